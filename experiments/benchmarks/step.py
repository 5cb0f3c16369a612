"""One consolidation step beside the PyTorch peer's and the time of its matrix work alone; random
weights of Qwen3 shapes.

python experiments/benchmarks/step.py --peer=peer_torch.py --json=step.json 1.7b
JAX_PLATFORMS=cpu python experiments/benchmarks/step.py --json=step.json tiny
"""

import argparse
import dataclasses
import gc
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import transformer
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


def flops(work: Work, a: architecture_lib.Architecture) -> tuple[float, float]:
  """Of the teacher's pass and of the update (`plan_seconds.step_flops`)."""
  return plan_seconds.step_flops(a, work.samples, work.prompt, work.response, work.knowledge)


def row(work: Work, rate: float, dtype: Any, **options: Any) -> dict[str, Any]:
  """One measurement, in steady state; the knowledge is read before, once a round."""
  a = architecture_lib.named(work.architecture)
  params = jax.jit(lambda key: transformer.init(a, key))(jax.random.key(0))
  knowledge = (
    np.random.default_rng(1).integers(3, a.vocabulary, (work.texts, work.knowledge)).tolist()
  )
  attn_impl = "xla" if options["attn_impl"] == "xla" else "flash"
  read = lambda: teacher_lib.prepare(
    params, a, knowledge, dtype=dtype, attn_impl=attn_impl, unroll=options["unroll"]
  )
  reading = measure.seconds(lambda: read().keys, repeats=1)
  teacher = jax.block_until_ready(read())
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.01))
  state = jax.jit(lambda params: step_lib.init_state(params, optimizer))(params)
  del params, read  # of float32, one copy
  batch = jax.device_put(random_batch(work, a.vocabulary, options["attn_impl"] != "flash"))
  how = {name: value for name, value in options.items() if name != "unroll"}
  step = step_lib.make_step(a, optimizer, dtype=dtype, **how).lower(state, teacher, batch).compile()
  # of this program alone; the device's own peak is that of all rows so far
  memory = step.memory_analysis()
  held = [state]
  del state

  def call():
    held[0], metrics = step(held[0], teacher, batch)
    return metrics

  took, kinds = measure.seconds(call), measure.kernels(call)
  micro_batches = step_lib.micro_batches_of(*batch.tokens.shape, 1, options["micro_tokens"])
  cut = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
  score = jax.jit(
    lambda teacher, cut: jax.lax.map(
      lambda micro_batch: teacher_lib.teacher_hidden(
        teacher, a, micro_batch, dtype=dtype, attn_impl=options["attn_impl"]
      ),
      cut,
    )
  )
  teacher_took = measure.seconds(score, teacher, cut, repeats=3)
  peak = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )
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
    "GiB": peak / 2**30,
    "kernels ms": kinds,
  }


def options(how: str, work: Work) -> list[dict[str, Any]]:
  """What --how says."""
  default = (
    "flash:dots:{}:512:unroll" if jax.default_backend() == "gpu" else "xla:none:{}:8:unroll"
  ).format(work.micro_tokens)
  made = []
  for one in (how or default).split(","):
    attn_impl, remat, micro_tokens, chunk, loop = one.split(":")
    made.append(
      dict(
        attn_impl=attn_impl,
        remat=remat,
        micro_tokens=int(micro_tokens),
        chunk=int(chunk),
        unroll=loop == "unroll",
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
    try:
      rows.append(row(changed, rate, dtype, **way))
    except (
      jax.errors.JaxRuntimeError
    ) as error:  # out of memory: the other rows are still worth having
      what = {
        "policy": changed.architecture,
        "samples": changed.samples,
        "knowledge": changed.knowledge,
        **way,
      }
      rows.append({**what, "error": str(error)[:80]})
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


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("work", choices=list(WORK))
  parser.add_argument("--peer", help="path of peer_torch.py")
  parser.add_argument("--json", help="where to write the figures")
  parser.add_argument(
    "--how",
    default="",
    help="PATH:REMAT:MICRO_TOKENS:CHUNK:LOOP[,…], LOOP unroll or scan, each a row; default: the "
    "fastest",
  )
  parser.add_argument(
    "--growth", action="store_true", help="also fewer samples, and no to much knowledge"
  )
  args = parser.parse_args(argv)
  measure.report(run(args.work, args.how, args.growth, args.peer), "consolidation step", args.json)


if __name__ == "__main__":
  main()
