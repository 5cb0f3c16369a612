"""What one request for a chat completion holds, and what a response says: JSON as OpenAI has it,
and as the servers that follow it write it.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from oel_jax.conversations.schema import KNOWLEDGE, Message, Prompt, ToolCall, to_json
from oel_jax.policy.tokenizers.chat_template import END_THINK, JOINTS, THINK

if TYPE_CHECKING:
  from oel_jax.policy.sampling.token_sampling import Sampling

SEEDS = 2**31  # seeds are below it: some servers keep them in 32 bits, signed
SHOWN = 200  # letters of what a server says


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the policy said.

  Attributes:
    message: the assistant's; `response_tokens` is None if the server did not count.
    cut: whether a limit ended it, ours or the server's.
  """

  message: Message
  cut: bool


def request(
  model: str,
  messages: Sequence[Message],
  seed: int,
  *,
  tools: Sequence[str] = (),
  sampling: "Sampling",
  max_tokens: int,
) -> bytes:
  """The body that asks for the answer to these messages.

  Args:
    model: as the server calls it.
    messages: of a prompt (`conversations.prompt.messages`).
    seed: of the answer; its lower 31 bits are sent.
    tools: definitions of those that are offered.
    sampling: temperature, top_p and, if it is on, top_k, which OpenAI's own server refuses.
    max_tokens: of the answer, thinking included.
  """
  asked = to_json(Prompt("", _with_knowledge_said(messages), tuple(tools)))
  body = {
    "model": model,
    "messages": asked["messages"],
    "temperature": sampling.temperature,
    "top_p": sampling.top_p,
    "max_tokens": max_tokens,
    "seed": seed % SEEDS,
  }
  body |= {"top_k": sampling.top_k} if sampling.top_k else {}
  body |= {"tools": asked["tools"]} if tools else {}
  # Half a surrogate pair, which a game may show, is "?": servers refuse the whole request for it.
  return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


def _with_knowledge_said(messages: Sequence[Message]) -> tuple[Message, ...]:
  """The messages with knowledge in the system message, behind what the conversation's own says."""
  first, *rest = messages
  if first.role != KNOWLEDGE:
    return tuple(messages)
  own = [rest.pop(0).content] if rest and rest[0].role == "system" else []
  return (Message("system", JOINTS[0].join([*own, first.content])), *rest)


def answer(body: bytes) -> Answer:
  """The answer that a response of status 200 holds, its first one if there are several.

  Thinking is what the server gives as such, or what the text has up to its last `</think>`; text
  that no mark divides is the answer.

  Raises:
    ValueError: it holds none; says what is wrong.
  """
  found = _json(body)
  if not isinstance(found, dict):
    raise ValueError(f"no object but {shortened(body)}")
  if found.get("error"):
    raise ValueError(f"an error: {said(body)}")
  choices = found.get("choices")
  choice = choices[0] if isinstance(choices, list) and choices else None
  message = choice.get("message") if isinstance(choice, dict) else None
  if not isinstance(message, dict):
    raise ValueError(f"no choice with a message: {shortened(body)}")
  ended = choice.get("finish_reason")
  cut = ended == "length"
  if ended in ("content_filter", "error"):
    raise ValueError(f"an answer that the server withheld, finish_reason {ended!r}")
  calls = message.get("tool_calls") or []
  if not isinstance(calls, list):
    raise ValueError(f"tool calls that are no list: {shortened(body)}")
  calls = tuple(map(_call, calls))
  thinking, content = _content(message, may_be_empty=bool(calls) or cut)
  tokens = _tokens(found.get("usage"), bool(thinking or content or calls))
  return Answer(
    Message("assistant", content, tool_calls=calls, thinking=thinking, response_tokens=tokens),
    cut=cut,
  )


def _content(message: dict[str, Any], *, may_be_empty: bool) -> tuple[str, str]:
  """(thinking, content) of a message. Raises ValueError if both are null and may not be."""
  thinking = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
  content = _text(message.get("content"))
  if content is None:
    content = _text(message.get("refusal"))
  if content is None and thinking is None and not may_be_empty:
    raise ValueError("an answer whose content is null")
  if thinking is not None:
    return thinking.strip(), (content or "").strip()
  before, close, after = (content or "").rpartition(END_THINK)
  if THINK in after:  # opened, and never closed
    before, close, after = content, THINK, ""
  return (before.replace(THINK, "").replace(END_THINK, "").strip() if close else ""), after.strip()


def _text(content: Any) -> str | None:
  """A text, or the texts of its parts; None for null. Half a surrogate pair becomes "?"."""
  if isinstance(content, list):
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
  if not isinstance(content, str | None):
    raise ValueError(f"content that is no text: {shortened(json.dumps(content).encode())}")
  return content and content.encode("utf-8", "replace").decode()


def _call(data: Any) -> ToolCall:
  function = data.get("function") if isinstance(data, dict) else None
  name = function.get("name") if isinstance(function, dict) else None
  if not isinstance(name, str):
    raise ValueError(f"a tool call without a name: {shortened(json.dumps(data).encode())}")
  arguments = function.get("arguments")
  if not isinstance(arguments, str):  # some servers give the object itself
    arguments = json.dumps({} if arguments is None else arguments)
  given = data.get("id")
  return ToolCall(given if isinstance(given, str) else "", name, _text(arguments))


def _tokens(usage: Any, said_something: bool) -> int | None:
  """How many tokens the server counted; None if it did not, or says 0 of something."""
  count = usage.get("completion_tokens") if isinstance(usage, dict) else None
  return count if type(count) is int and count >= said_something else None


def said(body: bytes) -> str:
  """The first words of an error, squeezed; from the usual places of a JSON object, or as they
  stand.
  """
  try:
    found = _json(body)
  except ValueError:
    found = None
  for name in ("error", "message", "detail"):
    if isinstance(found, dict) and found.get(name):
      found = found[name]
  return shortened(found.encode("utf-8", "replace") if isinstance(found, str) else body)


def shortened(body: bytes) -> str:
  """The beginning of a text for an error: printable, on one line."""
  text = body[: 8 * SHOWN].decode("utf-8", "replace")
  text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
  return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…") if text else "nothing"


def _json(body: bytes) -> Any:
  try:
    return json.loads(body)
  except RecursionError as error:
    raise ValueError("nested too deeply (recursion)") from error
  except ValueError as error:  # of JSON or of UTF-8
    raise ValueError(f"no JSON but {shortened(body)}") from error
