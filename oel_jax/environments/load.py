"""The game that a configuration names, and whether it can be played."""

import functools
import inspect
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from oel_jax.environments.actions import parse_action
from oel_jax.environments.api import Environment, Game, GameSpec, Step
from oel_jax.runtime import files, named

TEXTARENA = "textarena"
ROUNDS_BEFORE = "{rounds_before}"  # a value of game_args that is the number in its place
_FIELD = "config.deployment.environment"
_TRIED = 6  # moves that a game is tried with


def game_spec(deployment: ml_collections.ConfigDict, rounds_before: int = 0) -> GameSpec:
  """The game of a `config.deployment`; nothing is opened.

  Args:
    deployment: config.deployment.
    rounds_before: how many rounds went before the one that plays, which is told to a game that
      changes: it stands in place of each value of `game_args` that is ROUNDS_BEFORE.

  Raises:
    ValueError: `action_pattern` is no regular expression or has no group 1, TextArena has no such
      game, or `environment` names nothing that can be called.
    OSError: `environment` names a file that is not there.
  """
  try:
    groups = re.compile(deployment.action_pattern).groups
  except re.error as error:
    raise ValueError(
      f"config.deployment.action_pattern is {deployment.action_pattern!r}: no regular expression "
      f"({error})"
    ) from error
  if groups < 1:
    raise ValueError(
      f"config.deployment.action_pattern is {deployment.action_pattern!r}: it needs a group ( ) "
      "around the action"
    )
  environment, given = deployment.environment, deployment.game_args.to_dict()
  arguments = {n: rounds_before if v == ROUNDS_BEFORE else v for n, v in given.items()}
  shown = dict(
    player=deployment.player,
    actions=deployment.actions,
    action_pattern=deployment.action_pattern,
    max_turns=deployment.max_turns,
    passed_reward=deployment.passed_reward,
    rounds_before=rounds_before,
  )
  if environment == TEXTARENA:
    make = functools.partial(textarena_game, deployment.game, arguments)
    return GameSpec(deployment.game, make, **shown)
  own = _function(environment, named.source(environment, _FIELD))
  make = functools.partial(_made, environment, own, arguments)
  # By the file's name, wherever it lies: a run's folder and its files may be moved together.
  return GameSpec(re.split(r"[/\\]", environment)[-1], make, **shown, field="environment")


@functools.cache
def _function(environment: str, file: pathlib.Path | None) -> Callable[..., Any]:
  """What makes environments; its file runs once a process, with what it reads for all of them."""
  return named.function(environment, _FIELD)


def changes(deployment: ml_collections.ConfigDict) -> bool:
  """Whether the game is another in each round: ROUNDS_BEFORE is one of its arguments."""
  return ROUNDS_BEFORE in deployment.game_args.to_dict().values()


def code_digest(deployment: ml_collections.ConfigDict) -> str | None:
  """16 hexadecimal digits of the file that `environment` names; None if it is TextArena's, or of
  a module that has no file.
  """
  if deployment.environment == TEXTARENA:
    return None
  file = named.source(deployment.environment, _FIELD)
  return files.sha256(file)[:16] if file else None


def textarena_game(game: str, arguments: Mapping[str, Any]) -> Environment:
  """One episode of a TextArena game; TextArena is imported when the first one is made."""
  from oel_jax.environments.textarena import TextArena

  return TextArena(game, arguments)


def _made(environment: str, make: Callable[..., Any], arguments: Mapping[str, Any]) -> Environment:
  """What the user's class or function makes.

  Raises:
    ValueError: it fails, or what it makes is a class, or has no `reset` or no `step`.
  """
  told = f"{_FIELD} is {environment!r}"
  try:
    made = make(**arguments)
  except named.FAILURES as error:
    place = named.explained(error, named.source(environment, _FIELD))
    raise ValueError(
      f"{told}, which fails with config.deployment.game_args {arguments!r} ({place}): it takes "
      f"{_signature(make)}"
    ) from error
  if isinstance(made, type):
    raise ValueError(
      f"{told}, which makes the class {made.__name__} and not an object of it: it must return "
      f"{made.__name__}(...), or be that class itself"
    )
  for method in ("reset", "step"):
    if not callable(getattr(made, method, None)):
      raise ValueError(
        f"{told}, which makes {made!r}, and that has no method {method}: it must have reset(seed) "
        "and step(action), as environments/api.py says"
      )
  return made


def _signature(make: Callable[..., Any]) -> str:
  try:
    return str(inspect.signature(make))
  except (TypeError, ValueError):  # a class of a C extension
    return "other arguments"


def try_game(spec: GameSpec) -> None:
  """Opens a game and makes moves: what cannot be played shows before a model is loaded.

  Raises:
    ValueError: the game shows the player nothing, or another thing the second time; or as `Game`.
    RuntimeError: as `Game` and `Game.play`.
  """
  if spec.field == "environment":  # TextArena's draw from the generators that `Game` sets
    _refuse_chance(spec)
  game = Game(spec, 0)
  complaint = game.play("")
  if not shows_something(spec, game, complaint):
    raise ValueError(
      f"config.deployment.{spec.field} is {spec.name!r}, which shows the player nothing to go by, "
      f"only {game.observation[:80]!r} whatever is played: take another game, or one that shows "
      "its state (rules are hidden)"
    )


def _refuse_chance(spec: GameSpec) -> None:
  """Raises ValueError unless the same seed and actions lead to the same texts, twice."""
  for first, again in zip(_texts(spec), _texts(spec), strict=True):
    if first != again:
      raise ValueError(
        f"config.deployment.{spec.field} is {spec.name!r}: with seed 0 and the same moves it says "
        f"{first[:80]!r} once and {again[:80]!r} another time: the same seed must give the same "
        "episode, so all chance must come from random.Random(seed), or the like"
      )


def _texts(spec: GameSpec) -> list[str]:
  """What an episode of seed 0 says while it is tried, one text for each move that is tried."""
  game = Game(spec, 0)
  found = [game.observation]
  for action in ("", *sample_actions(spec)[:_TRIED]):
    step = game.play(action)
    found.append(_said(step))
    if step.done:
      game = Game(spec, 0)
  return found


def shows_something(spec: GameSpec, game: Game, complaint: Step) -> bool:
  """Whether what the player sees, at first or after a move, depends on the seed, or on its moves
  beyond a complaint about an invalid one.

  Args:
    spec: the game.
    game: opened with seed 0, with one invalid move made; its moves are gone on with.
    complaint: what that move led to.
  """
  first = game.observation.strip()
  dull = {"", first, _said(complaint)}
  actions, step = sample_actions(spec)[:_TRIED], complaint
  for action in actions:
    if step.done:
      game = Game(spec, 0)
    step = game.play(action)
    if _said(step) not in dull:
      return True
  others = [Game(spec, seed) for seed in range(3)]
  if any(other.observation.strip() != first for other in others):
    return True
  if actions and len({_said(other.play(actions[0])) for other in others}) > 1:
    return True
  # Without a move that the game may take, no more can be told.
  return not actions and dull != {""}


def _said(step: Step) -> str:
  """What the environment said; that we stopped a game is not its word."""
  return (
    step.observation if step.ended == "turn_limit" else step.outcome or step.observation
  ).strip()


def sample_actions(spec: GameSpec) -> list[str]:
  """Actions that the pattern takes, in brackets: those that the prompt offers, then numbers, words
  and letters.
  """
  usual = ["1", "0", "5", "a", "0 0", "1 1", "1 2", "1 1 1", "a 1", "1 2 3 4", "word"]
  texts = [match.group() for match in re.finditer(spec.action_pattern, spec.actions, re.IGNORECASE)]
  texts += [form.format(action) for action in usual for form in ("[{}]", "{}")]
  parsed = (parse_action(text, spec.action_pattern, spec.actions) for text in texts)
  return list(dict.fromkeys(action for action in parsed if action))
