"""Which TextArena games can be played, found out by playing: `python -m oel_jax.main --games`."""

import contextlib
import functools
import os
import re
import time
from collections.abc import Iterable, Iterator

from oel_jax.environments.api import Game, GameSpec
from oel_jax.environments.load import shows_something, textarena_game

_BRACKETS = re.compile(r"\[[^\[\]\n]{1,24}\]")
_NAMED = 6  # actions of a line
_SLOW = 1.0  # seconds to open a game; more are told


def tried(names: Iterable[str] | None = None) -> Iterator[str]:
  """Yields a line for each single-player TextArena game, with what came of trying it, and a last
  one about those that need several players.

  Tried is: to open it with seed 0 and its own default arguments, an invalid move, and some of the
  moves that its rules name. That it can be won, or by whom, is not.

  Args:
    names: of games; None: all that are registered without wrappers.
  """
  from textarena.envs.registration import ENV_REGISTRY

  if names is None:
    names = [name for name, entry in ENV_REGISTRY.items() if not entry.default_wrappers]
  several = 0
  for name in sorted(names):
    told = _try(name)
    several += told is None
    if told is not None:
      yield f"{name:32} {told}"
  yield f"({several} more games need several players.)"


def _try(name: str) -> str | None:
  """What came of trying the game; None if it needs several players."""
  spec = GameSpec(name, functools.partial(textarena_game, name, {}))
  began = time.monotonic()
  try:
    with _silent():
      game = Game(spec, 0)
      seconds = time.monotonic() - began
      complaint = game.play("")
      actions = _actions(game, complaint.outcome or complaint.observation)
      spec = GameSpec(name, spec.make, "", ", ".join(actions), r"\[([^\[\]]+)\]")
      if not shows_something(spec, game, complaint):
        return "refused: shows the player nothing, whatever is played"
  except (ValueError, RuntimeError) as error:
    return None if "needs several players" in str(error) else f"cannot be tried here: {_why(error)}"
  parts = ["shows its state" if game.observation.strip() else "shows nothing before the first move"]
  parts += [f"{seconds:.0f} s to open"] if seconds > _SLOW else []
  parts += [f"actions such as {' '.join(actions[:_NAMED])}"] if actions else []
  return "; ".join(parts)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
  """Drops what is written to stderr: NLTK, which tells there what it cannot download, keeps the
  stream that it found when it was imported.
  """
  kept = os.dup(2)
  with open(os.devnull, "w") as nowhere:
    os.dup2(nowhere.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)


def _actions(game: Game, complaint: str) -> list[str]:
  """What stands in brackets in the rules, which the player does not see, and in a complaint about
  an invalid move.
  """
  texts = [complaint, *getattr(game._environment, "rules", ())]
  return list(dict.fromkeys(found for text in texts for found in _BRACKETS.findall(text)))


def _why(error: Exception) -> str:
  """In one line what is absent, or what the game raised."""
  reason = error.__cause__ or error
  data = re.search(r"nltk\.download\('(\w+)'\)", str(reason))
  if data:
    return f"it needs words of NLTK (python -m nltk.downloader {data[1]})"
  told = " ".join(str(reason).split())
  return f"{type(reason).__name__}: {told[:120]}"
