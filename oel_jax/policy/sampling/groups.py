"""Groups of devices that hold the sampler's weights together, and what a device of a group runs.

Heads, feed-forward and vocabulary are split over the devices of a group (Shoeybi et al. 2019,
section 3). A group has rows, slots and prompts, of its own; each device of it has their keys and
values of its own heads:

    config.mesh.sample_tensor = 2, a process of eight devices

    group     0      1      2      3
    device    0 1    2 3    4 5    6 7

So a device runs the program of a smaller model (`Architecture.share`), and the kernels see whole
arrays of it. It adds its part of each attention's and feed-forward's output to those of the others,
and gathers the logits: all devices of a group then draw from the same bits, by the same program.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from oel_jax.policy.architecture import Architecture
from oel_jax.policy.ops import split
from oel_jax.runtime import mesh as mesh_lib

AXIS = "tensor"


def check(a: Architecture, size: int, devices: int) -> None:
  """Raises ValueError where groups of `size` of a process's devices cannot share these weights.

  Of fewer key-value heads than a group has devices, each is held by several of them.
  """
  field = f"config.mesh.sample_tensor is {size}"
  if size < 1 or devices % size:
    raise ValueError(f"{field}: it must divide the number of a process's devices, {devices}")
  for name in ("heads", "feedforward", "vocabulary"):
    count = getattr(a, name)
    if count % size:
      raise ValueError(f"{field}: it must divide the weights' {name}, {count}")
  if a.kv_heads % size and size % a.kv_heads:
    raise ValueError(
      f"{field}: it must divide the weights' kv_heads, {a.kv_heads}, or be a multiple of them"
    )


def check_processes(devices: Sequence[jax.Device], size: int) -> None:
  """Raises ValueError where a group of these devices would be of several processes."""
  for first in range(0, len(devices), size):
    if len({device.process_index for device in devices[first : first + size]}) > 1:
      raise ValueError(
        f"config.mesh.sample_tensor is {size}: the mesh does not have so many devices of a process "
        "side by side everywhere; it must be 1"
      )


def make_mesh(devices: Sequence[jax.Device], size: int) -> Mesh:
  """The devices, of a process or of all, as groups of `size` that stand side by side: groups along
  "data", the devices of each along "tensor".
  """
  shape = np.array(devices).reshape(-1, 1, size)
  return Mesh(shape, mesh_lib.AXES, axis_types=(AxisType.Auto,) * len(mesh_lib.AXES))


def local(mesh: Mesh) -> list[jax.Device]:
  """The mesh's devices that belong to the process of the first."""
  devices = list(mesh.devices.flat)
  return [device for device in devices if device.process_index == devices[0].process_index]


def of_params(params: Any, a: Architecture, size: int) -> Mesh | None:
  """The devices of these parameters in groups; None if they are on one device. ValueError as in
  `check`.
  """
  placed = getattr(jax.tree.leaves(params)[0], "sharding", None)
  devices = list(placed.mesh.devices.flat) if isinstance(placed, NamedSharding) else []
  check(a, size, len(devices) or 1)
  return make_mesh(devices, size) if len(devices) > 1 else None


def size_of(mesh: Mesh | None) -> int:
  """Devices of a group."""
  return 1 if mesh is None else mesh.shape[AXIS]


def axis_of(mesh: Mesh | None) -> str | None:
  """The axis along which weights are split; None where each device has them whole."""
  return AXIS if size_of(mesh) > 1 else None


def heads_by_device(
  x: Float[Array, "*D A H"], a: Architecture, size: int
) -> Float[Array, "*D A2 H"]:
  """Heads of queries, of keys, of values → those of the first device, each kind, those of the
  second, …; key-value heads that several devices hold stand there for each.
  """
  q, k, v = jnp.split(x, [a.heads, a.heads + a.kv_heads], axis=-2)
  copies = max(1, size // a.kv_heads)
  kinds = (q, *(jnp.repeat(one, copies, axis=-2) for one in (k, v)))
  apart = [one.reshape(*x.shape[:-2], size, -1, x.shape[-1]) for one in kinds]
  return jnp.concatenate(apart, axis=-2).reshape(*x.shape[:-2], -1, x.shape[-1])


def halves_by_device(x: Float[Array, "D F2"], size: int) -> Float[Array, "D F2"]:
  """Gate, up → the first device's gate, its up, the second's gate, …"""
  return x.reshape(len(x), 2, size, -1).swapaxes(1, 2).reshape(x.shape)


# Within `jax.shard_map`; without an axis, on whole weights.


def embed(
  table_VxD: Float[Array, "V D"], tokens: Int[Array, "*tokens"], axis: str | None
) -> Float[Array, "*tokens D"]:
  """The tokens' rows of a table of which each device has some."""
  return table_VxD[tokens] if axis is None else split.own_rows(table_VxD, tokens, axis)


def add_up(part: Float[Array, "*P M D"], like: Float[Array, "M F"], axis: str) -> Array:
  """The sum over a group of a product's parts, in the type of `like`, the product's input; it was
  made in one part a device or more.
  """
  part = part.sum(0) if part.ndim > like.ndim else part
  return jax.lax.psum(part, axis).astype(like.dtype)


def gather(logits_MxV: Float[Array, "M V"], axis: str | None) -> Float[Array, "M V2"]:
  """The logits of the whole vocabulary, the same bits on all devices of a group."""
  if axis is None:
    return logits_MxV
  return jax.lax.all_gather(logits_MxV, axis, axis=1, tiled=True)
