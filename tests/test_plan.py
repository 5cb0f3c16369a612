"""The plan of a run: its bytes by hand, its temporaries those of the real programs, its seconds
those that were measured.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from oel_jax import config as config_lib
from oel_jax.consolidation import placement, restore, samples, trainer
from oel_jax.consolidation import task as task_lib
from oel_jax.policy import transformer
from oel_jax.policy.architecture import Architecture, named
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime import target
from oel_jax.tasks import plan, plan_programs, plan_seconds, plan_shapes
from oel_jax.tasks.plan_shapes import Work

A = Architecture(64, 32, 2, 4, 2, 16, 48)
WORK = Work(prompt=20, response=8, texts=2, knowledge=40, samples=4, probe=2, copies=2)
# Numbers in A's embedding, in its layers' matrices, and in its norms: the layers', of queries and
# keys, and the last.
EMBEDDING, MATRICES = 64 * 32, 2 * (32 * 16 * (4 + 2 + 2) + 4 * 16 * 32 + 3 * 32 * 48)
NORMS = 2 * (2 * 32 + 2 * 16) + 32


def planner(sizes, count, dtype="float32", sample_tensor=1, **fields):
  config = config_lib.default().consolidation
  config.update(fields)
  devices = jax.devices()[:count]
  mesh = mesh_lib.make_mesh(ml_collections.ConfigDict(sizes), devices)
  policy = plan_shapes.unread(A, mesh, dtype, sample_tensor)
  return plan_programs.Planner(config, policy, mesh, WORK)


def test_what_is_held_by_hand_on_one_device():
  found = planner(dict(data=1, fsdp=1, tensor=1), 1, "bfloat16")
  count = EMBEDDING + MATRICES + NORMS
  assert found.held() == {
    "weights of the run": 2 * 4 * count,
    "weights trained": 4 * count,
    "optimizer": 8 * count + 4 + 4,  # with the steps done and Adam's own count
    "teacher": 2 * (EMBEDDING + MATRICES),
  }
  # Keys and values of two layers, two texts, two heads of 16, and 40 tokens as on a CPU, 128.
  assert found.prefix_cache() == {"prefix cache": 2 * 2 * 2 * 2 * 128 * 16 * 2}


def test_what_is_held_by_hand_on_eight():
  found = planner(dict(data=2, fsdp=2, tensor=2), 8)
  # Norms lie whole on each device, the rest is cut by fsdp and tensor.
  count = (EMBEDDING + MATRICES) // 4 + NORMS
  held = found.held()
  assert held["weights trained"] == 4 * count and held["optimizer"] == 8 * count + 8
  assert held["teacher"] == 0  # in float32 its arrays are the run's
  assert found.prefix_cache() == {"prefix cache": 2 * 2 * 2 * 1 * 128 * 16 * 4}


class Tokenizer:
  vocabulary, pad_id, eos_ids = 64, 0, ()


def test_the_step_is_the_one_that_the_trainer_runs():
  """Compiled from arrays, by the trainer's own functions."""
  found = planner(dict(data=1, fsdp=1, tensor=1), 1, remat="full")
  program, config, mesh = found.step(), found.config, found.mesh
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  zeros = lambda tree: jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree))
  optimizer = restore.make_optimizer(config)
  params = zeros(transformer.abstract(A))
  state = mesh_lib.put(
    zeros(jax.eval_shape(functools.partial(restore.begin, optimizer), params)),
    mesh_lib.state_shardings(mesh, found.state),
  )
  policy = Policy(A, state.params, Tokenizer(), jnp.dtype("float32"))
  ids = lambda n, size: tuple(map(tuple, np.random.randint(3, 60, (n, size)).tolist()))
  task = task_lib.Task(ids(4, 20), ids(2, 40), (0, 0), (range(2),) * 4, 0, 1, tuple("abcd"))
  read = lambda params: placement.prepare_teacher(
    config, task, policy.replace(params), mesh, found.attn_impl
  )
  teacher = jax.eval_shape(read, state.params)
  assert shapes(teacher) == shapes(found.teacher)
  batch, _ = samples.sample_batch(task, found.policy, policy, *[range(4)] * 2, config, 8, "plan")
  each = samples.micro_tokens_of(config, task.prompts, limit=8, samples=4, mesh=mesh)
  placed = samples.place(batch, mesh, 4, each)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  step = trainer.make_step(config, policy, optimizer, found.attn_impl, shardings, each)
  memory = step.lower(state, zeros(teacher), placed).compile().memory_analysis()
  assert program.temporaries == memory.temp_size_in_bytes > 0
  assert program.arguments == memory.argument_size_in_bytes
  # Two copies of the weights are held beside the arguments, but one is the teacher's. The rest are
  # small arrays: of the batch those that the step does not read, and the texts' lengths.
  beside = sum(program.held.values()) - program.arguments
  assert abs(beside - 4 * (EMBEDDING + MATRICES + NORMS)) < 512


def test_what_the_arguments_take_is_what_the_compiler_says():
  program = planner(dict(data=2, fsdp=2, tensor=2), 8).read()
  weights = (EMBEDDING + MATRICES) // 4 + NORMS
  assert program.arguments <= 4 * (weights + 2 * 128 + 2)
  assert program.arguments > 0.8 * 4 * weights  # the last norm is not read


def test_what_devices_that_sample_together_hold_by_hand():
  sizes = dict(data=8, fsdp=1, tensor=1)
  ready, prefill, decode = planner(sizes, 8, sample_tensor=2).sampling()
  # Norms of the heads have a row a head: a device has two of queries and one of keys.
  norms = 2 * (2 * 32 + 3 * 16) + 32
  assert ready.held["sampler's weights"] == 4 * ((EMBEDDING + MATRICES) // 2 + norms)
  # One slot a group; keys and values of two layers, one head, 128 columns of 16 numbers.
  assert prefill.held["key-value cache"] == decode.held["key-value cache"] == 2 * 2 * 128 * 16 * 4
  whole = next(planner(sizes, 8).sampling())
  norms = 2 * (2 * 32 + 6 * 16) + 32
  assert whole.held["sampler's weights"] == 4 * (EMBEDDING + MATRICES + norms)


def test_no_column_of_the_table_is_lost():
  program = plan_programs.Program(
    "step",
    {"weights of the run": 4, "weights trained": 4, "optimizer": 8, "batch": 1},
    arguments=13,
    kept=2,
    temporaries=20,
    known={"gradients": 4, "weights cast": 2, "logits": 30},
  )
  found = plan.row(
    {"name": "step", "held": program.held, "known": program.known}
    | {"temporaries": 20, "total": program.total}
  )
  sizes = {name: size * plan.GIB for name, size in found.items() if name != "GiB"}
  assert sizes["parameters"] == 8 and sizes["gradients, casts"] == 6
  assert sizes["logits"] == 14  # what is left of the temporaries
  assert sizes["total"] == 39 and sizes[plan.REST] == 3


@pytest.mark.parametrize(
  "name, knowledge, count, seconds", [("1.7b", 2048, 64, 2.71), ("4b", 8192, 16, 1.82)]
)
def test_a_step_takes_what_was_measured(name, knowledge, count, seconds):
  work = Work(600, 1024, 10, knowledge, count, 0, 1)
  found = plan_seconds.step_seconds(named(f"qwen3-{name}"), target.DEVICES["h200"], 1, work)
  assert found == pytest.approx(seconds, rel=0.01)


@pytest.mark.parametrize("count, measured", [(1, 681), (64, 15943), (256, 21435)])
def test_sampling_takes_what_was_measured(count, measured):
  """Tokens a second of Qwen3-1.7B, prompts of 600 and 256 new tokens, the whole call."""
  sampled = plan_seconds.Sampled(count, 600, 256, count)
  found = plan_seconds.sampling_seconds(named("qwen3-1.7b"), target.DEVICES["h200"], 1, sampled)
  # One sequence alone reaches less of the bandwidth.
  assert found == pytest.approx(count * 256 / measured, rel=0.18 if count == 1 else 0.05)


def test_two_devices_together_sample_as_one_of_twice_the_speed():
  a, h200 = named("qwen3-1.7b"), target.DEVICES["h200"]
  twice = dataclasses.replace(h200, flops=2 * h200.flops, bandwidth=2 * h200.bandwidth)
  sampled = plan_seconds.Sampled(64, 600, 256, 64)
  found = plan_seconds.sampling_seconds(a, h200, 4, sampled, together=2)
  assert found == plan_seconds.sampling_seconds(a, twice, 2, sampled)


def test_a_round_by_hand():
  config = config_lib.default()
  work = plan._work(config)
  found = plan_seconds.sampled(config, work)
  # Five turns a game: 30 for the knowledge and 64 for the prompts; 64 without and 64 with; 128
  # without, before and after with, and with the first round's knowledge. Ten texts of 30 steps.
  count = lambda name: sum(one.count for one in found[name])
  assert [count(name) for name in ("deploy", "gate", "evaluate")] == [470, 640, 2560]
  assert count("extract") == 300 and count("consolidate") == 20 * 64
  device = target.DEVICES["h200"]
  assert plan_seconds.stages(config, named("qwen3-1.7b"), device, 2, work)[3]["tokens"] == 1310720
  config.deployment.environment = ""
  config.logs.path = "logs"
  assert plan_seconds.sampled(config, work)["evaluate"] == []


@pytest.mark.parametrize(
  "text, told",
  [
    ("h300", "must be one of h100, h200, v5e, v5p, cpu"),
    ("h200,none", 'must be a number of devices, as in "h200,8"'),
    ("h200,0", "must be a number of devices"),
    ("v5e,3", "slices of v5e have one of 1, 4, 8, 16"),
  ],
)
def test_devices_that_there_are_not(text, told):
  with pytest.raises(ValueError, match="config.plan.device is") as error:
    target.parse(text)
  assert told in str(error.value) and repr(text) in str(error.value)


def test_more_devices_than_this_machine_has():
  with pytest.raises(ValueError, match="asks for 9 CPU devices, and JAX has 8"):
    target.compile_only(*target.parse("cpu,9"))


def test_a_compiler_that_is_not_installed(monkeypatch):
  from jax.experimental import topologies

  def missing(**how):
    raise NotImplementedError("topology not implemented for cuda")

  monkeypatch.setattr(topologies, "get_topology_desc", missing)
  with pytest.raises(ValueError, match=r"pip install 'jax\[cuda13\]' brings it"):
    target.compile_only(*target.parse("h200,8"))


def refused(**fields):
  config = config_lib.default()
  config.policy.architecture = "pocket-tiny"
  for name, value in fields.items():
    group, _, field = name.partition("__")
    config[group][field] = value
  with pytest.raises(ValueError) as error:
    plan.run(config, None)
  return str(error.value)


def test_configurations_that_cannot_be_planned(monkeypatch):
  monkeypatch.setattr(jax.config, "update", lambda *given: None)
  assert "for --stage=plan it must name a device and how many, as h200,8" in refused()
  told = refused(plan__device="cpu,8", mesh__fsdp=3)
  assert "config.mesh.fsdp (3)" in told and "does not divide the number of devices, 8" in told
  for name, value, plain in (
    ("select", 0.25, 1.0),
    ("anchor", 1.0, 0.0),
    ("teacher_on_host", 0.5, 0.0),
    ("teacher", "live", "'frozen' or 'first'"),
    ("data", "teacher", "'student'"),
  ):
    told = refused(plan__device="cpu", **{f"consolidation__{name}": value})
    assert f"config.consolidation.{name} is {value!r}" in told and f"it must be {plain}" in told
  told = refused(plan__device="cpu,8", mesh__sample_tensor=3)
  assert told.startswith("config.mesh.sample_tensor is 3: it must divide the number of a process's")
  told = refused(plan__device="cpu", policy__architecture="auto")
  assert told.startswith('config.policy.architecture is "auto"') and "qwen3-8b" in told


def test_kernels_are_chosen_for_the_device_that_is_planned_for():
  assert target.backend() == "cpu" and target.compute_capability() == ""
  with target.compiling_for(target.DEVICES["h200"]):
    assert target.backend() == "gpu" and target.compute_capability() == "9.0"
  with target.compiling_for(target.DEVICES["v5p"]):
    assert target.backend() == "tpu"
  assert target.backend() == "cpu"


def test_a_level_of_optimization_is_for_a_cpu_and_leaves_the_users_own_alone(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
  assert target.optimization(1) == {}
  monkeypatch.delenv("XLA_FLAGS")
  assert target.optimization(1) == {"xla_backend_optimization_level": 1}
  with target.compiling_for(target.DEVICES["h200"]):
    assert target.optimization(1) == {}


def planned(tmp_path, *arguments):
  """plan.json of the command line, and what it printed."""
  command = [sys.executable, "-m", "oel_jax.main", "--stage=plan", f"--workdir={tmp_path}"]
  command += ["--config=experiments/frozen_lake.py:qwen3-1.7b", *arguments]
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
  assert done.returncode == 0, done.stderr
  return json.loads((tmp_path / "plan.json").read_text()), done.stdout


@pytest.mark.slow
def test_the_command(tmp_path):
  arguments = ["pocket-tiny", "cpu,1"]
  names = ("policy.architecture", "plan.device")
  arguments = [f"--config.{name}={value}" for name, value in zip(names, arguments, strict=True)]
  found, told = planned(tmp_path, *arguments)
  names = [program["name"] for program in found["programs"]]
  assert names[0] == "reading the knowledge" and names[-1] == "step" and len(names) == 6
  assert found["fits"] and found["compiles"] and found["seconds"] is None
  assert "| step |" in told and "how fast a cpu is is not known" in told


@pytest.mark.slow
@pytest.mark.skipif(
  not any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13))
  if importlib.util.find_spec("jax_plugins")
  else True,
  reason="needs XLA's compiler for NVIDIA GPUs (jax[cuda13]), but no GPU",
)
def test_the_step_that_was_measured_on_an_h200(tmp_path):
  """Whole rows of one sample: experiments/benchmarks/README.md has 54.7 GiB, with state, teacher
  and prefix in it.
  """
  arguments = ["qwen3-1.7b", "h200", "1", "False", "0", "1000.0"]
  names = ("policy.architecture", "plan.device", "rounds", "consolidation.pack")
  names += ("consolidation.log_probe", "plan.price")
  arguments = [f"--config.{name}={value}" for name, value in zip(names, arguments, strict=True)]
  found, told = planned(tmp_path, *arguments)
  step = found["programs"][-1]
  held = step["held"]["weights of the run"]
  assert (step["total"] - held) / 2**30 == pytest.approx(54.7, rel=0.02)
  assert found["cost"] == pytest.approx(found["seconds"] / 3.6) and found["fits"]
  assert "which costs" in told


def test_a_program_that_is_too_large_for_a_tpu(monkeypatch):
  """As XLA says it of weights of 15.26 GiB that are copied."""
  told = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (30.52G) exceeds available HBM (15.75G). HLO module: jit_prepare."
  )

  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError(told)

  class Jitted:
    def trace(self, *args):
      return self

    def lower(self, lowering_platforms):
      return Lowered()

  mesh = mesh_lib.make_mesh(
    ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1)), jax.devices()[:1]
  )
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  given = jax.ShapeDtypeStruct((int(15.26 * 2**29),), jnp.bfloat16, sharding=whole)
  made = plan_programs._program("copy", {"weights": 1}, {"copies": 2}, Jitted(), given)
  assert made.too_large and made.held == {"weights": 1} and not made.failed
  assert made.temporaries == pytest.approx(15.26 * 2**30, rel=1e-3)
  told = "INTERNAL: partitioner\nValueError: not so.\n\nSuspected Python Code Location:\n  x"
  made = plan_programs._program("copy", {}, {}, Jitted(), given)
  assert made.failed == "ValueError: not so." and made.total == 0
