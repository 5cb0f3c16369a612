"""Games: hidden rules, private randomness, how a game ends, and clear errors. Compared with
TextArena driven by hand.
"""

import collections
import functools
import hashlib
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import textarena
from textarena.envs.registration import ENV_REGISTRY, register

from oel_jax import config
from oel_jax.environments import Game, GameSpec, game_spec, parse_action, textarena_game, try_game

DIRECTIONS = {"[up]": (-1, 0), "[down]": (1, 0), "[left]": (0, -1), "[right]": (0, 1)}
MOVES = list(DIRECTIONS)
CELLS = [f"[{row} {column}]" for row in range(5) for column in range(5)]
LAKE = {"size": 3, "num_holes": 2, "randomize_start_goal": False}
GAMES = {
  "FrozenLake-v0-raw": (LAKE, MOVES),
  "Sokoban-v0-raw": ({"dim_room": (6, 6), "num_boxes": 1}, MOVES),
  "Minesweeper-v0-small-raw": ({}, CELLS),
  "2048-v0-3x3-raw": ({}, MOVES),
}


def spec(
  name: str = "FrozenLake-v0-raw", args: dict | None = None, max_turns: int = 5, **more
) -> GameSpec:
  if args is None:
    args = GAMES.get(name, ({},))[0]
  make = functools.partial(textarena_game, name, args)
  return GameSpec(name, make, player="P", max_turns=max_turns, **more)


def actions(name: str, seed: int, count: int) -> list[str]:
  return random.Random(seed).choices(GAMES[name][1] + [""], k=count)


def by_hand(name: str, seed: int, moves: list[str]) -> tuple[list[str], float | None, str]:
  """The same game driven straight through TextArena: what it said each time, the reward, the
  reason.
  """

  def said():
    hidden = (textarena.ObservationType.PROMPT, textarena.ObservationType.PLAYER_ACTION)
    return "\n".join(text for _, text, kind in env.get_observation()[1] if kind not in hidden)

  env = textarena.make(name, **GAMES[name][0])
  env.reset(num_players=1, seed=seed)
  heard = [said()]
  for move in moves:
    done, _ = env.step(move)
    heard.append(said())
    if done:
      rewards, info = env.close()
      return heard, rewards[0], info[0]["reason"]
  return heard, None, ""


def by_open_game(name: str, seed: int, moves: list[str]):
  game = Game(spec(name, max_turns=1000), seed)
  heard = [game.observation]
  for move in moves:
    step = game.play(move)
    heard.append(step.observation)
    if step.done:
      return heard, step
  return heard, None


@pytest.mark.parametrize("name", GAMES)
def test_a_random_policy_sees_what_textarena_says_and_no_rules(name):
  ends = collections.Counter()
  for seed in range(12):
    moves = actions(name, seed, 80)
    expected, reward, reason = by_hand(name, seed, moves)
    heard, last = by_open_game(name, seed, moves)
    assert heard == expected
    assert heard[0] and "You are" not in "".join(heard) and "bjective" not in "".join(heard)
    if reward is None:
      assert last is None
      continue
    ends[last.ended] += 1
    assert last.reward == pytest.approx(reward) and isinstance(last.reward, float)
    assert last.outcome == (heard[-1] + "\n" + reason if heard[-1] else reason)
    invalid = reason.startswith("Invalid Move") and "hit a mine" not in reason
    assert last.ended == ("passed" if reward >= 1.0 else "invalid" if invalid else "lost")
  assert ends


# TextArena draws from the global generators.


@pytest.mark.parametrize("name", GAMES)
def test_the_same_seed_gives_the_same_game_whatever_ran_before_and_the_caller_is_untouched(name):
  moves = actions(name, 3, 40)
  first = by_open_game(name, 3, moves)
  random.seed(12345)
  np.random.seed(54321)
  random.random(), np.random.random()
  before = random.getstate(), np.random.get_state()
  assert by_open_game(name, 3, moves) == first
  assert random.getstate() == before[0]
  np.testing.assert_equal(np.random.get_state(), before[1])
  # The seed does matter.
  assert len({"".join(by_open_game(name, seed, moves)[0]) for seed in range(8)}) > 1


def test_interleaved_games_do_not_touch_each_other():
  games = [(name, seed) for name in GAMES for seed in (1, 2, 3)]
  alone = {
    (name, seed): by_open_game(name, seed, actions(name, seed, 30))[0] for name, seed in games
  }
  opened = {key: Game(spec(key[0], max_turns=1000), key[1]) for key in games}
  heard = {key: [game.observation] for key, game in opened.items()}
  going = set(games)
  shuffle = random.Random(0)
  for turn in range(30):
    for key in shuffle.sample(sorted(going), len(going)):
      step = opened[key].play(actions(*key, 30)[turn])
      heard[key].append(step.observation)
      if step.done:
        going.discard(key)
  assert heard == alone


def test_another_process_with_another_hash_seed_sees_the_same_boards():
  program = (
    "import hashlib; from oel_jax.environments import Game, GameSpec, textarena_game\n"
    f"games = {[(name, args) for name, (args, _) in GAMES.items()]!r}\n"
    "specs = [GameSpec(n, lambda n=n, a=a: textarena_game(n, a)) for n, a in games]\n"
    "text = ''.join(Game(spec, s).observation for spec in specs for s in range(10))\n"
    "print(hashlib.sha256(text.encode()).hexdigest())"
  )
  here = "".join(Game(spec(name), seed).observation for name in GAMES for seed in range(10))
  search = os.pathsep.join([os.getcwd(), *filter(None, sys.path)])
  environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": search}
  there = subprocess.run(
    [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
  ).stdout
  assert there.strip().splitlines()[-1] == hashlib.sha256(here.encode()).hexdigest()


class Chance(textarena.Env):
  """A game of one's own that draws from both global generators at every step, as some of
  TextArena's do.
  """

  said = "board"
  kind = textarena.ObservationType.GAME_BOARD

  def __init__(self, pieces=()):
    self.pieces = pieces

  def _draw(self):
    if self.pieces:
      random.shuffle(self.pieces)
    self.state.add_observation(
      f"{self.said} {random.random()} {np.random.random()} {self.pieces}",
      observation_type=self.kind,
    )

  def reset(self, num_players, seed=None):
    self.state = textarena.SinglePlayerState(num_players=num_players, seed=seed)
    rules = "Pieces:\nThe  king moves\ntwo steps! Do not  lose it.\n"
    self.state.reset(game_state={}, player_prompt_function=lambda player_id, game_state: rules)
    self._draw()

  def step(self, action):
    if action == "[crash]":
      raise KeyError("oh")
    self._draw()
    return self.state.step()


class Ends(Chance):
  """A game that ends at the first move, with results of any kind."""

  def __init__(self, rewards=(), info=(), done=True, said=None):
    super().__init__()
    rewards = {0: 1.0} if rewards == () else rewards
    info = {0: {"reason": "The end."}} if info == () else info
    self._results, self._done, self._said = (rewards, info), done, said

  def step(self, action):
    self._draw()
    return self._done, {}

  def close(self):
    return self._results

  def get_observation(self):
    found = super().get_observation()
    return (0, self._said) if self._said is not None and len(found[1]) == 1 else found


class Loud(Chance):
  """A game that prints, as LogicPuzzle and RushHour do."""

  def reset(self, num_players, seed=None):
    print("reset")
    super().reset(num_players, seed)

  def step(self, action):
    print("step")
    return super().step(action)


class Leaky(Chance):
  said = "Hint: the king moves if you ask."


class LeakyLater(Chance):
  said = "Remember: do NOT lose it."

  def reset(self, num_players, seed=None):
    self.said = "board"
    super().reset(num_players, seed)
    del self.said


class Untyped(Chance):
  kind = "GAME_BOARD"


@pytest.fixture
def own_games():
  classes = (Chance, Ends, Loud, Leaky, LeakyLater, Untyped)
  for cls in classes:
    register(f"{cls.__name__}-v0", cls)
  yield
  for cls in classes:
    del ENV_REGISTRY[f"{cls.__name__}-v0"]


def test_both_global_generators_belong_to_the_game(own_games):
  args = {"pieces": [1, 2, 3, 4, 5]}

  def run(disturb):
    game = Game(spec("Chance-v0", args, 9), 5)
    heard = [game.observation]
    for _ in range(5):
      disturb()
      heard.append(game.play("[x]").observation)
    return heard

  quiet = run(lambda: None)
  assert len(set(quiet)) == 6
  assert (
    run(
      lambda: (
        random.random(),
        np.random.random(),
        Game(spec("Chance-v0", args), 6).play("[x]"),
      )
    )
    == quiet
  )
  assert args == {"pieces": [1, 2, 3, 4, 5]}  # the game shuffled a copy


# Rules are dropped by type, and nothing of them gets through another way.


def test_rules_that_reach_the_player_are_an_error(own_games):
  with pytest.raises(
    RuntimeError, match="Leaky-v0, seed 5: the hidden rules reached the player: 'the king moves'"
  ):
    Game(spec("Leaky-v0"), 5)
  game = Game(spec("LeakyLater-v0"), 5)
  assert "king" not in game.observation and "Remember" not in game.observation
  with pytest.raises(RuntimeError, match="the hidden rules reached the player: 'do not lose it.'"):
    game.play("[x]")
  with pytest.raises(RuntimeError, match="Untyped-v0.*has no type"):
    Game(spec("Untyped-v0"), 5)


def test_a_game_that_fails_names_itself(own_games):
  with pytest.raises(
    RuntimeError, match=r"Chance-v0, seed 5: the game failed at the move '\[crash\]': KeyError"
  ):
    Game(spec("Chance-v0"), 5).play("[crash]")


# What a game returns, and what it prints.


@pytest.mark.parametrize("reward", [0.5, 1, np.float32(0.25), np.int64(0), -2.0, 20])
def test_any_finite_number_is_a_reward(own_games, reward):
  step = Game(spec("Ends-v0", {"rewards": {0: reward}}), 5).play("[x]")
  assert step.reward == float(reward) and type(step.reward) is float
  assert step.ended == ("passed" if reward >= 1 else "lost")


@pytest.mark.parametrize(
  "results, told",
  [
    ({"rewards": {0: None}}, r"its rewards at the end are \{0: None\}: they must hold a finite"),
    ({"rewards": {0: "1.0"}}, r"its rewards at the end are \{0: '1.0'\}"),
    ({"rewards": {0: float("nan")}}, r"its rewards at the end are \{0: nan\}"),
    ({"rewards": {0: float("inf")}}, r"its rewards at the end are \{0: inf\}"),
    ({"rewards": {1: 1.0}}, r"its rewards at the end are \{1: 1.0\}"),
    ({"rewards": None}, "its rewards at the end are None"),
    ({"rewards": 1.0}, "its rewards at the end are 1.0"),
    ({"info": None}, "its facts at the end are None: they must hold a dictionary"),
    ({"info": {0: "lost"}}, "its facts at the end are {0: 'lost'}"),
    ({"info": {0: {"reason": 3}}}, "its reason for the end is 3: it must be a text"),
    ({"done": None}, "whether it is over is None: it must be True or False"),
    ({"done": "no"}, "whether it is over is 'no': it must be True or False"),
    ({"said": 3}, "its observations are no list of sender, text and type"),
    ({"said": ["board"]}, "its observations are no list of sender, text and type"),
    ({"said": [(0, 3, textarena.ObservationType.GAME_BOARD)]}, "the observation 3 has no type"),
  ],
)
def test_results_of_other_types_are_an_error_that_names_the_game(own_games, results, told):
  with pytest.raises(RuntimeError, match=f"^Ends-v0.*: {told}.*: take another game$"):
    Game(spec("Ends-v0", results), 5).play("[x]")


def test_what_a_game_prints_is_kept_from_the_user(own_games, capsys):
  Game(spec("Loud-v0"), 5).play("[x]")
  print("ours")
  assert capsys.readouterr().out == "ours\n"


def test_a_game_that_cannot_be_played_is_told_when_it_is_tried(own_games):
  try_game(spec())
  with pytest.raises(RuntimeError, match="Ends-v0.*its rewards at the end are None"):
    try_game(spec("Ends-v0", {"rewards": None}))
  with pytest.raises(ValueError, match="config.deployment.game is 'quux'"):
    try_game(spec("quux"))


@pytest.mark.parametrize(
  "reward, passed_reward, ended",
  [
    (0.5, 0.5, "passed"),
    (0.5, 0.6, "lost"),
    (7, 8.0, "lost"),
    (-1, -1.0, "passed"),
  ],
)
def test_what_is_passed_is_a_field(own_games, reward, passed_reward, ended):
  deployment = config.default().deployment
  deployment.game, deployment.passed_reward = "Ends-v0", passed_reward
  given = game_spec(deployment)
  assert given.passed_reward == passed_reward
  own = spec("Ends-v0", {"rewards": {0: reward}}, passed_reward=given.passed_reward)
  assert Game(own, 5).play("[x]").ended == ended


def test_a_turn_limit_passes_nothing_however_low_the_reward_that_passes(own_games):
  step = Game(spec("Chance-v0", max_turns=1, passed_reward=-1.0), 5).play("[x]")
  assert (step.reward, step.ended) == (0.0, "turn_limit")


@pytest.mark.parametrize(
  "name, args, move, said",
  [
    ("Countdown-v0-raw", {"numbers": [2, 3, 4], "target": 5}, "[0 1 +]", "Found exact target: 5"),
    ("Cryptarithm-v0-raw", {}, "[S 9]", "S → 9"),
    ("Slitherlink-v0-raw", {}, "[h 0 0]", "Clues satisfied"),
  ],
)
def test_games_with_another_order_of_arguments(name, args, move, said):
  """They hand over sender, text and type of observations, reward and reason of invalid moves."""
  game = Game(spec(name, args), 3)
  step = game.play(move)
  assert said in f"{step.observation}\n{step.outcome}" and move not in step.observation
  game = Game(spec(name, args), 3)
  first, second = game.play("dance"), game.play("dance")
  assert re.search("Reason: (Invalid action|Bad action) format", first.observation)
  assert "dance" not in first.observation
  assert second.ended == "invalid" and "format. Use" in second.outcome and 0 <= second.reward < 1


def test_a_solved_fifteen_puzzle_is_passed(monkeypatch):
  """It names its winners as games of several players do. Boards of its own are far from solved."""
  from textarena.envs.FifteenPuzzle.env import FifteenPuzzleEnv

  tiles = [*range(1, 15), None, 15]
  board = [tiles[row : row + 4] for row in range(0, 16, 4)]
  monkeypatch.setattr(FifteenPuzzleEnv, "_generate_board", lambda self: board)
  step = Game(spec("FifteenPuzzle-v0-raw", {}), 3).play("[left]")
  assert (step.done, step.reward, step.ended) == (True, 1.0, "passed")
  assert "successfully solved the 15-Puzzle" in step.outcome


def test_a_mine_is_a_loss_and_no_invalid_move():
  """The game calls both an invalid move, and forgives the first of either."""
  ends = collections.Counter()
  for seed in range(12):
    game = Game(spec("Minesweeper-v0-small-raw", max_turns=200), seed)
    moves = random.Random(seed).choices(CELLS, k=200)
    step = next(step for step in map(game.play, moves) if step.done)
    ends["mine" if "You hit a mine" in step.outcome else "other", step.ended] += 1
  assert set(ends) == {("mine", "lost"), ("other", "invalid")}


# How Frozen Lake ends, from its board alone.


def walks(board: str, goal: str) -> list[str] | None:
  """Shortest walk from P to a cell, found on the printed board; holes are entered last only."""
  grid = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in board.splitlines()
    if line.startswith("|")
  ]
  start = next((r, c) for r, row in enumerate(grid) for c, cell in enumerate(row) if cell == "P")
  queue = collections.deque([(start, [])])
  visited = {start}
  while queue:
    (row, column), path = queue.popleft()
    if grid[row][column] == goal:
      return path
    if grid[row][column] in ("H", "G"):
      continue
    for move, (down, right) in DIRECTIONS.items():
      cell = row + down, column + right
      if 0 <= cell[0] < len(grid) and 0 <= cell[1] < len(grid) and cell not in visited:
        visited.add(cell)
        queue.append((cell, path + [move]))
  return None


@pytest.mark.parametrize("seed", range(5))
def test_frozen_lake_won_and_lost(seed):
  for goal, ended, words in (("G", "passed", "Congratulations"), ("H", "lost", "fell into a hole")):
    game = Game(spec(), seed)
    path = walks(game.observation, goal)
    steps = [game.play(move) for move in path]
    assert [step.done for step in steps] == [False] * (len(path) - 1) + [True]
    assert all(step.outcome == step.ended == "" and step.reward == 0.0 for step in steps[:-1])
    assert (
      steps[-1].ended == ended
      and words in steps[-1].outcome
      and steps[-1].outcome.startswith("You moved ")
    )
    assert (steps[-1].reward == 1.0) == (goal == "G") and 0.0 < steps[-1].reward <= 1.0
    with pytest.raises(RuntimeError, match="the game is over"):
      game.play("[up]")


def test_frozen_lake_two_invalid_moves_end_it():
  for moves in (["[up]", "[left]"], ["", ""], ["[up]", ""]):
    game = Game(spec(), 0)
    first, second = [game.play(move) for move in moves]
    assert not first.done and "invalid move" in first.observation
    assert (
      second.done
      and second.ended == "invalid"
      and second.reward < 1.0
      and "\nInvalid Move: " in second.outcome
    )


def test_the_turn_limit_says_so_in_our_words():
  game = Game(spec(max_turns=3), 0)
  step_one = walks(game.observation, "")[0]  # to a safe cell, and back
  back = {"[right]": "[left]", "[down]": "[up]"}[step_one]
  first, second, third = [game.play(move) for move in (step_one, back, step_one)]
  assert not first.done and not second.done
  assert third.done and third.ended == "turn_limit" and third.reward == 0.0
  assert third.outcome == third.observation + "\nThe game was stopped after 3 turns."
  assert "\n\n" + "+-----" in third.observation  # the board is there

  # A win on the last turn is a win.
  game = Game(spec(max_turns=len(walks(game_board(0), "G"))), 0)
  assert [game.play(move) for move in walks(game_board(0), "G")][-1].ended == "passed"


def game_board(seed: int) -> str:
  return Game(spec(), seed).observation


def test_sokoban_takes_a_room_as_list_or_tuple():
  for seed in range(5):
    boards = {
      Game(spec("Sokoban-v0-raw", {"dim_room": dim, "num_boxes": 1}), seed).observation
      for dim in ((6, 6), [6, 6])
    }
    (board,) = boards
    assert (
      board.count("X") == 1
      and board.count("P") == 1
      and len(re.findall(r"^(?:[#_OXP√] ?){6}$", board, re.MULTILINE)) == 6
    )


# Clear errors.


@pytest.mark.parametrize(
  "name, args, message",
  [
    (
      "FrozenLak-v0-raw",
      {},
      "config.deployment.game is 'FrozenLak-v0-raw', which .* does not know: did you mean "
      "FrozenLake-v0-raw",
    ),
    ("quux", {}, "config.deployment.game is 'quux'.* such as FrozenLake-v0-raw"),
    (
      "FrozenLake-v0",
      LAKE,
      "config.deployment.game is 'FrozenLake-v0', whose wrappers .* it must be 'FrozenLake-v0-raw'",
    ),
    (
      "TicTacToe-v0-raw",
      {},
      "config.deployment.game is 'TicTacToe-v0-raw', which needs several players",
    ),
    ("Poker-v0-raw", {}, "'Poker-v0-raw', which needs several players"),
    (
      "PublicGoodsGame-v0-raw",
      {},
      "'PublicGoodsGame-v0-raw', which needs several players",
    ),  # it resets for one without a word
    (
      "FrozenLake-v0-raw",
      {"siz": 3},
      r"config.deployment.game_args is {'siz': 3}.*'siz'.*it takes \(size: int = 4, num_holes",
    ),
    (
      "FrozenLake-v0-raw",
      {"num_players": 1},
      "config.deployment.game_args is {'num_players': 1}.*it takes",
    ),
    ("FrozenLake-v0-raw", {"size": "3"}, "config.deployment.game_args is {'size': '3'}.*it takes"),
    ("FrozenLake-v0-raw", {"size": 0}, "config.deployment.game_args is {'size': 0}.*it takes"),
    (
      "2048-v0-3x3-raw",
      {"board_size": 11},
      "config.deployment.game_args is {'board_size': 11}.*cannot exceed 10.*it takes",
    ),
  ],
)
def test_errors_name_the_field_the_value_and_what_would_be_right(name, args, message):
  before = random.getstate()
  with pytest.raises(ValueError, match=message):
    Game(spec(name, args), 1)
  assert random.getstate() == before


def test_the_spec_comes_from_the_configuration():
  deployment = config.default().deployment
  result = game_spec(deployment)
  assert result.name == "FrozenLake-v0-raw" and result.max_turns == 5 and result.player == "P"
  assert Game(result, 0).observation == game_board(0)
  for pattern, words in (("[up", "no regular expression"), (r"\[up\]", "needs a group")):
    deployment.action_pattern = pattern
    with pytest.raises(ValueError, match="config.deployment.action_pattern is .*" + words):
      game_spec(deployment)


# Which action an answer takes.


@pytest.mark.parametrize(
  "answer, action",
  [
    ("", ""),
    ("I do not know.", ""),
    ("up", ""),
    ("[jump]", ""),
    ("[up]", "[up]"),
    ("I choose [UP].", "[up]"),
    ("[ Left  ]", "[left]"),
    ("**[down]**\n", "[down]"),
    ("Allowed are [up], [down], [left], [right]. I take [down].", "[down]"),
    ("[up] then [right]", "[right]"),
    ("First [right], then [le", "[right]"),
    ("[ri", ""),
    ("[[up]]", "[up]"),
    ("[up or down]", ""),
  ],
)
def test_the_last_action_of_the_answer_counts(answer, action):
  assert parse_action(answer, config.default().deployment.action_pattern) == action


@pytest.mark.parametrize(
  "answer, action",
  [("[0 3]", "[0 3]"), ("not [1 1] but [ 0 \n 3 ]", "[0 3]"), ("[0, 3]", ""), ("[0]", "")],
)
def test_actions_of_several_words(answer, action):
  assert parse_action(answer, r"\[\s*(\d+\s+\d+)\s*\]") == action


def test_an_optional_group_that_took_no_part_is_no_action():
  assert parse_action("pass", r"pass|\[(up)\]") == ""


BANDIT = r"\[\s*(Left|Right)\s*\]"


@pytest.mark.parametrize(
  "answer, pattern, offered, action",
  [
    ("[Left]", BANDIT, "", "[Left]"),
    ("[left]", BANDIT, "", "[Left]"),  # as the pattern has it
    ("[ LEFT ]", BANDIT, "[Left], [Right]", "[Left]"),
    ("[turnleft]", r"\[(turnLeft|turnRight)\]", "[turnLeft]", "[turnLeft]"),  # as it is offered
    ("Action: [UP]", r"action:\s*\[(up|down)\]", "[up], [down]", "[up]"),
    ("[W]", r"\[([a-z])\]", "[w], [W]", "[W]"),  # two actions that differ in nothing else
    ("[w]", r"\[([a-z])\]", "[W], [w]", "[w]"),
    ("[Apple]", r"\[([A-Za-z]+)\]", "[word]", "[Apple]"),  # as it was written
    ("[APPLE]", r"\[([a-z]+)\]", "[word]", "[apple]"),
    ("[e2E4]", r"\[(\w+)\]", "", "[e2E4]"),
    ("[ A \n 5 ]", r"\[\s*([a-z]\s+\d)\s*\]", "[LETTER DIGIT]", "[a 5]"),
    ("[A 5]", r"\[\s*([A-Z]\s+\d)\s*\]", "", "[A 5]"),
    ("[up]", r"\[(up|down)\]", "[cup] [down]", "[up]"),  # offered is the word, not a part of one
  ],
)
def test_an_action_keeps_the_case_that_the_game_offers(answer, pattern, offered, action):
  assert parse_action(answer, pattern, offered) == action


def test_a_game_that_tells_cases_apart_gets_the_action_that_it_offers():
  args, pattern = {"buttons": ["Left", "right"]}, r"\[(left|right)\]"
  given = spec("Bandit-v0-raw", args, actions="[Left], [right]", action_pattern=pattern)
  for answer, button in (("[left]", "Left"), ("[Left]", "Left"), ("[RIGHT]", "right")):
    step = Game(given, 1).play(parse_action(answer, given.action_pattern, given.actions))
    assert f"You pressed the {button} button" in step.observation
