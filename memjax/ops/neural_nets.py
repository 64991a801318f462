"""Networks whose weights are a memory: each is written once against an interpreter, which decides what its weights are.

    ops.linear(name, x) = x W      ops.scale(name, x) = x (1 + gamma)      ops.bias(name, x) = x + beta      ops.slow(name)

Fast tensors belong to one row and head, slow ones are ordinary parameters. Tokens never mix, so that the gradient of one
token is rank-1 in every fast tensor. x is [B, H, C, width]; fast matrices are [B, H, in, out], vectors [B, H, width].
"""
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from memjax.config.registered import NETWORKS

ACTIVATIONS = {'silu': jax.nn.silu, 'gelu': lambda x: jax.nn.gelu(x, approximate=False), 'relu': jax.nn.relu, 'tanh': jnp.tanh}
KINDS = ('linear', 'mlp', 'swiglu', 'gated', 'factorised', 'low_rank', 'attention', 'custom')
EPSILON = 1e-5                       # of the layer norm
SHARP = 8.0                          # of attention over normed queries and keys, as in titans-pytorch


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(jnp.float32, a.dtype))


@_product.defjvp
def _product_jvp(spec, primals, tangents):
  # tangents have the dtype of the operands: transposed, the matmuls of gradients have narrow operands too, not float32 ones
  (a, b), (da, db) = primals, tangents
  part = lambda a, b: jnp.einsum(spec, a, b, preferred_element_type=a.dtype)
  out = _product(spec, a, b)
  return out, part(da, b).astype(out.dtype) + part(a, db).astype(out.dtype)


def dot(spec: str, a: jax.Array, b: jax.Array, dtype, *, wide: bool = True) -> jax.Array:
  """einsum of operands cast to `dtype`, accumulated in float32 (float64 for float64) and returned so, or not `wide`: in `dtype`."""
  a, b = a.astype(dtype), b.astype(dtype)
  return _product(spec, a, b) if wide else jnp.einsum(spec, a, b, preferred_element_type=dtype)


@dataclasses.dataclass(frozen=True)
class Network:
  """A memory network of key_width inputs and value_width outputs.

  kind: linear x W; mlp of `depth` layers; swiglu (silu(x W1) (.) x W3) W2; gated: residual layers mixed by a learned gate;
  factorised: each layer x U V; low_rank: slow W + fast U V; attention: causal, over the tokens given, plus a feed-forward; custom:
  `function`, as `neural_custom` has registered it. With `residual` M(x) = x + (1 + gain) (.) layer norm(net(x)), where the gain is
  fast, or slow. `bias`: fast biases on the layers of linear and mlp.
  """
  key_width: int
  value_width: int
  kind: str = 'mlp'
  depth: int = 2
  hidden: int = 0                    # 0 = 4 key_width
  activation: str = 'silu'
  rank: int = 8
  residual: bool = True
  slow_gain: bool = False
  bias: bool = False
  function: str = ''

  @property
  def widths(self) -> list[tuple[int, int]]:
    """(in, out) of each layer of the feed-forward kinds."""
    inner = self.hidden or 4 * self.key_width
    depth = 1 if self.kind == 'linear' else self.depth
    edges = [self.key_width, *[inner] * (depth - 1), self.value_width]
    return list(itertools.pairwise(edges))

  @property
  def fast(self) -> dict[str, tuple[int, ...]]:
    """Shapes of the fast tensors of one head, by name."""
    K, V, F, R = self.key_width, self.value_width, self.hidden or 4 * self.key_width, self.rank
    shapes = {}
    if self.kind == 'attention': shapes = {'query': (K, K), 'key': (K, K), 'value': (K, V), 'up': (K, F), 'down': (F, V)}
    elif self.kind == 'swiglu': shapes = {'gate': (K, F), 'up': (K, F), 'down': (F, V)}
    elif self.kind == 'gated':
      for n in range(self.depth): shapes |= {f'up_{n}': (K, F), f'down_{n}': (F, K), f'new_{n}': (K, K), f'old_{n}': (K, K)}
      shapes['out'] = (K, V)
    elif self.kind == 'custom': shapes = dict(NETWORKS[self.function].fast(K, V))
    elif self.kind in ('factorised', 'low_rank'):
      for n, (i, o) in enumerate(self.widths): shapes |= {f'u_{n}': (i, R), f'v_{n}': (R, o)}
    else:
      for n, (i, o) in enumerate(self.widths): shapes |= {f'w_{n}': (i, o), **({f'b_{n}': (o,)} if self.bias else {})}
    return shapes | ({'gain': (V,)} if self.residual and not self.slow_gain else {})

  @property
  def slow(self) -> dict[str, tuple[int, ...]]:
    """Shapes of the slow tensors of one head, by name."""
    shapes = {f's_{n}': edge for n, edge in enumerate(self.widths)} if self.kind == 'low_rank' else {}
    if self.kind == 'custom': shapes = dict(NETWORKS[self.function].slow(self.key_width, self.value_width))
    return shapes | ({'gain': (self.value_width,)} if self.residual and self.slow_gain else {})

  @property
  def is_linear(self) -> bool:
    """Whether the memory is one matrix (with or without bias), which mode 'exact' needs."""
    return self.kind == 'linear' and not self.residual

  @property
  def mixes(self) -> bool:
    """Whether tokens see the tokens before them, so that gradients are not rank-1."""
    return self.kind == 'attention'

  def __call__(self, ops, x):
    """M(x), [B, H, C, value_width]."""
    y = {'linear': _feed_forward, 'mlp': _feed_forward, 'swiglu': _swiglu, 'gated': _gated, 'factorised': _feed_forward,
         'low_rank': _feed_forward, 'attention': _attention, 'custom': _custom}[self.kind](self, ops, x).astype(x.dtype)
    if not self.residual: return y
    y -= y.mean(-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + EPSILON)
    scaled = y * (1 + ops.slow('gain')[None, :, None]) if self.slow_gain else ops.scale('gain', y)
    return x + scaled


def _feed_forward(net, ops, x):
  act = ACTIVATIONS[net.activation]
  for n in range(len(net.widths)):
    if n: x = act(x)
    if net.kind in ('factorised', 'low_rank'):
      made = ops.linear(f'v_{n}', ops.linear(f'u_{n}', x))
      x = made if net.kind == 'factorised' else made + dot('bhci,hio->bhco', x, ops.slow(f's_{n}'), ops.dtype, wide=False)
    else:
      x = ops.linear(f'w_{n}', x)
      if net.bias: x = ops.bias(f'b_{n}', x)
  return x


def _swiglu(net, ops, x):
  return ops.linear('down', jax.nn.silu(ops.linear('gate', x)) * ops.linear('up', x))


def _attention(net, ops, x):
  unit = lambda a: a * jax.lax.rsqrt(jnp.sum(a * a, -1, keepdims=True) + 1e-6)
  query, key = unit(ops.linear('query', x)), unit(ops.linear('key', x))
  C = x.shape[2]
  score = dot('bhtk,bhsk->bhts', query, key, ops.dtype) * SHARP
  score = jnp.where(jnp.tril(jnp.ones((1, 1, C, C), bool)), score, -jnp.inf)
  mixed = dot('bhts,bhsv->bhtv', jax.nn.softmax(score), ops.linear('value', x), ops.dtype)
  return mixed + ops.linear('down', ACTIVATIONS[net.activation](ops.linear('up', x)))


def _custom(net, ops, x):
  y = NETWORKS[net.function].function(ops, x)
  left = sorted(set(net.fast) - {'gain'} - set(ops.seen)) if isinstance(ops, Record) else []
  if left: raise ValueError(f'the memory network {net.function!r} does not use {left[0]!r}')
  wanted = (*x.shape[:-1], net.value_width)
  if y.shape != wanted: raise ValueError(f'the memory network {net.function!r} gives {list(y.shape)}, not {list(wanted)}')
  return y


def _gated(net, ops, x):
  act = ACTIVATIONS[net.activation]
  for n in range(net.depth):
    u = ops.linear(f'down_{n}', act(ops.linear(f'up_{n}', x)))
    x = x + jax.nn.sigmoid(ops.linear(f'new_{n}', u) + ops.linear(f'old_{n}', x)) * (u - x)
  return ops.linear('out', x)


class Plain:
  """Weights as they are: `fast` per row and head."""

  def __init__(self, fast: dict, slow: dict, dtype):
    self.fast, self.parameters, self.dtype = fast, slow, dtype

  def linear(self, name, x):
    """x W."""
    return dot('bhci,bhio->bhco', x, self.fast[name], self.dtype, wide=False)

  def scale(self, name, x):
    """x (1 + gamma)."""
    return x * (1 + self.fast[name][:, :, None])

  def bias(self, name, x):
    """x + beta."""
    return x + self.fast[name][:, :, None]

  def slow(self, name):
    """An ordinary parameter, [H, ...]."""
    return self.parameters[name]


class Record(Plain):
  """Plain, with a probe added after every fast operation and its input kept: d loss / d probe and that input are the two
  factors of the gradient of each token. A name used twice would not be rank-1: ValueError."""

  def __init__(self, fast: dict, slow: dict, dtype, probes: dict):
    super().__init__(fast, slow, dtype)
    self.probes, self.seen = probes, {}

  def _note(self, name, x):
    if name in self.seen: raise ValueError(f'the memory network uses {name!r} twice')
    self.seen[name] = x
    return self.probes[name]

  def linear(self, name, x):
    """x W + probe."""
    return super().linear(name, x) + self._note(name, x)

  def scale(self, name, x):
    """x (1 + gamma) + probe."""
    return super().scale(name, x) + self._note(name, x)

  def bias(self, name, x):
    """x + beta + probe."""
    return super().bias(name, x) + self._note(name, jnp.ones_like(x))


def probe_shapes(net: Network) -> dict[str, int]:
  """Channels after each fast operation, by name."""
  return {name: shape[-1] for name, shape in net.fast.items()}


def inner_loss(kind: str, prediction: jax.Array, target: jax.Array, *, scale: float = 0.5, argument: float = 0.0) -> jax.Array:
  """The loss of each token, over the last axis.

  l2: scale |e|^2 with e = prediction - target; dot: -<prediction, target>; huber (argument: where it turns linear; equals l2
  inside); lp: scale sum (e^2 + 1e-6)^(p/2), argument p; kl: KL(softmax target || softmax prediction).
  """
  if kind == 'dot': return -jnp.sum(prediction * target, -1)
  if kind == 'kl':
    log_target = jax.nn.log_softmax(target)
    return jnp.sum(jnp.exp(log_target) * (log_target - jax.nn.log_softmax(prediction)), -1)
  e = prediction - target
  if kind == 'l2': return scale * jnp.sum(e * e, -1)
  if kind == 'lp': return scale * jnp.sum((e * e + 1e-6) ** (argument / 2), -1)
  size = jnp.abs(e)
  return scale * jnp.sum(jnp.where(size < argument, e * e, argument * (2 * size - argument)), -1)
