"""The paths that a configuration names, made absolute: those that its file sets are relative to the
file's folder, those of the command line to the working directory.
"""

import os
import pathlib
from collections.abc import Callable, Collection
from typing import Any

from oel_jax.runtime import files, named

# Fields that hold a path, and those that hold FILE.py:NAME, or several of them.
FILES = (
  "policy.weights",
  "extraction.weights",
  "logs.path",
  "logs.redact_names",
  "logs.tools",
  "distill.knowledge",
  "distill.prompts",
  "distill.held_out",
  "distill.unrelated",
  "evaluation.unrelated",
)
FUNCTIONS = (
  "distill.obeys",
  "distill.content",
  "deployment.environment",
  "extraction.edit",
  "consolidation.anchor_edit",
  "evaluation.tasks",
  "logs.redact_hook",
)
FIELDS = (*FILES, *FUNCTIONS)


def resolve(
  config: Any,
  file: str | os.PathLike,
  given: Collection[str],
  *,
  names: Collection[str] = (),
  needed: bool = True,
) -> None:
  """Makes the paths in `config` absolute, in place.

  What the file sets and does not lie beside it is looked for in the working directory, too: once
  all paths were looked for there.

  Args:
    config: an ml_collections.ConfigDict; of FIELDS it need have none.
    file: the configuration's file.
    given: fields that the command line set.
    names: values that are no paths, such as "pocket".
    needed: whether a path that the file sets must lead somewhere.

  Raises:
    ValueError: it leads nowhere, and then both places are named; or it is one of another store.
  """
  folder, here = pathlib.Path(file).absolute().parent, pathlib.Path.cwd()
  for field in FIELDS:
    *groups, name = field.split(".")
    group = config
    for part in groups:
      group = group.get(part, {})
    if not group.get(name) or group[name] in names:
      continue
    places = (here,) if field in given else (folder, here)
    # "{round}" stands for a number, of rounds to come, too.
    must = needed and field not in given and "{round}" not in group[name]
    group[name] = _each(field, group[name], lambda path: _find(path, places, field, must))


def absolute(field: str, value: Any) -> Any:
  """Returns the value of one of FIELDS with its paths as `resolve` leaves those of the command
  line.
  """
  return _each(field, value, lambda path: os.path.abspath(os.path.expanduser(path)))


def _each(field: str, value: Any, change: Callable[[str], str]) -> Any:
  """Returns the field's value with `change` made to each path in it; MODULE:NAME stays."""
  if isinstance(value, (list, tuple)):
    return type(value)(_each(field, one, change) for one in value)
  if not isinstance(value, str):
    return value
  if named.is_name(value):
    path, _, function = value.rpartition(":")
    return f"{change(path)}:{function}" if path.endswith(".py") else value
  return change(value) if field in FILES else value


def _find(path: str, places: tuple[pathlib.Path, ...], field: str, needed: bool) -> str:
  given = files.local(path, f"config.{field}")
  found = [place / given for place in places if (place / given).exists()]
  if needed and not found and not given.is_absolute():
    raise ValueError(
      f"config.{field} is {path!r}: there is no such file or folder, neither in {places[0]}, where "
      f"the configuration's file lies, nor in {places[-1]}, the working directory"
    )
  return os.path.normpath(found[0] if found else places[0] / given)
