"""Ten rounds: does play get worse again, and what helps? Each measure alone, and all together.

    JOBS=4 python experiments/ten_rounds.py pocket runs/ten
    JOBS=4 python experiments/ten_rounds.py pocket-4x4 runs/ten
    python experiments/ten_rounds.py desk-changing runs/ten --weights=GGUF

`plain` trains as the paper does: on all samples, turn by turn, each round on its own knowledge
alone, whether or not that helps in context. The others differ from it in what VARIANTS says.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from readings import LAST, Cell, Column, Compared, Row, line, markdown  # noqa: E402
from study import Setting, Study, main  # noqa: E402

from oel_jax.evaluation import statistics  # noqa: E402
from oel_jax.report import records  # noqa: E402

PLAIN = {
  "extraction.start_from": "nothing",
  "consolidation.on_no_gain": "warn",
  "evaluation.accumulation": (),
  "evaluation.own_answers": 64,
}
VARIANTS = {
  "plain": {},
  # a quarter of the tokens, those of the responses over which teacher and student disagree most
  "select": {"consolidation.select": 0.25},
  "balance": {"consolidation.balance": True},  # each game counts alike, however many turns it has
  "keep": {"consolidation.anchor": 1.0},  # the teacher's view of the round's knowledge
  "carry": {"extraction.start_from": "previous_round"},
  "skip": {"consolidation.on_no_gain": "skip"},
}
VARIANTS["guard"] = {name: value for each in VARIANTS.values() for name, value in each.items()}
# the run's first weights teach in every round; "keep" holds to the round's, so not with it
VARIANTS["first"] = VARIANTS["carry"] | {"consolidation.teacher": "first"}
# What is told of each round: its head, and the cell's way and what.
TOLD = {
  "passed without knowledge, %": ("without", "passed"),
  "passed with that round's knowledge, %": ("after_in_context", "passed"),
  "passed with round 1's knowledge, %": ("first_knowledge", "passed"),
  "response tokens a turn, mean of the games'": ("without", "tokens"),
}
OWN = {"entropy of its own answers, nats × 100": "entropy", "mass on the top k, %": "topk_mass"}


def arms(setting: Setting, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
  """The configurations' changes by variant."""
  del setting
  if options.rounds < 1:
    raise ValueError(f"--rounds is {options.rounds}: it must be 1 or more")
  wanted = options.variants.split(",")
  if unknown := [name for name in wanted if name not in VARIANTS]:
    raise ValueError(f"--variants has {unknown[0]!r}: they are {', '.join(VARIANTS)}")
  return {name: PLAIN | VARIANTS[name] | {"rounds": options.rounds} for name in wanted}


def rows(names: Sequence[str]) -> list[Row]:
  """What is passed after the first round and the last."""
  heads = {1: "round 1", LAST: "last round"}
  return [
    Row(f"{name}, {head}", (), Cell(name, n))
    for name in _sorted(names)
    for n, head in heads.items()
  ]


def compared(names: Sequence[str]) -> list[Compared]:
  """Each variant against the plain one, after the last round."""
  return [
    Compared(f"{name} above plain, last round", Cell(name, LAST), Cell("plain", LAST))
    for name in _sorted(names)
    if name != "plain" and "plain" in names
  ]


def details(column: Column) -> list[str]:
  """Lines of Markdown: the variants' rounds, measure by measure; the largest fall; the cost."""
  names = _sorted(column.arms())
  found = [f"**{column.head}**, mean over the seeds"]
  for head, (way, what) in TOLD.items():
    scale = 100 if what == "passed" else 1
    read = lambda name, n, way=way, what=what: column.values(Cell(name, n, way, what)).values()
    found += _by_round(column, names, head, scale, read)
  for task in _tasks(column, names):
    read = lambda name, n, task=task: column.values(Cell(name, n, "without", task)).values()
    found += _by_round(column, names, f"{task} kept, %", 100, read)
  for head, field in OWN.items():
    read = lambda name, n, field=field: _own(column, name, n, field)
    found += _by_round(column, names, head, 100, read)
  return [*found, "", *_falls(column, names), "", *_costs(column, names)]


def _sorted(names: Iterable[str]) -> list[str]:
  return [name for name in VARIANTS if name in set(names)]


def _rounds(column: Column, names: Sequence[str]) -> int:
  """The last round that a run has evaluated."""
  found = [column.rounds(name, seed) for name in names for seed in column.seeds(name)]
  return max((number for rounds in found for number in rounds), default=0)


def _by_round(
  column: Column,
  names: Sequence[str],
  head: str,
  scale: float,
  read: Callable[[str, int], Iterable[Any]],
) -> list[str]:
  """A table with a line a variant and a column a round; [] where nothing was measured."""
  last, lines = _rounds(column, names), []
  for name in names:
    means = [[np.mean(one) for one in read(name, n)] for n in range(last + 1)]
    if any(means):
      cells = [f"{scale * np.mean(each):.1f}" if each else "" for each in means]
      lines.append(line([name, *cells]))
  return ["", *markdown([head, "base", *map(str, range(1, last + 1))]), *lines] if lines else []


def _tasks(column: Column, names: Sequence[str]) -> list[str]:
  found = (column.round(name, seed, 0) for name in names for seed in column.seeds(name))
  measured = (path / "evaluation.json" for path in found)
  kept = [records.read_evaluation(path, 0).retention for path in measured if path.exists()]
  return list(dict.fromkeys(task for each in kept for task in each))


def _own(column: Column, name: str, number: int, field: str) -> list[float]:
  found = []
  for seed in column.seeds(name):
    path = column.round(name, seed, number) / "evaluation.json"
    if path.exists() and (sure := records.read_evaluation(path, number).own_answers):
      found.append(getattr(sure, field))
  return found


def _falls(column: Column, names: Sequence[str]) -> list[str]:
  """By how much the lowest round after the best one is below it, games compared one by one."""
  last, lines = _rounds(column, names), []
  for name in names:
    played = {n: column.values(Cell(name, n)) for n in range(1, last + 1)}
    seeds = sorted(set.intersection(*map(set, played.values()))) if played else []
    if not seeds:
      continue
    rates = {n: np.mean([values[seed].mean() for seed in seeds]) for n, values in played.items()}
    best = max(rates, key=rates.get)
    low = min((n for n in rates if n >= best), key=rates.get)
    sides = [[played[n][seed] for seed in seeds] for n in (best, low)]
    found = statistics.paired(*sides)
    error = (found["games"][1] - found["games"][0]) / (2 * statistics.Z) if found["games"] else 0.0
    fall, errors = found["difference"], f"{found['difference'] / error:.1f}" if error else "–"
    shown = [f"{100 * rates[best]:.1f}", str(low), f"{100 * fall:.1f}", errors]
    lines.append(line([name, str(best), *shown]))
  head = ["largest fall", "best round", "passed %", "lowest after it", "points", "standard errors"]
  about = (
    "A standard error is over games, of the difference of two rounds. The best round was picked "
    "for its share, so some fall is there by chance."
  )
  return [*markdown(head), *lines, "", about] if lines else []


def _costs(column: Column, names: Sequence[str]) -> list[str]:
  """Work of training and of the whole run beside plain's, in floating point operations."""
  work = {name: _work(column, name) for name in names}
  whole = work.get("plain")
  lines = []
  for name, found in work.items():
    if not found["tokens"]:
      continue
    beside = ["", ""]
    if whole and whole["tokens"]:
      beside = [f"{found[what] / whole[what]:.2f}" for what in ("training", "all")]
    lines.append(line([name, f"{100 * found['trained'] / found['tokens']:.1f}", *beside]))
  head = ["cost", "trained on, % of the tokens sampled", "training ÷ plain's", "all ÷ plain's"]
  return [*markdown(head), *lines] if lines else []


def _work(column: Column, name: str) -> dict[str, float]:
  """Of the variant's runs, on average."""
  total = dict.fromkeys(("tokens", "trained", "training", "all"), 0.0)
  seeds = column.seeds(name)
  for seed in seeds:
    for number in column.rounds(name, seed):
      path = column.round(name, seed, number) / "cost.json"
      found = records.read_costs(path, number) if path.exists() else []
      total["all"] += sum(cost.flops or 0.0 for cost in found)
      for cost in (cost for cost in found if cost.stage == "consolidate"):
        total["tokens"] += cost.tokens or 0
        total["trained"] += cost.trained or 0
        total["training"] += cost.flops or 0.0
  return {key: value / max(1, len(seeds)) for key, value in total.items()}


def _options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--rounds", type=int, default=10, help="of each run (%(default)s)")
  parser.add_argument("--variants", default=",".join(VARIANTS), help="(%(default)s)")


STUDY = Study(
  title="Round after round, percent passed without knowledge",
  settings=("pocket", "pocket-4x4", "desk-changing"),
  paper="pocket",
  arms=arms,
  rows=rows,
  compared=compared,
  rounds=0,
  published=(),
  options=_options,
  details=details,
)

if __name__ == "__main__":
  main(STUDY)
