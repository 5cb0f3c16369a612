"""OEL, Table 1: what raw trajectories give and what knowledge extracted from them gives, in context
and in the weights. The paper's is Sokoban by Qwen3-4B-Instruct-2507.

    JOBS=4 python experiments/oel_table1.py pocket runs/table1
    python experiments/oel_table1.py desk runs/table1 --weights=GGUF
    python experiments/oel_table1.py sokoban-qwen3-4b runs/table1 --weights=FOLDER
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from readings import Cell, Compared, Row  # noqa: E402
from study import GAMES, Study, main  # noqa: E402

RAW, EXTRACTED = "trajectories", "extracted"
ROWS = (
  Row("no experience", "7.5", Cell(EXTRACTED, 0)),
  Row("raw trajectories in context", "10.9", Cell(RAW, 1, "in_context")),
  Row("raw trajectories consolidated", "7.8", Cell(RAW)),
  Row("extracted knowledge in context", "18.2", Cell(EXTRACTED, 1, "in_context")),
  Row("extracted knowledge consolidated", "21.4", Cell(EXTRACTED)),
)
COMPARED = (
  Compared(
    "extracted above raw, in context", Cell(EXTRACTED, 1, "in_context"), Cell(RAW, 1, "in_context")
  ),
  Compared("extracted above raw, consolidated", Cell(EXTRACTED), Cell(RAW)),
  Compared(
    "extracted: consolidated above in context", Cell(EXTRACTED), Cell(EXTRACTED, 1, "in_context")
  ),
  Compared("raw: consolidated above in context", Cell(RAW), Cell(RAW, 1, "in_context")),
)
STUDY = Study(
  title="OEL, Table 1: raw trajectories and extracted knowledge, percent passed",
  settings=GAMES,
  paper="sokoban-qwen3-4b",
  arms=lambda setting, options: {
    EXTRACTED: {},
    RAW: {"extraction.source": "trajectories"} | setting.raw,
  },
  rows=lambda arms: ROWS,
  compared=lambda arms: COMPARED,
)

if __name__ == "__main__":
  main(STUDY)
