"""Weights split over groups of devices while they sample: the tokens of one device, and what the
devices of a group hold and exchange.
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from test_sampler import GREEDY, fixture_one_core  # noqa: F401 (used by its name)
from test_sampler_texts import fixture_short  # noqa: F401 (used by its name)

from oel_jax.policy import transformer
from oel_jax.policy.architecture import Architecture, named
from oel_jax.policy.sampling import engine, groups, kv_cache, model, slot_state, text_cache
from oel_jax.policy.sampling.sampler import generate
from oel_jax.policy.sampling.token_sampling import Sampling
from oel_jax.runtime import mesh as mesh_lib

# Heads as Qwen2.5-1.5B and Qwen3-1.7B have them, and what else sets the two apart.
SHAPES = {
  "12:2": Architecture(128, 48, 2, 12, 2, 32, 64, qk_norm=False, qkv_bias=True),
  "16:8": Architecture(128, 64, 2, 16, 8, 32, 96, tied_head=False),
}
LIMIT = 9


@functools.cache
def params(shape):
  """Random, with norms and biases that are not all alike."""
  rng = np.random.default_rng(3)
  spread = lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32) / x.shape[-1] ** 0.5
  return jax.tree.map(spread, transformer.init(SHAPES[shape], jax.random.key(1)))


@functools.cache
def placed(shape, **sizes):
  mesh = mesh_lib.make_mesh(ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1) | sizes))
  return jax.device_put(params(shape), mesh_lib.param_shardings(mesh, params(shape)))


def prompts_of(count, longest=14):
  rng = np.random.default_rng(count)
  return [rng.integers(0, 120, 2 + 3 * i % longest).tolist() for i in range(count)]


def sample(weights, shape, prompts, sampling=GREEDY, limit=LIMIT, **how):
  return generate(
    weights,
    SHAPES[shape],
    prompts,
    range(len(prompts)),
    sampling=sampling,
    max_new_tokens=limit,
    eos_ids=(126, 127),
    pad_id=1,
    logprobs=True,
    **how,
  )


@functools.cache
def on_one_device(shape, count):
  return sample(params(shape), shape, prompts_of(count))


def same(found, right):
  assert found[0] == right[0]
  for ours, theirs in zip(found[1], right[1], strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_heads_and_halves_by_device_by_hand():
  a = Architecture(8, 4, 1, 4, 2, 2, 4)
  names = ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"]
  numbers = jnp.arange(8)[:, None] * jnp.ones((1, 2), jnp.int32)
  order = lambda size: [names[i] for i in groups.heads_by_device(numbers, a, size)[:, 0]]
  assert order(1) == names
  assert order(2) == ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
  assert order(4) == ["q0", "k0", "v0", "q1", "k0", "v0", "q2", "k1", "v1", "q3", "k1", "v1"]
  halves = groups.halves_by_device(jnp.array([[0, 1, 2, 3, 10, 11, 12, 13]]), 2)
  assert halves.tolist() == [[0, 1, 10, 11, 2, 3, 12, 13]]


@pytest.mark.parametrize(
  "size, devices, told",
  [
    (3, 8, "it must divide the number of a process's devices, 8"),
    (2, 1, "it must divide the number of a process's devices, 1"),
    (0, 8, "it must divide the number of a process's devices, 8"),
    (5, 5, "it must divide the weights' heads, 12"),
    (4, 4, "it must divide the weights' feedforward, 90"),
    (3, 3, "it must divide the weights' vocabulary, 128"),
    (6, 6, "it must divide the weights' kv_heads, 4, or be a multiple of them"),
  ],
)
def test_what_does_not_divide_is_refused(size, devices, told):
  vocabulary = 126 if size == 6 else 128
  with pytest.raises(ValueError) as error:
    groups.check(Architecture(vocabulary, 48, 2, 12, 4, 32, 90), size, devices)
  assert str(error.value) == f"config.mesh.sample_tensor is {size}: {told}"


def test_a_group_of_several_processes_is_refused():
  devices = [types.SimpleNamespace(process_index=i) for i in (0, 0, 1, 1, 1, 1)]
  groups.check_processes(devices, 1)
  groups.check_processes(devices, 2)
  with pytest.raises(ValueError, match="config.mesh.sample_tensor is 3: the mesh does not have"):
    groups.check_processes(devices, 3)


@pytest.mark.parametrize("count", [5, 8])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokens_are_those_of_one_device(shape, size, count):
  """Five prompts for four groups or two leave rows empty; 12:2 over four has its key-value heads
  twice; training has placed the weights in another way.
  """
  where = dict(data=2, fsdp=2, tensor=2) if count == 5 else {}
  found = sample(placed(shape, **where), shape, prompts_of(count), sample_tensor=size)
  same(found, on_one_device(shape, count))


def test_no_device_has_more_than_its_share(monkeypatch):
  seen, run = [], engine.decode

  def spy(weights, slots, *args, **how):
    layer, part = weights["layers"][0], lambda x: x.addressable_shards[0].data.shape
    seen.append({name: part(layer[name]) for name in ("qkv", "o", "gate_up", "down")})
    seen[-1] |= {"embed": part(weights["embed"]["embedding"]), "keys": part(slots.keys[0])}
    return run(weights, slots, *args, **how)

  monkeypatch.setattr(engine, "decode", spy)
  before = run._cache_size()
  for _ in range(2):
    sample(placed("16:8"), "16:8", prompts_of(8), Sampling(0.9), limit=5, sample_tensor=4, slots=8)
  rows = seen[0].pop("keys")
  assert rows[:3] == (4, 2, 32)  # 8 rows over 2 groups, 8 heads over 4 devices
  assert seen[0] == {
    "qkv": (64, (4 + 2 + 2) * 32),
    "o": (4 * 32, 64),
    "gate_up": (64, 2 * 24),
    "down": (24, 64),
    "embed": (32, 64),
  }
  assert run._cache_size() - before <= 2


def test_texts_kept_once_are_split_by_heads(short, monkeypatch):
  seen, read = [], text_cache.read
  monkeypatch.setattr(
    text_cache, "read", lambda *args, **how: seen.append(read(*args, **how)) or seen[-1]
  )
  text, prompts = prompts_of(20, 60)[19], prompts_of(5)
  prompts = [text + prompt for prompt in prompts] + prompts[:2]
  right = sample(params("16:8"), "16:8", prompts)
  same(sample(placed("16:8"), "16:8", prompts, sample_tensor=2), right)
  shards = [one.keys[0].addressable_shards[0].data.shape for one in seen]
  assert [shape[:2] for shape in shards] == [(1, 8), (1, 4)]


def test_conversations_go_on_from_what_a_slot_holds():
  prompts = prompts_of(5)

  def answers(weights, **how):
    said = []

    def reply(i, ids):
      said.append((i, ids))
      again = sum(number == i for number, _ in said) < 3
      return (prompts[i] * 4 + ids * 3, i + 10 * len(ids)) if again else None

    sample(weights, "12:2", prompts, Sampling(1.0), limit=6, reply=reply, **how)
    return sorted(said)

  assert answers(placed("12:2"), sample_tensor=2) == answers(params("12:2"))


def test_the_kernel_runs_on_a_devices_own_heads(monkeypatch):
  monkeypatch.setattr(kv_cache, "attn_impl", lambda *_: "triton")
  traced, step = [], kv_cache.step
  monkeypatch.setattr(
    kv_cache,
    "step",
    lambda *args, **how: traced.append(args[0].shape) or step(*args, **how, interpret=True),
  )
  found = sample(placed("16:8"), "16:8", prompts_of(5), limit=4, sample_tensor=4)
  assert found[0] == [ids[:4] for ids in on_one_device("16:8", 5)[0]]
  assert {shape[1:] for shape in traced} == {(4 + 2 + 2, 32)}


def test_what_a_group_exchanges():
  """Two sums of hidden states a layer and the embedding's, the logits, and how many are left:
  neither weights nor keys and values.
  """
  a, rows, size = SHAPES["16:8"], 4, 4
  weights = placed("16:8")
  mesh = groups.of_params(weights, a, size)
  weights = model.prepare(weights, architecture=a, dtype=jnp.float32, mesh=mesh)
  how = dict(architecture=a.share(size), attn_impl="xla", mesh=mesh)
  slots = slot_state.empty(rows=2 * rows, columns=64, eos_ids=1, dtype=jnp.float32, **how)
  lowered = engine.decode.lower(
    weights, slots, 3, 1, chunk=8, sampling=Sampling(0.7), logprobs=False, **how
  )
  found = re.findall(
    r"= (\S+?)(?:\{\S*)? (all-\w+|reduce-scatter|collective-\w+)\(", lowered.compile().as_text()
  )
  allowed = {(f"f32[{rows},{a.width}]", "all-reduce"), ("s32[]", "all-reduce")}
  allowed |= {(f"f32[{rows},1,{a.width}]", "all-reduce")}
  allowed |= {(f"f32[{rows},{a.vocabulary}]", "all-gather")}
  assert set(found) <= allowed and {name for _, name in found} == {"all-reduce", "all-gather"}
  assert sum(name == "all-reduce" and shape[0] == "f" for shape, name in found) == 2 * a.layers + 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen2.5-1.5b"])
def test_on_gpus_scores_are_those_of_one_but_for_rounding(name):
  """In bfloat16, by the kernels and cuDNN, of the ids that were drawn."""
  if jax.device_count() < 2:
    pytest.skip(f"needs two GPUs, here is {jax.device_count()}")
  a, size = named(name), 2
  init = functools.partial(transformer.init, a)
  mesh = mesh_lib.make_mesh(
    ml_collections.ConfigDict(dict(data=1, fsdp=size, tensor=1)), jax.devices()[:size]
  )
  weights = mesh_lib.sharded_init(init, mesh, jax.random.key(0))
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 1000, 20 + 11 * i).tolist() for i in range(20)]
  ids, scores = generate(
    weights,
    a,
    prompts,
    range(len(prompts)),
    sampling=Sampling(1.0),
    max_new_tokens=24,
    eos_ids=(),
    pad_id=0,
    dtype=jnp.bfloat16,
    logprobs=True,
    sample_tensor=size,
  )
  whole, T = jax.jit(init)(jax.random.key(0)), 256

  @jax.jit
  def score_of(whole, row):  # weights closed over become constants of the program, gigabytes of it
    positions = jnp.arange(T)[None]
    hidden, _ = transformer.apply(
      whole, a, row[None], positions, jnp.ones((1, T), jnp.int32), dtype=jnp.bfloat16
    )
    logits = transformer.logits(hidden[0, :-1], transformer.head(whole))
    return jnp.take_along_axis(jax.nn.log_softmax(logits), row[1:, None], axis=-1)[:, 0]

  for prompt, own, score in zip(prompts, ids, scores, strict=True):
    row = prompt + own
    scored = score_of(whole, jnp.array(row + [0] * (T - len(row))))
    right = scored[len(prompt) - 1 : len(row) - 1]
    np.testing.assert_allclose(score, right, atol=0.1)
