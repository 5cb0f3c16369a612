"""The gradient of the default way on a GPU, on weights and batches as real ones are, beside the
plain form in float32.

The default way is unrolled layers, our kernels and cuDNN's attention in bfloat16; the plain form is
a scan over the layers in plain JAX. What the default way is off by must be at most 1.5 times what
the plain form in bfloat16 is off by: large key biases make both differ from float32.
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oel_jax import config as config_lib
from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import samples, trainer
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import task as task_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.conversations.schema import Message, Prompt
from oel_jax.policy import load, transformer
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.sampling.sampler import generate
from oel_jax.policy.sampling.token_sampling import Sampling
from oel_jax.runtime import finite
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.metrics import Metrics

pytestmark = pytest.mark.gpu

SHAPES = {
  "qwen2.5-1.5b": Architecture(8192, 1536, 3, 12, 2, 128, 8960, qk_norm=False, qkv_bias=True),
  "qwen2.5-0.5b": Architecture(8192, 896, 3, 14, 2, 64, 4864, qk_norm=False, qkv_bias=True),
  "qwen3-1.7b": Architecture(8192, 2048, 3, 16, 8, 128, 6144),
  "qwen3-4b": Architecture(8192, 2560, 3, 32, 8, 128, 9728),
  "smollm2-135m": Architecture(
    8192, 576, 3, 9, 3, 64, 1536, rope_theta=1e5, norm_eps=1e-5, qk_norm=False
  ),
}
WAYS = {
  "default": (True, "cudnn", jnp.bfloat16),
  "plain": (False, "xla", jnp.bfloat16),
  "float32": (False, "xla", jnp.float32),
}
MODELS = {
  "0.5b": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
  "1.5b": "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
}


def real_looking(shape):
  """Random weights with the key and query biases, and the few large columns, of a real model."""
  params = jax.jit(lambda key: transformer.init(shape, key))(jax.random.key(0))
  params["embed"]["embedding"] = (
    params["embed"]["embedding"].at[:, jnp.array([3, 17])].multiply(100)
  )
  if shape.qkv_bias:
    attend = params["layers"]["attention"]
    noise = lambda bias, size: size * jax.random.normal(jax.random.key(bias.size), bias.shape)
    k = attend["k"]["bias"]
    slow = shape.head_size // 2 - 1  # real models have their large biases in the slowest pairs
    attend["k"]["bias"] = (k + noise(k, 2)).at[:, :, slow].add(350).at[:, :, -2].add(-200)
    attend["q"]["bias"] += noise(attend["q"]["bias"], 0.5)
    attend["v"]["bias"] += noise(attend["v"]["bias"], 1)
  return params


def made_up_samples(seed, vocabulary, count=40):
  """Prompts, which of two texts each is given, responses; one token, many, and everything
  between.
  """
  rng = np.random.default_rng(seed)
  ids = lambda n: rng.integers(3, vocabulary, n).tolist()
  prompts = [ids(n) for n in rng.integers(20, 120, count)]
  responses = [ids(n) for n in (1, 1, 60, *rng.integers(1, 40, count - 3))]
  return prompts, rng.integers(0, 2, count).tolist(), responses


def gradients(params, shape, knowledge, batch, skip=0):
  """{way: (loss, the gradient that the optimizer sees)}, by the step itself."""
  found = {}
  for way, (unroll, attn_impl, dtype) in WAYS.items():
    teacher = teacher_lib.prepare(
      params,
      shape,
      knowledge,
      skip=skip,
      dtype=dtype,
      attn_impl="flash" if attn_impl == "cudnn" else attn_impl,
      unroll=unroll,
    )
    kept = optax.trace(decay=0.0)  # its state is the gradient
    remat = "full" if dtype == jnp.float32 else "dots"
    step = step_lib.make_step(
      shape, kept, dtype=dtype, remat=remat, attn_impl=attn_impl, micro_tokens=4096
    )
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
      state, metrics = step(
        step_lib.init_state(jax.tree.map(jnp.copy, params), kept), teacher, batch
      )
    found[way] = float(metrics["loss"]), state.optimizer.trace
    del state, teacher
  return found


@jax.jit
def distance(one, other):
  """The norm of the difference of two gradients."""
  return jnp.sqrt(
    sum(
      jnp.sum(jnp.square(a - b))
      for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )
  )


def compare(found):
  losses, trees = zip(*found.values())
  nothing = jax.tree.map(jnp.zeros_like, trees[0])
  norms = [float(distance(tree, nothing)) for tree in trees]
  assert not finite.not_finite(trees[0])
  default, plain, exact = trees
  ours, plain = (float(distance(tree, exact)) / norms[2] for tree in (default, plain))
  print(f"losses {[round(loss, 5) for loss in losses]}, norms {[round(norm, 4) for norm in norms]}")
  print(
    f"error of the default way {ours:.4f}, of the plain form {plain:.4f}, ratio {ours / plain:.2f}"
  )
  assert ours <= 1.5 * plain


@pytest.mark.parametrize(
  "name, pack", [*((name, True) for name in SHAPES), ("qwen2.5-1.5b", False)]
)
def test_gradient_is_as_near_to_float32_as_that_of_the_plain_form(name, pack):
  shape = SHAPES[name]
  prompts, given, responses = made_up_samples(1, shape.vocabulary)
  knowledge = [
    np.random.default_rng(i).integers(3, shape.vocabulary, n).tolist()
    for i, n in enumerate((70, 31))
  ]
  batch = batch_lib.assemble(
    prompts,
    given,
    responses,
    pad_id=0,
    length=192,
    response_length=64,
    texts=2 if pack else 1,
    pack=pack,
  )
  batch = mesh_lib.pad_batch(
    batch, mesh_lib.make_mesh(config_lib.default().mesh), multiple=len(batch.mask) + 1
  )
  compare(gradients(real_looking(shape), shape, knowledge, batch))


# Real weights, where they are.

DESKS = {
  "a broken lamp": "G7",
  "a late parcel": "C3",
  "a wrong item": "K10",
  "an invoice": "E5",
  "a lost password": "J9",
}
SAYINGS = (
  "I have a case of {}.",
  "Hello, it is about {}!",
  "Good morning. Who helps me with {}? Thank you very much in advance.",
  "{}",
  "My neighbour had {} last year, and now so do I. What now?",
  "Again: {}. It is the third time this month.",
)


def instructions():
  desks = ", ".join(DESKS.values())
  say = (
    "You answer customers of a lamp shop. Desks: {}. Answer in one short sentence; end with the "
    "desk in brackets.\n\nCustomer: {}"
  )
  return [say.format(desks, saying.format(kind)) for kind in DESKS for saying in SAYINGS]


@pytest.fixture(name="real", scope="module", params=MODELS)
def fixture_real(request):
  """(config, policy, task) of a real model."""
  folder = os.environ.get("OEL_MODELS")
  if folder is None:
    pytest.skip("OEL_MODELS names no folder with the real weights")
  config = config_lib.default()
  with config.unlocked():
    config.policy.update(
      weights=str(pathlib.Path(folder) / MODELS[request.param]),
      thinking=False,
      max_prompt_tokens=2048,
    )
    config.consolidation.update(
      steps=3, batch_size=24, learning_rate=1e-5, checkpoint_every=1000, log_probe=8
    )
  devices = mesh_lib.make_mesh(config.mesh)
  policy = load.load_policy(config.policy, devices)
  prefixes = [
    Prompt(f"case-{i}", (Message("user", text),)) for i, text in enumerate(instructions())
  ]
  items = [f"- EXPERIENCE ITEM: {kind} goes to desk {desk}." for kind, desk in DESKS.items()]
  texts = ["\n".join(items), "\n".join(reversed(items[:3]))]
  task = task_lib.make_task(
    policy.tokenizer, prefixes, texts, seed=0, round=1, thinking=False, limit=2048
  )
  return config, devices, policy, task


def test_gradient_of_real_weights(real):
  config, _, policy, task = real
  batch, _ = samples.sample_batch(
    task, policy, policy, range(24), range(24), config.consolidation, 64, "consolidate"
  )
  compare(gradients(policy.params, policy.architecture, task.knowledge, batch, task.skip))


def test_three_steps_of_real_weights(real, tmp_path):
  config, devices, policy, task = real
  with Metrics(tmp_path) as metrics:
    params, _ = trainer.consolidate(
      config.consolidation,
      task,
      policy,
      limit=64,
      directory=tmp_path / "checkpoints",
      mesh=devices,
      metrics=metrics,
    )
  lines = [
    line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"loss"' in line
  ]
  print(*lines, sep="\n")
  assert len(lines) == 3 and "NaN" not in "".join(lines)
  changed = jax.tree.map(
    lambda old, new: bool(jnp.isfinite(new).all()) and bool((old != new).any()),
    policy.params,
    params,
  )
  assert all(jax.tree.leaves(changed)), changed


def test_sampler_of_real_weights_draws_by_the_plain_form(real):
  """The log-probabilities of what was drawn, by prefill, cache and kernels, and by one plain pass
  in bfloat16 and in float32.
  """
  config, _, policy, task = real
  # 20 rows: the products for few rows are used.
  prompts = [list(prompt) for prompt in task.prompts[:20]]
  how = dict(
    sampling=Sampling(temperature=0.7),
    max_new_tokens=48,
    eos_ids=policy.tokenizer.eos_ids,
    pad_id=policy.tokenizer.pad_id,
  )
  drawn, scores = generate(
    policy.params, policy.architecture, prompts, range(20), dtype=jnp.bfloat16, logprobs=True, **how
  )
  T = -(-max(len(p) + len(d) for p, d in zip(prompts, drawn)) // 32) * 32

  @functools.partial(jax.jit, static_argnames="dtype")
  def plain(params, tokens, lengths, dtype):
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, _ = transformer.apply(
      params, policy.architecture, tokens, positions, segments, dtype=dtype
    )

    def one(row):  # a row's logits at a time
      logits = jax.nn.log_softmax(transformer.logits(row[0], transformer.head(params)))
      return jnp.take_along_axis(logits[:-1], row[1][1:, None], axis=-1)[:, 0]

    return jax.lax.map(one, (hidden, tokens))

  tokens, lengths = (
    np.zeros((20, T), np.int32),
    np.array([len(p) + len(d) for p, d in zip(prompts, drawn)]),
  )
  for row, prompt, ids in zip(tokens, prompts, drawn):
    row[: len(prompt) + len(ids)] = [*prompt, *ids]
  cut = lambda table: np.concatenate(
    [table[i, len(p) - 1 : len(p) + len(d) - 1] for i, (p, d) in enumerate(zip(prompts, drawn))]
  )
  beside = cut(np.asarray(plain(policy.params, tokens, lengths, jnp.bfloat16)))
  with jax.default_matmul_precision("highest"):
    wanted = cut(np.asarray(plain(policy.params, tokens, lengths, jnp.float32)))
  ours, theirs = (np.sqrt(np.square(x - wanted).mean()) for x in (np.concatenate(scores), beside))
  print(
    f"{len(wanted)} ids; root mean square error of the sampler's log-probabilities {ours:.4f}, of "
    f"the plain form's {theirs:.4f}"
  )
  print(repr(policy.tokenizer.decode(drawn[0])))
  assert ours <= 1.5 * theirs
