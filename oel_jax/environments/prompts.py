"""What the player reads. The rules stay hidden: the prompt has the board, the player's own symbol
and the allowed actions, no more.
"""

from oel_jax.conversations.schema import Message


def first_message(observation: str, *, player: str, actions: str) -> Message:
  """The user message that opens a game: what is asked, then the game's first observation,
  untouched; that alone, which then says itself what is asked, if `player` and `actions` are "".
  """
  if not player and not actions:
    return Message("user", observation)
  symbol = f"You are {player} on the board. " if player else ""
  return Message(
    "user",
    "You are playing a game. Nobody tells you its rules: find out how to win.\n"
    f"{symbol}Your actions: {actions}\n"
    "Think first, then answer with one action.\n\n"
    f"{observation}",
  )


def next_message(observation: str) -> Message:
  """The user message after a move: everything the game said since, untouched."""
  return Message("user", observation)
