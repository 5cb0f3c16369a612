"""cuDNN's attention on a mesh, run by each device on its own rows and heads: with the plain form in
its place, the numbers of one device.
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from oel_jax.policy import attention, transformer
from oel_jax.policy.architecture import Architecture
from oel_jax.runtime import mesh as mesh_lib

# Four key-value heads or eight are split over "tensor"; two over four devices are not.
HEADS = {"16:8": dict(data=2, fsdp=1, tensor=4), "12:2": dict(data=1, fsdp=2, tensor=4)}
HEADS |= {"12:4": dict(data=2, fsdp=2, tensor=2)}
B, T, P, H = 4, 12, 8, 16


@pytest.fixture(name="seen", autouse=True)
def fixture_plain(monkeypatch):
  """cuDNN's two functions are the plain form; the shapes that each of them was given."""
  seen = []

  def public(q, k, v, *, mask=None, is_causal=False, implementation):
    seen.append((q.shape, k.shape))
    assert implementation == "cudnn"
    return _plain(q, k.swapaxes(1, 2), v.swapaxes(1, 2), _mask(q, k, mask, is_causal))[0]

  def with_logsumexp(q, k, v, mask_type, q_seqlen=None, kv_seqlen=None):
    seen.append((q.shape, k.shape))
    mask = None if kv_seqlen is None else jnp.arange(k.shape[2]) < kv_seqlen[:, None, None, None]
    return _plain(q, k, v, _mask(q, k.swapaxes(1, 2), mask, mask_type == "CAUSAL"))

  monkeypatch.setattr(jax.nn, "dot_product_attention", public)
  monkeypatch.setattr(attention, "_cudnn", with_logsumexp)
  return seen


def _mask(q, k, mask, is_causal):
  shape = q.shape[0], 1, q.shape[1], k.shape[1]
  mask = jnp.ones(shape, bool) if mask is None else jnp.broadcast_to(mask, shape)
  return mask & jnp.tril(jnp.ones(shape[2:], bool)) if is_causal else mask


def _plain(q, k, v, mask_Bx1xTxS):
  """Output and log-sum-exps, a head at a time, by another way than the plain form."""
  group = q.shape[2] // k.shape[1]
  k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
  scores = jnp.einsum("btnh,bnsh->bnts", q, k) / q.shape[-1] ** 0.5
  scores = jnp.where(mask_Bx1xTxS, scores, -jnp.inf)
  y = jnp.einsum("bnts,bnsh->btnh", jax.nn.softmax(scores), v)
  return y, jax.nn.logsumexp(scores, axis=-1).swapaxes(1, 2)[..., None]


def _mesh(sizes):
  return mesh_lib.make_mesh(ml_collections.ConfigDict(sizes), jax.devices())


def _arrays(name):
  rng, (N, K) = np.random.default_rng(0), map(int, name.split(":"))
  shapes = (B, T, N, H), (B, K, T, H), (B, K, T, H), (B, K, P, H), (B, K, P, H)
  return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


@pytest.mark.parametrize("attn_impl", ["cudnn", "flash"])
@pytest.mark.parametrize("name", HEADS)
def test_value_and_gradients_are_those_of_one_device(name, attn_impl, seen):
  *own, _, _ = _arrays(name)
  segments = np.ones((B, T), np.int32)
  if attn_impl == "cudnn":
    segments[::2, 7:] = 2
  mask = attention.segment_mask(jnp.asarray(segments))
  weight = np.random.default_rng(1).normal(size=own[0].shape)

  def made(attn_impl, mesh):
    def total(*own):
      y = attention.attend(*own, mask, attn_impl, mesh=mesh)
      return jnp.sum(y * weight), y

    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*own)

  found, right = made(attn_impl, _mesh(HEADS[name])), made("xla", None)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found[1:], right[1:])
  (q, k), sizes = seen[0], HEADS[name]
  parts = sizes["tensor"] if name != "12:2" else 1
  rows = B // (sizes["data"] * sizes["fsdp"])
  N, K = map(int, name.split(":"))
  assert (q[0], q[2], k[0], k[2]) == (rows, N // parts, rows, K // parts)


@pytest.mark.parametrize("attn_impl", ["cudnn", "flash"])
@pytest.mark.parametrize("name", HEADS)
def test_behind_a_prefix(name, attn_impl):
  q, k, v, *prefix = _arrays(name)
  length = jnp.array([8, 3, 0, 5])
  there = jnp.broadcast_to(jnp.arange(P) < length[:, None, None], (B, T, P))
  own = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
  given = q, (k, v), tuple(prefix), jnp.concatenate([there, own], axis=-1), length

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def made(attn_impl, mesh):
    return attention.attend_with_prefix(*given, attn_impl, mesh=mesh)

  found, right = made(attn_impl, _mesh(HEADS[name])), made("xla", None)
  np.testing.assert_allclose(found, right, atol=1e-5)


def test_the_decoder_tells_it_the_mesh(seen):
  a = Architecture(64, 32, 2, 8, 4, 16, 48)
  params = transformer.init(a, jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 64, (B, T))
  positions, segments = np.broadcast_to(np.arange(T), (B, T)), np.ones((B, T), np.int32)
  run = jax.jit(
    functools.partial(transformer.apply, architecture=a), static_argnames=("attn_impl", "mesh")
  )
  how = dict(tokens_BxT=tokens, positions_BxT=positions, segments_BxT=segments)
  mesh = _mesh(dict(data=2, fsdp=2, tensor=2))
  placed = jax.device_put(params, mesh_lib.param_shardings(mesh, params))
  found = run(placed, attn_impl="cudnn", mesh=mesh, **how)[0]
  np.testing.assert_allclose(found, run(params, **how)[0], atol=1e-4)
  assert {shapes[0] for shapes in seen} == {(1, T, 4, 16)}
