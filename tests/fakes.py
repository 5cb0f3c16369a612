"""Stand-ins that more than one test file uses."""


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
