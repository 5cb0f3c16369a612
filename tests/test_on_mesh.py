"""The step without a loop over layers on eight virtual devices, against the one on one device; and
what its program gathers, adds up and runs of a GPU's kernels.
"""

import collections
import dataclasses
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from test_unrolled import INTERPRET, KERNELS

from oel_jax import config as config_lib
from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import on_mesh, placement, samples
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import parameters, unrolled
from oel_jax.policy.ops import common
from oel_jax.runtime import mesh as mesh_lib

A = architecture_lib.Architecture(32, 16, 2, 4, 2, 8, 24, rope_theta=1e4)
TEXTS = [[5, 6, 7, 8], [], [9, 10]]
MICRO_TOKENS = 40  # of rows of 19: two a micro-batch


def _mesh(data, fsdp, tensor=1):
  sizes = ml_collections.ConfigDict(dict(data=data, fsdp=fsdp, tensor=tensor))
  return mesh_lib.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


@functools.cache
def _params(a, seed):
  """Of the size of `transformer.init`'s; scales of 1 and biases of 0 would hide what is not added
  up.
  """
  rng = np.random.default_rng(seed)
  one = lambda path, leaf: rng.normal(size=leaf.shape) / 4 + (path[-1].key == "scale")
  return jax.tree.map(np.float32, jax.tree_util.tree_map_with_path(one, parameters.abstract(a)))


def _batch(mesh, count):
  """Packed samples of unlike lengths, in the first rows of many: not every device has as many."""
  rng = np.random.default_rng(3)
  draw = lambda n: rng.integers(3, 32, n).tolist()
  made = batch_lib.assemble(
    [draw(1 + i % 9) for i in range(count)],
    [i % len(TEXTS) for i in range(count)],
    [draw(1 + 3 * i % 10) for i in range(count)],
    pad_id=0,
    length=19,
    response_length=10,
    texts=2,
  )
  return samples.place(made, mesh, 32, MICRO_TOKENS)


def _optimizer():
  return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5, momentum=0.9))


def _placed(mesh, a, student, teacher, texts=TEXTS):
  """(state, shardings, teacher) as a run places them."""
  optimizer = _optimizer()
  begin = lambda params: step_lib.init_state(params, optimizer)
  abstract = mesh_lib.abstract_init(begin, mesh, parameters.abstract(a))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  state = mesh_lib.sharded_init(begin, mesh, student)
  shape = jax.ShapeDtypeStruct((a.layers, len(texts), a.kv_heads, 32, a.head_size), jnp.float32)
  places = mesh_lib.param_shardings(mesh, {"teacher": {"keys": shape, "values": shape}})["teacher"]
  teacher = teacher_lib.prepare(
    jax.device_put(teacher, mesh_lib.param_shardings(mesh, teacher)),
    a,
    texts,
    dtype=jnp.float32,
    shardings=(places["keys"], places["values"]),
    unroll=True,
  )
  return state, shardings, teacher


@functools.cache
def _trained(mesh, a=A, remat="dots", count=30, **how):
  """Loss and metrics of a step, and the parameters behind it."""
  state, shardings, teacher = _placed(mesh, a, _params(a, 0), _params(a, 1))
  how = dict(chunk=7, k=4, micro_tokens=MICRO_TOKENS) | how
  step = step_lib.make_step(a, _optimizer(), shardings=shardings, remat=remat, **how)
  state, metrics = step(state, teacher, _batch(mesh, count))
  assert metrics.pop("not_finite") == 0
  return jax.device_get((metrics, state.params))


@functools.cache
def _probed(mesh):
  teacher = _placed(mesh, A, _params(A, 0), _params(A, 1))[2]
  probe = step_lib.make_probe(
    A, k=4, temperature=0.7, chunk=7, micro_tokens=MICRO_TOKENS, mesh=mesh
  )
  params = jax.device_put(_params(A, 0), mesh_lib.param_shardings(mesh, _params(A, 0)))
  return jax.device_get(probe(params, teacher, _batch(mesh, 30)))


def _same(found, wanted):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, wanted)


SHORT = dataclasses.replace(A, layers=1)  # for programs that are compiled quickly
UNTIED = dataclasses.replace(A, qkv_bias=True, qk_norm=False, tied_head=False)
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  "sizes, a, how",
  [
    ((2, 4), SHORT, {}),
    ((2, 2, 2), SHORT, {}),
    slow((2, 4), dataclasses.replace(A, layers=4), {}),
    slow((2, 2, 2), dataclasses.replace(A, layers=4), {}),
    slow((8, 1), A, {}),
    slow((1, 8), A, dict(remat="none")),
    slow((1, 8), UNTIED, dict(remat="full", support="topk_tail")),
    slow((1, 2, 2), UNTIED, dict(remat="full", support="topk_tail")),
    slow((4, 2), UNTIED, dict(kind="imitation")),
    slow((4, 1, 2), UNTIED, dict(kind="imitation")),
    slow((2, 4), dataclasses.replace(A, width=18), dict(kind="jsd")),  # which 4 does not divide
    slow((1, 4, 2), dataclasses.replace(A, width=18), dict(kind="jsd")),
    slow((2, 1, 4), dataclasses.replace(A, kv_heads=4), dict(support="topk", remat="none")),
    slow((2, 4), A, dict(micro_tokens=None)),
    slow((1, 1, 2), A, dict(micro_tokens=None)),
  ],
)
def test_eight_devices_step_as_one(sizes, a, how):
  one, eight = (_trained(_mesh(*each), a, **how) for each in ((1, 1), sizes))
  assert one[0]["tokens"] == sum(1 + 3 * i % 10 for i in range(30)) and one[0]["loss"] > 0.01
  _same(eight, one)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (2, 2, 2)])
def test_eight_devices_probe_as_one(sizes):
  _same(_probed(_mesh(*sizes)), _probed(_mesh(1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (1, 1, 2)])
def test_kernels_do_the_same_on_each_device(monkeypatch, sizes):
  wanted, used = _trained(_mesh(1, 1), count=6), set()

  def wired(function, key):
    def run(*args, **how):
      used.add(key)
      return function(*args, **how, interpret=INTERPRET)

    return run

  for key in KERNELS:
    monkeypatch.setattr(*key, wired(getattr(*key), key))
  monkeypatch.setattr(common, "supported", lambda x, head_size=2: True)
  _same(_trained.__wrapped__(_mesh(*sizes), count=6), wanted)
  assert used == set(KERNELS)


@functools.cache
def _traced(sizes, layers, attn_impl="flash"):
  """The step in bfloat16 of a shape that a GPU's kernels take, from shapes alone."""
  a = architecture_lib.Architecture(512, 64, layers, 4, 2, 64, 128)
  mesh, optimizer, dtype = _mesh(*sizes), _optimizer(), jnp.bfloat16
  abstract = parameters.abstract(a)
  state = mesh_lib.abstract_init(lambda p: step_lib.init_state(p, optimizer), mesh, abstract)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  weights = jax.eval_shape(lambda params: unrolled.fuse(params, dtype), abstract)
  on = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  if places := on_mesh.weight_shardings(mesh, abstract, dtype):
    weights = jax.tree.map(on, weights, places)
  number = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  texts = jax.ShapeDtypeStruct((layers, 3, 2, 128, 64), dtype)
  row, response = number(16, 128), number(16, 64)
  counted = jax.ShapeDtypeStruct(response.shape, bool)
  batch = batch_lib.Batch(row, row, row, number(16, 1), row, response, response, response, counted)
  how = dict(dtype=dtype, remat="dots", attn_impl=attn_impl, micro_tokens=256)
  step = step_lib.make_step(a, optimizer, shardings=shardings, **how)
  teacher = teacher_lib.Teacher(weights, texts, texts, number(3), number(3))
  rows = mesh_lib.batch_sharding(mesh)
  return step.trace(state, teacher, jax.tree.map(lambda x: on(x, rows), batch))


@pytest.fixture(name="_gpu")
def fixture_gpu(monkeypatch):
  """What asks where it runs hears of an H200."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 92000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda least: least != "10.0")
  monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda one: one == "9.0")


def _calls(traced):
  """Name → how often a program for a GPU calls it: kernels of cuDNN and Pallas, collectives."""
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  kernels = re.findall(r"@(__cudnn\$\w+)", text) + re.findall(r'\bname = "(\w+)"', text)
  moves = re.findall(r"stablehlo.(all_gather|all_to_all|reduce_scatter|all_reduce)", text)
  return collections.Counter(kernels), collections.Counter(moves)


@pytest.mark.parametrize(
  "sizes, layers, attn_impl",
  [
    ((2, 4), 1, "flash"),
    slow((8, 1), 1, "flash"),
    slow((1, 8), 2, "flash"),
    slow((2, 4), 3, "cudnn"),
    slow((2, 2, 2), 2, "cudnn"),
    slow((4, 1, 2), 1, "flash"),
  ],
)
def test_every_device_runs_the_kernels_of_one_and_gathers_by_layer(_gpu, sizes, layers, attn_impl):
  one, _ = _calls(_traced((1, 1), layers, attn_impl))
  kernels, moves = _calls(_traced(sizes, layers, attn_impl))
  assert kernels == one and one["row_sums"] == 1 and one["heads_backward"] == layers
  assert sum(n for name, n in one.items() if "fmha" in name and "Backward" in name) == layers
  if sizes[1] == 1:
    assert set(moves) == {"all_reduce"}
    return
  # A layer's four matrices for the teacher, for the student and for its backward pass; both heads;
  # and the tokens, whose rows of the embedding come from the others, and go to them.
  assert moves["all_gather"] == 3 * 4 * layers + 2 + 3 and moves["all_to_all"] == 3
  assert moves["reduce_scatter"] == 4 * layers + 1


def _moved(text, kind):
  """The shapes that such collectives of a compiled program make, but those of devices that are each
  alone in their group, which send nothing.
  """
  alone = r"replica_groups=\{\{\d+\}(?:,\{\d+\})*\}"
  return [
    [int(n) for n in shape.split(",") if n]
    for line in text.split("\n")
    for result in re.findall(rf"= (.*?) {kind}(?:-start)?\(", line)
    if not re.search(alone, line)
    for shape in re.findall(r"\w+\[([\d,]*)\]", result)
  ]


@pytest.mark.slow
def test_what_is_split_is_added_up_as_it_is_split():
  """Of the compiled program: what is added up whole are norms' scales and single numbers."""
  text = _traced((2, 4), 2, "xla").lower().compile().as_text()
  shapes, width = functools.partial(_moved, text), 64
  assert shapes("reduce-scatter") and all(width // 4 in shape for shape in shapes("reduce-scatter"))
  # Over data: a device's part of each gradient.
  assert all(math.prod(s) <= 512 * width // 4 for s in shapes("all-reduce"))
  stacked = [s for s in shapes("all-gather") if len(s) > 2 and width in s and s[0] == 2]
  assert not stacked


@pytest.mark.slow
def test_what_is_split_over_tensor_never_travels():
  """Of the compiled program: hidden states are added up, and what all heads share."""
  text = _traced((1, 1, 2), 2, "xla").lower().compile().as_text()
  for kind in ("all-gather", "all-to-all", "reduce-scatter", "collective-permute"):
    assert not _moved(text, kind), kind
  # A micro-batch is two rows of 128 tokens, of which 64 are a response's.
  hidden = ([2, 128, 64], [256, 64], [128, 64], [1, 128, 64])
  large = [shape for shape in _moved(text, "all-reduce") if math.prod(shape) > 2 * 128]
  assert large and all(shape in hidden for shape in large)


def test_heads_that_cannot_be_split_run_in_the_loop():
  config = config_lib.default().consolidation
  policy = types.SimpleNamespace(dtype=jnp.bfloat16, architecture=A)
  config.unroll = "yes"
  assert placement.unroll(config, policy, _mesh(2, 2)) and A.kv_heads == 2
  assert placement.unroll(config, policy, _mesh(2, 2, 2))
  told = 'unroll is "yes" and config.mesh.tensor 4, which does not divide the weights\' kv_heads '
  with pytest.raises(ValueError, match=told + r"\(2\): config.mesh.tensor must, or"):
    placement.unroll(config, policy, _mesh(1, 2, 4))
  config.unroll = "auto"
  assert not placement.unroll(config, policy, _mesh(1, 2, 4))
  with pytest.raises(ValueError, match=r"4 devices along tensor, .* kv_heads \(2\): they must"):
    on_mesh.check(A, _mesh(1, 2, 4))
