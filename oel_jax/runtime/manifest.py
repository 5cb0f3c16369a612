"""What a round's folder holds, and what it was made from: FOLDER/manifest.json.

For each file of records the manifest has its SHA-256, its number of lines, and "made_from": the
name of each input → a digest of it, such as the weights that played. JSON files carry digest and
"made_from" themselves, and are not listed.

A file is announced, with what it is made from, before its first line is written, and its SHA-256
follows when it is whole. So a file whose entry has no SHA-256 was cut off by a kill, in the making
or just after; and one without an entry was made by a version without manifests, and is taken as it
stands.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from oel_jax.runtime import files, schema

NAME = "manifest.json"
SCHEMA = 1


class Manifest:
  """The manifest of one folder. Every call reads the file anew; it is small."""

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)

  def verify(self) -> None:
    """Compares the listed files with their entries; logs a warning if there are files but no
    manifest. A file that is gone is no fault.

    Raises:
      ValueError: the manifest is damaged, or a file is not what was written; names the file, and
        the line where that can be told.
    """
    if not (self.folder / NAME).exists():
      if any(self.folder.rglob("*.jsonl")):
        logging.warning(
          "%s: carried here without its %s, or made before runs had one: its files are taken as "
          "they stand",
          self.folder,
          NAME,
        )
      return
    for name, entry in self._entries().items():
      path = self.folder / name
      if entry["sha256"] is not None and path.is_file() and files.sha256(path) != entry["sha256"]:
        raise ValueError(_damaged(path, entry["records"]))

  def made_from(self, name: str) -> dict[str, str] | None:
    """What the file, or what there is of it, was made from; None if it is not listed."""
    entry = self._entries().get(name)
    return entry and entry["made_from"]

  def changed(self, name: str, made_from: dict[str, str]) -> list[str]:
    """The inputs that differ from those that the file was made from; [] if there is no such file,
    finished or begun, or no entry.
    """
    path, before = self.folder / name, self.made_from(name)
    if before is None or not (path.exists() or path.with_name(f"{path.name}.partial").exists()):
      return []
    return [
      key
      for key in sorted(before.keys() | made_from.keys())
      if before.get(key) != made_from.get(key)
    ]

  def announce(self, name: str, made_from: dict[str, str]) -> None:
    """Enters a file that is about to be made; one that is there, whole, and made from the same
    stays as it is.
    """
    entries = self._entries()
    if not ((self.folder / name).exists() and entries.get(name, {}).get("made_from") == made_from):
      self._write(entries, {name: {"sha256": None, "records": None, "made_from": made_from}})

  def record(self, names: Sequence[str], made_from: dict[str, str]) -> None:
    """Enters files that are whole now."""
    entries = self._entries()
    new = {}
    for name in names:
      data = (self.folder / name).read_bytes()
      new[name] = {
        "sha256": files.sha256(self.folder / name),
        "records": data.count(b"\n"),
        "made_from": made_from,
      }
    self._write(entries, new)

  def rewrite(self, name: str, why: dict[str, str], write: Callable[[pathlib.Path], None]) -> None:
    """Has `write` write a file that is there anew, whole or not at all; `why` is added to what it
    was made from. At no moment would a kill have the file taken for a damaged one.
    """
    made_from = self.made_from(name)
    if made_from is None:  # not listed, as where it was carried from another machine
      write(self.folder / name)
      return
    self.announce(name, made_from | why)
    write(self.folder / name)
    self.record([name], made_from | why)

  def _write(self, entries: dict[str, Any], new: dict[str, Any]) -> None:
    if entries | new != entries:
      self.folder.mkdir(parents=True, exist_ok=True)
      files.write_sealed(self.folder / NAME, {"schema": SCHEMA, "files": entries | new})

  def _entries(self) -> dict[str, Any]:
    if not (self.folder / NAME).exists():
      return {}
    advice = (
      "restore it from a copy, or remove it to have the folder's other files taken as they stand"
    )
    return files.read_json(self.folder / NAME, _parse, advice)


def differing(before: dict[str, str] | None, now: dict[str, str]) -> list[str]:
  """Returns the inputs of `now` that differ from those of before; [] if a file of an earlier
  version does not say what it was made from (None).
  """
  return [name for name in now if before and before.get(name) != now[name]]


def _parse(value: Any) -> dict[str, Any]:
  schema.need(
    schema.get(value, "schema", schema.TOP) == SCHEMA, "schema", value["schema"], str(SCHEMA)
  )
  entries = schema.get(value, "files", schema.TOP, dict)
  for name, entry in entries.items():
    for field, kind in (("sha256", str), ("records", int)):
      found = schema.get(entry, field, name)
      schema.need(
        found is None or type(found) is kind,
        f"{name}.{field}",
        found,
        f"of type {kind.__name__}, or null",
      )
    made_from = schema.get(entry, "made_from", name, dict)
    strings = all(type(text) is str for text in made_from.values())
    schema.need(strings, f"{name}.made_from", made_from, "an object of strings")
  return entries


def _damaged(path: pathlib.Path, records: int) -> str:
  lines = path.read_bytes().split(b"\n")
  target = path.parent if path.parent.name == "knowledge" else path  # texts are made all at once
  text = f"{path}: not as this run wrote it: {records} lines then, {len(lines) - 1} now"
  for number, line in enumerate(lines if path.suffix == ".jsonl" else (), start=1):
    try:
      if line:
        schema.loads(line)
    except ValueError as error:
      text += f"; line {number}: {error}"
      break
  again = f"remove {target} and the same command as before makes it again"
  return f"{text}; restore it from a copy, or {again}"
