"""Every program of the loop lowers for a TPU, without one: on one device, and on meshes of v5e and
v5p. From shapes alone, of models with their layers cut to two; the choices are those of a TPU.
Nothing is compiled or run.
"""

import dataclasses
import functools
import re
import types

import gguf
import jax
import jax.numpy as jnp
import ml_collections
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from oel_jax import config as config_lib
from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import placement, restore
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy import transformer, unrolled
from oel_jax.policy.architecture import named
from oel_jax.policy.sampling import engine, kv_cache, model, slot_state, text_cache
from oel_jax.policy.sampling.token_sampling import Sampling
from oel_jax.policy.weights import gguf_blocks
from oel_jax.runtime import checksum, finite
from oel_jax.runtime import mesh as mesh_lib

# data, fsdp and tensor of slices
MESHES = {"one": None, "v5e-16": (4, 4, 1), "v5p-8": (1, 2, 2)}
# Of StableHLO's custom calls those that XLA:TPU knows; cuDNN's and Triton's have other names.
KNOWN = {"tpu_custom_call", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "TopK"}
DTYPE = jnp.bfloat16
# Rows, tokens and response tokens of a batch; texts and their tokens.
S, T, R, G, P = 16, 1056, 512, 4, 512


@pytest.fixture(name="_tpu", autouse=True)
def fixture_tpu(monkeypatch):
  """What asks JAX where it runs hears of a TPU."""
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


def _cut(name):
  return dataclasses.replace(named(name), layers=2)


def _lowered(jitted, *args, **static):
  """The program for a TPU, and how often it calls a kernel of one."""
  text = jitted.trace(*args, **static).lower(lowering_platforms=("tpu",)).as_text()
  calls = re.findall(r"stablehlo\.custom_call @(\w+)", text)
  assert set(calls) <= KNOWN, set(calls) - KNOWN
  return calls.count("tpu_custom_call")


def _mesh(name):
  sizes = MESHES[name]
  return sizes and AbstractMesh(sizes, mesh_lib.AXES, axis_types=(AxisType.Auto,) * 3)


def _on(mesh, tree, axes=("data", "fsdp")):
  """Shapes whose leading axis is spread over these axes of the mesh."""
  if mesh is None:
    return tree
  place = NamedSharding(mesh, PartitionSpec(axes))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def _array(*shape, dtype=jnp.int32):
  return jax.ShapeDtypeStruct(shape, dtype)


def _params(a, mesh):
  params = transformer.abstract(a)
  if mesh is None:
    return params
  places = mesh_lib.param_shardings(mesh, params)
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places
  )


def _batch(mesh, texts=2):
  row = _array(S, T)
  response = _array(S, R)
  return _on(
    mesh,
    batch_lib.Batch(
      *(row, row, row, _array(S, texts), row),
      *(response, response, response, _array(S, R, dtype=jnp.bool_)),
    ),
  )


def _teacher(a, mesh, texts=G):
  """The teacher's shapes, how its texts lie on the mesh, and the parameters that read them."""
  params = jax.eval_shape(
    functools.partial(transformer.cast, dtype=DTYPE, tables=True), _params(a, mesh)
  )
  keys = _array(a.layers, texts, a.kv_heads, P, a.head_size, dtype=DTYPE)
  places = None
  if mesh is not None:
    place = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    params = jax.tree.map(place, params, mesh_lib.param_shardings(mesh, params))
    found = mesh_lib.param_shardings(mesh, {"teacher": {"keys": keys, "values": keys}})["teacher"]
    places = found["keys"], found["values"]
    keys = place(keys, places[0])
  return teacher_lib.Teacher(params, keys, keys, _array(texts), _array(texts)), places


def _chosen(a, **fields):
  config = config_lib.default()
  config.consolidation.update(fields)
  policy = types.SimpleNamespace(architecture=a, dtype=DTYPE)
  return config.consolidation, placement.attn_impl(config.consolidation, policy)


def _step(a, mesh, **fields):
  config, attn_impl = _chosen(a, **fields)
  optimizer = restore.make_optimizer(config)
  begin = functools.partial(restore.begin, optimizer)
  state, shardings = jax.eval_shape(begin, _params(a, None)), None
  if mesh is not None:
    state = mesh_lib.abstract_init(begin, mesh, _params(a, mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  how = dict(kind=config.kind, support=config.support, k=config.k, chunk=config.chunk)
  step = step_lib.make_step(
    a,
    optimizer,
    **how,
    micro_tokens=config.micro_tokens,
    dtype=DTYPE,
    remat=config.remat,
    attn_impl=attn_impl,
    shardings=shardings,
  )
  return step, state


def on_meshes(*quick):
  """Parametrizes a test by `MESHES`, the others being slow."""
  marks = lambda name: () if name in quick else pytest.mark.slow
  return pytest.mark.parametrize("mesh", [pytest.param(m, marks=marks(m)) for m in MESHES])


# Kernels in the body of the loop over the layers: the teacher's two, of a row and of its text; the
# student's forward and two backward ones.
@on_meshes("one", "v5p-8")
def test_the_training_step(mesh):
  a, mesh = _cut("qwen3-1.7b"), _mesh(mesh)
  step, state = _step(a, mesh)
  assert _lowered(step, state, _teacher(a, mesh)[0], _batch(mesh)) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, fields",
  [
    ("qwen2.5-1.5b", dict(support="topk")),  # 12:2 heads, a bias
    ("llama-3.2-1b", dict(kind="jsd", support="topk_tail", remat="full")),  # heads of 64
    ("qwen3-8b", dict(kind="imitation", pack=False)),  # a head of its own
    ("pocket", dict(attention="xla")),
  ],
)
def test_other_models_and_losses(name, fields):
  a = _cut(name)
  step, state = _step(a, None, **fields)
  kernels = _lowered(step, state, _teacher(a, None)[0], _batch(None))
  # "full" runs the forward kernel again; imitation has no teacher; the embedded policy's heads of
  # 32 are too small.
  assert kernels == {"qwen2.5-1.5b": 5, "llama-3.2-1b": 6, "qwen3-8b": 3, "pocket": 0}[name]


@pytest.mark.slow
def test_the_step_without_a_loop_over_the_layers():
  a = _cut("qwen3-1.7b")
  step, state = _step(a, None)
  teacher, _ = _teacher(a, None)
  fused = jax.eval_shape(functools.partial(unrolled.fuse, dtype=DTYPE), teacher.params)
  # Layers call the same five.
  assert _lowered(step, state, teacher._replace(params=fused), _batch(None)) == 5


@on_meshes("v5e-16")
def test_the_reading_of_the_knowledge(mesh):
  a, mesh = _cut("qwen3-1.7b"), _mesh(mesh)
  teacher, places = _teacher(a, mesh)
  read = teacher_lib._read(a, DTYPE, _chosen(a)[1], places)
  assert _lowered(read, teacher.params, _array(G, P), _array(G)) == 1


@on_meshes("v5e-16")
def test_the_probe_which_held_out_prompts_are_scored_by_too(mesh):
  a, mesh = _cut("qwen3-1.7b"), _mesh(mesh)
  attn_impl = _chosen(a)[1]
  how = dict(k=256, temperature=0.7, chunk=512, dtype=DTYPE, attn_impl=attn_impl, mesh=mesh)
  probe = step_lib.make_probe(a, micro_tokens=1024, **how)
  assert _lowered(probe, _params(a, mesh), _teacher(a, mesh)[0], _batch(mesh)) == 3


@on_meshes("v5p-8")
def test_the_first_state_and_what_looks_at_weights(mesh):
  a, mesh = _cut("qwen3-1.7b"), _mesh(mesh)
  params = _params(a, mesh)
  init = functools.partial(transformer.init, a)
  places = None if mesh is None else mesh_lib.param_shardings(mesh, params)
  assert _lowered(jax.jit(init, out_shardings=places), jax.random.key(0)) == 0
  assert _lowered(checksum._sums_on_device, jax.tree.leaves(params)) == 0
  assert _lowered(finite._flags, params) == 0


def _sampling(name, devices, dtype=DTYPE, texts=False):
  """Arguments of the sampler's programs, on one device or on so many of this machine's, which stand
  for a TPU's.
  """
  a = _cut(name)
  mesh = None
  if devices > 1:
    sizes = ml_collections.ConfigDict(dict(data=2, fsdp=-1, tensor=1))
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[:devices])
  how = dict(architecture=a, attn_impl=kv_cache.attn_impl(a, dtype), mesh=mesh)
  weights = jax.eval_shape(
    functools.partial(model.prepare, architecture=a, dtype=dtype, mesh=mesh), _params(a, mesh)
  )
  empty = functools.partial(
    slot_state.empty, **how, rows=16 * devices, columns=2048, eos_ids=2, dtype=dtype, texts=texts
  )
  slots = jax.eval_shape(empty)
  drawing = dict(sampling=Sampling(0.7, top_p=0.8, top_k=20), logprobs=True)
  return a, mesh, how, weights, slots, drawing


@pytest.mark.parametrize("devices", [1, 8])
def test_prefill_and_decode(devices):
  a, mesh, how, weights, slots, drawing = _sampling("qwen3-1.7b", devices)
  rows = 4 * devices
  each = _array(rows)
  requests = _array(rows, dtype=jnp.uint32), each, _array(rows, 2)
  prefill = functools.partial(
    _lowered, engine.prefill_insert, weights, slots, _array(rows, 640), each, each, requests
  )
  assert prefill(None, **how, **drawing) == 1  # which each layer calls
  # A prompt that goes on from what a slot holds is read in plain XLA.
  assert prefill(engine.Shared(each, each, each), **how, **drawing) == 0
  steps = _array(), _array()
  assert _lowered(engine.decode, weights, slots, *steps, chunk=64, **how, **drawing) == 0


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_prefill_and_decode_behind_texts(devices):
  """In float32, where texts are kept once without a kernel for it, too."""
  dtype = jnp.float32
  a, mesh, how, weights, slots, drawing = _sampling("qwen3-1.7b", devices, dtype, texts=True)
  tokens, where = _array(G, P), dict(architecture=a, mesh=mesh)
  given = weights, tokens, _array()
  assert _lowered(text_cache._read, *given, **where) == 0
  read = jax.eval_shape(functools.partial(text_cache._read, **where), *given)
  how["texts"] = text_cache.Texts(*read, _array(G))
  rows = 4 * devices
  each = _array(rows)
  requests = _array(rows, dtype=jnp.uint32), each, _array(rows, 2)
  prefill = functools.partial(
    _lowered, engine.prefill_insert, weights, slots, _array(rows, 640), each, each, requests
  )
  assert prefill(None, text_R=each, **how, **drawing) == 0
  assert prefill(engine.Shared(each, each, each), text_R=each, **how, **drawing) == 0
  steps = _array(), _array()
  assert _lowered(engine.decode, weights, slots, *steps, chunk=64, **how, **drawing) == 0


def test_the_samplers_other_programs():
  a, _, how, weights, slots, _ = _sampling("qwen2.5-1.5b", 1)
  prepare = functools.partial(_lowered, model.prepare, _params(a, None))
  assert prepare(architecture=a, dtype=DTYPE, mesh=None) == 0
  empty = functools.partial(_lowered, slot_state.empty, **how)
  assert empty(rows=16, columns=2048, eos_ids=2, dtype=DTYPE) == 0
  resize = functools.partial(_lowered, slot_state.resize, slots, attn_impl=how["attn_impl"])
  assert resize(columns=4096) == resize(_array(8)) == 0


@pytest.mark.parametrize("kind", gguf_blocks.TYPES, ids=lambda kind: kind.name)
def test_the_decoding_of_quantised_weights(kind):
  size = gguf.GGML_QUANT_SIZES[kind][1]
  blocks = _array(2048, 8, size, dtype=jnp.uint8)
  assert _lowered(jax.jit(gguf_blocks.decoder(kind)), blocks) == 0
