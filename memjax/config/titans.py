"""The wirings of Titans around attention (titans specification section 12): 'a+b:mag', 'a+b:mac', and what they need."""
import dataclasses
from typing import Any

from memjax.config.errors import refuse
from memjax.config.layout import MAC, MAG, stages
from memjax.config.mixers import AttentionConfig
from memjax.config.options import config, option


@config
class TitansConfig:
  """How ':mag' and ':mac' join attention and memory."""
  fuse: str = option('double_sigmoid', 'norm(y) act(norm(m)) of the reads y of attention and m of the memory with act = 2 sigmoid, '
                     'sigmoid or silu; or w y + (1 - w) m with a learned gate w', choices=('double_sigmoid', 'sigmoid', 'silu', 'mix'))
  lookback: int = option(0, "segments before its own whose tokens attention of ':mac' sees", low=0, high=1)
  learned: int = option(0, "learned queries with which ':mac' recalls at the start of a segment; 0 = one from each token", low=0)
  asked: str = option('aligned', "whose queries recall for ':mac': a token sees the answer to its own and earlier ones of its segment, or "
                      'to all of the segment before', choices=('aligned', 'previous'))
  write: str = option('attention', "what the memory of ':mac' learns from: what attention found; that plus the input, which then also "
                      'takes its place in fuse; or the input, which it reads once, for attention to see and for fuse',
                      choices=('attention', 'sum', 'input'))
  read: str = option('token', "the memory that ':mac' reads with what attention found: with the writes up to that token, or that of the "
                     "segment's start", choices=('token', 'segment'))


def check_titans(model: Any) -> None:
  """Refuses, in a ModelConfig, mixers that ':mag' and ':mac' cannot join, and options of theirs where neither is in use."""
  titans, used = model.block.titans, set()
  for where in ('prefix', 'pattern', 'suffix'):
    for layer in getattr(model, where):
      for names, wiring in stages(layer):
        if wiring not in (MAG, MAC): continue
        used.add(wiring)
        _check_stage(model, names, wiring, path=f'{where} layer {layer!r}')
  for field in dataclasses.fields(titans):
    needed = (MAG, MAC) if field.name == 'fuse' else (MAC,)
    changed = getattr(titans, field.name) != field.default
    refuse(changed and not used.intersection(needed), f'block.titans.{field.name} applies to {" and ".join(needed)}, which no layer has')
    asks = field.name in ('learned', 'asked', 'read')
    refuse(changed and asks and titans.write == 'input',
           f"block.titans.{field.name} does not apply to write='input', where each token reads the memory once")
  refuse(titans.learned > 0 and titans.asked != 'aligned', f"block.titans.learned={titans.learned} leaves no queries to asked='previous'")


def _check_stage(model: Any, names: tuple[str, ...], wiring: str, *, path: str) -> None:
  refuse(len(names) != 2, f'{path} puts {len(names)} mixers into {wiring}; it joins an attention and a memory')
  (first, second), titans = names, model.block.titans
  attention, memory = (model.mixers[name] for name in names)
  refuse(not isinstance(attention, AttentionConfig),
         f'{path} begins with {first!r} of kind {attention.kind}; {wiring} begins with attention')
  wide = attention.heads * attention.head_width
  refuse(wide not in (0, model.width), f'{path} needs mixers.{first}.heads times head_width to be width={model.width}, not {wide}')
  refuse(isinstance(memory, AttentionConfig), f'{path} ends with {second!r} of kind {memory.kind}; {wiring} ends with a memory')
  if wiring == MAG:
    refuse(second in model.grafted and titans.fuse != 'double_sigmoid',
           f'{path} grafts {second!r}; only block.titans.fuse=double_sigmoid leaves a host undisturbed, not {titans.fuse}')
    mode = memory.rule.mode if memory.kind == 'neural' else ''
    blind = mode in ('block', 'chunk_gates') and attention.kind == 'window' and attention.window < memory.chunk
    refuse(blind, f"{path} leaves tokens unseen: mixers.{second}.rule.mode={mode!r} needs mixers.{first}.window of at least its chunk")
    return
  refuse(memory.kind != 'neural', f'{path} ends with {second!r} of kind {memory.kind}; {MAC} ends with kind neural')
  refuse(memory.waits or memory.rule.mode == 'tnt',
         f'{path} ends with {second!r}, whose writes wait for the end of a chunk; {MAC} reads every token')
  refuse(memory.proj.source != 'input', f"{path} writes what block.titans.write says; mixers.{second}.proj.source='stream' does not apply")
  refuse(attention.kind != 'window', f'{path} begins with {first!r} of kind {attention.kind}; {MAC} begins with window, its segment')
  refuse(attention.backend.startswith('cudnn'),
         f'{path} attends also to what was recalled, which mixers.{first}.backend={attention.backend!r} does not have')
  refuse(attention.window % memory.chunk != 0,
         f'{path} needs mixers.{first}.window={attention.window}, its segment, to be a multiple of mixers.{second}.chunk={memory.chunk}')
  refuse(bool({first, second}.intersection(model.grafted)),
         f'{path} cannot be grafted: {MAC} puts more keys into the softmax, which disturbs the host; use a stage of its own or {MAG}')
