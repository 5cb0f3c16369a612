"""OPCD's tables: in context, off-policy and on-policy, for a system prompt and for a game; and a
teacher that is trained along (live) against one that is not (frozen).

    JOBS=4 python experiments/opcd_tables.py smollm2-135m runs/opcd
    JOBS=4 python experiments/opcd_tables.py pocket runs/opcd
    JOBS=4 python experiments/opcd_tables.py sokoban-qwen3-4b runs/opcd --weights=FOLDER

The system prompt is the one of experiments/system_prompt.py, not one of OPCD's.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from readings import Cell, Compared, Row  # noqa: E402
from study import GAMES, Changes, Setting, Study, main  # noqa: E402

ON, OFF, LIVE = "on-policy", "off-policy", "live"
ARMS = {
  ON: {},
  OFF: {"consolidation.data": "teacher", "consolidation.kind": "forward_kl"},
  LIVE: {"consolidation.teacher": "live"},
}
PUBLISHED = {  # base, in context, off-policy, on-policy, live
  "Frozen Lake, 1.7B": ("6.3", "20.2 ± 2.2", "22.9 ± 4.0", "26.5 ± 6.4", ""),
  "Sokoban, 4B": ("9.4", "48.4", "51.6", "53.9", "18.8"),
  "medical, Llama-3.1-8B": ("68.4", "72.2", "75.2", "76.7", ""),
  "medical, Llama-3.2-3B": ("59.4", "66.4", "71.0", "76.3", ""),
  "medical, Qwen2.5-7B": ("46.4", "52.6", "58.5", "62.3", ""),
  "safety, Llama-3.1-8B": ("70.7", "75.3", "77.2", "79.6", ""),
  "safety, Llama-3.2-3B": ("30.7", "69.5", "83.3", "83.1", ""),
  "safety, Qwen2.5-7B": ("69.1", "72.7", "77.0", "78.1", ""),
}
ROWS = {
  "base": Cell(ON, 0),
  "in context": Cell(ON, 1, "in_context"),
  "off-policy (teacher's samples, forward KL)": Cell(OFF),
  "on-policy, frozen teacher": Cell(ON),
  "on-policy, live teacher": Cell(LIVE),
}


def arms(setting: Setting, options: argparse.Namespace) -> dict[str, Changes]:
  """The same of a game and of a text; where a gate is, nothing is skipped."""
  games = setting.name in GAMES
  return {
    name: changes | ({"consolidation.on_no_gain": "warn"} if games else {})
    for name, changes in ARMS.items()
  }


STUDY = Study(
  title="OPCD: percent passed, or answers of the wanted form",
  settings=("smollm2-135m", *GAMES),
  paper="sokoban-qwen3-4b",
  published=tuple(PUBLISHED),
  arms=arms,
  rows=lambda names: [
    Row(name, tuple(figures[place] for figures in PUBLISHED.values()), cell)
    for place, (name, cell) in enumerate(ROWS.items())
  ],
  compared=lambda names: [
    Compared("on-policy above off-policy", Cell(ON), Cell(OFF)),
    Compared("on-policy above in context", Cell(ON), Cell(ON, 1, "in_context")),
    Compared("frozen teacher above live", Cell(ON), Cell(LIVE)),
  ],
  begins="extract",
)

if __name__ == "__main__":
  main(STUDY)
