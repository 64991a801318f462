"""Writes data/references.npz, data/cases.json and data/written: what transformers computes for tiny random models.

python -m tests.adapters.make_references       needs torch and transformers; the tests themselves need neither

The weights are not stored: `weights` draws them from a stream of numpy that is frozen for good (RandomState). Matrices are
0.3 N(0, 1), norms 1 + 0.2 N(0, 1), biases 0.2 N(0, 1): at the initial values of a library most mistakes cannot be seen.
"""
import json
import zlib
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / 'data'
ROWS, LENGTH, IGNORED = 2, 24, 5
BASE = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, rms_norm_eps=1e-6, initializer_range=.3)
LLAMA3 = dict(rope_type='llama3', rope_theta=10000., factor=8., low_freq_factor=1., high_freq_factor=4.,
              original_max_position_embeddings=32)
YARN = dict(rope_type='yarn', rope_theta=10000., factor=4., original_max_position_embeddings=32)
CASES = {
    'llama_plain': ('llama', {}),
    'llama_bias_mha_tied': ('llama', dict(attention_bias=True, mlp_bias=True, num_key_value_heads=4, tie_word_embeddings=True)),
    'llama_llama3rope': ('llama', dict(rope_parameters=LLAMA3)),
    'llama_linear': ('llama', dict(rope_parameters=dict(rope_type='linear', rope_theta=500., factor=4.))),
    'llama_headdim16': ('llama', dict(head_dim=16, rms_norm_eps=1e-5)),
    'qwen2': ('qwen2', {}),
    'qwen2_tied_yarn': ('qwen2', dict(tie_word_embeddings=True, rope_parameters=YARN)),
    'qwen2_window': ('qwen2', dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    'qwen3': ('qwen3', dict(head_dim=16, rope_parameters=dict(YARN, attention_factor=1.3, beta_fast=8., beta_slow=2.))),
    'qwen3_tied_bias': ('qwen3', dict(head_dim=8, attention_bias=True, tie_word_embeddings=True)),
    'mistral_window': ('mistral', dict(sliding_window=5, head_dim=8)),
    'mistral_nowin_hd12': ('mistral', dict(sliding_window=None, head_dim=12)),
}
WRITTEN = 'qwen2_tied_yarn'        # the case whose folder transformers writes
GRADIENTS = ('embed_tokens.weight', 'layers.0.self_attn.q_proj', 'layers.0.self_attn.q_norm', 'layers.1.self_attn.k_proj.bias',
             'layers.1.mlp.down_proj', 'layers.1.input_layernorm', 'lm_head', 'model.norm')


def weights(case: str, shapes: dict) -> dict:
  """{name: float32 array} of a case, each tensor from a seed of its own."""
  out = {}
  for name, shape in shapes.items():
    normal = np.random.RandomState(zlib.crc32(f'{case}/{name}'.encode())).standard_normal(shape)
    if len(shape) == 2: value = .3 * normal
    else: value = .2 * normal + (0 if name.endswith('bias') else 1)
    out[name] = value.astype(np.float32)
  return out


def tokens(case: str) -> np.ndarray:
  """[ROWS, LENGTH] token ids; the first IGNORED ones of row 0 are not scored."""
  return np.random.RandomState(zlib.crc32(case.encode())).randint(0, BASE['vocab_size'], (ROWS, LENGTH))


def older(config: dict) -> dict:
  """The same config.json in the words of transformers 4."""
  config = dict(config, torch_dtype=config['dtype'])
  rope = dict(config.pop('rope_parameters'))
  config['rope_theta'], kind = rope.pop('rope_theta'), rope.pop('rope_type')
  config['rope_scaling'] = None if kind == 'default' else {'type': kind, **rope}
  for name in ('dtype', 'layer_types'): config.pop(name, None)
  return config


def compute(case: str) -> tuple[dict, dict]:
  """({'config', 'older', 'shapes'}, {'logits', 'loss', 'gradient/NAME'}) of one case."""
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM
  kind, changes = CASES[case]
  config = AutoConfig.for_model(kind, **{**BASE, **changes, 'bos_token_id': 1, 'eos_token_id': 2, 'dtype': 'float32'})
  model = AutoModelForCausalLM.from_config(config, attn_implementation='eager').float().eval()
  own = dict(model.named_parameters())
  shapes = {name: list(value.shape) for name, value in own.items()}
  with torch.no_grad():
    for name, value in weights(case, shapes).items(): own[name].copy_(torch.from_numpy(value))
  ids = torch.from_numpy(tokens(case))
  labels = ids.clone()
  labels[0, :IGNORED] = -100
  out = model(ids, labels=labels)
  out.loss.backward()
  arrays = {'logits': out.logits.detach().numpy(), 'loss': np.float32(out.loss.item())}
  for name, value in own.items():
    if any(part in name for part in GRADIENTS): arrays[f'gradient/{name}'] = value.grad.numpy()
  if case == WRITTEN: model.save_pretrained(DATA / 'written')
  tree = json.loads(config.to_json_string(use_diff=False))
  drop = ('transformers_version', 'architectures', 'id2label', 'label2id', '_name_or_path', 'chunk_size_feed_forward', 'problem_type')
  tree = {name: value for name, value in tree.items() if name not in drop}
  return {'config': tree, 'older': older(tree), 'shapes': shapes}, arrays


def main() -> None:
  """Writes all cases."""
  described, arrays = {}, {}
  for case in CASES:
    described[case], found = compute(case)
    arrays |= {f'{case}/{name}': value for name, value in found.items()}
    print(case, np.abs(found['logits']).max(), found['loss'])
  (DATA / 'cases.json').write_text(json.dumps(described, indent=1) + '\n')
  np.savez_compressed(DATA / 'references.npz', **arrays)


if __name__ == '__main__': main()
