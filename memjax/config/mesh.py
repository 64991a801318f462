"""How devices are arranged: four axes, and presets that say which of them are split."""
import math

from memjax.config.errors import refuse
from memjax.config.options import config, option

AXES = ('data', 'fsdp', 'model', 'sequence')
PRESETS = {                            # name -> (axis that takes all devices that remain, axes that may be split)
    '': ('data', AXES), 'dp': ('data', ('data',)), 'fsdp': ('fsdp', ('data', 'fsdp')),
    'fsdp_tp': ('fsdp', ('data', 'fsdp', 'model')), 'bank_parallel': ('fsdp', ('data', 'fsdp')),
    'sequence_parallel': ('sequence', ('data', 'fsdp', 'sequence'))}


@config
class MeshConfig:
  """Devices along each axis; 0 = all that remain on the axis of the preset (data without one), else 1."""
  preset: str = option('', 'dp: rows over devices; fsdp: parameters too; fsdp_tp: heads and hidden channels over model (2) besides; '
                       'bank_parallel: as fsdp, and the chapters of banks over the same devices; sequence_parallel: pieces of each row',
                       choices=tuple(PRESETS))
  data: int = option(0, 'replicas; rows are split over data and fsdp', low=0)
  fsdp: int = option(0, 'parameters split over this axis', low=0)
  model: int = option(0, 'heads and hidden channels split over this axis', low=0)
  sequence: int = option(0, 'tokens of a row split over this axis', low=0)

  def __post_init__(self):
    _, splits = PRESETS[self.preset]
    for axis in AXES:
      refuse(axis not in splits and getattr(self, axis) > 1,
             f'{axis}={getattr(self, axis)} does not go with preset={self.preset!r}, which splits {" and ".join(splits)}')
    refuse(self.preset == 'fsdp_tp' and self.model == 1, "model=1 leaves nothing to preset='fsdp_tp'; use preset='fsdp'")

  @property
  def rest(self) -> str:
    """The axis that takes the devices that remain."""
    return PRESETS[self.preset][0]

  def sizes(self, devices: int) -> dict[str, int]:
    """Devices along each of `AXES` where there are so many; what does not divide is left over."""
    sizes = {axis: getattr(self, axis) or (2 if axis == 'model' and self.preset == 'fsdp_tp' else 1) for axis in AXES}
    if not getattr(self, self.rest): sizes[self.rest] = max(devices // math.prod(sizes.values()), 1)
    return sizes
