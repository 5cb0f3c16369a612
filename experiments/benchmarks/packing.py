"""The consolidation step as a round runs it, on responses of mixed lengths: how many programs its
batches compile, how much of its rows is padding, and tokens a second; random weights.

    python experiments/benchmarks/packing.py --json=packing.json equal mixed desk
    JAX_PLATFORMS=cpu python experiments/benchmarks/packing.py --shapes desk quickstart mixed

With PYTHONPATH=OLDER_CHECKOUT the same of an older one. "GiB so far" is the peak of the process: of
one work alone where it is given alone.
"""

import argparse
import collections
import dataclasses
import functools
import statistics
import time
import types
from collections.abc import Iterator
from typing import Any

import figures_file
import jax
import jax.numpy as jnp
import measure
import ml_collections
import numpy as np

from oel_jax import config as config_lib
from oel_jax.consolidation import micro_batches, placement, restore, samples
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation.task import Task
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import transformer
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.metrics import CompileCounter

FEW, MANY = 4, 40  # steps that are timed, and batches whose shapes are counted


@dataclasses.dataclass(frozen=True)
class Work:
  """A round's work: an architecture, samples a step, tokens of prompts (from, to), knowledge texts
  and their tokens, most tokens of a response, and how long responses are.

  `responses`: "limit" (all of them that long), ("between", shortest), spread evenly over the
  logarithm up to the limit, or ("about", median, sigma), log-normal and cut off at the limit.
  """

  architecture: str
  samples: int
  prompts: tuple[int, int]
  texts: int
  knowledge: int
  limit: int
  responses: Any
  pack: bool = True


WORK = {
  # The benchmark of step.py, and as long as its longest at most.
  "equal": Work("qwen3-1.7b", 64, (600, 600), 10, 2048, 1024, "limit", pack=False),
  "mixed": Work("qwen3-1.7b", 64, (600, 600), 10, 2048, 1024, ("between", 50)),
  "mixed-flash": Work("qwen3-1.7b", 64, (600, 600), 10, 2048, 1024, ("between", 50), pack=False),
  # As experiments/help_desk.py and frozen_lake.py were seen to be.
  "desk": Work("qwen2.5-1.5b", 64, (45, 85), 10, 500, 96, ("about", 27, 0.5)),
  "quickstart": Work("pocket", 16, (60, 192), 8, 192, 96, ("about", 20, 0.7)),
  "thinking": Work("qwen3-1.7b", 64, (300, 900), 10, 2048, 1024, ("about", 450, 0.6)),
  "tiny": Work("pocket-tiny", 8, (5, 12), 2, 10, 16, ("about", 5, 0.5)),
}


def task_of(work: Work, vocabulary: int) -> Task:
  """Prompts for ten steps, and the texts, of random ids."""
  rng = np.random.default_rng(0)
  ids = lambda count, low, high: tuple(
    tuple(rng.integers(3, vocabulary, n).tolist()) for n in rng.integers(low, high + 1, count)
  )
  count = 10 * work.samples
  return Task(
    prompts=ids(count, *work.prompts),
    knowledge=ids(work.texts, work.knowledge, work.knowledge),
    skip=(0,) * work.texts,
    given=(range(work.texts),) * count,
    seed=0,
    round=1,
    ids=tuple(map(str, range(count))),
  )


def lengths(work: Work, rng: np.random.Generator) -> np.ndarray:
  """Tokens of one step's responses, int."""
  if work.responses == "limit":
    return np.full(work.samples, work.limit)
  kind, *how = work.responses
  if kind == "between":
    drawn = np.exp(rng.uniform(np.log(how[0]), np.log(work.limit + 1), work.samples))
  else:
    drawn = how[0] * np.exp(how[1] * rng.standard_normal(work.samples))
  return np.clip(drawn, 1, work.limit).astype(int)


def batches(
  work: Work, config: ml_collections.ConfigDict, task: Task, mesh: jax.sharding.Mesh
) -> Iterator[tuple[int, Any]]:
  """(Real tokens, batch as `trainer` places it) of one step after the other."""
  rng, number = np.random.default_rng(1), 0
  a = architecture_lib.named(work.architecture)
  respond = lambda prompts, seeds, **how: [
    rng.integers(3, a.vocabulary, n).tolist() for n in lengths(work, rng)
  ]
  student = types.SimpleNamespace(
    architecture=a, sample=respond, tokenizer=types.SimpleNamespace(pad_id=0)
  )
  while True:
    chosen = rng.permutation(len(task.prompts))[: work.samples]
    drawn = range(number, number + work.samples)
    made, responses = samples.sample_batch(
      task, student, student, chosen, drawn, config, work.limit, "consolidate"
    )
    number += work.samples
    count = sum(len(task.prompts[i]) for i in chosen) + sum(map(len, responses))
    yield count, samples.place(made, mesh, work.samples, *micro_tokens(work, config, task, mesh))


def micro_tokens(work: Work, config: Any, task: Task, mesh: Any) -> tuple[int, ...]:
  """What `place` is told of them; nothing, in checkouts where it was not."""
  if not hasattr(samples, "micro_tokens_of"):
    return ()
  how = dict(limit=work.limit, samples=work.samples, mesh=mesh)
  return (samples.micro_tokens_of(config, task.prompts, **how),)


def run_tokens(batch: Any, micro: tuple[int, ...], config: Any) -> tuple[int, int]:
  """Tokens that the step computes, padding included, and in how many micro-batches."""
  rows, length = batch.tokens.shape
  parts = micro_batches.count_of(rows, length, 1, *(micro or (config.micro_tokens,)))
  counts = np.asarray(batch.mask).reshape(-1, parts, batch.mask.shape[1]).any((0, 2))
  run = int(counts.nonzero()[0].max()) + 1 if micro else parts
  return rows * length * run // parts, run


def shapes(name: str) -> dict[str, Any]:
  """What the batches of many steps are like; nothing is run."""
  work, mesh = WORK[name], mesh_lib.make_mesh(config_lib.default().mesh)
  config = settings(work)
  task = task_of(work, architecture_lib.named(work.architecture).vocabulary)
  micro, seen, found = micro_tokens(work, config, task, mesh), collections.Counter(), []
  for real, batch in (pair for pair, _ in zip(batches(work, config, task, mesh), range(MANY))):
    seen[(*batch.tokens.shape, *batch.at.shape[1:], *batch.texts.shape[1:])] += 1
    computed, run = run_tokens(batch, micro, config)
    found.append((real, computed, run))
  real, computed, run = np.sum(found, axis=0)
  return {
    "work": name,
    "programs": len(seen),
    "padding": float(1 - real / computed),
    "tokens": float(real / MANY),
    "micro-batches": float(run / MANY),
    "rows x length x responses x texts": ", ".join("x".join(map(str, one)) for one in seen),
  }


def settings(work: Work) -> ml_collections.ConfigDict:
  """config.consolidation of the work."""
  config = config_lib.default().consolidation
  config.update(pack=work.pack, batch_size=work.samples)
  return config


def speed(name: str) -> dict[str, Any]:
  """Steps until FEW compiled nothing, each on responses of its own."""
  work, mesh = WORK[name], mesh_lib.make_mesh(config_lib.default().mesh)
  config, a = settings(work), architecture_lib.named(work.architecture)
  dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
  task = task_of(work, a.vocabulary)
  params = jax.jit(lambda key: transformer.init(a, key))(jax.random.key(0))
  policy = Policy(a, params, types.SimpleNamespace(vocabulary=a.vocabulary), dtype)
  attn_impl = placement.attn_impl(config, policy)
  teacher = placement.prepare_teacher(config, task, policy, mesh, attn_impl)
  optimizer = restore.make_optimizer(config)
  begin = functools.partial(restore.begin, optimizer)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, mesh_lib.abstract_init(begin, mesh, params))
  state = mesh_lib.sharded_init(begin, mesh, params)
  micro = micro_tokens(work, config, task, mesh)
  step = step_lib.make_step(
    a,
    optimizer,
    micro_tokens=(micro or (config.micro_tokens,))[0],
    dtype=dtype,
    remat=config.remat,
    attn_impl=attn_impl,
    shardings=shardings,
  )
  del params, policy
  compiled, took, found, steps = CompileCounter(), [], [], 0
  for real, batch in batches(work, config, task, mesh):
    before, started = compiled(), time.perf_counter()
    state, metrics = step(state, teacher, batch)
    jax.block_until_ready(metrics)
    steps += 1
    if compiled() == before:
      took.append(time.perf_counter() - started)
      found.append((real, *run_tokens(batch, micro, config)))
    if len(took) == FEW:
      break
  compiled.close()
  real, computed, run = np.sum(found, axis=0)
  peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")  # none on a CPU
  return {
    "work": name,
    "attention": attn_impl,
    "steps": steps,
    "programs": step._cache_size(),
    "compile s": compiled.seconds,
    "step s": statistics.mean(took),
    "tokens/s": float(real / sum(took)),
    "padding": float(1 - real / computed),
    "micro-batches": float(run / len(found)),
    **({} if peak is None else {"GiB so far": peak / 2**30}),
  }


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("work", nargs="+", choices=list(WORK))
  parser.add_argument("--shapes", action="store_true", help="count shapes and padding, run nothing")
  parser.add_argument("--json", type=figures_file.to_write, help="where to write the figures")
  args = parser.parse_args(argv)
  rows = []
  for name in args.work:
    rows.append((shapes if args.shapes else speed)(name))
    print(rows[-1], flush=True)
  measure.report(rows, "packed rows", args.json)


if __name__ == "__main__":
  main()
