"""The neural memory into which surprising tokens alone are written."""
import jax
import jax.numpy as jnp

from memjax.memory.neural import Neural
from memjax.memory.neural_held import RECENT, RUNNING
from memjax.ops.neural_gated import GatedChunk, Surprise, opens, scan_gated

MEANS = tuple(RUNNING.index(name) for name in ('weight', 'surprise', 'surprise_square'))


class NeuralGated(Neural):
  """`Neural` in modes token and block with `gates.surprise`."""

  @property
  def surprise(self) -> Surprise:
    """What may write."""
    g = self.config.gates
    return Surprise(g.surprise, g.threshold, RECENT)

  def plan(self, gates):
    """The gates: what a chunk does is known once its gradients are."""
    return gates

  def scan_all(self, start, state, chunks, layout):
    """As in `Neural`; tokens that were pending have been judged."""
    (N, B), C, end = chunks.full.shape, self.config.chunk, layout.place.shape[1]
    new = ((layout.source >= C) & (layout.source < end)).reshape(B, N, C)
    chunks = GatedChunk(chunks.query, chunks.tokens, chunks.coefficients, jnp.swapaxes(new, 0, 1), chunks.full, chunks.fresh)
    carry = self.carried(state), jnp.stack([state.running_BxHxY[..., n] for n in MEANS], -1)
    (memory, _), out = scan_gated(self.rule, start, carry, chunks, surprise=self.surprise, group=self.config.exec.group,
                                  detach=self.config.write.detach)
    return memory, out

  def decided(self, slots, told):
    """Slots in which tokens that did not write say so."""
    write_BxNxCxH = jnp.moveaxis(told.kept > 0, (0, 2), (1, 3))
    return slots.replace(gate=slots.gate.at[..., -1, :].multiply(write_BxNxCxH.astype(slots.gate.dtype)))

  def judged(self, state, found, gates, items):
    """(factors, gates, items) of one token, which does not write where it does not surprise."""
    means = jnp.stack([state.running_BxHxY[..., n] for n in MEANS], -1)
    write_BxH = gates.write[..., 0] & opens(self.surprise, jax.lax.stop_gradient(found.norm.mean(-1)), means)
    gate = items.gate.at[:, :, -1].multiply(write_BxH[:, None].astype(items.gate.dtype))
    keep = lambda a: jnp.where(write_BxH.reshape(*write_BxH.shape, *(1,) * (a.ndim - 2)), a, 0)
    found = found._replace(d=jax.tree.map(keep, found.d), kept=keep(found.kept))
    return found, gates._replace(write=write_BxH[..., None]), items.replace(gate=gate)
