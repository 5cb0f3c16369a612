"""Games in several processes: each plays whole games of its share, with weights of its own, and
process 0 is told what was said.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from oel_jax.conversations.jsonl import to_line
from oel_jax.conversations.schema import Conversation, conversation_from_json
from oel_jax.environments import Episode, game_spec, play
from oel_jax.policy.sampling import spread
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.policy.sampling.token_sampling import Sampling
from oel_jax.runtime import distributed, together
from oel_jax.stages.run import Meter, Run


def player(run: Run) -> Callable[..., None] | None:
  """What plays in the place of `environments.play`; None in a run of one process."""
  if not together.leads():
    return None

  def play_shares(
    meter: Meter,
    spec: Any,
    *,
    episodes: Sequence[Episode],
    slots: int,
    sampling: Sampling,
    on_finished: Callable[[Conversation], None],
    on_unanswered: Any,
    remote: Any,
    **how: Any,
  ) -> None:
    told = dict(on_finished=on_finished, on_unanswered=on_unanswered, remote=remote)
    if remote:  # who answers is asked by this process alone
      play(meter, spec, episodes=episodes, slots=slots, sampling=sampling, **told, **how)
      return
    texts = list(dict.fromkeys(episode.knowledge for episode in episodes))
    dealt = [texts.index(episode.knowledge) for episode in episodes]
    bare = [dataclasses.replace(episode, knowledge="") for episode in episodes]
    before = spec.rounds_before
    shares = _play(run, meter.policy, before, bare, texts, dealt, slots, sampling, how)
    for lines, tokens, flops in shares:
      meter.tokens += tokens
      meter.flops += flops
      for line in lines:
        on_finished(conversation_from_json(json.loads(line)))

  return play_shares


@together.everywhere
def _play(
  run: Run,
  policy: Policy,
  rounds_before: int,
  episodes: list[Episode],
  texts: list[str],
  dealt: list[int],
  slots: int,
  sampling: Sampling,
  how: dict[str, Any],
) -> list[tuple[list[str], int, float]]:
  """Of each process: the lines of its games, and what its meter counted. Episode i is given text
  `dealt`[i], which travels once.
  """
  meter, first, step = Meter(spread.own(policy)), distributed.process(), distributed.count()
  pairs = list(zip(episodes, dealt, strict=True))[first::step]
  mine = [dataclasses.replace(episode, knowledge=texts[text]) for episode, text in pairs]

  def work() -> tuple[list[str], int, float]:
    played = (
      play(
        meter,
        game_spec(run.config.deployment, rounds_before),
        episodes=mine,
        slots=-(-slots // step),
        sampling=sampling,
        **how,
      )
      if mine
      else []
    )
    return [to_line(one).decode() for one in played], meter.tokens, meter.flops

  return distributed.gather_done(work, "games")
