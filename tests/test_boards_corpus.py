"""What the policy of both games is taught, checked from the text alone: labels follow from prompts,
priors leak nothing, no example begins on a held-out board, and no text is lost in the vocabulary.
"""

import collections
import functools
import random
import re

from sentencepiece import sentencepiece_model_pb2 as model_pb2
from test_claims import resolved
from test_rooms import STEP, forward

from oel_jax.conversations.schema import KNOWLEDGE, Message
from oel_jax.environments import prompts
from oel_jax.extraction.prompts import ITEM_MARK
from oel_jax.pocket import claims, worlds
from oel_jax.pocket.boards import chosen, corpus, plans, rooms, vocabulary
from oel_jax.pocket.claims import BOX, GENERIC, GOAL, SAFE, TARGET, TRAP, WALL, Claim
from oel_jax.pocket.corpus import ACTION_LIST
from oel_jax.policy.architecture import ARCHITECTURES
from oel_jax.policy.tokenizers import CONTROLS, SentencePieceTokenizer


@functools.cache
def tokenizer() -> SentencePieceTokenizer:
  return SentencePieceTokenizer(vocabulary.frozen())


@functools.cache
def played():
  rng = random.Random(5)
  drawn = [rooms.random_room(rng) for _ in range(1000)]
  return [(room, corpus.play_example(rng, room)) for room in drawn]


SLOT = r"(?:unknown|([A-Z]) at \((\d), (\d)\))"
THOUGHT = re.compile(
  f"Goal: {SLOT}\\. Box: {SLOT}\\.(.*?)"
  r" I am at \((\d), (\d)\)\.(?: ([A-Z]) goes ([^.]*)\. I (?:push|go ([^.]*))\.)?"
  r"( There is no way\.)?(?: Not ([a-z, ]+)\.)? Next: (\w+)\."
)


def cells(text: str | None) -> list[tuple[int, int]]:
  return [(int(r), int(c)) for r, c in re.findall(r"\((\d), (\d)\)", text or "")]


def revealed(record: str) -> list[Claim]:
  """What a transcript of a push world shows, in order, each once: the box is what lies ahead of the
  player after a push, or lay there before the last one; what won is the letter that is gone.
  """
  symbol = re.search(r"You are (.) on the board", record)[1]
  parts = re.split(r"(?=You (?:pushed|  ?moved|attempted)|Invalid Move)", record)
  board, facts = plans.view(parts[0], symbol), []
  for part in parts[1:]:
    if "into a wall" in part:
      facts.append(Claim(WALL))
    if "Current Board" not in part:
      continue
    before, board = board, plans.view(part, symbol)
    action = re.search(r"moved \[(\w+)\]", part)[1]
    if part.startswith("You pushed"):
      facts.append(Claim(BOX, before.rows[board.at[0]][board.at[1]]))
    if "You have solved" in part:
      r, c = plans.step(board.at, action)
      facts.append(Claim(TARGET, before.rows[r][c]))
  return list(dict.fromkeys(facts))


def told(example) -> list[Claim] | None:
  """The claims that the system message amounts to; None without one."""
  if example.messages[0].role != KNOWLEDGE:
    return None
  text = example.messages[0].content
  if ITEM_MARK in text:
    assert text.count(ITEM_MARK) == len(claims.parse_all(text))
    return claims.parse_all(text)
  return [
    claim for record in text.split("You are playing a game.")[1:] for claim in revealed(record)
  ]


def as_lake(said: list[Claim]) -> list[Claim]:
  names = {TARGET: GOAL, BOX: TRAP}
  return [Claim(names.get(claim.role, claim.role), claim.letter) for claim in said]


def test_play_labels_follow_from_the_prompt_alone():
  seen = collections.Counter()
  for room, example in played():
    said = told(example) or []
    target, box = resolved(as_lake(said), room.letters())
    shown = "\n".join(message.content for message in example.messages if message.role == "user")
    view = plans.view(shown, re.search(r"You are (.) on the board", shown)[1])
    match = THOUGHT.fullmatch(example.thinking)
    assert match, example.thinking
    named_target, named_box = match[1] or "", match[4] or ""
    free = set(view.letters()) - {target, box} - {c.letter for c in said if c.role == SAFE}
    for known, named in ((target, named_target), (box, named_box)):
      assert named == known if known else not named or named in free
    target_at, box_at = (
      tuple(map(int, match.group(i, i + 1))) if match[i] else None for i in (2, 5)
    )
    assert cells(f"({match[8]}, {match[9]})") == [view.at]
    for named, at in ((named_target, target_at), (named_box, box_at)):
      assert at == ((view.find(named) or view.at) if named else None)
    move = match[15]
    assert example.answer == f"[{move}]"
    best = None
    if named_target and named_box and box_at != view.at:
      best = forward(view.open(), (view.at, box_at), target_at)
    if best is None:
      assert bool(match[13]) == bool(named_target and named_box) and not match[10]
    else:  # the ways are those of a best plan, whose first move is made
      assert match[10] == named_box and not match[14]
      walked, pushed = cells(match[12]), cells(match[11])
      first = walked[0] if walked else box_at
      assert first == plans.step(view.at, move) and pushed[-1] == target_at
      after = plans.moved(view.open(), (view.at, box_at), move)
      assert forward(view.open(), after, target_at) == best - 1
    assert ("Nobody told me" in match[7]) == (
      not (named_target and named_box) and bool(free - {named_target, named_box})
    )
    form = "none" if told(example) is None else "told" if said else "empty"
    seen[form, bool(target), bool(box)] += 1
  assert set(seen) == {("none", False, False), ("empty", False, False)} | {
    ("told", target, box) for target in (False, True) for box in (False, True)
  }
  assert min(seen.values()) > 10 and seen["told", True, True] > 250, seen


def test_histories_are_real_games_not_yet_decided():
  for room, example in played()[:400]:
    conversation = [message for message in example.messages if message.role != KNOWLEDGE]
    game = rooms.RoomGame(room)
    assert conversation[0].content.endswith("\n\n" + game.observation)
    assert f"You are {room.player} on the board" in conversation[0].content
    for answer, heard in zip(conversation[1::2], conversation[2::2]):
      step = game.play(answer.content)
      assert not step.done and step.observation == heard.content


def test_without_knowledge_a_letter_is_guessed_no_better_than_by_chance():
  hits, chances = 0, []
  for room, example in played():
    if told(example):
      continue
    match = THOUGHT.fullmatch(example.thinking)
    for named, role in ((match[1], room.target), (match[4], room.box)):
      if named:
        hits += named == role
        chances.append(1 / len(room.letters()))
  assert len(chances) > 60
  assert abs(hits - sum(chances)) < 3.5 * sum(p * (1 - p) for p in chances) ** 0.5


def test_extraction_labels_are_what_the_record_shows():
  rng, seen = random.Random(7), collections.Counter()
  for _ in range(500):
    (message,) = (example := corpus.extract_example(rng)).messages
    record = message.content.partition("Record:\n")[2].partition("\n\nWhat does this record")[0]
    before = message.content.partition("Known before this game:\n")[2].partition("\n\nRecord:")[0]
    known, facts = claims.parse_all(before), revealed(record)
    expected = [fact for fact in facts if fact.role in (TARGET, BOX)]
    if Claim(WALL) in facts and (not expected or Claim(WALL) not in known):
      expected.append(Claim(WALL))
    assert claims.parse_all(example.answer) == (expected or [Claim(GENERIC)])
    seen.update(fact.role for fact in facts)
  assert min(seen[role] for role in (TARGET, BOX, WALL)) > 60, seen


def test_ask_labels_follow_from_the_prompt_alone():
  rng, answers = random.Random(9), collections.Counter()
  for i in range(600):
    system, question = (example := corpus.ask_example(rng, push=i % 2 == 0)).messages
    board, _, asked = question.content.rpartition("\n\n")
    text = re.sub("Available.*", "", board)
    shown = set(re.findall("[A-Z]", text.replace("Current Board", ""))) if board else rooms.LETTERS
    said = as_lake(claims.parse_all(system.content))
    letter = resolved(said, sorted(shown))["box" in asked or "hazard" in asked]
    if i % 2 == 0 and board and example.answer != f"It is {letter or 'unknown'}.":
      continue  # what the player stands on is asked about, too
    assert example.answer == f"It is {letter or 'unknown'}."
    answers[asked, bool(board), letter != ""] += 1
  assert len(answers) == 16 and min(answers.values()) > 3, answers


def test_no_example_begins_on_a_held_out_board():
  """Rooms and lakes as they are shown in all texts of 400 examples, 3 × 3 lakes aside."""
  found = collections.Counter()
  for seed in range(400):
    text = "\n".join(message.content for message in corpus.example(seed).messages)
    for part in text.split("You are playing a game.")[1:]:
      first = part.partition("Current Board:\n\n")[2].partition("\n\nAvailable")
      if "Moves" in first[2][:8]:
        view = plans.view(f"Current Board:\n\n{first[0]}\n\n", re.search("You are (.)", part)[1])
        found["room"] += 1
        sides = {_side(view, cell) for cell in [view.find(x) for x in view.letters()] + [view.at]}
        assert False in sides  # one of these cells is the target, and its room is not held out
      else:
        found["lake"] += 1
  assert found["room"] > 150 < found["lake"]
  rng = random.Random(1)
  assert not any(chosen.held_out(corpus.lake(rng)) for _ in range(200))
  assert all(chosen.held_out(corpus.lake(rng, held=True)) for _ in range(50))


def _side(view, cell) -> bool:
  rows = [list(row.replace(view.player, "x")) for row in view.rows]
  rows[cell[0]][cell[1]] = "target"
  flat = tuple("".join("?" if symbol == "target" else symbol for symbol in row) for row in rows)
  return rooms.held_out(rooms.Room(flat, view.at, (0, 0), "X", "?"))


# The vocabulary


def test_the_frozen_file_is_what_the_pieces_make_and_fits_the_weights():
  assert vocabulary.frozen() == vocabulary.build()
  model = model_pb2.ModelProto.FromString(vocabulary.frozen())
  names = [piece.piece for piece in model.pieces]
  assert len(set(names)) == len(names) <= ARCHITECTURES["boards-4m"].vocabulary
  assert all(len(tokenizer().encode(text)) == 1 for text in vocabulary.DECIDING)


def test_every_text_survives_and_no_character_of_the_games_is_spelled_in_bytes():
  names = [p.piece for p in model_pb2.ModelProto.FromString(vocabulary.frozen()).pieces]
  known = set(range(len(CONTROLS) + 1, names.index("<0x00>")))
  for seed in range(300):
    example = corpus.example(seed)
    for text in [*(m.content for m in example.messages), example.thinking, example.answer]:
      ids = tokenizer().encode(text)
      assert tokenizer().decode(ids) == text and set(ids) <= known, text
  for text in ("", "\u2581 ▁ é √\r\n", "  | X  |", " #\n#", "<|end|> [up]", "\x00\t"):
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_a_symbol_is_one_piece_on_a_board_in_an_item_and_in_a_thought():
  (piece,) = tokenizer().encode(" X")
  room = rooms.Room(
    ("######", "#_O__#", "#____#", "######", "######", "######"), (1, 1), (2, 2), "X", "O"
  )
  board = tokenizer().encode(rooms.render(room, room.start, room.box_at))
  assert board.index(piece) == 1 + 6 + 2 and len(board) == 1 + 6 + 6 + 3
  lake = worlds.World(((" ", "X"), ("H", "G")), (0, 0), "G", "H", (1, 1))
  assert tokenizer().encode(worlds.render(lake, (0, 0))).count(piece) == 1
  for wordings in claims.WORDINGS.values():
    for wording in wordings:
      ids = tokenizer().encode(f"{ITEM_MARK} {wording.format('X')}")
      assert ids.count(piece) == ("{}" in wording) and len(ids) <= 4, wording
  assert tokenizer().encode("Goal: X at (1, 2).").count(piece) == 1
  assert tokenizer().encode("It is X.").count(piece) == 1
  assert set(STEP) <= set(map(str.strip, vocabulary.DECIDING))


def test_no_prompt_of_a_game_is_longer_than_what_is_taught():
  """Positions beyond a training row are untrained: it must hold the longest game, knowledge of the
  size that experiments/new_boards.py allows, and a response.
  """
  limits = {"row": 1024, "knowledge": 192, "response": 96}
  room = rooms.Room(
    ("######", "#____#", "#____#", "#__O_#", "#____#", "######"), (1, 1), (3, 2), "X", "O"
  )
  lake = worlds.World(
    tuple(tuple("GH   "[:5]) if r == 4 else (" ",) * 5 for r in range(5)), (0, 0), "G", "H", (4, 0)
  )
  for game, turns in (
    (rooms.RoomGame(room), rooms.MAX_TURNS),
    (worlds.WorldGame(lake), worlds.MAX_TURNS),
  ):
    messages = [prompts.first_message(game.observation, player="P", actions=ACTION_LIST)]
    for turn in range(turns - 1):
      action = ("[right]", "[left]")[turn % 2]
      heard = game.play(action)
      assert not heard.done
      messages += [Message("assistant", action), Message("user", heard.observation)]
    length = len(tokenizer().chat(messages))
    assert length + limits["knowledge"] + limits["response"] <= limits["row"], length
