"""What the extractor reads: one finished trajectory, perhaps the knowledge so far, and the form its
answer must have. The words are those of games or of conversations, as config.extraction.wording
says.
"""

from oel_jax.conversations.schema import Message

ITEM_MARK = "- EXPERIENCE ITEM:"

_OPENING = {
  "games": "This is the record of a finished game whose rules nobody told the player.",
  "conversations": "This is the record of one finished conversation of an assistant.",
}
_KNOWN = {"games": "Known before this game:", "conversations": "Known before this conversation:"}
_TASK = {
  "games": (
    "What does this record teach that will help in any later game of this kind? "
    "Speak of symbols and rules, not of places on this board. Prefer what is not yet known.\n"
  ),
  "conversations": (
    "Write down, for everyone who will work on such cases, what the last words of the record or "
    "its feedback say about cases of this kind. Keep their names and numbers, and leave out who "
    "asked.\n"
  ),
}
_ITEMS = {
  "games": f"Answer with one or two lines, each of which begins with {ITEM_MARK}",
  # Asked for one or two, a small model filled the second line with whatever came to its mind.
  "conversations": f"Answer with one line that begins with {ITEM_MARK}",
}
_TEXT = "Answer with a few plain sentences."


def extraction_message(
  transcript: str, knowledge: str, *, form: str, wording: str = "games"
) -> Message:
  """The user message that asks for what a trajectory teaches (OEL section 3, e'_i ~ π_extract(· |
  τ_i, e_{i-1})).

  Args:
    transcript: `conversations.schema.transcript` of one finished episode.
    knowledge: e_{i-1}; "" if there is none or the extractor is not to see it.
    form: "items" or "text".
    wording: "games" or "conversations".
  """
  known = f"{_KNOWN[wording]}\n{knowledge}\n\n" if knowledge else ""
  asked = _TASK[wording] + (_ITEMS[wording] if form == "items" else _TEXT)
  return Message("user", f"{_OPENING[wording]}\n\n{known}Record:\n{transcript}\n\n{asked}")
