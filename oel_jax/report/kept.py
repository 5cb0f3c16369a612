"""What the model kept of what it could do before, on the page: shares of the tasks that a
configuration names, and of their parts.
"""

from oel_jax.report.parts import escape, label, note, share_cell, table
from oel_jax.report.records import Run


def kept(run: Run) -> str:
  """HTML of each round's tasks, and folded of the parts that they are made up of."""
  title = "<h3>What else the model can do</h3>"
  if not run.tasks:
    return title + note("Not measured.")
  lines = [
    [f"<td>{label(number)}</td>", *(share_cell(found.retention.get(task)) for task in run.tasks)]
    for number, found in sorted(run.evaluations.items())
  ]
  head = ("Round", *(escape(task.capitalize()) for task in run.tasks))
  return title + table(head, lines) + "".join(_parts(run, task) for task in run.tasks)


def _parts(run: Run, task: str) -> str:
  """A task's parts, one a line and folded; "" if it has none."""
  rounds = {
    number: parts
    for number, found in sorted(run.evaluations.items())
    if (parts := found.retention_categories.get(task))
  }
  names = dict.fromkeys(name for parts in rounds.values() for name in parts)
  if not names:
    return ""
  lines = [
    [f"<td>{_words(name)}</td>", *(share_cell(parts.get(name)) for parts in rounds.values())]
    for name in names
  ]
  head = ("", *map(label, rounds))
  told = f"{_words(task)}, part by part"
  return f"<details><summary>{told}</summary>{table(head, lines)}</details>"


def _words(name: str) -> str:
  return escape(name.replace("_", " ").capitalize())
