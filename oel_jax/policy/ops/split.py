"""Weights that lie split over an axis of a mesh along their width, made whole where they are used,
inside `jax.shard_map` (Rajbhandari et al. 2020, section 5.3).

Each device has rows of its own. A layer's matrices are gathered for that layer alone, and again for
its backward pass; what they are to be changed by is added up over the devices as it is split, so
that none ever holds the gradient of more than a layer whole. Of a table only the rows of the
devices' tokens travel.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oel_jax.policy.ops import embedding


def whole(shard: Float[Array, "..."], dimension: int, axis: str) -> Float[Array, "..."]:
  """The array of which each device along `axis` has a part of `dimension`. It is taken as constant:
  the gradient comes out at its sink (`whole_sink`).
  """
  return jax.lax.all_gather(shard, axis, axis=dimension, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def whole_sink(shard: Float[Array, "..."], dimension: int, axis: str) -> Float[Array, "..."]:
  """Zeros in the shape of `whole`, nothing of which is left once compiled. The gradient in the
  shard is the sum over the devices of what each gives for its part.
  """
  shape = list(shard.shape)
  shape[dimension] *= jax.lax.axis_size(axis)
  return jnp.zeros(shape, shard.dtype)


def _whole_sink_forward(shard, dimension, axis):
  return whole_sink(shard, dimension, axis), None


def _whole_sink_backward(dimension, axis, _, gradient):
  return (jax.lax.psum_scatter(gradient, axis, scatter_dimension=dimension, tiled=True),)


whole_sink.defvjp(_whole_sink_forward, _whole_sink_backward)


def embed(
  table_VxE: Float[Array, "V E"], tokens: Int[Array, "*tokens"], axis: str
) -> Float[Array, "*tokens D"]:
  """The rows of a device's own tokens, of a table of which each device has E = D / devices
  columns: every device looks up its columns for all tokens.
  """
  ids = jax.lax.all_gather(tokens, axis)
  columns = table_VxE[ids]
  rows = jax.lax.all_to_all(columns, axis, 0, columns.ndim - 1, tiled=True)
  return rows.reshape(*tokens.shape, -1)


def add_rows(
  table_VxE: Float[Array, "V E"],
  tokens: Int[Array, "*tokens"],
  rows: Float[Array, "*tokens D"],
  axis: str,
) -> Float[Array, "V E"]:
  """`embedding.add_rows` of the tokens of all devices along `axis`, each of which has E = D /
  devices columns of the table.
  """
  ids = jax.lax.all_gather(tokens, axis)
  columns = jax.lax.all_to_all(rows[None], axis, rows.ndim, 0, tiled=True)
  return embedding.add_rows(table_VxE, ids, columns)
