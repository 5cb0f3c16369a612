"""The online loop: deploy → extract → consolidate → evaluate, round after round (OEL section 3).

Each stage leaves whole files or none, a stage found whole is not done again, and every draw is
named by (seed, round, stage, index), or by all but the round for held-out games: a run that is
killed at any moment goes on when the same command is given, and ends with the same bits on one
machine.

What is found is compared with what was written and with what it was made from (`runtime.manifest`):
weights, knowledge, settings. A measurement of other weights or settings than the present ones is
made again, and the old one kept aside; games and knowledge that other weights made are refused, for
whatever was trained on them would have to go, too.

Maps come from seeds: held-out maps have odd ones, every other stage has even ones. This keeps the
seeds apart, not the boards: of the default game's, 3 × 3 with two holes, there are only 19, and a
held-out one comes up in the other stages, too, under another seed.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import logging

from oel_jax import choices, report
from oel_jax import config as config_lib
from oel_jax.consolidation import placement, trainer
from oel_jax.consolidation import task as task_lib
from oel_jax.conversations.jsonl import read_conversations, read_prompts, write_jsonl
from oel_jax.conversations.schema import EMPTY, Conversation, cut_prompts
from oel_jax.environments.rollout import Episode, play_to_file
from oel_jax.environments.textarena import game_spec, try_game
from oel_jax.evaluation import episodes, statistics, tasks
from oel_jax.extraction import knowledge as knowledge_lib
from oel_jax.extraction import state as extraction_state
from oel_jax.extraction.extract import extract, raw_knowledge
from oel_jax.policy import load
from oel_jax.policy.sampling.sampler import Policy, Reply, Sampling
from oel_jax.report import records
from oel_jax.runtime import files, mesh, named, progress, schema
from oel_jax.runtime.checksum import fingerprint
from oel_jax.runtime.manifest import Manifest
from oel_jax.runtime.metrics import Metrics
from oel_jax.runtime.seeds import derive
from oel_jax.runtime.workdir import opened


def run(config: Any, workdir: str, *, resume_anyway: bool = False) -> dict[str, Any]:
  """Runs all rounds in `workdir`, going on with what is there, and writes the report.

  Returns what report/results.json holds.

  Raises:
    ValueError: the configuration is wrong or differs from the run's; a file of the run is damaged,
      or was made from something else than this run has; no knowledge came out; or on_no_gain =
      "stop" and there was no gain.
    OSError: another process runs in `workdir`, or it cannot be written.
  """
  config_lib.validate(config)
  # What can be wrong with the configuration shows here, before the directory belongs to it.
  devices = mesh.make_mesh(config.mesh)
  try_game(game_spec(config.deployment))
  longest = max(config.deployment.max_response_tokens, config.extraction.max_response_tokens)
  policy = load.load_policy(config_lib.policy(config), devices, response_tokens=longest)
  tasks.read_tasks(config.evaluation.tasks)
  _read_edit(config)
  placement.unroll(config.consolidation, policy, devices)
  most = dict(texts=config.extraction.texts, tokens=config.extraction.max_knowledge_tokens)
  chosen = choices.choose(config, policy, devices, **most, exact=False)
  with opened(config, workdir, resume_anyway) as folder, Metrics(folder, config) as metrics:
    loop = Loop(config, folder, metrics, devices)
    loop.check(policy)
    choices.tell(folder, chosen)  # a run that is refused changes no file
    loop.evaluate(0, policy, policy, [])
    for number in range(1, config.rounds + 1):
      texts = loop.extract(number, policy)
      loop.collect_prompts(number, policy)
      before = policy
      if loop.gate(number, policy, texts):
        policy = policy.replace(loop.consolidate(number, policy, texts))
      loop.evaluate(number, policy, before, texts)
    results = report.write(folder)
  progress.table(report.rows(results), f"{config.deployment.game}, {config.rounds} rounds")
  print(f"report: {folder / 'report' / 'index.html'}", flush=True)
  return results


# Files of a round, below its folder.
DEPLOYED, PROMPT_GAMES, PROMPTS = (
  "user/trajectories.jsonl",
  "user/prefix_trajectories.jsonl",
  "prompts.jsonl",
)
OLD_PROMPTS = "prefixes.jsonl"  # as runs of before named it: one that is there is read in its place
TRAINED = "checkpoints"  # the manifest's entry of the finished training


@dataclasses.dataclass
class Meter:
  """A policy that counts what it writes, and the work, as if every prompt were read whole; the
  stages cannot tell it from the policy.
  """

  policy: Policy
  tokens: int = 0
  flops: float = 0.0

  @property
  def tokenizer(self) -> Any:
    return self.policy.tokenizer

  @property
  def params(self) -> Any:
    return self.policy.params

  def sample(
    self,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    reply: Reply | None = None,
    **how: Any,
  ) -> list[list[int]]:
    asked = list(prompts)

    def counted(i: int, sampled: list[int]) -> tuple[Sequence[int], int] | None:
      self._count(asked[i], sampled)
      following = reply(i, sampled)
      if following:
        asked[i] = following[0]
      return following

    if reply:
      return self.policy.sample(prompts, seeds, reply=counted, **how)
    responses = self.policy.sample(prompts, seeds, **how)
    for prompt, sampled in zip(prompts, responses, strict=True):
      self._count(prompt, sampled)
    return responses

  def _count(self, prompt: Sequence[int], sampled: Sequence[int]) -> None:
    self.tokens += len(sampled)
    self.flops += (
      2.0
      * sum(leaf.size for leaf in jax.tree.leaves(self.policy.params))
      * (len(prompt) + len(sampled))
    )


@dataclasses.dataclass(frozen=True)
class Loop:
  """The stages of a run, each of which reads and writes its own files below `folder`/round_N."""

  config: Any
  folder: pathlib.Path
  metrics: Metrics
  mesh: jax.sharding.Mesh

  def check(self, policy: Policy) -> None:
    """Compares what is in the directory with what was written, before any work is done; `policy` is
    the one that the run begins with.

    Raises:
      ValueError: a file is damaged; or a round was built on weights that the run no longer has, or
        that would now be trained further.
    """
    records.read(self.folder)
    for path in self.folder.glob("round_*/user/extraction.jsonl"):
      extraction_state.check(path)
    for path in self.folder.glob("round_*/user/extraction.json"):  # an earlier version's
      files.read_json(
        path, advice="restore it from a copy, or delete it to extract anew where that has not ended"
      )
    self._refuse_other_weights(1, policy)
    for number in range(1, self.config.rounds + 1):
      steps = trainer.steps_done(self._round(number) / "checkpoints")
      trained = self._manifest(number).made_from(TRAINED)  # by an earlier version, unknown
      steps = int(trained["steps"]) if trained else steps
      if 0 < steps < self.config.consolidation.steps:
        planned = self.config.consolidation.steps
        why = (
          f"config.consolidation.steps is {planned}, round {number} has been trained for {steps}"
        )
        if any(self._round(number + 1).rglob("*.jsonl")):
          raise ValueError(
            f"{why}, and round {number + 1} was built on those weights: set it to {steps}, choose "
            f"another --workdir, or remove the folders round_{number + 1} and later ones to have "
            "these rounds done again"
          )
        files.set_aside(self._round(number) / "evaluation.json", why)

  def extract(self, number: int, policy: Policy) -> list[str]:
    """Deploys the policy for trajectories and lets it write down what they teach; returns the K
    texts of the round.
    """
    self._refuse_other_weights(number, policy)
    texts = self._knowledge(number)
    if not texts:
      texts = self._write_knowledge(number, policy, self._deploy(number, policy))
    return self._said(texts, self._round(number))

  def _deploy(self, number: int, policy: Policy) -> list[Conversation]:
    """The games that the round's knowledge is drawn from."""
    count = self.config.extraction.trajectories
    with self._stage(number, "deploy", policy, count) as (meter, advance):
      ids = [(f"r{number}-deploy-{i:05d}", "deploy", i) for i in range(count)]
      return self._play(number, DEPLOYED, meter, ids, self._sampling("deployment"), advance)

  def collect_prompts(self, number: int, policy: Policy) -> None:
    """Deploys the policy once more, on other maps; the prompts of its turns are all that goes to
    the server side.
    """
    path, games = self._prompts(number), self._round(number) / PROMPT_GAMES
    count = self.config.deployment.episodes
    if path.exists():
      if games.exists():
        _compare_prompts(path, games)
      return
    with self._stage(number, "prefixes", policy, count) as (meter, advance):
      ids = [(f"r{number}-prefix-{i:05d}", "prefixes", i) for i in range(count)]
      played = self._play(number, PROMPT_GAMES, meter, ids, self._sampling("deployment"), advance)
      self._log_play(number, "prefixes", played)
      made_from = {"weights": fingerprint(policy.params), PROMPT_GAMES: files.sha256(games)[:16]}
      self._manifest(number).announce(PROMPTS, made_from)
      write_jsonl(path, (prompt for game in played for prompt in cut_prompts(game)))
      self._manifest(number).record([PROMPTS], made_from)

  def gate(self, number: int, policy: Policy, texts: Sequence[str]) -> bool:
    """Plays with the knowledge and without, on the same maps, before anything is trained on it.
    Returns whether to train.

    Without gain, `on_no_gain` = "warn" trains all the same, "stop" raises ValueError, and "skip"
    leaves the weights as they are if play with knowledge is worse.
    """
    path, count = self._round(number) / "gate.json", self.config.consolidation.gate_episodes
    if count and path.exists():
      self._refuse_other_gate(path, policy, texts)
    if count and not path.exists():
      passed = {}
      with self._stage(number, "gate", policy, 2 * count) as (meter, advance):
        for name, given in (("without", []), ("with", texts)):
          ids = [(f"r{number}-gate-{i:05d}", "gate", i) for i in range(count)]
          played = self._play(
            number,
            f"user/gate_{name}.jsonl",
            meter,
            ids,
            self._sampling("evaluation"),
            advance,
            given,
          )
          passed[name] = statistics.count(
            sum(trajectory.passed for trajectory in played), len(played)
          )
      self._log(
        number, "gate", **{f"passed_{name}": counted["rate"] for name, counted in passed.items()}
      )
      files.write_sealed(path, {"schema": 1, "made_from": _made_from(policy, texts), **passed})
    if not count:
      return True
    found = self._gate(number)
    if found["decision"] != "train":
      logging.warning(
        "round %d: no gain from the knowledge: %d of %d passed with it, %d without: %s",
        number,
        found["with"]["hits"],
        found["with"]["of"],
        found["without"]["hits"],
        "not consolidated" if found["decision"] == "skip" else "consolidated all the same",
      )
      if self.config.consolidation.on_no_gain == "stop":
        report.write(self.folder)
        raise ValueError(
          f"round {number}: with the knowledge {found['with']['hits']} of {found['with']['of']} "
          f"games are passed, without it {found['without']['hits']}; "
          'config.consolidation.on_no_gain is "stop": take "warn" or "skip", or better knowledge'
        )
    return found["decision"] != "skip"

  def consolidate(self, number: int, policy: Policy, texts: Sequence[str]) -> Any:
    """Trains the knowledge into the weights; returns the new parameters. From the round's folder it
    reads prompts.jsonl alone.
    """
    config = self.config.consolidation
    task = task_lib.make_task(
      policy.tokenizer,
      read_prompts(self._prompts(number), max_damaged=0.0),
      texts,
      seed=self.config.seed,
      round=number,
      thinking=self.config.policy.thinking,
      limit=self.config.policy.max_prompt_tokens,
    )
    with self._stage(number, "consolidate", policy, config.steps) as (meter, advance):
      params, cost = trainer.consolidate(
        config,
        task,
        policy,
        limit=self.config.deployment.max_response_tokens,
        directory=self._round(number) / "checkpoints",
        mesh=self.mesh,
        metrics=self.metrics,
        advance=advance,
      )
      meter.tokens, meter.flops = int(cost["tokens"]), cost["flops"]
    self._note_trained(number, params)
    return params

  def _note_trained(self, number: int, params: Any) -> None:
    """Enters steps and weights of the finished training into the manifest, after a look at what
    stood there.
    """
    now = {"steps": str(self.config.consolidation.steps), "weights": fingerprint(params)}
    before = self._manifest(number).made_from(TRAINED)
    if before and before["steps"] == now["steps"] and before["weights"] != now["weights"]:
      logging.warning(
        "round %d: trained again, to other weights than before (%s, now %s)",
        number,
        before["weights"],
        now["weights"],
      )
    self._manifest(number).announce(TRAINED, now)

  def evaluate(self, number: int, policy: Policy, before: Policy, texts: Sequence[str]) -> None:
    """Plays the held-out maps, the same in every round, without knowledge and with it; measures
    what was kept. Writes evaluation.json.
    """
    path, config = self._round(number) / "evaluation.json", self.config.evaluation
    first = (
      self._said(self._knowledge(1), self._round(1))
      if number > 1 and config.in_context and texts
      else []
    )
    gate = self._gate(number)
    base = None
    if number:  # the round before, whose policy wrote this round's knowledge; not the run's first
      measured = self._round(number - 1) / "evaluation.json"
      base = records.read_evaluation(measured, number - 1).without.passed.value
    made_from = _made_from(policy, texts) | {
      "weights before": fingerprint(before.params),
      "first knowledge": schema.digest(first),
      "gate": schema.digest(gate and gate["decision"]),
      "base": schema.digest(base),
      "settings": self._settings(all_of_it=True),
    }
    if path.exists():
      measured = records.read_evaluation(path, number).made_from
      changed = [name for name in made_from if measured and measured.get(name) != made_from[name]]
      if not changed:
        return
      files.set_aside(path, f"it was measured with other {', '.join(changed)}")
    result = {"schema": 1, "round": number, "made_from": made_from}
    # What is played: a name, by whom, and with which knowledge in the prompt.
    plays = {"without": (policy, [])}
    if config.in_context and texts:
      plays |= {"in_context": (before, texts), "after_in_context": (policy, texts)}
      plays |= {"first_knowledge": (policy, first)} if first else {}
    steps = config.accumulation if number == 1 else ()
    curve = {step: self._knowledge_at(step, before) for step in steps}
    kept = tasks.read_tasks(config.tasks)
    total = config.episodes * (len(plays) + len(curve)) + len(kept) * config.retention
    with self._stage(number, "evaluate", policy, total) as (meter, advance):
      for name, (player, given) in plays.items():
        meter.policy = player
        result[name] = episodes.play_summary(
          self._play_held_out(number, name, meter, given, advance)
        )
      result["accumulation"] = []
      for step, given in curve.items():
        meter.policy = before
        passed = episodes.play_summary(
          self._play_held_out(number, f"after_{step:03d}_trajectories", meter, given, advance)
        )["passed"]
        result["accumulation"].append({"trajectories": step, "passed": passed})
      meter.policy = policy
      seed = derive(self.config.seed, "retention")
      result["retention"] = tasks.measure(kept, meter, config.retention, seed=seed, advance=advance)
    if number and "in_context" in result:
      result["recovered"] = statistics.recovered(
        result["without"]["passed"]["rate"], base, result["in_context"]["passed"]["rate"]
      )
    result["gate"] = gate
    scalars = {f"passed_{name}": result[name]["passed"]["rate"] for name in plays}
    scalars |= {f"retention_{name}": share["rate"] for name, share in result["retention"].items()}
    self._log(
      number, "evaluate", response_tokens=result["without"]["response_tokens"]["mean"], **scalars
    )
    files.write_sealed(path, result)

  # What the stages share.

  def _log(self, number: int, stage: str, **scalars: float) -> None:
    """A stage's main numbers, for metrics.jsonl and TensorBoard; before its last file, so that a
    kill leaves neither or has both made anew.
    """
    self.metrics.drop_after(number, stage, -1)
    self.metrics.write(stage, 0, round=number, at=number, **scalars)

  def _log_play(self, number: int, stage: str, trajectories: Sequence[Conversation]) -> None:
    played = episodes.play_summary(trajectories)
    self._log(
      number,
      stage,
      passed=played["passed"]["rate"],
      response_tokens=played["response_tokens"]["mean"],
    )

  def _gate(self, number: int) -> dict[str, Any] | None:
    """What gate.json says, and the decision that follows from it under the present `on_no_gain`;
    None without a gate.
    """
    path = self._round(number) / "gate.json"
    if not path.exists():
      return None
    found = {
      name: value
      for name, value in records.read_gate(path).items()
      if name not in ("made_from", schema.DIGEST)
    }
    gain = found["with"]["rate"] - found["without"]["rate"]
    skips = self.config.consolidation.on_no_gain == "skip" and gain < 0
    return found | {"decision": "train" if gain > 0 else "skip" if skips else "warn"}

  def _said(self, texts: list[knowledge_lib.Knowledge], folder: pathlib.Path) -> list[str]:
    """The texts to put into prompts: those that say something, or the empty wrapper where that is
    the point.
    """
    return (
      [EMPTY]
      if self.config.extraction.source == "empty"
      else [text.text for text in knowledge_lib.nonempty(texts, folder)]
    )

  def _round(self, number: int) -> pathlib.Path:
    return self.folder / f"round_{number}"

  def _prompts(self, number: int) -> pathlib.Path:
    """Where the round's prompts are, or are to be."""
    old = self._round(number) / OLD_PROMPTS
    return old if old.exists() else self._round(number) / PROMPTS

  def _sampling(self, stage: str) -> Sampling:
    config = self.config[stage]
    return Sampling(config.temperature, config.top_p, config.top_k)

  def _manifest(self, number: int) -> Manifest:
    return Manifest(self._round(number))

  def _refuse_other_weights(self, number: int, policy: Policy) -> None:
    """Raises ValueError if the round's games or knowledge were made by, or from, something else
    than the run now has.
    """
    manifest, weights = self._manifest(number), fingerprint(policy.params)
    for name in (DEPLOYED, PROMPT_GAMES, PROMPTS, OLD_PROMPTS, "knowledge/00.jsonl"):
      made_from = manifest.made_from(name)
      if made_from is None:
        continue
      now = {"weights": weights} | {
        file: files.sha256(self._round(number) / file)[:16]
        for file in made_from
        if (self._round(number) / file).is_file()
      }
      if number > 1 and "previous knowledge" in made_from:
        now["previous knowledge"] = schema.digest(
          [text.text for text in self._knowledge(number - 1)]
        )
      changed = [key for key in manifest.changed(name, made_from | now)]
      if changed:
        raise ValueError(
          f"{self._round(number) / name}: made from other {', '.join(changed)} than round {number} "
          "has now: give the configuration that it "
          f"was made with, choose another --workdir, or remove the folders round_{number} and "
          "later ones to have these rounds done again"
        )

  def _refuse_other_gate(self, path: pathlib.Path, policy: Policy, texts: Sequence[str]) -> None:
    """Raises ValueError if gate.json compares play with other weights or knowledge than the
    round's.
    """
    before, now = records.read_gate(path).get("made_from"), _made_from(policy, texts)
    changed = [name for name in now if before and before.get(name) != now[name]]
    if changed:
      raise ValueError(
        f"{path}: measured with other {', '.join(changed)} than the round has now: remove the "
        "round's folder, and later ones, "
        "to have these rounds done again, or choose another --workdir"
      )

  def _settings(self, all_of_it: bool = False) -> str:
    """A digest of the configuration that held-out games depend on; of all that evaluation.json
    depends on, too.
    """
    config = json.loads(self.config.to_json())
    evaluation = config["evaluation"]
    if not all_of_it:
      evaluation = {
        name: value
        for name, value in evaluation.items()
        if name not in ("in_context", "accumulation", "tasks", "retention")
      }
    # How the prompts of training were sampled says nothing about held-out games.
    game = {
      name: value
      for name, value in config["deployment"].items()
      if name not in ("episodes", "slots", "temperature", "top_p", "top_k")
    }
    return schema.digest(
      [
        config["seed"],
        evaluation,
        game,
        config["policy"]["thinking"],
        config["policy"]["max_prompt_tokens"],
      ]
    )

  def _play(
    self, number, name, meter, ids, sampling, advance, texts=(), held_out=False
  ) -> list[Conversation]:
    """Plays the episodes of (id, stage, index) into the file `name`, each with one of the texts by
    lot if there are any.

    The round has no part in the draws of held-out games: game i has the same map and the same
    random stream in every round, with knowledge and without. Streams in common lower the noise of a
    comparison; they do not remove it.

    A file of held-out games that were played with other weights, knowledge or settings is set
    aside; another such file is refused.
    """
    path, manifest = self._round(number) / name, self._manifest(number)
    made_from = _made_from(meter, texts) | ({"settings": self._settings()} if held_out else {})
    changed = manifest.changed(name, made_from)
    if changed and not held_out:
      raise ValueError(
        f"{path}: played with other {', '.join(changed)} than the round has now: remove it, and it "
        "is played again"
      )
    for file in (path, path.with_name(f"{path.name}.partial")) if changed else ():
      files.set_aside(file, f"it was played with other {', '.join(changed)}")
    manifest.announce(name, made_from)
    result = self._play_episodes(path, meter, number, ids, sampling, advance, texts, held_out)
    manifest.record([name], made_from)
    return result

  def _play_episodes(
    self, path, policy, number, ids, sampling, advance, texts, held_out
  ) -> list[Conversation]:
    config = self.config.deployment
    episodes = []
    for name, stage, i in ids:
      draw = functools.partial(
        derive, self.config.seed, *((stage,) if held_out else (number, stage))
      )
      given = texts[draw("text", i) % len(texts)] if texts else ""
      episodes.append(Episode(name, draw("map", i) & ~1 | held_out, draw("sample", i), given))
    done = 0

    def tell(finished: int) -> None:
      nonlocal done
      advance(finished - done)
      done = finished

    return play_to_file(
      path,
      policy,
      game_spec(config),
      episodes=episodes,
      slots=config.slots,
      advance=tell,
      sampling=sampling,
      max_response_tokens=config.max_response_tokens,
      max_prompt_tokens=self.config.policy.max_prompt_tokens,
      thinking=self.config.policy.thinking,
    )

  def _play_held_out(self, number, name, policy, texts, advance) -> list[Conversation]:
    file = "user/evaluation.jsonl" if name == "without" else f"user/evaluation_{name}.jsonl"
    ids = [
      (f"r{number}-{name}-{i:05d}", "held out", i) for i in range(self.config.evaluation.episodes)
    ]
    return self._play(
      number, file, policy, ids, self._sampling("evaluation"), advance, texts, held_out=True
    )

  def _knowledge(self, number: int) -> list[knowledge_lib.Knowledge]:
    """The round's K texts as they lie on the disk; [] if they are not all there."""
    folder, count = self._round(number) / "knowledge", self.config.extraction.texts
    return (
      [knowledge_lib.read(folder, i) for i in range(count)] if (folder / "whole").exists() else []
    )

  def _write_knowledge(
    self, number: int, policy: Policy, trajectories: list[Conversation]
  ) -> list[knowledge_lib.Knowledge]:
    config, folder = self.config.extraction, self._round(number) / "knowledge"
    with self._stage(number, "extract", policy, config.trajectories) as (meter, advance):
      whole = self._accumulate(number, meter, trajectories, advance)
    texts = self._limited(whole, config.use, policy)
    for i, text in enumerate(texts):
      knowledge_lib.write(folder, i, text)
    made_from = {
      "weights": fingerprint(policy.params),
      DEPLOYED: files.sha256(self._round(number) / DEPLOYED)[:16],
    }
    if config.start_from == "previous_round" and number > 1:
      made_from["previous knowledge"] = schema.digest(
        [text.text for text in self._knowledge(number - 1)]
      )
    names = [f"knowledge/{i:02d}.{kind}" for i in range(len(texts)) for kind in ("jsonl", "md")]
    self._manifest(number).record(names, made_from)
    self._log_play(number, "deploy", trajectories)
    self._log(number, "extract", items=sum(len(text.items) for text in texts) / len(texts))
    files.write_text(folder / "whole", "")  # the last file to appear
    return texts

  def _knowledge_at(self, step: int, policy: Policy) -> list[str]:
    """Round 1's texts as they stood after `step` trajectories; read back from the accumulation,
    nothing is sampled. `policy` is the one that wrote them.
    """
    whole = self._accumulate(
      1, policy, read_conversations(self._round(1) / DEPLOYED, max_damaged=0.0), lambda n: None
    )
    return [text.text for text in self._limited(whole, step, policy) if text.text] or [EMPTY]

  def _limited(
    self, whole: list[knowledge_lib.Knowledge], step: int, policy: Policy
  ) -> list[knowledge_lib.Knowledge]:
    """The accumulations as they stood after `step` trajectories, within max_knowledge_tokens, and
    edited if config.extraction.edit says so.
    """
    config = self.config.extraction
    count = lambda text: len(policy.tokenizer.encode(text))
    texts = knowledge_lib.as_of(
      whole, step, max_tokens=config.max_knowledge_tokens, count_tokens=count
    )
    edit = _read_edit(self.config)
    return [_edited(text, edit) for text in texts] if edit else texts

  def _accumulate(
    self, number: int, policy: Any, trajectories: list[Conversation], advance: Callable[[int], None]
  ) -> list[knowledge_lib.Knowledge]:
    """All that the K texts gathered in a round, before the limit; sampled once, then read back from
    user/extraction.jsonl.
    """
    config = self.config.extraction
    if config.source == "trajectories":
      return raw_knowledge(trajectories, texts=config.texts, seed=self.config.seed, round=number)
    if config.source == "empty":
      return [knowledge_lib.Knowledge()] * config.texts
    carried = (
      self._knowledge(number - 1) if config.start_from == "previous_round" and number > 1 else None
    )
    return extract(
      policy,
      trajectories,
      texts=config.texts,
      form=config.form,
      see_previous=config.see_previous,
      sampling=self._sampling("extraction"),
      max_response_tokens=config.max_response_tokens,
      max_knowledge_tokens=config.max_knowledge_tokens,
      max_prompt_tokens=self.config.policy.max_prompt_tokens,
      seed=self.config.seed,
      round=number,
      thinking=self.config.policy.thinking,
      start=carried,
      state_path=self._round(number) / "user/extraction.jsonl",
      weights=fingerprint(policy.params),
      advance=advance,
    )

  @contextlib.contextmanager
  def _stage(
    self, number: int, name: str, policy: Policy, total: int
  ) -> Iterator[tuple[Meter, Callable[..., None]]]:
    """A stage's progress bar, its meter, and an entry in the round's cost.json, one for each
    process that came to its end.
    """
    meter, started = Meter(policy), time.monotonic()
    title = f"round {number}: {name}" if number else f"base: {name}"
    # The first games, and each round's training step, are programs that no stage before has made.
    first = "compiling" if not number or name == "consolidate" else ""
    with progress.bar(title, total, first) as advance:
      yield meter, advance
    if meter.tokens:
      path = self._round(number) / "cost.json"
      spent = files.read_json(path, records.costs)["stages"] if path.exists() else []
      spent.append(
        {
          "stage": name,
          "seconds": time.monotonic() - started,
          "tokens": meter.tokens,
          "flops": meter.flops,
        }
      )
      files.write_sealed(path, {"schema": 1, "stages": spent})


def _read_edit(config: Any) -> Callable[[str], str] | None:
  name = config.extraction.edit
  return named.function(name, "config.extraction.edit") if name else None


def _edited(text: knowledge_lib.Knowledge, edit: Callable[[str], str]) -> knowledge_lib.Knowledge:
  """The round's own items edited; those carried over were edited when they were new."""
  own = lambda item: item.step != knowledge_lib.CARRIED
  return knowledge_lib.Knowledge(
    tuple(dataclasses.replace(i, text=edit(i.text)) if own(i) else i for i in text.items)
  )


def _made_from(policy: Policy, texts: Sequence[str]) -> dict[str, str]:
  """What games are played with, for manifest.json and the like."""
  return {"weights": fingerprint(policy.params), "knowledge": schema.digest(list(texts))}


def _compare_prompts(path: pathlib.Path, games: pathlib.Path) -> None:
  """Raises ValueError unless the prompts are those of the turns of those games, all of them and in
  order.
  """
  found = read_prompts(path, max_damaged=0.0)
  right = [
    prompt for game in read_conversations(games, max_damaged=0.0) for prompt in cut_prompts(game)
  ]
  place = next(
    (i for i, (a, b) in enumerate(zip(found, right)) if a != b), min(len(found), len(right))
  )
  if found != right:
    has, wants = (side[place].id if place < len(side) else "nothing" for side in (found, right))
    raise ValueError(
      f"{path}: its {len(found)} prompts are not the {len(right)} of {games}: number {place + 1} "
      f"is {has}, and must be {wants}; "
      f"restore the file that is wrong, or remove {path.name} to have it made again"
    )
