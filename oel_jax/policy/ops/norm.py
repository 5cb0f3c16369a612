"""RMSNorm (Zhang and Sennrich 2019, eq. 4) of a sum, and its gradient."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from oel_jax.policy.ops import common


def rms(x: Float[Array, "*M D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*M D"]:
  """The RMSNorm of x over its last axis, in float32, rounded to the type of x. The scale may have
  one row a head, too.
  """
  x32 = x.astype(jnp.float32)
  return (x32 * (jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps) * scale)).astype(
    x.dtype
  )


def add_norm(
  x: Float[Array, "*M D"], y: Float[Array, "..."] | None, scale_D: Float[Array, "D"], eps: float
) -> tuple[Float[Array, "*M D"], Float[Array, "*M D"]]:
  """x + y (None is 0) and its RMSNorm, both in the type of x; y may be in parts [P, M, D] where the
  kernel runs.
  """
  if y is not None and common.supported(x):
    return tuple(add_norm_kernel(x, y, scale_D, eps=eps))
  return add_norm_plain(x, y, scale_D, eps)


def add_norm_plain(
  x: Float[Array, "*M D"], y: Float[Array, "*M D"] | None, scale_D: Float[Array, "D"], eps: float
) -> tuple[Float[Array, "*M D"], Float[Array, "*M D"]]:
  """`add_norm` without a kernel, anywhere."""
  x = x if y is None else x + y
  return x, rms(x, scale_D, eps)


def backward(
  x_MxD: Float[Array, "M D"],
  scale_D: Float[Array, "D"],
  gradient_MxD: Float[Array, "M D"],
  passed_MxD: Float[Array, "M D"],
  eps: float,
) -> tuple[Float[Array, "M D"], Float[Array, "M D"], Float[Array, "D"]]:
  """Of y = rms(x): the gradient in x, with `passed_MxD`, that by other ways; y again; and the
  gradient in the scale.
  """
  if common.supported(x_MxD):
    scale = scale_D.astype(jnp.float32)
    return backward_kernel(x_MxD, scale, gradient_MxD, passed_MxD, eps=eps)
  y, back = jax.vjp(functools.partial(rms, eps=eps), x_MxD, scale_D)
  d_x, d_scale = back(gradient_MxD)
  return d_x + passed_MxD, y, d_scale


def add_norm_kernel(
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
    functools.partial(_add_norm_body, eps=eps),
    grid=(M,),
    in_specs=[token, pl.BlockSpec((len(y), None, D), lambda i: (0, i, 0)), pl.no_block_spec],
    out_specs=[token, token],
    out_shape=[jax.ShapeDtypeStruct(x_MxD.shape, x_MxD.dtype)] * 2,
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
    interpret=interpret,
    name="add_norm",
  )(x_MxD, y, scale_D)


def _add_norm_body(x_ref, y_ref, scale_ref, sum_ref, normed_ref, *, eps):
  (parts, D), dtype = y_ref.shape, x_ref.dtype
  columns, there = common.padded(0, D)
  get = lambda ref, *at: triton.load(ref.at[(*at, columns)], mask=there, other=0.0).astype(
    jnp.float32
  )
  rounded = lambda x: x.astype(dtype).astype(jnp.float32)
  x = rounded(get(x_ref) + rounded(sum(get(y_ref, jnp.int32(part)) for part in range(parts))))
  normed = x * (jax.lax.rsqrt(jnp.sum(x * x) / D + eps) * get(scale_ref))
  triton.store(sum_ref.at[columns], x.astype(dtype), mask=there)
  triton.store(normed_ref.at[columns], normed.astype(dtype), mask=there)


def backward_kernel(
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
  programs = min(common.PROGRAMS, M)
  d_x, y, d_scale = pl.pallas_call(
    functools.partial(_backward_body, eps=eps),
    grid=(programs,),
    out_specs=[pl.no_block_spec, pl.no_block_spec, pl.BlockSpec((None, D), lambda i: (i, 0))],
    out_shape=[like, like, jax.ShapeDtypeStruct((programs, D), jnp.float32)],
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
    interpret=interpret,
    name="norm_backward",
  )(x_MxD, scale_D, gradient_MxD, passed_MxD)
  return d_x, y, d_scale.sum(0)


def _backward_body(x_ref, scale_ref, gradient_ref, passed_ref, d_x_ref, y_ref, d_scale_ref, *, eps):
  (M, D), first, step = x_ref.shape, pl.program_id(0), pl.num_programs(0)
  columns, there = common.padded(0, D)
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
