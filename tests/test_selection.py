"""Which samples a step trains on: their scores against float64, sample by sample, and the choice
against a count by hand; and that a step that chooses none away is the plain one.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_on_mesh import TEXTS, A, _mesh, _params, _placed
from test_trainer import _config, _one_device, _run, _task, policy  # noqa: F401

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import draws, restore, samples, selection, trainer
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy import transformer
from oel_jax.runtime import finite
from oel_jax.runtime import mesh as mesh_lib

_logits = jax.jit(
  lambda params, tokens: transformer.logits(
    transformer.apply(params, A, tokens, jnp.arange(40)[None], jnp.ones_like(tokens))[0],
    transformer.head(params),
  )
)


def _log_probabilities(params, prompt, response):
  """Of the response's ids behind the prompt, one unpadded sequence; softmax in float64."""
  ids = np.zeros((1, 40), np.int32)  # one shape; what stands behind a token does not reach it
  ids[0, : len(prompt) + len(response)] = [*prompt, *response]
  logits = np.asarray(_logits(params, ids)[0], np.float64)[len(prompt) - 1 :][: len(response)]
  logits -= logits.max(-1, keepdims=True)
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  return logits[np.arange(len(response)), response]


@functools.cache
def _drawn(count=13):
  """Samples of unlike lengths, with the student's log-probabilities."""
  rng = np.random.default_rng(3)
  draw = lambda n: rng.integers(3, 32, n).tolist()
  prompts = [draw(1 + i % 9) for i in range(count)]
  responses = [draw(1 + 3 * i % 10) for i in range(count)]
  student = _params(A, 0)
  logprobs = [_log_probabilities(student, *one) for one in zip(prompts, responses, strict=True)]
  texts = [i % len(TEXTS) for i in range(count)]
  return samples.Drawn(prompts, texts, responses, logprobs, max(map(len, responses)))


def _scores_by_hand(drawn):
  teacher, found = _params(A, 1), []
  for prompt, text, response, own in zip(*drawn[:4], strict=True):
    other = _log_probabilities(teacher, [*TEXTS[text], *prompt], response)
    found.append(np.abs(own - other).sum())
  return np.array(found)


@pytest.mark.parametrize(
  "mesh, unroll, pack, micro_tokens",
  [
    ((1, 1), False, True, None),
    ((1, 1), True, False, 40),
    ((2, 2), True, True, 40),
    ((2, 2), False, True, 40),
  ],
)
def test_scores_are_those_of_float64_sample_by_sample(mesh, unroll, pack, micro_tokens):
  drawn, mesh = _drawn(), _mesh(*mesh)
  _, _, teacher = _placed(mesh, A, _params(A, 0), _params(A, 1))
  if not unroll:
    teacher = teacher_lib.prepare(_params(A, 1), A, TEXTS, dtype=jnp.float32)
  how = dict(length=19, response_length=10, texts=2 if pack else 1, pack=pack)
  made = batch_lib.assemble(*drawn[:3], pad_id=0, **how)
  rows = batch_lib.rows_of(*drawn[:3], **how)
  placed = samples.place(selection.scored(made, rows, drawn), mesh, 16, micro_tokens or 10**6)
  score = selection.make_scorer(A, samples=16, chunk=7, micro_tokens=micro_tokens, mesh=mesh)
  found = np.asarray(score(teacher, placed))
  np.testing.assert_allclose(found[:13], _scores_by_hand(drawn), rtol=1e-4, atol=1e-4)
  assert not found[13:].any()


def test_the_choice_is_the_largest_score_for_its_tokens_as_far_as_they_fit():
  # Scores for a token: .5, .1, 2, .5, 1; half of 40 tokens are 20.
  scores, tokens = [5.0, 1.0, 8.0, 2.0, 12.0], [10, 10, 4, 4, 12]
  assert selection.choose(scores, tokens, 0.5) == [2, 3, 4]  # 4 + 12, then 10 no more, but 4
  assert selection.choose(scores, tokens, 0.09) == [2]  # which is too large, and the first
  assert selection.choose(scores, tokens, 1.0) == [0, 1, 2, 3, 4]
  assert selection.choose([1.0, 1.0], [3, 3], 0.5) == [0]  # a tie
  assert selection.choose([np.nan, 1.0], [3, 3], 0.5) == [1]


def test_the_choice_is_that_of_a_count_by_numpy():
  rng = np.random.default_rng(0)
  for _ in range(200):
    n = rng.integers(1, 12)
    scores, tokens = rng.exponential(size=n), rng.integers(1, 50, n)
    share = rng.uniform(0.05, 1)
    chosen = selection.choose(scores, tokens, share)
    density, inside = scores / tokens, np.isin(np.arange(n), chosen)
    assert tokens[inside].sum() <= share * tokens.sum() or len(chosen) == 1
    assert inside[density.argmax()]
    for i in np.flatnonzero(~inside):  # what stands before it left it no room
      before = tokens[inside & (density >= density[i])].sum()
      assert before + tokens[i] > share * tokens.sum()


def _lines(folder):
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return [line for line in lines if line["step"]]


def test_a_round_trains_on_a_share_and_says_what_it_cost(policy, tmp_path):  # noqa: F811
  config = _config(steps=2, select=0.5, batch_size=5, log_probe=0)
  _, cost = _run(policy, tmp_path, config)
  lines = _lines(tmp_path)
  assert all(0 < line["selected"] <= 0.5 for line in lines)
  assert all(line["selected_disagreement"] >= line["disagreement"] > 0 for line in lines)
  assert 0 < cost["trained"] <= 0.5 * cost["tokens"]
  parameters = sum(leaf.size for leaf in jax.tree.leaves(policy.params))
  assert cost["flops"] == 2 * parameters * (2 * cost["tokens"] + 4 * cost["trained"])


@pytest.mark.slow
def test_it_is_gone_on_with_to_the_same_bits(policy, tmp_path):  # noqa: F811
  config = _config(steps=3, checkpoint_every=1, select=0.5, batch_size=5, log_probe=0)
  config.update(balance=True, anchor=1.0)
  whole, _ = _run(policy, tmp_path / "whole", config)
  done = []

  def stop(n, note=""):
    del note
    done.append(n)
    if len(done) == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    _run(policy, tmp_path / "cut", config, advance=stop)
  again, _ = _run(policy, tmp_path / "cut", config)
  jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_a_score_that_is_no_number_ends_the_run(policy, tmp_path, monkeypatch):  # noqa: F811
  """Though its sample is chosen last, and the others train on."""
  scores = jnp.arange(5.0).at[1].set(jnp.nan)
  monkeypatch.setattr(selection, "make_scorer", lambda *_, **__: lambda teacher, batch: scores)
  config = _config(steps=1, select=0.5, batch_size=5, log_probe=0)
  with pytest.raises(finite.NotFiniteError, match="disagreement is nan"):
    _run(policy, tmp_path, config)


def test_a_step_that_chooses_none_away_is_the_plain_one(policy, tmp_path):  # noqa: F811
  """With select = 1 a round ends with the bits of steps put together by hand."""
  config, mesh, task = _config(steps=2, log_probe=0), _one_device(), _task(policy)
  found, cost = _run(policy, tmp_path, config)
  optimizer = restore.make_optimizer(config)
  begin = restore.beginning(optimizer)
  abstract = mesh_lib.abstract_init(begin, mesh, policy.params)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  micro_tokens = samples.micro_tokens_of(config, task.prompts, limit=8, samples=4, mesh=mesh)
  step = trainer.make_step(config, policy, optimizer, "xla", shardings, micro_tokens)
  teacher = teacher_lib.prepare(
    policy.params, policy.architecture, task.knowledge, skip=task.skip, dtype=jnp.float32
  )
  state, tokens = mesh_lib.sharded_init(begin, mesh, policy.params), 0
  for drawn, _ in zip(draws.batches(task, config), range(2)):
    given = task, policy.replace(state.params), policy, drawn["prompt"], drawn["draw"], config, 8
    batch, _ = samples.sample_batch(*given, "consolidate")
    tokens += int((batch.segments > 0).sum())
    state, _ = step(state, teacher, samples.place(batch, mesh, 4, micro_tokens))
  jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(state.params))
  assert cost["trained"] == cost["tokens"] == tokens
  assert set(_lines(tmp_path)[0]) & {"selected", "disagreement"} == set()


def test_the_students_own_probabilities_are_those_of_its_samples(policy):  # noqa: F811
  """As the sampler gives them; without a choice they are not asked for."""
  task = _task(policy)
  given = task, policy, policy, [0, 3], [7, 8], _config(), 8, "consolidate"
  plain, scored = samples.draw(*given), samples.draw(*given, logprobs=True)
  assert plain.responses == scored.responses and plain.logprobs == ()
  for ids, logprobs in zip(scored.responses, scored.logprobs, strict=True):
    assert logprobs.shape == (len(ids),) and (logprobs <= 0).all()
  kept = scored.only([1])
  assert kept.prompts == [task.prompts[3]] and kept.responses == [scored.responses[1]]
  assert kept.longest == scored.longest
