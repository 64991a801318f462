"""The section of docs/numbers.md on pretrained hosts: what memories and low-rank changes learn, and what is forgotten."""
from typing import Any

ABOUT = {
  'Adapters': 'A pretrained host, frozen, with what is trained beside it (`benchmarks/adapters.py`): a memory bank after every fifth '
              'layer, LoRA on queries and values, or half of each. Perplexity a token on held-out text of the domain that was trained '
              'on, and of another one, where a rise would be forgetting. The rates of each row were chosen by validation.',
  'Pretrained decoding': 'Greedy decoding with a pretrained host beside transformers in the same run, with the same weights, prompts and '
                         'threads (`benchmarks/decode_host.py`). The floor is the time in which the weights can be read once.',
}
CAPTIONS = {'adapters': 'Perplexity of a pretrained host before and after training a memory, LoRA or both'}
TITLES = {'host': 'host as it is', 'memory': 'memory bank', 'lora': 'LoRA', 'both': 'both, half of each'}


def adapters(result: dict[str, Any], table, cell) -> list[str]:
  """A row each way of training, mean of the seeds."""
  o, (target, other) = result['options'], result['texts']
  text = (f'{result["host"]}, {o["steps"]:,} steps of {o["batch"]} x {o["length"]} tokens of {target}, warm-up {o["warmup"]}; '
          f'rates of the configs times {", ".join(f"{f:g}" for f in o["factors"])} tried.')
  def seeds(row, text):
    runs = [run for run in result['runs'] if run['model'] == row['model'] and run['factor'] == row.get('factor')]
    return ', '.join(cell(run['after'][text]['perplexity'], 4) for run in runs) or None
  columns = {
      'trained': lambda r: TITLES[r['model']], 'parameters trained': 'trained',
      'rates times': lambda r: f'{r["factor"]:g}' if 'factor' in r else None,
      f'{target} valid': lambda r: cell(r['valid'], 4), f'{target} test': lambda r: cell(r['target'], 4),
      'of the seeds': lambda r: seeds(r, 'target'), f'{other} test': lambda r: cell(r['other'], 4),
      'of the seeds ': lambda r: seeds(r, 'other'), 'tokens/s': 'tokens_per_second'}
  return [text, *table(result['rows'], columns)]


def decode_host(result: dict[str, Any], table, cell) -> list[str]:
  """A row each implementation, batch and prompt."""
  versions = ', '.join(f'{name} {version}' for name, version in result['versions'].items())
  text = (f'{result["model"]}, {result["dtype"]}: {result["weight_bytes"] / 1e6:.0f} MB of weights, read at '
          f'{result["read_bytes_per_second"] / 1e9:.1f} GB/s in {result["floor_ms"]:.1f} ms a step at best. {versions}.')
  return [text, *table(result['rows'], {
      'prompt': 'prompt', 'batch': 'batch', 'row': 'row', 'prefill ms': 'prefill_ms', 'ms a step': 'ms_per_step',
      'tokens/s': 'tokens_per_second', 'fastest': 'best', 'same tokens': lambda r: cell(r['same_tokens'])})]


def draw(results: dict[str, dict[str, Any]], figure, preferred, style) -> bool:
  """Two groups of bars, the text that was trained on and the other; whether there was anything to draw."""
  result = preferred(results, 'adapters')
  if result is None: return False
  axes, rows = figure.subplots(), result['rows']
  for number, (row, colour) in enumerate(zip(rows, ('black', 'blue', 'orange', 'green'), strict=False)):
    at = [group + (number - 1.5) * 0.2 for group in (0, 1)]
    axes.bar(at, [row['target'], row['other']], width=0.18, color=style[colour][0], label=TITLES[row['model']])
    for x, key in zip(at, ('target', 'other'), strict=True):
      axes.annotate(f'{row[key]:.1f}', (x, row[key]), (0, 3), textcoords='offset points', ha='center', fontsize=9)
      runs = [run for run in result['runs'] if run['model'] == row['model'] and run['factor'] == row.get('factor')]
      axes.plot([x] * len(runs), [run['after'][key]['perplexity'] for run in runs], '.', color='#333333', markersize=4)
  axes.set_xticks((0, 1), [f'{result["texts"][0]}, trained on', f'{result["texts"][1]}, not trained on'])
  axes.set(ylabel='perplexity a token, held-out text', ylim=(0, 1.3 * max(row['target'] for row in rows)))
  axes.set_title(f'{result["host"].partition(".")[0]}, frozen, about {rows[1]["trained"] / 1e6:.1f} M parameters trained; dots are seeds')
  axes.grid(axis='x', visible=False)
  axes.legend(ncols=4, loc='upper center')
  return True


def smollm2(result, _):
  """What the comparison on SmolLM2 says."""
  rows = {row['model']: row for row in result['rows']}
  target = lambda name: f'{rows[name]["target"]:.2f}'
  edge = all(row['factor'] == max(result['options']['factors']) for name, row in rows.items() if name != 'host')
  others = [rows[name]['other'] for name in TITLES if name != 'host']
  return (f'**The memory learns the new domain, and LoRA learns it better at about equal size:** perplexity {target("host")} before, '
          f'{target("memory")} with the bank, {target("lora")} with LoRA, {target("both")} with half of each; the seeds differ by '
          f'{max(row.get("target_spread", 0) for row in rows.values()):.2f} at most. None forgets the other text: '
          f'{rows["host"]["other"]:.2f} before, {min(others):.2f} to {max(others):.2f} after. One host, one pass over the text.'
          + (' All three do best with the highest rate that was tried, so the best rate may be higher still.' if edge else ''))


READINGS = {('Adapters', 'adapters-h200'): smollm2}
