"""The divergence from the base on unrelated prompts, against a sum over the vocabulary by hand;
and where it is told.
"""

import json
import logging

import jax
import numpy as np
import pytest
from test_changed_runs import Player
from test_loop import short_config

from oel_jax.conversations.schema import Message
from oel_jax.evaluation import statistics
from oel_jax.pocket import load
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import transformer
from oel_jax.policy.sampling.sampler import Policy, Sampling
from oel_jax.policy.tokenizers import SentencePieceTokenizer
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.metrics import Metrics
from oel_jax.runtime.seeds import derive
from oel_jax.stages import unrelated, user_side
from oel_jax.stages.evaluate import evaluate
from oel_jax.stages.run import Meter, Run

ASKED = ("Name the capital of Canada.", "What is 17 plus 25?", "Why?")
LIMIT, TEMPERATURE = 6, 0.7


@pytest.fixture(scope="module", name="base")
def fixture_base():
  tokenizer = SentencePieceTokenizer((load.DATA / load.TOKENIZER).read_bytes())
  architecture = architecture_lib.Architecture(tokenizer.vocabulary, 16, 1, 2, 1, 8, 24)
  return Policy(architecture, transformer.init(architecture, jax.random.key(0)), tokenizer)


@pytest.fixture(name="run")
def fixture_run(tmp_path, base):
  config = short_config()
  config.deployment.max_response_tokens = LIMIT
  config.evaluation.unrelated = str(tmp_path / "unrelated.txt")
  config.evaluation.retention = 0
  (tmp_path / "unrelated.txt").write_text("".join(f"{line}\n" for line in ASKED))
  config.mesh.data = 1
  mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:1])
  with Metrics(tmp_path) as metrics:
    yield Run(config, tmp_path, metrics, mesh, base)


def moved(base: Policy) -> Policy:
  """The base with other numbers in every matrix."""
  rng = np.random.default_rng(1)
  noise = lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
  return base.replace(jax.tree.map(noise, base.params))


def log_probabilities(policy: Policy, rows: list[list[int]]) -> list[np.ndarray]:
  """Of each row, [T, V] float64, at TEMPERATURE."""
  tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
  for line, row in zip(tokens, rows, strict=True):
    line[: len(row)] = row  # what stands behind a row changes nothing before it
  places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

  @jax.jit
  def logits(params):
    hidden, _ = transformer.apply(params, policy.architecture, tokens, places, np.ones_like(tokens))
    return transformer.logits(hidden, transformer.head(params))

  found = np.asarray(logits(policy.params), np.float64) / TEMPERATURE
  found -= found.max(-1, keepdims=True)
  return list(found - np.log(np.exp(found).sum(-1, keepdims=True)))


def test_it_is_the_divergence_from_the_base_on_the_policys_own_answers(run):
  policy = moved(run.base)
  meter = Meter(policy)
  found = unrelated.measure(run, policy, meter)
  prompts = [
    list(policy.tokenizer.chat([Message("user", line)], thinking=run.config.policy.thinking))
    for line in ASKED
  ]
  answers = policy.sample(
    prompts,
    [derive(run.config.seed, 0, "held out", i) for i in range(len(ASKED))],
    sampling=Sampling(TEMPERATURE),
    max_new_tokens=LIMIT,
  )
  whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
  both = (log_probabilities(one, whole) for one in (policy, run.base))
  divergences = []
  for prompt, row, of, base in zip(prompts, whole, *both, strict=True):
    said = slice(len(prompt) - 1, len(row) - 1)
    divergences += list((np.exp(of) * (of - base)).sum(-1)[said])
  assert run.config.consolidation.temperature == TEMPERATURE
  assert len(divergences) == sum(map(len, answers)) and min(divergences) > 0.01
  np.testing.assert_allclose(found["kl"], np.mean(divergences), rtol=1e-4)
  assert found["prompts"] == 3
  assert found["response_tokens"] == statistics.mean(list(map(len, answers)))
  size = sum(leaf.size for leaf in jax.tree.leaves(policy.params))
  assert meter.tokens == sum(map(len, answers))
  assert meter.flops == 3 * 2 * size * sum(map(len, whole))


def test_the_base_is_not_away_from_itself(run):
  found = unrelated.measure(run, run.base, Meter(run.base))
  assert abs(found["kl"]) < 1e-6 and found["response_tokens"]["of"] == 3


def test_it_is_measured_where_asked_for_and_again_where_the_prompts_change(
  run, tmp_path, monkeypatch, caplog
):
  measured = []

  def measure(run, policy, meter):
    measured.append(policy)
    return {"prompts": 1, "kl": 0.25, "response_tokens": statistics.mean([3])}

  monkeypatch.setattr(unrelated, "measure", measure)
  player = Player()
  this = Run(run.config, tmp_path, run.metrics, None, player)
  for _ in range(2):
    evaluate(this, 0, player, player, [])
  assert measured == [player]
  assert json.loads((tmp_path / "round_0/evaluation.json").read_text())["unrelated"]["kl"] == 0.25
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["unrelated_kl"] for line in lines] == [0.25]
  (tmp_path / "unrelated.txt").write_text("Why not?\n")
  with caplog.at_level(logging.WARNING):
    evaluate(this, 0, player, player, [])
  assert len(measured) == 2 and "it was measured with other settings" in caplog.text


@pytest.mark.parametrize(
  "content, told",
  [
    ("\n\n", "config.evaluation.unrelated: .*unrelated.txt holds no prompts"),
    (None, "unrelated.txt"),
  ],
)
def test_prompts_that_are_none_are_told_before_anything_is_written(run, tmp_path, content, told):
  (tmp_path / "unrelated.txt").unlink()
  if content is not None:
    (tmp_path / "unrelated.txt").write_text(content)
  with pytest.raises((ValueError, OSError), match=told):
    user_side.check(run.config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_too_long_is_named(run):
  run.config.policy.max_prompt_tokens = 12
  with pytest.raises(ValueError, match="max_prompt_tokens is 12, but prompt unrelated-1 has"):
    unrelated.measure(run, run.base, Meter(run.base))
