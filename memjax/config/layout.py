"""How layers are written and where they are: 'swa+mem:gate>bank' as stages and mixers, the parts of a stack, names of modules."""
from collections.abc import Iterator
from typing import Any

GATE, MAG, MAC, BARE = ':gate', ':mag', ':mac', ':bare'
WIRINGS = (GATE, MAG, MAC)


def stages(layer: str) -> tuple[tuple[tuple[str, ...], str], ...]:
  """((('swa', 'mem'), ':gate'), (('bank',), '')) for 'swa+mem:gate>bank' (or that with ':bare'): the residual stages of one
  layer in order, each with its mixers and how they are joined, one of `WIRINGS` or '' for a sum."""
  found = ((stage, next((wiring for wiring in WIRINGS if stage.endswith(wiring)), '')) for stage in layer.removesuffix(BARE).split('>'))
  return tuple((tuple(stage.removesuffix(wiring).split('+')), wiring) for stage, wiring in found)


def mixer_names(layer: str) -> tuple[str, ...]:
  """('swa', 'mem', 'bank') for 'swa+mem:gate>bank': all mixers of one layer."""
  return tuple(name for names, _ in stages(layer) for name in names)


def suffix_of(stage: int) -> str:
  """'' for the first stage of a layer, '_1' for the second: how the names of its modules end."""
  return f'_{stage}' if stage else ''


def stacks(model: Any) -> dict[str, tuple[str, ...]]:
  """The layers of a ModelConfig by part: 'prefix', 'repeats' (one pattern) and 'suffix'; parts without layers are absent."""
  parts = {'prefix': model.prefix, 'repeats': model.pattern if model.repeats else (), 'suffix': model.suffix}
  return {part: layers for part, layers in parts.items() if layers}


def walk_layers(model: Any) -> Iterator[tuple[tuple[str, str], int, str]]:
  """(part and layer in the parameters, repeat, pattern) of all layers in order; repeat -1: the layer is not scanned."""
  for part, layers in stacks(model).items():
    for repeat in range(model.repeats) if part == 'repeats' else (-1,):
      yield from (((part, f'layer_{number}'), repeat, layer) for number, layer in enumerate(layers))


def mixer_path(model: Any, part: str, layer: str, mixer: str) -> str:
  """'repeats/layer_0/mixers_1/bank': where the parameters of a mixer in `layer` ('layer_0') of a part are."""
  names = enumerate(stages(stacks(model)[part][int(layer.removeprefix('layer_'))]))
  stage = next(number for number, (mixers, _) in names if mixer in mixers)
  return f'{part}/{layer}/mixers{suffix_of(stage)}/{mixer}'
