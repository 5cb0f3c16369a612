"""Texts that prompts begin with, kept once: which ones, attention to them, and the same tokens."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import (
  FREE,
  GREEDY,
  TINY,
  UNTIED,
  fixture_one_core,  # noqa: F401 (used by its name)
  naive_sampled,
  params,
  random_prompts,
  sample,
)
from test_sampler_mesh import on_mesh

from oel_jax.policy import transformer
from oel_jax.policy.architecture import named
from oel_jax.policy.sampling import (
  beginnings,
  engine,
  kv_cache,
  model,
  on_cpu,
  sampler,
  scheduler,
  sizes,
  slot_state,
  text_cache,
)
from oel_jax.policy.sampling.sampler import generate
from oel_jax.runtime.finite import NotFiniteError


@pytest.fixture(name="short")
def fixture_short(monkeypatch):
  """Texts of a few tokens, with few prompts each, are shared."""
  monkeypatch.setattr(beginnings, "MIN_TOKENS", 10)
  monkeypatch.setattr(beginnings, "MIN_PROMPTS", 2)
  monkeypatch.setattr(beginnings, "STEP", 2)
  monkeypatch.setattr(sizes, "TEXT_LENGTHS", (64, 128))


@pytest.fixture(name="exact")
def fixture_exact():
  """Products of float32 are that on a GPU, too, where they would be TF32's."""
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(name="texts")
def fixture_texts(monkeypatch):
  """How many texts each call of `decode` has."""
  counts = []

  def spy(run, *args, texts=None, **how):
    counts.append(int((np.asarray(texts.length) > 0).sum()) if texts else 0)
    return run(*args, texts=texts, **how)

  for module in (engine, on_cpu):
    monkeypatch.setattr(module, "decode", functools.partial(spy, module.decode))
  return counts


def behind_texts():
  """Six prompts behind a text of 40 tokens, three behind one of 21, and two behind none."""
  first, second, *rest = random_prompts(40, 21, 3, 9, 1, 20, 12, 5, 7, 2, 15, 30, 4, seed=21)
  prompts = [first + own for own in rest[:6]] + [second + own for own in rest[6:9]] + rest[9:]
  return [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))]


# Which texts


def test_the_texts_are_those_that_save_most(short, monkeypatch):
  monkeypatch.setattr(sizes, "TEXT_LENGTHS", range(1, 100))
  a, b, c, *rest = random_prompts(30, 20, 12, *[5] * 12, seed=22)
  found = lambda prompts, most=1000: beginnings.find(prompts, most).texts
  head = [7] * 12
  behind = lambda *texts: [head + text + own for text in texts for own in rest[:3]]
  # Each text with its head saves more than the head alone, which saves more than short ones.
  assert found(behind(a, b)) == [head + a, head + b]
  assert found(behind(c[:2], b[:2])) == [head]
  assert found([a + rest[0], b + rest[1]]) == [] == found([a[:9] + own for own in rest])
  # Of equal prompts one token is left to read; of one that is another's beginning, too.
  assert found([a, a, a]) == [a[:-1]] and found([a, a + rest[0]]) == [a[:-1]]
  # There is room for both, for one, for the shorter one, for what both begin with, and for none.
  assert found(behind(a, b), 84) == [head + a, head + b]
  assert found(behind(a, b), 83) == [head + a] and found(behind(a, b), 41) == [head + b]
  assert found(behind(a, b), 31) == [head] and found(behind(a, b), 11) == []
  # Where there is room for few texts, what more prompts begin with may save more.
  monkeypatch.setattr(beginnings, "MAX_TEXTS", 1)
  assert found(behind(a, b)) == [head + a] and found(behind(a, b, c, a[::-1])) == [head]
  monkeypatch.setattr(beginnings, "MAX_TEXTS", 32)
  # A room of 42 tokens more for a text is not worth 2 x 13, and one of 14 is.
  wide = [a + own for own in rest[:3]]
  assert found([*wide, head + rest[0], head + rest[1]]) == [a]
  assert found([*wide, b + rest[0], b + rest[1]]) == [a, b]


def test_there_is_room_for_texts_of_few_lengths():
  common = beginnings.Beginnings([[0] * 513, [0]], 4)
  assert common.tokens == 4096 and beginnings.Beginnings([], 0).tokens == 0
  prompts = [[text] * 600 + [n] for text in range(5) for n in range(4)]
  places = lambda tokens: beginnings.find(prompts, tokens).places
  assert places(12 * 1024) == 12 and places(12 * 1024 - 1) == 5 and places(4 * 1024) == 4
  prompts = prompts[4:8]
  assert beginnings.find(prompts, 1023).texts == []
  assert beginnings.find(prompts, 1024).texts == [[1] * 600]


def test_turns_of_a_long_conversation_are_cut_without_end(short):
  """Each prompt goes on with the one before; a group saves (count - 1) times its shortest."""
  (whole,) = random_prompts(6000, seed=27)
  prompts = [whole[:n] for n in range(6, 6000, 6)]
  saved = {n: (len(prompts) - n - 1) * (len(prompts[n]) - 1) for n in range(2, len(prompts))}
  best = max(saved, key=saved.get)
  (text,) = beginnings.find(prompts, 10**6).texts
  assert text == whole[: len(text)] and abs(len(text) - len(prompts[best])) <= 6000 // 200


def test_a_row_without_a_text_gets_nothing_of_the_others():
  """What is put beside it may be no number: 0 times that is none."""
  own = np.ones((2, 1, 4), np.float32), np.zeros((2, 1), np.float32)
  before = tuple(x * np.float32("nan") for x in own)
  joined = np.asarray(jax.jit(text_cache.join)(own, before, np.int32([-1, 0])))
  assert (joined[0] == 1).all() and np.isnan(joined[1]).all()


def test_of_two_texts_one_is_no_number(exact, short, texts):
  """An id of one text has an embedding of NaN, and so has id 0, which nobody has."""
  a, b, *rest = random_prompts(40, 30, *[9] * 8, seed=28)
  prompts = [text + own for text, own in zip([a, b, [], a, b, a, b, []], rest, strict=True)]
  ours = set(b).difference(a, *rest)
  assert ours and all(0 not in prompt for prompt in prompts)
  weights = {**params(), "head": {"kernel": params()["embed"]["embedding"]}}
  table = weights["head"]["kernel"].copy()
  table[[0, min(ours)]] = np.nan
  how = dict(sampling=GREEDY, max_new_tokens=3, eos_ids=(), pad_id=1)
  with pytest.raises(NotFiniteError) as raised:
    generate({**weights, "embed": {"embedding": table}}, UNTIED, prompts, range(8), **how)
  assert set(texts) == {2} and sorted(raised.value.prompts) == [1, 4, 6]


def test_short_texts_and_few_prompts_are_not_shared():
  a, *rest = random_prompts(511, *[40] * 4, seed=23)
  assert beginnings.find([a + own for own in rest], 10**6).texts == []
  a.append(3)
  assert beginnings.find([a + own for own in rest], 10**6).texts == [a]
  assert beginnings.find([a + own for own in rest[:3]], 10**6).texts == []
  # In games, others will follow those two.
  assert beginnings.find([a + own for own in rest[:2]], 10**6, replies=True).texts == [a]


def test_a_prompt_is_split_behind_the_longest_text():
  common = beginnings.Beginnings([[1, 2], [1, 2, 3], [4]], 4)
  given = [[1, 2, 3, 9], [1, 2, 3], [1, 2, 4], [1, 2], [4, 4], [5, 2, 3]]
  assert [common.split(prompt) for prompt in given] == [
    (1, [9]),
    (0, [3]),
    (0, [4]),
    (-1, [1, 2]),
    (2, [4]),
    (-1, [5, 2, 3]),
  ]
  assert [common.length(n) for n in (-1, 0, 1)] == [0, 2, 3]


# Attention


@pytest.mark.parametrize("n,group", [pytest.param(1, 4, marks=pytest.mark.slow), (3, 64)])
def test_every_row_behind_a_text_has_a_place_in_a_block_of_it(n, group):
  rng = np.random.default_rng(n)
  run = jax.jit(text_cache.blocks, static_argnums=2)
  for B in (1, 9):
    texts = text_cache.Texts((), (), np.arange(n) + 5)
    for text in (*rng.integers(-1, n, (4, B)), np.full(B, n - 1), np.full(B, -1)):
      found = jax.tree.map(np.asarray, run(jnp.asarray(text), texts, group))
      size = found.rows.size
      assert size and found.rows.shape[1] * group <= max(text_cache.QUERIES, group)
      for row in range(B):
        place = found.place[row]
        assert (place >= size) == (text[row] < 0)
        if text[row] >= 0:
          assert found.rows.flat[place] == row
          assert found.text[place // found.rows.shape[1]] == text[row]
      assert (found.text >= 0).sum() <= B


@pytest.mark.parametrize(
  "attn_impl,programs",
  [
    pytest.param("xla", 1, marks=pytest.mark.slow),
    pytest.param("triton", 1, marks=pytest.mark.slow),
    ("triton", 512),
  ],
)
def test_each_block_sees_its_text(exact, monkeypatch, attn_impl, programs):
  """Against float64; queries in tiles, texts in parts, a text that ends within a part."""
  monkeypatch.setattr(text_cache, "PROGRAMS", programs)
  monkeypatch.setattr(text_cache, "QUERIES", 32)
  run = text_cache.kernel
  monkeypatch.setattr(text_cache, "kernel", lambda *given: run(*given, interpret=True))
  rng = np.random.default_rng(0)
  C, M, N, K, H, P = 4, 7, 6, 1, 16, 256
  q = rng.standard_normal((C, M, N, H))
  k, v = rng.standard_normal((2, 3, K, P, H))
  length, text = np.int32([256, 65, 1]), np.int32([1, 0, -1, 2])
  texts = text_cache.LayerTexts(np.float32(k), np.float32(v), length)
  attend = jax.jit(text_cache.attend, static_argnums=(3, 4))
  value, logsumexp = jax.device_get(attend(np.float32(q), text, texts, attn_impl, H**-0.5))
  assert np.isfinite(value).all() and np.isfinite(logsumexp).all()
  for c, n in itertools.product((0, 1, 3), range(N)):
    here = text[c], n // (N // K), slice(length[text[c]])
    scores = q[c, :, n] @ k[here].T / H**0.5
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    mass = weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(value[c, :, n], weights @ v[here] / mass, atol=1e-5)
    np.testing.assert_allclose(logsumexp[c, :, n], (top + np.log(mass))[:, 0], atol=1e-5)
  # What is no number stays with its query, or with the blocks of its text.
  q[0, 1, 2] = k[2, 0, 0, 3] = np.nan
  texts = texts._replace(keys=np.float32(k))
  broken = np.asarray(attend(np.float32(q), text, texts, attn_impl, H**-0.5)[0])
  is_nan = np.zeros((C, M, N), bool)
  is_nan[0, 1, 2] = is_nan[3] = True
  assert np.isnan(broken[is_nan]).all() and (broken[~is_nan] == value[~is_nan]).all()


# Tokens


@pytest.mark.parametrize(
  "dtype,attn_impl,kept",
  [("float32", "xla", True), ("bfloat16", "triton", True), ("bfloat16", "xla", False)],
)
def test_without_a_kernel_texts_are_kept_once_in_float32_only(monkeypatch, dtype, attn_impl, kept):
  rooms = []

  def find(prompts, max_tokens, **_):
    rooms.append(max_tokens)
    raise InterruptedError

  monkeypatch.setattr(kv_cache, "attn_impl", lambda *_: attn_impl)
  monkeypatch.setattr(beginnings, "find", find)
  monkeypatch.setattr(model, "prepare", lambda *_, **__: jnp.zeros(1))
  with pytest.raises(InterruptedError):
    sample([[3, 4]], dtype=jnp.dtype(dtype))
  assert (rooms[0] > 0) == kept


@pytest.mark.slow
@pytest.mark.parametrize("slots", [None, 4])
def test_a_text_kept_once_changes_no_token(exact, short, texts, slots):
  prompts = behind_texts()
  expected = [naive_sampled(prompt, seed) for seed, prompt in enumerate(prompts)]
  assert sample(prompts, slots=slots) == expected and set(texts) == {2}
  # Nor does another order, or who is beside it.
  order = np.random.default_rng(1).permutation(len(prompts))
  assert sample([prompts[i] for i in order], order, slots=slots) == [expected[i] for i in order]


@pytest.mark.slow
def test_scores_are_those_without_sharing(exact, short, texts, monkeypatch):
  ours = sample(behind_texts(), sampling=GREEDY, logprobs=True)
  monkeypatch.setattr(beginnings, "MIN_TOKENS", 1000)
  theirs = sample(behind_texts(), sampling=GREEDY, logprobs=True)
  assert ours[0] == theirs[0] and {0, 2} == set(texts)
  for one, other in zip(ours[1], theirs[1], strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_slots_hold_only_what_is_behind_the_text(short, monkeypatch):
  made = []

  def empty(**how):
    made.append((how["rows"], how["columns"], how["texts"]))
    raise InterruptedError

  monkeypatch.setattr(sizes, "CACHE_LENGTHS", (32, 64, 128))
  monkeypatch.setattr(slot_state, "empty", empty)
  monkeypatch.setattr(text_cache, "read", lambda *_, **__: None)
  # Memory for one prompt of 128 tokens, or for a text of 90 in 128 and for 16 of 32.
  token_bytes = 2 * TINY.layers * TINY.kv_heads * TINY.head_size * 4
  monkeypatch.setattr(sampler, "MAX_CACHE_BYTES", 640 * token_bytes)
  text, *rest = random_prompts(90, *[9] * 20, seed=24)
  for least, reply in ((10, None), (1000, None), (10, lambda *_: None)):
    monkeypatch.setattr(beginnings, "MIN_TOKENS", least)
    with pytest.raises(InterruptedError):
      sample([text + own for own in rest], limit=2, reply=reply)
  # A reply may leave its text: no more slots then than without it.
  assert made == [(16, 32, True), (4, 128, False), (4, 32, True)]


@pytest.mark.parametrize("slots", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_conversations_go_on_behind_their_text(exact, short, texts, monkeypatch, slots):
  """They keep it, and take over their own turns; one turns to the other text, one to none; a prompt
  that equals another's rest behind another text takes nothing from it.
  """
  monkeypatch.setattr(scheduler, "MIN_SHARED_CPU", 4)
  a, b, *rest = random_prompts(30, 24, *[12] * 6, seed=25)
  prompts = [a + rest[0], a + rest[1], a + rest[2], b + rest[0], b + rest[1], b + rest[5]]
  asked, answers = [[prompt] for prompt in prompts], [[] for _ in prompts]
  turned = {1: b + rest[1] + rest[3], 4: rest[4]}

  def reply(i, ids):
    answers[i].append(ids)
    if len(answers[i]) > 2:
      return None
    asked[i].append(
      turned[i] if i in turned and len(answers[i]) == 1 else asked[i][-1] + ids + [9, 8, i]
    )
    return asked[i][-1], 100 * i + len(answers[i])

  sample(prompts, [100 * i for i in range(6)], reply=reply, slots=slots, limit=7)
  assert set(texts) == {2}
  for i, (each, turns) in enumerate(zip(answers, asked, strict=True)):
    assert each == [naive_sampled(prompt, 100 * i + n, limit=7) for n, prompt in enumerate(turns)]


@pytest.mark.slow
def test_a_mesh_has_the_texts_everywhere(exact, short, texts):
  if jax.device_count() < 8:
    pytest.skip(f"needs 8 devices, here are {jax.device_count()}")
  prompts = behind_texts()
  assert on_mesh(prompts, range(len(prompts)), max_new_tokens=7) == sample(prompts, limit=7)
  assert set(texts) == {2}


@pytest.mark.slow
def test_the_kernels_run_behind_texts(exact, short, texts, monkeypatch):
  step, kernel = kv_cache.step, text_cache.kernel
  monkeypatch.setattr(kv_cache, "attn_impl", lambda *_: "triton")
  monkeypatch.setattr(kv_cache, "step", lambda *args, **how: step(*args, **how, interpret=True))
  monkeypatch.setattr(text_cache, "kernel", lambda *args: kernel(*args, interpret=True))
  prompts = behind_texts()
  assert sample(prompts, sampling=FREE, limit=4) == [
    naive_sampled(prompt, seed, limit=4) for seed, prompt in enumerate(prompts)
  ]
  assert set(texts) == {2}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen2.5-1.5b"])
def test_on_a_gpu_scores_are_those_without_sharing_but_for_rounding(name, texts, monkeypatch):
  """Two texts and prompts behind them, whole and with a reply that takes over what a slot holds."""
  shape = named(name)
  init = lambda key: jax.tree.map(
    lambda leaf: leaf.astype(jnp.bfloat16), transformer.init(shape, key)
  )
  weights = jax.jit(init)(jax.random.key(0))
  a, b, *rest = random_prompts(900, 700, *[100] * 12, seed=26)
  prompts = [(a, b)[i % 2] + own for i, own in enumerate(rest)]

  def run():
    said = set()

    def reply(i, ids):
      first = i not in said
      said.add(i)
      return (prompts[i] + rest[i][::-1], i) if first else None

    return generate(
      weights,
      shape,
      prompts,
      range(12),
      sampling=GREEDY,
      max_new_tokens=6,
      eos_ids=(),
      pad_id=0,
      dtype=jnp.bfloat16,
      logprobs=True,
      reply=reply,
    )

  ids, scores = run()
  assert set(texts) == {2}
  monkeypatch.setattr(beginnings, "MIN_TOKENS", 10_000)
  plain_ids, plain_scores = run()
  assert 0 in texts
  for i in range(12):
    same = np.equal(ids[i], plain_ids[i])
    count = 6 if same.all() else int(same.argmin())  # then a rounding has decided
    np.testing.assert_allclose(scores[i][:count], plain_scores[i][:count], atol=0.1)
  assert np.equal([each[0] for each in ids], [each[0] for each in plain_ids]).sum() >= 8
