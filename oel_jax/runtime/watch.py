"""How the processes of a run end when one of them does.

A process that fails, or is stopped by a signal, tells the others why (`failed`); one that is killed
is missed after LOST seconds. A thread in each process looks for both, for the main one may wait in
a collective, which nothing interrupts, and ends the process with one line and status 2. Where
process 0 is killed, JAX aborts the others at once, with a stack trace, and lets nobody take part in
that: the same line comes after it (`tell_of_abort`).
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

import jax

# The client has no public name; multihost_utils and Orbax take it from there, too.
from jax._src import distributed as runtime

from oel_jax.runtime import signals

LOST = 40.0  # seconds without a sign of life
BEAT = 2.0  # between two looks of the thread
GRACE = 3.0  # for a process that is told of an end to tell its own, which may say more
LINGER = 10.0  # that process 0 stays after its end, for the others to read of it
AGAIN = "the same command in all of them goes on from there"

# Folders of the coordination service's store.
_ALIVE, _ENDED, _READ = "oel_jax/alive", "oel_jax/ended", "oel_jax/read"
_on_abort = None


def begin() -> None:
  """Starts the thread, once all processes are there."""
  why = "most likely since another has ended, or one more has come with a --process_id of theirs"
  tell_of_abort(f"JAX has aborted it, {why}: {AGAIN}")
  _watch.begin()
  signals.before_end(failed)


def stop() -> None:
  """Stops looking: all have come to their end."""
  _watch.running = False


def failed(text: str, status: int = 2) -> None:
  """Tells the other processes that this one ends, and why, and ends it; nothing if there are none.

  Not by an exception: on its way out JAX would wait for those that may wait for this one.
  """
  if runtime.global_state.num_processes == 1:
    return
  if not _watch.running:  # not all have come together, or all have gone
    _flush()
    os._exit(status)
  _watch.end(f"{_name()}: {text}", status)


def explain() -> None:
  """For a main thread that met an error in what all have a part in: gives the other thread the time
  to find out which of them has ended, and to say so and end this one.
  """
  if _watch.running:
    # The last sign of life was seen up to two looks ago, and the next look may be one away.
    time.sleep(LOST + 3 * BEAT + GRACE)
    _watch.let_end()


def _name(process: int | None = None) -> str:
  """This process, or another, in words."""
  own, count = runtime.global_state.process_id, runtime.global_state.num_processes
  return f"process {own if process is None else process} of {count}"


def tell_of_abort(means: str) -> None:
  """Has the process end with a line that says what it means, and status 2, where JAX aborts it.

  Python's own handlers run in the main thread, which an abort never comes back to; and a callback
  of JAX's client (its missed_heartbeat_callback, JAX 0.10.2) ends in an error of its own.
  """

  def end(number: int) -> None:
    del number
    os.write(2, f"error: {_name()}: {means}\n".encode())
    os._exit(2)

  global _on_abort  # C holds it, which Python does not know
  _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
  library = ctypes.CDLL(None)
  library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  library.signal(int(signal.SIGABRT), ctypes.cast(_on_abort, ctypes.c_void_p))


class _Watch:
  """The thread that shows the others that this process lives, and ends it when one of them does
  not.
  """

  def __init__(self) -> None:
    self.running = False
    self._ending = threading.Lock()

  def begin(self) -> None:
    """Starts it, once all processes are there."""
    self.running = True
    threading.Thread(target=self._look, daemon=True).start()

  def end(self, why: str, status: int) -> NoReturn:
    """Tells the others why, unless somebody has told them before, and ends this process."""
    # Nobody else ends it meanwhile; a signal may come while this thread has the lock.
    self._ending.acquire(timeout=LINGER)
    self._tell(why)
    self._leave(status)

  def let_end(self) -> None:
    """Waits for the end of this process, if the thread is at that: it has said why."""
    if self._ending.acquire(timeout=GRACE + LINGER):
      self._ending.release()

  def _look(self) -> None:
    client, seen, beat = runtime.global_state.client, {}, 0
    while self.running:
      beat += 1
      try:
        client.key_value_set(
          f"{_ALIVE}/{runtime.global_state.process_id}", str(beat), allow_overwrite=True
        )
        why = _there(client, _ENDED)
        if why is None and runtime.global_state.process_id == 0:
          why = self._missed(client, seen)
      except jax.errors.JaxRuntimeError:
        why = f"{_name(0)} is not there any more"
      if why is not None and self.running:
        time.sleep(GRACE)
        self._ending.acquire()
        os.write(2, f"error: another process has ended: {why}; {AGAIN}\n".encode())
        self._tell(why)
        self._leave(2)
      time.sleep(BEAT)

  def _missed(self, client: Any, seen: dict[str, tuple[str, float]]) -> str | None:
    """Says which process has shown no sign of life; `seen` is what was seen of each, and when."""
    now = time.monotonic()
    beats = dict(client.key_value_dir_get(_ALIVE))
    for other in range(1, runtime.global_state.num_processes):
      key = f"{_ALIVE}/{other}"
      if seen.get(key, ("", 0.0))[0] != beats.get(key, "none"):
        seen[key] = beats.get(key, "none"), now
      elif now - seen[key][1] > LOST:
        return f"{_name(other)} has shown no sign of life for {LOST:.0f} s"
    return None

  def _tell(self, why: str) -> None:
    # Refused if another has told before; or nobody is left to be told.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      runtime.global_state.client.key_value_set(f"{_ENDED}/why", why)

  def _leave(self, status: int) -> NoReturn:
    """Process 0 stays until the others have read why, for the store goes with it."""
    client, end = runtime.global_state.client, time.monotonic() + LINGER
    _flush()
    try:
      client.key_value_set(f"{_READ}/{runtime.global_state.process_id}", "", allow_overwrite=True)
      while runtime.global_state.process_id == 0 and time.monotonic() < end:
        if len(client.key_value_dir_get(_READ)) == runtime.global_state.num_processes:
          break
        time.sleep(0.2)
    except jax.errors.JaxRuntimeError:
      pass
    os._exit(status)


def _flush() -> None:
  with contextlib.suppress(RuntimeError):  # a signal has come in the middle of a print
    sys.stdout.flush()


def _there(client: Any, key: str) -> str | None:
  """What stands at `key`; None if nothing does."""
  found = dict(client.key_value_dir_get(key))
  return next(iter(found.values()), None)


_watch = _Watch()
