"""What the extractor reads: one finished trajectory, perhaps the knowledge so far, and the form its
answer must have.
"""

from oel_jax.conversations.schema import Message

ITEM_MARK = "- EXPERIENCE ITEM:"

_TASK = (
  "What does this record teach that will help in any later game of this kind? "
  "Speak of symbols and rules, not of places on this board. Prefer what is not yet known.\n"
)
_FORM = {
  "items": f"Answer with one or two lines, each of which begins with {ITEM_MARK}",
  "text": "Answer with a few plain sentences.",
}


def extraction_message(transcript: str, knowledge: str, *, form: str) -> Message:
  """The user message that asks for what a trajectory teaches (OEL section 3, e'_i ~ π_extract(· |
  τ_i, e_{i-1})).

  Args:
    transcript: `conversations.schema.transcript` of one finished episode.
    knowledge: e_{i-1}; "" if there is none or the extractor is not to see it.
    form: "items" or "text".
  """
  known = f"Known before this game:\n{knowledge}\n\n" if knowledge else ""
  opening = "This is the record of a finished game whose rules nobody told the player.\n\n"
  return Message("user", f"{opening}{known}Record:\n{transcript}\n\n{_TASK}{_FORM[form]}")
