"""OEL, Table 2: whose knowledge a policy learns from: its own, a larger model's, a smaller one's,
or that of one pre-trained with another seed. The paper's is Frozen Lake by Qwen3-1.7B, with
knowledge of its own and of Qwen3-4B's.

    JOBS=4 python experiments/oel_table2.py desk runs/table2 --weights=1.5B.gguf --smaller=0.5B.gguf
    JOBS=4 python experiments/oel_table2.py pocket runs/table2 --larger=FILE --smaller=FILE \\
        --other=FILE
    python experiments/oel_table2.py qwen3-1.7b runs/table2 --weights=FOLDER --larger=FOLDER_OF_4B

An arm whose model is not named is left out. What LMOps#441 asks is printed below the table: games
passed text by text, and the share of responses that the limit of tokens cut. --budgets=256,512,1024
repeats all of it with these limits, to see what of the order survives.
"""

import argparse
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import readings  # noqa: E402
from readings import Cell, Column, Compared, Row  # noqa: E402
from study import GAMES, Changes, Setting, Study, main  # noqa: E402

from oel_jax.runtime import files  # noqa: E402

WRITERS = ("larger", "smaller", "other")
PUBLISHED = {"larger": ("18.0", "22.7"), "own": ("23.8", "31.1")}


def add_options(parser: argparse.ArgumentParser) -> None:
  """The models that write the knowledge down, and the limits of a response."""
  for name in WRITERS:
    what = f"a {name} model's" if name != "other" else "another seed's of pre-training"
    parser.add_argument(f"--{name}", help=f"weights that write knowledge: {what}")
  parser.add_argument("--budgets", default="", help="tokens of a response, with commas between")


def arms(setting: Setting, options: argparse.Namespace) -> dict[str, Changes]:
  """An arm a writer that is named, and a budget: "own", "larger@512"."""
  found = {"own": {}}
  for name in WRITERS:
    if weights := getattr(options, name):
      found[name] = {"extraction.weights": weights}
  try:
    budgets = [int(budget) for budget in options.budgets.split(",") if budget]
  except ValueError:
    raise ValueError(f"--budgets is {options.budgets!r}: it must be whole numbers") from None
  for budget in budgets:
    field = {"deployment.max_response_tokens": budget}
    found |= {f"{name}@{budget}": own | field for name, own in found.items() if "@" not in name}
  return found


def rows(names: list[str]) -> list[Row]:
  """Nothing known, then each writer's knowledge in context and consolidated, budget by budget."""
  found = []
  for budget in _budgets(names):
    told = f" ({budget[1:]} tokens a response)" if budget else ""
    base = "7.3" if not budget else ""
    found.append(Row(f"no knowledge{told}", base, Cell(f"own{budget}", 0)))
    for writer in (*WRITERS, "own"):
      shown = PUBLISHED.get(writer, ("", "")) if not budget else ("", "")
      if f"{writer}{budget}" in names or (not budget and writer in PUBLISHED):
        name = f"{writer}{budget}"
        found.append(Row(f"{writer}, in context{told}", shown[0], Cell(name, 1, "in_context")))
        found.append(Row(f"{writer}, consolidated{told}", shown[1], Cell(name)))
  return found


def compared(names: list[str]) -> list[Compared]:
  """Own knowledge against each other writer's, and each consolidated against in context."""
  found = []
  for budget in _budgets(names):
    for writer in WRITERS:
      for way, told in (("in_context", "in context"), ("without", "consolidated")):
        sides = (Cell(f"{name}{budget}", 1, way) for name in ("own", writer))
        found.append(Compared(f"own above {writer}{budget}, {told}", *sides))
    own = Cell(f"own{budget}"), Cell(f"own{budget}", 1, "in_context")
    found.append(Compared(f"own{budget}: consolidated above in context", *own))
  return found


def _budgets(names: list[str]) -> list[str]:
  """What follows the writer in the names of arms: "" and "@N", from few tokens to many."""
  found = {name[name.index("@") :] for name in names if "@" in name}
  return ["", *sorted(found, key=lambda budget: int(budget[1:]))]


def text_by_text(column: Column) -> list[str]:
  """What LMOps#441 asks for, a line an arm and seed."""
  lines = []
  for arm in column.arms():
    for seed in column.seeds(arm):
      path = column.round(arm, seed, 1) / "evaluation.json"
      if path.exists():
        found = files.read_json(path)
        lines.append(readings.line([arm, str(seed), *_text_numbers(found)]))
  if not lines:
    return []
  head = [
    "arm",
    "seed",
    "passed % text by text",
    "their deviation",
    "chance alone",
    "cut, in context %",
  ]
  about = (
    "Games passed in context with each of the K texts, best first; their standard deviation, and "
    "what it would be if all texts were as good and only games differed; responses that the limit "
    "of tokens cut, in context and without knowledge after training."
  )
  return ["", column.head, "", *readings.markdown([*head, "cut, after %"]), *lines, "", about]


def _text_numbers(found: dict) -> list[str]:
  play = found.get("in_context") or {}
  shares = sorted((one["passed"] for one in play.get("texts", [])), key=lambda one: -one["rate"])
  rates = [one["rate"] for one in shares]
  cut = [
    _percent(one["cut"]["rate"]) if one.get("cut") else "–" for one in (play, found["without"])
  ]
  if len(rates) < 2:
    return ["–", "–", "–", *cut]
  mean = sum(rates) / len(rates)
  spread = math.sqrt(sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1))
  chance = math.sqrt(sum(mean * (1 - mean) / one["of"] for one in shares) / len(shares))
  return [" ".join(f"{100 * rate:.0f}" for rate in rates), *map(_percent, (spread, chance)), *cut]


def _percent(share: float | None) -> str:
  return "–" if share is None else f"{100 * share:.1f}"


STUDY = Study(
  title="OEL, Table 2: whose knowledge is learned, percent passed",
  settings=GAMES,
  paper="qwen3-1.7b",
  arms=arms,
  rows=rows,
  compared=compared,
  options=add_options,
  details=text_by_text,
)

if __name__ == "__main__":
  main(STUDY)
