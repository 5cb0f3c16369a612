"""Knowledge texts: items that remember where they came from, the length limit, and the files that
carry them to the server side.
"""

import bisect
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Sequence

from absl import logging

from oel_jax.extraction.prompts import ITEM_MARK
from oel_jax.runtime import schema
from oel_jax.runtime.files import read_text, write_text

SCHEMA = 1
_MARKED = re.compile(
  r"(?:[-*\u2022]\s*)?(?:\*\*)?experience item(?:\*\*)?:(?:\*\*)?\s*(\S.*)", re.I | re.S
)
CARRIED = -1  # the step of an item that an earlier round wrote


@dataclasses.dataclass(frozen=True)
class Item:
  """One piece of knowledge.

  Attributes:
    text: a structured item's whole line, ITEM_MARK included; or a free-text answer; or a
      transcript.
    trajectory: id of the trajectory it was drawn from.
    step: i of e'_i, counted from 1: it came from the i-th trajectory of its text's accumulation.
      CARRIED (-1) if carried over.
    round: the round that wrote it, carried over or not.
  """

  text: str
  trajectory: str
  step: int
  round: int


@dataclasses.dataclass(frozen=True)
class Knowledge:
  """One knowledge text e as its items, oldest first; those carried over from an earlier round come
  before all others.
  """

  items: tuple[Item, ...] = ()

  @property
  def text(self) -> str:
    """What a prompt shows: the items, one after another; "" if there are none."""
    return "\n".join(item.text for item in self.items)

  def at(self, step: int) -> "Knowledge":
    """e_step: the items of the first `step` trajectories and all that were carried over. `at(0)` is
    e_0.

    Right only on a text that nothing was dropped from: what the limit takes away at the end was
    still there at an earlier step.
    """
    return Knowledge(tuple(item for item in self.items if item.step <= step))

  def carried(self) -> "Knowledge":
    """The same items as the beginning of the next round's text; trajectory and round still say
    where each was written.
    """
    return Knowledge(tuple(dataclasses.replace(item, step=CARRIED) for item in self.items))


def parse_items(answer: str, form: str) -> list[str]:
  """The items of one answer of the extractor (its thinking already cut off).

  Args:
    answer: text after the thinking; "" if the response never got there.
    form: "items": each line that begins with ITEM_MARK and says something after it; other lines are
      left out. Real models write the mark without its dash, with a star, in bold or in small
      letters: those count. "text": the whole answer is one item.

  Returns:
    Item texts without surrounding white space, in order; structured ones begin with ITEM_MARK. None
    if the answer holds none.
  """
  if form == "text":
    return [answer.strip()] if answer.strip() else []
  # Not splitlines: a form feed inside an item does not end it.
  found = (_MARKED.fullmatch(line.strip()) for line in answer.split("\n"))
  return [f"{ITEM_MARK} {item[1]}" for item in found if item]


def longest_end(knowledge: Knowledge, fits: Callable[[Knowledge], bool]) -> Knowledge:
  """The most of the newest items that fit, whole and in order. `fits` must hold for no items at
  all; more items never fit better.
  """
  if fits(knowledge):
    return knowledge
  items = knowledge.items
  # Halving, not one item at a time: each trial tokenizes a whole prompt.
  first = bisect.bisect_left(
    range(len(items)), True, key=lambda start: fits(Knowledge(items[start:]))
  )
  return Knowledge(items[first:])


def limit(
  knowledge: Knowledge, max_tokens: int, count_tokens: Callable[[str], int]
) -> tuple[Knowledge, int]:
  """Drops the oldest whole items until the text fits (OEL's longest knowledge); never cuts inside
  an item.

  An item that is over the limit all alone goes too, with a warning: kept, it would push every other
  item out and still not fit.

  Args:
    knowledge: the items, oldest first.
    max_tokens: most tokens of the text, without the message around it.
    count_tokens: tokens of a string.

  Returns:
    What is left, and how many items were dropped.
  """
  if count_tokens(knowledge.text) <= max_tokens:
    return knowledge, 0
  kept = []
  for item in knowledge.items:
    tokens = count_tokens(item.text)
    if tokens <= max_tokens:
      kept.append(item)
    else:
      logging.warning(
        "knowledge item from trajectory %s dropped: its %d tokens alone are over "
        "extraction.max_knowledge_tokens = %d",
        item.trajectory,
        tokens,
        max_tokens,
      )
  result = longest_end(Knowledge(tuple(kept)), lambda rest: count_tokens(rest.text) <= max_tokens)
  return result, len(knowledge.items) - len(result.items)


def as_of(
  texts: Sequence[Knowledge], step: int, *, max_tokens: int, count_tokens: Callable[[str], int]
) -> list[Knowledge]:
  """The texts as they stood after `step` trajectories, within the limit: what consolidation and
  play in context use.

  Args:
    texts: whole accumulations, as `extract` and `raw_knowledge` return them.
    step: trajectories read; extraction.use, or a point of the accumulation curve.
    max_tokens: extraction.max_knowledge_tokens.
    count_tokens: tokens of a string.

  Returns:
    One Knowledge for each text, in order. What the limit dropped is logged.
  """
  result = []
  for index, text in enumerate(texts):
    kept, dropped = limit(text.at(step), max_tokens, count_tokens)
    if dropped:
      logging.warning(
        "knowledge text %02d after %d trajectories: the %d oldest of %d items dropped to keep to "
        "%d tokens",
        index,
        step,
        dropped,
        dropped + len(kept.items),
        max_tokens,
      )
    result.append(kept)
  return result


def nonempty(texts: Sequence[Knowledge], directory: pathlib.Path) -> list[Knowledge]:
  """The texts that say something; a teacher with an empty one would teach the student nothing.

  Raises:
    ValueError: all are empty; names `directory`, the round's folder.
  """
  result = [text for text in texts if text.text.strip()]
  if not result:
    raise ValueError(
      f"{directory}: all {len(texts)} knowledge texts are empty, so there is nothing to "
      "consolidate; within "
      "extraction.max_response_tokens the extractor must answer, and with extraction.form = "
      "'items' in lines that begin "
      f"'{ITEM_MARK}', each from extraction.min_support conversations"
    )
  empty = [f"{index:02d}" for index, text in enumerate(texts) if not text.text.strip()]
  if empty:
    logging.warning("%s: empty knowledge texts left out: %s", directory, ", ".join(empty))
  return result


def write(directory: pathlib.Path, index: int, knowledge: Knowledge) -> None:
  """Writes `directory/00.md`, the text, and `directory/00.jsonl`, a line for each item with its
  provenance; 00 is `index`.

  Each file appears whole or not at all. A text without items makes two empty files.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  records = [
    schema.sealed({"schema": SCHEMA, **dataclasses.asdict(item)}) for item in knowledge.items
  ]
  lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
  write_text(directory / f"{index:02d}.jsonl", "".join(lines))
  write_text(directory / f"{index:02d}.md", _markdown(knowledge))


def read(directory: pathlib.Path, index: int) -> Knowledge:
  """Reads what `write` wrote.

  Raises:
    FileNotFoundError: one of the two files is missing.
    ValueError: a damaged line, another schema, or a text that is not the items'; names the file and
      the line.
  """
  directory = pathlib.Path(directory)
  source = directory / f"{index:02d}.jsonl"
  lines = _content(source).split("\n")
  if lines[-1]:
    raise ValueError(f"{source}:{len(lines)}: the last line is cut off: {_short(lines[-1])}")
  items = []
  for number, line in enumerate(lines[:-1], start=1):
    where = f"{source}:{number}"
    try:
      record = schema.loads(line.encode())
    except ValueError as error:
      raise ValueError(f"{where}: damaged ({error}): {_short(line)}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
      raise ValueError(f'{where}: expected an object with "schema": {SCHEMA}, got {_short(line)}')
    items.append(parse_item(record, where))
  result = Knowledge(tuple(items))
  _check_text(directory / f"{index:02d}.md", source, _markdown(result))
  return result


def parse_item(record, where: str) -> Item:
  """An Item from its decoded JSON object; `where` opens the ValueError that a missing or wrong
  field raises.
  """
  right = {
    "text": (str, "text"),
    "trajectory": (str, "a trajectory's id"),
    "step": (int, "1 or more, or -1"),
    "round": (int, "an integer"),
  }
  if not isinstance(record, dict):
    raise ValueError(f"{where}: expected an object with {', '.join(right)}, got {_short(record)}")
  for field, (kind, words) in right.items():
    value = record.get(field)
    if type(value) is not kind or (field == "step" and value < 1 and value != CARRIED):
      raise ValueError(f'{where}: "{field}" is {_short(value)}: it must be {words}')
  return Item(**{field: record[field] for field in right})


def _markdown(knowledge: Knowledge) -> str:
  return knowledge.text + "\n" if knowledge.items else ""


def _check_text(path: pathlib.Path, source: pathlib.Path, expected: str) -> None:
  """Raises ValueError at the first line of `path` that is not what the items in `source` say."""
  seen = _content(path)
  if seen == expected:
    return
  lines, right = seen.split("\n"), expected.split("\n")
  same = next(
    (i for i, (a, b) in enumerate(zip(lines, right)) if a != b), min(len(lines), len(right))
  )
  found, wanted = (
    _short(side[same]) if same < len(side) else "the end of the file" for side in (lines, right)
  )
  raise ValueError(
    f"{path}:{same + 1}: {found} is not what {source.name} says ({wanted}); the two must hold the "
    "same text"
  )


def _content(path: pathlib.Path) -> str:
  """The file's text as it is, line ends included."""
  if not path.exists():
    raise FileNotFoundError(
      f"{path}: no such knowledge file; a text is a pair of files, NN.md and NN.jsonl"
    )
  return read_text(path)


def _short(value) -> str:
  """`value` as an error shows it."""
  shown = repr(value)
  return shown if len(shown) <= 80 else shown[:77] + "..."
