"""What a person at the terminal sees: bars with the time left, and tables. In a log file: one line
where a stage ends.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

LINE_SECONDS = 10  # between two lines, where the output is no terminal


@contextlib.contextmanager
def bar(name: str, total: int, compiles: Any = None) -> Iterator[Callable[..., None]]:
  """Shows a stage's progress while the `with` block runs.

  On a terminal a bar, elsewhere a line every LINE_SECONDS in which something was done: what is
  done, the note, seconds a piece and time left, both without what compiling took. And which program
  is waited for while it is compiled: how many will be is not known beforehand.

  Args:
    name: what is being done, e.g. "round 1: deploy".
    total: how many pieces of work it has; 0: they are not counted.
    compiles: a `metrics.CompileCounter`, which tells of programs that are compiled; None: nobody
      does.

  Yields:
    advance(n=1, note=""): tells that n more pieces are done, and something about the last of them,
      e.g. "loss 0.21".
  """
  import rich.console  # here, for it takes a while

  # Made here, since stdout may have been redirected after the import; and of this stdout, since a
  # game's is redirected.
  console = rich.console.Console(file=sys.stdout)
  start = time.monotonic()
  with contextlib.ExitStack() as stack:
    shown = stack.enter_context(_bar(console)) if console.is_terminal else None
    stage = _Stage(name, total, shown)
    if compiles is not None:
      stack.enter_context(compiles.telling(stage.compiling))
    yield stage.advance
  done = f"{stage.done} of {total} in" if total else "ended after"
  print(f"{name}: {done} {time.monotonic() - start:.1f} s", flush=True)


class _Stage:
  """What a bar, or lines in its place, say of a stage; programs are compiled in several threads.

  Attributes:
    done: pieces of work.
  """

  def __init__(self, name: str, total: int, shown: Any):
    """`shown` is the bar, or None."""
    self.done = 0
    self._name, self._total, self._shown = name, total, shown
    self._task = shown.add_task(name, total=total or None) if shown is not None else None
    self._told, self._note = time.monotonic(), ""
    self._begun: tuple[float, int] | None = None  # when and how many at the first call
    self._lock, self._under_way, self._since = threading.Lock(), 0, 0.0
    self._programs, self._compiled = 0, 0.0  # programs, and seconds in which any was compiled

  def advance(self, n: int = 1, note: str = "") -> None:
    now, self._note = time.monotonic(), note
    self.done += n
    # What comes before the first piece is done is mostly preparation.
    self._begun = self._begun or (now - self._compiled, self.done)
    if self._shown is not None:
      self._describe(note)
      return
    spent = now - self._compiled - self._begun[0]
    # Pieces that end at the same moment, as soon as the first ones do, say nothing of how long.
    if min(spent, now - self._told) >= LINE_SECONDS and self._begun[1] < self.done < self._total:
      each = spent / (self.done - self._begun[1])
      left = _clock((self._total - self.done) * each)
      said = f"{note}, " if note else ""
      self._tell(f"{self.done} of {self._total}, {said}{each:.2f} s each, {left} left", now)

  def compiling(self, program: str) -> None:
    """A program begins to be compiled; "": one is there."""
    with self._lock:
      now = time.monotonic()
      if program:
        self._since = self._since if self._under_way else now
        self._under_way += 1
      elif not self._under_way:
        return  # it began before this stage
      else:
        self._programs += 1
        self._under_way -= 1
        self._compiled += 0 if self._under_way else now - self._since
      self._tell_compiling(program, now)

  def _tell_compiling(self, program: str, now: float) -> None:
    count = f"{self._programs} program{'' if self._programs == 1 else 's'}"
    if self._shown is not None:
      so_far = f", {count} so far" if self._programs else ""
      self._describe(f"compiling {program}{so_far}" if program else self._note)
    elif program and not self._programs and self._under_way == 1:
      then = f", then {self._total} to do" if self._total else ""
      self._tell(f"compiling {program}{then}", now)
    elif not program and now - self._told >= LINE_SECONDS:
      done = f", {self.done} of {self._total}" if self._total else ""
      self._tell(f"{count} compiled in {self._compiled:.0f} s{done}", now)

  def _describe(self, note: str) -> None:
    said = f"{self._name}: {note}" if note else self._name
    self._shown.update(self._task, completed=self.done, description=said)

  def _tell(self, line: str, now: float) -> None:
    print(f"{self._name}: {line}", flush=True)
    self._told = now


def _bar(console: Any) -> Any:
  """Returns a rich.progress.Progress that vanishes at its end."""
  from rich import progress

  return progress.Progress(
    "[progress.description]{task.description}",
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TimeElapsedColumn(),
    "left",
    progress.TimeRemainingColumn(),
    console=console,
    transient=True,
  )


def _clock(seconds: float) -> str:
  """Returns 0:05, 12:30 or 1:02:03."""
  hours, rest = divmod(round(seconds), 3600)
  minutes, seconds = divmod(rest, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def table(rows: Sequence[dict[str, Any]], title: str) -> None:
  """Prints one line a row; the columns are the keys in the order they first appear. Floats show
  four significant digits, None a dash.
  """

  import rich.console
  import rich.markup
  import rich.table

  def cell(value: Any) -> str:
    if value is None:
      return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

  names = list(dict.fromkeys(name for row in rows for name in row))
  shown = rich.table.Table(title=title, title_justify="left")
  for name in names:
    numbers = all(isinstance(row.get(name), (int, float, type(None))) for row in rows)
    shown.add_column(
      rich.markup.escape(name), justify="right" if numbers else "left", overflow="fold"
    )
  for row in rows:
    shown.add_row(*(rich.markup.escape(cell(row.get(name))) for name in names))
  console = rich.console.Console()
  if not console.is_terminal:
    console.width = 160  # a log file has no width of its own; rich would take 80 and fold the cells
  console.print(shown)
