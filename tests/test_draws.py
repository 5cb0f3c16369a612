"""What the steps of a round draw from: whole games, and whose samples; and rounds that are trained
so.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_trainer import TEXTS, _config, _lines, _one_device, _task

from oel_jax.consolidation import draws, samples, trainer
from oel_jax.consolidation import task as task_lib
from oel_jax.conversations.schema import Message, Prompt
from oel_jax.pocket import vocabulary
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import transformer
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.policy.tokenizers import SentencePieceTokenizer
from oel_jax.runtime import finite
from oel_jax.runtime.metrics import Metrics

TURNS = (1, 3, 2, 1, 2, 3)  # of each game
BARE = dict(log_probe=0, checkpoint_every=100)


@pytest.fixture(scope="module", name="policy")
def fixture_policy():
  architecture = architecture_lib.named("pocket-tiny")
  params = jax.jit(lambda key: transformer.init(architecture, key))(jax.random.key(0))
  return Policy(architecture, params, SentencePieceTokenizer(vocabulary.build()))


def games_task(policy, texts=TEXTS):
  prompts = [
    Prompt(f"r1-prefix-{game:05d}-{turn}", (Message("user", "go " * (3 * game + turn + 1)),))
    for game, turns in enumerate(TURNS)
    for turn in range(turns)
  ]
  how = dict(seed=3, round=1, thinking=True, limit=256)
  return task_lib.make_task(policy.tokenizer, prompts, texts, **how)


def test_a_step_takes_all_the_prompts_of_new_games(policy):
  task, config = games_task(policy), _config(games_per_step=2)
  games = draws.games_of(task)
  assert list(map(len, games)) == list(TURNS) and sum(games, []) == list(range(12))
  assert draws.max_samples(task, config) == 6
  assert draws.max_samples(task, _config(batch_size=4)) == 4
  batches = iter(draws.batches(task, config))
  steps = [next(batches) for _ in range(2)]
  state = batches.get_state()
  steps.append(next(batches))
  assert sorted(n for step in steps for n in step["prompt"]) == list(range(12))  # each game once
  for step in steps:
    assert {frozenset(game) for game in games if set(game) & set(step["prompt"])} == {
      frozenset(game) for game in games if set(game) <= set(step["prompt"])
    }
  drawn = [n for step in [*steps, next(batches)] for n in step["draw"]]
  assert len(set(drawn)) == len(drawn)
  again = iter(draws.batches(task, config))
  again.set_state(state)
  assert next(again) == steps[2]


class Counting:
  """Answers each prompt with its first id and how often it was asked anything."""

  def __init__(self):
    self.asked = []

  def sample(self, prompts, seeds, **how):
    self.asked.append(list(zip(map(tuple, prompts), seeds, strict=True)))
    return [[prompt[0], len(self.asked)] for prompt in prompts]


def test_what_is_drawn_once_is_sampled_once():
  policy = Counting()
  once = draws.Once(policy)
  assert once.sample([(1,), (2,)], [5, 6]) == [[1, 1], [2, 1]]
  assert once.sample([(2,), (3,), (2,), (3,)], [6, 7, 8, 7]) == [[2, 1], [3, 2], [2, 2], [3, 2]]
  assert policy.asked == [[((1,), 5), ((2,), 6)], [((3,), 7), ((2,), 8)]]


def test_a_prompt_whose_numbers_are_none_is_named_by_its_place():
  class Fails:
    def sample(self, prompts, seeds, **how):
      raise finite.NotFiniteError("no number", prompts=[1])

  once = draws.Once(Fails(), {((1,), 5): [0]})
  with pytest.raises(finite.NotFiniteError) as error:
    once.sample([(2,), (1,), (3,)], [0, 5, 0])
  assert error.value.prompts == (2,)  # the second of those that are new


@pytest.mark.parametrize(
  "renewed, teacher, who",
  [
    ("step", "frozen", ("student", "policy", "draw")),
    ("step", "live", ("student", "student", "draw")),
    ("step", "first", ("student", "first", "draw")),
    ("round", "frozen", ("policy", "policy", "prompt")),
    ("round", "first", ("policy", "policy", "prompt")),
    ("never", "live", ("first", "first", "prompt")),
  ],
)
def test_whose_samples_a_step_takes(renewed, teacher, who):
  found = draws.samplers(_config(renewed=renewed, teacher=teacher), "policy", "first")
  drawn = {"prompt": [3, 1], "draw": [8, 9]}
  *sides, numbers = found("student", drawn)
  names = [getattr(side, "policy", side) for side in sides]
  assert (*names, numbers) == (*who[:2], drawn[who[2]])


def test_the_first_weights_sample_once_a_round_what_they_teach():
  found = draws.samplers(
    _config(renewed="round", teacher="first", data="teacher"), "policy", "first"
  )
  assert found.once.policy == found.teacher == "first"


def test_a_response_that_ends_with_the_limits_last_token_is_whole():
  assert draws.whole([[7] * 4, [7, 2], [7, 7, 7, 2], [2]], 4, (2, 3)) == [1, 2, 3]


def run(policy, folder, task, monkeypatch, base=None, **changes):
  """Trains; returns what each step was sampled with, and the lines of metrics."""
  seen, draw, assemble = [], samples.draw, samples.assemble

  def drawing(*args, **how):
    drawn = draw(*args, **how)
    seen.append([list(args[3]), drawn.responses])
    return drawn

  def assembling(*args, **how):
    seen[-1].append(assemble(*args, **how))
    return seen[-1][-1]

  with Metrics(folder) as metrics, monkeypatch.context() as patch:
    patch.setattr(samples, "draw", drawing)
    patch.setattr(samples, "assemble", assembling)
    params, _ = trainer.consolidate(
      _config(**BARE | changes),
      task,
      policy,
      limit=8,
      directory=folder / "checkpoints",
      mesh=_one_device(),
      metrics=metrics,
      base=base,
    )
  return seen, [line for line in _lines(folder) if line["step"]], jax.device_get(params)


@pytest.fixture(name="cheap")
def fixture_cheap(monkeypatch):
  """A step that compiles at once, and tells how many tokens count."""

  def make(*args, **how):
    def step(state, teacher, batch, kept, base):
      measured = {"loss": 1.0, "tokens": batch.mask.sum(), "not_finite": 0}
      return state._replace(step=state.step + 1), measured

    return step

  monkeypatch.setattr(trainer, "_step_with", make)


@pytest.fixture(name="said")
def fixture_said(monkeypatch):
  """Responses that nobody samples, for that compiles: of 1 to 4 tokens."""
  answer = lambda seed: [4 + seed % 9] * (seed % 4 + 1)
  said = lambda self, prompts, seeds, **how: [answer(seed) for seed in seeds]
  monkeypatch.setattr(Policy, "sample", said)


def test_games_of_all_lengths_are_one_update_each(policy, tmp_path, monkeypatch, cheap, said):
  seen, lines, _ = run(policy, tmp_path, games_task(policy), monkeypatch, steps=3, games_per_step=2)
  sizes = [len(chosen) for chosen, _, _ in seen]
  assert sum(sizes) == 12 and [line["samples"] for line in lines] == sizes
  for line, (_, responses, _) in zip(lines, seen, strict=True):
    assert line["tokens"] == sum(map(len, responses))


def test_samples_are_renewed_as_asked(policy, tmp_path, monkeypatch, cheap):
  """Five prompts, five a step: each comes up in both steps."""
  found = {}
  for renewed in ("step", "round", "never"):
    seen, *_ = run(
      policy, tmp_path / renewed, _task(policy), monkeypatch, steps=2, batch_size=5, renewed=renewed
    )
    found[renewed] = [dict(zip(chosen, responses, strict=True)) for chosen, responses, _ in seen]
  assert found["round"][0] == found["round"][1] == found["never"][0] == found["never"][1]
  assert found["step"][0] != found["step"][1]


def test_cut_responses_are_left_out_of_the_loss(policy, tmp_path, monkeypatch, cheap):
  """A random policy's are nearly all cut; one is made to end."""
  sample = Policy.sample

  def ends(self, prompts, seeds, **how):
    found = sample(self, prompts, seeds, **how)
    return [[*found[0][:2], *self.tokenizer.eos_ids], *([5] * 8 for _ in found[1:])]

  monkeypatch.setattr(Policy, "sample", ends)
  how = dict(steps=1, batch_size=5, cut_responses=False)
  seen, [line], _ = run(policy, tmp_path, _task(policy), monkeypatch, **how)
  [(chosen, responses, batch)] = seen
  assert line["cut"] == 0.8 and line["samples"] == 5 and line["tokens"] == 3 == batch.mask.sum()
  np.testing.assert_array_equal(batch.response[batch.mask], responses[0])


def test_where_all_are_cut_nothing_is_learned_and_that_is_told(
  policy, tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(Policy, "sample", lambda self, prompts, seeds, **how: [[5] * 8] * 4)
  how = dict(steps=1, cut_responses=False, weight_decay=0.0)
  _, [line], params = run(policy, tmp_path, _task(policy), monkeypatch, **how)
  assert line["loss"] == line["gradient_norm"] == line["tokens"] == 0 and line["cut"] == 1
  assert "round 1: a step learns nothing: all of its 4 responses were cut" in caplog.text
  jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(policy.params))


def test_a_live_teacher_moves_with_the_student(policy, tmp_path, monkeypatch, said):
  """Without knowledge it is the student: KL 0, wherever decay has taken the weights. The frozen one
  is left behind.
  """
  prompts = [Prompt(f"p{i}", (Message("user", "go " * (i + 1)),)) for i in range(5)]
  how = dict(seed=3, round=1, thinking=True, limit=256)
  task = task_lib.plain_task(policy.tokenizer, prompts, **how)
  found = {}
  for teacher in ("frozen", "live"):
    changes = dict(steps=2, teacher=teacher, weight_decay=300.0)
    _, lines, _ = run(policy, tmp_path / teacher, task, monkeypatch, **changes)
    found[teacher] = [line["kl"] for line in lines]
  assert abs(found["frozen"][0]) < 1e-6 and found["frozen"][1] > 1e-3
  assert max(map(abs, found["live"])) < 1e-6


def test_the_first_weights_teach_in_every_round(policy, tmp_path, monkeypatch, said):
  """Without knowledge, from a student of other weights: KL(student ‖ first), in NumPy float64."""
  prompts = [Prompt(f"p{i}", (Message("user", "go " * (i + 1)),)) for i in range(5)]
  how = dict(seed=3, round=2, thinking=True, limit=256)
  task = task_lib.plain_task(policy.tokenizer, prompts, **how)
  moved = policy.replace(jax.tree.map(lambda leaf: leaf * 1.05, policy.params))
  changes = dict(steps=1, batch_size=5, teacher="first", base=policy)
  [(chosen, responses, _)], [line], _ = run(moved, tmp_path, task, monkeypatch, **changes)
  found = []
  for k, response in zip(chosen, responses, strict=True):
    ids = jnp.array([[*task.prompts[k], *response]])
    ours, theirs = (_log_probabilities(each, ids)[-len(response) :] for each in (moved, policy))
    found += (np.exp(ours) * (ours - theirs)).sum(-1).tolist()
  assert line["kl"] > 1e-3
  np.testing.assert_allclose(line["kl"], np.mean(found), rtol=1e-3)


def _log_probabilities(policy, ids):
  """Of what comes behind each id but the last, at the divergence's temperature."""
  a, count = policy.architecture, ids.shape[1]
  hidden, _ = transformer.apply(
    policy.params, a, ids, jnp.arange(count)[None], jnp.ones((1, count), jnp.int32)
  )
  logits = transformer.logits(hidden[0, :-1], transformer.head(policy.params))
  scaled = np.asarray(logits, np.float64) / _config().temperature
  return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def test_ends_that_are_one_are_those_of_the_tokenizer(policy, tmp_path, monkeypatch, said):
  """With two of them the loss is lower: which it is, is no difference."""
  two = dataclasses.replace(policy, tokenizer=_TwoEnds(policy.tokenizer))
  losses = {}
  for one_end in (False, True):
    folder = tmp_path / str(one_end)
    _, [line], _ = run(two, folder, _task(policy), monkeypatch, steps=1, one_end=one_end)
    losses[one_end] = line["loss"]
  assert 0 < losses[True] < losses[False]


class _TwoEnds:
  def __init__(self, tokenizer):
    self._tokenizer, self.eos_ids = tokenizer, (*tokenizer.eos_ids, 9)

  def __getattr__(self, name):
    return getattr(self._tokenizer, name)
