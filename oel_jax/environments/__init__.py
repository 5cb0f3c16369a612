"""The user side: the only code that sees an environment. TextArena games by name, their prompts,
and play.
"""

from oel_jax.environments.rollout import Episode, play, play_to_file
from oel_jax.environments.textarena import Game, GameSpec, Step, game_spec, open_game, parse_action

__all__ = [
  "Episode",
  "Game",
  "GameSpec",
  "Step",
  "game_spec",
  "open_game",
  "parse_action",
  "play",
  "play_to_file",
]
