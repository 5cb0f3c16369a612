"""The user side's loop: many games side by side, each at its own pace, resumable episode by episode
(OEL section 3, deployment).

Episodes are played in fixed groups: which prompts share a batch depends on the list of episodes
alone, never on what was done before, so a run that was cut off and goes on samples the same
batches, and with them the same bits.
"""

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import logging

from oel_jax.conversations import prompt as prompt_lib
from oel_jax.conversations.jsonl import append_jsonl, read_conversations, write_jsonl
from oel_jax.conversations.schema import (
  GAME,
  Conversation,
  Message,
  Source,
  knowledge_message,
)
from oel_jax.environments import prompts
from oel_jax.environments.actions import parse_action
from oel_jax.environments.api import Game, GameSpec
from oel_jax.runtime.seeds import derive

if TYPE_CHECKING:
  from oel_jax.policy.sampling.sampler import Sampling

SLOW = 10.0  # seconds before a group's first answer; more are told


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
class _Seat:
  """An episode being played: its game and the messages so far; the last waits for an answer."""

  episode: Episode
  game: Game
  messages: list[Message]
  finished: Conversation | None = None

  @property
  def turns(self) -> int:
    """Turns that have been answered."""
    return len(self.messages) // 2


def play(
  policy: Any,
  spec: GameSpec,
  *,
  episodes: Sequence[Episode],
  sampling: "Sampling",
  max_response_tokens: int,
  max_prompt_tokens: int,
  slots: int,
  thinking: bool,
  on_finished: Callable[[Conversation], None] | None = None,
  advance: Callable[[int], None] | None = None,
) -> list[Conversation]:
  """Plays every episode to its end.

  Args:
    policy: has `tokenizer.chat`, `tokenizer.split_response` and `sample` with its `reply`
      (oel_jax/policy).
    spec: the game.
    episodes: cut into groups of `slots`, in order; one call samples for a group, and a game moves
      while the policy answers to others.
    sampling: temperature, top_p, top_k.
    max_response_tokens: a turn, thinking included.
    max_prompt_tokens: limit of a prompt, in tokens.
    slots: games side by side.
    thinking: whether the chat template opens a thinking block.
    on_finished: called with each conversation as its game ends.
    advance: called with the number of games that have ended so far.

  Returns:
    The conversations, in the order of `episodes`.

  Raises:
    ValueError: a prompt is longer than `max_prompt_tokens`, or the game cannot be opened
      (`Game`).
    RuntimeError: the game fails.
  """
  finished: list[Conversation] = []

  def finish(played: Conversation) -> None:
    finished.append(played)
    if on_finished:
      on_finished(played)
    if advance:
      advance(len(finished))

  def ask(seat: _Seat) -> tuple[list[int], int]:
    """The prompt of the seat's next turn, and the seed of its answer."""
    prompt = _prompt(policy, seat, thinking, max_prompt_tokens)
    return prompt, derive(seat.episode.sample_seed, seat.turns)

  def reply(seats: list[_Seat], number: int, response: list[int]) -> tuple[list[int], int] | None:
    seat = seats[number]
    _move(policy, spec, seat, response, thinking)
    if seat.finished is None:
      return ask(seat)
    finish(seat.finished)
    return None

  for group in _groups(episodes, slots):
    seats = _seats(spec, group)
    first_prompts, seeds = zip(*map(ask, seats), strict=True)
    policy.sample(
      first_prompts,
      seeds,
      sampling=sampling,
      max_new_tokens=max_response_tokens,
      reply=functools.partial(reply, seats),
    )
  by_id = {played.id: played for played in finished}
  return [by_id[episode.id] for episode in episodes]


def _seats(spec: GameSpec, group: Sequence[Episode]) -> list[_Seat]:
  """The games of a group, opened one by one; a game whose boards take long to make says so."""
  seats, started, told = [], time.monotonic(), False
  for episode in group:
    game = Game(spec, episode.map_seed)
    first = prompts.first_message(game.observation, player=spec.player, actions=spec.actions)
    seats.append(_Seat(episode, game, [first]))
    expected = (time.monotonic() - started) / len(seats) * len(group)
    if expected > SLOW and not told:
      line = "%s: the boards of %d games are being made, which takes about %.0f s"
      logging.warning(line, spec.name, len(group), expected)
      told = True
  return seats


def play_to_file(
  path: str | os.PathLike,
  policy: Any,
  spec: GameSpec,
  *,
  episodes: Sequence[Episode],
  slots: int,
  advance: Callable[[int], None] | None = None,
  **how: Any,
) -> list[Conversation]:
  """Plays every episode and leaves them all in `path`, in the order of `episodes`; cut off at any
  moment, it goes on when called again.

  Each episode is added to `path`.partial as it ends. A later call keeps what is there: whole groups
  are not played again; a group that lacks an episode is played again whole, since its batches
  decide its bits, but only the missing lines are added. A `path` that exists is only read, unless
  lines of it are damaged: then their episodes are played again.

  Args:
    path: JSON Lines file of `oel_jax.conversations.jsonl`.
    policy, spec, episodes, slots, advance: as in `play`; `advance` counts kept episodes too.
    **how: the other arguments of `play`, but on_finished.

  Raises:
    ValueError: as in `play`; or a file holds episodes other than these.
    OSError: the disk is full; what was written stays.
  """
  path = pathlib.Path(path)
  partial = path.with_name(path.name + ".partial")
  if path.exists():
    partial.unlink(missing_ok=True)  # left by a crash between the last rename and its removal
    done = _read_own(path, spec, episodes)
    if [played.id for played in done] == [episode.id for episode in episodes]:
      if advance:
        advance(len(episodes))
      return done
    # Lines are missing, damaged, doubled or moved: what is missing is played again.
    path.rename(partial)
  # A crash damages the last line of a short file: here any share of damaged lines will do, their
  # episodes are played again.
  kept = _read_own(partial, spec, episodes, max_damaged=1.0) if partial.exists() else []
  done = {played.id: played for played in kept}
  if done:
    logging.warning("%s: goes on with %d of %d episodes", partial, len(done), len(episodes))

  def keep(played: Conversation) -> None:
    if played.id not in done:
      append_jsonl(partial, played)
      done[played.id] = played
    if advance:
      advance(len(done))

  if done and advance:
    advance(len(done))
  for group in _groups(episodes, slots):
    if any(episode.id not in done for episode in group):
      play(policy, spec, episodes=group, slots=slots, on_finished=keep, **how)
  result = [done[episode.id] for episode in episodes]
  rewards = [played.reward for played in result]
  if rewards and not 0 <= min(rewards) <= max(rewards) <= 1:
    logging.warning(
      "%s: the rewards of %s are no shares, they go from %g to %g: passed is a game that ends "
      "with %g or more (config.deployment.passed_reward)",
      path,
      spec.name,
      min(rewards),
      max(rewards),
      spec.passed_reward,
    )
  write_jsonl(path, result)
  partial.unlink(missing_ok=True)
  return result


def _groups(episodes: Sequence[Episode], slots: int) -> list[Sequence[Episode]]:
  ids = [episode.id for episode in episodes]
  if len(set(ids)) < len(ids):
    raise ValueError(
      f"episodes: the id {max(ids, key=ids.count)!r} occurs more than once: ids must differ"
    )
  return [episodes[start : start + slots] for start in range(0, len(episodes), slots)]


def _prompt(policy: Any, seat: _Seat, thinking: bool, limit: int) -> list[int]:
  """Token ids of the prompt for the seat's next turn."""
  knowledge = knowledge_message(seat.episode.knowledge) if seat.episode.knowledge else None
  ids = prompt_lib.ids(policy.tokenizer, seat.messages, knowledge, thinking=thinking)
  if len(ids) > limit:
    raise ValueError(
      f"config.policy.max_prompt_tokens is {limit}, but the prompt of episode {seat.episode.id}, "
      f"turn {seat.turns + 1}, "
      f"has {len(ids)} tokens: raise it, or shorten the knowledge "
      "(extraction.max_knowledge_tokens) or the game (deployment.max_turns)"
    )
  return ids


def _move(
  policy: Any, spec: GameSpec, seat: _Seat, response: Sequence[int], thinking_on: bool
) -> None:
  """Puts one sampled response to the game; fills `seat.finished` when that ends it."""
  thinking, answer = policy.tokenizer.split_response(response, thinking=thinking_on)
  action = parse_action(answer, spec.action_pattern, spec.actions)
  step = seat.game.play(action)
  sampled = dict(thinking=thinking, action=action, response_tokens=len(response))
  seat.messages.append(Message("assistant", answer, **sampled))
  if not step.done:
    seat.messages.append(prompts.next_message(step.observation))
  else:
    seat.finished = Conversation(
      id=seat.episode.id,
      messages=tuple(seat.messages),
      source=Source(GAME, spec.name, seed=seat.episode.map_seed),
      outcome=step.outcome,
      reward=step.reward,
      passed=step.ended == "passed",
      ended=step.ended,
    )


def _read_own(
  path: pathlib.Path, spec: GameSpec, episodes: Sequence[Episode], **options: float
) -> list[Conversation]:
  """Reads a file of an earlier call.

  Raises:
    ValueError: it holds an episode that is not one of these: it is another run's.
  """
  own = {(episode.id, spec.name, episode.map_seed) for episode in episodes}
  result = read_conversations(path, **options)
  for played in result:
    name, seed = played.source.name, played.source.seed
    if (played.id, name, seed) not in own:
      raise ValueError(
        f"{path}: episode {played.id!r} of {name}, map seed {seed}, is "
        f"none of the {len(episodes)} episodes "
        "asked for: the file was made with another configuration; remove it, or use another folder"
      )
  return result
