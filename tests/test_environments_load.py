"""The game that a configuration names: TextArena's or the user's own, and what is refused."""

import re
import sys

import pytest

from oel_jax import config as config_lib
from oel_jax.environments import Game, game_spec, textarena_game, try_game
from oel_jax.environments.api import GameSpec, Step

OWN = """
import random

from oel_jax.environments import Step

class Guess:
  def __init__(self, most=9):
    self.most = most

  def reset(self, seed):
    self.number = seed % self.most + 1
    return f"I think of a number from 1 to {self.most}."

  def step(self, action):
    if not action.isdigit():
      return Step("That is no number.")
    if int(action) == self.number:
      return Step("Yes.", done=True, reward=1.0)
    return Step("Higher." if int(action) < self.number else "Lower.")

number = 3
def broken(): return 1 / 0
def empty(): return object()
class NoStep:
  def reset(self, seed): return ""
class BadReset(Guess):
  def reset(self, seed):
    return {}["seed"]
class BadStep(Guess):
  def step(self, action):
    return self.nothing
class Exits(Guess):
  def step(self, action):
    raise SystemExit(3)
class ExitsAtOnce(Guess):
  def reset(self, seed):
    exit()
def leaves(): quit()
def which(): return Guess
class Chance(Guess):
  def reset(self, seed):
    return super().reset(seed) + f"A card: {random.Random().random()}"
class LateChance(Guess):
  def step(self, action):
    return Step(f"A card: {random.Random().random()}") if action else Step("No number.")
class Texts(Guess):
  def step(self, action):
    return "Higher."
"""


@pytest.fixture(name="file")
def fixture_file(tmp_path):
  path = tmp_path / "my_env.py"
  path.write_text(OWN)
  return path


def deployment(environment: str, **changes):
  found = config_lib.default().deployment
  with found.unlocked():
    found.game_args = changes.pop("game_args", {})
    found.update(
      environment=environment, player="", actions="[number]", action_pattern=r"\[(\d+)\]", **changes
    )
  return found


def test_a_class_of_ones_own_is_played(file):
  spec = game_spec(deployment(f"{file}:Guess", game_args={"most": 5}, max_turns=3))
  assert (spec.name, spec.max_turns, spec.actions) == ("my_env.py:Guess", 3, "[number]")
  try_game(spec)
  game = Game(spec, 13)
  assert game.observation == "I think of a number from 1 to 5."
  assert [game.play(f"[{n}]").observation for n in (3, 5)] == ["Higher.", "Lower."]
  assert game.play("[4]") == Step("Yes.", True, 1.0, "Yes.", "passed")
  # A function that makes one, and a file that runs once.
  assert game_spec(deployment(f"{file}:Guess")).make.args[1] is spec.make.args[1]


def test_a_class_of_a_module_and_a_file_below_the_working_directory(file, monkeypatch):
  monkeypatch.chdir(file.parent)
  monkeypatch.syspath_prepend(file.parent)
  for name in ("my_env.py:Guess", "my_env:Guess"):
    spec = game_spec(deployment(name))
    assert spec.name == name and Game(spec, 0).observation.endswith("to 9.")
  del sys.modules["my_env"]


@pytest.mark.parametrize(
  "name, told",
  [
    ("my_env.py", "it must be MODULE:NAME or FILE.py:NAME"),
    ("my_env.py:", "it must be MODULE:NAME"),
    ("texarena", "it must be MODULE:NAME"),
    ("no_env.py:Guess", "there is no such file"),
    ("no_such_module:Guess", "the module cannot be imported .*no_such_module"),
    ("gs://b/my_env.py:Guess", "files are read and written on this machine only"),
    ("my_env.py:Gess", "the file has no function Gess .did you mean Guess"),
    ("my_env.py:number", "the file has no function number"),
    ("syntax.py:Guess", r"cannot be run \(SyntaxError: .*syntax.py, line 1"),
    ("raises.py:Guess", r"cannot be run \(ZeroDivisionError: .*raises.py:2\)"),
    ("exits.py:Guess", r"cannot be run \(SystemExit: "),
  ],
)
def test_what_names_nothing_is_told_with_the_field(file, monkeypatch, name, told):
  monkeypatch.chdir(file.parent)
  (file.parent / "syntax.py").write_text("class")
  (file.parent / "raises.py").write_text("\n1 / 0\n")
  (file.parent / "exits.py").write_text("raise SystemExit(3)")
  with pytest.raises((ValueError, OSError)) as error:
    game_spec(deployment(name))
  assert str(error.value).startswith(f"config.deployment.environment is '{name[:4]}")
  assert re.search(told, str(error.value)), error.value


@pytest.mark.parametrize(
  "name, told",
  [
    ("Guess", r"with config.deployment.game_args {'size': 3} \(TypeError.*it takes \(most=9\)"),
    ("broken", r"with config.deployment.game_args {}.*ZeroDivisionError.*my_env.py:22\)"),
    ("empty", r"which makes <object .*no method reset: it must have reset\(seed\) and step"),
    ("NoStep", "no method step"),
    ("BadReset", r"my_env.py:BadReset, seed 0: reset failed: KeyError: 'seed', at .*my_env.py:28"),
    ("BadStep", r"failed at the move ''.*AttributeError.*my_env.py:31"),
    ("Exits", r"seed 0: the game failed at the move ''.*SystemExit: 3, at .*my_env.py:34"),
    ("ExitsAtOnce", r"seed 0: reset failed: SystemExit: None, at .*my_env.py:37"),
    ("leaves", r"which fails with config.deployment.game_args {} .SystemExit: None, at .*py:38"),
    ("which", r"which makes the class Guess and not an object of it: it must return Guess\(...\)"),
    ("Chance", r"with seed 0 and the same moves it says 'I think .*A card: 0.\d*' once and 'I"),
    ("LateChance", "with seed 0 and the same moves it says 'A card: .*from random.Random"),
    ("Texts", "seed 0: step returned 'Higher.': it must be a Step"),
  ],
)
def test_what_cannot_be_played_is_told_before_it_is(file, name, told):
  args = {"size": 3} if name == "Guess" else {}
  with pytest.raises((ValueError, RuntimeError), match=told):
    try_game(game_spec(deployment(f"{file}:{name}", game_args=args)))


# A game that shows the player nothing.


class Shows:
  """Shows what it is told to; `said` has what each action brings, but for the game of seed
  `other`.
  """

  def __init__(self, first="", said=None, seeded=False, other=None):
    self.first, self.said, self.seeded, self.other = first, said or {}, seeded, other

  def reset(self, seed):
    if seed == self.other:
      self.said = {"else": "Tails it was."}
    return f"{self.first}{seed}" if self.seeded else self.first

  def step(self, action):
    return self.said.get(action, Step(self.said.get("else", "")))


def spec(max_turns=5, actions="[up], [down]", **shown):
  pattern = r"\[(up|down)\]"
  return GameSpec("shows", lambda: Shows(**shown), "", actions, pattern, max_turns=max_turns)


@pytest.mark.parametrize("max_turns", [1, 5])
@pytest.mark.parametrize(
  "shown",
  [
    {},
    {"first": " \n"},
    {"first": "Your move:"},
    {"first": "Your move:", "said": {"else": "Your move:"}},
    {"said": {"else": "Invalid."}},  # whatever is played
    {"said": {"": Step("Invalid."), "up": Step("\n"), "down": Step("Invalid. ")}},
    {"said": {"": Step("", True, 0.0, "You lost."), "else": ""}},
  ],
)
def test_a_game_that_shows_nothing_is_refused(shown, max_turns):
  with pytest.raises(ValueError, match="config.deployment.game is 'shows', which shows the player"):
    try_game(spec(max_turns, **shown))


@pytest.mark.parametrize("max_turns", [1, 5])
@pytest.mark.parametrize(
  "shown",
  [
    {"first": "board", "seeded": True},
    {"first": "board", "said": {"up": Step("moved"), "else": "board"}},
    {"said": {"": Step("Invalid."), "down": Step("Warm.")}},  # nothing at first, as in a bandit
    {"said": {"down": Step("", True, 1.0, "You won."), "": Step("", True, 0.0, "You lost.")}},
    {"said": {"else": "Heads it was."}, "other": 2},  # whatever is played, but not in each game
  ],
)
def test_a_game_that_shows_something_is_not(shown, max_turns):
  try_game(spec(max_turns, **shown))


def test_where_no_move_can_be_made_up_only_silence_is_refused():
  odd = lambda **shown: GameSpec("shows", lambda: Shows(**shown), "", "", r"<(\W{9})>")
  try_game(odd(first="Say the magic word."))
  try_game(odd(said={"else": "That is not it."}))
  with pytest.raises(ValueError, match="shows the player nothing"):
    try_game(odd())


@pytest.mark.parametrize(
  "game, pattern",
  [
    ("Bandit-v0-raw", r"\[(\w+)\]"),
    ("GuessTheNumber-v0-raw", r"\[(\d+)\]"),
    ("Mastermind-v0-raw", r"\[(\d \d \d \d)\]"),
  ],
)
def test_games_that_begin_with_nothing_but_answer_moves_are_played(game, pattern):
  make = lambda: textarena_game(game, {})
  offered = "[red], [blue]" if game.startswith("Bandit") else ""
  assert not Game(GameSpec(game, make), 0).observation
  try_game(GameSpec(game, make, "", offered, pattern))
