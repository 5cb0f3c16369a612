"""TextArena games by name, for one player, with their rules hidden and their randomness kept to themselves.

TextArena draws from Python's and NumPy's global generators, at the start of a game and while it is played, and it sends the rules as an
observation like any other. Here each game has generator states of its own, and what the player sees never holds the rules.
"""

import contextlib
import copy
import dataclasses
import difflib
import importlib
import inspect
import random
import re
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
import textarena
from textarena.envs.registration import ENV_REGISTRY

_RULE_WORDS = 3  # fewer are no sentence: a board and the rules may share a label


@dataclasses.dataclass(frozen=True)
class GameSpec:
  """What `config.deployment` says of the game; the fields are explained there."""

  name: str
  args: Mapping[str, Any]
  player: str
  actions: str
  action_pattern: str
  max_turns: int


@dataclasses.dataclass(frozen=True)
class Step:
  """What a move led to.

  Attributes:
    observation: everything the game said since, but the rules and the move itself; may be "" on the last step.
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
    raise ValueError(f"config.deployment.action_pattern is {deployment.action_pattern!r}: no regular expression ({error})") from error
  if groups < 1:
    raise ValueError(f"config.deployment.action_pattern is {deployment.action_pattern!r}: it needs a group ( ) around the action")
  return GameSpec(
      name=deployment.game,
      args=deployment.game_args.to_dict(),
      player=deployment.player,
      actions=deployment.actions,
      action_pattern=deployment.action_pattern,
      max_turns=deployment.max_turns,
  )


def parse_action(answer: str, pattern: str) -> str:
  """The last action in an answer, as the game wants it: "[up]"; "" if there is none.

  The last, because answers often list the allowed actions before they choose.

  Args:
    answer: what stands after the thinking; an action named in the thinking was not taken.
    pattern: regular expression, case ignored; its group 1 is lowered, its spaces are squeezed, and brackets are put around it.
  """
  matches = list(re.finditer(pattern, answer, re.IGNORECASE))
  action = " ".join((matches[-1].group(1) or "").lower().split()) if matches else ""
  return f"[{action}]" if action else ""


class Game:
  """One game in progress, from `open_game`. `observation` is the first thing the player sees."""

  def __init__(self, spec: GameSpec, seed: int):
    self._name = spec.name
    self._max_turns = spec.max_turns
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
      RuntimeError: the game is over already, fails by itself, or shows its rules.
    """
    if self._done:
      raise RuntimeError(f"{self._name}, seed {self._seed}: the game is over, there is no move left to make")
    with self._own_random():
      try:
        done, _ = self._env.step(answer_action)
      except Exception as error:
        raise RuntimeError(f"{self._name}, seed {self._seed}: the game failed at the move {answer_action!r}: {error!r}") from error
      observation = self._observe()
      rewards, info = self._env.close() if done else (None, {})
    self._turns += 1
    self._done = bool(done) or self._turns >= self._max_turns
    if not self._done:
      return Step(observation, done=False)
    if done:
      facts = info.get(0, {})
      reward, last = float((rewards or {}).get(0, 0.0)), facts.get("reason")
      ended = "passed" if reward >= 1.0 else "invalid" if facts.get("invalid_move") else "lost"
    else:
      reward, last, ended = 0.0, f"The game was stopped after {self._turns} turns.", "turn_limit"
    return Step(observation, True, reward, "\n".join(part for part in (observation, last) if part), ended)

  def _observe(self) -> str:
    """Everything the game said since the last time, but the rules and the player's own move."""
    shown = []
    for _, text, kind in self._env.get_observation()[1]:
      if not isinstance(text, str) or not isinstance(kind, textarena.ObservationType):
        raise RuntimeError(f"{self._name}: the observation {text!r} has no type ({kind!r}), its rules cannot be hidden: take another game")
      if kind is textarena.ObservationType.PROMPT:
        self._rules += _sentences(text)
      elif kind is not textarena.ObservationType.PLAYER_ACTION:
        shown.append(text)
    seen = _squeeze("\n".join(shown))
    for sentence in self._rules:
      if sentence in seen:
        raise RuntimeError(f"{self._name}, seed {self._seed}: the hidden rules reached the player: {sentence!r}")
    return "\n".join(shown)

  @contextlib.contextmanager
  def _own_random(self):
    """Puts this game's generator states in place, and the caller's back afterwards. They are global, so this is not for threads."""
    outside = random.getstate(), np.random.get_state()
    random.setstate(self._random[0])
    np.random.set_state(self._random[1])
    try:
      yield
    finally:
      self._random = random.getstate(), np.random.get_state()
      random.setstate(outside[0])
      np.random.set_state(outside[1])


def open_game(spec: GameSpec, seed: int) -> Game:
  """Starts a game. The same spec and seed give the same game whatever was or is played beside it; no global generator moves.

  Args:
    spec: from `game_spec`.
    seed: of the map and of all later chance, 0 ≤ seed < 2**32.

  Raises:
    ValueError: the name is unknown, needs several players or comes with wrappers, or the game refuses its arguments.
    RuntimeError: the game shows its rules.
  """
  if spec.name not in ENV_REGISTRY:
    close = difflib.get_close_matches(spec.name, [name for name in ENV_REGISTRY if name.endswith("-raw")])
    hint = f"did you mean {' or '.join(close)}?" if close else "it must be the name of a TextArena game, such as FrozenLake-v0-raw"
    raise ValueError(f"config.deployment.game is {spec.name!r}, which TextArena does not know: {hint}")
  if ENV_REGISTRY[spec.name].default_wrappers:
    raise ValueError(f"config.deployment.game is {spec.name!r}, whose wrappers mix rules and board: it must be {spec.name + '-raw'!r}")
  return Game(spec, seed)


def _start(spec: GameSpec, seed: int) -> textarena.Env:
  """Makes and resets the environment; whatever it objects to becomes a ValueError that names the configuration's field."""
  entry = ENV_REGISTRY[spec.name].entry_point
  try:
    if isinstance(entry, str):
      module, name = entry.split(":")
      entry = getattr(importlib.import_module(module), name)
  except Exception as error:
    raise ValueError(f"config.deployment.game is {spec.name!r}, which this TextArena cannot load ({error!r}): take another game") from error
  several = f"config.deployment.game is {spec.name!r}, which needs several players: it must be a game for one player"
  try:
    env = textarena.make(spec.name, **copy.deepcopy(dict(spec.args)))  # a copy: games may change the lists they are given
    env.reset(num_players=1, seed=seed)
  except Exception as error:
    if "player" in str(error).lower() and not isinstance(error, TypeError):  # TypeError: an argument that has "player" in its name
      raise ValueError(several) from error
    raise ValueError(
        f"config.deployment.game_args is {dict(spec.args)!r}, with which {spec.name} does not start ({error!r}): "
        f"it takes {inspect.signature(entry)}"
    ) from error
  if not isinstance(env.state, textarena.SinglePlayerState):
    raise ValueError(several)
  return env


def _sentences(rules: str) -> list[str]:
  """The sentences and lines of a rules text that are long enough to tell from a board's labels."""
  parts = (_squeeze(part) for part in re.split(r"\n|(?<=[.!?])\s", rules))
  return [part for part in parts if len(re.findall(r"[^\W\d_]{2,}", part)) >= _RULE_WORDS]


def _squeeze(text: str) -> str:
  return " ".join(text.lower().split())
