"""Whether a round's knowledge helps in context, on the page: its gate, and text by text."""

from oel_jax.report.gates import Gate, GateText
from oel_jax.report.parts import NONE, label, note, share_cell, table
from oel_jax.report.records import Run

_DECISIONS = {
  "train": "knowledge helps in context: trained on it",
  "warn": "no clear gain in context: trained on it all the same, with a warning",
  "skip": "no clear gain in context: not trained on it",
}


def in_context(run: Run) -> str:
  """HTML of each round's gate, and of its texts one by one."""
  unchecked = (*[NONE] * 4, '<td class="left none">not checked</td>')
  lines = [
    [f"<td>{label(number)}</td>", *(_gate(evaluation.gate) if evaluation.gate else unchecked)]
    for number, evaluation in sorted(run.evaluations.items())
    if number > 0
  ]
  if not lines:
    return note("Not measured yet.")
  about = note(
    "Measured before training, on games of its own: a model that cannot use the advice has nothing "
    "to consolidate."
  )
  head = ("Round", "Without knowledge", "With knowledge", "Cut, without", "Cut, with", "Decision")
  cut = note("Cut: responses that the limit of tokens ended, deployment.max_response_tokens.")
  by_text = "".join(_by_text(run)) + _in_context_by_text(run)
  return about + table(head, lines, left=["Decision"]) + cut + by_text


def _gate(gate: Gate) -> tuple[str, ...]:
  kind = {"train": "good", "warn": "warn", "skip": "off"}[gate.decision]
  pill = f'<span class="pill {kind}">{gate.decision}</span>'
  decision = f'<td class="left">{pill} {_DECISIONS[gate.decision]}</td>'
  with_knowledge = share_cell(gate.kept or gate.with_knowledge)
  cut = share_cell(gate.cut_without), share_cell(gate.cut_with)
  return share_cell(gate.without), with_knowledge, *cut, decision


def _by_text(run: Run) -> list[str]:
  """Each round's knowledge texts one by one, folded; open where one was left out."""
  blocks = []
  for number, evaluation in sorted(run.evaluations.items()):
    texts = evaluation.gate.texts if evaluation.gate else ()
    if not texts:
      continue
    out = [f"{text.number:02d}" for text in texts if text.left_out]
    told = f" · left out: {', '.join(out)}" if out else ""
    rows = [_text_cells(text) for text in texts]
    blocks.append(
      f"<details{' open' if out else ''}><summary>Round {number}, text by text"
      f'<span class="dim">{told}</span></summary>'
      + table(("Text", "With it", "Cut", "p that it hurts", ""), rows, left=[""])
      + "</details>"
    )
  if blocks:
    blocks.append(
      note(
        "Each text’s games against all games without knowledge: p is Fisher’s exact test, "
        "one-sided. A text with p below 5% divided by the number of texts hurts: it is left out "
        "of training and of the round’s share with knowledge."
      )
    )
  return blocks


def _in_context_by_text(run: Run) -> str:
  """The held-out games that each text of a round was given to, folded; with a gate or without."""
  blocks = []
  for number, evaluation in sorted(run.evaluations.items()):
    texts = evaluation.in_context.texts if evaluation.in_context else ()
    rows = [
      [f"<td>{name:02d}</td>", share_cell(passed), share_cell(cut)] for name, passed, cut in texts
    ]
    if rows:
      blocks.append(
        f"<details><summary>Round {number}, text by text, held-out games in context</summary>"
        + table(("Text", "Passed", "Cut"), rows)
        + "</details>"
      )
  return "".join(blocks)


def _text_cells(text: GateText) -> list[str]:
  pill = '<span class="pill off">left out</span>' if text.left_out else ""
  return [
    f"<td>{text.number:02d}</td>",
    share_cell(text.passed),
    share_cell(text.cut),
    f"<td>{text.p:.2g}</td>",
    f'<td class="left">{pill}</td>',
  ]
