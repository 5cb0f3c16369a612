"""The GGUF container: the metadata and tensors of a file, or of the parts that it was split into.

Metadata are read at once; a tensor's bytes stay on disk until its numbers are asked for. The `gguf`
package turns quantised bytes into numbers, but its reader makes an array of every single string,
which takes a quarter of a minute for a vocabulary of 150,000 tokens; so the header is read here.
"""

import dataclasses
import functools
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

try:
  import gguf
except ImportError as error:
  raise ImportError(
    f'GGUF files need the extra "hf": pip install "oel_jax[hf]" ({error})'
  ) from error
from gguf import GGML_QUANT_SIZES as BLOCKS
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value

from oel_jax.policy.weights import gguf_blocks, native
from oel_jax.runtime import files

VERSIONS = (2, 3)
NUMBERS = {
  Value.UINT8: "B", Value.INT8: "b", Value.UINT16: "H", Value.INT16: "h", Value.UINT32: "I",
  Value.INT32: "i", Value.FLOAT32: "f", Value.BOOL: "?", Value.UINT64: "Q", Value.INT64: "q",
  Value.FLOAT64: "d",
}  # fmt: skip
FLOATS = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: ml_dtypes.bfloat16}
SLICE = 2**22  # numbers at a time: the float32 copy of a large embedding is a small model's size


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor on disk.

  Attributes:
    name: in the file.
    kind: type of its numbers.
    shape: rows first, [out, in] for a matrix.
    data: uint8 [rows, bytes of a row], mapped from the file.
  """

  name: str
  kind: Type
  shape: tuple[int, ...]
  data: np.ndarray = dataclasses.field(repr=False)

  def slices(self) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows, their numbers in float32 [rows, in]), about `SLICE` numbers at a time."""
    step = max(1, SLICE // self.shape[-1])
    for start in range(0, len(self.data), step):
      rows = slice(start, min(start + step, len(self.data)))
      yield rows, gguf.dequantize(self.data[rows], self.kind)

  def mapped(self) -> np.ndarray | None:
    """Returns a view of the file: the numbers of floats, of `shape`; the blocks of a type that
    `gguf_blocks` has, uint8 [..., blocks, bytes of a block]; None for other types.
    """
    if self.kind in FLOATS:
      return self.data.view(FLOATS[self.kind]).reshape(self.shape)
    if self.kind in gguf_blocks.TYPES:
      return self.data.reshape(*self.shape[:-1], -1, BLOCKS[self.kind][1])
    return None

  def values(self) -> np.ndarray:
    """Returns all numbers, in float32 and of `shape`."""
    found = np.empty((len(self.data), self.shape[-1]), np.float32)
    for rows, numbers in self.slices():
      found[rows] = numbers
    return found.reshape(self.shape)

  def holds_what(self, other: "Tensor") -> bool:
    """Returns whether `other` has the same shape and numbers; stops at the first that differ."""
    if self.shape != other.shape:
      return False
    if self.kind == other.kind and self._has_the_bytes_of(other):
      return True
    pairs = zip(self.slices(), other.slices(), strict=True)
    return all(np.array_equal(ours, theirs) for (_, ours), (_, theirs) in pairs)

  def _has_the_bytes_of(self, other: "Tensor") -> bool:
    step = max(1, SLICE // self.data.shape[-1])
    parts = [slice(start, start + step) for start in range(0, len(self.data), step)]
    return all(np.array_equal(self.data[part], other.data[part]) for part in parts)


@dataclasses.dataclass(frozen=True)
class File:
  """An opened GGUF file.

  Attributes:
    path: where it lies; of a split file, where its first part does.
    metadata: key → value; arrays are lists.
    tensors: by name, of all parts.
  """

  path: pathlib.Path
  metadata: dict[str, Any] = dataclasses.field(repr=False)
  tensors: dict[str, Tensor] = dataclasses.field(repr=False)


@functools.cache
def is_read(kind: Type) -> bool:
  """Returns whether the gguf package can turn this type into numbers (it publishes no list)."""
  try:
    gguf.dequantize(np.zeros((1, BLOCKS[kind][1]), np.uint8), kind)
  except NotImplementedError:
    return False
  return True


def read(path: str | os.PathLike) -> File:
  """Opens a GGUF file; of a split one any part may be given, and the others must lie beside it.

  Raises:
    FileNotFoundError: there is no such file, or parts are missing.
    ValueError: it is damaged or cut; or parts do not belong together; or tensors have a type that
      cannot be read, which are named with it.
  """
  file = _read_one(pathlib.Path(path))
  count = file.metadata.get("split.count", 1)
  if not _is_whole(count) or count > 1:
    file = _join(file)
  wrong = [f"{x.name} is {x.kind.name}" for x in file.tensors.values() if not is_read(x.kind)]
  if wrong:
    shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    raise ValueError(
      f"{file.path}: {shown}: the gguf package cannot turn this type into numbers; give a file "
      "of another quantisation, such as Q8_0 or Q4_K_M"
    )
  return file


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _join(given: File) -> File:
  """The whole of a split file, of which `given` is a part."""
  count, paths = given.metadata["split.count"], files.split_parts(given.path)
  if len(paths) != count:
    raise ValueError(
      f'{given.path}: "split.count" is {count}: the names of the parts must end in '
      f"-00001-of-{count:05d}.gguf and so on, or the others cannot be found"
    )
  missing = [path for path in paths if not path.is_file()]
  if missing:
    more = f" and {len(missing) - 5} more" if missing[5:] else ""
    shown = ", ".join(map(str, missing[:5])) + more
    raise FileNotFoundError(f"{shown}: no such file, a part of the split file {given.path}")
  opened = [_read_one(path) for path in paths]
  tensors: dict[str, Tensor] = {}
  for number, file in enumerate(opened):
    found = file.metadata.get("split.no"), file.metadata.get("split.count")
    if found != (number, count):
      raise ValueError(
        f'{file.path}: "split.no" and "split.count" are {found[0]} and {found[1]}: they must be '
        f"{number} and {count}, as its name says"
      )
    twice = tensors.keys() & file.tensors.keys()
    if twice:
      raise ValueError(f"{file.path}: {min(twice)} is in an earlier part already")
    tensors |= file.tensors
  total = opened[0].metadata.get("split.tensors.count", len(tensors))
  if total != len(tensors):
    raise ValueError(
      f'{opened[0].path}: "split.tensors.count" is {total}, but the {count} parts hold '
      f"{len(tensors)}: they are not of one file"
    )
  return File(paths[0], opened[0].metadata, tensors)


def _read_one(path: pathlib.Path) -> File:
  if not path.is_file():
    raise FileNotFoundError(
      f"{path}: no such file; config.policy.weights must be a GGUF file or a folder with a "
      "Hugging Face model"
    )
  try:
    # As a plain array: each slice of a memmap is a memmap, which costs more than a small slice.
    return _parse(path, np.asarray(np.memmap(path, np.uint8, "r")))
  except (ValueError, KeyError, struct.error, OverflowError, MemoryError) as error:
    hint = native.pointer_hint(path)
    said = f"{type(error).__name__}: {error}"
    raise ValueError(
      f"{path}: damaged, cut, or newer than the gguf package ({said}){hint}"
    ) from error


class _Cursor:
  """Reads a header from its beginning, number by number."""

  def __init__(self, content: np.ndarray):
    self.content, self.at = memoryview(content), 0

  def number(self, kind: Value = Value.UINT64) -> Any:
    layout = "<" + NUMBERS[kind]
    (found,) = struct.unpack_from(layout, self.content, self.at)
    self.at += struct.calcsize(layout)
    return found

  def string(self) -> str:
    size = self.number()
    return str(self.take(size), "utf-8")

  def take(self, size: int) -> memoryview:
    if size > len(self.content) - self.at:
      raise ValueError(f"{size} bytes at {self.at} of {len(self.content)}: it ends before")
    self.at += size
    return self.content[self.at - size : self.at]

  def value(self) -> Any:
    kind = Value(self.number(Value.UINT32))
    if kind == Value.ARRAY:
      return self.array()
    return self.string() if kind == Value.STRING else self.number(kind)

  def array(self) -> list[Any]:
    kind, count = Value(self.number(Value.UINT32)), self.number()
    if kind == Value.ARRAY:
      raise ValueError(f"an array of arrays at {self.at}")
    if kind == Value.STRING:
      return [self.string() for _ in range(count)]
    layout = np.dtype("<" + NUMBERS[kind])
    return np.frombuffer(self.take(count * layout.itemsize), layout).tolist()


def _parse(path: pathlib.Path, content: np.ndarray) -> File:
  """Reads the header and maps the tensors; lets any error pass that damaged bytes lead to."""
  cursor = _Cursor(content)
  if bytes(cursor.take(4)) != b"GGUF":
    raise ValueError("it does not begin with GGUF")
  version = cursor.number(Value.UINT32)
  if not version & 0xFFFF:
    raise ValueError("its numbers are big-endian: give the little-endian file")
  if version not in VERSIONS:
    raise ValueError(f"version {version}, where {' and '.join(map(str, VERSIONS))} are known")
  tensor_count, key_count = cursor.number(), cursor.number()
  metadata: dict[str, Any] = {}
  for _ in range(key_count):
    key = cursor.string()
    if key in metadata:
      raise ValueError(f'"{key}" is there twice')
    metadata[key] = cursor.value()
  heads = []
  for _ in range(tensor_count):
    name, axes = cursor.string(), cursor.number(Value.UINT32)
    shape = tuple(cursor.number() for _ in range(axes))[::-1]
    heads.append((name, shape, Type(cursor.number(Value.UINT32)), cursor.number()))
  alignment = metadata.get("general.alignment", 32)
  if not _is_whole(alignment) or alignment < 1:
    raise ValueError(f'"general.alignment" is {alignment!r}')
  start = -(-cursor.at // alignment) * alignment
  tensors: dict[str, Tensor] = {}
  for name, shape, kind, offset in heads:
    if name in tensors:
      raise ValueError(f"the tensor {name} is there twice")
    tensors[name] = Tensor(name, kind, shape, _mapped(content, name, shape, kind, start + offset))
  return File(path, metadata, tensors)


def _mapped(
  content: np.ndarray, name: str, shape: tuple[int, ...], kind: Type, at: int
) -> np.ndarray:
  """The bytes of a tensor, [rows, bytes of a row]."""
  numbers, size = BLOCKS[kind]
  if not shape or 0 in shape or shape[-1] % numbers:
    raise ValueError(f"{name} has the shape {shape}, and {kind.name} blocks of {numbers} numbers")
  rows, row = int(np.prod(shape[:-1], dtype=object)), shape[-1] // numbers * size
  if at + rows * row > len(content):
    raise ValueError(f"{name} ends at byte {at + rows * row} of {len(content)}")
  return content[at : at + rows * row].reshape(rows, row)
