"""The teacher with layers in the host's memory teaches what the teacher on the device does."""

import dataclasses
import functools
import weakref

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import samples as samples_lib
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import streamed
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import transformer
from oel_jax.runtime import mesh as mesh_lib

A = architecture_lib.Architecture(32, 16, 4, 4, 2, 8, 24, rope_theta=1e4, qk_norm=True)
TEXTS = ([5, 6, 7, 8], [], [9, 10, 11, 12, 13, 14, 15], [16, 17])
HOW = dict(dtype=jnp.float32, attn_impl="xla")


@functools.cache
def _params(seed):
  return jax.jit(lambda key: transformer.init(A, key))(jax.random.key(seed))


def _teacher(texts=TEXTS, skip=0):
  return teacher_lib.prepare(_params(1), A, texts, dtype=jnp.float32, skip=skip, unroll=True)


def _batch(pack, micro_tokens):
  """Four samples, and rows that hold none."""
  rng = np.random.default_rng(0)
  ids = lambda sizes: [rng.integers(3, 32, size).tolist() for size in sizes]
  batch = batch_lib.assemble(
    ids((3, 5, 2, 8)),
    range(4),
    ids((1, 9, 3, 6)),
    pad_id=0,
    length=19,
    response_length=10,
    pack=pack,
    texts=4 if pack else 1,
  )
  sizes = ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1))
  mesh = mesh_lib.make_mesh(sizes, jax.devices()[:1])
  return samples_lib.place(batch, mesh, 6, micro_tokens or 1000)


@pytest.fixture(autouse=True)
def fixture_small_micro_batches(monkeypatch):
  monkeypatch.setattr(streamed, "TOKENS", 1)


def _counted(x, batch):
  return np.asarray(x)[np.asarray(batch.mask)]


@pytest.mark.parametrize("pack, micro_tokens", [(False, 38), (True, 19), (True, None)])
def test_the_hidden_states_are_those_of_the_teacher_on_the_device(pack, micro_tokens):
  teacher, batch = _teacher(skip=(1, 0, 2, 0)), _batch(pack, micro_tokens)
  wanted = jax.jit(lambda t, b: teacher_lib.teacher_hidden(t, A, b, **HOW))(teacher, batch)
  for share in (0.5, 1.0):
    found = streamed.hidden(
      streamed.from_teacher(teacher, share), A, batch, micro_tokens=micro_tokens, **HOW
    )
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    np.testing.assert_allclose(_counted(found, batch), _counted(wanted, batch), atol=1e-5)


def test_a_teacher_without_knowledge_and_one_layer_alone():
  batch = _batch(True, None)
  teacher = _teacher(texts=[[]] * 4)
  wanted = teacher_lib.teacher_hidden(teacher, A, batch, **HOW)
  found = streamed.hidden(streamed.from_teacher(teacher, 1.0), A, batch, micro_tokens=None, **HOW)
  np.testing.assert_allclose(_counted(found, batch), _counted(wanted, batch), atol=1e-5)
  first = jax.tree.map(lambda x: x[:1], _params(1)["layers"])
  short = dataclasses.replace(A, layers=1)
  teacher = teacher_lib.prepare(
    {**_params(1), "layers": first}, short, TEXTS, dtype=jnp.float32, unroll=True
  )
  wanted = teacher_lib.teacher_hidden(teacher, short, batch, **HOW)
  lying = streamed.from_teacher(teacher, 1.0)
  found = streamed.hidden(lying, short, batch, micro_tokens=None, **HOW)
  np.testing.assert_allclose(_counted(found, batch), _counted(wanted, batch), atol=1e-5)


@pytest.mark.parametrize("micro_tokens", [19, pytest.param(None, marks=pytest.mark.slow)])
def test_a_step_learns_the_same(micro_tokens):
  teacher, batch, optimizer = _teacher(), _batch(True, micro_tokens), optax.sgd(1.0)
  step = step_lib.make_step(A, optimizer, k=4, chunk=7, micro_tokens=micro_tokens)

  def learned(teacher, batch):
    state = step_lib.init_state(jax.tree.map(jnp.copy, _params(0)), optimizer)
    state, metrics = step(state, teacher, batch)
    return jax.device_get((state.params, metrics))

  wanted = learned(teacher, batch)
  lying = streamed.from_teacher(teacher, 1.0)
  found = learned(*streamed.ahead(lying, A, batch, micro_tokens=micro_tokens, **HOW))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)
  # What is not streamed is taken as it is.
  same = streamed.ahead(teacher, A, batch, micro_tokens=micro_tokens, **HOW)
  assert same[0] is teacher and same[1] is batch


def test_layers_lie_where_their_share_says():
  teacher = _teacher()
  kinds = lambda layer: {
    x.sharding.memory_kind for x in (layer.keys, layer.values, layer.weights["gate_up"])
  }
  device, host = {"device"}, {"pinned_host"}
  lies = lambda share: list(map(kinds, streamed.from_teacher(teacher, share).layers))
  assert lies(1.0) == [host] * 4
  assert lies(0.5) == [device, host] * 2
  assert lies(0.25) == [device] * 3 + [host]


def test_what_came_to_the_device_does_not_stay_there(monkeypatch):
  """Three layers are there at most: the one that runs, the next, and the one that comes."""
  seen, most, put = [], [0], streamed.put

  def counted(layer, memory_kind):
    made = put(layer, memory_kind)
    seen.append(weakref.ref(made.keys))
    most[0] = max(most[0], sum(keys() is not None for keys in seen))
    return made

  lying = streamed.from_teacher(_teacher(), 1.0)
  monkeypatch.setattr(streamed, "put", counted)
  streamed.hidden(lying, A, _batch(True, None), micro_tokens=None, **HOW)
  assert len(seen) == 4 and most[0] <= 3
