"""The embedded policy's vocabulary: a SentencePiece model whose pieces are given, not trained.

Every fixed phrase of a prompt is one piece (user-defined symbols, the longest match wins), then
words, then printable characters, then bytes, so that any text survives encoding and decoding
unchanged. A symbol on the board is the same piece as the letter in a sentence, and a cell is always
two pieces long: reading knowledge is then matching a piece, and the cell below lies a fixed number
of pieces ahead.
"""

import string
from collections.abc import Sequence

from sentencepiece import sentencepiece_model_pb2 as model_pb2

from oel_jax.conversations.schema import knowledge_message
from oel_jax.environments import prompts
from oel_jax.extraction.prompts import ITEM_MARK, extraction_message
from oel_jax.pocket import claims, corpus, worlds
from oel_jax.policy.tokenizers import CONTROLS

# What decides something in a response, one piece each.
DECIDING = (
  *("unknown", *worlds.LETTERS, *worlds.ACTIONS),
  *(*worlds.PLACES, *(f" {place}" for place in worlds.PLACES)),
)
_WORDS = (
  "Goal: ",
  ". Hazard: ",
  ". I am at ",
  ". Not ",
  ". Next: ",
  " at ",
  ", ",
  ", or",
  "unknown",
  *(f"[{name}]" for name in worlds.ACTIONS),
  *worlds.ACTIONS,
  *(
    " " + word
    for word in "Nobody told me what does It may be where to go it end the game do nothing".split()
  ),
)


def pieces() -> list[str]:
  """The user-defined pieces, each once."""
  prompt = prompts.first_message("", player=corpus.PLAYER, actions=corpus.ACTION_LIST).content
  record, _, task = extraction_message("\x00", "", form="items").content.partition("\x00")
  opening = record.removesuffix("Record:\n")
  known = (
    extraction_message("", "\x00", form="items").content.removeprefix(opening).partition("\x00")[0]
  )
  phrases = [
    prompt,
    opening,
    known,
    "Record:\n",
    task,
    knowledge_message("").content,
    f"{ITEM_MARK} ",
    *(corpus.ask_message(role).content for role in (claims.GOAL, claims.TRAP)),
    *(f"{task}\n" for task in corpus.OTHER_TASKS),
    "\nAnswer: ",
    "\nEnd of game:\n",
    "Current Board:\n\n",
    ".\nCurrent Board:\n\n",
    "\nAvailable Actions: [up], [down], [left], [right], [w], [a], [s], [d]",
    "|  ",
    "  |  ",
    "  |\n",
    "| P/",
    "  | P/",
    " |  ",
    " |\n",
    *("+" + "+".join(["-----"] * size) + "+\n" for size in worlds.SIZES),
    *worlds.PLACES,
    *(f" {place}" for place in worlds.PLACES),
    *(f"You moved {name} to position " for name in worlds.ACTIONS),
    "\nCongratulations! You reached the goal!",
    "\nYou fell into a hole! Game over. You completed ",
    "% of the journey to the goal.",
    "\nThe game was stopped after ",
    " turns.",
    "You attempted an invalid move. Reason: ",
    "\nInvalid Move: ",
    *(f"You tried to move {name} but hit a wall!" for name in worlds.ACTIONS),
    " Please resubmit a valid move and remember to follow the game rules to avoid "
    "penalties.\nCurrent Board:\n\n",
    "Invalid action format. Use [up], [down], [left], [right] or [w], [a], [s], [d].",
    *(
      part
      for role in (*claims.LAKE, claims.SAFE, claims.WALL, claims.GENERIC)
      for wording in claims.WORDINGS[role]
      for part in wording.split("{}")
    ),
    *_WORDS,
    "\n",
    *string.printable[:95],
  ]
  return list(dict.fromkeys(phrase for phrase in phrases if phrase))


def build() -> bytes:
  """Returns the SentencePiece model file: control pieces, user-defined pieces, 256 bytes."""
  return model_file(pieces())


def model_file(given: Sequence[str]) -> bytes:
  """A SentencePiece model of control pieces, the given ones and 256 bytes."""
  model, kind = model_pb2.ModelProto(), model_pb2.ModelProto.SentencePiece
  spell = (
    [("<unk>", kind.UNKNOWN)]
    + [(name, kind.CONTROL) for name in CONTROLS]
    + [(piece, kind.USER_DEFINED) for piece in given]
  )
  spell += [(f"<0x{byte:02X}>", kind.BYTE) for byte in range(256)]
  for text, its_kind in spell:
    model.pieces.add(piece=text, score=0.0, type=its_kind)
  spec = model.trainer_spec
  spec.model_type, spec.byte_fallback, spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = (
    spec.BPE,
    True,
    0,
    -1,
    -1,
    1,
  )
  spec.unk_piece = "<unk>"
  model.normalizer_spec.name = "identity"
  model.normalizer_spec.add_dummy_prefix = False
  model.normalizer_spec.remove_extra_whitespaces = False
  model.normalizer_spec.escape_whitespaces = False  # a user's "▁" stays one
  return model.SerializeToString()
