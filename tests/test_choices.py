"""What a run says that it has chosen is what runs."""

import json
import types

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from oel_jax import choices, report
from oel_jax import config as config_lib
from oel_jax.policy.architecture import Architecture
from oel_jax.runtime import mesh as mesh_lib

SHAPE = Architecture(64, 32, 2, 4, 2, 64, 48)
KNOWLEDGE = dict(texts=2, tokens=60, exact=True)


def _mesh(**sizes):
  sizes = dict(data=1, fsdp=1, tensor=1) | sizes
  count = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
  return mesh_lib.make_mesh(ml_collections.ConfigDict(sizes), jax.devices()[:count])


def _chosen(dtype, mesh=None, knowledge=KNOWLEDGE, **consolidation):
  config = config_lib.default()
  config.consolidation.update(consolidation)
  policy = types.SimpleNamespace(architecture=SHAPE, dtype=dtype)
  return choices.choose(config, policy, mesh or _mesh(), **knowledge)


def test_a_cpu_runs_everything_plain():
  assert _chosen(jnp.float32) == {
    "devices": "1 x cpu",
    "mesh": "data 1, fsdp 1, tensor 1",
    "replicated": "nothing that its axis should split",
    "compute_dtype": "float32",
    "attention": "xla",
    "sampling_attention": "xla (prompts), xla (tokens)",
    "layers": "scanned",
    "kernels": "plain",
    "sampling_kernels": "plain",
    "sampling_weights": "whole on each device",
    "knowledge": "on the device",
  }


def test_a_gpu_runs_kernels_in_bfloat16_and_not_in_float32(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  names = ("attention", "sampling_attention", "layers", "kernels", "sampling_kernels")
  found = lambda dtype, **fields: [_chosen(dtype, **fields)[name] for name in names]
  fast = ["cudnn", "cudnn (prompts), triton (tokens)", "unrolled", "Pallas", "Pallas"]
  assert found(jnp.bfloat16) == fast
  assert found(jnp.bfloat16, pack=False)[0] == "flash"
  assert found(jnp.bfloat16, mesh=_mesh(data=2, fsdp=2)) == fast
  assert found(jnp.bfloat16, mesh=_mesh(fsdp=2, tensor=2)) == fast
  split = found(jnp.bfloat16, mesh=_mesh(fsdp=2, tensor=4))
  told = "scanned, for mesh.tensor, 4, does not divide kv_heads (2)"
  assert split[2:4] == [told, "plain"]
  assert found(jnp.bfloat16, unroll="no")[2:] == ["scanned", "plain", "Pallas"]
  assert found(jnp.float32) == ["xla", "xla (prompts), xla (tokens)", "scanned", "plain", "plain"]
  # Knowledge on the host is fetched layer by layer, in a loop.
  assert found(jnp.bfloat16, knowledge_gib=1e-9)[2:4] == ["scanned", "plain"]


def test_devices_that_sample_together_are_told():
  config = config_lib.default()
  config.mesh.sample_tensor = 2
  policy = types.SimpleNamespace(architecture=SHAPE, dtype=jnp.float32)
  chosen = choices.choose(config, policy, _mesh(data=2), **KNOWLEDGE)
  assert chosen["sampling_weights"] == "split over 2 devices, as are texts kept once"


def test_a_tpu_runs_splash_attention_and_no_kernels_of_a_gpu(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  names = ("attention", "sampling_attention", "layers", "kernels", "sampling_kernels")
  found = lambda dtype, **fields: [_chosen(dtype, **fields)[name] for name in names]
  plain = ["scanned", "plain", "plain"]
  assert found(jnp.bfloat16) == ["splash", "splash (prompts), xla (tokens)", *plain]
  assert found(jnp.bfloat16, attention="xla")[0] == "xla"
  assert found(jnp.float32) == ["xla", "xla (prompts), xla (tokens)", *plain]


def test_an_axis_that_does_not_divide_is_told():
  chosen = _chosen(jnp.float32, _mesh(fsdp=2, tensor=4))
  assert chosen["devices"] == "8 x cpu" and chosen["mesh"] == "data 1, fsdp 2, tensor 4"
  assert chosen["replicated"] == (
    "layers/attention/k/kernel: 2 over tensor (4); layers/attention/v/kernel: 2 over tensor (4)"
  )


def test_where_the_knowledge_lies_is_told_as_far_as_it_is_known():
  # 60 take 128 tokens on a CPU
  size = 2 * SHAPE.layers * 2 * SHAPE.kv_heads * 128 * SHAPE.head_size * 4 / 2**30
  where = lambda gib, **given: _chosen(jnp.float32, knowledge=KNOWLEDGE | given, knowledge_gib=gib)[
    "knowledge"
  ]
  assert where(size) == where(size, exact=False) == "on the device"
  assert where(0.99 * size) == "on the host"
  assert where(0.0001, tokens=10**6, exact=False).startswith(
    "on the device up to 0.0001 GiB, more on the host"
  )


def test_layers_of_the_teacher_on_the_host_are_told_or_refused():
  how = dict(unroll="yes", knowledge_gib=1e-9)
  chosen = _chosen(jnp.float32, teacher_on_host=0.5, **how)
  assert chosen["knowledge"] == "50% of the teacher's layers, on the host, and they with it"
  assert chosen["layers"] == "unrolled"
  with pytest.raises(ValueError, match='is 0.5, and layers run in a loop.*unroll "yes"'):
    _chosen(jnp.float32, teacher_on_host=0.5)
  with pytest.raises(ValueError, match="is 0.5, and the mesh has 2 devices: .* must be 0, or"):
    _chosen(jnp.float32, _mesh(data=2), teacher_on_host=0.5, **how)


def test_it_is_told_in_one_line_and_kept_for_the_report(tmp_path, capsys):
  chosen = {"devices": "1 x cpu", "attention": "xla"}
  (tmp_path / "round_0").mkdir()
  assert report.write(tmp_path)["choices"] is None
  choices.tell(tmp_path, chosen)
  assert capsys.readouterr().out == "chosen: devices 1 x cpu; attention xla\n"
  assert report.write(tmp_path)["choices"] == chosen
  assert json.loads((tmp_path / "report/results.json").read_text())["choices"] == chosen


@pytest.mark.parametrize(
  "text",
  [
    "{",
    "[]",
    '{"schema": 1}',
    '{"schema": 1, "choices": [1]}',
    '{"schema": 1, "choices": {"a": 1}}',
    '{"schema": 2, "choices": {}}',
    "\xff",
  ],
)
def test_a_damaged_file_of_choices_is_told(tmp_path, text):
  (tmp_path / "round_0").mkdir()
  (tmp_path / "choices.json").write_bytes(text.encode("latin-1"))
  with pytest.raises(ValueError, match="choices.json: damaged, .* remove it"):
    report.write(tmp_path)
