"""Rates and intervals against brute force, summaries of hand-made games, leaks, and
retention measured on oracles.
"""

import json
import math
import re
import statistics as python_statistics

import numpy as np
import pytest
from fakes import Tokenizer, game_of, in_turns, turn_of

from oel_jax.conversations.schema import KNOWLEDGE, Conversation
from oel_jax.evaluation import episodes, statistics, tasks
from oel_jax.pocket import claims, corpus, worlds
from oel_jax.pocket.claims import GENERIC, GOAL, TRAP, Claim

Z = python_statistics.NormalDist().inv_cdf(0.975)


def score_bound(hits: int, of: int, side: int) -> float:
  """The p farthest from hits / of, on one side, that a score test accepts: |hits / of − p| ≤ Z √(p
  (1 − p) / of), by bisection.
  """
  inside, outside = hits / of, (0.0, 1.0)[side > 0]
  for _ in range(200):
    middle = (inside + outside) / 2
    if abs(hits / of - middle) <= Z * math.sqrt(middle * (1 - middle) / of):
      inside = middle
    else:
      outside = middle
  return inside


@pytest.mark.parametrize(
  "hits, of", [(0, 1), (1, 1), (0, 128), (128, 128), (3, 10), (17, 512), (500, 512), (1, 3)]
)
def test_a_count_has_the_score_interval(hits, of):
  found = statistics.count(hits, of)
  assert (found["rate"], found["hits"], found["of"]) == (hits / of, hits, of)
  expected = [score_bound(hits, of, -1), score_bound(hits, of, 1)]
  np.testing.assert_allclose(found["interval"], expected, atol=1e-9)
  assert 0 <= found["interval"][0] <= found["rate"] <= found["interval"][1] <= 1


def test_a_count_of_nothing_says_so():
  assert statistics.count(0, 0) == {"rate": None, "hits": 0, "of": 0, "interval": None}


def test_paired_intervals_by_hand():
  # Differences 1 0 1 0 and 0 0 -1 1: means 0.5 and 0; variances 1/3 and 2/3.
  first = [np.array([1.0, 1, 1, 0]), np.array([0.0, 1, 0, 1])]
  second = [np.array([0.0, 1, 0, 0]), np.array([0.0, 1, 1, 0])]
  found = statistics.paired(first, second)
  assert found["difference"] == 0.25
  error = math.sqrt(1 / 3 / 4 + 2 / 3 / 4) / 2
  np.testing.assert_allclose(found["games"], [0.25 - Z * error, 0.25 + Z * error])
  # Over two seeds: standard error 0.25, one degree of freedom, 12.706 of it.
  np.testing.assert_allclose(found["seeds"], [0.25 - 12.7062 * 0.25, 0.25 + 12.7062 * 0.25], 1e-5)
  assert statistics.paired(first[:1], second[:1])["seeds"] is None
  assert statistics.paired([np.ones(1)] * 2, [np.zeros(1)] * 2)["games"] is None
  with pytest.raises(ValueError, match="2 and 1 seeds"):
    statistics.paired(first, second[:1])
  with pytest.raises(ValueError, match=r"seed number 2 has games of the shapes \(4,\) and \(3,\)"):
    statistics.paired(first, [second[0], second[1][:3]])


def test_the_interval_over_games_covers_as_often_as_it_says():
  """Brute force: games of one seed drawn 2,000 times."""
  rng, hits, truth = np.random.default_rng(0), 0, 0.6 - 0.5
  for _ in range(2000):
    luck = rng.random(200)  # a game's own; half of it is the same for both ways
    other = np.where(rng.random(200) < 0.5, luck, rng.random(200))
    pair = [(luck < 0.6).astype(float)], [(other < 0.5).astype(float)]
    low, high = statistics.paired(*pair)["games"]
    hits += low <= truth <= high
  assert 0.93 < hits / 2000 < 0.965


@pytest.mark.parametrize(
  "freedom, right", [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (30, 2.042272)]
)
def test_students_t_is_that_of_the_tables(freedom, right):
  assert statistics.student_t(freedom) == pytest.approx(right, abs=1e-6)


def test_a_mean_has_the_normal_interval():
  values = [96, 41, 23.5, 23, 80]
  found = statistics.mean(values)
  error = np.std(values, ddof=1) / np.sqrt(5)
  assert found["of"] == 5
  np.testing.assert_allclose(
    [found["mean"], *found["interval"]],
    [np.mean(values), *(np.mean(values) + np.array([-Z, Z]) * error)],
  )
  assert statistics.mean([]) == {"mean": None, "of": 0, "interval": None}
  # One value says nothing of the spread.
  assert statistics.mean([7]) == {
    "mean": 7,
    "of": 1,
    "interval": None,
  }


def test_recovered_is_the_share_of_the_gain():
  assert statistics.recovered(0.5, 0.1, 0.9) == pytest.approx(0.5)
  assert statistics.recovered(0.9, 0.1, 0.5) == pytest.approx(2.0)
  assert statistics.recovered(0.0, 0.25, 0.5) == pytest.approx(-1.0)
  assert statistics.recovered(0.5, 0.5, 0.5) is None and statistics.recovered(0.5, 0.5, 0.4) is None


def trajectory(ended: str, *tokens: int, thinking: str = "", answer: str = "[up]") -> Conversation:
  turns = tuple(turn_of("board", thinking, answer, "[up]", count) for count in tokens)
  return game_of("t", "game", 1, turns, "over", float(ended == "passed"), ended == "passed", ended)


def test_a_summary_counts_games_turns_and_tokens():
  games = [
    trajectory("passed", 10, 20),
    trajectory("lost", 30),
    trajectory("passed", 40, 50, 60),
    trajectory("turn_limit", 70, thinking="The experience given to me says so."),
    trajectory("invalid", 80, answer="As the lessons above say: [up]"),
  ]
  found = episodes.play_summary(games, 60)
  assert (found["passed"]["hits"], found["passed"]["of"]) == (2, 5)
  # A turn, not a game.
  assert (
    found["response_tokens"]["mean"] == pytest.approx(45) and found["response_tokens"]["of"] == 8
  )
  assert found["moves"]["mean"] == pytest.approx(8 / 5) and found["moves"]["of"] == 5
  assert found["ended"] == {"passed": 2, "lost": 1, "invalid": 1, "turn_limit": 1}
  assert (found["leaks"]["hits"], found["leaks"]["of"]) == (2, 8)
  assert found["cut"] == statistics.count(3, 8) and "cut" not in episodes.play_summary(games)


@pytest.mark.parametrize(
  "text",
  [
    "According to the experience given to me, G is the goal.",
    "The knowledge provided says to avoid H.",
    "From the notes above I know where to go.",
    "My previous experience tells me to go down.",
    "In earlier games H ended the game.",
    "- EXPERIENCE ITEM: The goal is G.",
    "The lessons listed\nare not needed, but the given lessons are.",
  ],
)
def test_talk_of_the_knowledge_is_a_leak(text):
  assert episodes.leaks(text)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "[up]",
    "Goal: G at (2, 2). Hazard: H at (0, 1) (1, 2). I am at (0, 0). Not right. Next: down.",
    "Goal: unknown. Hazard: unknown. Nobody told me what G does. It may be where to go, or it may "
    "end the game, or it may do nothing.",
    # the words, but not of something handed over
    "Given the walls, few moves are left. I take note of the items.",
    "Given the walls, I experience few choices.",
    "The item is on the board. I was given a start.",
    "I previously moved down, so the last move was wasted.",
  ],
)
def test_talk_of_the_game_is_none(text):
  assert not episodes.leaks(text)


def test_no_answer_that_pre_training_teaches_is_a_leak():
  examples = [corpus.example(seed) for seed in range(2000)]
  played = [example for example in examples if example.kind in ("play", "ask", "other")]
  assert len(played) > 1000
  assert not [
    example for example in played if episodes.leaks(f"{example.thinking}\n{example.answer}")
  ]


# Retention, on policies of which it is known what they can do.


KEPT = tasks.read_tasks(
  [f"oel_jax.pocket.retention:{name}" for name in ("extraction", "worlds", "symmetric", "other")]
)


class Oracle:
  """Does all that retention asks for, from the words of the prompt; `able` names what it can do,
  all else it gets wrong.
  """

  def __init__(self, *able: str):
    self.able, self.tokenizer = able, Tokenizer()

  @in_turns
  def sample(self, prompts, seeds, *, sampling, max_new_tokens):
    chats = [
      [(message.role, message.content) for message in self.tokenizer.seen[prompt[0]]]
      for prompt in prompts
    ]
    return [self.tokenizer.put(self.answer(chat)) for chat in chats]

  def answer(self, chat: list[tuple[str, str]]) -> str:
    question = chat[-1][1]
    if "record of a finished game" in question:
      return (
        self.extract(question)
        if "extraction" in self.able
        else f"- EXPERIENCE ITEM: The goal is {missing_letter(question)}."
      )
    if chat[0][0] == KNOWLEDGE or "board" in question.lower():
      return self.play(chat)
    return solve(question) if "other" in self.able else "no idea"

  def play(self, chat: list[tuple[str, str]]) -> str:
    rows, player = boards("\n".join(text for _, text in chat))[-1]
    cells = dict(np.ndenumerate(rows))
    said = re.findall(r"^- EXPERIENCE ITEM: .*$", chat[0][1], re.MULTILINE)
    goal, trap = claims.resolve(
      [claims.parse(line) for line in said], [symbol for symbol in cells.values() if symbol != " "]
    )
    if "play" not in self.able:
      goal, trap = trap, goal
    start = tuple(map(int, player))
    world = worlds.World(
      tuple(map(tuple, rows)),
      start,
      goal,
      trap,
      next(cell for cell, symbol in cells.items() if symbol == goal),
    )
    actions = corpus.good_actions(world, start, goal, trap)
    return f"[{actions[0]}]"

  def extract(self, question: str) -> str:
    record = question.partition("Record:\n")[2]
    if "reached the goal!" not in record and "fell into a hole!" not in record:
      return "- EXPERIENCE ITEM: Watch what each symbol does."
    # What the player stands on is hidden by the player, so it is looked up on the board before.
    (before, _), (_, (r, c)) = boards(record)[-2:]
    return claims_line(GOAL if "reached the goal!" in record else TRAP, before[r][c])


def boards(text: str) -> list[tuple[np.ndarray, tuple[int, int]]]:
  """The boards of a text, as symbols with " " where the player stands, and the player's place."""
  found = []
  for block in re.findall(r"(?:^[+|].*\n)+", text, re.MULTILINE):
    cells = np.array(
      [
        [cell.strip() or " " for cell in line.strip("|").split("|")]
        for line in block.split("\n")
        if line.startswith("|")
      ]
    )
    [place] = np.argwhere(np.char.startswith(cells, "P"))
    found.append((np.where(np.char.startswith(cells, "P"), " ", cells), tuple(map(int, place))))
  return found


def claims_line(role: str, letter: str) -> str:
  return f"- EXPERIENCE ITEM: {claims.WORDINGS[role][3].format(letter)}"


def missing_letter(text: str) -> str:
  return next(
    letter for letter in worlds.LETTERS if f" {letter} " not in text and f"/{letter}" not in text
  )


def solve(question: str) -> str:
  task, text = question.split("\n")
  word = task.split()
  if "case." in word:
    return text.upper() if "upper" in word else text.lower()
  if word[0] == "How":
    return str(len(text))
  if "letter?" in word:
    return text[0] if "first" in word else text[-1]
  return {"Repeat": text, "Sort": "".join(sorted(text)), "Write": "".join(reversed(text))}[word[0]]


def test_an_oracle_keeps_everything():
  found = tasks.measure(KEPT, Oracle("extraction", "play", "other"), 40, seed=3)
  assert {name: (share["hits"], share["of"]) for name, share in found.items()} == {
    name: (40, 40) for name in ("extraction", "worlds", "symmetric", "other")
  }


def test_each_ability_is_measured_by_itself():
  everything = {"extraction": {"extraction"}, "play": {"worlds", "symmetric"}, "other": {"other"}}
  for lost, measures in everything.items():
    found = tasks.measure(KEPT, Oracle(*(everything.keys() - {lost})), 40, seed=3)
    for name, share in found.items():
      # A wrong extractor names a goal that is not there; a player with the roles exchanged now and
      # then has no hazard that it can reach.
      assert (share["rate"] <= 0.2) if name in measures else (share["rate"] == 1.0), (
        lost,
        name,
        share,
      )


def test_retention_is_the_same_every_time_and_off_by_request():
  partly = Oracle("extraction")
  assert tasks.measure(KEPT, partly, 12, seed=5) == tasks.measure(KEPT, partly, 12, seed=5)
  assert tasks.measure(KEPT, None, 0, seed=5) == {}


def test_a_false_item_beside_a_true_one_is_no_hit():
  class Talkative(Oracle):
    def extract(self, question):
      return super().extract(question) + f"\n{claims_line(TRAP, missing_letter(question))}"

  assert tasks.measure(KEPT, Talkative("extraction"), 20, seed=3)["extraction"]["hits"] == 0
  assert claims.parse("- EXPERIENCE ITEM: Watch what each symbol does.") == Claim(GENERIC)


def test_a_task_may_count_with_numpy():
  """A sum of NumPy's truth values is a whole number of NumPy's, which JSON has not."""
  right = np.array([True, False, True])
  whole = tasks.Count(right.sum(), np.int32(3), {"a": tasks.Count(right.sum(), right.size)})
  found = tasks.measure({"own": lambda *_, seed: whole}, None, 3, seed=0)["own"]
  assert json.loads(json.dumps(found)) == statistics.count(2, 3) | {
    "categories": {"a": statistics.count(2, 3)}
  }


def test_a_task_that_exits_does_not_end_the_run_unsaid():
  def leave(*_, seed):
    raise SystemExit(0)

  with pytest.raises(ValueError, match=r"evaluation.tasks: own fails .SystemExit: 0, at .*\.py:\d"):
    tasks.measure({"own": leave}, None, 3, seed=0)


@pytest.mark.parametrize(
  "hits, of", [(float("nan"), 4), (2.5, 4), (5, 4), (-1, 4), (1, float("inf")), ("3", 4)]
)
def test_what_is_no_share_of_a_tasks_examples_is_told(hits, of):
  for count in (tasks.Count(hits, of), tasks.Count(0, 0, {"part": tasks.Count(hits, of)})):
    told = re.escape(f"returns {hits!r} hits of {of!r}: they must be whole numbers, from 0 hits")
    with pytest.raises(ValueError, match=f"config.evaluation.tasks: own.* {told}"):
      tasks.measure({"own": lambda *_, seed, count=count: count}, None, 4, seed=0)
