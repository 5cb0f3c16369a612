"""One consolidation step beside the PyTorch peer's and the time of its matrix work alone; random
weights of Qwen3 shapes.

python experiments/benchmarks/step.py --peer=peer_torch.py --json=step.json 1.7b
python experiments/benchmarks/step.py --mesh=data=2 --mesh=fsdp=2 --json=mesh.json 1.7b
JAX_PLATFORMS=cpu python experiments/benchmarks/step.py --json=step.json tiny
"""

import argparse
import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable
from typing import Any

import figures_file
import jax
import jax.numpy as jnp
import measure
import ml_collections
import numpy as np
import optax

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import micro_batches, streamed
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import parameters, transformer
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.tasks import plan_seconds


@dataclasses.dataclass(frozen=True)
class Work:
  """A step's work: an architecture, and tokens of its samples, prompts, knowledge texts and
  responses.
  """

  architecture: str
  samples: int
  prompt: int
  knowledge: int
  response: int
  texts: int = 10
  micro_tokens: int = 16384  # those that fit and waste least

  @property
  def tokens(self) -> int:
    return self.samples * (self.prompt + self.response)


WORK = {
  "1.7b": Work("qwen3-1.7b", 64, 600, 2048, 1024),
  "4b": Work("qwen3-4b", 16, 600, 8192, 1024, micro_tokens=6500),
  "8b": Work("qwen3-8b", 32, 600, 2048, 1024, micro_tokens=6500),  # does not fit one GPU
  "tiny": Work("pocket-tiny", 4, 6, 10, 8, texts=2, micro_tokens=30),
}
GROWTH = {
  "1.7b": [
    *(dict(samples=samples) for samples in (4, 16, 40)),
    *(dict(samples=16, knowledge=n) for n in (0, 8192, 16384)),
  ],
  "tiny": [dict(knowledge=0)],
}


def random_batch(work: Work, vocabulary: int, pack: bool) -> batch_lib.Batch:
  """Samples of the full length, each given a text by turns."""
  rng = np.random.default_rng(0)
  prompts, responses = (
    rng.integers(3, vocabulary, (work.samples, n)).tolist() for n in (work.prompt, work.response)
  )
  return batch_lib.assemble(
    prompts,
    [i % work.texts for i in range(work.samples)],
    responses,
    pad_id=0,
    length=work.prompt + work.response,
    response_length=work.response,
    pack=pack,
  )


def random_knowledge(work: Work, vocabulary: int) -> list[list[int]]:
  """The texts' ids."""
  return np.random.default_rng(1).integers(3, vocabulary, (work.texts, work.knowledge)).tolist()


def flops(work: Work, a: architecture_lib.Architecture) -> tuple[float, float]:
  """Of the teacher's pass and of the update (`plan_seconds.step_flops`)."""
  return plan_seconds.step_flops(a, work.samples, work.prompt, work.response, work.knowledge)


def row(work: Work, rate: float, dtype: Any, **options: Any) -> dict[str, Any]:
  """One measurement, in steady state; the knowledge is read before, once a round."""
  a = architecture_lib.named(work.architecture)
  params = jax.jit(lambda key: transformer.init(a, key))(jax.random.key(0))
  knowledge = random_knowledge(work, a.vocabulary)
  attn_impl = "xla" if options["attn_impl"] == "xla" else "flash"
  read = lambda: teacher_lib.prepare(
    params, a, knowledge, dtype=dtype, attn_impl=attn_impl, unroll=options["unroll"]
  )
  reading = measure.seconds(lambda: read().keys, repeats=1)
  teacher = jax.block_until_ready(read())
  if share := options["teacher_on_host"]:
    teacher = streamed.from_teacher(teacher, share)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.01))
  state = jax.jit(lambda params: step_lib.init_state(params, optimizer))(params)
  del params, read  # of float32, one copy
  batch = jax.device_put(random_batch(work, a.vocabulary, options["attn_impl"] != "flash"))
  how = {name: options[name] for name in ("attn_impl", "micro_tokens")} | {"dtype": dtype}
  ahead = lambda: streamed.ahead(teacher, a, batch, **how)
  step = step_lib.make_step(a, optimizer, **how, remat=options["remat"], chunk=options["chunk"])
  step = step.lower(state, *ahead()).compile()
  # of this program alone; the device's own peak is that of all rows so far
  memory = step.memory_analysis()
  held, losses = [state], []
  del state

  def call():
    held[0], metrics = step(held[0], *ahead())
    losses.append(metrics["loss"])
    return metrics

  took, kinds = measure.seconds(call), measure.kernels(call)
  stats = jax.local_devices()[0].memory_stats() or {}
  teacher_took = measure.seconds(scorer(teacher, a, batch, how), repeats=3)
  teacher_flops, update_flops = flops(work, a)
  limit, head = (
    (teacher_flops + update_flops) / rate,
    2 * a.width * a.vocabulary * work.samples * work.response,
  )
  return {
    "policy": work.architecture,
    "samples": work.samples,
    "knowledge": work.knowledge,
    **options,
    "step s": took,
    "limit s": limit,
    "of limit": limit / took,
    "teacher s": teacher_took,
    "update MFU": (update_flops + head) / rate / (took - teacher_took),
    "texts read s": reading,
    "GiB": measure.gib(memory),
    "GiB, device's peak so far": stats.get("peak_bytes_in_use", 0) / 2**30,
    "first loss": float(losses[0]),
    "kernels ms": kinds,
    "link": measure.link(teacher.layers[-1], streamed.put) if share else {},
  }


def scorer(
  teacher: Any, a: architecture_lib.Architecture, batch: Any, how: dict[str, Any]
) -> Callable[[], Any]:
  """The teacher's pass alone."""
  if isinstance(teacher, streamed.Streamed):
    return lambda: streamed.hidden(teacher, a, batch, **how)
  count = micro_batches.count_of(*batch.tokens.shape, 1, how["micro_tokens"])
  cut = micro_batches.cut(batch, count)
  one = functools.partial(
    teacher_lib.teacher_hidden, dtype=how["dtype"], attn_impl=how["attn_impl"]
  )
  score = jax.jit(lambda teacher, cut: jax.lax.map(lambda part: one(teacher, a, part), cut))
  return lambda: score(teacher, cut)


def spread_row(
  work: Work, sizes: dict[str, int], rate: float, dtype: Any, repeats: int, **options: Any
) -> dict[str, Any]:
  """The step on the first devices, as a mesh of these sizes; no sizes is one device, without one.

  Everything is born in its shards, so that what fits the mesh only can be measured.
  """
  a, devices = architecture_lib.named(work.architecture), math.prod(sizes.values())
  mesh = mesh_lib.make_mesh(
    ml_collections.ConfigDict({axis: sizes.get(axis, 1) for axis in mesh_lib.AXES}),
    jax.devices()[:devices],
  )
  init = lambda key: transformer.init(a, key)
  places = mesh_lib.param_shardings(mesh, parameters.abstract(a))
  params = jax.jit(init, out_shardings=places)(jax.random.key(0))
  knowledge = random_knowledge(work, a.vocabulary)
  attn_impl = "xla" if options["attn_impl"] == "xla" else "flash"
  room = teacher_lib.room(knowledge)
  texts = jax.ShapeDtypeStruct((a.layers, work.texts, a.kv_heads, room, a.head_size), dtype)
  texts = mesh_lib.param_shardings(mesh, {"teacher": {"keys": texts, "values": texts}})["teacher"]
  started = time.perf_counter()
  teacher = teacher_lib.prepare(
    params,
    a,
    knowledge,
    dtype=dtype,
    attn_impl=attn_impl,
    unroll=options["unroll"],
    shardings=(texts["keys"], texts["values"]),
  )
  jax.block_until_ready(teacher.keys)
  reading = time.perf_counter() - started
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.01))
  begin = lambda params: step_lib.init_state(params, optimizer)
  shardings = jax.tree.map(
    lambda leaf: leaf.sharding, mesh_lib.abstract_init(begin, mesh, parameters.abstract(a))
  )
  state = jax.jit(begin, out_shardings=shardings, donate_argnums=0)(params)
  del params
  batch = random_batch(work, a.vocabulary, options["attn_impl"] != "flash")
  batch = mesh_lib.put(batch, mesh_lib.batch_sharding(mesh))
  how = {name: options[name] for name in ("attn_impl", "micro_tokens", "remat", "chunk")}
  step = step_lib.make_step(a, optimizer, dtype=dtype, shardings=shardings, **how)
  started = time.perf_counter()
  step = step.lower(state, teacher, batch).compile()
  compiling, memory = time.perf_counter() - started, step.memory_analysis()
  held, losses = [state], []
  del state

  def call():
    held[0], metrics = step(held[0], teacher, batch)
    losses.append(metrics["loss"])
    return metrics

  took, kinds = measure.seconds(call, repeats=repeats), measure.kernels(call)
  return {
    "mesh": ", ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device",
    "policy": work.architecture,
    "samples": work.samples,
    "knowledge": work.knowledge,
    **options,
    "step s": took,
    "tokens/s a device": work.tokens / took / devices,
    "of limit": sum(flops(work, a)) / rate / devices / took,
    "first loss": float(losses[0]),
    "texts read s, compiled": reading,
    "compile s": compiling,
    "GiB": measure.gib(memory),
    "collectives": collectives(step.as_text()),
    "kernels ms": kinds,
  }


def collectives(text: str) -> dict[str, int]:
  """How many of each kind a program has."""
  kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
  count = lambda kind: text.count(f" {kind}(") + text.count(f" {kind}-start(")
  return {kind: count(kind) for kind in kinds}


def options(how: str, work: Work) -> list[dict[str, Any]]:
  """What --how says."""
  default = (
    "flash:dots:{}:512:unroll" if jax.default_backend() == "gpu" else "xla:none:{}:8:unroll"
  ).format(work.micro_tokens)
  made = []
  for one in (how or default).split(","):
    attn_impl, remat, micro_tokens, chunk, loop, *share = one.split(":")
    made.append(
      dict(
        attn_impl=attn_impl,
        remat=remat,
        micro_tokens=int(micro_tokens),
        chunk=int(chunk),
        unroll=loop == "unroll",
        teacher_on_host=float(*share),
      )
    )
  return made


def run(name: str, how: str, growth: bool, peer: str | None) -> list[dict[str, Any]]:
  """The work in each way of `how`, beside the peer; then smaller and larger work in the first."""
  work = WORK[name]
  theirs = measure.peer(
    peer,
    f"step_bench('{name}', {work.samples}, {work.prompt}, {work.knowledge}, {work.response}, "
    "20480)",
  )
  # Not before the peer is done: JAX takes the memory as soon as it is asked for its devices.
  ways = options(how, work)
  dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
  rate, rows = measure.matrix_rate(dtype), []
  works = [(work, way) for way in ways]
  works += [
    (dataclasses.replace(work, **change), ways[0])
    for change in (GROWTH.get(name, []) if growth else [])
  ]
  for changed, way in works:
    what = dict(policy=changed.architecture, samples=changed.samples, knowledge=changed.knowledge)
    rows.append(measured_or_error(lambda: row(changed, rate, dtype, **way), **what, **way))
    print(rows[-1], flush=True)
    gc.collect()
  for line in theirs:
    faster = line["step_s"] / rows[0].get("step s", np.nan)
    rows.append(
      {
        "policy": "PyTorch peer",
        "samples": line["B"],
        "knowledge": line["knowledge"],
        "step s": line["step_s"],
        "teacher s": line["teacher_s"],
        "GiB": line["peak_gib"],
        "ours is faster by": faster,
      }
    )
  return rows


def run_meshes(
  name: str, how: str, meshes: list[str], strong: bool, repeats: int
) -> list[dict[str, Any]]:
  """The work on one device, and on each mesh with as many samples a device (with `strong`, with as
  many in all, too), beside it.
  """
  work = WORK[name]
  way = options(how, work)[0]
  dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
  rate, rows, alone = measure.matrix_rate(dtype), [], None
  sizes = [
    {axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))}
    for mesh in meshes
  ]
  for one in [{}, *sizes]:
    devices = math.prod(one.values())
    more = dataclasses.replace(work, samples=work.samples * devices)
    for scaling, changed in [("weak", more)] + [("strong", work)] * (strong and devices > 1):
      measured = measured_or_error(
        lambda: spread_row(changed, one, rate, dtype, repeats, **way), mesh=str(one)
      )
      alone = measured.get("step s") if not one else alone
      if one and alone and "step s" in measured:
        ideal = alone * changed.samples / work.samples / devices
        measured |= {"scaling": scaling, "of one device's": ideal / measured["step s"]}
      rows.append(measured)
      print(rows[-1], flush=True)
      gc.collect()
  return rows


def measured_or_error(measured: Callable[[], dict[str, Any]], **what: Any) -> dict[str, Any]:
  """The row, or what could not be measured and why: other rows are still worth having where one is
  out of memory.
  """
  try:
    return measured()
  except jax.errors.JaxRuntimeError as error:
    return {**what, "error": str(error)[:80]}


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("work", choices=list(WORK))
  parser.add_argument("--peer", help="path of peer_torch.py")
  parser.add_argument("--json", type=figures_file.to_write, help="where to write the figures")
  parser.add_argument(
    "--how",
    default="",
    help="PATH:REMAT:MICRO_TOKENS:CHUNK:LOOP[:TEACHER_ON_HOST][,…], LOOP unroll or scan, each a "
    "row, those that need least first, as the device's peak never falls; default: the fastest",
  )
  parser.add_argument(
    "--growth", action="store_true", help="also fewer samples, and no to much knowledge"
  )
  parser.add_argument(
    "--mesh",
    action="append",
    default=[],
    help="AXIS=SIZE[,…], of data, fsdp, tensor: on so many devices beside one; may be given again",
  )
  parser.add_argument(
    "--strong", action="store_true", help="with --mesh: also with as many samples in all as on one"
  )
  parser.add_argument("--repeats", type=int, default=5, help="with --mesh: steps timed")
  args = parser.parse_args(argv)
  if args.mesh:
    rows = run_meshes(args.work, args.how, args.mesh, args.strong, args.repeats)
  else:
    rows = run(args.work, args.how, args.growth, args.peer)
  measure.report(rows, "consolidation step", args.json)


if __name__ == "__main__":
  main()
