"""Every kernel on numbers as real models have them, beside the plain form; compiled on a GPU,
interpreted elsewhere.

Real activations have a few columns of 1e3 to 1e4, real keys biases of 350, real logits one winner:
normal random numbers test none of that. A kernel in bfloat16 must be as near to float32 as the
plain form in bfloat16 is: at most 1.5 times its error.
"""

import functools
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.consolidation import chunk_loss, losses
from oel_jax.policy import attention
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.ops import heads, norm, small_matmul, swiglu
from oel_jax.policy.sampling import kv_cache, text_cache

HEADS = {
  "qwen2.5-1.5b": (12, 2, 128),
  "qwen2.5-0.5b": (14, 2, 64),
  "qwen3": (16, 8, 128),
  "qwen3-4b": (32, 8, 128),
  "smollm2": (9, 3, 64),
}
EPS = 1e-6


def cases(names, compiled, interpreted):
  """Parameters `names` and "interpret": `compiled` for a GPU, and `interpreted`, which are fewer,
  for it takes long.
  """
  on_gpu = [pytest.param(*case, False, marks=pytest.mark.gpu) for case in compiled]
  anywhere = [pytest.param(*case, True) for case in interpreted]
  return pytest.mark.parametrize(f"{names}, interpret", on_gpu + anywhere)


def real(seed, *shape, columns=(3, 17, 40), large=(1e3, 1e4), dtype=jnp.bfloat16):
  """Normal random numbers, but a few columns are large, of one sign each."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape)
  for column, size in zip(columns, np.geomspace(*large, len(columns))):
    x[..., column] += size * rng.choice([-1, 1])
  return jnp.asarray(x, dtype)


def normal(seed, *shape, dtype=jnp.bfloat16):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def widened(tree):
  return jax.tree.map(
    lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
  )


def as_right(kernel, plain, *given):
  """Asserts that `kernel` of the given arrays is as near to `plain` of them in float32 as `plain`
  itself is.
  """
  found, beside, wanted = (
    jax.tree.leaves(f(*x)) for f, x in ((kernel, given), (plain, given), (plain, widened(given)))
  )
  for i, (a, b, c) in enumerate(zip(found, beside, wanted, strict=True)):
    a, b, c = (np.asarray(x.astype(jnp.float32), np.float64) for x in (a, b, c))
    assert np.isfinite(a).all(), f"output {i} is not finite"
    norm = np.linalg.norm(c) or 1.0
    ours, theirs = np.linalg.norm(a - c) / norm, np.linalg.norm(b - c) / norm
    print(f"output {i}: error {ours:.1e}, of the plain form {theirs:.1e}")
    assert ours <= 1.5 * max(theirs, 2**-9), (
      f"output {i}: error {ours:.1e}, of the plain form {theirs:.1e}"
    )


@cases("tokens, width", [(1, 1536), (5, 896), (300, 576), (2, 2560)], [(1, 1536), (2, 576)])
def test_add_norm(tokens, width, interpret):
  def plain(x, y, scale):
    return x + y, norm.rms(x + y, scale, EPS)

  given = real(0, tokens, width), real(1, tokens, width), normal(2, width)
  as_right(functools.partial(norm.add_norm_kernel, eps=EPS, interpret=interpret), plain, *given)


@cases("tokens, width", [(1, 1536), (5, 896), (530, 576)], [(1, 896), (3, 576)])
def test_norm_backward(tokens, width, interpret):
  def plain(x, scale, gradient, passed):
    y, back = jax.vjp(functools.partial(norm.rms, eps=EPS), x, scale)
    d_x, d_scale = back(gradient)
    return d_x + passed, y, d_scale

  # A padding token is all zeros, or what a bias makes of it: nothing may be divided by its size.
  x = real(0, tokens, width).at[-1].set(0)
  given = x, normal(2, width, dtype=jnp.float32), normal(3, tokens, width), normal(4, tokens, width)
  as_right(functools.partial(norm.backward_kernel, eps=EPS, interpret=interpret), plain, *given)


@cases(
  "name, tokens",
  [(name, tokens) for name in HEADS for tokens in (1, 7, 600)],
  [("qwen2.5-1.5b", 2), ("qwen3", 1), ("smollm2", 1)],
)
def test_heads_and_their_gradient(name, tokens, interpret):
  N, K, H = HEADS[name]
  normed = name.startswith("qwen3")
  qkv, bias = normal(0, tokens, N + 2 * K, H), None
  if name.startswith("qwen2.5"):  # keys' and queries' as in its 1.5B
    bias = normal(9, N + 2 * K, H, dtype=jnp.float32).at[N : N + K, 5].add(350).at[:N, 9].add(-29)
  scale = real(1, 2, H, columns=(9,), large=(40, 40), dtype=jnp.float32) if normed else None
  angles = np.random.default_rng(2).uniform(0, 6, (tokens, H // 2))
  cos_sin = jnp.asarray(np.concatenate([np.cos(angles), np.sin(angles)], -1), jnp.float32)
  gradients = tuple(normal(3 + i, tokens, count, H) for i, count in enumerate((N, K, K)))
  a = Architecture(2, 2, 1, N, K, H, 2, norm_eps=EPS)
  plain = functools.partial(heads.plain, a)
  as_right(
    functools.partial(heads.kernel, a, interpret=interpret),
    plain,
    qkv,
    bias,
    scale,
    cos_sin,
  )

  def backward(qkv, bias, scale, cos_sin, gradients):
    return jax.vjp(lambda qkv, scale: plain(qkv, bias, scale, cos_sin), qkv, scale)[1](gradients)

  as_right(
    functools.partial(heads.backward_kernel, a, interpret=interpret),
    backward,
    qkv,
    bias,
    scale,
    cos_sin,
    gradients,
  )


@cases("tokens, size", [(1, 8960), (300, 4864), (2, 1000)], [(1, 4864), (2, 1000)])
def test_swiglu_backward(tokens, size, interpret):
  def plain(gate_up, gradient):
    y, back = jax.vjp(swiglu.plain, gate_up)
    return *back(gradient), y

  # Gates far below and above 0, where the sigmoid is 0 or 1.
  gate_up = real(0, tokens, 2 * size, columns=(3, 17, 40, size + 3, size + 17), large=(50, 1e4))
  as_right(
    functools.partial(swiglu.backward_kernel, interpret=interpret),
    plain,
    gate_up,
    normal(1, tokens, size),
  )


@cases("count", [(16,), (40,), (128,)], [(40,)])
def test_small_products(count, interpret):
  x, matrix = real(0, count, 1536), normal(1, 256, 1536)
  product = lambda x, matrix: (x.astype(jnp.float32) @ matrix.astype(jnp.float32).T).astype(x.dtype)

  def gated(x, matrix):
    gate, up = jnp.split(product(x, matrix), 2, axis=1)
    return jax.nn.silu(gate) * up

  with jax.default_matmul_precision("highest"):
    as_right(
      functools.partial(small_matmul.product_kernel, interpret=interpret), product, x, matrix
    )
    as_right(functools.partial(small_matmul.swiglu_kernel, interpret=interpret), gated, x, matrix)
    parts = lambda x, matrix: (
      small_matmul.parts_kernel(x, matrix, interpret=interpret).sum(0).astype(x.dtype)
    )
    as_right(parts, product, x, matrix)


@cases("name", [(name,) for name in HEADS], [("qwen2.5-1.5b",), ("smollm2",)])
def test_attention_over_the_cache(name, interpret):
  """Rows that see one column, some and all; scores even, far below 0, far above, apart, and one
  winner.
  """
  (N, K, H), B, S, column = HEADS[name], 5, 192, 70
  rng = np.random.default_rng(0)
  qkv = rng.normal(size=(B, N + 2 * K, H))
  keys, values = rng.normal(size=(2, B, K, S, H))
  qkv[:, :N, 5] = H**0.5
  bias = np.array([0, -250, 900, 0, 0])
  keys[..., 5] += bias[:, None, None]
  qkv[:, N : N + K, 5] += bias[:, None]
  keys[3, ..., 5] += rng.choice([-350, 350], size=(K, S))
  keys[4, :, column - 9, 5] += 20
  # No rotation: the plain form below reads keys as they stand in the cache.
  cos_sin = jnp.concatenate([jnp.ones((B, H // 2)), jnp.zeros((B, H // 2))], -1)
  filled = jnp.array([1, 2, 33, 100, S], jnp.int32)
  qkv, keys, values = (jnp.asarray(x, jnp.bfloat16) for x in (qkv, keys, values))

  def kernel(qkv, keys, values):
    return kv_cache.step(
      qkv,
      None,
      None,
      cos_sin,
      keys,
      values,
      jnp.int32(column),
      filled,
      eps=EPS,
      interpret=interpret,
    )[0]

  def plain(qkv, keys, values):
    q, k, v = jnp.split(qkv, [N, N + K], axis=1)
    keys = keys.swapaxes(2, 3)
    return kv_cache.attend(q, k, v, keys, values, jnp.int32(column), filled - 1)[0]

  with jax.default_matmul_precision("highest"):
    as_right(kernel, plain, qkv, keys, values)


@pytest.mark.slow
@cases("name", [(name,) for name in HEADS], [("qwen2.5-1.5b",)])
def test_attention_over_texts_and_the_cache(name, interpret):
  """Rows behind two texts and none, beside one attention over both; scores far above 0 and far
  below it, so that a query rounded otherwise for its text would weigh it wrongly.
  """
  (N, K, H), B, S, P, column = HEADS[name], 5, 64, 512, 40
  rng = np.random.default_rng(0)
  qkv = rng.normal(size=(B, N + 2 * K, H))
  keys, values = rng.normal(size=(2, B, K, S, H))
  text_keys, text_values = rng.normal(size=(2, 2, K, P, H))
  text, length = jnp.array([0, 1, -1, 1, 0], jnp.int32), jnp.array([P, 300], jnp.int32)
  # Not round, as the rotation leaves them: what is rounded once more is another number.
  qkv[:, :N, 5] = H**0.5 * (1 + rng.random((B, N)) / 5)
  for k, bias in ((text_keys, [900, -250]), (keys, [900, -250, 0, -250, 900])):
    k[..., 5] += np.reshape(bias, (-1, 1, 1))
  qkv[:, N : N + K, 5] += np.reshape([900, -250, 0, -250, 900], (-1, 1))
  angles = rng.uniform(0, 6, (B, H // 2))
  angles[:, 5] = 0  # which keeps the bias where it is
  cos_sin = jnp.asarray(np.concatenate([np.cos(angles), np.sin(angles)], -1), jnp.float32)
  filled = jnp.array([1, 2, 33, 20, S], jnp.int32)
  given = [jnp.asarray(x, jnp.bfloat16) for x in (qkv, keys, values, text_keys, text_values)]

  def step(qkv, keys, values):
    how = dict(eps=EPS, queries=True, interpret=interpret)
    return kv_cache.step(qkv, None, None, cos_sin, keys, values, jnp.int32(column), filled, **how)

  def kernel(qkv, keys, values, text_keys, text_values):
    y, _, _, logsumexp, q = step(qkv, keys, values)
    texts = text_cache.LayerTexts(text_keys, text_values, length)
    run = functools.partial(text_cache.kernel, interpret=interpret)
    with unittest.mock.patch.object(text_cache, "kernel", run):
      where = text_cache.blocks(text, texts, N // K)
      before = text_cache.attend_rows(q, where, texts, "triton", 1.0)
    return text_cache.join((y, logsumexp), before, text)

  def plain(qkv, keys, values, text_keys, text_values):
    rotated = attention.rotate_by(qkv[:, : N + K], cos_sin[:, None])
    columns = jnp.arange(S)
    new = (columns == column)[None, None, :, None]
    k = jnp.where(new, rotated[:, N:, None], keys)
    v = jnp.where(new, qkv[:, N + K :, None], values)
    own = (column - columns) % S < filled[:, None]
    there = jnp.arange(P) < text_cache.lengths(length, text)[:, None]
    k, v = (jnp.concatenate([x[text], y], 2) for x, y in ((text_keys, k), (text_values, v)))
    mask = jnp.concatenate([there, own], 1)[:, None]
    return kv_cache.attend_many(rotated[:, None, :N], k, v, mask)[0][:, 0]

  # Interpreted, XLA would use queries that are not rounded, and return them rounded.
  exact = jax.jit(kernel, compiler_options={"xla_allow_excess_precision": False})
  with jax.default_matmul_precision("highest"):
    as_right(exact if interpret else kernel, plain, *given)


@cases("V", [(4099,), (151936,)], [(4099,)])
def test_sums_of_logits(V, interpret):
  """Rows of logits: even, far below 0, far above, one winner on one side, one on both, and
  infinitely unlikely ids.
  """
  rng = np.random.default_rng(0)
  s, t = np.float32(rng.normal(size=(2, 6, V)) * 3)
  s[1] -= 1e3
  t[2] += 1e4
  s[3, 7] = t[4, 7] = s[4, 7] = 60
  s[5, ::3] = t[5, 1::3] = -np.inf
  options = chunk_loss.Options(statistics=True, topk_mass=True, k=4)
  run = lambda f: jax.jit(lambda s, t: chunk_loss._finish(options, f(options, s, t)[0]))(s, t)
  sums, found = run(functools.partial(chunk_loss._kernel_pass, interpret=interpret))
  log_p, log_q = (np.maximum(np.float64(x), losses.FLOOR) / options.temperature for x in (s, t))
  totals = [np.logaddexp.reduce(x, axis=-1) for x in (log_p, log_q)]
  log_p, log_q = log_p - totals[0][:, None], log_q - totals[1][:, None]
  p, q = np.exp(log_p), np.exp(log_q)
  wanted = {"kl": p * (log_p - log_q), "student_entropy": -p * log_p, "teacher_entropy": -q * log_q}
  for a, b in zip(sums, totals):
    np.testing.assert_allclose(a, b, rtol=2e-6)
  for name, terms in wanted.items():
    # Entropies are differences of numbers of the size of the logits, in float32.
    room = 2e-6 * np.maximum(
      1,
      np.maximum(
        np.abs(s).max(-1, where=np.isfinite(s), initial=0),
        np.abs(t).max(-1, where=np.isfinite(t), initial=0),
      ),
    )
    assert (np.abs(found[name] - terms.sum(-1)) <= room + 2e-5 * np.abs(terms.sum(-1))).all(), (
      name,
      found[name],
      terms.sum(-1),
    )
