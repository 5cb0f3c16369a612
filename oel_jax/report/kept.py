"""What the model kept of what it could do before, on the page: shares of the tasks that a
configuration names, and of their parts; how far it is from the base where nothing was to be
learned; how sure it is of its own answers.
"""

from oel_jax.report.parts import escape, label, mean_cell, minus, note, share_cell, table
from oel_jax.report.records import Run


def kept(run: Run) -> str:
  """HTML of each round's tasks, folded of the parts that they are made up of, and of the divergence
  from the base.
  """
  return "<h3>What else the model can do</h3>" + _tasks(run) + _unrelated(run) + _own_answers(run)


def _tasks(run: Run) -> str:
  if not run.tasks:
    return note("Not measured.")
  lines = [
    [f"<td>{label(number)}</td>", *(share_cell(found.retention.get(task)) for task in run.tasks)]
    for number, found in sorted(run.evaluations.items())
  ]
  head = ("Round", *(escape(task.capitalize()) for task in run.tasks))
  return table(head, lines) + "".join(_parts(run, task) for task in run.tasks)


def _unrelated(run: Run) -> str:
  """How far each round's model is from the base; "" if it was not measured."""
  lines = [
    [
      f"<td>{label(number)}</td>",
      f"<td>{away.prompts}</td>",
      f"<td>{minus(f'{away.kl:z.4f}')}</td>",
      mean_cell(away.response_tokens, "answers"),
    ]
    for number, found in sorted(run.evaluations.items())
    if (away := found.unrelated)
  ]
  if not lines:
    return ""
  about = note(
    "KL from the model to the one that the run began with, neither with knowledge in its prompt, "
    "in nats a token of the model’s own answers to prompts that have nothing to do with what was "
    "learned: 0 is no change."
  )
  head = ("Round", "Prompts", "KL to the base", "Tokens an answer")
  return "<h3>Unrelated prompts</h3>" + table(head, lines) + about


def _own_answers(run: Run) -> str:
  """How sure each round's model is of its own answers; "" if it was not measured."""
  measured = {
    number: sure for number, found in sorted(run.evaluations.items()) if (sure := found.own_answers)
  }
  lines = [
    [
      f"<td>{label(number)}</td>",
      f"<td>{sure.prompts}</td>",
      f"<td>{sure.entropy:.4f}</td>",
      f"<td>{100 * sure.topk_mass:.2f}%</td>",
      f"<td>{minus(f'{sure.kl:z.4f}')}</td>",
    ]
    for number, sure in measured.items()
  ]
  if not lines:
    return ""
  k = next(iter(measured.values())).k
  about = note(
    "Means over the tokens of the model’s own answers to the first prompts of held-out games, "
    "without knowledge: entropy and KL to the model that the run began with in nats a token, and "
    f"the mass on the {k} likeliest tokens."
  )
  head = ("Round", "Prompts", "Entropy", f"Top-{k} mass", "KL to the base")
  return "<h3>How sure it is of its own answers</h3>" + table(head, lines) + about


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
