"""What stands between a layer's matrix products, each as one pass over memory: Pallas kernels for
one NVIDIA GPU.

XLA makes two to five kernels of each of these, and every one reads its input anew. Plain JAX does
the same elsewhere; it is the reference. The functions take flat arrays of M tokens. Where there are
gradients of scales, sums over all tokens, a program goes over every `PROGRAMS`-th token, and they
stay in registers until its end.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

PROGRAMS = 528  # four for each of an H100's 132 multiprocessors
COLUMNS = 2048  # of a feed-forward row that a program takes


def add_norm(
  x_MxD: Float[Array, "M D"],
  y: Float[Array, "*P M D"],
  scale_D: Float[Array, "D"],
  *,
  eps: float,
  interpret: bool = False,
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
  """x + y, and its RMSNorm (Zhang and Sennrich 2019, eq. 4), both in the type of x, to which the
  sum is rounded first.

  Args:
    x_MxD: what is added to.
    y: [M, D], or P parts of it, whose sum is rounded to the type of x.
    scale_D: of the norm, any float type.
    eps: of the norm.
    interpret: run it without a GPU.
  """
  M, D = x_MxD.shape
  y = y.reshape(-1, M, D)
  token = pl.BlockSpec((None, D), lambda i: (i, 0))
  return pl.pallas_call(
    functools.partial(_add_norm, eps=eps),
    grid=(M,),
    in_specs=[token, pl.BlockSpec((len(y), None, D), lambda i: (0, i, 0)), pl.no_block_spec],
    out_specs=[token, token],
    out_shape=[jax.ShapeDtypeStruct(x_MxD.shape, x_MxD.dtype)] * 2,
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
    interpret=interpret,
    name="add_norm",
  )(x_MxD, y, scale_D)


def _add_norm(x_ref, y_ref, scale_ref, sum_ref, normed_ref, *, eps):
  (parts, D), dtype = y_ref.shape, x_ref.dtype
  columns, there = _padded(0, D)
  get = lambda ref, *at: triton.load(ref.at[(*at, columns)], mask=there, other=0.0).astype(
    jnp.float32
  )
  rounded = lambda x: x.astype(dtype).astype(jnp.float32)
  x = rounded(get(x_ref) + rounded(sum(get(y_ref, jnp.int32(part)) for part in range(parts))))
  normed = x * (jax.lax.rsqrt(jnp.sum(x * x) / D + eps) * get(scale_ref))
  triton.store(sum_ref.at[columns], x.astype(dtype), mask=there)
  triton.store(normed_ref.at[columns], normed.astype(dtype), mask=there)


def norm_backward(
  x_MxD: Float[Array, "M D"],
  scale_D: Float[Array, "D"],
  gradient_MxD: Float[Array, "M D"],
  passed_MxD: Float[Array, "M D"],
  *,
  eps: float,
  interpret: bool = False,
) -> tuple[Float[Array, "M D"], Float[Array, "M D"], Float[Array, "D"]]:
  """Of y = RMSNorm(x) (Zhang and Sennrich 2019, eq. 4): y again, and the gradients in x and in the
  scale.

  Args:
    x_MxD: what was normed.
    scale_D: float32.
    gradient_MxD: in y.
    passed_MxD: the gradient in x by other ways, which is added.
    eps: of the norm.
    interpret: run it without a GPU.

  Returns:
    The gradient in x, y, and the gradient in the scale (float32).
  """
  M, D = x_MxD.shape
  like = jax.ShapeDtypeStruct(x_MxD.shape, x_MxD.dtype)
  programs = min(PROGRAMS, M)
  d_x, y, d_scale = pl.pallas_call(
    functools.partial(_norm_backward, eps=eps),
    grid=(programs,),
    out_specs=[pl.no_block_spec, pl.no_block_spec, pl.BlockSpec((None, D), lambda i: (i, 0))],
    out_shape=[like, like, jax.ShapeDtypeStruct((programs, D), jnp.float32)],
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
    interpret=interpret,
    name="norm_backward",
  )(x_MxD, scale_D, gradient_MxD, passed_MxD)
  return d_x, y, d_scale.sum(0)


def _norm_backward(x_ref, scale_ref, gradient_ref, passed_ref, d_x_ref, y_ref, d_scale_ref, *, eps):
  (M, D), first, step = x_ref.shape, pl.program_id(0), pl.num_programs(0)
  columns, there = _padded(0, D)
  get = lambda ref, *at: triton.load(ref.at[(*at, columns)], mask=there, other=0.0).astype(
    jnp.float32
  )
  scale = get(scale_ref)

  def token(i, d_scale):
    at = first + i * step
    x, gradient = get(x_ref, at), get(gradient_ref, at)
    size = jax.lax.rsqrt(jnp.sum(x * x) / D + eps)
    normed, inner = x * size, gradient * scale
    d_x = get(passed_ref, at) + size * (inner - normed * (jnp.sum(inner * normed) / D))
    triton.store(d_x_ref.at[at, columns], d_x.astype(d_x_ref.dtype), mask=there)
    triton.store(y_ref.at[at, columns], (normed * scale).astype(y_ref.dtype), mask=there)
    return d_scale + gradient * normed

  d_scale = jax.lax.fori_loop(
    0, pl.cdiv(M - first, step), token, jnp.zeros(columns.size, jnp.float32)
  )
  triton.store(d_scale_ref.at[columns], d_scale, mask=there)


def heads(
  qkv_MxAxH: Float[Array, "M A H"],
  bias_AxH: Float[Array, "A H"] | None,
  scale_2xH: Float[Array, "2 H"] | None,
  turns_MxH: Float[Array, "M H"],
  *,
  kv_heads: int,
  eps: float,
  interpret: bool = False,
) -> tuple[Array, Array, Array]:
  """Queries [M, N, H] and keys [M, K, H], normed and rotated (Su et al. 2021, eq. 34), and values
  [M, K, H], all in the type of qkv.

  Args:
    qkv_MxAxH: the heads as the projection leaves them: N of queries, K of keys, K of values; H is a
      power of two.
    bias_AxH: float32, added to them, and not rounded before the rotation; None for no bias.
    scale_2xH: of the queries' and of the keys' norm, float32; None for no norm.
    turns_MxH: cosines, then sines of the rotary angles, float32.
    kv_heads: K.
    eps: of the norm.
    interpret: run it without a GPU.
  """
  M, A, H = qkv_MxAxH.shape
  counts = A - 2 * kv_heads, kv_heads, kv_heads
  token = lambda *shape: pl.BlockSpec((None, *shape), lambda i: (i, *(0 for _ in shape)))
  whole = [x for x in (bias_AxH, scale_2xH) if x is not None]
  return pl.pallas_call(
    functools.partial(_heads, counts=counts, eps=eps, biased=bias_AxH is not None),
    grid=(M,),
    in_specs=[token(A, H), token(H), *(pl.no_block_spec for _ in whole)],
    out_specs=[token(count, H) for count in counts],
    out_shape=[jax.ShapeDtypeStruct((M, count, H), qkv_MxAxH.dtype) for count in counts],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="heads",
  )(qkv_MxAxH, turns_MxH, *whole)


def _heads(qkv_ref, cos_sin_ref, *refs, counts, eps, biased):
  *whole, outs = *refs[:-3], refs[-3:]
  bias_ref = whole.pop(0) if biased else None
  scale_ref = whole.pop(0) if whole else None
  H, dtype, first = qkv_ref.shape[1], qkv_ref.dtype, 0
  halves = pl.ds(0, H // 2), pl.ds(H // 2, H // 2)
  cos, sin = (cos_sin_ref[half][None] for half in halves)
  for kind, (out_ref, count) in enumerate(zip(outs, counts, strict=True)):
    get, put = (
      _biased(_reader(qkv_ref, first, count), bias_ref, first, count),
      _writer(out_ref, 0, count),
    )
    if kind == 2:
      for half in halves:
        put(half, get(half))
    else:
      x, y, _ = _normed(get, halves, H, None if scale_ref is None else eps)
      if scale_ref is not None:  # rounded where the model rounds
        x, y = (
          (z * scale_ref[kind, half][None]).astype(dtype).astype(jnp.float32)
          for z, half in zip((x, y), halves, strict=True)
        )
      put(halves[0], x * cos - y * sin)
      put(halves[1], y * cos + x * sin)
    first += count


def heads_backward(
  qkv_MxAxH: Float[Array, "M A H"],
  bias_AxH: Float[Array, "A H"] | None,
  scale_2xH: Float[Array, "2 H"] | None,
  turns_MxH: Float[Array, "M H"],
  gradients: tuple[Array, Array, Array],
  *,
  eps: float,
  interpret: bool = False,
) -> tuple[Float[Array, "M A H"], Float[Array, "2 H"] | None]:
  """The gradients of `heads` in qkv and scale, given those in its three outputs.

  Args:
    qkv_MxAxH, bias_AxH, scale_2xH, turns_MxH, eps, interpret: as in `heads`.
    gradients: in queries [M, N, H], keys and values [M, K, H].

  Returns:
    The gradient in qkv, in its type (that in the bias is its sum over the tokens), and in the
    scale, float32; None where there is none.
  """
  M, A, H = qkv_MxAxH.shape
  programs, counts = min(PROGRAMS, M), tuple(gradient.shape[1] for gradient in gradients)
  scale = () if scale_2xH is None else (scale_2xH,)
  bias = () if bias_AxH is None else (bias_AxH,)
  out = pl.pallas_call(
    functools.partial(_heads_backward, counts=counts, eps=eps, biased=len(bias)),
    grid=(programs,),
    out_specs=[pl.no_block_spec] + [pl.BlockSpec((None, 2, H), lambda i: (i, 0, 0)) for _ in scale],
    out_shape=[jax.ShapeDtypeStruct(qkv_MxAxH.shape, qkv_MxAxH.dtype)]
    + [jax.ShapeDtypeStruct((programs, 2, H), jnp.float32) for _ in scale],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="heads_backward",
  )(qkv_MxAxH, turns_MxH, *gradients, *bias, *scale)
  return out[0], out[1].sum(0) if scale else None


def _heads_backward(qkv_ref, cos_sin_ref, q_ref, k_ref, v_ref, *refs, counts, eps, biased):
  bias_ref, refs = (refs[0], refs[1:]) if biased else (None, refs)
  scale_ref, d_qkv_ref, d_scale_ref = refs if len(refs) == 3 else (None, *refs, None)
  (M, _, H), first, step = qkv_ref.shape, pl.program_id(0), pl.num_programs(0)
  halves = pl.ds(0, H // 2), pl.ds(H // 2, H // 2)
  starts = 0, counts[0], counts[0] + counts[1]
  scales = (
    [[scale_ref[kind, half][None] for half in halves] for kind in range(2)]
    if scale_ref is not None
    else None
  )

  def token(i, sums):
    at = first + i * step
    cos, sin = (cos_sin_ref[at, half][None] for half in halves)
    new = []
    for kind, (ref, begin, count) in enumerate(
      zip((q_ref, k_ref, v_ref), starts, counts, strict=True)
    ):
      get, put = _reader(ref, 0, count, at), _writer(d_qkv_ref, begin, count, at)
      if kind == 2:
        for half in halves:
          put(half, get(half))
        continue
      low, high = (get(half) for half in halves)
      low, high = low * cos + high * sin, high * cos - low * sin
      if scales is not None:
        x, y, size = _normed(
          _biased(_reader(qkv_ref, begin, count, at), bias_ref, begin, count), halves, H, eps
        )
        new += [
          old + d * z
          for old, d, z in zip(sums[2 * kind : 2 * kind + 2], (low, high), (x, y), strict=True)
        ]
        low, high = low * scales[kind][0], high * scales[kind][1]
        mean = ((jnp.sum(low * x, -1) + jnp.sum(high * y, -1)) / H)[:, None]
        low, high = size * (low - x * mean), size * (high - y * mean)
      put(halves[0], low)
      put(halves[1], high)
    return tuple(new)

  zeros = [
    jnp.zeros((pl.next_power_of_2(count), H // 2), jnp.float32)
    for count in counts[:2]
    for _ in halves
  ]
  sums = jax.lax.fori_loop(
    0, pl.cdiv(M - first, step), token, tuple(zeros) if scales is not None else ()
  )
  for i, total in enumerate(sums):
    d_scale_ref[i // 2, halves[i % 2]] = total.sum(0)


def _reader(ref, first, count, *token):
  """Loads half of `count` heads from number `first` on, float32, with zeros up to a power of
  two.
  """
  rows, there = _padded(first, count)
  return lambda half: triton.load(
    ref.at[(*token, rows, half)], mask=there[:, None], other=0.0
  ).astype(jnp.float32)


def _biased(get, bias_ref, first, count):
  """Loads what `get` does, and adds the bias of these heads, if there is one."""
  if bias_ref is None:
    return get
  bias = _reader(bias_ref, first, count)
  return lambda half: get(half) + bias(half)


def _writer(ref, first, count, *token):
  rows, there = _padded(first, count)
  return lambda half, value: triton.store(
    ref.at[(*token, rows, half)], value.astype(ref.dtype), mask=there[:, None]
  )


def _padded(first, count):
  """`count` places from `first` on, as a slice of a power of two, which may reach beyond the array,
  and which of the slice count.
  """
  size = pl.next_power_of_2(count)
  return pl.ds(jnp.int32(first), size), jnp.arange(size) < count


def _normed(get, halves, H, eps):
  """The two halves of each head, of mean square 1 (without `eps`: as they are), and what they were
  multiplied by, [heads, 1].
  """
  x, y = (get(half) for half in halves)
  if eps is None:
    return x, y, None
  size = jax.lax.rsqrt((jnp.sum(x * x, -1) + jnp.sum(y * y, -1)) / H + eps)[:, None]
  return x * size, y * size, size


def swiglu_backward(
  gate_up_MxF2: Float[Array, "M F2"], gradient_MxF: Float[Array, "M F"], *, interpret: bool = False
) -> tuple[Float[Array, "M F2"], Float[Array, "M F"]]:
  """Of y = silu(gate) up (Shazeer 2020, eq. 6), gate and up side by side: the gradient in them, and
  y again, in their types.

  Args:
    gate_up_MxF2: the F of the gate, then the F that it multiplies.
    gradient_MxF: in y.
    interpret: run it without a GPU.
  """
  M, F = gradient_MxF.shape
  return pl.pallas_call(
    _swiglu_backward,
    grid=(M, pl.cdiv(F, COLUMNS)),
    in_specs=[pl.no_block_spec] * 2,
    out_specs=[pl.no_block_spec] * 2,
    out_shape=[
      jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (gate_up_MxF2, gradient_MxF)
    ],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="swiglu_backward",
  )(gate_up_MxF2, gradient_MxF)


def _swiglu_backward(gate_up_ref, gradient_ref, d_gate_up_ref, y_ref):
  F, at, begin = gradient_ref.shape[1], pl.program_id(0), pl.program_id(1) * COLUMNS
  there = begin + jnp.arange(COLUMNS) < F
  left, right = pl.ds(begin, COLUMNS), pl.ds(F + begin, COLUMNS)
  get = lambda ref, columns: triton.load(ref.at[at, columns], mask=there, other=0.0).astype(
    jnp.float32
  )
  put = lambda ref, columns, value: triton.store(
    ref.at[at, columns], value.astype(ref.dtype), mask=there
  )
  gate, up, gradient = get(gate_up_ref, left), get(gate_up_ref, right), get(gradient_ref, left)
  share = jax.nn.sigmoid(gate)
  put(y_ref, left, gate * share * up)
  put(d_gate_up_ref, left, gradient * up * share * (1 + gate * (1 - share)))
  put(d_gate_up_ref, right, gradient * gate * share)
