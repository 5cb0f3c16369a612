"""Which conversations say the same: exactly, as the beginning of another, or nearly.

- The same: a digest of all that was said.
- The beginning of another: a proxy writes a line for each call, and each call says again all that
  was said before; of those lines the last one says it all. What the system says counts for nothing
  here: many programs write the time into it, or what they remember, at each call.
- Nearly the same: Jaccard similarity of the sets of five-word sequences (what the system says left
  out, which many conversations share), estimated by MinHash (Broder 1997) from 128 hashes, of which
  8 bits each are kept (Li and König 2010). Candidates agree in one of 32 bands of four hashes,
  which finds 0.80 with a probability of 1 - (1 - 0.8^4)^32 > 0.9999.

128 bytes a conversation stand in memory for the sketch and 24 for digests, and 8 for each answer.
"""

import array
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8, UInt64

from oel_jax.conversations.schema import Conversation, Message
from oel_jax.runtime.seeds import derive

NEAR = 0.8
WORDS = 5  # of a sequence
HASHES, ROWS = 128, 4  # of a sketch; of a band, which four bytes name
ROUNDS = 8  # of a band's conversations, how many the others are compared with
KEPT, SAME, CONTINUED, NEARLY = range(4)
NAMES = {SAME: "same", CONTINUED: "continued", NEARLY: "near"}
_CHUNK = 4096
# Chinese, Japanese and Korean signs are words each: nothing stands between their words.
_SIGN = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_SIGN}]|[^\W_{_SIGN}]+")


class Sketches:
  """What is kept of conversations to find those that say the same; in the order they came in."""

  def __init__(self, seed: int = 0):
    # random_raw is the same in every version of NumPy.
    drawn = np.random.PCG64(derive(seed, "duplicates")).random_raw(2 * HASHES + WORDS)
    self._odd, self._shift, self._word = np.split(drawn | np.uint64(1), [HASHES, 2 * HASHES])
    self._sketches, self._said = bytearray(), bytearray()
    self._digests, self._without_system = array.array("Q"), array.array("Q")
    self._beginnings = array.array("Q")

  def add(self, conversation: Conversation) -> None:
    """Takes in the next conversation."""
    *beginnings, without_system = _digests(conversation)
    self._beginnings.extend(beginnings)
    self._without_system.append(without_system)
    self._digests.append(_digest(conversation))
    self._said.append(any(x is not None for x in (conversation.feedback, conversation.reward)))
    self._sketches += self._sketch(_text(conversation)).tobytes()

  def holds(self, number: int, conversation: Conversation) -> bool:
    """Whether the conversation is the one that came in at this number, from 0."""
    return number < len(self._digests) and self._digests[number] == _digest(conversation)

  def reasons(self, near: float = NEAR) -> UInt8[np.ndarray, "N"]:
    """Returns for each conversation KEPT, or why it is left out: SAME, CONTINUED or NEARLY.

    Of those that say the same, the first one with feedback or a score stays, else the first. One
    that has some is never left out for one that has none.

    Args:
      near: similarity from which two are near-duplicates, the later one is left out; above 1, none
        are.
    """
    reasons = np.full(len(self._digests), KEPT, np.uint8)
    if not len(reasons):
      return reasons
    digests = np.frombuffer(self._digests, np.uint64)
    said = np.frombuffer(self._said, np.uint8).astype(bool)
    order = np.lexsort((~said, digests))  # stable: the first of them stays first
    again = np.r_[False, digests[order][1:] == digests[order][:-1]]
    reasons[order[again]] = SAME
    whole, beginnings = (
      np.frombuffer(kept, np.uint64) for kept in (self._without_system, self._beginnings)
    )
    continued = np.isin(whole, beginnings)
    reasons[continued & ~said & (reasons == KEPT)] = CONTINUED
    if near <= 1:
      sketches = np.frombuffer(self._sketches, np.uint8).reshape(-1, HASHES)
      _leave_near(reasons, sketches, said, near)
    return reasons

  def _sketch(self, text: str) -> UInt8[np.ndarray, "128"]:
    """The lowest of each hash over the five-word sequences, eight bits of it."""
    words = [zlib.crc32(word.encode("utf-8", "replace")) for word in _WORD.findall(text.lower())]
    found = np.array(words + [0] * (WORDS - len(words)), np.uint64)
    count = len(found) - WORDS + 1
    sequences = sum(found[i : i + count] * odd for i, odd in enumerate(self._word))
    sequences = _mixed(sequences)
    lowest = np.full(HASHES, np.iinfo(np.uint64).max)
    for begin in range(0, count, _CHUNK):
      hashes = sequences[begin : begin + _CHUNK, None] * self._odd + self._shift
      lowest = np.minimum(lowest, hashes.min(0))
    return (_mixed(lowest) >> np.uint64(56)).astype(np.uint8)


def _mixed(value: UInt64[np.ndarray, "N"]) -> UInt64[np.ndarray, "N"]:
  """Each bit of the result depends on every bit of the value (the finaliser of splitmix64)."""
  value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return value ^ (value >> np.uint64(31))


def _leave_near(
  reasons: UInt8[np.ndarray, "N"],
  sketches: UInt8[np.ndarray, "N 128"],
  said: Bool[np.ndarray, "N"],
  near: float,
) -> None:
  """Marks in `reasons` what is near an earlier conversation.

  In each band, those of one name are compared with the first of them; those that are not near it
  with the first of what remains, and so on.
  """
  needed = math.ceil(HASHES * (near + (1 - near) / 256) - 1e-9)  # 1 in 256 agrees by chance
  bands = sketches.view(np.uint32)
  for band in range(bands.shape[1]):
    left = np.flatnonzero(reasons == KEPT)
    left = left[np.argsort(bands[left, band], kind="stable")]
    for _ in range(ROUNDS):
      names = bands[left, band]
      first = np.r_[True, names[1:] != names[:-1]][: len(left)]
      others = np.flatnonzero(~first)
      if not len(others):
        break
      leaders = np.maximum.accumulate(np.where(first, np.arange(len(left)), 0))[others]
      out = np.zeros(len(left), bool)
      for begin in range(0, len(others), _CHUNK):
        one, other = left[others[begin : begin + _CHUNK]], left[leaders[begin : begin + _CHUNK]]
        same = (sketches[one] == sketches[other]).sum(1)
        out[others[begin : begin + _CHUNK]] = (same >= needed) & (said[other] | ~said[one])
      reasons[left[out]] = NEARLY
      left = left[~first & ~out]


def _digest(conversation: Conversation) -> int:
  """64 bits that name all that was said."""
  whole = hashlib.blake2b(digest_size=8)
  for message in conversation.messages:
    _update(whole, message)
  return int.from_bytes(whole.digest(), "big")


def _digests(conversation: Conversation) -> Iterator[int]:
  """64 bits that name what was said but by the system: up to each answer but the last message, then
  all of it.
  """
  whole = hashlib.blake2b(digest_size=8)
  last = len(conversation.messages) - 1
  for number, message in enumerate(conversation.messages):
    if message.role != "system":
      _update(whole, message)
    if message.role == "assistant" and number < last:
      yield int.from_bytes(whole.digest(), "big")
  yield int.from_bytes(whole.digest(), "big")


def _update(whole: Any, message: Message) -> None:
  """Takes a message in, but for what programs change where they send an answer back: the spaces
  around it, and between the arguments of its calls.
  """
  calls = [text for call in message.tool_calls for text in (call.name, _packed(call.arguments))]
  for text in (message.role, message.content.strip(), *calls):
    whole.update(text.encode("utf-8", "replace") + b"\0")
  whole.update(b"\1")


def _packed(arguments: str) -> str:
  """The JSON text with no spaces but in its texts; what is none, as it is."""
  try:
    return json.dumps(json.loads(arguments), sort_keys=True)
  except (ValueError, RecursionError):
    return arguments


def _text(conversation: Conversation) -> str:
  """What was said by all but the system."""
  said = []
  for message in conversation.messages:
    if message.role != "system":
      said.append(message.content)
      said += (f"{call.name} {call.arguments}" for call in message.tool_calls)
  return "\n".join(said)
