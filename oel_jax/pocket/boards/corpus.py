"""What the policy of both games is taught: one chat example at a time, drawn from a seed.

The abilities are those of `pocket.corpus`, *play*, *extract*, *ask* and *other*, in push worlds and
in Frozen Lakes. No example begins on a board that `chosen` holds out.
"""

import random

from oel_jax.conversations.schema import (
  GAME,
  Conversation,
  Message,
  Source,
  knowledge_message,
  transcript,
)
from oel_jax.environments import prompts
from oel_jax.pocket import claims as claims_lib
from oel_jax.pocket import corpus, worlds
from oel_jax.pocket.boards import chosen, plans, player, rooms
from oel_jax.pocket.claims import BOX, GOAL, LAKE, PUSH, TARGET, TRAP, WALL, Claim
from oel_jax.pocket.corpus import Example

MIX = {"play": 0.56, "extract": 0.26, "ask": 0.10, "other": 0.08}
PUSH_SHARE = 0.55  # of the examples that are of a game
# how often an unknown role is guessed, and a move straight back ruled out, as in `corpus`; of a
# Frozen Lake more often than there, and guesses are kept to: wide boards are seldom won by chance
PUSH_GUESS = 0.3
EXPLORING = {"guess": 0.7, "onward": 0.6, "keep": True, "way": True}
# The lakes' sizes and layouts, and how often: where large ones with the goal in the corner were
# seldom drawn, the way was not found on them. As many have a lone trap there, which tells nothing.
LAKE_SIZES = ((3, 4, 5), (1, 2, 3))
LAKE_LAYOUTS = (("symmetric", "corner_goal", "corner_trap"), (3, 2, 2))
NAMES = {GOAL: "goal", TRAP: "hazard", TARGET: "target", BOX: "box"}  # in questions


def example(seed: int) -> Example:
  """The example of this seed; the mix is drawn with it."""
  rng = random.Random(seed)
  kind = rng.choices(list(MIX), list(MIX.values()))[0]
  if kind == "other":
    return corpus.other_example(rng)
  push = rng.random() < PUSH_SHARE
  if kind == "ask":
    return ask_example(rng, push)
  if kind == "play":
    if push:
      return play_example(rng)
    return corpus.play_example(rng, lake(rng), **EXPLORING)
  return extract_example(rng) if push else corpus.extract_example(rng, lake(rng))


def lake(rng: random.Random, *, layout: str | None = None, held: bool = False) -> worlds.World:
  """A Frozen Lake as `worlds.random_world` draws it, of the boards that are held out or not, by
  LAKE_SIZES and LAKE_LAYOUTS.
  """
  while True:
    drawn = layout or rng.choices(*LAKE_LAYOUTS)[0]
    world = worlds.random_world(rng, layout=drawn, size=rng.choices(*LAKE_SIZES)[0])
    if chosen.held_out(world) == held:
      return world


# Play


def play_example(rng: random.Random, room: rooms.Room | None = None) -> Example:
  """One turn in a push world, under full, partial, redundant, contradictory, wrong, raw or no
  knowledge.
  """
  room = room or rooms.random_room(rng)
  form = rng.choices(*corpus.FORMS)[0]
  said: list[Claim] = []
  knowledge = ""
  if form == "raw":
    others = [episode(rng, same_symbols(rng, room)) for _ in range(rng.randint(1, 2))]
    knowledge = "\n\n".join(transcript(game) for game, _ in others)
    said = [claim for _, facts in others for claim in facts]
  elif form == "items":
    said = item_list(rng, room)
    knowledge = "\n".join(claims_lib.say(claim, rng) for claim in said)
  target, box = claims_lib.resolve(said, room.letters(), PUSH)
  messages, view = history(rng, room, (target, box))
  harmless = {claim.letter for claim in said if claim.role == claims_lib.SAFE}
  thinking, action = player.respond(rng, view, target, box, harmless, guess=PUSH_GUESS)
  return corpus.turn(rng, form, knowledge, messages, thinking, action)


def item_list(rng: random.Random, room: rooms.Room, allow_strangers: bool = True) -> list[Claim]:
  """Draws the claims of a knowledge text about a room, as `claims.draw` does."""
  truth = {TARGET: room.target, BOX: room.box}
  alphabet = [letter for letter in rooms.LETTERS if letter != room.player]
  return claims_lib.draw(rng, truth, room.letters(), alphabet, allow_strangers)


def history(
  rng: random.Random, room: rooms.Room, known: tuple[str, str]
) -> tuple[list[Message], plans.View]:
  """The messages up to an undecided turn, and the last board shown; the last message is the
  user's, still unanswered.
  """
  game, skill = rooms.RoomGame(room), rng.choice((0.0, 0.5, 1.0))
  view, said = plans.view(game.observation, room.player), [_first(game)]
  for _ in range(min(rng.randrange(rooms.MAX_TURNS), rng.randrange(rooms.MAX_TURNS))):
    action = _move(rng, view, known, skill)
    step = game.play(f"[{action}]")
    if step.done:
      break
    said += [_answer(action), prompts.next_message(step.observation)]
    view = _seen(step.observation, view)
  return said, view


def _first(game: rooms.RoomGame) -> Message:
  symbol = game.room.player
  return prompts.first_message(game.observation, player=symbol, actions=corpus.ACTION_LIST)


def _answer(action: str) -> Message:
  return Message("assistant", f"[{action}]", action=f"[{action}]", response_tokens=0)


def _seen(observation: str, before: plans.View) -> plans.View:
  """The board that an observation shows; a complaint about a move shows none."""
  return plans.view(observation, before.player) if "Board" in observation else before


def _move(rng: random.Random, view: plans.View, known: tuple[str, str], skill: float) -> str:
  if rng.random() < skill:
    if found := player.known_plan(view, *known):
      return found[0]
    return rng.choice(player.free_actions(view, *known) or list(worlds.ACTIONS))
  free = player.free_actions(view, "", "")
  return rng.choice(list(worlds.ACTIONS) if rng.random() < 0.3 or not free else free)


# Extraction


def episode(
  rng: random.Random, room: rooms.Room, known: tuple[str, str] | None = None
) -> tuple[Conversation, list[Claim]]:
  """Plays one game with a policy of random quality and says what it reveals: what was pushed, where
  it lay when that won, and walls run into.
  """
  if known is None:
    told = (room.target, room.box)
    known = rng.choice((("", ""), told, told[::-1], ("", room.box)))
  game = rooms.RoomGame(room, max_turns=rng.choice((5, 8, *[rooms.MAX_TURNS] * 3)))
  skill, view = rng.choice((0.3, 0.7, 1.0)), plans.view(game.observation, room.player)
  said, facts = [_first(game)], []
  while True:
    action, box = _move(rng, view, known, skill), game.box
    step = game.play(f"[{action}]")
    said.append(_answer(action))
    if "into a wall" in step.observation + step.outcome:
      facts.append(Claim(WALL))
    if game.box != box:
      facts.append(Claim(BOX, room.box))
    if step.ended == "passed":
      facts.append(Claim(TARGET, room.target))
    if step.done:
      end = (step.outcome, step.reward, step.ended == "passed", step.ended)
      finished = Conversation("", tuple(said), Source(GAME, "room", seed=0), *end)
      return finished, list(dict.fromkeys(facts))
    said.append(prompts.next_message(step.observation))
    view = _seen(step.observation, view)


def same_symbols(rng: random.Random, room: rooms.Room) -> rooms.Room:
  """Another room, of this one's symbols but for letters that do nothing."""
  other = rooms.random_room(rng)
  fields = ("target", "box", "player", "wall", "floor", "done")
  names = {getattr(other, field): getattr(room, field) for field in fields}
  spare = [letter for letter in rooms.LETTERS if letter not in names.values()]
  for letter in other.letters():
    if letter not in names:
      names[letter] = spare.pop(rng.randrange(len(spare)))
  rows = tuple("".join(names[symbol] for symbol in row) for row in other.rows)
  own = {field: getattr(room, field) for field in fields}
  return rooms.Room(rows, other.start, other.box_at, **own)


def extract_example(rng: random.Random) -> Example:
  """One game of a push world in the real extraction prompt, with or without what is known before;
  the answer says what it reveals.
  """
  room = rooms.random_room(rng)
  game, facts = episode(rng, room)
  known = item_list(rng, room) if rng.random() < 0.7 else []
  return corpus.written_down(rng, game, facts, known)


# Ask


def ask_example(rng: random.Random, push: bool) -> Example:
  """Which letter has a role: by the knowledge alone, or of those on a board that the question
  shows.
  """
  board = rng.random() < 0.5
  roles = PUSH if push else LAKE
  if push:
    room = rooms.random_room(rng)
    said = item_list(rng, room, allow_strangers=board)
    letters, observation = room.letters(), rooms.RoomGame(room).observation
  else:
    world = lake(rng)
    said = corpus.item_list(rng, world, allow_strangers=board)
    letters, observation = world.letters(), worlds.WorldGame(world).observation
  role = rng.choice(roles)
  known = claims_lib.resolve(said, letters if board else list(rooms.LETTERS), roles)
  knowledge = "\n".join(claims_lib.say(claim, rng) for claim in said)
  question = ask_message(role, observation if board else "")
  told = answer(known[roles.index(role)])
  return Example("ask", (knowledge_message(knowledge), question), "", told)


def ask_message(role: str, observation: str = "") -> Message:
  """The question of the binding probe."""
  question = f"Which symbol is the {NAMES[role]}?"
  return Message("user", f"{observation}\n\n{question}" if observation else question)


def answer(letter: str) -> str:
  """The right answer to it; "" is for a role that nothing is known of."""
  return f"It is {letter or 'unknown'}."
