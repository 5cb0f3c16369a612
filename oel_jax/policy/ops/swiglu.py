"""SwiGLU (Shazeer 2020, eq. 6) of gate and up side by side, and its gradient."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from oel_jax.policy.ops import common

COLUMNS = 2048  # of a feed-forward row that a program takes


def plain(gate_up: Float[Array, "*M F2"]) -> Float[Array, "*M F"]:
  """silu(gate) up, in the type of the two."""
  gate, up = jnp.split(gate_up, 2, axis=-1)
  return jax.nn.silu(gate) * up


def backward(
  gate_up_MxF2: Float[Array, "M F2"], gradient_MxF: Float[Array, "M F"]
) -> tuple[Float[Array, "M F2"], Float[Array, "M F"]]:
  """Of y = plain(gate_up): the gradient in gate and up, and y again, in their types."""
  if common.supported(gate_up_MxF2):
    return backward_kernel(gate_up_MxF2, gradient_MxF)
  y, back = jax.vjp(plain, gate_up_MxF2)
  return back(gradient_MxF)[0], y


def backward_kernel(
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
    _backward_body,
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


def _backward_body(gate_up_ref, gradient_ref, d_gate_up_ref, y_ref):
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
