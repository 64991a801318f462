"""The figures of memory banks, drawn from 'banks' and 'training' of `analysis.json`."""
import math
from typing import Any

import numpy as np

from memjax.runtime.analysis import text
from memjax.runtime.analysis.lines import BLUE, COLOURS, GREEN, GREY, MARKERS, ORANGE, PURPLE, title_of

WIDEST = 128           # chapters of a heat map; more are shown as curves over ranks
ROWS = 6               # entries with their nearest tokens in the figure


def layers_of(report: dict) -> list[dict]:
  """The layers that read banks."""
  return report.get('banks', {}).get('layers', [])


def routed(report: dict) -> list[dict]:
  """Those whose banks have chapters."""
  return [layer for layer in layers_of(report) if 'chapter_use' in layer]


def with_values(report: dict) -> list[dict]:
  """Those that read values by product keys."""
  return [layer for layer in layers_of(report) if 'value_use' in layer]


def named_entries(report: dict) -> list[dict]:
  """Those whose entries have nearest tokens: the first layer of each table, three at most."""
  first = {layer['table']: layer for layer in reversed(layers_of(report)) if layer['nearest']['entries']}
  return list(reversed(first.values()))[:3]


def _ranked(axes: Any, curves: list[tuple[str, dict]], even: float, label: str) -> None:
  """Falling curves over ranks on logarithmic axes, and the even share."""
  for number, (name, found) in enumerate(curves):
    value = np.asarray(found['value'])
    value = np.where(value > 0, value, np.nan)
    axes.plot(found['rank'], value, color=COLOURS[number % 7], marker=MARKERS[number % 7], markersize=4, markevery=0.12, label=name)
  if even: axes.axhline(even, color=GREY, linestyle='--', linewidth=1.2, label=label)
  axes.set(xscale='log', yscale='log')
  axes.xaxis.set_major_formatter(lambda x, _: f'{x:,.0f}' if x >= 1 else '')
  axes.grid()
  axes.legend(loc='lower left', fontsize=8)


def _bars(axes: Any, layers: list[dict], columns: dict[str, tuple[str, str]]) -> None:
  """Groups of horizontal bars, a group a layer, from the top down."""
  height = 0.8 / len(columns)
  for number, (key, (name, colour)) in enumerate(columns.items()):
    value = [layer[key] for layer in layers]
    axes.barh(np.arange(len(layers)) + (number - (len(columns) - 1) / 2) * height, value, 0.9 * height, color=colour, label=name)
  axes.set_yticks(range(len(layers)), [layer['label'] for layer in layers], fontsize=8)
  axes.set_ylim(len(layers) - 0.4, -0.6)
  axes.grid(axis='x')


def draw_chapter_use(figure: Any, report: dict) -> None:
  """Share of the tokens that read each chapter, by layer, beside coverage and Gini; values of product keys by rank."""
  layers, values = routed(report), with_values(report)
  panels = figure.subplots(1, bool(layers) + bool(values) + 1, width_ratios=[2.6] * (bool(layers) + bool(values)) + [1.2], squeeze=False)[0]
  if layers and max(layer['chapters'] for layer in layers) <= WIDEST: _chapter_map(figure, panels[0], layers)
  elif layers:
    curves = [(title_of(layer), ranked(layer['chapter_use'][layer['shared']:])) for layer in layers[:6]]
    even = layers[0]['top_k'] / (layers[0]['chapters'] - layers[0]['shared'])
    _ranked(panels[0], curves, even, 'even use')
    panels[0].set(title='Tokens that read each chapter', xlabel='chapter by rank', ylabel='share of the tokens')
  if values:
    axes = panels[int(bool(layers))]
    _ranked(axes, [(title_of(layer), layer['value_use']) for layer in values[:6]], values[0]['active_entries'] / values[0]['entries'],
            'even use')
    axes.set(title='Reads of each value', xlabel='value by rank', ylabel='reads a token')
  _bars(panels[-1], layers + values, {'coverage': ('coverage', GREEN), 'gini': ('Gini', ORANGE)})
  panels[-1].set(title='How even', xlabel='0 … 1', xlim=(0, 1))
  panels[-1].legend(loc='upper center', bbox_to_anchor=(0.5, -0.24), ncols=2, fontsize=8)


def ranked(value: list[float]) -> dict[str, list]:
  """A curve over all ranks."""
  return {'rank': list(range(1, len(value) + 1)), 'value': sorted(value, reverse=True)}


def _chapter_map(figure: Any, axes: Any, layers: list[dict]) -> None:
  width = max(layer['chapters'] for layer in layers)
  grid = np.full((len(layers), width), np.nan)
  for number, layer in enumerate(layers): grid[number, layer['shared']:layer['chapters']] = layer['chapter_use'][layer['shared']:]
  image = axes.imshow(grid, aspect='auto', cmap='viridis', vmin=0, vmax=max(float(np.nanmax(grid)), 1e-6), interpolation='nearest')
  shared = max(layer['shared'] for layer in layers)
  if shared:
    axes.axvspan(-0.5, shared - 0.5, facecolor='#e4e4e4', edgecolor='none')
    axes.text((shared - 1) / 2, (len(layers) - 1) / 2, 'shared', rotation=90, ha='center', va='center', fontsize=8, color=GREY)
  axes.set_yticks(range(len(layers)), [title_of(layer) for layer in layers], fontsize=8)
  axes.set_xticks(range(0, width, -(-width // 16)))
  for border in range(1, len(layers)): axes.axhline(border - 0.5, color='white', linewidth=2)
  axes.spines[:].set_visible(False)
  axes.set(title='Tokens that read each chapter', xlabel='chapter')
  even = sorted({layer['top_k'] / (layer['chapters'] - layer['shared']) for layer in layers})
  bar = figure.colorbar(image, ax=axes, label=f'share of the tokens (white line: even, {", ".join(f"{x:.2g}" for x in even)})', pad=0.02)
  for share in even: bar.ax.axhline(share, color='white', linewidth=2)


def draw_router_entropy(figure: Any, report: dict) -> None:
  """Entropies of the router, use of the chapters and router losses over training, means of the layers."""
  router = report['training']['router']
  losses = {f'router_{name}': name for name in ('balance', 'auxiliary', 'z') if f'router_{name}' in router}
  panels = figure.subplots(1, 2 + bool(losses))
  def plot(axes, columns):
    for number, (key, name) in enumerate(columns.items()):
      if key in router: axes.plot(router[key]['step'], router[key]['value'], color=(BLUE, ORANGE, PURPLE)[number], label=name,
                                  marker='o' if len(router[key]['step']) < 40 else None, markersize=3)
    axes.set_xlabel('step')
    axes.grid()
  plot(panels[0], {'router_entropy': 'of a token, mean', 'router_mean_entropy': 'of the mean of all tokens'})
  ceilings = sorted({layer['chapters'] - layer['shared'] for layer in routed(report)})
  for chapters in ceilings:
    panels[0].axhline(math.log(chapters), color=GREY, linestyle='--', linewidth=1.2, label=f'even over {chapters:,} chapters')
  top = math.log(ceilings[-1])
  low = min(0.95 * top, *(min(router[key]['value']) for key in ('router_entropy', 'router_mean_entropy') if key in router))
  low = max(0.0, low - 0.2 * (top - low))
  panels[0].set(title="Entropy of the router's choice", ylabel='nats', ylim=(low, top + 0.4 * max(top - low, 0.1)))
  plot(panels[1], {'chapter_coverage': 'chapters in use', 'chapter_gini': 'Gini of their use', 'top_share': 'share of the busiest'})
  panels[1].set(title='Use of the chapters', ylabel='0 … 1', ylim=(0, 1.3))
  panels[1].set_yticks(np.linspace(0, 1, 6))
  if losses:
    plot(panels[2], losses)
    if 'router_balance' in losses: panels[2].axhline(1, color=GREY, linestyle='--', linewidth=1.2, label='balanced')
    panels[2].set(title='Router losses', ylabel='before their weights')
    panels[2].set_ylim(0, 1.25 * panels[2].get_ylim()[1])
  for axes in panels: axes.legend(loc='upper right', fontsize=8)


def draw_entry_attention(figure: Any, report: dict) -> None:
  """Attention of each entry by rank, and how many entries that makes, by layer."""
  layers = layers_of(report)
  left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
  sizes = {layer['entries'] for layer in layers}
  _ranked(left, [(title_of(layer), layer['attention']) for layer in layers[:6]], 1 / sizes.pop() if len(sizes) == 1 else 0, 'even share')
  left.set(title='Attention of each entry', xlabel='entry by rank', ylabel='share of all attention')
  top = left.get_ylim()[1]
  left.set_ylim(bottom=max(left.get_ylim()[0], top * 1e-7))
  _bars(right, layers, {'effective_entries': ('effective (exp of the entropy)', GREEN), 'active_entries': ('read by one token', ORANGE),
                        'entries': ('in the table', GREY)})
  right.set(title='Entries', xscale='log', xlabel='entries', xlim=(0.8, 3 * max(layer['entries'] for layer in layers)))
  right.xaxis.set_major_formatter(lambda x, _: f'{x:,.0f}' if x >= 1 else '')
  right.minorticks_off()
  right.legend(loc='upper center', bbox_to_anchor=(0.5, -0.16), ncols=1, fontsize=8)


def draw_nearest_tokens(figure: Any, report: dict) -> None:
  """A table a layer: the entries with most attention and their nearest tokens, shaded by cosine."""
  from matplotlib.cm import ScalarMappable
  from matplotlib.colors import Normalize
  from matplotlib.patches import Rectangle
  layers = named_entries(report)
  top = max(max(entry['cosine']) for layer in layers for entry in layer['nearest']['entries'][:ROWS])
  scale = ScalarMappable(Normalize(0, max(top, 1e-3)), 'Blues')
  panels = figure.subplots(1, len(layers), squeeze=False)[0]
  for layer, axes in zip(layers, panels, strict=True):
    shown = layer['nearest']['entries'][:ROWS]
    for row, entry in enumerate(shown):
      for column, (token, cosine) in enumerate(zip(entry['tokens'], entry['cosine'], strict=True)):
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=scale.to_rgba(cosine), edgecolor='white', linewidth=1.5))
        colour = 'white' if cosine > 0.6 * scale.norm.vmax else 'black'
        axes.text(column + 0.5, row + 0.4, text.shown(token), ha='center', va='center', fontsize=9, family='monospace', color=colour,
                  parse_math=False)
        axes.text(column + 0.5, row + 0.78, f'{cosine:.2f}', ha='center', va='center', fontsize=6, color=colour)
    axes.set(xlim=(0, len(shown[0]['tokens'])), ylim=(len(shown), 0), title=title_of(layer))
    axes.set_xlabel(f'by cosine with {layer["nearest"]["of"]}', fontsize=7, color=GREY)
    axes.set_yticks(np.arange(len(shown)) + 0.5, [f'entry {e["entry"]:,}\n{100 * e["share"]:.2g} %' for e in shown], fontsize=8)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
  figure.colorbar(scale, ax=panels.tolist(), label='cosine', pad=0.01, aspect=30)
  figure.suptitle('Tokens nearest to the entries with most attention', x=0.01, ha='left', fontweight='bold')


def draw_chapter_similarity(figure: Any, report: dict) -> None:
  """Cosine of the mean entries of each pair of chapters, a map a table."""
  tables = report['banks']['similarity'][:3]
  panels = figure.subplots(1, len(tables), squeeze=False)[0]
  grids = [np.asarray(table['cosine']) for table in tables]
  limit = max(0.05, *(float(np.abs(grid - np.diag(np.diag(grid))).max()) for grid in grids))
  for table, grid, axes in zip(tables, grids, panels, strict=True):
    image = axes.imshow(grid, cmap='RdBu_r', vmin=-limit, vmax=limit, interpolation='nearest')
    ticks = range(0, len(grid), -(-len(grid) // 8))
    labels = [table['shown'][n] for n in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    some = '' if len(grid) == table['chapters'] else f' (the {len(grid)} most read of {table["chapters"]:,})'
    axes.set(title=f'{table["table"]}, mean {table["mean"]:+.3f}', xlabel=f'chapter{some}', ylabel='chapter')
    axes.spines[:].set_visible(False)
  figure.colorbar(image, ax=panels.tolist(), label='cosine of their mean entries', pad=0.02)
  figure.suptitle('Similarity of the chapters', x=0.01, ha='left', fontweight='bold')
