"""From the projections of queries, keys and values to what attention reads: bias, norm of queries
and keys, rotary positions (Su et al. 2021, eq. 34).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from oel_jax.policy import attention
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.ops import common
from oel_jax.policy.ops.norm import rms


def plain(
  a: Architecture, qkv: Any, bias: Any, scale: Any, cos_sin: Float[Array, "*M H"]
) -> tuple[Float[Array, "*M N H"], Float[Array, "*M K H"], Float[Array, "*M K H"]]:
  """Queries and keys, normed and rotated, and values, all in the type of qkv.

  Args:
    a: the architecture; its counts of heads and ε are read.
    qkv: the heads as the projections leave them: [*M, N + 2 K, H], or the three apart.
    bias: float32, added to them, and not rounded before the rotation: in bfloat16, a key with a
      bias of 350, as Qwen2.5 has them, would be rounded to a multiple of 2 once more. [N + 2 K, H],
      or three apart; None for no bias.
    scale: of the queries' and of the keys' norm, float32: [2, H], or [N + K, H], a row a head, or
      two apart; None for no norm.
    cos_sin: cosines, then sines of the rotary angles, float32.
  """
  apart = isinstance(qkv, tuple)
  dtype = jax.tree.leaves(qkv)[0].dtype
  qkv = qkv if bias is None else jax.tree.map(jnp.add, qkv, bias)

  def turned(x, scale):
    x = x if scale is None else rms(x, scale, a.norm_eps).astype(dtype)
    return attention.rotate_by(x, cos_sin[..., None, :])

  if apart:
    q, k, v = qkv
    q, k = (turned(x, by) for x, by in zip((q, k), scale or (None, None), strict=True))
  else:  # queries and keys are one array for as long as the same is done to both
    qk, v = jnp.split(qkv, [a.heads + a.kv_heads], axis=-2)
    q, k = jnp.split(turned(qk, by_head(a, scale)), [a.heads], axis=-2)
  return tuple(x.astype(dtype) for x in (q, k, v))


def by_head(a: Architecture, scale: Float[Array, "heads H"] | None) -> Float[Array, "NK H"] | None:
  """The scale of the norm with a row for each of N + K heads."""
  if scale is None or scale.shape[0] == a.heads + a.kv_heads:
    return scale
  rows = zip(scale, (a.heads, a.kv_heads), strict=True)
  return jnp.concatenate([jnp.broadcast_to(row, (count, a.head_size)) for row, count in rows])


def _forward(a, qkv_MxAxH, bias_AxH, scale_2xH, cos_sin_MxH):
  given = qkv_MxAxH, bias_AxH, scale_2xH, cos_sin_MxH
  if common.supported(qkv_MxAxH, a.head_size):
    return tuple(kernel(a, *given)), given
  return plain(a, *given), given


def _backward(a, saved, gradients):
  qkv, bias, scale, cos_sin = saved
  if common.supported(qkv, a.head_size):
    d_qkv, d_scale = backward_kernel(a, *saved, gradients)
    d_bias = None if bias is None else d_qkv.astype(jnp.float32).sum(0).astype(bias.dtype)
    return d_qkv, d_bias, d_scale, None
  of_numbers = lambda qkv, bias, scale: plain(a, qkv, bias, scale, cos_sin)
  return *jax.vjp(of_numbers, qkv, bias, scale)[1](gradients), None


# (architecture, qkv [M, N + 2 K, H], bias, scale [2, H], cos_sin [M, H]) → as `plain`, which it is
# where the kernels do not run.
heads = common.with_rule(_forward, _backward, (0,))


def kernel(
  a: Architecture,
  qkv_MxAxH: Float[Array, "M A H"],
  bias_AxH: Float[Array, "A H"] | None,
  scale_2xH: Float[Array, "2 H"] | None,
  cos_sin_MxH: Float[Array, "M H"],
  *,
  interpret: bool = False,
) -> tuple[Float[Array, "M N H"], Float[Array, "M K H"], Float[Array, "M K H"]]:
  """`plain` as one kernel, for fused heads, A = N + 2 K of them, and one scale for all queries and
  one for all keys; H is a power of two. `interpret` runs it without a GPU.
  """
  M, A, H = qkv_MxAxH.shape
  counts = a.heads, a.kv_heads, a.kv_heads
  token = lambda *shape: pl.BlockSpec((None, *shape), lambda i: (i, *(0 for _ in shape)))
  whole = [x for x in (bias_AxH, scale_2xH) if x is not None]
  return pl.pallas_call(
    functools.partial(_kernel_body, counts=counts, eps=a.norm_eps, biased=bias_AxH is not None),
    grid=(M,),
    in_specs=[token(A, H), token(H), *(pl.no_block_spec for _ in whole)],
    out_specs=[token(count, H) for count in counts],
    out_shape=[jax.ShapeDtypeStruct((M, count, H), qkv_MxAxH.dtype) for count in counts],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="heads",
  )(qkv_MxAxH, cos_sin_MxH, *whole)


def _kernel_body(qkv_ref, cos_sin_ref, *refs, counts, eps, biased):
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


def backward_kernel(
  a: Architecture,
  qkv_MxAxH: Float[Array, "M A H"],
  bias_AxH: Float[Array, "A H"] | None,
  scale_2xH: Float[Array, "2 H"] | None,
  cos_sin_MxH: Float[Array, "M H"],
  gradients: tuple[Array, Array, Array],
  *,
  interpret: bool = False,
) -> tuple[Float[Array, "M A H"], Float[Array, "2 H"] | None]:
  """The gradients of `kernel` in qkv and scale, given those in its three outputs.

  Args:
    a, qkv_MxAxH, bias_AxH, scale_2xH, cos_sin_MxH, interpret: as in `kernel`.
    gradients: in queries [M, N, H], keys and values [M, K, H].

  Returns:
    The gradient in qkv, in its type (that in the bias is its sum over the tokens), and in the
    scale, float32; None where there is none.
  """
  M, A, H = qkv_MxAxH.shape
  programs, counts = min(common.PROGRAMS, M), (a.heads, a.kv_heads, a.kv_heads)
  scale = () if scale_2xH is None else (scale_2xH,)
  bias = () if bias_AxH is None else (bias_AxH,)
  out = pl.pallas_call(
    functools.partial(_backward_body, counts=counts, eps=a.norm_eps, biased=len(bias)),
    grid=(programs,),
    out_specs=[pl.no_block_spec] + [pl.BlockSpec((None, 2, H), lambda i: (i, 0, 0)) for _ in scale],
    out_shape=[jax.ShapeDtypeStruct(qkv_MxAxH.shape, qkv_MxAxH.dtype)]
    + [jax.ShapeDtypeStruct((programs, 2, H), jnp.float32) for _ in scale],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="heads_backward",
  )(qkv_MxAxH, cos_sin_MxH, *gradients, *bias, *scale)
  return out[0], out[1].sum(0) if scale else None


def _backward_body(qkv_ref, cos_sin_ref, q_ref, k_ref, v_ref, *refs, counts, eps, biased):
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
  rows, there = common.padded(first, count)
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
  rows, there = common.padded(first, count)
  return lambda half, value: triton.store(
    ref.at[(*token, rows, half)], value.astype(ref.dtype), mask=there[:, None]
  )


def _normed(get, halves, H, eps):
  """The two halves of each head, of mean square 1 (without `eps`: as they are), and what they were
  multiplied by, [heads, 1].
  """
  x, y = (get(half) for half in halves)
  if eps is None:
    return x, y, None
  size = jax.lax.rsqrt((jnp.sum(x * x, -1) + jnp.sum(y * y, -1)) / H + eps)[:, None]
  return x * size, y * size, size
