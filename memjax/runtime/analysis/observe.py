"""A text run through a trained model, and what its memories held and did meanwhile; plain lists, ready for JSON."""
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.layout import mixer_names, walk_layers
from memjax.config.schema import ModelConfig
from memjax.data.pipeline import eval_batches
from memjax.data.tokens import Tokens
from memjax.ops.binding import unbind
from memjax.ops.holographic import effective_slots
from memjax.runtime.analysis.banks import report_banks
from memjax.runtime.analysis.learning import learning_of, most_documents, roomy, start_of, weight_change
from memjax.runtime.analysis.plain import round_list
from memjax.runtime.reading import Run, run_tags

MOMENTS = 64           # points in time at which the state is looked at
SHOWN = 64             # tokens of the figure of predictions
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Place(NamedTuple):
  """One memory of one layer: where its state and statistics are."""
  label: str
  mixer: str
  part: str
  layer: str
  repeat: int

  def state_of(self, states: dict) -> Any:
    """Its state [B, ...] in the states of the model."""
    state = states[self.part][self.layer][self.mixer]
    return jax.tree.map(lambda a: a[:, self.repeat], state) if self.part == 'repeats' else state

  def statistics_of(self, layers: dict) -> dict[str, np.ndarray]:
    """Its statistics in those that the model collected."""
    found = layers[f'{self.part}/{self.layer}/{self.mixer}']
    return {name: np.asarray(a[self.repeat] if self.part == 'repeats' else a) for name, a in found.items()}


def list_places(config: ModelConfig) -> list[Place]:
  """Every memory of every layer, in the order of the layers."""
  return [Place(f'{number} {mixer}', mixer, *home, max(repeat, 0))
          for number, (home, repeat, layer) in enumerate(walk_layers(config)) for mixer in mixer_names(layer)]


def slot_norms(state: Any) -> jax.Array | None:
  """Norms of the slots of a state, [B, H, S]; None for a memory without slots."""
  m = getattr(state, 'm_BxHxSxK', None)
  if m is None and hasattr(state, 'm_BxSxK'): m = state.m_BxSxK[:, None]
  return None if m is None else jnp.linalg.norm(m.astype(jnp.float32), axis=-1)


def observe(found: Run, tokens: Tokens, *, rows: int, length: int) -> tuple[dict, dict[str, dict]]:
  """(report, {place label: arrays of its trained keys, values and addresses}) of `rows` pieces of a text.

  The report holds for each memory the norms of its slots in the end and over time, their use, effective slots, horizon
  and gate, the sizes of its reads, and how well items are recalled after a delay; what `report_banks` says of banks; and a
  piece of the predictions. A model whose router sees the future cannot be read in pieces: no slots, 'in_pieces' False.
  """
  is_text = tokens.weight_N is None                     # conversations are read whole, as in training
  length = min(length, max(len(tokens) // rows, 2)) if is_text else found.config.training.length
  batch = next(eval_batches(tokens, batch=rows, length=length, stream=is_text))
  places = list_places(found.model.config)
  found = found._replace(model=roomy(found.model, most_documents(batch['position'])))
  call = functools.partial(_call, found.model)
  in_pieces = not run_tags(found.model.config)
  logits_BxLxA, states, aux = jax.jit(functools.partial(call, collect=True))(
      found.params, found.model.init_state(rows, length if in_pieces else 0), batch)
  at, norms, changes = watch(jax.jit(call), found, batch, places) if in_pieces else ([], {}, {})
  layers, arrays, statistics = [], {}, {place.label: place.statistics_of(aux['layers']) for place in places}
  for place in places:
    seen = statistics[place.label]
    kind = found.model.config.mixers[place.mixer].kind
    layer = {'label': place.label, 'mixer': place.mixer, 'kind': kind, **read_sizes(seen)}
    if place.label in norms: layer |= slots_of(seen, norms[place.label], at)
    if in_pieces and 'key_BxLxHxK' in seen and 'address_BxLxHxS' in seen:
      arrays[place.label] = {name: seen[name] for name in ('key_BxLxHxK', 'value_BxLxHxK', 'address_BxLxHxS')}
      layer['replay'] = replay(found.model.config.mixers[place.mixer].binding.kind, arrays[place.label],
                               place.state_of(states).m_BxHxSxK, batch['position'])
    if place.label in changes:
      layer['learning'] = learning_of(seen, batch['mask'], changes[place.label], at)
      layer['replay'] = by_delay(seen['recall_BxL'], seen['control_BxL'], batch['position'])
    layers.append(layer)
  report = {'rows': rows, 'length': length, 'corpus': tokens.name, 'split': tokens.split, 'in_pieces': in_pieces, 'layers': layers,
            'banks': report_banks(found, places, statistics, int(batch['mask'].sum())),
            'predictions': predictions(found, batch, np.asarray(logits_BxLxA[0]))}
  return report, arrays


def _call(model, params, state, batch, *, collect=False):
  return model.apply({'params': params}, batch['token'], state, position_BxL=batch['position'], mask_BxL=batch['mask'],
                     collect=collect)


def watch(call: Any, found: Run, batch: dict, places: list[Place]) -> tuple[list[int], dict[str, np.ndarray], dict[str, np.ndarray]]:
  """(numbers of tokens read, {label: norms of the slots then [T, B, H, S]}, {label: changes of the weights then [T, B, H]}): the text
  in about MOMENTS pieces."""
  rows, length = batch['token'].shape
  step = max(1, length // MOMENTS)
  state, at, norms, changes = found.model.init_state(rows, length), [], {}, {}
  starts = {place.label: start_of(found, place) for place in places}
  for cut in range(0, length - length % step, step):
    _, state, _ = call(found.params, state, {name: a[:, cut:cut + step] for name, a in batch.items()})
    at.append(cut + step)
    for place in places:
      norm = slot_norms(place.state_of(state))
      if norm is not None: norms.setdefault(place.label, []).append(np.asarray(norm))
      if start := starts[place.label]: changes.setdefault(place.label, []).append(weight_change(place.state_of(state), start))
  return at, *({label: np.stack(series) for label, series in found.items()} for found in (norms, changes))


def quantiles(x: np.ndarray) -> list[float]:
  """The SHARES quantiles."""
  return round_list(np.quantile(np.asarray(x, np.float64), SHARES))


def read_sizes(seen: dict[str, np.ndarray]) -> dict:
  """Distribution of the norm of the reads."""
  return {'read_norm': quantiles(seen['read_norm_BxL'])}


def slots_of(seen: dict[str, np.ndarray], norm_TxBxHxS: np.ndarray, at: list[int]) -> dict:
  """What is known of the slots of one memory: [H][S] unless the name says otherwise."""
  heads, slots = norm_TxBxHxS.shape[2:]
  out = {'heads': heads, 'slots': slots, 'state_norm': round_list(norm_TxBxHxS[-1].mean(0)),
         'state_norm_spread': quantiles(norm_TxBxHxS[-1]), 'tokens': at,
         'state_norm_over_time': round_list(norm_TxBxHxS.mean(1))}                                # [T][H][S]
  if 'gate_BxLxS' in seen:                                                                        # the seed's memory
    gate = seen['gate_BxLxS']
    norm = seen['state_norm_BxLxS']                                                               # before the norm of the write
    out |= {'state_norm': round_list(norm[:, -1].mean(0)[None]), 'state_norm_spread': quantiles(norm[:, -1]),
            'state_norm_over_time': round_list(norm[:, [t - 1 for t in at]].mean(0)[:, None]),
            'use': round_list(gate.mean((0, 1))[None]), 'pick': round_list(seen['pick_BxLxS'].mean((0, 1))[None]),
            'effective_slots': round_list(effective_slots(jnp.asarray(gate)[:, :, None])), 'gate': round_list([gate.mean()])}
  named = {'use_HxS': 'use', 'effective_slots_H': 'effective_slots', 'gate_H': 'gate', 'key_modulus_H': 'key_modulus'}
  out |= {name: round_list(seen[key]) for key, name in named.items() if key in seen}
  if 'pick_GxHxS' in seen: out['pick'] = round_list(seen['pick_GxHxS'].mean(0))
  if 'horizon_HxJ' in seen: out['horizon'] = round_list(seen['horizon_HxJ'].mean(-1))
  return out


@functools.partial(jax.jit, static_argnames='kind')
def replay_cosines(m_BxHxSxK, *, kind: str, key_BxLxHxK, value_BxLxHxK, address_BxLxHxS):
  """cos(unbind(key_i, sum_s address_i,s m_s), value_i) of every token i in the memory m, averaged over heads, [B, L].

  With it the same for the value of another token, half the text away: what a memory that knows only the mean would reach.
  """
  wide = lambda a: a.astype(jnp.float32)
  mixed = jnp.einsum('blhs,bhsk->blhk', wide(address_BxLxHxS), wide(m_BxHxSxK))
  read, value = unbind(kind, wide(key_BxLxHxK), mixed), wide(value_BxLxHxK)
  unit = lambda a: a / jnp.maximum(jnp.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
  cosine = lambda other: jnp.sum(unit(read) * unit(other), -1).mean(-1)
  return cosine(value), cosine(jnp.roll(value, value.shape[1] // 2, 1))


def replay(kind: str, arrays: dict[str, np.ndarray], m_BxHxSxK: Any, position_BxL: np.ndarray) -> dict[str, list]:
  """{'delay', 'cosine', 'control'}: how well items of each row's last document are read at its end, by their delay.

  Delays, in tokens, are the means of bins that grow by a third; 'control' compares with another token's value.
  """
  cosine_BxL, control_BxL = (np.asarray(a) for a in replay_cosines(m_BxHxSxK, kind=kind, **arrays))
  return by_delay(cosine_BxL, control_BxL, position_BxL)


def by_delay(cosine_BxL: np.ndarray, control_BxL: np.ndarray, position_BxL: np.ndarray) -> dict[str, list]:
  """{'delay', 'cosine', 'control'}: means over the tokens of each row's last document in bins of their delay."""
  length = cosine_BxL.shape[1]
  start_B = np.array([np.flatnonzero(row == 0)[-1] if (row == 0).any() else 0 for row in position_BxL])
  delay_L, own_BxL = length - 1 - np.arange(length), np.arange(length)[None] >= start_B[:, None]
  edges = np.unique(np.round(np.geomspace(1, length + 1, int(8 * np.log2(length + 1) / 3) + 2)).astype(int)) - 1
  out = {'delay': [], 'cosine': [], 'control': []}
  for low, high in itertools.pairwise(edges):
    chosen = own_BxL & ((delay_L >= low) & (delay_L < high))[None]
    if not chosen.any(): continue
    out['delay'].append(np.broadcast_to(delay_L, chosen.shape)[chosen].mean())
    out['cosine'].append(cosine_BxL[chosen].mean())
    out['control'].append(control_BxL[chosen].mean())
  return {name: round_list(series) for name, series in out.items()}


def predictions(found: Run, batch: dict[str, np.ndarray], logits_LxA: np.ndarray) -> dict[str, list]:
  """{'input', 'target', 'prediction', 'probability'} of the last SHOWN tokens of the first row.

  Input t, and beside it the token after it: the true one, the likeliest one, and the probability of the true one.
  """
  last = slice(max(int(batch['mask'][0].sum()) - SHOWN, 0), int(batch['mask'][0].sum()))
  wide = logits_LxA[last].astype(np.float64)
  wide -= wide.max(-1, keepdims=True)
  share = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
  target = batch['target'][0, last]
  show = lambda ids: [found.tokenizer.decode([i]) if i < found.tokenizer.vocabulary else f'<{i}>' for i in map(int, ids)]
  return {'input': show(batch['token'][0, last]), 'target': show(target), 'prediction': show(share.argmax(-1)),
          'probability': round_list(share[np.arange(len(target)), target], 4)}
