"""The decoder without a loop, and its kernels, against `transformer.apply` and JAX's own
derivatives; the kernels run without a GPU here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import transformer, unrolled
from oel_jax.policy.ops import common, heads, norm, swiglu

# Head counts that are no powers of two.
SMALL = architecture_lib.Architecture(32, 16, 3, 6, 3, 8, 24, rope_theta=1e4)
SHAPES = {
  "qwen3": SMALL,
  "qwen2": dataclasses.replace(SMALL, qk_norm=False, qkv_bias=True, tied_head=False),
  "llama3": dataclasses.replace(
    SMALL, qk_norm=False, rope_scaling=architecture_lib.Llama3Scaling(8.0, 1.0, 4.0, 16)
  ),
}
INTERPRET = jax.default_backend() != "gpu"
KERNELS = (
  (norm, "add_norm_kernel"),
  (norm, "backward_kernel"),
  (heads, "kernel"),
  (heads, "backward_kernel"),
  (swiglu, "backward_kernel"),
)


@functools.cache
def _params(name):
  params = jax.jit(lambda key: transformer.init(SHAPES[name], key))(jax.random.key(0))
  # Scales of 1 and biases of 0 would hide their gradients' faults.
  return jax.tree.map(
    lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params
  )


def _normal(seed, *shapes):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def _cos_sin(tokens, size):
  (angles,) = _normal(9, (tokens, size // 2))
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _same(found, wanted, tolerance=2e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), found, wanted
  )


@pytest.mark.parametrize("name", SHAPES)
def test_unfuse_undoes_fuse(name):
  back = jax.jit(lambda params: unrolled.unfuse(unrolled.fuse(params, jnp.float32), SHAPES[name]))
  jax.tree.map(np.testing.assert_array_equal, back(_params(name)), _params(name))


def _compare_with_the_loop(name, remat, with_prefix):
  """Hidden states at some positions of packed rows, and the gradient of their sum by random
  weights, in both decoders.
  """
  a, (B, T) = SHAPES[name], (2, 7)
  rng = np.random.default_rng(1)
  tokens, at = rng.integers(0, a.vocabulary, (B, T)), jnp.asarray([[2, 3, 4], [0, 6, 6]])
  segments = jnp.asarray([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 2, 2, 2, 2]])
  positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 0], [0, 1, 2, 0, 1, 2, 3]])
  prefix = None
  if with_prefix:
    keys, values = _normal(2, *[(a.layers, 2, a.kv_heads, 5, a.head_size)] * 2)
    prefix = transformer.Prefix(
      keys,
      values,
      jnp.asarray([5, 3]),
      jnp.asarray([[1, 0], [0, 0]]),
      jnp.where(segments == 2, 1, 0),
    )
  (weight,) = _normal(3, (B, 3, a.width))
  counted = jnp.asarray([[1, 1, 1], [1, 1, 0]])[..., None]

  def loop(params):
    hidden, _ = transformer.apply(params, a, tokens, positions, segments, prefix=prefix)
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    return jnp.sum(hidden * weight * counted), hidden

  weights = unrolled.fuse(_params(name), jnp.float32)

  def apart(learned):
    hidden = unrolled.forward(
      unrolled.attach(weights, learned),
      a,
      tokens,
      positions,
      segments,
      at,
      dtype=jnp.float32,
      remat=remat,
      attn_impl="xla",
      prefix=prefix,
    )
    return jnp.sum(hidden * weight * counted), hidden

  (_, wanted), gradient = jax.jit(jax.value_and_grad(loop, has_aux=True))(_params(name))
  (_, found), pieces = jax.jit(jax.value_and_grad(apart, has_aux=True))(
    unrolled.sinks(weights, tokens)
  )
  _same(found, wanted)
  _same(unrolled.unfuse(unrolled.add_rows(pieces, tokens, pieces.pop("rows")), a), gradient, 5e-5)


@pytest.mark.parametrize(
  "name, remat, with_prefix",
  [
    pytest.param("qwen3", "none", False, marks=pytest.mark.slow),
    ("qwen3", "dots", True),
    ("qwen3", "full", False),
    ("qwen2", "none", True),
    pytest.param("qwen2", "dots", False, marks=pytest.mark.slow),
    pytest.param("llama3", "dots", False, marks=pytest.mark.slow),
    ("llama3", "full", True),
  ],
)
def test_forward_and_its_gradient_are_those_of_the_loop(name, remat, with_prefix):
  _compare_with_the_loop(name, remat, with_prefix)


@pytest.fixture(name="few_programs")
def fixture_few_programs(monkeypatch):
  """So few that each goes over several tokens."""
  monkeypatch.setattr(common, "PROGRAMS", 4)


@pytest.mark.parametrize("name", SHAPES)
def test_the_kernels_do_the_same_where_they_stand(name, few_programs, monkeypatch):
  used = []

  def wired(operation, name):
    function = getattr(operation, name)

    def run(*args, **how):
      used.append((operation, name))
      return function(*args, **how, interpret=INTERPRET)

    return run

  for operation, kernel in KERNELS:
    monkeypatch.setattr(operation, kernel, wired(operation, kernel))
  monkeypatch.setattr(common, "supported", lambda x, head_size=2: True)
  _compare_with_the_loop(name, "dots", True)
  assert set(used) == set(KERNELS)


def test_python_goes_through_a_teachers_layers_once(monkeypatch):
  """The first apart, which has nothing to add up yet, and the last, which is read at few places."""
  a, seen, block = dataclasses.replace(SMALL, layers=7), [], transformer.block
  monkeypatch.setattr(transformer, "block", lambda *given: seen.append(1) or block(*given))
  how, tokens = dict(dtype=jnp.float32, attn_impl="xla"), jnp.ones((1, 4), jnp.int32)
  params = jax.eval_shape(lambda: transformer.init(a, jax.random.key(0)))
  weights = jax.eval_shape(lambda given: unrolled.fuse(given, jnp.float32), params)
  read = lambda given: unrolled.forward(given, a, *[tokens] * 4, remat="none", **how)
  assert jax.eval_shape(read, weights).shape == (1, 4, a.width) and len(seen) == 3


def test_no_product_of_a_layer_is_made_twice():
  a = SMALL
  tokens = jnp.ones((1, 4), jnp.int32)

  def products(remat):
    loss = lambda weights: unrolled.forward(
      weights, a, tokens, tokens, tokens, tokens, dtype=jnp.float32, remat=remat, attn_impl="xla"
    ).sum()
    return (
      jax.jit(jax.grad(loss))
      .lower(unrolled.fuse(_params("qwen3"), jnp.float32))
      .compile()
      .as_text()
      .count(" dot(")
    )

  # The two of the attention may be: on a GPU they are cuDNN's, whose output is kept.
  assert products("dots") <= products("none") + 2 * a.layers < products("full")


def test_gradient_of_a_sink_is_not_rounded_to_the_type_of_the_products():
  a, tokens = SMALL, jnp.arange(12, dtype=jnp.int32)[None]
  weights = unrolled.fuse(_params("qwen3"), jnp.bfloat16)

  def loss(weights):
    return (
      unrolled.forward(
        weights,
        a,
        tokens,
        tokens,
        tokens + 1,
        tokens,
        dtype=jnp.bfloat16,
        remat="dots",
        attn_impl="xla",
      )
      .astype(jnp.float32)
      .sum()
    )

  rounded = jax.jit(jax.grad(loss))(weights)
  exact = jax.jit(jax.grad(lambda learned: loss(unrolled.attach(weights, learned))))(
    unrolled.sinks(weights, tokens)
  )
  for one, other in zip(rounded["layers"], exact["layers"], strict=True):
    for name in unrolled.MATRICES:
      assert (
        other[name].dtype == jnp.float32 and (other[name] != other[name].astype(jnp.bfloat16)).any()
      )
      assert np.linalg.norm(np.float32(one[name]) - other[name]) < 2**-6 * np.linalg.norm(
        other[name]
      )


def test_kernels_are_for_gpus_in_bfloat16_and_heads_that_they_can_halve(monkeypatch):
  x = jnp.zeros((2, 8), jnp.bfloat16)
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  assert not common.supported(x)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert (
    common.supported(x)
    and common.supported(x, 64)
    and not common.supported(x, 80)
    and not common.supported(x.astype(jnp.float32))
  )


@pytest.mark.parametrize("width", [48, 64])
def test_add_norm(width):
  x, y, scale = _normal(3, (5, width), (5, width), (width,))
  added = np.float64(x) + y
  wanted = added, added / np.sqrt((added**2).mean(-1, keepdims=True) + 1e-6) * scale
  _same(tuple(norm.add_norm_kernel(x, y, scale, eps=1e-6, interpret=INTERPRET)), wanted)
  _same(
    tuple(
      norm.add_norm_kernel(x, jnp.stack([y / 2, -y, y * 1.5]), scale, eps=1e-6, interpret=INTERPRET)
    ),
    wanted,
  )
  rounded = norm.add_norm_kernel(
    x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), scale, eps=1e-6, interpret=INTERPRET
  )
  x = x.astype(jnp.bfloat16) + y.astype(jnp.bfloat16)
  np.testing.assert_array_equal(rounded[0], x)
  np.testing.assert_array_equal(rounded[1], norm.rms(x, scale, 1e-6))


@pytest.mark.parametrize("tokens, width", [(3, 48), (23, 64)])
def test_norm_backward(tokens, width, few_programs):
  x, scale, gradient, passed = _normal(
    4, (tokens, width), (width,), (tokens, width), (tokens, width)
  )
  y, back = jax.vjp(functools.partial(norm.rms, eps=1e-6), x, scale)
  d_x, d_scale = back(gradient)
  _same(
    norm.backward_kernel(x, scale, gradient, passed, eps=1e-6, interpret=INTERPRET),
    (d_x + passed, y, d_scale),
  )


@pytest.mark.parametrize(
  "count, kv_heads, size, normed, biased",
  [
    (6, 3, 8, True, False),
    (4, 2, 16, False, False),
    (2, 2, 8, True, True),
    (6, 3, 8, False, True),
  ],
)
def test_heads_and_their_gradient(count, kv_heads, size, normed, biased, few_programs):
  tokens = 9
  qkv, bias, scale = _normal(
    5, (tokens, count + 2 * kv_heads, size), (count + 2 * kv_heads, size), (2, size)
  )
  bias, scale, cos_sin = bias if biased else None, scale if normed else None, _cos_sin(tokens, size)
  a = architecture_lib.Architecture(2, 2, 1, count, kv_heads, size, 2, norm_eps=1e-6)
  plain = lambda qkv, scale: heads.plain(a, qkv, bias, scale, cos_sin)
  wanted, back = jax.vjp(plain, qkv, scale)
  _same(
    tuple(heads.kernel(a, qkv, bias, scale, cos_sin, interpret=INTERPRET)),
    wanted,
  )
  gradients = tuple(_normal(6, *(y.shape for y in wanted)))
  _same(
    heads.backward_kernel(a, qkv, bias, scale, cos_sin, gradients, interpret=INTERPRET),
    back(gradients),
  )


@pytest.mark.parametrize("size", [24, swiglu.COLUMNS + 100])
def test_swiglu_backward(size):
  gate_up, gradient = _normal(7, (3, 2 * size), (3, size))
  y, back = jax.vjp(swiglu.plain, gate_up)
  _same(swiglu.backward_kernel(gate_up, gradient, interpret=INTERPRET), (*back(gradient), y))
