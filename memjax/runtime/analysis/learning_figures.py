"""The figures of neural memories, drawn from 'learning' and 'replay' of the layers of `analysis.json`."""
from typing import Any

import numpy as np

from memjax.runtime.analysis.lines import BLUE, COLOURS, ORANGE, draw_replay, title_of

MOST = 4               # layers of a figure


def learning(report: dict) -> list[dict]:
  """The layers whose memory learns by gradient descent."""
  return [layer for layer in report['layers'] if 'learning' in layer]


def size_of(report: dict, rows: int) -> tuple[float, float]:
  """Inches of a figure with so many rows of panels."""
  return 3.6 * min(len(learning(report)), MOST) + 1.2, 2.7 * rows + 0.8


def draw_surprise(figure: Any, report: dict) -> None:
  """Norm of each token's gradient, and the inner loss before its write, while a text is read."""
  layers = learning(report)[:MOST]
  panels = figure.subplots(2, len(layers), squeeze=False)
  for number, layer in enumerate(layers):
    seen = layer['learning']
    for axes, key, colour in zip(panels[:, number], ('surprise', 'inner_loss'), (BLUE, ORANGE), strict=True):
      axes.plot(seen['tokens'], seen[key], color=colour, linewidth=1.2)
      axes.set(xlim=(0, None), ylim=(min(0, *seen[key]), None))
      axes.grid(axis='y')
    panels[0, number].set_title(title_of(layer))
    panels[1, number].set_xlabel('tokens read')
  panels[0, 0].set_ylabel('norm of the gradient')
  panels[1, 0].set_ylabel('inner loss before the write')
  figure.suptitle('Surprise: how badly the memory predicted what came', x=0.01, ha='left', fontweight='bold')


def draw_learning(figure: Any, report: dict) -> None:
  """Gates, distance of the weights from the learned start, and recall by delay."""
  layers = learning(report)[:MOST]
  panels = figure.subplots(3, len(layers), squeeze=False)
  for number, layer in enumerate(layers):
    seen, (gates, weights, recall) = layer['learning'], panels[:, number]
    for n, (name, series) in enumerate(seen['gates'].items()):
      gates.plot(seen['tokens'], np.maximum(series, 1e-6), color=COLOURS[n % 7], linewidth=1.2, label=name)
    gates.set(title=title_of(layer), yscale='log', xlim=(0, None))
    change_TxH = np.asarray(seen['weight_change'])
    for head in range(change_TxH.shape[1]): weights.plot(seen['weight_tokens'], change_TxH[:, head], color=BLUE, linewidth=1, alpha=0.35)
    weights.plot(seen['weight_tokens'], change_TxH.mean(1), color='black', linewidth=2.2, label='mean of the heads')
    weights.set(xlabel='tokens read', xlim=(0, None), ylim=(0, None))
    for axes in (gates, weights): axes.grid(axis='y')
    draw_replay(recall, layer['replay'])
  panels[0, 0].set_ylabel('gates')
  panels[1, 0].set_ylabel('‖W − W_init‖ / ‖W_init‖')
  panels[2, 0].set_ylabel('cosine of the recalled value and')
  panels[0, 0].legend(loc='best', fontsize=8)
  panels[1, 0].legend(loc='best', fontsize=8)
  panels[2, 0].legend(loc='best', fontsize=8)
  figure.suptitle('How the memory learns', x=0.01, ha='left', fontweight='bold')
