"""Looks into the memory of a trained model: figures as PNG and every number in analysis.json, under W/analysis.

  python -m memjax.analyze --workdir runs/default

Figures: state_norms, slot_use, predictions, layer_norms (and the four on one sheet, memory_analysis), cost (measured here and now),
capacity, memory_over_time, effective_slots, loss_curve; for banks chapter_use, router_entropy, entry_attention, nearest_tokens,
chapter_similarity, and their footprint in analysis.json; for neural memories surprise and learning. Those that do not apply are named in
analysis.json with the reason. Without the extra `plot` only analysis.json is written. The last line of stdout is the folder.
"""
import os
import sys

from memjax.config.flags import Flag, run

FLAGS = (
    Flag('workdir', str, None, 'folder of the training run'),
    Flag('step', int, 0, 'checkpoint; 0 = the best, else the newest', low=0),
    Flag('split', str, 'val', 'split of the corpus that is read', choices=('train', 'val', 'test')),
    Flag('text', str, '', 'UTF-8 file that is read instead of a split'),
    Flag('rows', int, 4, 'pieces of the text', low=1),
    Flag('tokens', int, 512, 'tokens of each piece', low=2),
    Flag('cost', bool, True, 'measures time and bytes of one layer against attention; --nocost leaves it out'),
    Flag('lengths', tuple[int, ...], (128, 512, 1024), 'tokens at which they are measured, as 128,512', low=2),
)


def main(config, values) -> None:
  """Writes the analysis; UserError for whatever is wrong with the run or the text."""
  del config
  from memjax.runtime.analysis.report import write_analysis
  from memjax.runtime.reading import open_run, read_tokens
  found = open_run(values['workdir'], values['step'])
  tokens = read_tokens(found, values['split'], values['text'])
  lengths = tuple(sorted(set(values['lengths']))) if values['cost'] else ()
  folder, _ = write_analysis(found, tokens, rows=values['rows'], length=values['tokens'], lengths=lengths)
  sys.stdout.write(f'{os.path.abspath(folder)}\n')


if __name__ == '__main__': run(main, flags=FLAGS, takes_config=False)
