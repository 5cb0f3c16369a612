"""XLA compiles the loop's programs for a v5e, and the step for a v5p, too, where there are none.

Needs libtpu, which the extra "tpu" brings, and about ten minutes of one core:
`pip install -e '.[test,tpu]'`, then `JAX_PLATFORMS=cpu pytest -m slow tests/test_tpu_compile.py`.
Models are Qwen3-1.7B cut to two layers. Nothing is run.
"""

import functools

import jax
import numpy as np
import pytest
import test_tpu
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from test_tpu import DTYPE, G, P, fixture_tpu  # noqa: F401  (the fixture is used by all)

from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy.sampling import engine, model
from oel_jax.runtime import mesh as mesh_lib

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow

# The devices of a topology, its mesh (data, fsdp, tensor) and the memory of a device.
SLICES = {"v5e:2x2": ((1, 4, 1), 16 * 2**30), "v5p:2x2x1": ((1, 2, 2), 95 * 2**30)}


@pytest.fixture(name="devices", params=SLICES)
def fixture_devices(request, monkeypatch):
  """(Compile-only devices of a slice, its mesh's sizes, bytes of a device)."""
  for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost")):
    monkeypatch.setenv(name, value)
  jax.devices()  # this machine's, which read XLA_FLAGS: libtpu ends the process at one of theirs
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  topology = topologies.get_topology_desc(platform="tpu", topology_name=request.param)
  jax.config.update("jax_enable_compilation_cache", False)  # of this machine's programs
  yield topology.devices, *SLICES[request.param]
  jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture(name="mesh")
def fixture_mesh(devices):
  found, sizes, _ = devices
  axis_types = (AxisType.Auto,) * 3
  return Mesh(np.array(found).reshape(sizes), mesh_lib.AXES, axis_types=axis_types)


def _memory(jitted, *args, **static):
  """What XLA plans for the compiled program."""
  lowered = jitted.trace(*args, **static).lower(lowering_platforms=("tpu",))
  return lowered.compile().memory_analysis()


def _needs(memory):
  kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.argument_size_in_bytes + kept + memory.temp_size_in_bytes


def test_the_training_step(devices, mesh):
  a = test_tpu._cut("qwen3-1.7b")
  step, state = test_tpu._step(a, mesh)
  memory = _memory(step, state, test_tpu._teacher(a, mesh)[0], test_tpu._batch(mesh))
  assert _needs(memory) < devices[2]
  # The new state takes the place of the old one.
  assert memory.alias_size_in_bytes > 0.9 * memory.output_size_in_bytes


@pytest.mark.parametrize("devices", ["v5e:2x2"], indirect=True)
def test_the_teacher_and_the_probe(devices, mesh):
  a = test_tpu._cut("qwen3-1.7b")
  teacher, places = test_tpu._teacher(a, mesh)
  attn_impl = test_tpu._chosen(a)[1]
  read = teacher_lib._read(a, DTYPE, attn_impl, places)
  memory = _memory(read, teacher.params, test_tpu._array(G, P), test_tpu._array(G))
  assert _needs(memory) < devices[2]
  probe = step_lib.make_probe(
    a, k=256, temperature=0.7, chunk=512, dtype=DTYPE, attn_impl=attn_impl, mesh=mesh
  )
  memory = _memory(probe, test_tpu._params(a, mesh), teacher, test_tpu._batch(mesh))
  assert _needs(memory) < devices[2]


@pytest.mark.parametrize("devices", ["v5e:2x2"], indirect=True)
def test_the_sampler(devices):
  a, _, how, weights, slots, drawing = test_tpu._sampling("qwen3-1.7b", 1)
  one = NamedSharding(Mesh(np.array(devices[0][:1]), ("x",)), PartitionSpec())
  put = functools.partial(
    jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
  )
  each, tokens, number, seeds, ends = (
    put(test_tpu._array(*shape, dtype=dtype))
    for shape, dtype in (
      *(((4,), "int32"), ((4, 640), "int32"), ((), "int32"), ((4,), "uint32")),
      ((4, 2), "int32"),
    )
  )
  prepared = _memory(
    model.prepare, put(test_tpu._params(a, None)), architecture=a, dtype=DTYPE, mesh=None
  )
  weights, slots = put(weights), put(slots)
  given = weights, slots, tokens, each, each, (seeds, each, ends)
  for shared in (None, engine.Shared(each, each, each)):
    memory = _memory(engine.prefill_insert, *given, shared, **how, **drawing)
    assert _needs(memory) < devices[2]
  memory = _memory(engine.decode, weights, slots, number, number, chunk=64, **how, **drawing)
  assert max(map(_needs, (prepared, memory))) < devices[2]
  # The caches are written in place.
  assert memory.alias_size_in_bytes > 0.9 * sum(x.size for x in slots.keys + slots.values) * 2
