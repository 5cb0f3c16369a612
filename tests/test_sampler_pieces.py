"""The few sizes of a device that is no CPU: long prompts are read in pieces, a few side by side,
and nobody can tell from the tokens.
"""

import types

import numpy as np
import pytest
from test_sampler import (
  fixture_one_core,  # noqa: F401 (used by its name)
  naive_sampled,
  random_prompts,
  sample,
)
from test_sampler_conversations import converse, fixture_entered  # noqa: F401 (by its name)
from test_sampler_texts import behind_texts, fixture_short, fixture_texts  # noqa: F401

from oel_jax.policy.sampling import engine, sampler, scheduler, sizes, slot_room

PROGRAMS = engine.prefill_insert, engine.decode


@pytest.fixture(name="pieces", autouse=True)
def fixture_pieces(monkeypatch):
  """A device that is no CPU decides, in sizes at which a few tokens do what takes hundreds."""
  other = types.SimpleNamespace(backend=lambda: "gpu")
  for module in (sampler, slot_room):
    monkeypatch.setattr(module, "target", other)
  monkeypatch.setattr(sizes, "PIECE_LENGTHS", (8, 16))
  monkeypatch.setattr(sizes, "FEW_PROMPTS", 4)
  monkeypatch.setattr(sizes, "PREFILL_LENGTHS", (24, 96))
  monkeypatch.setattr(sizes, "FULL_BATCH_TOKENS", 64)
  monkeypatch.setattr(sizes, "CACHE_LENGTHS", (128,))
  monkeypatch.setattr(scheduler, "MIN_SHARED", 4)


def expected(prompts, **how):
  return [naive_sampled(prompt, seed, **how) for seed, prompt in enumerate(prompts)]


def test_prompts_without_replies_enter_whole_in_one_batch_size_a_length(entered):
  prompts = random_prompts(1, 5, 64, 17, 40, 22, 9, 70, seed=31)
  assert sample(prompts) == expected(prompts)
  assert {(rows, length) for (rows, length), _ in entered} == {(4, 24), (1, 96)}
  assert all(shared is None for _, shared in entered)


def test_what_others_begin_with_is_taken_over_and_the_rest_read_in_pieces(entered, monkeypatch):
  monkeypatch.setattr(scheduler, "MIN_SHARED_TO_WAIT", 20)
  text, *rest = random_prompts(20, 50, 30, 7, seed=32)
  prompts = [text + own for own in rest]
  assert sample(prompts) == expected(prompts)
  assert [(shape, shared) for shape, shared in entered] == [
    ((1, 96), None),
    ((4, 16), [20, 20]),
    ((4, 16), [36]),
  ]


@pytest.mark.parametrize("slots", [pytest.param(16, marks=pytest.mark.slow), 4, 1])
def test_conversations_of_all_lengths_take_two_programs(entered, slots):
  prompts = random_prompts(3, 40, 17, 8, 33, 25, 50, 1, seed=33)
  for program in PROGRAMS:
    program.clear_cache()
  answers, asked = converse(prompts, 2, slots=slots)
  assert [program._cache_size() for program in PROGRAMS] == [2, 1]
  assert {length for (_, length), _ in entered} == {8, 16}
  assert {rows for (rows, _), _ in entered} == {min(4, slots)}
  for i, (each, turns) in enumerate(zip(answers, asked, strict=True)):
    assert each == [naive_sampled(prompt, 100 * i + turn) for turn, prompt in enumerate(turns)]


def test_scores_are_those_of_a_prompt_alone():
  prompts = random_prompts(44, 13, 27, 30, seed=34)
  ids, scores = sample(prompts, logprobs=True, reply=lambda *_: None)
  for i, prompt in enumerate(prompts):
    alone = sample([prompt], [i], logprobs=True)
    assert ids[i] == alone[0][0]
    np.testing.assert_allclose(scores[i], alone[1][0], atol=1e-5)


def test_pieces_stand_behind_a_text_that_is_kept_once(short, texts):
  prompts = behind_texts()
  assert sample(prompts, reply=lambda *_: None) == expected(prompts) and set(texts) == {2}
