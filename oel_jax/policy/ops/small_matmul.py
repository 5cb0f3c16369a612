"""Products with matrices as sampling holds them, and kernels for those of a few rows, which a
decoder makes at every token, as fast as the matrix can be read.

On a GPU the matrices have one row an output. XLA follows such a product with kernels of their own
for what is done to it, and, where it adds up in parts, for their sum. In the kernels SwiGLU is part
of the product, and `norm.add_norm` takes the parts as they are. Pallas kernels for one NVIDIA GPU.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from oel_jax.policy.ops import swiglu as swiglu_lib
from oel_jax.runtime import target

# Rows; for fewer XLA's are as fast, with more it is no longer the memory that limits.
FEWEST, MOST = (
  16,
  128,
)


class Cut(NamedTuple):
  """How a product is cut up: `parts` of the sum, `wide` outputs a program, `deep` terms at once."""

  parts: int
  wide: int
  deep: int
  warps: int
  stages: int


PRODUCT = Cut(1, 32, 128, 4, 4)
# Of these the first that divides the sum and whose programs all run at once: best of eight or more
# each for 64 rows of Qwen3-1.7B on an H100, and of Qwen2.5-1.5B and Qwen3-4B on an H200.
PARTS = Cut(4, 64, 128, 8, 4), Cut(5, 64, 128, 8, 4), Cut(4, 64, 64, 4, 4)
SWIGLU = Cut(1, 64, 64, 4, 5), Cut(1, 64, 64, 4, 4)
MULTIPROCESSORS, SHARED_BYTES = 132, 227 * 1024  # of an H100 or H200; of each multiprocessor


def on_gpu() -> bool:
  """Whether matrices have one row an output."""
  return target.backend() == "gpu"


def lay_out(matrix_DxF: Float[Array, "D F"]) -> Float[Array, "..."]:
  """The matrix as the products below read it: [F, D] on a GPU."""
  return matrix_DxF.T if on_gpu() else matrix_DxF


def product(x_MxD: Float[Array, "M D"], matrix: Float[Array, "..."]) -> Float[Array, "M F"]:
  """x times a matrix as `lay_out` lays it out. On a GPU a single token's product is a sum over
  rows, which reads the matrix faster than any matrix product: 2.0 for 2.6 ms a step of Qwen3-1.7B
  on an H100.
  """
  if not on_gpu():
    return x_MxD @ matrix
  if len(x_MxD) == 1:
    products = x_MxD.astype(jnp.float32) * matrix.astype(jnp.float32)
    return jnp.sum(products, axis=-1).astype(x_MxD.dtype)[None]
  if supported(x_MxD, matrix):
    return product_kernel(x_MxD, matrix)
  return jnp.einsum("md,fd->mf", x_MxD, matrix)


def addend(x_MxD: Float[Array, "M D"], matrix: Float[Array, "..."]) -> Float[Array, "*P M F"]:
  """`product` for `norm.add_norm`: whole, or in parts that it adds up."""
  if supported(x_MxD, matrix) and _cut(x_MxD, matrix, 1, PARTS):
    return parts_kernel(x_MxD, matrix)
  return product(x_MxD, matrix)


def swiglu(x_MxD: Float[Array, "M D"], matrix: Float[Array, "..."]) -> Float[Array, "M F"]:
  """silu(gate) up, where gate and up are the halves of `product`."""
  if supported(x_MxD, matrix):
    return swiglu_kernel(x_MxD, matrix)
  return swiglu_lib.plain(product(x_MxD, matrix))


def supported(x_MxD: Float[Array, "M D"], matrix_FxD: Float[Array, "F D"]) -> bool:
  """Whether the numbers and their type are what the kernels are for, and the GPU has the shared
  memory that they take: up to 192 KiB.
  """
  (M, D), F = x_MxD.shape, matrix_FxD.shape[0]
  even = D % PRODUCT.deep == 0 and F % (2 * SWIGLU[0].wide) == 0
  return _large_gpu() and x_MxD.dtype == jnp.bfloat16 and FEWEST <= M <= MOST and even


def _large_gpu() -> bool:
  """An NVIDIA H100, H200, B200 or their like."""
  return target.backend() == "gpu" and target.compute_capability() in ("9.0", "10.0", "10.3")


def product_kernel(
  x_MxD: Float[Array, "M D"], matrix_FxD: Float[Array, "F D"], *, interpret: bool = False
) -> Float[Array, "M F"]:
  """Sums over D, in float32, rounded to bfloat16, the type of both arguments. `interpret` runs it
  without a GPU.

  Here and below shapes and types are those that `supported` allows: others are not refused, and
  may give anything.
  """
  return _product(x_MxD, matrix_FxD, PRODUCT, 1, x_MxD.dtype, interpret)[0]


def parts_kernel(
  x_MxD: Float[Array, "M D"], matrix_FxD: Float[Array, "F D"], *, interpret: bool = False
) -> Float[Array, "P M F"]:
  """`product_kernel` as float32 parts, which are to be added up."""
  cut = _cut(x_MxD, matrix_FxD, 1, PARTS)
  return _product(x_MxD, matrix_FxD, cut, 1, jnp.float32, interpret)


def swiglu_kernel(
  x_MxD: Float[Array, "M D"], matrix_F2xD: Float[Array, "F2 D"], *, interpret: bool = False
) -> Float[Array, "M F"]:
  """silu(gate) up (Shazeer 2020, eq. 6), where gate and up are the halves of `product_kernel`;
  rounded as it, silu(gate) and the result would be.
  """
  cut = _cut(x_MxD, matrix_F2xD, 2, SWIGLU)
  return _product(x_MxD, matrix_F2xD, cut, 2, x_MxD.dtype, interpret)[0]


def _cut(x: Array, matrix: Array, sides: int, cuts: Sequence[Cut]) -> Cut | None:
  """The first of `cuts` that divides the sum and whose programs all run at once; if none does, the
  last that divides it; if none does, None.
  """
  (M, D), F = x.shape, matrix.shape[0] // sides

  def at_once(cut):
    held = cut.stages * cut.deep * (pl.next_power_of_2(M) + sides * cut.wide) * x.dtype.itemsize
    return F // cut.wide * cut.parts <= MULTIPROCESSORS * (SHARED_BYTES // held)

  dividing = [cut for cut in cuts if D % (cut.parts * cut.deep) == 0]
  return next(filter(at_once, dividing), dividing[-1] if dividing else None)


def _product(
  x: Array, matrix: Array, cut: Cut, sides: int, dtype: Any, interpret: bool
) -> Float[Array, "P M F"]:
  M, F = x.shape[0], matrix.shape[0] // sides
  return pl.pallas_call(
    functools.partial(_kernel, cut=cut, sides=sides),
    grid=(F // cut.wide, cut.parts),
    in_specs=[pl.no_block_spec] * 2,
    out_specs=pl.BlockSpec((None, M, cut.wide), lambda n, part: (part, 0, n)),
    out_shape=jax.ShapeDtypeStruct((cut.parts, M, F), dtype),
    compiler_params=triton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
    interpret=interpret,
    name="small_matmul",
  )(x, matrix)


def _kernel(x_ref, matrix_ref, out_ref, *, cut, sides):
  (M, D), F, dtype = x_ref.shape, matrix_ref.shape[0] // sides, x_ref.dtype
  n, part, count = pl.program_id(0), pl.program_id(1), D // cut.deep // cut.parts
  rows = pl.next_power_of_2(M)
  row, there = pl.ds(0, rows), (jnp.arange(rows) < M)[:, None] if rows > M else None

  def step(i, sums):
    at = pl.ds((part * count + i) * cut.deep, cut.deep)
    x = triton.load(x_ref.at[row, at], mask=there, other=None if there is None else 0.0)
    outputs = (pl.ds(side * F + n * cut.wide, cut.wide) for side in range(sides))
    return tuple(
      total + triton.dot(x, matrix_ref[output, at].T)
      for total, output in zip(sums, outputs, strict=True)
    )

  made, *up = jax.lax.fori_loop(0, count, step, (jnp.zeros((rows, cut.wide), jnp.float32),) * sides)
  if up:
    rounded = lambda x: x.astype(dtype).astype(jnp.float32)
    made = rounded(jax.nn.silu(rounded(made))) * rounded(up[0])
  triton.store(out_ref.at[row, :], made.astype(out_ref.dtype), mask=there)
