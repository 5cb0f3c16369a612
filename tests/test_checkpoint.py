"""Checkpoints: bit for bit, on other numbers of devices, after damage, after a kill, with a disk
that takes no more.
"""

import collections
import fractions
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from processes import ROOT, python_path

from oel_jax.runtime import checksum
from oel_jax.runtime.checkpoint import Checkpoints

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

# Run by other processes, each with its own number of devices: the same state is computed there and
# here.
SCRIPT = """
import sys, jax, jax.numpy as jnp, ml_collections, numpy as np
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.checkpoint import Checkpoints
from test_checkpoint import OPTIMIZER

def init(seed):
  embedding = jnp.sin(jnp.arange(64 * 16.0) * seed).reshape(64, 16)
  params = {"embed": {"embedding": embedding}, "norm": {"scale": jnp.ones(16) / seed}}
  opt_state = OPTIMIZER.init(params)
  grads = jax.tree.map(lambda p: jnp.cos(p), params)
  opt_state = OPTIMIZER.update(grads, opt_state, params)[1]
  return {"params": params, "opt_state": opt_state, "step": jnp.int32(seed)}

command, directory, fsdp, tensor = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
mesh = mesh_lib.make_mesh(ml_collections.ConfigDict(dict(data=-1, fsdp=fsdp, tensor=tensor)))
with Checkpoints(directory) as checkpoints:
  if command == "save":
    checkpoints.save(7, mesh_lib.sharded_init(init, mesh, 7), {"iterator": {"next": 11}})
    made = jax.tree.leaves(mesh_lib.sharded_init(init, mesh, 7))
    np.savez(directory + ".npz", *[np.asarray(leaf) for leaf in made])
  else:
    abstract = mesh_lib.abstract_init(init, mesh, 7)
    step, state, extra = checkpoints.restore(abstract)
    assert step == 7 and extra == {"iterator": {"next": 11}}
    expected = np.load(directory + ".npz")
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True)
    for i, (leaf, wanted) in enumerate(pairs):
      assert leaf.sharding == wanted.sharding, (i, leaf.sharding)
      assert leaf.dtype == expected[f"arr_{i}"].dtype, i
      assert np.asarray(leaf).tobytes() == expected[f"arr_{i}"].tobytes(), i
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
print(len(jax.devices()), "devices: done")
"""


def run(script: str, *args, devices: int = 1) -> subprocess.CompletedProcess:
  count = "--xla_force_host_platform_device_count="
  env = dict(
    os.environ,
    XLA_FLAGS=re.sub(rf"{count}\d+", f"{count}{devices}", os.environ["XLA_FLAGS"]),
    JAX_PLATFORMS="cpu",
    PYTHONPATH=python_path(ROOT, ROOT / "tests"),
  )
  return subprocess.run(
    [sys.executable, "-c", script, *map(str, args)],
    env=env,
    capture_output=True,
    text=True,
    timeout=120,
  )


def make_state(seed: int):
  params = {
    "a": {"b": jnp.sin(jnp.arange(600.0).reshape(30, 20) * seed)},
    "c": jnp.arange(7.0) / seed,
  }
  opt_state = OPTIMIZER.init(params)
  return {
    "params": params,
    "opt_state": OPTIMIZER.update(params, opt_state, params)[1],
    "step": jnp.int32(seed),
  }


def abstract(state):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
  )


def same_bits(a, b) -> bool:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  return jax.tree.all(
    jax.tree.map(
      lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b
    )
  )


def test_saved_on_eight_devices_restored_on_one_and_on_four(tmp_path):
  directory = tmp_path / "checkpoints"
  saved = run(SCRIPT, "save", directory, 2, 2, devices=8)
  assert "8 devices: done" in saved.stdout, saved.stderr
  for devices, fsdp, tensor in ((1, 1, 1), (4, 4, 1)):
    restored = run(SCRIPT, "restore", directory, fsdp, tensor, devices=devices)
    assert f"{devices} devices: done" in restored.stdout, restored.stderr


def test_keeps_the_latest_two_and_restores_bits_and_types(tmp_path):
  with Checkpoints(tmp_path / "c") as checkpoints:
    assert checkpoints.restore(abstract(make_state(1))) is None
    for step in (1, 2, 3):
      checkpoints.save(step, make_state(step), {"epoch": step})
    checkpoints.save(3, make_state(3))  # saved already: nothing happens
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2", "3"]
    with pytest.raises(ValueError, match="step 1 after step 3"):
      checkpoints.save(1, make_state(1))
    with pytest.raises(ValueError, match="extra of step 4"):
      checkpoints.save(4, make_state(4), {"key": np.arange(3)})
  with Checkpoints(tmp_path / "c") as checkpoints:
    restored = checkpoints.restore(abstract(make_state(1)))
  assert restored.step == 3 and restored.extra == {"epoch": 3}
  assert same_bits(restored.state, make_state(3)) and not same_bits(restored.state, make_state(2))


def test_buffers_may_be_donated_while_the_write_goes_on(tmp_path):
  state = {"x": jnp.arange(2_000_000.0)}
  wanted = np.asarray(state["x"]).copy()
  step = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)
  like = abstract(state)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    for _ in range(20):
      state = step(state)
    jax.block_until_ready(state)
    np.testing.assert_array_equal(np.asarray(checkpoints.restore(like).state["x"]), wanted)


def test_any_damaged_file_gives_the_same_bits_or_the_checkpoint_before(tmp_path, caplog):
  whole, directory = tmp_path / "whole", tmp_path / "damaged"
  with Checkpoints(whole) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, make_state(step), {"step": step})
  names = sorted(path.relative_to(whole) for path in (whole / "20").rglob("*") if path.is_file())
  skipped = set()
  for name in names:
    for damage in ("cut", "gone", "zeros", "flip at 1/5", "flip at 1/2", "flip at 4/5"):
      shutil.rmtree(directory, ignore_errors=True)
      shutil.copytree(whole, directory)
      data = (directory / name).read_bytes()
      if damage == "gone":
        (directory / name).unlink()
      elif damage.startswith("flip"):
        changed = bytearray(data)
        changed[int(len(data) * fractions.Fraction(damage.removeprefix("flip at ")))] ^= 4
        (directory / name).write_bytes(changed)
      else:
        (directory / name).write_bytes(
          data[: len(data) // 2] if damage == "cut" else bytes(len(data))
        )
      caplog.clear()
      with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(abstract(make_state(1)))
        assert restored is not None and restored.step in (10, 20), (name, damage)
        assert same_bits(restored.state, make_state(restored.step)) and restored.extra == {
          "step": restored.step
        }, (name, damage)
        if restored.step == 10:
          skipped.add((name.name, damage))
          assert (
            "unfinished or damaged checkpoint skipped" in caplog.text
            and str(directory / "20") in caplog.text
          )
          assert list(directory.glob("20.damaged-*")), "damaged data is kept"
  assert {
    ("_METADATA", "cut"),
    ("_METADATA", "gone"),
    ("metadata", "cut"),
    ("metadata", "gone"),
  } <= skipped
  assert any(len(name) == 32 and damage.startswith("flip") for name, damage in skipped), (
    "array data was damaged too"
  )


def test_goes_on_after_a_skipped_checkpoint(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, make_state(step))
  shutil.rmtree(tmp_path / "20" / "state")
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(abstract(make_state(1))).step == 10
    checkpoints.save(20, make_state(20))
    assert checkpoints.restore(abstract(make_state(1))).step == 20
    checkpoints.save(30, make_state(30))
    checkpoints.wait()
    assert checkpoints.steps() == [20, 30]


def test_another_model_is_an_error_and_harms_nothing(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(10, make_state(10))
  like = abstract(make_state(1))
  like["params"]["c"] = jax.ShapeDtypeStruct(
    (8,), jnp.float32, sharding=like["params"]["c"].sharding
  )
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(
      ValueError, match=r"holds float32\[7\] at params/c, where this run has float32\[8\]"
    ):
      checkpoints.restore(like)
    del like["params"]["c"]
    with pytest.raises(ValueError, match=r"params/c, where this run has nothing"):
      checkpoints.restore(like)
    assert checkpoints.restore(abstract(make_state(1))).step == 10


KILLED = """
import os, sys, time, jax.numpy as jnp
from oel_jax.runtime.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"x": jnp.arange(4_000_000.0)})
checkpoints.wait()
checkpoints.save(2, {"x": jnp.arange(4_000_000.0) + 1})
time.sleep(float(sys.argv[2]))
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("delay", [0.0, 0.03])
def test_killed_while_writing(tmp_path, delay):
  assert run(KILLED, tmp_path, delay).returncode == -9
  like = {
    "x": jax.ShapeDtypeStruct(
      (4_000_000,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
  }
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(like)
    np.testing.assert_array_equal(
      np.asarray(restored.state["x"]),
      np.arange(4_000_000.0, dtype=np.float32) + (restored.step - 1),
    )
    checkpoints.save(3, restored.state)
  assert sorted(path.name for path in tmp_path.iterdir()) == [str(restored.step), "3"], (
    "leftovers of the killed process are removed"
  )


FULL = """
import resource, sys, jax, jax.numpy as jnp, numpy as np
from oel_jax.runtime.checkpoint import Checkpoints
noise = jax.device_put(np.random.default_rng(0).normal(size=400_000).astype(np.float32))
with Checkpoints(sys.argv[1]) as checkpoints:
  checkpoints.save(1, {"x": jnp.ones(400_000)})
  checkpoints.wait()
  # Stands for a disk that takes no more.
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
  try:
    # Written in the background: the error comes with the next call.
    checkpoints.save(2, {"x": noise})
    checkpoints.wait()
  except OSError as error:
    print("told:", error)
print("left:", *Checkpoints(sys.argv[1]).steps())
"""


def test_a_background_error_is_one_clear_error_and_the_checkpoint_before_stays(tmp_path):
  result = run(FULL, tmp_path)
  told = [line for line in result.stdout.splitlines() if line.startswith("told:")]
  assert len(told) == 1 and "could not write the checkpoint of step 2" in told[0], (
    result.stdout + result.stderr
  )
  assert str(tmp_path) in told[0] and "Traceback" not in result.stderr
  assert "left: 1" in result.stdout, result.stdout + result.stderr


def test_an_error_without_words_is_told_by_its_type(tmp_path, monkeypatch):
  with Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as patched:

    def fail():
      raise TimeoutError

    patched.setattr(checkpoints._manager, "wait_until_finished", fail)
    with pytest.raises(OSError, match="could not write the checkpoint of step None: TimeoutError;"):
      checkpoints.wait()


@pytest.mark.parametrize("mib, saves, saved", [(11, 9, 0), (7.3, 2, 0), (3.7, 1, 0), (3.7, 9, 2)])
def test_room_for_one_more_than_are_kept(tmp_path, monkeypatch, mib, saves, saved):
  state = {"a": jnp.zeros((1 << 18, 2)), "b": jnp.zeros((1 << 20,), jnp.bfloat16)}  # 4 MiB
  usage = collections.namedtuple("usage", "free")
  with Checkpoints(tmp_path) as checkpoints:
    for step in range(saved):
      checkpoints.save(step, state)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(int(mib * 2**20)))
    checkpoints.need_room(state, saves)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(int((mib - 0.5) * 2**20)))
    with pytest.raises(OSError, match=r"GiB free, and [123] more checkpoints of up to 0.0 GiB"):
      checkpoints.need_room(state, saves)


def test_restores_onto_a_placement_across_devices(tmp_path):
  state = {"x": jnp.arange(32.0).reshape(8, 4)}
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spread = NamedSharding(mesh, P("data"))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    restored = checkpoints.restore(
      {"x": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=spread)}
    ).state["x"]
  assert restored.sharding == spread and {
    shard.data.shape for shard in restored.addressable_shards
  } == {(1, 4)}
  np.testing.assert_array_equal(np.asarray(restored), np.asarray(state["x"]))


def checksum_by_hand(array) -> int:
  """From the description, in Python's integers, which have no width that could wrap around by
  chance.
  """

  def mix(word):
    word ^= word >> 16
    word = word * 0x85EBCA6B % 2**32
    word ^= word >> 13
    word = word * 0xC2B2AE35 % 2**32
    return word ^ word >> 16

  size = min(array.dtype.itemsize, 4)
  data = array.tobytes()
  words = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
  return sum(mix(word ^ mix(i)) for i, word in enumerate(words)) % 2**32


@pytest.mark.parametrize(
  "array",
  [
    np.random.default_rng(0).normal(size=(5, 3, 7)).astype(np.float32),
    np.arange(70001, dtype=np.int32),
    np.array(jnp.arange(9, dtype=jnp.bfloat16)),
    np.array([True, False, True]),
    np.array(7, np.int32),
    np.zeros((0, 3), np.float32),
    np.arange(6.0).reshape(2, 3),
  ],
  ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_a_checksum_is_its_description_on_the_host_and_on_a_device(array):
  wanted = checksum_by_hand(array)
  assert checksum.checksums({"a": array}) == {"a": f"{wanted:08x}"}
  if array.dtype.itemsize < 8:  # JAX has no wider types here
    assert int(checksum._sums_on_device([jnp.asarray(array)])[0]) == wanted


def test_arrays_on_a_device_and_on_the_host_keep_their_names(monkeypatch):
  tree = {"a": jnp.arange(5), "b": np.arange(3), "c": jnp.ones((2, 2)), "d": np.ones(4)}
  wanted = checksum.checksums(tree)
  assert len(set(wanted.values())) == 4
  monkeypatch.setattr(checksum, "_on_cpu", lambda array: False)
  assert checksum.checksums(tree) == wanted


def test_a_checksum_does_not_depend_on_the_placement_and_sees_every_bit():
  array = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  wanted = checksum_by_hand(array)
  for spec in (P("data", "tensor"), P("tensor"), P(None, "tensor"), P()):
    spread = jax.device_put(array, NamedSharding(mesh, spec))
    assert int(checksum._sums_on_device([spread])[0]) == wanted and checksum.checksums(
      [spread]
    ) == {"0": f"{wanted:08x}"}
  found = {
    checksum.fingerprint({"w": array}),
    checksum.fingerprint({"v": array}),
    checksum.fingerprint({"w": array.reshape(6, 8)}),
    checksum.fingerprint({"w": array.view(np.int32)}),
    checksum.fingerprint({"w": array[::-1]}),
  }
  flipped = array.view(np.uint32)
  for bit in range(32):
    flipped[3, 1] ^= np.uint32(1 << bit)
    found.add(checksum.fingerprint({"w": array}))
    flipped[3, 1] ^= np.uint32(1 << bit)
  assert len(found) == 5 + 32 and checksum.fingerprint({"w": array}) in found


def test_a_checkpoint_of_a_version_without_checksums_is_restored_with_a_warning(tmp_path, caplog):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(10, make_state(10), {"epoch": 3})
  path = tmp_path / "10" / "extra" / "metadata"
  assert set(json.loads(path.read_text())) == {"epoch", "arrays", "digest"}
  path.write_text('{"epoch": 3}')
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(abstract(make_state(1)))
  assert same_bits(restored.state, make_state(10)) and restored.extra == {"epoch": 3}
  assert f"{tmp_path / '10'}: saved without checksums" in caplog.text
