"""The end of the page: knowledge texts, what each stage cost, the configuration."""

import json
import time
from collections.abc import Sequence
from typing import Any

from oel_jax.extraction.prompts import ITEM_MARK
from oel_jax.report.parts import NONE, escape, label, note, percent_of, show_seconds, show_si, table
from oel_jax.report.records import Cost, Run

# In the order of a round.
STAGES = ("deploy", "prefixes", "extract", "gate", "consolidate", "evaluate")


def knowledge(run: Run) -> str:
  """HTML of each round's texts, folded."""
  if not run.knowledge:
    return note("No knowledge has been extracted yet.")
  blocks = []
  for number, texts in sorted(run.knowledge.items()):
    inner = "".join(
      f'<details><summary>Text {escape(name)} <span class="dim">· {_size(text)}</span></summary>'
      + (f"<pre>{escape(text)}</pre>" if text.strip() else note("Empty."))
      + "</details>"
      for name, text in texts
    )
    plural = "text" if len(texts) == 1 else "texts"
    blocks.append(
      f'<details><summary>Round {number} <span class="dim">· {len(texts)} '
      f"{plural}</span></summary>{inner}</details>"
    )
  return note("The texts of each round, as they stand in its folder knowledge/.") + "".join(blocks)


def _size(text: str) -> str:
  items = sum(line.startswith(ITEM_MARK) for line in text.split("\n"))
  return (
    f"{items} item{'s' if items != 1 else ''}, " if items else ""
  ) + f"{len(text.split()):,} words"


def costs(run: Run) -> str:
  """HTML of seconds, tokens and FLOPs by stage, and by round, folded."""
  if not run.costs:
    return note("Not measured yet.")
  by_stage = {stage: [] for stage in STAGES} | {cost.stage: [] for cost in run.costs}
  for cost in run.costs:
    by_stage[cost.stage].append(cost)
  head = ("Stage", "Seconds", "Share of time", "Tokens", "Tokens a second", "FLOPs", "FLOP/s")
  head += ("Programs", "Seconds to compile")
  whole = sum(cost.seconds for cost in run.costs)
  total = _cost_cells("All rounds", run.costs, whole)
  lines = [_cost_cells(stage, costs, whole) for stage, costs in by_stage.items() if costs]
  each = []
  for number in sorted({cost.round for cost in run.costs}):
    each += [
      _cost_cells(f"{label(number)}: {cost.stage}", [cost], whole)
      for cost in run.costs
      if cost.round == number
    ]
  return (
    note(
      "Tokens are those sampled or trained on; programs those that were compiled, or fetched from "
      "the compilation cache."
    )
    + table(head, [*lines, total], total=True)
    + f"<details><summary>By round</summary>{table(head, each)}</details>"
  )


def _cost_cells(name: str, costs: Sequence[Cost], whole: float) -> list[str]:
  seconds = sum(cost.seconds for cost in costs)
  cells = [
    f"<td>{escape(name)}</td>",
    f"<td>{show_seconds(seconds)}</td>",
    f"<td>{percent_of(seconds, whole)}</td>",
  ]
  for field in ("tokens", "flops"):
    known = [cost for cost in costs if getattr(cost, field) is not None]
    amount, time_taken = (
      sum(getattr(cost, field) for cost in known),
      sum(cost.seconds for cost in known),
    )
    if not known:
      cells += [NONE, NONE]
      continue
    cells += [
      f"<td>{show_si(amount)}</td>",
      f"<td>{show_si(amount / time_taken)}</td>" if time_taken else NONE,
    ]
  programs = [cost.programs for cost in costs if cost.programs is not None]
  compiling = [cost.compile_seconds for cost in costs if cost.compile_seconds is not None]
  cells.append(f"<td>{sum(programs)}</td>" if programs else NONE)
  cells.append(f"<td>{show_seconds(sum(compiling))}</td>" if compiling else NONE)
  return cells


def configuration(run: Run) -> str:
  """HTML of all fields, versions and changes in the middle of the run."""
  if not run.config:
    return note("config.json is missing.")
  blocks = [_fields("All fields", run.config), _fields("Versions", run.versions)]
  for change in run.changes:
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(change["time"]))
    fields = {
      field["field"]: f"{_json(field['was'])} → {_json(field['is'])}" for field in change["fields"]
    }
    items = "".join(
      f"<li><span class=key>{escape(name)}: {escape(values)}</span></li>"
      for name, values in fields.items()
    )
    blocks.append(f"<p>Changed in the middle of the run, {when}:</p><ul>{items}</ul>")
  return "".join(blocks)


def _fields(title: str, values: dict[str, Any]) -> str:
  lines = [
    [f'<td class="key">{escape(name)}</td>', f'<td class="key left">{escape(_json(value))}</td>']
    for name, value in values.items()
  ]
  fields = table(("Field", "Value"), lines, left=["Value"])
  return f"<details><summary>{title}</summary>{fields}</details>"


def _json(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False)
