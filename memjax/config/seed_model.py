"""The sections memory, model and context of a seed file, their defaults filled in, as a ModelConfig."""
import math
from types import SimpleNamespace
from typing import Any

from memjax.config.banks import (
  NONCAUSAL,
  BankConfig,
  BankFormConfig,
  BankLossConfig,
  BankQuantConfig,
  BankShapeConfig,
  MixingConfig,
  ProductKeyConfig,
  RouterConfig,
)
from memjax.config.context import ContextConfig
from memjax.config.errors import refuse
from memjax.config.layout import mixer_names
from memjax.config.mixers import AttentionConfig
from memjax.config.placement import ATTENTION, arrange, fold, place
from memjax.config.schema import BlockConfig, EmbeddingConfig, ModelConfig

DTYPES = {'no': 'float32', 'fp16': 'bfloat16', 'bf16': 'bfloat16'}
MERGES = {'weighted_mean': 'weighted', 'sum': 'sum', 'evict': 'evict'}
CONTEXT = 'context'


def build_model(memory: SimpleNamespace, model: SimpleNamespace, context: SimpleNamespace, *, vocabulary: int,
                precision: str) -> ModelConfig:
  """The decoder that the sections describe. Raises ConfigError, the message starting at a key or field."""
  block = BlockConfig(
      norm='rmsnorm' if model.use_rms_norm else 'layernorm', activation=model.hidden_activation, norm_epsilon=model.norm_eps,
      dropout=model.dropout, init_std=model.initializer_range, mixer_out_std=model.self_attn_wo_init_std or 0.0,
      mlp_out_std=model.mlp_down_proj_init_std or 0.0)
  embedding = EmbeddingConfig(tie=model.tie_embeddings, std=model.initializer_range)
  stack = _stack(memory, model)
  if context.enabled: stack = _add_context(stack, model, context)
  return ModelConfig(width=model.hidden_dim, hidden=model.intermediate_dim, vocabulary=vocabulary, block=block, embedding=embedding,
                     dtype=DTYPES[precision], grafted=(CONTEXT,) if context.enabled else (), **stack)


def _stack(memory, model) -> dict[str, Any]:
  """Attention and memory in their places; without a memory nothing of it is built."""
  rotary = {'rotary_base': model.rope_theta} if model.use_rope else {'rotary': False}
  attention = AttentionConfig(heads=model.num_heads, kv_heads=model.num_kv_heads or 0, **rotary)
  depth, is_on = model.num_layers, (memory.use_memory_adapter or memory.use_both_memory_and_lora) and not memory.vanilla_mode
  where = place(depth, memory.memory_layer_placement if is_on else 'none', k=memory.memory_layer_k, n=memory.memory_layer_n,
                indices=memory.memory_layer_indices or ())
  return arrange(depth, where, memory=_memory(memory, model) if where else None, attention=attention, variant=memory.memory_block_variant,
                 sharing=memory.memory_sharing, sharing_k=memory.memory_sharing_k)


def _memory(memory, model) -> BankConfig | ProductKeyConfig:
  if memory.memory_bank_type == 'product_key': return _product_key(memory, model)
  refuse(memory.quantize_memory and not memory.memory_qat,
         'quantize_memory stores the bank as integers, which cannot be trained; set memory_qat: true, or quantise after training')
  reduced = memory.use_low_rank_memory and memory.low_rank_mode == 'reduced_dim'
  routed = memory.use_chapters
  parts = {'router': _router(memory), 'mixing': _mixing(memory), 'loss': _losses(memory)} if routed else {}
  return BankConfig(
      heads=memory.memory_num_heads or model.num_heads, kv_heads=memory.memory_num_kv_heads or model.num_kv_heads or 0,
      projection_rank=memory.projection_rank if memory.use_low_rank_projections and not reduced else 0, dropout=_dropout(memory),
      zero_out=memory.wo_init_zero, shape=_shape(memory, reduced), quant=_quant(memory), form=_form(memory), **parts)


def _dropout(memory) -> float:
  return -1.0 if memory.memory_dropout is None else memory.memory_dropout


def _product_key(memory, model) -> ProductKeyConfig:
  keys = math.isqrt(memory.num_memory_tokens)
  refuse(keys ** 2 != memory.num_memory_tokens,
         f'num_memory_tokens={memory.num_memory_tokens} of memory_bank_type product_key is not a square')
  return ProductKeyConfig(heads=memory.memory_num_heads or model.num_heads, keys=keys, top_k=memory.top_k_chapters,
                          value_width=memory.memory_dim or 0, dropout=_dropout(memory), zero_out=memory.wo_init_zero)


def _shape(memory, reduced: bool) -> BankShapeConfig:
  low = {'low_rank': 'reduced' if reduced else 'factorized', 'rank': memory.memory_rank} if memory.use_low_rank_memory else {}
  return BankShapeConfig(entries=memory.num_memory_tokens, width=0 if reduced else memory.memory_dim or 0, std=memory.memory_init_std,
                         chapters=memory.num_chapters if memory.use_chapters else 0, **low)


def _router(memory) -> RouterConfig:
  """The router; strategies that see the future are refused by the names of the file."""
  train, inference = memory.routing_strategy_train, memory.routing_strategy_inference
  remedy = 'lets a token see the future; use token, prefix-mean, rolling or chunk'
  refuse(train in NONCAUSAL and not memory.allow_noncausal_routing,
         f"routing_strategy_train='{train}' {remedy}, or set memory.allow_noncausal_routing: true")
  refuse(inference in NONCAUSAL and inference != train, f"routing_strategy_inference='{inference}' {remedy}")
  inference = '' if inference in (None, train, 'prefill-freeze') else inference
  refuse(inference == 'chunk', "routing_strategy_inference='chunk' has a learned start, which only training with chunk learns")
  more = {'window': memory.routing_window_size} if {'rolling', 'hybrid', 'sequence-rolling'} & {train, inference} else {}
  if train == 'chunk': more['block'] = memory.routing_chunk_size
  return RouterConfig(strategy=train, inference=inference, top_k=memory.top_k_chapters, kind=memory.router_type,
                      input={'mem_norm': 'normed', 'block_input': 'stream'}[memory.router_input], weight_norm=memory.router_weight_norm,
                      allow_noncausal=train in NONCAUSAL, **more)


def _mixing(memory) -> MixingConfig:
  combine = 'joint_bias' if memory.token_routing_kernel_version == 'v5' and memory.memory_combine == 'mixture' else memory.memory_combine
  norm = memory.normalize_shared_routed_before_mixing and memory.num_shared_chapters > 0
  more = {'norm': memory.shared_routed_norm_type, 'norm_epsilon': memory.shared_routed_norm_eps} if norm else {}
  return MixingConfig(combine=combine, shared=memory.num_shared_chapters, scale=memory.routed_scaling_factor, **more)


def _losses(memory) -> BankLossConfig:
  balance = memory.load_balance_coefficient if memory.use_load_balance_loss else 0.0
  auxiliary = memory.auxiliary_loss_coefficient if memory.use_auxiliary_loss else 0.0
  forms = {'balance_form': memory.balance_loss_form} if balance else {}
  if auxiliary: forms['auxiliary_form'] = memory.auxiliary_loss_form
  return BankLossConfig(balance=balance, auxiliary=auxiliary, z=memory.z_loss_coefficient if memory.use_z_loss else 0.0,
                        bias_rate=memory.router_bias_update_rate if memory.router_bias_balancing else 0.0, **forms)


def _quant(memory) -> BankQuantConfig:
  """Integers with straight-through training; per_row is the original's: absmax / 127, or / 7 of 4 bits."""
  if not memory.quantize_memory: return BankQuantConfig()
  scheme, group, bits = memory.memory_quant_scheme, memory.memory_quant_group, memory.memory_quant_bits
  if scheme == 'per_row': scheme, group = 'absmax7' if bits == 4 else 'absmax', 0
  return BankQuantConfig(bits=bits, scheme=scheme, group=group, target=memory.memory_quant_target, train='straight')


def _form(memory) -> BankFormConfig:
  kind = memory.routed_attention_impl if memory.routed_attention_impl in ('gather', 'scan', 'tiles', 'capacity') else 'auto'
  more = {'block': memory.routed_attention_block} if kind in ('auto', 'tiles') else {}
  if kind == 'auto': more['gather_limit_mb'] = memory.routed_gather_limit_mb
  return BankFormConfig(kind=kind, token_chunk=memory.routed_attention_token_chunk or 0, remat=memory.memory_gradient_checkpointing, **more)


def _add_context(stack: dict[str, Any], model, context) -> dict[str, Any]:
  """The stack with a context bank as the last residual stage of some layers."""
  chosen = {'top_k': context.top_k_clusters, 'iterations': context.lloyd_iters} if context.num_clusters else {}
  bank = ContextConfig(heads=model.num_heads, kv_heads=model.num_kv_heads or 0, slots=context.capacity, clusters=context.num_clusters,
                       merge=MERGES[context.merge], decay=context.age_decay, new_importance=context.new_importance,
                       threshold=context.ref_threshold, **chosen)
  depth, index, layers = model.num_layers, -1, []
  where = place(depth, 'all') if context.layers is None else place(depth, 'custom', indices=context.layers)
  for layer in stack['prefix'] + stack['pattern'] * stack['repeats'] + stack['suffix']:
    attends = ATTENTION in mixer_names(layer)       # the memory layers of variant B belong to the layer before them
    index += attends
    layers.append(f'{layer}>{CONTEXT}' if attends and index in where else layer)
  return {'mixers': stack['mixers'] | {CONTEXT: bank}, **fold(layers)}
