"""Weights that lie split over an axis of a mesh along their width, made whole where they are used,
inside `jax.shard_map` (Rajbhandari et al. 2020, section 5.3).

Each device has rows of its own. A matrix is gathered where it is multiplied, and again for the
gradients of that product; its own gradient is added up over the devices as it is split. None ever
holds more of them whole than what it works at. Of the embedding only the rows of the devices'
tokens travel.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oel_jax.policy.ops import embedding


class Parts(NamedTuple):
  """How a matrix is split: each device along `axis`, of a mesh, has its part of `dimension`. None
  in its place: the matrix is whole.
  """

  dimension: int
  axis: str


def whole(part: Float[Array, "..."], parts: Parts | None) -> Float[Array, "..."]:
  """The matrix that this device has a part of."""
  if parts is None:
    return part
  return jax.lax.all_gather(part, parts.axis, axis=parts.dimension, tiled=True)


def again(part: Float[Array, "..."], parts: Parts | None) -> Float[Array, "..."]:
  """The same in a backward pass. Without the barrier, XLA would keep what the forward pass has
  gathered of all layers; it waits for nothing, so that it can be gathered ahead.
  """
  return part if parts is None else whole(jax.lax.optimization_barrier(part), parts)


def add_up(gradient: Float[Array, "..."], parts: Parts | None) -> Float[Array, "..."]:
  """This device's part of the sum over the devices of a gradient in the whole matrix."""
  if parts is None:
    return gradient
  return jax.lax.psum_scatter(gradient, parts.axis, scatter_dimension=parts.dimension, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def whole_sink(part: Float[Array, "..."], parts: Parts) -> Float[Array, "..."]:
  """Zeros in the shape of `whole`, of which nothing is left once compiled, and whose gradient is
  added up for the part.
  """
  shape = list(part.shape)
  shape[parts.dimension] *= jax.lax.axis_size(parts.axis)
  return jnp.zeros(shape, part.dtype)


whole_sink.defvjp(
  lambda part, parts: (whole_sink(part, parts), None),
  lambda parts, _, gradient: (add_up(gradient, parts),),
)


@jax.custom_vjp
def ticket(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, ""]]:
  """x, and a ticket for `redeemed` of weights that are used later: the backward pass goes on from
  here, with the gradient in x, when those weights' gradients are added up.

  XLA would add up all of them at the end of the backward pass, and keep them whole until then.
  """
  return x, jnp.float32(0)


@jax.custom_vjp
def redeemed(tree: Any, ticket: Float[Array, ""]) -> Any:
  """The weights as they are (`ticket`)."""
  return tree


def _redeem(_, gradient):
  # A number of each that is always 0, which XLA cannot know: barriers do not hold its scheduler.
  numbers = [leaf.reshape(-1)[0].astype(jnp.float32) for leaf in jax.tree.leaves(gradient)]
  return gradient, 0 * sum(numbers)


ticket.defvjp(
  lambda x: ((x, jnp.float32(0)), None),
  lambda _, gradients: (gradients[0] + gradients[1].astype(gradients[0].dtype),),
)
redeemed.defvjp(lambda tree, ticket: (tree, None), _redeem)


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
