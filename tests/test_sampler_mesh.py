"""Sampling on a mesh of eight devices: rows are spread over it, and nothing is exchanged but how
many are left.
"""

import functools
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from test_sampler import FREE, LIMIT, TINY, naive_sampled, params, random_prompts, sample

from oel_jax.policy.sampling import engine, groups, kv_cache, model, slot_state
from oel_jax.policy.sampling.sampler import generate
from oel_jax.policy.sampling.token_sampling import Sampling
from oel_jax.runtime import mesh as mesh_lib


@functools.cache
def placed():
  mesh = mesh_lib.make_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
  return jax.device_put(params(), mesh_lib.param_shardings(mesh, params()))


def on_mesh(prompts, seeds, **how):
  return generate(
    placed(), TINY, prompts, seeds, sampling=FREE, eos_ids=(510, 511), pad_id=1, **how
  )


def test_a_mesh_samples_the_same_ids_whatever_the_placement_and_spreads_the_rows(monkeypatch):
  prompts, seen, run = random_prompts(*range(3, 15), seed=10), [], engine.decode

  def spy(weights, slots, *args, **how):
    seen.append(
      (
        weights["layers"][0]["qkv"].sharding.is_fully_replicated,
        slots.keys[0].addressable_shards[0].data.shape[0],
      )
    )
    return run(weights, slots, *args, **how)

  monkeypatch.setattr(engine, "decode", spy)
  before = run._cache_size()
  for _ in range(2):
    assert on_mesh(prompts, range(12), max_new_tokens=24, slots=8) == sample(prompts, limit=24)
  assert set(seen[:2]) == {(True, 1)} and run._cache_size() - before <= 3


@pytest.mark.parametrize("slots,own", [(None, 4), (12, 1), (3, 1)])
def test_prompts_are_read_on_the_device_of_their_slot(monkeypatch, slots, own):
  prompts, entries, enter = random_prompts(*range(3, 23), seed=10), [], engine.prefill_insert
  right, expected = sample(prompts, logprobs=True)

  def spy(*args, **how):
    slots, first = enter(*args, **how)
    entries.append((args[2].shape, {shard.data.shape for shard in first[0].addressable_shards}))
    return slots, first

  monkeypatch.setattr(engine, "prefill_insert", spy)
  ids, scores = on_mesh(prompts, range(20), max_new_tokens=LIMIT, slots=slots, logprobs=True)
  assert ids == right and all(entry == ((8 * own, 96), {(own,)}) for entry in entries)
  for found, score in zip(scores, expected, strict=True):
    np.testing.assert_allclose(found, score, atol=1e-4)


def test_no_array_of_no_elements_is_spread(monkeypatch):
  """Where nothing ends a response: XLA's compiler for several GPUs crashes at one."""
  seen, run = [], engine.decode

  def spy(*args, **how):
    seen.extend(np.size(leaf) for leaf in jax.tree.leaves(args))
    return run(*args, **how)

  monkeypatch.setattr(engine, "decode", spy)
  prompts = random_prompts(3, 4, seed=10)
  found = generate(
    placed(), TINY, prompts, range(2), sampling=FREE, max_new_tokens=7, eos_ids=(), pad_id=1
  )
  assert (
    found
    == [naive_sampled(prompt, seed, eos_ids=(), limit=7) for seed, prompt in enumerate(prompts)]
    and min(seen) > 0
  )


def test_several_processes_keep_all_rows_everywhere(monkeypatch):
  monkeypatch.setattr(slot_state, "row_axes", lambda mesh: ())
  prompts = random_prompts(*range(3, 15), seed=10)
  assert on_mesh(prompts, range(12), max_new_tokens=13) == sample(prompts, limit=13)


def test_the_kernel_runs_on_a_mesh(monkeypatch):
  monkeypatch.setattr(kv_cache, "attn_impl", lambda *_: "triton")
  traced, step = [], kv_cache.step
  monkeypatch.setattr(
    kv_cache,
    "step",
    lambda *args, **how: traced.append(args[0].shape[0]) or step(*args, **how, interpret=True),
  )
  prompts = random_prompts(*range(3, 15), seed=10)
  assert on_mesh(prompts, range(12), max_new_tokens=7) == [
    naive_sampled(prompt, seed, limit=7) for seed, prompt in enumerate(prompts)
  ]
  assert traced == [4] * TINY.layers  # of 32 rows


def test_on_a_mesh_nothing_is_exchanged_but_how_many_rows_are_left():
  mesh = groups.of_params(placed(), TINY, 1)
  weights = model.prepare(placed(), architecture=TINY, dtype=jnp.float32, mesh=mesh)
  slots = slot_state.empty(
    architecture=TINY, rows=16, columns=64, eos_ids=2, dtype=jnp.float32, attn_impl="xla", mesh=mesh
  )
  how = dict(
    architecture=TINY,
    sampling=Sampling(0.7, 0.8, 20, 0.01),
    logprobs=True,
    attn_impl="xla",
    mesh=mesh,
  )
  zero = np.zeros((8,), np.int32)
  requests = zero.astype(np.uint32), zero + 9, np.zeros((8, 2), np.int32)
  given = np.zeros((8, 32), np.int32), zero + 1, zero, requests, engine.Shared(zero, zero, zero)
  drawing = (
    engine.decode.lower(weights, slots, jnp.int32(3), jnp.int32(1), chunk=8, **how)
    .compile()
    .as_text()
  )
  entering = engine.prefill_insert.lower(weights, slots, *given, **how).compile().as_text()
  collective = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    r"|collective-broadcast)(-start)?\("
  )
  found = {(shape, name) for shape, name, _ in collective.findall(drawing)}
  assert found == {("s32[]", "all-reduce")} and not collective.findall(entering)
  assert collective.findall("  %a = f32[2,8]{1,0} all-gather(%b), dimensions={0}") == [
    ("f32[2,8]{1,0}", "all-gather", "")
  ]
