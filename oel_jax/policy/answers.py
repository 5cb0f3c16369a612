"""Who answers: messages in, the assistant's message out, by our own policy or by another that is
asked.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from oel_jax.conversations.schema import Message
from oel_jax.policy.tokenizers import tool_calls

if TYPE_CHECKING:
  from oel_jax.policy.sampling.sampler import Sampling


@dataclasses.dataclass(frozen=True)
class Asked:
  """A prompt that waits for its answer.

  Attributes:
    messages: as `conversations.prompt.messages` makes them.
    ids: the same as token ids of our own policy.
    seed: of the answer, uint32.
    tools: definitions of those that are offered, as `schema.Prompt` has them.
  """

  messages: tuple[Message, ...]
  ids: list[int]
  seed: int
  tools: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Unanswered:
  """In place of an answer that did not come; `why` says what came of asking, in words."""

  why: str


# Given the number of a prompt and the answer to it: what is asked next in its place, or None.
Reply = Callable[[int, Message | Unanswered], Asked | None]


class Answering(Protocol):
  """Answers prompts side by side."""

  def answer(self, asked: Sequence[Asked], reply: Reply) -> None:
    """Answers each prompt, then what `reply` asks in its place, until it asks nothing anywhere.

    `reply` is never called twice at a time, and for one number always in the same thread. An answer
    has `response_tokens`.
    """


@dataclasses.dataclass(frozen=True)
class Sampled:
  """Our own policy's answers, sampled here.

  Attributes:
    policy: has `tokenizer.split_response` and `sample` with its `reply`.
    sampling: temperature, top_p, top_k.
    max_new_tokens: of an answer, thinking included.
    thinking: whether the chat template opens a thinking block.
  """

  policy: Any
  sampling: "Sampling"
  max_new_tokens: int
  thinking: bool

  def answer(self, asked: Sequence[Asked], reply: Reply) -> None:
    offered = {number: tool_calls.offered(one.tools) for number, one in enumerate(asked)}

    def said(number: int, ids: list[int]) -> tuple[list[int], int] | None:
      message = tool_calls.read_response(
        self.policy.tokenizer, ids, offered[number], thinking=self.thinking
      )
      following = reply(number, message)
      if following is None:
        return None
      offered[number] = tool_calls.offered(following.tools)
      return following.ids, following.seed

    self.policy.sample(
      [one.ids for one in asked],
      [one.seed for one in asked],
      sampling=self.sampling,
      max_new_tokens=self.max_new_tokens,
      reply=said,
    )
