"""An episode of any environment: how it ends, what is checked, and whose random numbers it has."""

import random

import numpy as np
import pytest

from oel_jax.environments import Game, GameSpec, Step


class Counter:
  """Counts its moves; each action says what the step is."""

  def __init__(self, **steps):
    self.steps, self.heard = steps, []

  def reset(self, seed):
    self.seed = seed
    return f"seed {seed}"

  def step(self, action):
    self.heard.append(action)
    return self.steps.get(action, Step(f"move {len(self.heard)}"))


def game(seed=7, max_turns=3, passed_reward=1.0, **steps):
  made = []
  make = lambda: made.append(Counter(**steps)) or made[0]
  opened = Game(GameSpec("counter", make, max_turns=max_turns, passed_reward=passed_reward), seed)
  return opened, made[0]


def test_the_environment_gets_the_seed_and_the_action_without_brackets():
  opened, environment = game()
  assert opened.observation == "seed 7" and environment.seed == 7
  assert opened.play("[go  on]") == Step("move 1")
  assert opened.play("") == Step("move 2")
  assert environment.heard == ["go  on", ""]


@pytest.mark.parametrize(
  "step, ended",
  [
    (Step("won", True, 1), Step("won", True, 1.0, "won", "passed")),
    (Step("", True, np.float32(0.5), "half"), Step("", True, 0.5, "half", "lost")),
    (Step("no", True, 0.0, "", "invalid"), Step("no", True, 0.0, "no", "invalid")),
    (Step("no", True, 2.0, "", "invalid"), Step("no", True, 2.0, "no", "passed")),
    (Step("no", True, category="hard"), Step("no", True, 0.0, "no", "lost", "hard")),
  ],
)
def test_the_reward_says_what_is_passed(step, ended):
  opened, _ = game(end=step)
  assert opened.play("[end]") == ended
  with pytest.raises(RuntimeError, match="counter, seed 7: the game is over"):
    opened.play("[end]")
  assert game(end=step, passed_reward=0.4)[0].play("[end]").ended == (
    "passed" if step.reward >= 0.4 else ended.ended
  )


def test_the_limit_stops_a_game_and_passes_nothing():
  opened, environment = game(max_turns=2, passed_reward=-1.0, quiet=Step(""))
  opened.play("[x]")
  stopped = "The game was stopped after 2 turns."
  assert opened.play("[x]") == Step("move 2", True, 0.0, f"move 2\n{stopped}", "turn_limit")
  with pytest.raises(RuntimeError, match="the game is over"):
    opened.play("[x]")
  assert len(environment.heard) == 2
  assert game(max_turns=1, quiet=Step(""))[0].play("[quiet]").outcome == stopped[:-8] + "1 turns."
  sort = game(max_turns=1, quiet=Step("", category="hard"))[0].play("[quiet]").category
  assert sort == "hard"
  # An end of its own on the last turn is its own.
  assert game(max_turns=1, end=Step("e", True, 1.0))[0].play("[end]").ended == "passed"


@pytest.mark.parametrize(
  "returned, told",
  [
    ("a text", "step returned 'a text': it must be a Step"),
    (("a", 0.0, True), r"step returned \('a', 0.0, True\): it must be a Step"),
    (Step(None), "observation of what step returned is None: it must be a text"),
    (Step("a", "no"), "done of what step returned is 'no': it must be True or False"),
    (Step("a", True, None), "reward of what step returned is None: it must be a finite number"),
    (Step("a", True, float("nan")), "reward of what step returned is nan"),
    (Step("a", True, 1.0, 3), "outcome of what step returned is 3: it must be a text"),
    (Step("a", True, 1.0, "", "won"), "ended of what step returned is 'won': it must be one of"),
    (Step("a", True, category=3), "category of what step returned is 3: it must be a text"),
  ],
)
def test_what_is_no_step_is_told(returned, told):
  with pytest.raises(RuntimeError, match=f"^counter, seed 7: {told}"):
    game(end=returned)[0].play("[end]")


class Fails(Counter):
  def reset(self, seed):
    return 3 if seed else {}["no such"]

  def step(self, action):
    return random.Random(0).choice([])


def test_what_an_environment_raises_is_told_with_the_line_of_its_own_file():
  with pytest.raises(
    RuntimeError, match=r"fails, seed 0: reset failed: KeyError: 'no such', at .*_api.py:"
  ):
    Game(GameSpec("fails", Fails), 0)
  with pytest.raises(RuntimeError, match="fails, seed 1: reset returned 3: it must be a text"):
    Game(GameSpec("fails", Fails), 1)
  line = Fails.step.__code__.co_firstlineno + 1  # not that of random.py, where it was raised
  opened = Game(GameSpec("later", type("Later", (Fails,), {"reset": Counter.reset})), 0)
  with pytest.raises(RuntimeError, match=r"failed at the move '\[x\]'.*IndexError") as told:
    opened.play("[x]")
  assert f"test_environments_api.py:{line}" in str(told.value)


class Chance:
  """Draws from both global generators, when it is made, begun and played."""

  def __init__(self):
    self.first = random.random()

  def reset(self, seed):
    return f"{self.first} {random.random()} {np.random.random()}"

  def step(self, action):
    return Step(f"{random.random()} {np.random.random()}")


def test_global_generators_belong_to_each_game_and_the_caller_is_untouched():
  def heard(seed, disturb):
    opened = Game(GameSpec("chance", Chance, max_turns=9), seed)
    texts = [opened.observation]
    for _ in range(3):
      disturb()
      texts.append(opened.play("[x]").observation)
    return texts

  quiet = heard(5, lambda: None)
  before = random.getstate(), np.random.get_state()
  beside = Game(GameSpec("chance", Chance, max_turns=99), 6)
  assert heard(5, lambda: beside.play("[x]")) == quiet
  assert random.getstate() == before[0]
  np.testing.assert_equal(np.random.get_state(), before[1])
  assert heard(5, lambda: (random.random(), np.random.random())) == quiet
  assert len({*quiet, *heard(6, lambda: None)}) == 8
