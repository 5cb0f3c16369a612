"""Parameters in safetensors files: one tensor a leaf, named by its path
("layers/attention/q/kernel").
"""

import hashlib
import os
import pathlib
from typing import Any

import flax
import jax
import numpy as np
import safetensors
import safetensors.numpy

from oel_jax.policy import parameters
from oel_jax.policy.architecture import Architecture
from oel_jax.runtime import files, finite

POINTER = b"version https://git-lfs.github.com/spec/"  # how such a pointer begins


def save(
  path: str | os.PathLike, params: Any, *, dtype: Any = None, metadata: dict[str, str] | None = None
) -> None:
  """Writes the parameters, whole or not at all.

  Args:
    path: the .safetensors file.
    params: nested dict of arrays.
    dtype: stored type; as they are if None.
    metadata: strings kept in the file's header.

  Raises:
    ValueError: a value is not finite, or not in `dtype`; names the tensor.
    OSError: the file cannot be written.
  """
  path = pathlib.Path(path)
  with np.errstate(over="ignore"):  # told below, with the tensor's name
    leaves = flax.traverse_util.flatten_dict(jax.device_get(params), sep="/")
    flat = {name: np.ascontiguousarray(np.asarray(leaf), dtype) for name, leaf in leaves.items()}
  for name, leaf in flat.items():
    if not np.isfinite(leaf.astype(np.float32)).all():
      raise ValueError(
        f"{path}: {name} holds values that are not finite in {leaf.dtype}: nothing was written"
      )
  files.write_bytes(path, safetensors.numpy.save(flat, metadata))


def load(path: str | os.PathLike, architecture: Architecture) -> Any:
  """Reads parameters of this architecture, as float32.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, or tensors are missing, unknown or misshaped; all of
      them are named. Or a number is not finite.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"config.policy.weights: there is no file {path}")
  try:
    found = safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, ValueError) as error:
    hint = pointer_hint(path)
    raise ValueError(f"{path}: not a whole safetensors file ({error}){hint}") from error
  wanted = flax.traverse_util.flatten_dict(parameters.abstract(architecture), sep="/")
  wrong = [f"{name}: missing" for name in wanted if name not in found] + [
    f"{name}: unknown" for name in found if name not in wanted
  ]
  wrong += [
    f"{n}: {found[n].shape} instead of {w.shape}"
    for n, w in wanted.items()
    if n in found and found[n].shape != w.shape
  ]
  if wrong:
    raise ValueError(f"{path}: does not fit the architecture: {'; '.join(wrong)}")
  good = {name: finite.checked(path, name, found[name]) for name in wanted}
  params = {name: tensor.astype(np.float32) for name, tensor in good.items()}
  return flax.traverse_util.unflatten_dict(params, sep="/")


def metadata(path: str | os.PathLike) -> dict[str, str]:
  """The strings in the file's header; ValueError if it is damaged."""
  try:
    with safetensors.safe_open(path, framework="np") as file:
      return file.metadata() or {}
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def pointer_hint(path: str | os.PathLike) -> str:
  """What an error about a damaged file should add: that it is a Git LFS pointer, or nothing."""
  with open(path, "rb") as file:
    is_pointer = file.read(len(POINTER)) == POINTER
  return "; it is a Git LFS pointer: fetch the file itself, with git lfs pull" if is_pointer else ""


def digest(path: str | os.PathLike) -> str:
  """sha256 of the file, hexadecimal."""
  return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
