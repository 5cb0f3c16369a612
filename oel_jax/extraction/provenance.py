"""What stands behind an item of knowledge: which conversations gave it, how many, of which kind it
is, and what has replaced it. Their file, user/items.jsonl, stays on the user side.

Two items are the same if their `normalised` texts are: the tag of the kind, case, white space and
the punctuation around them do not count. Wordings that differ otherwise are different items, each
with a support of its own.
"""

import collections
import dataclasses
import pathlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from oel_jax.conversations.jsonl import JsonLines, write_jsonl
from oel_jax.conversations.schema import Conversation, Message, by_policy
from oel_jax.extraction import words as words_lib
from oel_jax.extraction.knowledge import Item, Knowledge
from oel_jax.extraction.prompts import ITEM_MARK
from oel_jax.runtime import schema
from oel_jax.runtime.schema import get, need

SCHEMA = 1
KINDS = ("where-to-find", "lesson", "procedure", "fact")
# What tells a kind where no tag does, in this order; an item with none of these words has none.
_WORDS = (
  ("procedure", r"\bfirst\b.*\bthen\b|\bstep \d|\bin this order\b"),
  (
    "where-to-find",
    r"->|→|=>|\b(goes?|belongs?|sent|routed|forwarded) to\b"
    r"|\bis (handled by|(found|kept) (in|at|on|under))\b",
  ),
  ("lesson", r"\b(never|always|avoid|do not|don't|must not|make sure)\b"),
  ("fact", r"\b(costs?|valid|as of|deadline|expires?|until)\b"),
)
_TAGS = "|".join(kind.replace("-", "[- ]") for kind in KINDS)
_TAG = re.compile(rf"(?:\[({_TAGS})\]|\(({_TAGS})\)|({_TAGS}):)\s*", re.IGNORECASE)
# What parts an item's key from what it says of it. A colon without a space behind it is a time,
# but not that of Chinese and Japanese.
_SEPARATOR = re.compile(
  r"\s*(?:->|→|=>|:(?=\s)|：|\b(?:goes|go|belongs|belong) to\b|\bis handled by\b)\s*", re.IGNORECASE
)
# "Cases of the kind 'late parcel' get form 12": what is quoted is the key.
_OF_THE_KIND = re.compile(
  r"\W*cases? of (?:the|this) (?:kind|type)\W{1,3}(['\"‘“])(.+?)['\"’”](?!\w)(.+)",
  re.IGNORECASE | re.DOTALL,
)
MAX_KEY_WORDS = 12  # more before a colon are a sentence, not the name of a case
# Words before a colon that name no case.
_NO_KEY = ("advice", "example", "hint", "important", "note", "remember", "rule", "tip", "warning")
# Why an item is in no text.
LIMIT, SUPPORT, OWN_WORDS, NEWER = "limit", "support", "own words", "newer item"
TOO_WEAK = (SUPPORT, OWN_WORDS)


@dataclasses.dataclass(frozen=True)
class Sighting:
  """A conversation that gave an item.

  Attributes:
    conversation: its id.
    round: whose extraction read it.
    place: its number, from 1, among the conversations of that round, which stand in the order of
      time; 0 if not known.
    messages: numbers, from 1, of the messages that share the item's words (`shared`): found by
      words, for the extractor does not say what it draws on. () if there are none.
    told: whether others said it (`told`).
  """

  conversation: str
  round: int
  place: int
  messages: tuple[int, ...]
  told: bool = True  # as in files from before it was known


@dataclasses.dataclass(frozen=True)
class Origin:
  """An item, and what stands behind it.

  Attributes:
    text: in the first of its wordings.
    kind: one of KINDS; "" if not known.
    seen: one for each conversation that gave it, this round's and, where items are carried over,
      those of the rounds before.
    texts: numbers of the knowledge texts that hold it.
    left_out: why none does: SUPPORT, of too few conversations; OWN_WORDS, of too few in which
      others said it; NEWER, another took its place; LIMIT, the oldest items go. "" if one does.
    superseded_by: the text of the newer item; "" if there is none.
  """

  text: str
  kind: str
  seen: tuple[Sighting, ...]
  texts: tuple[int, ...] = ()
  left_out: str = ""
  superseded_by: str = ""

  @property
  def support(self) -> int:
    """Distinct conversations that gave the item."""
    return len(self.seen)

  @property
  def told(self) -> int:
    """Those of them in which others said it."""
    return sum(one.told for one in self.seen)


Origins = dict[str, Origin]  # by their `normalised` texts


def normalised(text: str) -> str:
  """The text by which items are compared: see the module."""
  text = unicodedata.normalize("NFKC", _untagged(text)).casefold()
  return " ".join(text.split()).strip(" .,;:!*_\"'“”。")


def kind_of(text: str) -> str:
  """One of KINDS: as the extractor's tag says ("[lesson] …", "(lesson) …", "lesson: …"), or else as
  a word of the item tells; "" if nothing does.
  """
  if tag := _TAG.match(_unmarked(text)):
    return next(filter(None, tag.groups())).lower().replace(" ", "-")
  found = (kind for kind, words in _WORDS if re.search(words, text, re.IGNORECASE | re.DOTALL))
  return next(found, "")


def key_of(text: str) -> tuple[str, str] | None:
  """What an item is about and what it says of it, both normalised: ("damaged parcel", "brass") of
  "Damaged parcel: BRASS", "Damaged parcel -> BRASS", "Damaged parcel goes to BRASS" or "Cases of
  the kind 'damaged parcel' are BRASS".

  None where no such words part it, or what stands before them is no name of a case.
  """
  if found := _OF_THE_KIND.match(_untagged(text)):
    return normalised(found[2]), normalised(found[3])
  parts = _SEPARATOR.split(_untagged(text), maxsplit=1)
  key, value = (normalised(part) for part in parts) if len(parts) == 2 else ("", "")
  named = key and key not in _NO_KEY and len(key.split()) <= MAX_KEY_WORDS
  return (key, value) if named and value else None


def shared(text: str, conversation: Conversation) -> tuple[int, ...]:
  """Numbers, from 1, of few messages that together hold all terms of the item that the conversation
  has; the one that adds most is taken first, of several the first.
  """
  held = [words_lib.terms(_text(message)) for message in conversation.messages]
  missing, found = words_lib.terms(_untagged(text)), []
  while held:
    number = max(range(len(held)), key=lambda i: len(held[i] & missing))
    if not held[number] & missing:
      break
    missing -= held[number]
    found.append(number + 1)
  return tuple(sorted(found))


def told(text: str, conversation: Conversation, people: Collection[str] = ()) -> bool:
  """Whether others said it: of the item's words, each that the policy said stands in what a user, a
  tool or the system said, in the outcome or in the feedback, too; `people`, who answered in the
  policy's place (`schema.by_policy`), are others. A word that nobody said is the extractor's own,
  and counts neither way, unless it is a name or a number, which no paraphrase makes: a slip of the
  extractor's is what nobody told.

  An answer that nobody put right is written down like one that was; what a policy gets wrong the
  same way each time would have support enough.
  """
  said = {True: "", False: ""}  # by whether the policy said it
  for message in conversation.messages:
    said[by_policy(message, people)] += f" {_text(message)}"
  others = f"{said[False]} {conversation.outcome or ''} {conversation.feedback or ''}"
  item = _untagged(text)
  words = words_lib.words(item) & words_lib.words(said[True]) | words_lib.names(item)
  return words <= words_lib.words(others) and words_lib.numbers(item) <= words_lib.numbers(others)


def related(origins: Sequence[Origin], said: str) -> Origin | None:
  """The item with most terms in common with a text, a term that n of the items have counting as the
  n-th part of one; of several the first, None where no item has any.
  """
  held = [words_lib.terms(_untagged(origin.text)) for origin in origins]
  having = collections.Counter(term for terms in held for term in terms)
  asked = words_lib.terms(said)
  weights = [sum(1 / having[term] for term in sorted(terms & asked)) for terms in held]
  best = max(range(len(origins)), key=weights.__getitem__, default=None)
  return origins[best] if best is not None and weights[best] else None


def gather(
  texts: Sequence[Knowledge],
  conversations: Sequence[Conversation],
  earlier: Origins,
  people: Collection[str] = (),
) -> Origins:
  """Every item of the texts with the conversations that gave it, and those of before.

  Args:
    texts: as they stood before anything was left out.
    conversations: those that the round's extraction read, in the order of time.
    earlier: of the round before, if its items were carried over.
    people: as in `told`.
  """
  read = {said.id: (place, said) for place, said in enumerate(conversations, start=1)}
  found = {name: dataclasses.replace(origin, texts=()) for name, origin in earlier.items()}
  for item in (item for text in texts for item in text.items):
    name = normalised(item.text)
    origin = found.get(name) or Origin(item.text, kind_of(item.text), ())
    if item.trajectory not in {sighting.conversation for sighting in origin.seen}:
      origin = dataclasses.replace(origin, seen=(*origin.seen, _sighting(item, read, people)))
    found[name] = origin
  return found


def sift(
  origins: Origins, *, min_support: int, newest_wins: bool, told_by_others: bool = False
) -> Origins:
  """Says of each item whether it is left out: one of fewer than `min_support` conversations, of
  which with `told_by_others` only those count in which others said it; and with `newest_wins`, of
  those left that have the same key and say different things, all but the newest.

  Newest is what the latest conversation that counts said (round, then place). Two whose latest
  conversation is the same, or unknown, both stay.
  """
  time = {name: _time(origin, told_by_others) for name, origin in origins.items()}
  weak = {name: _weak(origin, min_support, told_by_others) for name, origin in origins.items()}
  newest: dict[str, str] = {}  # by key, the name of the newest item
  for name in (name for name in origins if newest_wins and not weak[name]):
    if key := key_of(origins[name].text):
      before = newest.setdefault(key[0], name)
      if time[name] > time[before]:
        newest[key[0]] = name
  result = {}
  for name, origin in origins.items():
    key = key_of(origin.text) if newest_wins and not weak[name] else None
    other = newest[key[0]] if key else name
    newer = time[other] > time[name] and key_of(origins[other].text) != key
    why = weak[name] or (NEWER if newer else "")
    by = origins[other].text if newer else ""
    result[name] = dataclasses.replace(origin, left_out=why, superseded_by=by)
  return result


def placed(origins: Origins, texts: Sequence[Knowledge]) -> Origins:
  """With the numbers of the texts, as they were written, that hold each item."""
  held: dict[str, list[int]] = {name: [] for name in origins}
  for number, text in enumerate(texts):
    for name in held.keys() & {normalised(item.text) for item in text.items}:
      held[name].append(number)
  return {
    name: dataclasses.replace(
      origin,
      texts=tuple(held[name]),
      left_out="" if held[name] else origin.left_out or LIMIT,
    )
    for name, origin in origins.items()
  }


def without(
  origins: Origins,
  conversations: Collection[str],
  *,
  min_support: int,
  newest_wins: bool,
  told_by_others: bool = False,
) -> Origins:
  """What is left where these conversations never were: their sightings go, items that nobody else
  gave go with them, and the rest is sifted anew (`sift`). What the limit kept out stays out.
  """
  seen = lambda origin: tuple(one for one in origin.seen if one.conversation not in conversations)
  rest = {
    name: dataclasses.replace(origin, seen=seen(origin))
    for name, origin in origins.items()
    if seen(origin)
  }
  how = dict(min_support=min_support, newest_wins=newest_wins, told_by_others=told_by_others)
  return {
    name: dataclasses.replace(
      origin, left_out=origin.left_out or (LIMIT if rest[name].left_out == LIMIT else "")
    )
    for name, origin in sift(rest, **how).items()
  }


def write(path: pathlib.Path, origins: Origins) -> None:
  """Writes user/items.jsonl, a line for each item, whole or not at all."""
  write_jsonl(path, map(_to_json, origins.values()))


def read(path: pathlib.Path) -> Origins:
  """Reads what `write` wrote; {} if there is no such file, as with versions before it.

  Raises:
    ValueError: a line is damaged; names the file and the line.
  """
  if not path.exists():
    return {}
  found: Iterable[Origin] = JsonLines(path, _from_json, max_damaged=0.0)
  return {normalised(origin.text): origin for origin in found}


def _unmarked(text: str) -> str:
  return text.removeprefix(ITEM_MARK).strip()


def _untagged(text: str) -> str:
  """Without the mark that opens an item, and the tag of its kind."""
  return _TAG.sub("", _unmarked(text), count=1) if _TAG.match(_unmarked(text)) else _unmarked(text)


def _text(message: Message) -> str:
  """What a message says, in the calls that it makes, too."""
  calls = (f"{call.name} {call.arguments}" for call in message.tool_calls)
  return " ".join((message.content, *calls))


def _sighting(
  item: Item, read: dict[str, tuple[int, Conversation]], people: Collection[str]
) -> Sighting:
  place, said = read.get(item.trajectory, (0, None))
  if said is None:
    return Sighting(item.trajectory, item.round, place, ())
  by_others = told(item.text, said, people)
  return Sighting(item.trajectory, item.round, place, shared(item.text, said), by_others)


def _weak(origin: Origin, min_support: int, told_by_others: bool) -> str:
  """Why an item has too little behind it; "" if it has enough."""
  if origin.support < min_support:
    return SUPPORT
  return OWN_WORDS if told_by_others and origin.told < min_support else ""


def _time(origin: Origin, told_by_others: bool) -> tuple[int, int]:
  seen = [one for one in origin.seen if one.told or not told_by_others]
  return max(((one.round, one.place) for one in seen), default=(0, 0))


def _to_json(origin: Origin) -> dict[str, Any]:
  return {
    "schema": SCHEMA,
    **dataclasses.asdict(origin),
    "support": origin.support,
    "told": origin.told,
  }


def _from_json(data: dict[str, Any], number: int) -> Origin:
  need(get(data, "schema", "the line") == SCHEMA, "schema", data["schema"], str(SCHEMA))
  seen = []
  for index, one in enumerate(get(data, "seen", "the line", list)):
    where = f"seen[{index}]"
    numbers = get(one, "messages", where, list)
    need(all(type(n) is int for n in numbers), f"{where}.messages", numbers, "whole numbers")
    place = schema.whole(one, "place", where)
    conversation = get(one, "conversation", where, str)
    told = get(one, "told", where, bool) if "told" in one else True
    seen.append(Sighting(conversation, get(one, "round", where, int), place, tuple(numbers), told))
  need(bool(seen), "seen", seen, "a list of at least one")
  texts = get(data, "texts", "the line", list)
  need(all(type(n) is int for n in texts), "texts", texts, "whole numbers")
  words = {
    name: get(data, name, "the line", str) for name in ("text", "kind", "left_out", "superseded_by")
  }
  return Origin(words.pop("text"), words.pop("kind"), tuple(seen), tuple(texts), **words)
