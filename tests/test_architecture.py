"""A field more in `Architecture`, as someone would add it: a factor on the scores of attention.

In a copy of the package it takes three files, and the scanned, unrolled and cached runs obey it.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

from processes import python_path

import oel_jax

PACKAGE = pathlib.Path(oel_jax.__file__).parent

# File → what is replaced there, each found once.
CHANGES = {
  "policy/architecture.py": [
    ("  tied_head: bool = True\n", "  tied_head: bool = True\n  score_scale: float = 1.0\n"),
  ],
  # The plain form, and what stands around the kernels.
  "policy/ops/heads.py": [
    (
      "  return tuple(x.astype(dtype) for x in (q, k, v))\n",
      "  return tuple(x.astype(dtype) for x in (q * a.score_scale, k, v))\n",
    ),
    (
      "    return tuple(kernel(a, *given)), given\n",
      "    q, k, v = kernel(a, *given)\n    return (q * a.score_scale, k, v), given\n",
    ),
    (
      "    d_qkv, d_scale = backward_kernel(a, *saved, gradients)\n",
      "    gradients = (gradients[0] * a.score_scale, *gradients[1:])\n"
      "    d_qkv, d_scale = backward_kernel(a, *saved, gradients)\n",
    ),
  ],
  # The kernel that makes queries itself does not know the field: it is not for such architectures.
  "policy/sampling/kv_cache.py": [
    (
      "    and queries <= ROWS\n",
      "    and queries <= ROWS\n    and architecture.score_scale == 1\n",
    ),
  ],
}

# A factor on queries is one on their norm's scale, which the package knows: rotation is linear.
OBEYS = """
  import dataclasses, functools
  import jax, jax.numpy as jnp, numpy as np
  from oel_jax.policy import parameters, transformer, unrolled
  from oel_jax.policy.architecture import Architecture
  from oel_jax.policy.ops import common, heads
  from oel_jax.policy.sampling import kv_cache, sampler

  PLAIN = Architecture(32, 16, 2, 4, 2, 8, 24)
  SCALED = dataclasses.replace(PLAIN, score_scale=1.7)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32),
    parameters.abstract(PLAIN),
  )
  attend = params["layers"]["attention"]
  attend = {**attend, "q_norm": {"scale": 1.7 * attend["q_norm"]["scale"]}}
  folded = {**params, "layers": {**params["layers"], "attention": attend}}
  tokens = jnp.asarray(rng.integers(0, 32, (2, 6)), jnp.int32)
  places, ones = jnp.broadcast_to(jnp.arange(6), (2, 6)), jnp.ones((2, 6), jnp.int32)

  def scanned(params, a):
    return transformer.apply(params, a, tokens, places, ones)[0]

  def without_loop(params, a):
    weights = unrolled.fuse(params, jnp.float32)
    return unrolled.forward(
      weights, a, tokens, places, ones, places, dtype=jnp.float32, remat="none", attn_impl="xla"
    )

  def cached(params, a):  # the first log-probability is prefill's, the others are decoding's
    prompts = np.asarray(tokens).tolist()
    how = dict(sampling=sampler.Sampling(0.01), max_new_tokens=4, eos_ids=(), pad_id=0)
    ids, scores = sampler.generate(params, a, prompts, [1, 2], logprobs=True, **how)
    return jnp.asarray(scores)

  jitted = lambda f: jax.jit(f, static_argnums=1)
  for run in (jitted(scanned), jitted(without_loop), cached):
    found, wanted, before = run(params, SCALED), run(folded, PLAIN), run(params, PLAIN)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert (abs(found - before).reshape(2, -1).max(0) > 1e-3).sum() >= 3, run

  # The kernels for training, without a GPU; and the one for decoding is not chosen.
  qkv = jnp.asarray(rng.normal(size=(3, 8, 8)), jnp.float32)
  scale, cos_sin = jnp.ones((2, 8)), jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
  weight = jnp.asarray(rng.normal(size=(3, 4, 8)), jnp.float32)

  def both(a):
    total = lambda qkv: jnp.sum(weight * heads.heads(a, qkv, None, scale, cos_sin)[0])
    return jax.value_and_grad(total)(qkv)

  plain = both(SCALED)
  common.supported = lambda x, head_size: True
  heads.kernel = functools.partial(heads.kernel, interpret=True)
  heads.backward_kernel = functools.partial(heads.backward_kernel, interpret=True)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), both(SCALED), plain)
  jax.default_backend = lambda: "gpu"
  real = dataclasses.replace(PLAIN, head_size=64)
  assert kv_cache.attn_impl(real, jnp.bfloat16) == "triton"
  assert kv_cache.attn_impl(dataclasses.replace(real, score_scale=1.7), jnp.bfloat16) == "xla"
"""


def test_a_new_field_is_three_files_and_every_run_obeys_it(tmp_path):
  ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
  shutil.copytree(PACKAGE, tmp_path / "oel_jax", ignore=ignored)
  assert len(CHANGES) <= 3
  for name, replacements in CHANGES.items():
    text = (tmp_path / "oel_jax" / name).read_text(encoding="utf-8")
    for old, new in replacements:
      assert text.count(old) == 1, f"{name} holds {text.count(old)} times: {old}"
      text = text.replace(old, new)
    (tmp_path / "oel_jax" / name).write_text(text, encoding="utf-8")
  env = os.environ | {"PYTHONPATH": python_path(tmp_path), "JAX_PLATFORMS": "cpu"}
  script = textwrap.dedent(OBEYS)
  run = subprocess.run(
    [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True
  )
  assert run.returncode == 0, run.stderr
