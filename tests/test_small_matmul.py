"""Products of few rows against float64, and where the sampler makes them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import naive_sampled, random_prompts, sample

from oel_jax.policy.ops import common, norm, small_matmul
from oel_jax.policy.sampling import engine, model, on_cpu, slot_state

INTERPRET = jax.default_backend() != "gpu"


@pytest.mark.parametrize("rows", [16, 24, 128])
def test_products(rows):
  rng = np.random.default_rng(rows)
  x, matrix = (
    jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((rows, 1024), (256, 1024))
  )
  wanted = np.float64(x) @ np.float64(matrix).T
  same = lambda found, wanted, close: np.testing.assert_allclose(
    np.float64(found), wanted, rtol=close, atol=close
  )
  parts = small_matmul.parts_kernel(x, matrix, interpret=INTERPRET)
  assert parts.shape == (4, rows, 256) and parts.dtype == jnp.float32
  same(parts.sum(0), wanted, 1e-3)
  same(parts[1], np.float64(x)[:, 256:512] @ np.float64(matrix)[:, 256:512].T, 1e-3)
  found = small_matmul.product_kernel(x, matrix, interpret=INTERPRET)
  assert found.dtype == jnp.bfloat16
  same(found, wanted, 2**-8)
  gate, up = np.split(wanted, 2, axis=1)
  same(
    small_matmul.swiglu_kernel(x, matrix, interpret=INTERPRET),
    gate / (1 + np.exp(-gate)) * up,
    2**-6,
  )


def test_how_the_products_of_models_are_cut():
  """By the multiprocessors that an H200 has, and the shared memory of each."""
  shaped = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  def cut(sides, F, D, cuts, rows=64):
    found = small_matmul._cut(shaped(rows, D), shaped(sides * F, D), sides, cuts)
    return found and (found.parts, found.deep, found.stages)

  parts, swiglu = small_matmul.PARTS, small_matmul.SWIGLU
  assert cut(2, 6144, 2048, swiglu) == (1, 64, 5)  # Qwen3-1.7B: 96 programs, one each
  assert cut(2, 8960, 1536, swiglu) == (1, 64, 4)  # Qwen2.5-1.5B: 140, of which two share one
  assert cut(2, 9728, 2560, swiglu) == (1, 64, 4)  # Qwen3-4B: 152
  assert cut(2, 25600, 5120, swiglu) == (1, 64, 4)  # Qwen3-32B: 400, in two waves
  assert cut(1, 2048, 6144, parts) == (4, 128, 4)  # 128
  assert cut(1, 1536, 8960, parts) == (5, 128, 4)  # 8960 is no multiple of 4 x 128; 120
  assert cut(1, 2560, 9728, parts) == (4, 64, 4)  # 160, three to a multiprocessor
  assert cut(1, 896, 4864, parts) == (4, 64, 4)  # Qwen2.5-0.5B: 4864 = 19 x 256
  assert cut(1, 896, 896, parts) is None
  assert cut(1, 2560, 9728, parts, rows=16) == (4, 128, 4)  # less to hold: 80 KiB, two


def test_which_products_fit(monkeypatch):
  zeros = lambda *shape, dtype=jnp.bfloat16: jnp.zeros(shape, dtype)
  monkeypatch.setattr(small_matmul, "_large_gpu", lambda: True)
  assert small_matmul.supported(zeros(64, 2048), zeros(4096, 2048)) and small_matmul.supported(
    zeros(16, 9728), zeros(2560, 9728)
  )
  assert not small_matmul.supported(
    zeros(64, 576), zeros(1536, 576)
  ) and not small_matmul.supported(zeros(64, 2048), zeros(1000, 2048))
  assert not small_matmul.supported(
    zeros(8, 2048), zeros(4096, 2048)
  ) and not small_matmul.supported(zeros(256, 2048), zeros(4096, 2048))
  assert not small_matmul.supported(
    zeros(64, 2048, dtype=jnp.float32), zeros(4096, 2048, dtype=jnp.float32)
  )
  monkeypatch.undo()
  for capability, large in (
    (None, False),
    ("8.9", False),
    ("9.0", True),
    ("10.0", True),
    ("12.0", False),
    ("gfx942", False),
  ):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
      jax,
      "devices",
      lambda capability=capability: [types.SimpleNamespace(compute_capability=capability)],
    )
    assert small_matmul.supported(zeros(64, 2048), zeros(4096, 2048)) == large
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  assert not small_matmul.supported(zeros(64, 2048), zeros(4096, 2048))


@pytest.fixture(name="fresh")
def fixture_fresh():
  """What is traced here is for this test alone."""
  programs = model.prepare, engine.prefill_insert, engine.decode
  clear = lambda: (
    slot_state.committed.cache_clear(),
    [program.clear_cache() for program in programs],
  )
  clear()
  yield
  clear()


@pytest.mark.parametrize("fewest", [1, 2])
def test_the_sampler_makes_the_same_tokens_with_them(fewest, fresh, monkeypatch):
  """As on a GPU, in float32: matrices with one row an output, a single row's product as a sum, or
  all products by the kernels.
  """
  used, product, add_norm = set(), small_matmul._product, norm.add_norm_kernel

  def counted(x, matrix, cut, sides, dtype, interpret):
    used.add((cut.parts, sides))
    return product(x, matrix, cut, sides, dtype, True)

  monkeypatch.setattr(small_matmul, "_product", counted)
  monkeypatch.setattr(small_matmul, "PRODUCT", small_matmul.Cut(1, 16, 16, 4, 1))
  monkeypatch.setattr(small_matmul, "PARTS", (small_matmul.Cut(2, 16, 8, 4, 1),))
  monkeypatch.setattr(small_matmul, "SWIGLU", (small_matmul.Cut(1, 16, 16, 4, 1),))
  monkeypatch.setattr(small_matmul, "supported", lambda x, matrix: fewest <= len(x) <= 4)
  monkeypatch.setattr(small_matmul, "on_gpu", lambda: True)
  monkeypatch.setattr(common, "supported", lambda x: True)
  for name in ("prefill_insert", "decode"):
    monkeypatch.setattr(on_cpu, name, getattr(engine, name))
  monkeypatch.setattr(
    norm, "add_norm_kernel", lambda *args, **how: add_norm(*args, **how, interpret=True)
  )
  lengths = (3,) if fewest == 2 else (3, 9, 17)
  prompts = random_prompts(*lengths, seed=20)
  assert sample(prompts, limit=6, slots=4) == [
    naive_sampled(prompt, seed, limit=6) for seed, prompt in enumerate(prompts)
  ]
  assert used == (set() if fewest == 2 else {(1, 1), (2, 1), (1, 2)})
