"""What the user side's stages need beside the policy, tried before anything is written."""

from typing import Any

from oel_jax.environments.textarena import game_spec, try_game
from oel_jax.evaluation import tasks
from oel_jax.stages import extract


def check(config: Any) -> None:
  """Raises ValueError if the game cannot be played, or if a task or an edit that the configuration
  names is not there; OSError if a file is missing.
  """
  try_game(game_spec(config.deployment))
  tasks.read_tasks(config.evaluation.tasks)
  extract.read_edit(config)
