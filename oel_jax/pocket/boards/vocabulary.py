"""The vocabulary of both games: a SentencePiece model whose pieces are given, not trained, as
`pocket.vocabulary` makes the shipped one's.

Here a symbol is one piece with the space before it, on a board, in a sentence and in an item alike,
so a row of a room is always SIZE pieces long and a row of a lake two a cell.
"""

import string

from oel_jax.conversations.schema import knowledge_message
from oel_jax.environments import prompts
from oel_jax.extraction.prompts import ITEM_MARK, extraction_message
from oel_jax.pocket import claims, corpus, load, worlds
from oel_jax.pocket import vocabulary as vocabulary_lib
from oel_jax.pocket.boards import corpus as boards_corpus
from oel_jax.pocket.boards import rooms

PLACES = tuple(f"({r}, {c})" for r in range(rooms.SIZE) for c in range(rooms.SIZE))
# What decides something in a response, one piece each.
DECIDING = tuple(
  f" {text}" for text in ("unknown", *rooms.LETTERS, *worlds.ACTIONS, *PLACES)
) + tuple(rooms.LETTERS)
FILE = "boards.model"  # in load.DATA
_SENTENCES = (
  "Nobody told me what does. It may be what to push, or it may be where to push it, or it may do "
  "nothing.",
  "It may be where to go, or it may end the game, or it may do nothing.",
)
# What both games' records and both players say, between symbols, places and actions.
_PHRASES = (
  "Current Board:\n\n",
  ".\nCurrent Board:\n\n",
  "\nAvailable Actions: [up], [down], [left], [right], [w], [a], [s], [d]",
  f"\nAvailable Moves: {', '.join(worlds.ACTIONS)}",
  "You  moved",
  "You pushed a box while moved",
  "\nCongratulations! You have solved the Sokoban puzzle!",
  "\nCongratulations! You reached the goal!",
  "\nYou fell into a hole! Game over. You completed ",
  "% of the journey to the goal.",
  "\nThe game was stopped after ",
  " turns.",
  "You attempted an invalid move. Reason:",
  "Invalid Move:",
  "\nInvalid Move:",
  " You cannot move into a wall!",
  " The submitted move does not follow the correct format. "
  "Use [up], [down], [left], [right] or [w], [a], [s], [d].",
  " Invalid action format. Use [up], [down], [left], [right] or [w], [a], [s], [d].",
  " Please resubmit a valid move and remember to follow the game rules to avoid penalties.",
  " Please resubmit a valid move and remember to follow the game rules to avoid penalties.\n"
  "Current Board:\n\n",
  "\nAnswer: ",
  "\nEnd of game:\n",
  "Goal:",
  ". Hazard:",
  ". Box:",
  ". I am at",
  ". There is no way",
  ". I go",
  ". I push",
  ". Not",
  ". Next:",
  " goes",
  " at",
  " unknown",
  "It is",
)


def pieces() -> list[str]:
  """The user-defined pieces, each once."""
  asked = prompts.first_message("", player="\x00", actions=corpus.ACTION_LIST).content
  before, _, after = asked.partition("\x00")
  record, _, task = extraction_message("\x00", "", form="items").content.partition("\x00")
  opening = record.removesuffix("Record:\n")
  known = (
    extraction_message("", "\x00", form="items").content.removeprefix(opening).partition("\x00")[0]
  )
  texts = [before.rstrip(" "), after, opening, known, "Record:\n", task]
  texts += [knowledge_message("").content, ITEM_MARK]
  texts += [boards_corpus.ask_message(role).content for role in boards_corpus.NAMES]
  texts += [f"{task}\n" for task in corpus.OTHER_TASKS]
  texts += _PHRASES
  texts += [text for wordings in claims.WORDINGS.values() for text in _parts(wordings)]
  for sentence in _SENTENCES:
    texts += [f" {word}" for word in sentence.replace(".", "").replace(",", "").split()]
  for name in worlds.ACTIONS:
    texts += [name, f" {name}", f"[{name}]", f" [{name}]", f"You moved {name} to position"]
    texts += [f" You tried to move {name} but hit a wall!"]
  texts += [*PLACES, *(f" {place}" for place in PLACES)]
  texts += ["| ", "  | ", "  |\n", "  ", "P/", " | ", " |\n"]
  texts += ["+" + "+".join(["-----"] * size) + "+\n" for size in worlds.SIZES]
  for mark in rooms.MARKS:
    texts += [mark, f" {mark}", f" {mark}\n", " ".join([mark] * rooms.SIZE) + "\n"]
  texts += [f" {letter}" for letter in rooms.LETTERS]
  texts += ["\n", *string.printable[:95]]
  return list(dict.fromkeys(texts))


def _parts(wordings: tuple[str, ...]) -> list[str]:
  """The items' own pieces: what stands between the mark, a letter and the end."""
  texts = []
  for wording in wordings:
    before, found, after = wording.partition("{}")
    texts += [f" {before}".rstrip(" "), after] if found else [f" {wording}"]
  return [text for text in texts if text]


def build() -> bytes:
  """Returns the SentencePiece model file that `pieces` make."""
  return vocabulary_lib.model_file(pieces())


def frozen() -> bytes:
  """Returns the file that policies are trained with, as `build` once made it."""
  return (load.DATA / FILE).read_bytes()
