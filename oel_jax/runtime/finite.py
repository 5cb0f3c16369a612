"""Numbers that are none, NaN and infinities: refused when weights are read, and never gone on
with.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Numbers that are looked at together: a float32 copy of a whole tensor could be as large as a small
# model.
SLICE = 2**14
NAMED = 4  # names of a list that an error gives


class NotFiniteError(RuntimeError):
  """A computation of a run gave NaN or infinity; the run stops there.

  Attributes:
    prompts: where it was a sampler's: indices into the prompts that it was given; empty elsewhere.
  """

  def __init__(self, message: str, prompts: Sequence[int] = ()):
    super().__init__(message)
    self.prompts = tuple(prompts)


def checked(source: str | os.PathLike, name: str, tensor: np.ndarray) -> np.ndarray:
  """Returns a tensor of weights, just read, as it is: each of its numbers is finite in float32.

  Args:
    source: the file or folder that it was read from.
    name: of the tensor there.
    tensor: of any type of numbers.

  Raises:
    ValueError: a number is NaN, infinite, or beyond float32; names source and tensor, and the first
      such place.
  """
  flat = tensor.reshape(-1)
  for start in range(0, flat.size, SLICE):
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinite in it, which is told here
      part = flat[start : start + SLICE].astype(np.float32, copy=False)
    good = np.isfinite(part)
    if not good.all():
      first = start + int(good.argmin())
      place = [int(i) for i in np.unravel_index(first, tensor.shape)]
      raise ValueError(
        f"{source}: {name} holds {flat[first]} at {place}, which is not finite in float32: "
        "the weights are of a training that went wrong, or the file is damaged; take another copy "
        "or another checkpoint"
      )
  return tensor


def not_finite(tree: Any) -> list[str]:
  """The paths ("layers/attention/q/kernel") of the arrays of a pytree that hold a number that is
  not finite.
  """
  flags = jax.device_get(_flags(tree))
  return [path(keys) for keys, good in jax.tree_util.tree_leaves_with_path(flags) if not good]


@jax.jit
def _flags(tree: Any) -> Any:
  return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)


def path(keys: Sequence[Any]) -> str:
  """A leaf's path in a pytree, as the parameters' names are written."""
  return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def listed(names: Sequence[str], shown: int = NAMED) -> str:
  """The names as one phrase: the first few, and how many more there are."""
  more = f" and {len(names) - shown} more" if len(names) > shown else ""
  return ", ".join(names[:shown]) + more
