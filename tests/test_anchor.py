"""The term that keeps what the first weights do with knowledge in their prompts: its value against
float64, its gradient against differentiation of the plain form, and what a round lays out for it.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_on_mesh import TEXTS, A, _mesh, _params, _placed
from test_trainer import PREFIXES, _config, _one_device, _run, _task, policy  # noqa: F401
from test_trainer import TEXTS as KNOWLEDGE

from oel_jax.consolidation import anchor, samples, trainer
from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import task as task_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy import parameters, transformer
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.metrics import Metrics

T, KEEP = 0.7, 3.0
OTHERS = ([9, 8, 7], [4], [])  # the knowledge that is kept


@functools.cache
def _samples(count=6):
  """(prompt, knowledge of the loss, that which is kept, response) of each."""
  rng = np.random.default_rng(5)
  draw = lambda n: rng.integers(3, 32, n).tolist()
  return [(draw(1 + i), TEXTS[i % 3], OTHERS[i % 3], draw(1 + 4 * i % 9)) for i in range(count)]


def _scores(params, prompt, response):
  """Logits over T that the response's tokens are drawn from, of one sequence without a batch."""
  size = len(prompt) + len(response)
  ids = jnp.zeros((1, 32), jnp.int32).at[0, :size].set(jnp.array([*prompt, *response]))
  hidden, _ = transformer.apply(params, A, ids, jnp.arange(32)[None], jnp.ones_like(ids))
  logits = transformer.logits(hidden[0], transformer.head(params)) / T
  return logits[len(prompt) - 1 : size - 1]


def _plain(params, teacher):
  """The mean over the loss's tokens, and KEEP times the mean over those that are kept."""
  means = []
  for kept in (False, True):
    total = count = 0
    for prompt, known, other, response in _samples()[: 2 if kept else None]:
      own = _scores(params, [*other, *prompt] if kept else prompt, response)
      theirs = _scores(teacher, [*(other if kept else known), *prompt], response)
      log_p, log_q = jax.nn.log_softmax(own), jax.nn.log_softmax(theirs)
      total += (jnp.exp(log_p) * (log_p - log_q)).sum()
      count += len(response)
    means.append(total / count)
  return means[0] + KEEP * means[1], means


def _batches(mesh, micro_tokens):
  prompts, known, others, responses = zip(*_samples())
  how = dict(pad_id=0, response_length=10)
  texts = [i % 3 for i in range(len(prompts))]
  made = batch_lib.assemble(prompts, texts, responses, length=19, texts=2, **how)
  informed = [[*other, *prompt] for other, prompt in zip(others, prompts, strict=True)][:2]
  kept = batch_lib.assemble(informed, [0, 0], responses[:2], length=24, **how)
  place = lambda batch, count: samples.place(batch, mesh, count, micro_tokens or 10**6)
  return place(made, 6), place(kept, 2)


@pytest.mark.parametrize(
  "mesh, unroll, micro_tokens",
  [
    ((1, 1), False, 40),
    pytest.param((1, 1), True, None, marks=pytest.mark.slow),
    pytest.param((2, 2), False, None, marks=pytest.mark.slow),
    ((2, 2), True, 40),
  ],
)
def test_gradient_and_value_are_those_of_the_plain_form(mesh, unroll, micro_tokens):
  mesh, student, teacher = _mesh(*mesh), _params(A, 0), _params(A, 1)
  _, _, read = _placed(mesh, A, student, teacher)
  optimizer = optax.sgd(1.0)  # the change of the parameters is the gradient
  begin = lambda params: step_lib.init_state(params, optimizer)
  abstract = mesh_lib.abstract_init(begin, mesh, parameters.abstract(A))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  state = mesh_lib.sharded_init(begin, mesh, student)
  if not unroll:
    read = teacher_lib.prepare(teacher, A, TEXTS, dtype=jnp.float32)
  step = step_lib.make_step(
    A,
    optimizer,
    chunk=7,
    micro_tokens=micro_tokens,
    shardings=shardings,
    anchor=KEEP,
  )
  (_, means), gradient = jax.jit(jax.value_and_grad(_plain, has_aux=True))(student, teacher)
  new, metrics = step(state, read, *_batches(mesh, micro_tokens))
  np.testing.assert_allclose([metrics["loss"], metrics["anchor"]], means, rtol=1e-5)
  for old, now, slope in zip(*map(jax.tree.leaves, (student, new.params, gradient)), strict=True):
    np.testing.assert_allclose(old - np.asarray(now), slope, rtol=2e-4, atol=5e-6)


def test_what_is_kept_is_what_the_teacher_does_without_other_knowledge():
  """KL(π_θ ‖ π_teacher) on one prompt, both sides given e', in float64."""
  student, teacher = _params(A, 0), _params(A, 1)
  total = count = 0.0
  for prompt, _, other, response in _samples()[:2]:
    sides = [
      np.asarray(_scores(params, [*other, *prompt], response), np.float64)
      for params in (student, teacher)
    ]
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in sides)
    total, count = total + (np.exp(log_p) * (log_p - log_q)).sum(), count + len(response)
  read = teacher_lib.prepare(teacher, A, TEXTS, dtype=jnp.float32)
  step = step_lib.make_step(A, optax.sgd(1.0), chunk=7, anchor=KEEP)
  state = step_lib.init_state(jax.tree.map(jnp.asarray, student), optax.sgd(1.0))
  _, metrics = step(state, read, *_batches(_mesh(1, 1), None))
  np.testing.assert_allclose(metrics["anchor"], total / count, rtol=1e-5)


def test_samples_are_laid_out_with_the_knowledge_that_is_kept(policy):  # noqa: F811
  # Of four samples 0.3 are 1.2: two are kept.
  config, task = _config(anchor=1.0, anchor_share=0.3, batch_size=4), _task(policy)
  other = task_lib.make_task(
    policy.tokenizer,
    PREFIXES,
    [text.replace("G", "Q") for text in KNOWLEDGE],
    seed=3,
    round=1,
    thinking=True,
    limit=256,
  )
  drawn = samples.draw(task, policy, policy, [4, 0, 2, 1], [5, 6, 7, 8], config, 8, "consolidate")
  keep = anchor.prepare(config, other, policy, 8, _one_device(), 10**6, 4)
  batch, tokens = keep(drawn)
  tokens_SxT, segments_SxT, mask_SxR = map(np.asarray, (batch.tokens, batch.segments, batch.mask))
  found = set()
  for row, segments in zip(*(x[mask_SxR.any(-1)] for x in (tokens_SxT, segments_SxT)), strict=True):
    found |= {tuple(row[segments == n].tolist()) for n in range(1, segments.max() + 1)}
  wanted = {
    (*other.knowledge[text], *prompt[other.skip[text] :], *response)
    for prompt, text, response in list(zip(*drawn[:3], strict=True))[:2]
  }
  assert found == wanted and tokens == sum(map(len, wanted))
  assert batch.mask.sum() == sum(map(len, drawn.responses[:2]))
  assert anchor.prepare(_config(), other, policy, 8, _one_device(), 10**6, 4) is None


@pytest.mark.slow
def test_a_round_holds_to_what_is_kept(policy, tmp_path):  # noqa: F811
  held, parameters_by = {}, {}
  for weight in (0.0, 1e-9, 30.0):
    folder = tmp_path / str(weight)
    config = _config(steps=4, anchor=weight, anchor_share=1.0)
    parameters_by[weight], _ = _run(policy, folder, config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held[weight] = [line.get("anchor") for line in lines if line["step"]]
  assert held[0.0] == [None] * 4
  assert all(abs(held[weight][0]) < 1e-6 for weight in (1e-9, 30.0))  # both are the first weights
  assert 0 < held[30.0][-1] < held[1e-9][-1]
  pairs = zip(*(jax.tree.leaves(parameters_by[weight]) for weight in (0.0, 1e-9)), strict=True)
  assert max(np.abs(a - b).max() for a, b in pairs) < 1e-4


def test_knowledge_of_another_task_is_kept_where_it_is_given(policy, tmp_path):  # noqa: F811
  """`kept` says whose; the loss goes by the round's own. What that costs is told."""
  other = task_lib.make_task(
    policy.tokenizer,
    PREFIXES,
    ["- EXPERIENCE ITEM: The goal is Q."] * 2,
    seed=3,
    round=1,
    thinking=True,
    limit=256,
  )
  ends = []
  for kept in (None, other):
    folder = tmp_path / str(kept is None)
    with Metrics(folder) as metrics:
      params, cost = trainer.consolidate(
        _config(steps=2, anchor=5.0, anchor_share=1.0, log_probe=0),
        _task(policy),
        policy,
        limit=8,
        directory=folder / "checkpoints",
        mesh=_one_device(),
        metrics=metrics,
        kept=kept,
      )
    ends.append(jax.device_get(params))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert cost["flops"] == 2 * size * (cost["tokens"] + 4 * cost["trained"])
    assert cost["trained"] > 2 * cost["tokens"]  # the knowledge is longer than these prompts
  pairs = zip(*map(jax.tree.leaves, ends), strict=True)
  assert not all(np.array_equal(a, b) for a, b in pairs)
