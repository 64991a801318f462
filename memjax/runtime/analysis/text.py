"""The figure of predictions: what the model read, what came next, and what it expected."""
from typing import Any

PLAIN = {'\n': '↵', ' ': '␣', '\t': '⇥', '\r': '←', '\ufffd': '□', '': '∅'}
BYTES, WORDS = 32, 10      # tokens a line, for tokens of one character and for longer ones


def columns_of(report: dict) -> int:
  """Tokens a line."""
  return BYTES if max(len(token) for token in report['predictions']['target']) <= 2 else WORDS


def size_of(report: dict) -> tuple[float, float]:
  """Inches."""
  return 13, 1.3 + 1.25 * -(-len(report['predictions']['target']) // columns_of(report))


def shown(token: str) -> str:
  """A token as it can be drawn: white space visible, long ones cut, what fonts lack replaced."""
  token = ''.join(PLAIN.get(c, c if c.isprintable() else '□') for c in token) if token.strip(' ') or len(token) < 2 else '␣' * len(token)
  token = token.removesuffix('␣') if len(token) > 1 else token or PLAIN['']
  return token if len(token) <= 9 else f'{token[:8]}…'


def draw_predictions(figure: Any, report: dict) -> None:
  """Lines of three rows, input, target and prediction; shading is the probability that the target was given."""
  from matplotlib.cm import ScalarMappable
  from matplotlib.colors import Normalize
  from matplotlib.patches import Rectangle
  found, columns = report['predictions'], columns_of(report)
  count = len(found['target'])
  rows, axes, scale = -(-count // columns), figure.subplots(), ScalarMappable(Normalize(0, 1), 'Blues')
  hits = sum(t == p for t, p in zip(found['target'], found['prediction'], strict=True))
  for n in range(count):
    line, x = divmod(n, columns)
    p, hit = found['probability'][n], found['target'][n] == found['prediction'][n]
    for row, (kind, y) in enumerate(zip(('input', 'target', 'prediction'), (0, 1, 2), strict=True)):
      y += 4 * line
      face = scale.to_rgba(p) if kind == 'target' else '#f2f2f2' if kind == 'input' else '#d7ecd9' if hit else '#fbe3d6'
      axes.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor='white', linewidth=1.2))
      dark = row == 1 and p > 0.55
      axes.text(x + 0.5, y + 0.52, shown(found[kind][n]), ha='center', va='center', fontsize=9, family='monospace',
                color='white' if dark else 'black', parse_math=False)
  axes.set(xlim=(0, columns), ylim=(4 * rows - 1, 0))
  middles = [4 * line + row + 0.5 for line in range(rows) for row in range(3)]
  axes.set_yticks(middles, ['input', 'next token', 'predicted'] * rows, fontsize=9)
  axes.set_xticks([])
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_title(f'Predictions: {hits} of {count} right (green), shading = probability of the next token')
  figure.colorbar(scale, ax=axes, label='probability', pad=0.01, aspect=12 if rows > 1 else 6)
