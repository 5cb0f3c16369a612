"""The user side: the only code that sees an environment. TextArena games by name, their prompts,
and play.
"""

from oel_jax.deployment.games import Game, GameSpec, Step, game_spec, open_game, parse_action
from oel_jax.deployment.play import Episode, play, play_to_file

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
