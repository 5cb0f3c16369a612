"""Sokoban and Frozen Lake on boards of which the held-out ones are met nowhere else, on the policy
of both games, whose weights experiments/pretrain_pocket.py:boards-4m or :boards-6m makes; none are
shipped yet.

    python -m oel_jax.main --config=experiments/new_boards.py:sokoban \\
        --workdir=runs/new_boards/sokoban/0 --config.seed=0 \\
        --config.policy.weights=runs/boards-6m/0/pocket.safetensors

TextArena draws the boards; `oel_jax/pocket/boards/chosen.py` takes those that can be won within the
turn limit, and divides them in two halves by a hash: games whose knowledge and prompts are learned
from have boards of one half, held-out games those of the other, and pre-training begins on none of
them. So the share of held-out boards met in training is 0.
"""

import pathlib
import sys

import ml_collections

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import frozen_lake  # noqa: E402

GAMES = {
  "sokoban": ("sokoban", dict(min_moves=2, max_moves=8), 10),
  "lake4": ("lake", dict(size=4, num_holes=3, max_moves=8), 8),
  "lake5": ("lake", dict(size=5, num_holes=4, max_moves=8), 8),
}
SIZES = tuple(GAMES)
TASKS = (
  "push_extraction",
  "lake_extraction",
  "rooms",
  "rooms_symmetric",
  "lakes",
  "lakes_symmetric",
  "other",
)


def get_config(game: str = "sokoban") -> ml_collections.ConfigDict:
  """`game` is a key of GAMES."""
  if game not in GAMES:
    raise ValueError(
      f"experiments/new_boards.py has no game {game!r}: it must be one of {', '.join(GAMES)}"
    )
  make, arguments, max_turns = GAMES[game]
  config = frozen_lake.get_config("pocket-table")
  with config.unlocked():
    config.policy.architecture, config.policy.weights = "auto", None
    config.deployment.environment = f"oel_jax.pocket.boards.chosen:{make}"
    config.deployment.game_args = ml_collections.ConfigDict(arguments)
    config.deployment.max_turns = max_turns
    config.evaluation.tasks = tuple(f"oel_jax.pocket.boards.retention:{task}" for task in TASKS)
  return config
