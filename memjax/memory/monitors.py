"""What the holographic memory reports about itself: auxiliary losses, monitors for the metrics, statistics for the figures."""
import jax
import jax.numpy as jnp

from memjax.ops.binding import real_bins
from memjax.ops.holographic import (
  balance_loss,
  contrastive_loss,
  distinct,
  effective_slots,
  gather_tokens,
  replay_loss,
  sample_candidates,
  sample_replay,
)

SAMPLE = 64   # tokens of each row that the monitors look at


def _sample(x):
  """Every n-th token, about SAMPLE of them: monitors need no more."""
  return None if x is None else jax.lax.stop_gradient(x[:, ::max(1, x.shape[1] // SAMPLE)].astype(jnp.float32))


def monitors(items) -> dict[str, jax.Array]:
  """float32 scalars without gradient: effective slots, keep horizon in tokens, mean gate."""
  out = {}
  if items.unit_address is not None: out['effective_slots'] = effective_slots(_sample(items.unit_address)).mean()
  if items.log_keep is not None: out['keep_horizon'] = horizon(items.log_keep).mean()
  if items.gate is not None: out['gate_mean'] = _sample(items.gate).mean()
  return out


def auxiliary_losses(memory, m_BxHxSxK, items, *, written_BxL, reset_BxL, key, token_BxL) -> dict[str, jax.Array]:
  """Each enabled loss under its name and their weighted sum as 'penalty'; replay and contrastive need a key (training)."""
  weights, out = memory.config.loss, {}
  if weights.balance: out['balance'] = balance_loss(items.unit_address, written_BxL)
  if weights.gate: out['gate'] = items.gate.mean()
  if key is not None and (weights.replay or weights.contrastive):
    out |= _replay(memory, m_BxHxSxK, items, written_BxL=written_BxL, reset_BxL=reset_BxL, key=key, token_BxL=token_BxL)
  out = {name: value.astype(jnp.float32) for name, value in out.items()}
  return {**out, 'penalty': sum((getattr(weights, name) * value for name, value in out.items()), jnp.zeros((), jnp.float32))}


def _replay(memory, m_BxHxSxK, items, *, written_BxL, reset_BxL, key, token_BxL):
  """Reads of earlier items under their own key and address, from the memory as it is at a later token."""
  weights, (B, L) = memory.config.loss, items.bound.shape[:2]
  index_BxL, valid_BxL = sample_replay(key, (B, L), window=weights.window, mask_BxL=written_BxL, reset_BxL=reset_BxL)
  at = lambda x: gather_tokens(x, index_BxL)
  again = items.replace(query=memory.projections.ask(at(items.key)))
  pick = None if items.unit_address is None else at(items.unit_address)[:, :, None]
  _, mixed = memory.mixing(m_BxHxSxK, again, pick, mask_BxL=written_BxL, reset_BxL=reset_BxL)
  read = memory.untied(mixed, again.query)[:, :, 0]
  gate = jnp.ones(read.shape[:3]) if items.gate is None else at(items.gate).reshape(*read.shape[:3], -1).mean(-1)
  weight, out = jnp.where(valid_BxL[..., None], gate, 0), {}
  if weights.replay: out['replay'] = replay_loss(read, at(items.value), weight)
  if weights.contrastive:
    candidate, exists = sample_candidates(jax.random.fold_in(key, 1), valid_BxL)
    flat = lambda x: x.reshape(B, L, -1)
    out['contrastive'] = contrastive_loss(
        flat(read), flat(items.value), target_BxL=index_BxL, candidate_BxJ=candidate, temperature=weights.temperature,
        allowed_BxLxJ=distinct(index_BxL, candidate, exists, token_BxL), weight_BxL=weight.mean(-1))
  return out


def horizon(log_keep: jax.Array) -> jax.Array:
  """-1 / mean log keep: tokens after which e^-1 is left, per head (and slot or channel); at most 1e6."""
  mean = _sample(log_keep).mean((0, 1))
  return jnp.minimum(-1 / jnp.minimum(mean, -1e-6), 1e6)


def slot_statistics(memory, items, state) -> dict[str, jax.Array]:
  """Arrays for the figures: use and pick of each slot, S_eff, horizon, gate, key modulus, state norm before the call."""
  out = {'state_norm_BxHxS': jnp.linalg.norm(state.m_BxHxSxK.astype(jnp.float32), axis=-1), 'key_modulus_H': _modulus(memory, items.key)}
  if items.unit_address is not None:
    signed = memory.config.address.kind in ('content', 'signed')
    use = lambda x: jnp.square(x) if signed else x
    out['use_HxS'] = use(items.unit_address.astype(jnp.float32)).mean((0, 1))
    out['effective_slots_H'] = effective_slots(items.unit_address.astype(jnp.float32))
    if items.pick is not None: out['pick_GxHxS'] = use(items.pick.astype(jnp.float32)).mean((0, 1))
  if items.log_keep is not None: out['horizon_HxJ'] = horizon(items.log_keep).reshape(items.log_keep.shape[2], -1)
  if items.gate is not None: out['gate_H'] = items.gate.astype(jnp.float32).mean((0, 1)).reshape(items.key.shape[2], -1).mean(-1)
  own = {'key_BxLxHxK': items.key, 'value_BxLxHxK': items.value, 'address_BxLxHxS': items.unit_address}   # for capacity and replay
  return out | {name: a.astype(jnp.float32) for name, a in own.items() if a is not None}


def _modulus(memory, key_BxLxHxK):
  """Mean modulus of the bins of the keys, [H]; 1 for unit keys."""
  real = real_bins(memory.config.binding.kind, key_BxLxHxK.shape[-1])
  wide = jnp.square(key_BxLxHxK.astype(jnp.float32))
  half = (wide.shape[-1] - real) // 2
  pairs = wide[..., real:real + half] + wide[..., real + half:]
  return jnp.sqrt(jnp.concatenate([wide[..., :real], pairs], -1)).mean((0, 1, 3))
