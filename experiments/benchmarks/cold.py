"""How long a run takes where nothing has been compiled before, stage by stage, beside another
checkout's.

    python experiments/benchmarks/cold.py --against=OLDER_CHECKOUT --json=cold.json
    python experiments/benchmarks/cold.py --against=OLDER_CHECKOUT --weights=MODEL.gguf

The first is the quickstart; the second one round of Frozen Lake by a real model: 256 games, ten
texts of 30 trajectories, 40 steps of 32 prompts. Each run is the command that a user gives, in a
process of its own with an empty compilation cache, the checkouts in turn; figures are medians of
--repeats runs. "begin and end" is what no stage takes: importing, reading weights, the report. What
stands behind -- goes to the runs of both.
"""

import argparse
import collections
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import figures_file

HERE = pathlib.Path(__file__).resolve().parents[2]
QUICKSTART = ("--config=experiments/frozen_lake.py:pocket",)
REAL_MODEL = (
  "--config=experiments/frozen_lake.py:qwen3-1.7b",
  "--config.rounds=1",
  "--config.policy.thinking=False",
  "--config.deployment.episodes=256",
  "--config.deployment.max_response_tokens=64",
  "--config.extraction.form=items",
  "--config.extraction.max_response_tokens=256",
  "--config.consolidation.steps=40",
  "--config.consolidation.batch_size=32",
  "--config.consolidation.gate_episodes=0",
  "--config.consolidation.checkpoint_every=1000",
  "--config.evaluation.episodes=48",
  "--config.evaluation.in_context=False",
)


def run(checkout: pathlib.Path, arguments: Sequence[str]) -> dict[str, float]:
  """Seconds of a whole run, of each stage, and of consolidation's first and later steps; and, where
  the checkout counts them, the programs that were compiled, and the compiler's seconds.

  Raises:
    RuntimeError: the run failed.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"OEL_JAX_CACHE": f"{folder}/cache", "PYTHONPATH": path}
    command = [sys.executable, "-m", "oel_jax.main", f"--workdir={folder}/run", *arguments]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    whole = time.perf_counter() - started
    if done.returncode:
      raise RuntimeError(f"{checkout}: the run failed: {done.stderr[-2000:]}")
    return {"whole": whole, **stages(pathlib.Path(folder) / "run", whole)}


def stages(folder: pathlib.Path, whole: float) -> dict[str, float]:
  """What the files of a run say of its parts."""
  spent: collections.Counter[str] = collections.Counter()
  counted: collections.Counter[str] = collections.Counter()
  for path in sorted(folder.glob("round_*/cost.json")):
    for entry in json.loads(path.read_text())["stages"]:
      number = path.parent.name.removeprefix("round_")
      name = f"base {entry['stage']}" if number == "0" else entry["stage"]
      spent[name] += entry["seconds"]
      for kind, unit in (("programs", "programs"), ("compile_seconds", "compiling")):
        if kind in entry:
          counted[unit] += entry[kind]
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  steps = [line for line in lines if line["stage"] == "consolidate" and "seconds" in line]
  first = [line["seconds"] for line in steps if line["step"] == 1]
  later = [line["seconds"] for line in steps if line["step"] > 1]
  found = {"begin and end": whole - sum(spent.values()), **spent}
  found |= {"first step": first[0], "a later step": statistics.median(later)} if later else {}
  return found | counted


def main(argv: list[str] | None = None) -> None:
  argv = sys.argv[1:] if argv is None else argv
  end = argv.index("--") if "--" in argv else len(argv)
  own, passed_on = argv[:end], argv[end + 1 :]
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--weights", help="a Hugging Face folder or a GGUF file of a real model")
  parser.add_argument("--against", metavar="CHECKOUT", help="whose code runs, too")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--json", type=figures_file.to_write, help="where to write the figures")
  args = parser.parse_args(own)
  arguments = list(QUICKSTART)
  if args.weights:
    arguments = [*REAL_MODEL, f"--config.policy.weights={pathlib.Path(args.weights).resolve()}"]
  checkouts = {"s": HERE}
  if args.against:
    checkouts["against s"] = pathlib.Path(args.against).resolve()
    if not (checkouts["against s"] / "oel_jax").is_dir():
      parser.error(f"--against is {args.against!r}: it must be a checkout, which holds oel_jax/")
  found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
  for _ in range(args.repeats):
    for name, checkout in checkouts.items():
      found[name].append(run(checkout, [*arguments, *passed_on]))
  rows = []
  for what in found["s"][0]:
    row: dict[str, float | str] = {"what": what}
    for name, runs in found.items():
      if all(what in one for one in runs):
        row[name] = statistics.median(one[what] for one in runs)
    if "against s" in row:
      row["faster"] = float(row["against s"]) / float(row["s"])
    rows.append(row)
  import measure  # JAX takes the device: not before the runs have ended

  measure.report(rows, "a run with nothing compiled before", args.json)


if __name__ == "__main__":
  main()
