"""Consolidation of a round: what is drawn, that the right text is scored, and that an interrupted
run ends with the same bits.
"""

import dataclasses
import functools
import json
import re
import shutil
import signal

import families
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from oel_jax import config as config_lib
from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import (
  draws,
  failure,
  micro_batches,
  placement,
  restore,
  samples,
  trainer,
)
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import task as task_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.conversations.schema import KNOWLEDGE, Message, Prompt, knowledge_message
from oel_jax.pocket import vocabulary
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import transformer
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.policy.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer
from oel_jax.runtime import finite, signals, target
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.metrics import Metrics

TEXTS = (
  "- EXPERIENCE ITEM: The goal is G.",
  "- EXPERIENCE ITEM: H is a hazard.\n- EXPERIENCE ITEM: Aim for G.",
)
PREFIXES = tuple(Prompt(f"p{i}", (Message("user", "go " * (i + 1)),)) for i in range(5))


@pytest.fixture(scope="module")
def policy():
  architecture = architecture_lib.named("pocket-tiny")
  params = jax.jit(lambda key: transformer.init(architecture, key))(jax.random.key(0))
  return Policy(architecture, params, SentencePieceTokenizer(vocabulary.build()))


def _config(**changes):
  config = config_lib.default().consolidation
  with config.unlocked():
    config.update(
      dict(steps=6, batch_size=4, learning_rate=1e-3, k=8, checkpoint_every=2, log_probe=3)
      | changes
    )
  return config


def _task(policy, **changes):
  how = dict(seed=3, round=1, thinking=True, limit=256) | changes
  return task_lib.make_task(policy.tokenizer, PREFIXES, TEXTS, **how)


def _one_device():
  return mesh_lib.make_mesh(
    ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1)), jax.devices()[:1]
  )


def _run(policy, folder, config=None, advance=lambda n, note="": None):
  with Metrics(folder) as metrics:
    params, cost = trainer.consolidate(
      config or _config(),
      _task(policy),
      policy,
      limit=8,
      directory=folder / "checkpoints",
      mesh=_one_device(),
      metrics=metrics,
      advance=advance,
    )
  return jax.device_get(params), cost


def test_the_task_holds_the_ids_of_the_chat(policy):
  task = _task(policy)
  for prefix, ids in zip(PREFIXES, task.prompts, strict=True):
    assert list(ids) == policy.tokenizer.chat(prefix.messages)
    for text, known in zip(TEXTS, task.knowledge, strict=True):
      assert [*known, *ids] == policy.tokenizer.chat((knowledge_message(text), *prefix.messages))


def test_bad_tasks_are_refused(policy):
  with pytest.raises(ValueError, match="config.policy.max_prompt_tokens is 12, but prompt p4"):
    _task(policy, limit=12)
  with pytest.raises(ValueError, match="0 prompts and 2 knowledge texts"):
    task_lib.make_task(policy.tokenizer, [], TEXTS, seed=0, round=1, thinking=True, limit=100)

  class Shifty:  # a template that says something else when there is knowledge
    def chat(self, messages, tools=(), thinking=True):
      return [1, 2, 3] if messages[0].role == KNOWLEDGE else [9, 3]

    def knowledge_prefix(self, message, system=None, tools=(), thinking=True):
      return 0, [1, 2]

  with pytest.raises(ValueError, match="chat template changes the prompt"):
    task_lib.make_task(Shifty(), PREFIXES, TEXTS, seed=0, round=1, thinking=True, limit=100)


OWN_SYSTEMS = (
  Prompt("kind", (Message("system", "Be kind."), Message("user", "go"))),
  Prompt("short", (
      Message("system", "Be short"), Message("user", "go"),
      Message("assistant", "no"), Message("user", "go"),
  )),
  Prompt("kind again", (Message("system", "Be kind."), Message("user", "stop"))),
)  # fmt: skip


@pytest.mark.parametrize("family", [*families.FAMILIES, "pocket"])
def test_prompts_with_system_messages_of_their_own_are_given_knowledge_behind_them(family, policy):
  tokenizer = policy.tokenizer
  if family != "pocket":
    tokenizer = HuggingFaceTokenizer(families.tokenizer(family))
  prefixes = (*PREFIXES, *OWN_SYSTEMS)
  task = task_lib.make_task(tokenizer, prefixes, TEXTS, seed=3, round=1, thinking=True, limit=1024)
  assert len(task.knowledge) == len(task.skip) == 3 * len(TEXTS)  # no own system text, and two
  assert task.given[5] == task.given[7] != task.given[6] and len(set(task.given)) == 3
  for prefix, prompt, entries in zip(prefixes, task.prompts, task.given, strict=True):
    assert list(prompt) == tokenizer.chat(prefix.messages)
    for text, entry in zip(TEXTS, entries, strict=True):
      informed = [*task.knowledge[entry], *prompt[task.skip[entry] :]]
      assert informed == tokenizer.chat((knowledge_message(text), *prefix.messages))


def test_a_prompt_is_given_knowledge_behind_its_own_system_text(policy):
  """Which of the texts a prompt is given does not depend on system messages."""
  task, plain = (
    task_lib.make_task(policy.tokenizer, prefixes, TEXTS, seed=3, round=1, thinking=True, limit=256)
    for prefixes in ((*OWN_SYSTEMS, *PREFIXES), (*PREFIXES[:3], *PREFIXES))
  )
  drawn = {}
  for name, made in (("own", task), ("plain", plain)):
    how = _config(pack=False)
    batch, _ = samples.sample_batch(made, policy, policy, range(8), range(8), how, 8, "consolidate")
    rows = [tuple(row.tolist()) for row in batch.tokens]
    drawn[name] = {
      i: int(given[0])
      for i, prompt in enumerate(made.prompts)
      for row, given in zip(rows, batch.texts, strict=True)
      if row[: len(prompt)] == prompt
    }
  texts = drawn["own"]
  assert sorted(texts) == list(range(8))
  assert all(text in task.given[i] for i, text in texts.items())
  assert {text - task.given[i].start for i, text in texts.items()} == {0, 1}
  for i in range(3, 8):
    assert texts[i] - task.given[i].start == drawn["plain"][i]


def test_many_system_texts_are_told(policy, caplog):
  own = [Message("system", f"Rule {i}") for i in range(17)]
  prefixes = [Prompt(f"p{i}", (message, Message("user", "go"))) for i, message in enumerate(own)]
  how = dict(seed=0, round=1, thinking=True, limit=256)
  make = lambda prefixes: task_lib.make_task(policy.tokenizer, prefixes, TEXTS, **how)
  make(prefixes[:16])
  assert "different system texts" not in caplog.text
  make(prefixes)
  assert (
    "17 different system texts and lists of tools: with 2 knowledge texts, 34 beginnings of up to"
    in caplog.text
  )


def test_a_prompt_that_melts_into_the_knowledge_is_refused():
  """No control token between the two: by what a prompt begins with, its first letters may become
  one token with the knowledge's last.
  """

  class Plain:
    def chat(self, messages, tools=(), thinking=True):
      return [ord(c) for c in "".join(message.content for message in messages).replace(".1", "1")]

    def knowledge_prefix(self, message, system=None, tools=(), thinking=True):
      return 0, self.chat([message])

  user = lambda i, text: Prompt(f"p{i}", (Message("user", text),))
  make = lambda *prefixes: task_lib.make_task(
    Plain(),
    prefixes,
    ["It is G."],
    seed=0,
    round=1,
    thinking=True,
    limit=1024,
    message=lambda text: Message(KNOWLEDGE, text),
  )
  make(user(0, "go"), user(1, "2"))
  with pytest.raises(ValueError, match="prompt p1, of the roles user: the chat template"):
    make(user(0, "go"), user(1, "1"))


@pytest.mark.parametrize("data", ["student", "teacher"])
def test_a_batch_is_scored_as_it_was_sampled(policy, data):
  """The sampled ids stand behind the prompt on both sides, and the knowledge only with the teacher;
  the sampler is who `data` says.
  """
  task, seen = _task(policy), []

  class Spy:
    architecture, tokenizer = policy.architecture, policy.tokenizer

    def __init__(self, name):
      self.name = name

    def sample(self, prompts, seeds, **how):
      sampled = policy.sample(prompts, seeds, **how)
      seen.append((self.name, prompts, sampled))
      return sampled

  batch, responses = samples.sample_batch(
    task, Spy("student"), Spy("teacher"), [0, 3, 4], [7, 8, 9], _config(data=data), 8, "consolidate"
  )
  [(name, prompts, sampled)] = seen
  assert name == data and responses == sampled
  found = []
  for row, segments, texts, slots in zip(
    batch.tokens, batch.segments, batch.texts, batch.slots, strict=True
  ):
    for segment in range(1, segments.max() + 1):
      [slot] = set(slots[segments == segment])
      found.append((row[segments == segment].tolist(), int(texts[slot])))
  for i, prompt, response in zip([0, 3, 4], prompts, sampled, strict=True):
    own = list(task.prompts[i]) + response
    [text] = [text for ids, text in found if ids == own]
    assert list(prompt) == ([] if data == "student" else list(task.knowledge[text])) + list(
      task.prompts[i]
    )
  # The row that predicts the response's first token is the prompt's last.
  for row, at, response, mask in zip(
    batch.tokens, batch.at, batch.response, batch.mask, strict=True
  ):
    np.testing.assert_array_equal(row[at + 1][mask], response[mask])
  assert batch.mask.sum() == sum(map(len, sampled))


@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_the_teacher_samples_from_the_chat_with_the_knowledge_in_it(family):
  tokenizer, asked = HuggingFaceTokenizer(families.tokenizer(family)), []

  class Spy:
    def sample(self, prompts, seeds, **how):
      asked.extend(prompts)
      return [[5]] * len(prompts)

  Spy.architecture, Spy.tokenizer = architecture_lib.named("pocket-tiny"), tokenizer
  task = task_lib.make_task(tokenizer, PREFIXES, TEXTS, seed=3, round=1, thinking=True, limit=1024)
  assert min(task.skip) > 0  # what prompt and knowledge both begin with, once only
  samples.sample_batch(
    task, Spy(), Spy(), [0, 1, 2, 3], [0, 1, 2, 3], _config(data="teacher"), 8, "x"
  )
  chats = [
    [tokenizer.chat((knowledge_message(text), *prefix.messages)) for text in TEXTS]
    for prefix in PREFIXES
  ]
  assert len(asked) == 4 and all(list(ids) in chats[i] for i, ids in enumerate(asked))
  # Both texts were drawn.
  assert {chats[i].index(list(ids)) for i, ids in enumerate(asked)} == {
    0,
    1,
  }


def test_unpacked_rows_hold_a_sample_each(policy):
  batch, _ = samples.sample_batch(
    _task(policy), policy, policy, [0, 3, 4], [7, 8, 9], _config(pack=False), 8, "consolidate"
  )
  assert batch.texts.shape == (3, 1) and batch.segments.max() == 1


def test_flash_attention_on_packed_rows_is_refused_before_anything_is_sampled(policy, tmp_path):
  with pytest.raises(
    ValueError,
    match='config.consolidation.attention is "flash".* config.consolidation.pack is True: it must '
    "be False",
  ):
    _run(policy, tmp_path, _config(attention="flash", pack=True))
  assert placement.attn_impl(_config(attention="flash", pack=False), policy) == "flash"
  assert placement.attn_impl(_config(attention="cudnn", pack=True), policy) == "cudnn"


@pytest.mark.parametrize("rows, devices, parts", [(3, 1, 1), (5, 1, 2), (16, 1, 4), (9, 2, 2)])
def test_micro_batches_that_hold_samples_come_first_and_the_others_are_not_run(
  rows, devices, parts
):
  mesh = mesh_lib.make_mesh(
    ml_collections.ConfigDict(dict(data=devices, fsdp=1, tensor=1)), jax.devices()[:devices]
  )
  numbers = range(1, rows + 1)
  batch = batch_lib.assemble(
    [[n] for n in numbers], [0] * rows, [[6]] * rows, pad_id=0, length=128, response_length=1
  )
  batch = batch._replace(tokens=np.repeat(np.int32(numbers)[:, None], 128, axis=1))
  found = samples.place(batch, mesh, 16, 4 * 128)
  # Of each device four rows at a time.
  assert micro_batches.count_of(16, 128, devices, 4 * 128) == 4 // devices
  assert found.mask.shape == (16, 1) and found.mask.sum() == rows
  assert sorted(np.asarray(found.tokens)[np.asarray(found.mask)[:, 0], 0]) == [*numbers]
  add = lambda so_far, part: (so_far[0] + 1, so_far[1] + part.mask.sum())
  run, count = jax.jit(lambda batch: micro_batches._fold(add, (0, 0), batch, 4 // devices))(found)
  assert (run, count) == (parts, rows)


def test_samples_of_all_lengths_fit_and_have_one_shape(monkeypatch):
  monkeypatch.setattr(target, "backend", lambda: "gpu")
  rng, a = np.random.default_rng(0), architecture_lib.named("qwen2.5-1.5b")
  of = lambda lengths: [[1] * n for n in lengths]
  prompts, knowledge = of(rng.integers(30, 97, 200)), of([500, 70, 130])
  how = dict(limit=96, pack=True)
  shapes = {samples.row_shape(a, prompts, knowledge, longest=n, **how) for n in range(1, 97)}
  [shape] = shapes
  # Of the 1.5B, attention to 512 tokens is a thirtieth of the products; two texts of 500.
  assert shape.length == 512 and shape.texts == 2
  for longest in (1, 20, 96):
    chosen = rng.integers(0, 200, 64)
    responses = of([longest, *rng.integers(1, longest + 1, 63)])
    batch = batch_lib.assemble(
      [prompts[i] for i in chosen],
      rng.integers(0, 3, 64).tolist(),
      responses,
      pad_id=0,
      **shape._asdict(),
    )
    assert batch.mask.sum() == sum(map(len, responses))
  # Where attention is dear, rows are as long as the longest sample, and long rooms for responses
  # are shapes of their own.
  a, of_limit = architecture_lib.named("pocket"), dict(limit=1024, pack=True)
  lengths = [
    samples.row_shape(a, prompts, knowledge, longest=n, **of_limit).length for n in (9, 300, 1000)
  ]
  longest = max(map(len, prompts))
  assert lengths == [-(-(longest + room) // 32) * 32 for room in (256, 512, 1024)]
  # A room that would save less than a quarter of the row is none.
  saved = samples.row_shape(a, of([400]), knowledge, limit=96, longest=9, pack=True)
  assert saved == samples.row_shape(a, of([400]), knowledge, limit=96, longest=96, pack=True)


def test_on_a_cpu_responses_and_texts_of_other_lengths_are_no_other_shape():
  prompts, a = [[1] * n for n in (31, 167)], architecture_lib.named("pocket")
  shape = lambda longest, text, **how: samples.row_shape(
    a, prompts, [[1] * text] * 8, limit=96, longest=longest, **dict(pack=True) | how
  )
  # 167 and 96 tokens, to a multiple of 32; texts of 128 or 256, 2.6 times the row.
  assert shape(20, 64) == shape(96, 64) == shape(20, 128) == shape(96, 100)
  assert (shape(20, 64).length, shape(20, 64).texts) == (288, 5)
  assert [teacher_lib.room([[1] * n]) for n in (0, 1, 128, 129)] == [0, 128, 128, 256]
  assert shape(20, 129).texts == 2
  # Rounds whose prompts are two tokens longer have micro-batches as large.
  config, alone = config_lib.default(), ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1))
  mesh = mesh_lib.make_mesh(alone, jax.devices()[:1])
  micro = lambda n: samples.micro_tokens_of(
    config.consolidation, [[1] * n], limit=96, samples=16, mesh=mesh
  )
  assert micro(80) == micro(82) == 352
  # A row of one sample is as short as its response lets it be.
  assert [shape(n, 64, pack=False).length for n in (24, 48, 96)] == [216, 240, 288]


def test_rows_of_one_sample_are_cut_evenly():
  """64 rows of 1,624 tokens in parts of at most ten rows: eight of eight, not six of ten and a
  rest.
  """
  mesh = _one_device()
  batch = batch_lib.assemble(
    [[5]] * 64, [0] * 64, [[6]] * 64, pad_id=0, length=1624, response_length=1, pack=False
  )
  assert len(samples.place(batch, mesh, 64, 16384).mask) == 64
  # 17 of them in parts of at most eight: a row more makes three parts of six.
  batch = jax.tree.map(lambda x: x[:17], batch)
  assert len(samples.place(batch, mesh, 17, 8 * 1624).mask) == 18


def test_batches_of_all_lengths_compile_one_program_of_the_step(policy, monkeypatch):
  """One for all: their rows are as long, and as many; and what a step returns is taken by the next
  as the first state was.
  """
  rng, task, config, mesh = (
    np.random.default_rng(0),
    _task(policy),
    _config(batch_size=16),
    _one_device(),
  )

  class Student:
    architecture, tokenizer = policy.architecture, policy.tokenizer

    def sample(self, prompts, seeds, **how):
      longest = rng.integers(1, 65)
      return [[5] * n for n in rng.integers(1, longest + 1, len(prompts))]

  # The loss is cut out: what is compiled, and how often, goes by the shapes, and this compiles at
  # once.
  loss = lambda params, teacher, batch, **how: (
    sum(map(jnp.sum, jax.tree.leaves(params))) * batch.mask.sum(),
    (batch.mask.sum(), {}),
  )
  monkeypatch.setattr(step_lib, "loss_sum", loss)
  params, optimizer = {"norm": {"scale": jnp.ones(4)}}, restore.make_optimizer(config)
  begin = functools.partial(restore.begin, optimizer)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, mesh_lib.abstract_init(begin, mesh, params))
  micro = samples.micro_tokens_of(config, task.prompts, limit=64, samples=16, mesh=mesh)
  step = step_lib.make_step(
    policy.architecture, optimizer, kind="imitation", micro_tokens=micro, shardings=shardings
  )
  state, lengths, shapes = mesh_lib.sharded_init(begin, mesh, params), set(), set()
  for i in range(60):
    batch, drawn = samples.sample_batch(
      task,
      Student(),
      policy,
      rng.integers(0, 5, 16),
      range(16 * i, 16 * i + 16),
      config,
      64,
      "consolidate",
    )
    state, _ = step(state, None, samples.place(batch, mesh, 16, micro))
    lengths.add(max(map(len, drawn)))
    shapes.add(batch.tokens.shape)
  assert len(lengths) > 20 and len(shapes) > 4
  assert step._cache_size() == 1


def test_every_prefix_is_drawn_once_a_pass_and_both_texts_are_used(policy):
  task, numbers = _task(policy), iter(draws.batches(_task(policy), _config(batch_size=5)))
  passes = [next(numbers) for _ in range(8)]
  assert all(sorted(batch["prompt"]) == list(range(5)) for batch in passes)
  assert len({tuple(batch["prompt"]) for batch in passes}) > 1
  assert [n for batch in passes for n in batch["draw"]] == list(range(40))
  used = set()
  for drawn in passes[:2]:
    batch, _ = samples.sample_batch(
      task, policy, policy, drawn["prompt"], drawn["draw"], _config(), 8, "consolidate"
    )
    used |= {
      int(texts[slot])
      for texts, slots, segments in zip(batch.texts, batch.slots, batch.segments)
      for slot in slots[segments > 0]
    }
  assert used == {0, 1}


def test_cut_off_anywhere_and_gone_on_with_ends_with_the_same_bits(policy, tmp_path):
  config = _config(steps=4)
  whole, _ = _run(policy, tmp_path / "whole", config)
  assert not np.array_equal(whole["norm"]["scale"], np.asarray(policy.params["norm"]["scale"]))

  class Cut(Exception):
    pass

  for at in (1, 3):  # before the first checkpoint, and between two
    done = []

    def stop(n, note="", at=at, done=done):
      done.append(n)
      if sum(done) == at:
        raise Cut

    with pytest.raises(Cut):
      _run(policy, tmp_path / f"cut{at}", config, advance=stop)
    again, _ = _run(policy, tmp_path / f"cut{at}", config)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    lines = (tmp_path / f"cut{at}" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 5  # step 0 and each step once, none twice


def test_a_finished_round_is_not_trained_again(policy, tmp_path):
  first, spent = _run(policy, tmp_path)
  again, nothing = _run(policy, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, again, first)
  assert spent["tokens"] > 0 and nothing["tokens"] == 0
  # What it was trained from has changed: refused, and the checkpoints stay.
  task, others = _task(policy), policy.replace(jax.tree.map(lambda p: p + 1, policy.params))
  for name, changed, player in (
    ("prompts", dataclasses.replace(task, prompts=task.prompts[::-1]), policy),
    ("knowledge", dataclasses.replace(task, knowledge=task.knowledge[:1]), policy),
    ("weights", task, others),
  ):
    with pytest.raises(
      ValueError,
      match=f"checkpoints: its checkpoints were trained from other {name} than this run has now",
    ):
      restore.check_inputs(tmp_path / "checkpoints", changed, player)
    with (
      Metrics(tmp_path) as metrics,
      pytest.raises(ValueError, match=f"trained from other {name} than"),
    ):
      trainer.consolidate(
        _config(),
        changed,
        player,
        limit=8,
        directory=tmp_path / "checkpoints",
        mesh=_one_device(),
        metrics=metrics,
      )
  restore.check_inputs(tmp_path / "checkpoints", task, policy)
  restore.check_inputs(tmp_path / "nothing here", task, others)
  assert restore.steps_done(tmp_path / "checkpoints") == 6


def test_of_a_finished_training_the_weights_alone_may_be_kept(policy, tmp_path):
  """The bits are those of checkpoints, they take a third of the room, and serve for all but more
  steps; what a kill left between the two is finished.
  """
  config, folder = _config(keep="weights"), tmp_path / "kept/checkpoints"
  whole, _ = _run(policy, tmp_path / "whole")
  kept, spent = _run(policy, tmp_path / "kept", config)
  jax.tree.map(np.testing.assert_array_equal, kept, whole)
  names = lambda folder: sorted(path.name for path in folder.iterdir())
  assert names(folder) == ["weights"] and names(folder / "weights") == ["6"]
  size = lambda folder: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
  each = size(tmp_path / "whole/checkpoints") / len(names(tmp_path / "whole/checkpoints"))
  assert size(folder) < 0.4 * each
  read = lambda: restore.trained_params(config, policy, folder, _one_device())
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(read()), whole)
  shutil.copytree(tmp_path / "whole/checkpoints/6", folder / "6")  # as a kill leaves it
  again, nothing = _run(policy, tmp_path / "kept", config)
  jax.tree.map(np.testing.assert_array_equal, again, whole)
  assert names(folder) == ["weights"]
  assert spent["tokens"] > 0 and nothing["tokens"] == 0 and restore.steps_done(folder) == 6
  task, others = _task(policy), policy.replace(jax.tree.map(lambda p: p + 1, policy.params))
  restore.check_inputs(folder, task, policy)
  with pytest.raises(ValueError, match="trained from other weights than"):
    restore.check_inputs(folder, task, others)
  with pytest.raises(ValueError, match="trained from other weights than"):
    _run(others, tmp_path / "kept", config)
  with pytest.raises(ValueError, match="weights: holds the weights after step 6 alone, .* is 8"):
    _run(policy, tmp_path / "kept", _config(steps=8, keep="weights"))
  # A run that kept its checkpoints, and does so no more; and a damaged file is trained again.
  slimmed, nothing = _run(policy, tmp_path / "whole", config)
  jax.tree.map(np.testing.assert_array_equal, slimmed, whole)
  assert nothing["tokens"] == 0 and names(tmp_path / "whole/checkpoints") == ["weights"]
  data = max((folder / "weights/6").rglob("*"), key=lambda path: path.stat().st_size)
  data.write_bytes(bytes(data.stat().st_size))
  anew, spent = _run(policy, tmp_path / "kept", config)
  jax.tree.map(np.testing.assert_array_equal, anew, whole)
  assert spent["tokens"] > 0


@pytest.mark.slow  # test_step.py compares the gradients themselves
def test_micro_batches_do_not_change_what_is_learned(policy, tmp_path):
  whole, _ = _run(policy, tmp_path / "a", _config(steps=2))
  cut, _ = _run(policy, tmp_path / "b", _config(steps=2, micro_tokens=1))
  # Adam divides by the gradient's own size, so where that is rounding noise the two may differ by
  # up to a step of the rate, 1e-3.
  differ = np.concatenate(
    [
      np.abs(a - b).ravel()
      for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True)
    ]
  )
  assert np.quantile(differ, 0.99) < 1e-5


def test_knowledge_that_is_too_large_stays_with_the_host(policy):
  task = _task(policy)
  size = lambda teacher: (teacher.keys.nbytes + teacher.values.nbytes) / 2**30
  prepare = lambda **changes: placement.prepare_teacher(
    _config(**changes), task, policy, _one_device(), "xla"
  )
  here = prepare()
  assert (
    here.keys.sharding.memory_kind
    == prepare(knowledge_gib=size(here)).keys.sharding.memory_kind
    == "device"
  )
  there = prepare(knowledge_gib=0.99 * size(here))
  assert there.keys.sharding.memory_kind == there.values.sharding.memory_kind == "pinned_host"
  np.testing.assert_allclose(here.keys, there.keys, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_teacher_in_the_hosts_memory_teaches_the_same(policy, tmp_path):
  how = dict(steps=2, unroll="yes", select=0.5, chunk=64)
  here, _ = _run(policy, tmp_path / "a", _config(**how))
  there, _ = _run(policy, tmp_path / "b", _config(**how, teacher_on_host=0.5))
  # Adam divides by the gradient's own size, as above.
  pairs = zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True)
  differ = np.concatenate([np.abs(a - b).ravel() for a, b in pairs])
  assert np.quantile(differ, 0.99) < 1e-5
  lines = [
    [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    for name in "ab"
  ]
  for one, other in zip(*lines, strict=True):
    assert one.keys() == other.keys()
    for name in one.keys() & {"loss", "kl", "probe_kl", "disagreement"}:
      assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_the_vocabularies_must_belong_together(policy):
  small = dataclasses.replace(policy.architecture, vocabulary=policy.tokenizer.vocabulary - 1)
  with pytest.raises(ValueError, match="do not belong together"):
    Policy(small, policy.params, policy.tokenizer)


# Numbers that are none


def test_rounds_have_the_programs_of_the_one_before(policy):
  """The same settings give the same functions, which jit has compiled; others give others."""
  mesh, config = _one_device(), _config()

  def made(config):
    optimizer = restore.make_optimizer(config)
    begin = restore.beginning(optimizer)
    abstract = mesh_lib.abstract_init(begin, mesh, policy.params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = trainer.make_step(config, policy, optimizer, "xla", shardings, 64)
    return begin, step

  assert all(a is b for a, b in zip(made(config), made(_config()), strict=True))
  faster = made(_config(learning_rate=1e-2))
  assert all(a is not b for a, b in zip(made(config), faster, strict=True))
  sharper = made(_config(temperature=0.5))
  assert sharper[0] is made(config)[0] and sharper[1] is not made(config)[1]
  probes = [
    step_lib.make_probe(policy.architecture, k=k, temperature=1.0, chunk=8) for k in (1, 1, 2)
  ]
  assert probes[0] is probes[1] and probes[0] is not probes[2]


@pytest.fixture(name="at_step")
def fixture_at_step(monkeypatch):
  """Puts a step in place that compiles at once.

  `at_step(5, {"loss": nan}, inf)` has the fifth measure the one and write the other into a
  parameter. What a real step measures of its arrays: test_step.py.
  """
  changes = {}

  def make(*args, **how):
    del args, how

    def step(state, teacher, batch, kept, base):
      del teacher, batch
      number = int(state.step) + 1
      more, value = changes.get(number, ({}, None))
      params = dict(state.params)
      if value is not None:
        params["norm"] = {"scale": params["norm"]["scale"].at[3].set(value)}
      measured = {"loss": 1.0, "gradient_norm": 2.0, "kl": 1.0, "gradient_norm/norm/scale": 2.0}
      measured |= {"not_finite": len(finite.not_finite(params))} | more
      return step_lib.State(state.step + 1, params, state.optimizer), measured

    return step

  monkeypatch.setattr(step_lib, "make_step", make)
  monkeypatch.setattr(trainer, "_step_with", trainer._step_with.__wrapped__)  # which keeps steps
  return lambda number, more, value=None: changes.update({number: (more, value)})


def _lines(folder):
  refuse = lambda name: pytest.fail(f"{name} is no JSON")
  text = (folder / "metrics.jsonl").read_text()
  return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _files(folder):
  return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BARE = dict(log_probe=0)


def test_parameters_that_are_not_finite_end_the_run_at_that_step(policy, tmp_path, at_step):
  """The last good checkpoint stays as it was, and the same command goes on from it."""
  at_step(5, {}, np.inf)
  told = (
    r"round 1, step 5 of consolidation: the new parameters are not finite in norm/scale\. "
    r"Prompts: p\d, p\d, p\d, p\d\. Last good checkpoint: step 4 in .*/checkpoints; it is kept"
    r".* config.consolidation.learning_rate \(0.001\) .*--resume_anyway$"
  )
  with pytest.raises(finite.NotFiniteError, match=told):
    _run(policy, tmp_path, _config(**BARE))
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
  kept = _files(tmp_path / "checkpoints/4")
  for _ in range(2):
    with pytest.raises(finite.NotFiniteError, match="step 5 of"):
      _run(policy, tmp_path, _config(**BARE))
    assert _files(tmp_path / "checkpoints/4") == kept
    assert [line["step"] for line in _lines(tmp_path)] == [0, 1, 2, 3, 4, 5]
  at_step(5, {})  # what led there has changed
  _run(policy, tmp_path, _config(**BARE))
  assert [line["step"] for line in _lines(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
  "measured, told",
  [
    ({"loss": np.nan}, "loss is nan"),
    ({"gradient_norm": np.inf}, "gradient_norm is inf"),
    ({"kl": np.nan, "loss": -np.inf}, "kl is nan; loss is -inf"),
    ({"gradient_norm/norm/scale": np.nan}, "the gradient is not finite in norm/scale"),
    ({"not_finite": 1}, "the optimizer's state is not finite"),
  ],
)
def test_any_number_of_a_step_ends_the_run(policy, tmp_path, at_step, measured, told):
  at_step(1, measured)
  with pytest.raises(finite.NotFiniteError) as raised:
    _run(policy, tmp_path, _config(checkpoint_every=1, **BARE))
  assert f"round 1, step 1 of consolidation: {told}. Prompts: p" in str(raised.value)
  assert "checkpoint: none yet; the round begins with its first weights" in str(raised.value)
  assert not any((tmp_path / "checkpoints").iterdir())
  line, logged = _lines(tmp_path)[-1], measured.keys() & {"loss", "kl", "gradient_norm"}
  assert line["step"] == 1 and all(line[name] is None for name in logged)
  assert line.get("not_finite", {}) == {name: str(measured[name]) for name in logged}


@pytest.mark.parametrize("call, step", [(1, 0), (2, 2)])
def test_a_probe_that_is_not_finite_ends_the_run_before_the_save(
  policy, tmp_path, monkeypatch, at_step, call, step
):
  del at_step
  calls = []

  def probe(params, teacher, batch):
    calls.append(0)
    return {"kl": np.nan if len(calls) == call else 1.0}

  monkeypatch.setattr(step_lib, "make_probe", lambda *args, **how: probe)
  told = f"step {step} of consolidation: probe_kl is nan. Prompts: p"
  with pytest.raises(finite.NotFiniteError, match=told):
    _run(policy, tmp_path)
  assert _lines(tmp_path)[-1]["not_finite"] == {"probe_kl": "nan"}
  assert not any((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("during, step", [("probe", 0), ("step", 3)])
def test_a_sampler_that_stops_is_told_with_the_prefix(
  policy, tmp_path, monkeypatch, at_step, during, step
):
  del at_step
  batches = iter(draws.batches(_task(policy), _config()))
  drawn = [next(batches)["prompt"] for _ in range(3)]
  calls, sample = [], Policy.sample

  def stops(self, prompts, seeds, **how):
    calls.append(0)
    if len(calls) == step + 1 if during == "probe" else len(calls) == step:
      raise finite.NotFiniteError("sampling has stopped", prompts=[1])
    return sample(self, prompts, seeds, **how)

  monkeypatch.setattr(Policy, "sample", stops)
  named = f"p{1 if during == 'probe' else drawn[2][1]}"
  good, config = ("none", _config()) if during == "probe" else ("step 2", _config(**BARE))
  told = (
    f"step {step} of consolidation: sampling has stopped. Prompts: {named}. Last good checkpoint"
  )
  with pytest.raises(finite.NotFiniteError, match=f"{told}: {good}"):
    _run(policy, tmp_path, config)
  if during == "step":
    assert _lines(tmp_path)[-1]["not_finite"] == {"logits": "nan"}


def test_a_checkpoint_of_numbers_that_are_none_is_not_gone_on_with(
  policy, tmp_path, at_step, monkeypatch
):
  """As a version that did not look has left it."""
  at_step(4, {}, np.nan)
  monkeypatch.setattr(failure, "broken", lambda *given: "")
  _run(policy, tmp_path, _config(steps=4, **BARE))
  told = "checkpoints/4: holds numbers .* not finite, in params/norm/scale.*remove that folder"
  for steps in (4, 6):
    with pytest.raises(ValueError, match=told):
      _run(policy, tmp_path, _config(steps=steps, **BARE))
  with pytest.raises(ValueError, match=told):
    restore.trained_params(_config(steps=4), policy, tmp_path / "checkpoints", _one_device())
  shutil.rmtree(tmp_path / "checkpoints/4")
  at_step(4, {})
  _run(policy, tmp_path, _config(steps=4, **BARE))


# SIGTERM


def test_sigterm_saves_the_step_and_the_run_ends_with_the_same_bits(policy, tmp_path, at_step):
  """It comes while step 3 is under way, of which there would be no checkpoint."""
  for number in range(1, 7):
    at_step(number, {}, number)
  whole, _ = _run(policy, tmp_path / "whole", _config(**BARE))
  done = []

  def kill(n, note=""):
    done.append(n)
    assert n > 1 or re.fullmatch(r"loss \d\S*", note)
    if sum(done) == 2:  # the second step is done, and the third begins
      signal.raise_signal(signal.SIGTERM)

  before = signal.getsignal(signal.SIGTERM)
  told = "step 3 of 6 is saved in .*/cut/checkpoints"
  with pytest.raises(signals.Terminated, match=told) as raised:
    _run(policy, tmp_path / "cut", _config(**BARE), advance=kill)
  assert raised.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
  assert sorted(path.name for path in (tmp_path / "cut/checkpoints").iterdir()) == ["2", "3"]
  again, _ = _run(policy, tmp_path / "cut", _config(**BARE))
  jax.tree.map(np.testing.assert_array_equal, again, whole)
  numbers = lambda folder: [(line["step"], line.get("loss")) for line in _lines(folder)]
  assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
