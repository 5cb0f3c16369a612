"""The user side's loop: many games side by side, each at its own pace, resumable (OEL section 3,
deployment).

A place is a conversation of `Policy.sample`; `slots` of them are played at a time. The game that
ends in a place makes room for the next one there: `reply` answers with that game's first prompt, so
no game waits for a slower one.

    place 0   e0 e0 e0 e0 e0 e0 | e5 e5 …
    place 1   e1 e1 | e3 e3 e3 e3 | e6 …      each column a turn
    place 2   e2 e2 e2 | e4 e4 e4 e4 e4 …

Which prompts share a batch depends on the list of episodes alone, never on a clock or on what was
done before. Therefore a run that was cut off plays the episodes of the call that it was in again
and samples the same batches, and with them the same bits (rounding depends on a batch's shape, and
on the place of keys and values in the cache, so the missing games alone would not do).
"""

import collections
import functools
import os
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import logging

from oel_jax.conversations.jsonl import append_jsonl, read_conversations, write_jsonl
from oel_jax.conversations.schema import Conversation, Message
from oel_jax.environments import seat as seat_lib
from oel_jax.environments import unanswered
from oel_jax.environments.api import GameSpec
from oel_jax.environments.seat import Episode, Seat
from oel_jax.policy.answers import Answering, Asked, Sampled, Unanswered
from oel_jax.policy.tokenizers.chat_template import CannotRender

if TYPE_CHECKING:
  from oel_jax.policy.sampling.sampler import Sampling

PER_PLACE = 8  # episodes of a place in one call of `Policy.sample`; after a kill it is made again
SLOW = 10.0  # seconds before a call's first answer; more are told


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
  wording: str = "games",
  on_finished: Callable[[Conversation], None] | None = None,
  on_unanswered: Callable[[Episode, str], None] | None = None,
  advance: Callable[[int], None] | None = None,
  remote: Answering | None = None,
) -> list[Conversation]:
  """Plays every episode to its end.

  Args:
    policy: has `tokenizer.chat`, `tokenizer.split_response` and `sample` with its `reply`
      (oel_jax/policy).
    spec: the game.
    episodes: the game that ends makes room for the next one, and a game moves while the policy
      answers to others. Beyond PER_PLACE × `slots` they are played in several calls, in order.
    sampling: temperature, top_p, top_k.
    max_response_tokens: a turn, thinking included.
    max_prompt_tokens: limit of a prompt, in tokens.
    slots: games that are open, and played side by side.
    thinking: whether the chat template opens a thinking block.
    wording: how knowledge is told (`schema.knowledge_message`).
    on_finished: called with each conversation as its game ends.
    on_unanswered: called with each episode that ends for want of an answer, and why.
    advance: called with the number of games that have ended so far.
    remote: answers in the policy's place, whose tokenizer measures the prompts all the same.

  Returns:
    The conversations, in the order of `episodes`, without those that `on_unanswered` was told of.

  Raises:
    ValueError: a prompt is longer than `max_prompt_tokens`, or the game cannot be opened
      (`Game`).
    RuntimeError: the game fails; or an answer does not come and there is no `on_unanswered`.
  """
  answering = remote or Sampled(policy, sampling, max_response_tokens, thinking)
  finished: list[Conversation] = []

  def finish(played: Conversation) -> None:
    finished.append(played)
    if on_finished:
      on_finished(played)
    if advance:
      advance(len(finished))

  def miss(seat: Seat, why: str) -> None:
    told = f"turn {seat.turns + 1}: {why}"
    if on_unanswered is None:
      raise RuntimeError(f"episode {seat.episode.id}, {told}")
    on_unanswered(seat.episode, told)

  def ask(seat: Seat) -> Asked:
    return seat_lib.asked(policy, seat, thinking, wording, max_prompt_tokens)

  def ask_on(seat: Seat) -> Asked | None:
    """The next turn; None where the policy cannot be shown what it did, which ends the game."""
    try:
      return ask(seat)
    except CannotRender as error:
      if seat.messages[-1].role != "tool":
        raise
      finish(seat_lib.unshown(spec, seat, error.reason))
      return None

  def reply(
    queue: _Queue, seats: list[Seat], place: int, answer: Message | Unanswered
  ) -> Asked | None:
    queue.met(place)
    if isinstance(answer, Unanswered):
      miss(seats[place], answer.why)
    elif (played := seat_lib.moved(spec, seats[place], answer)) is not None:
      finish(played)
    elif following := ask_on(seats[place]):
      return following
    following = queue.take()
    if following is None:
      return None
    seats[place] = seat_lib.opened(spec, following)
    return ask(seats[place])

  for call in _calls(episodes, slots):
    queue = _Queue(call[slots:], min(slots, len(call)))
    seats = _first_seats(spec, call[:slots])
    answering.answer([ask(seat) for seat in seats], functools.partial(reply, queue, seats))
  by_id = {played.id: played for played in finished}
  return [by_id[episode.id] for episode in episodes if episode.id in by_id]


class _Queue:
  """The episodes that wait for a place.

  On a CPU `Policy.sample` shares the places out among threads. Within one, the order of replies
  follows from the prompts; between two, the clock decides. So the episodes are dealt to the places
  beforehand, and a place takes the first of those that lie before the places that its own thread is
  known to have: whatever the clock does, the same place gets the same episode.
  """

  def __init__(self, episodes: Sequence[Episode], places: int):
    numbered = list(enumerate(episodes))
    self._dealt = [collections.deque(numbered[place::places]) for place in range(places)]
    self._beside: dict[int, set[int]] = collections.defaultdict(set)  # by thread

  def met(self, place: int) -> None:
    """Notes that the place belongs to this thread."""
    self._beside[threading.get_ident()].add(place)

  def take(self) -> Episode | None:
    """The episode that follows where this thread's game has ended; None if it has none left."""
    hands = [self._dealt[place] for place in self._beside[threading.get_ident()]]
    hands = [hand for hand in hands if hand]
    return min(hands, key=lambda hand: hand[0][0]).popleft()[1] if hands else None


def _first_seats(spec: GameSpec, episodes: Sequence[Episode]) -> list[Seat]:
  """The games that begin, opened one by one; where boards take long to make, this is told."""
  seats, told = [], False
  for episode in episodes:
    seats.append(seat_lib.opened(spec, episode))
    if len(seats) == 1:  # which may import its game first
      started = time.monotonic()
      continue
    expected = (time.monotonic() - started) / (len(seats) - 1) * len(episodes)
    if expected > SLOW and not told:
      line = "%s: the boards of %d games are being made, which takes about %.0f s"
      logging.warning(line, spec.name, len(episodes), expected)
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
  remote: Answering | None = None,
  by: Callable[..., Any] | None = None,
  **how: Any,
) -> list[Conversation]:
  """Plays every episode and leaves them all in `path`, in the order of `episodes`; cut off at any
  moment, it goes on when called again.

  Each episode is added to `path`.partial as it ends. A later call keeps what is there. The
  PER_PLACE × `slots` episodes that share a call of `Policy.sample` are not played again if all are
  there; if one is missing all are, since the batches decide its bits, but only missing lines are
  added. A `path` that exists is only read, unless lines of it are damaged: then their episodes are
  played again.

  Episodes that a `remote` leaves unanswered are left out (`environments.unanswered`) and count as
  done. What it did answer is not asked again: no batch decides those bits.

  Args:
    path: JSON Lines file of `oel_jax.conversations.jsonl`.
    policy, spec, episodes, slots, advance, remote: as in `play`; `advance` counts kept episodes,
      too.
    by: plays in the place of `play`, whose arguments it is given.
    **how: the other arguments of `play`, but on_finished and on_unanswered.

  Raises:
    ValueError: as in `play`; or a file holds episodes other than these.
    RuntimeError: as in `play`; or more than `unanswered.MAX_SHARE` of the episodes had no answer.
    OSError: the disk is full; what was written stays.
  """
  path = pathlib.Path(path)
  partial = path.with_name(path.name + ".partial")
  if path.exists():
    partial.unlink(missing_ok=True)  # left by a crash between the last rename and its removal
    done, known = _read_own(path, spec, episodes), unanswered.read(path)
    left = [episode.id for episode in episodes if episode.id not in known]
    if [played.id for played in done] == left:
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
  missed = unanswered.Missed(path, len(episodes))
  miss = lambda episode, why: missed.add(episode.id, why)
  how |= dict(slots=slots, on_finished=keep, on_unanswered=miss, remote=remote)
  for call in _calls(episodes, slots):
    missing = [episode for episode in call if episode.id not in done]
    if missing:
      (by or play)(policy, spec, episodes=call if remote is None else missing, **how)
  missed.write()
  result = [done[episode.id] for episode in episodes if episode.id in done]
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


def _calls(episodes: Sequence[Episode], slots: int) -> list[Sequence[Episode]]:
  """The episodes of each call of `Policy.sample`."""
  ids = [episode.id for episode in episodes]
  if len(set(ids)) < len(ids):
    raise ValueError(
      f"episodes: the id {max(ids, key=ids.count)!r} occurs more than once: ids must differ"
    )
  size = PER_PLACE * slots
  return [episodes[start : start + size] for start in range(0, len(episodes), size)]


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
