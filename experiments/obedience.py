"""Whether an answer has the form that a system prompt asks for: something a program can see."""

import re

WORDS = 25
END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")  # a full stop inside a number or a name ends nothing


def one_short_sentence(answer: str) -> bool:
  """True for a single line of one whole sentence, which has at most `WORDS` words.

  Strict where in doubt: the full stop of "Dr." ends a sentence too. An answer that the limit of tokens cut has no end and does not obey.
  """
  text = answer.strip()
  ends = list(END.finditer(text))
  return "\n" not in text and len(ends) == 1 and ends[0].end() == len(text) and len(text.split()) <= WORDS
