"""Reading all chapters and weighing the unread ones with nothing equals the routed read, values and gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.routed_attention import routed_attend
from memjax.ops.routed_dense import attend_all_chapters

Z, P, T, J, H, G, K = 7, 5, 3, 2, 4, 2, 6


@pytest.mark.parametrize('mode', ['mixture', 'joint', 'joint_bias'])
@pytest.mark.parametrize('has_shared', [False, True], ids=['routed', 'shared'])
def test_dense_equals_gather(mode, has_shared):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  ids = jnp.asarray(np.stack([rng.permutation(P)[:J] for _ in range(Z)]), jnp.int32).at[2].set(-1).at[3, 1].set(-1)
  arguments = normal(Z, H, K), normal(P, T, G, K), normal(P, T, G, K), jax.nn.log_softmax(normal(Z, J))
  shared = (normal(4, G, K), normal(4, G, K)) if has_shared else None
  weight = normal(Z, H, K).at[2].set(0)                    # a token without chapters may read what it likes: it is masked later
  def loss(read, **form):
    def value(q, k, v, log_weight):
      y = read(q, k, v, ids, log_weight_ZxJ=log_weight, mode=mode, routed_scale=1.5, shared_kv=shared, **form)
      return jnp.sum(y * weight), y
    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3), has_aux=True))(*arguments)
  dense, gathered = loss(attend_all_chapters), loss(routed_attend, impl='gather')
  keep = np.arange(Z) != 2
  np.testing.assert_allclose(np.asarray(dense[0][1])[keep], np.asarray(gathered[0][1])[keep], atol=1e-5)
  for a, b in zip(dense[1], gathered[1], strict=True): np.testing.assert_allclose(a, b, atol=2e-5)
