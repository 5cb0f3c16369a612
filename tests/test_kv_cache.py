"""Attention over a circular cache, against NumPy in float64; the kernel in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.policy.architecture import ARCHITECTURES
from oel_jax.policy.sampling import kv_cache

S = 192
FILLED = np.int32([1, S, 64, 65, 100])


def by_hand(q, k, v, column, filled):
  """Row by row, the values and log-sum-exps: the columns are counted back from the one written
  last.
  """
  B, N, H = q.shape
  K = k.shape[1]
  result, logsumexp = np.zeros((B, N, H)), np.zeros((B, N))
  for b in range(B):
    columns = [(column - i) % S for i in range(filled[b])]
    for n in range(N):
      scores = k[b, n // (N // K), columns].astype(np.float64) @ q[b, n] / H**0.5
      weights = np.exp(scores - scores.max())
      result[b, n] = weights @ v[b, n // (N // K), columns] / weights.sum()
      logsumexp[b, n] = scores.max() + np.log(weights.sum())
  return result, logsumexp


def caches(rng, column):
  k, v = (rng.standard_normal((5, 2, S, 32)).astype(np.float32) for _ in range(2))
  k[0, :, (column + 1) % S] = v[0, :, (column + 1) % S] = 1e4  # what an earlier sequence left there
  return k, v


@pytest.mark.parametrize("column", [0, 63, 64, 191])
def test_each_row_sees_what_it_fills(column):
  rng = np.random.default_rng(column)
  k, v = caches(rng, column)
  q = rng.standard_normal((5, 4, 32)).astype(np.float32)
  new_k, new_v, right = (
    k[:, :, column].copy(),
    v[:, :, column].copy(),
    by_hand(q, k, v, column, FILLED),
  )
  k[:, :, column] = v[:, :, column] = 1e4  # not written yet
  given = (q, new_k, new_v, k.swapaxes(2, 3), v, np.int32(column), FILLED - 1)
  for found, wanted in zip(kv_cache.attend(*map(jnp.asarray, given)), right, strict=True):
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_many_queries_see_what_their_mask_says():
  rng = np.random.default_rng(0)
  q, mask = rng.standard_normal((3, 6, 4, 32)), rng.random((3, 6, 9)) < 0.4
  k, v = rng.standard_normal((2, 3, 2, 9, 32))
  mask[..., 0] = True
  right, logsumexp = np.zeros_like(q), np.zeros((3, 6, 4))
  for b, t, n in np.ndindex(3, 6, 4):
    scores = k[b, n // 2, mask[b, t]] @ q[b, t, n] / 32**0.5
    weights = np.exp(scores - scores.max())
    right[b, t, n] = weights @ v[b, n // 2, mask[b, t]] / weights.sum()
    logsumexp[b, t, n] = scores.max() + np.log(weights.sum())
  given = *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(mask)
  np.testing.assert_allclose(kv_cache.attend_many(*given)[0], right, atol=1e-5)
  np.testing.assert_allclose(kv_cache.attend_many(*given)[1], logsumexp, atol=1e-5)
  half = *(x.astype(jnp.bfloat16) for x in given[:3]), given[3]
  assert kv_cache.attend_many(*half)[0].dtype == jnp.bfloat16
  np.testing.assert_allclose(kv_cache.attend_many(*half)[0].astype(jnp.float32), right, atol=0.05)


# Rows are attended to whole, or in parts.
@pytest.mark.parametrize(
  "column,normed,programs",
  [(0, True, 1), (5, False, 512), (63, True, 512), (64, False, 1), (191, True, 512)],
)
def test_the_kernel_norms_turns_writes_and_attends(monkeypatch, column, normed, programs):
  monkeypatch.setattr(kv_cache, "PROGRAMS", programs)
  rng = np.random.default_rng(column)
  k, v = caches(rng, column)
  qkv, scale = (
    rng.standard_normal((5, 8, 32)).astype(np.float32),
    rng.standard_normal((6, 32)).astype(np.float32),
  )
  angles = rng.uniform(0, 6, (5, 16))
  cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
  heads = qkv[:, :6].astype(np.float64)
  if normed:
    heads = heads / np.sqrt(np.mean(heads**2, -1, keepdims=True) + 1e-5) * scale
  pairs = (heads[..., :16] + 1j * heads[..., 16:]) * np.exp(1j * angles)[:, None]
  heads = np.concatenate([pairs.real, pairs.imag], -1)
  written = k.copy(), v.copy()
  written[0][:, :, column], written[1][:, :, column] = heads[:, 4:], qkv[:, 6:]
  bias = rng.standard_normal((8, 32)).astype(np.float32)
  y, keys, values, logsumexp, q = kv_cache.step(
    jnp.asarray(qkv - bias),
    jnp.asarray(bias),
    jnp.asarray(scale) if normed else None,
    jnp.asarray(cos_sin),
    jnp.asarray(k),
    jnp.asarray(v),
    jnp.int32(column),
    jnp.asarray(FILLED),
    eps=1e-5,
    queries=True,
    interpret=True,
  )
  np.testing.assert_allclose(keys, written[0], atol=1e-5)
  np.testing.assert_allclose(values, written[1], atol=1e-6)
  right = by_hand(heads[:, :4], *written, column, FILLED)
  np.testing.assert_allclose(q, heads[:, :4] / 32**0.5, atol=1e-5)
  for found, wanted in zip((y, logsumexp), right, strict=True):
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_kernel_is_for_gpus_in_bfloat16_and_heads_that_it_can_halve(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  assert {kv_cache.attn_impl(shape, jnp.bfloat16) for shape in ARCHITECTURES.values()} == {"xla"}
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  found = {name: kv_cache.attn_impl(shape, jnp.bfloat16) for name, shape in ARCHITECTURES.items()}
  assert {name for name, attn_impl in found.items() if attn_impl == "xla"} == {
    "boards-tiny",
    "pocket-tiny",
  }
  assert {kv_cache.attn_impl(shape, jnp.float32) for shape in ARCHITECTURES.values()} == {"xla"}
