"""Held-out games on the page, before and after: the same map beside itself."""

from collections import defaultdict
from collections.abc import Sequence

from oel_jax.conversations.schema import Conversation, Message
from oel_jax.report.parts import escape, note
from oel_jax.report.records import Run

SHOWN_GAMES = 2
ENDED_WORDS = {
  "passed": "passed",
  "lost": "lost",
  "invalid": "invalid move",
  "turn_limit": "out of turns",
}


def games(run: Run) -> str:
  """HTML of a few maps, newly passed ones first, and of how many there are of each kind."""
  # A round that is being played has only some of its games.
  done = sorted(set(run.games) & set(run.evaluations))
  if len(done) < 2 or done[0] != 0:
    return note("Shown once the base model and a round have played the held-out games.")
  pairs = pair_games(run.games[0], run.games[done[-1]])
  gained = [(before, after) for before, after in pairs if after.passed and not before.passed]
  others = [(before, after) for before, after in pairs if before.passed or not after.passed]
  fell, both = (
    sum(before.passed and after.passed == passed for before, after in pairs)
    for passed in (False, True)
  )
  text = (
    f"Of {len(pairs)} maps, after round {done[-1]} against the base model: {len(gained)} newly "
    f"passed, {fell} no longer passed, "
    f"{both} passed both times, {len(others) - fell - both} neither time. "
  )
  text += (
    "Shown, in order of play: the first newly passed"
    if gained
    else "Shown: the first in order of play"
  )
  text += ", then the first of the others." if 0 < len(gained) < SHOWN_GAMES else "."
  blocks = [
    f"<h3>Map {before.source.seed}</h3><div "
    f'class="pair">{_game("Base model", before)}{_game(f"After round {done[-1]}", after)}</div>'
    for before, after in (gained + others)[:SHOWN_GAMES]
  ]
  return note(text) + "".join(blocks)


def pair_games(
  before: Sequence[Conversation], after: Sequence[Conversation]
) -> list[tuple[Conversation, Conversation]]:
  """Games of the same map, in the order of `before`.

  Paired by map and not by line: a damaged line may be missing from one of the files.
  """
  later = defaultdict(list)
  for game in reversed(after):
    later[game.source].append(game)
  return [(game, later[game.source].pop()) for game in before if later[game.source]]


def _game(title: str, game: Conversation) -> str:
  tokens = sum(answer.response_tokens for answer in game.answers)
  pill = f'<span class="pill {"good" if game.passed else "off"}">{ENDED_WORDS[game.ended]}</span>'
  turns = "".join(_turn(number, *turn) for number, turn in enumerate(_turns(game), start=1))
  end = f'<div class="turn"><p class="label">End of game</p><pre>{escape(game.outcome)}</pre></div>'
  facts = f'<p class="label">{len(game.answers)} turns, {tokens:,} response tokens</p>'
  return f'<div class="game"><h4>{title} {pill}</h4>{facts}{turns}{end}</div>'


def _turns(game: Conversation) -> list[tuple[list[Message], Message]]:
  """Each answer with the messages since the one before: what was shown, or what tools returned."""
  turns, asked = [], []
  for message in game.messages:
    if message.role == "assistant":
      turns.append((asked, message))
      asked = []
    else:
      asked.append(message)
  return turns


def _turn(number: int, asked: Sequence[Message], answer: Message) -> str:
  thinking = (
    f'<div class="said thinking">{escape(answer.thinking.strip())}</div>'
    if answer.thinking.strip()
    else ""
  )
  calls = "\n".join(f"{call.name}({call.arguments})" for call in answer.tool_calls)
  words = "\n".join(filter(None, (answer.content.strip(), calls)))
  said = f'<div class="said">{escape(words)}</div>' if words else '<div class="dim">no answer</div>'
  action = f"took {escape(answer.action)}" if answer.action else "no valid action"
  action = f"called {escape(_names(answer))}" if calls else action
  facts = f'<p class="label">Turn {number} · {action} · {answer.response_tokens:,} tokens</p>'
  shown = "".join(f"<pre>{escape(message.content)}</pre>" for message in asked)
  return f'<div class="turn">{facts}{shown}{thinking}{said}</div>'


def _names(answer: Message) -> str:
  return ", ".join(call.name for call in answer.tool_calls)
