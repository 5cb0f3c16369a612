"""Sokoban, 6 × 6 with one box, as in the paper's main experiment (OEL, section 4, Table 1).

    python -m oel_jax.main --config=experiments/sokoban.py:qwen3-4b-instruct \\
        --workdir=runs/sokoban --config.policy.weights=FOLDER
"""

import ml_collections

from oel_jax import config as config_lib

SIZES = ("qwen3-4b-instruct",)


def get_config(size: str = "qwen3-4b-instruct") -> ml_collections.ConfigDict:
  """`size`: "qwen3-4b-instruct", for Qwen3-4B-Instruct-2507, whose Hugging Face folder
  `policy.weights` must name.
  """
  if size not in SIZES:
    raise ValueError(f"experiments/sokoban.py has no size {size!r}: it must be {SIZES[0]}")
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
  return config
