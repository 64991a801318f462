"""What the banks of a trained model hold and how a text used them; plain lists, ready for JSON."""
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.banks import BANKS, shared_table
from memjax.config.layout import mixer_path
from memjax.memory.bank import scale_free_norm
from memjax.memory.registry import make_memory, make_table
from memjax.models.block import settings
from memjax.runtime.analysis.plain import round_list
from memjax.runtime.footprint import entries_of
from memjax.runtime.reading import Run

MOST = 12              # entries whose nearest tokens are looked up
NEAR = 5               # tokens for each
SHOWN = 64             # chapters in a map of similarities
POINTS = 200           # of a curve over ranks
ROUTER = ('router_entropy', 'router_mean_entropy', 'chapter_coverage', 'chapter_gini', 'top_share', 'router_balance',
          'router_auxiliary', 'router_z')
DIRECT, PROJECTED = 'the entry itself', 'the entry through the value and output projections'
VALUE = 'the value through the output projection'


def report_banks(found: Run, places: list, seen: dict[str, dict[str, np.ndarray]], tokens: int) -> dict[str, Any]:
  """{} for a model without banks, else {'layers': [...], 'similarity': [...]} of a text of so many tokens.

  `seen` holds the statistics of each place by its label.
  """
  banks = [place for place in places if found.model.config.mixers[place.mixer].kind in BANKS]
  if not banks: return {}
  layers = [layer_report(found, place, seen[place.label], tokens) for place in banks]
  return {'tokens': tokens, 'layers': layers, 'similarity': similarities(found, banks, seen)}


def layer_report(found: Run, place: Any, seen: dict[str, np.ndarray], tokens: int) -> dict[str, Any]:
  """Use of the chapters (shares of the tokens), attention by entry and the nearest tokens of one layer."""
  mixer = found.model.config.mixers[place.mixer]
  entries, active = entries_of(mixer)
  mass_M = np.asarray(seen['entry_mass_M'], np.float64)
  share_M = mass_M / max(mass_M.sum(), 1e-30)
  out = {'label': place.label, 'mixer': place.mixer, 'kind': mixer.kind, 'table': table_name(mixer, place),
         'entries': entries, 'active_entries': active,
         'attention': curve(mass_M), 'attention_total': float(f'{mass_M.sum():.6g}'),
         'effective_entries': float(round_list(np.exp(-np.sum(share_M * np.log(np.maximum(share_M, 1e-30))))))}
  if mixer.kind == 'product_key':
    out |= {'value_use': curve(seen['value_use_M'] / max(tokens, 1)), **evenness(seen['value_use_M'])}
  elif mixer.shape.chapters:
    shared, use_P = mixer.mixing.shared, np.asarray(seen['chapter_use_P'], np.float64)
    out |= {'chapters': mixer.shape.chapters, 'top_k': mixer.router.top_k, 'shared': shared,
            'chapter_use': round_list(np.where(np.arange(len(use_P)) < shared, 1.0, use_P / max(tokens, 1))), **evenness(use_P[shared:])}
    out |= {name: float(round_list(seen[name])) for name in ('router_entropy', 'router_mean_entropy')}
  return out | {'nearest': nearest_tokens(found, place, mass_M)}


def curve(x_M: np.ndarray) -> dict[str, list]:
  """{'rank', 'value'}: the values in falling order at up to POINTS ranks, dense at the first."""
  falling = np.sort(np.asarray(x_M, np.float64))[::-1]
  rank = np.unique(np.round(np.geomspace(1, len(falling), POINTS)).astype(int))
  return {'rank': rank.tolist(), 'value': round_list(falling[rank - 1])}


def evenness(count: np.ndarray) -> dict[str, float]:
  """{'coverage', 'gini', 'top_share'}: share of the places in use, Gini coefficient (0 = even) and the busiest one's share."""
  count = np.sort(np.asarray(count, np.float64))
  number, total = len(count), max(count.sum(), 1)
  gini = np.sum((2 * np.arange(1, number + 1) - number - 1) * count) / (number * total)
  found = {'coverage': (count > 0).mean(), 'gini': gini, 'top_share': count[-1] / total}
  return {name: float(round_list(value)) for name, value in found.items()}


# The tables and what is near to their entries ------------------------------------------------------------------------------------

def own_params(found: Run, place: Any) -> dict:
  """The parameters of one memory."""
  part, layer, stage, mixer = mixer_path(found.model.config, place.part, place.layer, place.mixer).split('/')
  own = found.params[part][layer][stage][mixer]
  return jax.tree.map(lambda a: a[place.repeat], own) if place.part == 'repeats' else own


def table_name(mixer: Any, place: Any) -> str:
  """'bank m' for a table that layers share, 'layer 3 mem' for one of its own."""
  return f'bank {shared_table(mixer)}' if shared_table(mixer) else f'layer {place.label}'


def table_at(found: Run, place: Any) -> Any:
  """The table that one layer reads: its own, or that which layers share."""
  mixer = found.model.config.mixers[place.mixer]
  params = found.params[f'bank_{shared_table(mixer)}'] if shared_table(mixer) else own_params(found, place)['bank']
  return make_table(mixer, found.model.config.width, parent=None).apply({'params': params})


def rows_at(table: Any, ids: np.ndarray, entries: int) -> jax.Array:
  """Some entries [N, W] of a table as float32, whatever its form; the table is never restored as a whole."""
  if isinstance(table, jax.Array): return table[ids].astype(jnp.float32)
  return jax.jit(lambda table, ids: jax.lax.map(lambda i: table.tokens(i, chapters=entries)[0], ids))(table, jnp.asarray(ids))


def directions(found: Run, place: Any, rows_NxW: jax.Array) -> tuple[str, np.ndarray]:
  """(what they are, [N, D]): entries of the width of the model as they are, others as what a read of them alone adds to the stream."""
  config = found.model.config
  mixer = config.mixers[place.mixer]
  if mixer.kind == 'bank' and rows_NxW.shape[1] == config.width: return DIRECT, np.asarray(rows_NxW)
  path = mixer_path(config, place.part, place.layer, place.mixer)
  memory = make_memory(mixer, config.width, lora=settings(config, place.mixer, above=path), parent=None)
  def through(memory, rows_NxW):
    if mixer.kind == 'product_key': return memory.out(rows_NxW)
    value = memory.value(scale_free_norm(rows_NxW, mixer.mixing.norm, mixer.mixing.norm_epsilon))
    value = value.reshape(len(rows_NxW), memory.groups, memory.head_width)
    return memory.out(jnp.repeat(value, mixer.heads // memory.groups, 1).reshape(len(rows_NxW), -1))
  of = VALUE if mixer.kind == 'product_key' else PROJECTED
  return of, np.asarray(memory.apply({'params': own_params(found, place)}, rows_NxW, method=through))


def nearest_tokens(found: Run, place: Any, mass_M: np.ndarray) -> dict[str, Any]:
  """{'of', 'entries': [{'entry', 'chapter', 'share', 'tokens', 'cosine'}]}: the MOST entries with most attention, each with the
  NEAR tokens whose embeddings have the largest cosine with it. No entries where the output projection is still zero."""
  mixer = found.model.config.mixers[place.mixer]
  chosen = np.argsort(-mass_M, kind='stable')[:MOST]
  of, vectors = directions(found, place, rows_at(table_at(found, place), chosen, len(mass_M)))
  unit = lambda a: a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
  if not np.any(np.linalg.norm(vectors, axis=-1) > 1e-12): return {'of': of, 'entries': []}
  cosine_NxA = unit(vectors.astype(np.float32)) @ unit(np.asarray(found.params['embed']['table'], np.float32)).T
  near = np.argsort(-cosine_NxA, -1, kind='stable')[:, :NEAR]
  show = lambda i: found.tokenizer.decode([i]) if i < found.tokenizer.vocabulary else f'<{i}>'
  chapters = getattr(getattr(mixer, 'shape', None), 'chapters', 0)
  place_of = (lambda entry: {'chapter': entry // (len(mass_M) // chapters)}) if chapters else lambda entry: {}
  return {'of': of, 'entries': [
      {'entry': entry, **place_of(entry), 'share': float(round_list(mass_M[entry])), 'tokens': [show(int(i)) for i in ids],
       'cosine': round_list(cosine[ids], 4)} for entry, ids, cosine in zip(chosen.tolist(), near, cosine_NxA, strict=True)]}


def similarities(found: Run, places: list, seen: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
  """[{'table', 'chapters', 'shown', 'cosine', 'mean'}] of every table in chapters: cosines between the mean entries of the
  SHOWN chapters that were read most, in their order, and the mean over all pairs of different chapters."""
  tables: dict[tuple, list] = {}
  for place in places:
    mixer = found.model.config.mixers[place.mixer]
    if mixer.kind != 'bank' or mixer.shape.chapters < 2: continue
    tables.setdefault((table_name(mixer, place), mixer.shape.chapters), []).append(place)
  out = []
  for (name, chapters), readers in tables.items():
    mean = jax.jit(lambda table, chapters=chapters: jax.lax.map(
        lambda c: table.tokens(c, chapters=chapters).mean(0), jnp.arange(chapters)))(table_at(found, readers[0]))
    unit = np.asarray(mean, np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), 1e-12)
    use = sum(np.asarray(seen[place.label]['chapter_use_P']) for place in readers)
    shown = np.sort(np.argsort(-use, kind='stable')[:SHOWN])
    off = (np.sum(unit.sum(0) ** 2) - np.sum(unit ** 2)) / (chapters * (chapters - 1))
    out.append({'table': name, 'chapters': chapters, 'shown': shown.tolist(), 'cosine': round_list(unit[shown] @ unit[shown].T, 4),
                'mean': float(round_list(off))})
  return out
