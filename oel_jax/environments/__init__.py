"""The user side: the only code that sees an environment. What can be played, how it is shown, and
play.
"""

from oel_jax.environments.actions import parse_action
from oel_jax.environments.api import Environment, Game, GameSpec, Step
from oel_jax.environments.load import changes, code_digest, game_spec, textarena_game, try_game
from oel_jax.environments.rollout import Episode, play, play_to_file

__all__ = [
  "Environment",
  "Episode",
  "Game",
  "GameSpec",
  "Step",
  "changes",
  "code_digest",
  "game_spec",
  "parse_action",
  "play",
  "play_to_file",
  "textarena_game",
  "try_game",
]
