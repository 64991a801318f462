"""The options of the original Memory-Augmented Transformer and Mixture of Chapters files: names, defaults, types, what is lost.

One row a key of the specification's section 11; `memjax.config.seed_file` maps them onto our Config. Keys of our own, which those
files lack, stand among them.
"""
from typing import Any, NamedTuple

from memjax.config.banks import CAUSAL, NONCAUSAL
from memjax.config.placement import PLACEMENTS, SHARINGS, VARIANTS
from memjax.config.schema import ACTIVATIONS

HOST = 'a model from scratch is built; pretrained hosts and LoRA are not read from such a file'
WANDB = 'metrics.jsonl and TensorBoard are written, never Weights & Biases'
TOKENS = 'the tokenizer decides'


class Option(NamedTuple):
  """One key. `lost` says why values cannot be honoured: those of `only`, or every one but the default."""
  default: Any
  type: Any
  choices: tuple = ()
  low: float | None = None
  high: float | None = None
  lost: str = ''
  only: tuple = ()
  null: bool = False

  @property
  def limits(self) -> dict:
    """As `options.check` wants them."""
    return {'choices': self.choices, 'low': self.low, 'high': self.high}


def flag(default: bool, **more) -> Option:
  """true or false."""
  return Option(default, bool, **more)


def whole(default: int | None, low: int = 1, **more) -> Option:
  """An integer; null where the default is."""
  return Option(default, int, low=low, **{'null': default is None, **more})


def real(default: float | None, low: float = 0.0, high: float | None = None, **more) -> Option:
  """A number; null where the default is."""
  return Option(default, float, low=low, high=high, null=default is None, **more)


def text(default: str | None, *choices: str, **more) -> Option:
  """Text, one of the choices where there are some; null where the default is."""
  return Option(default, str, choices, null=default is None, **more)


MEMORY = {
    'vanilla_mode': flag(False), 'use_memory_adapter': flag(True), 'use_both_memory_and_lora': flag(False, lost=HOST),
    'num_memory_tokens': whole(1024), 'memory_dim': whole(None), 'memory_num_heads': whole(None), 'memory_num_kv_heads': whole(None),
    'memory_layer_placement': text('all', *PLACEMENTS), 'memory_layer_k': whole(5), 'memory_layer_n': whole(3),
    'memory_layer_indices': Option(None, tuple[int, ...], null=True),
    'memory_sharing': text('shared', *SHARINGS), 'memory_sharing_k': whole(2), 'memory_block_variant': text('A', *VARIANTS),
    'memory_dropout': real(None, high=0.999), 'memory_gradient_checkpointing': flag(True),
    'use_low_rank_memory': flag(False), 'memory_rank': whole(64), 'low_rank_mode': text('factorized', 'factorized', 'reduced_dim'),
    'use_low_rank_projections': flag(False), 'projection_rank': whole(64),
    'use_chapters': flag(False), 'num_chapters': whole(100), 'top_k_chapters': whole(20), 'num_shared_chapters': whole(0, 0),
    'routed_scaling_factor': real(1.0), 'normalize_shared_routed_before_mixing': flag(False),
    'shared_routed_norm_type': text('rms', 'rms', 'layernorm'), 'shared_routed_norm_eps': real(1e-6, 1e-12),
    'routing_strategy_train': text('token', *CAUSAL, *NONCAUSAL),
    'routing_strategy_inference': text(None, *CAUSAL, *NONCAUSAL, 'hybrid', 'prefill-freeze', only=('prefill-freeze',),
                                       lost='evaluation and generation route as training does'),
    'routing_window_size': whole(128), 'routing_chunk_size': whole(64), 'allow_noncausal_routing': flag(False),
    'router_input': text('mem_norm', 'mem_norm', 'block_input'), 'router_weight_norm': text('topk', 'topk', 'full'),
    'router_type': text('linear', 'linear', 'product_key'),
    'memory_combine': text('mixture', 'mixture', 'joint', 'joint_bias', 'legacy_scale'),
    'token_routing_kernel_version': text('v2', 'v1', 'v2', 'v3', 'v4', 'v5', only=('v1', 'v3', 'v4'),
                                         lost='every implementation gives the same result; v4 is memory_combine mixture, v5 joint_bias'),
    'routed_attention_impl': text('auto', 'auto', 'gather', 'scan', 'tiles', 'capacity', 'ragged', 'pallas', only=('ragged', 'pallas'),
                                  lost='auto is used, which gives the same result'),
    'routed_attention_block': whole(128), 'routed_attention_token_chunk': whole(None), 'routed_gather_limit_mb': whole(1024, 0),
    'use_load_balance_loss': flag(True), 'load_balance_coefficient': real(0.01),
    'balance_loss_form': text('normalized', 'normalized', 'legacy'),
    'use_auxiliary_loss': flag(False), 'auxiliary_loss_coefficient': real(0.01),
    'auxiliary_loss_form': text('kl', 'kl', 'cv2', 'legacy_mse'), 'use_z_loss': flag(False), 'z_loss_coefficient': real(0.001),
    'router_bias_balancing': flag(False), 'router_bias_update_rate': real(1e-3),
    'quantize_memory': flag(False), 'memory_quant_bits': Option(8, int, (4, 8)),
    'memory_quant_scheme': text('absmax', 'absmax', 'absmax7', 'nf4', 'per_row'), 'memory_quant_group': whole(32, 0),
    'memory_quant_target': text('bank', 'bank', 'kv'), 'memory_qat': flag(False),
    'wo_init_zero': flag(True), 'memory_init_std': real(0.02), 'memory_bank_type': text('attention', 'attention', 'product_key'),
    'adapter_insert_point': text('after_layer', 'after_layer', 'after_attention', lost=HOST),
    'use_lora': flag(False, lost=HOST), 'lora_rank': whole(16, lost=HOST), 'lora_alpha': real(32.0, lost=HOST),
    'lora_dropout': real(0.05, lost=HOST), 'lora_targets': Option(('q_proj', 'v_proj'), tuple[str, ...], lost=HOST),
}

MODEL = {
    'hidden_dim': whole(768), 'num_heads': whole(12), 'num_kv_heads': whole(None), 'num_layers': whole(12), 'intermediate_dim': whole(3072),
    'vocab_size': whole(32_000), 'max_seq_len': whole(8192), 'max_position_embeddings': whole(None), 'tokenizer_name': text(None),
    'bos_token_id': whole(None, 0, lost=TOKENS), 'eos_token_id': whole(None, 0, lost=TOKENS), 'pad_token_id': whole(None, 0, lost=TOKENS),
    'use_rope': flag(True), 'rope_theta': real(1e4, 1.0), 'dropout': real(0.0, high=0.999),
    'attention_dropout': real(0.0, high=0.999, lost='attention has no dropout of its own'),
    'hidden_activation': text('swiglu', *ACTIVATIONS), 'initializer_range': real(0.02, 1e-12),
    'self_attn_wo_init_std': real(None, 1e-12), 'mlp_down_proj_init_std': real(None, 1e-12),
    'norm_eps': real(1e-6, 1e-12), 'use_rms_norm': flag(True), 'tie_embeddings': flag(True),
    'base_model_name': text(None, lost=HOST), 'freeze_base_model': flag(True, lost=HOST),
    'use_flash_attention': flag(True, lost='the best attention there is is used'),
}

TRAINING = {
    'memory_lr': real(1e-4), 'lora_lr': real(1e-4, lost=HOST), 'base_model_lr': real(1e-5), 'memory_bank_lr': real(None),
    'training_mode': text('instruction_finetuning', 'instruction_finetuning', 'pretraining', only=('instruction_finetuning',),
                          lost='the model is trained on plain text, as in pretraining'),
    'dataset_name': text('HuggingFaceH4/ultrachat_200k'), 'dataset_subset': text(None),
    'dataset_split': text('train', lost='training reads the split train'), 'eval_split': text('test'),
    'text_field': text('messages', only=('messages',), lost="chats need instruction tuning; the column 'text' is read"),
    'max_length': whole(8192),
    'distributed_strategy': text('ddp', 'ddp', 'fsdp'), 'num_gpus': whole(1),
    'fsdp_sharding_strategy': text('FULL_SHARD', 'FULL_SHARD', 'SHARD_GRAD_OP', 'NO_SHARD', 'HYBRID_SHARD',
                                   only=('SHARD_GRAD_OP', 'HYBRID_SHARD'), lost='parameters are kept whole on every device'),
    'batch_size': whole(4), 'gradient_accumulation_steps': whole(4),
    'num_epochs': Option(None, float, low=0.0, null=True, lost='max_steps counts: the length of the text is not known here'),
    'max_steps': whole(10_000), 'warmup_steps': whole(100, 0), 'warmup_ratio': real(None, high=1.0),
    'optimizer': text('adamw', 'adamw', 'adam', 'sgd', only=('sgd',), lost='AdamW is used'),
    'weight_decay': real(0.01), 'adam_beta1': real(0.9, high=0.9999), 'adam_beta2': real(0.95, high=0.99999), 'adam_epsilon': real(1e-8),
    'weight_decay_mask': text('matrices', 'matrices', 'all', lost='all matrices decay, vectors (norms, biases) do not'),
    'max_grad_norm': real(1.0, lost='the gradient of each group is clipped by itself'),
    'scheduler': text('cosine', 'cosine', 'linear', 'constant', 'wsd'), 'min_lr_ratio': real(0.1, high=1.0),
    'decay_start_step': whole(None, 0), 'decay_start_ratio': real(None, high=1.0),
    'wsd_stable_steps': whole(None, 0), 'wsd_stable_ratio': real(0.0, high=1.0),
    'wsd_decay_shape': text('cosine', 'cosine', 'linear', 'one_minus_sqrt'),
    'mixed_precision': text('bf16', 'no', 'fp16', 'bf16', only=('fp16',), lost='bf16 is used, which needs no loss scaling'),
    'save_precision': text(None, 'fp32', 'fp16', 'bf16', lost='checkpoints keep float32'),
    'gradient_checkpointing': flag(True), 'save_steps': whole(500), 'eval_steps': whole(500),
    'save_total_limit': whole(3, null=True), 'save_best_model': flag(True),
    'early_stopping': flag(False), 'early_stopping_patience': whole(5), 'early_stopping_threshold': real(0.0),
    'logging_steps': whole(10), 'log_to_wandb': flag(False, lost=WANDB), 'wandb_project': text('memory-transformer', lost=WANDB),
    'wandb_run_name': text(None),
    'output_dir': text('./outputs', lost='--workdir says where'), 'resume_from_checkpoint': text(None, lost='use --resume_from'),
    'init_from_checkpoint': text(None, lost='use --init_from'), 'bank_sparse_update': flag(False), 'seed': whole(0, 0),
}

CONTEXT = {
    'enabled': flag(False), 'capacity': whole(4096, 2), 'slots_per_prompt': whole(100, lost='every 100 tokens become one slot'),
    'compressor': text('pool', 'pool', 'linear', 'perceiver', only=('linear', 'perceiver'), lost='pool is used'),
    'num_clusters': whole(64, 0), 'top_k_clusters': whole(4), 'merge': text('weighted_mean', 'weighted_mean', 'sum', 'evict'),
    'age_decay': real(0.99, high=1.0), 'lloyd_iters': whole(10, 0), 'new_importance': real(1.0, 1e-6),
    'ref_threshold': real(0.01, high=1.0), 'layers': Option(None, tuple[int, ...], null=True),
}

SECTIONS = {'memory': MEMORY, 'model': MODEL, 'training': TRAINING, 'context': CONTEXT}
