"""Whether an answer has the form that the system prompt of `system_prompt.txt` asks for, and
whether it speaks of what was asked: what a program can see of both.
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


WORD = re.compile(r"[^\W\d_]{3,}|\d+")
# Words of three letters and more in questions and answers of any kind.
COMMON = frozenset(
  "about all also and any are been best but can come could describe did does don down each even "
  "every explain few for from get give good had has have help her here him his how into its just "
  "keep let like list long made make makes many may might more most much must need not now one "
  "only other our out over put say see she short should some such sure take tell than that the "
  "their them then there these they thing things this those too two use very want was way well "
  "were what when where which while who why will with without work would yes you your".split()
)


def is_about(prompt: str, answer: str) -> bool:
  """True for an answer that takes up a word of the prompt and says something that is not in it.

  It catches what a check of the form lets through: the same short answer to everything, an empty
  phrase, the question said again. Whether the answer is right it cannot see, and a right answer in
  words all of its own is not counted; so it compares models and grades none.
  """
  asked, said = (_stems(text) for text in (prompt, answer))
  return bool(asked & said) and bool(said - asked)


def _stems(text: str) -> set[str]:
  """The beginnings of the words that mean something: owl's and Owls are one, hoot and hooting."""
  words = (word.lower() for word in WORD.findall(re.sub(r"['’]s?\b", "", text)))
  return {word.removesuffix("s")[:4] for word in words if word not in COMMON}
