"""The run directory: made once with its configuration, refused for another one."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
from absl import logging
from jax.experimental import multihost_utils

from oel_jax.runtime import files

SCHEMA = 1


def open_workdir(config: ml_collections.ConfigDict, workdir: str | os.PathLike, resume_anyway: bool = False) -> pathlib.Path:
  """Makes the run directory, or opens it again to go on with the same run.

  DIR/config.json holds the resolved configuration and the versions it ran with. When `resume_anyway` lets a changed configuration
  through, the file is rewritten with the new one, and its "changes" keep what each field was before.

  Args:
    config: resolved; tuples and lists are the same thing here.
    workdir: created, with its parents, if need be.
    resume_anyway: go on although the configuration differs.

  Returns:
    `workdir` as an absolute path.

  Raises:
    ValueError: the configuration differs (each field is listed with both values); config.json is
      damaged or of another schema; or `workdir` is on another store.
    OSError: the directory cannot be made or written.
  """
  path = files.local(workdir, "--workdir").absolute()
  if jax.process_index() == 0:
    try:
      path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise files.explained(error, path) from error
    _open(config, path / "config.json", resume_anyway)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"open {path}")
  return path


def _versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for package in ("jax", "flax", "oel_jax"):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "not installed"  # run from a checkout
  return found


def _open(config: ml_collections.ConfigDict, path: pathlib.Path, resume_anyway: bool) -> None:
  new = {"schema": SCHEMA, "config": json.loads(config.to_json(allow_nan=False)), "versions": _versions(), "changes": []}
  if not path.exists():
    files.write_json(path, new)
    return
  old = _read(path)
  if old["versions"] != new["versions"]:
    logging.warning("%s: this run was begun with %s and goes on with %s; its numbers may differ in their last digits",
                    path, old["versions"], new["versions"])
  before, now = _flat(old["config"]), _flat(new["config"])
  both = [{"field": name, "was": before.get(name, "no such field"), "is": now.get(name, "no such field")} for name in sorted(before | now)]
  # Values are compared as JSON, where 1, 1.0 and true are three different things.
  changed = [field for field in both if json.dumps(field["was"]) != json.dumps(field["is"])]
  if not changed:
    return
  listed = "; ".join(f"config.{change['field']} was {change['was']!r} and is {change['is']!r}" for change in changed)
  if any(change["field"] not in before or change["field"] not in now for change in changed):
    listed += " (a field that only one of them has came or went with a version of oel_jax)"
  if not resume_anyway:
    raise ValueError(f"{path}: this directory belongs to a run with another configuration: {listed}. "
                     "Choose another --workdir, restore the values, or give --resume_anyway")
  logging.warning("%s: going on with a changed configuration, as --resume_anyway says: %s", path, listed)
  new["changes"] = old["changes"] + [{"time": time.time(), "fields": changed}]
  files.write_json(path, new)


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
    if value["schema"] != SCHEMA:
      raise ValueError(f"its schema is {value['schema']!r}, this version of oel_jax reads {SCHEMA}")
    if not (isinstance(value["config"], dict) and isinstance(value["versions"], dict) and isinstance(value["changes"], list)):
      raise ValueError("config, versions or changes is not what it should be")
    return value
  except (ValueError, KeyError, TypeError) as error:  # ValueError: JSON and UTF-8 errors too
    raise ValueError(f"{path}: not a configuration that oel_jax wrote, or damaged ({type(error).__name__}: {error}). "
                     "Remove the file to go on with the configuration given now, or choose another --workdir") from error


def _flat(value: dict[str, Any], above: str = "") -> dict[str, Any]:
  """Nested fields by their dotted names; an empty group stays as a value, so that its disappearance shows."""
  found = {}
  for name, inner in value.items():
    if isinstance(inner, dict) and inner:
      found |= _flat(inner, f"{above}{name}.")
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
      if jax.process_index() == 0:  # the others of a distributed run belong to it
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      advice = "another process is running in this directory: wait for it, or choose another --workdir"
      raise OSError(error.errno, advice, str(path)) from error
    yield
