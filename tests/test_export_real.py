"""A real model through the export command: SmolLM2-135M to a folder and back, low-rank changes into Q8_0 (Q7.4, Q10.7, Q10.8).

The file is found as in test_real_model; without it there is nothing here to collect.
"""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import export
from memjax.adapters.gguf_model import GgufModel
from memjax.adapters.lora import extract, size_of, with_lora
from memjax.adapters.peft import save_peft
from memjax.adapters.pretrained import open_pretrained
from memjax.config.flags import call
from memjax.config.lora import LoraConfig
from memjax.data.chat import chat_tokens
from memjax.layers.tree import named, unnamed
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime.exporting import open_model
from tests.test_real_model import ASKED, GPL, HAS_GPL, MODEL, WINDOW, WINDOWS

LORA = LoraConfig(rank=16, alpha=32.0)

if MODEL and HAS_GPL:
  pytestmark = pytest.mark.slow

  def nats(config, params, host, count=2):
    """Nats a token of the first windows of the licence, each alone."""
    tokens = host.texts.words.tokenizer.encode(GPL.read_text()[:24_000])[:WINDOW * count].reshape(-1, 1, WINDOW)
    model = build_decoder(config)
    @jax.jit
    def one(params, token_BxL):
      logits_BxLxA, _, _ = model.apply({'params': params}, token_BxL, model.init_state(1), position_BxL=jnp.arange(WINDOW)[None])
      return -jnp.take_along_axis(jax.nn.log_softmax(logits_BxLxA[:, :-1]), token_BxL[:, 1:, None], -1).mean()
    return np.array([one(params, window) for window in tokens])

  def do(*words): assert call(export.main, flags=export.FLAGS, takes_config=False, argv=[str(word) for word in words]) == 0

  @pytest.fixture(scope='module')
  def host():
    return open_model(str(MODEL))

  @pytest.fixture(scope='module')
  def changes(host, tmp_path_factory):
    """A folder of PEFT whose changes move the model, and the parameters with them."""
    folder, rng, config = tmp_path_factory.mktemp('changes') / 'peft', np.random.default_rng(0), with_lora(host.config, LORA)
    shapes, own = param_shapes(build_decoder(config))[0], named(host.params)
    draw = lambda like: jnp.asarray(.04 * rng.normal(size=like.shape), jnp.float32)
    params = unnamed({path: own[path] if path in own else draw(like) for path, like in named(shapes).items()}, shapes)
    assert size_of(extract(params, LORA)) == 921_600
    save_peft(str(folder), config, params, base='SmolLM2')
    return folder, config, params

  def test_a_folder_has_the_same_perplexity(host, tmp_path):
    """float16 keeps Q4_1 but for its rounding; the written folder reads, writes and chats as the file."""
    do('--to=hf', f'--model={MODEL}', f'--output={tmp_path}/m', '--dtype=float16')
    again = open_model(str(tmp_path / 'm'))
    assert open_pretrained(str(tmp_path / 'm'))[1].read('model.norm.weight').dtype == np.float16
    found = nats(again.config, again.params, again)
    np.testing.assert_allclose(found, WINDOWS[:2], atol=2e-3)
    np.testing.assert_allclose(found, nats(host.config, host.params, host), atol=1e-3)
    asked = [{'role': 'user', 'content': 'What is the capital of France?'}]
    words = again.texts.words
    assert chat_tokens(words.tokenizer, words.template, asked, add_generation_prompt=True).tolist() == ASKED
    assert (again.texts.ends, again.texts.has_bos, again.texts.context, again.texts.licence) == ((2,), False, 8192, 'apache-2.0')
    assert json.loads((tmp_path / 'm' / 'config.json').read_text())['tie_word_embeddings'] is True

  def test_a_folder_in_float32_is_the_file(host, tmp_path):
    do('--to=hf', f'--model={MODEL}', f'--output={tmp_path}/m')
    again = open_model(str(tmp_path / 'm'))
    for path, x in named(again.params).items(): assert np.array_equal(x, named(host.params)[path]), path
    do('--to=gguf', f'--model={tmp_path}/m', f'--output={tmp_path}/m.gguf', '--type=Q4_1')
    one, other = GgufModel(str(MODEL)), GgufModel(str(tmp_path / 'm.gguf'))
    assert {name: info.type for name, info in one.file.tensors.items()} == {name: info.type for name, info in other.file.tensors.items()}
    keys = [key for key in one.metadata if key.startswith(('llama.', 'tokenizer.')) and not key.endswith(('token_type', 'scores'))]
    assert not [key for key in keys if key in other.metadata and not np.all(one.metadata[key] == other.metadata[key])]
    assert list(one.metadata['tokenizer.ggml.token_type']) == list(other.metadata['tokenizer.ggml.token_type'])

  def test_low_rank_changes_in_eight_bits(host, changes, tmp_path):
    """Merged, written as Q8_0 and read again: perplexity within 1 % of the model with its changes, and not that of the host."""
    folder, config, params = changes
    do('--to=gguf', '--type=Q8_0', f'--model={MODEL}', f'--adapter={folder}', f'--output={tmp_path}/m.gguf')
    again = open_model(str(tmp_path / 'm.gguf'))
    want, found = (np.exp(nats(*pair, host).mean()) for pair in ((config, params), (again.config, again.params)))
    plain = np.exp(nats(host.config, host.params, host).mean())
    assert abs(found / want - 1) < 0.01 and abs(want / plain - 1) > 0.01, (plain, want, found)
    print(f'perplexity: host {plain:.3f}, with changes {want:.3f}, merged in Q8_0 {found:.3f}')

  def test_eight_bits_a_weight(host, tmp_path):
    """int8 by output channel: perplexity within 1 % of float32 (Q7.4)."""
    do('--to=quantized', f'--model={MODEL}', f'--output={tmp_path}/m')
    small = open_model(str(tmp_path / 'm'))
    want, found = (np.exp(nats(*pair, host).mean()) for pair in ((host.config, host.params), (small.config, small.params)))
    assert abs(found / want - 1) < 0.01, (want, found)
    print(f'perplexity: float32 {want:.3f}, int8 {found:.3f}')
