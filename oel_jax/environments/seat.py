"""One episode at the table: its game, what has been said, and what an answer does to both."""

import dataclasses
from typing import Any

from oel_jax.conversations import prompt as prompt_lib
from oel_jax.conversations.schema import (
  GAME,
  Conversation,
  Message,
  Source,
  knowledge_message,
)
from oel_jax.environments import prompts
from oel_jax.environments.actions import parse_action
from oel_jax.environments.api import Game, GameSpec, Step
from oel_jax.policy.answers import Asked
from oel_jax.runtime.seeds import derive


@dataclasses.dataclass(frozen=True)
class Episode:
  """One game to play.

  Attributes:
    id: becomes the conversation's.
    map_seed: seed of the game, 0 ≤ seed < 2**32.
    sample_seed: turn t samples with the seed derive(sample_seed, t).
    knowledge: stands in a system message before the game; "" for none, then there is no such
      message.
  """

  id: str
  map_seed: int
  sample_seed: int
  knowledge: str = ""


@dataclasses.dataclass
class Seat:
  """An episode being played: its game and the messages so far; the last waits for an answer."""

  episode: Episode
  game: Game
  messages: list[Message]

  @property
  def turns(self) -> int:
    """Turns that have been answered."""
    return sum(message.role == "assistant" for message in self.messages)


def opened(spec: GameSpec, episode: Episode) -> Seat:
  """The episode as it begins: its game is opened, and the first message asks."""
  game = Game(spec, episode.map_seed)
  first = prompts.first_message(game.observation, player=spec.player, actions=spec.actions)
  return Seat(episode, game, [first])


def asked(policy: Any, seat: Seat, thinking: bool, wording: str, limit: int) -> Asked:
  """The prompt of the seat's next turn, and the seed of its answer."""
  text = seat.episode.knowledge
  knowledge = knowledge_message(text, wording) if text else None
  tools = seat.game.tools
  ids = prompt_lib.ids(policy.tokenizer, seat.messages, knowledge, tools=tools, thinking=thinking)
  if len(ids) > limit:
    raise ValueError(
      f"config.policy.max_prompt_tokens is {limit}, but the prompt of episode {seat.episode.id}, "
      f"turn {seat.turns + 1}, "
      f"has {len(ids)} tokens: raise it, or shorten the knowledge "
      "(extraction.max_knowledge_tokens) or the game (deployment.max_turns)"
    )
  seed = derive(seat.episode.sample_seed, seat.turns)
  return Asked(prompt_lib.messages(seat.messages, knowledge), ids, seed, tools)


def moved(spec: GameSpec, seat: Seat, answer: Message) -> Conversation | None:
  """Puts one answer to the game; returns the whole conversation when that ends it."""
  step = _called(seat, answer) if answer.tool_calls else _acted(spec, seat, answer)
  return _conversation(spec, seat, step) if step.done else None


def _acted(spec: GameSpec, seat: Seat, answer: Message) -> Step:
  """Makes the move that an answer's words are."""
  action = parse_action(answer.content, spec.action_pattern, spec.actions)
  step = seat.game.play(action)
  seat.messages.append(dataclasses.replace(answer, action=action))
  if not step.done:
    seat.messages.append(prompts.next_message(step.observation))
  return step


def _called(seat: Seat, answer: Message) -> Step:
  """Makes an answer's calls of tools; each result is a message, but for the one that ended the
  game, which its outcome tells.
  """
  calls = tuple(
    dataclasses.replace(call, id=call.id or f"call_{seat.turns}_{number}")
    for number, call in enumerate(answer.tool_calls)
  )
  steps = seat.game.call(calls)
  seat.messages.append(dataclasses.replace(answer, tool_calls=calls))
  seat.messages += [
    Message("tool", step.observation, tool_call_id=call.id, name=call.name)
    for call, step in zip(calls, steps)
    if not step.done
  ]
  return steps[-1]


def unshown(spec: GameSpec, seat: Seat, why: str) -> Conversation:
  """The game that ends because the chat template cannot show the policy's last calls: Llama 3.1's,
  say, shows one at a time.
  """
  told = f"The game was stopped: {why}."
  return _conversation(spec, seat, Step("", True, 0.0, told, "invalid", seat.game.category))


def _conversation(spec: GameSpec, seat: Seat, step: Step) -> Conversation:
  return Conversation(
    id=seat.episode.id,
    messages=tuple(seat.messages),
    source=Source(GAME, spec.name, seat.episode.map_seed, category=step.category or None),
    outcome=step.outcome,
    reward=step.reward,
    passed=step.ended == "passed",
    ended=step.ended,
    tools=seat.game.tools,
  )
