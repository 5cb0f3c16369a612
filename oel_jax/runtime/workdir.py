"""The run directory: made once with its configuration, refused for another one, held by one process
at a time.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import Any

import ml_collections
from absl import logging

from oel_jax.runtime import files, mirror, named, paths, schema

SCHEMA = 1
WHOLE_BELOW = 64 * 2**20  # bytes up to which a file's digest is of all its bytes
# What a Hugging Face folder's digest is made of; a README or a .gitattributes changes nothing.
WEIGHTS = (".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf")


@contextlib.contextmanager
def opened(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike, resume_anyway: bool = False
) -> Iterator[pathlib.Path]:
  """Makes the run directory, or opens it again to go on with the same run, and holds it: nothing in
  it changes before it is held.

  DIR/config.json holds the resolved configuration, the versions it ran with, and digests of the
  files that the configuration names (`file_digests`). When `resume_anyway` lets a changed
  configuration or file through, config.json is rewritten with the new one, and its "changes" keep
  what each field was before. Where config.mirror names a place, a directory that holds no run is
  filled from it, and it is brought up to date at the end (`runtime.mirror`).

  Args:
    config: resolved; tuples and lists are the same thing here.
    workdir: created, with its parents, if need be.
    resume_anyway: go on although the configuration, or a file that it names, differs. More rounds
      than before need no permission.

  Yields:
    `workdir` as an absolute path.

  Raises:
    ValueError: the configuration differs (each field is listed with both values), a file that it
      names has changed, config.json is damaged or of another schema, or `workdir` is on another
      store; or the mirror is another run's, or damaged.
    OSError: another process on this machine is running in it, or the directory cannot be made or
      written.
  """
  path = files.local(workdir, "--workdir").absolute()
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise files.explained(error, path) from error
  copied = config.get("mirror", "")
  with locked(path):
    mirror.restore(copied, path)
    _open(config, path / "config.json", resume_anyway)
    try:
      yield path
    except BaseException:
      mirror.update(copied, path, quiet=True)
      raise
    mirror.update(copied, path)


def file_digests(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Field → 16 hexadecimal digits, of each file or folder that the configuration names and that is
  there.

  The fields are policy.weights, extraction.weights, deployment.environment, evaluation.tasks,
  evaluation.unrelated, extraction.edit and consolidation.anchor_edit, where they name a file, and
  those of `distill`. Up to 64 MiB a file's digest is of all its bytes; of a larger one it is of its
  size, its first MiB (where safetensors and GGUF list their tensors), its last, and 256 blocks of
  64 KiB spread evenly between. A folder's is of the names and digests of the files in it that end
  as WEIGHTS says; that of one part of a split GGUF file is of all its parts.
  """
  weights = (config.policy.weights or "") if "policy" in config else ""
  found_at = {"policy.weights": _python_file(weights) or weights}
  environment = config.get("deployment", {}).get("environment", "textarena")
  if environment not in ("", "textarena"):
    # The server side has none, and runs none.
    found_at["deployment.environment"] = str(named.found(environment) or "")
  extractor = config.get("extraction", {}).get("weights", "")
  found_at["extraction.weights"] = _python_file(extractor) or extractor
  for group, name in (("extraction", "edit"), ("consolidation", "anchor_edit")):
    found_at[f"{group}.{name}"] = _python_file(config.get(group, {}).get(name, ""))
  found_at["evaluation.unrelated"] = config.get("evaluation", {}).get("unrelated", "")
  if "distill" in config:
    found_at |= {
      f"distill.{name}": config.distill[name]
      for name in ("knowledge", "prompts", "held_out", "unrelated")
    }
    for name in ("obeys", "content"):  # FILE.py:FUNCTION
      found_at[f"distill.{name}"] = _python_file(config.distill[name])
  found = {}
  for field, name in found_at.items():
    path = pathlib.Path(name or "").expanduser()
    if name and path.is_dir():
      found[field] = schema.digest(
        {
          inner.name: _digest(inner)
          for inner in path.iterdir()
          if inner.suffix in WEIGHTS and inner.is_file()
        }
      )
    elif name and path.is_file():
      parts = [part for part in files.split_parts(path) if part.is_file()]
      digests = {part.name: _digest(part) for part in parts}
      found[field] = schema.digest(digests) if len(parts) > 1 else _digest(path)
  if digest := tasks_digest(config):
    found["evaluation.tasks"] = digest
  return found


def tasks_digest(config: ml_collections.ConfigDict) -> str | None:
  """16 hexadecimal digits of the user's files that evaluation.tasks names; None if it names none
  that is there.
  """
  tasks = [_python_file(text) for text in config.get("evaluation", {}).get("tasks", ())]
  paths = [pathlib.Path(file).expanduser() for file in tasks if file]
  digests = [_digest(path) for path in paths if path.is_file()]
  return schema.digest(digests) if digests else None


def _python_file(text: str) -> str:
  """The file of FILE.py:NAME; "" for anything else, a MODULE:NAME too."""
  file = text.rpartition(":")[0]
  return file if file.endswith(".py") else ""


def _digest(path: pathlib.Path) -> str:
  """See `file_digests`."""
  size = path.stat().st_size
  if size <= WHOLE_BELOW:
    return files.sha256(path)[:16]
  found = hashlib.sha256(str(size).encode())
  with open(path, "rb") as file:
    places = [(0, 2**20), (size - 2**20, 2**20), *((size * i // 257, 2**16) for i in range(1, 257))]
    for start, length in places:
      file.seek(start)
      found.update(file.read(length))
  return found.hexdigest()[:16]


def _versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for package in ("jax", "flax", "oel_jax"):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "not installed"  # run from a checkout
  return found


def _open(config: ml_collections.ConfigDict, path: pathlib.Path, resume_anyway: bool) -> None:
  digests = file_digests(config)
  new = {
    "schema": SCHEMA,
    "config": json.loads(config.to_json(allow_nan=False)),
    "versions": _versions(),
    "files": digests,
    "changes": [],
  }
  if not path.exists():
    files.write_sealed(path, new)
    return
  old = read_config(path)
  if old["versions"] != new["versions"]:
    logging.warning(
      "%s: this run was begun with %s and goes on with %s; its numbers may differ in their last "
      "digits",
      path,
      old["versions"],
      new["versions"],
    )
  before, now = flat(old["config"]), flat(new["config"])
  both = [
    {"field": name, "was": before.get(name, "no such field"), "is": now.get(name, "no such field")}
    for name in sorted(before | now)
  ]
  # Values are compared as JSON, where 1, 1.0 and true are three different things.
  changed = [field for field in both if json.dumps(field["was"]) != json.dumps(field["is"])]
  listed = [
    f"config.{change['field']} was {change['was']!r} and is {change['is']!r}" for change in changed
  ]
  if any(change["field"] not in before or change["field"] not in now for change in changed):
    listed[-1] += " (a field that only one of them has came or went with a version of oel_jax)"
  for field in sorted(old["files"].keys() & digests.keys()):
    if old["files"][field] != digests[field]:
      listed.append(
        f"the content of config.{field} ({now[field]}) has changed: its digest was "
        f"{old['files'][field]} and is {digests[field]}"
      )
      changed.append(
        {"field": f"content of {field}", "was": old["files"][field], "is": digests[field]}
      )
  if not changed:
    return
  if all(map(_is_harmless, changed)):
    logging.info("%s: going on: %s", path, "; ".join(listed))
  elif not resume_anyway:
    raise ValueError(
      f"{path}: this directory belongs to a run with another configuration: {'; '.join(listed)}. "
      "Choose another --workdir, restore the values, or give --resume_anyway"
    )
  else:
    logging.warning(
      "%s: going on with a changed configuration, as --resume_anyway says: %s",
      path,
      "; ".join(listed),
    )
  new["changes"] = old["changes"] + [{"time": time.time(), "fields": changed}]
  files.write_sealed(path, new)


def _is_harmless(change: dict[str, Any]) -> bool:
  """Whether a change leaves what is there as it is: more rounds; another place for the metrics; the
  same path, relative to the working directory before; another patience with an endpoint; what a
  plan was asked for; where it is mirrored.
  """
  field, was, now = change["field"], change["was"], change["is"]
  if field in paths.FIELDS:
    return paths.absolute(field, was) == now
  if field in ("wandb_project", "mirror") or field.startswith("plan."):
    return True
  if field in ("deployment.endpoint_timeout", "deployment.endpoint_retries"):
    return type(was) is type(now)
  return field == "rounds" and type(was) is type(now) is int and now > was


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """Returns what config.json holds: "config", "versions", "files" ({} by an earlier version) and
  "changes".

  Raises:
    ValueError: damaged, or of another schema; names the file.
    OSError: it cannot be read.
  """
  others = "choose another --workdir, or remove it to go on with the configuration given then"
  return files.read_json(path, _parse, f"restore it from a copy, {others}")


def _parse(value: Any) -> dict[str, Any]:
  schema.need(
    schema.get(value, "schema", schema.TOP) == SCHEMA,
    "schema",
    value["schema"],
    f"{SCHEMA}, which this version of oel_jax reads",
  )
  for field in ("config", "versions"):
    schema.get(value, field, schema.TOP, dict)
  for index, change in enumerate(schema.get(value, "changes", schema.TOP, list)):
    where = f"changes[{index}]"
    schema.need(
      schema.is_number(schema.get(change, "time", where)),
      f"{where}.time",
      change["time"],
      "seconds since 1970",
    )
    for field, name in itertools.product(
      schema.get(change, "fields", where, list), ("field", "was", "is")
    ):
      schema.get(field, name, f"{where}.fields")
  named = value.get("files", {})
  schema.need(isinstance(named, dict), "files", named, "an object")
  return value | {"files": named}


def flat(value: dict[str, Any], above: str = "") -> dict[str, Any]:
  """Nested fields by their dotted names; an empty group stays as a value, so that its disappearance
  shows.
  """
  found = {}
  for name, inner in value.items():
    if isinstance(inner, dict) and inner:
      found |= flat(inner, f"{above}{name}.")
    else:
      found[f"{above}{name}"] = inner
  return found


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Holds the run directory for this process; it lets go when the process ends, however it ends.

  Raises:
    OSError: another process on this machine is running in it.
  """
  with open(path / ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      advice = (
        "another process is running in this directory: wait for it, or choose another --workdir"
      )
      raise OSError(error.errno, advice, str(path)) from error
    yield
