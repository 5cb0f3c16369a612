"""Functions that a configuration names: MODULE:NAME of a module that can be imported, or
FILE.py:NAME of a file of the user's.
"""

import importlib
import importlib.util
import itertools
import re
import sys
import types
from collections.abc import Callable
from typing import Any

from oel_jax.runtime import files

FORM = "MODULE:NAME or FILE.py:NAME, a function"
_numbers = itertools.count()  # two files of one name stay two modules


def is_name(text: str) -> bool:
  """Whether the text is written as the name of a function; nothing is looked up."""
  return re.fullmatch(r"(.*\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*", text) is not None


def function(text: str, field: str) -> Callable[..., Any]:
  """Returns the function that `text` names.

  Args:
    text: MODULE:NAME or FILE.py:NAME. The file is run as a module of its own.
    field: of the configuration, for errors: "config.evaluation.tasks".

  Raises:
    ValueError: it is written otherwise; the module cannot be imported or the file not be run; or
      neither has such a function.
    OSError: there is no such file.
  """
  told = f"{field} is {text!r}"
  if not is_name(text):
    raise ValueError(f"{told}: it must be {FORM}")
  place, _, name = text.rpartition(":")
  module = _run_file(place, field, told) if place.endswith(".py") else _import(place, told)
  found = getattr(module, name, None)
  if not callable(found):
    what = "file" if place.endswith(".py") else "module"
    raise ValueError(f"{told}: the {what} has no function {name}")
  return found


def _import(place: str, told: str) -> types.ModuleType:
  try:
    return importlib.import_module(place)
  except ImportError as error:
    raise ValueError(f"{told}: the module cannot be imported ({error})") from error


def _run_file(place: str, field: str, told: str) -> types.ModuleType:
  file = files.local(place, field)
  if not file.is_file():
    raise FileNotFoundError(f"{told}: there is no such file")
  # Registered while it runs and afterwards: dataclasses and type hints look it up by its name.
  spec = importlib.util.spec_from_file_location(f"oel_jax_file_{next(_numbers)}", file)
  module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except (Exception, SystemExit) as error:  # whatever is wrong in the user's file
    del sys.modules[spec.name]
    reason = f"{type(error).__name__}: {error}"
    raise ValueError(f"{told}: the file cannot be run ({reason})") from error
  return module
