"""What a file of conversations costs to read, and a trajectory to extract, by how many there are.

    JAX_PLATFORMS=cpu python experiments/benchmarks/conversations.py --json=conversations.json

Reading: a file of chats with tool calls, one line in 1,000 damaged, is written as a stream and read
by a process of its own; "peak MB" is the highest resident memory of that process, imports and all.
Extraction: a fake policy answers at once with two items, so that what is left is our own work a
step: finding the items to show, the prompt, and the file.
"""

import argparse
import json
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import figures_file

from oel_jax.conversations import jsonl
from oel_jax.conversations.schema import (
  GAME,
  LOG,
  Conversation,
  Message,
  Source,
  ToolCall,
)
from oel_jax.extraction import extract
from oel_jax.runtime import files

DAMAGED = 1000  # one line in so many
LOOKED_UP = 1000  # records asked for by number
TEXTS = 4


def chats(count: int) -> Iterator[Conversation]:
  """Conversations of six messages, about 900 bytes each, the same at every call."""
  for i in range(count):
    call = ToolCall(f"call-{i}", "look_up", json.dumps({"order": i}))
    yield Conversation(
      f"chat-{i:07d}",
      (
        Message("system", "You answer for a shop."),
        Message("user", f"Where is my order {i}? " + "It was to come last week. " * 4),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", '{"state": "sent"}', tool_call_id=call.id, name="look_up"),
        Message("assistant", "It has been sent. " + "It is on its way to you. " * 4),
        Message("user", "Thank you."),
      ),
      Source(LOG, "shop.jsonl", line=i + 1),
      feedback="helpful",
    )


def write(path: pathlib.Path, count: int) -> None:
  """Writes `count` lines, of which one in DAMAGED is no longer what its digest was made of."""

  def lines() -> Iterator[bytes]:
    for i, chat in enumerate(chats(count)):
      line = jsonl.to_line(chat)
      yield line.replace(b"order", b"odder", 1) if i % DAMAGED == DAMAGED - 1 else line

  files.write_chunks(path, lines())


def read(path: str) -> dict[str, float]:
  """Streams the file, then asks for records by number; prints nothing but the figures."""
  started = time.perf_counter()
  file = jsonl.conversations(path)
  stream = iter(file)
  next(stream)
  first = time.perf_counter() - started
  count = 1 + sum(1 for _ in stream)
  streamed = time.perf_counter() - started
  chosen = random.Random(0).sample(range(count), min(count, LOOKED_UP))
  looked = time.perf_counter()
  for number in chosen:
    file[number]
  looked = time.perf_counter() - looked
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
  return {
    "lines": count + file.damaged,
    "damaged": file.damaged,
    "first s": first,
    "all s": streamed,
    "us by number": looked / len(chosen) * 1e6,
    "peak MB": peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024),
  }


def read_elsewhere(count: int) -> dict[str, float]:
  """`read` of a new file, in a process that did not write it."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "chats.jsonl"
    write(path, count)
    command = [sys.executable, __file__, f"--read={path}"]
    told = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return {"MB": path.stat().st_size / 1e6} | json.loads(told)


class Tokenizer:
  """A token is a word."""

  def encode(self, text: str) -> list[str]:
    return text.split()

  def chat(self, messages: Sequence[Message], *, thinking: bool = True) -> list[str]:
    return self.encode(messages[0].content)

  def split_response(self, ids: Sequence[str], *, thinking: bool = True) -> tuple[str, str]:
    return "", "\n".join(ids)


class Policy:
  """Answers with two items of its own at once."""

  tokenizer = Tokenizer()

  def sample(self, prompts: Sequence[Any], seeds: Sequence[int], **how: Any) -> list[list[str]]:
    item = "- EXPERIENCE ITEM: the symbol {} ends the game, so keep away from it"
    return [[item.format(seed), item.format(seed + 1)] for seed in seeds]


def games(count: int) -> list[Conversation]:
  """Games of five turns."""
  turn = (Message("user", "| P | . | H |\n" * 3), Message("assistant", "I go [right]"))
  end = ("The end.", 0.0, False, "lost")
  return [Conversation(f"g{i}", turn * 5, Source(GAME, "lake", seed=i), *end) for i in range(count)]


def extraction(count: int) -> dict[str, float]:
  """Extracts from `count` games with the fake policy, its file on the disk."""
  played = games(count)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "extraction.jsonl"
    started = time.perf_counter()
    texts = extract(
      Policy(),
      played,
      texts=TEXTS,
      form="items",
      see_previous=True,
      sampling=None,
      max_response_tokens=100,
      max_knowledge_tokens=2048,
      max_prompt_tokens=4096,
      seed=0,
      round=1,
      state_path=path,
    )
    seconds = time.perf_counter() - started
    size = path.stat().st_size / 1e6
  assert all(len(text.items) == 2 * count for text in texts)
  return {"trajectories": count, "ms a trajectory": seconds / count * 1e3, "state MB": size}


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--lines", type=int, default=1_000_000)
  parser.add_argument("--trajectories", type=int, nargs="+", default=[100, 1000, 10_000])
  parser.add_argument("--json", type=figures_file.to_write, default="conversations.json")
  parser.add_argument("--read", help=argparse.SUPPRESS)
  given = parser.parse_args(arguments)
  if given.read:
    print(json.dumps(read(given.read)))
    return
  found = {"reading": read_elsewhere(given.lines), "extraction": []}
  print(found["reading"], flush=True)
  for count in given.trajectories:
    found["extraction"].append(extraction(count))
    print(found["extraction"][-1], flush=True)
  first = found["extraction"][0]["ms a trajectory"]
  found["growth"] = found["extraction"][-1]["ms a trajectory"] / first
  print(f"a trajectory of the most costs {found['growth']:.2f} times one of the fewest")
  pathlib.Path(given.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
