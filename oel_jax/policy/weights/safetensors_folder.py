"""The tensors of a Hugging Face folder: which of its files count, and what they are called."""

import dataclasses
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from oel_jax.policy import parameters
from oel_jax.policy.weights import native

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING = parameters.BY_PATH["embed/embedding"].huggingface
HEAD = parameters.BY_PATH["head/kernel"].huggingface
FLOATS = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}
SLICE = 2**22  # numbers compared at a time


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file, its numbers still on disk.

  Attributes:
    kind: the type of its numbers, as safetensors writes it.
    shape: its sizes; [out, in] for a matrix.
    numbers: of that type and shape, mapped from the file; None if the type is not one of `FLOATS`.
  """

  kind: str
  shape: tuple[int, ...]
  numbers: np.ndarray | None = dataclasses.field(repr=False)

  def holds_what(self, other: "Tensor") -> bool:
    """Returns whether two matrices have the same shape and numbers; compares by slices of rows."""
    if self.shape != other.shape or len(self.shape) != 2:
      return False
    if self.numbers is None or other.numbers is None:
      return False
    rows, columns = self.shape
    step = max(1, SLICE // max(1, columns))
    slices = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    return all(np.array_equal(self.numbers[part], other.numbers[part]) for part in slices)


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
  """Opens the tensors of a folder.

  A single file counts before an index, as in `transformers`: an index may be left over from shards
  that are gone. Of a tensor that lies in two shards, the one that the index names counts.

  Returns:
    Name → tensor, "model." in front of all but the head also where the folder leaves it away.

  Raises:
    FileNotFoundError: there are no weights, or none that are read; or a shard is missing.
    ValueError: a file is damaged, or does not hold what the index says; or another prefix stands in
      front of the names.
  """
  if (folder / SINGLE).is_file():
    listed, names = {}, [SINGLE]
  elif (folder / INDEX).is_file():
    listed = _read_index(folder / INDEX)
    names = sorted(set(listed.values()))
  else:
    raise FileNotFoundError(_say_what_is_there(folder))
  opened = {}
  for name in names:
    if not (folder / name).is_file():
      raise FileNotFoundError(f"{folder / name}: no such file, but {INDEX} names it: get it, too")
    try:
      with safetensors.safe_open(folder / name, framework="np"):  # which checks the whole header
        opened[name] = _mapped(folder / name)
    except safetensors.SafetensorError as error:
      hint = native.pointer_hint(folder / name)
      raise ValueError(f"{folder / name}: not a whole safetensors file ({error}){hint}") from error
  found = {name: tensor for file in opened.values() for name, tensor in file.items()}
  lacking = [tensor for tensor, name in listed.items() if tensor not in opened[name]]
  if lacking:
    raise ValueError(
      f"{folder / INDEX}: {lacking[0]} should lie in {listed[lacking[0]]}, which does not hold it"
      + (f"; nor {len(lacking) - 1} more" if lacking[1:] else "")
      + ": index and shards are not of one model"
    )
  found |= {tensor: opened[name][tensor] for tensor, name in listed.items()}
  return _with_usual_names(folder, found)


def _mapped(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a whole file, in its order, by the header's word: eight bytes with its size, and
  JSON.
  """
  content = np.asarray(np.memmap(path, np.uint8, "r"))
  start = 8 + int.from_bytes(content[:8].tobytes(), "little")
  header = json.loads(content[8:start].tobytes())
  header.pop("__metadata__", None)
  found = {}
  for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
    kind, shape = entry["dtype"], tuple(entry["shape"])
    numbers = None
    if kind in FLOATS:
      first, last = entry["data_offsets"]
      numbers = content[start + first : start + last].view(FLOATS[kind]).reshape(shape)
    found[name] = Tensor(kind, shape, numbers)
  return found


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """Tensor name → shard."""

  def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for name, value in pairs:
      if found[name] != value:
        raise ValueError(f"{name!r} is there twice: {value!r} and {found[name]!r}")
    return found

  try:
    found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)["weight_map"]
    for name, shard in found.items():
      if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:
        raise ValueError(f"{name!r} lies in {shard!r}: it must be a file beside the index")
    return found
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    hint = native.pointer_hint(path)
    raise ValueError(
      f"{path}: not an index of safetensors shards ({type(error).__name__}: {error}){hint}"
    ) from error


def _say_what_is_there(folder: pathlib.Path) -> str:
  """What to say of a folder in which neither a single file nor an index of shards is found."""
  wanted = f"the folder must hold {SINGLE}, or {INDEX} and every shard it names"
  shards = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
  endings = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
  others = sorted(path for path in folder.iterdir() if path.suffix in endings)
  if shards:
    return f"{folder / INDEX}: no such file, though there are shards ({shards[0]}): {wanted}"
  if not others:
    return f"{folder / SINGLE}: no such file: {wanted}"
  other = others[0]
  advice = {
    ".safetensors": f"it is named in another way, perhaps with other tensor names: {wanted}",
    ".gguf": "give the path of this file",
  }.get(other.suffix, "pickled weights are not read, since they can run code: save safetensors")
  return f"{folder / SINGLE}: no such file, but there is {other.name}: {advice}"


def _with_usual_names(folder: pathlib.Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
  """The tensors as a model with a head names them; one without puts no "model." in front.

  Raises:
    ValueError: another prefix stands there; it is named.
  """
  if any(name.startswith(("model.layers.", "model.embed_tokens.")) for name in tensors):
    return tensors
  first = next((name for name in tensors if "layers.0." in name), "")
  prefix = first.partition("layers.0.")[0]
  if prefix:
    raise ValueError(
      f'{folder}: tensors are named as {first!r}, with {prefix!r} in front of "layers" where '
      '"model." should stand: part of another model, or a wrapper; save the language model alone'
    )
  return {name if name == HEAD else f"model.{name}": tensor for name, tensor in tensors.items()}
