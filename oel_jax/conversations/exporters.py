"""Played conversations as a log that anybody reads: OpenAI's chat form, one a line.

    python -m oel_jax.conversations.exporters RUN/round_1/user/trajectories.jsonl LOG.jsonl

A log has what was said, and nothing that only an environment knows: neither reward nor verdict, nor
category, nor seed. The environment's last words, a user's or a back office's, are the feedback.
"""

import json
import os
import sys
from collections.abc import Iterable
from typing import Any

from oel_jax.conversations.jsonl import conversations
from oel_jax.conversations.schema import Conversation, to_json
from oel_jax.runtime.files import write_chunks

_KEPT = ("role", "content", "tool_calls", "tool_call_id", "name")


def openai(conversation: Conversation) -> dict[str, Any]:
  """The conversation as a line of `logs.read` holds it: id, messages, and user, tools and feedback
  where they are known. An answer's thinking stands in "reasoning_content".
  """
  data = to_json(conversation)
  messages = []
  for message in data["messages"]:
    line = {name: message[name] for name in _KEPT if name in message}
    if message.get("thinking"):
      line["reasoning_content"] = message["thinking"]
    messages.append(line)
  more = {
    "user": conversation.user,
    "tools": data.get("tools"),
    "feedback": conversation.feedback or conversation.outcome,
  }
  line = {"id": conversation.id, "messages": messages}
  return line | {name: value for name, value in more.items() if value}


def write_log(path: str, played: Iterable[Conversation]) -> None:
  """Writes the conversations as a log, whole or not at all; they are taken one at a time.

  Raises:
    OSError: the file cannot be written; what stood there before still does.
  """
  write_chunks(path, (_line(openai(conversation)) for conversation in played))


def _line(data: dict[str, Any]) -> bytes:
  # A policy may sample half a surrogate pair, which UTF-8 cannot hold.
  return json.dumps(data, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


if __name__ == "__main__":
  if len(sys.argv) != 3:
    sys.exit("usage: python -m oel_jax.conversations.exporters CONVERSATIONS.jsonl LOG.jsonl")
  try:
    if os.path.exists(sys.argv[2]) and os.path.samefile(*sys.argv[1:]):
      raise ValueError(
        f"{sys.argv[2]}: the log would take the place of its conversations; name another file"
      )
    write_log(sys.argv[2], conversations(sys.argv[1], max_damaged=0.0))
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
