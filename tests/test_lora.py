"""Low-rank training: what is learned are the adapters, by the gradient in them; who samples, is
probed and is kept are the weights with them; and a run that was cut off ends with the same bits.
"""

import contextlib
import dataclasses
import json

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import safetensors.numpy
import test_step
import test_trainer

from oel_jax import config as config_lib
from oel_jax.consolidation import lora, restore
from oel_jax.consolidation import step as step_lib
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import load, transformer
from oel_jax.policy.weights import huggingface, peft
from oel_jax.runtime import mesh as mesh_lib

policy = test_trainer.policy
RANK, SCALE = 3, 2.0
# By hand, what is flattened: of kernels [L, in, heads, size], [L, heads, size, out], [L, in, out].
INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


def _flat(tree):
  return {
    path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()
  }


def _adapters(params, seed=5):
  """Of which neither factor is 0."""
  made = lora.init(params, RANK, jax.random.key(seed))
  leaves, tree = jax.tree.flatten(made)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  noise = (0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves))
  return tree.unflatten([leaf + more for leaf, more in zip(leaves, noise)])


def _by_hand(params, adapters):
  """The weights with their adapters, layer by layer in float64."""
  whole, learned = _flat(params), _flat(adapters)
  for path in {path.rpartition("/")[0] for path in learned}:
    name, W = path.split("/")[-2], whole[path].astype(np.float64)
    a, b = (learned[f"{path}/{x}"].astype(np.float64) for x in "ab")
    layers = [W[i] + SCALE * (a[i] @ b[i]).reshape(W.shape[1:]) for i in range(len(W))]
    assert a.shape[1] == np.prod(W.shape[1 : 1 + INPUTS[name]])
    whole[path] = np.stack(layers)
  return whole


def test_adapters_are_added_to_the_matrices_of_layers_alone():
  params = test_step._params(0)
  fresh = lora.init(params, RANK, jax.random.key(1))
  jax.tree.map(np.testing.assert_array_equal, lora.merge(params, fresh, SCALE), params)
  assert {path.split("/")[-3] for path in _flat(fresh)} == set(INPUTS)
  assert all((leaf == 0).all() == path.endswith("/b") for path, leaf in _flat(fresh).items())
  adapters = _adapters(params)
  wanted = _by_hand(params, adapters)
  for path, leaf in _flat(lora.merge(params, adapters, SCALE)).items():
    np.testing.assert_allclose(leaf, wanted[path], rtol=1e-5, atol=1e-6, err_msg=path)
    assert np.array_equal(leaf, _flat(params)[path]) == ("kernel" not in path or "head" in path)
  halves = lora.merge(jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params), adapters, SCALE)
  assert {leaf.dtype for leaf in jax.tree.leaves(halves)} == {jnp.dtype("bfloat16")}


def _one_step(mesh=None, unroll=False):
  """(the adapters, their gradient by the step, its metrics)."""
  base, params, samples = test_step._params(0), test_step._params(1), test_step._samples()
  batch, optimizer, shardings = test_step._batch(samples), optax.sgd(1.0), None
  adapters = _adapters(base)
  begin = lambda adapters: step_lib.init_state(adapters, optimizer)
  if mesh:
    params, base = (jax.device_put(x, mesh_lib.param_shardings(mesh, x)) for x in (params, base))
    abstract = mesh_lib.abstract_init(begin, mesh, adapters)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    batch = jax.device_put(mesh_lib.pad_batch(batch, mesh), mesh_lib.batch_sharding(mesh))
    state = mesh_lib.sharded_init(begin, mesh, adapters)
  else:
    state = begin(jax.tree.map(jnp.copy, adapters))
  how = dict(k=4, chunk=7, shardings=shardings, lora_scale=SCALE)
  step = step_lib.make_step(test_step.ARCHITECTURE, optimizer, **how)
  teacher = test_step._teacher(params, samples, unroll=unroll)
  state, metrics = step(state, teacher, batch, base=base)
  gradient = jax.tree.map(
    lambda old, new: np.asarray(old) - np.asarray(new), adapters, state.params
  )
  return adapters, gradient, metrics


@pytest.mark.parametrize("unroll", [False, True])
def test_the_gradient_is_that_in_the_adapters(unroll):
  """Beside that of the plain loss in weights which are put together by other means."""
  adapters, gradient, metrics = _one_step(unroll=unroll)
  base, samples = test_step._params(0), test_step._samples()
  teacher, batch = test_step._teacher(test_step._params(1), samples), test_step._batch(samples)

  def mean(adapters):
    learned, whole = (flax.traverse_util.flatten_dict(x, sep="/") for x in (adapters, base))
    for path in {path.rpartition("/")[0] for path in learned}:
      product = jax.vmap(jnp.dot)(learned[f"{path}/a"], learned[f"{path}/b"])
      whole[path] += SCALE * product.reshape(whole[path].shape)
    total, count = test_step._loss_sum(
      flax.traverse_util.unflatten_dict(whole, sep="/"), teacher, batch
    )
    return total / count

  wanted = jax.grad(mean)(adapters)
  assert all(leaf.any() for leaf in jax.tree.leaves(wanted))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), gradient, wanted)
  assert metrics["loss"] == pytest.approx(float(mean(adapters)), rel=1e-5)
  norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(wanted)))
  assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
  "shape",
  [
    dict(data=2, fsdp=1, tensor=1),
    # On few cores XLA's CPU runtime may wait for ever here (JAX 0.10.2): the sums over devices do
    # not depend on one another, and each holds a thread until its partner comes.
    pytest.param(dict(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
    pytest.param(dict(data=1, fsdp=4, tensor=1), marks=pytest.mark.slow),
  ],
)
def test_the_gradient_does_not_depend_on_the_devices(shape):
  devices = jax.devices()[: int(np.prod(list(shape.values())))]
  _, one, measured = _one_step()
  _, many, there = _one_step(mesh_lib.make_mesh(ml_collections.ConfigDict(shape), devices))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), many, one)
  assert there["loss"] == pytest.approx(float(measured["loss"]), rel=1e-5)


def test_a_round_learns_adapters_and_leaves_weights(policy, tmp_path):
  """Cut off and gone on with it ends with the bits of one that was not; what is left are whole
  weights, which moved in the layers' matrices alone, by products of the rank that was asked for.
  """
  config = test_trainer._config(lora_rank=2, lora_alpha=4.0, learning_rate=1e-2)
  before = jax.device_get(policy.params)
  whole, spent = test_trainer._run(policy, tmp_path / "whole", config)
  assert spent["trained"] > 0
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(policy.params), before)
  for path, leaf in _flat(whole).items():
    moved = (leaf - _flat(before)[path]).astype(np.float64)
    if path.split("/")[-2] not in INPUTS:
      assert not moved.any(), path
      continue
    inputs = int(np.prod(leaf.shape[1 : 1 + INPUTS[path.split("/")[-2]]]))
    for layer in moved.reshape(len(moved), inputs, -1):
      sizes = np.linalg.svd(layer, compute_uv=False)
      assert sizes[1] > 20 * sizes[2:].max(initial=0) and sizes[0] > 1e-4, (path, sizes)
  lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
  probed = [line["probe_kl"] for line in lines if "probe_kl" in line]
  assert probed[-1] < probed[0]

  class Stop(Exception):
    pass

  done = []

  def advance(n, note=""):
    done.append(n)
    if len(done) == 5:  # step 4 is saved
      raise Stop

  with pytest.raises(Stop):
    test_trainer._run(policy, tmp_path / "cut", config, advance)
  folder = tmp_path / "cut/checkpoints"
  here = lambda: restore.trained_params(config, policy, folder, test_trainer._one_device())
  assert here() is None  # of adapters nobody goes on before they are done
  again, _ = test_trainer._run(policy, tmp_path / "cut", config)
  jax.tree.map(np.testing.assert_array_equal, again, whole)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(here()), whole)
  assert sorted(path.name for path in folder.iterdir()) == ["weights"]


def test_adapters_of_another_round_or_seed_are_drawn_anew(policy):
  config = test_trainer._config(lora_rank=2)
  begin = restore.beginning(restore.make_optimizer(config), config.lora_rank)
  drawn = [
    _flat(
      begin(*restore.begins_with(config, test_trainer._task(policy, **which), policy.params)).params
    )
    for which in ({}, {}, {"round": 2}, {"seed": 4})
  ]
  path = "layers/attention/q/kernel/a"
  assert np.array_equal(drawn[0][path], drawn[1][path])
  assert not any(np.isclose(drawn[0][path], other[path]).any() for other in drawn[2:])
  inputs = drawn[0][path].shape[1]
  assert np.abs(drawn[0][path]).max() <= inputs**-0.5
  assert np.abs(drawn[0][path]).mean() == pytest.approx(0.5 * inputs**-0.5, rel=0.2)


def test_a_state_is_small(policy):
  """AdamW's moments are of the adapters alone."""
  config = test_trainer._config(lora_rank=1)
  optimizer = restore.make_optimizer(config)
  given = restore.begins_with(config, test_trainer._task(policy), policy.params)
  state = restore.beginning(optimizer, 1)(*given)
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  a = policy.architecture
  heads, groups = a.heads * a.head_size, a.kv_heads * a.head_size
  each = 2 * (a.width + heads) + 2 * (a.width + groups) + 3 * (a.width + a.feedforward)
  assert count(state.params) == a.layers * each
  assert count(state.optimizer) <= 2 * count(state.params) + 8


@pytest.mark.parametrize(
  "field, value, right",
  [
    ("lora_rank", -1, "0 or more"),
    ("lora_alpha", 0.0, "more than 0"),
    ("lora_alpha", 16.0, "32 where consolidation.lora_rank is 0"),
  ],
)
def test_what_cannot_be_a_rank_is_refused(field, value, right):
  config = config_lib.default()
  config.consolidation[field] = value
  with pytest.raises(
    ValueError, match=f"config.consolidation.{field} is {value}: it must be {right}"
  ):
    config_lib.validate(config)


def test_every_matrix_of_a_layer_has_adapters():
  """Those that stand between two dimensions of a layer; not norms, biases, embedding and head."""
  for name in ("pocket-tiny", "qwen3-8b"):
    shapes = jax.eval_shape(
      lambda key: transformer.init(architecture_lib.named(name), key), jax.random.key(0)
    )
    found = jax.eval_shape(lambda x: lora.init(x, 8, jax.random.key(0)), shapes)
    whole = flax.traverse_util.flatten_dict(shapes, sep="/")
    wanted = {
      path
      for path, leaf in whole.items()
      if path.startswith("layers/") and leaf.ndim > 2 and path.endswith("kernel")
    }
    assert {
      path.rpartition("/")[0] for path in flax.traverse_util.flatten_dict(found, sep="/")
    } == wanted


@pytest.mark.parametrize("name, rank", [("pocket-tiny", 5), ("pocket-tiny", 400)])
def test_what_was_added_is_written_as_an_adapter(name, rank, tmp_path):
  """Beside the tensors of both models as `huggingface.save` writes them; a rank above a matrix's
  own is filled with zeros.
  """
  architecture = architecture_lib.named(name)
  base = transformer.init(architecture, jax.random.key(0))
  whole = lora.merge(base, _adapters(base), SCALE)
  how = dict(rank=rank, name="base")
  missed = peft.save(tmp_path / "adapter", base, whole, architecture, **how)
  assert 0 <= missed < 1e-5
  added = safetensors.numpy.load_file(tmp_path / "adapter" / peft.WEIGHTS)
  config = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
  assert config["r"] == config["lora_alpha"] == rank
  assert config["base_model_name_or_path"] == "base" and config["peft_type"] == "LORA"
  stored = []
  for params, folder in ((base, "before"), (whole, "after")):
    huggingface.save(tmp_path / folder, params, architecture, dtype=np.float32)
    stored.append(safetensors.numpy.load_file(tmp_path / folder / "model.safetensors"))
  before, after = stored
  moved = {key for key in after if not np.array_equal(after[key], before[key])}
  assert {key.split(".")[-2] for key in moved} == set(config["target_modules"])
  assert len(added) == 2 * len(moved) == 2 * 7 * architecture.layers
  for key in moved:
    above = f"base_model.model.{key.removesuffix('.weight')}"
    b, a = (added[f"{above}.lora_{x}.weight"] for x in "BA")
    assert (b.shape, a.shape) == ((len(after[key]), rank), (rank, after[key].shape[1]))
    np.testing.assert_allclose(before[key] + b @ a, after[key], atol=2e-6)


def test_what_of_a_product_rounding_to_bfloat16_leaves():
  """The figures of experiments/README.md: weights of 0.02, 1024 inputs, rank 16, alpha 32, along
  the product, in float64.
  """
  rng, left = np.random.default_rng(0), []
  weights = (0.02 * rng.standard_normal((1024, 1024))).astype("bfloat16").astype(np.float64)
  a = rng.uniform(-1, 1, (1024, 16)) / 32
  for most in (1e-4, 3e-4, 1e-3):
    product = 2 * (a @ rng.uniform(-most, most, (16, 1024)))
    moved = (weights + product).astype("bfloat16").astype(np.float64) - weights
    left.append((moved * product).sum() / np.square(product).sum())
  np.testing.assert_allclose(left, [0.24, 0.61, 0.98], atol=0.01)


def test_another_alpha_is_refused_in_the_middle_of_a_round(policy, tmp_path):
  make = lambda alpha: test_trainer._config(
    lora_rank=2, lora_alpha=alpha, steps=2, checkpoint_every=1
  )

  def stop(n, note=""):
    raise _Stop

  with pytest.raises(_Stop):
    test_trainer._run(policy, tmp_path, make(4.0), stop)
  with pytest.raises(ValueError, match="lora_alpha 4.0, which is 8.0 now: set it to 4.0"):
    test_trainer._run(policy, tmp_path, make(8.0))
  test_trainer._run(policy, tmp_path, make(4.0))


def test_weights_that_are_not_learned_are_held_as_they_are_computed_with(policy, tmp_path):
  """In bfloat16 half the room: what a round leaves has the types that it began with, and serves
  again.
  """
  narrow = transformer.cast(policy.params, jnp.bfloat16, tables=True)
  policy = dataclasses.replace(policy, params=narrow, dtype=jnp.dtype(jnp.bfloat16))
  config = test_trainer._config(lora_rank=2, learning_rate=1e-2, steps=2)
  left, _ = test_trainer._run(policy, tmp_path, config)
  kinds = lambda tree: {path: leaf.dtype for path, leaf in _flat(tree).items()}
  assert kinds(left) == kinds(narrow) and len(set(kinds(left).values())) == 2
  read = restore.trained_params(
    config, policy, tmp_path / "checkpoints", test_trainer._one_device()
  )
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(read), left)
  path = "layers/feedforward/up/kernel"
  assert not np.array_equal(_flat(left)[path], _flat(narrow)[path])


def test_loaded_narrow_a_policy_has_its_matrices_in_the_type_that_it_computes_in():
  config = config_lib.default().policy
  config.update(weights=config_lib.POLICIES["pocket"], compute_dtype="bfloat16")
  mesh = test_trainer._one_device()
  whole, narrow = (load.load_policy(config, mesh, narrow=narrow) for narrow in (False, True))
  for path, leaf in _flat(narrow.params).items():
    wanted = _flat(whole.params)[path]
    assert leaf.dtype == ("bfloat16" if wanted.ndim > 1 and "norm" not in path else "float32"), path
    assert np.array_equal(leaf, wanted.astype(leaf.dtype))


class _Stop(Exception):
  pass


@pytest.mark.parametrize("before, now", [(2, 0), (2, 3), (0, 2)])
@pytest.mark.parametrize("done", [False, True])
def test_another_rank_is_refused_by_its_name_and_nothing_is_lost(
  policy, tmp_path, before, now, done
):
  """In the middle of a round and after its end, by who trains and by who reads what is left; given
  the rank that it was, it goes on.
  """
  make = lambda rank: test_trainer._config(lora_rank=rank, steps=2, checkpoint_every=1, log_probe=0)

  def stop(n, note=""):
    raise _Stop

  with contextlib.nullcontext() if done else pytest.raises(_Stop):
    test_trainer._run(policy, tmp_path, make(before), (lambda *_: None) if done else stop)
  checkpoints = tmp_path / "checkpoints"
  files = sorted(path for path in checkpoints.rglob("*") if path.is_file())
  told = f"config.consolidation.lora_rank was {before}; now it is {now}: set it to {before}"
  with pytest.raises(ValueError, match=told):
    test_trainer._run(policy, tmp_path, make(now))
  here = lambda config: restore.trained_params(
    config, policy, checkpoints, test_trainer._one_device()
  )
  with pytest.raises(ValueError, match=told):
    here(make(now))
  assert sorted(path for path in checkpoints.rglob("*") if path.is_file()) == files
  left, _ = test_trainer._run(policy, tmp_path, make(before))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(here(make(before))), left)
