"""JSON that a run reads back: parsed strictly, its digest compared, its fields checked; whatever is
wrong is one ValueError.

Every object that a run writes, a whole file or one line of a file, ends with "digest", which tells
damage from what was meant. An object without one, of an earlier version or written by hand, is
taken as it stands.
"""

import hashlib
import json
import math
import reprlib
from typing import Any

DIGEST = "digest"


def digest(value: Any) -> str:
  """Returns 16 hexadecimal digits that name a JSON value: of the SHA-256 of its shortest form with
  sorted keys.

  Raises:
    TypeError, ValueError: the value holds something that JSON has not, such as NaN or an array.
  """
  return _digest(json.loads(_dumps(value)))


def sealed(record: dict[str, Any]) -> dict[str, Any]:
  """Returns the object with its "digest" as the last field."""
  rest = {name: value for name, value in record.items() if name != DIGEST}
  return rest | {DIGEST: digest(rest)}


def loads(data: bytes) -> Any:
  """Returns the value of a JSON text in UTF-8; of an object with a "digest", it is compared.

  Raises:
    ValueError: not UTF-8 or not JSON; NaN or an infinity; a number beyond a float64 or an int64; a
      name that occurs twice; nested too deeply; or an object that is not what its digest was made
      of.
  """
  try:
    value = json.loads(
      data.decode("utf-8"),
      parse_constant=_refuse_constant,
      parse_float=_float,
      parse_int=_int,
      object_pairs_hook=_object,
    )
  except UnicodeDecodeError as error:
    raise ValueError(
      f"not UTF-8 at byte {error.start}: {data[error.start : error.start + 4]!r}"
    ) from error
  except RecursionError as error:
    raise ValueError("nested too deeply (recursion)") from error
  if isinstance(value, dict) and DIGEST in value and not _holds(value):
    raise ValueError(
      f'damaged, or edited: the rest of it is not what its field "{DIGEST}" was made of; if it was '
      "edited, remove that field"
    )
  return value


def need(ok: bool, field: str, value: Any, right: str) -> None:
  """Raises ValueError naming the field, the value seen and what would be right, unless `ok`."""
  if not ok:
    raise ValueError(f"{field} is {reprlib.repr(value)}: it must be {right}")


def get(value: Any, field: str, where: str, kind: type | None = None) -> Any:
  """Returns a field of an object, of exactly that type if one is given; `where` names it."""
  need(isinstance(value, dict), where, value, "an object")
  if field not in value:
    raise ValueError(f"{where} has no field {field!r}")
  if kind is not None:
    need(
      type(value[field]) is kind,
      f"{where}.{field}" if where != TOP else field,
      value[field],
      f"of type {kind.__name__}",
    )
  return value[field]


TOP = "the file"  # what `where` says of the outermost object


def whole(value: Any, field: str, where: str) -> int:
  """Returns a field that is a whole number, 0 or more."""
  number = get(value, field, where)
  need(type(number) is int and number >= 0, f"{where}.{field}", number, "a whole number, 0 or more")
  return number


def is_number(value: Any) -> bool:
  """Whether the value is a number, and neither true nor false."""
  return type(value) in (int, float)


def share(value: Any, where: str) -> None:
  """Checks what `statistics.count` makes: "hits" out of "of", their "rate" and its "interval"."""
  hits, of = whole(value, "hits", where), whole(value, "of", where)
  need(hits <= of, f"{where}.hits", hits, f"at most {where}.of ({of})")
  rate = _measured(value, "rate", of, where)
  if rate is not None:  # a share that contradicts its own counts must not be printed as a result
    need(
      of > 0 and abs(rate - hits / of) <= 1e-3, f"{where}.rate", rate, f"hits / of ({hits} / {of})"
    )


def mean(value: Any, where: str) -> None:
  """Checks what `statistics.mean` makes: a "mean" over "of" cases and its "interval"."""
  _measured(value, "mean", whole(value, "of", where), where)


def _measured(value: Any, name: str, of: int, where: str) -> float | None:
  number, interval = get(value, name, where), value.get("interval")
  need(is_number(number) or (number is None and of == 0), f"{where}.{name}", number, "a number")
  if interval is not None:
    pair = (
      isinstance(interval, list)
      and len(interval) == 2
      and all(map(is_number, interval))
      and interval[0] <= interval[1]
    )
    need(
      pair or (of == 0 and interval == [None, None]),
      f"{where}.interval",
      interval,
      "two numbers, low and high",
    )
  return number


def _holds(value: dict[str, Any]) -> bool:
  """Whether an object that was read is what its digest was made of."""
  return value[DIGEST] == _digest({name: value[name] for name in value if name != DIGEST})


def _digest(value: Any) -> str:
  """`digest` of a value that came from JSON: no tuple, no key that is no text."""
  text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
  # A lone surrogate is written as "?", too.
  return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _dumps(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _refuse_constant(name: str) -> None:
  raise ValueError(f"{name} is not JSON")


def _float(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise ValueError(f"the number {text[:40]} is beyond a float")
  return value


def _int(text: str) -> int:
  if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
    raise ValueError(f"the number {text[:40]} is beyond 64 bits")
  return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  result = dict(pairs)
  if len(result) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"the name {max(names, key=names.count)!r} occurs twice in one object")
  return result
