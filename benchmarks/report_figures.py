"""The figures of docs/numbers.md and the README, drawn from the JSON of the benchmarks."""
import pathlib
from typing import Any

from benchmarks import report_context, report_hosts, report_neural

STYLE = {                                   # Okabe and Ito: told apart by colour-blind readers, and by marker
  'black': ('#000000', 's'), 'blue': ('#0072B2', 'o'), 'orange': ('#D55E00', '^'), 'green': ('#009E73', 'D'), 'pink': ('#CC79A7', 'v'),
  'sky': ('#56B4E9', 'P'), 'yellow': ('#E69F00', 'X'), 'grey': ('#777777', '*'),
}
RC = {'font.size': 11, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'grid.color': '#e4e4e4',
      'axes.axisbelow': True, 'axes.titlesize': 12, 'legend.frameon': False, 'lines.linewidth': 2, 'lines.markersize': 6.5}
FAMILIES = {                                # of recall: label -> (colour, whether a row belongs to it)
  'holographic, small_state': ('blue', lambda row: row == 'small_state' or row.startswith('small_state, ')),
  'holographic, default': ('sky', lambda row: row == 'holographic'),
  'linear attention': ('orange', lambda row: row.startswith('linear') and 'norm' not in row),
  'delta rule': ('green', lambda row: row.startswith('delta') and 'norm' not in row),
  'window attention': ('pink', lambda row: row.startswith('window')),
  'full attention': ('black', lambda row: row == 'attention'),
}
MODELS = {'attention': 'full attention', 'hybrid': 'hybrid', 'holographic': 'holographic', 'hybrid, no binding': 'hybrid,\nno binding'}


def preferred(results: dict[str, dict[str, Any]], kind: str, key: str = 'rows') -> dict[str, Any] | None:
  """The result of one benchmark, that of an accelerator before that of a CPU; None where there is none."""
  found = [r for r in results.values() if r['benchmark'] == kind and r.get(key)]
  return min(found, key=lambda r: r.get('machine', {}).get('platform') == 'cpu') if found else None


def mixing(results, figure) -> bool:
  """Milliseconds of forward + backward against tokens a row; whether there was anything to draw."""
  result = preferred({n: r for n, r in results.items() if r.get('machine', {}).get('platform') == 'gpu'}, 'holographic')
  if result is None: return False
  rows = [r for r in result['rows'] if r['pass'] == 'both' and (r['automatic'] or r['row'] == 'attention')]
  axes, size = figure.subplots(), rows[0]
  lines = {'attention': ('softmax attention (cuDNN)', 'black'), 'convolution dft': ('holographic, circular convolution', 'orange'),
           'elementwise': ('holographic, elementwise binding', 'blue')}
  for start, (label, colour) in lines.items():
    mine = sorted((r['L'], r['ms']) for r in rows if r['row'].startswith(start))
    axes.plot(*zip(*mine, strict=True), color=STYLE[colour][0], marker=STYLE[colour][1], label=label)
    axes.annotate(f'{mine[-1][1]:.3g} ms', mine[-1], (9, 0), textcoords='offset points', va='center', color=STYLE[colour][0])
  lengths, ticks = sorted({r['L'] for r in rows}), (2, 5, 10, 20, 40)
  axes.set(xscale='log', yscale='log', xlabel='tokens a row', ylabel='ms, forward + backward', ylim=(1.7, 50),
           xlim=(lengths[0] * 0.85, lengths[-1] * 1.7),
           title=f'Mixing {size["B"] * size["L"]:,} tokens, {size["H"]} x {size["K"]} channels, {size["S"]} slots a head, '
                 f'{result["dtype"]}, one {result["machine"]["device"].removeprefix("NVIDIA ")}')
  axes.set_xticks(lengths, [f'{n:,}' for n in lengths])
  axes.set_yticks(ticks, [str(n) for n in ticks])
  axes.minorticks_off()
  axes.legend(loc='upper left')
  return True


def recall(results, figure) -> bool:
  """Accuracy against state, the memory alone and all bytes carried; dots are seeds."""
  result = preferred({n: r for n, r in results.items() if any(row.get('setting') == 'curve' for row in r.get('rows', []))}, 'recall')
  if result is None: return False
  panels = figure.subplots(1, 2, sharey=True)
  pairs = result['settings']['curve'][1]
  for axes, size in zip(panels, (lambda r: 4 * r['state_floats'], lambda r: r['state_bytes']), strict=True):
    for label, (colour, belongs) in FAMILIES.items():
      rows = sorted((r for r in result['rows'] if r['setting'] in ('equal', 'curve') and belongs(r['row'])), key=size)
      if not rows: continue
      shade, marker = STYLE[colour]
      axes.plot([size(r) for r in rows], [r['accuracy'] for r in rows], color=shade, marker=marker, label=label)
      for r in rows: axes.plot([size(r)] * len(r['seeds']), r['seeds'], '.', color=shade, alpha=0.45, markersize=4)
    axes.axhline(1 / pairs, color='#777777', linewidth=1, linestyle='--')
    axes.set(xscale='log', ylim=(-0.02, 1.03))
    ticks = [n for n in (256, 1024, 4096, 16384) if axes.get_xlim()[0] <= n <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f'{n / 1024:g} KiB' for n in ticks], fontsize=10)
    axes.minorticks_off()
  panels[0].set(xlabel='the memory itself, a layer', ylabel='accuracy at the queries', title='State of the memory')
  panels[1].set(xlabel='all bytes carried, a layer', title='... with short-convolution tail')
  panels[1].annotate('guessing among the values', (1, 1 / pairs), (-2, 3), xycoords=panels[1].get_yaxis_transform(),
                     textcoords='offset points', ha='right', fontsize=9, color='#555555')
  figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
  return True


def language(results, figure) -> bool:
  """Test scores by model, a dot a seed and a bar at the mean: bits per byte of bytes, perplexity of words."""
  texts: dict[str, list] = {}
  for result in results.values():
    if not result['benchmark'].startswith('language-') or result.get('machine', {}).get('platform') != 'gpu': continue
    texts.setdefault(result['benchmark'].split('-')[1], []).append(result)
  if not texts: return False
  for axes, (name, found) in zip(figure.subplots(1, len(texts), squeeze=False)[0], sorted(texts.items()), strict=True):
    is_words = found[0]['options']['tokens'] == 'words'
    score = 'perplexity' if is_words else 'bits_per_byte'
    rows = {row['model']: row for result in found for row in result['rows']}
    order = [model for model in MODELS if model in rows]
    for i, model in enumerate(order):
      colour, marker = STYLE['black' if model == 'attention' else 'blue' if 'no binding' not in model else 'orange']
      axes.plot([i - 0.28, i + 0.28], [rows[model][score]] * 2, color=colour)
      axes.plot([i + 0.12 * (n - 1) for n in range(len(rows[model][f'{score}_seeds']))], rows[model][f'{score}_seeds'], marker,
                color=colour, alpha=0.6)
      label = f'{rows[model][score]:#.{3 if is_words else 4}g}'.rstrip('.')
      top = max(rows[model][f'{score}_seeds'])
      axes.annotate(label, (i, top), (0, 9), textcoords='offset points', ha='center', fontsize=10, color=colour)
    axes.set_xticks(range(len(order)), [MODELS[model] for model in order], fontsize=9.5)
    title = {'shakespeare': 'Shakespeare, bytes', 'wikitext2': 'WikiText-2, words'}.get(name, name)
    axes.margins(y=0.12)
    axes.set(xlim=(-0.6, len(order) - 0.4), ylabel='test perplexity' if is_words else 'test bits per byte',
             title=f'{title}, {rows[order[0]]["parameters"] / 1e6:.2g}M parameters')
    axes.grid(axis='x', visible=False)
  return True


def banks(results, figure) -> bool:
  """For each text validation loss over steps and test scores; a cross is a leaking router once it is causal."""
  found = {r['options']['name']: r for r in results.values() if r['benchmark'].startswith('banks-') and r['machine']['platform'] == 'gpu'}
  if not found: return False
  colours = dict(zip(('bank, token', 'vanilla, equal parameters', 'vanilla, equal FLOPs', 'bank, sequence'), STYLE.values(), strict=False))
  panels = figure.subplots(len(found), 2, squeeze=False, width_ratios=(3, 2))
  for (curves, scores), (name, result) in zip(panels, sorted(found.items()), strict=True):
    rows = [r for r in result['rows'] if r['model'] in colours]
    words = result['options']['tokens'] == 'words'
    seeds, causal = ('perplexity_seeds', 'causal_perplexity') if words else ('bits_per_byte_seeds', 'causal_bits_per_byte')
    for place, row in enumerate(rows):
      colour, marker = colours[row['model']]
      mean = [sum(p['valid']) / len(p['valid']) for p in row['curve']]
      curves.plot([p['step'] for p in row['curve']], mean, color=colour, marker=marker, label=row['model'])
      scores.plot([place] * len(row[seeds]), row[seeds], marker, color=colour, linestyle='none')
      if causal not in row: continue
      scores.plot(place, row[causal], 'x', color=colour, markersize=11, markeredgewidth=3, label='routed by the past alone')
    curves.set(title=f'{name}: validation', xlabel='step', ylabel='nats a token')
    scores.set(title=f'{name}: test', ylabel='perplexity' if words else 'bits per byte', xlim=(-0.5, len(rows) - 0.5))
    scores.set_xticks(range(len(rows)), [r['model'].replace(', ', ',\n').replace('equal ', 'equal\n') for r in rows], fontsize=9)
    curves.legend(fontsize=9)
    scores.legend(fontsize=9)
  return True


def adapters(results, figure) -> bool:
  """What a pretrained host learned and forgot."""
  return report_hosts.draw(results, figure, preferred, STYLE)


def context(results, figure) -> bool:
  """What a layer costs up to a million tokens."""
  return report_context.draw(results, figure, STYLE)


def needle(results, figure) -> bool:
  """Needles found by length."""
  return report_neural.draw_needle(results, figure, STYLE)


def titans(results, figure) -> bool:
  """How models of text with memories that learn train."""
  return report_neural.draw_titans(results, figure, STYLE)


DRAWINGS = {'mixing': (mixing, (8, 4.2)), 'recall': (recall, (8, 4.6)), 'language': (language, (8, 3.9)), 'banks': (banks, (9, 7)),
            'adapters': (adapters, (8, 4)), 'context': (context, (10, 4.2)), 'needle': (needle, (10, 4.4)), 'titans': (titans, (9, 4.4))}


def draw_all(results: dict[str, dict[str, Any]], folder: pathlib.Path) -> list[str]:
  """Names of the figures that were drawn, FOLDER/name.png."""
  from matplotlib import rc_context
  from matplotlib.figure import Figure
  folder.mkdir(parents=True, exist_ok=True)
  drawn = []
  for name, (draw, size) in DRAWINGS.items():
    with rc_context(RC):
      figure = Figure(figsize=size, layout='constrained')
      if not draw(results, figure): continue
      figure.savefig(folder / f'{name}.png', dpi=200, metadata={'Software': None})
      drawn.append(name)
  return drawn
