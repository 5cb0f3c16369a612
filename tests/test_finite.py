"""Numbers that are none: found in trees, refused in every file of weights, and told with the
place.
"""

import re

import flax
import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from oel_jax.policy import transformer
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.weights import huggingface, native, place
from oel_jax.runtime import finite, mesh

TINY = Architecture(16, 8, 2, 2, 1, 4, 12, qk_norm=False, tied_head=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8])
def test_finite_tensors_come_back_as_they_are(dtype):
  tensor = np.arange(-6, 6).reshape(3, 4).astype(dtype)
  assert finite.checked("x", "y", tensor) is tensor
  assert finite.checked("x", "y", tensor[:0]).shape == (0, 4)


@pytest.mark.parametrize(
  "dtype, value",
  [
    (np.float32, np.nan),
    (np.float16, np.inf),
    (ml_dtypes.bfloat16, -np.inf),
    (np.float64, 1e39),
  ],
)
def test_the_place_of_a_number_that_is_none_is_told(monkeypatch, dtype, value):
  # The place is in the third slice, and the last is shorter.
  monkeypatch.setattr(finite, "SLICE", 5)
  tensor = np.zeros((3, 4), dtype)
  tensor[2, 3] = value
  told = f"FILE: a.weight holds {value} at [2, 3], which is not finite"
  with pytest.raises(ValueError, match=re.escape(told)):
    finite.checked("FILE", "a.weight", tensor)


def test_the_largest_and_smallest_numbers_are_numbers():
  most = np.finfo(np.float32).max
  finite.checked("x", "y", np.float32([most, -most, 1e-45, -0.0]))
  finite.checked("x", "y", np.array([3.3e38, -3.3e38], ml_dtypes.bfloat16))


def test_not_finite_names_the_paths_of_a_tree():
  tree = {"a": {"b": jnp.ones(3), "c": jnp.array([1, jnp.nan])}, "n": jnp.int32(2), "z": (jnp.inf,)}
  assert finite.not_finite(tree) == ["a/c", "z/0"]


def test_a_long_list_is_cut():
  assert finite.listed(["a", "b"]) == "a, b"
  assert finite.listed(list("abcdef")) == "a, b, c, d and 2 more"


def _params():
  """Random parameters of TINY by their paths."""
  rng = np.random.default_rng(0)
  abstract = flax.traverse_util.flatten_dict(transformer.abstract(TINY), sep="/")
  draw = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)
  return {path: draw(leaf) for path, leaf in abstract.items()}


def test_a_file_of_ours_with_a_number_that_is_none_is_refused(tmp_path):
  path, flat = tmp_path / "w.safetensors", _params()
  flat["layers/feedforward/up/kernel"][1, 2, 3] = np.nan
  safetensors.numpy.save_file(flat, path)
  told = r"w.safetensors: layers/feedforward/up/kernel holds nan at \[1, 2, 3\]"
  with pytest.raises(ValueError, match=told):
    native.load(path, TINY)


@pytest.mark.parametrize("dtype, value", [(np.float32, np.nan), (ml_dtypes.bfloat16, np.inf)])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_folder_with_a_number_that_is_none_is_refused(tmp_path, dtype, value, name):
  params = flax.traverse_util.unflatten_dict(_params(), sep="/")
  huggingface.save(tmp_path, params, TINY, dtype=dtype)
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  tensors[name][2, 1] = value
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=rf"{name} holds {value} at \[2, 1\], which is not finite"):
    huggingface.load(tmp_path, TINY)


def test_a_number_that_is_none_is_told_of_on_a_mesh(tmp_path, monkeypatch):
  huggingface.save(tmp_path, flax.traverse_util.unflatten_dict(_params(), sep="/"), TINY)
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  name = "model.layers.1.mlp.down_proj.weight"
  tensors[name][7, 11] = np.nan  # on the last device only
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  devices = mesh.make_mesh(ml_collections.ConfigDict(dict(data=2, fsdp=4, tensor=1)))
  places = mesh.param_shardings(devices, transformer.abstract(TINY))
  with pytest.raises(ValueError, match=rf"{name} holds nan at \[7, 11\], which is not finite"):
    huggingface.load(tmp_path, TINY, shardings=places)
  monkeypatch.setattr(finite, "checked", lambda source, name, tensor: tensor)
  with pytest.raises(ValueError, match="down/kernel of layer 1: a device finds a number"):
    huggingface.load(tmp_path, TINY, shardings=places)


def test_a_number_beyond_float32_is_refused_in_a_folder_of_float64(tmp_path):
  huggingface.save(tmp_path, flax.traverse_util.unflatten_dict(_params(), sep="/"), TINY)
  name = "model.layers.0.mlp.down_proj.weight"
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  tensors[name] = tensors[name].astype(np.float64)
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  found = huggingface.load(tmp_path, TINY)["layers"]["feedforward"]["down"]["kernel"][0]
  np.testing.assert_array_equal(found, tensors[name].T.astype(np.float32))
  tensors[name][1, 2] = 1e300
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=rf"{name} holds 1e\+300 at \[1, 2\], which is not finite"):
    huggingface.load(tmp_path, TINY)


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_number_that_is_none_is_seen_on_a_device(device, dtype):
  numbers = np.random.default_rng(0).standard_normal((65, 33)).astype(dtype)
  numbers[0] = -numbers[0] * 0
  for value in (1.0, np.nan, -np.nan, np.inf, -np.inf):
    numbers[40, 7] = value
    _, finite_there = jax.jit(place.plain)(jax.device_put(numbers, jax.devices(device)[0]))
    assert finite_there == np.isfinite(value)
