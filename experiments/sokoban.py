"""Sokoban, 6 × 6 with one box, as in the paper's main experiment (OEL, section 4, Table 1).

    python -m oel_jax.main --config=experiments/sokoban.py:qwen3-4b-instruct \\
        --workdir=runs/sokoban --config.policy.weights=FOLDER
    python -m oel_jax.main --config=experiments/sokoban.py:qwen3-4b-instruct-paper \
        --workdir=runs/sokoban-paper --config.policy.weights=FOLDER
"""

import pathlib
import sys

import ml_collections

from oel_jax import config as config_lib

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import frozen_lake  # noqa: E402

SIZES = ("qwen3-4b-instruct", f"qwen3-4b-instruct{frozen_lake.AS_IT_IS}")


def get_config(size: str = "qwen3-4b-instruct") -> ml_collections.ConfigDict:
  """`size`: "qwen3-4b-instruct", for Qwen3-4B-Instruct-2507, whose Hugging Face folder
  `policy.weights` must name; with "-paper" behind it, it has the paper's update, too
  (`frozen_lake.papers_update`).
  """
  if size not in SIZES:
    known = " or ".join(SIZES)
    raise ValueError(f"experiments/sokoban.py has no size {size!r}: it must be {known}")
  config = config_lib.default()
  with config.unlocked():
    config.rounds = 3
    config.policy.thinking = False
    config.deployment.game = "Sokoban-v0-raw"
    config.deployment.game_args = ml_collections.ConfigDict(dict(dim_room=(6, 6), num_boxes=1))
    config.extraction.update(
      form="items", trajectories=100, use=50, see_previous=True, max_knowledge_tokens=8192
    )
    config.consolidation.update(learning_rate=1e-6, steps=100)
  return frozen_lake.papers_update(config) if size.endswith(frozen_lake.AS_IT_IS) else config
