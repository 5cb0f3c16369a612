"""What the user side's stages need beside the policy, tried before anything is written."""

import os
import pathlib
from typing import Any

from absl import logging

from oel_jax.evaluation import tasks
from oel_jax.runtime import named
from oel_jax.stages import collect, unrelated
from oel_jax.stages.run import PROMPTS


def check(config: Any, workdir: str | os.PathLike) -> str:
  """Returns the name of the game that is played, or of the logs that are read.

  Raises:
    ValueError: it cannot be played; a task, an edit or a function that the configuration names is
      not there; or the unrelated prompts are none.
    RuntimeError: the game fails, or shows its rules.
    OSError: a file is missing.
  """
  tasks.read_tasks(config.evaluation.tasks)
  unrelated.prompts(config)
  named.edit(config.extraction.edit, "config.extraction.edit")
  name = _check_logs(config, pathlib.Path(workdir)) if config.logs.path else ""
  if config.deployment.environment:
    # Here, for who begins from logs may have no game at all.
    from oel_jax.environments import game_spec, try_game

    game = game_spec(config.deployment)
    try_game(game)
    name = name or game.name
  return name


def _check_logs(config: Any, workdir: pathlib.Path) -> str:
  """Raises as `check`; rounds to come may have no logs yet, those that have begun need none."""
  collect.redactor(config)
  collect.agents_tools(config)
  first = pathlib.Path(collect.place(config, 1))
  if not first.exists() and not (workdir / "round_1" / PROMPTS).exists():
    raise FileNotFoundError(
      f"{first}: there is no such file or folder: config.logs.path must be a log, or a "
      "folder of them"
    )
  if config.rounds > 1 and "{round}" not in config.logs.path:
    logging.warning(
      "config.logs.path is %r for all %d rounds: later ones learn from what the first model said; "
      'with "{round}" in it each round has its own',
      config.logs.path,
      config.rounds,
    )
  return config.logs.path
