"""The consolidation of one round: sample, score, step, save; resumable at any step (OEL section 3).

This is the server side. It sees prompts and knowledge texts; it imports no environment.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np
import optax
from absl import logging

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import step as step_lib
from oel_jax.policy.generate import Policy, Sampling
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.checkpoint import Checkpoints
from oel_jax.runtime.metrics import Metrics
from oel_jax.runtime.seeds import derive
from oel_jax.trajectory import Message, Prefix, knowledge_message


@dataclasses.dataclass(frozen=True)
class Task:
  """Everything a step draws from, as token ids.

  Attributes:
    prompts: one a prefix.
    knowledge: one a text; what the teacher reads before a prompt.
    skip: so many ids at the beginning of a prompt stand at the beginning of every knowledge; the teacher reads prompt[skip:].
    seed: of the run; with the round it names every draw.
    round: counted from 1.
  """

  prompts: tuple[tuple[int, ...], ...]
  knowledge: tuple[tuple[int, ...], ...]
  skip: int
  seed: int
  round: int


def make_task(
    tokenizer: Any, prefixes: Sequence[Prefix], texts: Sequence[str], *, seed: int, round: int, thinking: bool, limit: int,
    message: Callable[[str], Message] = knowledge_message,
) -> Task:  # fmt: skip
  """Turns prefixes and knowledge texts into ids; `message` makes the system message of a text.

  Raises:
    ValueError: there is none of either; a prompt with its knowledge is over `limit` (config.policy.max_prompt_tokens); or the chat
      template does not put knowledge before an otherwise unchanged prompt (traps, 13 and 14).
  """
  if not prefixes or not texts:
    raise ValueError(f"consolidation got {len(prefixes)} prefixes and {len(texts)} knowledge texts: it needs at least one of each")
  prompts = tuple(tuple(tokenizer.chat(prefix.messages, thinking=thinking)) for prefix in prefixes)
  found = [tokenizer.knowledge_prefix(message(text), thinking=thinking) for text in texts]
  skip, knowledge = found[0][0], tuple(tuple(ids) for _, ids in found)
  longest, length = max(zip(prefixes, prompts, strict=True), key=lambda pair: len(pair[1]))
  most = max(map(len, knowledge))
  if len(length) + most > limit:
    raise ValueError(
        f"config.policy.max_prompt_tokens is {limit}, but prefix {longest.id} has {len(length)} tokens and the longest knowledge {most}: "
        "raise it, or lower extraction.max_knowledge_tokens"
    )
  for text, (own_skip, known) in zip(texts, found, strict=True):
    whole = tokenizer.chat((message(text), *prefixes[0].messages), thinking=thinking)
    if own_skip != skip or tuple(whole) != (*known, *prompts[0][skip:]) or tuple(known[:skip]) != prompts[0][:skip]:
      raise ValueError(
          "the chat template changes the prompt when a system message with knowledge stands before it: teacher and student would differ in "
          "more than the knowledge"
      )
  return Task(prompts, knowledge, skip, seed, round)


def make_optimizer(config: Any) -> optax.GradientTransformation:
  """AdamW at a constant rate after clipping by the global norm (OEL, training details)."""
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(config.learning_rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay),
  )


def draws(task: Task, batch_size: int) -> grain.IterDataset:
  """Batches of {"prefix", "draw"}: prefixes shuffled anew in each pass, draws counted through; the state is one small dict."""
  order = grain.MapDataset.range(len(task.prompts)).seed(derive(task.seed, task.round, "prefixes")).shuffle().repeat()
  numbered = order.map_with_index(lambda draw, prefix: {"prefix": np.int64(prefix), "draw": np.int64(draw)})
  return numbered.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).batch(batch_size)


def sample_batch(
    task: Task, student: Policy, teacher: Policy, prefixes: Sequence[int], numbers: Sequence[int], config: Any, limit: int, stage: str
) -> tuple[batch_lib.Batch, list[int]]:
  """Draws a knowledge text and a response for each prefix; returns the batch and the responses' lengths.

  `config` is config.consolidation; its `data` says who samples: the student from the prompt, or the teacher from knowledge and prompt.
  """
  prompts = [task.prompts[i] for i in prefixes]
  known = [task.knowledge[derive(task.seed, task.round, stage, "knowledge", int(n)) % len(task.knowledge)] for n in numbers]
  seeds = [derive(task.seed, task.round, stage, int(n)) for n in numbers]
  sampling = Sampling(temperature=config.temperature)
  if config.data == "student":
    responses = student.sample(prompts, seeds, sampling=sampling, max_new_tokens=limit)
  else:
    responses = teacher.sample([k + p[task.skip :] for k, p in zip(known, prompts, strict=True)], seeds, sampling=sampling, max_new_tokens=limit)
  # Few shapes: the room for prompts is that of the longest in the round, and responses have one of three.
  rows = next(room for room in (-(-limit // 4), -(-limit // 2), limit) if max(map(len, responses)) <= room)
  prompt_room, knowledge_room = (_round_up(max(map(len, ids))) for ids in (task.prompts, task.knowledge))
  made = batch_lib.assemble(
      prompts, known, responses, pad_id=student.tokenizer.pad_id, response_length=rows, student_length=prompt_room + rows,
      teacher_length=knowledge_room + prompt_room + rows, skip=task.skip,
  )  # fmt: skip
  return made, [len(response) for response in responses]


def _round_up(length: int, multiple: int = 32) -> int:
  return -(-length // multiple) * multiple


def consolidate(
    config: Any, task: Task, policy: Policy, *, limit: int, directory: str | os.PathLike, mesh: jax.sharding.Mesh, metrics: Metrics,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[Any, dict[str, float]]:  # fmt: skip
  """Trains the policy to do without the knowledge what it does with it.

  Args:
    config: config.consolidation.
    task: prompts and knowledge.
    policy: the round's first weights: student at step 0, and the frozen teacher.
    limit: most tokens of a response.
    directory: of the round's checkpoints; what is there is gone on with.
    mesh: devices.
    metrics: gets a line a step.
    advance: told of each step done.

  Returns:
    The new parameters, and what it cost in this process: sampled and trained-on "tokens", "flops" (2 a parameter and token, forward).

  Raises:
    ValueError: the checkpoints hold more steps than config.steps.
  """
  optimizer = make_optimizer(config)
  # Where to start, in this order: the round's last whole checkpoint, or a copy of the round's first weights.
  begin = functools.partial(_begin, optimizer)
  abstract = mesh_lib.abstract_init(begin, mesh, policy.params)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  size = sum(leaf.size for leaf in jax.tree.leaves(policy.params))
  cost = {"tokens": 0.0, "flops": 0.0}
  with Checkpoints(directory) as checkpoints:
    restored = checkpoints.restore(abstract)
    state = restored.state if restored else mesh_lib.sharded_init(begin, mesh, policy.params)
    batches = iter(draws(task, config.batch_size))
    first = 0
    if restored:
      batches.set_state(restored.extra["iterator"])
      first = restored.step
      if first < config.steps:
        logging.warning("round %d: consolidation goes on after step %d", task.round, first)
    if first > config.steps:
      raise ValueError(f"{directory}: holds step {first}, but config.consolidation.steps is {config.steps}: it must be at least that")
    advance(first)
    if first == config.steps:
      return state.params, cost
    metrics.drop_after(task.round, "consolidate", first if restored else -1)
    step = step_lib.make_step(
        policy.architecture, optimizer, kind=config.kind, support=config.support, k=config.k, temperature=config.temperature,
        chunk=config.chunk, micro_batch=config.micro_batch, dtype=policy.dtype, shardings=shardings,
    )  # fmt: skip
    probe = _make_probe(config, task, policy, limit, mesh)
    if first == 0:
      metrics.write("consolidate", 0, round=task.round, **probe(policy.params))
    for i in range(first + 1, config.steps + 1):
      started, drawn = time.time(), next(batches)
      student = policy.replace(state.params)
      batch, lengths = sample_batch(task, student, policy, drawn["prefix"], drawn["draw"], config, limit, "consolidate")
      state, measured = step(state, policy.params, _place(batch, mesh, config.micro_batch))
      cost["tokens"] += float(batch.student_length.sum())
      cost["flops"] += 2.0 * size * float(4 * batch.student_length.sum() + batch.teacher_length.sum())
      scalars = {name: float(value) for name, value in measured.items()} | {"response_tokens": float(np.mean(lengths))}
      saving = i % config.checkpoint_every == 0 or i == config.steps
      scalars |= probe(state.params) if saving else {}
      # The line comes before the checkpoint: if a kill falls between them, the step is done again and its line dropped; none is missing.
      metrics.write("consolidate", i, round=task.round, **scalars, seconds=time.time() - started, compiles=metrics.compiles())
      if saving:
        checkpoints.save(i, state, {"iterator": batches.get_state()})
      advance(1)
    checkpoints.wait()
  return state.params, cost


def _begin(optimizer: optax.GradientTransformation, params: Any) -> step_lib.State:
  return step_lib.init_state(jax.tree.map(lambda p: p.astype("float32"), params), optimizer)


def trained_params(config: Any, policy: Policy, directory: str | os.PathLike, mesh: jax.sharding.Mesh) -> Any:
  """The parameters that `consolidate` left in `directory` after config.steps steps; None if it has not come so far."""
  if not os.path.isdir(directory):
    return None
  with Checkpoints(directory) as checkpoints:
    restored = checkpoints.restore(mesh_lib.abstract_init(functools.partial(_begin, make_optimizer(config)), mesh, policy.params))
  return restored.state.params if restored and restored.step == config.steps else None


def _make_probe(config, task, policy, limit, mesh):
  """Statistics on one fixed batch, the same at every step of the round: entropies, top-k mass, exact KL."""
  count = min(config.log_probe, len(task.prompts))
  if count == 0:
    return lambda params: {}
  numbers = list(range(count))
  batch, _ = sample_batch(task, policy, policy, numbers, numbers, config, limit, "probe")
  batch = _place(batch, mesh, 1)
  probe = step_lib.make_probe(policy.architecture, k=config.k, temperature=config.temperature, chunk=config.chunk, dtype=policy.dtype)
  rename = {"reverse_kl": "probe_kl"}

  def measure(params):
    return {rename.get(name, name): float(value) for name, value in probe(params, policy.params, batch).items()}

  return measure


def _place(batch: batch_lib.Batch, mesh: jax.sharding.Mesh, micro_batch: int) -> batch_lib.Batch:
  """Puts the batch on the devices, rows spread over them; rows are added, masked out, so that devices and micro-batches come out even."""
  return jax.device_put(mesh_lib.pad_batch(batch, mesh, multiple=micro_batch), mesh_lib.batch_sharding(mesh))
