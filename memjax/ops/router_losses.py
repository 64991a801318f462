"""Losses that keep chapters in use, and the monitors that say whether they are."""
import jax
import jax.numpy as jnp

from memjax.config.errors import UserError

BALANCE_FORMS = ('normalized', 'legacy')
AUXILIARY_FORMS = ('kl', 'cv2', 'legacy_mse')


def chapter_counts(ids_ZxJ, real_Z, chapters: int):
  """[P] fp32: how many real units selected each chapter; ids of -1 count nowhere."""
  ids = jnp.where((ids_ZxJ >= 0) & real_Z[:, None], ids_ZxJ, chapters)
  return jnp.zeros(chapters, jnp.int32).at[ids.ravel()].add(1, mode='drop').astype(jnp.float32)


def _real_logits(logit_ZxP, real_Z):
  wide = logit_ZxP.astype(jnp.promote_types(jnp.float32, logit_ZxP.dtype))
  return jnp.where(real_Z[:, None], wide, 0)


def _real_mean(x, real_Z):
  """The mean of x [Z] or [Z, P] over real units; zero where there are none."""
  weight = real_Z.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)
  return jnp.sum(x * weight, 0) / jnp.maximum(jnp.sum(weight), 1)


def _entropy(p):
  """-sum p log p over the last axis, with finite gradients where p underflowed."""
  return -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), -1)


def _balance(form, logit_ZxP, ids_ZxJ, *, real_Z, shared):
  logit = logit_ZxP if form == 'legacy' else logit_ZxP[:, shared:]
  mean = _real_mean(jax.nn.softmax(logit, -1), real_Z)
  counts = chapter_counts(ids_ZxJ, real_Z, logit_ZxP.shape[1])[-logit.shape[1]:]
  units = jnp.maximum(jnp.sum(real_Z), 1) * (1 if form == 'legacy' else ids_ZxJ.shape[1])
  return logit.shape[1] * jnp.sum(counts.astype(mean.dtype) / units * mean)


def _auxiliary(form, logit_ZxP, *, real_Z, shared):
  p = jax.nn.softmax(logit_ZxP if form == 'legacy_mse' else logit_ZxP[:, shared:], -1)
  chapters = p.shape[1]
  if form == 'legacy_mse': loss = jnp.mean((_real_mean(p * p, real_Z) - 1 / chapters) ** 2)
  elif form == 'kl': loss = jnp.log(jnp.asarray(chapters, p.dtype)) - _entropy(_real_mean(p, real_Z))
  else: loss = jnp.mean((chapters * _real_mean(p, real_Z) - 1) ** 2)     # the mean of P is 1 / C
  return jnp.where(jnp.any(real_Z), loss, 0)


def router_losses(logit_ZxP, ids_ZxJ, real_Z, *, shared: int = 0, balance_form: str = 'normalized', auxiliary_form: str = 'kl'):
  """{'balance', 'auxiliary', 'z'}: fp32 (or wider) scalars over the real units; zeros without one.

  With C routed chapters, G units, c_i units that selected chapter i, P_i = mean_g p_gi:
  balance: C sum_i c_i P_i / (G k) (normalized; 1 when balanced) or C sum_i c_i P_i / G (legacy; k when balanced). The gradient
  flows through P alone. auxiliary: kl = log C - H(P); cv2 = Var_i(P) / Mean_i(P)^2 (Shazeer et al. 2017); legacy_mse =
  mean_i(mean_g p_gi^2 - 1 / C)^2. z = mean_g logsumexp(logit_g)^2 (Zoph et al. 2022). Shared chapters are left out, except that
  in the legacy forms p is a softmax over all chapters and C is all of them. Raises UserError for another form.
  """
  if balance_form not in BALANCE_FORMS: raise UserError(f'unknown balance form {balance_form!r}; one of {", ".join(BALANCE_FORMS)}')
  if auxiliary_form not in AUXILIARY_FORMS:
    raise UserError(f'unknown auxiliary form {auxiliary_form!r}; one of {", ".join(AUXILIARY_FORMS)}')
  logit_ZxP = _real_logits(logit_ZxP, real_Z)
  return {'balance': _balance(balance_form, logit_ZxP, ids_ZxJ, real_Z=real_Z, shared=shared),
          'auxiliary': _auxiliary(auxiliary_form, logit_ZxP, real_Z=real_Z, shared=shared),
          'z': _real_mean(jax.nn.logsumexp(logit_ZxP[:, shared:], -1) ** 2, real_Z)}


def router_monitors(logit_ZxP, ids_ZxJ, real_Z, *, shared: int = 0):
  """Scalars without gradient over the real units and the routed chapters; zeros without a unit.

  router_entropy: mean entropy of p; router_mean_entropy: entropy of the mean of p (nats); chapter_coverage: share of chapters
  that some unit selected; chapter_gini: Gini coefficient of the counts (0 even, 1 - 1 / C all on one); top_share: the busiest
  chapter's share of all selections.
  """
  p = jax.nn.softmax(jax.lax.stop_gradient(_real_logits(logit_ZxP, real_Z))[:, shared:], -1)
  counts = chapter_counts(ids_ZxJ, real_Z, logit_ZxP.shape[1])[shared:]
  chapters, total = len(counts), jnp.maximum(jnp.sum(counts), 1)
  rank = 2 * jnp.arange(1, chapters + 1, dtype=jnp.float32) - chapters - 1
  return {'router_entropy': _real_mean(_entropy(p), real_Z), 'router_mean_entropy': _entropy(_real_mean(p, real_Z)),
          'chapter_coverage': jnp.mean((counts > 0).astype(jnp.float32)),
          'chapter_gini': jnp.sum(rank * jnp.sort(counts)) / (chapters * total), 'top_share': jnp.max(counts) / total}
