"""Fingerprints of the seeded random keys that a model computes with; checkpoints carry them, so that other keys are never read silently."""
from typing import Any

from memjax.config.errors import UserError
from memjax.config.schema import Config
from memjax.ops.keys import check_fingerprint, fingerprint


def key_seeds(config: Config) -> dict[str, int]:
  """{mixer: seed} of the mixers that use random keys, position codes or permutations."""
  seeds = {}
  for name, mixer in config.model.mixers.items():
    if mixer.kind == 'holographic_seed': seeds[name] = mixer.key_seed
    elif mixer.kind == 'holographic' and (mixer.binding.position or mixer.address.kind == 'copies'): seeds[name] = mixer.binding.seed
  return seeds


def key_fingerprints(config: Config) -> dict[str, str]:
  """{mixer: hash of its first keys}, for the record of a checkpoint."""
  return {name: fingerprint(seed) for name, seed in key_seeds(config).items()}


def check_keys(config: Config, record: dict[str, Any]) -> None:
  """Nothing; raises UserError where this library computes other keys than the checkpoint was trained with."""
  stored = (record.get('data') or {}).get('keys', {})
  for name, seed in key_seeds(config).items():
    try:
      if name in stored: check_fingerprint(seed, stored[name])
    except UserError as error:
      raise UserError(f'model.mixers.{name}: {error}') from None
