"""What `--stage=plan` says beside what a GPU uses: a round's training for real, random weights.

python experiments/benchmarks/plan.py --json=plan.json qwen3-1.7b
python experiments/benchmarks/plan.py --json=plan.json qwen3-4b --config.consolidation.batch_size=16
python experiments/benchmarks/plan.py --json=plan.json qwen3-8b --config.consolidation.lora_rank=16
JAX_PLATFORMS=cpu python experiments/benchmarks/plan.py pocket-tiny --config.plan.device=cpu

Set XLA_PYTHON_CLIENT_MEM_FRACTION=.95. The plan is made first, by a process that is told to use the
CPU alone. Then the knowledge is read, the probe and a step's responses are sampled, and two steps
run, by the trainer's own functions, with random prompts and knowledge of the planned lengths; no id
ends a response. `peak_bytes_in_use` never falls, so what a program used is known if
it used more than those before it: the programs are in the plan's order.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import figures_file
import jax
import jax.numpy as jnp
import measure
import numpy as np

from oel_jax import config as config_lib
from oel_jax.consolidation import lora, placement, restore, samples, trainer
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import task as task_lib
from oel_jax.policy import architecture, transformer
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import mesh as mesh_lib

TOP = pathlib.Path(__file__).parents[2]
GIB = 2**30


class Tokenizer:
  """No text: ids, of which none ends a response."""

  def __init__(self, vocabulary: int):
    self.vocabulary, self.pad_id, self.eos_ids = vocabulary, 0, ()


def planned(overrides: list[str]) -> dict[str, Any]:
  """plan.json, made by the command line."""
  with tempfile.TemporaryDirectory() as folder:
    config = pathlib.Path(folder, "default.py")
    config.write_text("from oel_jax import config\n\nget_config = config.default\n")
    command = [sys.executable, "-m", "oel_jax.main", "--stage=plan", f"--workdir={folder}"]
    command += [f"--config={config}", *overrides]
    environment = os.environ | {"PYTHONPATH": f"{TOP}:{os.environ.get('PYTHONPATH', '')}"}
    environment["JAX_PLATFORMS"] = "cpu"
    subprocess.run(command, check=True, env=environment)
    return json.loads(pathlib.Path(folder, "plan.json").read_text())


def random_task(config: Any, vocabulary: int) -> task_lib.Task:
  """As many prompts as a step has samples, or the probe."""
  count = max(config.consolidation.batch_size, config.consolidation.log_probe)
  rng = np.random.default_rng(0)
  ids = lambda n, size: tuple(map(tuple, rng.integers(3, vocabulary, (n, size)).tolist()))
  texts = config.extraction.texts
  return task_lib.Task(
    prompts=ids(count, config.plan.prompt_tokens),
    knowledge=ids(texts, config.extraction.max_knowledge_tokens),
    skip=(0,) * texts,
    given=(range(texts),) * count,
    seed=0,
    round=1,
    ids=tuple(map(str, range(count))),
  )


def used(config: Any) -> dict[str, int]:
  """The device's peak so far in bytes, behind each part of a round's training."""
  name, how = config.policy.architecture, config.consolidation
  a = architecture.named(name)
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  mesh = mesh_lib.make_mesh(config.mesh)
  first = functools.partial(transformer.init, a)
  if how.lora_rank:  # what is not learned is held as it is computed with
    first = lambda key: transformer.cast(transformer.init(a, key), dtype, tables=True)
  params = mesh_lib.sharded_init(first, mesh, jax.random.key(0))
  policy = Policy(a, params, Tokenizer(a.vocabulary), dtype)
  whole = lora.whole(how, params)
  base = params if how.lora_rank else None
  task, limit = random_task(config, a.vocabulary), config.deployment.max_response_tokens
  optimizer = restore.make_optimizer(how)
  found = {}

  def note(name: str, *made: Any) -> None:
    jax.block_until_ready(made)
    stats = jax.local_devices()[0].memory_stats() or {}
    found[name] = stats.get("peak_bytes_in_use", 0)
    found[f"held behind {name}"] = stats.get("bytes_in_use", 0)

  begin = restore.beginning(optimizer, how.lora_rank)
  state = mesh_lib.sharded_init(begin, mesh, *restore.begins_with(how, task, params))
  note("first state", state)
  attn_impl = placement.attn_impl(how, policy)
  teacher = placement.prepare_teacher(how, task, policy, mesh, attn_impl)
  note("reading the knowledge", teacher)
  chosen = range(how.batch_size)
  draw = lambda numbers: samples.sample_batch(
    task, policy.replace(whole(state.params)), policy, numbers, numbers, how, limit, "plan"
  )[0]
  micro_tokens = lambda count: samples.micro_tokens_of(
    how, task.prompts, limit=limit, samples=count, mesh=mesh
  )
  if how.log_probe:
    each = micro_tokens(how.log_probe)
    batch = samples.place(draw(range(how.log_probe)), mesh, how.log_probe, each)
    note("sampling, for the probe", batch)
    probe = step_lib.make_probe(
      a,
      k=how.k,
      temperature=how.temperature,
      chunk=how.chunk,
      micro_tokens=each,
      dtype=dtype,
      attn_impl=attn_impl,
      mesh=mesh,
    )
    note("probe", probe(whole(state.params), teacher, batch))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  each = micro_tokens(how.batch_size)
  step = trainer.make_step(how, policy, optimizer, attn_impl, shardings, each)
  for again in ("", ", again"):
    batch = samples.place(draw(chosen), mesh, how.batch_size, each)
    note(f"sampling{again}", batch)
    state, metrics = step(state, teacher, batch, None, base)
    note(f"step{again}", metrics)
  return found


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("architecture", choices=list(architecture.ARCHITECTURES))
  parser.add_argument("--json", type=figures_file.to_write, help="where to write the figures")
  args, overrides = parser.parse_known_args(argv)
  # One copy of the weights is held here, as in a run's first round.
  given = [f"--config.policy.architecture={args.architecture}", "--config.rounds=1", *overrides]
  if not any(one.startswith("--config.plan.device=") for one in given):
    given.append("--config.plan.device=h200")
  plan = planned(given)
  config = config_lib.default()
  for one in given:
    name, _, value = one.removeprefix("--config.").partition("=")
    group, _, field = name.rpartition(".")
    part = config[group] if group else config
    part[field] = type(part[field])(value) if not isinstance(part[field], bool) else value == "True"
  found = used(config)
  sizes = {program["name"]: program["total"] / GIB for program in plan["programs"]}
  sizes["sampling"] = max(size for name, size in sizes.items() if name.startswith("sampling: "))
  rows = [
    {"what": name, "planned GiB": sizes.get(name), "used GiB, at most so far": size / GIB}
    for name, size in found.items()
  ]
  whole = max(size for name, size in found.items() if not name.startswith("held"))
  ratio = plan["peak"] / whole if whole else None  # a CPU does not count
  rows.append(
    {
      "what": "all",
      "planned GiB": plan["peak"] / GIB,
      "used GiB, at most so far": whole / GIB,
      "planned of used": ratio,
    }
  )
  measure.report(rows, f"plan and use, {args.architecture}", args.json)


if __name__ == "__main__":
  main()
