"""What a person at the terminal sees: bars with the time left, and tables. In a log file: one line
where a stage ends.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

LINE_SECONDS = 10  # between two lines, where the output is no terminal


@contextlib.contextmanager
def bar(name: str, total: int, first: str = "") -> Iterator[Callable[..., None]]:
  """Shows a stage's progress while the `with` block runs.

  On a terminal a bar, elsewhere a line every LINE_SECONDS in which something was done: what is
  done, the note, seconds a piece and time left.

  Args:
    name: what is being done, e.g. "round 1: deploy".
    total: how many pieces of work it has.
    first: what has to be done before the first piece, e.g. "compiling".

  Yields:
    advance(n=1, note=""): tells that n more pieces are done, and something about the last of them,
      e.g. "loss 0.21".
  """
  import rich.console  # here, for it takes a while

  # Made here, since stdout may have been redirected after the import; and of this stdout, since a
  # game's is redirected.
  console = rich.console.Console(file=sys.stdout)
  done, begun = 0, None  # begun: (when, done), of the first call: what comes before is compiling
  start = told = time.monotonic()
  with contextlib.ExitStack() as stack:
    shown = None
    if console.is_terminal:
      shown = stack.enter_context(_bar(console))
      task = shown.add_task(f"{name}: {first}" if first else name, total=total)
    elif first:
      print(f"{name}: {first}, then {total} to do", flush=True)

    def advance(n: int = 1, note: str = "") -> None:
      nonlocal done, begun, told
      now = time.monotonic()
      done += n
      begun = begun or (now, done)
      if shown is not None:
        shown.update(task, completed=done, description=f"{name}: {note}" if note else name)
      elif now - told >= LINE_SECONDS and begun[1] < done < total:
        told = now
        each = (now - begun[0]) / (done - begun[1])
        said = f"{note}, " if note else ""
        left = _clock((total - done) * each)
        print(f"{name}: {done} of {total}, {said}{each:.2f} s each, {left} left", flush=True)

    yield advance
  print(f"{name}: {done} of {total} in {time.monotonic() - start:.1f} s", flush=True)


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
