"""The figures of a memory, drawn from the numbers of `analysis.json`. matplotlib (extra `plot`) is imported when drawing."""
import math
import pathlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from memjax.runtime.analysis import bank_figures, learning_figures, lines, text
from memjax.runtime.analysis.lines import addressed, slotted, title_of

STYLE = {'font.size': 10, 'axes.titlesize': 11, 'axes.titleweight': 'bold', 'axes.titlelocation': 'left',
         'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': False, 'grid.color': '#e4e4e4', 'grid.linewidth': 0.8,
         'legend.frameon': False, 'legend.fontsize': 9, 'lines.linewidth': 1.8, 'figure.facecolor': 'white',
         'axes.prop_cycle': None, 'axes.axisbelow': True}
NO_SLOTS = 'no layer of this model has memory slots'
IN_PIECES = 'the router of this model sees the future: it cannot be read in pieces'
NO_CHAPTERS = 'no bank of this model has chapters'
NO_KEYS = 'no layer of this model reports the keys and addresses of its items'


class Kind(NamedTuple):
  """One figure: how it is drawn, its size in inches, and why it cannot be drawn from a report ('' if it can)."""
  draw: Callable[[Any, dict], None]
  size: Callable[[dict], tuple[float, float]]
  reason: Callable[[dict], str]


def draw_state_norms(figure: Any, report: dict) -> None:
  """Heat map: one row a layer and head, one column a slot, the norm of the slot before any norm."""
  from matplotlib.colors import LogNorm, Normalize
  layers = slotted(report)
  rows = [(title_of(layer) + (f', head {h}' if layer['heads'] > 1 else ''), norm)
          for layer in layers for h, norm in enumerate(layer['state_norm'])]
  width = max(len(norm) for _, norm in rows)
  grid = np.full((len(rows), width), np.nan)
  for number, (_, norm) in enumerate(rows): grid[number, :len(norm)] = norm
  axes = figure.subplots()
  top = max(float(np.nanmax(grid)), 1e-6)
  scale = LogNorm(max(float(np.nanmin(grid)), top / 1000), top) if np.nanmedian(grid) < top / 8 else Normalize(0, top)
  image = axes.imshow(grid, aspect='auto', cmap='viridis', norm=scale, interpolation='nearest')
  every = max(1, math.ceil(len(rows) / 24))
  axes.set_yticks(range(0, len(rows), every), [rows[n][0] for n in range(0, len(rows), every)], fontsize=8)
  axes.set_xticks(range(0, width, -(-width // 16)))
  for border in np.cumsum([layer['heads'] for layer in layers])[:-1]: axes.axhline(border - 0.5, color='white', linewidth=2)
  axes.set(xlabel='slot', title=f'Norm of each slot after {layers[0]["tokens"][-1]:,} tokens')
  axes.spines[:].set_visible(False)
  figure.colorbar(image, ax=axes, label='‖m‖ (before any norm)', pad=0.02)


def draw_slot_use(figure: Any, report: dict) -> None:
  """Use and pick of each slot by layer, and effective slots."""
  layers = addressed(report)[:4]
  axes = np.atleast_1d(figure.subplots(1, len(layers) + 1, width_ratios=[2] * len(layers) + [max(1.3, 0.35 * len(addressed(report)))]))
  for layer, place in zip(layers, axes, strict=False):
    use, slot = np.asarray(layer['use']).mean(0), np.arange(layer['slots'])
    place.bar(slot - 0.2, use, 0.4, color=lines.BLUE, label='written to')
    if 'pick' in layer: place.bar(slot + 0.2, np.asarray(layer['pick']).mean(0), 0.4, color=lines.ORANGE, label='read from')
    if np.isclose(use.sum(), 1, atol=0.02):
      place.axhline(1 / layer['slots'], color=lines.GREY, linewidth=1, linestyle='--', label='even share')
    place.set(title=title_of(layer), xlabel='slot', xlim=(-0.8, layer['slots'] - 0.2))
    place.set_xticks(range(0, layer['slots'], -(-layer['slots'] // 8)))
  tops = [place.get_ylim()[1] for place in axes[:-1]]
  alike = max(tops) < 3 * min(tops)                  # one scale for memories of one kind; shares and gates differ too much
  for place, top in zip(axes, tops, strict=False): place.set_ylim(0, 1.35 * (max(tops) if alike else top))
  for place in axes[1:-1]: place.tick_params(labelleft=not alike)
  axes[0].set_ylabel('share of address and pick')
  axes[0].legend(loc='upper right')
  lines.effective_bars(axes[-1], addressed(report))
  figure.suptitle('How the slots are used', x=0.01, ha='left', fontweight='bold')


def draw_layer_norms(figure: Any, report: dict) -> None:
  """Distributions over rows, heads and slots (state), and over rows and tokens (reads), by layer."""
  layers, slots = report['layers'], slotted(report)
  axes = np.atleast_1d(figure.subplots(1, 2 if slots else 1, width_ratios=[max(len(slots), 2), max(len(layers), 2)] if slots else None))
  if slots: lines.boxes(axes[0], [(layer['label'], layer['state_norm_spread']) for layer in slots], lines.BLUE)
  lines.boxes(axes[-1], [(layer['label'], layer['read_norm']) for layer in layers], lines.ORANGE)
  if slots: axes[0].set(title='Norms of the slots', ylabel='‖m‖', xlabel='layer')
  axes[-1].set(title='Norms of the reads', ylabel='‖y‖ before any norm', xlabel='layer')
  figure.supxlabel('box: middle half, whiskers: 5 % to 95 %', fontsize=8, color=lines.GREY)


def draw_memory_analysis(figure: Any, report: dict) -> None:
  """The first four figures on one sheet."""
  parts = figure.subfigures(2, 2, width_ratios=[1, 1.25], wspace=0.03, hspace=0.05)
  names = ['state_norms', 'slot_use', 'layer_norms', 'predictions']
  for part, name in zip(parts.ravel(), names, strict=True): FIGURES[name].draw(part, report)


def _banks(report: dict) -> int:
  return len(bank_figures.layers_of(report))


def _rows(report: dict) -> int:
  return sum(layer['heads'] for layer in slotted(report))


def _no_slots(has: Callable[[dict], Any]) -> Callable[[dict], str]:
  return lambda report: '' if has(report) else NO_SLOTS if report['in_pieces'] else IN_PIECES


def _unless(has: Callable[[dict], Any], reason: str) -> Callable[[dict], str]:
  return lambda report: '' if has(report) else reason


def _wide(report: dict) -> tuple[float, float]:
  return 3 + 2.9 * min(len(addressed(report)), 4), 3.6


FIGURES = {
    'state_norms': Kind(draw_state_norms, lambda r: (8, min(max(2.8, 1 + 0.25 * _rows(r)), 8)), _no_slots(slotted)),
    'slot_use': Kind(draw_slot_use, _wide, _no_slots(addressed)),
    'predictions': Kind(text.draw_predictions, text.size_of, _unless(lambda r: r['predictions']['target'], 'the text is empty')),
    'layer_norms': Kind(draw_layer_norms, lambda r: (9, 3.8), lambda r: ''),
    'cost': Kind(lines.draw_cost, lambda r: (12, 4), _unless(lambda r: r.get('cost'), 'not measured')),
    'capacity': Kind(lines.draw_capacity, lambda r: (3.2 + 3.2 * min(len(r['capacity']), 3), 4),
                     _unless(lambda r: r.get('capacity'), NO_KEYS)),
    'memory_over_time': Kind(lines.draw_memory_over_time, lambda r: (3.6 * min(len(slotted(r)), 4) + 1.2, 6.2), _no_slots(slotted)),
    'effective_slots': Kind(lines.draw_effective_slots, lambda r: (9, 3.8), _no_slots(addressed)),
    'loss_curve': Kind(lines.draw_loss_curve, lambda r: (8, 4.2),
                       _unless(lambda r: r['training']['loss']['value'], 'metrics.jsonl holds no loss')),
    'memory_analysis': Kind(draw_memory_analysis, lambda r: (18, 11), _no_slots(addressed)),
}

BANK_FIGURES = {
    'chapter_use': Kind(bank_figures.draw_chapter_use,
                        lambda r: (12 if bank_figures.routed(r) and bank_figures.with_values(r) else 9, 1.9 + 0.42 * max(_banks(r), 4)),
                        _unless(lambda r: bank_figures.routed(r) or bank_figures.with_values(r), NO_CHAPTERS)),
    'router_entropy': Kind(bank_figures.draw_router_entropy, lambda r: (12.5, 3.9),
                           lambda r: '' if r['training']['router'] and bank_figures.routed(r) else
                           'metrics.jsonl holds no router' if bank_figures.routed(r) else NO_CHAPTERS),
    'entry_attention': Kind(bank_figures.draw_entry_attention, lambda r: (10.5, 2.4 + 0.42 * max(_banks(r), 4)), lambda r: ''),
    'nearest_tokens': Kind(bank_figures.draw_nearest_tokens, lambda r: (1.2 + 4.6 * len(bank_figures.named_entries(r)), 4),
                           _unless(bank_figures.named_entries, 'every output projection is still zero')),
    'chapter_similarity': Kind(bank_figures.draw_chapter_similarity, lambda r: (1.2 + 4.4 * min(len(r['banks']['similarity']), 3), 4.6),
                               _unless(lambda r: r['banks']['similarity'], NO_CHAPTERS)),
}

NEURAL_FIGURES = {
    'surprise': Kind(learning_figures.draw_surprise, lambda r: learning_figures.size_of(r, 2), lambda r: ''),
    'learning': Kind(learning_figures.draw_learning, lambda r: learning_figures.size_of(r, 3), lambda r: ''),
}


def has_plot() -> bool:
  """Whether matplotlib can be imported."""
  try:
    import matplotlib  # noqa: F401
  except ImportError:
    return False
  return True


def draw(report: dict, folder: pathlib.Path) -> tuple[dict[str, str], dict[str, str]]:
  """({figure: file}, {figure left out: reason}); the files are PNG in the folder. Figures of banks are for models with
  banks, those of learning for models with neural memories."""
  from cycler import cycler
  from matplotlib import rc_context
  from matplotlib.figure import Figure
  drawn, skipped = {}, {}
  kinds = FIGURES | (BANK_FIGURES if report['banks'] else {}) | (NEURAL_FIGURES if learning_figures.learning(report) else {})
  with rc_context({**STYLE, 'axes.prop_cycle': cycler(color=lines.COLOURS)}), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Glyph .* missing')          # a box stands for what the font lacks
    for name, kind in kinds.items():
      if reason := kind.reason(report):
        skipped[name] = reason
        continue
      figure = Figure(figsize=kind.size(report), layout='constrained')
      kind.draw(figure, report)
      figure.savefig(folder / f'{name}.png', dpi=150)
      drawn[name] = f'{name}.png'
  return drawn, skipped
