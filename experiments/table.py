"""Puts several seeds' results into one Markdown table, mean ± standard error over the runs.

    python experiments/table.py runs/table/0 runs/table/1 runs/table/2
    python experiments/table.py --controls runs/controls/own runs/controls/swapped

The second has a line a control, as its last round left it; the seeds' runs lie in its directory. `table.sh` makes them all.
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


def load(folders: list[pathlib.Path]) -> list[dict[str, Any]]:
  """The results of these run directories; ends the process if one has none."""
  paths = [folder / "report" / "results.json" for folder in folders]
  for path in paths:
    if not path.exists():
      sys.exit(f"error: {path} does not exist: the run has no report yet")
  return [json.loads(path.read_text()) for path in paths]


def main(arguments: list[str]) -> None:
  """Prints the table of the runs in these directories, or of these directories of runs."""
  controls, folders = arguments[:1] == ["--controls"], [pathlib.Path(name) for name in arguments if name != "--controls"]
  if not folders:
    sys.exit("usage: python experiments/table.py RUN_DIRECTORY ...  or  table.py --controls DIRECTORY_OF_RUNS ...")
  if controls:
    groups = {folder.name: load(sorted(path for path in folder.glob("[0-9]*") if path.is_dir())) for folder in folders}
    empty = [name for name, results in groups.items() if not results]
    if empty:
      sys.exit(f"error: no runs in {', '.join(empty)}")
    lines = [[name, *rows(results)[-1][1:]] for name, results in groups.items()]
    counts = sorted({len(results) for results in groups.values()})
  else:
    results = load(folders)
    lines, counts = rows(results), [len(results)]
  head = ["", "passed %", "in context %", "response tokens", *(f"{name} %" for name in KEPT)]
  print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
  for line in lines:
    print(f"| {' | '.join(line)} |")
  print(f"\n{' or '.join(map(str, counts))} runs a line, mean ± standard error over runs.")


if __name__ == "__main__":
  main(sys.argv[1:])
