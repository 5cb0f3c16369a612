"""What plays a game and what is played: an `Environment` has two methods, and a `Game` is one
episode of it under the limits that the configuration sets.

The README has an environment of one's own, whole, `Coin`. One that offers tools, too:

    class Clock(Coin):
      tools = [
        {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
      ]

      def call(self, name, arguments):
        return Step("12:00")
"""

import contextlib
import dataclasses
import inspect
import json
import math
import numbers
import pathlib
import random
import reprlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from oel_jax.conversations.schema import ToolCall
from oel_jax.conversations.tool_texts import tool_text
from oel_jax.policy.tokenizers.tool_calls import offered
from oel_jax.runtime import named

ENDED = ("", "passed", "lost", "invalid")  # what an environment may say of its own last step


@dataclasses.dataclass(frozen=True)
class Step:
  """What a move led to.

  Attributes:
    observation: what the player is told of it; may be "" on the last step.
    done: whether the game is over.
    reward: of the whole game, given on its last step; config.deployment.passed_reward says from
      which on it is passed.
    outcome: on the last step, how the game ended, in words: what knowledge is extracted from. "":
      the observation says it.
    ended: "invalid" on the last step if an invalid move ended the game, else "". What `Game.play`
      returns has "passed", "lost", "invalid" or "turn_limit" on the last step.
    category: on the last step, which sort of episode it was: evaluation counts the passed ones by
      it, and nobody else reads it.
  """

  observation: str
  done: bool = False
  reward: float = 0.0
  outcome: str = ""
  ended: str = ""
  category: str = ""


class Environment(Protocol):
  """One episode of anything that is played in turns of text, by one player.

  A new object is made for each episode, `reset` is called once, and then `step` until the game is
  over. How the player is asked is configuration: the first observation comes after the words of
  `environments/prompts.py`, which name `player` and `actions`, or alone if both are ""; later ones
  are given as they are.
  Up to `deployment.slots` episodes are played side by side in one process, never two methods at a
  time.

  The same seed and the same actions must lead to the same texts, for a run that was cut off plays
  episodes again. Python's and NumPy's global generators may be used: each episode has states of
  its own, made from its seed. What is read once for all episodes (a word list) belongs into the
  module or into the function that makes the environments.

  One that offers tools has two things more:

    tools: definitions as OpenAI writes them, {"type": "function", "function": {"name",
      "description", "parameters"}}, a list that stays the same from `reset` on.
    call(name, arguments) -> Step: makes one call of one of them, `arguments` being a dict; the
      observation is what the tool returns.

  The model's own chat template shows definitions, calls and results, and its calls are read in the
  form that its family writes; behind a server they come as `tool_calls`. All calls of one answer
  are one move, and what is said beside them reaches nobody. A call of no tool, or with arguments
  that are no JSON object, is told to the model alone. A game whose calls the template cannot show
  (Llama 3.1: two at once) ends as invalid. The embedded policy knows no tools.
  """

  def reset(self, seed: int) -> str:
    """Begins the episode that belongs to the seed, 0 ≤ seed < 2**32; returns the first observation,
    what the player sees before its first move.
    """

  def step(self, action: str) -> Step:
    """Makes the player's move.

    Args:
      action: what group 1 of config.deployment.action_pattern found in the answer, spaces squeezed;
        "" if the answer holds no action, which the environment takes as an invalid move.
    """


@dataclasses.dataclass(frozen=True)
class GameSpec:
  """What is played and how it is shown; the fields are explained at `config.deployment`.

  Attributes:
    name: as trajectories and errors have it.
    make: makes an environment, one an episode.
    field: of config.deployment, that names it.
    rounds_before: as `load.game_spec` was given it.
  """

  name: str
  make: Callable[[], Environment]
  player: str = ""
  actions: str = ""
  action_pattern: str = r"\[([^\]]*)\]"
  max_turns: int = 5
  passed_reward: float = 1.0
  field: str = "game"
  rounds_before: int = 0


class Game:
  """One episode in progress. `observation` is the first thing the player sees, `tools` are the
  definitions of those that it offers, as `schema.Conversation` has them, and `category` is what the
  last move said.

  The same spec and seed give the same game whatever was or is played beside it; no global
  generator moves.

  Raises:
    ValueError: the environment cannot be made.
    RuntimeError: it fails, or does not return a text.
  """

  def __init__(self, spec: GameSpec, seed: int):
    self._spec, self._seed = spec, seed
    self._random = random.Random(seed).getstate(), np.random.RandomState(seed).get_state()
    self._turns, self._done, self.category = 0, False, ""
    with self._own_random():
      self._environment = spec.make()
      try:
        self.observation = self._environment.reset(seed)
      except named.FAILURES as error:
        if _told(error):
          raise
        raise self._wrong(f"reset failed{_where(error, self._environment)}") from error
    if not isinstance(self.observation, str):
      raise self._wrong(f"reset returned {reprlib.repr(self.observation)}: it must be a text")
    self.tools = self._offered()

  def play(self, answer_action: str) -> Step:
    """Makes one move.

    Args:
      answer_action: from `parse_action`: the action in brackets, or "", which is a move, too.

    Returns:
      The environment's step, its `ended` filled in: on the last one "passed" if the reward is at
      least `passed_reward`, else "invalid" or "lost"; "turn_limit", with reward 0.0, where the
      game went on but `max_turns` moves are made.

    Raises:
      RuntimeError: the game is over already, fails by itself, or returns what no game may return.
    """
    action = answer_action.removeprefix("[").removesuffix("]")
    what = f"the move {answer_action!r}"
    step = self._made("step", what, lambda: self._environment.step(action))
    return self._finished(step)

  def call(self, calls: Sequence[ToolCall]) -> list[Step]:
    """Makes the calls of one answer, which are one move, in order.

    Returns:
      A step for each call that was made: none follows one that ended the game. The last one's
      `ended` is filled in as by `play`. A call that names no tool of the game's, or whose arguments
      are no JSON object, does not reach the environment: its step says so.

    Raises:
      RuntimeError: as `play`.
    """
    steps = []
    for call in calls:
      steps.append(self._called(call))
      if steps[-1].done:
        break
    return [*(Step(step.observation) for step in steps[:-1]), self._finished(steps[-1])]

  def _called(self, call: ToolCall) -> Step:
    names = offered(self.tools)
    if call.name not in names:
      return Step(f"There is no tool {call.name!r}: there are {', '.join(names)}.")
    try:
      arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
      arguments = None
    if not isinstance(arguments, dict):
      return Step(f"The arguments of {call.name} must be a JSON object.")
    what = f"the call of {call.name} with {reprlib.repr(arguments)}"
    return self._made("call", what, lambda: self._environment.call(call.name, arguments))

  def _made(self, method: str, what: str, move: Callable[[], Any]) -> Step:
    """What a move led to, by the environment's own word; for errors `what` names the move, and
    `method` what of the environment makes it.
    """
    if self._done:
      raise self._wrong("the game is over, there is no move left to make")
    with self._own_random():
      try:
        step = move()
      except named.FAILURES as error:
        if _told(error):
          raise
        raise self._wrong(f"the game failed at {what}{_where(error, self._environment)}") from error
    self._check(method, step)
    return step

  def _finished(self, step: Step) -> Step:
    """The last step of a move, with how the game ended if it did."""
    self._turns += 1
    self._done = step.done or self._turns >= self._spec.max_turns
    self.category = step.category or self.category
    if step.done:
      ended = "passed" if step.reward >= self._spec.passed_reward else step.ended or "lost"
      outcome = step.outcome or step.observation
      return Step(step.observation, True, float(step.reward), outcome, ended, step.category)
    if not self._done:
      return Step(step.observation)
    stopped = f"The game was stopped after {self._turns} turns."
    outcome = f"{step.observation}\n{stopped}" if step.observation else stopped
    return Step(step.observation, True, 0.0, outcome, "turn_limit", step.category)

  def _offered(self) -> tuple[str, ...]:
    """The definitions of the environment's tools as JSON texts.

    Raises:
      RuntimeError: they are none, or there is nothing that makes the calls.
    """
    given = getattr(self._environment, "tools", ())
    try:
      right = isinstance(given, (list, tuple)) and all(isinstance(tool, Mapping) for tool in given)
      texts = tuple(map(tool_text, given)) if right else ()
    except (TypeError, ValueError) as error:
      raise self._wrong(f"its tools cannot be written as JSON: {error}") from error
    if not right or len(offered(texts)) < len(texts):
      raise self._wrong(
        f"its tools are {reprlib.repr(given)}: each must be "
        '{"type": "function", "function": {"name": …}}'
      )
    if texts and not callable(getattr(self._environment, "call", None)):
      raise self._wrong("it offers tools and has no method call(name, arguments)")
    return texts

  def _check(self, method: str, step: Any) -> None:
    """Raises RuntimeError unless what the method returned is a `Step` whose fields are of their
    types.
    """
    if not isinstance(step, Step):
      raise self._wrong(f"{method} returned {reprlib.repr(step)}: it must be a Step")
    right = {
      "observation": (isinstance(step.observation, str), "a text"),
      "done": (isinstance(step.done, (bool, np.bool_)), "True or False"),
      "reward": (
        isinstance(step.reward, numbers.Real) and math.isfinite(step.reward),
        "a finite number",
      ),
      "outcome": (isinstance(step.outcome, str), "a text"),
      "ended": (step.ended in ENDED, f"one of {', '.join(map(repr, ENDED))}"),
      "category": (isinstance(step.category, str), "a text"),
    }
    for name, (fits, what) in right.items():
      if not fits:
        seen = reprlib.repr(getattr(step, name))
        raise self._wrong(f"{name} of what {method} returned is {seen}: it must be {what}")

  def _wrong(self, what: str) -> RuntimeError:
    return RuntimeError(f"{self._spec.name}, seed {self._seed}: {what}")

  @contextlib.contextmanager
  def _own_random(self) -> Iterator[None]:
    """Puts this game's generator states in place, and the caller's back afterwards; generators are
    global, so this is not for threads.
    """
    outside = random.getstate(), np.random.get_state()
    random.setstate(self._random[0])
    np.random.set_state(self._random[1])
    try:
      yield
    finally:
      self._random = random.getstate(), np.random.get_state()
      random.setstate(outside[0])
      np.random.set_state(outside[1])


def _told(error: BaseException) -> bool:
  """Whether an environment of this folder raised it, in words that need no more."""
  raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
  return pathlib.Path(raised_in).parent == pathlib.Path(__file__).parent


def _where(error: BaseException, environment: Any) -> str:
  """The error, and the line of the environment's own file that led to it."""
  try:
    own = inspect.getsourcefile(type(environment))
  except TypeError:  # a class without a file
    own = None
  return f": {named.explained(error, own)}"
