"""TextArena games by name, for one player, with their rules hidden and their randomness kept to
themselves.

TextArena draws from Python's and NumPy's global generators, at the start of a game and while it is
played, and it sends the rules as an observation like any other. Here each game has generator states
of its own, and what the player sees never holds the rules.
"""

import contextlib
import copy
import dataclasses
import difflib
import importlib
import inspect
import io
import math
import numbers
import random
import re
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
import textarena
from absl import logging
from textarena.envs.registration import ENV_REGISTRY

_RULE_WORDS = 3  # fewer are no sentence: a board and the rules may share a label
# Reasons that a game gives for an invalid move, but which are the end of a game that was lost.
_LOST = re.compile(r"You hit a mine at ")


@dataclasses.dataclass(frozen=True)
class GameSpec:
  """What `config.deployment` says of the game; the fields are explained there."""

  name: str
  args: Mapping[str, Any]
  player: str
  actions: str
  action_pattern: str
  max_turns: int
  passed_reward: float = 1.0


@dataclasses.dataclass(frozen=True)
class Step:
  """What a move led to.

  Attributes:
    observation: everything the game said since, but the rules and the move itself; may be "" on the
      last step.
    done: whether the game is over, by its own word or by our turn limit.
    reward: the game's own; 0.0 while it goes on and where our turn limit ends it.
    outcome: what the game said last and its reason, or that it was stopped; "" while it goes on.
    ended: "passed", "lost", "invalid" or "turn_limit"; "" while it goes on.
  """

  observation: str
  done: bool
  reward: float = 0.0
  outcome: str = ""
  ended: str = ""


def game_spec(deployment: ml_collections.ConfigDict) -> GameSpec:
  """The game of a `config.deployment`.

  Raises:
    ValueError: `action_pattern` is no regular expression or has no group 1.
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
  return GameSpec(
    name=deployment.game,
    args=deployment.game_args.to_dict(),
    player=deployment.player,
    actions=deployment.actions,
    action_pattern=deployment.action_pattern,
    max_turns=deployment.max_turns,
    passed_reward=deployment.passed_reward,
  )


def parse_action(answer: str, pattern: str, offered: str = "") -> str:
  """The last action in an answer, as the game wants it: "[up]"; "" if there is none.

  The last, because answers often list the allowed actions before they choose.

  Args:
    answer: what stands after the thinking; an action named in the thinking was not taken.
    pattern: regular expression, case ignored; the spaces in its group 1 are squeezed, and brackets
      are put around it.
    offered: the actions in the words of the prompt. An action is spelled as it stands there; or
      else as the pattern has it; or else as it was written.
  """
  matches = list(re.finditer(pattern, answer, re.IGNORECASE))
  written = _words(matches[-1].group(1) or "") if matches else ""
  return f"[{_spelled(written, matches[-1], offered)}]" if written else ""


def _spelled(written: str, match: re.Match, offered: str) -> str:
  """The action with the case that the game offers, since games may tell [Left] from [left]."""
  for flags in (0, re.IGNORECASE):
    listed = re.search(rf"(?<!\w){re.escape(written)}(?!\w)", offered, flags)
    if listed:
      return listed.group()
  start, end = match.span(1)
  raw, exact = match.group(1), re.compile(match.re.pattern)
  for form in (raw, raw.lower(), raw.upper(), raw.capitalize()):
    found = exact.match(match.string[:start] + form + match.string[end:], match.start())
    if found and found.group(1) == form:
      return _words(form)
  return written


def _words(text: str) -> str:
  return " ".join(text.split())


class Game:
  """One game in progress, from `open_game`. `observation` is the first thing the player sees."""

  def __init__(self, spec: GameSpec, seed: int):
    self._name = spec.name
    self._max_turns = spec.max_turns
    self._passed_reward = spec.passed_reward
    self._seed = seed
    self._random = random.Random(seed).getstate(), np.random.RandomState(seed).get_state()
    self._rules: list[str] = []
    self._turns = 0
    self._done = False
    with self._own_random():
      self._env = _start(spec, seed)
      self.observation = self._observe()

  def play(self, answer_action: str) -> Step:
    """Makes one move; "" is a move too, which the game takes as an invalid one.

    Raises:
      RuntimeError: the game is over already, fails by itself, shows its rules, or returns what no
        game may return.
    """
    if self._done:
      raise RuntimeError(
        f"{self._name}, seed {self._seed}: the game is over, there is no move left to make"
      )
    with self._own_random():
      try:
        done, _ = self._env.step(answer_action)
        rewards, info = self._env.close() if done else ({}, {})
      except Exception as error:
        raise RuntimeError(
          f"{self._name}, seed {self._seed}: the game failed at the move {answer_action!r}: "
          f"{error!r}"
        ) from error
      if not isinstance(done, (bool, np.bool_)):
        raise self._wrong(f"whether it is over is {done!r}: it must be True or False")
      observation = self._observe()
    self._turns += 1
    self._done = bool(done) or self._turns >= self._max_turns
    if not self._done:
      return Step(observation, done=False)
    if done:
      reward, last, invalid = self._outcome(rewards, info)
      ended = "passed" if reward >= self._passed_reward else "invalid" if invalid else "lost"
    else:
      reward, last, ended = 0.0, f"The game was stopped after {self._turns} turns.", "turn_limit"
    return Step(
      observation, True, reward, "\n".join(part for part in (observation, last) if part), ended
    )

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
    return RuntimeError(f"{self._name}, seed {self._seed}: {what}: take another game")

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
        raise RuntimeError(
          f"{self._name}: the observation {text!r} has no type ({kind!r}), its rules cannot be "
          "hidden: take another game"
        )
      if kind is textarena.ObservationType.PROMPT:
        self._rules += _sentences(text)
      elif kind is not textarena.ObservationType.PLAYER_ACTION:
        shown.append(text)
    seen = _squeeze("\n".join(shown))
    for sentence in self._rules:
      if sentence in seen:
        raise RuntimeError(
          f"{self._name}, seed {self._seed}: the hidden rules reached the player: {sentence!r}"
        )
    return "\n".join(shown)

  @contextlib.contextmanager
  def _own_random(self):
    """Puts this game's generator states in place, and the caller's back afterwards.

    What the game prints meanwhile is kept from the user. Generators and standard output are global,
    so this is not for threads.
    """
    outside = random.getstate(), np.random.get_state()
    random.setstate(self._random[0])
    np.random.set_state(self._random[1])
    printed = io.StringIO()
    try:
      with contextlib.redirect_stdout(printed):
        yield
    finally:
      if printed.getvalue():
        logging.debug("%s printed: %s", self._name, printed.getvalue())
      self._random = random.getstate(), np.random.get_state()
      random.setstate(outside[0])
      np.random.set_state(outside[1])


def open_game(spec: GameSpec, seed: int) -> Game:
  """Starts a game. The same spec and seed give the same game whatever was or is played beside it;
  no global generator moves.

  Args:
    spec: from `game_spec`.
    seed: of the map and of all later chance, 0 ≤ seed < 2**32.

  Raises:
    ValueError: the name is unknown, needs several players or comes with wrappers, or the game
      refuses its arguments.
    RuntimeError: the game shows its rules.
  """
  if spec.name not in ENV_REGISTRY:
    close = difflib.get_close_matches(
      spec.name, [name for name in ENV_REGISTRY if name.endswith("-raw")]
    )
    hint = (
      f"did you mean {' or '.join(close)}?"
      if close
      else "it must be the name of a TextArena game, such as FrozenLake-v0-raw"
    )
    raise ValueError(
      f"config.deployment.game is {spec.name!r}, which TextArena does not know: {hint}"
    )
  if ENV_REGISTRY[spec.name].default_wrappers:
    raise ValueError(
      f"config.deployment.game is {spec.name!r}, whose wrappers mix rules and board: it must be "
      f"{spec.name + '-raw'!r}"
    )
  return Game(spec, seed)


def try_game(spec: GameSpec) -> None:
  """Opens a game and makes an invalid move: what cannot be played shows before a model is loaded.

  Raises:
    ValueError, RuntimeError: as `open_game` and `Game.play`.
  """
  open_game(spec, 0).play("")


def _start(spec: GameSpec, seed: int) -> textarena.Env:
  """Makes and resets the environment; whatever it objects to becomes a ValueError that names the
  configuration's field.
  """
  entry = ENV_REGISTRY[spec.name].entry_point
  try:
    if isinstance(entry, str):
      module, name = entry.split(":")
      entry = getattr(importlib.import_module(module), name)
  except Exception as error:
    raise ValueError(
      f"config.deployment.game is {spec.name!r}, which this TextArena cannot load ({error!r}): "
      "take another game"
    ) from error
  several = (
    f"config.deployment.game is {spec.name!r}, which needs several players: it must be a game for "
    "one player"
  )
  try:
    # A copy: games may change the lists they are given.
    env = textarena.make(spec.name, **copy.deepcopy(dict(spec.args)))
    env.reset(num_players=1, seed=seed)
  except Exception as error:
    # TypeError: an argument that has "player" in its name.
    if "player" in str(error).lower() and not isinstance(error, TypeError):
      raise ValueError(several) from error
    raise ValueError(
      f"config.deployment.game_args is {dict(spec.args)!r}, with which {spec.name} does not start "
      f"({error!r}): "
      f"it takes {inspect.signature(entry)}"
    ) from error
  if not isinstance(env.state, textarena.SinglePlayerState):
    raise ValueError(several)
  _take_any_order(env.state)
  return env


def _take_any_order(state: textarena.SinglePlayerState) -> None:
  """Lets the state take arguments in the order in which some games hand them over.

  Countdown, Cryptarithm and Slitherlink give sender, text and type of an observation, and reward
  and reason of an invalid move; the state declares other orders.
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

  state.add_observation, state.set_invalid_move = add_observation, set_invalid_move


def _sentences(rules: str) -> list[str]:
  """The sentences and lines of a rules text that are long enough to tell from a board's labels."""
  parts = (_squeeze(part) for part in re.split(r"\n|(?<=[.!?])\s", rules))
  return [part for part in parts if len(re.findall(r"[^\W\d_]{2,}", part)) >= _RULE_WORDS]


def _squeeze(text: str) -> str:
  return " ".join(text.lower().split())
