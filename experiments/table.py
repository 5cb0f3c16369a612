"""Puts several seeds' results into one Markdown table, mean ± standard error over the runs.

    python experiments/table.py runs/table/0 runs/table/1 runs/table/2
"""

import json
import math
import pathlib
import sys
from typing import Any

COLUMNS = ("passed", "in_context", "response_tokens")
KEPT = ("extraction", "worlds", "symmetric", "other")


def spread(values: list[float], percent: bool) -> str:
  """Mean ± standard error of the runs' values, in percent or as they are; "–" if a run has none, no error for one run."""
  if not values or any(value is None for value in values):
    return "–"
  scale = 100 if percent else 1
  mean = sum(values) / len(values)
  if len(values) == 1:
    return f"{scale * mean:.1f}"
  error = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
  return f"{scale * mean:.1f} ± {scale * error:.1f}"


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
  """The base model, then each round that every run has: label, COLUMNS, then KEPT."""
  number = min(len(result["rounds"]) for result in results)
  table = []
  for i in range(-1, number):
    found = [{**r["base"], "retention": r["base_retention"]} if i < 0 else r["rounds"][i] for r in results]
    line = ["base" if i < 0 else f"round {i + 1}"]
    line += [spread([entry.get(name) for entry in found], name != "response_tokens") for name in COLUMNS]
    table.append(line + [spread([entry["retention"].get(name) for entry in found], True) for name in KEPT])
  return table


def main(folders: list[str]) -> None:
  """Prints the table of the runs in these directories."""
  if not folders:
    sys.exit("usage: python experiments/table.py RUN_DIRECTORY ...")
  paths = [pathlib.Path(folder) / "report" / "results.json" for folder in folders]
  for path in paths:
    if not path.exists():
      sys.exit(f"error: {path} does not exist: the run has no report yet")
  head = ["", "passed %", "in context %", "response tokens", *(f"{name} %" for name in KEPT)]
  print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
  for line in rows([json.loads(path.read_text()) for path in paths]):
    print(f"| {' | '.join(line)} |")
  print(f"\n{len(paths)} runs, mean ± standard error over runs.")


if __name__ == "__main__":
  main(sys.argv[1:])
