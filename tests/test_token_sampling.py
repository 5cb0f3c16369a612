"""How a token is drawn: filters and draws against float64 distributions and `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import FREE, TINY, next_logits, params, random_prompts, sample

from oel_jax.policy.sampling import engine, model, slot_state, token_sampling
from oel_jax.policy.sampling.token_sampling import Sampling, filter_logits, sample_token


def support_by_numpy(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
  """Probabilities of one row in float64, filtered as transformers' warpers in a row: temperature,
  top-k, top-p, min-p.
  """
  z = np.asarray(logits, np.float64) / sampling.temperature
  if 0 < sampling.top_k < len(z):
    z[z < np.sort(z)[-sampling.top_k]] = -np.inf
  if sampling.top_p < 1:
    p = np.exp(z - z.max())
    p /= p.sum()
    total, order = 0.0, np.argsort(z, kind="stable")
    for i in order[:-1]:  # the likeliest always stays
      total += p[i]
      if total > 1 - sampling.top_p:
        break
      z[i] = -np.inf
  p = np.exp(z - z.max())
  p[p < sampling.min_p] = 0
  return p / p.sum()


SAMPLINGS = [
  Sampling(1.0),
  Sampling(0.7),
  Sampling(0.7, 0.8, 20),
  Sampling(1.3, 0.95),
  Sampling(1.0, 1.0, 5),
  Sampling(0.2, 0.5),
  Sampling(1.0, 0.01),
  Sampling(1.0, 1.0, 1),
  Sampling(2.0, 0.9, 40),
  Sampling(1.0, 0.8, 1000),
  Sampling(1.0, min_p=0.05),
  Sampling(0.7, 0.9, 20, 0.1),
  Sampling(1.5, min_p=1.0),
]


def rows_of_logits(seed, vocabulary):
  """Peaked rows, where a few ids hold most of the mass, and flat ones, where many are needed."""
  rng = np.random.default_rng(seed)
  return (rng.standard_normal((20, vocabulary)) * rng.choice([0.3, 2.5, 6.0], (20, 1))).astype(
    np.float32
  )


@pytest.mark.parametrize("vocabulary", [50, 3000])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_filtered_distribution_is_that_of_float64(sampling, vocabulary):
  logits = rows_of_logits(1, vocabulary)
  filtered = np.asarray(filter_logits(jnp.asarray(logits), sampling), np.float64)
  for row, ours in zip(logits, filtered, strict=True):
    expected = support_by_numpy(row, sampling)
    np.testing.assert_array_equal(np.isfinite(ours), expected > 0)
    got = np.exp(ours - ours.max())
    np.testing.assert_allclose(got / got.sum(), expected, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [50, 3000])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_filtered_distribution_is_that_of_transformers(sampling, vocabulary):
  transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
  logits = rows_of_logits(2, vocabulary)
  scores = torch.tensor(logits)
  warpers = (
    [transformers.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.temperature != 1
    else []
  )
  warpers += [transformers.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
  warpers += [transformers.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
  warpers += [transformers.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
  for warper in warpers:
    scores = warper(None, scores)
  np.testing.assert_allclose(
    filter_logits(jnp.asarray(logits), sampling), scores.numpy(), rtol=1e-6
  )


def test_each_filter_sees_what_the_one_before_has_left():
  """Transformers' order is top-k, top-p, min-p: each other order would keep another number."""
  kept = lambda p, *filters: int(
    np.isfinite(filter_logits(jnp.log(jnp.asarray([p])), Sampling(1.0, *filters))).sum()
  )
  p = [0.5, 0.3, 0.1, 0.06, 0.04]
  # min-p first would leave 0.56, 0.33 and 0.11, of which two are enough for top-p.
  assert kept(p, 0.85, 0, 0.15) == 3
  assert kept(p, 0.85, 3) == 2  # top-p first would keep three
  assert kept(p, 0.85, 4, 0.1) == 3 and kept(p, 0.85, 4, 0.25) == 2 and kept(p, 0.95, 3, 0.19) == 3
  transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
  for filters in (
    (0.85, 0, 0.15),
    (0.85, 3, 0.0),
    (0.85, 4, 0.1),
    (0.85, 4, 0.25),
    (0.95, 3, 0.19),
    (0.95, 3, 0.25),
  ):
    top_p, top_k, min_p = filters
    config = transformers.GenerationConfig(
      do_sample=True, top_p=top_p, top_k=top_k, min_p=min_p or None
    )
    # In the order of its own generate.
    theirs = transformers.GenerationMixin()._get_logits_processor(config)
    assert kept(p, *filters) == int(torch.isfinite(theirs(None, torch.tensor([p]).log())).sum()), (
      filters
    )


def test_ties():
  kept = lambda row, sampling: np.isfinite(
    np.asarray(filter_logits(jnp.asarray([row], jnp.float32), sampling))
  )[0].tolist()
  # top-k keeps all that tie with the k-th.
  assert kept([1, 3, 2, 2, 0], Sampling(1.0, 1.0, 2)) == [
    False,
    True,
    True,
    True,
    False,
  ]
  assert sum(kept([2, 2, 2, 2], Sampling(1.0, 0.75))) == 3  # one holds exactly 1 - top_p: it goes
  assert sum(kept([2, 2, 2, 2], Sampling(1.0, 0.7))) == 3
  assert sum(kept([2, 2, 2, 2], Sampling(1.0, 0.1))) == 1
  # float32 has no 1 - top_p below 1, which a whole row's mass would not be more than.
  assert sum(kept([2, 2, 2, 2], Sampling(1.0, 1e-9))) == 1
  assert kept([5, 5, -9, -9], Sampling(1.0, 0.9)) == [True, True, False, False]
  assert kept([-np.inf, 0, -np.inf, 0], Sampling(1.0, 0.9)) == [False, True, False, True]


def test_the_lower_id_is_in_the_top_k_though_its_group_has_the_smaller_maximum():
  x = np.zeros((1, 64), np.float32)
  x[0, [0, 20, 21]] = 3, 10, 3
  assert token_sampling.group_width(64, 2) == 4
  top, ids = token_sampling.top_k(x, 2)
  assert (top.tolist(), ids.tolist()) == ([[10, 3]], [[20, 0]])


@pytest.fixture(name="sorts")
def fixture_sorts(monkeypatch):
  """One entry for each time that whole rows were sorted, also within a program."""
  counted, sort = [], token_sampling._sort_and_filter

  def spy(*args):
    jax.debug.callback(lambda: counted.append(1))
    return sort(*args)

  monkeypatch.setattr(token_sampling, "_sort_and_filter", spy)
  return counted


@pytest.mark.parametrize("sampling", [Sampling(1.0, 0.8), Sampling(0.7, 0.8, 20)], ids=str)
def test_a_row_that_has_ended_makes_no_other_be_sorted(sorts, sampling):
  peaked = np.concatenate([3 * np.arange(10.0), np.linspace(-2, -1, 90)])
  # The middle one's ids tie.
  logits = jnp.asarray(np.stack([peaked, np.ones(100), peaked[::-1]]), jnp.float32)
  right = filter_logits(logits, sampling)
  jax.effects_barrier()
  assert sorts == [1]
  found = filter_logits(logits, sampling, jnp.array([True, False, True]))
  jax.effects_barrier()
  assert sorts == [1]
  np.testing.assert_array_equal(found[::2], right[::2])
  np.testing.assert_array_equal(
    filter_logits(logits, sampling, jnp.array([True, True, False]))[:2], right[:2]
  )
  jax.effects_barrier()
  assert sorts == [1, 1]


def test_ended_rows_and_what_fills_a_batch_sort_nothing(sorts):
  """Where all layers are 0, an id whose embedding is 0 has logits that tie. It stands in the slots
  without a prompt, and in the filling.
  """
  weights = jax.tree.map(np.zeros_like, params()) | {
    "norm": params()["norm"],
    "embed": jax.tree.map(np.copy, params()["embed"]),
  }
  weights["embed"]["embedding"][0] = 0
  weights = model.prepare(weights, architecture=TINY, dtype=jnp.float32)
  slots = slot_state.empty(
    architecture=TINY, rows=4, columns=64, eos_ids=1, dtype=jnp.float32, attn_impl="xla"
  )
  how = dict(architecture=TINY, sampling=Sampling(0.2, 0.9), logprobs=False, attn_impl="xla")
  requests = (
    np.arange(2, dtype=np.uint32),
    np.full((2,), 9, np.int32),
    np.full((2, 1), -1, np.int32),
  )
  for rows in ([1, 4], [1, 2]):  # what fills the batch; then the same as a prompt
    slots, first = engine.prefill_insert(
      weights,
      slots,
      np.int32([[7, 8, 9], [0, 0, 0]]),
      np.int32([3, 3]),
      np.int32(rows),
      requests,
      None,
      **how,
    )
    if rows == [1, 4]:
      slots, _ = engine.decode(weights, slots, 1, 1, chunk=8, **how)
    jax.block_until_ready(first)
    jax.effects_barrier()
    assert sorts == [1] * (rows == [1, 2])


@pytest.mark.parametrize(
  "sampling",
  [
    FREE,
    Sampling(0.7, 0.8, 20),
    Sampling(1.3, 0.95),
    Sampling(1.0, 1.0, 5),
    Sampling(1.0, min_p=0.1),
  ],
  ids=str,
)
def test_a_row_that_is_not_finite_is_marked_in_every_mode(sampling):
  """NaN or +inf anywhere, or nothing but -inf; some -inf is a mask, and never drawn."""
  vocabulary = 3000
  logits = rows_of_logits(4, vocabulary)[:8]
  logits[1, 17] = np.nan
  logits[2, vocabulary - 1] = np.inf
  logits[3, [0, 5]] = np.nan, np.inf
  logits[4] = -np.inf
  logits[5, ::2] = -np.inf
  logits[6] = np.nan
  logits[7, [3, 30]] = np.nan, -np.inf
  draw = jax.jit(lambda x, keys, active: sample_token(x, keys, sampling, active))
  keys = jax.random.split(jax.random.key(0), 8)
  unfit = np.array([0, 1, 1, 1, 1, 0, 1, 1], bool)
  for active in (np.ones(8, bool), np.arange(8) % 2 == 0):
    found = np.asarray(draw(logits, keys, active))
    np.testing.assert_array_equal((found == token_sampling.NOT_FINITE)[active], unfit[active])
    drawn = found[active & ~unfit]
    assert (drawn >= 0).all() and (drawn < vocabulary).all()
  assert draw(logits, keys, np.ones(8, bool))[5] % 2 == 1


def test_the_filter_is_the_same_for_bfloat16_logits_of_the_same_value():
  logits = jnp.asarray(np.random.default_rng(3).normal(0, 2, (4, 64)), jnp.bfloat16)
  filtered = filter_logits(logits, Sampling(0.7, 0.8, 20))
  assert filtered.dtype == jnp.float32
  np.testing.assert_array_equal(
    filtered, filter_logits(logits.astype(jnp.float32), Sampling(0.7, 0.8, 20))
  )


@pytest.mark.parametrize(
  "sampling,support",
  [(FREE, 8), (Sampling(0.7, 0.9, 6), 4), (Sampling(1.0, min_p=0.15), 5)],
  ids=str,
)
def test_draws_follow_the_distribution(sampling, support):
  """Chi-square of 20,000 draws over eight ids; the bound is the 99.99th percentile at most 7
  degrees of freedom has.
  """
  row = np.array([0.3, -1.0, 2.0, 1.4, 0.0, -3.0, 1.0, 0.9], np.float32)
  n = 20_000
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(n))
  drawn = np.asarray(sample_token(jnp.broadcast_to(row, (n, 8)), keys, sampling))
  assert drawn.dtype == np.int32
  counts, expected = np.bincount(drawn, minlength=8), n * support_by_numpy(row, sampling)
  assert counts[expected == 0].sum() == 0
  inside = expected > 0
  assert inside.sum() == support
  assert np.sum((counts - expected)[inside] ** 2 / expected[inside]) < 29.9


def test_draws_from_many_ids_follow_the_distribution():
  """The same in 24 classes of 125 neighbours and, apart, of every 24th id; a third of the ids have
  no mass and are never drawn.
  """
  rng = np.random.default_rng(0)
  row = np.where(rng.random(3000) < 0.33, -np.inf, rng.normal(0, 2, 3000)).astype(np.float32)
  n, expected = 20_000, support_by_numpy(row, FREE)
  draw = jax.jit(jax.vmap(lambda key: sample_token(row[None], key[None], FREE)[0]))
  drawn = np.asarray(
    draw(jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(6), jnp.arange(n)))
  )
  counts = np.bincount(drawn, minlength=3000)
  assert len(counts) == 3000 and counts[expected == 0].sum() == 0
  for classes in (np.arange(3000) // 125, np.arange(3000) % 24):
    wanted = n * np.bincount(classes, expected)
    # The 99.99th percentile at 23 degrees of freedom.
    assert np.sum((np.bincount(classes, counts) - wanted) ** 2 / wanted) < 57.1


def test_the_numbers_at_the_ends_draw_ids_that_have_mass():
  mass = jnp.asarray([[0.0, 0.25, 0.0, 0.75, 0.0]])
  at = lambda share: int(token_sampling._first_above(mass, jnp.asarray([[share]], jnp.float32))[0])
  assert [at(share) for share in (0, 0.2499, 0.25, 1 - 2**-23)] == [1, 1, 3, 3]
  mass = jnp.asarray([[1e-45, 1.0, 1e-45]])
  assert at(0) == at(1 - 2**-23) == 1


def test_first_tokens_of_whole_responses_follow_the_distribution_too():
  """The streams of different seeds are independent: 1,024 seeds on one prompt, ids counted in eight
  classes.
  """
  prompt = random_prompts(12)[0]
  row = np.zeros(96, np.int32)
  row[:12] = prompt
  expected = 1024 * support_by_numpy(np.asarray(next_logits(row, 12)), FREE).reshape(-1, 8).sum(0)
  firsts = [ids[0] for ids in sample([prompt] * 1024, range(1024), limit=2)]
  assert np.sum((np.bincount(np.array(firsts) % 8, minlength=8) - expected) ** 2 / expected) < 29.9
  assert len(set(firsts)) > 50
