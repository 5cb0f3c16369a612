"""Whether an answer follows an instruction: one function a rule, of the answer's text and of what
the rule says.

White space at the two ends of an answer is forgiven, and so are empty lines between lines that are
counted, a code block around JSON, and where `alone` compares an answer of a few words, its case and
one full stop behind it. Nothing else is: a comment or bold print around an answer is wrong where
the instruction wants nothing else.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")  # "don't" and "well-known" are one word each
END = re.compile(r"[.!?]+(?=\s|$)")  # of a sentence; the point in "3.5" ends none
BLOCK = re.compile(r"```(?:json)?\n(.*)\n```", re.DOTALL)
MIN_WORDS = 5  # of a sentence that is asked for: "Yes." says nothing


def words(answer: str) -> list[str]:
  """The words, in order; a number is one, a sign by itself is none."""
  return WORD.findall(answer)


def sentences(answer: str) -> int:
  """How many sentences there are; a last one without its end counts, too."""
  return sum(map(bool, map(words, END.split(answer))))


def lines(answer: str) -> list[str]:
  """The lines that are not empty, without white space around each."""
  return [line.strip() for line in answer.split("\n") if line.strip()]


def alone(answer: str, wanted: str) -> bool:
  """Whether the answer is `wanted` and nothing else, in any case, with a full stop or without."""
  return answer.strip().removesuffix(".").casefold() == wanted.casefold()


def exactly(answer: str, wanted: str) -> bool:
  """Whether the answer is `wanted`, letter by letter."""
  return answer.strip() == wanted


def word_count(answer: str, least: int, most: int) -> bool:
  """Whether it has from `least` to `most` words."""
  return least <= len(words(answer)) <= most


def sentence_count(answer: str, count: int) -> bool:
  """Whether it has so many sentences, each with its end."""
  return sentences(answer) == count and answer.strip()[-1] in ".!?"


def line_count(answer: str, count: int) -> bool:
  """Whether it has so many lines, none of them without a word."""
  found = lines(answer)
  return len(found) == count and all(map(words, found))


def first_word(answer: str, word: str) -> bool:
  """Whether it begins with the word, in any case, and goes on."""
  found = words(answer)
  begins = answer.lstrip().casefold().startswith(word.casefold())
  return begins and len(found) >= MIN_WORDS and found[0].casefold() == word.casefold()


def last_word(answer: str, word: str) -> bool:
  """Whether it ends with the word, in any case, with the sentence's end behind it or without."""
  found, text = words(answer), answer.strip().rstrip(".!?").casefold()
  ends = text.endswith(word.casefold()) and found[-1].casefold() == word.casefold()
  return ends and len(found) >= MIN_WORDS


def upper(answer: str) -> bool:
  """Whether it is a sentence without a small letter."""
  return len(words(answer)) >= MIN_WORDS and not any(map(str.islower, answer))


def lower(answer: str) -> bool:
  """Whether it is a sentence without a capital letter."""
  return len(words(answer)) >= MIN_WORDS and not any(map(str.isupper, answer))


def without_word(answer: str, word: str) -> bool:
  """Whether it is a sentence in which the word does not occur, in any case."""
  found = [one.casefold() for one in words(answer)]
  return len(found) >= MIN_WORDS and word.casefold() not in found


def without_text(answer: str, text: str) -> bool:
  """Whether it is a sentence in which the sign or letter does not occur, in any case."""
  return len(words(answer)) >= MIN_WORDS and text.casefold() not in answer.casefold()


def word_times(answer: str, word: str, count: int) -> bool:
  """Whether the word occurs so many times, in any case."""
  return [one.casefold() for one in words(answer)].count(word.casefold()) == count


def question(answer: str) -> bool:
  """Whether it is one question and nothing else."""
  return sentence_count(answer, 1) and answer.strip().endswith("?")


def wrapped(answer: str, before: str, after: str) -> bool:
  """Whether it stands between the two signs, which occur nowhere in it."""
  text = answer.strip()
  inner = text[len(before) : len(text) - len(after)]
  bare = before not in inner and after not in inner
  return text == before + inner + after and bare and bool(words(inner))


def parts(answer: str, separator: str, count: int) -> list[str] | None:
  """The parts of a line of so many, none of them without a word; None if it is another."""
  found = [part.strip() for part in answer.strip().split(separator)]
  fits = len(found) == count and "\n" not in answer.strip() and all(map(words, found))
  return found if fits else None


def separated(answer: str, separator: str, count: int) -> bool:
  """Whether it is a line of so many parts with the separator between them."""
  return parts(answer, separator, count) is not None


def initials(answer: str, letter: str, count: int) -> bool:
  """Whether it is so many different words, with commas between them, that begin with the letter."""
  found = parts(answer.strip().removesuffix("."), ",", count) or []
  begin = [part.casefold().startswith(letter) and len(words(part)) == 1 for part in found]
  return bool(found) and all(begin) and len(set(map(str.casefold, found))) == count


def divided(answer: str, divider: str) -> bool:
  """Whether it is three lines, of which the second is the divider."""
  found = lines(answer)
  return len(found) == 3 and found[1] == divider and all(map(words, found[::2]))


def numbered(answer: str, count: int) -> bool:
  """Whether its lines are "1. …", "2. …" and so on, so many, and nothing else."""
  found = lines(answer)
  marks = [f"{number}. " for number in range(1, count + 1)]
  return len(found) == count and all(
    line.startswith(mark) and bool(words(line.removeprefix(mark)))
    for line, mark in zip(found, marks, strict=True)
  )


def bullets(answer: str, mark: str, count: int) -> bool:
  """Whether each of its lines begins with the mark and a space, so many, and nothing else."""
  found = lines(answer)
  return len(found) == count and all(
    line.startswith(f"{mark} ") and bool(words(line)) for line in found
  )


def closing_line(answer: str, line: str) -> bool:
  """Whether the last line is this and no other is, and words stand before it."""
  *before, last = lines(answer) or [""]
  return last == line and line not in before and any(map(words, before))


def json_object(answer: str, keys: Sequence[str]) -> bool:
  """Whether it is a JSON object with these keys, in any order, each once, and a text for each."""
  found = _json(answer, lambda pairs: pairs)
  if not isinstance(found, list) or not all(isinstance(pair, tuple) for pair in found):
    return False
  texts = all(isinstance(value, str) and value.strip() for _, value in found)
  return texts and sorted(key for key, _ in found) == sorted(keys)


def json_texts(answer: str, count: int) -> bool:
  """Whether it is a JSON array of so many different texts."""
  found = _json(answer)
  texts = isinstance(found, list) and all(isinstance(one, str) and one.strip() for one in found)
  return texts and len(found) == len(set(found)) == count


def _json(answer: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
  """What the JSON text holds, in a code block or in none; None if it is no JSON. `pairs` makes an
  object of its keys and values, of which a dictionary would forget those that come twice.
  """
  try:
    block = BLOCK.fullmatch(answer.strip())
    return json.loads(block[1] if block else answer, object_pairs_hook=pairs)
  except (ValueError, RecursionError):
    return None
