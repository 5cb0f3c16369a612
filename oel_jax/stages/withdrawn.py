"""Conversations that were withdrawn from a run, DIR/withdrawn.json: no later round learns from
them, or is measured on them.
"""

import pathlib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from oel_jax.conversations.schema import Conversation, Prompt, cut_prompts
from oel_jax.runtime import files, schema

NAME = "withdrawn.json"
SCHEMA = 1
USER = "user:"


def read(folder: pathlib.Path) -> frozenset[str]:
  """The ids of all conversations that were withdrawn from the run in `folder`, and USER + the name
  of each user whose conversations all were.

  Raises:
    ValueError: the file is damaged.
  """
  path = folder / NAME
  return frozenset(files.read_json(path, _parse)) if path.exists() else frozenset()


def add(folder: pathlib.Path, conversations: Collection[str]) -> None:
  """Adds conversations, or users as `read` has them, to those that were withdrawn."""
  ids = sorted(read(folder) | set(conversations))
  files.write_sealed(folder / NAME, {"schema": SCHEMA, "conversations": ids})


def left(folder: pathlib.Path, conversations: Iterable[Conversation]) -> list[Conversation]:
  """The conversations without those that were withdrawn."""
  gone = read(folder)
  user = lambda said: {f"{USER}{said.user}"} if said.user else set()
  return [said for said in conversations if not (own_ids(said.id) | user(said)) & gone]


def own_ids(id: str) -> set[str]:
  """What a record may have called itself whose conversation has this id: one whose name came before
  in the logs has file and line behind it (`logs.read`), NAME#FILE:LINE; a sub-agent of Claude
  Code's has its session's UUID before it, UUID/NAME.
  """
  again = re.fullmatch(r".+#.+:\d+", id, re.DOTALL)
  session = re.match(r"([\da-f]{8}(?:-[\da-f]{4}){3}-[\da-f]{12})/", id)
  names = {id, *(id[: found.start()] for found in re.finditer("#", id) if again)}
  return names | {session[1]} if session else names


def prompts(folder: pathlib.Path, conversations: Iterable[Conversation]) -> list[Prompt]:
  """The prompts of all conversations but those that were withdrawn."""
  return [prompt for said in left(folder, conversations) for prompt in cut_prompts(said)]


def _parse(value: Any) -> Sequence[str]:
  need = schema.need
  need(schema.get(value, "schema", schema.TOP) == SCHEMA, "schema", value["schema"], str(SCHEMA))
  ids = schema.get(value, "conversations", schema.TOP, list)
  need(all(type(name) is str for name in ids), "conversations", ids, "a list of ids")
  return ids
