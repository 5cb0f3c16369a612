"""OEL, Figure 5: how long the responses are, round by round. The paper's fall to about 70% by
round 3.

    JOBS=4 python experiments/oel_figure5.py pocket runs/figure5
    JOBS=4 python experiments/oel_figure5.py qwen3-1.7b runs/figure5 --weights=FOLDER
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from readings import Cell, Column, Compared, Row  # noqa: E402
from study import GAMES, Study, main  # noqa: E402

ARM, ROUNDS = "own", (1, 2, 3)
STATES = {"base": 0, **{f"round {number}": number for number in ROUNDS}}
HEADS = {"tokens": "tokens a response", "passed": "passed %", "cut": "cut %"}


def of_the_base(column: Column) -> list[str]:
  """Each round's tokens as a share of the base's, mean ± standard error over the seeds."""
  base, lines = column.values(Cell(ARM, 0, what="tokens")), []
  for number in ROUNDS:
    found = column.values(Cell(ARM, number, what="tokens"))
    shares = [100 * found[seed].mean() / base[seed].mean() for seed in found if seed in base]
    if shares:
      error = np.std(shares, ddof=1) / np.sqrt(len(shares)) if len(shares) > 1 else 0
      told = f"{np.mean(shares):.0f}%" + (f" ± {error:.0f}" if error else "")
      lines.append(f"{column.head}: after round {number}, {told} of the base's tokens.")
  return ["", *lines] if lines else []


STUDY = Study(
  title="OEL, Figure 5: the length of responses, round by round",
  settings=GAMES,
  paper="qwen3-1.7b",
  arms=lambda setting, options: {ARM: {}},
  rows=lambda names: [
    Row(
      f"{state}, {head}",
      "about 70% of the base" if (number, what) == (3, "tokens") else "",
      Cell(ARM, number, what=what),
    )
    for what, head in HEADS.items()
    for state, number in STATES.items()
  ],
  compared=lambda names: [
    Compared(
      f"tokens, round {number} above the base",
      Cell(ARM, number, what="tokens"),
      Cell(ARM, 0, what="tokens"),
    )
    for number in ROUNDS
  ],
  rounds=len(ROUNDS),
  about="A game has one number, the mean over its turns; cut are responses that reach the limit.",
  details=of_the_base,
)

if __name__ == "__main__":
  main(STUDY)
