"""fused.py against the dense losses and NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.consolidation import chunk_loss, fused, losses, online_softmax
from oel_jax.policy.sampling.token_sampling import top_k

INTERPRET = jax.default_backend() != "gpu"
PAIRS = [(kind, support) for kind in losses.KINDS for support in losses.SUPPORTS]


def random_case(seed=0, tokens=(37,), student=8, teacher=12, vocabulary=50, dtype=np.float32):
  """(student_hidden, student_head, teacher_hidden, teacher_head, mask); widths differ."""
  rng = np.random.default_rng(seed)
  shapes = (*tokens, student), (vocabulary, student), (*tokens, teacher), (vocabulary, teacher)
  arrays = [jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.25, dtype) for shape in shapes]
  return *arrays, jnp.asarray(rng.random(tokens) < 0.7)


def dense_imitation(student_hidden, student_head, tokens, _, mask):
  return losses.imitation(student_hidden @ student_head.T, tokens, mask)


def fused_imitation(student_hidden, student_head, tokens, _, mask, chunk):
  return fused.linear_imitation(student_hidden, student_head, tokens, mask, chunk=chunk)


def dense(student_hidden, student_head, teacher_hidden, teacher_head, mask, **options):
  return losses.divergence(
    student_hidden @ student_head.T, teacher_hidden @ teacher_head.T, mask, **options
  )


def mean(loss, *args, **options):
  """The mean over tokens, as training uses it: the cotangent that reaches the sum is not 1."""
  total, count = loss(*args, **options)
  return total / jnp.maximum(count, 1)


@functools.partial(
  jax.jit, static_argnames=("loss", "kind", "support", "k", "temperature", "chunk", "one")
)
def value_and_gradients(loss, case, **options):
  """(mean, gradients in the student's hidden states and head); one shape and one set of options
  compile once.
  """
  return jax.value_and_grad(lambda h, w: mean(loss, h, w, *case[2:], **options), (0, 1))(*case[:2])


def assert_same(case, chunk, pair=(fused.linear_divergence, dense), **options):
  found, expected = (
    value_and_gradients(pair[0], case, chunk=chunk, **options),
    value_and_gradients(pair[1], case, **options),
  )
  np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
  for a, b in zip(found[1], expected[1]):
    np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("kind, support", PAIRS)
def test_fused_is_dense_in_value_and_gradients(kind, support):
  case = random_case()
  # 37 tokens: no multiple of 10, nor of the 4 steps taken.
  assert_same(case, 10, kind=kind, support=support, k=7)


@pytest.mark.parametrize(
  "kind, support", [("reverse_kl", "full"), ("forward_kl", "topk_tail"), ("jsd", "topk")]
)
def test_tokens_that_are_one_outcome_are_so_here_too(kind, support):
  assert_same(random_case(), 10, kind=kind, support=support, k=7, one=(3, 9, 49))
  with pytest.raises(ValueError, match="mesh.tensor and mesh.fsdp must be 1"):
    fused.linear_divergence(*random_case(), one=(3, 9), vocabulary_axes=("tensor",))


@pytest.mark.parametrize("support", losses.SUPPORTS)
def test_value_without_differentiation(support):
  case = random_case()
  total, count = jax.jit(lambda *a: fused.linear_divergence(*a, support=support, k=7, chunk=10))(
    *case
  )
  expected, _ = value_and_gradients(dense, case, kind="reverse_kl", support=support, k=7)
  np.testing.assert_allclose(total / count, expected, rtol=2e-6)
  assert count == case[-1].sum() and total.dtype == count.dtype == jnp.float32


INDEX = np.arange(37)  # in 4 chunks of at most 10
SPANS = {
  "whole": INDEX >= 0,
  "empty": INDEX < 0,
  "a run that crosses the borders of chunks": (INDEX > 6) & (INDEX < 23),
  "runs as long as a chunk": INDEX // 10 % 2 == 1,
  "two chunks masked, two whole": INDEX % 4 < 2,
  "first and last token only": np.isin(INDEX, [0, 36]),
}


@pytest.mark.parametrize("span", SPANS)
def test_masks(span):
  assert_same(
    (*random_case(1)[:4], jnp.asarray(SPANS[span])), 10, kind="reverse_kl", support="full", k=7
  )


@pytest.mark.parametrize("span", SPANS)
def test_imitation_is_dense_in_value_and_gradients(span):
  case = random_case(1)
  ids = jnp.where(SPANS[span], INDEX % 50, -100)  # as padding often is
  assert_same(
    (*case[:2], ids, None, jnp.asarray(SPANS[span])), 10, (fused_imitation, dense_imitation)
  )


@pytest.mark.parametrize("counted", [0, 1, 8, 9, 32, 33, 57, 88, 96])
def test_masked_tokens_cost_nothing(counted, monkeypatch):
  """So many chunks of 8 are compared as the tokens that count need, wherever in the 96 they
  stand.
  """
  mask, seen, compare = np.random.default_rng(counted).permutation(96) < counted, [], fused._compare

  def count(*args):
    jax.debug.callback(lambda mask: seen.append(int(mask.sum())), args[1][2])
    return compare(*args)

  monkeypatch.setattr(fused, "_compare", count)
  case = (*random_case(13, (96,))[:4], jnp.asarray(mask))
  loss = lambda h, w: mean(fused.linear_divergence, h, w, *case[2:], chunk=8)
  for function in (loss, jax.value_and_grad(loss, (0, 1))):
    seen.clear()
    jax.block_until_ready(jax.jit(function)(*case[:2]))
    jax.effects_barrier()
    assert len(seen) == -(-counted // 8) and sum(seen) == counted
  monkeypatch.undo()
  assert_same(case, 8)


@pytest.mark.parametrize("tokens, chunk", [((1,), 16), ((5, 7), 1), ((2, 16), 1000)])
def test_shapes_and_chunks(tokens, chunk):
  assert_same(random_case(2, tokens), chunk, temperature=1.3)


@pytest.mark.parametrize(
  "kind, support", [(kind, "full") for kind in losses.KINDS] + [("reverse_kl", "topk_tail")]
)
def test_no_gradient_where_student_is_teacher(kind, support, exact):
  hidden, head, _, _, mask = random_case(3)
  case = (hidden, head, hidden, head, mask)
  lowered = value_and_gradients.lower(
    fused.linear_divergence, case, kind=kind, support=support, k=7, chunk=10
  )
  value, slopes = lowered.compile(exact)(case)
  assert value == 0
  for slope in slopes:
    np.testing.assert_array_equal(slope, 0)  # exact: the descent stops where it should


@pytest.mark.parametrize("kind", losses.KINDS)
def test_tail_at_full_mass(kind):
  teacher = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
  for outside in (1e-9, 1e-60):  # mass in the top k: 1 − 1e-9, and exactly 1 in float32
    student = jnp.asarray(np.log([[1 - outside, outside / 2, outside / 2]]), jnp.float32)
    case = student, jnp.eye(3), teacher, jnp.eye(3), jnp.ones(1)
    options = {"kind": kind, "support": "topk_tail", "k": 1, "temperature": 1.0}
    for number in jax.tree.leaves(
      value_and_gradients(fused.linear_divergence, case, chunk=1, **options)
    ):
      assert np.isfinite(number).all()
    assert_same(case, 1, **options)


def test_teacher_cotangents_are_zero():
  case = random_case(4)
  slopes = jax.jit(
    jax.grad(lambda h, w: mean(fused.linear_divergence, *case[:2], h, w, case[4]), (0, 1))
  )(*case[2:4])
  for slope in slopes:
    np.testing.assert_array_equal(slope, 0)


def reverse_kl_float64(
  student_hidden, student_head, teacher_hidden, teacher_head, mask, temperature
):
  """Value and both gradients of the mean, in float64 NumPy."""
  hs, ws, ht, wt = (
    np.asarray(x.astype(jnp.float32), np.float64)
    for x in (student_hidden, student_head, teacher_hidden, teacher_head)
  )
  log_p, log_q = hs @ ws.T / temperature, ht @ wt.T / temperature
  log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
  p, weight = np.exp(log_p), np.asarray(mask, np.float64) / np.asarray(mask).sum()
  kl = (p * (log_p - log_q)).sum(-1)
  d_logits = p * (log_p - log_q - kl[:, None]) / temperature * weight[:, None]
  return kl @ weight, (d_logits @ ws, d_logits.T @ hs)


@pytest.mark.parametrize("head_dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16_against_float64(head_dtype):
  case = list(random_case(5, (200,), 32, 48, 300, jnp.bfloat16))
  case[1], case[3] = case[1].astype(head_dtype), case[3].astype(head_dtype)
  value, slopes = value_and_gradients(fused.linear_divergence, case, chunk=64)
  expected, wanted = reverse_kl_float64(*case, 0.7)
  np.testing.assert_allclose(value, expected, rtol=1e-5)  # the logits are never rounded to bfloat16
  assert [slope.dtype for slope in slopes] == [jnp.bfloat16, head_dtype]
  # One bfloat16 rounding of each term: 2^-9, less in the sum.
  for slope, right in zip(slopes, wanted):
    error = np.linalg.norm(np.asarray(slope, np.float64) - right) / np.linalg.norm(right)
    assert error < (2e-3 if slope.dtype == jnp.float32 else 4e-3)


def test_poisoned_padding_changes_nothing():
  case = random_case(6)
  graded = functools.partial(
    value_and_gradients, fused.linear_divergence, kind="reverse_kl", support="full", k=7, chunk=10
  )
  statistics = jax.jit(
    functools.partial(fused.linear_divergence, k=7, chunk=10, statistics=True, topk_mass=True)
  )
  keep = case[4][:, None]
  for poison in (np.nan, np.inf, -1e10):
    dirty = jnp.where(keep, case[0], poison), case[1], jnp.where(keep, case[2], poison), *case[3:]
    jax.tree.map(np.testing.assert_array_equal, graded(dirty), graded(case))
    jax.tree.map(np.testing.assert_array_equal, statistics(*dirty), statistics(*case))
    ids = jnp.where(case[4], 3, 10**6)
    learnt = [
      value_and_gradients(fused_imitation, (*some[:2], ids, None, case[4]), chunk=10)
      for some in (dirty, case)
    ]
    jax.tree.map(np.testing.assert_array_equal, *learnt)


def test_no_temporary_of_tokens_by_vocabulary():
  tokens, vocabulary, shape = 2048, 4096, jax.ShapeDtypeStruct
  args = (
    shape((tokens, 16), jnp.float32),
    shape((vocabulary, 16), jnp.float32),
    shape((tokens, 24), jnp.float32),
    shape((vocabulary, 24), jnp.float32),
    shape((tokens,), bool),
  )

  def temporaries(loss, **options):
    step = jax.value_and_grad(lambda *a: mean(loss, *a, **options), (0, 1))
    return jax.jit(step).lower(*args).compile().memory_analysis().temp_size_in_bytes

  # 4 chunks are 128 tokens.
  assert temporaries(fused.linear_divergence, chunk=32) < tokens * vocabulary * 4 / 2
  assert temporaries(dense) > tokens * vocabulary * 4  # so the shape can tell


def matrix_products(function, *args):
  return str(jax.make_jaxpr(function)(*args)).count("dot_general[")


def test_gradients_are_formed_only_when_asked_and_once():
  case = random_case(7)
  loss = lambda h, w: fused.linear_divergence(h, w, *case[2:])[0]
  assert matrix_products(loss, *case[:2]) == 2
  assert matrix_products(jax.value_and_grad(loss, (0, 1)), *case[:2]) == 4
  learn = lambda h, w: fused.linear_imitation(h, w, jnp.zeros(37, int), case[4])[0]
  assert matrix_products(jax.value_and_grad(learn, (0, 1)), *case[:2]) == 3


def test_the_heads_gradient_comes_out_at_its_sink_unrounded():
  student, head, teacher, reference, mask = random_case(21, tokens=(40,), dtype=jnp.bfloat16)
  loss = lambda head, sink: (
    3
    * fused.linear_divergence(student, head, teacher, reference, mask, chunk=16, head_sink=sink)[0]
  )
  fixed, found = jax.jit(jax.grad(loss, (0, 1)))(head, jnp.zeros(head.shape, jnp.float32))
  wanted = jax.jit(jax.grad(loss))(head.astype(jnp.float32), None)
  assert found.dtype == jnp.float32 and not fixed.any()
  np.testing.assert_array_equal(found, wanted)
  assert (found != found.astype(jnp.bfloat16)).any()
  learn = lambda head, sink: fused.linear_imitation(
    student, head, jnp.arange(40), mask, chunk=16, head_sink=sink
  )[0]
  found = jax.jit(jax.grad(learn, 1))(head, jnp.zeros(head.shape, jnp.float32))
  np.testing.assert_array_equal(found, jax.jit(jax.grad(learn))(head.astype(jnp.float32), None))


def test_the_heads_gradient_is_added_to_that_of_the_batches_before():
  student, head, teacher, reference, mask = random_case(22, tokens=(40,), dtype=jnp.bfloat16)
  before, zeros = random_case(23)[1], jnp.zeros(head.shape, jnp.float32)

  def loss(sink, start):
    how = dict(chunk=16, head_sink=sink, head_start=start)
    value = fused.linear_divergence(student, head, teacher, reference, mask, **how)[0]
    return value + fused.linear_imitation(student, head, jnp.arange(40), mask, **how)[0]

  found, alone = (jax.jit(jax.grad(loss))(zeros, start) for start in (before, None))
  np.testing.assert_allclose(found, alone + 2 * before, atol=1e-5)  # of two losses


@pytest.mark.parametrize(
  "kind, statistics",
  [("reverse_kl", False), ("forward_kl", False), ("forward_kl", True), ("jsd", True)],
)
@pytest.mark.parametrize(
  "function",
  [
    chunk_loss._one_pass,
    chunk_loss._two_passes,
    functools.partial(chunk_loss._kernel_pass, interpret=INTERPRET),
  ],
)
def test_row_statistics_match_float64(function, kind, statistics, monkeypatch):
  """Whichever this machine's platform would not take, too; logits that rise, fall, and are huge on
  one side alone.
  """
  monkeypatch.setattr(online_softmax, "ROWS", 2)  # several steps, the last one past the end
  monkeypatch.setattr(online_softmax, "WIDE", 8)
  rng = np.random.default_rng(11)
  s, t = (np.float32(rng.normal(size=(6, 40)) * scale) for scale in (1, 30))
  s[1], s[2], t[3], s[4, 3], t[5, 7] = (
    np.sort(s[1]),
    np.sort(s[2])[::-1],
    np.sort(t[3]),
    300,
    losses.FLOOR,
  )
  log_p, log_q = (np.float64(x) / 0.7 for x in (s, t))
  totals = [
    x.max(-1) + np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) for x in (log_p, log_q)
  ]
  log_p, log_q = log_p - totals[0][:, None], log_q - totals[1][:, None]
  p, q = np.exp(log_p), np.exp(log_q)
  expected = {
    "kl": p * (log_p - log_q),
    "forward_kl": q * (log_q - log_p),
    "student_entropy": -p * log_p,
    "teacher_entropy": -q * log_q,
  }
  wanted = {"forward_kl"} if kind == "forward_kl" else {"kl"}
  wanted |= {"kl", "student_entropy", "teacher_entropy"} if statistics else set()
  options = chunk_loss.Options(kind, statistics=statistics)
  measure = jax.jit(lambda s, t: chunk_loss._finish(options, function(options, s, t)[0]))
  sums, found = measure(s, t)
  assert found.keys() == wanted
  for a, b in zip(sums, totals):
    np.testing.assert_allclose(a, b, rtol=2e-6)
  for name in found:  # an entropy is a difference of logits of about 100, in float32
    np.testing.assert_allclose(
      found[name], expected[name].sum(-1), rtol=2e-6, atol=3e-5 * ("entropy" in name), err_msg=name
    )
  for name in found.keys() & {"kl", "forward_kl"}:
    np.testing.assert_array_equal(measure(s, s)[1][name], 0)


@pytest.mark.parametrize(
  "function",
  [
    chunk_loss._one_pass,
    chunk_loss._two_passes,
    functools.partial(chunk_loss._kernel_pass, interpret=INTERPRET),
  ],
)
def test_the_largest_of_each_group_come_with_the_statistics(function, monkeypatch):
  monkeypatch.setattr(online_softmax, "ROWS", 2)
  monkeypatch.setattr(online_softmax, "WIDE", 128)
  s, t = np.random.default_rng(13).normal(size=(2, 3, 1100)).astype(np.float32)
  s[0, 70] = -np.inf
  run = lambda **how: jax.jit(functools.partial(function, chunk_loss.Options(**how)))(s, t)
  padded = np.pad(s, ((0, 0), (0, 1152 - 1100)), constant_values=-np.inf)
  sides, maxima = run(support="topk", k=2)  # groups of 64
  np.testing.assert_array_equal(maxima, padded.reshape(3, 18, 64).max(-1))
  for side, alone in zip(sides, run()[0]):
    np.testing.assert_array_equal(side[0], alone[0])
  _, maxima = run(statistics=True, topk_mass=True, k=34)  # of 4
  np.testing.assert_array_equal(maxima, s.reshape(3, 275, 4).max(-1))
  assert run()[1] is None and run(support="topk", k=256)[1] is None
  found = jax.jit(functools.partial(top_k, k=2))(s, maxima_CxG=padded.reshape(3, 18, 64).max(-1))
  np.testing.assert_array_equal(found[1], np.argsort(-s, axis=-1, kind="stable")[:, :2])


@pytest.mark.parametrize(
  "function",
  [
    chunk_loss._one_pass,
    chunk_loss._two_passes,
    functools.partial(chunk_loss._kernel_pass, interpret=INTERPRET),
  ],
)
def test_nan_in_a_row_of_logits_is_seen_in_all_that_is_told_of_it(function):
  s, t = np.random.default_rng(14).normal(size=(2, 4, 40)).astype(np.float32)
  s[1, 3], t[2, 30], s[3], t[3] = np.nan, np.nan, np.nan, np.nan
  options = chunk_loss.Options(statistics=True)
  _, found = jax.jit(lambda s, t: chunk_loss._finish(options, function(options, s, t)[0]))(s, t)
  assert np.isnan(found["kl"]).tolist() == [False, True, True, True]
  assert np.isnan(found["student_entropy"]).tolist() == [False, True, False, True]
  assert np.isnan(found["teacher_entropy"]).tolist() == [False, False, True, True]


@pytest.mark.parametrize("levels", [1, 50])  # few different numbers: nearly everything is tied
def test_largest_numbers_of_a_long_row(levels):
  x = np.float32(np.random.default_rng(12).integers(0, levels, (5, 3001)))
  x[1], x[2] = np.sort(x[1]), np.sort(x[2])[::-1]
  found = jax.jit(functools.partial(top_k, k=7))(x)
  ids = np.argsort(-x, axis=-1, kind="stable")[:, :7]
  np.testing.assert_array_equal(found[1], ids)
  np.testing.assert_array_equal(found[0], np.take_along_axis(x, ids, axis=-1))


def sharded(case, mesh, axes, **options):
  """`value_and_gradients` and statistics, with the tokens over 'data' and the heads' rows over
  `axes`.
  """
  P = jax.sharding.PartitionSpec
  tokens, head, whole = P("data"), P(axes or None), P()

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(tokens, head, tokens, head, tokens),
    out_specs=(whole, whole, tokens),
  )
  def loss(*args):
    *sums, found = fused.linear_divergence(*args, **options, vocabulary_axes=axes, statistics=True)
    return *jax.lax.psum(sums, "data"), found

  def mean(h, w):
    total, count, found = loss(h, w, *case[2:])
    return total / jnp.maximum(count, 1), found

  return jax.jit(jax.value_and_grad(mean, (0, 1), has_aux=True))(*case[:2])


AXES = "data", "fsdp", "tensor"
make_mesh = lambda *shape: jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


@pytest.mark.parametrize(
  "kind, support, shape, axes",
  [
    ("reverse_kl", "full", (8, 1, 1), ()),
    ("reverse_kl", "full", (2, 2, 2), ("tensor", "fsdp")),
    ("forward_kl", "topk", (1, 8, 1), ("fsdp",)),
    ("jsd", "full", (1, 1, 8), ("tensor",)),
    pytest.param("reverse_kl", "topk", (4, 2, 1), ("tensor", "fsdp"), marks=pytest.mark.slow),
    ("jsd", "topk_tail", (2, 2, 2), ("fsdp", "tensor")),
    pytest.param("forward_kl", "full", (2, 4, 1), ("fsdp",), marks=pytest.mark.slow),
    ("reverse_kl", "topk_tail", (1, 2, 4), ("tensor", "fsdp")),
    pytest.param("jsd", "topk", (1, 1, 8), ("tensor",), marks=pytest.mark.slow),
    pytest.param("forward_kl", "topk_tail", (1, 8, 1), ("fsdp",), marks=pytest.mark.slow),
  ],
)
def test_tokens_and_vocabulary_spread_over_devices_give_the_same(kind, support, shape, axes):
  """The devices along 'data' have unlike numbers of tokens that count, so their loops end apart."""
  case = list(random_case(8, (48,), vocabulary=64))
  # logits that tie, on several devices
  case[1] = case[1].at[3].set(case[1][40]).at[50].set(case[1][40])
  case[4] = jnp.asarray(np.arange(48) >= 17) & case[4]
  # With 8 slices, 11 is more than a slice has.
  options = {
    "kind": kind,
    "support": support,
    "k": 11,
    "chunk": 4,
  }
  (value, found), slopes = sharded(case, make_mesh(*shape), axes, **options)
  expected = value_and_gradients(dense, case, kind=kind, support=support, k=11)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), (value, slopes), expected)
  alone = jax.jit(functools.partial(fused.linear_divergence, **options, statistics=True))(*case)[2]
  assert found.keys() == alone.keys() and ("topk_mass" in found) == (support != "full")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, alone)


def test_bfloat16_gradients_of_a_spread_vocabulary_are_rounded_once():
  case = list(random_case(5, (200,), 32, 48, 304, jnp.bfloat16))
  case[1], case[3] = case[1].astype(jnp.float32), case[3].astype(jnp.float32)
  _, wanted = reverse_kl_float64(*case, 0.7)
  error = lambda slope: (
    np.linalg.norm(np.asarray(slope, np.float64) - wanted[0]) / np.linalg.norm(wanted[0])
  )
  _, spread = sharded(case, make_mesh(1, 2, 4), ("tensor", "fsdp"), chunk=64)
  _, alone = value_and_gradients(fused.linear_divergence, case, chunk=64)
  assert spread[0].dtype == jnp.bfloat16 and error(spread[0]) < 1.05 * error(alone[0])


def test_imitation_of_a_vocabulary_spread_over_devices():
  case, mesh = random_case(8, (48,), vocabulary=64), make_mesh(2, 2, 2)
  ids, P, axes = jnp.arange(48) % 64, jax.sharding.PartitionSpec, ("tensor", "fsdp")
  specs = P("data"), P(axes), P("data"), P("data")
  loss = lambda *args: jax.lax.psum(
    fused.linear_imitation(*args, chunk=4, vocabulary_axes=axes), "data"
  )
  loss = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
  found = jax.jit(jax.value_and_grad(lambda h, w: mean(loss, h, w, ids, case[4]), (0, 1)))(
    *case[:2]
  )
  expected = value_and_gradients(dense_imitation, (*case[:2], ids, None, case[4]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_ties_at_the_border_of_the_top_k_go_to_the_lower_id_on_whichever_device():
  """All logits of a row are equal: the k lowest ids are kept."""
  hidden, head = jnp.ones((8, 1)), jnp.ones((64, 1))
  case = hidden, head, hidden, jnp.arange(64.0)[:, None] / 64, jnp.ones(8)
  options = {"support": "topk", "k": 13, "temperature": 1.0, "chunk": 4}
  (value, _), slopes = sharded(case, make_mesh(1, 4, 2), ("tensor", "fsdp"), **options)
  expected = value_and_gradients(dense, case, support="topk", k=13, temperature=1.0)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), (value, slopes), expected
  )
  assert (slopes[1][:13, 0] != slopes[1][13:14, 0]).all()


@pytest.mark.parametrize(
  "kind, support, asked",
  [
    ("reverse_kl", "full", True),
    ("forward_kl", "full", False),
    ("jsd", "topk", False),
    ("reverse_kl", "topk_tail", False),
  ],
)
def test_statistics_match_float64_and_change_nothing(kind, support, asked):
  case = random_case(9, (3, 13))
  options = {"kind": kind, "support": support, "k": 5, "temperature": 0.7, "chunk": 10}
  measured = lambda h, w: fused.linear_divergence(
    h, w, *case[2:], **options, statistics=True, topk_mass=asked
  )
  hs, ws, ht, wt, mask = (np.asarray(x, np.float64) for x in case)
  softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
  p, q = softmax(hs @ ws.T / 0.7), softmax(ht @ wt.T / 0.7)
  expected = {
    "kl": (p * np.log(p / q)).sum(-1),
    "student_entropy": -(p * np.log(p)).sum(-1),
    "teacher_entropy": -(q * np.log(q)).sum(-1),
  }
  if asked or support != "full":
    expected["topk_mass"] = np.sort(p)[..., -5:].sum(-1)
  paired = lambda h, w: (lambda total, *others: (total, others))(*measured(h, w))
  (total, (count, graded_found)), slopes = jax.jit(
    jax.value_and_grad(paired, (0, 1), has_aux=True)
  )(*case[:2])
  for found in (jax.jit(measured)(*case[:2])[2], graded_found):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_allclose(found[name], value * mask, rtol=1e-5, atol=1e-6, err_msg=name)
      assert found[name].dtype == jnp.float32
  plain, plain_slopes = value_and_gradients(fused.linear_divergence, case, **options)
  np.testing.assert_allclose(total / count, plain, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a / count, b, atol=1e-6), slopes, plain_slopes
  )
  for slope in jax.jit(
    jax.grad(lambda h, w: sum(x.sum() for x in measured(h, w)[2].values()), (0, 1))
  )(*case[:2]):
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"kind": "kl"}, "kind is 'kl'"),
    ({"chunk": 0}, "chunk is 0; it must be at least 1"),
    ({"student_head": np.ones((50, 9))}, r"student_head has shape \(50, 9\); it must be \[V, 8\]"),
    ({"teacher_head": np.ones((49, 12))}, "teacher_head has 49 rows; it must have 50"),
    (
      {"teacher_hidden": np.ones((36, 12))},
      r"mask has shape \(37,\); it must be \(36,\), teacher_hidden",
    ),
    (
      {"student_hidden": np.ones(8)},
      r"student_hidden has shape \(8,\); it must be \[N, D\] or \[B, T, D\]",
    ),
  ],
)
def test_errors_name_the_argument_and_what_is_right(change, message):
  names = "student_hidden", "student_head", "teacher_hidden", "teacher_head", "mask"
  with pytest.raises(ValueError, match=message):
    fused.linear_divergence(**dict(zip(names, random_case())) | change)
