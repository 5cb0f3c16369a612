"""What a slot holds is not read again: the turns of a conversation, and texts that others begin
with, too.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import (
  FREE,
  LIMIT,
  TINY,
  fixture_drawing,  # noqa: F401 (used by its name)
  fixture_one_core,  # noqa: F401 (the same)
  naive_sampled,
  params,
  random_prompts,
  sample,
)  # noqa: F401
from test_sampler_mesh import on_mesh, placed

from oel_jax.policy.sampling import (
  driver,
  engine,
  model,
  on_cpu,
  scheduler,
  sizes,
  slot_state,
)


def alike_prompts():
  """Two texts of 40 and 50 tokens before three prompts each, one of them nothing but the text and a
  token; and a prompt of its own.
  """
  first, second, *rest = random_prompts(40, 50, 7, 20, 3, 1, 12, 30, seed=8)
  return [
    first + rest[0],
    second + rest[1],
    first + rest[2],
    second[:1] + rest[5],
    second + rest[3],
    first + rest[4],
    second + rest[2],
  ]


@pytest.fixture(name="entered")
def fixture_entered(monkeypatch):
  """What each batch that enters looks like: its shape, and how much of each prompt in it is taken
  from a slot.
  """
  batches = []

  def spy(enter, weights, slots, tokens, lengths, rows, requests, shared, **how):
    batches.append((tokens.shape, shared and shared.count[rows < len(slots.filled)].tolist()))
    return enter(weights, slots, tokens, lengths, rows, requests, shared, **how)

  for module in (engine, on_cpu):
    watched = functools.partial(spy, module.prefill_insert)
    monkeypatch.setattr(module, "prefill_insert", watched)
  return batches


def test_a_shared_beginning_is_read_once_and_changes_nothing(monkeypatch, entered):
  prompts = alike_prompts()
  expected = [naive_sampled(prompt, seed) for seed, prompt in enumerate(prompts)]
  assert len({tuple(ids) for ids in expected}) == len(prompts)
  for least, right in (
    (1000, [((8, 96), [0] * 7)]),
    (30, [((8, 96), [0] * 3), ((8, 96), [50, 50, 40, 40])]),
  ):
    monkeypatch.setattr(scheduler, "MIN_SHARED_CPU", least)
    monkeypatch.setattr(scheduler, "MIN_SHARED_TO_WAIT", least)
    entered.clear()
    assert sample(prompts) == expected and entered == right
  entered.clear()
  assert sample(prompts, slots=4) == expected
  assert (
    entered[:2] == [((4, 96), [0] * 3), ((4, 96), [50])]
    and len(entered) > 2
    and all(any(shared) for _, shared in entered[1:])
  )


def converse(prompts, turns, **how):
  """Each prompt goes on `turns` times: with what was answered and five ids more. Returns all
  answers of each, and all prompts.
  """
  answers, asked, more = (
    [[] for _ in prompts],
    [[prompt] for prompt in prompts],
    random_prompts(*[5] * turns, seed=11),
  )

  def reply(i, ids):
    answers[i].append(ids)
    if len(answers[i]) > turns:
      return None
    asked[i].append(asked[i][-1] + ids + more[len(answers[i]) - 1])
    return asked[i][-1], 100 * i + len(answers[i])

  last = sample(prompts, [100 * i for i in range(len(prompts))], reply=reply, **how)
  assert last == [each[-1] for each in answers]
  return answers, asked


@pytest.mark.parametrize("slots", [16, 4, 1])
def test_a_conversation_reads_only_what_is_new(monkeypatch, entered, slots):
  """Ten conversations of three turns, through fewer slots, in a ring that goes round and grows."""
  monkeypatch.setattr(scheduler, "MIN_SHARED_CPU", 4)
  monkeypatch.setattr(sizes, "CACHE_LENGTHS", (64, 128))
  answers, asked = converse(random_prompts(*range(20, 30), seed=12), 2, slots=slots)
  for i, (each, prompts) in enumerate(zip(answers, asked, strict=True)):
    assert len(each) == len(prompts) == 3
    assert each == [naive_sampled(prompt, 100 * i + turn) for turn, prompt in enumerate(prompts)]
  held = sorted(count for _, shared in entered for count in shared or [] if count)
  # All that was in the ring: the prompt before and the answer, but the id drawn last.
  right = sorted(len(prompt) - 6 for prompts in asked for prompt in prompts[1:])
  assert held == right


@pytest.mark.parametrize("slots", [None, 8])
def test_a_conversation_on_a_mesh_goes_on_where_it_was(monkeypatch, entered, slots):
  monkeypatch.setattr(scheduler, "MIN_SHARED_CPU", 4)
  monkeypatch.setattr(sizes, "CACHE_LENGTHS", (64, 128))
  monkeypatch.setitem(globals(), "params", placed)
  _, asked = talked = converse(random_prompts(*range(20, 30), seed=12), 2, slots=slots)
  monkeypatch.undo()
  assert talked == converse(random_prompts(*range(20, 30), seed=12), 2)
  held = sorted(count for _, shared in entered for count in shared or [] if count)
  assert held == sorted(len(prompt) - 6 for prompts in asked for prompt in prompts[1:])


def test_a_text_before_all_prompts_is_read_once_a_device(monkeypatch, entered):
  monkeypatch.setattr(scheduler, "MIN_SHARED_TO_WAIT", 30)
  text, *rest = random_prompts(60, *range(3, 23), seed=12)
  prompts = [text + own for own in rest]
  assert on_mesh(prompts, range(20), max_new_tokens=LIMIT) == sample(prompts)
  shares = [shared for (rows, _), shared in entered if rows % 8 == 0][:2]
  assert [sorted(shared) for shared in shares] == [[0] * 8, [60] * 12]


def test_what_the_ring_has_overwritten_is_read_again(monkeypatch, entered):
  """One conversation waits, while a long answer goes round the ring in the other slot."""
  monkeypatch.setattr(sizes, "REPLY_LENGTH", 96)  # both are read in one batch
  monkeypatch.setattr(scheduler, "MIN_SHARED_CPU", 4)
  monkeypatch.setattr(sizes, "CACHE_LENGTHS", (64, 128))
  first, second = random_prompts(50, 3, seed=13)
  calls = []

  def reply(i, ids):
    calls.append(i)
    return (first + ids, 7) if calls == [0] else None

  late = sample([first, second], [1, 2], limit=[2, 60], eos_ids=(), reply=reply)
  assert [shared for _, shared in entered] == [[0, 0], [51]]
  assert late == [
    naive_sampled(first + naive_sampled(first, 1, (), 2), 7, (), 2),
    naive_sampled(second, 2, (), 60),
  ]
  # 40 columns are written before the reply: 50 + 1 + 40 are more than 64.
  monkeypatch.setattr(scheduler, "CHUNK_REPLIES", 40)
  entered.clear()
  calls.clear()
  assert sample([first, second], [1, 2], limit=[2, 60], eos_ids=(), reply=reply) == late
  assert [shared for _, shared in entered] == [[0, 0], [0]]


def test_a_larger_ring_does_not_bring_back_what_was_overwritten(monkeypatch, entered):
  """As above, and a long prompt makes the ring grow before the overwritten slot is looked at: 91
  columns would fit into it now.
  """
  monkeypatch.setattr(sizes, "REPLY_LENGTH", 96)
  monkeypatch.setattr(scheduler, "MIN_SHARED_CPU", 4)
  monkeypatch.setattr(sizes, "CACHE_LENGTHS", (64, 128))
  monkeypatch.setattr(scheduler, "CHUNK_REPLIES", 40)
  first, second, long = random_prompts(50, 3, 70, seed=13)
  further = {0: [(long, 7), (first + [5, 6], 8)], 1: []}
  late = sample(
    [first, second],
    [1, 2],
    limit=[2, 60],
    eos_ids=(),
    reply=lambda i, ids: further[i].pop(0) if further[i] else None,
  )
  assert late == [naive_sampled(first + [5, 6], 8, (), 2), naive_sampled(second, 2, (), 60)]
  assert [shared for _, shared in entered] == [[0, 0], [0], [0]] and {
    shape for shape, _ in entered
  } == {(4, 96)}


def test_a_slot_that_a_waiting_prompt_goes_on_from_is_taken_last(monkeypatch, entered):
  """The first of four goes on with too much to be read beside the second, and waits; meanwhile two
  others take the slots of those that are done with.
  """
  monkeypatch.setattr(scheduler, "MIN_SHARED_CPU", 4)
  prompts, more = random_prompts(40, 39, 38, 37, 8, 7, seed=16), random_prompts(150, 5, seed=17)
  asked = {}

  def reply(i, ids):
    if i > 1 or i in asked:
      return None
    asked[i] = prompts[i] + ids + more[i]
    return asked[i], 50 + i

  late = sample(prompts, eos_ids=(), slots=4, reply=reply)
  assert entered == [((4, 40), [0] * 4), ((4, 40), [50, 0, 0]), ((4, 256), [51])]
  assert (
    late[2:] == [naive_sampled(prompt, 2 + n, ()) for n, prompt in enumerate(prompts[2:])]
    and len(asked[0]) == 202
  )
  assert late[1] == naive_sampled(asked[1], 51, ())


def test_replies_where_every_response_is_one_id(monkeypatch):
  monkeypatch.setattr(scheduler, "MIN_SHARED_CPU", 4)
  answers, asked = converse(random_prompts(*range(20, 26), seed=14), 3, limit=1, slots=4)
  for i, (each, prompts) in enumerate(zip(answers, asked, strict=True)):
    assert each == [
      naive_sampled(prompt, 100 * i + turn, limit=1) for turn, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("prefill_insert", [engine.prefill_insert, on_cpu.prefill_insert])
def test_nothing_shared_is_the_same_as_no_look_at_the_slots(prefill_insert):
  """On a CPU every prompt looks at the slots; on a GPU only those that share."""
  weights = model.prepare(params(), architecture=TINY, dtype=jnp.float32)
  tokens, lengths = driver.pad_right(random_prompts(5, 20, 32, seed=15), 4, 32, 1)
  zero, how = (
    np.zeros((4,), np.int32),
    dict(architecture=TINY, sampling=FREE, logprobs=True, attn_impl="xla"),
  )
  found = []
  for shared in (None, engine.Shared(zero, zero, zero)):
    slots = slot_state.empty(
      architecture=TINY, rows=4, columns=64, eos_ids=1, dtype=jnp.float32, attn_impl="xla"
    )._replace(column=jnp.int32(50))
    requests = (
      np.arange(4, dtype=np.uint32),
      np.full((4,), 9, np.int32),
      np.full((4, 1), -1, np.int32),
    )
    found.append(
      prefill_insert(
        weights, slots, tokens, lengths, np.int32([2, 0, 1, 4]), requests, shared, **how
      )
    )
  (slots, first), (same, again) = found
  np.testing.assert_array_equal(first[0], again[0])
  np.testing.assert_allclose(first[1], again[1], atol=1e-5)
  for prompt, row in ((0, 2), (1, 0), (2, 1)):
    columns = np.arange(50 - lengths[prompt], 50)
    for ours, theirs in zip(slots.keys + slots.values, same.keys + same.values, strict=True):
      axis = 2 if ours.shape[2] == 64 else 3
      np.testing.assert_allclose(
        *(np.take(np.asarray(ring), columns, axis)[row] for ring in (ours, theirs)), atol=1e-5
      )


def test_a_reply_is_checked():
  with pytest.raises(ValueError, match="empty prompt at index 1"):
    sample([[1], [2]], reply=lambda i, ids: ([], 1) if i else None)


def test_conversations_go_on_in_fewer_slots(monkeypatch, entered, drawing):
  """Five of 32 go on; what their slots hold is taken along."""
  monkeypatch.setattr(scheduler, "MIN_SHARED_CPU", 4)
  prompts, more, answers = (
    random_prompts(*range(10, 42), seed=19),
    random_prompts(5, 7, seed=20),
    [[] for _ in range(32)],
  )
  asked = [[prompt] for prompt in prompts]

  def reply(i, ids):
    answers[i].append(ids)
    if i % 7 or len(answers[i]) > 2:
      return None
    asked[i].append(asked[i][-1] + ids + more[len(answers[i]) - 1])
    return asked[i][-1], 100 * i + len(answers[i])

  sample(prompts, [100 * i for i in range(32)], reply=reply)
  for i, (each, turns) in enumerate(zip(answers, asked, strict=True)):
    assert each == [naive_sampled(prompt, 100 * i + turn) for turn, prompt in enumerate(turns)]
  assert {slots for slots, _ in drawing} == {32, 8} and sum(map(len, asked)) == 42
  held = sorted(count for _, shared in entered for count in shared if count)
  assert held == sorted(
    len(turns[n]) - len(more[n - 1]) - 1 for turns in asked for n in range(1, len(turns))
  )
