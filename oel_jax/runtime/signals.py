"""How a run ends when it is told to: by SIGTERM (a scheduler, `kill`) and by SIGINT (Ctrl-C).

Each gives one line and no traceback.

What is written is whole at every moment, so a process may end anywhere, and the same command goes
on. Training keeps the steps since its last checkpoint, too: it has SIGTERM wait for the end of a
step (`deferred`).
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator


class Terminated(SystemExit):
  """SIGTERM came while training, and what was done is saved: ends the process with status 143.

  Its text says what is saved.
  """

  def __init__(self, text: str):
    super().__init__(text)
    self.code = 128 + signal.SIGTERM


def install() -> None:
  """Has SIGTERM and SIGINT end this process at once: one line on stderr, status 143 or 130."""
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _end)
  # For the process that looks after shared memory, which inherits this: it frees what is left, and
  # would say so in lines of its own.
  sys.warnoptions.append("ignore:resource_tracker:UserWarning")


_tell: Callable[[str, int], None] | None = None


def before_end(tell: Callable[[str, int], None]) -> None:
  """Has `tell` called with what a signal has done and the status to end with, after the line and
  before the end. It may end the process itself.
  """
  global _tell
  _tell = tell


def _end(number: int, frame: object) -> None:
  """Ends the process as it is.

  An exception would wait for threads that sample, and libraries would print theirs on the way out.
  """
  del frame
  name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
  shown = "\x1b[?25h\n" if sys.stdout.isatty() else ""  # a progress bar has hidden the cursor
  # Not print, whose buffer this signal may have come in the middle of.
  told = f"{shown}stopped by {name}: give the same command again to go on from what is written\n"
  os.write(2, told.encode())
  for child in multiprocessing.active_children():
    child.kill()
  if _tell is not None:
    _tell(f"stopped by {name}", 128 + number)
  os._exit(128 + number)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
  """Has the first SIGTERM wait while the `with` block runs; a second one does what it did before.

  A block that comes to its end although SIGTERM has come is ended by it then; one that raises
  `Terminated` has taken care of it.

  Yields:
    came: whether SIGTERM has come. Outside of the main thread, where Python handles no signals, it
      never has.
  """
  if threading.current_thread() is not threading.main_thread():
    yield lambda: False
    return
  came = False
  # None stands for a handler that is not Python's, which cannot be put back.
  before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

  def note(number: int, frame: object) -> None:
    del number, frame
    nonlocal came
    came = True
    signal.signal(signal.SIGTERM, before)

  signal.signal(signal.SIGTERM, note)
  try:
    yield lambda: came
  finally:
    signal.signal(signal.SIGTERM, before)
  if came:  # after the last look at it: it must not be lost
    signal.raise_signal(signal.SIGTERM)
