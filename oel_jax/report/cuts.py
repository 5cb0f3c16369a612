"""Responses that the limit of tokens cut, wherever a round had any: on the page and in
results.json.
"""

from oel_jax.report.measures import Measure
from oel_jax.report.parts import label, note, share_cell, table
from oel_jax.report.records import Evaluation, Run

# What had responses → what the page calls it, in the order of a round.
COLUMNS = {
  "knowledge": "Games for knowledge",
  "prompts": "Games for prompts",
  "consolidation": "Training samples",
  "without": "Held-out games",
  "in_context": "In context, before",
  "after_in_context": "In context, after",
  "first_knowledge": "Round 1’s knowledge, after",
  "held_out_before": "Held-out prompts, before",
  "held_out_after": "Held-out prompts, after",
}


def cuts(run: Run) -> str:
  """HTML of a table, a line a round; without the columns that no round has."""
  found = {n: measured(run, each) for n, each in sorted(run.evaluations.items())}
  names = [name for name in COLUMNS if any(name in shares for shares in found.values())]
  if not names:
    return note("Not measured.")
  lines = [
    [f"<td>{label(number)}</td>", *(share_cell(shares.get(name)) for name in names)]
    for number, shares in found.items()
  ]
  about = (
    "Responses with all the tokens that deployment.max_response_tokens allows. Where they are "
    "many, what comes last in an answer is lost: its action, or the end of what it says."
  )
  return table(("Round", *(COLUMNS[name] for name in names)), lines) + note(about)


def measured(run: Run, evaluation: Evaluation) -> dict[str, Measure]:
  """The shares of a round's responses that were cut, by the names in COLUMNS; those that were not
  counted, by an earlier version say, are absent.
  """
  plays = ("without", "in_context", "after_in_context", "first_knowledge")
  found = evaluation.deployed_cut | {"consolidation": _samples(run, evaluation.round)}
  found |= {name: play.cut for name in plays if (play := getattr(evaluation, name))}
  if away := evaluation.held_out:
    found |= {"held_out_before": away.cut_before, "held_out_after": away.cut_after}
  return {name: share for name, share in found.items() if share and share.value is not None}


def _samples(run: Run, number: int) -> Measure | None:
  """Of all of the round's training samples, as its steps tell of theirs."""
  size = run.config.get("consolidation.batch_size")
  steps = [step for step in run.steps if step["round"] == number and "cut" in step]
  if not steps or type(size) is not int:
    return None
  counts = [step.get("samples", size) for step in steps]
  hits = round(sum(step["cut"] * count for step, count in zip(steps, counts, strict=True)))
  return Measure(hits / sum(counts), sum(counts), None, hits)
