"""The page of `report` for a run of `tasks.distill`: answers to held-out prompts before, with the
text in context, and after.
"""

import dataclasses
import pathlib
from typing import Any

from oel_jax.report import appendix
from oel_jax.report.measures import Measure, read_mean, read_share
from oel_jax.report.parts import (
  NONE,
  document,
  escape,
  figure,
  mean_cell,
  note,
  percent_range,
  section,
  share_cell,
  show_tokens,
  signed,
  table,
)
from oel_jax.report.records import Run
from oel_jax.runtime import files, schema

SCHEMA = 1
# Files of a run directory, each with what the page calls it, in the order of a run.
MEASURED = {"base": "Before", "in_context": "Text in context", "after": "After"}
SHARES = {"obeys": "wanted form", "content": "wanted content", "cut": "cut by the limit"}
SHOWN_PROMPTS = 8
FEW = 0.1  # half an interval that is wider says little
FOOTER = (
  "Shares come with Wilson’s 95% interval, means with a 95% interval. The same numbers, with their "
  "counts, are in results.json beside this page. The page shows prompts and answers: treat it as "
  "you treat your users’ data."
)


@dataclasses.dataclass(frozen=True)
class Answers:
  """Answers to the held-out prompts, in their order.

  Attributes:
    shares: by the names in SHARES, those that were measured.
    response_tokens: mean over answers.
    texts: (prompt, answer), the prompt's last message.
  """

  shares: dict[str, Measure]
  response_tokens: Measure
  texts: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Distilled:
  """What there is of a run.

  Attributes:
    answers: by the names in MEASURED, those that were measured.
    recovered: the gain of the weights as a share of the gain in context; None if it is not known.
    unrelated_kl: KL(after ‖ base) in nats a token; None if it was not measured.
  """

  answers: dict[str, Answers]
  recovered: float | None
  unrelated_kl: float | None


def read(folder: pathlib.Path) -> Distilled:
  """Reads a run directory of `tasks.distill`, at any moment of the run.

  Raises:
    ValueError: a file is damaged; names it and the field.
  """
  answers = {
    name: files.read_json(folder / f"{name}.json", _answers)
    for name in MEASURED
    if (folder / f"{name}.json").exists()
  }
  ends = {}
  if (folder / "results.json").exists():
    ends = files.read_json(folder / "results.json", _ends)
  return Distilled(answers, ends.get("recovered"), ends.get("unrelated_kl"))


def summarize(found: Distilled) -> dict[str, Any]:
  """Returns what results.json holds: "base", "in_context" and "after", None or each with "obeys",
  "content" if it was judged, "response_tokens" and "cut"; "recovered"; "unrelated_kl".
  """
  measured = {
    name: _numbers(found.answers[name]) if name in found.answers else None for name in MEASURED
  }
  ends = {"recovered": found.recovered, "unrelated_kl": found.unrelated_kl}
  return {"schema": SCHEMA} | measured | ends


def measurement(value: Any) -> dict[str, Any]:
  """Returns the value of base.json, in_context.json or after.json, checked; raises ValueError
  naming the field.
  """
  schema.need(
    schema.get(value, "schema", schema.TOP) == SCHEMA, "schema", value["schema"], str(SCHEMA)
  )
  measured = schema.get(value, "measured", schema.TOP)
  answers = schema.get(value, "answers", schema.TOP, list)
  schema.share(schema.get(measured, "obeys", "measured"), "measured.obeys")
  schema.mean(schema.get(measured, "response_tokens", "measured"), "measured.response_tokens")
  for name in ("content", "cut"):
    if name in measured:
      schema.share(measured[name], f"measured.{name}")
  for name in measured:
    schema.need(
      measured[name]["of"] == len(answers),
      f"measured.{name}.of",
      measured[name]["of"],
      f"{len(answers)}, as there are answers",
    )
  return value


def _ends(value: Any) -> dict[str, Any]:
  for name in ("recovered", "unrelated_kl"):
    number = schema.get(value, name, schema.TOP)
    schema.need(number is None or schema.is_number(number), name, number, "a number or null")
  return value


def _answers(value: Any) -> Answers:
  measured = measurement(value)["measured"]
  return Answers(
    {name: read_share(measured[name], name) for name in SHARES if name in measured},
    read_mean(measured["response_tokens"], "response_tokens"),
    [
      tuple(str(schema.get(one, name, "answers")) for name in ("prompt", "answer"))
      for one in value["answers"]
    ],
  )


def _numbers(answers: Answers) -> dict[str, Any]:
  measured = answers.shares | {"response_tokens": answers.response_tokens}
  return {
    key: number
    for name, measure in measured.items()
    for key, number in (
      (name, measure.value),
      (f"{name}_count", measure.of),
      (f"{name}_interval", measure.interval and list(measure.interval)),
    )
  }


def render(run: Run, found: Distilled, light: dict[str, bytes], dark: dict[str, bytes]) -> str:
  """Returns the page as HTML; arguments as `page.render` has them."""
  plot = figure(
    "Consolidation, step by step",
    "From metrics.jsonl.",
    light.get("consolidation"),
    dark.get("consolidation"),
    "wide",
    note("Not measured yet."),
  )
  sections = [
    section("Held-out prompts", _table(found)),
    section("Curves", f'<div class="plots">{plot}</div>'),
    section("Answers, side by side", _side_by_side(found.answers)),
    section("Configuration", appendix.configuration(run)),
  ]
  subtitle = f"a text of your own · {run.config.get('policy.weights')}"
  return document(run.name, subtitle, summary(found.answers), sections, FOOTER)


def summary(found: dict[str, Answers]) -> str:
  """What happened, in a few sentences made of the numbers."""
  if "base" not in found:
    return "Nothing has been measured yet."
  spoken = {name: _spoken(answers.shares["obeys"]) for name, answers in found.items()}
  text = [f"Before, {spoken['base']} have the wanted form."]
  if "in_context" in found:
    text.append(f"With the text in the prompt, {spoken['in_context']}.")
  if "after" not in found:
    return " ".join([*text, "The trained model has not been measured yet."])
  text.append(f"After training, without the text, {spoken['after']}.")
  before, after = (found[name].response_tokens.value for name in ("base", "after"))
  if before and after is not None:
    text.append(
      f"An answer went from {show_tokens(before)} to {show_tokens(after)} tokens "
      f"({signed(100 * (after / before - 1))}%)."
    )
  first, last = (found[name].shares["obeys"].interval for name in ("base", "after"))
  if first and last and first[0] <= last[1] and last[0] <= first[1]:
    text.append(
      "The intervals before and after overlap: so few prompts may not tell the two apart."
    )
  return " ".join(text)


def _spoken(share: Measure) -> str:
  interval = f" (95% interval {percent_range(share)})" if share.interval else ""
  return f"{100 * share.value:.1f}% of {share.of} answers{interval}"


def _table(found: Distilled) -> str:
  if not found.answers:
    return note("Not measured yet.")
  lines = []
  for name, answers in found.answers.items():
    shares = [share_cell(answers.shares.get(share), main=share == "obeys") for share in SHARES]
    tokens = mean_cell(answers.response_tokens, "answers")
    lines.append([f"<td>{MEASURED[name]}</td>", *shares, tokens])
  head = ("", *(words.capitalize() for words in SHARES.values()), "Tokens an answer")
  recovered, kl = found.recovered, found.unrelated_kl
  facts = [
    ("Recovered", NONE if recovered is None else f"<td>{100 * recovered:.0f}%</td>"),
    (
      "KL to the base on unrelated prompts, nats a token",
      NONE if kl is None else f"<td>{kl:.3g}</td>",
    ),
  ]
  below = table(("", ""), [[f"<td>{name}</td>", cell] for name, cell in facts])
  about = note(
    "Recovered: the gain of the weights as a share of the gain in context, of the wanted form; "
    "says little where that gain is small. Cut: answers with all the tokens that "
    "deployment.max_response_tokens allows."
  )
  return table(head, lines) + below + about


def _side_by_side(found: dict[str, Answers]) -> str:
  if not found:
    return note("Not measured yet.")
  shown = min(len(answers.texts) for answers in found.values())
  blocks = []
  for place in range(min(shown, SHOWN_PROMPTS)):
    prompt = next(iter(found.values())).texts[place][0]
    said = "".join(
      f'<div class="game"><h4>{MEASURED[name]}</h4><div class="said">'
      f"{escape(answers.texts[place][1]) or note('no answer')}</div></div>"
      for name, answers in found.items()
    )
    blocks.append(f'<h3>{escape(prompt)}</h3><div class="pair three">{said}</div>')
  return note(f"The first {len(blocks)} of {shown}, in their order.") + "".join(blocks)
