"""GGUF files of the reference models, with a tokenizer of their size and a chat template: as llama.cpp converts such models."""
import numpy as np

from memjax.adapters.gguf_types import interleave_rows
from memjax.adapters.gguf_write import source, write_gguf
from tests.adapters.files import cases, tensors_of

NAMES = {'model.embed_tokens.': 'token_embd.', 'model.norm.': 'output_norm.', 'lm_head.': 'output.', 'model.layers.': 'blk.',
         'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm', 'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k',
         'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output', 'self_attn.q_norm': 'attn_q_norm',
         'self_attn.k_norm': 'attn_k_norm', 'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down'}
TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
TOKENS = [*SPECIAL, *'abcdefghijklmnopqrstuvwxyzABCDEFGH.,?!019ĠĊ|<>_', 'th', 'Ġth', 'Ġthe', 'at', 'er']
MERGES = ['t h', 'Ġ th', 'Ġth e', 'a t', 'e r']
VOCABULARY = {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'smollm', 'tokenizer.ggml.tokens': TOKENS,
              'tokenizer.ggml.token_type': [3 if token in SPECIAL else 1 for token in TOKENS], 'tokenizer.ggml.merges': MERGES,
              'tokenizer.ggml.bos_token_id': 1, 'tokenizer.ggml.eos_token_id': 2, 'tokenizer.ggml.add_bos_token': False,
              'tokenizer.chat_template': TEMPLATE}


def gguf_name(name):
  """The name in GGUF of a tensor of Hugging Face."""
  for theirs, ours in NAMES.items(): name = name.replace(theirs, ours)
  return name


def metadata_of(case):
  """The keys of the architecture."""
  config = cases()[case]['config']
  family, rope = config['model_type'], config['rope_parameters']
  family = 'llama' if family == 'mistral' else family
  own = {'block_count': config['num_hidden_layers'], 'context_length': config['max_position_embeddings'],
         'embedding_length': config['hidden_size'], 'feed_forward_length': config['intermediate_size'],
         'attention.head_count': config['num_attention_heads'], 'attention.head_count_kv': config['num_key_value_heads'],
         'attention.layer_norm_rms_epsilon': config['rms_norm_eps'], 'rope.freq_base': rope['rope_theta'],
         'vocab_size': config['vocab_size']}
  if 'head_dim' in config:
    own |= dict.fromkeys(('attention.key_length', 'attention.value_length', 'rope.dimension_count'), config['head_dim'])
  if rope['rope_type'] in ('linear', 'yarn'): own |= {'rope.scaling.type': rope['rope_type'], 'rope.scaling.factor': rope['factor']}
  if rope['rope_type'] in ('llama3', 'yarn'): own['rope.scaling.original_context_length'] = rope['original_max_position_embeddings']
  return {'general.architecture': family} | {f'{family}.{key}': value for key, value in own.items()}


def tensors_in_gguf(case):
  """{name in GGUF: rows as they are stored}, the divisors of Llama 3 among them."""
  config, out = cases()[case]['config'], {}
  heads = {'attn_q': config['num_attention_heads'], 'attn_k': config['num_key_value_heads']}
  for name, x in tensors_of(case).items():
    name = gguf_name(name)
    part = name.split('.')[-2]
    out[name] = interleave_rows(x, heads[part]) if part in heads and config['model_type'] in ('llama', 'mistral') else x
  if config['rope_parameters']['rope_type'] == 'llama3': out['rope_freqs.weight'] = llama3_divisors(config)
  return out


def llama3_divisors(config):
  """What the divisors are, frequency by frequency, as the converter of llama.cpp computes them."""
  rope, out = config['rope_parameters'], []
  for i in range(config['head_dim'] // 2):
    wavelength = 2 * np.pi * rope['rope_theta'] ** (2 * i / config['head_dim'])
    low, high = (rope['original_max_position_embeddings'] / rope[f'{one}_freq_factor'] for one in ('low', 'high'))
    smooth = (rope['original_max_position_embeddings'] / wavelength - rope['low_freq_factor']) / (
        rope['high_freq_factor'] - rope['low_freq_factor'])
    out.append(1. if wavelength < high else rope['factor'] if wavelength > low else 1 / ((1 - smooth) / rope['factor'] + smooth))
  return np.array(out, np.float32)


def write_case(path, case, *, kind='F32', tensors=(), **metadata):
  """The path, now a GGUF file of a case; keywords change its metadata, `tensors` its tensors (None takes one out)."""
  keys = metadata_of(case) | VOCABULARY | {key.replace('__', '.'): value for key, value in metadata.items()}
  rows = tensors_in_gguf(case) | dict(tensors)
  write_gguf(path, {key: value for key, value in keys.items() if value is not None},
             {name: source(x, 'F32' if x.ndim == 1 else kind) for name, x in rows.items() if x is not None})
  return str(path)
