"""Whether an answer has the form that the system prompt of `system_prompt.txt` asks for: something
a program can see.
"""

import re

# A full stop inside a number or a name ends nothing.
SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")


def is_very_short(answer: str, *, sentences: int = 2, words: int = 40) -> bool:
  """True for an answer of one line, of whole sentences, at most so many and of at most so many
  words together.

  Strict where in doubt: the full stop of "Dr." ends a sentence too. An answer that the limit of
  tokens cut does not obey: its last sentence has no end, or it is too long.
  """
  text = answer.strip()
  ends = list(SENTENCE_END.finditer(text))
  return (
    "\n" not in text
    and 1 <= len(ends) <= sentences
    and ends[-1].end() == len(text)
    and len(text.split()) <= words
  )
