"""What the stages of a run share: where its files are, what they were made from, its metrics, and
what each stage costs.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from oel_jax import config as config_lib
from oel_jax.policy.sampling.sampler import Policy, Reply, Sampling
from oel_jax.report import gates, records
from oel_jax.runtime import files, mirror, progress, schema
from oel_jax.runtime.checksum import fingerprint
from oel_jax.runtime.manifest import Manifest
from oel_jax.runtime.metrics import Metrics

# Files of a round, below its folder.
DEPLOYED = "user/trajectories.jsonl"  # games that the knowledge is drawn from
PROMPT_GAMES = "user/prefix_trajectories.jsonl"  # games that the prompts are cut from
LOGS = "user/logs.json"  # what was found in the logs that the round began from
USERS = "user/users.json"  # whose conversations the round's logs gave it
HELD_OUT = "user/held_out.jsonl"  # prompts of conversations that are measured on alone
ANSWERS = {  # to the first of these, by what the round began with and by what it made
  "before": "user/held_out_before.jsonl",
  "after": "user/held_out_after.jsonl",
}
PROMPTS = "prompts.jsonl"
OLD_PROMPTS = "prefixes.jsonl"  # as runs of before named it: one that is there is read in its place
KNOWLEDGE = "knowledge/whole"  # the last file of the knowledge to appear
LEFT_OUT = "knowledge/left_out.json"  # the texts that the gate left out; none if it is not there
ITEMS = "user/items.jsonl"  # what stands behind each item of the knowledge
STATE = "user/extraction.jsonl"  # the steps that the knowledge is made of (`extraction.state`)
GATE = "gate.json"
CHECKPOINTS = "checkpoints"  # a folder; also the manifest's entry of the finished training
EVALUATION = "evaluation.json"


@dataclasses.dataclass(frozen=True)
class Run:
  """A run directory that is held (`runtime.workdir.opened`), and what its stages work with; `base`
  is the policy that round 1 begins with.
  """

  config: Any
  folder: pathlib.Path
  metrics: Metrics
  mesh: jax.sharding.Mesh
  base: Policy | None = None

  def round(self, number: int) -> pathlib.Path:
    """The round's folder; round 0 is the base model's."""
    return self.folder / f"round_{number}"

  def prompts(self, number: int) -> pathlib.Path:
    """Where the round's prompts are, or are to be."""
    old = self.round(number) / OLD_PROMPTS
    return old if old.exists() else self.round(number) / PROMPTS

  def manifest(self, number: int) -> Manifest:
    """What the round's files were made from."""
    return Manifest(self.round(number))

  def consolidation(self, number: int) -> Any:
    """config.consolidation as it is for the round."""
    return config_lib.consolidation(self.config, number)

  def sampling(self, group: str) -> Sampling:
    """As config.deployment, config.extraction or config.evaluation say."""
    config = self.config[group]
    return Sampling(config.temperature, config.top_p, config.top_k)

  def gate(self, number: int) -> dict[str, Any] | None:
    """What gate.json says, and the "decision" that follows from it under the present `on_no_gain`,
    one of `gates.DECISIONS`; None without a gate.
    """
    path = self.round(number) / GATE
    if not path.exists():
      return None
    found = gates.read_gate(path)
    shares = {k: v for k, v in found.items() if k not in ("made_from", schema.DIGEST)}
    gain = found.get("kept", found["with"])["rate"] - found["without"]["rate"]
    skips = self.config.consolidation.on_no_gain == "skip" and gain < 0
    return shares | {"decision": "train" if gain > 0 else "skip" if skips else "warn"}

  def teacher(self, policy: Policy) -> Policy:
    """Who plays with knowledge as the teacher does of a round that begins with `policy`: that, or,
    where config.consolidation.teacher is "first", the run's first weights.
    """
    return self.base if self.config.consolidation.teacher == "first" else policy

  def log(self, number: int, stage: str, **scalars: float) -> None:
    """A stage's main numbers, for metrics.jsonl and TensorBoard; before its last file, so that a
    kill leaves neither or has both made anew.
    """
    self.metrics.drop_after(number, stage, -1)
    self.metrics.write(stage, 0, round=number, at=number, **scalars)

  @contextlib.contextmanager
  def stage(
    self, number: int, name: str, policy: Policy, total: int
  ) -> Iterator[tuple["Meter", Callable[..., None]]]:
    """A stage's progress bar, its meter, and an entry in the round's cost.json, one for each
    process that came to its end.
    """
    meter, started = Meter(policy), time.monotonic()
    compiles = self.metrics.compiles
    programs, compiling = compiles(), compiles.seconds
    title = f"round {number}: {name}" if number else f"base: {name}"
    with progress.bar(title, total, compiles) as advance:
      yield meter, advance
    if meter.tokens:
      path = self.round(number) / "cost.json"
      spent = files.read_json(path, records.costs)["stages"] if path.exists() else []
      spent.append(
        {
          "stage": name,
          "seconds": time.monotonic() - started,
          "tokens": meter.tokens,
          "flops": meter.flops,
          **({"trained": meter.trained} if meter.trained is not None else {}),
          "programs": compiles() - programs,
          "compile_seconds": compiles.seconds - compiling,
        }
      )
      path.parent.mkdir(exist_ok=True)  # where nothing is played, the base model's has no file yet
      files.write_sealed(path, {"schema": 1, "stages": spent})
    mirror.update(self.config.mirror, self.folder, quiet=True)


@dataclasses.dataclass
class Meter:
  """A policy that counts what it writes, and the work, as if every prompt were read whole; what
  samples from it cannot tell it from the policy.
  """

  policy: Policy
  tokens: int = 0
  flops: float = 0.0
  trained: int | None = None  # of these tokens, those that went through the student's gradients

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

  def scored(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
    """Counts answers that were sampled elsewhere and read again by a student and a teacher."""
    for prompt, sampled in zip(prompts, answers, strict=True):
      self._count(prompt, sampled, passes=3)

  def _count(self, prompt: Sequence[int], sampled: Sequence[int], passes: int = 1) -> None:
    size = sum(leaf.size for leaf in jax.tree.leaves(self.policy.params))
    self.tokens += len(sampled)
    self.flops += 2.0 * size * passes * (len(prompt) + len(sampled))


def made_from(policy: Policy | Meter, texts: Sequence[str]) -> dict[str, str]:
  """What games are played with, for manifest.json and the like: name → digest."""
  return {"weights": fingerprint(policy.params), "knowledge": schema.digest(list(texts))}
