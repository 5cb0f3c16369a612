"""The decoder against a NumPy float64 one written here, and against itself: packed, padded,
rematerialised.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.policy import transformer
from oel_jax.policy.architecture import ARCHITECTURES, Architecture, Llama3Scaling, named
from oel_jax.policy.ops import embedding
from oel_jax.runtime.mesh import TABLE

TINY = named("pocket-tiny")
# Two key-value heads of three query heads each: the grouping's order shows; no QK norm, an untied
# head, another base and ε.
GROUPED = Architecture(
  48, 24, 3, 6, 2, 8, 40, rope_theta=500.0, norm_eps=1e-3, qk_norm=False, tied_head=False
)
BOTH = pytest.mark.parametrize("a", [TINY, GROUPED], ids=["tiny", "grouped"])


@functools.cache
def random_params(a: Architecture, seed: int = 0):
  """The tree of `init` with every leaf random, norm scales too, so that a forgotten one shows.
  (Drawn by NumPy: `init` takes seconds.)
  """
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    scale = path[-1].key == "scale"
    fan_in = 25 if scale else shape.shape[-1] if path[-1].key == "embedding" else a.width
    return jnp.asarray(scale + rng.standard_normal(shape.shape) / fan_in**0.5, jnp.float32)

  return jax.tree_util.tree_map_with_path(
    leaf, jax.eval_shape(lambda: transformer.init(a, jax.random.key(0)))
  )


@functools.partial(jax.jit, static_argnames=("a", "dtype", "remat", "keep_cache"))
def forward(
  params, tokens, positions, segments, *, a, dtype=jnp.float32, remat="none", keep_cache=False
):
  return transformer.apply(
    params, a, tokens, positions, segments, dtype=dtype, remat=remat, keep_cache=keep_cache
  )


def plain(a, params, tokens):
  """Hidden states of whole rows, one sequence each."""
  tokens = np.atleast_2d(np.asarray(tokens, np.int32))
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  return np.asarray(forward(params, tokens, positions, np.ones_like(tokens), a=a)[0])


def draw(a, *shape, seed=0):
  return np.random.default_rng(seed).integers(0, a.vocabulary, shape).astype(np.int32)


def numpy_decoder(a: Architecture, params, tokens: np.ndarray) -> np.ndarray:
  """One sequence [T] → [T, D], float64, loops over heads; rotary positions as complex rotations."""
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)

  def rms(x, scale):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + a.norm_eps) * scale

  def rotated(x):  # [T, H]
    half = a.head_size // 2
    angle = np.outer(
      np.arange(len(x)), [a.rope_theta ** (-2 * i / a.head_size) for i in range(half)]
    )
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)

  x, T = params["embed"]["embedding"][tokens], len(tokens)
  for i in range(a.layers):
    layer = jax.tree.map(lambda p: p[i], params["layers"])
    att, ffn = layer["attention"], layer["feedforward"]
    n = rms(x, layer["attention_norm"]["scale"])
    y = np.zeros_like(x)
    for head in range(a.heads):
      group = head // (a.heads // a.kv_heads)
      q, k, v = (
        n @ att["q"]["kernel"][:, head],
        n @ att["k"]["kernel"][:, group],
        n @ att["v"]["kernel"][:, group],
      )
      if a.qk_norm:
        q, k = rms(q, att["q_norm"]["scale"]), rms(k, att["k_norm"]["scale"])
      scores = rotated(q) @ rotated(k).T / np.sqrt(a.head_size)
      for t in range(T):
        weights = np.exp(scores[t, : t + 1] - scores[t, : t + 1].max())
        y[t] += (weights / weights.sum()) @ v[: t + 1] @ att["o"]["kernel"][head]
    x = x + y
    n = rms(x, layer["feedforward_norm"]["scale"])
    gate = n @ ffn["gate"]["kernel"]
    x = x + (gate / (1 + np.exp(-gate)) * (n @ ffn["up"]["kernel"])) @ ffn["down"]["kernel"]
  return rms(x, params["norm"]["scale"])


@BOTH
def test_hidden_states_and_logits_equal_numpy_in_float64(a):
  params, tokens = random_params(a), draw(a, 3, 19)
  expected = np.stack([numpy_decoder(a, params, row) for row in tokens])
  hidden = plain(a, params, tokens)
  np.testing.assert_allclose(hidden, expected, atol=1e-4)
  kernel = params["embed"]["embedding"] if a.tied_head else params["head"]["kernel"]
  assert transformer.head(params) is kernel
  np.testing.assert_allclose(
    transformer.logits(hidden, transformer.head(params)),
    expected @ np.asarray(kernel, np.float64).T,
    atol=1e-3,
  )


def test_bfloat16_activations_stay_near_and_logits_are_float32():
  params, tokens = random_params(TINY), draw(TINY, 2, 12)
  positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
  hidden, _ = forward(params, tokens, positions, np.ones_like(tokens), a=TINY, dtype=jnp.bfloat16)
  assert hidden.dtype == jnp.bfloat16
  assert transformer.logits(hidden, transformer.head(params)).dtype == jnp.float32
  exact = plain(TINY, params, tokens)
  assert np.abs(np.asarray(hidden, np.float32) - exact).mean() < 0.03 * np.abs(exact).mean()


@BOTH
def test_packed_segments_equal_separate_sequences(a):
  params = random_params(a)
  parts = [draw(a, n, seed=n) for n in (5, 1, 9, 7)]
  tokens = np.concatenate([*parts, np.zeros(3, np.int32)])[None]
  positions = np.concatenate([*(np.arange(len(p)) for p in parts), np.zeros(3)]).astype(np.int32)[
    None
  ]
  segments = np.concatenate(
    [*(np.full(len(p), i + 1) for i, p in enumerate(parts)), np.zeros(3)]
  ).astype(np.int32)[None]
  packed = np.asarray(forward(params, tokens, positions, segments, a=a)[0])[0]
  start = 0
  for part in parts:
    np.testing.assert_allclose(
      packed[start : start + len(part)], numpy_decoder(a, params, part), atol=1e-4
    )
    start += len(part)


def test_changing_one_segment_changes_no_other_bit_for_bit():
  params, tokens = random_params(TINY), draw(TINY, 1, 16)
  positions = np.tile(np.arange(8, dtype=np.int32), 2)[None]
  segments = np.repeat(np.int32([1, 2]), 8)[None]
  before = np.asarray(forward(params, tokens, positions, segments, a=TINY)[0])
  other = tokens.copy()
  other[0, :8] = draw(TINY, 8, seed=9)
  after = np.asarray(forward(params, other, positions, segments, a=TINY)[0])
  np.testing.assert_array_equal(after[0, 8:], before[0, 8:])
  assert np.abs(after[0, :8] - before[0, :8]).max() > 0.1


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def _value_and_gradient(params, tokens, positions, real):
  hidden, _ = transformer.apply(params, TINY, tokens, positions, real.astype(jnp.int32))
  return jnp.sum(jnp.where(real[..., None], hidden, 0.0) ** 3), hidden


@pytest.mark.parametrize("poison", [1e10, np.nan], ids=["large", "nan"])
def test_padding_changes_nothing_at_real_positions(poison):
  """The embedding of the token that fills the padding is poisoned; values and gradients of
  real positions do not move.
  """
  lengths = np.array([7, 12, 3])
  tokens = draw(TINY, 3, 12) % 100
  positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
  real = positions < lengths[:, None]
  clean = random_params(TINY)
  bad = {**clean, "embed": {"embedding": clean["embed"]["embedding"].at[-1].set(poison)}}
  (_, values), gradient = _value_and_gradient(clean, np.where(real, tokens, 3), positions, real)
  for params, filler in (
    (clean, draw(TINY, 3, 12, seed=5)),
    (bad, np.full((3, 12), TINY.vocabulary - 1, np.int32)),
  ):
    (_, again), gradient_again = _value_and_gradient(
      params, np.where(real, tokens, filler), positions, real
    )
    np.testing.assert_array_equal(np.asarray(again)[real], np.asarray(values)[real])
    jax.tree.map(
      lambda g, h: np.testing.assert_allclose(g, h, rtol=1e-5, atol=1e-4), gradient_again, gradient
    )


def test_remat_changes_neither_values_nor_gradients():
  a, params, tokens = TINY, random_params(TINY), draw(TINY, 2, 9)
  positions, segments = (
    np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape),
    np.ones_like(tokens),
  )

  def loss(p, remat):
    hidden, _ = transformer.apply(p, a, tokens, positions, segments, remat=remat)
    return jnp.mean(jax.nn.logsumexp(transformer.logits(hidden, transformer.head(p)), axis=-1))

  results = {
    remat: jax.jit(jax.value_and_grad(lambda p: loss(p, remat)))(params)
    for remat in ("none", "dots", "full")
  }
  value, gradient = results["none"]
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
  for remat in ("dots", "full"):
    np.testing.assert_allclose(results[remat][0], value, rtol=1e-6)
    jax.tree.map(
      lambda g, h: np.testing.assert_allclose(g, h, rtol=1e-4, atol=1e-6),
      results[remat][1],
      gradient,
    )


def test_gradient_equals_a_finite_difference_in_float64():
  a, tokens = GROUPED, draw(GROUPED, 6)
  params = random_params(a)
  positions, ones = np.arange(6, dtype=np.int32)[None], np.ones((1, 6), np.int32)
  gradient = jax.jit(
    jax.grad(lambda p: jnp.sum(jnp.sin(transformer.apply(p, a, tokens[None], positions, ones)[0])))
  )(params)
  direction = jax.tree.map(lambda p: np.random.default_rng(p.size).standard_normal(p.shape), params)
  value = lambda h: np.sin(
    numpy_decoder(
      a, jax.tree.map(lambda p, d: np.asarray(p, np.float64) + h * d, params, direction), tokens
    )
  ).sum()
  slope = sum(
    np.sum(np.asarray(g, np.float64) * d)
    for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
  )
  assert slope == pytest.approx((value(1e-6) - value(-1e-6)) / 2e-6, rel=2e-3)


def _paths(a):
  abstract = jax.eval_shape(lambda: transformer.init(a, jax.random.key(0)))
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
  }


@pytest.mark.parametrize(
  "vocabulary", [7, embedding.SMALL_VOCABULARY + 1]
)  # by a matrix product, and by adding row to row
def test_the_gradient_of_an_embedding_is_the_sum_over_each_tokens_places(vocabulary):
  rng = np.random.default_rng(0)
  tokens, weight = rng.integers(0, 7, (3, 50)), rng.normal(size=(3, 50, 4))
  table = rng.normal(size=(vocabulary, 4)).astype(np.float32)
  value, gradient = jax.value_and_grad(
    lambda t: jnp.sum(embedding.embed(t, jnp.asarray(tokens)) * weight.astype(np.float32))
  )(table)
  expected = np.zeros((vocabulary, 4))
  for at in np.ndindex(tokens.shape):
    expected[tokens[at]] += weight[at]
  np.testing.assert_allclose(value, (table.astype(np.float64)[tokens] * weight).sum(), rtol=1e-5)
  np.testing.assert_allclose(gradient, expected, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_has_exactly_one_row_in_the_sharding_table(name):
  a = named(name)
  leaves = _paths(a)
  for path, leaf in leaves.items():
    rows = [axes for pattern, axes in TABLE if re.fullmatch(pattern, path)]
    assert len(rows) == 1 and len(rows[0]) == leaf.ndim, (path, leaf.shape, rows)
    assert leaf.dtype == jnp.float32
  L, D, N, K, H, F, V = (
    a.layers,
    a.width,
    a.heads,
    a.kv_heads,
    a.head_size,
    a.feedforward,
    a.vocabulary,
  )
  shapes = {
    "embed/embedding": (V, D),
    "layers/attention/q/kernel": (L, D, N, H),
    "layers/attention/k/kernel": (L, D, K, H),
    "layers/attention/v/kernel": (L, D, K, H),
    "layers/attention/o/kernel": (L, N, H, D),
    "layers/feedforward/gate/kernel": (L, D, F),
    "layers/feedforward/up/kernel": (L, D, F),
    "layers/feedforward/down/kernel": (L, F, D),
    "layers/attention_norm/scale": (L, D),
    "layers/feedforward_norm/scale": (L, D),
    "norm/scale": (D,),
  }
  if a.qk_norm:
    shapes |= {f"layers/attention/{x}_norm/scale": (L, H) for x in "qk"}
  if a.qkv_bias:
    shapes |= {
      f"layers/attention/{x}/bias": (L, heads, H) for x, heads in (("q", N), ("k", K), ("v", K))
    }
  if not a.tied_head:
    shapes["head/kernel"] = (V, D)
  assert {path: leaf.shape for path, leaf in leaves.items()} == shapes


def test_parameter_counts_are_the_published_ones():
  """Model cards: Qwen3 0.6 B, 1.7 B, 4.0 B and 8.2 B; Qwen2.5 1.54 B and 7.61 B; Llama 8.03 B, 1.24
  B and 3.21 B; SmolLM2 135 M.
  """
  counts = {
    name: sum(int(np.prod(leaf.shape)) for leaf in _paths(named(name)).values())
    for name in ARCHITECTURES
  }
  assert counts["qwen3-0.6b"] == 596_049_920
  assert counts["qwen3-1.7b"] == 1_720_574_976
  assert counts["qwen3-4b"] == counts["qwen3-4b-instruct"] == 4_022_468_096
  assert counts["qwen3-8b"] == 8_190_735_360
  assert counts["qwen2.5-1.5b"] == 1_543_714_304 and counts["qwen2.5-7b"] == 7_615_616_512
  assert counts["llama-3.1-8b"] == 8_030_261_248 and counts["smollm2-135m"] == 134_515_008
  assert counts["llama-3.2-1b"] == 1_235_814_400 and counts["llama-3.2-3b"] == 3_212_749_824


@pytest.mark.parametrize(
  "names, theta, eps, heads, tied, kind, factor",
  [
    ("qwen3-0.6b qwen3-1.7b", 1e6, 1e-6, (16, 8, 128), True, "qk_norm", None),
    ("qwen3-4b", 1e6, 1e-6, (32, 8, 128), True, "qk_norm", None),
    ("qwen3-4b-instruct", 5e6, 1e-6, (32, 8, 128), True, "qk_norm", None),  # Qwen3-4B-Instruct-2507
    ("qwen3-8b", 1e6, 1e-6, (32, 8, 128), False, "qk_norm", None),
    ("qwen2.5-1.5b", 1e6, 1e-6, (12, 2, 128), True, "qkv_bias", None),
    ("qwen2.5-7b", 1e6, 1e-6, (28, 4, 128), False, "qkv_bias", None),
    ("llama-3.1-8b", 5e5, 1e-5, (32, 8, 128), False, None, 8.0),
    ("llama-3.2-1b", 5e5, 1e-5, (32, 8, 64), True, None, 32.0),
    ("llama-3.2-3b", 5e5, 1e-5, (24, 8, 128), True, None, 32.0),
    ("smollm2-135m", 1e5, 1e-5, (9, 3, 64), True, None, None),
  ],
)
def test_what_no_parameter_count_shows_is_as_published(
  names, theta, eps, heads, tied, kind, factor
):
  """The config.json of each model card."""
  for a in map(named, names.split()):
    assert (a.rope_theta, a.norm_eps, (a.heads, a.kv_heads, a.head_size), a.tied_head) == (
      theta,
      eps,
      heads,
      tied,
    )
    assert (a.qk_norm, a.qkv_bias) == (kind == "qk_norm", kind == "qkv_bias")
    assert a.rope_scaling == (factor and Llama3Scaling(factor, 1.0, 4.0, 8192.0))


def test_layers_start_out_different_and_fan_in_scaled():
  params = jax.jit(lambda: transformer.init(TINY, jax.random.key(0)))()
  q = np.asarray(params["layers"]["attention"]["q"]["kernel"])
  assert np.abs(q[0] - q[1]).max() > 0.1  # split_rngs: layers are not copies of one another
  assert np.std(q) == pytest.approx(TINY.width**-0.5, rel=0.1)


def test_a_wrong_architecture_is_refused_by_name():
  with pytest.raises(ValueError, match="kv_heads is 3.*heads"):
    dataclasses.replace(TINY, kv_heads=3)
  with pytest.raises(ValueError, match="head_size is 15.*even"):
    dataclasses.replace(TINY, head_size=15)
  with pytest.raises(ValueError, match="qwen3-9b.*pocket-tiny.*qwen3-8b"):
    named("qwen3-9b")
