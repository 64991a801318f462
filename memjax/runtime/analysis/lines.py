"""Figures of curves, bars and boxes. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""
from typing import Any

import numpy as np

BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, GREY = (
    '#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#F0E442', '#6e6e6e')
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
CLAIM = 10.5 / 1024 ** 2       # FLOPs saved that the original claims at 1,024 tokens, over tokens squared
MARKERS = 'os^Dvph'


def slotted(report: dict) -> list[dict]:
  """The memories with slots."""
  return [layer for layer in report['layers'] if 'state_norm' in layer]


def addressed(report: dict) -> list[dict]:
  """Those that also report how their slots are used."""
  return [layer for layer in slotted(report) if 'use' in layer]


def title_of(layer: dict) -> str:
  """'layer 3 mem'."""
  return f'layer {layer["label"]}'


def boxes(axes: Any, rows: list[tuple[str, list[float]]], colour: str) -> None:
  """Box plots from quantiles at 5, 25, 50, 75 and 95 %."""
  most = max(spread[-1] for _, spread in rows)
  log = min(spread[2] for _, spread in rows) < most / 30
  if log: rows = [(label, [max(x, most / 1e4) for x in spread]) for label, spread in rows]
  stats = [dict(zip(('whislo', 'q1', 'med', 'q3', 'whishi'), spread, strict=True), label=label, fliers=[]) for label, spread in rows]
  drawn = axes.bxp(stats, showfliers=False, patch_artist=True, widths=0.6, medianprops={'color': 'black', 'linewidth': 1.6})
  for box in drawn['boxes']: box.set(facecolor=colour, alpha=0.75, edgecolor='none')
  axes.grid(axis='y')
  if log: axes.set_yscale('log')
  else: axes.set_ylim(bottom=0)
  axes.tick_params('x', labelrotation=90 if len(rows) > 8 else 0, labelsize=8)


def effective_bars(axes: Any, layers: list[dict]) -> None:
  """Effective slots of each layer (bar) and head (dot), and how many there are."""
  for number, layer in enumerate(layers):
    by_head = np.asarray(layer['effective_slots'])
    axes.bar(number, by_head.mean(), 0.6, color=GREEN, alpha=0.6, label='mean of the heads' if number == 0 else None)
    spread = np.linspace(-0.15, 0.15, len(by_head)) if len(by_head) > 1 else [0]
    axes.plot(number + np.asarray(spread), by_head, 'o', color='black', markersize=3, label='one head' if number == 0 else None)
    axes.plot([number - 0.4, number + 0.4], [layer['slots']] * 2, color=RED, linestyle='--', linewidth=1.4,
              label='all slots' if number == 0 else None)
  axes.set_xticks(range(len(layers)), [layer['label'] for layer in layers], fontsize=8, rotation=90 if len(layers) > 4 else 0)
  axes.set(title='Effective slots', xlabel='layer', ylabel='S_eff', ylim=(0, 1.45 * max(layer['slots'] for layer in layers)))
  axes.grid(axis='y')
  axes.legend(loc='upper right', fontsize=8)


def draw_effective_slots(figure: Any, report: dict) -> None:
  """S_eff over training (mean of the layers), and of each layer and head now."""
  training, layers = report['training'], addressed(report)
  past, now = figure.subplots(1, 2, width_ratios=[1.4, 1])
  series = training['effective_slots']
  if series['value']: past.plot(series['step'], series['value'], color=GREEN, marker='o', markersize=3)
  else: past.text(0.5, 0.5, 'not in metrics.jsonl', ha='center', color=GREY, transform=past.transAxes)
  top = max(layer['slots'] for layer in layers)
  past.axhline(top, color=RED, linestyle='--', linewidth=1.4, label='all slots')
  past.set(title='Effective slots over training', xlabel='step', ylabel='S_eff, mean of the layers', ylim=(0, 1.1 * top))
  past.grid(axis='y')
  past.legend(loc='lower right')
  effective_bars(now, layers)
  now.set_title('At this checkpoint')


def draw_loss_curve(figure: Any, report: dict) -> None:
  """Training and held-out loss of one run, with the loss of guessing."""
  training, axes = report['training'], figure.subplots()
  axes.plot(training['loss']['step'], training['loss']['value'], color=BLUE, linewidth=1.2, label='training')
  if training['eval']['value']:
    axes.plot(training['eval']['step'], training['eval']['value'], color=ORANGE, marker='o', markersize=4, label='held out')
  if training['test'] is not None:
    axes.plot([report['step']], [training['test']], '*', color=RED, markersize=12, label=f'test {training["test"]:.3f}')
  axes.axhline(training['guess'], color=GREY, linestyle='--', linewidth=1, label=f'guessing, {training["guess"]:.2f}')
  name = report['name'] or report['config']
  axes.set(title=f'Loss of {name} (config {report["config"]})', xlabel='step', ylabel='nats per token')
  axes.set_ylim(bottom=0)
  axes.grid()
  axes.legend(loc='upper right', bbox_to_anchor=(1, 0.94))


def draw_cost(figure: Any, report: dict) -> None:
  """Milliseconds and bytes of one layer against the length of the text, on logarithmic axes."""
  from matplotlib.ticker import LogLocator
  cost = report['cost']
  length, panels = np.asarray(cost['lengths']), figure.subplots(1, 3)
  for axes, key, unit in zip(panels, ('ms', 'temporary_bytes', 'state_bytes'), (1, 2 ** 20, 2 ** 10), strict=True):
    for number, (name, row) in enumerate(cost['memories'].items()):
      y = np.maximum(np.asarray(row[key], float) / unit, 1e-3)
      axes.plot(length, y, color=COLOURS[number % 7], marker=MARKERS[number % 7], markersize=5, label=name)
    axes.set(xscale='log', yscale='log', xlabel='tokens')
    axes.set_xticks(length, [f'{n:,}' for n in length])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.grid()
  full = next((row for row in cost['memories'].values() if row['kind'] == 'attention'), None)
  claim = CLAIM * length.astype(float) ** 2
  if full is not None and (claim >= 1).sum() > 1:
    chosen = claim >= 1
    panels[0].plot(length[chosen], np.asarray(full['ms'])[chosen] / claim[chosen], color=GREY, linestyle='--', linewidth=1.2,
                   label="original's claim\n(attention / FLOPs saved)")
  panels[0].set(title='Time, forward and gradient', ylabel='ms per row')
  panels[1].set(title='Temporaries of the gradient', ylabel='MiB per row')
  panels[2].set(title='State that decoding carries', ylabel='KiB per row')
  panels[0].set_ylim(top=8 * panels[0].get_ylim()[1])
  panels[0].legend(loc='upper left')
  figure.suptitle(f'Measured cost of one layer, D = {cost["width"]}, on {cost["device"]}', x=0.01, ha='left', fontweight='bold')


def draw_capacity(figure: Any, report: dict) -> None:
  """Recall against the number of stored pairs, by layer: measured and by the formula."""
  layers = list(report['capacity'].items())[:3]
  panels = np.atleast_1d(figure.subplots(1, len(layers), sharey=True))
  for (label, found), axes in zip(layers, panels, strict=True):
    pairs = found['pairs']
    axes.plot(pairs, found['theory_ideal'], color=GREY, linestyle='--', linewidth=1.2, label=f'theory, {found["state_floats"]:,} floats')
    axes.plot(pairs, found['random'], 's', color=SKY, markersize=6, label='random keys')
    axes.plot(pairs, found['theory'], color=BLUE, linestyle=':', linewidth=1.8, label=f'theory, {found["floats"]:,} effective')
    axes.plot(pairs, found['trained'], 'o-', color=RED, markersize=5, label='trained keys')
    axes.axhline(1 / found['items'], color=GREY, linewidth=0.8)
    axes.set(xscale='log', ylim=(-0.02, 1.04), xlabel='pairs stored', title=f'layer {label}')
    ticks = pairs[::max(1, len(pairs) // 5)]
    axes.set_xticks(ticks, [f'{n:,}' for n in ticks])
    axes.minorticks_off()
    axes.grid()
    axes.legend(loc='upper right', fontsize=8)
  panels[0].set_ylabel(f'recall among {layers[0][1]["items"]:,} items')
  figure.suptitle('Capacity: how many pairs a memory holds', x=0.01, ha='left', fontweight='bold')


def draw_replay(axes: Any, replay: dict) -> None:
  """Cosine of what is recalled for a key with its value, by delay."""
  delay = np.asarray(replay['delay']) + 1
  axes.plot(delay, replay['cosine'], 'o-', color=GREEN, markersize=4, label='its own value')
  axes.plot(delay, replay['control'], '--', color=GREY, linewidth=1.2, label="another token's value")
  axes.set(xscale='log', ylim=(min(0, *replay['cosine'], *replay['control']) - 0.03, 1.03), xlabel='tokens since it was written')
  ticks = [4 ** n for n in range(8) if 4 ** n <= delay[-1]]
  axes.set_xticks(ticks, [f'{n:,}' for n in ticks])
  axes.minorticks_off()
  axes.grid()


def draw_memory_over_time(figure: Any, report: dict) -> None:
  """Norm of each slot while a text is read, and how well its items are recalled after a delay."""
  layers = slotted(report)[:4]
  panels = figure.subplots(2, len(layers), squeeze=False)
  for number, layer in enumerate(layers):
    above, below = panels[:, number]
    norm_TxS = np.asarray(layer['state_norm_over_time']).mean(1)
    alpha = 1.0 if norm_TxS.shape[1] <= 8 else 0.35
    for slot in range(norm_TxS.shape[1]):
      above.plot(layer['tokens'], norm_TxS[:, slot], color=COLOURS[slot % 7] if alpha == 1 else BLUE, linewidth=1, alpha=alpha)
    above.plot(layer['tokens'], norm_TxS.mean(1), color='black', linewidth=2.2, label='mean')
    above.set(title=title_of(layer), xlabel='tokens read', ylim=(0, None), xlim=(0, None))
    above.grid(axis='y')
    if 'replay' in layer:
      draw_replay(below, layer['replay'])
    else:
      below.axis('off')
      below.text(0.5, 0.5, 'no replay: this memory\nreports no addresses', ha='center', va='center', color=GREY, transform=below.transAxes)
  panels[0, 0].set_ylabel('‖m‖ per slot, mean of the heads')
  panels[1, 0].set_ylabel('cosine of the recalled value and')
  panels[0, 0].legend(loc='best')
  first = next((n for n, layer in enumerate(layers) if 'replay' in layer), None)
  if first is not None: panels[1, first].legend(loc='best', fontsize=8)
  figure.suptitle('The memory over time', x=0.01, ha='left', fontweight='bold')
