"""Weights that lie split over axes of a mesh, inside `jax.shard_map`.

Along their width they are made whole where they are used (Rajbhandari et al. 2020, section 5.3).
Each device has rows of its own. A matrix is gathered where it is multiplied, and again for the
gradients of that product; its own gradient is added up over the devices as it is split. None ever
holds more of them whole than what it works at. Of the embedding only the rows of the devices'
tokens travel.

Heads, feed-forward and vocabulary stay split (Shoeybi et al. 2019, section 3): devices that have
the same rows and other heads add up what the second matrix of attention and of the feed-forward
gives, and in the backward pass the gradient in what the first one read.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oel_jax.policy.ops import embedding


class Axes(NamedTuple):
  """The axes of a mesh over which weights are split, inside `jax.shard_map`; None: over none.

  Attributes:
    width: over it matrices and tables are, along their width; its devices have rows of their own.
    heads: over it heads, feed-forward and vocabulary are; its devices have the same rows.
  """

  width: str | None = None
  heads: str | None = None

  def devices(self) -> int:
    """How many have heads of their own."""
    return 1 if self.heads is None else jax.lax.axis_size(self.heads)

  def vocabulary(self) -> tuple[str, ...]:
    """The axes over which the heads of the loss are split, as the losses take them."""
    return () if self.heads is None else (self.heads,)


class Parts(NamedTuple):
  """How a matrix is split: each device along `axis`, of a mesh, has its part of `dimension`, or
  all of it if that is None; and each along `heads`, if one is named, its part of the other
  dimension. None in its place: the matrix is whole.
  """

  dimension: int
  axis: str | None
  heads: str | None = None


def whole(part: Float[Array, "..."], parts: Parts | None) -> Float[Array, "..."]:
  """The matrix that this device has a part of; of what is split over heads, its own."""
  if parts is None or parts.axis is None:
    return part
  return jax.lax.all_gather(part, parts.axis, axis=parts.dimension, tiled=True)


def again(part: Float[Array, "..."], parts: Parts | None) -> Float[Array, "..."]:
  """The same in a backward pass. Without the barrier, XLA would keep what the forward pass has
  gathered of all layers; it waits for nothing, so that it can be gathered ahead.
  """
  if parts is None or parts.axis is None:
    return part
  return whole(jax.lax.optimization_barrier(part), parts)


def add_up(gradient: Float[Array, "..."], parts: Parts | None) -> Float[Array, "..."]:
  """This device's part of the sum over the devices of a gradient in the whole matrix."""
  if parts is None or parts.axis is None:
    return gradient
  return jax.lax.psum_scatter(gradient, parts.axis, scatter_dimension=parts.dimension, tiled=True)


def of_all_heads(x: Float[Array, "..."], parts: Parts | None) -> Float[Array, "..."]:
  """The sum of what each device's heads, or part of the feed-forward, give; for rules of gradients,
  which JAX does not differentiate.
  """
  return x if parts is None or parts.heads is None else jax.lax.psum(x, parts.heads)


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
  table_VxE: Float[Array, "V E"], tokens: Int[Array, "*tokens"], axes: Axes
) -> Float[Array, "*tokens D"]:
  """The rows of a device's own tokens, of a table of which each device along `axes.width` has E = D
  / devices columns: every one looks up its columns for all tokens. Each along `axes.heads` has V of
  the rows. Not differentiable.
  """
  ids = tokens if axes.width is None else jax.lax.all_gather(tokens, axes.width)
  rows = table_VxE[ids] if axes.heads is None else own_rows(table_VxE, ids, axes.heads)
  if axes.width is not None:
    rows = jax.lax.all_to_all(rows, axes.width, 0, rows.ndim - 1, tiled=True)
  return rows.reshape(*tokens.shape, -1)


def own_rows(
  table_VxD: Float[Array, "V D"], tokens: Int[Array, "*tokens"], axis: str
) -> Float[Array, "*tokens D"]:
  """The tokens' rows of a table of which each device along the axis has V, in order."""
  row, mine = _place(table_VxD, tokens, axis)
  # Not another row times 0, which may be no number.
  found = jnp.where(mine[..., None], table_VxD[jnp.where(mine, row, 0)], 0)
  return jax.lax.psum(found, axis)


def _place(table_VxD, tokens, axis):
  """The number of each token's row in this device's part of the table, and whether it is there."""
  row = tokens - jax.lax.axis_index(axis) * len(table_VxD)
  return row, (row >= 0) & (row < len(table_VxD))


def add_rows(
  table_VxE: Float[Array, "V E"],
  tokens: Int[Array, "*tokens"],
  rows: Float[Array, "*tokens D"],
  axes: Axes,
) -> Float[Array, "V E"]:
  """`embedding.add_rows` of the tokens of all devices along `axes.width`, each of which has E = D /
  devices columns of the table, and along `axes.heads` V of its rows.
  """
  ids, columns = tokens, rows
  if axes.width is not None:
    ids = jax.lax.all_gather(tokens, axes.width)
    columns = jax.lax.all_to_all(rows[None], axes.width, rows.ndim, 0, tiled=True)
  if axes.heads is not None:
    row, mine = _place(table_VxE, ids, axes.heads)
    ids = jnp.where(mine, row, len(table_VxE))  # behind the last: nothing is added there
  return embedding.add_rows(table_VxE, ids, columns)
