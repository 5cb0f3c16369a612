"""fused.py against the dense losses and NumPy in float64. Trap numbers are those of the loss section of traps.md."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.consolidation import fused, losses
from oel_jax.policy.sampling import top_k

PAIRS = [(kind, support) for kind in losses.KINDS for support in losses.SUPPORTS]


def random_case(seed=0, tokens=(37,), student=8, teacher=12, vocabulary=50, dtype=np.float32):
  """(student_hidden, student_head, teacher_hidden, teacher_head, mask); widths differ."""
  rng = np.random.default_rng(seed)
  shapes = (*tokens, student), (vocabulary, student), (*tokens, teacher), (vocabulary, teacher)
  arrays = [jnp.asarray(rng.normal(size=shape) / shape[-1]**0.25, dtype) for shape in shapes]
  return *arrays, jnp.asarray(rng.random(tokens) < 0.7)


def dense_imitation(student_hidden, student_head, tokens, _, mask):
  return losses.imitation(student_hidden @ student_head.T, tokens, mask)


def fused_imitation(student_hidden, student_head, tokens, _, mask, chunk):
  return fused.linear_imitation(student_hidden, student_head, tokens, mask, chunk=chunk)


def dense(student_hidden, student_head, teacher_hidden, teacher_head, mask, **options):
  return losses.divergence(student_hidden @ student_head.T, teacher_hidden @ teacher_head.T, mask, **options)


def mean(loss, *args, **options):
  """The mean over tokens, as training uses it: the cotangent that reaches the sum is not 1."""
  total, count = loss(*args, **options)
  return total / jnp.maximum(count, 1)


@functools.partial(jax.jit, static_argnames=('loss', 'kind', 'support', 'k', 'temperature', 'chunk'))
def value_and_gradients(loss, case, **options):
  """(mean, gradients in the student's hidden states and head); one shape and one set of options compile once."""
  return jax.value_and_grad(lambda h, w: mean(loss, h, w, *case[2:], **options), (0, 1))(*case[:2])


def assert_same(case, chunk, pair=(fused.linear_divergence, dense), **options):
  found, expected = value_and_gradients(pair[0], case, chunk=chunk, **options), value_and_gradients(pair[1], case, **options)
  np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
  for a, b in zip(found[1], expected[1]):
    np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize('kind, support', PAIRS)
def test_trap_5_fused_is_dense_in_value_and_gradients(kind, support):
  case = random_case()
  assert_same(case, 10, kind=kind, support=support, k=7)  # 37 tokens: no multiple of 10, nor of the 4 steps taken


@pytest.mark.parametrize('support', losses.SUPPORTS)
def test_trap_5_value_without_differentiation(support):
  case = random_case()
  total, count = jax.jit(lambda *a: fused.linear_divergence(*a, support=support, k=7, chunk=10))(*case)
  expected, _ = value_and_gradients(dense, case, kind='reverse_kl', support=support, k=7)
  np.testing.assert_allclose(total / count, expected, rtol=2e-6)
  assert count == case[-1].sum() and total.dtype == count.dtype == jnp.float32


INDEX = np.arange(37)  # in 4 chunks of at most 10
SPANS = {
    'whole': INDEX >= 0, 'empty': INDEX < 0,
    'a run that crosses the borders of chunks': (INDEX > 6) & (INDEX < 23),
    'runs as long as a chunk': INDEX // 10 % 2 == 1,
    'two chunks masked, two whole': INDEX % 4 < 2,
    'first and last token only': np.isin(INDEX, [0, 36]),
}


@pytest.mark.parametrize('span', SPANS)
def test_trap_5_masks(span):
  assert_same((*random_case(1)[:4], jnp.asarray(SPANS[span])), 10, kind='reverse_kl', support='full', k=7)


@pytest.mark.parametrize('span', SPANS)
def test_imitation_is_dense_in_value_and_gradients(span):
  case = random_case(1)
  ids = jnp.where(SPANS[span], INDEX % 50, -100)  # as padding often is
  assert_same((*case[:2], ids, None, jnp.asarray(SPANS[span])), 10, (fused_imitation, dense_imitation))


@pytest.mark.parametrize('counted', [0, 1, 8, 9, 32, 33, 57, 88, 96])
def test_masked_tokens_cost_nothing(counted, monkeypatch):
  """So many chunks of 8 are compared as the tokens that count need, wherever in the 96 they stand."""
  mask, seen, compare = np.random.default_rng(counted).permutation(96) < counted, [], fused._compare

  def count(*args):
    jax.debug.callback(lambda mask: seen.append(int(mask.sum())), args[3])
    return compare(*args)

  monkeypatch.setattr(fused, '_compare', count)
  case = (*random_case(13, (96,))[:4], jnp.asarray(mask))
  loss = lambda h, w: mean(fused.linear_divergence, h, w, *case[2:], chunk=8)
  for function in (loss, jax.value_and_grad(loss, (0, 1))):
    seen.clear()
    jax.block_until_ready(jax.jit(function)(*case[:2]))
    jax.effects_barrier()
    assert len(seen) == -(-counted // 8) and sum(seen) == counted
  monkeypatch.undo()
  assert_same(case, 8)


@pytest.mark.parametrize('tokens, chunk', [((1,), 16), ((5, 7), 1), ((2, 16), 1000)])
def test_trap_5_shapes_and_chunks(tokens, chunk):
  assert_same(random_case(2, tokens), chunk, temperature=1.3)


@pytest.mark.parametrize('kind, support', [(kind, 'full') for kind in losses.KINDS] + [('reverse_kl', 'topk_tail')])
def test_trap_1_no_gradient_where_student_is_teacher(kind, support):
  hidden, head, _, _, mask = random_case(3)
  value, slopes = value_and_gradients(fused.linear_divergence, (hidden, head, hidden, head, mask), kind=kind,
                                      support=support, k=7, chunk=10)
  assert value == 0
  for slope in slopes:
    np.testing.assert_array_equal(slope, 0)  # exact: the descent stops where it should


@pytest.mark.parametrize('kind', losses.KINDS)
def test_trap_2_tail_at_full_mass(kind):
  teacher = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
  for outside in (1e-9, 1e-60):  # mass in the top k: 1 − 1e-9, and exactly 1 in float32
    student = jnp.asarray(np.log([[1 - outside, outside / 2, outside / 2]]), jnp.float32)
    case = student, jnp.eye(3), teacher, jnp.eye(3), jnp.ones(1)
    options = {'kind': kind, 'support': 'topk_tail', 'k': 1, 'temperature': 1.0}
    for number in jax.tree.leaves(value_and_gradients(fused.linear_divergence, case, chunk=1, **options)):
      assert np.isfinite(number).all()
    assert_same(case, 1, **options)


def test_teacher_cotangents_are_zero():
  case = random_case(4)
  slopes = jax.jit(jax.grad(lambda h, w: mean(fused.linear_divergence, *case[:2], h, w, case[4]), (0, 1)))(*case[2:4])
  for slope in slopes:
    np.testing.assert_array_equal(slope, 0)


def reverse_kl_float64(student_hidden, student_head, teacher_hidden, teacher_head, mask, temperature):
  """Value and both gradients of the mean, in float64 NumPy."""
  hs, ws, ht, wt = (np.asarray(x.astype(jnp.float32), np.float64)
                    for x in (student_hidden, student_head, teacher_hidden, teacher_head))
  log_p, log_q = hs @ ws.T / temperature, ht @ wt.T / temperature
  log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
  p, weight = np.exp(log_p), np.asarray(mask, np.float64) / np.asarray(mask).sum()
  kl = (p * (log_p - log_q)).sum(-1)
  d_logits = p * (log_p - log_q - kl[:, None]) / temperature * weight[:, None]
  return kl @ weight, (d_logits @ ws, d_logits.T @ hs)


@pytest.mark.parametrize('head_dtype', [jnp.bfloat16, jnp.float32])
def test_trap_7_bfloat16_against_float64(head_dtype):
  case = list(random_case(5, (200,), 32, 48, 300, jnp.bfloat16))
  case[1], case[3] = case[1].astype(head_dtype), case[3].astype(head_dtype)
  value, slopes = value_and_gradients(fused.linear_divergence, case, chunk=64)
  expected, wanted = reverse_kl_float64(*case, 0.7)
  np.testing.assert_allclose(value, expected, rtol=1e-5)  # the logits are never rounded to bfloat16
  assert [slope.dtype for slope in slopes] == [jnp.bfloat16, head_dtype]
  for slope, right in zip(slopes, wanted):  # one bfloat16 rounding of each term: 2^-9, less in the sum
    error = np.linalg.norm(np.asarray(slope, np.float64) - right) / np.linalg.norm(right)
    assert error < (2e-3 if slope.dtype == jnp.float32 else 4e-3)


def test_trap_8_poisoned_padding_changes_nothing():
  case = random_case(6)
  graded = functools.partial(value_and_gradients, fused.linear_divergence, kind='reverse_kl', support='full', k=7,
                             chunk=10)
  statistics = jax.jit(functools.partial(fused.linear_statistics, k=7, chunk=10))
  keep = case[4][:, None]
  for poison in (np.nan, np.inf, -1e10):
    dirty = jnp.where(keep, case[0], poison), case[1], jnp.where(keep, case[2], poison), *case[3:]
    jax.tree.map(np.testing.assert_array_equal, graded(dirty), graded(case))
    jax.tree.map(np.testing.assert_array_equal, statistics(*dirty), statistics(*case))
    ids = jnp.where(case[4], 3, 10**6)
    learnt = [value_and_gradients(fused_imitation, (*some[:2], ids, None, case[4]), chunk=10) for some in (dirty, case)]
    jax.tree.map(np.testing.assert_array_equal, *learnt)


def test_trap_18_no_temporary_of_tokens_by_vocabulary():
  tokens, vocabulary, shape = 2048, 4096, jax.ShapeDtypeStruct
  args = (shape((tokens, 16), jnp.float32), shape((vocabulary, 16), jnp.float32), shape((tokens, 24), jnp.float32),
          shape((vocabulary, 24), jnp.float32), shape((tokens,), bool))

  def temporaries(loss, **options):
    step = jax.value_and_grad(lambda *a: mean(loss, *a, **options), (0, 1))
    return jax.jit(step).lower(*args).compile().memory_analysis().temp_size_in_bytes

  assert temporaries(fused.linear_divergence, chunk=32) < tokens * vocabulary * 4 / 2  # 4 chunks are 128 tokens
  assert temporaries(dense) > tokens * vocabulary * 4  # so the shape can tell


def matrix_products(function, *args):
  return str(jax.make_jaxpr(function)(*args)).count('dot_general[')


def test_gradients_are_formed_only_when_asked_and_once():
  case = random_case(7)
  loss = lambda h, w: fused.linear_divergence(h, w, *case[2:])[0]
  assert matrix_products(loss, *case[:2]) == 2
  assert matrix_products(jax.value_and_grad(loss, (0, 1)), *case[:2]) == 4
  learn = lambda h, w: fused.linear_imitation(h, w, jnp.zeros(37, int), case[4])[0]
  assert matrix_products(jax.value_and_grad(learn, (0, 1)), *case[:2]) == 3


@pytest.mark.parametrize('function', [fused._one_pass, fused._two_passes])
def test_row_statistics_match_float64(function):
  """Whichever this machine's platform would not take, too; logits that rise, fall, and are huge on one side alone."""
  rng = np.random.default_rng(11)
  s, t = (np.float32(rng.normal(size=(6, 40)) * scale) for scale in (1, 30))
  s[1], s[2], t[3], s[4, 3], t[5, 7] = np.sort(s[1]), np.sort(s[2])[::-1], np.sort(t[3]), 300, losses.FLOOR
  log_p, log_q = (np.float64(x) / 0.7 for x in (s, t))
  totals = [x.max(-1) + np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) for x in (log_p, log_q)]
  log_p, log_q = log_p - totals[0][:, None], log_q - totals[1][:, None]
  found = jax.jit(functools.partial(function, temperature=0.7))(s, t)
  for a, b in zip(found, (*totals, (np.exp(log_p) * (log_p - log_q)).sum(-1))):
    np.testing.assert_allclose(a, b, rtol=2e-6)
  for a in jax.jit(functools.partial(function, temperature=0.7))(s, s)[2]:
    assert a == 0


@pytest.mark.parametrize('levels', [1, 50])  # few different numbers: nearly everything is tied
def test_largest_numbers_of_a_long_row(levels):
  x = np.float32(np.random.default_rng(12).integers(0, levels, (5, 3001)))
  x[1], x[2] = np.sort(x[1]), np.sort(x[2])[::-1]
  found = jax.jit(functools.partial(top_k, k=7))(x)
  ids = np.argsort(-x, axis=-1, kind='stable')[:, :7]
  np.testing.assert_array_equal(found[1], ids)
  np.testing.assert_array_equal(found[0], np.take_along_axis(x, ids, axis=-1))


def test_sharded_tokens_give_the_same_gradients():
  devices = len(jax.devices())
  mesh = jax.make_mesh((devices,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows, whole = jax.sharding.PartitionSpec('data'), jax.sharding.PartitionSpec()

  @jax.shard_map(mesh=mesh, in_specs=(rows, whole, rows, whole, rows), out_specs=whole)
  def sharded(*args):
    return jax.lax.psum(fused.linear_divergence(*args, chunk=4), 'data')

  case = random_case(8, (8 * devices,))
  found, expected = value_and_gradients(sharded, case), value_and_gradients(dense, case)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_statistics_match_float64():
  case = random_case(9, (3, 13))
  found = jax.jit(lambda *a: fused.linear_statistics(*a, k=5, temperature=0.7, chunk=10))(*case)
  hs, ws, ht, wt, mask = (np.asarray(x, np.float64) for x in case)
  softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
  p, q, p1, q1 = softmax(hs @ ws.T / 0.7), softmax(ht @ wt.T / 0.7), softmax(hs @ ws.T), softmax(ht @ wt.T)
  expected = {
      'student_entropy': -(p1 * np.log(p1)).sum(-1), 'teacher_entropy': -(q1 * np.log(q1)).sum(-1),
      'topk_mass': np.sort(p)[..., -5:].sum(-1), 'reverse_kl': (p * np.log(p / q)).sum(-1), 'count': np.ones_like(mask)}
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], (value * mask).sum(), rtol=1e-5, err_msg=name)
    assert found[name].dtype == jnp.float32
  slopes = jax.jit(jax.grad(lambda h: fused.linear_statistics(h, *case[1:])['reverse_kl']))(case[0])
  np.testing.assert_array_equal(slopes, 0)


@pytest.mark.parametrize('change, message', [
    ({'kind': 'kl'}, "kind is 'kl'"), ({'chunk': 0}, 'chunk is 0; it must be at least 1'),
    ({'student_head': np.ones((50, 9))}, r'student_head has shape \(50, 9\); it must be \[V, 8\]'),
    ({'teacher_head': np.ones((49, 12))}, 'teacher_head has 49 rows; it must have 50'),
    ({'teacher_hidden': np.ones((36, 12))}, r'mask has shape \(37,\); it must be \(36,\), teacher_hidden'),
    ({'student_hidden': np.ones(8)}, r'student_hidden has shape \(8,\); it must be \[N, D\] or \[B, T, D\]'),
])
def test_errors_name_the_argument_and_what_is_right(change, message):
  names = 'student_hidden', 'student_head', 'teacher_hidden', 'teacher_head', 'mask'
  with pytest.raises(ValueError, match=message):
    fused.linear_divergence(**dict(zip(names, random_case())) | change)
