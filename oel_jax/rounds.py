"""The online loop: deploy → extract → consolidate → evaluate, round after round (OEL section 3).

Each stage leaves whole files or none, a stage found whole is not done again, and every draw is named by (seed, round, stage, index), or by
all but the round for held-out games: a run that is killed at any moment goes on when the same command is given, and ends with the same bits
on one machine.

Maps come from seeds: held-out maps have odd ones, every other stage has even ones. This keeps the seeds apart, not the boards: of the
default game's, 3 × 3 with two holes, there are only 19, and a held-out one comes up in the other stages, too, under another seed.
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
import jax.numpy as jnp
from absl import logging

from oel_jax import choices, report
from oel_jax import config as config_lib
from oel_jax.consolidation import train
from oel_jax.deployment.games import game_spec, open_game
from oel_jax.deployment.play import Episode, play_to_file
from oel_jax.evaluation import evaluate, statistics
from oel_jax.extraction import knowledge as knowledge_lib
from oel_jax.extraction.extract import extract, raw_knowledge
from oel_jax.pocket import claims
from oel_jax.pocket import load as pocket
from oel_jax.policy import architecture, huggingface, model, weights
from oel_jax.policy.generate import Policy, Reply, Sampling
from oel_jax.policy.tokenizer import HuggingFaceTokenizer
from oel_jax.runtime import files, mesh, progress
from oel_jax.runtime.metrics import Metrics
from oel_jax.runtime.seeds import derive
from oel_jax.runtime.workdir import locked, open_workdir
from oel_jax.trajectory import EMPTY, Trajectory, prefixes, read_prefixes, read_trajectories, write_jsonl


def run(config: Any, workdir: str, *, resume_anyway: bool = False) -> dict[str, Any]:
  """Runs all rounds in `workdir`, going on with what is there, and writes the report.

  Returns what report/results.json holds.

  Raises:
    ValueError: the configuration is wrong or differs from the run's; no knowledge came out; or on_no_gain = "stop" and there was no gain.
    OSError: another process runs in `workdir`, or it cannot be written.
  """
  config_lib.validate(config)
  # What can be wrong with the configuration shows here, before the directory belongs to it.
  devices = mesh.make_mesh(config.mesh)
  policy = load_policy(config.policy, devices)
  train.unroll(config.consolidation, policy, devices)
  open_game(game_spec(config.deployment), 0)
  folder = open_workdir(config, workdir, resume_anyway)
  most = dict(texts=config.extraction.texts, tokens=config.extraction.max_knowledge_tokens)
  chosen = choices.choose(config, policy, devices, **most, exact=False)
  with locked(folder), Metrics(folder) as metrics:
    choices.tell(folder, chosen)
    loop = Loop(config, folder, metrics, devices)
    loop.evaluate(0, policy, policy, [])
    for number in range(1, config.rounds + 1):
      texts = loop.extract(number, policy)
      loop.collect_prefixes(number, policy)
      before = policy
      if loop.gate(number, policy, texts):
        policy = policy.replace(loop.consolidate(number, policy, texts))
      loop.evaluate(number, policy, before, texts)
    results = report.write(folder)
  progress.table(report.rows(results), f"{config.deployment.game}, {config.rounds} rounds")
  print(f"report: {folder / 'report' / 'index.html'}", flush=True)
  return results


def load_policy(config: Any, devices: jax.sharding.Mesh) -> Policy:
  """The policy that config.policy names, its parameters in float32 and placed as training leaves them.

  Raises:
    ValueError: no such weights, or damaged ones; or they are of another architecture than config.policy.architecture; or too small for the
      tokenizer, which shows before they are read.
    OSError: a file is missing in the folder.
  """
  dtype = config.compute_dtype
  if dtype == "auto":
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  if config.weights is None:
    raise ValueError('config.policy.weights is not set: it must be a Hugging Face folder, a .gguf file, a .safetensors file of ours, or "pocket"')
  path = pathlib.Path(config.weights).expanduser()
  if path.is_dir():
    shape, tokenizer = huggingface.read_architecture(path), HuggingFaceTokenizer.from_folder(path)
    read = functools.partial(huggingface.load, path, shape)
  elif path.suffix == ".gguf":
    from oel_jax.policy import gguf  # here, for it needs packages of the extra "hf"

    file = gguf.read(path)
    shape, tokenizer = gguf.read_architecture(file), HuggingFaceTokenizer(gguf.tokenizer(file))
    read = functools.partial(gguf.load, file, shape)
  else:
    return _load_own(config, path, devices, jnp.dtype(dtype))
  _agree(config, shape, tokenizer)
  return Policy(shape, read(shardings=mesh.param_shardings(devices, model.abstract(shape))), tokenizer, jnp.dtype(dtype))


def _load_own(config: Any, path: pathlib.Path, devices: jax.sharding.Mesh, dtype: Any) -> Policy:
  """The embedded policy, or a file of ours with its vocabulary."""
  policy = pocket.load(dtype)
  if config.weights != "pocket":
    if not path.is_file():
      raise ValueError(f"config.policy.weights is {config.weights!r}: there is no such file or folder")
    name = weights.metadata(path).get("architecture") if config.architecture == "auto" else config.architecture
    if name is None:
      raise ValueError(f'config.policy.architecture is "auto", but {path} does not say its own: give a name of policy/architecture.py')
    shape = architecture.named(name)
    policy = dataclasses.replace(policy, architecture=shape, params=weights.load(path, shape))
  _agree(config, policy.architecture, policy.tokenizer)
  # To jit, host arrays are not what training leaves: every program would be compiled again after round 1.
  return policy.replace(jax.device_put(policy.params, mesh.param_shardings(devices, policy.params)))


def _agree(config: Any, shape: architecture.Architecture, tokenizer: Any) -> None:
  """Raises ValueError if the weights are of another architecture than the configuration names, or lack ids of the tokenizer."""
  if config.architecture != "auto" and architecture.named(config.architecture) != shape:
    raise ValueError(f'config.policy.architecture is {config.architecture!r}, but {config.weights} holds {shape}: it must be "auto" or fit')
  if tokenizer.vocabulary > shape.vocabulary:  # before the weights are read, which takes minutes (traps, 16)
    raise ValueError(
        f"config.policy.weights is {config.weights!r}: its tokenizer has {tokenizer.vocabulary} ids but its weights only "
        f"{shape.vocabulary} rows: tokenizer and weights must be of one model, with a row for each id"
    )


@dataclasses.dataclass
class Meter:
  """A policy that counts what it writes, and the work, as if every prompt were read whole; the stages cannot tell it from the policy."""

  policy: Policy
  tokens: int = 0
  flops: float = 0.0

  @property
  def tokenizer(self) -> Any:
    return self.policy.tokenizer

  def sample(
      self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, reply: Reply | None = None, **how: Any
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
    self.flops += 2.0 * sum(leaf.size for leaf in jax.tree.leaves(self.policy.params)) * (len(prompt) + len(sampled))


@dataclasses.dataclass(frozen=True)
class Loop:
  """The stages of a run, each of which reads and writes its own files below `folder`/round_N."""

  config: Any
  folder: pathlib.Path
  metrics: Metrics
  mesh: jax.sharding.Mesh

  def extract(self, number: int, policy: Policy) -> list[str]:
    """Deploys the policy for trajectories and lets it write down what they teach; returns the K texts of the round."""
    config, folder = self.config.extraction, self._round(number)
    with self._stage(number, "deploy", policy, config.trajectories) as (meter, advance):
      ids = [(f"r{number}-deploy-{i:05d}", "deploy", i) for i in range(config.trajectories)]
      trajectories = self._play(folder / "user/trajectories.jsonl", meter, number, ids, self._sampling("deployment"), advance)
    texts = self._knowledge(number)
    if not texts:
      texts = self._write_knowledge(number, policy, trajectories)
    return self._said(texts, folder)

  def collect_prefixes(self, number: int, policy: Policy) -> None:
    """Deploys the policy once more, on other maps; the prompts of its turns are all that goes to the server side."""
    path, count = self._round(number) / "prefixes.jsonl", self.config.deployment.episodes
    if path.exists():
      return
    with self._stage(number, "prefixes", policy, count) as (meter, advance):
      ids = [(f"r{number}-prefix-{i:05d}", "prefixes", i) for i in range(count)]
      played = self._play(self._round(number) / "user/prefix_trajectories.jsonl", meter, number, ids, self._sampling("deployment"), advance)
      self._log_play(number, "prefixes", played)
      write_jsonl(path, [prefix for trajectory in played for prefix in prefixes(trajectory)])

  def gate(self, number: int, policy: Policy, texts: Sequence[str]) -> bool:
    """Plays with the knowledge and without, on the same maps, before anything is trained on it. Returns whether to train.

    Without gain, `on_no_gain` = "warn" trains all the same, "stop" raises ValueError, and "skip" leaves the weights as they are if play
    with knowledge is worse.
    """
    path, count = self._round(number) / "gate.json", self.config.consolidation.gate_episodes
    if count and not path.exists():
      passed = {}
      with self._stage(number, "gate", policy, 2 * count) as (meter, advance):
        for name, given in (("without", []), ("with", texts)):
          ids = [(f"r{number}-gate-{i:05d}", "gate", i) for i in range(count)]
          file = self._round(number) / f"user/gate_{name}.jsonl"
          played = self._play(file, meter, number, ids, self._sampling("evaluation"), advance, given)
          passed[name] = statistics.count(sum(trajectory.passed for trajectory in played), len(played))
      self._log(number, "gate", **{f"passed_{name}": counted["rate"] for name, counted in passed.items()})
      files.write_json(path, {"schema": 1, **passed})
    if not count:
      return True
    found = self._gate(number)
    if found["decision"] != "train":
      logging.warning(
          "round %d: no gain from the knowledge: %d of %d passed with it, %d without: %s", number, found["with"]["hits"], count,
          found["without"]["hits"], "not consolidated" if found["decision"] == "skip" else "consolidated all the same",
      )  # fmt: skip
      if self.config.consolidation.on_no_gain == "stop":
        report.write(self.folder)
        raise ValueError(
            f"round {number}: with the knowledge {found['with']['hits']} of {count} games are passed, without it {found['without']['hits']}; "
            'config.consolidation.on_no_gain is "stop": take "warn" or "skip", or better knowledge'
        )
    return found["decision"] != "skip"

  def consolidate(self, number: int, policy: Policy, texts: Sequence[str]) -> Any:
    """Trains the knowledge into the weights; returns the new parameters. From the round's folder it reads prefixes.jsonl alone."""
    config = self.config.consolidation
    task = train.make_task(
        policy.tokenizer, read_prefixes(self._round(number) / "prefixes.jsonl"), texts, seed=self.config.seed, round=number,
        thinking=self.config.policy.thinking, limit=self.config.policy.max_prompt_tokens,
    )  # fmt: skip
    with self._stage(number, "consolidate", policy, config.steps) as (meter, advance):
      params, cost = train.consolidate(
          config, task, policy, limit=self.config.deployment.max_response_tokens, directory=self._round(number) / "checkpoints",
          mesh=self.mesh, metrics=self.metrics, advance=advance,
      )  # fmt: skip
      meter.tokens, meter.flops = int(cost["tokens"]), cost["flops"]
    return params

  def evaluate(self, number: int, policy: Policy, before: Policy, texts: Sequence[str]) -> None:
    """Plays the held-out maps, the same in every round, without knowledge and with it; measures what was kept. Writes evaluation.json."""
    path = self._round(number) / "evaluation.json"
    if path.exists():
      return
    config, result = self.config.evaluation, {"schema": 1, "round": number}
    # What is played: a name, by whom, and with which knowledge in the prompt.
    plays = {"without": (policy, [])}
    if config.in_context and texts:
      first = self._said(self._knowledge(1), self._round(1)) if number > 1 else []
      plays |= {"in_context": (before, texts), "after_in_context": (policy, texts)}
      plays |= {"first_knowledge": (policy, first)} if first else {}
    curve = {step: self._knowledge_at(step, policy) for step in config.accumulation} if number == 1 else {}
    total = config.episodes * (len(plays) + len(curve)) + len(evaluate.RETENTION) * config.retention
    with self._stage(number, "evaluate", policy, total) as (meter, advance):
      for name, (player, given) in plays.items():
        meter.policy = player
        result[name] = evaluate.play_summary(self._play_held_out(number, name, meter, given, advance))
      result["accumulation"] = []
      for step, given in curve.items():
        meter.policy = before
        passed = evaluate.play_summary(self._play_held_out(number, f"after_{step:03d}_trajectories", meter, given, advance))["passed"]
        result["accumulation"].append({"trajectories": step, "passed": passed})
      meter.policy = policy
      result["retention"] = evaluate.retention(meter, config.retention, seed=derive(self.config.seed, "retention"), advance=advance)
    if number and "in_context" in result:
      # The base is the round before, whose policy wrote this round's knowledge; not the policy that the run began with.
      base = _read_json(self._round(number - 1) / "evaluation.json")["without"]["passed"]["rate"]
      result["recovered"] = statistics.recovered(result["without"]["passed"]["rate"], base, result["in_context"]["passed"]["rate"])
    result["gate"] = self._gate(number)
    scalars = {f"passed_{name}": result[name]["passed"]["rate"] for name in plays}
    scalars |= {f"retention_{name}": kept["rate"] for name, kept in result["retention"].items()}
    self._log(number, "evaluate", response_tokens=result["without"]["response_tokens"]["mean"], **scalars)
    files.write_json(path, result)

  # What the stages share.

  def _log(self, number: int, stage: str, **scalars: float) -> None:
    """A stage's main numbers, for metrics.jsonl and TensorBoard; before its last file, so that a kill leaves neither or has both made anew."""
    self.metrics.drop_after(number, stage, -1)
    self.metrics.write(stage, 0, round=number, **scalars)

  def _log_play(self, number: int, stage: str, trajectories: Sequence[Trajectory]) -> None:
    played = evaluate.play_summary(trajectories)
    self._log(number, stage, passed=played["passed"]["rate"], response_tokens=played["response_tokens"]["mean"])

  def _gate(self, number: int) -> dict[str, Any] | None:
    """What gate.json says, and the decision that follows from it under the present `on_no_gain`; None without a gate."""
    path = self._round(number) / "gate.json"
    if not path.exists():
      return None
    found = _read_json(path)
    gain = found["with"]["rate"] - found["without"]["rate"]
    skips = self.config.consolidation.on_no_gain == "skip" and gain < 0
    return found | {"decision": "train" if gain > 0 else "skip" if skips else "warn"}

  def _said(self, texts: list[knowledge_lib.Knowledge], folder: pathlib.Path) -> list[str]:
    """The texts to put into prompts: those that say something, or the empty wrapper where that is the point."""
    return [EMPTY] if self.config.extraction.source == "empty" else [text.text for text in knowledge_lib.nonempty(texts, folder)]

  def _round(self, number: int) -> pathlib.Path:
    return self.folder / f"round_{number}"

  def _sampling(self, stage: str) -> Sampling:
    config = self.config[stage]
    return Sampling(config.temperature, config.top_p, config.top_k)

  def _play(self, path, policy, number, ids, sampling, advance, texts=(), held_out=False) -> list[Trajectory]:
    """Plays the episodes of (id, stage, index), each with one of the texts by lot if there are any.

    The round has no part in the draws of held-out games: game i has the same map and the same random stream in every round, with knowledge
    and without. Streams in common lower the noise of a comparison; they do not remove it.
    """
    config = self.config.deployment
    episodes = []
    for name, stage, i in ids:
      draw = functools.partial(derive, self.config.seed, *((stage,) if held_out else (number, stage)))
      given = texts[draw("text", i) % len(texts)] if texts else ""
      episodes.append(Episode(name, draw("map", i) & ~1 | held_out, draw("sample", i), given))
    done = 0

    def tell(finished: int) -> None:
      nonlocal done
      advance(finished - done)
      done = finished

    return play_to_file(
        path, policy, game_spec(config), episodes=episodes, slots=config.slots, advance=tell, sampling=sampling,
        max_response_tokens=config.max_response_tokens, max_prompt_tokens=self.config.policy.max_prompt_tokens,
        thinking=self.config.policy.thinking,
    )  # fmt: skip

  def _play_held_out(self, number, name, policy, texts, advance) -> list[Trajectory]:
    path = self._round(number) / "user" / ("evaluation.jsonl" if name == "without" else f"evaluation_{name}.jsonl")
    ids = [(f"r{number}-{name}-{i:05d}", "held out", i) for i in range(self.config.evaluation.episodes)]
    return self._play(path, policy, number, ids, self._sampling("evaluation"), advance, texts, held_out=True)

  def _knowledge(self, number: int) -> list[knowledge_lib.Knowledge]:
    """The round's K texts as they lie on the disk; [] if they are not all there."""
    folder, count = self._round(number) / "knowledge", self.config.extraction.texts
    return [knowledge_lib.read(folder, i) for i in range(count)] if (folder / "whole").exists() else []

  def _write_knowledge(self, number: int, policy: Policy, trajectories: list[Trajectory]) -> list[knowledge_lib.Knowledge]:
    config, folder = self.config.extraction, self._round(number) / "knowledge"
    with self._stage(number, "extract", policy, config.trajectories) as (meter, advance):
      whole = self._accumulate(number, meter, trajectories, advance)
    texts = self._limited(whole, config.use, policy)
    for i, text in enumerate(texts):
      knowledge_lib.write(folder, i, text)
    self._log_play(number, "deploy", trajectories)
    self._log(number, "extract", items=sum(len(text.items) for text in texts) / len(texts))
    files.write_text(folder / "whole", "")  # the last file to appear
    return texts

  def _knowledge_at(self, step: int, policy: Policy) -> list[str]:
    """Round 1's texts as they stood after `step` trajectories; read back from the accumulation, nothing is sampled."""
    whole = self._accumulate(1, policy, read_trajectories(self._round(1) / "user/trajectories.jsonl"), lambda n: None)
    return [text.text for text in self._limited(whole, step, policy) if text.text] or [EMPTY]

  def _limited(self, whole: list[knowledge_lib.Knowledge], step: int, policy: Policy) -> list[knowledge_lib.Knowledge]:
    """The accumulations as they stood after `step` trajectories, within max_knowledge_tokens; roles exchanged for the control "swapped"."""
    config = self.config.extraction
    count = lambda text: len(policy.tokenizer.encode(text))
    texts = knowledge_lib.as_of(whole, step, max_tokens=config.max_knowledge_tokens, count_tokens=count)
    return [_swapped(text) for text in texts] if config.source == "swapped" else texts

  def _accumulate(
      self, number: int, policy: Any, trajectories: list[Trajectory], advance: Callable[[int], None]
  ) -> list[knowledge_lib.Knowledge]:
    """All that the K texts gathered in a round, before the limit; sampled once, then read back from user/extraction.json."""
    config = self.config.extraction
    if config.source == "trajectories":
      return raw_knowledge(trajectories, texts=config.texts, seed=self.config.seed, round=number)
    if config.source == "empty":
      return [knowledge_lib.Knowledge()] * config.texts
    carried = self._knowledge(number - 1) if config.start_from == "previous_round" and number > 1 else None
    return extract(
        policy, trajectories, texts=config.texts, form=config.form, see_previous=config.see_previous, sampling=self._sampling("extraction"),
        max_response_tokens=config.max_response_tokens, max_knowledge_tokens=config.max_knowledge_tokens,
        max_prompt_tokens=self.config.policy.max_prompt_tokens, seed=self.config.seed, round=number, thinking=self.config.policy.thinking,
        start=carried, state_path=self._round(number) / "user/extraction.json", advance=advance,
    )  # fmt: skip

  @contextlib.contextmanager
  def _stage(self, number: int, name: str, policy: Policy, total: int) -> Iterator[tuple[Meter, Callable[[int], None]]]:
    """A stage's progress bar, its meter, and an entry in the round's cost.json, one for each process that came to its end."""
    meter, started = Meter(policy), time.monotonic()
    with progress.bar(f"round {number}: {name}" if number else f"base: {name}", total) as advance:
      yield meter, advance
    if meter.tokens:
      path = self._round(number) / "cost.json"
      spent = _read_json(path)["stages"] if path.exists() else []
      spent.append({"stage": name, "seconds": time.monotonic() - started, "tokens": meter.tokens, "flops": meter.flops})
      files.write_json(path, {"schema": 1, "stages": spent})


def _swapped(text: knowledge_lib.Knowledge) -> knowledge_lib.Knowledge:
  """Goal and trap exchanged in the round's own items; those carried over were exchanged when they were new."""
  own = lambda item: item.step != knowledge_lib.CARRIED
  return knowledge_lib.Knowledge(tuple(dataclasses.replace(i, text=claims.swap_roles(i.text)) if own(i) else i for i in text.items))


def _read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path}: damaged ({error}): remove the file to have it made again") from error
