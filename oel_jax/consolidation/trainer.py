"""The consolidation of one round: sample, score, step, save; resumable at any step (OEL section 3).

This is the server side. It sees prompts and knowledge texts; it imports no environment.
"""

import dataclasses
import functools
import math
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
from oel_jax.consolidation import failure
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.consolidation.metrics import BUCKETS
from oel_jax.conversations.schema import Message, Prefix, knowledge_message
from oel_jax.policy.sampling.sampler import Policy, Sampling
from oel_jax.runtime import finite, schema, signals
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.checkpoint import Checkpoints, Restored
from oel_jax.runtime.checksum import fingerprint
from oel_jax.runtime.metrics import Metrics
from oel_jax.runtime.seeds import derive

MANY_SYSTEMS = 16  # system texts of a round's prompts; more are told: each is read with each text


@dataclasses.dataclass(frozen=True)
class Task:
  """Everything a step draws from, as token ids.

  Attributes:
    prompts: one a prefix.
    knowledge: what the teacher reads before a prompt, one a text and system text of the prompts:
      knowledge stands behind the system text.
    skip: one a knowledge: so many ids at its beginning are the prompt's, too; after it, the teacher
      reads prompt[skip:].
    given: one a prompt: which knowledge it may be given, one a text.
    seed: of the run; with the round it names every draw.
    round: counted from 1.
    ids: the prefixes' own names, one a prompt; errors name them.
  """

  prompts: tuple[tuple[int, ...], ...]
  knowledge: tuple[tuple[int, ...], ...]
  skip: tuple[int, ...]
  given: tuple[range, ...]
  seed: int
  round: int
  ids: tuple[str, ...]


def make_task(
  tokenizer: Any,
  prefixes: Sequence[Prefix],
  texts: Sequence[str],
  *,
  seed: int,
  round: int,
  thinking: bool,
  limit: int,
  message: Callable[[str], Message] = knowledge_message,
) -> Task:
  """Turns prefixes and knowledge texts into ids; `message` makes the knowledge message of a text.

  Raises:
    ValueError: there is none of either; a prompt with its knowledge is over `limit`
      (config.policy.max_prompt_tokens); or the chat template does not leave the prompt otherwise
      unchanged when there is knowledge.
  """
  if not prefixes or not texts:
    raise ValueError(
      f"consolidation got {len(prefixes)} prefixes and {len(texts)} knowledge texts: it needs at "
      "least one of each"
    )
  prompts = tuple(tuple(tokenizer.chat(prefix.messages, thinking=thinking)) for prefix in prefixes)
  own = [prefix.messages[0] if prefix.messages[0].role == "system" else None for prefix in prefixes]
  systems = {system: i for i, system in enumerate(dict.fromkeys(own))}
  found = [
    tokenizer.knowledge_prefix(message(text), system=system, thinking=thinking)
    for system in systems
    for text in texts
  ]
  first = [systems[system] * len(texts) for system in own]
  given = tuple(range(entry, entry + len(texts)) for entry in first)
  sizes = [max(len(found[entry][1]) - found[entry][0] for entry in entries) for entries in given]
  longest = max(range(len(prompts)), key=lambda i: len(prompts[i]) + sizes[i])
  own_size, known_size = len(prompts[longest]), sizes[longest]
  if own_size + known_size > limit:
    raise ValueError(
      f"config.policy.max_prompt_tokens is {limit}, but prefix {prefixes[longest].id} has "
      f"{own_size} tokens and the longest knowledge {known_size}: raise it, or shorten prompts "
      "or knowledge (which a run of rounds limits by extraction.max_knowledge_tokens)"
    )
  seen = set()
  for prefix, prompt, entries in zip(prefixes, prompts, given, strict=True):
    # The template goes by the roles: the first of each sequence of them is looked at with every
    # text, which takes long, others with one.
    roles = tuple(message.role for message in prefix.messages)
    for text, entry in list(zip(texts, entries, strict=True))[: 1 if roles in seen else None]:
      skip, known = found[entry]
      whole = tokenizer.chat((message(text), *prefix.messages), thinking=thinking)
      if tuple(whole) != (*known, *prompt[skip:]) or tuple(known[:skip]) != prompt[:skip]:
        raise ValueError(
          f"prefix {prefix.id}, of the roles {', '.join(roles)}: the chat template changes the "
          "prompt when knowledge stands in its system message: teacher and student would differ "
          "in more than the knowledge"
        )
    seen.add(roles)
  if len(systems) > MANY_SYSTEMS:
    logging.warning(
      "consolidation: the prompts have %d different system texts: with %d knowledge texts, "
      "%d beginnings of up to %d tokens are kept for the teacher",
      len(systems),
      len(texts),
      len(found),
      max(len(known) for _, known in found),
    )
  knowledge = tuple(tuple(known) for _, known in found)
  ids = tuple(prefix.id for prefix in prefixes)
  return Task(prompts, knowledge, tuple(skip for skip, _ in found), given, seed, round, ids)


def make_optimizer(config: Any) -> optax.GradientTransformation:
  """AdamW at a constant rate after clipping by the global norm (OEL, training details)."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      config.learning_rate,
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
    ),
  )


def draws(task: Task, batch_size: int) -> grain.IterDataset:
  """Batches of {"prefix", "draw"}: prefixes shuffled anew in each pass, draws counted through; the
  state is one small dict.
  """
  order = (
    grain.MapDataset.range(len(task.prompts))
    .seed(derive(task.seed, task.round, "prefixes"))
    .shuffle()
    .repeat()
  )
  numbered = order.map_with_index(
    lambda draw, prefix: {"prefix": np.int64(prefix), "draw": np.int64(draw)}
  )
  return numbered.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).batch(
    batch_size
  )


def sample_batch(
  task: Task,
  student: Policy,
  teacher: Policy,
  prefixes: Sequence[int],
  numbers: Sequence[int],
  config: Any,
  limit: int,
  stage: str,
) -> tuple[batch_lib.Batch, list[int]]:
  """Draws a knowledge text and a response for each prefix; returns the batch, packed, and the
  responses' lengths.

  `config` is config.consolidation; its `data` says who samples: the student from the prompt, or the
  teacher from knowledge and prompt.
  """
  prompts = [task.prompts[i] for i in prefixes]
  lots = [derive(task.seed, task.round, stage, "knowledge", int(n)) for n in numbers]
  texts = [task.given[i][lot % len(task.given[i])] for i, lot in zip(prefixes, lots, strict=True)]
  seeds = [derive(task.seed, task.round, stage, int(n)) for n in numbers]
  sampling = Sampling(temperature=config.temperature)
  if config.data == "student":
    responses = student.sample(prompts, seeds, sampling=sampling, max_new_tokens=limit)
  else:
    pairs = zip(texts, prompts, strict=True)
    informed = [task.knowledge[text] + prompt[task.skip[text] :] for text, prompt in pairs]
    responses = teacher.sample(informed, seeds, sampling=sampling, max_new_tokens=limit)
  # Few shapes: the room for prompts is that of the longest in the round, and responses have one of
  # three.
  rows = next(
    room for room in (-(-limit // 4), -(-limit // 2), limit) if max(map(len, responses)) <= room
  )
  length, known = _round_up(max(map(len, task.prompts))) + rows, max(map(len, task.knowledge))
  # Several texts a row where they are short: together no longer than the row, since each of its
  # tokens is compared with all of them.
  together = min(len(task.knowledge), max(1, length // max(1, known))) if config.pack else 1
  made = batch_lib.assemble(
    prompts,
    texts,
    responses,
    pad_id=student.tokenizer.pad_id,
    length=length,
    texts=together,
    pack=config.pack,
    response_length=min(length, 2 * rows) if config.pack else rows,
  )
  return made, [len(response) for response in responses]


def _round_up(length: int, multiple: int = 32) -> int:
  return -(-length // multiple) * multiple


def consolidate(
  config: Any,
  task: Task,
  policy: Policy,
  *,
  limit: int,
  directory: str | os.PathLike,
  mesh: jax.sharding.Mesh,
  metrics: Metrics,
  advance: Callable[..., None] = lambda n, note="": None,
) -> tuple[Any, dict[str, float]]:
  """Trains the policy to do without the knowledge what it does with it.

  Args:
    config: config.consolidation.
    task: prompts and knowledge.
    policy: the round's first weights: student at step 0, and the frozen teacher.
    limit: most tokens of a response.
    directory: of the round's checkpoints; what is there is gone on with.
    mesh: devices.
    metrics: gets a line a step.
    advance: told of each step done, as `progress.bar` wants it, with the loss as its note.

  Returns:
    The new parameters, and what it cost in this process: sampled and trained-on "tokens", "flops"
    (2 a parameter and token, forward).

  Raises:
    ValueError: the checkpoints hold more steps than config.steps, or numbers that are not finite.
    NotFiniteError: a step gave a number that is not finite. Its line in metrics.jsonl says which;
      no checkpoint is written any more, and those before it are kept.
    Terminated: SIGTERM came. A checkpoint of the step that was under way is written.
  """
  optimizer = make_optimizer(config)
  begin = functools.partial(_begin, optimizer)
  abstract = mesh_lib.abstract_init(begin, mesh, policy.params)
  size = sum(leaf.size for leaf in jax.tree.leaves(policy.params))
  cost = {"tokens": 0.0, "flops": 0.0}
  made_from = _inputs(task, policy)
  with Checkpoints(directory) as checkpoints:
    batches = iter(draws(task, config.batch_size))
    restored = _restore(checkpoints, abstract)
    first = _go_on(restored, batches, config, task, made_from, directory) if restored else 0
    state = restored.state if restored else mesh_lib.sharded_init(begin, mesh, policy.params)
    if first:
      advance(first)
    if first == config.steps:
      return state.params, cost
    metrics.drop_after(task.round, "consolidate", first if restored else -1)
    path = attention_path(config, policy)
    teacher = prepare_teacher(config, task, policy, mesh, path)
    _tell_if_on_host(config, task, teacher)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = _make_step(config, policy, optimizer, path, shardings)

    def failed(step: int, what: str, prefixes: Sequence[int]) -> finite.NotFiniteError:
      return failure.failed(
        what,
        config=config,
        dtype=policy.dtype,
        round=task.round,
        step=step,
        ids=[task.ids[i] for i in prefixes],
        checkpoints=checkpoints,
      )

    try:
      probe = _make_probe(config, task, policy, teacher, limit, mesh, path)
    except finite.NotFiniteError as error:
      raise failed(first, str(error), error.prompts) from error
    if first == 0:
      probed = probe(policy.params)
      metrics.write("consolidate", 0, round=task.round, **probed)
      if what := failure.broken(probed):
        raise failed(0, what, range(min(config.log_probe, len(task.prompts))))
    with signals.deferred() as terminated:
      for i in range(first + 1, config.steps + 1):
        started, drawn = time.time(), next(batches)
        student = policy.replace(state.params)
        try:
          batch, lengths = sample_batch(
            task, student, policy, drawn["prefix"], drawn["draw"], config, limit, "consolidate"
          )
        except finite.NotFiniteError as error:
          metrics.write("consolidate", i, round=task.round, logits=math.nan)
          raise failed(i, str(error), drawn["prefix"][list(error.prompts)]) from error
        state, measured = step(state, teacher, _place(batch, mesh, config.batch_size))
        tokens = float((batch.segments > 0).sum())
        cost["tokens"] += tokens
        # A pass of the sampler, one of the teacher, and three of the student: forward, and both
        # gradients.
        cost["flops"] += 2.0 * size * 5 * tokens
        measured = {name: float(value) for name, value in jax.device_get(measured).items()}
        scalars = _logged(measured, lengths)
        saving = i % config.checkpoint_every == 0 or i == config.steps
        scalars |= probe(state.params) if saving else {}
        # The line comes before the checkpoint: if a kill falls between them, the step is done again
        # and its line dropped; none is missing.
        metrics.write(
          "consolidate",
          i,
          round=task.round,
          **scalars,
          seconds=time.time() - started,
          compiles=metrics.compiles(),
        )
        if what := failure.broken(scalars, measured, state):
          raise failed(i, what, drawn["prefix"])
        ending = terminated()
        if saving or ending:
          checkpoints.save(i, state, {"iterator": batches.get_state(), "made_from": made_from})
        advance(1, f"loss {measured['loss']:.4g}")
        if ending:
          checkpoints.wait()
          what = f"step {i} of {config.steps} is saved in {checkpoints.directory}"
          raise signals.Terminated(what)
    checkpoints.wait()
  return state.params, cost


def _go_on(
  restored: Restored,
  batches: Any,
  config: Any,
  task: Task,
  made_from: dict[str, str],
  directory: str | os.PathLike,
) -> int:
  """Returns the step of the round's last whole checkpoint, and sets the batches to what follows it.

  Raises:
    ValueError: it was trained from something else, or for more steps than the configuration says.
  """
  _compare_inputs(directory, restored.extra.get("made_from"), made_from)
  batches.set_state(restored.extra["iterator"])
  if restored.step < config.steps:
    logging.warning("round %d: consolidation goes on after step %d", task.round, restored.step)
  if restored.step > config.steps:
    raise ValueError(
      f"{directory}: holds step {restored.step}, but config.consolidation.steps is "
      f"{config.steps}: it must be at least that"
    )
  return restored.step


def _tell_if_on_host(config: Any, task: Task, teacher: teacher_lib.Teacher) -> None:
  if teacher.keys.sharding.memory_kind == "pinned_host":
    logging.warning(
      "round %d: keys and values of the knowledge are more than %g GiB, as "
      "config.consolidation.knowledge_gib says: they stay on the host, layers run in a loop",
      task.round,
      config.knowledge_gib,
    )


def _make_step(config, policy, optimizer, path, shardings):
  return step_lib.make_step(
    policy.architecture,
    optimizer,
    kind=config.kind,
    support=config.support,
    k=config.k,
    temperature=config.temperature,
    chunk=config.chunk,
    micro_tokens=config.micro_tokens,
    dtype=policy.dtype,
    remat=config.remat,
    path=path,
    shardings=shardings,
  )


def _inputs(task: Task, policy: Policy) -> dict[str, str]:
  """What a training is made from → a digest of it; kept in each checkpoint."""
  return {
    "weights": fingerprint(policy.params),
    "prompts": schema.digest(task.prompts),
    "knowledge": schema.digest(task.knowledge),
  }


def check_inputs(directory: str | os.PathLike, task: Task, policy: Policy) -> None:
  """Raises ValueError if the newest checkpoint in `directory` was trained from other weights,
  prompts or knowledge than these.
  """
  if steps_done(directory):
    with Checkpoints(directory) as checkpoints:
      extra = checkpoints.extra()
    _compare_inputs(directory, (extra or {}).get("made_from"), _inputs(task, policy))


def _compare_inputs(
  directory: str | os.PathLike, before: dict[str, str] | None, now: dict[str, str]
) -> None:
  """Raises ValueError if they differ; an earlier version's checkpoint (None) does not say what it
  was trained from.
  """
  changed = [name for name in now if before and before.get(name) != now[name]]
  if changed:
    raise ValueError(
      f"{directory}: its checkpoints were trained from other {', '.join(changed)} than this run "
      "has now: restore them, choose "
      "another --workdir, or remove the folder to train anew"
    )


def _restore(checkpoints: Checkpoints, abstract: Any) -> Restored | None:
  """The newest whole checkpoint, or None.

  Raises:
    ValueError: its numbers are not finite: versions before this check went on with such ones.
  """
  restored = checkpoints.restore(abstract)
  if restored and (broken := finite.not_finite(restored.state)):
    raise ValueError(
      f"{checkpoints.directory / str(restored.step)}: holds numbers that are not finite, in "
      f"{finite.listed(broken)}: training had gone wrong before it was saved; remove that "
      "folder, and the same command goes on from the one before it, or begins the round anew"
    )
  return restored


def _logged(measured: dict[str, float], lengths: Sequence[int]) -> dict[str, float]:
  """A step's line of metrics, without single parameters and places that no response has."""
  without = {"not_finite"}
  without |= {name for name, (begin, _) in BUCKETS.items() if begin >= max(lengths)}
  without |= {name for name in measured if name.startswith(step_lib.GRADIENT)}
  scalars = {name: value for name, value in measured.items() if name not in without}
  return scalars | {"response_tokens": float(np.mean(lengths))}


def _begin(optimizer: optax.GradientTransformation, params: Any) -> step_lib.State:
  return step_lib.init_state(jax.tree.map(lambda p: p.astype("float32"), params), optimizer)


def trained_params(
  config: Any, policy: Policy, directory: str | os.PathLike, mesh: jax.sharding.Mesh
) -> Any:
  """The parameters that `consolidate` left in `directory` after config.steps steps; None if it has
  not come so far.
  """
  if not os.path.isdir(directory):
    return None
  with Checkpoints(directory) as checkpoints:
    begin = functools.partial(_begin, make_optimizer(config))
    restored = _restore(checkpoints, mesh_lib.abstract_init(begin, mesh, policy.params))
  return restored.state.params if restored and restored.step == config.steps else None


def steps_done(directory: str | os.PathLike) -> int:
  """The step of the newest checkpoint in `directory`, whole or not; 0 if there is none. Nothing is
  opened or changed.
  """
  if not os.path.isdir(directory):
    return 0
  return max((int(name) for name in os.listdir(directory) if name.isdigit()), default=0)


def attention_path(config: Any, policy: Policy) -> str:
  """The attention that config.consolidation.attention asks for: "auto" is the fastest that is
  correct here (`attention.attend`).

  Raises:
    ValueError: rows may hold several samples, and "flash" would not keep them apart.
  """
  if config.attention == "flash" and config.pack:
    raise ValueError(
      'config.consolidation.attention is "flash", which does not keep a row\'s samples apart, and '
      "config.consolidation.pack is True: "
      'it must be False, or the attention "cudnn", "xla" or "auto"'
    )
  if config.attention != "auto":
    return config.attention
  if not _fast(policy):
    return "xla"
  return "cudnn" if config.pack else "flash"


def _fast(policy: Policy) -> bool:
  """Whether cuDNN and the kernels are there: on an NVIDIA GPU, in bfloat16."""
  return jax.default_backend() == "gpu" and np.dtype(policy.dtype) == "bfloat16"


def unroll(config: Any, policy: Policy, mesh: jax.sharding.Mesh) -> bool:
  """Whether the layers run without a loop, as config.consolidation.unroll asks for.

  Raises:
    ValueError: it asks for that on several devices.
  """
  if config.unroll == "yes" and mesh.size > 1:
    raise ValueError(
      f'config.consolidation.unroll is "yes" on {mesh.size} devices: it is for one; "auto" or "no" '
      "run on many"
    )
  possible = mesh.size == 1 and _fast(policy)
  return possible if config.unroll == "auto" else config.unroll == "yes"


def prepare_teacher(
  config: Any, task: Task, policy: Policy, mesh: jax.sharding.Mesh, path: str
) -> teacher_lib.Teacher:
  """The round's teacher, its texts read once; heads of keys and values are spread as those of the
  parameters are.

  Where they would take more than config.knowledge_gib of a device, they stay in the host's memory
  (of a run of one process).
  """
  a, longest = policy.architecture, max(map(len, task.knowledge))
  shardings = _knowledge_shardings(policy, mesh, len(task.knowledge), longest)[1]
  size = knowledge_bytes(policy, mesh, len(task.knowledge), longest)
  return teacher_lib.prepare(
    policy.params,
    a,
    task.knowledge,
    skip=task.skip,
    dtype=policy.dtype,
    path="flash" if path == "cudnn" else path,
    unroll=unroll(config, policy, mesh),
    shardings=(shardings["keys"], shardings["values"]),
    on_host=size > config.knowledge_gib * 2**30 and jax.process_count() == 1,
  )


def _knowledge_shardings(
  policy: Policy, mesh: jax.sharding.Mesh, texts: int, tokens: int
) -> tuple[jax.ShapeDtypeStruct, dict[str, Any]]:
  """The shape of the teacher's keys, and of its values, and how each lies on the mesh."""
  a, P = policy.architecture, teacher_lib.room([range(tokens)])
  shape = jax.ShapeDtypeStruct((a.layers, texts, a.kv_heads, P, a.head_size), policy.dtype)
  names = {"teacher": {"keys": shape, "values": shape}}
  return shape, mesh_lib.param_shardings(mesh, names)["teacher"]


def knowledge_bytes(policy: Policy, mesh: jax.sharding.Mesh, texts: int, tokens: int) -> int:
  """What keys and values of so many texts, the longest of so many tokens, take on a device."""
  shape, shardings = _knowledge_shardings(policy, mesh, texts, tokens)
  return 2 * math.prod(shardings["keys"].shard_shape(shape.shape)) * shape.dtype.itemsize


def _make_probe(config, task, policy, teacher, limit, mesh, path):
  """Statistics on one fixed batch, the same at every step of the round: exact KL, entropies, top-k
  mass, named probe_kl and so on.
  """
  count = min(config.log_probe, len(task.prompts))
  if count == 0:
    return lambda params: {}
  numbers = list(range(count))
  batch, _ = sample_batch(task, policy, policy, numbers, numbers, config, limit, "probe")
  batch = _place(batch, mesh, count)
  probe = step_lib.make_probe(
    policy.architecture,
    k=config.k,
    temperature=config.temperature,
    chunk=config.chunk,
    dtype=policy.dtype,
    path=path,
    mesh=mesh,
  )
  return lambda params: {
    f"probe_{name}": float(value) for name, value in probe(params, teacher, batch).items()
  }


def _place(batch: batch_lib.Batch, mesh: jax.sharding.Mesh, samples: int) -> batch_lib.Batch:
  """Puts the batch on the devices, rows spread over them.

  Rows are added, masked out: devices come out even, and few shapes are compiled, each for half a
  minute on a CPU. Packed samples need a little more than half as many rows in most batches.
  """
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  rooms = [-(-samples * eighths // (8 * shards)) * shards for eighths in (2, 5, 8)]
  padded = mesh_lib.pad_batch(
    batch, mesh, multiple=next(room for room in rooms if len(batch.mask) <= room)
  )
  return jax.device_put(padded, mesh_lib.batch_sharding(mesh))
