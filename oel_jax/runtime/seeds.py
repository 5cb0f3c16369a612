"""Stable seeds: every random draw of the project names its place in the run."""

import hashlib


def derive(*parts: int | str) -> int:
  """Hashes the name of a draw into a seed.

  Python's own `hash` of a string changes from process to process, and sums of counters collide; a
  hash of the whole name does neither.

  Args:
    *parts: what is drawn, for example `derive(config.seed, round, "deploy", episode)`. 1 and "1"
      are different parts.

  Returns:
    An integer in [0, 2**32), the same in every process and on every machine.

  Raises:
    TypeError: a part is neither an int nor a str (a NumPy integer would be written differently by
      different NumPy versions).
  """
  for part in parts:
    if type(part) not in (int, str):
      raise TypeError(
        f"seeds.derive: expected int or str parts, got {type(part).__name__} {part!r}"
      )
  return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")
