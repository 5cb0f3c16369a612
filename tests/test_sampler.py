"""Sampling whole responses, against a naive loop that runs the whole forward for every token;
single draws: test_token_sampling.py.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from oel_jax.policy import transformer
from oel_jax.policy.architecture import named
from oel_jax.policy.sampling import (
  engine,
  model,
  on_cpu,
  sampler,
  scheduler,
  sizes,
  slot_state,
)
from oel_jax.policy.sampling.sampler import Policy, generate
from oel_jax.policy.sampling.token_sampling import Sampling
from oel_jax.runtime.finite import NotFiniteError

TINY = named("pocket-tiny")
GREEDY, FREE = Sampling(1e-6), Sampling(1.0)
LIMIT = 12  # few limits, samplings and sets of end ids: each is compiled anew


@pytest.fixture(name="one_core", autouse=True)
def fixture_one_core(monkeypatch):
  """All slots together, whatever the machine's cores; with several: test_sampler_cores.py."""
  monkeypatch.setattr(sampler, "MIN_PROMPTS_PER_CORE", 10**9)


@functools.cache
def params():
  rng = np.random.default_rng(0)

  def leaf(path, shape):
    scale = path[-1].key == "scale"
    return (scale + rng.standard_normal(shape.shape) / (5 if scale else TINY.width**0.5)).astype(
      np.float32
    )

  return jax.tree_util.tree_map_with_path(
    leaf, jax.eval_shape(lambda: transformer.init(TINY, jax.random.key(0)))
  )


def sample(prompts, seeds=None, sampling=FREE, limit=LIMIT, eos_ids=(510, 511), pad_id=1, **how):
  seeds = range(len(prompts)) if seeds is None else seeds
  return generate(
    params(),
    TINY,
    prompts,
    seeds,
    sampling=sampling,
    max_new_tokens=limit,
    eos_ids=eos_ids,
    pad_id=pad_id,
    **how,
  )


def random_prompts(*lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 500, length).tolist() for length in lengths]


@jax.jit
def next_logits(tokens, length):
  """Logits behind the first `length` tokens of one row, by a whole forward without any cache."""
  positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)[None]
  hidden, _ = transformer.apply(
    params(), TINY, tokens[None], positions, (positions < length).astype(jnp.int32)
  )
  return transformer.logits(hidden[0, length - 1], transformer.head(params()))


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
  return naive(
    prompt, lambda logits, t: drawn_by_numpy(logits, jax.random.fold_in(key, t)), limit, eos_ids
  )


def drawn_by_numpy(logits, key):
  """The id that two random numbers say, in float64: the first one says which group of about √V
  neighbours, the second one which of them.
  """
  z = np.asarray(logits, np.float64)
  p, (first, second), width = (
    np.exp(z - z.max()),
    np.asarray(jax.random.uniform(key, (2,)), np.float64),
    int(np.ceil(len(z) ** 0.5)),
  )
  groups = [p[i : i + width] for i in range(0, len(p), width)]
  sums = np.cumsum([group.sum() for group in groups])
  group = np.searchsorted(sums, first * sums[-1], side="right")
  sums = np.cumsum(groups[group])
  return group * width + np.searchsorted(sums, second * sums[-1], side="right")


def test_nearly_greedy_sampling_equals_a_naive_loop_for_prompts_of_any_length():
  prompts = random_prompts(1, 5, 64, 17)
  expected = [naive(prompt, lambda logits, t: np.argmax(logits)) for prompt in prompts]
  assert sample(prompts, sampling=GREEDY) == expected
  # Not one token over and over.
  assert len({tuple(ids) for ids in expected}) == 4 and all(len(set(ids)) > 3 for ids in expected)


def test_sampling_equals_a_naive_loop_with_each_sequences_own_stream():
  prompts, seeds = random_prompts(9, 30, 2), [7, 4_294_967_295, 0]
  assert sample(prompts, seeds) == [
    naive_sampled(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)
  ]


def test_a_sequence_does_not_depend_on_what_shares_its_batch():
  prompts, seeds = random_prompts(3, 20, 64, 41), [11, 12, 13, 14]
  together = sample(prompts, seeds)
  alone = [sample([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
  assert together == alone
  order = [2, 0, 3, 1]
  assert sample([prompts[i] for i in order], [seeds[i] for i in order]) == [
    together[i] for i in order
  ]
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
  whole, run = sample(prompts), on_cpu.prefill_insert
  monkeypatch.setattr(sizes, "MAX_BATCH_TOKENS", 4 * (256 + 96))
  monkeypatch.setattr(
    on_cpu,
    "prefill_insert",
    lambda *args, **how: shapes.append(args[2].shape) or run(*args, **how),
  )
  assert sample(prompts) == whole and shapes == [(4, 96), (4, 96)]


@pytest.mark.parametrize("slots", [1, 4])
def test_long_prompts_that_look_at_no_cache_give_the_same_tokens(slots, monkeypatch):
  """Beside short ones that do, in slots that hold what others left."""
  monkeypatch.setattr(sizes, "LONG_LENGTH_CPU", 96)
  monkeypatch.setattr(sizes, "PREFILL_LENGTHS", (16, 96))
  prompts, looks = random_prompts(40, 9, 60, 12, 70, 33, seed=8), []
  prompts.append(prompts[0] + [5, 6, 7])  # begins as another does
  expected = [naive_sampled(prompt, seed) for seed, prompt in enumerate(prompts)]
  run = on_cpu.prefill_insert
  spy = lambda *args, **how: looks.append((args[2].shape[1], args[6])) or run(*args, **how)
  monkeypatch.setattr(on_cpu, "prefill_insert", spy)
  assert sample(prompts, slots=slots) == expected
  assert {(length, shared is not None) for length, shared in looks} == {(16, True), (96, False)}


def test_each_of_several_end_ids_ends_a_response_and_is_kept():
  """The first of the ids that comes ends the response; it is the last id returned."""
  whole = sample(four_prompts())
  # The length limit: no end id.
  assert all(len(ids) == LIMIT and not {510, 511} & set(ids) for ids in whole)
  ends = three_ends()
  cut = [next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids) for ids in whole]
  assert sample(four_prompts(), eos_ids=ends) == cut
  assert len(cut[0]) <= 4 and len(cut[1]) <= 7 and len(cut[2]) == 1
  assert {ids[-1] for ids in cut[:3]} == set(ends)


def test_no_response_is_longer_than_the_limit():
  prompts = random_prompts(5, 9)
  assert sample(prompts, limit=2) == [ids[:2] for ids in sample(prompts)]


def test_padding_may_be_the_end_id_and_may_stand_in_the_prompt():
  """What fills a row is told from what was said by its place, not by its value."""
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
  """4 long and 12 short responses in 4 slots. In batches of four, each with a long one, it
  would be 4 x 24 steps.
  """
  prompts, limits, steps = random_prompts(*[20] * 16, seed=4), [24, 3, 3, 3] * 4, []
  run = on_cpu.decode

  def spy(*args, **how):
    slots, drawn = run(*args, **how)
    steps.append(int((np.asarray(drawn[0]) >= 0).sum(1).max()))
    return slots, drawn

  whole = [
    ids[:limit] for ids, limit in zip(sample(prompts, limit=24, eos_ids=()), limits, strict=True)
  ]
  monkeypatch.setattr(on_cpu, "decode", spy)
  assert sample(prompts, limit=limits, eos_ids=(), slots=4) == whole
  # 132 ids, 16 of them drawn on entering, by four at a time: 29 at best.
  assert sum(map(len, whole)) == 132 and sum(steps) <= 50


def test_the_ring_grows_with_what_it_holds_and_goes_round(monkeypatch):
  """60 tokens and then 30 more, in a ring of 64 that becomes 128; short ones enter behind long
  ones, where the ring has gone round.
  """
  monkeypatch.setattr(sizes, "CACHE_LENGTHS", (64, 128))
  long, short = random_prompts(60, 50, seed=5), random_prompts(3, 8, 5, 9, 4, 7, seed=6)
  expected = [naive_sampled(prompt, seed, limit=30) for seed, prompt in enumerate(long + short)]
  assert sample(long + short, limit=30, slots=4) == expected
  seeds = [0, 1, *range(1000, 1014)]
  expected = [
    naive_sampled(prompt, seed, limit=12)
    for seed, prompt in zip(seeds, random_prompts(*[40] * 16, seed=7), strict=True)
  ]
  # 16 x 11 columns in a ring of 64.
  assert sample(random_prompts(*[40] * 16, seed=7), seeds, slots=1) == expected


def test_the_number_of_slots_follows_from_the_memory_of_the_cache(monkeypatch):
  def made(**how):
    raise InterruptedError(how["rows"])

  monkeypatch.setattr(slot_state, "empty", made)

  def rows(count, limit=1):
    with pytest.raises(InterruptedError) as raised:
      sample([[1] * 5] * count, limit=limit)
    return raised.value.args[0]

  assert (rows(3), rows(40)) == (4, 32)
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert rows(300) == 256
  token = 2 * TINY.layers * TINY.kv_heads * TINY.head_size * 4
  monkeypatch.setattr(sampler, "MAX_CACHE_BYTES", 20 * 512 * token)
  # Room for 305 tokens is 512: there is memory for 20 rows, and 16 is a size.
  assert rows(40, limit=300) == 16
  monkeypatch.setattr(sampler, "MAX_CACHE_BYTES", 0)
  assert rows(2) == 1


@pytest.fixture(name="drawing")
def fixture_drawing(monkeypatch):
  """How many slots each call of `decode` has, and how many of them are active."""
  calls = []

  def spy(run, weights, slots, *args, **how):
    calls.append((len(slots.active), int(slots.active.sum())))
    return run(weights, slots, *args, **how)

  for module in (engine, on_cpu):
    monkeypatch.setattr(module, "decode", functools.partial(spy, module.decode))
  return calls


def test_few_that_are_left_on_a_cpu_go_on_in_fewer_slots(monkeypatch, drawing):
  monkeypatch.setattr(scheduler, "CHUNK", 4)
  prompts, limits = (
    random_prompts(*range(10, 50), seed=18),
    [30 if i % 5 == 4 else 2 for i in range(40)],
  )
  expected = [
    naive_sampled(prompt, seed, limit=limit)
    for (seed, prompt), limit in zip(enumerate(prompts), limits, strict=True)
  ]
  assert sample(prompts, limit=limits) == expected
  assert {slots for slots, _ in drawing} == {32, 16, 8} and drawing == sorted(
    drawing, key=lambda call: -call[0]
  )
  assert all(active <= slots for slots, active in drawing) and drawing.count((8, 8)) > 3
  drawing.clear()
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert sample(prompts, limit=limits, slots=32) == expected and {
    slots for slots, _ in drawing
  } == {32}


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
    for inner in jax_core.jaxprs_in_params(eqn.params):
      names |= primitives(inner, "" if eqn.primitive.name == inside else inside)
  return names


def loop_operands(jaxpr) -> set[tuple[int, ...]]:
  """Shapes of all that goes into the program's while loops."""
  shapes = set()
  for eqn in jaxpr.eqns:
    shapes |= {var.aval.shape for var in eqn.invars} if eqn.primitive.name == "while" else set()
    for inner in jax_core.jaxprs_in_params(eqn.params):
      shapes |= loop_operands(inner)
  return shapes


def test_the_loop_takes_no_stacked_weights_apart():
  """No layer is sliced out of a stack; of the cache, one column is written."""
  weights = model.prepare(params(), architecture=TINY, dtype=jnp.float32)
  slots = slot_state.empty(
    architecture=TINY, rows=4, columns=64, eos_ids=2, dtype=jnp.float32, attn_impl="xla"
  )
  run = functools.partial(
    engine.decode, architecture=TINY, sampling=FREE, chunk=8, logprobs=False, attn_impl="xla"
  )
  program = jax.make_jaxpr(run)(weights, slots, 3, 1).jaxpr
  stacks = {leaf.shape for leaf in jax.tree.leaves(params()["layers"])}
  assert all(leaf.shape[0] == TINY.layers for leaf in jax.tree.leaves(params()["layers"]))
  assert loop_operands(program) and not loop_operands(program) & stacks
  names = primitives(program)
  assert (
    "dot_general" in names
    and "dynamic_update_slice" in names
    and not names & {"scan", "dynamic_slice"}
  )
  kernel = jnp.asarray(params()["layers"]["feedforward"]["gate"]["kernel"])
  stacked = lambda x: jax.lax.fori_loop(0, 2, lambda i, y: y @ kernel[i][:, :32], x)
  assert "dynamic_slice" in primitives(jax.make_jaxpr(stacked)(jnp.ones((1, 32))).jaxpr, "scan")


def test_the_ring_is_written_in_place():
  weights = model.prepare(params(), architecture=TINY, dtype=jnp.float32)
  slots = slot_state.empty(
    architecture=TINY, rows=32, columns=1024, eos_ids=1, dtype=jnp.float32, attn_impl="xla"
  )
  how = dict(architecture=TINY, sampling=FREE, chunk=8, logprobs=False, attn_impl="xla")
  used = (
    engine.decode.lower(weights, slots, jnp.int32(3), jnp.int32(1), **how)
    .compile()
    .memory_analysis()
  )
  # One copy of one layer's would already be more.
  assert used.temp_size_in_bytes < slots.values[0].nbytes
  assert used.alias_size_in_bytes >= 2 * TINY.layers * slots.values[0].nbytes


def test_python_goes_through_layers_that_are_alike_once(monkeypatch):
  """And through the first, which has nothing to add up yet."""
  a, seen, block = dataclasses.replace(TINY, layers=7), [], transformer.block
  monkeypatch.setattr(transformer, "block", lambda *given: seen.append(1) or block(*given))
  tokens = jnp.ones((2, 3), jnp.int32)
  params = jax.eval_shape(lambda: transformer.init(a, jax.random.key(0)))
  weights = jax.eval_shape(
    lambda given: model.prepare(given, architecture=a, dtype="float32"), params
  )

  def attend(layer, own, held):
    return own[0] + held, None

  def read(weights):
    split = model.heads_at(a, jnp.zeros((2, 3), jnp.int32))
    return model.forward(weights, a, tokens, split, attend, [jnp.float32(0)] * a.layers)[0]

  assert jax.eval_shape(read, weights).shape == (2, 3, a.width) and len(seen) == 2


def test_few_programs_are_compiled():
  """24 batches of other sizes and lengths share a handful of compiled shapes."""
  programs = on_cpu.prefill_begin, on_cpu.prefill_layer, on_cpu.prefill_last, on_cpu.decode
  for program in (*programs, on_cpu.prefill_draw):
    program.clear_cache()
  for i in range(24):
    rows, longest = (3, 120) if i % 6 == 0 else (8 + i % 8, 60)
    sample(random_prompts(*np.random.default_rng(i).integers(1, longest, rows), longest, seed=i))
  # Two sizes and two lengths; two sizes, and a ring that grows.
  assert [program._cache_size() for program in programs] == [3] * 4
  assert on_cpu.prefill_draw._cache_size() == 2


def test_a_program_is_compiled_once_wherever_its_arrays_came_from():
  """Slots that are new, slots that other programs returned, and weights on a mesh of one device."""
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  placed = jax.device_put(params(), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
  programs = on_cpu.prefill_begin, on_cpu.prefill_layer, on_cpu.prefill_last, on_cpu.decode
  for program in (*programs, on_cpu.prefill_draw):
    program.clear_cache()
  how = dict(sampling=FREE, max_new_tokens=5, eos_ids=(510,), pad_id=1, slots=4)
  prompts = random_prompts(*[60] * 12)
  drawn = [generate(tree, TINY, prompts, range(12), **how) for tree in (placed, params(), placed)]
  assert [program._cache_size() for program in (*programs, on_cpu.prefill_draw)] == [1] * 5
  assert drawn[0] == drawn[1] == drawn[2]


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
  """Looked up, it is NaN or another token; either way the response would be noise, without a
  word.
  """
  with pytest.raises(ValueError, match=f"the id {bad} in the prompt at index 1"):
    sample([[1], [3, bad]])


@pytest.mark.parametrize(
  "field,value",
  [
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_k", -1),
    ("min_p", 1.1),
  ],
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
  with pytest.raises(ValueError, match=f"{TINY.vocabulary + 1}.*{TINY.vocabulary}"):
    Policy(TINY, params(), Words(TINY.vocabulary + 1))


# Logits that are not finite

UNTIED = dataclasses.replace(TINY, tied_head=False)


def _poisoned(place, value):
  """Parameters with a head of their own, whose embedding or head holds `value` in row
  `place[1]`.
  """
  name, row = place
  made = {**params(), "head": {"kernel": params()["embed"]["embedding"].copy()}}
  made["embed"] = {"embedding": params()["embed"]["embedding"].copy()}
  table = made[name]["embedding" if name == "embed" else "kernel"]
  table[row] = value
  return made


@pytest.mark.parametrize("cores", [False, True])
def test_logits_that_are_not_finite_stop_sampling_where_they_turn_up(monkeypatch, cores):
  """The id that response 2 draws third has an embedding of NaN: all that it is read for is NaN."""
  if cores:
    monkeypatch.setattr(sampler, "MIN_PROMPTS_PER_CORE", 1)
    monkeypatch.setattr(sampler, "_cores", lambda mesh: 2)
  prompts = random_prompts(9, 14, 7, 11, seed=21)
  whole = sample(prompts)
  poison = whole[2][2]
  first = min(ids.index(poison) for ids in whole if poison in ids)
  assert first <= 2 and not any(poison in prompt for prompt in prompts)
  others = [i for i, ids in enumerate(whole) if poison in ids[:-1]]
  told = r"logits of the prompt at index (\d) .* not finite after (\d+) tokens of its response"
  run = functools.partial(
    generate,
    _poisoned(("embed", poison), np.nan),
    UNTIED,
    prompts,
    range(4),
    sampling=FREE,
    max_new_tokens=LIMIT,
    pad_id=1,
  )
  with pytest.raises(NotFiniteError, match=told) as raised:
    run(eos_ids=(510, 511))
  assert raised.value.prompts and set(raised.value.prompts) <= set(others)
  index, tokens = map(int, re.search(told, str(raised.value)).groups())
  assert index in others and tokens == whole[index].index(poison) + 1
  # A row that has ended goes on being computed beside others: what comes of it is not looked at.
  assert run(eos_ids=(poison, 511)) == sample(prompts, eos_ids=(poison, 511))


def _hidden(prompt):
  """The last hidden state of a prompt, by a forward without any cache."""
  tokens = jnp.asarray([prompt])
  ones = jnp.ones(tokens.shape, jnp.int32)
  return np.asarray(transformer.apply(params(), TINY, tokens, jnp.cumsum(ones, 1) - 1, ones)[0])[
    0, -1
  ]


@pytest.mark.parametrize("sampling", [FREE, Sampling(0.7, top_p=0.8, top_k=20)])
def test_one_logit_of_a_prompt_that_is_not_finite_is_enough(sampling):
  """Of a whole row of the vocabulary. What a filter makes -inf itself is no fault."""
  prompt = random_prompts(5, seed=2)[0]
  # Every product with it is above 0, and their sum above what float32 holds.
  above = 3e38 * np.sign(_hidden(prompt))
  run = lambda held: generate(
    _poisoned(("head", 77), held),
    UNTIED,
    [prompt] * 2,
    range(2),
    sampling=sampling,
    max_new_tokens=LIMIT,
    eos_ids=(510, 511),
    pad_id=1,
  )
  assert all(run(0.0))
  for held in (np.nan, above, -above, 3e38, -3e38):
    with pytest.raises(NotFiniteError, match="index 0 .* after 0 tokens .*, and those of 1 more"):
      run(held)
