"""Sampling whole responses, against a naive loop that runs the whole forward for every token; single draws: test_sampling.py."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from oel_jax.policy import generate as generate_lib
from oel_jax.policy import decode, model, ring
from oel_jax.policy.architecture import named
from oel_jax.policy.generate import Policy, generate
from oel_jax.policy.sampling import Sampling
from oel_jax.runtime import mesh as mesh_lib

TINY = named("pocket-tiny")
GREEDY, FREE = Sampling(1e-6), Sampling(1.0)
LIMIT = 12  # few limits, samplings and sets of end ids: each is compiled anew


@functools.cache
def params():
  rng = np.random.default_rng(0)

  def leaf(path, shape):
    scale = path[-1].key == "scale"
    return (scale + rng.standard_normal(shape.shape) / (5 if scale else TINY.width**0.5)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(lambda: model.init(TINY, jax.random.key(0))))


def sample(prompts, seeds=None, sampling=FREE, limit=LIMIT, eos_ids=(510, 511), pad_id=1, **how):
  seeds = range(len(prompts)) if seeds is None else seeds
  return generate(params(), TINY, prompts, seeds, sampling=sampling, max_new_tokens=limit, eos_ids=eos_ids, pad_id=pad_id, **how)


def random_prompts(*lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 500, length).tolist() for length in lengths]


@jax.jit
def next_logits(tokens, length):
  """Logits behind the first `length` tokens of one row, by a whole forward without any cache."""
  positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)[None]
  hidden, _ = model.apply(params(), TINY, tokens[None], positions, (positions < length).astype(jnp.int32))
  return model.logits(hidden[0, length - 1], model.head(params()))


def naive(prompt, choose, limit=LIMIT, eos_ids=(510, 511)):
  row, response = np.zeros(96, np.int32), []
  row[: len(prompt)] = prompt
  while len(response) < limit:
    token = int(choose(next_logits(row, len(prompt) + len(response)), len(response)))
    row[len(prompt) + len(response)] = token
    response.append(token)
    if token in eos_ids:
      break
  return response


def naive_sampled(prompt, seed, eos_ids=(510, 511), limit=LIMIT):
  """Each sequence's own stream: its seed, then the position in the response."""
  key = jax.random.key(np.uint32(seed))
  return naive(prompt, lambda logits, t: drawn_by_numpy(logits, jax.random.fold_in(key, t)), limit, eos_ids)


def drawn_by_numpy(logits, key):
  """The id that two random numbers say, in float64: the first one says which group of about √V neighbours, the second one which of them."""
  z = np.asarray(logits, np.float64)
  p, (first, second), width = np.exp(z - z.max()), np.asarray(jax.random.uniform(key, (2,)), np.float64), int(np.ceil(len(z) ** 0.5))
  groups = [p[i : i + width] for i in range(0, len(p), width)]
  sums = np.cumsum([group.sum() for group in groups])
  group = np.searchsorted(sums, first * sums[-1], side="right")
  sums = np.cumsum(groups[group])
  return group * width + np.searchsorted(sums, second * sums[-1], side="right")


def test_nearly_greedy_sampling_equals_a_naive_loop_for_prompts_of_any_length():
  prompts = random_prompts(1, 5, 64, 17)
  expected = [naive(prompt, lambda logits, t: np.argmax(logits)) for prompt in prompts]
  assert sample(prompts, sampling=GREEDY) == expected
  assert len({tuple(ids) for ids in expected}) == 4 and all(len(set(ids)) > 3 for ids in expected)  # not one token over and over


def test_sampling_equals_a_naive_loop_with_each_sequences_own_stream():
  prompts, seeds = random_prompts(9, 30, 2), [7, 4_294_967_295, 0]
  assert sample(prompts, seeds) == [naive_sampled(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


def test_a_sequence_does_not_depend_on_what_shares_its_batch():
  prompts, seeds = random_prompts(3, 20, 64, 41), [11, 12, 13, 14]
  together = sample(prompts, seeds)
  alone = [sample([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
  assert together == alone
  order = [2, 0, 3, 1]
  assert sample([prompts[i] for i in order], [seeds[i] for i in order]) == [together[i] for i in order]
  more = random_prompts(*range(1, 13), seed=1)  # the next batch size
  assert sample(more + prompts, [*range(100, 112), *seeds])[12:] == together
  longer = sample(prompts + [random_prompts(100)[0]], seeds + [1])  # and the next length
  assert longer[:4] == together


def test_equal_prompts_differ_by_seed_and_only_by_seed():
  prompt = random_prompts(10)[0]
  first, second, again = sample([prompt] * 3, [1, 2, 1])
  assert first == again and first != second


def test_more_prompts_than_the_largest_batch_keep_their_order():
  lengths = [int(n) for n in np.random.default_rng(0).integers(1, 60, 260)]
  prompts, seeds = random_prompts(*lengths), list(range(500, 760))
  result = sample(prompts, seeds, limit=2)
  assert len(result) == 260 and all(0 < len(ids) <= 2 for ids in result)
  for i in (0, 77, 255, 256, 259):
    assert sample([prompts[i]], [seeds[i]], limit=2) == [result[i]]


# Ends


@functools.cache
def three_ends() -> tuple[int, ...]:
  """Ids that three of the four responses to `four_prompts` come to hold at different places."""
  whole = sample(four_prompts())
  return whole[0][3], whole[1][6], whole[2][0]


def four_prompts():
  return random_prompts(4, 8, 15, 33, seed=1)


def test_long_prompts_enter_in_smaller_batches_with_the_same_tokens(monkeypatch):
  prompts, shapes = random_prompts(*([40] * 5 + [50] * 3), seed=3), []
  whole, run = sample(prompts), decode.enter
  monkeypatch.setattr(generate_lib, "BATCH_TOKENS", 4 * (256 + 96))
  monkeypatch.setattr(decode, "enter", lambda *args, **how: shapes.append(args[2].shape) or run(*args, **how))
  assert sample(prompts) == whole and shapes == [(4, 96), (4, 96)]


def test_each_of_several_end_ids_ends_a_response_and_is_kept():
  """Trap 15: the first of the ids that comes ends the response; it is the last id returned."""
  whole = sample(four_prompts())
  assert all(len(ids) == LIMIT and not {510, 511} & set(ids) for ids in whole)  # the length limit: no end id
  ends = three_ends()
  cut = [next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids) for ids in whole]
  assert sample(four_prompts(), eos_ids=ends) == cut
  assert len(cut[0]) <= 4 and len(cut[1]) <= 7 and len(cut[2]) == 1
  assert {ids[-1] for ids in cut[:3]} == set(ends)


def test_no_response_is_longer_than_the_limit():
  prompts = random_prompts(5, 9)
  assert sample(prompts, limit=2) == [ids[:2] for ids in sample(prompts)]


def test_padding_may_be_the_end_id_and_may_stand_in_the_prompt():
  """Trap 15: what fills a row is told from what was said by its place, not by its value."""
  ends, prompts = three_ends(), four_prompts()
  prompts[1][4] = prompts[2][-1] = prompts[3][0] = ends[0]
  expected = [naive_sampled(prompt, seed, ends) for seed, prompt in enumerate(prompts)]
  assert sample(prompts, eos_ids=ends, pad_id=1) == expected
  assert sample(prompts, eos_ids=ends, pad_id=ends[0]) == expected
  assert expected[0][-1] == ends[0]


def test_each_request_has_its_own_limit_and_end_ids():
  prompts, limits = four_prompts(), [12, 5, 1, 9]
  ends = [(510, 511), three_ends(), (), (three_ends()[0],)]
  expected = [naive_sampled(*given) for given in zip(prompts, range(4), ends, limits, strict=True)]
  assert sample(prompts, limit=limits, eos_ids=ends) == expected


# Slots


def test_nothing_waits_for_the_slowest(monkeypatch):
  """Trap 22: 4 long and 12 short responses in 4 slots. In batches of four, each with a long one, it would be 4 x 24 steps."""
  prompts, limits, steps = random_prompts(*[20] * 16, seed=4), [24, 3, 3, 3] * 4, []
  run = decode.decode

  def spy(*args, **how):
    slots, drawn = run(*args, **how)
    steps.append(int((np.asarray(drawn[0]) >= 0).sum(1).max()))
    return slots, drawn

  whole = [ids[:limit] for ids, limit in zip(sample(prompts, limit=24, eos_ids=()), limits, strict=True)]
  monkeypatch.setattr(decode, "decode", spy)
  assert sample(prompts, limit=limits, eos_ids=(), slots=4) == whole
  assert sum(map(len, whole)) == 132 and sum(steps) <= 50  # 132 ids, 16 of them drawn on entering, by four at a time: 29 at best


def test_the_ring_grows_with_what_it_holds_and_goes_round(monkeypatch):
  """60 tokens and then 30 more, in a ring of 64 that becomes 128; short ones enter behind long ones, where the ring has gone round."""
  monkeypatch.setattr(generate_lib, "RINGS", (64, 128))
  long, short = random_prompts(60, 50, seed=5), random_prompts(3, 8, 5, 9, 4, 7, seed=6)
  expected = [naive_sampled(prompt, seed, limit=30) for seed, prompt in enumerate(long + short)]
  assert sample(long + short, limit=30, slots=4) == expected
  seeds = [0, 1, *range(1000, 1014)]
  expected = [naive_sampled(prompt, seed, limit=12) for seed, prompt in zip(seeds, random_prompts(*[40] * 16, seed=7), strict=True)]
  assert sample(random_prompts(*[40] * 16, seed=7), seeds, slots=1) == expected  # 16 x 11 columns in a ring of 64


def test_the_number_of_slots_follows_from_the_memory_of_the_cache(monkeypatch):
  def made(**how):
    raise InterruptedError(how["rows"])

  monkeypatch.setattr(decode, "empty", made)

  def rows(count, limit=1):
    with pytest.raises(InterruptedError) as raised:
      sample([[1] * 5] * count, limit=limit)
    return raised.value.args[0]

  assert (rows(3), rows(40)) == (4, 32)
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert rows(300) == 256
  token = 2 * TINY.layers * TINY.kv_heads * TINY.head_size * 4
  monkeypatch.setattr(generate_lib, "CACHE_BYTES", 20 * 512 * token)
  assert rows(40, limit=300) == 16  # room for 305 tokens is 512: there is memory for 20 rows, and 16 is a size
  monkeypatch.setattr(generate_lib, "CACHE_BYTES", 0)
  assert rows(2) == 1


@pytest.fixture(name="drawing")
def fixture_drawing(monkeypatch):
  """How many slots each call of `decode` has, and how many of them are active."""
  calls, run = [], decode.decode

  def spy(weights, slots, *args, **how):
    calls.append((len(slots.active), int(slots.active.sum())))
    return run(weights, slots, *args, **how)

  monkeypatch.setattr(decode, "decode", spy)
  return calls


def test_few_that_are_left_on_a_cpu_go_on_in_fewer_slots(monkeypatch, drawing):
  monkeypatch.setattr(generate_lib, "CHUNK", 4)
  prompts, limits = random_prompts(*range(10, 50), seed=18), [30 if i % 5 == 4 else 2 for i in range(40)]
  expected = [naive_sampled(prompt, seed, limit=limit) for (seed, prompt), limit in zip(enumerate(prompts), limits, strict=True)]
  assert sample(prompts, limit=limits) == expected
  assert {slots for slots, _ in drawing} == {32, 16, 8} and drawing == sorted(drawing, key=lambda call: -call[0])
  assert all(active <= slots for slots, active in drawing) and drawing.count((8, 8)) > 3
  drawing.clear()
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert sample(prompts, limit=limits, slots=32) == expected and {slots for slots, _ in drawing} == {32}


def test_conversations_go_on_in_fewer_slots(monkeypatch, entered, drawing):
  """Five of 32 go on; what their slots hold is taken along."""
  monkeypatch.setattr(generate_lib, "SHARED_CPU", 4)
  prompts, more, answers = random_prompts(*range(10, 42), seed=19), random_prompts(5, 7, seed=20), [[] for _ in range(32)]
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
  assert held == sorted(len(turns[n]) - len(more[n - 1]) - 1 for turns in asked for n in range(1, len(turns)))


# On a mesh of eight devices


@functools.cache
def placed():
  mesh = mesh_lib.make_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
  return jax.device_put(params(), mesh_lib.param_shardings(mesh, params()))


def on_mesh(prompts, seeds, **how):
  return generate(placed(), TINY, prompts, seeds, sampling=FREE, eos_ids=(510, 511), pad_id=1, **how)


def test_a_mesh_samples_the_same_ids_whatever_the_placement_and_spreads_the_rows(monkeypatch):
  prompts, seen, run = random_prompts(*range(3, 15), seed=10), [], decode.decode

  def spy(weights, slots, *args, **how):
    seen.append((weights["layers"][0]["qkv"].sharding.is_fully_replicated, slots.keys[0].addressable_shards[0].data.shape[0]))
    return run(weights, slots, *args, **how)

  monkeypatch.setattr(decode, "decode", spy)
  before = run._cache_size()
  for _ in range(2):
    assert on_mesh(prompts, range(12), max_new_tokens=24, slots=8) == sample(prompts, limit=24)
  assert set(seen[:2]) == {(True, 1)} and run._cache_size() - before <= 3


@pytest.mark.parametrize("slots,own", [(None, 4), (12, 1), (3, 1)])
def test_prompts_are_read_on_the_device_of_their_slot(monkeypatch, slots, own):
  prompts, entries, enter = random_prompts(*range(3, 23), seed=10), [], decode.enter
  right, expected = sample(prompts, logprobs=True)

  def spy(*args, **how):
    slots, first = enter(*args, **how)
    entries.append((args[2].shape, {shard.data.shape for shard in first[0].addressable_shards}))
    return slots, first

  monkeypatch.setattr(decode, "enter", spy)
  ids, scores = on_mesh(prompts, range(20), max_new_tokens=LIMIT, slots=slots, logprobs=True)
  assert ids == right and all(entry == ((8 * own, 96), {(own,)}) for entry in entries)
  for found, score in zip(scores, expected, strict=True):
    np.testing.assert_allclose(found, score, atol=1e-4)


def test_several_processes_keep_all_rows_everywhere(monkeypatch):
  monkeypatch.setattr(decode, "row_axes", lambda mesh: ())
  prompts = random_prompts(*range(3, 15), seed=10)
  assert on_mesh(prompts, range(12), max_new_tokens=13) == sample(prompts, limit=13)


def test_the_kernel_runs_on_a_mesh(monkeypatch):
  monkeypatch.setattr(ring, "path", lambda *_: "triton")
  traced, step = [], ring.step
  monkeypatch.setattr(ring, "step", lambda *args, **how: traced.append(args[0].shape[0]) or step(*args, **how, interpret=True))
  prompts = random_prompts(*range(3, 15), seed=10)
  assert on_mesh(prompts, range(12), max_new_tokens=7) == [naive_sampled(prompt, seed, limit=7) for seed, prompt in enumerate(prompts)]
  assert traced == [4] * TINY.layers  # of 32 rows


def test_on_a_mesh_nothing_is_exchanged_but_how_many_rows_are_left():
  mesh = jax.tree.leaves(placed())[0].sharding.mesh
  weights = decode.prepare(placed(), architecture=TINY, dtype=jnp.float32, mesh=mesh)
  slots = decode.empty(architecture=TINY, rows=16, size=64, ends=2, dtype=jnp.float32, path="xla", mesh=mesh)
  how = dict(architecture=TINY, sampling=Sampling(0.7, 0.8, 20, 0.01), logprobs=True, path="xla", mesh=mesh)
  zero = np.zeros((8,), np.int32)
  requests = zero.astype(np.uint32), zero + 9, np.zeros((8, 2), np.int32)
  given = np.zeros((8, 32), np.int32), zero + 1, zero, requests, decode.Shared(zero, zero, zero)
  drawing = decode.decode.lower(weights, slots, jnp.int32(3), jnp.int32(1), chunk=8, **how).compile().as_text()
  entering = decode.enter.lower(weights, slots, *given, **how).compile().as_text()
  collective = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(-start)?\(")
  found = {(shape, name) for shape, name, _ in collective.findall(drawing)}
  assert found == {("s32[]", "all-reduce")} and not collective.findall(entering)
  assert collective.findall("  %a = f32[2,8]{1,0} all-gather(%b), dimensions={0}") == [("f32[2,8]{1,0}", "all-gather", "")]


# What a slot holds is not read again


def alike_prompts():
  """Two texts of 40 and 50 tokens before three prompts each, one of them nothing but the text and a token; and a prompt of its own."""
  first, second, *rest = random_prompts(40, 50, 7, 20, 3, 1, 12, 30, seed=8)
  return [first + rest[0], second + rest[1], first + rest[2], second[:1] + rest[5], second + rest[3], first + rest[4], second + rest[2]]


@pytest.fixture(name="entered")
def fixture_entered(monkeypatch):
  """What each batch that enters looks like: its shape, and how much of each prompt in it is taken from a slot."""
  batches, enter = [], decode.enter

  def spy(weights, slots, tokens, lengths, rows, requests, shared, **how):
    batches.append((tokens.shape, shared and shared.count[rows < len(slots.filled)].tolist()))
    return enter(weights, slots, tokens, lengths, rows, requests, shared, **how)

  monkeypatch.setattr(decode, "enter", spy)
  return batches


def test_a_shared_beginning_is_read_once_and_changes_nothing(monkeypatch, entered):
  prompts = alike_prompts()
  expected = [naive_sampled(prompt, seed) for seed, prompt in enumerate(prompts)]
  assert len({tuple(ids) for ids in expected}) == len(prompts)
  for least, right in ((1000, [((8, 96), [0] * 7)]), (30, [((8, 96), [0] * 3), ((8, 96), [50, 50, 40, 40])])):
    monkeypatch.setattr(generate_lib, "SHARED_CPU", least)
    monkeypatch.setattr(generate_lib, "WORTH_WAITING", least)
    entered.clear()
    assert sample(prompts) == expected and entered == right
  entered.clear()
  assert sample(prompts, slots=4) == expected
  assert entered[:2] == [((4, 96), [0] * 3), ((4, 96), [50])] and len(entered) > 2 and all(any(shared) for _, shared in entered[1:])


def converse(prompts, turns, **how):
  """Each prompt goes on `turns` times: with what was answered and five ids more. Returns all answers of each, and all prompts."""
  answers, asked, more = [[] for _ in prompts], [[prompt] for prompt in prompts], random_prompts(*[5] * turns, seed=11)

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
  monkeypatch.setattr(generate_lib, "SHARED_CPU", 4)
  monkeypatch.setattr(generate_lib, "RINGS", (64, 128))
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
  monkeypatch.setattr(generate_lib, "SHARED_CPU", 4)
  monkeypatch.setattr(generate_lib, "RINGS", (64, 128))
  monkeypatch.setitem(globals(), "params", placed)
  _, asked = talked = converse(random_prompts(*range(20, 30), seed=12), 2, slots=slots)
  monkeypatch.undo()
  assert talked == converse(random_prompts(*range(20, 30), seed=12), 2)
  held = sorted(count for _, shared in entered for count in shared or [] if count)
  assert held == sorted(len(prompt) - 6 for prompts in asked for prompt in prompts[1:])


def test_a_text_before_all_prompts_is_read_once_a_device(monkeypatch, entered):
  monkeypatch.setattr(generate_lib, "WORTH_WAITING", 30)
  text, *rest = random_prompts(60, *range(3, 23), seed=12)
  prompts = [text + own for own in rest]
  assert on_mesh(prompts, range(20), max_new_tokens=LIMIT) == sample(prompts)
  shares = [shared for (rows, _), shared in entered if rows % 8 == 0][:2]
  assert [sorted(shared) for shared in shares] == [[0] * 8, [60] * 12]


def test_what_the_ring_has_overwritten_is_read_again(monkeypatch, entered):
  """One conversation waits, while a long answer goes round the ring in the other slot."""
  monkeypatch.setattr(generate_lib, "TURN", 96)  # both are read in one batch
  monkeypatch.setattr(generate_lib, "SHARED_CPU", 4)
  monkeypatch.setattr(generate_lib, "RINGS", (64, 128))
  first, second = random_prompts(50, 3, seed=13)
  calls = []

  def reply(i, ids):
    calls.append(i)
    return (first + ids, 7) if calls == [0] else None

  late = sample([first, second], [1, 2], limit=[2, 60], eos_ids=(), reply=reply)
  assert [shared for _, shared in entered] == [[0, 0], [51]]
  assert late == [naive_sampled(first + naive_sampled(first, 1, (), 2), 7, (), 2), naive_sampled(second, 2, (), 60)]
  monkeypatch.setattr(generate_lib, "CHUNK_REPLIES", 40)  # 40 columns are written before the reply: 50 + 1 + 40 are more than 64
  entered.clear()
  calls.clear()
  assert sample([first, second], [1, 2], limit=[2, 60], eos_ids=(), reply=reply) == late
  assert [shared for _, shared in entered] == [[0, 0], [0]]


def test_a_larger_ring_does_not_bring_back_what_was_overwritten(monkeypatch, entered):
  """As above, and a long prompt makes the ring grow before the overwritten slot is looked at: 91 columns would fit into it now."""
  monkeypatch.setattr(generate_lib, "TURN", 96)
  monkeypatch.setattr(generate_lib, "SHARED_CPU", 4)
  monkeypatch.setattr(generate_lib, "RINGS", (64, 128))
  monkeypatch.setattr(generate_lib, "CHUNK_REPLIES", 40)
  first, second, long = random_prompts(50, 3, 70, seed=13)
  further = {0: [(long, 7), (first + [5, 6], 8)], 1: []}
  late = sample([first, second], [1, 2], limit=[2, 60], eos_ids=(), reply=lambda i, ids: further[i].pop(0) if further[i] else None)
  assert late == [naive_sampled(first + [5, 6], 8, (), 2), naive_sampled(second, 2, (), 60)]
  assert [shared for _, shared in entered] == [[0, 0], [0], [0]] and {shape for shape, _ in entered} == {(4, 96)}


def test_a_slot_that_a_waiting_prompt_goes_on_from_is_taken_last(monkeypatch, entered):
  """The first of four goes on with too much to be read beside the second, and waits; meanwhile two others take the slots of those that are
  done with."""
  monkeypatch.setattr(generate_lib, "SHARED_CPU", 4)
  prompts, more = random_prompts(40, 39, 38, 37, 8, 7, seed=16), random_prompts(150, 5, seed=17)
  asked = {}

  def reply(i, ids):
    if i > 1 or i in asked:
      return None
    asked[i] = prompts[i] + ids + more[i]
    return asked[i], 50 + i

  late = sample(prompts, eos_ids=(), slots=4, reply=reply)
  assert entered == [((4, 40), [0] * 4), ((4, 40), [50, 0, 0]), ((4, 256), [51])]
  assert late[2:] == [naive_sampled(prompt, 2 + n, ()) for n, prompt in enumerate(prompts[2:])] and len(asked[0]) == 202
  assert late[1] == naive_sampled(asked[1], 51, ())


def test_replies_where_every_response_is_one_id(monkeypatch):
  monkeypatch.setattr(generate_lib, "SHARED_CPU", 4)
  answers, asked = converse(random_prompts(*range(20, 26), seed=14), 3, limit=1, slots=4)
  for i, (each, prompts) in enumerate(zip(answers, asked, strict=True)):
    assert each == [naive_sampled(prompt, 100 * i + turn, limit=1) for turn, prompt in enumerate(prompts)]


def test_nothing_shared_is_the_same_as_no_look_at_the_slots():
  """On a CPU every prompt looks at the slots; on a GPU only those that share."""
  weights = decode.prepare(params(), architecture=TINY, dtype=jnp.float32)
  tokens, lengths = generate_lib.pad_right(random_prompts(5, 20, 32, seed=15), 4, 32, 1)
  zero, how = np.zeros((4,), np.int32), dict(architecture=TINY, sampling=FREE, logprobs=True, path="xla")
  found = []
  for shared in (None, decode.Shared(zero, zero, zero)):
    slots = decode.empty(architecture=TINY, rows=4, size=64, ends=1, dtype=jnp.float32, path="xla")._replace(column=jnp.int32(50))
    requests = np.arange(4, dtype=np.uint32), np.full((4,), 9, np.int32), np.full((4, 1), -1, np.int32)
    found.append(decode.enter(weights, slots, tokens, lengths, np.int32([2, 0, 1, 4]), requests, shared, **how))
  (slots, first), (same, again) = found
  np.testing.assert_array_equal(first[0], again[0])
  np.testing.assert_allclose(first[1], again[1], atol=1e-5)
  for prompt, row in ((0, 2), (1, 0), (2, 1)):
    columns = np.arange(50 - lengths[prompt], 50)
    for ours, theirs in zip(slots.keys + slots.values, same.keys + same.values, strict=True):
      axis = 2 if ours.shape[2] == 64 else 3
      np.testing.assert_allclose(*(np.take(np.asarray(ring), columns, axis)[row] for ring in (ours, theirs)), atol=1e-5)


def test_a_reply_is_checked():
  with pytest.raises(ValueError, match="empty prompt at index 1"):
    sample([[1], [2]], reply=lambda i, ids: ([], 1) if i else None)


# Log-probabilities


def test_log_probabilities_are_those_of_the_model_as_it_is():
  """Whatever was sampled with: no temperature, no filter."""
  prompts = random_prompts(4, 18, 9)
  sampling = Sampling(0.7, 0.9, 40, 0.01)
  ids, scores = sample(prompts, sampling=sampling, logprobs=True)
  assert ids == sample(prompts, sampling=sampling)
  for prompt, response, found in zip(prompts, ids, scores, strict=True):
    row = np.zeros(96, np.int32)
    row[: len(prompt) + len(response)] = prompt + response
    expected = []
    for t, token in enumerate(response):
      logits = np.asarray(next_logits(row, len(prompt) + t), np.float64)
      expected.append(logits[token] - np.log(np.sum(np.exp(logits))))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


# Shapes and bad input


def primitives(jaxpr, inside="while") -> set[str]:
  """Names of the operations within loops, whatever they are nested in; `inside` = "" counts all."""
  names = set()
  for eqn in jaxpr.eqns:
    names |= {eqn.primitive.name} if not inside else set()
    for inner in jax.core.jaxprs_in_params(eqn.params):
      names |= primitives(inner, "" if eqn.primitive.name == inside else inside)
  return names


def loop_operands(jaxpr) -> set[tuple[int, ...]]:
  """Shapes of all that goes into the program's while loops."""
  shapes = set()
  for eqn in jaxpr.eqns:
    shapes |= {var.aval.shape for var in eqn.invars} if eqn.primitive.name == "while" else set()
    for inner in jax.core.jaxprs_in_params(eqn.params):
      shapes |= loop_operands(inner)
  return shapes


def test_the_loop_takes_no_stacked_weights_apart():
  """Trap 19: no layer is sliced out of a stack; of the cache, one column is written."""
  weights = decode.prepare(params(), architecture=TINY, dtype=jnp.float32)
  slots = decode.empty(architecture=TINY, rows=4, size=64, ends=2, dtype=jnp.float32, path="xla")
  run = functools.partial(decode.decode, architecture=TINY, sampling=FREE, chunk=8, logprobs=False, path="xla")
  program = jax.make_jaxpr(run)(weights, slots, 3, 1).jaxpr
  stacks = {leaf.shape for leaf in jax.tree.leaves(params()["layers"])}
  assert all(leaf.shape[0] == TINY.layers for leaf in jax.tree.leaves(params()["layers"]))
  assert loop_operands(program) and not loop_operands(program) & stacks
  names = primitives(program)
  assert "dot_general" in names and "dynamic_update_slice" in names and not names & {"scan", "dynamic_slice"}
  kernel = jnp.asarray(params()["layers"]["feedforward"]["gate"]["kernel"])
  stacked = lambda x: jax.lax.fori_loop(0, 2, lambda i, y: y @ kernel[i][:, :32], x)
  assert "dynamic_slice" in primitives(jax.make_jaxpr(stacked)(jnp.ones((1, 32))).jaxpr, "scan")


def test_the_ring_is_written_in_place():
  weights = decode.prepare(params(), architecture=TINY, dtype=jnp.float32)
  slots = decode.empty(architecture=TINY, rows=32, size=1024, ends=1, dtype=jnp.float32, path="xla")
  how = dict(architecture=TINY, sampling=FREE, chunk=8, logprobs=False, path="xla")
  used = decode.decode.lower(weights, slots, jnp.int32(3), jnp.int32(1), **how).compile().memory_analysis()
  assert used.temp_size_in_bytes < slots.values[0].nbytes  # one copy of one layer's would already be more
  assert used.alias_size_in_bytes >= 2 * TINY.layers * slots.values[0].nbytes


def test_few_programs_are_compiled():
  """Trap 20: 24 batches of other sizes and lengths share a handful of compiled shapes."""
  decode.enter.clear_cache()
  decode.decode.clear_cache()
  for i in range(24):
    rows, longest = (3, 120) if i % 6 == 0 else (8 + i % 8, 60)
    sample(random_prompts(*np.random.default_rng(i).integers(1, longest, rows), longest, seed=i))
  assert decode.enter._cache_size() == 3 and decode.decode._cache_size() == 3  # two sizes and two lengths; two sizes, and a ring that grows


@pytest.mark.parametrize("size,expected", [(1, 96), (96, 96), (97, 256), (16384, 16384), (16385, 32768), (40000, 49152)])
def test_buckets(size, expected):
  assert generate_lib.bucket(size, generate_lib.LENGTHS) == expected


def test_every_ring_is_whole_blocks():
  assert all(size % ring.BLOCK == 0 for size in generate_lib.RINGS)


def test_bad_input_is_one_clear_error():
  with pytest.raises(ValueError, match="slots 0: it must be at least 1"):
    sample([[1]], [0], slots=0)
  with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
    sample([[1], [2]], [0])
  with pytest.raises(ValueError, match="empty prompt at index 1"):
    sample([[1], [], [2]])
  with pytest.raises(ValueError, match="max_new_tokens 0 for the prompt at index 1"):
    sample([[1], [2]], limit=[3, 0])
  assert sample([]) == []


@pytest.mark.parametrize("bad", [TINY.vocabulary, -1])
def test_an_id_beyond_the_vocabulary_is_refused(bad):
  """Looked up, it is NaN or another token; either way the response would be noise, without a word."""
  with pytest.raises(ValueError, match=f"the id {bad} in the prompt at index 1"):
    sample([[1], [3, bad]])


@pytest.mark.parametrize(
    "field,value", [("temperature", 0.0), ("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("min_p", 1.1)]
)
def test_a_sampling_that_means_nothing_is_refused(field, value):
  with pytest.raises(ValueError, match=f"{field}.*{value}"):
    Sampling(**{"temperature": 1.0, field: value})


class Words:
  """A stand-in for a tokenizer: what `Policy` needs of one."""

  pad_id, eos_ids = 1, (510, 511)

  def __init__(self, vocabulary):
    self.vocabulary = vocabulary


def test_policy_samples_with_its_own_parts_and_refuses_a_foreign_tokenizer():
  policy = Policy(TINY, params(), Words(TINY.vocabulary))
  prompts = random_prompts(1, 5, 64, 17)
  assert policy.sample(prompts, range(4), sampling=FREE, max_new_tokens=LIMIT) == sample(prompts)
  other = policy.replace({**params(), "norm": {"scale": -params()["norm"]["scale"]}})
  assert other.sample(prompts, range(4), sampling=FREE, max_new_tokens=LIMIT) != sample(prompts)
  with pytest.raises(ValueError, match=f"{TINY.vocabulary + 1}.*{TINY.vocabulary}"):  # trap 16
    Policy(TINY, params(), Words(TINY.vocabulary + 1))
