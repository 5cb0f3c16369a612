"""The answer that stands beside a request, as servers write it and programs that trace calls; and
which records of a trace are calls of a model.
"""

from collections.abc import Iterator
from typing import Any

from oel_jax.conversations.log_items import entry
from oel_jax.conversations.log_messages import SPEAKERS, Seen, opened, with_role
from oel_jax.conversations.schema import Message

RESPONSES = ("response", "response_body", "output", "outputs", "completion")


def step_of_trace(data: dict[str, Any]) -> str:
  """What a trace's record is, if it is no call of a model: a tool's, a search; else ""."""
  if "traceId" in data or "trace_id" in data:  # Langfuse's observations
    what = data.get("type")
    if isinstance(what, str) and what.isupper() and what != "GENERATION":
      return what
  run, inputs = data.get("run_type"), object_in(data.get("inputs"))  # LangSmith's
  outputs = object_in(data.get("outputs"))
  said = outputs.get("messages") and (state_of_graph(data) or inputs.get("messages"))
  return run if isinstance(run, str) and run != "llm" and not said else ""


def state_of_graph(data: dict[str, Any]) -> dict[str, Any] | None:
  """The outputs of a run of LangGraph's that hold all that was said, not what is new alone."""
  outputs = object_in(data.get("outputs"))
  given = opened(outputs.get("messages"))
  first = given[0] if isinstance(given, list) and given else None
  who = with_role(first).get("role") if isinstance(first, dict) else None
  return outputs if isinstance(who, str) and SPEAKERS.get(who) in ("system", "user") else None


def object_in(value: Any) -> dict[str, Any]:
  """An object, or what stands as one in a text; an empty one for anything else."""
  value = opened(value)
  return value if isinstance(value, dict) else {}


def answer(data: dict[str, Any], seen: Seen) -> Iterator[Message]:
  """The messages of the answer that stands beside a request, none if there is none.

  Raises:
    ValueError: it is in pieces, or holds what is no message.
  """
  given = next((data[name] for name in RESPONSES if data.get(name)), None)
  given = opened(data if given is None else given)
  if isinstance(given, dict) and isinstance(opened(given.get("body")), dict):
    given = opened(given["body"])
  first = object_in(given[0]) if isinstance(given, list) and given else {}
  streamed = isinstance(given, str) and given.lstrip().startswith(("data: {", "event: "))
  if streamed or first.get("object") == "chat.completion.chunk":
    raise ValueError("the answer is a stream of events: its pieces must be joined to one answer")
  if isinstance(given, str):
    given = {"role": "assistant", "content": given}
  elif isinstance(given, dict) and isinstance(given.get("choices"), list) and given["choices"]:
    if len(given["choices"]) > 1:
      seen.append(("form", "choices"))
    choice = given["choices"][0]
    choice = choice if isinstance(choice, dict) else {}
    given = choice.get("message", {"role": "assistant", "content": choice.get("text")})
  elif isinstance(given, dict) and isinstance(given.get("candidates"), list):  # Gemini's
    if len(given["candidates"]) > 1:
      seen.append(("form", "choices"))
    given = [object_in(each).get("content") for each in given["candidates"][:1]]
    given = [{"role": "assistant"} | each for each in given if isinstance(each, dict)]
  elif isinstance(given, dict) and isinstance(given.get("generations"), list):  # LangChain's
    while isinstance(given, list | dict) and given and "message" not in given:
      given = given[0] if isinstance(given, list) else given.get("generations")
    given = given["message"] if isinstance(given, dict) and given else []
  elif isinstance(given, dict) and isinstance(given.get("output"), list):
    given = given["output"]
  elif isinstance(given, dict) and given is not data and isinstance(given.get("messages"), list):
    given = given["messages"] if state_of_graph(data) is None else []
  elif isinstance(given, dict) and given is not data and isinstance(given.get("message"), dict):
    given = given["message"]
  elif isinstance(given, dict) and given is not data and "content" in given:
    given = {"role": "assistant"} | given
  else:
    given = given if isinstance(given, list) else []
  for each in given if isinstance(given, list) else [given]:
    yield from entry(each, seen)
