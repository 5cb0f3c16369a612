"""Safetensors files: the same bits back, and one error that names everything that is wrong with a
file.
"""

import hashlib
import json
import os
import pathlib
import struct

import flax
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from oel_jax.policy import transformer
from oel_jax.policy.architecture import Architecture, named
from oel_jax.policy.weights import native

TINY = named("pocket-tiny")
UNTIED = Architecture(16, 8, 2, 2, 1, 4, 12, qk_norm=False, tied_head=False)


def params_of(a: Architecture):
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: transformer.init(a, jax.random.key(0)))
  return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract)


def flat(params) -> dict[str, np.ndarray]:
  return flax.traverse_util.flatten_dict(params, sep="/")


def read_by_hand(path: pathlib.Path) -> dict[str, tuple[str, list[int], bytes]]:
  """The format itself: eight bytes of header length, a JSON header, the bytes."""
  data = path.read_bytes()
  (length,) = struct.unpack("<Q", data[:8])
  header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
  header.pop("__metadata__", None)
  return {
    name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
    for name, entry in header.items()
  }


@pytest.mark.parametrize("a", [TINY, UNTIED], ids=["tied", "untied"])
def test_float32_comes_back_bit_for_bit(tmp_path, a):
  params = params_of(a)
  params["embed"]["embedding"][0, :3] = -0.0, 1e-42, 3e38  # signed zero, a subnormal, the largest
  native.save(tmp_path / "w.safetensors", params)
  loaded = native.load(tmp_path / "w.safetensors", a)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  for name, leaf in flat(params).items():
    assert flat(loaded)[name].dtype == np.float32
    assert flat(loaded)[name].tobytes() == leaf.tobytes(), name
  by_hand = read_by_hand(tmp_path / "w.safetensors")
  assert {name: entry for name, entry in by_hand.items()} == {
    name: ("F32", list(leaf.shape), leaf.astype("<f4").tobytes())
    for name, leaf in flat(params).items()
  }
  assert ("head/kernel" in by_hand) is not a.tied_head
  assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_device_arrays_and_transposed_views_are_stored_in_the_right_order(tmp_path):
  params = params_of(UNTIED)
  gate = params["layers"]["feedforward"]["gate"]["kernel"]
  params["layers"]["feedforward"]["gate"]["kernel"] = np.asfortranarray(gate)
  params["norm"]["scale"] = jax.numpy.asarray(params["norm"]["scale"])
  native.save(tmp_path / "w.safetensors", params)
  loaded = native.load(tmp_path / "w.safetensors", UNTIED)
  np.testing.assert_array_equal(loaded["layers"]["feedforward"]["gate"]["kernel"], gate)
  np.testing.assert_array_equal(loaded["norm"]["scale"], params["norm"]["scale"])


@pytest.mark.parametrize("dtype,tag", [(np.float16, "F16"), (ml_dtypes.bfloat16, "BF16")])
def test_half_width_storage_rounds_once_and_comes_back_as_float32(tmp_path, dtype, tag):
  params = params_of(TINY)
  native.save(tmp_path / "w.safetensors", params, dtype=dtype)
  assert {entry[0] for entry in read_by_hand(tmp_path / "w.safetensors").values()} == {tag}
  count = sum(leaf.size for leaf in flat(params).values())
  assert 2 * count < (tmp_path / "w.safetensors").stat().st_size < 2 * count + 4096
  for name, leaf in flat(native.load(tmp_path / "w.safetensors", TINY)).items():
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf, flat(params)[name].astype(dtype).astype(np.float32))


def test_a_value_that_float16_cannot_hold_is_not_stored_as_infinity(tmp_path):
  params = params_of(UNTIED)
  params["norm"]["scale"][0] = 1e5
  with pytest.raises(ValueError, match="norm/scale"):
    native.save(tmp_path / "w.safetensors", params, dtype=np.float16)
  assert not list(tmp_path.iterdir())


def test_metadata_and_digest(tmp_path):
  path = tmp_path / "w.safetensors"
  native.save(path, params_of(UNTIED), metadata={"architecture": "x", "seed": "0"})
  assert native.metadata(path) == {"architecture": "x", "seed": "0"}
  assert native.digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
  native.save(path, params_of(UNTIED))
  assert native.metadata(path) == {}


def test_everything_that_does_not_fit_is_in_one_error(tmp_path):
  tensors = flat(params_of(TINY))
  del tensors["norm/scale"], tensors["layers/attention/q/kernel"]
  tensors["layers/feedforward/up/kernel"] = np.zeros((2, 32, 65), np.float32)
  tensors["extra/bias"] = np.zeros(3, np.float32)
  tensors["head/kernel"] = tensors["embed/embedding"]  # a tied head, stored twice
  safetensors.numpy.save_file(tensors, tmp_path / "w.safetensors")
  with pytest.raises(ValueError) as error:
    native.load(tmp_path / "w.safetensors", TINY)
  text = str(error.value)
  assert str(tmp_path / "w.safetensors") in text
  for part in (
    "norm/scale: missing",
    "layers/attention/q/kernel: missing",
    "extra/bias: unknown",
    "head/kernel: unknown",
    "layers/feedforward/up/kernel: (2, 32, 65) instead of (2, 32, 64)",
  ):
    assert part in text
  assert text.count("missing") == 2 and text.count("unknown") == 2 and text.count("instead") == 1


def test_another_size_is_refused(tmp_path):
  native.save(tmp_path / "w.safetensors", params_of(TINY))
  with pytest.raises(ValueError, match=r"norm/scale: \(32,\) instead of \(128,\)"):
    native.load(tmp_path / "w.safetensors", named("pocket"))


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
  path = tmp_path / "w.safetensors"
  native.save(path, params_of(TINY))
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ValueError, match="w.safetensors.*not a whole safetensors file"):
    native.load(path, TINY)


def test_a_file_of_another_kind_is_named(tmp_path):
  path = tmp_path / "w.safetensors"
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
  with pytest.raises(ValueError, match="w.safetensors.*not a whole safetensors file.*git lfs pull"):
    native.load(path, TINY)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"config\.policy\.weights.*nowhere\.safetensors"):
    native.load(tmp_path / "nowhere.safetensors", TINY)
  with pytest.raises(FileNotFoundError):
    native.load(tmp_path, TINY)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
  path = tmp_path / "w.safetensors"
  native.save(path, params_of(UNTIED))
  before = path.read_bytes()

  def full(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="w.safetensors"):
    native.save(path, params_of(UNTIED))
  assert path.read_bytes() == before
  assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
