"""One run in several processes, through JAX's own distributed runtime: its start, and what the
processes tell each other.

Process 0 is the one that writes. What is told goes through the key-value store of JAX's
coordination service, which process 0 serves, as JSON: lists of token ids, flags, errors. Arrays go
through XLA's collectives.

How all end when one does is in `runtime.watch`.
"""

import hashlib
import itertools
import json
import pathlib
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from absl import logging

# The client has no public name; multihost_utils and Orbax take it from there, too.
from jax._src import distributed as runtime

from oel_jax.runtime import watch
from oel_jax.runtime.finite import NotFiniteError

SLICE = 2.0  # of a wait: meanwhile Python handles no signals
TELL = 60.0  # of a wait, until it is told what is waited for
DEADLINE = 4 * 3600.0  # of a wait for what others are doing: they are known to live
NONCE = ".processes"  # in the run directory, while it is found out whether all see the same

_KINDS = {kind.__name__: kind for kind in (ValueError, OSError, RuntimeError, NotFiniteError)}
TAKEN = (
  "--process_id is 0, and something listens at {} already: another process has this id, or "
  "--coordinator_address needs another port"
)
T = TypeVar("T")


def start(
  *,
  detect: bool,
  coordinator: str | None,
  processes: int | None,
  process: int | None,
  timeout: float,
) -> None:
  """Makes this process one of several, if it is asked to; before JAX has looked for its devices.

  Args:
    detect: whether JAX is to find out about the others from the cluster: TPU, GKE, SLURM, MPI.
    coordinator: HOST:PORT, where process 0 is to listen.
    processes: how many there are.
    process: which this is, from 0.
    timeout: seconds in which all must have come.

  Raises:
    ValueError: the arguments do not say who the processes are.
    RuntimeError: no cluster is found, or not all processes have come.
  """
  given = {
    "--coordinator_address": coordinator,
    "--num_processes": processes,
    "--process_id": process,
  }
  missing = [name for name, value in given.items() if value is None]
  if not detect and len(missing) == len(given) or processes == 1:
    return
  if missing and not detect:
    raise ValueError(
      f"{' and '.join(missing)} must be given, too: a run in several processes needs all of "
      f"{', '.join(given)}, or --distributed alone where JAX knows the cluster"
    )
  if processes is not None and process is not None and not 0 <= process < processes:
    raise ValueError(
      f"--process_id is {process}, and --num_processes {processes}: it must be from 0 to "
      f"{processes - 1}"
    )
  if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
    raise ValueError(f"--coordinator_address is {coordinator!r}: it must be HOST:PORT")
  if coordinator is not None and process is not None:
    # JAX would end the process, in words of its own.
    _reach(coordinator, timeout) if process else _refuse_taken(coordinator)
  # It would take SIGTERM, which ends a run in this package's own way (`runtime.signals`).
  jax.config.update("jax_enable_preemption_service", False)
  watch.tell_of_abort(
    f"not all processes have come together in {timeout:g} s, or two have one --process_id: start "
    "one with each from 0 to --num_processes less one, all with one --coordinator_address"
  )
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      initialization_timeout=max(1, round(timeout)),
      shutdown_timeout_seconds=60,
    )
  except (RuntimeError, ValueError, KeyError, OSError) as error:
    raise RuntimeError(_not_started(error, coordinator, processes, process)) from error
  if count() > 1:
    if not is_writer():
      logging.set_verbosity(logging.ERROR)  # what process 0 says, too
    watch.begin()


def _reach(address: str, timeout: float) -> None:
  """Returns when somebody listens there."""
  end = time.monotonic() + timeout
  while (why := _refusal(address)) is not None:
    if time.monotonic() > end:
      raise RuntimeError(
        f"--coordinator_address is {address!r}: nobody has listened there for {timeout:g} s "
        f"({why}): start the process with --process_id=0 on that host, and give all processes the "
        "same address"
      )
    time.sleep(0.2)


def _refuse_taken(address: str) -> None:
  if _refusal(address) is None:
    raise RuntimeError(TAKEN.format(address))


def _refusal(address: str) -> str | None:
  """Why nobody can be reached there; None if somebody can."""
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    return None
  except OSError as error:
    return error.strerror or str(error)


def _not_started(
  error: Exception, coordinator: str | None, processes: int | None, process: int | None
) -> str:
  """What is wrong, in words that name the flag."""
  said = " ".join(str(error).split())
  if coordinator is None:
    return (
      "--distributed: JAX finds no cluster that it knows here (TPU, GKE, SLURM, MPI): give "
      f"--coordinator_address, --num_processes and --process_id ({said:.300})"
    )
  if process == 0 and ("ddress already in use" in said or "Failed to start" in said):
    return TAKEN.format(coordinator)
  return f"process {process} of {processes} could not join the others at {coordinator}: {said:.300}"


def process() -> int:
  """Which process this is, from 0. Does not look for devices."""
  return runtime.global_state.process_id


def count() -> int:
  """How many processes the run has."""
  return runtime.global_state.num_processes


def is_writer() -> bool:
  """Whether this process writes the run's files, and tells what happens."""
  return process() == 0


def gather(value: T, name: str, deadline: float = DEADLINE) -> list[T]:
  """Returns each process's `value`, in their order; all must call it, one time after the other.

  Args:
    value: JSON-able, such as ragged lists of token ids.
    name: what is gathered, the same in all; errors and the log say it.
    deadline: seconds to wait for the others.

  Raises:
    RuntimeError: one has not come in time, or has come to something else; says which and where.
  """
  if count() == 1:
    return [value]
  number, client = next(_numbers), runtime.global_state.client
  key = lambda number, process: f"oel_jax/gather/{number}/{process}"
  client.key_value_set(key(number, process()), json.dumps([name, value]))
  found = [
    json.loads(wait(key(number, other), f"process {other} of {count()} at {name!r}", deadline))
    for other in range(count())
  ]
  # All have come here, so all have read what was gathered before.
  if number:
    client.key_value_delete(key(number - 1, process()))
  for other, (at, _) in enumerate(found):
    if at != name:
      raise RuntimeError(f"process {process()} is at {name!r}, and process {other} at {at!r}")
  return [value for _, value in found]


def barrier(name: str, deadline: float = DEADLINE) -> None:
  """Returns when all processes have come here; arguments and errors as in `gather`."""
  gather(None, name, deadline)


def anywhere(flag: bool, name: str) -> bool:
  """Whether the flag is set in any of the processes; the same answer in all."""
  return any(gather(flag, name))


def gather_done(work: Callable[[], T], name: str) -> list[T]:
  """`gather` of what each process's `work` returns.

  Raises:
    Exception: what it raised here; else, as this process may tell it, what it raised elsewhere. So
      none waits for one that has failed.
  """
  found, failure = None, None
  try:
    found = work()
  except Exception as error:
    failure = error
  told = failure and [type(failure).__name__, str(failure), list(getattr(failure, "prompts", ()))]
  results = gather([told, found], name)
  if failure is not None:
    raise failure
  for other, (told, _) in enumerate(results):
    if told:
      kind, text, prompts = told
      text = f"process {other} of {count()}: {text}"
      raise (
        NotFiniteError(text, prompts)
        if kind == NotFiniteError.__name__
        else _KINDS.get(kind, RuntimeError)(text)
      )
  return [found for _, found in results]


def wait(key: str, what: str, deadline: float) -> str:
  """Returns what stands at `key` of the store, once it does; `what` is waited for.

  Raises:
    RuntimeError: it has not come in `deadline` seconds.
  """
  started = told = time.monotonic()
  turn = round(1000 * min(SLICE, deadline))  # milliseconds
  while True:
    try:
      return runtime.global_state.client.blocking_key_value_get(key, turn)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        watch.explain()  # the other thread, which knows better than the store
        raise RuntimeError(
          f"waiting for {what}: the coordination service does not answer ({error})"
        ) from error
    now = time.monotonic()
    if now - started > deadline:
      raise RuntimeError(f"{what} has not come for {deadline:g} s")
    if now - told > TELL:
      told = now
      logging.info("process %d waits for %s, %.0f s so far", process(), what, now - started)


def in_turn(found: T) -> T:
  """Returns the arrays that a program over all processes makes, on a CPU once they are made.

  XLA (JAX 0.10.2) runs programs side by side on a process's CPU devices, and their messages to
  other processes cross: of two that nothing else orders, both wait for ever. On a GPU or TPU they
  run one after another.
  """
  if count() > 1 and jax.default_backend() == "cpu":
    jax.block_until_ready(found)
  return found


def compare(
  values: dict[str, Any],
  right: str = "all processes must be started with the same command, from the same code",
) -> None:
  """Raises ValueError, in all processes, unless all have the same of each; names the first that
  differ, and says what would be `right`.
  """
  found = gather(values, "the start")
  for other, theirs in enumerate(found[1:], start=1):
    names = sorted(
      name
      for name in found[0].keys() | theirs.keys()
      if json.dumps(found[0].get(name)) != json.dumps(theirs.get(name))
    )
    if names:
      told = "; ".join(
        f"{name} is {found[0].get(name)!r:.100} in process 0 and {theirs.get(name)!r:.100} in "
        f"process {other}"
        for name in names[:4]
      )
      raise ValueError(f"{told}{' and more' if len(names) > 4 else ''}: {right}")


def code_version() -> str:
  """16 hexadecimal digits of this package's source, and JAX's version."""
  top = pathlib.Path(__file__).parents[1]
  found = hashlib.sha256()
  for path in sorted(top.rglob("*.py")):
    found.update(str(path.relative_to(top)).encode() + b"\0" + path.read_bytes() + b"\0")
  return f"{found.hexdigest()[:16]} with JAX {jax.__version__}"


def check_shared(folder: pathlib.Path, *, make: bool = True, patience: float = 10.0) -> None:
  """Raises ValueError, in all processes, unless all see in `folder` what process 0 writes there. It
  is made if need be, or if not `make`, refused; a networked store may need `patience` seconds.
  """
  path, made = folder / NONCE, secrets.token_hex(8)

  def write() -> str:
    if is_writer():
      if make:
        folder.mkdir(parents=True, exist_ok=True)
      elif not folder.is_dir():
        raise ValueError(f"--workdir is {str(folder)!r}: there is no such directory")
      path.write_text(made)
    return made

  made = gather_done(write, "the run directory")[0]
  end = time.monotonic() + patience
  while not (seen := path.is_file() and path.read_text() == made) and time.monotonic() < end:
    time.sleep(0.2)
  all_seen = gather(seen, "the look at the run directory")
  if is_writer():
    path.unlink(missing_ok=True)
  if not all(all_seen):
    blind = ", ".join(str(other) for other, sees in enumerate(all_seen) if not sees)
    raise ValueError(
      f"--workdir is {str(folder)!r}, and process {blind} does not see what process 0 writes "
      "there: it must be on storage that all processes share, at the same path"
    )


def finish() -> None:
  """Lets go of the other processes when all have come to their end."""
  if count() > 1:
    barrier("the end")
    watch.stop()
    jax.distributed.shutdown()


_numbers = itertools.count()
