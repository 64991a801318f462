"""Models whose tables or kernels are stored as integers: banks of a trained model, the linear maps of a host."""
import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax.config.banks import BankQuantConfig, shared_table
from memjax.config.errors import UserError
from memjax.config.quant import PACKED, QuantConfig
from memjax.config.schema import ModelConfig
from memjax.layers.tree import named, nbytes
from memjax.models.decoder import build_decoder, param_shapes
from memjax.ops.low_rank import as_kernel
from memjax.ops.quantize import Quantized, quantize

SCHEMES = PACKED                       # of banks: name -> bits, scheme, group
TARGETS = ('', 'kv', 'bank', 'host')
CODES, SCALE, HALVES = 'kernel_codes', 'kernel_scale', (jnp.bfloat16, jnp.float16)


class Report(NamedTuple):
  """What storing kernels in fewer bits did: bytes of all parameters, and the relative error |W' - W| / |W| of each kernel."""
  before: int
  after: int
  error: dict[str, float]

  def line(self) -> str:
    """The report in words."""
    worst = max(self.error, key=self.error.get)
    mean = sum(self.error.values()) / len(self.error)
    return (f'{len(self.error)} kernels in fewer bits: {self.before:,} -> {self.after:,} bytes, relative error {mean:.3%} on average, '
            f'{self.error[worst]:.3%} at most ({worst})')


def parse_quantization(name: str, default: str = 'bank') -> BankQuantConfig | QuantConfig:
  """The config of 'int8', 'int4' or 'nf4' for what `default` says; '/bank', '/kv' (keys and values of banks) and '/host' (kernels of
  linear maps) say otherwise. UserError for other names."""
  scheme, _, target = name.partition('/')
  if scheme not in SCHEMES or target not in TARGETS:
    raise UserError(f"--quantize={name} is not one of {', '.join(SCHEMES)}, each with '/bank' or '/kv' for tables of memories or their "
                    "keys and values, '/host' for the kernels of linear maps")
  target = target or default
  if target == 'host': return QuantConfig(storage=scheme)
  bits, kind, group = SCHEMES[scheme]
  return BankQuantConfig(bits=bits, scheme=kind, group=group, target=target)


def kernel_quantization(name: str) -> QuantConfig:
  """The config of 'int8', 'int4' or 'nf4' for a host, which has no tables. UserError for other names."""
  quant = parse_quantization(name, 'host')
  if isinstance(quant, QuantConfig): return quant
  raise UserError(f'--quantize={name} is for the tables of memories; a pretrained model has none')


def quantize_model(config: ModelConfig, params: dict, name: str, default: str = 'bank') -> tuple[ModelConfig, dict]:
  """(config, parameters) with banks or kernels stored as `parse_quantization` understands `name`. Raises UserError as its parts do."""
  quant = parse_quantization(name, default)
  return quantize_host(config, params, quant)[:2] if isinstance(quant, QuantConfig) else quantize_banks(config, params, quant)


def with_quant(config: ModelConfig, quant: QuantConfig) -> ModelConfig:
  """The config with other storage of kernels; `QuantConfig()` for float32."""
  return dataclasses.replace(config, block=dataclasses.replace(config.block, quant=quant))


def quantize_host(config: ModelConfig, params: dict, quant: QuantConfig) -> tuple[ModelConfig, dict, Report]:
  """(config, parameters, report) with the kernels that `quant` names stored as it says; all else are the same arrays.

  Raises UserError for kernels that are stored in fewer bits already, targets that match none, and kernels that groups do not divide.
  """
  if config.block.quant.storage: raise UserError(f'the kernels are stored as {config.block.quant.storage} already')
  config = with_quant(config, quant)
  wanted, error = named(param_shapes(build_decoder(config))[0]), {}
  def walk(node, path):
    out = {}
    for name, leaf in node.items():
      where = f'{path}{name}'
      if isinstance(leaf, dict): out[name] = walk(leaf, f'{where}/')
      elif name == 'kernel' and f'{where}_codes' in wanted:
        stored = pack_kernel(leaf, quant.storage)
        error[where] = float(relative_error(stored, leaf))
        out |= {CODES: stored.codes, SCALE: stored.scale}
      elif name == 'kernel' and wanted[where].dtype in HALVES:
        out[name] = leaf.astype(wanted[where].dtype)
        error[where] = float(relative_error(out[name], leaf))
      else: out[name] = leaf
    return out
  stored = walk(params, '')
  return config, stored, Report(nbytes(params), nbytes(stored), error)


def dequantize_host(config: ModelConfig, params: dict) -> tuple[ModelConfig, dict]:
  """(config, parameters) with all kernels as float32 again: the numbers that the stored ones stand for."""
  def walk(node):
    out = {name: walk(leaf) if isinstance(leaf, dict) else leaf for name, leaf in node.items() if name not in (CODES, SCALE)}
    if CODES in node: out['kernel'] = as_kernel(stored_kernel(node, config.block.quant))
    elif 'kernel' in node and node['kernel'].dtype in HALVES: out['kernel'] = node['kernel'].astype(jnp.float32)
    return out
  return with_quant(config, QuantConfig()), walk(params)


def stored_kernel(module: dict, quant: QuantConfig) -> jax.Array | Quantized:
  """The kernel of a linear map as it is stored: numbers [.., in, out], or codes of its transpose."""
  if CODES not in module: return module['kernel']
  if quant.storage not in PACKED: raise UserError('the kernels are stored as integers; say how, with quant=config.block.quant')
  bits, scheme, group = PACKED[quant.storage]
  width = module[CODES].shape[-1] * (8 // bits)
  return Quantized(module[CODES], module[SCALE], bits=bits, scheme=scheme, group=group, width=width)


def pack_rows(x_ExD: jax.Array, storage: str) -> Quantized:
  """W^T [.., out, in] as codes: one scale for each output (int8), or for each 32 neighbours along the input."""
  bits, scheme, group = PACKED[storage]
  return quantize(x_ExD, bits=bits, scheme=scheme, group=group)


@jax.jit
def relative_error(stored: jax.Array | Quantized, kernel: jax.Array) -> jax.Array:
  """|W' - W| / |W| over all numbers of a kernel [.., in, out]; 0 for a kernel of zeros."""
  wide = kernel.astype(jnp.float32)
  norm = jnp.linalg.norm(wide)
  return jnp.where(norm > 0, jnp.linalg.norm(as_kernel(stored) - wide) / jnp.where(norm > 0, norm, 1), 0)


@functools.partial(jax.jit, static_argnums=1)
def pack_kernel(kernel: jax.Array, storage: str) -> Quantized:
  """A kernel [.., in, out] as the codes of its transpose."""
  return pack_rows(jnp.swapaxes(kernel, -1, -2), storage)


def quantize_banks(config: ModelConfig, params: dict, quant: BankQuantConfig) -> tuple[ModelConfig, dict]:
  """(config, parameters) with the tables of all banks stored as `quant` says; other parameters are the same arrays.

  Raises UserError for a model without banks, or one whose rows the groups do not divide.
  """
  banks = {name: mixer for name, mixer in config.mixers.items() if mixer.kind == 'bank'}
  if not banks: raise UserError('there is nothing to quantise: the model has no mixer of kind bank')
  changed = {name: dataclasses.replace(mixer, quant=quant) for name, mixer in banks.items()}
  config = dataclasses.replace(config, mixers={**config.mixers, **changed})
  if quant.target == 'kv': return config, params
  owners = [f'bank_{shared_table(mixer)}' for mixer in banks.values() if shared_table(mixer)]
  inside = re.compile(rf"(^|/)({'|'.join([rf'{name}/bank' for name in banks] + owners)})$")
  return config, _store(params, '', lambda path: bool(inside.search(path)), quant)


def _store(tree: dict, path: str, is_table: Any, quant: BankQuantConfig) -> dict:
  """The tree with every leaf of a table as its codes and scale."""
  out: dict[str, Any] = {}
  for name, leaf in tree.items():
    if isinstance(leaf, dict): out[name] = _store(leaf, f'{path}/{name}' if path else name, is_table, quant)
    elif is_table(path) and name in ('entries', 'mix'):
      stored = jax.jit(lambda x: quantize(x, bits=quant.bits, scheme=quant.scheme, group=quant.group))(leaf)
      out[f'{name}_codes'], out[f'{name}_scale'] = stored.codes, stored.scale
    elif not (is_table(path) and name.endswith('_step')): out[name] = leaf
  return out
