"""Hugging Face model folders: safetensors, one file or shards, ↔ parameters; config.json is
`huggingface_config`'s.

Tensors are read one by one and go to their devices as they come, and are written one by one, so the
host never holds the model.
"""

import json
import math
import operator
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from oel_jax.policy.architecture import Architecture
from oel_jax.policy.parameters import Parameter
from oel_jax.policy.weights import assemble, fetch, place
from oel_jax.policy.weights.huggingface_config import (  # noqa: F401  (the first is read from here)
  read_architecture,
  write_config,
)
from oel_jax.policy.weights.safetensors_folder import (
  EMBEDDING,
  FLOATS,
  HEAD,
  INDEX,
  SINGLE,
  SLICE,
  Tensor,
  open_folder,
)
from oel_jax.runtime import files, finite

SHARD_BYTES = 4 * 2**30
FREQUENCIES = "rotary_emb.inv_freq"  # of old files; they follow from config.json

_name_of = operator.attrgetter("huggingface")


def load(
  folder: str | os.PathLike,
  architecture: Architecture,
  *,
  dtype: Any = np.float32,
  shardings: Any = None,
) -> Any:
  """Reads a folder's parameters, tensor by tensor, each straight to its devices.

  Args:
    folder: holds model.safetensors, or shards with their index.
    architecture: from `read_architecture`.
    dtype: of the parameters returned.
    shardings: tree of shardings (`mesh.param_shardings`); None for the default device.

  Returns:
    The parameter tree of `parameters.init`, layers stacked.

  Raises:
    FileNotFoundError: no weights in the folder, or a shard is missing.
    ValueError: a file is damaged; or tensors are missing, unknown or misshaped: one error lists
      them all; or one holds numbers that are not finite.
  """
  folder = pathlib.Path(folder)
  found = open_folder(folder)
  tensors = {name: tensor for name, tensor in found.items() if not name.endswith(FREQUENCIES)}
  if architecture.tied_head and HEAD in tensors:
    # The embedding once more, or in its place: of two names some programs keep but one.
    tensors.setdefault(EMBEDDING, tensors.pop(HEAD))
  kinds = {name: tensor.kind for name, tensor in tensors.items()}
  wrong = [f"{name} is {kind}" for name, kind in kinds.items() if kind not in FLOATS]
  if wrong:
    shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    raise ValueError(f"{folder}: {shown}: quantised or packed; only {', '.join(FLOATS)} are read")
  return assemble.assemble(
    f"{folder}: the weights do not fit config.json",
    {name: _to_place(folder, name, tensor) for name, tensor in tensors.items()},
    architecture,
    _name_of,
    dtype=dtype,
    shardings=shardings,
  )


def _to_place(folder: pathlib.Path, name: str, tensor: Tensor) -> place.Tensor:
  kind = np.float32 if tensor.kind == "F64" else FLOATS[tensor.kind]  # float64 goes to no device

  def raw() -> np.ndarray:
    with np.errstate(over="ignore"):  # beyond float32 is infinite in it, which is told later
      return tensor.numbers.astype(kind, copy=False)

  return place.Tensor(
    shape=tensor.shape,
    checked=lambda: finite.checked(folder, name, tensor.numbers),
    raw=raw,
    raw_type=jax.ShapeDtypeStruct(tensor.shape, kind),
  )


def save(
  folder: str | os.PathLike,
  params: Any,
  architecture: Architecture,
  *,
  dtype: Any = ml_dtypes.bfloat16,
  config: dict[str, Any] | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes config.json and the weights, in shards with an index if they are larger than one;
  `transformers` and engines read them.

  A model that stands there is replaced: its files go when the new weights are all on the disk,
  beside them. The host holds one tensor at a time, in float32 and in `dtype`.

  Args:
    folder: made if need be.
    params: tree of `parameters.init`'s shape.
    architecture: theirs.
    dtype: stored type.
    config: fields of the folder that the model came from, kept where they do not speak of shapes.
    shard_bytes: most bytes of a file.

  Raises:
    ValueError: as in `write_config`; or `config` is no JSON; or a value is not finite, or not in
      `dtype`: names the tensor.
    OSError: a file cannot be written; config.json comes last, so that a folder without it is known
      to be unfinished.
  """
  # An architecture that has no folder is told before one is touched.
  fields = write_config(architecture, dtype)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  total = sum(leaf.size for leaf in jax.tree.leaves(params)) * np.dtype(dtype).itemsize
  try:
    # What is no JSON is told before anything goes.
    files.write_json(folder / ".part-config.json", (config or {}) | fields)
    weight_map = _write_shards(folder, params, architecture, np.dtype(dtype), shard_bytes)
  finally:
    _remove(folder, ".*part-*")  # of a write that failed, now or earlier
  if len(set(weight_map.values())) > 1:
    files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
  files.write_json(folder / "config.json", (config or {}) | fields)


# Tensors by their names: of which parameter, and which layer of it.
Named = dict[str, tuple[Parameter, int | None]]


def _write_shards(
  folder: pathlib.Path,
  params: Any,
  architecture: Architecture,
  dtype: np.dtype,
  shard_bytes: int,
) -> dict[str, str]:
  """Writes the tensors into files of at most `shard_bytes` (or one tensor), in place of a model
  there; returns which file holds which.
  """
  shards = _dealt(architecture, dtype, shard_bytes)
  for i, named in enumerate(shards):
    files.write_chunks(folder / f".part-{i:05d}", _chunks(params, architecture, dtype, named))
  # A single file would be read before any index.
  _remove(folder, "config.json", INDEX, SINGLE, "model-*-of-*.safetensors")
  weight_map = {}
  for i, named in enumerate(shards):
    file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    os.replace(folder / f".part-{i:05d}", folder / file)
    weight_map |= dict.fromkeys(named, file)
  return weight_map


def _dealt(architecture: Architecture, dtype: np.dtype, shard_bytes: int) -> list[Named]:
  """The tensors of each file."""
  shards: list[Named] = [{}]
  filled = 0
  for name, (parameter, layer) in assemble.names(architecture, _name_of).items():
    size = math.prod(parameter.stored(architecture)) * dtype.itemsize
    if filled and filled + size > shard_bytes:
      shards.append({})
      filled = 0
    shards[-1][name] = parameter, layer
    filled += size
  return shards


def _chunks(
  params: Any, architecture: Architecture, dtype: np.dtype, named: Named
) -> Iterator[bytes | memoryview]:
  """A safetensors file of these tensors, one in memory at a time: eight bytes with the size of the
  header, the header, the numbers.
  """
  kind = next(kind for kind, numbers in FLOATS.items() if numbers == dtype)
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, (parameter, _) in named.items():
    shape, begin = parameter.stored(architecture), end
    end += math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": kind, "shape": shape, "data_offsets": (begin, end)}
  written = json.dumps(header, separators=(",", ":")).encode()
  written += b" " * (-len(written) % 8)
  yield len(written).to_bytes(8, "little") + written
  for name, (parameter, layer) in named.items():
    # Under no name, or the next one would stand beside it.
    yield _stored(
      name,
      parameter.to_stored(fetch.tensor(params, parameter.path, layer), architecture),
      dtype,
    ).data


def _remove(folder: pathlib.Path, *patterns: str) -> None:
  for path in [path for pattern in patterns for path in folder.glob(pattern)]:
    path.unlink()


def _stored(name: str, leaf: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """The tensor's bytes; ValueError, with its name, if a number is not finite."""
  with np.errstate(over="ignore"):  # told below
    numbers = np.ascontiguousarray(leaf, dtype).reshape(-1)
  parts = (numbers[start : start + SLICE] for start in range(0, numbers.size, SLICE))
  if not all(np.isfinite(part).all() for part in parts):
    raise ValueError(f"{name} holds values that are not finite in {dtype}: nothing was exported")
  return numbers.view(np.uint8)
