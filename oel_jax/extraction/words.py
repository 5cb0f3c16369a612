"""The words of a text, by which what an item says is looked for in a conversation."""

import itertools
import re
import unicodedata

_COMMON = frozenset(
  "a an and are as at be by for from in is it of on or that the they this to with you your".split()
)
# German: of its most frequent words those that are no English ones.
_GERMAN = frozenset(
  "aber auch auf bei das dem der ein eine einem einen einer für ist mit nicht oder und vom von "
  "wenn werden wird zum zur".split()
)
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff]+")
_WITHIN = re.compile(r"[ ,/&(\"'“”‘’-]+")  # between words of one phrase
TITLE_WORDS = 3  # a text with so many words behind its first may be a title


def words(text: str) -> set[str]:
  """All but the most frequent English ones, without regard to capitals."""
  return set(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())) - _COMMON


def terms(text: str) -> set[str]:
  """Its words; of writing without spaces between them, each two letters that stand together."""
  found = set()
  for word in words(text):
    for run in _UNSPACED.findall(word):
      found |= {run[i : i + 2] for i in range(max(1, len(run) - 1))}
    found |= set(_UNSPACED.sub(" ", word).split())
  return found


def names(text: str) -> set[str]:
  """The words in capitals, or with a capital letter within a phrase; none of a text whose capitals
  are no sign of names: a title, or German, which gives one to each noun.
  """
  each = list(re.finditer(r"\w+", text))
  gaps = (text[before.end() : word.start()] for before, word in itertools.pairwise(each))
  within = [word[0] for word, gap in zip(each[1:], gaps) if _WITHIN.fullmatch(gap)]
  capital = [word for word in within if word[0].isupper() and word != "I"]
  title = len(within) >= TITLE_WORDS and 2 * len(capital) > len(within)
  if title or _GERMAN & words(text):
    return set()
  return words(" ".join([*capital, *(word[0] for word in each if word[0].isupper())])) - {"i"}


def numbers(text: str) -> set[str]:
  """Those in digits, with the letters beside them; what has no spaces, Chinese or Japanese, may
  hold some.
  """
  text = unicodedata.normalize("NFKC", text).casefold()
  return set(re.findall(r"[a-z]*\d[a-z\d]*", text))
