"""What an extraction has written so far: user/extraction.jsonl, a header and then a line a step.

The header says which extraction it is: seed, round, texts, trajectories, what they were made from,
and what each text began with. A step's line holds, text by text, the items that the step added, and
what was left out of it. So a step costs the same however many went before, and a kill loses at most
the step that was under way.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging

from oel_jax.conversations.jsonl import append_jsonl, write_jsonl
from oel_jax.extraction.knowledge import CARRIED, Item, Knowledge, parse_item
from oel_jax.runtime import files, schema

SCHEMA = 2
ANEW = "delete the file to extract anew"
Step = list[list[str]]  # of each text, the texts of the items that the step added


def load(
  path: pathlib.Path, identity: dict[str, Any], start: Sequence[Knowledge], orders: Sequence[Any]
) -> list[Step]:
  """The steps that are done, [] if there is no file; one that is not there is begun.

  A last line that is cut off is taken away: its step was under way. The file of an earlier version
  (extraction.json beside it) is converted, and kept as extraction.json.replaced-TIME.

  Args:
    path: the file.
    identity: what the header must say.
    start: e_0 of each text.
    orders: of each text, the ids of its trajectories in the order of its steps.

  Raises:
    ValueError: the file is damaged, or another extraction's; names it, the line and the field.
  """
  old = path.with_suffix(".json")
  if not path.exists() and old.exists():
    parse = lambda value: _parse_old(value, identity, start, orders)
    steps = files.read_json(old, parse, ANEW)
    lines = [_step_line(number, step, []) for number, step in enumerate(steps, start=1)]
    write_jsonl(path, [_header(identity, start), *lines])
    files.set_aside(old, f"its {len(steps)} steps stand in {path.name} now")
  lines, rest = _lines(path)
  if rest:
    logging.warning("%s: the last line is cut off: its step is done again", path)
    os.truncate(path, path.stat().st_size - len(rest))
  if not lines:
    append_jsonl(path, _header(identity, start))
    return []
  found = [_parse_line(path, number, line) for number, line in enumerate(lines, start=1)]
  try:
    _check_header(found[0], identity, start)
    return [_parse_step(value, number, identity) for number, value in enumerate(found[1:], start=1)]
  except ValueError as error:
    raise ValueError(f"{path}: {error}; {ANEW}") from error


def append(path: pathlib.Path, number: int, step: Step, left_out: Sequence[dict[str, Any]]) -> None:
  """Adds the line of step `number`, from 1, and syncs it to the disk.

  Args:
    path: the file.
    number: the step.
    step: the items that it added.
    left_out: what it left out: "text", from 0, "trajectory", and "why".

  Raises:
    OSError: the disk is full, or the like; what was written stays.
  """
  append_jsonl(path, _step_line(number, step, left_out))


def check(path: pathlib.Path) -> None:
  """Raises ValueError that names file and line if a line is damaged; a last one that is cut off is
  no fault. Changes nothing.
  """
  read(path)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The header and the steps' lines of a file; a last line that is cut off is none.

  Raises:
    ValueError: a line is damaged; names file and line.
  """
  return [_parse_line(path, number, line) for number, line in enumerate(_lines(path)[0], start=1)]


def _header(identity: dict[str, Any], start: Sequence[Knowledge]) -> dict[str, Any]:
  return {"schema": SCHEMA, **identity, "start": [_digest(text) for text in start]}


def _step_line(number: int, step: Step, left_out: Sequence[dict[str, Any]]) -> dict[str, Any]:
  return {"schema": SCHEMA, "step": number, "items": step, "left_out": list(left_out)}


def _digest(text: Knowledge) -> str:
  """Names what a text began with: every field of its items."""
  return schema.digest([[item.text, item.trajectory, item.round] for item in text.items])


def _lines(path: pathlib.Path) -> tuple[list[bytes], bytes]:
  """The file's whole lines, and what a kill left of one at its end."""
  *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
  return lines, rest


def _parse_line(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
  try:
    value = schema.loads(line)
    schema.need(isinstance(value, dict), "the line", value, "an object")
    return value
  except ValueError as error:
    raise ValueError(f"{path}:{number}: damaged: {error}; {ANEW}") from error


def _check_header(
  header: dict[str, Any], identity: dict[str, Any], start: Sequence[Knowledge]
) -> None:
  for field, right in {"schema": SCHEMA, **identity}.items():
    if header.get(field) != right:
      raise ValueError(
        f'"{field}" of the partial extraction is {header.get(field)!r:.200}, this run has '
        f"{right!r:.200}"
      )
  began = schema.get(header, "start", "the header", list)
  for index, text in enumerate(start):
    if began[index : index + 1] != [_digest(text)]:
      raise ValueError(
        f"text {index} began from other knowledge than this run's ({len(text.items)} items)"
      )


def _parse_step(value: dict[str, Any], number: int, identity: dict[str, Any]) -> Step:
  where = f"line {number + 1}"
  step, items = value.get("step"), value.get("items")
  schema.need(step == number, f'{where}: "step"', step, str(number))
  planned, texts = len(identity["trajectories"]), identity["texts"]
  schema.need(number <= planned, f'{where}: "step"', step, f"at most {planned}")
  right = isinstance(items, list) and len(items) == texts and all(map(_are_texts, items))
  schema.need(right, f'{where}: "items"', items, f"{texts} lists of texts")
  return items


def _are_texts(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(text, str) for text in value)


# The file of an earlier version: one object, with every item of every text.


def _parse_old(
  state: Any, identity: dict[str, Any], start: Sequence[Knowledge], orders: Sequence[Sequence[str]]
) -> list[Step]:
  for field, right in {"schema": 1, **identity}.items():
    seen = state.get(field) if isinstance(state, dict) else None
    # The first versions do not say what it was made from.
    if seen != right and not (field == "made_from" and seen is None):
      raise ValueError(
        f'"{field}" of the partial extraction is {seen!r:.200}, this run has {right!r:.200}'
      )
  done, items = state.get("done"), state.get("items")
  steps, texts = len(identity["trajectories"]), identity["texts"]
  if type(done) is not int or not 0 <= done <= steps:
    raise ValueError(f'"done" is {done!r}: it must be from 0 to {steps}')
  if (
    not isinstance(items, list)
    or len(items) != texts
    or not all(isinstance(text, list) for text in items)
  ):
    raise ValueError(f'"items" must hold {texts} lists')
  found = [
    [parse_item(record, f"text {index}") for record in text] for index, text in enumerate(items)
  ]
  result: list[Step] = [[[] for _ in range(texts)] for _ in range(done)]
  for index, (text, carried, order) in enumerate(zip(found, start, orders, strict=True)):
    began = Knowledge(tuple(item for item in text if item.step == CARRIED))
    if began != carried:
      raise ValueError(
        f"text {index} began from other knowledge ({len(began.items)} items) than this "
        f"run's ({len(carried.items)} items)"
      )
    _check_places(index, text, done, order)
    for item in text[len(began.items) :]:
      result[item.step - 1][index].append(item.text)
  return result


def _check_places(index: int, text: Sequence[Item], done: int, order: Sequence[str]) -> None:
  """Raises ValueError unless the text's items stand in the order of their steps, none after `done`,
  each with its step's trajectory.
  """
  last = CARRIED
  for number, item in enumerate(text):
    if item.step < last or item.step > done:
      raise ValueError(
        f'text {index}, item {number}: "step" is {item.step}: it must be from {max(last, 1)} to '
        f'"done" ({done})'
      )
    last = item.step
    if item.step != CARRIED and item.trajectory != order[item.step - 1]:
      raise ValueError(
        f'text {index}, item {number}: "trajectory" is {item.trajectory!r}: step {item.step} of '
        f"this text reads {order[item.step - 1]!r}"
      )
