"""Batch, teacher and step: alignment, independence of micro-batch and devices, and that a step does what its loss says."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import step as step_lib
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import model
from oel_jax.runtime import mesh as mesh_lib

ARCHITECTURE = architecture_lib.Architecture(31, 16, 2, 2, 1, 8, 24, rope_theta=1e4)
LENGTHS = [(3, 4, 1), (5, 0, 9), (2, 7, 3), (8, 2, 6)]  # prompt, knowledge, response of four samples


@functools.cache
def _params(seed):
  return jax.jit(lambda key: model.init(ARCHITECTURE, key))(jax.random.key(seed))


def _samples(lengths=LENGTHS, seed=0):
  rng = np.random.default_rng(seed)
  return [[rng.integers(3, 31, n).tolist() for n in sample] for sample in lengths]


def _batch(samples, rows=10, prompt=9, knowledge=8, pad_id=0):
  prompts, known, responses = zip(*[(p, k, r) for p, k, r in samples])
  return batch_lib.assemble(
      prompts, known, responses, pad_id=pad_id, student_length=prompt + rows, teacher_length=knowledge + prompt + rows, response_length=rows
  )


_hidden = jax.jit(lambda params, tokens: model.apply(params, ARCHITECTURE, tokens, jnp.arange(32)[None], jnp.ones_like(tokens))[0])


def _log_probabilities(params, ids, temperature):
  """Next-token log-probabilities of one unpadded sequence, softmax in float64."""
  T = len(ids)
  tokens = np.zeros((1, 32), np.int32)  # one shape, one compilation; what stands behind a token does not reach it
  tokens[0, :T] = ids
  hidden = _hidden(params, tokens)[:, :T]
  logits = np.asarray(hidden[0], np.float64) @ np.asarray(model.head(params), np.float64).T / temperature
  logits -= logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _reference(student, teacher, samples, temperature=0.7, shift=0):
  """Sum of KL(student ‖ teacher) over the responses, sample by sample, without padding, and the number of tokens."""
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
  return step_lib.loss_sum(
      student, teacher, batch, architecture=ARCHITECTURE, kind=kind, support="full", k=4, temperature=0.7, chunk=7, dtype=jnp.float32, remat="none"
  )


def test_loss_equals_float64_reference_sample_by_sample():  # traps 10, 11
  samples, student, teacher = _samples(), _params(0), _params(1)
  total, count = _loss_sum(student, teacher, _batch(samples))
  expected, tokens = _reference(student, teacher, samples)
  assert count == tokens
  np.testing.assert_allclose(total, expected, rtol=2e-5)
  shifted, _ = _reference(student, teacher, samples, shift=1)
  assert abs(shifted - expected) > 0.01 * expected  # the reference itself would notice an off-by-one


def test_empty_knowledge_and_equal_weights_give_exactly_zero_and_a_shift_does_not():  # trap 10
  samples = [[p, [], r] for p, _, r in _samples()]
  batch, params = _batch(samples, knowledge=0), _params(0)
  assert float(_loss_sum(params, params, batch)[0]) == 0.0
  off = batch._replace(teacher_start=batch.teacher_start + 1)
  assert float(_loss_sum(params, params, off)[0]) > 1e-3


def test_padding_id_and_extra_room_change_nothing():  # traps 8, 11
  samples, student, teacher = _samples(), _params(0), _params(1)
  tight = _loss_sum(student, teacher, _batch(samples))[0]
  roomy = _loss_sum(student, teacher, _batch(samples, rows=16, prompt=20, knowledge=11, pad_id=5))[0]
  np.testing.assert_allclose(tight, roomy, rtol=1e-5)


def test_imitation_is_negative_log_likelihood_at_temperature_one():
  samples, student = _samples(), _params(0)
  total, _ = _loss_sum(student, _params(1), _batch(samples), "imitation")
  expected = 0.0
  for prompt, _, response in samples:
    logp = _log_probabilities(student, prompt + response, 1.0)[len(prompt) - 1 : -1]
    expected -= logp[np.arange(len(response)), response].sum()
  np.testing.assert_allclose(total, expected, rtol=1e-5)


def _gradient_after_one_step(micro_batch, mesh=None, lengths=None):
  """One step of plain gradient descent at rate 1: the change of the parameters is the gradient."""
  samples = _samples(lengths or [(3, 4, 1), (5, 0, 10), (2, 7, 1), (8, 2, 10)])
  optimizer, student, teacher = optax.sgd(1.0), _params(0), _params(1)
  batch, shardings = _batch(samples), None
  if mesh is not None:
    begin = lambda params: step_lib.init_state(params, optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, mesh_lib.abstract_init(begin, mesh, student))
    state = mesh_lib.sharded_init(begin, mesh, student)
    batch = jax.device_put(mesh_lib.pad_batch(batch, mesh), mesh_lib.batch_sharding(mesh))
  else:
    state = step_lib.init_state(jax.tree.map(jnp.copy, student), optimizer)
  step = step_lib.make_step(ARCHITECTURE, optimizer, k=4, chunk=7, micro_batch=micro_batch, shardings=shardings)
  state, metrics = step(state, teacher, batch)
  return jax.tree.map(lambda new, old: np.asarray(old) - np.asarray(new), state.params, student), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_gradient_does_not_depend_on_the_micro_batch(micro_batch):  # trap 6: responses of 1 and of 10 tokens
  whole, measured = _gradient_after_one_step(None)
  cut, measured_cut = _gradient_after_one_step(micro_batch)
  assert measured["tokens"] == measured_cut["tokens"] == 22
  np.testing.assert_allclose(measured["loss"], measured_cut["loss"], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole, cut)
  norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(whole)))
  np.testing.assert_allclose(measured["gradient_norm"], norm, rtol=1e-3)


@pytest.mark.parametrize("shape", [dict(data=8, fsdp=1, tensor=1), dict(data=2, fsdp=2, tensor=2)])
def test_gradient_does_not_depend_on_the_devices(shape):  # trap 6; 3 items on 8 devices: trap 26
  import ml_collections

  lengths = [(3, 4, 1), (5, 0, 10), (8, 2, 10)]
  one, measured = _gradient_after_one_step(None, lengths=lengths)
  many, measured_many = _gradient_after_one_step(None, mesh_lib.make_mesh(ml_collections.ConfigDict(shape)), lengths)
  assert measured["tokens"] == measured_many["tokens"] == 21
  np.testing.assert_allclose(measured["loss"], measured_many["loss"], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, many)


def test_teacher_survives_a_donating_step():  # trap 27: student and teacher begin as the same arrays
  params = _params(0)
  before = jax.tree.map(np.array, params)
  optimizer = optax.adamw(1e-2)
  state = mesh_lib.sharded_init(lambda p: step_lib.init_state(p, optimizer), mesh_lib.make_mesh(_one_device(), jax.devices()[:1]), params)
  step = step_lib.make_step(ARCHITECTURE, optimizer, k=4)
  state, _ = step(state, params, _batch(_samples()))
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, params), before)
  assert not np.array_equal(np.array(state.params["norm"]["scale"]), before["norm"]["scale"])


def _one_device():
  import ml_collections

  return ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1))


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_divergence_to_the_teacher_falls_on_a_fixed_batch(kind):  # trap 41
  optimizer, batch, teacher = optax.adamw(3e-3), _batch(_samples()), _params(1)
  state = step_lib.init_state(jax.tree.map(jnp.copy, _params(0)), optimizer)  # it is donated
  step = step_lib.make_step(ARCHITECTURE, optimizer, kind=kind, k=4)
  probe = step_lib.make_probe(ARCHITECTURE, k=4, temperature=0.7, chunk=64)
  first = float(probe(state.params, teacher, batch)["reverse_kl"])
  for _ in range(20):
    state, _ = step(state, teacher, batch)
  assert float(probe(state.params, teacher, batch)["reverse_kl"]) < 0.5 * first
  assert int(state.step) == 20


def test_a_sample_that_does_not_fit_is_an_error_not_cut():
  with pytest.raises(ValueError, match="sample 1: the student's sequence has 14 tokens, the batch has room for 13"):
    _batch(_samples(), rows=10, prompt=3)
  with pytest.raises(ValueError, match="both need at least one"):
    _batch([[[1], [2], []]])


def test_micro_batch_must_divide_the_batch():
  step = step_lib.make_step(ARCHITECTURE, optax.sgd(1.0), micro_batch=3)
  with pytest.raises(ValueError, match="micro_batch is 3"):
    step(step_lib.init_state(_params(0), optax.sgd(1.0)), _params(1), _batch(_samples()))


def _imported(code):
  return subprocess.run([sys.executable, "-c", f"{code}\nimport sys; print(' '.join(sys.modules))"], capture_output=True, text=True, check=True).stdout.split()


def test_the_server_side_has_no_environment():
  modules = _imported("import oel_jax.consolidation.train")
  assert not [name for name in modules if name.startswith(("textarena", "oel_jax.deployment", "oel_jax.extraction", "oel_jax.pocket"))]


def test_importing_the_step_pulls_in_jax_and_flax_only():
  modules = _imported("import oel_jax.consolidation.step")
  assert not [name for name in modules if name.split(".")[0] in ("optax", "orbax", "grain", "sentencepiece", "ml_collections", "textarena")]
