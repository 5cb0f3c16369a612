"""A copy of a run directory in a bucket, from which another machine goes on: `config.mirror`.

    gs://bucket/run/index.json      the files of the run directory, each with its SHA-256
                    files/SHA256    their contents

A run is safe by files that are renamed when whole and lines that are appended, which an object
store does not have. So it works in a directory of its own, and this copies what has changed when a
stage has ended or a checkpoint is whole. What the index names is there before it is written, in one
go, and what it no longer names is removed after: at any moment it stands for one state of the
directory, such as a kill might have left.

Addresses are those of `etils.epath`, which comes with Orbax; for gs:// it takes the package gcsfs.
Of several processes the first one does all this.
"""

import contextlib
import hashlib
import json
import pathlib
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import logging

from oel_jax.runtime import files, schema

FIELD = "config.mirror"
STORES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # with the package that reaches each
STATE = ".mirror.json"  # in the run directory: what has been copied
CONFIG = "config.json"  # comes last from a mirror: without it, a directory holds no run yet
CHUNK = 2**23  # bytes that are read at a time
TRIES = 3  # for a file that changes, or goes, while it is copied

# What is no part of a run, at its top or anywhere: what is held, what is being written.
_OWN = (STATE, ".lock", ".processes")
_UNFINISHED = re.compile(r"\..*\.tmp|.*\.orbax-checkpoint-tmp.*")


class _Changing(Exception):
  """A file is no longer what it was when it was looked at."""


def check(address: str, workdir: str) -> None:
  """Returns if there can be a mirror at the address; "" is none.

  Raises:
    ValueError: it is no address of a store that is known, nor an absolute path, or lies within the
      run directory.
    ImportError: a package is missing.
    OSError: nothing can be written there.
  """
  if not address:
    return
  store = re.match(r"([A-Za-z][\w+.-]+):/", address)
  right = (
    f"it must be {', '.join(f'{name}://BUCKET/FOLDER' for name in STORES)} or an absolute path"
  )
  if store and not re.fullmatch(rf"({'|'.join(STORES)})://[^/]+(/.*)?", address):
    raise ValueError(f"{FIELD} is {address!r}: {right}")
  if not store:
    path = pathlib.Path(address)
    if not path.is_absolute():
      raise ValueError(f"{FIELD} is {address!r}: {right}")
    folder = files.local(workdir, "--workdir").absolute().resolve()
    if folder == path.resolve() or folder in path.resolve().parents:
      raise ValueError(f"{FIELD} is {address!r}, within the run directory {folder}: {right}")
  with _reached(address):
    probe = _root(address) / f"probe-{secrets.token_hex(4)}"
    _write(probe, [b"oel_jax"])
    probe.unlink()


def restore(address: str, folder: pathlib.Path) -> None:
  """Brings the run that is mirrored there into a directory that holds none, and notes whose mirror
  it is; of a directory that holds one, looks whether it is that run's.

  Raises:
    ValueError: another run is mirrored there, or this one went on elsewhere; or what is there is
      damaged.
    OSError: it cannot be read, or the disk cannot be written.
  """
  if not address:
    return
  with _reached(address):
    index = _read_index(address)
  if (folder / CONFIG).exists():
    _compare(address, folder, index)
    return
  if index is None:
    return
  names = sorted(index["files"], key=lambda name: name == CONFIG)
  logging.warning("%s: brought here from %s: %d files", folder, address, len(names))
  looked = {}
  for name in names:
    path, digest = folder / name, index["files"][name]
    if name == CONFIG:
      _note(folder, index["run"], index["number"], looked)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_chunks(path, _checked(address, name, digest))
    looked[name] = [*_stat(path), digest]


def update(address: str, folder: pathlib.Path, *, quiet: bool = False) -> None:
  """Makes the mirror one of what is in the directory now.

  Args:
    address: config.mirror; "" is none.
    folder: of the run.
    quiet: only warn where it fails: the next time does the rest.

  Raises:
    OSError: it could not be written.
    ValueError: what is there, or was noted here of it, is damaged; or the mirror is no longer this
      directory's.
  """
  if not address:
    return
  try:
    for turn in range(TRIES):
      try:
        with _reached(address):
          _copy(address, folder)
        return
      except _Changing as error:
        if turn == TRIES - 1:
          raise OSError(f"{error}: changes while it is copied to {address}") from error
  except (OSError, ImportError, ValueError) as error:
    if not quiet:
      raise
    logging.warning("%s; the run goes on, and the next stage or checkpoint tries again", error)


def with_checkpoints(
  address: str, folder: pathlib.Path, checkpoints: pathlib.Path, advance: Callable[..., None]
) -> Callable[..., None]:
  """`advance`, which is told of each step of a training, and updates the mirror when another
  checkpoint is whole.
  """
  if not address:
    return advance
  steps = lambda: {path.name for path in checkpoints.glob("*") if path.name.isdigit()}
  seen = steps()

  def told(*args: Any, **options: Any) -> None:
    advance(*args, **options)
    if new := steps() - seen:
      seen.update(new)
      update(address, folder, quiet=True)

  return told


def _copy(address: str, folder: pathlib.Path) -> None:
  """Contents that are not there yet, the index, and away with what it no longer names.

  Raises:
    ValueError: the mirror is another run's by now, or this one went on elsewhere: two that were
      begun at the same time both found it empty, and a machine that was given up may come back.
  """
  _compare(address, folder, _read_index(address))
  state = _state(folder) or {"run": secrets.token_hex(8), "number": 0, "files": {}}
  there, looked = _there(address), {}
  for name, path in _files(folder):
    try:
      found, before = _stat(path), state["files"].get(name)
      digest = before[2] if before and before[:2] == found else files.sha256(path)
      if digest not in there:
        _send(path, _root(address) / "files" / digest, digest)
        there.add(digest)
    except FileNotFoundError as error:
      if path.exists():
        raise
      raise _Changing(str(path)) from error  # an old checkpoint, which Orbax has removed
    looked[name] = [*found, digest]
  named = {name: digest for name, (*_, digest) in looked.items()}
  index = _read_index(address)
  _compare(address, folder, index)  # again: what was sent may have taken long
  if index is None or index["files"] != named:
    number = state["number"] + 1
    _note(folder, state["run"], number, looked)  # first: this directory knows of all its indices
    index = schema.sealed({"schema": 1, "run": state["run"], "number": number, "files": named})
    _put(_root(address) / "index.json", json.dumps(index, indent=1).encode())
  for digest in there - set(named.values()):
    (_root(address) / "files" / digest).unlink()


def _there(address: str) -> set[str]:
  """The names of the contents that are stored."""
  try:
    return {path.name for path in (_root(address) / "files").iterdir()}
  except FileNotFoundError:  # a store has folders only of what is in them
    return set()


def _files(folder: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
  """Name, with "/", and path of each file of the run."""
  try:
    found = sorted(folder.rglob("*"))
  except FileNotFoundError as error:  # a folder went while it was listed, of an old checkpoint
    raise _Changing(str(folder)) from error
  for path in found:
    parts = path.relative_to(folder).parts
    if parts[0] not in _OWN and not any(map(_UNFINISHED.fullmatch, parts)) and path.is_file():
      yield "/".join(parts), path


def _stat(path: pathlib.Path) -> list[int]:
  found = path.stat()
  return [found.st_size, found.st_mtime_ns]


def _chunks(path: Any, told: Callable[[bytes], Any]) -> Iterator[bytes]:
  with path.open("rb") as file:
    while chunk := file.read(CHUNK):
      told(chunk)
      yield chunk


def _send(path: pathlib.Path, target: Any, digest: str) -> None:
  found = hashlib.sha256()
  _write(target, _chunks(path, found.update))
  if found.hexdigest() != digest:
    target.unlink()
    raise _Changing(str(path))


def _checked(address: str, name: str, digest: str) -> Iterator[bytes]:
  """The content of a file of the mirror.

  Raises:
    ValueError: at its end, if it is not what was put there, or not there.
  """
  source, found = _root(address) / "files" / digest, hashlib.sha256()
  with _reached(address):
    if source.exists():
      yield from _chunks(source, found.update)
  if found.hexdigest() != digest:
    raise ValueError(
      f"{source}: damaged or gone: it should hold {name} of the run; restore it from a copy, or "
      f"give another {FIELD} to begin anew"
    )


def _put(target: Any, data: bytes) -> None:
  """The whole content in one go: a store has the old object until the new one is there."""
  if "://" in str(target):
    target.write_bytes(data)
  else:
    _write(target, [data])


def _write(target: Any, chunks: Iterable[bytes]) -> None:
  """A file that is new there, all of it or nothing."""
  if "://" not in str(target):
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_chunks(str(target), chunks)
    return
  try:
    with target.open("wb") as file:
      for chunk in chunks:
        file.write(chunk)
  except BaseException:
    with contextlib.suppress(Exception):  # what is closed after an error is an object, too
      target.unlink()
    raise


def _root(address: str) -> Any:
  from etils import epath  # here: few runs have a mirror

  return epath.Path(address)


def _read_index(address: str) -> dict[str, Any] | None:
  """What index.json holds; None if there is none."""
  path = _root(address) / "index.json"
  if not path.exists():
    return None
  try:
    index = _parse(schema.loads(path.read_bytes()))
    for name, digest in index["files"].items():
      inside = not name.startswith("/") and ".." not in name.split("/")
      schema.need(inside, "files", name, "paths within the run directory")
      hexadecimal = type(digest) is str and re.fullmatch("[0-9a-f]{64}", digest)
      schema.need(hexadecimal, f"files.{name}", digest, "a SHA-256")
  except ValueError as error:
    raise ValueError(f"{path}: damaged, or no mirror of a run: {error}") from error
  return index


def _parse(value: Any) -> dict[str, Any]:
  """What index and state have in common."""
  found = schema.get(value, "schema", schema.TOP)
  schema.need(found == 1, "schema", found, "1, which this version of oel_jax reads")
  schema.get(value, "run", schema.TOP, str)
  schema.whole(value, "number", schema.TOP)
  schema.get(value, "files", schema.TOP, dict)
  return value


def _state(folder: pathlib.Path) -> dict[str, Any] | None:
  """What STATE holds; None if nothing has been copied."""
  path = folder / STATE
  advice = f"remove it, and give an empty {FIELD}"
  return files.read_json(path, _parse, advice) if path.exists() else None


def _note(folder: pathlib.Path, run: str, number: int, looked: dict[str, list[Any]]) -> None:
  found = {"schema": 1, "run": run, "number": number, "files": looked}
  files.write_sealed(folder / STATE, found)


def _compare(address: str, folder: pathlib.Path, index: dict[str, Any] | None) -> None:
  """Raises ValueError unless the mirror is this directory's."""
  if index is None:
    return
  state = _state(folder)
  if state is None or state["run"] != index["run"]:
    raise ValueError(
      f"{FIELD} is {address!r}, which mirrors another run than {folder}: give another address, or "
      "an empty --workdir to go on with that run"
    )
  if state["number"] < index["number"]:
    raise ValueError(
      f"{FIELD} is {address!r}, and this run went on elsewhere: {folder} has its state "
      f"{state['number']}, the mirror {index['number']}: give an empty --workdir to go on from the "
      "mirror"
    )


@contextlib.contextmanager
def _reached(address: str) -> Iterator[None]:
  """One line of whatever the store's packages raise."""
  try:
    yield
  except (ValueError, _Changing):
    raise
  except ImportError as error:
    package = STORES.get(address.partition(":")[0])
    raise ImportError(f"{FIELD} is {address!r}: pip install {package} ({error})") from error
  except Exception as error:
    said = " ".join(str(error).split()) or type(error).__name__
    raise OSError(f"{FIELD} is {address!r}: could not be used: {said:.300}") from error
