"""What the embedded policy is taught, checked from the text alone: labels follow from prompts, and
priors leak nothing.
"""

import collections
import functools
import random
import re
import string

import pytest
from test_claims import resolved

from oel_jax.conversations.schema import EMPTY, KNOWLEDGE, knowledge_message
from oel_jax.extraction.prompts import ITEM_MARK
from oel_jax.pocket import claims, corpus, worlds
from oel_jax.pocket.claims import GENERIC, GOAL, SAFE, TRAP, WALL, Claim
from oel_jax.pocket.worlds import World, WorldGame, random_world
from oel_jax.runtime.seeds import derive

STEP = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

# Moves


def by_relaxation(world: World, player, goal: str, trap: str) -> set[str]:
  """The moves worth making, through distances found by relaxing every cell until nothing
  changes.
  """
  size = len(world.rows)
  cells = [(r, c) for r in range(size) for c in range(size)]
  near = {
    name: (player[0] + dr, player[1] + dc)
    for name, (dr, dc) in STEP.items()
    if (player[0] + dr, player[1] + dc) in cells
  }
  targets = [cell for cell in cells if goal and world.symbol(cell) == goal and cell != player]
  for forbidden in (trap, None):
    allowed = {
      name for name, cell in near.items() if not forbidden or world.symbol(cell) != forbidden
    }
    if not targets:
      if allowed:
        return allowed
      continue
    away = dict.fromkeys(cells, 99)
    away.update(dict.fromkeys(targets, 0))
    for _ in cells:
      for r, c in cells:
        if not forbidden or world.symbol((r, c)) != forbidden:
          away[r, c] = min(
            [away[r, c]]
            + [away[r + dr, c + dc] + 1 for dr, dc in STEP.values() if (r + dr, c + dc) in away]
          )
    least = min((away[near[name]] for name in allowed), default=99)
    if least < 99:
      return {name for name in allowed if away[near[name]] == least}
  return set(near)


def test_good_actions_are_first_steps_of_shortest_safe_paths():
  rng = random.Random(3)
  for _ in range(1500):
    world = random_world(rng)
    player = (rng.randrange(world.size), rng.randrange(world.size))
    goal, trap = rng.sample(["", "", *world.letters()], 2)
    found = corpus.good_actions(world, player, goal, trap)
    assert len(set(found)) == len(found) and set(found) == by_relaxation(
      world, player, goal, trap
    ), (world, player, goal, trap)


def test_whoever_knows_wins_every_world_and_whoever_has_it_backwards_wins_none():
  rng = random.Random(4)
  for _ in range(400):
    world = random_world(rng)
    traps = [
      (r, c)
      for r, row in enumerate(world.rows)
      for c, symbol in enumerate(row)
      if symbol == world.trap
    ]
    trap_in_reach = (
      worlds.distances(world, traps, {world.goal}).get(world.start, 99) <= worlds.MAX_TURNS
    )
    for goal, trap, end in ((world.goal, world.trap, "passed"), (world.trap, world.goal, "lost")):
      if end == "lost" and not trap_in_reach:
        continue  # every way to the trap leads over the goal
      game, ended = WorldGame(world), ""
      while not ended:
        _, action = corpus.respond(rng, world, game.player, goal, trap)
        ended = game.play(f"[{action}]").ended
      assert ended == end


# Play


SLOT = r"(unknown|[A-Z])((?: at)?(?: \(\d, \d\))*)\."
THOUGHT = re.compile(f"Goal: {SLOT} Hazard: {SLOT}" + r"(.*?)(?: Not ([a-z, ]+)\.)? Next: (\w+)\.")


def inside(world: World, r: int, c: int) -> str:
  """The symbol at a place, "" outside the board."""
  return world.rows[r][c] if 0 <= r < world.size and 0 <= c < world.size else ""


def last_board(text: str) -> list[list[str]]:
  """The cells of the last board in a text, stripped."""
  board = text.rpartition("Current Board:\n\n")[2].partition("\n\n")[0]
  return [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in board.splitlines()
    if line.startswith("|")
  ]


def player_in(text: str) -> tuple[int, int]:
  ((r, c),) = [
    (r, c)
    for r, row in enumerate(last_board(text))
    for c, cell in enumerate(row)
    if cell.startswith("P")
  ]
  return r, c


def revealed(record: str) -> list[Claim]:
  """What a transcript shows, in order, each once: read from its first board, its moves and its last
  sentence.
  """
  board = last_board(record[: record.index("Available Actions")])
  events = re.findall(r"to position \((\d), (\d)\)|(hit a wall!)", record)
  facts = []
  for i, (r, c, wall) in enumerate(events):
    symbol = "" if wall else board[int(r)][int(c)].replace("P", "")
    last = i == len(events) - 1
    role = (
      GOAL
      if last and "Congratulations!" in record
      else TRAP
      if last and "fell into a hole" in record
      else SAFE
    )
    if wall or symbol:
      facts.append(Claim(WALL) if wall else Claim(role, symbol))
  return list(dict.fromkeys(facts))


@functools.cache
def played() -> list[tuple[World, corpus.Example]]:
  rng = random.Random(5)
  return [
    (world, corpus.play_example(rng, world)) for world in (random_world(rng) for _ in range(6000))
  ]


def told(example: corpus.Example) -> list[Claim] | None:
  """The claims that the system message amounts to; None without one."""
  if example.messages[0].role != KNOWLEDGE:
    return None
  text = example.messages[0].content
  if ITEM_MARK in text:
    assert text.count(ITEM_MARK) == len(claims.parse_all(text))
    return claims.parse_all(text)
  return [
    claim
    for record in text.split("You are playing a game.")[1:]
    for claim in revealed(record)
    if claim.role != SAFE
  ]


def test_play_labels_follow_from_the_prompt_alone():
  seen = collections.Counter()
  for world, example in played():
    said = told(example)
    goal, trap = resolved(said or [], world.letters())
    player = player_in(example.messages[-1].content)
    match = THOUGHT.fullmatch(example.thinking)
    assert match, example.thinking
    named_goal, goal_at, named_trap, trap_at, rest, closed, move = match.groups()
    beside = [
      name
      for name, (dr, dc) in STEP.items()
      if inside(world, player[0] + dr, player[1] + dc) == named_trap != "unknown"
    ]
    assert sorted((closed or "").split(", ") if closed else []) == sorted(beside)
    assert example.answer == f"[{move}]"
    open_to_guess = (
      set(world.letters())
      - {goal, trap}
      - {claim.letter for claim in said or [] if claim.role == SAFE}
    )
    for known, named, at in ((goal, named_goal, goal_at), (trap, named_trap, trap_at)):
      assert named == known if known else named == "unknown" or named in open_to_guess
      cells = [
        (r, c)
        for r, row in enumerate(world.rows)
        for c, symbol in enumerate(row)
        if symbol == named
      ]
      assert [tuple(map(int, cell)) for cell in re.findall(r"\((\d), (\d)\)", at)] == (
        cells if at else []
      )
    assert named_goal != named_trap or named_goal == "unknown"
    assert ("Nobody told me" in rest) == (
      "unknown" in (named_goal, named_trap) and bool(open_to_guess - {named_goal, named_trap})
    )
    assert [tuple(map(int, cell)) for cell in re.findall(r"at \((\d), (\d)\)", rest)] in (
      [],
      [player],
    )
    assert move in by_relaxation(
      world, player, named_goal.replace("unknown", ""), named_trap.replace("unknown", "")
    )
    form = (
      "none" if said is None else "items" if ITEM_MARK in example.messages[0].content else "raw"
    )
    form = "empty" if example.messages[0] == knowledge_message(EMPTY) else form
    seen[form, "both" if goal and trap else "some" if goal or trap else "neither"] += 1
  assert set(seen) == {("none", "neither"), ("empty", "neither")} | {
    (form, known) for form in ("items", "raw") for known in ("both", "some", "neither")
  }
  assert min(seen.values()) > 20
  assert seen["items", "both"] > 1600
  # A wrapper with nothing in it says as little as none.
  assert 0.8 < seen["none", "neither"] / seen["empty", "neither"] < 1.25


def test_histories_are_real_games_not_yet_decided():
  """Replaying the answers in the world gives every message; the last is the user's and the game
  still goes on.
  """
  for world, example in played()[:2000]:
    conversation = [message for message in example.messages if message.role != KNOWLEDGE]
    assert [message.role for message in conversation] == ["user", "assistant"] * (
      len(conversation) // 2
    ) + ["user"]
    game = WorldGame(world)
    assert conversation[0].content.endswith("\n\n" + game.observation)
    for answer, heard in zip(conversation[1::2], conversation[2::2]):
      step = game.play(answer.content)
      assert not step.done and step.observation == heard.content


def test_knowledge_is_right_more_often_than_not_and_wrong_now_and_then():
  verdicts = collections.Counter()
  for world, example in played():
    if (said := told(example)) is not None and ITEM_MARK in example.messages[0].content:
      goal, _ = resolved(said, world.letters())
      verdicts["none" if not goal else "right" if goal == world.goal else "wrong"] += 1
  assert verdicts["right"] > 4 * verdicts["wrong"] > 0 and verdicts["none"] > 300


def guesses():
  """Yields (world, goal guess or "", hazard guess or ""), without any knowledge."""
  rng = random.Random(6)
  for _ in range(16_000):
    world = random_world(rng)
    match = THOUGHT.fullmatch(corpus.respond(rng, world, world.start, "", "")[0])
    yield world, match[1].replace("unknown", ""), match[3].replace("unknown", "")


def test_without_knowledge_every_letter_is_guessed_alike_and_no_better_than_by_chance():
  """The prior must not know Frozen Lake: G and H are letters like the others. 25 letters:
  chi-square's 99.99th percentile is 61.
  """
  drawn = list(guesses())
  both = sum(bool(goal) and bool(trap) for _, goal, trap in drawn)
  # Independent of each other.
  assert abs(both - 0.09 * len(drawn)) < 4 * (0.09 * 0.91 * len(drawn)) ** 0.5
  for slot, role in ((1, "goal"), (2, "trap")):
    named = [(entry[0], entry[slot]) for entry in drawn if entry[slot]]
    n = len(named)
    assert abs(n - 0.3 * len(drawn)) < 4 * (0.21 * len(drawn)) ** 0.5
    counts = collections.Counter(letter for _, letter in named)
    assert set(counts) == set(worlds.LETTERS)
    assert sum((counts[letter] - n / 25) ** 2 / (n / 25) for letter in worlds.LETTERS) < 61
    for letter in "GH":
      assert abs(counts[letter] - n / 25) < 3 * (n / 25 * 24 / 25) ** 0.5, (role, letter, counts)
    chances = [1 / len(world.letters()) for world, _ in named]
    hits = sum(letter == getattr(world, role) for world, letter in named)
    assert abs(hits - sum(chances)) < 3 * sum(p * (1 - p) for p in chances) ** 0.5, (
      role,
      hits,
      sum(chances),
    )


def test_uninformed_play_examples_leak_nothing_either():
  """The same of whole examples, with their histories; and steps onto a goal are as frequent as
  steps onto a trap where both look alike.
  """
  hits, chances, onto = [0, 0], [[], []], collections.Counter()
  for world, example in played():
    if told(example) is not None and example.messages[0] != knowledge_message(EMPTY):
      continue
    match = THOUGHT.fullmatch(example.thinking)
    for slot, (named, role) in enumerate(((match[1], "goal"), (match[3], "trap"))):
      if named != "unknown":
        hits[slot] += named == getattr(world, role)
        chances[slot].append(1 / len(world.letters()))
    r, c = player_in(example.messages[-1].content)
    dr, dc = STEP[match[7]]
    symbol = world.symbol((r + dr, c + dc))
    if sum(row.count(world.goal) for row in world.rows) == sum(
      row.count(world.trap) for row in world.rows
    ):
      onto["goal" if symbol == world.goal else "trap" if symbol == world.trap else "other"] += 1
  for slot in (0, 1):
    assert len(chances[slot]) > 250
    assert abs(hits[slot] - sum(chances[slot])) < 3 * sum(p * (1 - p) for p in chances[slot]) ** 0.5
  assert (
    abs(onto["goal"] - onto["trap"]) < 3 * (onto["goal"] + onto["trap"]) ** 0.5
    and onto["goal"] > 30
  ), onto


def test_who_explores_turns_straight_back_less_often_than_by_chance():
  rng, turned = random.Random(6), collections.Counter()
  middle = World(((" ",) * 3,) * 3, (1, 1), "G", "H", (0, 0))
  for _ in range(4000):
    turned[corpus.respond(rng, middle, (1, 1), "", "", last="up")[1]] += 1
  # ONWARD of the time one of three moves, else one of four.
  back, other = (1 - corpus.ONWARD) / 4, corpus.ONWARD / 3 + (1 - corpus.ONWARD) / 4
  for name, share in (("down", back), ("up", other), ("left", other), ("right", other)):
    assert abs(turned[name] - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5, turned


# Extraction


def test_extraction_labels_are_what_the_record_shows():
  rng, seen = random.Random(7), collections.Counter()
  for _ in range(3000):
    example = corpus.extract_example(rng)
    (message,) = example.messages
    record = message.content.partition("Record:\n")[2].partition("\n\nWhat does this record teach")[
      0
    ]
    before = message.content.partition("Known before this game:\n")[2].partition("\n\nRecord:")[0]
    known, facts = claims.parse_all(before), revealed(record)
    assert bool(before) == bool(known)
    expected = [fact for fact in facts if fact.role in (GOAL, TRAP)]
    assert len(expected) == ("Congratulations" in record) + ("fell into" in record) <= 1
    if "hit a wall" in record and (not expected or Claim(WALL) not in known):
      expected.append(Claim(WALL))
    expected = expected or [Claim(GENERIC)]  # harmless symbols are seen but left unsaid
    assert claims.parse_all(example.answer) == expected
    assert len(example.answer.splitlines()) == len(expected) <= 2 and example.thinking == ""
    seen[expected[0].role, bool(known)] += 1
  assert all(
    seen[role, known] > 15 for role in (GOAL, TRAP, WALL, GENERIC) for known in (False, True)
  ), seen


def test_a_record_is_a_whole_game_of_its_world():
  rng, ends = random.Random(8), collections.Counter()
  for _ in range(500):
    world = random_world(rng)
    played, facts = corpus.episode(rng, world)
    limit = len(played.answers) if played.ended == "turn_limit" else 99
    game = WorldGame(world, max_turns=limit)
    heard = game.observation
    for asked, answer in zip(played.messages[::2], played.messages[1::2], strict=True):
      assert asked.content.endswith(heard) and answer.content == answer.action
      step = game.play(answer.action)
      heard = step.observation
    assert (step.done, step.ended, step.outcome, step.reward) == (
      True,
      played.ended,
      played.outcome,
      played.reward,
    )
    assert played.passed == (played.reward >= 1.0) == (Claim(GOAL, world.goal) in facts)
    assert (played.ended == "lost") == (Claim(TRAP, world.trap) in facts)
    assert (Claim(WALL) in facts) == (
      "hit a wall" in "".join(asked.content for asked in played.messages[::2]) + played.outcome
    )
    assert len(facts) <= 2
    ends[played.ended] += 1
  assert (
    set(ends) == {"passed", "lost", "invalid", "turn_limit"}
    and min(ends["passed"], ends["lost"], ends["turn_limit"]) > 50
  ), ends


# Ask and other


def test_ask_labels_follow_from_the_prompt_alone():
  rng, answers = random.Random(9), collections.Counter()
  for _ in range(2000):
    example = corpus.ask_example(rng)
    system, question = example.messages
    board = last_board(question.content)
    letters = (
      list(dict.fromkeys(cell for row in board for cell in row if cell not in ("", "P")))
      if board
      else list(string.ascii_uppercase)
    )
    answer = (
      resolved(claims.parse_all(system.content), letters)["hazard" in question.content] or "unknown"
    )
    assert example.answer == answer and example.thinking == ""
    answers[bool(board), answer != "unknown"] += 1
  assert min(answers.values()) > 100 and len(answers) == 4


def test_other_answers_are_right():
  rng, tasks = random.Random(10), collections.Counter()
  for _ in range(2000):
    example = corpus.other_example(rng)
    task, text = example.messages[0].content.split("\n")
    alphabet = dict(zip(string.ascii_lowercase, string.ascii_uppercase))
    if "upper" in task:
      expected = "".join(alphabet.get(x, x) for x in text)
    elif "lower" in task:
      expected = "".join({b: a for a, b in alphabet.items()}.get(x, x) for x in text)
    elif "backwards" in task:
      expected = "".join(text[-1 - i] for i in range(len(text)))
    elif "Sort" in task:
      expected = "".join(x * text.count(x) for x in string.ascii_letters if x in text)
    elif "first" in task:
      expected = text[:1]
    elif "last" in task:
      expected = text[len(text) - 1]
    elif "How many" in task:
      expected = str(sum(1 for _ in text))
    else:
      expected = text
    assert example.answer == expected, (task, text)
    tasks[task] += 1
  assert set(tasks) == set(corpus.OTHER_TASKS) and len(tasks) == 8


# The mix


def test_an_example_is_its_seeds_and_the_mix_is_as_written():
  assert [corpus.example(seed) for seed in range(50)] == [
    corpus.example(seed) for seed in range(50)
  ]
  assert len({corpus.example(seed).messages for seed in range(50)}) > 45
  n = 6000
  counts = collections.Counter(corpus.example(derive("mix", i)).kind for i in range(n))
  assert sum(corpus.MIX.values()) == pytest.approx(1)
  for kind, share in corpus.MIX.items():
    assert abs(counts[kind] - share * n) < 4 * (share * (1 - share) * n) ** 0.5, counts


def test_the_way_to_the_goal_is_a_shortest_safe_one():
  """Against a search over all ways of that many moves; without both roles none is told."""
  rng, seen = random.Random(8), 0
  for _ in range(300):
    world = random_world(rng)
    thought, action = corpus.respond(rng, world, world.start, world.goal, world.trap, way=True)
    told = re.search(r" I go ((?: ?\(\d, \d\))+)\. Next", thought)[1]
    cells = [tuple(map(int, pair)) for pair in re.findall(r"(\d), (\d)", told)]
    assert worlds.neighbours(world.start, world.size)[action] == cells[0]
    edge, moves = {world.start}, 0
    while not any(world.symbol(cell) == world.goal for cell in edge):
      edge = {
        other
        for cell in edge
        for other in worlds.neighbours(cell, world.size).values()
        if world.symbol(other) != world.trap
      }
      moves += 1
    assert len(cells) == moves and world.symbol(cells[-1]) == world.goal
    assert all(world.symbol(cell) != world.trap for cell in cells)
    for before, after in zip([world.start, *cells], cells, strict=False):
      assert after in worlds.neighbours(before, world.size).values()
    seen += moves > 3
    alone, _ = corpus.respond(rng, world, world.start, world.goal, "", guess=0.0, way=True)
    assert "I go" not in alone
  assert seen > 50


def test_a_guess_that_is_kept_to_is_of_a_letter_that_the_last_move_came_nearer_to():
  world = World((("A", " ", "B"), (" ",) * 3, (" ",) * 3), (2, 1), "A", "B", (0, 0))
  how = dict(guess=1.0, onward=0.0)
  for last, keep, expected in (("left", True, "A"), ("right", True, "B"), ("left", False, "AB")):
    at, rng = (2, {"left": 0, "right": 2}[last]), random.Random(1)
    named = {
      THOUGHT.fullmatch(corpus.respond(rng, world, at, "", "", last=last, keep=keep, **how)[0])[1]
      for _ in range(40)
    }
    assert named == set(expected)
