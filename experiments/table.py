"""Puts several seeds' results into one Markdown table, mean ± standard error over the runs.

    python experiments/table.py runs/table/0 runs/table/1 runs/table/2
    python experiments/table.py --controls runs/controls/own runs/controls/swapped
    python experiments/table.py --distill runs/system_prompt/student-reverse_kl \\
        runs/system_prompt/teacher-forward_kl

The second has a line a control, as its last round left it; the seeds' runs lie in its directory.
`table.sh` makes them all. The third has a line for each directory of runs of
`experiments/system_prompt.py`.
"""

import math
import pathlib
import sys
from typing import Any

from oel_jax.runtime import files

COLUMNS = ("passed", "in_context", "response_tokens")
KEPT = ("extraction", "worlds", "symmetric", "other")
DISTILLED = (
  "obey, before %",
  "in context %",
  "after %",
  "gain recovered %",
  "tokens before",
  "tokens after",
  "KL to the base on unrelated × 100",
)


def spread(values: list[float], percent: bool) -> str:
  """Mean ± standard error of the runs' values, in percent or as they are; "–" if a run has none, no
  error for one run.
  """
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
    found = [
      {**r["base"], "retention": r["base_retention"]} if i < 0 else r["rounds"][i] for r in results
    ]
    line = ["base" if i < 0 else f"round {i + 1}"]
    line += [
      spread([entry.get(name) for entry in found], name != "response_tokens") for name in COLUMNS
    ]
    table.append(
      line + [spread([entry["retention"].get(name) for entry in found], True) for name in KEPT]
    )
  return table


def distilled(results: list[dict[str, Any]]) -> list[str]:
  """One line of DISTILLED."""
  obey = [
    spread([result[name]["obeys"]["rate"] for result in results], True)
    for name in ("base", "in_context", "after")
  ]
  tokens = [
    spread([result[name]["response_tokens"]["mean"] for result in results], False)
    for name in ("base", "after")
  ]
  return [
    *obey,
    spread([r["recovered"] for r in results], True),
    *tokens,
    spread([r["unrelated_kl"] for r in results], True),
  ]


def load(folders: list[pathlib.Path], name: str = "report/results.json") -> list[dict[str, Any]]:
  """The results of these run directories; ends the process if one has none."""
  paths = [folder / name for folder in folders]
  for path in paths:
    if not path.exists():
      sys.exit(f"error: {path} does not exist: the run has no report yet")
  try:
    return [
      files.read_json(path, advice="run the same command, or python -m oel_jax.report, again")
      for path in paths
    ]
  except ValueError as error:
    sys.exit(f"error: {error}")


def main(arguments: list[str]) -> None:
  """Prints the table of the runs in these directories, or of these directories of runs."""
  kind, folders = (
    arguments[:1],
    [pathlib.Path(name) for name in arguments if name not in ("--controls", "--distill")],
  )
  if not folders:
    sys.exit(
      "usage: python experiments/table.py RUN_DIRECTORY ...  or  table.py --controls|--distill "
      "DIRECTORY_OF_RUNS ..."
    )
  head = ["", "passed %", "in context %", "response tokens", *(f"{name} %" for name in KEPT)]
  if kind in (["--controls"], ["--distill"]):
    controls = kind == ["--controls"]
    name, line = (
      ("report/results.json", lambda found: rows(found)[-1][1:])
      if controls
      else ("results.json", distilled)
    )
    head = head if controls else ["", *DISTILLED]
    groups = {
      folder.name: load(sorted(path for path in folder.glob("[0-9]*") if path.is_dir()), name)
      for folder in folders
    }
    empty = [name for name, results in groups.items() if not results]
    if empty:
      sys.exit(f"error: no runs in {', '.join(empty)}")
    lines = [[name, *line(results)] for name, results in groups.items()]
    counts = sorted({len(results) for results in groups.values()})
  else:
    results = load(folders)
    lines, counts = rows(results), [len(results)]
  print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
  for line in lines:
    print(f"| {' | '.join(line)} |")
  print(f"\n{' or '.join(map(str, counts))} runs a line, mean ± standard error over runs.")


if __name__ == "__main__":
  main(sys.argv[1:])
