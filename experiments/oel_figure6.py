"""OEL, Figure 6: what is kept of what the model could do before, on-policy against off-policy. The
paper asks IF-Eval; here it is `evaluation.tasks`, and the divergence from the base on unrelated
prompts where the setting has such.

    JOBS=4 python experiments/oel_figure6.py pocket runs/figure6
    JOBS=4 python experiments/oel_figure6.py desk runs/figure6 --weights=GGUF
    JOBS=4 python experiments/oel_figure6.py qwen3-1.7b runs/figure6 --weights=FOLDER
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from readings import Cell, Compared, Row  # noqa: E402
from study import GAMES, Study, main  # noqa: E402

ROUNDS = (1, 2)
OFF_POLICY = {"consolidation.data": "teacher"}
ARMS = {
  "on-policy": {},
  "off-policy-reverse_kl": OFF_POLICY,
  "off-policy-forward_kl": OFF_POLICY | {"consolidation.kind": "forward_kl"},
  "off-policy-imitation": OFF_POLICY | {"consolidation.kind": "imitation"},
}
TRAINED = {"consolidation.on_no_gain": "warn"}  # in each arm, whatever the gate says
TASKS = ("instructions", "extraction", "worlds", "symmetric", "other")
# OPCD, Frozen Lake, 1.7B, IF-Eval: of the base, off-policy, on-policy.
PUBLISHED = {
  "base": "67.3",
  "on-policy": "67.1 (OEL: 66–67)",
  "off-policy-forward_kl": "65.1, falls",
}


def rows(names: list[str]) -> list[Row]:
  """Games passed and each task, of the base and of each arm after each round."""
  found = []
  for what in ("passed", *TASKS, "kl"):
    head = {"passed": "passed %", "kl": "KL to the base × 100"}.get(what, f"{what} %")
    shown = PUBLISHED if what == "instructions" else {}
    found.append(Row(f"{head}, base", shown.get("base", ""), Cell("on-policy", 0, what=what)))
    for number in ROUNDS:
      for arm in ARMS:
        told = shown.get(arm, "") if number == 1 else ""
        found.append(Row(f"{head}, {arm}, round {number}", told, Cell(arm, number, what=what)))
  return found


def compared(names: list[str]) -> list[Compared]:
  """On-policy against each off-policy arm, and each arm against the base."""
  found = []
  for what in ("passed", *TASKS, "kl"):
    for number in ROUNDS:
      own = Cell("on-policy", number, what=what)
      for arm in ARMS:
        other = (
          Cell("on-policy", 0, what=what) if arm == "on-policy" else Cell(arm, number, what=what)
        )
        told = "the base" if arm == "on-policy" else arm
        found.append(Compared(f"{what}, round {number}: on-policy above {told}", own, other))
  return found


STUDY = Study(
  title="OEL, Figure 6: what is kept, on-policy and off-policy",
  settings=GAMES,
  paper="qwen3-1.7b",
  arms=lambda setting, options: {name: TRAINED | changes for name, changes in ARMS.items()},
  rows=rows,
  compared=compared,
  begins="extract",
  rounds=len(ROUNDS),
  about=(
    "What is kept has an interval over seeds alone: of its examples only the counts are. "
    "Instructions are a stand-in for IF-Eval: kinds that a program checks, asked in our own words."
  ),
)

if __name__ == "__main__":
  main(STUDY)
