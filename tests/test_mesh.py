"""The sharding table, initialisation in shards, and batches smaller than the mesh."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from oel_jax.runtime import mesh as mesh_lib

V, D, N, K, H, F, L = 32, 16, 4, 2, 8, 24, 3
SHAPES = {
  "embed": {"embedding": (V, D)},
  "layers": {
    "attention": {
      "q": {"kernel": (L, D, N, H), "bias": (L, N, H)},
      "k": {"kernel": (L, D, K, H), "bias": (L, K, H)},
      "v": {"kernel": (L, D, K, H), "bias": (L, K, H)},
      "o": {"kernel": (L, N, H, D)},
      "q_norm": {"scale": (L, H)},
      "k_norm": {"scale": (L, H)},
    },
    "feedforward": {
      "gate": {"kernel": (L, D, F)},
      "up": {"kernel": (L, D, F)},
      "down": {"kernel": (L, F, D)},
    },
    "attention_norm": {"scale": (L, D)},
    "feedforward_norm": {"scale": (L, D)},
  },
  "norm": {"scale": (D,)},
  "head": {"kernel": (V, D)},
}


def init(key):
  flat, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
  # Random numbers in one array only: their program takes seconds to compile.
  arrays = [
    jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) + i for i, shape in enumerate(flat)
  ]
  params = jax.tree.unflatten(treedef, arrays)
  params["embed"]["embedding"] = jax.random.normal(key, (V, D))
  return params


def sizes(data=-1, fsdp=1, tensor=1):
  return ml_collections.ConfigDict(dict(data=data, fsdp=fsdp, tensor=tensor))


def test_make_mesh_fills_in_the_devices_left_with_auto_axes():
  mesh = mesh_lib.make_mesh(sizes(-1, 2, 2))
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert mesh.axis_types == (AxisType.Auto,) * 3
  assert dict(mesh_lib.make_mesh(sizes(), jax.devices()[:1]).shape) == {
    "data": 1,
    "fsdp": 1,
    "tensor": 1,
  }
  assert dict(mesh_lib.make_mesh(sizes(2, -1, 1)).shape) == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize(
  "given, named",
  [
    (sizes(-1, 3, 1), r"config\.mesh\.fsdp \(3\).* 3 does not divide .* 8"),
    (
      sizes(2, 1, 2),
      r"config\.mesh\.data \(2\) x config\.mesh\.fsdp \(1\) x config\.mesh\.tensor \(2\) = 4.* 8 "
      r"devices",
    ),
    (sizes(-1, -1, 1), r"config\.mesh\.data and config\.mesh\.fsdp are -1"),
    (sizes(-1, 1, 0), r"config\.mesh\.tensor is 0"),
    (sizes(-2, 1, 1), r"config\.mesh\.data is -2"),
  ],
)
def test_make_mesh_names_the_wrong_field(given, named):
  with pytest.raises(ValueError, match=named):
    mesh_lib.make_mesh(given)


def test_param_shardings_by_hand():
  mesh = mesh_lib.make_mesh(sizes(1, 2, 4))
  shardings = mesh_lib.param_shardings(mesh, jax.eval_shape(init, jax.random.key(0)))
  leaves = jax.tree_util.tree_leaves_with_path(shardings)
  specs = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec for path, leaf in leaves
  }
  assert specs["embed/embedding"] == P("tensor", "fsdp")
  assert specs["layers/attention/q/kernel"] == P(None, "fsdp", "tensor", None)
  assert specs["layers/attention/q/bias"] == P(None, "tensor", None)
  # 2 key-value heads over 4: replicated along K only.
  assert specs["layers/attention/k/kernel"] == P(None, "fsdp", None, None)
  assert specs["layers/attention/o/kernel"] == P(None, "tensor", None, "fsdp")
  assert specs["layers/feedforward/up/kernel"] == P(None, "fsdp", "tensor")
  assert specs["layers/feedforward/down/kernel"] == P(None, "tensor", "fsdp")
  assert all(not any(spec) for name, spec in specs.items() if name.endswith("scale"))
  assert len(specs) == 17


def test_param_shardings_list_every_parameter_without_a_row():
  mesh = mesh_lib.make_mesh(sizes())
  abstract = jax.eval_shape(init, jax.random.key(0))
  abstract["layers"]["attention"]["gate"] = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
  abstract["extra"] = jax.ShapeDtypeStruct((4,), jnp.float32)
  abstract["norm"]["scale"] = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  for shardings in (mesh_lib.param_shardings, mesh_lib.state_shardings):
    with pytest.raises(ValueError) as error:
      shardings(mesh, abstract)
    for part in (
      "extra (4,)",
      "layers/attention/gate/kernel (2, 3)",
      "norm/scale (4, 4) has 2 dimensions",
    ):
      assert part in str(error.value)
    assert "embedding" not in str(error.value)


def train_state(key):
  params = init(key)
  return {
    "params": params,
    "opt_state": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
    "step": jnp.int32(0),
  }


def test_sharded_init_is_born_sharded_and_equals_one_device():
  mesh = mesh_lib.make_mesh(sizes(2, 2, 2))
  state = mesh_lib.sharded_init(train_state, mesh, jax.random.key(3))
  plain = jax.jit(train_state)(jax.random.key(3))
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), state, plain
  )
  embedding = state["params"]["embed"]["embedding"]
  assert {shard.data.shape for shard in embedding.addressable_shards} == {(V // 2, D // 2)}
  adam = next(
    part
    for part in jax.tree.leaves(state["opt_state"], is_leaf=lambda node: hasattr(node, "mu"))
    if hasattr(part, "mu")
  )
  same = jax.tree.map(
    lambda p, m, v: p.sharding == m.sharding == v.sharding, state["params"], adam.mu, adam.nu
  )
  assert jax.tree.all(same)
  assert state["step"].sharding.is_fully_replicated and adam.count.sharding.is_fully_replicated
  # The program holds no whole copy: its output on one device is an eighth of the split arrays plus
  # the replicated ones.
  shardings = jax.tree.map(
    lambda leaf: leaf.sharding, mesh_lib.abstract_init(train_state, mesh, jax.random.key(3))
  )
  memory = (
    jax.jit(train_state, out_shardings=shardings)
    .lower(jax.random.key(3))
    .compile()
    .memory_analysis()
  )
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(plain))
  assert memory.output_size_in_bytes < whole / 3


def test_three_items_on_eight_devices():
  mesh = mesh_lib.make_mesh(sizes(4, 2, 1))
  rng = np.random.default_rng(0)
  target = {"tokens": np.arange(15).reshape(3, 5), "mask": np.ones((3, 5), bool)}
  batch = {"x": rng.normal(size=(3, 5)).astype(np.float32), "target": target}
  padded = mesh_lib.pad_batch(batch, mesh)
  assert padded["x"].shape == (8, 5) and padded["target"]["mask"].dtype == bool
  np.testing.assert_array_equal(padded["target"]["mask"].sum(axis=1), [5, 5, 5, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(padded["x"][:3], batch["x"])
  np.testing.assert_array_equal(padded["x"][3:], np.tile(batch["x"][2], (5, 1)))
  placed = jax.device_put(padded, mesh_lib.batch_sharding(mesh))
  assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(1, 5)}
  mean = jax.jit(
    lambda b: jnp.sum(b["x"] ** 2 * b["target"]["mask"]) / jnp.sum(b["target"]["mask"])
  )(placed)
  np.testing.assert_allclose(mean, np.mean(batch["x"].astype(np.float64) ** 2), rtol=1e-6)


def test_pad_batch_leaves_a_multiple_alone_and_refuses_what_it_cannot_mask():
  mesh = mesh_lib.make_mesh(sizes())
  whole = {"mask": np.ones(16)}
  assert mesh_lib.pad_batch(whole, mesh) is whole
  with pytest.raises(ValueError, match="no array 'mask'"):
    mesh_lib.pad_batch({"x": np.ones(3)}, mesh)
  with pytest.raises(ValueError, match="lengths"):
    mesh_lib.pad_batch({"x": np.ones(3), "mask": np.ones(2)}, mesh)
  with pytest.raises(ValueError, match="at least 1"):
    mesh_lib.pad_batch({"mask": np.ones((0, 2))}, mesh)
