"""Whole files or none: a reader never sees half of what was being written, and what is read back is
checked first.
"""

import errno
import hashlib
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import logging

from oel_jax.runtime import schema

_SCHEME = re.compile(r"([A-Za-z][\w+.-]+):/")  # two letters at least: C:/ is a disk

# How a store is mounted so that a run can be in it: a checkpoint's folder is renamed when it is
# whole, which gcsfuse does only for as many files as it is told.
_MOUNTS = {"gs": ", by gcsfuse --implicit-dirs --rename-dir-limit=100000 BUCKET FOLDER"}

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def split_parts(path: str | os.PathLike) -> list[pathlib.Path]:
  """Returns where the parts of a split GGUF file lie, going by any part's name; else [path]."""
  path = pathlib.Path(path)
  named = _PART.fullmatch(path.name)
  if not named:
    return [path]
  count = int(named["count"])
  names = [f"{named['stem']}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
  return [path.with_name(name) for name in names]


def local(path: str | os.PathLike, field: str) -> pathlib.Path:
  """Returns the path of a file or folder of this machine, with ~ for the home folder.

  Args:
    path: as the user gave it.
    field: what gave it, for the error: "--workdir", "config.policy.weights".

  Raises:
    ValueError: it is an address of another store: gs://bucket/run would be a folder named gs: here.
  """
  scheme = _SCHEME.match(str(path))
  if scheme:
    raise ValueError(
      f"{field} is {str(path)!r}: files are read and written on this machine only, so it must be "
      f"a path here; copy it, or mount the {scheme[1]}: store as a folder"
      f"{_MOUNTS.get(scheme[1], '')}"
    )
  return pathlib.Path(path).expanduser()


def given(path: str | os.PathLike, field: str) -> pathlib.Path:
  """`local`, of a file that a field of the configuration names.

  Raises:
    ValueError: as `local`.
    OSError: there is no such file, or a folder; names the field.
  """
  file = local(path, field)
  if file.is_dir():
    raise IsADirectoryError(f"{field} is {str(path)!r}: it is a folder, and must be a file")
  if not file.exists():
    raise FileNotFoundError(f"{field} is {str(path)!r}: there is no such file")
  return file


def explained(error: OSError, path: str | os.PathLike) -> OSError:
  """Returns the error again, of the same type and number, with the file's name and what would
  help.
  """
  advice = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again, it goes on "
    "from what is already written",
    errno.EDQUOT: "your disk quota is used up; free some space and run the same command again, it "
    "goes on from what is already written",
    errno.EROFS: "the file system is read-only; choose another --workdir",
    errno.EACCES: "no permission to write there; choose another --workdir",
  }.get(error.errno, error.strerror or str(error))
  return type(error)(error.errno, f"could not write: {advice}", str(path))


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
  """`write_chunks` of the whole content."""
  write_chunks(path, [data])


def write_chunks(path: str | os.PathLike, chunks: Iterable[bytes | memoryview]) -> None:
  """Writes under a temporary name, then renames: `path` holds the old content or the new one, also
  after a power cut.

  Args:
    path: its folder must exist.
    chunks: the content, one part after another; each is written before the next one is asked for.

  Raises:
    OSError: the disk is full, or the like; names the file. What making a chunk raises comes as it
      is, for it is about another file. Either way whatever `path` held is untouched.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  not_made = []

  def made() -> Iterator[bytes | memoryview]:
    try:
      yield from chunks
    except OSError as error:
      not_made.append(error)
      raise

  try:
    with open(temporary, "wb") as file:
      file.writelines(made())
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself lives in the folder
    try:
      os.fsync(folder)
    finally:
      os.close(folder)
  except OSError as error:
    if error in not_made:
      raise
    raise explained(error, path) from error
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """`write_bytes` of the text in UTF-8."""
  write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes indented JSON through `write_text`.

  Raises:
    OSError: as in `write_text`.
    ValueError: the value holds something that JSON has not, such as NaN or an array; names the
      file.
  """
  try:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path}: cannot be written as JSON: {error}") from error
  write_text(path, text)


def write_sealed(path: str | os.PathLike, value: dict[str, Any]) -> None:
  """`write_json` of the object with its digest, which `read_json` compares."""
  try:
    value = schema.sealed(value)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path}: cannot be written as JSON: {error}") from error
  write_json(path, value)


AGAIN = "restore it from a copy, or remove it and the same command as before makes it again"


def read_json(
  path: str | os.PathLike, parse: Callable[[Any], Any] = lambda value: value, advice: str = AGAIN
) -> Any:
  """Returns what `parse` makes of a JSON file's value.

  Args:
    path: the file.
    parse: checks the value and raises ValueError, naming the field, where it is not what it must be
      (`runtime.schema`).
    advice: what the user can do about a damaged file.

  Raises:
    ValueError: the file is damaged (`schema.loads`) or `parse` refuses it; names the file.
    OSError: it cannot be read.
  """
  data = pathlib.Path(path).read_bytes()
  try:
    return parse(schema.loads(data))
  except ValueError as error:
    raise ValueError(
      f"{path}: damaged, or not written by this version of oel_jax: {error}; {advice}"
    ) from error


def read_text(path: str | os.PathLike) -> str:
  """Returns a file's text as it is, line ends included.

  Raises:
    ValueError: it is not UTF-8; names the file and the line.
    OSError: it cannot be read.
  """
  data = pathlib.Path(path).read_bytes()
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start) + 1
    raise ValueError(
      f"{path}:{line}: not UTF-8: {data[error.start : error.start + 8]!r}"
    ) from error


def sha256(path: str | os.PathLike) -> str:
  """Returns the SHA-256 of a file's bytes, 64 hexadecimal digits."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def set_aside(path: str | os.PathLike, why: str) -> None:
  """Renames a file that is to be made again to NAME.replaced-TIME, with a warning; nothing happens
  if there is no such file.
  """
  path = pathlib.Path(path)
  if path.exists():
    aside = path.with_name(f"{path.name}.replaced-{time.time_ns() // 10**6}")
    path.rename(aside)
    logging.warning("%s: made again, kept as %s: %s", path, aside.name, why)
