"""What a person at the terminal sees: bars with the time left, and tables. In a log file: one line
where a stage ends.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rich.console
import rich.progress
import rich.table

_COLUMNS = (
  "[progress.description]{task.description}",
  rich.progress.BarColumn(),
  rich.progress.MofNCompleteColumn(),
  rich.progress.TimeElapsedColumn(),
  "left",
  rich.progress.TimeRemainingColumn(),
)


@contextlib.contextmanager
def bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
  """Shows a stage's progress while the `with` block runs.

  Args:
    name: what is being done, e.g. "round 1: deploy".
    total: how many pieces of work it has.

  Yields:
    advance(n=1): tells that n more pieces are done.
  """
  # Made here, since stdout may have been redirected after the import; and of this stdout, since a
  # game's is redirected.
  console = rich.console.Console(file=sys.stdout)
  done = 0
  start = time.monotonic()
  with contextlib.ExitStack() as stack:
    shown = None
    if console.is_terminal:
      shown = stack.enter_context(
        rich.progress.Progress(*_COLUMNS, console=console, transient=True)
      )
      task = shown.add_task(name, total=total)

    def advance(n: int = 1) -> None:
      nonlocal done
      done += n
      if shown is not None:
        shown.update(task, completed=done)

    yield advance
  print(f"{name}: {done} of {total} in {time.monotonic() - start:.1f} s", flush=True)


def table(rows: Sequence[dict[str, Any]], title: str) -> None:
  """Prints one line a row; the columns are the keys in the order they first appear. Floats show
  four significant digits, None a dash.
  """

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
