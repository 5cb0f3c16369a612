"""Episodes that ended for want of an answer: counted, named, and in no file of games.

Beside NAME.jsonl stands then NAME.unanswered.json, which says of each why. Such a game was neither
won nor lost, so nothing is learned from it or asked of it.
"""

import pathlib
from typing import Any

from absl import logging

from oel_jax.runtime import files, schema

MAX_SHARE = 0.1  # of a file's episodes; more end the stage
SCHEMA = 1


class Missed:
  """The episodes of one file that had no answer, while they are played."""

  def __init__(self, path: pathlib.Path, episodes: int):
    """`episodes`: how many the file is to hold."""
    self._path, self._of, self._why = path, episodes, {}

  def add(self, episode: str, why: str) -> None:
    """Notes an episode, by its id.

    Raises:
      RuntimeError: it is one too many.
    """
    self._why[episode] = why
    if len(self._why) > MAX_SHARE * self._of:
      raise RuntimeError(
        f"{self._path}: {len(self._why)} of {self._of} episodes had no answer, which is more than "
        f"{MAX_SHARE:.0%} of them; the last is {episode}, {why}; the same command goes on from "
        "what is written"
      )

  def write(self) -> None:
    """Leaves what was noted beside the file, before that is there, and tells it; nothing, if
    nothing was.
    """
    if not self._why:
      _beside(self._path).unlink(missing_ok=True)
      return
    files.write_sealed(_beside(self._path), {"schema": SCHEMA, "unanswered": self._why})
    logging.warning(
      "%s: %d of %d episodes had no answer and are left out: %s",
      self._path,
      len(self._why),
      self._of,
      "; ".join(f"{name}, {why}" for name, why in self._why.items()),
    )


def read(path: pathlib.Path) -> dict[str, str]:
  """The episodes that the file lacks for want of an answer: id → why.

  Raises:
    ValueError: what stands beside it is damaged.
  """
  file = _beside(path)
  return files.read_json(file, _parse) if file.exists() else {}


def _beside(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix(".unanswered.json")


def _parse(value: Any) -> dict[str, str]:
  version = schema.get(value, "schema", schema.TOP)
  schema.need(version == SCHEMA, "schema", version, str(SCHEMA))
  found = schema.get(value, "unanswered", schema.TOP, dict)
  texts = all(isinstance(why, str) for why in found.values())
  schema.need(texts, "unanswered", found, "an object of texts")
  return found
