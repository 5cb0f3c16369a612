"""The consolidation of one round: sample, score, step, save; resumable at any step (OEL section 3).

This is the server side. It sees prompts and knowledge texts; it imports no environment.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from oel_jax.consolidation import anchor as anchor_lib
from oel_jax.consolidation import (
  draws,
  failure,
  lora,
  placement,
  probing,
  restore,
  samples,
  selection,
)
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import streamed as streamed_lib
from oel_jax.consolidation import task as task_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.consolidation.metrics import BUCKETS
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import distributed, finite, signals
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.checkpoint import Checkpoints
from oel_jax.runtime.metrics import Metrics

COSTS = ("tokens", "trained", "flops")  # of steps, in this process (`consolidate`)


def consolidate(
  config: Any,
  task: task_lib.Task,
  policy: Policy,
  *,
  limit: int,
  directory: str | os.PathLike,
  mesh: jax.sharding.Mesh,
  metrics: Metrics,
  kept: task_lib.Task | None = None,
  advance: Callable[..., None] = lambda n, note="": None,
  base: Policy | None = None,
) -> tuple[Any, dict[str, float]]:
  """Trains the policy to do without the knowledge what it does with it.

  Args:
    config: config.consolidation.
    task: prompts and knowledge.
    policy: the round's first weights: student at step 0, and the frozen teacher unless
      config.teacher names another.
    limit: most tokens of a response.
    directory: of the round's checkpoints; what is there is gone on with.
    mesh: devices.
    metrics: gets a line a step.
    kept: whose knowledge the term config.anchor is of (`anchor`); None: the task's own.
    advance: told of each step done, as `progress.bar` wants it, with the loss as its note.
    base: the run's first weights; None: the round's are.

  Returns:
    The new parameters, and what it cost in this process: "tokens" of the samples, prompts too,
    those that the student was "trained" on, with what was kept, and "flops" (2 a parameter and
    token, forward).

  Raises:
    ValueError: the checkpoints hold more steps than config.steps, or weights alone of fewer; or
      numbers that are not finite; or were trained with another config.lora_rank.
    NotFiniteError: a step gave a number that is not finite. Its line in metrics.jsonl says which;
      no checkpoint is written any more, and those before it are kept.
    OSError: the disk has no room for the checkpoints, or one could not be written.
    Terminated: SIGTERM came. A checkpoint of the step that was under way is written.
  """
  optimizer = restore.make_optimizer(config)
  begin = restore.beginning(optimizer, config.lora_rank)
  given = restore.begins_with(config, task, policy.params)
  abstract = mesh_lib.abstract_init(begin, mesh, *given)
  whole = restore.abstract_left(config, policy.params, mesh)
  made_from = restore.inputs(task, policy)
  cost = dict.fromkeys(COSTS, 0.0)
  finished = restore.weights(config, directory, whole, made_from)
  if finished is not None:
    restore.drop_checkpoints(directory)  # which a kill may have left
    advance(config.steps)
    return finished, cost
  with Checkpoints(directory) as checkpoints:
    batches = iter(draws.batches(task, config))
    restored = restore.newest(checkpoints, abstract, config.lora_rank)
    first = restore.go_on(restored, batches, config, task, made_from, directory) if restored else 0
    state = restored.state if restored else mesh_lib.sharded_init(begin, mesh, *given)
    if first:
      advance(first)
    if first < config.steps:
      restore.need_room(checkpoints, config, abstract, whole, first)
      metrics.drop_after(task.round, "consolidate", first if restored else -1)
      training = _Training(
        config,
        task,
        policy,
        limit=limit,
        mesh=mesh,
        metrics=metrics,
        checkpoints=checkpoints,
        samplers=draws.samplers(config, policy, base or policy),
        kept=kept or task,
        optimizer=optimizer,
        shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
        first=first,
      )
      state, cost = training.run(state, batches, made_from, advance)
  params = lora.whole(config, policy.params)(state.params)
  if restore.keeps_weights(config):
    restore.keep_weights(config, directory, params, made_from)
  return params, cost


class _Training:
  """What all steps of a round have in common; the state goes through `run_step`.

  Attributes:
    config: config.consolidation.
    task: prompts and knowledge.
    policy: the round's first weights.
    limit: most tokens of a response.
    mesh, metrics, checkpoints: of the round.
    samplers: whose samples the steps take.
    first: the last step that is done already; 0 if none is.
    attn_impl: the attention implementation.
    max_samples: most samples of a step.
    micro_tokens: most tokens of a micro-batch (`samples.micro_tokens_of`).
    teacher: what it has read of the knowledge.
    whole: what is learned → all parameters (`lora.whole`), and `base`, what is given to the step of
      them; None where they are learned themselves.
    step: the jitted step (`step.make_step`).
    select: what chooses the samples to be trained on; None: all are.
    anchor: what lays out the samples that are kept; None: none are.
    probe: parameters → statistics on the fixed batch; {} without one.
  """

  def __init__(
    self,
    config: Any,
    task: task_lib.Task,
    policy: Policy,
    *,
    limit: int,
    mesh: jax.sharding.Mesh,
    metrics: Metrics,
    checkpoints: Checkpoints,
    samplers: draws.Samplers,
    kept: task_lib.Task,
    optimizer: optax.GradientTransformation,
    shardings: Any,
    first: int,
  ):
    """Reads the knowledge once, and makes the step and the probe.

    Args:
      kept: whose knowledge the anchor's term is of.
      optimizer: of the round.
      shardings: of the state.
      Others: as among the attributes.

    Raises:
      NotFiniteError: the probe's batch could not be sampled before step `first` + 1.
    """
    self.config, self.task, self.policy = config, task, policy
    self.limit, self.mesh, self.metrics, self.checkpoints = limit, mesh, metrics, checkpoints
    self.samplers, self.first = samplers, first

    self.attn_impl = placement.attn_impl(config, policy)
    self.teacher = placement.prepare_teacher(config, task, samplers.teacher, mesh, self.attn_impl)
    placement.tell_if_on_host(config, task, self.teacher)
    self.max_samples = draws.max_samples(task, config)
    trained = selection.trained(config, self.max_samples)
    self.micro_tokens = samples.micro_tokens_of(
      config, task.prompts, limit=limit, samples=trained, mesh=mesh
    )
    self.whole = lora.whole(config, policy.params)
    self.base = policy.params if config.lora_rank else None
    self.step = make_step(config, policy, optimizer, self.attn_impl, shardings, self.micro_tokens)
    self.select = selection.prepare(
      config, task, policy, limit, mesh, self.attn_impl, self.max_samples
    )
    self.anchor = anchor_lib.prepare(
      config, kept, policy, limit, mesh, self.micro_tokens, self.max_samples
    )
    try:
      self.probe = probing.make(config, task, policy, self.teacher, limit, mesh, self.attn_impl)
    except finite.NotFiniteError as error:
      raise self.failed(first, str(error), error.prompts) from error

  def run(
    self,
    state: step_lib.State,
    batches: grain.DatasetIterator,
    made_from: dict[str, str],
    advance: Callable[..., None],
  ) -> tuple[step_lib.State, dict[str, float]]:
    """Takes the steps that are left, and saves what they leave.

    Args:
      state: after step `first`; donated.
      batches: the data iterator, from there.
      made_from: kept in each checkpoint (`restore.inputs`).
      advance: as `consolidate` has it.

    Returns:
      The state after the last step, and what the steps cost.

    Raises:
      NotFiniteError, OSError, Terminated: as `consolidate` says.
    """
    cost = dict.fromkeys(COSTS, 0.0)
    if self.first == 0:
      self.probe_untrained()
    with signals.deferred() as terminated:
      for i in range(self.first + 1, self.config.steps + 1):
        state, loss, spent = self.run_step(i, state, next(batches))
        cost = {name: total + spent[name] for name, total in cost.items()}
        ending = distributed.anywhere(terminated(), "the end of a step")
        last = i == self.config.steps and restore.keeps_weights(self.config)
        if ending or (self.saves(i) and not last):
          extra = {"iterator": batches.get_state()} | restore.beside(self.config, made_from)
          self.checkpoints.save(i, state, extra)
        advance(1, f"loss {loss:.4g}")
        if ending:
          self.checkpoints.wait()
          what = f"step {i} of {self.config.steps} is saved in {self.checkpoints.directory}"
          raise signals.Terminated(what)
    self.checkpoints.wait()
    return state, cost

  def probe_untrained(self) -> None:
    """Writes the line of step 0.

    Raises:
      NotFiniteError: a statistic is not finite.
    """
    probed = self.probe(self.policy.params)
    self.metrics.write("consolidate", 0, round=self.task.round, **probed)
    if what := failure.broken(probed):
      raise self.failed(0, what, range(min(self.config.log_probe, len(self.task.prompts))))

  def run_step(
    self, i: int, state: step_lib.State, drawn: dict[str, np.ndarray]
  ) -> tuple[step_lib.State, float, dict[str, float]]:
    """Samples, scores and updates once, and writes the step's line of metrics.

    Args:
      i: the step, from 1.
      state: after the step before; donated.
      drawn: "prompt" and "draw" of the data iterator.

    Returns:
      The new state, the loss, and what the step cost (`consolidate`).

    Raises:
      NotFiniteError: as `consolidate` says.
    """
    started = time.time()
    student = self.policy.replace(self.whole(state.params))
    teacher = self._teacher_of(student)
    try:
      by, informed, numbers = self.samplers(student, drawn)
      sampled = samples.draw(
        self.task,
        by,
        informed,
        drawn["prompt"],
        numbers,
        self.config,
        self.limit,
        "consolidate",
        logprobs=self.select is not None,
      )
    except finite.NotFiniteError as error:
      self.metrics.write("consolidate", i, round=self.task.round, logits=math.nan)
      raise self.failed(i, str(error), [drawn["prompt"][k] for k in error.prompts]) from error
    del student, by, informed  # of adapters, whole weights that the step has no use of
    chosen, told, counts = self._chosen(sampled, teacher)
    how = self.task, self.policy, chosen, self.config, self.limit
    batch = samples.assemble(*how, counts=counts)
    placed = samples.place(batch, self.mesh, self.max_samples, self.micro_tokens)
    kept, more = self.anchor(sampled) if self.anchor else (None, 0)
    how = dict(micro_tokens=self.micro_tokens, dtype=self.policy.dtype, attn_impl=self.attn_impl)
    teacher, placed = streamed_lib.ahead(teacher, self.policy.architecture, placed, **how)
    state, measured = self.step(state, teacher, placed, kept, self.base)
    measured = {name: float(value) for name, value in jax.device_get(measured).items()}
    scalars = _logged(measured, [len(ids) for ids in sampled.responses], self.limit) | told
    if self.saves(i):
      scalars |= self.probe(self.whole(state.params))
    # The line comes before the checkpoint: if a kill falls between them, the step is done again
    # and its line dropped; none is missing.
    self.metrics.write(
      "consolidate",
      i,
      round=self.task.round,
      **scalars,
      seconds=time.time() - started,
      compiles=self.metrics.compiles(),
    )
    if what := failure.broken(scalars, measured, state):
      raise self.failed(i, what, drawn["prompt"])
    return state, measured["loss"], self.spent(sum(sampled.tokens()), sum(chosen.tokens()) + more)

  def _chosen(
    self, sampled: samples.Drawn, teacher: teacher_lib.Teacher
  ) -> tuple[samples.Drawn, dict[str, float], bool]:
    """The samples to be trained on, what the choice tells, and whether their tokens count; warns if
    they do not.
    """
    eos_ids = None if self.config.cut_responses else self.policy.tokenizer.eos_ids
    left, counts = samples.usable(sampled, self.limit, eos_ids)
    if not counts:
      told = (
        "round %d: a step learns nothing: all of its %d responses were cut (cut_responses=False)"
      )
      logging.warning(told, self.task.round, len(sampled.responses))
    chosen, told = self.select(left, teacher) if self.select and counts else (left, {})
    return chosen, told, counts

  def _teacher_of(self, student: Policy) -> teacher_lib.Teacher:
    """The round's teacher; a live one is the student, which has read the knowledge anew. The step
    is given the student's arrays to write over, so these are copies.
    """
    if self.config.teacher != "live":
      return self.teacher
    copy = student.replace(jax.tree.map(jnp.copy, student.params))
    return placement.prepare_teacher(self.config, self.task, copy, self.mesh, self.attn_impl)

  def saves(self, i: int) -> bool:
    """Whether step i leaves a checkpoint."""
    return i % self.config.checkpoint_every == 0 or i == self.config.steps

  def spent(self, sampled: int, trained: int) -> dict[str, float]:
    """What a step cost with so many tokens sampled, and so many trained on, those kept too: a pass
    of the sampler over the first, and one of the teacher if it chooses; over the second one of the
    teacher and three of the student (forward, and both gradients); each 2 a parameter and token.
    """
    parameters = sum(leaf.size for leaf in jax.tree.leaves(self.policy.params))
    passes = (1 + (self.select is not None)) * sampled + 4 * trained
    return {"tokens": float(sampled), "trained": float(trained), "flops": 2.0 * parameters * passes}

  def failed(self, step: int, what: str, drawn: Sequence[int]) -> finite.NotFiniteError:
    """The error that ends the run at this step (`failure.failed`)."""
    return failure.failed(
      what,
      config=self.config,
      dtype=self.policy.dtype,
      round=self.task.round,
      step=step,
      ids=[self.task.ids[i] for i in drawn],
      checkpoints=self.checkpoints,
    )


def make_step(
  config: Any,
  policy: Policy,
  optimizer: optax.GradientTransformation,
  attn_impl: str,
  shardings: Any,
  micro_tokens: int,
) -> Callable:
  """The round's jitted step (`step.make_step`); `config` is config.consolidation, and of the policy
  only architecture, dtype and, for config.one_end, the tokens that end a response are read.
  """
  leaves, tree = jax.tree.flatten(shardings)
  return _step_with(
    policy.architecture,
    optimizer,
    tuple(leaves),
    tree,
    kind=config.kind,
    support=config.support,
    k=config.k,
    temperature=config.temperature,
    chunk=config.chunk,
    micro_tokens=micro_tokens,
    dtype=policy.dtype,
    remat=config.remat,
    attn_impl=attn_impl,
    one=tuple(policy.tokenizer.eos_ids) if config.one_end else (),
    anchor=config.anchor,
    lora_scale=lora.scale_of(config) if config.lora_rank else 1.0,
  )


@functools.lru_cache(maxsize=1)  # a new one would be compiled again in each round
def _step_with(architecture, optimizer, shardings, tree, **how):
  """`make_step` with the leaves of the state's shardings, which hash, and their tree."""
  return step_lib.make_step(architecture, optimizer, shardings=tree.unflatten(shardings), **how)


def _logged(measured: dict[str, float], lengths: Sequence[int], limit: int) -> dict[str, float]:
  """A step's line of metrics, without single parameters and places that no response has; "cut" is
  the share of its responses that have all `limit` tokens.
  """
  without = {"not_finite"}
  without |= {name for name, (begin, _) in BUCKETS.items() if begin >= max(lengths)}
  without |= {name for name in measured if name.startswith(step_lib.GRADIENT)}
  scalars = {name: value for name, value in measured.items() if name not in without}
  cut = float(np.mean([length >= limit for length in lengths]))
  return scalars | {
    "samples": len(lengths),
    "response_tokens": float(np.mean(lengths)),
    "cut": cut,
  }
