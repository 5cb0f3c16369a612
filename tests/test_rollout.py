"""Play: what each prompt holds, which action is taken, limits, places that are refilled, and files
that survive any interruption.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import random
import threading
import time
from concurrent import futures

import pytest
from fakes import in_turns

from oel_jax import config
from oel_jax.conversations.jsonl import append_jsonl, read_conversations
from oel_jax.conversations.schema import GAME, Message, Source, cut_prompts, knowledge_message
from oel_jax.environments import Episode, Game, Step, game_spec, play, play_to_file, rollout
from oel_jax.runtime.seeds import derive

SPEC = game_spec(config.default().deployment)
MOVES = ["[up]", "[down]", "[left]", "[right]"]
EOS = 256


class Tokenizer:
  """A token is a byte of the written-out messages. A response is bytes, an end of sequence, and
  perhaps a thinking before </think>.
  """

  def chat(self, chat, *, tools=(), thinking=True):
    return list(
      json.dumps([[message.role, message.content] for message in chat] + [thinking]).encode()
    )

  def split_response(self, ids, thinking=True):
    text = bytes(token for token in ids if token != EOS).decode()
    before, mark, after = text.partition("</think>")
    return (before, after) if mark else (text, "")


class Policy:
  """Answers by `answers(prompt messages, seed, batch)`; records every call."""

  tokenizer = Tokenizer()

  def __init__(self, answers):
    self.answers = answers
    self.calls = []

  @in_turns
  def sample(self, prompts, seeds, *, sampling, max_new_tokens):
    assert len(prompts) == len(seeds) and sampling == "sampling" and max_new_tokens == 100
    batch = hashlib.sha256(repr((prompts, seeds)).encode()).hexdigest()
    chats = [json.loads(bytes(prompt)) for prompt in prompts]
    self.calls.append((chats, list(seeds)))
    return [
      list(self.answers(chat[:-1], seed, batch).encode()) + [EOS]
      for chat, seed in zip(chats, seeds)
    ]


def scripted(*answers: str) -> Policy:
  """Gives the t-th answer in turn t of every game."""
  return Policy(lambda chat, seed, batch: answers[sum(role == "assistant" for role, _ in chat)])


def careful(chat, seed, batch) -> str:
  """A random move that depends on its own seed and on the WHOLE batch, as float rounding would on a
  real device.
  """
  return f"thought {batch[:6]}</think>" + random.Random(f"{seed} {batch}").choice(MOVES)


HOW = dict(sampling="sampling", max_response_tokens=100, max_prompt_tokens=100_000, thinking=True)


def episodes(count: int, knowledge: str = "") -> list[Episode]:
  return [
    Episode(f"e{number}", derive("map", number), derive("sample", number), knowledge)
    for number in range(count)
  ]


def lake(corner: str) -> int:
  """A map seed whose cell below the start is free ("free") or a hole ("hole")."""
  for seed in range(100):
    step = Game(SPEC, seed).play("[down]")
    if step.done == (corner == "hole"):
      return seed
  raise AssertionError("no such map")


# An observation that equals an earlier one.


def test_a_move_into_a_wall_twice_stands_in_the_prompt_twice():
  answers = [f"</think>{move}" for move in ("[left]", "[down]", "[up]", "[left]", "[down]")]
  policy = scripted(*answers)
  (trajectory,) = play(policy, SPEC, episodes=[Episode("e", lake("free"), 1)], slots=1, **HOW)
  last = policy.calls[-1][0][0][:-1]
  assert [role for role, _ in last] == ["user", "assistant"] * 4 + ["user"]
  # Word for word the same, and there both times.
  assert last[2][1] == last[8][1] and "hit a wall" in last[2][1]
  assert [content for role, content in last if role == "assistant"] == [
    "[left]",
    "[down]",
    "[up]",
    "[left]",
  ]
  assert (
    len(trajectory.answers) == 5
    and trajectory.messages[2].content == trajectory.messages[8].content
  )
  assert trajectory.ended == "turn_limit" and trajectory.outcome.endswith(
    "\nThe game was stopped after 5 turns."
  )


def test_the_trajectory_is_what_was_played():
  seed = lake("hole")
  policy = scripted(
    "Left?</think>I try [left].", "No, [left] was bad</think>Of [left] and [down], [DOWN]."
  )
  seen = []
  (trajectory,) = play(
    policy,
    SPEC,
    episodes=[Episode("r1-deploy-00000", seed, 9)],
    slots=4,
    on_finished=seen.append,
    **HOW,
  )
  game = Game(SPEC, seed)
  board = game.observation
  wall, hole = game.play("[left]"), game.play("[down]")
  assert seen == [trajectory] and (trajectory.id, trajectory.source) == (
    "r1-deploy-00000",
    Source(GAME, "FrozenLake-v0-raw", seed=seed),
  )
  shown, first, then, second = trajectory.messages
  assert shown.content.endswith("\n\n" + board) and "You are P on the board." in shown.content
  assert "[up], [down], [left], [right]" in shown.content and "H' = Hole" not in shown.content
  assert (first.thinking, first.content, first.action, first.response_tokens) == (
    "Left?",
    "I try [left].",
    "[left]",
    26 + 1,
  )
  assert then.content == wall.observation and second.action == "[down]"
  assert (trajectory.outcome, trajectory.reward, trajectory.passed, trajectory.ended) == (
    hole.outcome,
    hole.reward,
    False,
    "lost",
  )
  assert "fell into a hole" in trajectory.outcome
  # The prompts are those of the trajectory, with no thinking in them.
  chats = [[Message(role, content) for role, content in call[0][0][:-1]] for call in policy.calls]
  assert chats == [list(prompt.messages) for prompt in cut_prompts(trajectory)]
  assert chats[1] == [shown, Message("assistant", "I try [left]."), then]
  assert [seeds for _, seeds in policy.calls] == [[derive(9, 0)], [derive(9, 1)]]


# An action inside the thinking, or none.


@pytest.mark.parametrize(
  "answer", ["[down]", "I will go [down]</think>", "[down]</think>[jump]", ""]
)
def test_no_action_after_the_thinking_is_an_invalid_move(answer):
  (trajectory,) = play(
    scripted(answer, answer), SPEC, episodes=[Episode("e", lake("free"), 1)], slots=1, **HOW
  )
  assert [answer.action for answer in trajectory.answers] == ["", ""]
  assert trajectory.ended == "invalid" and not trajectory.passed


def test_a_win_passes():
  path = ("[down]", "[down]", "[right]", "[right]")
  results = play(
    scripted(*(f"</think>{move}" for move in path)), SPEC, episodes=episodes(30), slots=30, **HOW
  )
  won = [result for result in results if "Congratulations" in result.outcome]
  assert 0 < len(won) < 30
  for result in results:
    if result in won:
      assert (result.passed, result.reward, result.ended) == (True, 1.0, "passed")
    else:
      assert not result.passed and result.ended == "lost"


def test_knowledge_is_one_system_message_and_nothing_else_changes():
  without, given = Policy(lambda *_: "</think>[down]"), Policy(lambda *_: "</think>[down]")
  play(without, SPEC, episodes=episodes(3), slots=2, **HOW)
  play(given, SPEC, episodes=episodes(3, "- EXPERIENCE ITEM: H is bad."), slots=2, **HOW)
  system = knowledge_message("- EXPERIENCE ITEM: H is bad.")
  assert len(without.calls) == len(given.calls)
  for (plain, plain_seeds), (informed, informed_seeds) in zip(without.calls, given.calls):
    assert plain_seeds == informed_seeds
    assert informed == [[[system.role, system.content]] + chat for chat in plain]


def test_in_the_words_of_conversations_knowledge_is_the_items_alone():
  policy = Policy(lambda *_: "</think>[down]")
  item = "- EXPERIENCE ITEM: H is bad."
  play(policy, SPEC, episodes=episodes(1, item), slots=1, **HOW, wording="conversations")
  assert policy.calls[0][0][0][0] == ["knowledge", item]


def test_the_template_is_asked_for_thinking_or_not():
  for thinking in (True, False):
    policy = scripted("", "")
    play(policy, SPEC, episodes=episodes(1), slots=1, **{**HOW, "thinking": thinking})
    assert policy.calls[0][0][0][-1] is thinking


class Lasts:
  """A game that ends after as many moves as its seed says."""

  open = 0
  most_open = 0

  def reset(self, seed):
    self.left = seed
    Lasts.open += 1
    Lasts.most_open = max(Lasts.open, Lasts.most_open)
    return "begun"

  def step(self, action):
    self.left -= 1
    Lasts.open -= not self.left
    return Step(f"{self.left} left", self.left == 0, 1.0)


LASTS = dataclasses.replace(SPEC, make=Lasts, max_turns=1000)


def of_lengths(lengths) -> list[Episode]:
  return [Episode(f"e{i}", length, derive("sample", i)) for i, length in enumerate(lengths)]


def scheduled(lengths, slots: int) -> list[list[tuple[int, int]]]:
  """The (episode, turn) of each step, by hand: whoever is free takes the next episode in order."""
  waiting, places, steps = list(enumerate(lengths)), [None] * slots, []
  while waiting or any(places):
    places = [place or (waiting and (*waiting.pop(0), 0)) or None for place in places]
    steps.append([(place[0], place[2]) for place in places if place])
    places = [
      place and ((place[0], place[1], place[2] + 1) if place[2] + 1 < place[1] else None)
      for place in places
    ]
  return steps


@pytest.mark.parametrize("slots, lengths", [(3, (6, 2, 3, 4, 5, 1, 1)), (1, (2, 1)), (5, (1, 2))])
def test_the_game_that_ends_makes_room_for_the_next_one(slots, lengths):
  policy, counts = scripted(*["</think>[up]"] * 9), []
  Lasts.open = Lasts.most_open = 0
  result = play(
    policy, LASTS, episodes=of_lengths(lengths), slots=slots, advance=counts.append, **HOW
  )
  assert [played.id for played in result] == [f"e{number}" for number in range(len(lengths))]
  assert [len(played.messages) // 2 for played in result] == list(lengths)
  assert counts == list(range(1, len(lengths) + 1))
  expected = [
    [derive(derive("sample", number), turn) for number, turn in step]
    for step in scheduled(lengths, slots)
  ]
  assert [seeds for _, seeds in policy.calls] == expected
  assert (Lasts.open, Lasts.most_open) == (0, min(slots, len(lengths)))


def test_no_place_waits_while_there_are_games():
  rng = random.Random(0)
  lengths = [min(20, int(rng.expovariate(0.25)) + 1) for _ in range(64)]
  policy = Policy(lambda chat, seed, batch: "</think>[up]")
  play(policy, LASTS, episodes=of_lengths(lengths), slots=8, **HOW)
  busy = [len(seeds) for _, seeds in policy.calls]
  assert len(busy) == len(scheduled(lengths, 8)) < sum(lengths) / 8 + max(lengths)
  full = busy.index(next(count for count in busy if count < 8))
  assert full >= len(busy) - max(lengths) and busy[:full] == [8] * full
  in_groups = sum(max(lengths[start : start + 8]) for start in range(0, 64, 8))
  assert len(busy) < 0.7 * in_groups


class Threads(Policy):
  """Shares the prompts out among three threads, as a CPU's sampler does, at the clock's mercy."""

  def __init__(self, clock):
    super().__init__(careful)
    self.clock, self.lock = clock, threading.Lock()

  def sample(self, prompts, seeds, *, reply, **how):
    def work(own):
      def answer(k, ids):
        self.clock()
        with self.lock:
          return reply(own[k], ids)

      part = Policy(careful)
      part.sample([prompts[i] for i in own], [seeds[i] for i in own], reply=answer, **how)
      return [seeds for _, seeds in part.calls]

    parts = [range(part, len(prompts), 3) for part in range(3)]
    with futures.ThreadPoolExecutor(3) as pool:
      self.calls += pool.map(work, parts)


def test_where_an_episode_is_played_does_not_depend_on_the_clock():
  """Each answer depends on the whole batch, so one episode in another place changes the games."""

  def run(seed):
    rng = random.Random(seed)
    policy = Threads(lambda: time.sleep(rng.choice((0, 0, 0.001, 0.004))))
    return play(policy, SPEC, episodes=episodes(40), slots=7, **HOW), policy.calls

  games, batches = run(0)
  assert len({played.messages for played in games}) == 40
  for seed in (1, 2):
    assert run(seed) == (games, batches)
  # The places of a thread share its games: all are busy until its last ones.
  for part, places in zip(batches, (3, 2, 2), strict=True):
    busy = [len(seeds) for seeds in part]
    assert busy[:-5] == [places] * (len(busy) - 5)


def test_a_prompt_over_the_limit_names_field_limit_length_and_episode():
  policy = scripted("</think>[left]", "</think>[left]")
  play(policy, SPEC, episodes=episodes(1), slots=1, **HOW)
  lengths = [
    len(Tokenizer().chat([Message(*message) for message in chat[:-1]]))
    for (chat,), _ in policy.calls
  ]
  assert lengths[1] > lengths[0]
  policy, seen = scripted("</think>[left]", "</think>[left]"), []
  message = (
    rf"config.policy.max_prompt_tokens is {lengths[1] - 1}.*"
    rf"episode e0, turn 2, has {lengths[1]} tokens: raise it"
  )
  with pytest.raises(ValueError, match=message):
    play(
      policy,
      SPEC,
      episodes=episodes(1),
      slots=1,
      on_finished=seen.append,
      **{**HOW, "max_prompt_tokens": lengths[1] - 1},
    )
  assert len(policy.calls) == 1 and not seen
  play(
    scripted("</think>[left]", "</think>[left]"),
    SPEC,
    episodes=episodes(1),
    slots=1,
    **{**HOW, "max_prompt_tokens": lengths[1]},
  )


def test_ids_must_differ():
  with pytest.raises(ValueError, match="the id 'e1' occurs more than once"):
    play(scripted(), SPEC, episodes=episodes(3) + episodes(2)[1:], slots=2, **HOW)


# Files.


class Cut(Exception):
  """Stands for a crash."""


def uninterrupted(tmp_path, count=8, slots=3):
  policy = Policy(careful)
  result = play_to_file(
    tmp_path / "whole.jsonl", policy, SPEC, episodes=episodes(count), slots=slots, **HOW
  )
  return (tmp_path / "whole.jsonl").read_bytes(), result, policy


def test_play_to_file_writes_in_order_and_reads_what_is_there(tmp_path):
  data, result, _ = uninterrupted(tmp_path)
  assert (
    result
    == play(Policy(careful), SPEC, episodes=episodes(8), slots=3, **HOW)
    == read_conversations(tmp_path / "whole.jsonl")
  )
  assert [path.name for path in tmp_path.iterdir()] == ["whole.jsonl"]
  counts = []
  # A crash between the rename and the removal leaves it.
  append_jsonl(tmp_path / "whole.jsonl.partial", result[0])
  no_policy = None
  again = play_to_file(
    tmp_path / "whole.jsonl",
    no_policy,
    SPEC,
    episodes=episodes(8),
    slots=3,
    advance=counts.append,
    **HOW,
  )
  assert again == result and counts == [8]
  assert [path.name for path in tmp_path.iterdir()] == ["whole.jsonl"] and (
    tmp_path / "whole.jsonl"
  ).read_bytes() == data


@pytest.mark.parametrize(
  "order, played",
  [
    ((0, 1, 2, 3, 5, 4, 6, 7), 0),
    ((0, 1, 2, 2, 4, 5, 6, 7), 1),
    ((0, 1, 2, 3, 4, 5, 6, 7, 7), 0),
  ],
)
def test_lines_that_are_moved_lost_or_doubled_are_put_right(tmp_path, order, played):
  data, result, _ = uninterrupted(tmp_path)
  lines, policy = data.splitlines(keepends=True), Policy(careful)
  (tmp_path / "whole.jsonl").write_bytes(b"".join(lines[i] for i in order))
  assert (
    play_to_file(tmp_path / "whole.jsonl", policy, SPEC, episodes=episodes(8), slots=3, **HOW)
    == result
  )
  assert (tmp_path / "whole.jsonl").read_bytes() == data and bool(policy.calls) == bool(played)


@pytest.mark.parametrize("half_a_line", [False, True])
@pytest.mark.parametrize("cut_at", range(1, 9))
@pytest.mark.parametrize("per_place", [1, 2, rollout.PER_PLACE])
def test_cut_off_at_any_episode_the_file_is_the_same(
  tmp_path, monkeypatch, cut_at, half_a_line, per_place
):
  monkeypatch.setattr(rollout, "PER_PLACE", per_place)
  whole, result, reference = uninterrupted(tmp_path)
  path, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"

  def cut_after(last):
    def advance(finished):
      if finished == last:
        raise Cut

    return advance

  with pytest.raises(Cut):
    play_to_file(
      path, Policy(careful), SPEC, episodes=episodes(8), slots=3, advance=cut_after(cut_at), **HOW
    )
  assert not path.exists()
  written = partial.read_bytes()
  assert written.count(b"\n") == cut_at
  if half_a_line:
    partial.write_bytes(written[: -len(written.splitlines()[-1]) // 2 - 1])

  policy, counts = Policy(careful), []
  kept = cut_at - half_a_line
  assert (
    play_to_file(path, policy, SPEC, episodes=episodes(8), slots=3, advance=counts.append, **HOW)
    == result
  )
  assert path.read_bytes() == whole and not partial.exists()
  assert counts[-1] == 8 and counts == sorted(counts) and counts[0] in (kept, 1)
  # Whole calls were not made again, the others were, in the very same batches.
  ids = {json.loads(line)["id"] for line in written.splitlines()[:kept]}
  size = 3 * per_place
  calls = [range(start, min(start + size, 8)) for start in range(0, 8, size)]
  again = [i for call in calls if not {f"e{i}" for i in call} <= ids for i in call]
  first_turns = {derive(derive("sample", number), 0): number for number in range(8)}
  begun = [first_turns[seed] for _, seeds in policy.calls for seed in seeds if seed in first_turns]
  assert sorted(begun) == again
  assert all(call in reference.calls for call in policy.calls)


def test_cut_off_inside_a_call_again_and_again_no_line_is_written_twice(tmp_path):
  whole, _, reference = uninterrupted(tmp_path, count=4, slots=2)
  path, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"
  for last in range(len(reference.calls)):
    policy = Policy(careful)

    def dies(chat, seed, batch):
      if len(policy.calls) > last:
        raise Cut
      return careful(chat, seed, batch)

    policy.answers = dies
    with pytest.raises(Cut):
      play_to_file(path, policy, SPEC, episodes=episodes(4), slots=2, **HOW)
    ids = (
      [json.loads(line)["id"] for line in partial.read_text().splitlines()]
      if partial.exists()
      else []
    )
    assert len(ids) == len(set(ids))
  assert 0 < len(ids) < 4  # some were kept from games that ended earlier than others
  play_to_file(path, Policy(careful), SPEC, episodes=episodes(4), slots=2, **HOW)
  assert path.read_bytes() == whole


def test_a_file_of_another_run_is_refused(tmp_path):
  uninterrupted(tmp_path)
  with pytest.raises(
    ValueError,
    match="whole.jsonl: episode 'e7' .* is none of the 7 episodes asked for.*another configuration",
  ):
    play_to_file(tmp_path / "whole.jsonl", None, SPEC, episodes=episodes(7), slots=3, **HOW)
  (tmp_path / "whole.jsonl").rename(tmp_path / "b.jsonl.partial")
  moved = [
    Episode(episode.id, episode.map_seed + 1, episode.sample_seed) for episode in episodes(8)
  ]
  with pytest.raises(ValueError, match="b.jsonl.partial: episode 'e0'"):
    play_to_file(tmp_path / "b.jsonl", None, SPEC, episodes=moved, slots=3, **HOW)


def test_several_words_of_a_game_go_through_play():
  deployment = config.default().deployment
  deployment.unlock()
  deployment.game, deployment.game_args = "Minesweeper-v0-small-raw", {}
  deployment.action_pattern = r"\[\s*(\d+\s+\d+)\s*\]"
  policy = Policy(lambda chat, seed, batch: "</think>I open [ 2   2 ]")
  (trajectory,) = play(policy, game_spec(deployment), episodes=episodes(1), slots=1, **HOW)
  assert (
    trajectory.messages[1].action == "[2 2]"
    and "You revealed the cell at (2, 2)." in trajectory.messages[2].content
  )


# What is told.


class Given:
  """A game that ends at its first move with a reward."""

  def __init__(self, reward):
    self.reward = reward

  def reset(self, seed):
    return "board"

  def step(self, action):
    return Step("", True, self.reward, "The end.")


def test_rewards_that_are_no_shares_are_told_once_with_what_passed_means(tmp_path, caplog):
  rewards = itertools.cycle([0.0, 7.0, -1.0, 0.5])
  make = lambda: Given(next(rewards))
  own = dataclasses.replace(SPEC, name="Set-v0-raw", make=make, passed_reward=5.0)
  policy = scripted("</think>[up]")
  played = play_to_file(tmp_path / "a.jsonl", policy, own, episodes=episodes(8), slots=2, **HOW)
  assert [trajectory.passed for trajectory in played] == [False, True, False, False] * 2
  [told] = [record.message for record in caplog.records if "rewards" in record.message]
  assert f"{tmp_path}/a.jsonl: the rewards of Set-v0-raw are no shares" in told
  assert "they go from -1 to 7" in told
  assert "with 5 or more (config.deployment.passed_reward)" in told
  caplog.clear()
  uninterrupted(tmp_path)  # Frozen Lake's are
  assert "rewards" not in caplog.text


def test_boards_that_take_long_to_make_are_told_before_the_first_answer(monkeypatch, caplog):
  clock = iter(range(0, 10_000, 3))  # a board takes three seconds
  monkeypatch.setattr(time, "monotonic", lambda: next(clock))
  said = []

  def answer(chat, seed, batch):
    said.append([record.message for record in caplog.records])
    return "</think>[up]"

  spec = dataclasses.replace(SPEC, make=lambda: Given(0.0))
  with caplog.at_level(logging.WARNING, logger="absl"):
    play(Policy(answer), spec, episodes=episodes(3), slots=3, **HOW)  # nine seconds are none
    assert said[-1] == []
    play(Policy(answer), spec, episodes=episodes(8), slots=8, **HOW)
  told = "FrozenLake-v0-raw: the boards of 8 games are being made, which takes about 24 s"
  assert said[-1] == [told] == said[3]
