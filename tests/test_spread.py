"""Weights on the devices of two processes, four each: sampling from them, their checkpoints and
their export, beside what one process makes of them.
"""

import json
import types
from typing import Any

import jax
import ml_collections
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from test_distributed import both

from oel_jax import config as config_lib
from oel_jax.consolidation import restore
from oel_jax.policy import transformer
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.sampling.sampler import Policy, Sampling
from oel_jax.policy.weights import huggingface
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.checkpoint import Checkpoints
from oel_jax.runtime.checksum import fingerprint

SCRIPT = """
import dataclasses
import jax
import orbax.checkpoint as ocp
from test_spread import *
from oel_jax.policy.sampling import spread as spread_lib
from oel_jax.policy import load
from oel_jax.policy.sampling import beginnings
from oel_jax.tasks import export

texts, find = [], beginnings.find
def spy(*given, **how):
  found = find(*given, **how)
  texts.append(found.texts)
  return found
beginnings.find, beginnings.MIN_TOKENS, beginnings.MIN_PROMPTS = spy, 1, 2
devices = make_mesh(data=2, fsdp=4)
host = tiny_policy()
policy = host.replace(mesh_lib.put(host.params, mesh_lib.param_shardings(devices, host.params)))
assert not any(leaf.is_fully_addressable for leaf in jax.tree.leaves(policy.params))
if me:
  together.follow(policy=policy, base=policy.params)
else:
  with together.leading(policy=policy, base=policy.params):
    told = {"ids": [ask(policy, count) for count in (3, 1)]}
    told |= {"texts": list(texts), "fingerprint": fingerprint(policy.params)}

# Two groups of two devices in each.
split = dataclasses.replace(policy, sample_tensor=2)
shapes = spread_lib.own(split).params["layers"]["feedforward"]["up"]["kernel"]
if me:
  together.follow(policy=split, base=split.params)
else:
  with together.leading(policy=split, base=split.params):
    told |= {"split ids": [ask(split, count) for count in (3, 1)]}
    told |= {"split shape": shapes.addressable_shards[0].data.shape}

# Step 4 is whole, and one process cannot read its part of step 6.
config = run_config(place)
abstract = abstract_state(policy.params, devices, config)
folder = place / "run/round_1/checkpoints"
with Checkpoints(folder) as checkpoints:
  for step in (4, 6):
    spread = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    checkpoints.save(step, mesh_lib.put(filled(abstract, step), spread), {"step": step})
own = ocp.StandardCheckpointHandler.restore
def broken(self, directory, *args, **options):
  if me and directory.parts[-2] == "6":
    raise OSError("a read fails here alone")
  return own(self, directory, *args, **options)
ocp.StandardCheckpointHandler.restore = broken
with Checkpoints(folder) as checkpoints:
  step, state, extra = checkpoints.restore(abstract)
right = jax.tree.leaves(filled(abstract, 4))
for leaf, wanted in zip(jax.tree.leaves(state), right, strict=True):
  for shard in leaf.addressable_shards:
    np.testing.assert_array_equal(shard.data, np.asarray(wanted)[shard.index])

load.load_policy = lambda *args, **options: policy
distributed.check_shared(place / "run", make=False)
if me:
  export.follow(config, place / "run")
else:
  export.run(config, place / "run")
  # Not printed, for Gloo prints, too.
  (place / "told").write_text(json.dumps(told | {"step": step, "extra": extra}))
distributed.finish()
"""


def make_mesh(**sizes: int) -> jax.sharding.Mesh:
  count = int(np.prod(list(sizes.values())))
  return mesh_lib.make_mesh(ml_collections.ConfigDict(sizes | {"tensor": 1}), jax.devices()[:count])


def tiny_policy() -> Policy:
  """With a width that four devices divide."""
  architecture = Architecture(32, 16, 2, 4, 2, 8, 24)
  params = transformer.init(architecture, jax.random.key(0))
  words = types.SimpleNamespace(vocabulary=32, eos_ids=(1,), pad_id=0, save=None)
  return Policy(architecture, jax.tree.map(np.asarray, params), words)


def ask(policy: Policy, count: int, token: int = 5) -> list[list[int]]:
  """Answers to prompts of different lengths."""
  prompts = [[3, token] * (i + 1) for i in range(count)]
  seeds = [11 * i for i in range(count)]
  found = policy.sample(prompts, seeds, sampling=Sampling(1.0), max_new_tokens=4)
  return [list(map(int, ids)) for ids in found]


def run_config(place) -> Any:
  config = config_lib.default()
  config.rounds, config.policy.weights, config.consolidation.steps = 1, str(place / "model"), 4
  return config


def abstract_state(params: Any, devices: jax.sharding.Mesh, config: Any) -> Any:
  """Of training: parameters, two moments, counters."""
  optimizer = restore.make_optimizer(config.consolidation)
  return mesh_lib.abstract_init(lambda tree: restore.begin(optimizer, tree), devices, params)


def filled(tree: Any, seed: int) -> Any:
  """Numbers of these shapes and types, the same wherever they are made."""
  rng = np.random.default_rng(seed)
  draw = lambda leaf: np.asarray(rng.standard_normal(leaf.shape) * 100).astype(leaf.dtype)
  return jax.tree.map(draw, tree)


@pytest.fixture(scope="module", name="place")
def fixture_place(tmp_path_factory):
  """What two processes leave."""
  from test_workdir import open_workdir

  place = tmp_path_factory.mktemp("spread")
  (place / "model").mkdir()
  (place / "model/config.json").write_text('{"transformers_version": "5"}')
  (place / "model/generation_config.json").write_text("{}")
  open_workdir(run_config(place), place / "run")
  both(SCRIPT, place, devices=4)
  return place


@pytest.fixture(scope="module", name="told")
def fixture_told(place):
  return json.loads((place / "told").read_text())


def test_they_answer_as_on_one_device(told):
  """Three prompts over two processes are shares of two, which begin with a text that is kept once,
  and of one; one prompt is one and none.
  """
  policy = tiny_policy()
  right = ask(policy, 3)
  assert told["ids"] == [right, right[:1]] == told["split ids"]
  assert told["split shape"] == [2, 16, 12]  # half of the feed-forward
  assert told["texts"] == [[[3]], []]
  assert told["fingerprint"] == fingerprint(policy.params)


def test_a_checkpoint_that_one_process_cannot_read_is_skipped_in_both(place, told):
  assert told["step"] == 4 and told["extra"] == {"step": 4}
  names = sorted(path.name for path in (place / "run/round_1/checkpoints").iterdir())
  assert len(names) == 2 and names[0] == "4" and names[1].startswith("6.damaged-")


@pytest.mark.parametrize("sizes", [dict(data=1, fsdp=1), dict(data=1, fsdp=4)])
def test_a_checkpoint_of_two_processes_is_read_by_one(place, told, sizes):
  devices, config = make_mesh(**sizes), run_config(place)
  abstract = abstract_state(tiny_policy().params, devices, config)
  with Checkpoints(place / "run/round_1/checkpoints") as checkpoints:
    step, state, _ = checkpoints.restore(abstract)
  assert step == 4
  pairs = zip(jax.tree.leaves(state), jax.tree.leaves(filled(abstract, 4)), strict=True)
  for found, right in pairs:
    assert len(found.sharding.device_set) == devices.size
    np.testing.assert_array_equal(np.asarray(found), right)


def test_two_processes_export_the_bytes_of_one(place, told, tmp_path):
  config, policy = run_config(place), tiny_policy()
  abstract = abstract_state(policy.params, make_mesh(data=1, fsdp=1), config)
  params = filled(abstract, 4).params
  how = dict(dtype=ml_dtypes.bfloat16, config={"transformers_version": "5"})
  huggingface.save(tmp_path, params, policy.architecture, **how)
  for name in ("model.safetensors", "config.json"):
    assert (place / "run/export" / name).read_bytes() == (tmp_path / name).read_bytes()
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  down = params["layers"]["feedforward"]["down"]["kernel"][1]
  theirs = tensors["model.layers.1.mlp.down_proj.weight"]
  np.testing.assert_array_equal(theirs, down.T.astype(ml_dtypes.bfloat16))
