"""What is measured on held-out prompts, and which answers are kept: policies whose answers are
known, and a divergence that is told; the real one is in test_trainer.py and test_experiments.py.
"""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
import tool_families
from test_chat_tools import TOOLS
from test_loop import short_config

from oel_jax.consolidation import placement, samples
from oel_jax.consolidation import step as step_lib
from oel_jax.conversations.jsonl import read_conversations, write_jsonl
from oel_jax.conversations.schema import Message, Prompt, ToolCall
from oel_jax.evaluation import statistics
from oel_jax.pocket import load
from oel_jax.policy.architecture import Architecture, named
from oel_jax.policy.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.metrics import Metrics
from oel_jax.stages import divergence, held_out, withdrawn
from oel_jax.stages.run import ANSWERS, HELD_OUT, Meter, Run

LIMIT = 6
TEXTS = ("- EXPERIENCE ITEM: The goal is G.",)


@dataclasses.dataclass
class Fixed:
  """A policy that answers its prompts, in the order that they come, with so many times "up"."""

  tokenizer: SentencePieceTokenizer
  weights: int
  counts: tuple[int, ...]
  architecture: Architecture = named("pocket")
  dtype: type = np.float32

  def __post_init__(self):
    self.params, self.asked = {"w": np.full(2, self.weights, np.float32)}, []

  def sample(self, prompts, seeds, *, sampling, max_new_tokens):
    counts = self.counts[len(self.asked) :]
    self.asked += list(prompts)
    up = self.tokenizer.encode("up")[:1]
    return [
      (up * count + [self.tokenizer.eos_ids[0]])[:max_new_tokens]
      for count, _ in zip(counts, prompts)
    ]


@pytest.fixture(name="made")
def fixture_made(tmp_path, monkeypatch):
  """A round with prompts of ten conversations, two of each; whose divergence is what its weights
  say, over as many prompts as the batch of 8 that they come in.
  """
  config = short_config()
  config.deployment.max_response_tokens = LIMIT
  prompts = [
    Prompt(f"c{i}-{turn}", (Message("user", f"go {'up ' * turn}"),))
    for i in range(10)
    for turn in (0, 1)
  ]
  (tmp_path / "round_1/user").mkdir(parents=True)
  write_jsonl(tmp_path / "round_1" / HELD_OUT, prompts)
  monkeypatch.setattr(divergence, "BATCH", 8)
  monkeypatch.setattr(placement, "prepare_teacher", lambda *_: None)
  monkeypatch.setattr(samples, "place", lambda batch, *_: batch)
  probe = lambda params, teacher, batch: {"kl": params["w"][0] + len(batch.mask)}
  monkeypatch.setattr(step_lib, "make_probe", lambda *_, **how: probe)
  tokenizer = SentencePieceTokenizer((load.DATA / load.TOKENIZER).read_bytes())
  before = Fixed(tokenizer, 2, tuple(i % 9 for i in range(20)))
  after = Fixed(tokenizer, 1, (1,) * 20)
  config.mesh.data = 1
  mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:1])
  with Metrics(tmp_path) as metrics:
    yield Run(config, tmp_path, metrics, mesh), before, after, prompts


@pytest.mark.parametrize("data", ["student", "teacher"])
def test_both_answer_for_themselves_and_without_knowledge(made, data, tmp_path):
  """Also where the teacher samples in training; means are over tokens, shares over answers."""
  this, before, after, prompts = made
  this.config.consolidation.update(data=data, pack=False)
  meter = Meter(before)
  found = held_out.measure(this, 1, after, before, TEXTS, meter)
  asked = [tuple(before.tokenizer.chat(prompt.messages, thinking=True)) for prompt in prompts]
  for policy in (before, after):
    assert [tuple(ids) for ids in policy.asked] == asked
  sizes = [min(LIMIT, i % 9 + 1) for i in range(20)]
  # Batches of 8, 8 and 4 prompts, a row each.
  weighted = sum(size * (2 + (8 if i < 16 else 4)) for i, size in enumerate(sizes))
  assert found["kl_before"] == pytest.approx(weighted / sum(sizes))
  assert found["kl_after"] == pytest.approx((16 * 9 + 4 * 5) / 20)
  assert found["closer"] == pytest.approx(1 - found["kl_after"] / found["kl_before"])
  assert found["response_tokens_before"] == statistics.mean(sizes)
  assert found["cut_before"] == statistics.count(sum(size == LIMIT for size in sizes), 20)
  assert found["cut_after"]["hits"] == 0 and found["prompts"] == 20
  # Of 2 weights; each answer is sampled, and read by itself and the teacher.
  read = sum(map(len, asked)) + sum(sizes), sum(map(len, asked)) + 2 * 20
  assert (meter.tokens, meter.flops) == (sum(sizes) + 2 * 20, 3 * 2 * 2 * sum(read))


def test_answers_to_the_first_prompts_of_few_conversations_are_kept(made, tmp_path, caplog):
  this, before, after, prompts = made
  held_out.measure(this, 1, after, before, TEXTS, Meter(before))
  kept = {when: read_conversations(tmp_path / "round_1" / name) for when, name in ANSWERS.items()}
  firsts = prompts[::2][: held_out.KEPT]
  for when, counts in (("before", before.counts), ("after", after.counts)):
    assert [said.id for said in kept[when]] == [prompt.id for prompt in firsts]
    for said, prompt, count in zip(kept[when], firsts, counts[::2], strict=False):
      assert said.messages[:-1] == prompt.messages
      up = before.tokenizer.encode("up")[:1]
      told = before.tokenizer.split_response(
        (up * count + [before.tokenizer.eos_ids[0]])[:LIMIT], thinking=True
      )
      assert (said.messages[-1].thinking, said.messages[-1].content) == told
      assert said.messages[-1].response_tokens == min(LIMIT, count + 1)
  this.manifest(1).verify()
  # Other weights answer anew, and what the first said stays.
  first = (tmp_path / "round_1" / ANSWERS["after"]).read_bytes()
  other = Fixed(before.tokenizer, 5, (3,) * 20)
  before.asked.clear()
  with caplog.at_level(logging.WARNING):
    held_out.measure(this, 1, other, before, TEXTS, Meter(before))
  [aside] = (tmp_path / "round_1/user").glob("held_out_after.jsonl.replaced-*")
  assert aside.read_bytes() == first and "answered with other weights" in caplog.text
  assert not list((tmp_path / "round_1/user").glob("held_out_before.jsonl.replaced-*"))


def test_without_prompts_nothing_is_measured(made, tmp_path):
  this, before, after, _ = made
  write_jsonl(tmp_path / "round_1" / HELD_OUT, [])
  assert held_out.measure(this, 1, after, before, TEXTS, Meter(before)) is None
  assert held_out.measure(this, 2, after, before, TEXTS, Meter(before)) is None and not before.asked


def test_prompts_that_were_withdrawn_are_not_measured_and_counted(made, tmp_path):
  """Also where a kill left them in the file, and where it has been written without them."""
  this, before, after, prompts = made
  logs = {"schema": 1, "prompts": {"prompts": 7, "held out": 20}}
  (tmp_path / "round_1/user/logs.json").write_text(json.dumps(logs))
  withdrawn.add(tmp_path, {"c0", "c4"})
  for _ in range(2):
    before.asked.clear()
    after.asked.clear()
    found = held_out.measure(this, 1, after, before, TEXTS, Meter(before))
    left = [prompt for prompt in prompts if prompt.id[:2] not in ("c0", "c4")]
    assert (found["prompts"], found["withdrawn"]) == (16, 4) and len(before.asked) == 16
    kept = read_conversations(tmp_path / "round_1" / ANSWERS["after"])
    assert [said.id for said in kept] == [prompt.id for prompt in left[::2]]
    write_jsonl(tmp_path / "round_1" / HELD_OUT, left)


def test_an_answer_that_calls_a_tool_is_kept_as_a_call(made, tmp_path):
  """Only where tools were offered: elsewhere JSON may be what was asked for."""
  this, _, _, _ = made
  this.config.deployment.max_response_tokens = 60
  tokenizer = HuggingFaceTokenizer(tool_families.tokenizer("qwen3"))
  call = '{"name": "clock", "arguments": {"zone": "UTC"}}'

  class Caller(Fixed):
    def sample(self, prompts, seeds, **how):
      return [[*tokenizer.encode(call), tokenizer.eos_ids[0]] for _ in prompts]

  asked = (Message("user", "What time is it?"),)
  prompts = [Prompt("a-0", asked, TOOLS), Prompt("b-0", asked)]
  write_jsonl(tmp_path / "round_1" / HELD_OUT, prompts)
  before, after = (Caller(tokenizer, weights, ()) for weights in (1, 2))
  held_out.measure(this, 1, after, before, TEXTS, Meter(before))
  with_tools, without = read_conversations(tmp_path / "round_1" / ANSWERS["after"])
  answer = with_tools.messages[-1]
  assert answer.tool_calls == (ToolCall("", "clock", '{"zone": "UTC"}'),) and not answer.content
  assert with_tools.tools == TOOLS
  assert without.messages[-1].content == call and not without.messages[-1].tool_calls
