"""The help desk's hidden rules: one for each kind of case, drawn by lot, and whether an answer
obeys it. The judge is a program: what counts are the words below, whatever their case.
"""

import dataclasses
import functools
import random
import re
from collections.abc import Mapping

from oel_jax.environments.help_desk_cases import TOPICS, Topic
from oel_jax.runtime.seeds import derive

# Where a case goes and which form it needs; what must be said and what must not; what comes first;
# what holds for a time only.
KINDS = ("desk", "form", "lesson", "ask", "lookup", "fact")
DESKS = (
  "Alder", "Birch", "Cedar", "Elder", "Hazel", "Juniper", "Larch", "Maple", "Olive", "Rowan",
  "Spruce", "Willow",
)  # fmt: skip
FORMS = tuple(map(str, range(11, 99)))
CODES = (
  "CRANE", "CUCKOO", "EAGLE", "FALCON", "FINCH", "HERON", "LARK", "MAGPIE", "OSPREY", "OWL",
  "PLOVER", "RAVEN", "ROBIN", "SPARROW", "STORK", "WREN",
)  # fmt: skip
PHRASES = (
  "page nine", "two green labels", "the grey lid", "cold water only", "both receipts",
  "a blue envelope", "the long cable", "before noon", "the inner box", "a dry cloth",
  "the second drawer", "a signed note",
)  # fmt: skip
QUESTIONS = (
  "photo", "serial number", "postcode", "receipt", "phone number", "customer number",
  "water hardness", "shop name", "machine colour", "box label",
)  # fmt: skip
PROMISES = ("discount", "replacement", "compensation", "gift")
STATES = ("packed", "sent")  # of an order
WEEKS = 10  # of a period

_FORM = re.compile(r"\bform\W{0,4}(?:number|no)?\W{0,4}(\d+)", re.IGNORECASE)
_LOOKUP = re.compile(r"\bLOOK[ -]?UP\b\W{0,4}:\W{0,4}(\d+)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Rule:
  """What is to be done with one kind of case.

  Attributes:
    kind: one of KINDS.
    topic: the cases that it is about.
    values: desk: its name. form: its number. lesson: the phrase that must be said, the word that
      must not. ask: what is asked for first, then the desk. lookup: the desk by the order's state,
      in the order of STATES. fact: the code, and the last week in which it holds.
    changed: whether it became another one at the beginning of the period.
  """

  kind: str
  topic: Topic
  values: tuple[str, ...]
  changed: bool = False

  @property
  def category(self) -> str:
    """By which evaluation counts: the kind, and whether the period changed the rule."""
    return f"{self.kind}, changed" if self.changed else self.kind

  def text(self, tool: str = "") -> str:
    """The rule in words that a player can follow: perfect knowledge of this kind of case, and what
    the back office says to an answer that broke it. It tells no other rule. `tool` names what looks
    orders up; "": a line of text does.
    """
    by = f"with {tool}" if tool else "LOOK UP: and the number of the order"
    how = {
      "desk": "go to desk {0}",
      "form": "get form {0}",
      "lesson": 'are told "{0}", and nothing of a {1}',
      "ask": "are first asked for the {0}, and with it go to desk {1}",
      "lookup": f"are first looked up ({by}), and go to desk {{0}} if the order is packed, to desk "
      "{1} if it is sent",
      "fact": "get the code {0} until week {1}",
    }
    return f"Cases of the kind '{self.topic.title}' {how[self.kind].format(*self.values)}."

  def right(self, answer: str, *, state: str = "", asked: bool = False) -> bool:
    """Whether an answer, with which the case is decided, obeys the rule. An answer that decides
    two things, or that says the phrases of several lessons, is wrong.

    Args:
      answer: all of it; case and spaces do not count.
      state: of the order, if it was looked up; else "".
      asked: whether the customer was asked for the right thing, and gave it.
    """
    if self.kind == "lesson":
      return _said(answer, PHRASES) == {self.values[0]} and not _said(answer, self.values[1:])
    if self.kind == "lookup":
      wanted = f"desk: {self.values[STATES.index(state)]}" if state else ""
    elif self.kind == "ask":
      wanted = f"desk: {self.values[1]}" if asked else ""
    else:
      wanted = f"{'code' if self.kind == 'fact' else self.kind}: {self.values[0]}"
    return decisions(answer) == {wanted.casefold()}

  def asks(self, answer: str) -> bool:
    """Whether an answer asks for what must be asked for, for nothing else, and decides nothing."""
    wanted = {self.values[0]} if self.kind == "ask" else None
    return _said(answer, QUESTIONS) == wanted and not decisions(answer)


def decisions(answer: str) -> set[str]:
  """What an answer decides, {"desk: rowan"}: the desks and codes that it names, whatever it says of
  them, and the numbers that stand behind the word form.
  """
  named = {
    "desk": _said(answer, DESKS),
    "code": _said(answer, CODES),
    "form": _FORM.findall(answer),
  }
  return {f"{verb}: {value}".casefold() for verb, values in named.items() for value in values}


def looked_up(answer: str) -> str:
  """The number of the order that an answer looks up; "" if it looks up none, or decides, too."""
  found = _LOOKUP.search(answer)
  return found[1] if found and not decisions(answer) else ""


def _said(answer: str, phrases: tuple[str, ...]) -> set[str]:
  """Those of the phrases that an answer says, in lower case; the plurals of words count."""
  return set(_pattern(phrases).findall(" ".join(answer.casefold().split())))


@functools.cache
def _pattern(phrases: tuple[str, ...]) -> re.Pattern[str]:
  return re.compile(rf"\b({'|'.join(re.escape(phrase.casefold()) for phrase in phrases)})s?\b")


@functools.lru_cache(maxsize=64)
def table(
  kinds: tuple[str, ...], topics: int, desks: int, period: int, rules_seed: int, change: float
) -> tuple[Rule, ...]:
  """The rules of a period, one a topic, in an order drawn by lot; arguments as in `HelpDesk`.

  Which topics there are, the kind of each one's rule and what it says follow from the seed alone:
  names tell nothing. Topics are dealt to kinds in turn, and values from a shuffled deck, so that
  always giving the same answer pays as little as possible.
  """
  order = _draw(rules_seed, "topics").sample(range(len(TOPICS)), topics)
  named = tuple(_draw(rules_seed, "desks").sample(DESKS, desks))
  kind_of = {topic: kinds[place % len(kinds)] for place, topic in enumerate(order)}
  changes = [_changing(kind_of, rules_seed, number, change) for number in range(1, period + 1)]
  rules = []
  for place, topic in enumerate(order):
    version = sum(topic in changing for changing in changes)
    number = place // len(kinds)  # of its kind
    values = _values(kind_of[topic], number, version, named, rules_seed, period)
    rules.append(Rule(kind_of[topic], TOPICS[topic], values, period > 0 and topic in changes[-1]))
  return tuple(rules)


def _changing(kind_of: Mapping[int, str], seed: int, period: int, change: float) -> set[int]:
  """The topics whose rules change as a period begins: all facts, and a share of the others."""
  others = [topic for topic, kind in kind_of.items() if kind != "fact"]
  drawn = _draw(seed, "change", period).sample(others, round(change * len(others)))
  return {*drawn, *(topic for topic, kind in kind_of.items() if kind == "fact")}


def _values(
  kind: str, place: int, version: int, desks: tuple[str, ...], seed: int, period: int
) -> tuple[str, ...]:
  """What the rule of the `place`-th topic of a kind says in its `version`-th form."""
  dealt = functools.partial(_dealt, place=place, version=version, seed=seed)
  match kind:
    case "desk":
      return (dealt(desks, "desk"),)
    case "form":
      return (dealt(FORMS, "form"),)
    case "lesson":
      return dealt(PHRASES, "phrase"), dealt(PROMISES, "promise")
    case "ask":
      return dealt(QUESTIONS, "question"), dealt(desks, "ask")
    case "lookup":
      first = dealt(desks, "lookup")
      # Two desks that differ: who does not know the order's state is right in half of the cases.
      return first, dealt(tuple(desk for desk in desks if desk != first), "lookup, sent")
    case "fact":
      return dealt(CODES, "code"), str(WEEKS * (period + 1))
  raise ValueError(f"kinds has {kind!r}: it must be one of {', '.join(KINDS)}")


def _dealt(values: tuple[str, ...], name: str, *, place: int, version: int, seed: int) -> str:
  """The value from a shuffled deck; each new version is drawn anew from the other values."""
  deck = _draw(seed, name).sample(values, len(values))
  value = deck[place % len(deck)]
  for number in range(version):
    others = [other for other in values if other != value]
    value = _draw(seed, name, place, number).choice(others)
  return value


def _draw(*parts: int | str) -> random.Random:
  return random.Random(derive("help desk", *parts))
