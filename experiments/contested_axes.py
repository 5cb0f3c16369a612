"""What is contested about consolidation, crossed: whose samples, the direction of the divergence,
the learning rate, how often samples are renewed, whether responses that the limit cut are in the
loss, and whether equivalent end tokens are one action. What can be told apart, and what cannot.

    JOBS=16 python experiments/contested_axes.py pocket runs/axes
    python experiments/contested_axes.py pocket runs/axes --axes=samples,renewed --seeds=0,1,2
    python experiments/contested_axes.py qwen3-1.7b runs/axes --weights=FOLDER

All runs of a seed train on the same prompts and the same knowledge in round 1. --axes crosses some
axes, and leaves the others as the setting has them. "ends" is left out where one token alone ends
a response. All axes make 72 runs a seed, with "ends" 144, of two rounds each.
"""

import argparse
import itertools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from readings import Cell, Compared, Row  # noqa: E402
from study import GAMES, Changes, Setting, Study, main  # noqa: E402

RATE = "rate"
# Axis → its levels, the first as the paper has it → what they change.
AXES: dict[str, dict[str, Changes]] = {
  "samples": {
    "student": {"consolidation.data": "student"},
    "teacher": {"consolidation.data": "teacher"},
  },
  "direction": {
    "reverse": {"consolidation.kind": "reverse_kl"},
    "forward": {"consolidation.kind": "forward_kl"},
  },
  RATE: {"whole": {}, "third": {}, "triple": {}},  # of the setting's own
  "renewed": {
    "step": {"consolidation.renewed": "step"},
    "round": {"consolidation.renewed": "round"},
    "never": {"consolidation.renewed": "never"},
  },
  "cut": {
    "in": {"consolidation.cut_responses": True},
    "out": {"consolidation.cut_responses": False},
  },
  "ends": {
    "apart": {"consolidation.one_end": False},
    "one": {"consolidation.one_end": True},
  },
}
ROUNDS = (1, 2)
RATES = {"whole": 1.0, "third": 1 / 3, "triple": 3.0}
MEASURED = {"passed": "passed %", "tokens": "tokens a response"}


def add_options(parser: argparse.ArgumentParser) -> None:
  """Which axes are crossed."""
  told = "with commas between (%(default)s)"
  parser.add_argument("--axes", default=",".join(AXES), help=told)


def arms(setting: Setting, options: argparse.Namespace) -> dict[str, Changes]:
  """A run for each crossing of the axes asked for: "samples=teacher+rate=third"."""
  asked = options.axes.split(",")
  if unknown := [name for name in asked if name not in AXES]:
    raise ValueError(f"--axes names {unknown[0]!r}: it must be of {', '.join(AXES)}")
  axes = [name for name in AXES if name in asked and (name != "ends" or setting.ends > 1)]
  if not axes:
    raise ValueError(f"--axes is {options.axes!r}: one token alone ends a response here")
  rate, found = setting.default().consolidation.learning_rate, {}
  for levels in itertools.product(*(AXES[name] for name in axes)):
    changes: Changes = {"consolidation.on_no_gain": "warn"}
    for name, level in zip(axes, levels, strict=True):
      changes |= AXES[name][level]
      if name == RATE:
        changes["consolidation.learning_rate"] = rate * RATES[level]
    found["+".join(f"{name}={level}" for name, level in zip(axes, levels))] = changes
  return found


def rows(names: list[str]) -> list[Row]:
  """Base and round 1's knowledge in context, the same for all; then each crossing, after each
  round.
  """
  if not names:
    return []
  shared = {"base": Cell(names[0], 0), "in context, round 1": Cell(names[0], 1, "in_context")}
  found = [Row(f"{name}, passed %", "", cell) for name, cell in shared.items()]
  for number, (what, head) in itertools.product(ROUNDS, MEASURED.items()):
    cells = {arm: Cell(arm, number, what=what) for arm in names}
    found += [Row(f"{arm}, round {number}, {head}", "", cell) for arm, cell in cells.items()]
  return found


def compared(names: list[str]) -> list[Compared]:
  """Of each axis every level against the first, as the mean over all crossings of the others that
  have both: a game's mean over them stays one number.
  """
  found = []
  for axis, levels in AXES.items():
    first, *others = levels
    for level in others:
      pairs = [
        (arm, other)
        for arm in names
        if f"{axis}={level}" in arm.split("+")
        and (other := arm.replace(f"{axis}={level}", f"{axis}={first}")) in names
      ]
      for number, (what, head) in itertools.product(ROUNDS if pairs else (), MEASURED.items()):
        sides = (
          tuple(Cell(arm, number, what=what) for arm in side) for side in zip(*pairs, strict=True)
        )
        told = f"{head}, round {number}: {axis} {level} above {first}"
        found.append(Compared(f"{told}, mean of {len(pairs)}", *sides))
  return found


STUDY = Study(
  title="What is contested about consolidation, after one round and two",
  settings=GAMES,
  paper="qwen3-1.7b",
  arms=arms,
  rows=rows,
  compared=compared,
  begins="extract",
  rounds=len(ROUNDS),
  about=(
    "In round 1, samples that are never renewed are those renewed once a round. From round 2 on, "
    "each run learns from knowledge of its own."
  ),
  options=add_options,
)

if __name__ == "__main__":
  main(STUDY)
