"""OEL, Figure 4: what knowledge gives in context as trajectories accumulate, in each round, and
whether consolidation passes the plateau.

    JOBS=4 python experiments/oel_figure4.py pocket runs/figure4
    JOBS=4 python experiments/oel_figure4.py sokoban-qwen3-4b runs/figure4 --weights=FOLDER
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from readings import Cell, Compared, Row, share_of  # noqa: E402
from study import GAMES, Changes, Setting, Study, given, main  # noqa: E402

ARM, ROUNDS = "own", (1, 2, 3)
SHARES = {"⅛": 0.125, "¼": 0.25, "½": 0.5}


def arms(setting: Setting, options: argparse.Namespace) -> dict[str, Changes]:
  """One, which also plays with the knowledge as it stood before its end."""
  use = given(options, setting, "extraction.use")
  points = tuple(sorted({share_of(use, share) for share in SHARES.values()}))
  how = {"evaluation.accumulation": points, "evaluation.accumulation_rounds": len(ROUNDS)}
  return {ARM: how}


def rows(names: list[str]) -> list[Row]:
  """Each round's curve, and what the weights hold at its end."""
  found = [Row("base", "", Cell(ARM, 0))]
  for number in ROUNDS:
    head = f"round {number}, in context with"
    for told, share in SHARES.items():
      found.append(Row(f"{head} {told} of the trajectories", "", Cell(ARM, number, share)))
    found.append(Row(f"{head} all", "saturates", Cell(ARM, number, "in_context")))
    found.append(Row(f"round {number}, consolidated", "passes that plateau", Cell(ARM, number)))
  return found


def compared(names: list[str]) -> list[Compared]:
  """Whether the second half of the trajectories adds anything, and whether the weights hold more
  than the whole knowledge gives.
  """
  found = []
  for number in ROUNDS:
    whole = Cell(ARM, number, "in_context")
    told = f"round {number}: all above half of the trajectories, in context"
    found.append(Compared(told, whole, Cell(ARM, number, SHARES["½"])))
    told = f"round {number}: consolidated above in context"
    found.append(Compared(told, Cell(ARM, number), whole))
  return found


STUDY = Study(
  title="OEL, Figure 4: accumulation and consolidation, percent passed",
  settings=GAMES,
  paper="sokoban-qwen3-4b",
  arms=arms,
  rows=rows,
  compared=compared,
  rounds=len(ROUNDS),
  about="The base of a round's knowledge is the model that the round before left.",
)

if __name__ == "__main__":
  main(STUDY)
