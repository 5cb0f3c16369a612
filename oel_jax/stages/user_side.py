"""What the user side's stages need beside the policy, tried before anything is written."""

from typing import Any

from oel_jax.environments import game_spec, try_game
from oel_jax.evaluation import tasks
from oel_jax.stages import extract


def check(config: Any) -> str:
  """Returns the name of the game that is played.

  Raises:
    ValueError: it cannot be played, or a task or an edit that the configuration names is not there.
    RuntimeError: the game fails, or shows its rules.
    OSError: a file is missing.
  """
  game = game_spec(config.deployment)
  try_game(game)
  tasks.read_tasks(config.evaluation.tasks)
  extract.read_edit(config)
  return game.name
