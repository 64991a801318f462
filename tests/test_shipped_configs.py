"""Every shipped config: its size at full width against what its docstring says, and a short run against kept values."""
import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from memjax.config.flags import load
from memjax.models.decoder import build_decoder, param_shapes
from tests import golden

NAMES = sorted(path.stem for path in golden.CONFIGS.glob('*.py') if path.stem not in ('saved', 'from_file'))
WORDS = 33_278                                                                    # of WikiText-2, <eos> and <unk> included


@pytest.fixture(scope='module')
def cache(tmp_path_factory): return str(tmp_path_factory.mktemp('tokens'))


def full_size(name):
  """The config with its vocabulary filled in, as training does from the tokenizer."""
  config = load(golden.CONFIGS / f'{name}.py')
  size = config.model.vocabulary or {'bytes': 256, 'word': WORDS}[config.data.tokenizer.kind]
  return load(golden.CONFIGS / f'{name}.py', f'model.vocabulary={size}')


# Their golden values are compared by `make test-slow`.
LONG = ('adapter_qwen2p5_1p5b', 'adapter_smollm2_135m', 'attention_150m', 'attention_small', 'default', 'hamt_seed', 'hamt_small',
        'hybrid_150m', 'lora_only', 'mat_small', 'mat_tiny', 'memory_lora_combined', 'moc_371m', 'titans_linear_exact', 'titans_mac_170m',
        'titans_mag_170m', 'titans_mal_170m', 'titans_tiny', 'vanilla_control', 'wikitext2')
# Put together by `make test-slow`: those so like adapter_smollm2_135m, and large ones that are slow to trace.
LIKE = ('adapter_qwen2p5_1p5b', 'attention_150m', 'hybrid_150m', 'memory_lora_combined', 'titans_mac_170m', 'titans_mag_170m',
        'titans_mal_170m', 'titans_linear_exact', 'attention_small', 'vanilla_control')


def some(slow): return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in NAMES]


@pytest.mark.parametrize('name', NAMES)
def test_size_is_that_of_the_docstring(name):
  model = build_decoder(full_size(name).model)
  count = sum(a.size for a in jax.tree.leaves(param_shapes(model)[0]))
  words = ast.get_docstring(ast.parse((golden.CONFIGS / f'{name}.py').read_text(encoding='utf-8')))
  assert f'{count:,} parameters' in words or (name == 'hamt_seed' and f'{count:,} ' in words), f'{count:,} parameters'


@pytest.mark.parametrize('name', some(LIKE))
def test_full_size_fits_together(name):
  """Shapes of one training batch at full size, loss and gradient included, computing nothing."""
  config = full_size(name)
  model, rows = build_decoder(config.model), (config.training.batch, config.training.length)
  params, token = param_shapes(model)[0], jax.ShapeDtypeStruct(rows, jnp.int32)
  def loss(params, token, position):
    logits, state, aux = model.apply({'params': params}, token, model.init_state(rows[0]), position_BxL=position, key=jax.random.key(0))
    return logits.mean() + aux['penalty'], (logits, state)
  grads, (logits, state) = jax.eval_shape(jax.grad(loss, has_aux=True), params, token, token)
  same = lambda a, b: jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), a, b)
  assert logits.shape == (*rows, config.model.vocabulary) and all(jax.tree.leaves(same(grads, params)))
  attention = any(mixer.kind == 'attention' for mixer in config.model.mixers.values())
  assert attention or all(jax.tree.leaves(same(state, jax.eval_shape(lambda: model.init_state(rows[0])))))


def test_every_config_has_golden_values():
  assert set(NAMES) == set(golden.OVERRIDES) == {path.stem for path in Path(golden.FOLDER).glob('*.json')}


@pytest.mark.parametrize('name', some(LONG))
def test_golden(name, cache):
  """Three losses to 1e-3 and sixteen greedy tokens exactly; `python -m tests.golden` after a change that was meant."""
  found, kept = golden.compute(name, cache), golden.read(name)
  assert found['loss'] == pytest.approx(kept['loss'], rel=1e-3), kept['jax']
  assert found['token'] == kept['token'], kept['jax']
