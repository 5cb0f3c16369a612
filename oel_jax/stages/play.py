"""Games that a stage plays into a file of its round, by the names of their draws.

Maps come from seeds: held-out maps have odd ones, every other stage has even ones. This keeps the
seeds apart, not the boards: of the default game's, 3 × 3 with two holes, there are only 19, and a
held-out one comes up in the other stages, too, under another seed.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from oel_jax.conversations.schema import Conversation
from oel_jax.environments import Episode, GameSpec, code_digest, game_spec, play_to_file
from oel_jax.evaluation import episodes as episodes_lib
from oel_jax.policy.endpoint.endpoint import Endpoint
from oel_jax.policy.sampling.sampler import Sampling
from oel_jax.runtime import files, schema
from oel_jax.runtime.seeds import derive
from oel_jax.runtime.workdir import tasks_digest
from oel_jax.stages import endpoint, spread
from oel_jax.stages.run import Meter, Run, made_from

Advance = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Games:
  """What is to be played.

  Attributes:
    file: of the round, below its folder.
    prefix: of the games' ids, "r1-deploy": game i is r1-deploy-0000i.
    stage: names the draws, with the seed and, but for held-out games, the round.
    count: games.
    sampling: of the answers.
    texts: knowledge; each game is given one of them by lot, none if there are none.
    deployed: whether the deployed policy plays, behind config.deployment.endpoint if there is one.
    held_out: whether they measure. Then the round has no part in the draws: game i has the same map
      and the same random stream in every round, with knowledge and without. Streams in common lower
      the noise of a comparison; they do not remove it.
  """

  file: str
  prefix: str
  stage: str
  count: int
  sampling: Sampling
  texts: Sequence[str] = ()
  deployed: bool = False
  held_out: bool = False


def play(run: Run, number: int, games: Games, meter: Meter, advance: Advance) -> list[Conversation]:
  """Plays the games, or what is missing of them; returns them all, in order.

  A file of held-out games that were played with other weights, knowledge or settings is set aside.

  Raises:
    ValueError: a file of other games was played with others; or as `environments.play_to_file`.
  """
  path, manifest = run.round(number) / games.file, run.manifest(number)
  inputs = made_from(meter, games.texts)
  remote = endpoint.of(run.config, meter.tokenizer) if games.deployed else None
  if remote:
    inputs["endpoint"] = remote.name
  if games.held_out:
    inputs["settings"] = settings(run.config)
  changed = manifest.changed(games.file, inputs)
  if changed and not games.held_out:
    raise ValueError(
      f"{path}: played with other {', '.join(changed)} than the round has now: remove it, and it "
      "is played again"
    )
  for file in (path, path.with_name(f"{path.name}.partial")) if changed else ():
    files.set_aside(file, f"it was played with other {', '.join(changed)}")
  manifest.announce(games.file, inputs)
  if remote and not path.exists():
    endpoint.remind(remote, number)
  episodes = _episodes(run.config.seed, number, games)
  # The base model plays what round 1 does.
  spec = game_spec(run.config.deployment, max(number - 1, 0))
  result = _play(run, path, spec, episodes, games, meter, advance, remote)
  if remote and remote.counts.requests:
    meter.tokens += remote.counts.tokens
    run.log(number, f"{games.stage}_endpoint", **endpoint.tell(remote))
  manifest.record([games.file], inputs)
  return result


def held_out(run: Run, number: int, name: str, texts: Sequence[str]) -> Games:
  """The held-out games, the same in every round, played in the way of this name: "without"
  knowledge, or with `texts`.
  """
  return Games(
    file="user/evaluation.jsonl" if name == "without" else f"user/evaluation_{name}.jsonl",
    prefix=f"r{number}-{name}",
    stage="held out",
    count=run.config.evaluation.episodes,
    sampling=run.sampling("evaluation"),
    texts=texts,
    held_out=True,
  )


def log(run: Run, number: int, stage: str, played: Sequence[Conversation]) -> None:
  """The share passed, the mean length of a response and the share cut, as the stage's numbers."""
  summary = episodes_lib.play_summary(played, run.config.deployment.max_response_tokens)
  passed, tokens = summary["passed"]["rate"], summary["response_tokens"]["mean"]
  run.log(number, stage, passed=passed, response_tokens=tokens, cut=summary["cut"]["rate"])


def settings(config: Any, *, all_of_it: bool = False) -> str:
  """A digest of the configuration that held-out games depend on; of all that evaluation.json
  depends on, too.
  """
  values = json.loads(config.to_json())
  evaluation = values["evaluation"]
  unrelated, answers = evaluation.pop("unrelated"), evaluation.pop("own_answers")
  curves = evaluation.pop("accumulation_rounds")
  if not all_of_it:
    others = ("in_context", "accumulation", "tasks", "retention")
    evaluation = {name: value for name, value in evaluation.items() if name not in others}
  # How the prompts of training were sampled says nothing about held-out games.
  others = ("episodes", "slots", "temperature", "top_p", "top_k", "environment")
  others += ("endpoint", "endpoint_model", "endpoint_timeout", "endpoint_retries")
  game = {name: value for name, value in values["deployment"].items() if name not in others}
  own, policy = values["deployment"]["environment"], values["policy"]
  if own not in ("", "textarena"):
    game["environment"] = [own, code_digest(config.deployment)]
  parts = [values["seed"], evaluation, game, policy["thinking"], policy["max_prompt_tokens"]]
  if values["extraction"]["wording"] != "games":  # what all were of before there were two
    parts.append(values["extraction"]["wording"])
  if all_of_it and curves > 1:
    parts.append({"accumulation_rounds": curves})
  if all_of_it and (digest := tasks_digest(config)):
    parts.append(digest)
  if all_of_it and unrelated:
    prompts = files.sha256(pathlib.Path(unrelated).expanduser())
    parts.append({"unrelated": prompts, "temperature": values["consolidation"]["temperature"]})
  if all_of_it and answers:
    training = values["consolidation"]
    parts.append({"own_answers": answers} | {name: training[name] for name in ("k", "temperature")})
  return schema.digest(parts)


def dealt(seed: int, number: int, games: Games) -> list[int]:
  """For each of the games, in order, which of `games.texts` it is given."""
  return [_draw(seed, number, games, "text", i) % len(games.texts) for i in range(games.count)]


def by_text(
  run: Run, number: int, games: Games, played: Sequence[Conversation]
) -> list[list[Conversation]]:
  """The games that each of `games.texts` was given to."""
  given = dealt(run.config.seed, number, games)
  pairs = list(zip(played, given, strict=True))
  return [[game for game, text in pairs if text == place] for place in range(len(games.texts))]


def _draw(seed: int, number: int, games: Games, what: str, i: int) -> int:
  """The draw of this name for game i."""
  place = (games.stage,) if games.held_out else (number, games.stage)
  return derive(seed, *place, what, i)


def _episodes(seed: int, number: int, games: Games) -> list[Episode]:
  draw = functools.partial(_draw, seed, number, games)
  hands = dealt(seed, number, games) if games.texts else []
  episodes = []
  for i in range(games.count):
    text = games.texts[hands[i]] if hands else ""
    map_seed = draw("map", i) & ~1 | games.held_out
    episodes.append(Episode(f"{games.prefix}-{i:05d}", map_seed, draw("sample", i), text))
  return episodes


def _play(
  run: Run,
  path: pathlib.Path,
  spec: GameSpec,
  episodes: list[Episode],
  games: Games,
  meter: Meter,
  advance: Advance,
  remote: Endpoint | None,
) -> list[Conversation]:
  config, done = run.config, 0

  def tell(finished: int) -> None:
    nonlocal done
    advance(finished - done)
    done = finished

  return play_to_file(
    path,
    meter,
    spec,
    episodes=episodes,
    slots=config.deployment.slots,
    advance=tell,
    remote=remote,
    by=spread.player(run),
    sampling=games.sampling,
    max_response_tokens=config.deployment.max_response_tokens,
    max_prompt_tokens=config.policy.max_prompt_tokens,
    thinking=config.policy.thinking,
    wording=config.extraction.wording,
  )
