"""What the embedded policy is taught: one chat example at a time, drawn from a seed.

Four abilities: *play* (with knowledge of every quality, or none), *extract* (write down what one
trajectory shows), *ask* (say which symbol has which role, the probe of whether knowledge is read at
all) and *other* (small text tasks that a program can check). All prompts are the project's own,
made by the code that deployment and extraction use.
"""

import dataclasses
import random
from collections.abc import Set

from oel_jax.conversations.schema import (
  EMPTY,
  GAME,
  Conversation,
  Message,
  Source,
  knowledge_message,
  shown,
  transcript,
)
from oel_jax.environments import prompts
from oel_jax.extraction.prompts import extraction_message
from oel_jax.pocket import claims as claims_lib
from oel_jax.pocket import worlds
from oel_jax.pocket.claims import GENERIC, GOAL, SAFE, TRAP, WALL, Claim

BACK = {"up": "down", "down": "up", "left": "right", "right": "left"}
PLAYER, ACTION_LIST = "P", "[up], [down], [left], [right]"
# how often an unknown role is guessed; independent for each, so that informed and uninformed
# answers share their openings
GUESS = 0.3
# how often a move straight back is ruled out while exploring; a free walk seldom wins, one that
# never turns wins too often
ONWARD = 0.27
# what a game is played with: nothing, raw trajectories or items, and how often
FORMS = (("none", "raw", "items"), (22, 6, 72))
MIX = {"play": 0.56, "extract": 0.26, "ask": 0.10, "other": 0.08}


@dataclasses.dataclass(frozen=True)
class Example:
  """A prompt and the response to learn. `kind` is a key of MIX."""

  kind: str
  messages: tuple[Message, ...]
  thinking: str
  answer: str


def example(seed: int) -> Example:
  """The example of this seed; the mix is drawn with it."""
  rng = random.Random(seed)
  kind = rng.choices(list(MIX), list(MIX.values()))[0]
  return {
    "play": play_example,
    "extract": extract_example,
    "ask": ask_example,
    "other": other_example,
  }[kind](rng)


# Play


def play_example(
  rng: random.Random,
  world: worlds.World | None = None,
  *,
  guess: float = GUESS,
  onward: float = ONWARD,
  keep: bool = False,
  way: bool = False,
) -> Example:
  """One turn of a game, under full, partial, redundant, contradictory, wrong, raw or no
  knowledge; `guess`, `onward`, `keep` and `way` as in `respond`.
  """
  world = world or worlds.random_world(rng)
  form = rng.choices(*FORMS)[0]
  if form == "none":
    knowledge, said = "", []
  elif form == "raw":
    others = [_same_letters(rng, world) for _ in range(rng.randint(1, 2))]
    knowledge = "\n\n".join(transcript(game) for game, _ in others)
    said = [claim for _, facts in others for claim in facts]
  else:
    said = item_list(rng, world)
    knowledge = "\n".join(claims_lib.say(claim, rng) for claim in said)
  goal, trap = claims_lib.resolve(said, world.letters())
  said_before, player = history(rng, world, (goal, trap))
  harmless = {claim.letter for claim in said if claim.role == SAFE}
  last = said_before[-2].action.strip("[]") if len(said_before) > 1 else ""
  how = dict(guess=guess, onward=onward, keep=keep, way=way)
  thinking, action = respond(rng, world, player, goal, trap, harmless, last, **how)
  return turn(rng, form, knowledge, said_before, thinking, action)


def turn(
  rng: random.Random,
  form: str,
  knowledge: str,
  said: list[Message],
  thinking: str,
  action: str,
) -> Example:
  """The play example of a turn: what was said so far behind the knowledge, if there is any."""
  # A wrapper with nothing in it must say as little as no wrapper, which weights that never saw one
  # did not know.
  empty = form == "none" and rng.random() < 0.5
  front = (knowledge_message(EMPTY if empty else knowledge),) if knowledge or empty else ()
  return Example("play", front + shown(said), thinking, f"[{action}]")


def respond(
  rng: random.Random,
  world: worlds.World,
  player: worlds.Cell,
  goal: str,
  trap: str,
  harmless: Set[str] = frozenset(),
  last: str = "",
  *,
  guess: float = GUESS,
  onward: float = ONWARD,
  keep: bool = False,
  way: bool = False,
) -> tuple[str, str]:
  """The taught thinking and action of one turn; goal and trap are "" where the knowledge does not
  tell, `last` is the move before; `guess` and `onward` are explained at GUESS and ONWARD. With
  `keep` the goal is guessed among the letters that the move before came nearer to, if there are
  such, so that a guess is kept to. With `way` the cells that lead to the goal are named, if both
  roles are.

  The thinking opens with two slots, goal then hazard, each named or "unknown". An unknown role is
  guessed now and then. While a slot stays unknown, every letter without a role is weighed in a
  sentence, so that not knowing costs words.
  """
  letters = world.letters()
  unclaimed = [
    letter for letter in letters if letter not in (goal, trap) and letter not in harmless
  ]
  if not goal and unclaimed and rng.random() < guess:
    goal = rng.choice(keep and last and _approached(world, player, last, unclaimed) or unclaimed)
    unclaimed.remove(goal)
  if not trap and unclaimed and rng.random() < guess:
    trap = rng.choice(unclaimed)
    unclaimed.remove(trap)
  words = f"Goal: {_located(world, goal)}. Hazard: {_located(world, trap)}."
  if not goal or not trap:
    words += "".join(
      f" Nobody told me what {letter} does. It may be where to go, or it may end the game, or it "
      "may do nothing."
      for letter in unclaimed[:3]
    )
  actions = good_actions(world, player, goal, trap)
  if not goal and last and rng.random() < onward:
    actions = [name for name in actions if name != BACK[last]] or actions
  action = rng.choice(actions)
  closed = [
    name
    for name, cell in worlds.neighbours(player, world.size).items()
    if trap and world.symbol(cell) == trap
  ]
  words += f" I am at ({player[0]}, {player[1]})."
  words += f" Not {', '.join(closed)}." if closed else ""
  if way and goal and trap:
    cells = _way(world, player, goal, trap, action)
    words += f" I go {' '.join(f'({r}, {c})' for r, c in cells)}."
  return f"{words} Next: {action}.", action


def _way(
  world: worlds.World, player: worlds.Cell, goal: str, trap: str, action: str
) -> list[worlds.Cell]:
  """The cells from the move `action` on to the goal, by the first of `good_actions` each time."""
  cells = [worlds.neighbours(player, world.size)[action]]
  while world.symbol(cells[-1]) != goal:
    following = good_actions(world, cells[-1], goal, trap)[0]
    cells.append(worlds.neighbours(cells[-1], world.size)[following])
  return cells


def _approached(
  world: worlds.World, player: worlds.Cell, last: str, letters: list[str]
) -> list[str]:
  """The letters to whose nearest cell the last move came nearer."""
  before = tuple(x - step for x, step in zip(player, worlds.ACTIONS[last], strict=True))

  def distance(cell: tuple[int, ...], letter: str) -> int:
    return min(
      abs(r - cell[0]) + abs(c - cell[1])
      for r in range(world.size)
      for c in range(world.size)
      if world.symbol((r, c)) == letter
    )

  return [letter for letter in letters if distance(player, letter) < distance(before, letter)]


def _located(world: worlds.World, letter: str) -> str:
  """The letter and where it lies, in the words of the game's own positions: a small model that says
  where things are finds its way.
  """
  cells = [
    (r, c)
    for r in range(world.size)
    for c in range(world.size)
    if letter and world.symbol((r, c)) == letter
  ]
  return " ".join([letter, "at", *(f"({r}, {c})" for r, c in cells)]) if letter else "unknown"


def good_actions(world: worlds.World, player: worlds.Cell, goal: str, trap: str) -> list[str]:
  """The moves worth making: first steps of a shortest safe path to the goal, or, with no goal
  known, any step that is not the hazard.
  """
  moves = worlds.neighbours(player, world.size)
  targets = [
    (r, c)
    for r in range(world.size)
    for c in range(world.size)
    if goal and world.symbol((r, c)) == goal and (r, c) != player
  ]
  for avoid in ({trap} - {""}, set()):
    if targets:
      away = worlds.distances(world, targets, avoid)
      near = [
        name for name, cell in moves.items() if cell in away and world.symbol(cell) not in avoid
      ]
      if near:
        least = min(away[moves[name]] for name in near)
        return [name for name in near if away[moves[name]] == least]
    elif safe := [name for name, cell in moves.items() if world.symbol(cell) not in avoid]:
      return safe
  return list(moves)


def item_list(rng: random.Random, world: worlds.World, allow_strangers: bool = True) -> list[Claim]:
  """Draws the claims of a knowledge text about a world, as `claims.draw` does."""
  truth = {GOAL: world.goal, TRAP: world.trap}
  return claims_lib.draw(rng, truth, world.letters(), worlds.LETTERS, allow_strangers)


def history(
  rng: random.Random, world: worlds.World, known: tuple[str, str]
) -> tuple[list[Message], worlds.Cell]:
  """The messages up to an undecided turn, and where the player stands in it; the last is the
  user's, still unanswered.
  """
  game = worlds.WorldGame(world)
  skill = rng.choice((0.0, 0.5, 1.0))
  said = [prompts.first_message(game.observation, player=PLAYER, actions=ACTION_LIST)]
  for _ in range(min(rng.randrange(worlds.MAX_TURNS), rng.randrange(worlds.MAX_TURNS))):
    before, action = game.player, _move(rng, world, game.player, known, skill)
    step = game.play(f"[{action}]")
    if step.done:
      return said, before
    said += [_answer(action), prompts.next_message(step.observation)]
  return said, game.player


def _move(rng, world, player, known, skill):
  if rng.random() < skill:
    return rng.choice(good_actions(world, player, *known))
  return rng.choice(
    list(worlds.ACTIONS) if rng.random() < 0.3 else list(worlds.neighbours(player, world.size))
  )


def _answer(action: str) -> Message:
  return Message("assistant", f"[{action}]", action=f"[{action}]", response_tokens=0)


# Extraction


def episode(
  rng: random.Random, world: worlds.World, known: tuple[str, str] | None = None
) -> tuple[Conversation, list[Claim]]:
  """Plays one game with a policy of random quality and says what it reveals: the symbol that
  decided it, and walls run into.

  That a symbol stepped on does nothing is revealed too, but left unsaid: where one stood many turns
  ago is more than a model of this size can be relied on to look up, and a false item does more harm
  than a missing one.
  """
  if known is None:
    known = rng.choice(
      (("", ""), (world.goal, world.trap), (world.trap, world.goal), (world.goal, ""))
    )
  game, skill = (
    worlds.WorldGame(world, max_turns=rng.choice((3, 5, 5, 5, worlds.MAX_TURNS))),
    rng.choice((0.3, 0.7, 1.0)),
  )
  said = [prompts.first_message(game.observation, player=PLAYER, actions=ACTION_LIST)]
  facts = []
  while True:
    action = _move(rng, world, game.player, known, skill)
    bumped = action not in worlds.neighbours(game.player, world.size)
    step = game.play(f"[{action}]")
    said.append(_answer(action))
    symbol = world.symbol(game.player)
    if bumped:
      facts.append(Claim(WALL))
    elif symbol in (world.goal, world.trap):
      facts.append(Claim(GOAL if symbol == world.goal else TRAP, symbol))
    if step.done:
      end = (step.outcome, step.reward, step.ended == "passed", step.ended)
      finished = Conversation("", tuple(said), Source(GAME, "world", seed=0), *end)
      return finished, list(dict.fromkeys(facts))
    said.append(prompts.next_message(step.observation))


def _same_letters(rng: random.Random, world: worlds.World) -> tuple[Conversation, list[Claim]]:
  """An episode in another world whose goal and trap are this world's letters."""
  other = worlds.random_world(rng, size=3)
  names = {other.goal: world.goal, other.trap: world.trap}
  spare = [letter for letter in worlds.LETTERS if letter not in (world.goal, world.trap)]
  for letter in other.letters():
    if letter not in names:
      names[letter] = spare.pop(rng.randrange(len(spare)))
  rows = tuple(tuple(names.get(symbol, symbol) for symbol in row) for row in other.rows)
  return episode(rng, dataclasses.replace(other, rows=rows, goal=world.goal, trap=world.trap))


def lessons(facts: list[Claim], known: list[Claim]) -> list[Claim]:
  """The facts worth writing down: the deciding symbol always, as a vote; the wall if it is not yet
  known, or if there is nothing else.
  """
  deciding = [fact for fact in facts if fact.role != WALL]
  return deciding + [
    fact for fact in facts if fact.role == WALL and (not deciding or fact not in known)
  ]


def extract_example(rng: random.Random, world: worlds.World | None = None) -> Example:
  """One trajectory in the real extraction prompt, with or without what is known before; the answer
  says what it reveals.
  """
  world = world or worlds.random_world(rng)
  game, facts = episode(rng, world)
  return written_down(rng, game, facts, item_list(rng, world) if rng.random() < 0.7 else [])


def written_down(
  rng: random.Random, game: Conversation, facts: list[Claim], known: list[Claim]
) -> Example:
  """The extraction example of a game that reveals these facts, given what is known before."""
  knowledge = "\n".join(claims_lib.say(claim, rng) for claim in known)
  taught = lessons(facts, known) or [Claim(GENERIC)]
  answer = "\n".join(claims_lib.say(claim, rng) for claim in taught)
  message = extraction_message(transcript(game), knowledge, form="items")
  return Example("extract", (message,), "", answer)


# Ask and other tasks


def ask_example(rng: random.Random) -> Example:
  """Which letter is the goal, or the hazard: by the knowledge alone, or of those on a board that
  the question shows.
  """
  world, board = worlds.random_world(rng), rng.random() < 0.5
  said = item_list(rng, world, allow_strangers=board)
  role = rng.choice((GOAL, TRAP))
  answer = (
    claims_lib.resolve(said, world.letters() if board else list(worlds.LETTERS))[
      0 if role == GOAL else 1
    ]
    or "unknown"
  )
  shown = worlds.WorldGame(world).observation if board else ""
  knowledge = "\n".join(claims_lib.say(claim, rng) for claim in said)
  return Example("ask", (knowledge_message(knowledge), ask_message(role, shown)), "", answer)


def ask_message(role: str, observation: str = "") -> Message:
  """The question of the binding probe."""
  question = (
    f"Which symbol is the {'goal' if role == GOAL else 'hazard'}? Answer with the symbol alone."
  )
  return Message("user", f"{observation}\n\n{question}" if observation else question)


OTHER_TASKS = {
  "Repeat this.": lambda text: text,
  "Write this in upper case.": str.upper,
  "Write this in lower case.": str.lower,
  "Write this backwards.": lambda text: text[::-1],
  "Sort these letters.": lambda text: "".join(sorted(text)),
  "What is the first letter?": lambda text: text[0],
  "What is the last letter?": lambda text: text[-1],
  "How many letters are these?": lambda text: str(len(text)),
}


def other_example(rng: random.Random) -> Example:
  """A small text task whose answer a program can check."""
  task = rng.choice(list(OTHER_TASKS))
  letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7)))
  text = (
    letters.upper() if "lower" in task or rng.random() < 0.3 and "upper" not in task else letters
  )
  return Example("other", (Message("user", f"{task}\n{text}"),), "", OTHER_TASKS[task](text))
