"""TextArena games by name, for one player, with their rules hidden.

TextArena sends the rules as an observation like any other; what the player sees here never holds
them.
"""

import contextlib
import copy
import difflib
import importlib
import inspect
import io
import math
import numbers
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import textarena
from absl import logging
from textarena.envs.registration import ENV_REGISTRY

from oel_jax.environments.api import Step

_RULE_WORDS = 3  # fewer are no sentence: a board and the rules may share a label
# Reasons that a game gives for an invalid move, but which are the end of a game that was lost.
_LOST = re.compile(r"You hit a mine at ")


class TextArena:
  """One episode of a TextArena game, an `environments.api.Environment`.

  Args:
    game: its registered name, without wrappers: one that ends in "-raw".
    arguments: keyword arguments of the game.

  Raises:
    ValueError: the name is unknown or comes with wrappers.
  """

  def __init__(self, game: str, arguments: Mapping[str, Any]):
    check_name(game)
    self._game, self._arguments = game, arguments
    self.rules: list[str] = []  # as the game said them
    self._hidden: list[str] = []  # their sentences

  def reset(self, seed: int) -> str:
    """Starts the game; returns what it shows, but the rules.

    Raises:
      ValueError: it needs several players, or refuses its arguments.
      RuntimeError: it shows its rules, or returns what no game may return.
    """
    self._seed = seed
    with self._quiet():
      self._env = _start(self._game, self._arguments, seed)
      return self._observe()

  def step(self, action: str) -> Step:
    """Makes a move; the game gets the action in brackets, or "" if there is none.

    Raises:
      RuntimeError: the game shows its rules, or returns what no game may return.
    """
    with self._quiet():
      done, _ = self._env.step(f"[{action}]" if action else "")
      rewards, info = self._env.close() if done else ({}, {})
      if not isinstance(done, (bool, np.bool_)):
        raise self._wrong(f"whether it is over is {done!r}: it must be True or False")
      observation = self._observe()
    if not done:
      return Step(observation)
    reward, last, invalid = self._outcome(rewards, info)
    outcome = "\n".join(part for part in (observation, last) if part)
    return Step(observation, True, reward, outcome, "invalid" if invalid else "")

  def _outcome(self, rewards: Any, info: Any) -> tuple[float, str | None, bool]:
    """The player's reward, the game's reason, and whether an invalid move ended the game."""
    reward = rewards.get(0) if isinstance(rewards, Mapping) else None
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
      right = "they must hold a finite number for player 0"
      raise self._wrong(f"its rewards at the end are {rewards!r}: {right}")
    facts = info.get(0, {}) if isinstance(info, Mapping) else None
    if not isinstance(facts, Mapping):
      right = "they must hold a dictionary for player 0"
      raise self._wrong(f"its facts at the end are {info!r}: {right}")
    last = facts.get("reason")
    if not isinstance(last, (str, type(None))):
      raise self._wrong(f"its reason for the end is {last!r}: it must be a text")
    return float(reward), last, bool(facts.get("invalid_move")) and not _LOST.search(last or "")

  def _wrong(self, what: str) -> RuntimeError:
    return RuntimeError(f"{self._game}, seed {self._seed}: {what}: take another game")

  def _observe(self) -> str:
    """Everything the game said since the last time, but the rules and the player's own move."""
    try:
      said = [(text, kind) for _, text, kind in self._env.get_observation()[1]]
    except (TypeError, ValueError, LookupError) as error:
      what = f"its observations are no list of sender, text and type ({error})"
      raise self._wrong(what) from error
    shown = []
    for text, kind in said:
      if not isinstance(text, str) or not isinstance(kind, textarena.ObservationType):
        what = f"the observation {text!r} has no type ({kind!r}), its rules cannot be hidden"
        raise self._wrong(what)
      if kind is textarena.ObservationType.PROMPT:
        self.rules.append(text)
        self._hidden += _sentences(text)
      elif kind is not textarena.ObservationType.PLAYER_ACTION:
        shown.append(text)
    seen = _squeeze("\n".join(shown))
    for sentence in self._hidden:
      if sentence in seen:
        raise RuntimeError(
          f"{self._game}, seed {self._seed}: the hidden rules reached the player: {sentence!r}"
        )
    return "\n".join(shown)

  @contextlib.contextmanager
  def _quiet(self) -> Iterator[None]:
    """Keeps from the user what the game prints."""
    printed = io.StringIO()
    try:
      with contextlib.redirect_stdout(printed):
        yield
    finally:
      if printed.getvalue():
        logging.debug("%s printed: %s", self._game, printed.getvalue())


def check_name(game: str) -> None:
  """Raises ValueError unless it is the name of a TextArena game without wrappers."""
  if game not in ENV_REGISTRY:
    close = difflib.get_close_matches(
      game, [name for name in ENV_REGISTRY if name.endswith("-raw")]
    )
    hint = (
      f"did you mean {' or '.join(close)}?"
      if close
      else "it must be the name of a TextArena game, such as FrozenLake-v0-raw"
    )
    raise ValueError(f"config.deployment.game is {game!r}, which TextArena does not know: {hint}")
  if ENV_REGISTRY[game].default_wrappers:
    raise ValueError(
      f"config.deployment.game is {game!r}, whose wrappers mix rules and board: it must be "
      f"{game + '-raw'!r}"
    )


def _start(game: str, arguments: Mapping[str, Any], seed: int) -> textarena.Env:
  """Makes and resets the environment; whatever it objects to becomes a ValueError that names the
  configuration's field.
  """
  entry = ENV_REGISTRY[game].entry_point
  try:
    if isinstance(entry, str):
      module, name = entry.split(":")
      entry = getattr(importlib.import_module(module), name)
  except Exception as error:
    raise ValueError(
      f"config.deployment.game is {game!r}, which this TextArena cannot load ({error!r}): "
      "take another game"
    ) from error
  several = (
    f"config.deployment.game is {game!r}, which needs several players: it must be a game for "
    "one player"
  )
  try:
    # A copy: games may change the lists they are given.
    env = textarena.make(game, **copy.deepcopy(dict(arguments)))
    env.reset(num_players=1, seed=seed)
  except Exception as error:
    # TypeError: an argument that has "player" in its name.
    if "player" in str(error).lower() and not isinstance(error, TypeError):
      raise ValueError(several) from error
    raise ValueError(
      f"config.deployment.game_args is {dict(arguments)!r}, with which {game} does not start "
      f"({error!r}): "
      f"it takes {inspect.signature(entry)}"
    ) from error
  if not isinstance(env.state, textarena.SinglePlayerState):
    raise ValueError(several)
  _take_any_call(env.state)
  return env


def _take_any_call(state: textarena.SinglePlayerState) -> None:
  """Lets the state take the calls that some games make, and that it does not declare.

  Countdown, Cryptarithm and Slitherlink give sender, text and type of an observation, and reward
  and reason of an invalid move; the state declares other orders. FifteenPuzzle, once solved, names
  the winners, which states of several players take.
  """
  add, invalid = state.add_observation, state.set_invalid_move

  def add_observation(*args, **named):
    if len(args) == 3 and isinstance(args[2], textarena.ObservationType):
      order = "from_id", "message", "observation_type"
      args, named = (), named | dict(zip(order, args, strict=True))
    add(*args, **named)

  def set_invalid_move(*args, **named):
    if len(args) == 2 and isinstance(args[1], str):  # reward, reason
      args = args[::-1]
    invalid(*args, **named)

  def set_winners(player_ids, reason):
    state.set_outcome(reward=float(0 in player_ids), reason=reason)

  state.add_observation, state.set_invalid_move = add_observation, set_invalid_move
  state.set_winners = set_winners


def _sentences(rules: str) -> list[str]:
  """The sentences and lines of a rules text that are long enough to tell from a board's labels."""
  parts = (_squeeze(part) for part in re.split(r"\n|(?<=[.!?])\s", rules))
  return [part for part in parts if len(re.findall(r"[^\W\d_]{2,}", part)) >= _RULE_WORDS]


def _squeeze(text: str) -> str:
  return " ".join(text.lower().split())
