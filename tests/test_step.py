"""Batch, teacher and step: alignment, independence of micro-batch and devices, and that a step does
what its loss says.
"""

import dataclasses
import functools
import math
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import metrics as measures
from oel_jax.consolidation import micro_batches
from oel_jax.consolidation import samples as samples_lib
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import attention, transformer
from oel_jax.policy.weights import huggingface
from oel_jax.runtime import finite
from oel_jax.runtime import mesh as mesh_lib

# Vocabulary and all heads can be shared out over two.
ARCHITECTURE = architecture_lib.Architecture(32, 16, 2, 4, 2, 8, 24, rope_theta=1e4)
# Prompt, knowledge, response of four samples.
LENGTHS = [
  (3, 4, 1),
  (5, 0, 9),
  (2, 7, 3),
  (8, 2, 6),
]


@functools.cache
def _params(seed):
  return jax.jit(lambda key: transformer.init(ARCHITECTURE, key))(jax.random.key(seed))


def _samples(lengths=LENGTHS, seed=0):
  rng = np.random.default_rng(seed)
  return [[rng.integers(3, 32, n).tolist() for n in sample] for sample in lengths]


def _batch(samples, rows=10, prompt=9, pad_id=0, pack=True, texts=4):
  """Each sample has a knowledge text of its own."""
  prompts, _, responses = zip(*samples)
  known = range(len(samples))
  return batch_lib.assemble(
    prompts,
    known,
    responses,
    pad_id=pad_id,
    length=prompt + rows,
    response_length=rows,
    pack=pack,
    texts=texts if pack else 1,
  )


def _teacher(params, samples, shardings=None, on_host=False, unroll=False):
  texts = [knowledge for _, knowledge, _ in samples]
  return teacher_lib.prepare(
    params,
    ARCHITECTURE,
    texts,
    dtype=jnp.float32,
    shardings=shardings,
    on_host=on_host,
    unroll=unroll,
  )


_hidden = jax.jit(
  lambda params, tokens: transformer.apply(
    params, ARCHITECTURE, tokens, jnp.arange(32)[None], jnp.ones_like(tokens)
  )[0]
)


def _log_probabilities(params, ids, temperature):
  """Next-token log-probabilities of one unpadded sequence, softmax in float64."""
  T = len(ids)
  # One shape, one compilation; what stands behind a token does not reach it.
  tokens = np.zeros((1, 32), np.int32)
  tokens[0, :T] = ids
  hidden = _hidden(params, tokens)[:, :T]
  logits = (
    np.asarray(hidden[0], np.float64)
    @ np.asarray(transformer.head(params), np.float64).T
    / temperature
  )
  logits -= logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _reference(student, teacher, samples, temperature=0.7, shift=0):
  """Sum of KL(student ‖ teacher) over the responses, sample by sample, without padding, and the
  number of tokens.
  """
  total = count = 0
  for prompt, knowledge, response in samples:
    p = _log_probabilities(student, prompt + response, temperature)[len(prompt) - 1 : -1]
    q = _log_probabilities(teacher, knowledge + prompt + response, temperature)
    q = q[len(knowledge) + len(prompt) - 1 + shift :][: len(p)]
    p = p[: len(q)]
    total, count = total + (np.exp(p) * (p - q)).sum(), count + len(response)
  return total, count


@functools.partial(jax.jit, static_argnames="kind")
def _loss_sum(student, teacher, batch, kind="reverse_kl"):
  total, (count, _) = step_lib.loss_sum(
    student,
    teacher,
    batch,
    architecture=ARCHITECTURE,
    kind=kind,
    support="full",
    k=4,
    temperature=0.7,
    chunk=7,
    dtype=jnp.float32,
    remat="none",
    attn_impl="xla",
  )
  return total, count


@pytest.mark.parametrize(
  "how", [dict(), dict(pack=False), dict(texts=1), dict(texts=2, prompt=20, rows=20)]
)
def test_loss_equals_float64_reference_sample_by_sample(how):
  samples, student, params = _samples(), _params(0), _params(1)
  teacher, batch = _teacher(params, samples), _batch(samples, **how)
  total, count = _loss_sum(student, teacher, batch)
  expected, tokens = _reference(student, params, samples)
  assert count == tokens
  np.testing.assert_allclose(total, expected, rtol=2e-5)
  shifted, _ = _reference(student, params, samples, shift=1)
  # The reference itself would notice an off-by-one.
  assert abs(shifted - expected) > 0.01 * expected


def test_empty_knowledge_and_equal_weights_give_exactly_zero_and_a_shift_does_not():
  samples = [[p, [], r] for p, _, r in _samples()]
  batch, params = _batch(samples), _params(0)
  teacher = _teacher(params, samples)
  assert float(_loss_sum(params, teacher, batch)[0]) == 0.0
  # A text of one token, as though it were none.
  later = _teacher(params, [[p, [5], r] for p, _, r in samples])
  assert float(_loss_sum(params, later._replace(length=later.length * 0), batch)[0]) < 1e-5
  assert float(_loss_sum(params, later, batch)[0]) > 1e-3


def test_padding_id_and_extra_room_change_nothing():
  samples, student = _samples(), _params(0)
  teacher = _teacher(_params(1), samples)
  tight = _loss_sum(student, teacher, _batch(samples))[0]
  roomy = _loss_sum(student, teacher, _batch(samples, rows=16, prompt=20, pad_id=5))[0]
  np.testing.assert_allclose(tight, roomy, rtol=1e-5)


def test_a_prefix_read_once_equals_the_plain_forward():
  """Every hidden state at the response positions, to 1e-5; in bfloat16 to what its eight bits
  allow.
  """
  samples, params = _samples(seed=1), _params(1)
  batch = _batch(samples, texts=2, prompt=16, rows=16)
  for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.06)):
    teacher = teacher_lib.prepare(
      params, ARCHITECTURE, [known for _, known, _ in samples], dtype=dtype
    )
    found = jax.jit(
      lambda teacher: teacher_lib.teacher_hidden(
        teacher, ARCHITECTURE, batch, dtype=dtype, attn_impl="xla"
      )
    )(teacher)
    for s in range(len(batch.tokens)):
      at = 0
      for i in _texts(batch, s):
        prompt, known, response = samples[i]
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(known + prompt + response)] = known + prompt + response
        expected = _hidden(params, tokens)[0, len(known + prompt) - 1 :][: len(response)]
        np.testing.assert_allclose(
          np.asarray(found[s], np.float32)[at : at + len(response)], expected, atol=tolerance
        )
        at += len(response)
      assert at == batch.mask[s].sum()


def _xla_flash(q, k, v, *, scale, mask_type, return_residual, q_seqlen=None, kv_seqlen=None):
  """What cuDNN's attention gives, in float32: its output, [B, T, N, H], and the log-sum-exp of each
  query's scores, [B, N, T].
  """
  assert return_residual
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  scores = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
  T, S = scores.shape[-2:]
  seen = (
    jnp.tril(jnp.ones((T, S), bool))
    if mask_type.name == "CAUSAL"
    else (jnp.arange(S) < kv_seqlen[:, None])[:, None, None]
  )
  scores = jnp.where(seen, scores, -jnp.inf)
  return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v), jax.nn.logsumexp(scores, axis=-1)


@pytest.mark.parametrize("skip", [(0, 0, 0, 0), (2, 2, 2, 2), (2, 0, 1, 2)])
# On the path of cuDNN's flash attention.
def test_prefix_and_suffix_joined_in_every_layer_equal_the_plain_forward(monkeypatch, skip):
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  monkeypatch.setattr(cudnn, "dot_product_attention", _xla_flash)
  samples, params = _samples(seed=2), _params(1)
  begun = [[7, 8][:n] for n in skip]
  pairs = zip(begun, samples, strict=True)
  prompts, known, responses = zip(*[(b + x, b + e, y) for b, (x, e, y) in pairs])
  batch = _batch(list(zip(prompts, known, responses)), prompt=12, pack=False)
  teacher = teacher_lib.prepare(params, ARCHITECTURE, known, dtype=jnp.float32, skip=skip)
  found = jax.jit(
    lambda teacher: teacher_lib.teacher_hidden(
      teacher, ARCHITECTURE, batch, dtype=jnp.float32, attn_impl="flash"
    )
  )(teacher)
  for s in range(len(samples)):
    [i] = _texts(batch, s)
    ids = known[i] + prompts[i][skip[i] :] + responses[i]
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(ids)] = ids
    expected = _hidden(params, tokens)[0, len(ids) - len(responses[i]) - 1 :][: len(responses[i])]
    np.testing.assert_allclose(found[s, : len(responses[i])], expected, atol=1e-5)


def _texts(batch, s):
  """The texts of row s's samples, in their order."""
  segments, slots = batch.segments[s], batch.slots[s]
  return [
    int(batch.texts[s, slots[segments == segment][0]]) for segment in range(1, segments.max() + 1)
  ]


def test_packing_keeps_every_token_and_the_order_of_the_samples_changes_no_row():
  samples = _samples([(3, 4, 1), (5, 0, 9), (2, 7, 3), (8, 2, 6), (1, 1, 2)])
  batch = _batch(samples, prompt=6, texts=2)
  # Of 4, 14, 5, 14 and 3 tokens the 14s fill rows of 16, and the others would share one, but for
  # its two texts at most.
  assert len(batch.tokens) == 4 and len(_batch(samples, prompt=6, texts=3).tokens) == 3
  found = []
  for s in range(len(batch.tokens)):
    for segment in range(1, batch.segments[s].max() + 1):
      here = batch.segments[s] == segment
      assert (
        batch.positions[s][here].tolist() == list(range(here.sum()))
        and len(set(batch.slots[s][here])) == 1
      )
      found.append(batch.tokens[s][here].tolist())
    np.testing.assert_array_equal(
      batch.tokens[s][batch.at[s] + 1][batch.mask[s]], batch.response[s][batch.mask[s]]
    )
  assert sorted(found) == sorted(prompt + response for prompt, _, response in samples)
  assert batch.mask.sum() == sum(len(response) for _, _, response in samples)
  again = _batch(samples, prompt=6, texts=2)
  jax.tree.map(np.testing.assert_array_equal, again, batch)


def _mean_statistics(student, teacher, samples, buckets, k, temperature=0.7):
  """The metrics of a step, sample by sample in float64."""
  found = {name: [] for name in ("kl", "student_entropy", "teacher_entropy", "topk_mass", *buckets)}
  for prompt, knowledge, response in samples:
    p = _log_probabilities(student, prompt + response, temperature)[len(prompt) - 1 : -1]
    q = _log_probabilities(teacher, knowledge + prompt + response, temperature)[
      len(knowledge + prompt) - 1 : -1
    ]
    kl = (np.exp(p) * (p - q)).sum(-1)
    values = {
      "kl": kl,
      "student_entropy": -(np.exp(p) * p).sum(-1),
      "teacher_entropy": -(np.exp(q) * q).sum(-1),
    }
    values |= {"topk_mass": np.sort(np.exp(p), axis=-1)[:, -k:].sum(-1)} | {
      name: kl[a : b + 1] for name, (a, b) in buckets.items()
    }
    for name in found:
      found[name].extend(values[name])
  return {name: np.mean(values) if values else 0.0 for name, values in found.items()}


@pytest.mark.parametrize(
  "kind, support, micro_tokens, pack",
  [
    ("reverse_kl", "full", None, True),
    ("forward_kl", "topk_tail", 19, False),
    pytest.param("jsd", "full", 19, True, marks=pytest.mark.slow),
    pytest.param("reverse_kl", "topk", None, False, marks=pytest.mark.slow),
  ],
)
def test_the_metrics_of_a_step_match_float64(monkeypatch, kind, support, micro_tokens, pack):
  # For short responses.
  buckets = {
    "kl_0_15": (0, 1),
    "kl_16_63": (2, 5),
    "kl_64_255": (6, 8),
    "kl_256": (9, 2**31 - 1),
  }
  monkeypatch.setattr(measures, "BUCKETS", buckets)
  samples, optimizer = _samples(), optax.sgd(0.0)
  state = step_lib.init_state(jax.tree.map(jnp.copy, _params(0)), optimizer)
  step = step_lib.make_step(
    ARCHITECTURE, optimizer, kind=kind, support=support, k=4, chunk=7, micro_tokens=micro_tokens
  )
  batch, teacher = (
    _batch(samples, prompt=20, rows=20, pack=pack, texts=2),
    _teacher(_params(1), samples),
  )
  assert batch.segments.max() == (2 if pack else 1)
  metrics = step(state, teacher, batch)[1]
  expected = _mean_statistics(_params(0), _params(1), samples, buckets, 4)
  if support == "full":
    del expected["topk_mass"]
  others = {"loss", "gradient_norm", "tokens", "not_finite"}
  others |= {name for name in metrics if name.startswith(step_lib.GRADIENT)}
  assert expected.keys() == metrics.keys() - others
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
  how = dict(k=4, temperature=1.3, chunk=7, micro_tokens=micro_tokens)
  probe = step_lib.make_probe(ARCHITECTURE, **how)(_params(0), teacher, batch)
  expected = _mean_statistics(_params(0), _params(1), samples, {}, 4, 1.3)
  assert probe.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(probe[name], value, rtol=2e-5, err_msg=name)


def test_imitation_is_negative_log_likelihood_at_temperature_one():
  samples, student = _samples(), _params(0)
  total, _ = _loss_sum(student, _teacher(_params(1), samples), _batch(samples), "imitation")
  expected = 0.0
  for prompt, _, response in samples:
    logp = _log_probabilities(student, prompt + response, 1.0)[len(prompt) - 1 : -1]
    expected -= logp[np.arange(len(response)), response].sum()
  np.testing.assert_allclose(total, expected, rtol=1e-5)


def _gradient_after_one_step(
  micro_tokens, mesh=None, lengths=None, remat="none", pack=False, on_host=False, unroll=False
):
  """One step of plain gradient descent at rate 1: the change of the parameters is the gradient."""
  samples = _samples(lengths or [(3, 4, 1), (5, 0, 10), (2, 7, 1), (8, 2, 10)])
  optimizer, student, params = optax.sgd(1.0), _params(0), _params(1)
  batch, shardings, read = _batch(samples, pack=pack), None, None
  if mesh is not None:
    shapes = {
      name: jax.ShapeDtypeStruct((2, len(samples), 2, 32, 8), jnp.float32)
      for name in ("keys", "values")
    }
    read = tuple(mesh_lib.param_shardings(mesh, {"teacher": shapes})["teacher"].values())
    params = jax.device_put(params, mesh_lib.param_shardings(mesh, params))
    begin = lambda params: step_lib.init_state(params, optimizer)
    shardings = jax.tree.map(
      lambda leaf: leaf.sharding, mesh_lib.abstract_init(begin, mesh, student)
    )
    state = mesh_lib.sharded_init(begin, mesh, student)
    batch = jax.device_put(mesh_lib.pad_batch(batch, mesh), mesh_lib.batch_sharding(mesh))
  else:
    state = step_lib.init_state(jax.tree.map(jnp.copy, student), optimizer)
  if pack and micro_tokens:  # micro-batches that hold nothing, too
    one = mesh_lib.make_mesh(_one_device(), jax.devices()[:1])
    batch = samples_lib.place(batch, mesh or one, 2 * len(samples), micro_tokens)
  step = step_lib.make_step(
    ARCHITECTURE,
    optimizer,
    k=4,
    chunk=7,
    micro_tokens=micro_tokens,
    shardings=shardings,
    remat=remat,
  )
  teacher = _teacher(params, samples, read, on_host, unroll)
  assert teacher_lib.is_unrolled(teacher) == (unroll and not on_host)
  assert mesh is None or mesh.shape["tensor"] != 2 or teacher.keys.sharding.spec[2] == "tensor"
  assert (
    teacher.keys.sharding.memory_kind
    == teacher.values.sharding.memory_kind
    == ("pinned_host" if on_host else "device")
  )
  state, metrics = step(state, teacher, batch)
  gradient = jax.tree.map(lambda new, old: np.asarray(old) - np.asarray(new), state.params, student)
  assert metrics.pop("not_finite") == 0
  # Each parameter's own norm is looked at here, where what is compared is the gradient itself.
  for path, leaf in flax.traverse_util.flatten_dict(gradient, sep="/").items():
    norm = np.linalg.norm(leaf.astype(np.float64).ravel())
    np.testing.assert_allclose(metrics.pop(step_lib.GRADIENT + path), norm, rtol=1e-3, atol=1e-6)
  return gradient, {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize(
  "micro_tokens, remat, pack, unroll",
  [
    pytest.param(19, "full", True, False, marks=pytest.mark.slow),
    (19, "dots", False, True),
    pytest.param(1, "dots", False, False, marks=pytest.mark.slow),
    pytest.param(40, "full", False, False, marks=pytest.mark.slow),
    (19, "none", True, False),
    pytest.param(None, "dots", True, True, marks=pytest.mark.slow),
  ],
)
# Responses of 1 and of 10 tokens.
def test_gradient_does_not_depend_on_the_micro_batch(micro_tokens, remat, pack, unroll):
  whole, measured = _gradient_after_one_step(None)
  cut, measured_cut = _gradient_after_one_step(micro_tokens, remat=remat, pack=pack, unroll=unroll)
  assert measured["tokens"] == measured_cut["tokens"] == 22
  assert measured.keys() == measured_cut.keys() and measured["kl_0_15"] > 0
  for name in measured:
    np.testing.assert_allclose(measured[name], measured_cut[name], rtol=1e-5, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole, cut)
  norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(whole)))
  np.testing.assert_allclose(measured["gradient_norm"], norm, rtol=1e-3)


@pytest.mark.parametrize(
  "rows, length, shards, micro_tokens, pieces",
  [
    (64, 1624, 1, 16384, 8),
    (64, 1624, 4, 16384, 2),
    (64, 1624, 1, None, 1),
    (64, 1624, 1, 10, 64),
    (7, 10, 1, 69, 7),
    (3, 10, 8, 10, 1),
  ],
)
def test_pieces_are_the_fewest_equal_parts_that_fit(rows, length, shards, micro_tokens, pieces):
  assert micro_batches.count_of(rows, length, shards, micro_tokens) == pieces


def test_micro_batches_between_those_that_count_may_hold_nothing():
  """As in a batch that somebody else has laid out: its rows count in any order."""
  samples = _samples()
  batch = _batch(samples, pack=False)
  batch.mask[[0, 2]] = False
  length = batch.tokens.shape[1]  # each row is a micro-batch by itself
  probe = step_lib.make_probe(ARCHITECTURE, k=4, temperature=0.7, chunk=7, micro_tokens=length)
  total, count = _reference(_params(0), _params(1), samples[1::2])
  kl = probe(_params(0), _teacher(_params(1), samples), batch)["kl"]
  np.testing.assert_allclose(kl, total / count, rtol=1e-4)


@pytest.mark.parametrize(
  "shape, micro_tokens",
  [
    (dict(data=2, fsdp=2, tensor=2), 19),
    pytest.param(dict(data=8, fsdp=1, tensor=1), None, marks=pytest.mark.slow),
    pytest.param(dict(data=2, fsdp=1, tensor=2), 19, marks=pytest.mark.slow),
    pytest.param(dict(data=2, fsdp=2, tensor=2), None, marks=pytest.mark.slow),
    pytest.param(dict(data=1, fsdp=8, tensor=1), None, marks=pytest.mark.slow),
    pytest.param(dict(data=1, fsdp=1, tensor=8), None, marks=pytest.mark.slow),
    pytest.param(dict(data=4, fsdp=2, tensor=1), None, marks=pytest.mark.slow),
  ],
)
# 3 items on 8 devices; keys and values read on the mesh.
def test_gradient_does_not_depend_on_the_devices(shape, micro_tokens):
  import ml_collections

  lengths = [(3, 4, 1), (5, 0, 10), (8, 2, 10)]
  one, measured = _gradient_after_one_step(None, lengths=lengths)
  devices = jax.devices()[: math.prod(shape.values())]
  many, measured_many = _gradient_after_one_step(
    micro_tokens, mesh_lib.make_mesh(ml_collections.ConfigDict(shape), devices), lengths
  )
  assert measured["tokens"] == measured_many["tokens"] == 21
  for name in measured:
    np.testing.assert_allclose(measured[name], measured_many[name], rtol=1e-5, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, many)


@pytest.mark.parametrize(
  "kind, tied, micro_tokens",
  [
    ("reverse_kl", True, 19),
    pytest.param("imitation", False, None, marks=pytest.mark.slow),
    pytest.param("reverse_kl", False, None, marks=pytest.mark.slow),
    pytest.param("reverse_kl", False, 19, marks=pytest.mark.slow),
    pytest.param("imitation", True, 19, marks=pytest.mark.slow),
    pytest.param("imitation", False, 19, marks=pytest.mark.slow),
  ],
)
def test_all_gradients_are_those_of_the_loop(kind, tied, micro_tokens):
  """Embedding and head too, tied or not: without a loop their gradients come out in other places
  than the parameters.
  """
  architecture, samples, optimizer = (
    dataclasses.replace(ARCHITECTURE, tied_head=tied),
    _samples(),
    optax.sgd(1.0),
  )
  student, params = (transformer.init(architecture, jax.random.key(seed)) for seed in (0, 1))
  step = step_lib.make_step(architecture, optimizer, kind=kind, chunk=7, micro_tokens=micro_tokens)

  def trained(unroll):
    texts = [knowledge for _, knowledge, _ in samples]
    teacher = teacher_lib.prepare(params, architecture, texts, dtype=jnp.float32, unroll=unroll)
    state, _ = step(
      step_lib.init_state(jax.tree.map(jnp.copy, student), optimizer),
      teacher,
      _batch(samples, pack=False),
    )
    return jax.tree.map(lambda new, old: np.asarray(old) - np.asarray(new), state.params, student)

  wanted = trained(False)
  assert all(
    leaf.any()
    for leaf in jax.tree.leaves(
      {name: wanted[name] for name in ("embed", "head") if name in wanted}
    )
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), trained(True), wanted)


@pytest.mark.parametrize("unroll", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_student_that_is_its_teacher_has_no_divergence_in_bfloat16(unroll):
  """Loop or none, both run the same decoder: two would differ by their rounding."""
  samples, params = _samples([(3, 0, 4), (5, 0, 9)]), _params(0)
  teacher = teacher_lib.prepare(params, ARCHITECTURE, [[], []], dtype=jnp.bfloat16, unroll=unroll)
  batch, options = _batch(samples, pack=False), dict(k=4, chunk=7, dtype=jnp.bfloat16)
  probed = step_lib.make_probe(ARCHITECTURE, temperature=0.7, **options)(params, teacher, batch)
  optimizer = optax.sgd(1.0)
  state = step_lib.init_state(jax.tree.map(jnp.copy, params), optimizer)
  _, measured = step_lib.make_step(ARCHITECTURE, optimizer, **options)(state, teacher, batch)
  assert probed["kl"] == measured["kl"] == measured["loss"] == 0


@pytest.mark.parametrize(
  "shape, micro_tokens, pack, unroll",
  [
    (None, None, False, True),
    pytest.param(None, 19, True, False, marks=pytest.mark.slow),
    pytest.param(dict(data=2, fsdp=2, tensor=2), None, False, False, marks=pytest.mark.slow),
  ],
)
def test_knowledge_in_the_hosts_memory_teaches_the_same(shape, micro_tokens, pack, unroll):
  import ml_collections

  mesh = shape and mesh_lib.make_mesh(ml_collections.ConfigDict(shape))
  (here, measured), (there, measured_there) = (
    _gradient_after_one_step(micro_tokens, mesh, pack=pack, on_host=on_host, unroll=unroll)
    for on_host in (False, True)
  )
  # from the host the teacher's layers run in a loop, which rounds otherwise
  tolerance = 2e-6 if unroll else 0
  for name in measured:
    np.testing.assert_allclose(
      measured[name], measured_there[name], rtol=10 * tolerance, err_msg=name
    )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), here, there)


# student and teacher begin as the same arrays
def test_teacher_survives_a_donating_step():
  params = _params(0)
  before = jax.tree.map(np.array, params)
  optimizer = optax.adamw(1e-2)
  state = mesh_lib.sharded_init(
    lambda p: step_lib.init_state(p, optimizer),
    mesh_lib.make_mesh(_one_device(), jax.devices()[:1]),
    params,
  )
  step = step_lib.make_step(ARCHITECTURE, optimizer, k=4)
  given = state
  state, _ = step(state, _teacher(params, _samples()), _batch(_samples()))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.params))  # donated
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, params), before)
  assert not np.array_equal(np.array(state.params["norm"]["scale"]), before["norm"]["scale"])


@pytest.mark.slow
def test_exported_weights_have_moved_after_steps_at_1e_6(tmp_path):
  """Weights as large as a language model's, 0.02, lie 6e-5 apart in bfloat16: 60 steps add up to
  that, and each alone is rounded away.
  """
  samples, optimizer = _samples(), optax.adamw(1e-6, weight_decay=0.01)
  params = jax.tree.map(
    lambda p: p if p.ndim < 2 or (p == 1).all() else p / p.std() * 0.02, _params(0)
  )
  teacher, batch = _teacher(jax.tree.map(lambda p: 3 * p, params), samples), _batch(samples)
  step = step_lib.make_step(ARCHITECTURE, optimizer, k=4)

  def exported(params, name):
    huggingface.save(tmp_path / name, params, ARCHITECTURE, dtype=jnp.bfloat16)
    stored = safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
    assert all(tensor.dtype == jnp.bfloat16 for tensor in stored.values())
    return np.concatenate([stored[tensor].ravel() for tensor in sorted(stored)])

  before, moved = exported(params, "before"), {}
  for masters in ("float32", "bfloat16"):
    kept = lambda params: jax.tree.map(lambda p: jnp.array(p.astype(masters), jnp.float32), params)
    state = step_lib.init_state(kept(params), optimizer)
    for _ in range(100):
      state, _ = step(state, teacher, batch)
      state = state if masters == "float32" else state._replace(params=kept(state.params))
    moved[masters] = (exported(state.params, masters) != before).mean()
  assert moved["float32"] > 0.5 and moved["bfloat16"] < 0.1


def _one_device():
  import ml_collections

  return ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1))


@pytest.mark.parametrize(
  "kind",
  ["reverse_kl", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("forward_kl", "jsd"))],
)
def test_divergence_to_the_teacher_falls_on_a_fixed_batch(kind):
  optimizer, batch, teacher = (
    optax.adamw(3e-3),
    _batch(_samples()),
    _teacher(_params(1), _samples()),
  )
  state = step_lib.init_state(jax.tree.map(jnp.copy, _params(0)), optimizer)  # it is donated
  step = step_lib.make_step(ARCHITECTURE, optimizer, kind=kind, k=4)
  probe = step_lib.make_probe(ARCHITECTURE, k=4, temperature=0.7, chunk=64)
  first = float(probe(state.params, teacher, batch)["kl"])
  for _ in range(20):
    state, _ = step(state, teacher, batch)
  assert float(probe(state.params, teacher, batch)["kl"]) < 0.5 * first
  assert int(state.step) == 20


def test_a_step_as_users_compile_it_gives_the_same_numbers(monkeypatch):
  """The suite's own flags name another level of optimization."""
  optimizer, batch, found = optax.adamw(3e-3), _batch(_samples()), []
  for flags in ("--xla_backend_optimization_level=0", ""):
    monkeypatch.setenv("XLA_FLAGS", flags)  # XLA itself has read it before
    step = step_lib.make_step(ARCHITECTURE, optimizer, k=4)
    state = step_lib.init_state(jax.tree.map(jnp.copy, _params(0)), optimizer)
    found.append(step(state, _teacher(_params(1), _samples()), batch))
  (state, metrics), (state_there, metrics_there) = found
  same = functools.partial(np.testing.assert_allclose, rtol=1e-4)
  jax.tree.map(functools.partial(same, atol=1e-6), state.params, state_there.params)
  jax.tree.map(functools.partial(same, atol=1e-7), metrics, metrics_there)


@pytest.mark.parametrize("broken", ["parameter", "moment"])
def test_a_step_counts_the_arrays_that_are_not_finite(monkeypatch, broken):
  """Loss and gradient are finite, and one update, or what the optimizer keeps, is not."""
  # The loss is cut out: without it a step compiles at once.
  loss = lambda params, teacher, batch, **how: (
    sum(map(jnp.sum, jax.tree.leaves(params))),
    (batch.mask.sum(), {}),
  )
  monkeypatch.setattr(step_lib, "loss_sum", loss)
  params = {"norm": {"scale": jnp.ones(4)}, "head": {"kernel": jnp.ones((3, 4))}}

  def update(gradient, state, params):
    del params
    scale = gradient["norm"]["scale"].at[3].set(jnp.inf)
    wrong, still = gradient | {"norm": {"scale": scale}}, jax.tree.map(jnp.zeros_like, state)
    return (wrong, state) if broken == "parameter" else (still, wrong)

  init = lambda params: jax.tree.map(jnp.zeros_like, params)
  optimizer = optax.GradientTransformation(init, update)
  step = step_lib.make_step(ARCHITECTURE, optimizer, kind="imitation")
  batch = _batch(_samples())
  state, metrics = step(step_lib.init_state(params, optimizer), None, batch)
  assert metrics["not_finite"] == 1
  assert all(np.isfinite(value) for value in metrics.values())
  assert finite.not_finite(state.params) == (["norm/scale"] if broken == "parameter" else [])
  assert metrics["gradient_norm/head/kernel"] == pytest.approx(12**0.5 / batch.mask.sum())


def test_a_sample_that_does_not_fit_is_an_error_not_cut():
  with pytest.raises(
    ValueError, match="sample 1: the sequence has 14 tokens, the batch has room for 13"
  ):
    _batch(_samples(), rows=10, prompt=3)
  with pytest.raises(ValueError, match="both need at least one"):
    _batch([[[1], [2], []]])


def test_flash_attention_refuses_rows_of_several_texts():  # it would see none of the mask
  samples = _samples()
  with pytest.raises(
    ValueError, match='attention implementation "flash" got rows of 4 knowledge texts'
  ):
    teacher_lib.teacher_hidden(
      _teacher(_params(1), samples),
      ARCHITECTURE,
      _batch(samples),
      dtype=jnp.float32,
      attn_impl="flash",
    )


@pytest.mark.parametrize("pack, most", [(False, None), (True, None), (True, 2)])
def test_flash_attention_has_no_loss_for_rows_of_several_samples(monkeypatch, pack, most):
  attend = attention.attend
  monkeypatch.setattr(
    attention,
    "attend",
    lambda q, k, v, mask, *_: attend(q, k, v, jnp.tril(jnp.ones_like(mask)), "xla"),
  )
  samples, params, optimizer = (
    [[prompt, [], response] for prompt, _, response in _samples()[:most]],
    _params(1),
    optax.sgd(1.0),
  )
  state = step_lib.init_state(jax.tree.map(jnp.copy, _params(0)), optimizer)
  batch = _batch(samples, prompt=20, rows=20, pack=pack)
  assert (batch.segments.max() > 1) == pack and (most is None or batch.segments.max() == most)
  state, metrics = step_lib.make_step(ARCHITECTURE, optimizer, attn_impl="flash")(
    state, _teacher(params, samples), batch
  )
  total, count = _reference(_params(0), params, samples)
  np.testing.assert_allclose(metrics["loss"], np.nan if pack else total / count, rtol=2e-5)
  assert np.isnan(state.params["norm"]["scale"]).all() == pack


def _imported(code):
  return subprocess.run(
    [sys.executable, "-c", f"{code}\nimport sys; print(' '.join(sys.modules))"],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()


def test_the_server_side_has_no_environment():
  modules = _imported("import oel_jax.consolidation.trainer")
  assert not [
    name
    for name in modules
    if name.startswith(
      ("textarena", "oel_jax.environments", "oel_jax.extraction", "oel_jax.pocket")
    )
  ]


def test_tokens_that_prompts_and_knowledge_begin_with_are_read_once():
  """Prompt and knowledge begin with a system text: the teacher reads knowledge + prompt[skip:]."""
  samples, student, params, skip = _samples(), _params(0), _params(1), [3, 1, 0, 3]
  heads = [[7, 8, 9][:n] for n in skip]
  begun = [[head + x, head + e, y] for head, (x, e, y) in zip(heads, samples, strict=True)]
  expected = 0.0
  for (prompt, knowledge, response), (rest, _, _) in zip(begun, samples, strict=True):
    p = _log_probabilities(student, prompt + response, 0.7)[len(prompt) - 1 : -1]
    q = _log_probabilities(params, knowledge + rest + response, 0.7)[
      len(knowledge) + len(rest) - 1 : -1
    ]
    expected += (np.exp(p) * (p - q)).sum()
  teacher = teacher_lib.prepare(
    params, ARCHITECTURE, [knowledge for _, knowledge, _ in begun], dtype=jnp.float32, skip=skip
  )
  for how in (dict(prompt=12), dict(prompt=12, pack=False), dict(texts=2, prompt=23, rows=20)):
    np.testing.assert_allclose(
      _loss_sum(student, teacher, _batch(begun, **how))[0], expected, rtol=2e-5
    )
  # What the path without segments does: the skipped tokens stand behind the others.
  rows = _batch(begun, prompt=12, pack=False)
  hidden = teacher_lib.teacher_hidden(
    teacher, ARCHITECTURE, rows, dtype=jnp.float32, attn_impl="xla"
  )
  own = np.int32(skip)[rows.texts[:, 0]]
  skipped = rows._replace(segments=np.where(rows.positions < own[:, None], 0, rows.segments))
  moved = teacher_lib.to_the_end(skipped, own)
  shifted = moved._replace(positions=np.maximum(np.asarray(moved.positions) - own[:, None], 0))
  found = teacher_lib.teacher_hidden(
    teacher._replace(skip=jnp.int32(0)), ARCHITECTURE, shifted, dtype=jnp.float32, attn_impl="xla"
  )
  np.testing.assert_allclose(np.asarray(found)[rows.mask], np.asarray(hidden)[rows.mask], atol=1e-5)
