"""Stand-ins that more than one test file uses."""

import functools


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

  def chat(self, messages, *, thinking=True):
    return self.put(messages)

  def encode(self, text):
    return text.split()

  def split_response(self, ids, thinking=True):
    return "", self.seen[ids[0]]
