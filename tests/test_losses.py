"""losses.py against NumPy in float64 and hand computations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.consolidation import losses

PAIRS = [(kind, support) for kind in losses.KINDS for support in losses.SUPPORTS]
DIVERGENCES = [(kind, support) for kind, support in PAIRS if support != "topk"]
SOME = [(kind, "full") for kind in losses.KINDS] + [("reverse_kl", "topk"), ("jsd", "topk_tail")]


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def compiled(student, teacher, mask, kind, support, k, temperature):
  options = {"kind": kind, "support": support, "k": k, "temperature": temperature}
  return jax.value_and_grad(lambda s: losses.divergence(s, teacher, mask, **options), has_aux=True)(
    student
  )


def both(student, teacher, mask, kind="reverse_kl", support="full", k=4, temperature=0.7):
  """((sum, count), gradient in the student's logits); one shape and one set of options compile
  once.
  """
  return compiled(student, teacher, mask, kind, support, k, temperature)


@functools.partial(jax.jit, static_argnames="estimator")
def sampled(student, teacher, tokens, mask, estimator):
  loss = lambda s: losses.sampled_reverse_kl(s, teacher, tokens, mask, estimator=estimator)[0]
  return jax.value_and_grad(loss)(student)


def reference(student, teacher, mask, kind, support, k, temperature):
  """The definition in float64, one token at a time, from probabilities."""
  total = 0.0
  for s, t in zip(student[mask].astype(np.float64), teacher[mask].astype(np.float64)):
    p, q = (np.exp(x / temperature - np.max(x / temperature)) for x in (s, t))
    p, q = p / p.sum(), q / q.sum()
    kept = np.argsort(-s, kind="stable")[: len(s) if support == "full" else k]
    outside = np.setdiff1d(np.arange(len(s)), kept)
    if support == "topk_tail" and len(outside):
      p, q = (np.append(x[kept], x[outside].sum()) for x in (p, q))
    else:
      p, q = p[kept], q[kept]
    m = (p + q) / 2
    total += {
      "reverse_kl": (p * np.log(p / q)).sum(),
      "forward_kl": (q * np.log(q / p)).sum(),
      "jsd": (p * np.log(p / m)).sum() / 2 + (q * np.log(q / m)).sum() / 2,
    }[kind]
  return total


def random_case(seed=0, shape=(2, 5, 11), scale=2.0):
  rng = np.random.default_rng(seed)
  student, teacher = (scale * rng.normal(size=shape).astype(np.float32) for _ in range(2))
  return student, teacher, rng.random(shape[:-1]) < 0.7


@pytest.mark.parametrize("kind, support", PAIRS)
def test_value_and_gradient_match_float64(kind, support):
  student, teacher, mask = random_case()
  options = {"kind": kind, "support": support, "k": 4, "temperature": 0.7}
  (total, count), found = both(student, teacher, mask, **options)
  assert total.dtype == count.dtype == jnp.float32 and total.shape == count.shape == ()
  assert count == mask.sum()
  np.testing.assert_allclose(total, reference(student, teacher, mask, **options), rtol=2e-6)

  found, wide, step = np.asarray(found), student.astype(np.float64), 1e-5
  for index in np.ndindex(*student.shape):  # central differences
    nudge = np.zeros_like(wide)
    nudge[index] = step
    expected = (
      reference(wide + nudge, teacher, mask, **options)
      - reference(wide - nudge, teacher, mask, **options)
    ) / (2 * step)
    assert abs(found[index] - expected) < 1e-5


@pytest.mark.parametrize("kind, support", PAIRS)
def test_tokens_that_are_one_outcome_have_their_mass_together(kind, support):
  """NumPy: their probabilities are added up, and all but the first leave the vocabulary."""
  student, teacher, mask = random_case(3)
  options = {"kind": kind, "support": support, "k": 4, "temperature": 0.7}

  def together(logits):
    p = np.exp(logits.astype(np.float64) / 0.7)
    p[..., 2] += p[..., 5] + p[..., 10]
    return 0.7 * np.log(np.delete(p, [5, 10], axis=-1))

  value = lambda one: losses.divergence(student, teacher, mask, one=one, **options)[0]
  expected = reference(together(student), together(teacher), mask, **options)
  np.testing.assert_allclose(value((2, 5, 10)), expected, rtol=2e-6)
  assert value((2,)) == value(()) != value((2, 5, 10))


@pytest.mark.parametrize("kind, support", DIVERGENCES)
def test_a_divergence_is_zero_only_at_equality(kind, support):
  student, teacher, mask = random_case(1)
  (value, _), slope = both(student, student, mask, kind, support)
  assert abs(value) < 1e-6
  np.testing.assert_allclose(slope, 0, atol=1e-6)
  for seed in range(20):
    student, teacher, mask = random_case(seed, scale=1.0)
    # The teacher above the student on the student's whole top k: where the truncated sum is most
    # negative.
    if seed % 2:
      teacher = np.where(
        student >= np.sort(student)[..., -4:-3], student + 0.5, student - 1
      ).astype(np.float32)
    (value, _), slope = both(student, teacher, mask, kind, support)
    assert value > 0.01
    assert np.abs(slope).max() > 0.01


@pytest.mark.parametrize("estimator", losses.ESTIMATORS)
def test_sampled_estimators_have_no_gradient_at_equality(estimator):
  student, _, mask = random_case(2)
  tokens = np.random.default_rng(2).integers(0, 11, mask.shape)
  value, slope = sampled(student, student, tokens, mask, estimator)
  assert abs(value) < 1e-6
  np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_topk_without_tail_fails_as_documented():
  student = np.log([[0.3, 0.2, 0.25, 0.25]]).astype(np.float32)
  teacher = np.log([[0.4, 0.1, 0.35, 0.15]]).astype(np.float32)
  options = {"support": "topk", "k": 1, "temperature": 1.0}
  (value, _), _ = both(student, teacher, np.ones(1), **options)
  np.testing.assert_allclose(value, 0.3 * np.log(0.3 / 0.4), rtol=1e-5)  # negative
  # At equality it still pulls mass out of the top k: slope p (1 − mass) inside, −p · mass outside.
  _, slope = both(student, student, np.ones(1), **options)
  np.testing.assert_allclose(slope, [[0.3 * 0.7, -0.2 * 0.3, -0.25 * 0.3, -0.25 * 0.3]], rtol=1e-5)


@pytest.mark.parametrize("kind", losses.KINDS)
@pytest.mark.parametrize(
  "outside", [1e-9, 1e-60, 0.0]
)  # mass inside: 1 − 1e-9, exactly 1 in float32, exactly 1
def test_tail_at_full_mass(kind, outside):
  with np.errstate(divide="ignore"):
    student = np.log([[1 - outside, outside / 2, outside / 2]]).astype(np.float32)
  teacher = np.log([[0.6, 0.3, 0.1]]).astype(np.float32)
  (value, _), slope = both(student, teacher, np.ones(1), kind, "topk_tail", k=1, temperature=1.0)
  assert np.isfinite(value) and np.isfinite(slope).all()
  if outside or kind != "forward_kl":  # KL(teacher ‖ student) is infinite where the student has 0
    p, q = np.array([1 - outside, outside]), np.array([0.6, 0.4])
    m = (p + q) / 2
    kl = lambda a, b: sum(x * np.log(x / y) for x, y in zip(a, b) if x > 0)
    expected = {
      "reverse_kl": lambda: kl(p, q),
      "forward_kl": lambda: kl(q, p),
      "jsd": lambda: (kl(p, m) + kl(q, m)) / 2,
    }[kind]()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def rounding(student, teacher, temperature=0.7):
  """How far apart two float32 programs may put one entry of the same gradient.

  The entry is p (log p − log q − KL) / temperature. Each program rounds log p and log q, each by at
  most 2^-24 of its size, which is 22 here; XLA fuses the two programs alike or not, as it likes
  (jax 0.10 did, 0.11 does not).
  """
  log_p, log_q = (
    np.asarray(jax.nn.log_softmax(logits / temperature)) for logits in (student, teacher)
  )
  return 2 * 2**-24 * (np.abs(log_p) + np.abs(log_q)).max() / temperature


@pytest.mark.parametrize("kind", losses.KINDS)
def test_tail_is_a_bound_and_whole_vocabulary_is_exact(kind):
  for seed in range(10):
    student, teacher, mask = random_case(seed)
    (full, _), slope = both(student, teacher, mask, kind)
    (bound, _), _ = both(student, teacher, mask, kind, "topk_tail")
    assert 0 <= bound <= full * (1 + 1e-6)
    (exact, _), exact_slope = both(student, teacher, mask, kind, "topk_tail", k=11)
    np.testing.assert_allclose(exact, full, rtol=1e-6)
    np.testing.assert_allclose(exact_slope, slope, rtol=0, atol=rounding(student, teacher))
  (exact, _), exact_slope = both(student, teacher, mask, kind, "topk", k=256)  # more than there is
  np.testing.assert_allclose(exact, full, rtol=1e-6)
  np.testing.assert_allclose(exact_slope, slope, rtol=0, atol=rounding(student, teacher))


def test_direction_by_hand():
  student, teacher = np.log([[1 / 2, 1 / 4, 1 / 4]]), np.log([[1 / 8, 1 / 8, 3 / 4]])
  value = lambda kind: losses.divergence(student, teacher, np.ones(1), kind=kind, temperature=1.0)[
    0
  ]
  # ½ ln 4 + ¼ ln 2 + ¼ ln ⅓, and ⅛ ln ¼ + ⅛ ln ½ + ¾ ln 3
  np.testing.assert_allclose(value("reverse_kl"), 1.25 * np.log(2) - 0.25 * np.log(3), rtol=1e-6)
  np.testing.assert_allclose(value("forward_kl"), 0.75 * np.log(3) - 0.375 * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("kind, support", SOME)
def test_temperature_divides_both_sides(kind, support):
  student, teacher, mask = random_case(3)
  for temperature in (0.7, 2.0):
    (value, _), slope = both(student, teacher, mask, kind, support, temperature=temperature)
    divided = np.float32(student / temperature), np.float32(teacher / temperature), mask
    (expected, _), divided_slope = both(*divided, kind, support, temperature=1.0)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    # No T² factor: the chain rule's 1 / T and nothing else.
    np.testing.assert_allclose(slope, divided_slope / temperature, atol=2e-6)


def test_default_temperature_is_the_paper_s():
  case = random_case(3)
  np.testing.assert_allclose(
    losses.divergence(*case)[0], reference(*case, "reverse_kl", "full", 11, 0.7), rtol=2e-6
  )


def test_sums_and_counts_add_over_micro_batches():
  student, teacher, mask = random_case(4)
  whole, _ = both(student, teacher, mask)
  parts = [both(student, teacher, mask & (np.arange(2) == row)[:, None])[0] for row in range(2)]
  np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-6)
  assert both(student, teacher, np.zeros_like(mask))[0] == (0, 0)


@pytest.mark.parametrize("kind, support", SOME)
def test_bfloat16_inputs_are_cast_before_any_statistic(kind, support):
  student, teacher, mask = random_case(5, (2, 8, 300), scale=4.0)
  student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in (student, teacher))
  (value, _), slope = both(student, teacher, mask, kind, support, k=16)
  student, teacher = (np.asarray(x, np.float32) for x in (student, teacher))
  np.testing.assert_allclose(
    value, reference(student, teacher, mask, kind, support, 16, 0.7), rtol=1e-5
  )
  assert slope.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind, support", PAIRS)
def test_poisoned_padding_changes_nothing(kind, support):
  student, teacher, mask = random_case(6)
  expected = both(student, teacher, mask, kind, support)
  for poison in (np.nan, np.inf, -np.inf, -1e10):
    dirty = [np.where(mask[..., None], x, np.float32(poison)) for x in (student, teacher)]
    jax.tree.map(np.testing.assert_array_equal, both(*dirty, mask, kind, support), expected)


def test_poisoned_padding_in_the_baselines():
  student, teacher, mask = random_case(7)
  tokens = np.where(mask, np.random.default_rng(7).integers(0, 11, mask.shape), -100)
  dirty = [np.where(mask[..., None], x, np.float32(np.nan)) for x in (student, teacher)]
  for estimator in losses.ESTIMATORS:
    jax.tree.map(
      np.testing.assert_array_equal,
      sampled(*dirty, tokens, mask, estimator),
      sampled(student, teacher, tokens, mask, estimator),
    )
  imitation = jax.jit(jax.value_and_grad(lambda s: losses.imitation(s, tokens, mask)[0]))
  jax.tree.map(np.testing.assert_array_equal, imitation(dirty[0]), imitation(student))


@pytest.mark.parametrize("kind, support", PAIRS)
def test_tokens_that_neither_side_can_produce_count_for_nothing(kind, support):
  student, teacher, mask = random_case(8)
  without = reference(student[..., :8], teacher[..., :8], mask, kind, support, 4, 0.7)
  student[..., 8:] = teacher[..., 8:] = -np.inf
  (value, _), slope = both(student, teacher, mask, kind, support)
  np.testing.assert_allclose(value, without, rtol=2e-6)
  assert np.isfinite(slope).all() and np.abs(slope[..., :8]).max() > 0.01
  np.testing.assert_array_equal(slope[..., 8:], 0)


def test_teacher_gets_no_gradient():
  student, teacher, mask = random_case(9)
  tokens = np.zeros(mask.shape, int)
  for loss in (losses.divergence, lambda s, t, m: losses.sampled_reverse_kl(s, t, tokens, m)):
    np.testing.assert_array_equal(
      jax.jit(jax.grad(lambda t: loss(student, t, mask)[0]))(teacher), 0
    )


def test_sampled_estimators_in_expectation():
  """Every token in turn, weighted by the student's probability: the expectation, with no sampling
  noise.
  """
  student, teacher, _ = random_case(10)
  mask = np.arange(10).reshape(2, 5) == 3
  p = np.asarray(jax.nn.softmax(student[0, 3] / 0.7))

  def expected(estimator):
    each = [
      sampled(student, teacher, np.full((2, 5), token), mask, estimator) for token in range(11)
    ]
    return sum(w * value for w, (value, _) in zip(p, each)), sum(
      w * slope for w, (_, slope) in zip(p, each)
    )

  (reverse, _), reverse_slope = both(student, teacher, mask, "reverse_kl", "full")
  (_, _), forward_slope = both(student, teacher, mask, "forward_kl", "full")
  values, slopes = zip(*(expected(estimator) for estimator in losses.ESTIMATORS))
  np.testing.assert_allclose(values[0], reverse, rtol=1e-5)
  assert abs(values[1] - reverse) > 0.1  # k2 is biased in value
  np.testing.assert_allclose(values[2], reverse, rtol=1e-5)
  np.testing.assert_allclose(slopes[0], reverse_slope, atol=1e-5)
  np.testing.assert_allclose(slopes[1], reverse_slope, atol=1e-5)
  np.testing.assert_allclose(slopes[2], forward_slope, atol=1e-5)  # k3 descends the other direction


def test_imitation_by_hand():
  logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
  total, count = losses.imitation(logits, np.array([0, 1, 2]), np.array([1, 1, 0]))
  np.testing.assert_allclose(total, -np.log(0.5) - np.log(0.8), rtol=1e-6)
  assert count == 2 and total.dtype == jnp.float32


def test_toy_descent_lowers_the_exact_kl_only_with_all_of_the_mass():
  """Plain gradient descent on 10 contexts of 11 tokens, top k of 4: what each support does to the
  exact reverse KL.
  """
  rng = np.random.default_rng(0)
  start = 1.5 * rng.normal(size=(2, 5, 11)).astype(np.float32)
  teacher = start + 0.4 * rng.normal(size=start.shape).astype(np.float32)
  mask = np.ones((2, 5), bool)

  def descend(support):
    logits = start
    for _ in range(300):
      (loss, _), slope = both(logits, teacher, mask, "reverse_kl", support)
      logits = logits - 0.3 * slope
    return both(logits, teacher, mask, "reverse_kl", "full")[0][0], loss

  before = both(start, teacher, mask, "reverse_kl", "full")[0][0]
  (full, _), (tail, _), (topk, topk_loss) = map(descend, ("full", "topk_tail", "topk"))
  assert full < 0.02 * before
  assert full < tail < 0.5 * before
  # The loss being descended looks better than perfect while the student is further off than it was
  # at the start.
  assert topk_loss < 0 and topk > 2 * before


@pytest.mark.parametrize(
  "change, message",
  [
    ({"kind": "kl"}, "kind is 'kl'; it must be one of reverse_kl"),
    ({"support": "top_k"}, "support is 'top_k'; it must be one of full"),
    ({"k": 0}, "k is 0; it must be at least 1"),
    ({"temperature": 0.0}, "temperature is 0.0; it must be a finite number above 0"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"mask": np.ones(5)}, r"mask has shape \(5,\); it must be \(2, 5\)"),
    ({"teacher_logits": np.ones((2, 5, 12))}, r"teacher_logits has shape \(2, 5, 12\)"),
  ],
)
def test_errors_name_the_argument_and_what_is_right(change, message):
  student, teacher, mask = random_case()
  with pytest.raises(ValueError, match=message):
    losses.divergence(
      **{"student_logits": student, "teacher_logits": teacher, "mask": mask} | change
    )


def test_errors_of_the_baselines():
  student, teacher, mask = random_case()
  with pytest.raises(ValueError, match="estimator is 'k4'; it must be one of k1, k2, k3"):
    losses.sampled_reverse_kl(student, teacher, mask, mask, estimator="k4")
  with pytest.raises(ValueError, match=r"tokens has shape \(5,\); it must be \(2, 5\)"):
    losses.imitation(student, mask[0], mask)
