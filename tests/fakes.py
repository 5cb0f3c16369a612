"""Stand-ins that more than one test file uses."""

import functools

from oel_jax.conversations.schema import GAME, Conversation, Message, Source


def turn_of(
  observation: str, thinking: str, answer: str, action: str, response_tokens: int
) -> tuple[Message, Message]:
  """What a game showed, and the answer that was sampled."""
  sampled = dict(thinking=thinking, action=action, response_tokens=response_tokens)
  return Message("user", observation), Message("assistant", answer, **sampled)


def game_of(id: str, game: str, seed: int, turns, *end) -> Conversation:
  """A finished game of these turns; `end`: outcome, reward, passed, ended."""
  said = tuple(message for turn in turns for message in turn)
  return Conversation(id, said, Source(GAME, game, seed=seed), *end)


def in_turns(sample):
  """Gives a policy's `sample` the argument `reply`: all answer, then those who are given something
  further, and so on.
  """

  @functools.wraps(sample)
  def sampled(self, prompts, seeds, *, reply=None, **how):
    answers = dict(enumerate(sample(self, prompts, seeds, **how)))
    last = answers
    while reply and last:
      following = {i: reply(i, ids) for i, ids in last.items()}
      following = {i: given for i, given in following.items() if given}
      asked, drawn = zip(*following.values(), strict=True) if following else ((), ())
      last = dict(
        zip(
          following, sample(self, list(asked), list(drawn), **how) if following else (), strict=True
        )
      )
      answers |= last
    return list(answers.values())

  return sampled


class Tokenizer:
  """A token is a whole chat, or a whole answer: its place in the list of those seen."""

  def __init__(self):
    self.seen = []

  def put(self, what) -> list[int]:
    self.seen.append(what)
    return [len(self.seen) - 1]

  def chat(self, messages, *, tools=(), thinking=True):
    return self.put(messages)

  def encode(self, text):
    return text.split()

  def split_response(self, ids, thinking=True):
    return "", self.seen[ids[0]]
