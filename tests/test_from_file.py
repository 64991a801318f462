"""Option files of MAT and MoC: every key is honoured, warned of or refused; what is wrong is one line with the name of the file."""
import dataclasses
import logging
import re

import pytest
import yaml

from memjax.config.codec import diff
from memjax.config.errors import UserError
from memjax.config.flags import load
from memjax.config.seed_file import check_tree, fill, load_seed, to_config, warnings
from memjax.config.seed_options import SECTIONS

ROUTED = {'use_chapters': True, 'num_chapters': 9, 'num_memory_tokens': 36, 'top_k_chapters': 2}
BASE = {'memory': ROUTED, 'model': {'num_layers': 4}, 'training': {'training_mode': 'pretraining', 'dataset_name': 'shakespeare'}}
SHARED = {'memory.num_shared_chapters': 1}
NORMED = SHARED | {'memory.normalize_shared_routed_before_mixing': True}
STORED = {'memory.quantize_memory': True, 'memory.memory_qat': True}
CONTEXT, HUB, SCALE = {'context.enabled': True}, {'training.dataset_name': 'owner/name'}, {'training.num_gpus': 4}
STOPS, LOW = {'training.early_stopping': True}, {'memory.use_low_rank_memory': True}
WSD, PLACED = {'training.scheduler': 'wsd'}, 'memory.memory_layer_placement'
CHAPTERS = 'use_chapters: true, num_chapters: 64'

# key: (another legal value, the rest of the file that it needs); honoured means that it changes the Config.
HONOURED = {
    'memory': {
        'vanilla_mode': (True, {}), 'use_memory_adapter': (False, {}), 'num_memory_tokens': (72, {}), 'memory_dim': (96, {}),
        'memory_num_heads': (6, {}), 'memory_num_kv_heads': (3, {}), 'memory_layer_placement': ('none', {}),
        'memory_layer_k': (1, {PLACED: 'last_k'}), 'memory_layer_n': (2, {PLACED: 'every_n'}),
        'memory_layer_indices': ([1, 3], {PLACED: 'custom'}), 'memory_sharing': ('per_layer', {}),
        'memory_sharing_k': (3, {'memory.memory_sharing': 'every_k_layers'}), 'memory_block_variant': ('B', {}),
        'memory_dropout': (0.1, {}),
        'memory_gradient_checkpointing': (False, {}), 'use_low_rank_memory': (True, {}), 'memory_rank': (24, LOW),
        'low_rank_mode': ('reduced_dim', LOW | {'memory.memory_rank': 24}), 'use_low_rank_projections': (True, {}),
        'projection_rank': (8, {'memory.use_low_rank_projections': True}), 'use_chapters': (False, {}), 'num_chapters': (18, {}),
        'top_k_chapters': (3, {}), 'num_shared_chapters': (1, {}), 'routed_scaling_factor': (2.0, {}),
        'normalize_shared_routed_before_mixing': (True, SHARED), 'shared_routed_norm_type': ('layernorm', NORMED),
        'shared_routed_norm_eps': ('1e-5', NORMED), 'routing_strategy_train': ('prefix-mean', {}),
        'routing_strategy_inference': ('hybrid', {}),
        'routing_window_size': (64, {'memory.routing_strategy_train': 'rolling'}),
        'routing_chunk_size': (16, {'memory.routing_strategy_train': 'chunk'}),
        'allow_noncausal_routing': (True, {'memory.routing_strategy_train': 'sequence'}), 'router_input': ('block_input', {}),
        'router_weight_norm': ('full', {}), 'router_type': ('product_key', {}), 'memory_combine': ('joint', {}),
        'token_routing_kernel_version': ('v5', {}), 'routed_attention_impl': ('scan', {}), 'routed_attention_block': (64, {}),
        'routed_attention_token_chunk': (256, {}), 'routed_gather_limit_mb': (1, {}), 'use_load_balance_loss': (False, {}),
        'load_balance_coefficient': (0.5, {}), 'balance_loss_form': ('legacy', {}), 'use_auxiliary_loss': (True, {}),
        'auxiliary_loss_coefficient': (0.5, {'memory.use_auxiliary_loss': True}),
        'auxiliary_loss_form': ('cv2', {'memory.use_auxiliary_loss': True}), 'use_z_loss': (True, {}),
        'z_loss_coefficient': (0.5, {'memory.use_z_loss': True}), 'router_bias_balancing': (True, {}),
        'router_bias_update_rate': (0.5, {'memory.router_bias_balancing': True}), 'quantize_memory': (True, {'memory.memory_qat': True}),
        'memory_quant_bits': (4, STORED), 'memory_quant_scheme': ('per_row', STORED), 'memory_quant_group': (16, STORED),
        'memory_qat': (True, {'memory.quantize_memory': True}), 'wo_init_zero': (False, {}), 'memory_init_std': (0.1, {}),
        'memory_bank_type': ('product_key', {}), 'use_both_memory_and_lora': (True, {'memory.use_memory_adapter': False})},
    'model': {
        'hidden_dim': (192, {}), 'num_heads': (6, {}), 'num_kv_heads': (4, {}), 'num_layers': (5, {}), 'intermediate_dim': (100, {}),
        'vocab_size': (500, {}), 'max_seq_len': (512, {}), 'max_position_embeddings': (512, {}), 'tokenizer_name': ('word', {}),
        'use_rope': (False, {}), 'rope_theta': (1e5, {}), 'dropout': (0.1, {}), 'hidden_activation': ('relu', {}),
        'initializer_range': (0.1, {}), 'self_attn_wo_init_std': (0.1, {}), 'mlp_down_proj_init_std': (0.1, {}), 'norm_eps': ('1e-5', {}),
        'use_rms_norm': (False, {}), 'tie_embeddings': (False, {})},
    'training': {
        'memory_lr': (0.1, {}), 'base_model_lr': (0, {}), 'memory_bank_lr': (0.0, {}), 'dataset_name': ('owner/name', {}),
        'dataset_subset': ('small', HUB), 'eval_split': ('validation', {}), 'text_field': (['body'], HUB), 'max_length': (128, {}),
        'distributed_strategy': ('FSDP', SCALE), 'num_gpus': (2, {}),
        'fsdp_sharding_strategy': ('no_shard', SCALE | {'training.distributed_strategy': 'fsdp'}), 'batch_size': (2, {}),
        'gradient_accumulation_steps': (2, {}), 'max_steps': (50, {}), 'warmup_steps': (0, {}), 'warmup_ratio': (0.5, {}),
        'optimizer': ('adam', {}), 'weight_decay': (0.5, {}), 'adam_beta1': (0.5, {}), 'adam_beta2': (0.5, {}),
        'adam_epsilon': ('1e-6', {}), 'weight_decay_mask': ('all', {}), 'max_grad_norm': (0.5, {}), 'scheduler': ('WSD', {}),
        'min_lr_ratio': (0.0, {}),
        'decay_start_step': (5000, {}), 'decay_start_ratio': (0.25, WSD), 'wsd_stable_steps': (300, WSD), 'wsd_stable_ratio': (0.5, WSD),
        'wsd_decay_shape': ('linear', WSD), 'mixed_precision': ('no', {}), 'gradient_checkpointing': (False, {}), 'save_steps': (50, {}),
        'eval_steps': (50, {}), 'save_total_limit': (None, {}), 'save_best_model': (False, {}), 'early_stopping': (True, {}),
        'early_stopping_patience': (2, STOPS), 'early_stopping_threshold': (0.5, STOPS), 'logging_steps': (1, {}),
        'wandb_run_name': ('run', {}), 'bank_sparse_update': (True, {}), 'seed': (1, {})},
    'context': {
        'enabled': (True, {}), 'capacity': (128, CONTEXT), 'num_clusters': (0, CONTEXT), 'top_k_clusters': (2, CONTEXT),
        'merge': ('sum', CONTEXT), 'age_decay': (0.5, CONTEXT), 'lloyd_iters': (0, CONTEXT), 'new_importance': (2.0, CONTEXT),
        'ref_threshold': (0.5, CONTEXT), 'layers': ([0, 2], CONTEXT)},
}
WARNED = {     # known, and without effect
    'memory': {'adapter_insert_point': 'after_attention', 'use_lora': True, 'lora_rank': 4, 'lora_alpha': 4, 'lora_dropout': 0.5,
               'lora_targets': ['q_proj']},
    'model': {'bos_token_id': 1, 'eos_token_id': 1, 'pad_token_id': 1, 'attention_dropout': 0.5, 'base_model_name': 'a/b',
              'freeze_base_model': False, 'use_flash_attention': False},
    'training': {'lora_lr': 0.5, 'training_mode': 'instruction_finetuning', 'dataset_split': 'train_sft', 'num_epochs': 2,
                 'save_precision': 'fp16', 'log_to_wandb': True, 'wandb_project': 'x', 'output_dir': 'x', 'resume_from_checkpoint': 'x',
                 'init_from_checkpoint': 'x'},
    'context': {'slots_per_prompt': 7, 'compressor': 'perceiver'},
}
REFUSED = {'memory': {'memory_quant_target': ('kv', STORED, "train='straight' applies to target 'bank'")}}
ALSO_WARNED = {('training', 'max_grad_norm'), ('training', 'weight_decay_mask'), ('memory', 'use_both_memory_and_lora')}
VALUES_WARNED = [      # values of honoured keys that are not
    ('memory.routing_strategy_inference', 'prefill-freeze'), ('memory.token_routing_kernel_version', 'v1'),
    ('memory.routed_attention_impl', 'pallas'), ('model.tokenizer_name', 'hub/name'), ('training.optimizer', 'sgd'),
    ('training.mixed_precision', 'fp16'), ('training.eval_split', 'train_sft'), ('training.text_field', 'messages'),
    ('training.fsdp_sharding_strategy', 'SHARD_GRAD_OP'), ('memory.routing_window_size', 64), ('context.merge', 'sum')]


def tree_of(changes):
  """BASE with values at 'section.key'."""
  tree = {name: dict(keys) for name, keys in BASE.items()}
  for path, value in changes.items():
    section, key = path.split('.')
    tree.setdefault(section, {})[key] = value
  return tree


def said(changes):
  """(Config, warnings) of BASE with changes."""
  given = check_tree(tree_of(changes))
  config = to_config(given, name='n')
  return config, warnings(given, config)


def rows(table): return [(section, key, row) for section, keys in table.items() for key, row in keys.items()]


def test_every_key_has_a_row():
  for section, options in SECTIONS.items():
    listed = [*HONOURED[section], *WARNED[section], *REFUSED.get(section, {})]
    assert sorted(listed) == sorted(options), section


def test_every_honoured_key_changes_the_config():
  for section, key, (value, rest) in rows(HONOURED):
    path = f'{section}.{key}'
    if (section, key) in {('memory', 'memory_qat'), ('memory', 'allow_noncausal_routing')} or key == 'memory_layer_indices':
      with pytest.raises(UserError): said(rest)            # refused without the key
      config, lines = said(rest | {path: value})
    else:
      (before, _), (config, lines) = said(rest), said(rest | {path: value})
      assert diff(before, config), path
    assert bool([line for line in lines if line.startswith(path)]) == ((section, key) in ALSO_WARNED), (path, lines)


def test_every_other_key_is_warned_of():
  plain = said({})[0]
  for section, key, value in rows(WARNED):
    rest = CONTEXT if section == 'context' else {}
    config, lines = said(rest | {f'{section}.{key}': value})
    assert [line for line in lines if line.startswith(f'{section}.{key}=')] and all('\n' not in line for line in lines), (key, lines)
    assert config == (said(CONTEXT)[0] if rest else plain), key


def test_refused_keys():
  for section, key, (value, rest, says) in rows(REFUSED):
    with pytest.raises(UserError, match=re.escape(says)): said(rest | {f'{section}.{key}': value})


@pytest.mark.parametrize(('path', 'value'), VALUES_WARNED)
def test_values_that_are_not_honoured(path, value):
  assert [line for line in said({path: value})[1] if line.startswith(path)]


def test_a_plain_file_has_no_warnings_but_that_of_the_training_mode():
  assert said({})[1] == []
  assert [line.split('=')[0] for line in warnings({}, to_config({}))] == ['training.training_mode']


@pytest.fixture
def write(tmp_path):
  def write(text):
    (tmp_path / 'f.yaml').write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding='utf-8')
    return str(tmp_path / 'f.yaml')
  return write


def test_round_trip(write):
  """All keys, defaults written out, mean the same as none of them."""
  for tree in ({}, BASE):
    full = {name: {key: list(v) if isinstance(v, tuple) else v for key, v in keys.items()} for name, keys in fill(check_tree(tree)).items()}
    assert load_seed(write(full)) == load_seed(write(tree)) == dataclasses.replace(to_config(tree), name='f')


@pytest.mark.parametrize(('text', 'says'), [
    ('memory: {memroy_dim: 3}', "unknown key memory.memroy_dim; did you mean 'memory_dim'?"),
    ('memory: {seed: 3}', 'unknown key memory.seed; it belongs to training'),
    ('memori: {}', "unknown section 'memori'; did you mean 'memory'?"),
    ('model: {xyz: 1}', 'unknown key model.xyz; no key of model is like it'), ('[]', 'the file holds [], not the sections'),
    ('model: 3', 'model is a section of keys, not 3'), ('model: {num_heads: 2.5}', 'model.num_heads wants int, got 2.5'),
    ('model: {num_heads: null}', 'model.num_heads is null, which has no meaning here'), ('model: {num_heads: 0}', 'model.num_heads'),
    ('training: {memory_lr: fast}', "training.memory_lr wants float, got 'fast'"), ('memory: {vanilla_mode: 1}', 'wants bool, got 1'),
    ('memory: {memory_sharing: global}', "memory.memory_sharing must be one of 'shared'"),
    ('model: {a: 1\n', 'line 2 is not a file of options'), ('model: {num_heads: 2, num_heads: 4}', "'num_heads' stands twice"),
    ('memory: {use_chapters: true}', 'memory and model: entries=1024 is not a multiple of chapters=100'),
    ('memory: {quantize_memory: true}', 'quantize_memory stores the bank as integers'),
    ('memory: {memory_layer_placement: custom, memory_layer_indices: [12]}', 'indices holds 12; the layers are 0 to 11'),
    ('memory: {memory_layer_placement: custom}', 'indices of placement custom are missing'),
    ('memory: {memory_bank_type: product_key, num_memory_tokens: 8}', 'num_memory_tokens=8 of memory_bank_type product_key is not'),
    ('training: {max_length: 9000}', 'training: max_length=9000 exceeds the 8192 positions'),
    ('model: {tokenizer_name: bytes, vocab_size: 300}', 'model.vocab_size=300: there are 256 bytes'),
    (f'memory: {{{CHAPTERS}, routing_strategy_train: sequence}}', "routing_strategy_train='sequence' lets a token see"),
    (f'memory: {{{CHAPTERS}, routing_strategy_inference: sequence}}', "routing_strategy_inference='sequence' lets"),
    (f'memory: {{{CHAPTERS}, routing_strategy_inference: chunk}}', "inference='chunk' has a learned start")])
def test_mistakes_are_one_line(text, says, write):
  path = write(text)
  with pytest.raises(UserError) as caught: load(f'configs/from_file.py:{path}')
  assert str(caught.value).startswith(path) and says in str(caught.value) and '\n' not in str(caught.value)


def test_missing_files(tmp_path):
  for source, says in (('', 'wants a YAML file'), (':nowhere.yaml', 'no such file: nowhere.yaml'), (f':{tmp_path}', 'cannot be read')):
    with pytest.raises(UserError, match=says): load(f'configs/from_file.py{source}')


MOC = """
model: {hidden_dim: 768, num_heads: 12, num_kv_heads: 4, num_layers: 16, intermediate_dim: 2304, vocab_size: 49152, rope_theta: 1e5,
        self_attn_wo_init_std: 0.00378, mlp_down_proj_init_std: 0.00378, norm_eps: 1e-5, max_seq_len: 1024}
memory: {num_memory_tokens: 262208, memory_num_heads: 12, memory_num_kv_heads: 12, memory_layer_placement: custom,
         memory_layer_indices: [14, 2, 6, 10], use_chapters: true, num_chapters: 4097, top_k_chapters: 64, num_shared_chapters: 1,
         routed_scaling_factor: 2.5, normalize_shared_routed_before_mixing: true, shared_routed_norm_eps: 1.0e-05, use_z_loss: true}
training: {memory_lr: 6e-4, base_model_lr: 3e-4, training_mode: pretraining, dataset_name: FOLDER, eval_split: eval, num_gpus: 8,
           batch_size: 32, max_steps: 9600, warmup_steps: 250, weight_decay: 0.1, scheduler: WSD, decay_start_step: 8160,
           save_steps: 100, eval_steps: 100}
"""


def test_the_published_run_is_our_config(write, tmp_path, caplog):
  """The options of the Mixture of Chapters with token routing give the model and the recipe of configs/moc_371m.py."""
  with caplog.at_level(logging.WARNING): config = load(f'configs/from_file.py:{write(MOC.replace("FOLDER", str(tmp_path)))}')
  ours = load(f'configs/moc_371m.py:{tmp_path}')
  assert caplog.records == []
  assert diff(config, ours) == ['name', 'model.mixers.bank.form.block', 'training.accumulate', 'evaluation.batches', 'evaluation.batch',
                                'mesh.data']


def test_warnings_go_to_the_log(write, caplog):
  with caplog.at_level(logging.WARNING): load(f'configs/from_file.py:{write({"training": {"save_precision": "fp16"}})}')
  paths = [record.getMessage().split(': ')[1].split('=')[0] for record in caplog.records]
  assert paths == ['training.training_mode', 'training.save_precision']
