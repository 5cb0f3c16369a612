"""What the programs of a round's training take of a device: compiled from shapes alone, by the
compiler of the device that is planned for, which need not be there. Nothing is run, and there are
no weights.

What is held between programs is arithmetic, exact bytes of shapes and shardings. A program's
temporaries are what XLA's plan of the compiled program says.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oel_jax.consolidation import micro_batches, on_mesh, placement, restore, samples, trainer
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import task as task_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy import transformer
from oel_jax.policy.sampling import engine, groups, kv_cache, model, sampler, slot_room, slot_state
from oel_jax.policy.sampling.scheduler import CHUNK, Scheduler
from oel_jax.policy.sampling.token_sampling import Sampling
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime import target
from oel_jax.tasks import plan_collectives
from oel_jax.tasks.plan_shapes import EOS_IDS, Unread, Work, device_bytes, placed

# Where a TPU's program does not fit, there is no plan of it, but XLA says what it would need. That
# is all, though the message says temporaries: what copies its arguments needs twice their size.
NEEDS = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMG])")


@dataclasses.dataclass(frozen=True)
class Program:
  """What one program takes of a device, in bytes.

  Attributes:
    name: what it does.
    held: what lies there while it runs: its arguments, and what others go on with.
    arguments: the compiled program's; part of `held`.
    kept: what it returns beside what it puts in its arguments' place.
    temporaries: what it needs meanwhile, by the compiler's plan.
    known: of the temporaries, those that are arithmetic.
    too_large: whether the compiler gave it up for its size; `temporaries` is then what it said that
      the program would take beside its arguments.
    failed: why there is no such program; "": there is.
    sent: bytes that a device sends to others: axes of the mesh, as "data x fsdp" → operation →
      bytes. Of the step alone, and empty where a loop sends whose length nobody knows beforehand.
  """

  name: str
  held: dict[str, int]
  arguments: int
  kept: int
  temporaries: int
  known: dict[str, int] = dataclasses.field(default_factory=dict)
  too_large: bool = False
  failed: str = ""
  sent: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

  @property
  def total(self) -> int:
    return sum(self.held.values()) + self.kept + self.temporaries


class Planner:
  """The arguments of the programs on one mesh, and the programs."""

  def __init__(self, config: Any, policy: Unread, mesh: Mesh, work: Work):
    """`config` is config.consolidation."""
    self.config, self.policy, self.mesh, self.work = config, policy, mesh, work
    self.attn_impl = placement.attn_impl(config, policy)
    self.optimizer = restore.make_optimizer(config)
    self.whole = NamedSharding(mesh, PartitionSpec())
    begin = restore.beginning(self.optimizer, config.lora_rank)
    seed = [self._array(dtype=jnp.uint32)] if config.lora_rank else []
    self.state = mesh_lib.abstract_init(begin, mesh, policy.params, *seed)
    self.student = restore.abstract_left(config, policy.params, mesh)
    self.gradient = mesh_lib.abstract_init(restore.in_float32, mesh, policy.params)
    self.teacher, self.read_by = self._teacher()

  def _teacher(self) -> tuple[teacher_lib.Teacher, Any]:
    """The teacher, and the parameters that its texts are read by."""
    policy, work = self.policy, self.work
    shape, places = placement.knowledge_shardings(policy, self.mesh, work.texts, work.knowledge)
    size = placement.knowledge_bytes(policy, self.mesh, work.texts, work.knowledge)
    keys, values = (placed(shape, places[name]) for name in ("keys", "values"))
    self.on_host = size > self.config.knowledge_gib * 2**30 and self.hosts == 1
    if self.on_host:
      keys, values = (placed(x, x.sharding.with_memory_kind("pinned_host")) for x in (keys, values))
    cast = functools.partial(transformer.cast, dtype=policy.dtype, tables=True)
    read_by = placed(
      jax.eval_shape(cast, policy.params), jax.tree.map(lambda x: x.sharding, policy.params)
    )
    params = read_by
    self.is_unrolled = placement.unroll(self.config, policy, self.mesh) and not self.on_host
    if self.is_unrolled:
      fuse = lambda params: on_mesh.fuse(params, policy.architecture, policy.dtype, self.mesh)
      places = on_mesh.weight_shardings(self.mesh, read_by, policy.dtype) or self.whole
      params = placed(jax.eval_shape(fuse, read_by), places)
    each = self._array(work.texts)
    return teacher_lib.Teacher(params, keys, values, each, each), read_by

  @property
  def hosts(self) -> int:
    """Processes that the devices belong to."""
    return len({device.process_index for device in self.mesh.devices.flat})

  def _array(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=self.whole)

  def batch(self, count: int) -> tuple[Any, int]:
    """The batch of so many samples, laid out as the trainer does it, and the most tokens of a
    micro-batch.
    """
    work, prompt = self.work, (0,) * self.work.prompt
    task = task_lib.Task(
      prompts=(prompt,) * count,
      knowledge=((0,) * work.knowledge,) * work.texts,
      skip=(0,) * work.texts,
      given=(range(work.texts),) * count,
      seed=0,
      round=1,
      ids=("",) * count,
    )
    every = range(count)
    made, _ = samples.sample_batch(
      task, self.policy, self.policy, every, every, self.config, work.response, "plan"
    )
    micro_tokens = samples.micro_tokens_of(
      self.config, task.prompts, limit=work.response, samples=count, mesh=self.mesh
    )
    padded = samples.padded(made, self.mesh, count, micro_tokens)
    return placed(padded, mesh_lib.batch_sharding(self.mesh)), micro_tokens

  def held(self) -> dict[str, int]:
    """What lies on a device all through a round's training."""
    moments = device_bytes(self.state) - device_bytes(self.state.params)
    # Where nothing is cast, the teacher's arrays are the policy's own.
    teacher = device_bytes(self.teacher.params)
    if not self.is_unrolled:
      pairs = zip(jax.tree.leaves(self.read_by), jax.tree.leaves(self.policy.params), strict=True)
      teacher = sum(device_bytes(ours) for ours, theirs in pairs if ours.dtype != theirs.dtype)
    found = {
      "weights of the run": self.work.copies * device_bytes(self.policy.params),
      "weights trained": device_bytes(self.state.params),
      "optimizer": moments,
      "teacher": teacher,
    }
    return found

  def put_together(self) -> dict[str, int]:
    """Of adapters, the whole weights that are made to sample and to probe with."""
    if not self.config.lora_rank:
      return {}
    return {"weights put together": device_bytes(self.student)}

  def prefix_cache(self) -> dict[str, int]:
    """The knowledge's keys and values on a device."""
    size = device_bytes((self.teacher.keys, self.teacher.values))
    return {"prefix cache": 0 if self.on_host else size}

  def read(self) -> Program:
    """The reading of the knowledge, which makes the prefix cache."""
    places = None if self.on_host else (self.teacher.keys.sharding, self.teacher.values.sharding)
    attn_impl = "flash" if self.attn_impl == "cudnn" else self.attn_impl
    by_texts = self.is_unrolled and self.mesh.size > 1
    jitted = teacher_lib._read(
      self.policy.architecture, self.policy.dtype, attn_impl, places, by_texts
    )
    texts = 1 if self.on_host else self.work.texts
    tokens = self._array(texts, self.teacher.keys.shape[3])
    given = self.read_by, tokens, self._array(texts)
    held = self.held()
    if self.is_unrolled:  # it has its own in the end
      held["teacher"] = device_bytes(self.read_by)
    return _program("reading the knowledge", held, self.prefix_cache(), jitted, *given)

  def probe(self) -> Program:
    """The probe of a fixed batch."""
    (batch, micro_tokens), config = self.batch(self.work.probe), self.config
    jitted = step_lib.make_probe(
      self.policy.architecture,
      k=config.k,
      temperature=config.temperature,
      chunk=config.chunk,
      micro_tokens=micro_tokens,
      dtype=self.policy.dtype,
      attn_impl=self.attn_impl,
      mesh=self.mesh,
    )
    held = self.held() | self.prefix_cache() | self.put_together() | {"batch": device_bytes(batch)}
    return _program("probe", held, {}, jitted, self.student, self.teacher, batch)

  def step(self) -> Program:
    """The optimizer's step."""
    batch, micro_tokens = self.batch(self.work.samples)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
    jitted = trainer.make_step(
      self.config, self.policy, self.optimizer, self.attn_impl, shardings, micro_tokens
    )
    held = self.held() | self.prefix_cache() | {"batch": device_bytes(batch)}
    sends = functools.partial(self._sent, batch, micro_tokens)
    how = dict(sends=sends if self.mesh.size > 1 else None)
    given = self.state, self.teacher, batch
    if self.config.lora_rank:
      given = *given, None, self.policy.params
    found = _program("step", held, {}, jitted, *given, **how)
    return dataclasses.replace(found, known=self._known())

  def micro_batches(self, batch: Any, micro_tokens: int) -> int:
    """Of a batch that is filled."""
    shards = mesh_lib.row_shards(self.mesh)
    return micro_batches.count_of(*batch.tokens.shape, shards, micro_tokens)

  def _sent(self, batch: Any, micro_tokens: int, compiled: Any) -> dict[str, dict[str, float]]:
    count = self.micro_batches(batch, micro_tokens)
    loops = (count,) if count > 1 else ()
    try:
      found = plan_collectives.read(compiled.as_text(), dict(self.mesh.shape), loops)
    # The second where a compiler is newer than what prints its programs.
    except (ValueError, jax.errors.JaxRuntimeError) as error:
      logging.warning("what devices send in a step is not counted: %s", error)
      return {}
    return plan_collectives.by_axis(found)

  def _known(self) -> dict[str, int]:
    """Of the step's temporaries, those whose size is arithmetic."""
    a, dtype = self.policy.architecture, self.policy.dtype
    vocabulary = a.vocabulary // self.mesh.shape["tensor"]
    cast = self.teacher.params
    if not self.is_unrolled:
      cast = {"layers": self.read_by["layers"]}
    return {
      "gradients": device_bytes(self.gradient),
      "weights cast": 0 if dtype == jnp.float32 else device_bytes(cast),
      "logits": 2 * self.config.chunk * vocabulary * 4,
    }

  def sampling(self) -> Iterator[Program]:
    """The sampler's programs as it draws a step's responses, each process its share of them."""
    dtype, work, local = self.policy.dtype, self.work, self._local_mesh()
    a = self.policy.architecture.share(self.policy.sample_tensor)
    devices = mesh_lib.row_shards(local)
    whole = NamedSharding(local, PartitionSpec()) if local else self.whole
    held = self.held() | self.prefix_cache() | self.put_together()
    given = self.student
    if self.hosts > 1:  # cast, and gathered (`spread.own`)
      given = placed(self.read_by, mesh_lib.param_shardings(local, self.read_by))
      held["sampler's weights, gathered"] = device_bytes(given)
    attn_impl = kv_cache.attn_impl(a, dtype)
    how = dict(architecture=self.policy.architecture, dtype=dtype, mesh=local)
    weights = jax.eval_shape(functools.partial(model.prepare, **how), given)
    places = self.whole
    if local:
      places = jax.tree.map(lambda spec: NamedSharding(local, spec), model.specs(local, weights))
    weights = placed(weights, places)
    ready = {"sampler's weights": device_bytes(weights)}
    yield _program("sampling: weights made ready", held, ready, model.prepare, given, **how)
    prompts = -(-work.samples // self.hosts)
    room = slot_room.slot_room(
      [work.prompt] * prompts,
      work.response,
      attn_impl=attn_impl,
      devices=devices,
      tokens=sampler.MAX_CACHE_BYTES // sampler.token_bytes(a, dtype),
    )
    # All prompts are unlike: none takes over what another's slot holds.
    asked = [[i, *[0] * (work.prompt - 1)] for i in range(prompts)]
    scheduler = Scheduler(asked, slots=room.slots, columns=room.columns, devices=devices)
    entry = scheduler.next_entries()[0]
    held |= ready
    slots, rows = self._slots(room, attn_impl, local)
    held["key-value cache"] = device_bytes((slots.keys, slots.values))
    if room.columns < room.max_columns:  # as it grows for the last time, the one before it lives on
      held["key-value cache, outgrown"] = held["key-value cache"] * room.columns // room.max_columns
    how = dict(
      architecture=a,
      sampling=Sampling(temperature=self.config.temperature),
      logprobs=False,
      attn_impl=attn_impl,
      mesh=local,
    )
    each = rows(devices * entry.batch)
    requests = rows(devices * entry.batch, dtype=jnp.uint32), each, rows(each.shape[0], EOS_IDS)
    tokens = rows(devices * entry.batch, entry.length)
    logits = {"logits": 4 * entry.batch * self.policy.architecture.vocabulary}
    prefill = _program(
      "sampling: prefill",
      held,
      {},
      engine.prefill_insert,
      *(weights, slots, tokens, each, each, requests, None),
      **how,
    )
    yield dataclasses.replace(prefill, known=logits)
    number = placed(jax.ShapeDtypeStruct((), jnp.int32), whole)
    decode = _program(
      "sampling: decoding",
      held,
      {},
      engine.decode,
      weights,
      slots,
      number,
      number,
      chunk=CHUNK,
      **how,
    )
    logits = {"logits": 4 * room.slots * self.policy.architecture.vocabulary}
    yield dataclasses.replace(decode, known=logits)

  def _local_mesh(self) -> Mesh | None:
    """Those of the mesh's devices that one process samples on, in groups; None for one."""
    own = groups.local(self.mesh)
    return groups.make_mesh(own, self.policy.sample_tensor) if self.mesh.size > 1 else None

  def _slots(
    self, room: slot_room.SlotRoom, attn_impl: str, local: Mesh | None
  ) -> tuple[slot_state.Slots, Callable[..., Any]]:
    """The slots at their largest, and what makes arrays of so many rows as these lie."""
    empty = functools.partial(
      slot_state.empty,
      architecture=self.policy.architecture.share(self.policy.sample_tensor),
      mesh=local,
      rows=room.devices * room.slots,
      columns=room.max_columns,
      eos_ids=EOS_IDS,
      dtype=self.policy.dtype,
      attn_impl=attn_impl,
    )
    shapes = jax.eval_shape(empty)
    if local is None:
      return placed(shapes, self.whole), self._array
    specs = slot_state.specs(local, shapes)
    places = jax.tree.map(lambda spec: NamedSharding(local, spec), specs)
    by_rows = NamedSharding(local, PartitionSpec(slot_state.row_axes(local)))
    rows = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=by_rows)
    return placed(shapes, places), rows

  def programs(self) -> Iterator[Program]:
    """All of them, in the order in which a round runs them; each takes seconds to a minute."""
    yield self.read()
    if self.work.probe:
      yield self.probe()
    yield from self.sampling()
    yield self.step()


def _program(
  name: str,
  held: dict[str, int],
  makes: dict[str, int],
  jitted: Any,
  *args: Any,
  sends: Callable[[Any], Any] | None = None,
  **static: Any,
) -> Program:
  """What the compiler of the device that is planned for says of the program, which makes what is
  held from then on; `sends` finds in the compiled program what devices send.
  """
  platform = {"gpu": "cuda"}.get(target.backend(), target.backend())
  lowered = jitted.trace(*args, **static).lower(lowering_platforms=(platform,))
  arguments = device_bytes(args)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    found = NEEDS.search(str(error))
    if not found:
      return Program(name, dict(held), arguments, 0, 0, failed=_reason(str(error)))
    needs = float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]]
    return Program(name, dict(held), arguments, 0, max(0, int(needs) - arguments), too_large=True)
  memory = compiled.memory_analysis()
  kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
  kept = max(0, kept - sum(makes.values()))
  sizes = memory.argument_size_in_bytes, kept, memory.temp_size_in_bytes
  sent = sends(compiled) if sends else {}
  return Program(name, held | makes, *sizes, sent=sent)


def _reason(message: str) -> str:
  """The line of a compiler's error that says what is wrong: the last before a list of places."""
  said = message.split("Suspected Python Code Location")[0].strip().splitlines()
  return said[-1].strip()[:200] if said else "no reason given"
