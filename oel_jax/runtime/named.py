"""Functions that a configuration names: MODULE:NAME of a module that can be imported, or
FILE.py:NAME of a file of the user's.
"""

import difflib
import importlib
import importlib.util
import itertools
import pathlib
import re
import reprlib
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from oel_jax.runtime import files

FORM = "MODULE:NAME or FILE.py:NAME, a function"
# How code of the user's may fail: exit(), sys.exit() and quit() in it must not end the run unsaid.
FAILURES = (Exception, SystemExit)
_numbers = itertools.count()  # two files of one name stay two modules


def is_name(text: str) -> bool:
  """Whether the text is written as the name of a function; nothing is looked up."""
  return re.fullmatch(r"(.*\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*", text) is not None


def source(text: str, field: str) -> pathlib.Path | None:
  """Returns the file that `text` is read from; None for a module that has none.

  Args:
    text, field: as in `function`.

  Raises:
    ValueError: it is written otherwise, or there is no such module.
    OSError: there is no such file.
  """
  found = _file(text, field) or getattr(_module(text, field), "__file__", None)
  return pathlib.Path(found) if found else None


def found(text: str) -> pathlib.Path | None:
  """Returns the file that `text` is read from, where it is on this machine, without running it; for
  whoever names a function that another machine calls.
  """
  place = text.rpartition(":")[0]
  if place.endswith(".py"):
    file = pathlib.Path(place).expanduser()
    return file if file.is_file() else None
  try:
    spec = importlib.util.find_spec(place)  # runs the packages above it alone
  except (ImportError, ValueError):
    return None
  return pathlib.Path(spec.origin) if spec and spec.has_location else None


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
  told, name = f"{field} is {text!r}", text.rpartition(":")[2]
  file = _file(text, field)
  module, what = _module(text, field, file), "file" if file else "module"
  found = getattr(module, name, None)
  if not callable(found):
    close = difflib.get_close_matches(name, vars(module))
    hint = f" (did you mean {' or '.join(close)}?)" if close and found is None else ""
    raise ValueError(f"{told}: the {what} has no function {name}{hint}")
  return found


def called(
  text: str, field: str, function: Callable[..., Any], *args: Any, words: bool = True
) -> Any:
  """Returns what the user's function returns.

  Args:
    text, field: as in `function`.
    function: what `text` names.
    *args: what it is given.
    words: whether an error may say what the function's own says, which may hold what it was given.

  Raises:
    ValueError: it fails; names the field, the error and the line of the user's file.
  """
  try:
    return function(*args)
  except FAILURES as error:
    reason = explained(error, found(text), words=words)
    raise ValueError(f"{field} is {text!r}: it fails ({reason})") from error


def edit(text: str, field: str) -> Callable[[str], str] | None:
  """The function (text) -> text that `text` names, with errors that say so; None if it is "".

  Raises:
    ValueError, OSError: as `function`; and by the function itself as `called`, or where it returns
      something else.
  """
  if not text:
    return None
  own = function(text, field)

  def edited(given: str) -> str:
    found = called(text, field, own, given)
    if not isinstance(found, str):
      seen = reprlib.repr(found)
      raise ValueError(f"{field} is {text!r}: it returns {seen}: it must be a text")
    return found

  return edited


def explained(error: BaseException, file: pathlib.Path | None = None, *, words: bool = True) -> str:
  """Returns an error's type, words and line: the last line of `file` that led to it, if one did."""
  told = f"{type(error).__name__}: {error}" if words else type(error).__name__
  if isinstance(error, SyntaxError):  # says its own
    return told
  frames = traceback.extract_tb(error.__traceback__)
  own = [frame for frame in frames if frame.filename == str(file)]
  if not own and frames[-1].filename.startswith("<frozen"):  # the import itself
    return told
  frame = (own or frames)[-1]
  return f"{told}, at {frame.filename}:{frame.lineno}"


def _file(text: str, field: str) -> pathlib.Path | None:
  """The file of FILE.py:NAME; None for MODULE:NAME."""
  place = text.rpartition(":")[0]
  if not is_name(text):
    raise ValueError(f"{field} is {text!r}: it must be {FORM}")
  if not place.endswith(".py"):
    return None
  file = files.local(place, field).absolute()
  if not file.is_file():
    raise FileNotFoundError(f"{field} is {text!r}: there is no such file")
  return file


def _module(text: str, field: str, file: pathlib.Path | None = None) -> types.ModuleType:
  """The module, or what the file is when it has run."""
  try:
    return _run(file) if file else importlib.import_module(text.rpartition(":")[0])
  except FAILURES as error:  # whatever is wrong in the user's file
    failed = "file cannot be run" if file else "module cannot be imported"
    reason = explained(error, file)
    raise ValueError(f"{field} is {text!r}: the {failed} ({reason})") from error


def _run(file: pathlib.Path) -> types.ModuleType:
  # Registered while it runs and afterwards: dataclasses and type hints look it up by its name.
  spec = importlib.util.spec_from_file_location(f"oel_jax_file_{next(_numbers)}", file)
  module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[spec.name]
    raise
  return module
