"""On a CPU the prompts of one call are shared out among threads: nobody can tell, but by the
clock.
"""

import threading
import time

import jax
import numpy as np
import pytest
from test_sampler import TINY, naive_sampled, random_prompts, sample

from oel_jax.policy.sampling import model, on_cpu, sampler, sizes, slot_state


@pytest.fixture(name="threads", autouse=True)
def fixture_threads(monkeypatch):
  """Three cores, of which each takes four prompts or more. Returns which threads draw, and how many
  slots they have.

  A pool hands a second part to a thread that is through with its first, so no part may draw before
  all have begun.
  """
  monkeypatch.setattr(sampler, "_cores", lambda mesh: 3)
  monkeypatch.setattr(sampler, "MIN_PROMPTS_PER_CORE", 4)
  drawing, run, side_by_side = set(), on_cpu.decode, sampler._side_by_side

  def spy(weights, slots, *args, **how):
    drawing.add((threading.current_thread(), len(slots.active)))
    return run(weights, slots, *args, **how)

  def together(work, parts, stopped):
    begun = threading.Barrier(len(parts))
    side_by_side(lambda part: (begun.wait(), work(part)), parts, stopped)

  monkeypatch.setattr(on_cpu, "decode", spy)
  monkeypatch.setattr(sampler, "_side_by_side", together)
  return drawing


@pytest.mark.parametrize("count,parts", [(13, 3), (12, 3), (11, 2), (7, 1)])
def test_each_prompt_gets_its_own_seed_limit_and_place(threads, count, parts):
  prompts, limits = (
    random_prompts(*[5 + 7 * i % 30 for i in range(count)], seed=21),
    [3 + i % 9 for i in range(count)],
  )
  seeds = range(50, 50 - count, -1)
  asked = list(zip(prompts, seeds, limits, strict=True))
  expected = [naive_sampled(prompt, seed, limit=limit) for prompt, seed, limit in asked]
  ids, scores = sample(prompts, seeds, limit=limits, logprobs=True)
  assert ids == expected and len(threads) == parts
  assert (threading.current_thread() in {thread for thread, _ in threads}) == (parts == 1)
  alone = [
    sample([prompt], [seed], limit=limit, logprobs=True)[1][0] for prompt, seed, limit in asked
  ]
  for found, right in zip(scores, alone, strict=True):
    np.testing.assert_allclose(found, right, atol=1e-5)


@pytest.mark.parametrize("slots,each", [(2, 1), (6, 2), (13, 4), (None, 4)])
def test_the_slots_are_shared_out_too(threads, slots, each, monkeypatch):
  monkeypatch.setattr(sizes, "SLOT_COUNTS", (1, 2, 4, 8))
  sample([[1]] * 12, slots=slots)
  assert {size for _, size in threads} == {each} and len(threads) == min(3, slots or 3)


def test_replies_are_asked_for_one_at_a_time_and_by_the_callers_numbers(threads):
  prompts, more = random_prompts(*range(4, 16), seed=22), random_prompts(6, seed=23)[0]
  inside, answers = threading.Lock(), [[] for _ in prompts]

  def reply(i, ids):
    assert inside.acquire(blocking=False)
    time.sleep(0.01)
    answers[i].append(ids)
    inside.release()
    return (prompts[i] + ids + more, 100 + i) if len(answers[i]) < 2 and i % 3 else None

  last = sample(prompts, reply=reply)
  assert len(threads) == 3 and last == [each[-1] for each in answers]
  for i, prompt in enumerate(prompts):
    first = naive_sampled(prompt, i)
    assert (
      answers[i] == [first, naive_sampled(prompt + first + more, 100 + i)]
      if i % 3
      else answers[i] == [first]
    )


def test_where_one_fails_all_stop(threads):
  def reply(i, ids):
    if i == 7 and turns[7] == 2:
      return [TINY.vocabulary], 1
    turns[i] += 1
    return ([1, 2, 3], turns[i]) if turns[i] < 10_000 else None

  turns = [0] * 12
  with pytest.raises(ValueError, match=f"the id {TINY.vocabulary} in the prompt at index 7"):
    sample([[1, 2]] * 12, limit=2, reply=reply)
  assert max(turns) < 1_000 and not any(thread.is_alive() for thread, _ in threads)


def test_cores_are_those_of_a_cpu_without_a_mesh(monkeypatch):
  monkeypatch.undo()
  monkeypatch.setattr(sampler.os, "cpu_count", lambda: 7)
  monkeypatch.setattr(sampler.os, "sched_getaffinity", lambda _: {0, 2, 3}, raising=False)
  assert sampler._cores(None) == 3 and sampler._cores("a mesh") == 1
  monkeypatch.delattr(sampler.os, "sched_getaffinity")  # macOS and Windows have none
  assert sampler._cores(None) == 7
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert sampler._cores(None) == 1


def test_all_read_the_same_weights(monkeypatch):
  made, committed = [], slot_state.committed
  monkeypatch.setattr(
    slot_state,
    "committed",
    lambda make, *on, **how: made.append(make) or committed(make, *on, **how),
  )
  seen, enter = [], on_cpu.prefill_insert
  monkeypatch.setattr(
    on_cpu,
    "prefill_insert",
    lambda weights, *args, **how: seen.append(weights) or enter(weights, *args, **how),
  )
  sample([[1]] * 12)
  assert made == [model.prepare] + [slot_state.empty] * 3
  assert len(seen) == 3 and all(weights is seen[0] for weights in seen)
  assert all(leaf.committed for leaf in jax.tree.leaves(seen[0]))
