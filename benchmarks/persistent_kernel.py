"""One Mosaic GPU kernel that writes all chunks of a neural memory: what `persistent` measures beside the kernels of the library.

A program takes one row and head, and its two warpgroups two tiles of 64 hidden channels each, whose weights stay in registers over all
chunks; momenta lie in the second-level cache. Chunks of 64 tokens, keys and values of 64 channels, 256 hidden ones, one momentum, a slow
gain, bfloat16. The API is that of jax 0.10 to 0.12 and may change with any other.
"""
import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memjax.ops.neural_nets import EPSILON
from memjax.ops.pallas_neural_rows import held, silu

T, TILES, GROUPS = 64, 2, 2                              # tokens and channels of a product; tiles of a warpgroup; warpgroups
ARRAY, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
INDEXED = getattr(inspect.signature(plgpu.load).parameters.get('idx'), 'default', None) is inspect.Parameter.empty      # jax 0.10
READS = ('where', 'key', 'value', 'weight', 'push', 'turn', 'hold', 'init_up', 'init_down', 'init_gain', 'up0', 'up1', 'down0', 'down1')
BUFFERS = {'ad': 4, 'hh': 4, 'sl': 4, 'au': 2, 'st': 2, 'sg': 2, 'sh': 2, 'key': 2, 'value': 1, 'd': 3, 'kp': 2}           # of [T, T]


def get(ref: Any, layout: Any = ARRAY) -> jax.Array:
  """What a reference holds, in registers."""
  return plgpu.load(ref, *([()] if INDEXED else []), layout=layout, optimized=False)


def product(*pairs: tuple) -> jax.Array:
  """The sum of x . y over pairs of operands in shared memory."""
  def run(total):
    for x, y in pairs: plgpu.wgmma(total, x, y)
    return total[...]
  return pl.run_scoped(run, plgpu.ACC((T, T), jnp.float32))


def add_product(start: jax.Array, x: Any, y: Any) -> jax.Array:
  """start + x . y of operands in shared memory."""
  return pl.run_state(lambda total: plgpu.wgmma(total, x, y))(plgpu.ACC.init(start))


def turned(ref: Any) -> Any:
  """The transposed reference."""
  return plgpu.transpose_ref(ref, (1, 0)) if INDEXED else ref.transpose((1, 0))


def by_row(x: jax.Array) -> jax.Array:
  """[T] along columns."""
  return lax.broadcast_in_dim(x, (T, T), [0])


@dataclasses.dataclass(frozen=True)
class Place:
  """A warpgroup at work: arrays to read, to write, buffers; its head, row of arrays, row of the learned start, number; the chunks."""
  refs: dict
  out: dict
  buffers: dict
  at: tuple
  chunks: int

  def moved(self, n: Any) -> 'Place':
    """The same place by indices read from memory (zeros are added): the compiler would else keep all addresses from step to step, and
    spill them."""
    zero = self.refs['where'].at[n][...]
    return dataclasses.replace(self, at=tuple(x + zero for x in self.at))

  def channels(self, t: int) -> Any:
    """Hidden channels of tile t."""
    return pl.ds((self.at[3] * TILES + t) * T, T)

  def own(self, name: str, t: int = 0) -> Any:
    """A buffer of the warpgroup, or of its tile t."""
    w = self.at[3]
    return self.buffers[name].at[w * TILES + t if name in ('ad', 'hh', 'sl') else w]

  def tile(self, arrays: dict, name: str, t: int) -> Any:
    """Tile t of a level or of the learned start."""
    h, b, row, _ = self.at
    inner = (slice(None), self.channels(t)) if 'up' in name else (self.channels(t), slice(None))
    return arrays[name].at[(row if name.startswith('init') else b, h, *inner)]

  def home(self, side: str, t: int) -> jax.Array:
    """Tile t of the learned start."""
    return get(self.tile(self.refs, f'init_{side}', t))

  def sync(self) -> None:
    """Waits for the other warpgroup."""
    plgpu.barrier_arrive(self.buffers['all'])
    plgpu.barrier_wait(self.buffers['all'])

  def load(self, name: str, n: Any) -> None:
    """Starts to copy the keys or values of chunk n."""
    (h, b), slot = self.at[:2], lax.rem(n, BUFFERS[name])
    plgpu.copy_gmem_to_smem(self.refs[name].at[n, b, h], self.buffers[name].at[slot], self.buffers[f'{name}s'].at[slot])

  def wait(self, name: str, n: Any) -> None:
    """Waits for what `load` copies."""
    plgpu.barrier_wait(self.buffers[f'{name}s'].at[lax.rem(n, BUFFERS[name])])

  def stage(self, x: jax.Array, to: Any, name: str, left: int) -> None:
    """Rounds x into a buffer and starts to copy it out, once at most `left` copies may still read theirs."""
    plgpu.wait_smem_to_gmem(left, wait_read_only=True)
    self.own(name)[...] = x.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(self.own(name), to)


def meet(place: Place, m: Any, t: int, weights: tuple) -> None:
  """Hidden channels of chunk m at the anchors, weights = (up, down, their learned start)."""
  (h, b), (up, down, home_up, home_down) = place.at[:2], weights
  hold, anchor = place.refs['hold'].at[m, b][...], place.own('au')
  plgpu.wait_smem_to_gmem(5, wait_read_only=True)
  anchor[...] = (home_up + held(hold, up)).astype(jnp.bfloat16)
  place.own('ad', t)[...] = (home_down + held(hold, down)).astype(jnp.bfloat16)
  plgpu.commit_smem()
  z = product((place.buffers['key'].at[lax.rem(m, 2)], anchor)).astype(jnp.bfloat16).astype(jnp.float32)
  made = dict(zip(('h', 'slope', 'bend'), silu(z), strict=True))
  homes = {'h': place.own('hh', t), 'slope': place.own('sl', t), 'bend': anchor}
  for name, x in made.items(): homes[name][...] = x.astype(jnp.bfloat16)
  plgpu.commit_smem()
  for name, home in homes.items(): plgpu.copy_smem_to_gmem(home, place.out[name].at[m, b, h, :, place.channels(t)])


def judge(place: Place, n: Any, scale: float) -> None:
  """Outputs of chunk n, their errors and the gradients of these, also times what tokens push."""
  (h, b, row), buffers, refs, out = place.at[:3], place.buffers, place.refs, place.out
  made = product(*((buffers['hh'].at[v], buffers['ad'].at[v]) for v in range(TILES * GROUPS))).astype(jnp.bfloat16)
  place.stage(made, out['out'].at[n, b, h], 'st', 0)
  # What `pallas_neural_rows.judge` does, which spreads arrays of [T, 1]: Mosaic GPU has none.
  mean = lambda x: jnp.sum(x, axis=1) * (1 / T)
  gain = 1 + lax.broadcast_in_dim(get(refs['init_gain'].at[row, h], COLUMN), (T, T), [1])
  y = made.astype(jnp.float32)
  y = y - by_row(mean(y))
  size = lax.rsqrt(mean(y * y) + EPSILON)
  unit = y * by_row(size)
  place.wait('value', n)
  key, value = get(buffers['key'].at[lax.rem(n, 2)]), get(buffers['value'].at[0])
  error = key.astype(y.dtype) + unit * gain - value.astype(y.dtype)
  out['loss'].at[n, b, h][...] = scale * jnp.sum(error * error, axis=1)
  inner = error * by_row(2 * scale * get(refs['weight'].at[n, b, h], ROW)) * gain
  d = ((inner - by_row(mean(inner)) - unit * by_row(mean(inner * unit))) * by_row(size)).astype(jnp.bfloat16)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  buffers['d'].at[0][...] = d
  for p in range(2): buffers['d'].at[1 + p][...] = pushed(place, n, p, d)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(buffers['d'].at[0], out['d'].at[n, b, h])
  pl.when(n + 1 < place.chunks)(lambda: place.load('value', n + 1))


def pushed(place: Place, n: Any, p: int, x: jax.Array) -> jax.Array:
  """x, each token by minus what pushes it into level p."""
  h, b = place.at[:2]
  return (-by_row(get(place.refs['push'].at[n, b, h, p], ROW)) * x.astype(jnp.float32)).astype(jnp.bfloat16)


def push_keys(place: Place, n: Any) -> None:
  """The keys of chunk n times what their tokens push."""
  for p in range(2): place.buffers['kp'].at[p][...] = pushed(place, n, p, get(place.buffers['key'].at[lax.rem(n, 2)]))
  plgpu.commit_smem()


def update(place: Place, n: Any, t: int, weights: tuple) -> tuple:
  """(up, down, their learned start) of tile t after chunk n; shows reads what they were. Copies read buffers while others are filled."""
  (h, b), buffers, out, (up, down) = place.at[:2], place.buffers, place.out, weights
  hold = place.refs['hold'].at[n, b][...]
  stay, enter, keep = (place.refs['turn'].at[n, b, h, p, q][...] for p, q in ((0, 0), (0, 1), (1, 1)))
  f, seen_up, seen_down = place.channels(t), out['seen_up'].at[n, b, h], out['seen_down'].at[n, b, h]
  momentum, slope = held(hold, get(place.tile(out, 'up1', t))), get(place.own('sl', t)).astype(jnp.float32)
  d = product((buffers['d'].at[0], turned(place.own('ad', t)))).astype(jnp.bfloat16).astype(jnp.float32)
  place.stage(d * slope, seen_up.at[pl.ds(2 * T, T), f], 'st', 7)
  up = held(hold, up)
  place.stage(up, seen_up.at[pl.ds(0, T), f], 'sg', 5)
  place.stage(momentum, seen_up.at[pl.ds(T, T), f], 'sh', 5)
  up = add_product(stay * up + enter * momentum, turned(buffers['kp'].at[0]), place.own('st'))
  below = held(hold, get(place.tile(out, 'down1', t)))
  place.tile(out, 'up1', t)[...] = add_product(keep * momentum, turned(buffers['kp'].at[1]), place.own('st'))
  home_up, down = place.home('up', t), held(hold, down)
  place.stage(down, seen_down.at[f, pl.ds(0, T)], 'sg', 1)
  place.stage(below, seen_down.at[f, pl.ds(T, T)], 'sh', 1)
  hidden = turned(place.own('hh', t))
  down = add_product(stay * down + enter * below, hidden, buffers['d'].at[1])
  place.tile(out, 'down1', t)[...] = add_product(keep * below, hidden, buffers['d'].at[2])
  return up, down, home_up, place.home('down', t)


def kernel(place: Place, scale: float) -> None:
  """All chunks: each is judged at the anchors, written, and the next one met. The last one meets a chunk that nobody reads."""
  start, N = place, place.chunks
  first, last = start.at[3] == 0, start.at[3] == GROUPS - 1
  for name in ('key', 'value'): pl.when(first)(lambda name=name: start.load(name, 0))
  weights = []
  for t in range(TILES):
    weights.append(tuple(get(start.tile(start.refs, name, t)) for name in ('up0', 'down0')))
    for name in ('up1', 'down1'): start.tile(start.out, name, t)[...] = get(start.tile(start.refs, name, t))
  start.wait('key', 0)
  for t in range(TILES): meet(start, 0, t, (*weights[t], start.home('up', t), start.home('down', t)))
  start.sync()

  def body(n, weights):
    place = start.moved(n)
    pl.when(first & (n + 1 < N))(lambda: place.load('key', n + 1))
    pl.when(first)(lambda: judge(place, n, scale))
    pl.when(last)(lambda: push_keys(place, n))
    place.sync()
    pl.when(n + 1 < N)(lambda: place.wait('key', n + 1))
    new = []
    for t in range(TILES):
      new.append(update(place, n, t, weights[t]))
      meet(place, n + 1, t, new[t])
    place.sync()
    return tuple((up, down) for up, down, *_ in new)
  weights = lax.fori_loop(0, N, body, tuple(weights))
  for t in range(TILES):
    for name, x in zip(('up0', 'down0'), weights[t], strict=True): start.tile(start.out, name, t)[...] = x
  plgpu.wait_smem_to_gmem(0)


def write(start: dict, memory: dict, tokens: dict, *, scale: float) -> dict[str, jax.Array]:
  """What `pallas_neural` keeps of N chunks, and the memory after them; needs compute capability 9.0."""
  N, B, H, C, K = tokens['key'].shape
  F, rows = start['init_up'].shape[-1], start['init_up'].shape[0]
  if (C, K, F) != (T, T, T * TILES * GROUPS): raise ValueError(f'takes {T} tokens, {T} channels of keys, 256 hidden; not {C}, {K}, {F}')
  shape = lambda dtype, *axes: jax.ShapeDtypeStruct(axes, dtype)
  # One chunk more than there are: the last one meets a next one, so that as many copies are under way in every step.
  outs = {name: shape(jnp.bfloat16, N + 1, B, H, C, F) for name in ('h', 'slope', 'bend')}
  outs |= {'seen_up': shape(jnp.bfloat16, N, B, H, 2 * K + C, F), 'seen_down': shape(jnp.bfloat16, N, B, H, F, 2 * K)}
  outs |= {name: shape(jnp.bfloat16, N, B, H, C, K) for name in ('d', 'out')} | {'loss': shape(jnp.float32, N, B, H, C)}
  outs |= {name: shape(jnp.float32, *memory[name].shape) for name in ('up0', 'up1', 'down0', 'down1')}
  tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  scratch = {name: plgpu.SMEM((count, T, T), jnp.bfloat16, transforms=tiles) for name, count in BUFFERS.items()}
  scratch |= {f'{name}s': plgpu.Barrier(num_arrivals=1, num_barriers=BUFFERS[name]) for name in ('key', 'value')}
  scratch['all'] = plgpu.Barrier(num_arrivals=GROUPS)

  def body(*refs):
    read, written, own = refs[:len(READS)], refs[len(READS):len(READS) + len(outs)], refs[len(READS) + len(outs):]
    at = [lax.axis_index(name) for name in ('h', 'b', 'w')]
    kernel(Place(dict(zip(READS, read, strict=True)), dict(zip(outs, written, strict=True)), dict(zip(scratch, own, strict=True)),
                 (at[0], at[1], lax.rem(at[1], rows), at[2]), N), scale)
  run = plgpu.kernel(
      body, out_type=list(outs.values()), scratch_types=list(scratch.values()), grid=(H, B), grid_names=('h', 'b'), num_threads=GROUPS,
      thread_name='w', compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane))
  hold = jnp.concatenate([tokens['hold'], tokens['hold'][-1:]])            # also of the chunk that nobody reads
  given = {**start, **memory, **tokens, 'hold': hold, 'where': jnp.zeros((N,), jnp.int32)}
  return dict(zip(outs, run(*(given[name] for name in READS)), strict=True))
