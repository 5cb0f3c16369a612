"""Puts several seeds' results into one Markdown table, mean ± standard error over the runs.

    python experiments/table.py runs/table/0 runs/table/1 runs/table/2
    python experiments/table.py --categories runs/desk/0 runs/desk/1 runs/desk/2
    python experiments/table.py --controls runs/controls/own runs/controls/swapped
    python experiments/table.py --distill runs/system_prompt/student-reverse_kl \\
        runs/system_prompt/teacher-forward_kl

The second has a line for each category of the environment's, the share passed. The third has a line
a control, as its last round left it; the seeds' runs lie in its directory. `table.sh` makes those
of Frozen Lake. The last has a line for each directory of runs of `experiments/system_prompt.py`.
"""

import math
import pathlib
import sys
from typing import Any

from oel_jax.runtime import files

COLUMNS = ("passed", "in_context", "recovered", "response_tokens")
HEAD = ("", "passed %", "in context %", "gain recovered %", "response tokens")
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


def tasks(results: list[dict[str, Any]]) -> list[str]:
  """The tasks beside the environment that all runs have a share of."""
  kept = [result["base_retention"] for result in results]
  return [name for name in kept[0] if all(f"{name}_interval" in shares for shares in kept)]


def states(results: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
  """The base model, then each round that every run has: label, and the runs' entries. Ends the
  process if a run has no base.
  """
  if not all(result["base"] for result in results):
    sys.exit("error: a run's base is not evaluated yet: run the same command again")
  number = min(len(result["rounds"]) for result in results)
  base = [{**result["base"], "retention": result["base_retention"]} for result in results]
  rounds = [(f"round {i + 1}", [result["rounds"][i] for result in results]) for i in range(number)]
  return [("base", base), *rounds]


def rows(results: list[dict[str, Any]], kept: list[str]) -> list[list[str]]:
  """A line for each of `states`: label, COLUMNS, KL to the base, then the tasks `kept`."""
  table = []
  for label, found in states(results):
    moved = [(entry.get("unrelated") or {}).get("kl") for entry in found]
    table.append(
      [label]
      + [
        spread([entry.get(name) for entry in found], name != "response_tokens") for name in COLUMNS
      ]
      + [spread(moved, True)]
      + [spread([entry["retention"].get(name) for entry in found], True) for name in kept]
    )
  return table


def categories(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
  """Head and lines: for each category the share passed by the base, with each round's knowledge in
  context, and after each round.
  """
  head, columns = [""], []
  for label, found in states(results):
    if all("in_context_categories" in entry for entry in found):
      head.append(f"in context, {label} %")
      columns.append([entry["in_context_categories"] for entry in found])
    head.append(f"{label} %")
    columns.append([entry.get("categories") or {} for entry in found])
  names = sorted({name for column in columns for shares in column for name in shares})
  if not names:
    sys.exit("error: the environment of these runs has no categories, or there is none")
  rate = lambda shares, name: shares[name]["passed"] if name in shares else None
  share = lambda column, name: spread([rate(shares, name) for shares in column], True)
  return head, [[name, *(share(column, name) for column in columns)] for name in names]


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
  kinds = ("--categories", "--controls", "--distill")
  flags = [name for name in arguments if name.startswith("-")]
  folders = [pathlib.Path(name) for name in arguments if name not in flags]
  if not folders or flags[1:] or not {*flags} <= {*kinds}:
    sys.exit(
      "usage: python experiments/table.py [--categories] RUN_DIRECTORY ...  or  "
      "table.py --controls|--distill DIRECTORY_OF_RUNS ..."
    )
  kind = flags[0] if flags else ""
  if kind in ("--controls", "--distill"):
    head, lines, counts = _of_directories(kind, folders)
  else:
    results = load(folders)
    counts = [len(results)]
    if kind:
      head, lines = categories(results)
    else:
      head, lines = _head(tasks(results)), rows(results, tasks(results))
  print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
  for line in lines:
    print(f"| {' | '.join(line)} |")
  print(f"\n{' or '.join(map(str, counts))} runs a line, mean ± standard error over runs.")


def _head(kept: list[str]) -> list[str]:
  return [*HEAD, "KL to the base × 100", *(f"{name} %" for name in kept)]


def _of_directories(
  kind: str, folders: list[pathlib.Path]
) -> tuple[list[str], list[list[str]], list[int]]:
  """Head, a line for each directory of runs, and how many runs they rest on."""
  name = "report/results.json" if kind == "--controls" else "results.json"
  groups = {
    folder.name: load(sorted(path for path in folder.glob("[0-9]*") if path.is_dir()), name)
    for folder in folders
  }
  empty = [name for name, results in groups.items() if not results]
  if empty:
    sys.exit(f"error: no runs in {', '.join(empty)}")
  if kind == "--distill":
    head, line = ["", *DISTILLED], distilled
  else:
    kept = tasks([result for results in groups.values() for result in results])
    head, line = _head(kept), lambda found: rows(found, kept)[-1][1:]
  lines = [[name, *line(results)] for name, results in groups.items()]
  return head, lines, sorted({len(results) for results in groups.values()})


if __name__ == "__main__":
  main(sys.argv[1:])
