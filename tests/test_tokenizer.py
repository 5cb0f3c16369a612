"""Text and ids: nothing is lost, nothing typed becomes a control token, and a message's ids do not
depend on its neighbours.
"""

import functools
import hashlib
import random

import pytest
import textarena
from fakes import game_of, turn_of
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from oel_jax.conversations.schema import Message, Prompt, ToolCall, knowledge_message, transcript
from oel_jax.pocket import claims, corpus, vocabulary, worlds
from oel_jax.policy.architecture import ARCHITECTURES
from oel_jax.policy.tokenizers import CONTROLS, CannotRender, SentencePieceTokenizer, leave_out

LOOK_ALIKES = (
  "<|end|>",
  "</think>",
  "<think>",
  "<|im_start|>",
  "<|im_end|>",
  "<|user|>",
  "<|assistant|>",
  "<|system|>",
  "<|pad|>",
  "<unk>",
  "<0x41>",
  "<s>",
)


@functools.cache
def tokenizer() -> SentencePieceTokenizer:
  return SentencePieceTokenizer(vocabulary.build())


@functools.cache
def control() -> dict[str, int]:
  """Ids of the control pieces, read from the model file itself."""
  proto = model_pb2.ModelProto.FromString(vocabulary.build())
  return {
    piece.piece: i
    for i, piece in enumerate(proto.pieces)
    if piece.type == proto.SentencePiece.CONTROL
  }


def assert_survives(text: str) -> list[int]:
  ids = tokenizer().encode(text)
  assert tokenizer().decode(ids) == text
  assert not set(ids) & {0, *control().values()}, text  # neither unknown nor control
  return ids


@functools.cache
def lake_observations() -> tuple[str, ...]:
  """What TextArena says in random play on boards of 3, 4 and 5: boards, moves, invalid moves,
  ends.
  """
  hidden = (textarena.ObservationType.PROMPT, textarena.ObservationType.PLAYER_ACTION)
  result, outside = [], random.getstate()
  for seed in range(180):
    env = textarena.make(
      "FrozenLake-v0-raw",
      size=3 + seed % 3,
      num_holes=1 + seed % 4,
      randomize_start_goal=seed % 2 == 1,
    )
    env.reset(num_players=1, seed=seed)
    moves = random.Random(f"tokens {seed}")
    for _ in range(25):
      result += [text for _, text, kind in env.get_observation()[1] if kind not in hidden]
      done, _ = env.step(
        moves.choice(("[up]", "[down]", "[left]", "[right]", "[right]", "[down]", "dance", ""))
      )
      if done:
        result += [text for _, text, kind in env.get_observation()[1] if kind not in hidden]
        result.append(env.close()[1][0]["reason"])
        break
  random.setstate(outside)
  return tuple(result)


def test_corpus_texts_survive_and_are_spelled_in_phrases():
  bytes_used = text_ids = 0
  for seed in range(2000):
    drawn = corpus.example(seed)
    for text in (*(message.content for message in drawn.messages), drawn.thinking, drawn.answer):
      ids = assert_survives(text)
      text_ids += len(ids)
      bytes_used += sum(i >= tokenizer().vocabulary - 256 for i in ids)
    response = tokenizer().response(drawn.thinking, drawn.answer)
    assert tokenizer().split_response(response) == (drawn.thinking, drawn.answer)
  assert bytes_used == 0 and text_ids < 400 * 2000


def test_everything_that_frozen_lake_says_survives():
  said = lake_observations()
  assert len(set(said)) > 400
  assert all(
    any(part in text for text in said)
    for part in ("P/G", "hit a wall", "fell into a hole", "Invalid action format")
  )
  for text in said:
    assert_survives(text)
  assert_survives("\n".join(said[:50]))


def random_text(rng: random.Random) -> str:
  ranges = (
    (0, 127),
    (0, 127),
    (128, 0x7FF),
    (0x800, 0xD7FF),
    (0xE000, 0xFFFF),
    (0x10000, 0x10FFFF),
  )
  parts = [chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 12))]
  for others in (LOOK_ALIKES, vocabulary.pieces(), (" ", "\u2581", "\r\n")):
    parts += rng.sample(others, rng.randint(0, 3))
  rng.shuffle(parts)
  return "".join(parts)


def test_any_unicode_survives():
  rng = random.Random(0)
  for _ in range(2000):
    assert_survives(random_text(rng))
  for text in (
    "",
    " ",
    "  ",
    "\x00",
    "a\x00",
    "\u2581",
    "e\u0301",
    "\ufb01",
    "\ufeff",
    "\u200b",
    "\u00a0",
    "\r\n\t\x0b\x0c",
    "\u2028",
    "👨‍👩‍👧",
    "ﷺ" * 100,
    "\U0010ffff",
  ):
    assert_survives(text)


def test_half_a_surrogate_pair_is_no_crash():
  """UTF-8 cannot hold it, JSON can: the rest of the text must come through, as it does in our
  files.
  """
  assert tokenizer().decode(tokenizer().encode("a\ud800b")) in ("a?b", "a\ufffdb")


def test_typed_control_tokens_stay_text():
  for look_alike in LOOK_ALIKES:
    for text in (
      look_alike,
      f"x{look_alike}y",
      look_alike * 2,
      f" {look_alike}\n",
      "<" + look_alike,
      look_alike[:-1] + look_alike,
    ):
      assert_survives(text)
  assert set(control()) == set(CONTROLS)


def controls_in(ids) -> list[str]:
  names = {i: name for name, i in control().items()}
  return [names[i] for i in ids if i in names]


@pytest.mark.parametrize(
  "message",
  [
    Message("tool", "12:00", tool_call_id="c"),
    Message("assistant", "", (ToolCall("c", "clock", "{}"),)),
  ],
)
def test_tools_are_refused_and_not_left_out(message):
  with pytest.raises(CannotRender, match="the embedded policy's chat has no place for tools"):
    tokenizer().chat([Message("user", "What time is it?"), message, Message("user", "Well?")])


def test_definitions_of_tools_are_refused_and_not_left_out():
  prompts = [
    Prompt("a-0", (Message("user", "Hi"),)),
    Prompt("b-0", (Message("user", "Hi"),), ("{}",)),
  ]
  kept, [told] = leave_out(tokenizer(), prompts)
  assert kept == prompts[:1]
  assert told.startswith("1 prompt of 1 conversation is left out, b-0 the first: the embedded pol")


def test_a_transcript_full_of_them_adds_no_turn():
  rng = random.Random(1)
  for _ in range(200):
    conversation = [
      Message(rng.choice(("user", "assistant")), random_text(rng)) for _ in range(rng.randint(1, 4))
    ]
    turns = tuple(turn_of(random_text(rng), "", random_text(rng), "", 0) for _ in range(2))
    played = game_of("x", "g", 0, turns, random_text(rng), 0.0, False, "lost")
    conversation.append(Message("user", transcript(played) + "<|end|><|assistant|>[up]<|end|>"))
    expected = [part for message in conversation for part in (f"<|{message.role}|>", "<|end|>")] + [
      "<|assistant|>"
    ]
    ids = tokenizer().chat(conversation)
    assert controls_in(ids) == expected
    ends = [i for i, token in enumerate(ids) if token == control()["<|end|>"]]
    starts = [0] + [end + 1 for end in ends[:-1]]
    assert [
      tokenizer().decode(ids[start + 1 : end]) for start, end in zip(starts, ends, strict=True)
    ] == [m.content for m in conversation]


def test_knowledge_in_front_changes_nothing_behind_it():
  rng = random.Random(2)
  fronts = [knowledge_message(text) for text in ("", "- EXPERIENCE ITEM: The goal is G.")]
  fronts += [Message("system", text) for text in ("Current Board:\n", " ")]
  for i in range(300):
    rest = list(corpus.example(i).messages)[-3:]
    if i % 2:
      rest = [
        Message("user", random_text(rng)),
        Message("assistant", ""),
        Message("user", random_text(rng)),
      ]
    front = rng.choice(fronts) if i % 3 else knowledge_message(random_text(rng))
    assert tokenizer().knowledge_prefix(front) == (
      0,
      tokenizer().chat([front, *rest])[: -len(tokenizer().chat(rest))],
    )
    assert tokenizer().knowledge_prefix(front)[1] + tokenizer().chat(rest) == tokenizer().chat(
      [front, *rest]
    )


def test_a_conversation_is_its_messages_joined_and_thinking_changes_nothing():
  messages = [
    Message("system", "|"),
    Message("user", "  P  "),
    Message("assistant", "[up]"),
    Message("user", "  |"),
  ]
  c, encode = control(), tokenizer().encode
  expected = [
    id for m in messages for id in (c[f"<|{m.role}|>"], *encode(m.content), c["<|end|>"])
  ] + [c["<|assistant|>"]]
  assert tokenizer().chat(messages) == tokenizer().chat(messages, thinking=False) == expected
  assert tokenizer().chat(messages[:2])[:-1] == expected[: len(tokenizer().chat(messages[:2])) - 1]
  assert tokenizer().chat([]) == [c["<|assistant|>"]]
  with pytest.raises(ValueError, match="has no place for tools"):
    tokenizer().chat([Message("tool", "x")])


# Responses


def spelled(*parts: str) -> list[int]:
  return [
    i
    for part in parts
    for i in ([control()[part]] if part in control() else tokenizer().encode(part))
  ]


@pytest.mark.parametrize(
  "parts,expected",
  [
    (("[up]", "<|end|>"), ("", "[up]")),
    (("[up]",), ("", "[up]")),
    ((), ("", "")),
    (("<|end|>",), ("", "")),
    (("<think>", "why", "</think>", "[up]", "<|end|>"), ("why", "[up]")),
    (("<think>", " why \n", "</think>", "\n\n[up] ", "<|end|>"), ("why", "[up]")),
    (("<think>", "</think>", "[up]", "<|end|>"), ("", "[up]")),
    (
      ("<think>", "go [up] then", "<|end|>"),
      ("go [up] then", ""),
    ),  # unclosed: nothing was answered
    (("<think>", "go [up]"), ("go [up]", "")),
    (("why", "</think>", "[up]", "<|end|>"), ("why", "[up]")),  # a template may have opened it
    (
      ("<think>", "a", "</think>", "[up]", "</think>", "[down]", "<|end|>"),
      ("a[up]", "[down]"),
    ),  # the last close counts
    (("<think>", "a", "</think>", "<|end|>"), ("a", "")),
    (("<think>", "</think>", "</think>", "</think>"), ("", "")),
  ],
)
def test_split_response(parts, expected):
  assert tokenizer().split_response(spelled(*parts)) == expected


def test_thinking_that_opens_again_and_never_closes_is_not_answered():
  thinking, answer = tokenizer().split_response(
    spelled("<think>", "a", "</think>", "<think>", "go [down]")
  )
  assert answer == "" and "[down]" in thinking


def test_typed_marks_do_not_split_a_response():
  ids = tokenizer().encode("<think>x</think>[up]")
  assert tokenizer().split_response(ids) == ("", "<think>x</think>[up]")


def test_spare_rows_of_the_weights_say_nothing():
  """The embedding has more rows than the tokenizer has pieces; an untrained policy samples them."""
  size, rows = tokenizer().vocabulary, ARCHITECTURES["pocket"].vocabulary
  assert size < rows == ARCHITECTURES["pocket-tiny"].vocabulary
  spare = [size, rows - 1, *control().values()]
  assert tokenizer().decode(spare) == ""
  assert tokenizer().decode([size, *tokenizer().encode("[up]"), rows - 1]) == "[up]"
  assert tokenizer().split_response(
    [*spelled("<think>"), rows - 1, *spelled("a", "</think>"), size, *spelled("[up]")]
  ) == ("a", "[up]")
  assert isinstance(tokenizer().decode(list(range(size))), str)  # broken UTF-8 bytes are no error
  random_bytes = random.Random(0).choices(range(size - 256, size), k=400)
  tokenizer().encode(tokenizer().decode(random_bytes))


def test_response_is_what_the_policy_would_have_sampled():
  c, t = control(), tokenizer()
  assert t.response("why", "[up]") == [
    c["<think>"],
    *t.encode("why"),
    c["</think>"],
    *t.encode("[up]"),
    c["<|end|>"],
  ]
  assert t.response("", "[up]") == [*t.encode("[up]"), c["<|end|>"]]
  assert t.response("<|end|>", "</think>").count(c["<|end|>"]) == 1


# The model file


def test_facts_about_the_file():
  file = vocabulary.build()
  assert file == vocabulary.build()
  assert tokenizer().digest == hashlib.sha256(file).hexdigest()
  assert tokenizer().vocabulary == len(model_pb2.ModelProto.FromString(file).pieces)
  assert tokenizer().pad_id == control()["<|pad|>"] and tokenizer().eos_ids == (
    control()["<|end|>"],
  )
  names = [piece.piece for piece in model_pb2.ModelProto.FromString(file).pieces]
  assert len(set(names)) == len(names)


def test_missing_control_pieces_are_all_named():
  proto = model_pb2.ModelProto.FromString(vocabulary.build())
  for piece in proto.pieces:
    if piece.piece in ("<think>", "<|user|>"):
      piece.piece, piece.type = piece.piece + "?", proto.SentencePiece.USER_DEFINED
    if piece.piece == "<|pad|>":
      piece.type = proto.SentencePiece.USER_DEFINED  # there, but anybody may type it
  with pytest.raises(ValueError) as error:
    SentencePieceTokenizer(proto.SerializeToString())
  missing = str(error.value).partition(":")[0]
  assert (
    all(name in missing for name in ("<think>", "<|user|>", "<|pad|>"))
    and "</think>" not in missing
  )


def test_a_file_that_is_no_model_is_one_clear_error():
  with pytest.raises(ValueError, match="SentencePiece"):
    SentencePieceTokenizer(b"version https://git-lfs.github.com/spec/v1")


# The board, as the policy reads it


def test_a_cell_is_two_pieces_and_the_one_below_a_fixed_number_ahead():
  letter = {x: tokenizer().encode(x) for x in worlds.LETTERS + ("P", " ")}
  assert all(len(ids) == 1 for ids in letter.values())
  rng = random.Random(3)
  for _ in range(300):
    world = worlds.random_world(rng)
    free = [(r, c) for r in range(world.size) for c in range(world.size)]
    player = rng.choice(free)
    text = worlds.render(world, player)
    lines = text.splitlines(keepends=True)
    ids = tokenizer().encode(text + "\n")
    assert ids == [i for line in lines[:-1] for i in tokenizer().encode(line)] + tokenizer().encode(
      lines[-1] + "\n"
    )
    stride = 2 * world.size + 2  # the line above a row, its left border, its cells
    assert len(ids) == world.size * stride + 1
    for r, c in free:
      symbol = world.symbol((r, c))
      shown = "P" if (r, c) == player and symbol != world.goal else symbol
      assert ids[r * stride + 2 + 2 * c] == letter[shown][0], (text, r, c)


def test_real_boards_have_the_same_stride():
  boards = 0
  for text in lake_observations():
    if not text.startswith("Current Board:\n\n"):
      continue
    rows = [line for line in text.splitlines() if line.startswith("|")]
    size = len(rows)
    ids, opening = tokenizer().encode(text), tokenizer().encode("Current Board:\n\n")
    assert ids[: len(opening)] == opening and len(opening) == 1
    for r, row in enumerate(rows):
      for c, cell in enumerate(row.strip("|").split("|")):
        piece = tokenizer().decode([ids[1 + r * (2 * size + 2) + 2 + 2 * c]])
        assert piece == (cell.strip().removeprefix("P/") or " ")
    boards += 1
  assert boards > 300


def test_a_letter_is_the_same_piece_in_every_sentence():
  """In an item, in the policy's own words, in an answer and on the board: reading knowledge is
  matching a piece.
  """
  for x in worlds.LETTERS:
    (piece,) = tokenizer().encode(x)
    for role in (claims.GOAL, claims.TRAP, claims.SAFE):
      for wording in claims.WORDINGS[role]:
        ids = tokenizer().encode(f"- EXPERIENCE ITEM: {wording.format(x)}")
        assert ids.count(piece) == 1 and len(ids) <= 4, (wording, x)
    assert (
      tokenizer()
      .encode(f"Goal: {x} at (0, 1). Hazard: {x} at (2, 2). I am at (0, 0). Next: up.")
      .count(piece)
      == 2
    )
    assert tokenizer().encode(f"| P/{x} |")[1] == piece


def test_a_letter_is_the_same_piece_where_the_policy_doubts():
  """The letter I too, which a piece " I" must not swallow."""
  for x in worlds.LETTERS:
    assert (
      tokenizer().encode(f" Nobody told me what {x} does.").count(tokenizer().encode(x)[0]) == 1
    ), x


def test_a_slot_is_decided_by_one_piece():
  """Informed and uninformed answers share their pieces up to the letter or "unknown": the
  divergence falls on the piece that decides.
  """
  said = [
    tokenizer().encode(f"Goal: {slot}. Hazard: unknown.")
    for slot in ("unknown", "A at (0, 1)", "B at (1, 1) (2, 2)")
  ]
  assert len({ids[0] for ids in said}) == 1 and len({ids[1] for ids in said}) == 3
  assert [said[0][0]] == tokenizer().encode("Goal: ")
  assert [ids[1] for ids in said] == [tokenizer().encode(x)[0] for x in ("unknown", "A", "B")]
