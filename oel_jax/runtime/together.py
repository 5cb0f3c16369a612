"""Who does what in a run of several processes: process 0 runs the story, the others take part in
what needs all of them.

    process 0    load │ decide  read  CALL ▒▒▒ write  decide  CALL ▒▒▒▒▒▒ write │ end
    process 1    load │               ▒▒▒                     ▒▒▒▒▒▒            │ end
    process 2    load │               ▒▒▒                     ▒▒▒▒▒▒            │ end

A function marked `everywhere` runs in all processes when process 0 calls it: sampling, games, a
round's training, the reading of a checkpoint. Everything else, what is whole and what is skipped,
files, lines of progress, knowledge and gate, is decided, written and said by process 0 alone, once.
In one process, and within such a function, the mark changes nothing.

Arguments travel as JSON. What all processes have, the run, its first policy, trained weights, they
have under a name (`share`), and the name travels; of functions nothing does, and they are None
elsewhere.
"""

import array
import contextlib
import dataclasses
import functools
import importlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from oel_jax.runtime import distributed

WEIGHTS = "weights"  # begins the names of trained weights
KEPT = 2  # of which so many are held: what a round begins with, and what it makes

_TOP = __name__.partition(".")[0]
F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass
class _State:
  """Of this process: whether it leads now, what it shares, and how many calls there have been."""

  leads: bool = False
  shared: dict[str, Any] = dataclasses.field(default_factory=dict)
  calls: int = 0


_state = _State()


def leads() -> bool:
  """Whether this is process 0 of several, which decides alone what is done next."""
  return _state.leads


def share(name: str, value: Any) -> None:
  """Gives an object that each process has a name that stands for it in calls; None takes the name
  back. Of trained weights, the KEPT named last are held.
  """
  if distributed.count() == 1:
    return
  _state.shared.pop(name, None)
  if value is not None:
    _state.shared[name] = value
  trained = [other for other in _state.shared if other.startswith(WEIGHTS)]
  for old in trained[:-KEPT]:
    del _state.shared[old]


def everywhere(function: F) -> F:
  """Marks a function of a module for all processes to run when process 0 calls it, in the same
  order; process 0 has the result.
  """

  @functools.wraps(function)
  def run(*args: Any, **options: Any) -> Any:
    if not _state.leads:
      return function(*args, **options)
    name = f"{function.__module__}:{function.__qualname__}"
    _send({"call": name, "args": encode(args), "options": encode(options)})
    _state.leads = False
    try:
      found = distributed.in_turn(function(*args, **options))
    finally:
      _state.leads = True
    distributed.barrier(name)
    return found

  return run


@contextlib.contextmanager
def leading(**shared: Any) -> Iterator[None]:
  """While the block runs, process 0 leads; the others are in `follow`, with the same names. Nothing
  if there is one process.
  """
  if distributed.count() == 1:
    yield
    return
  for name, value in shared.items():
    share(name, value)
  _state.leads = True
  try:
    yield
  finally:
    _state.leads = False
    _state.shared.clear()
  _send({"call": None})  # not after an error, which `watch.failed` tells


def follow(**shared: Any) -> None:
  """Takes part in what process 0 calls, until it has come to its end; `shared` are this process's
  own of what has these names there.
  """
  for name, value in shared.items():
    share(name, value)
  while True:
    text = distributed.wait(_key(), "process 0", float("inf"))
    _state.calls += 1
    told = json.loads(text)
    if told["call"] is None:
      _state.shared.clear()
      return
    module, _, name = told["call"].partition(":")
    if module.partition(".")[0] != _TOP:
      raise ValueError(f"process 0 calls {told['call']!r}, which is none of this package's")
    function = getattr(importlib.import_module(module), name)
    distributed.in_turn(function(*decode(told["args"]), **decode(told["options"])))
    distributed.barrier(told["call"])


def _key() -> str:
  return f"oel_jax/call/{_state.calls}"


def _send(message: dict[str, Any]) -> None:
  """To all others; each call ends with a barrier, so the one before has been read by all."""
  client = distributed.runtime.global_state.client
  client.key_value_set(_key(), json.dumps(message))
  if _state.calls:
    client.key_value_delete(f"oel_jax/call/{_state.calls - 1}")
  _state.calls += 1


def encode(value: Any) -> Any:
  """A value as JSON has it, from which `decode` makes an equal one, types included.

  Raises:
    TypeError: it is none that travels.
  """
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  for name, known in _state.shared.items():
    if known is value:
      return {"shared": name}
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, list):
    return [encode(item) for item in value]
  if isinstance(value, tuple) and type(value) is tuple:
    return {"tuple": [encode(item) for item in value]}
  if isinstance(value, dict):
    return {"dict": [[name, encode(item)] for name, item in value.items()]}
  if isinstance(value, range):
    return {"range": [value.start, value.stop, value.step]}
  if isinstance(value, array.array):
    return {"array": [value.typecode, *value]}
  if isinstance(value, pathlib.Path):
    return {"path": str(value)}
  if hasattr(value, "params") and hasattr(value, "replace"):
    return {"policy": encode(value.params)}
  kind = type(value)
  if dataclasses.is_dataclass(value) and kind.__module__.partition(".")[0] == _TOP:
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": encode(fields)}
  if callable(value):
    return None
  raise TypeError(f"{kind.__name__} is nothing that one process can tell another")


def decode(value: Any) -> Any:
  """What `encode` was given."""
  if isinstance(value, list):
    return [decode(item) for item in value]
  if not isinstance(value, dict):
    return value
  kind, inner = next(iter(value.items()))
  if kind == "shared":
    return _state.shared[inner]
  if kind == "tuple":
    return tuple(decode(item) for item in inner)
  if kind == "dict":
    return {name: decode(item) for name, item in inner}
  if kind == "range":
    return range(*inner)
  if kind == "array":
    return array.array(inner[0], inner[1:])
  if kind == "path":
    return pathlib.Path(inner)
  if kind == "policy":
    return _state.shared["policy"].replace(decode(inner))
  module, _, name = inner.partition(":")
  assert module.partition(".")[0] == _TOP
  return getattr(importlib.import_module(module), name)(**decode(value["fields"]))
