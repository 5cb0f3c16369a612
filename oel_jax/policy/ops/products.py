"""Matrix products in training, with what stands before them, and their gradients.

A product's own gradient rule keeps what it read, and makes it again where that costs less than
memory; and it gives the gradient in a matrix to its sink, in float32, if it has one. Of a matrix
that is split over a mesh, and of its sink, it is given this device's part (`split`): of one behind
a norm, over its columns, and of the others over their rows.
"""

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from oel_jax.policy.ops import common, norm, split, swiglu


def _matrix_gradients(parts, x_MxD, gradient_MxF, matrix, sink) -> tuple:
  """xᵀ gradient: in the matrix's type where it belongs to the matrix itself, in float32 where to
  its sink.
  """
  if sink is None:
    whole = jnp.einsum("md,mf->df", x_MxD, gradient_MxF).astype(matrix.dtype)
    return split.add_up(whole, parts), None
  whole = jnp.einsum("md,mf->df", x_MxD, gradient_MxF, preferred_element_type=jnp.float32)
  return None, split.add_up(whole, parts)


def _product_forward(parts, x_MxD, matrix_DxF, sink):
  product = split.of_all_heads(x_MxD @ split.whole(matrix_DxF, parts), parts)
  return product, (x_MxD, matrix_DxF, sink)


def _product_backward(parts, saved, gradient):
  x, matrix, sink = saved
  d_x = gradient @ split.again(matrix, parts).T
  return d_x, *_matrix_gradients(parts, x, gradient, matrix, sink)


def _norm_product_forward(parts, eps, x_MxD, y_MxD, scale_D, matrix_DxF, sink):
  """x + y, and its norm times the matrix: so the gradient that comes past the norm is added where
  the norm's own is made.
  """
  x, normed = norm.add_norm(x_MxD, y_MxD, scale_D, eps)
  x = checkpoint_name(x, common.REMAT_SAVED)
  added = None if y_MxD is None else ()
  return (x, normed @ split.whole(matrix_DxF, parts)), (x, added, scale_D, matrix_DxF, sink)


def _norm_product_backward(parts, eps, saved, gradients):
  x, added, scale, matrix, sink = saved
  passed, gradient = gradients
  inner = split.of_all_heads(gradient @ split.again(matrix, parts).T, parts)
  d_x, y, d_scale = norm.backward(x, scale, inner, passed, eps)
  return (
    d_x,
    None if added is None else d_x,
    d_scale.astype(scale.dtype),
    *_matrix_gradients(parts, y, gradient, matrix, sink),
  )


def _swiglu_product_forward(parts, gate_up_MxF2, matrix_FxD, sink):
  """silu(gate) up, times the matrix."""
  product = swiglu.plain(gate_up_MxF2) @ split.whole(matrix_FxD, parts)
  return split.of_all_heads(product, parts), (gate_up_MxF2, matrix_FxD, sink)


def _swiglu_product_backward(parts, saved, gradient):
  gate_up, matrix, sink = saved
  inner = gradient @ split.again(matrix, parts).T
  d_gate_up, y = swiglu.backward(gate_up, inner)
  return d_gate_up, *_matrix_gradients(parts, y, gradient, matrix, sink)


# (how the matrix is split or None, x [M, D], matrix [D, F], its float32 sink or None) → x times the
# matrix.
product = common.with_rule(_product_forward, _product_backward, (0,))
# (how it is split, ε, x, y or None, scale, matrix, sink) → x + y, and its RMSNorm times the matrix.
norm_product = common.with_rule(_norm_product_forward, _norm_product_backward, (0, 1))
# (how it is split, gate and up [M, 2 F], matrix [F, D], sink) → silu(gate) up, times the matrix.
swiglu_product = common.with_rule(_swiglu_product_forward, _swiglu_product_backward, (0,))
