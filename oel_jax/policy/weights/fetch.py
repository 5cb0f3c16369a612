"""Parameters from the devices to the host, one tensor at a time: what is spread over the devices of
several processes is whole on each device for that time, and on the host of process 0 alone.
"""

import functools
from typing import Any

import flax
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oel_jax.runtime import distributed, together


@together.everywhere
def tensor(params: Any, path: str, layer: int | None) -> np.ndarray | None:
  """Returns a leaf of the tree, or one layer of it, as it is; None in all processes but the first.

  Args:
    params: tree of arrays; those of several processes have a name that they share.
    path: the leaf's keys, "/" between them.
    layer: which of a stacked leaf; None: all of it.
  """
  leaf = flax.traverse_util.flatten_dict(params, sep="/")[path]
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    whole = distributed.in_turn(_whole(leaf.sharding.mesh, layer is not None)(leaf, layer))
    return np.asarray(whole.addressable_data(0)) if distributed.is_writer() else None
  return np.asarray(leaf if layer is None else leaf[layer])


@functools.cache
def _whole(mesh: Mesh, stacked: bool) -> Any:
  """(leaf, layer) → that layer of it on every device."""
  one = lambda leaf, layer: jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)
  return jax.jit(
    one if stacked else lambda leaf, layer: leaf,
    out_shardings=NamedSharding(mesh, PartitionSpec()),
  )
