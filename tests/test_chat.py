"""Hugging Face tokenizers: ids as the template makes them, knowledge that changes nothing else, and
text that stays text.
"""

import copy
import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys

import families
import pytest
import transformers
from processes import python_path

from oel_jax.conversations.schema import Message, knowledge_message
from oel_jax.policy.tokenizers import HuggingFaceTokenizer

PLAYED = (
  Message("user", "You are playing a game.\n\nCurrent Board:\n|  P  |  H  |\n"),
  Message("assistant", "[up]\n[down]"),
  Message("user", "  wall.  "),
  Message("assistant", ""),
  Message("user", "Über 12 naïve Œufs – 東京 🙂\n\n\n\tend"),
)
TEXTS = (
  "H is a hole.",
  "- EXPERIENCE ITEM: H is a hole.\n- EXPERIENCE ITEM: G is the goal!",
  "東京",
  "42",
  " ",
  "ends in space \n\n",
)
CONTROL = sorted(
  {
    token
    for family in families.FAMILIES
    for token in families.tokenizer(family).added_tokens_encoder
  }
)


@pytest.fixture(params=families.FAMILIES)
def family(request):
  return request.param


@functools.cache
def wrapped(family: str) -> HuggingFaceTokenizer:
  return HuggingFaceTokenizer(families.tokenizer(family))


def by_template(family, messages, thinking=True):
  conversation = [{"role": message.role, "content": message.content} for message in messages]
  options = dict(add_generation_prompt=True, enable_thinking=thinking)
  options |= {"date_string": "01 Jan 2025"} if family == "llama3" else {}
  return families.tokenizer(family).apply_chat_template(
    conversation, tokenize=True, return_dict=False, **options
  )


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("length", [1, 3, 5])
def test_the_ids_are_the_templates(family, length, thinking):
  assert wrapped(family).chat(PLAYED[:length], thinking=thinking) == by_template(
    family, PLAYED[:length], thinking
  )


OWN = (
  "Know this.", "Be kind", "You are a pirate!", "Rules:\n- one\n- two", "東京", "ends in a space ",
  "and in a line\n", "two lines \n\n", "  ", "",
)  # fmt: skip


@pytest.mark.parametrize("own", OWN)
def test_a_system_message_of_the_conversations_own_replaces_the_templates(family, own):
  conversation = (Message("system", own), *PLAYED)
  assert wrapped(family).chat(conversation) == by_template(family, conversation)
  assert "helpful assistant" not in wrapped(family).decode(wrapped(family).chat(conversation))


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("length", [1, 3])
def test_knowledge_stands_behind_the_system_text_in_one_system_message(family, own, length):
  tokenizer, system = wrapped(family), Message("system", own)
  student = tokenizer.chat((system, *PLAYED[:length]))
  for text in TEXTS:
    knowledge = knowledge_message(text)
    teacher = tokenizer.chat((knowledge, system, *PLAYED[:length]))
    skip, ids = tokenizer.knowledge_prefix(knowledge, system=system)
    assert teacher == ids + student[skip:] and ids[:skip] == student[:skip]
    said = tokenizer.decode(teacher)
    assert said.count("system") == tokenizer.decode(student).count("system")  # no second one
    assert said.index(own.strip()) <= said.index("Experience from earlier games:")


@pytest.mark.parametrize(
  "name, default",
  [
    ("qwen2.5", "You are a helpful assistant."),
    ("smollm2", "You are a helpful assistant, said Nobody"),
    ("qwen3", ""),
    ("qwen3.5", ""),
  ],
)
def test_knowledge_stands_behind_the_templates_default_text(name, default):
  student = wrapped(name).decode(wrapped(name).chat(PLAYED[:1]))
  assert student.startswith(f"system\n{default}\n" if default else "user\n")
  given = (knowledge_message("H is a hole."), *PLAYED[:1])
  teacher = wrapped(name).decode(wrapped(name).chat(given))
  assert teacher.startswith(f"system\n{default}")
  assert "Experience from earlier games:\nH is a hole.\n" in teacher


def test_a_date_is_given_only_where_the_template_asks_for_today(monkeypatch):
  """Llama 3.1's template has a day of its own, 3.2's asks for today: a prompt must not change."""
  names = "llama3.1", "llama3"
  said = {name: wrapped(name).decode(wrapped(name).chat(PLAYED[:1])) for name in names}
  assert "Today: 26 Jul 2024\n" in said["llama3.1"] and "Today: 01 Jan 2025\n" in said["llama3"]

  class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
      return cls(2031, 7, 8)

  monkeypatch.setattr(datetime, "datetime", Later)
  for name, before in said.items():
    anew = HuggingFaceTokenizer(families.tokenizer(name))
    assert anew.decode(anew.chat(PLAYED[:1])) == before


@pytest.mark.parametrize("name", ["llama3", "llama3.1"])
def test_a_template_that_writes_the_beginning_of_text_gets_no_second_one(name):
  begin = families.tokenizer(name).bos_token_id
  for front in ((), (Message("system", "Be kind."),), (knowledge_message("H is a hole."),)):
    ids = wrapped(name).chat((*front, *PLAYED))
    assert ids[0] == begin and ids.count(begin) == 1


def test_a_second_system_message_is_the_templates_to_refuse():
  later = (*PLAYED[:2], Message("system", "Be kind."), PLAYED[2])
  with pytest.raises(ValueError, match="refuses the roles user, assistant, system, user: one"):
    wrapped("qwen3.5").chat(later)
  assert wrapped("qwen3").chat(later) == by_template("qwen3", later)


@pytest.mark.parametrize("thinking", [True, False])
def test_without_the_knowledge_the_teachers_prompt_is_the_students(family, thinking):
  tokenizer, skips = wrapped(family), set()
  for text in TEXTS:
    message = knowledge_message(text)
    skip, ids = tokenizer.knowledge_prefix(message, thinking=thinking)
    for length in (1, 3, 5):
      student = tokenizer.chat(PLAYED[:length], thinking=thinking)
      assert tokenizer.chat((message, *PLAYED[:length]), thinking=thinking) == ids + student[skip:]
      assert ids[:skip] == student[:skip]
    assert text.strip() in tokenizer.decode(ids)
    skips.add(skip)
  assert len(skips) == 1


def test_control_tokens_that_someone_typed_are_text(family):
  tokenizer = wrapped(family)
  control = set(families.tokenizer(family).added_tokens_decoder)
  turns = lambda ids: [i for i in ids if i in control]
  plain = (
    Message("system", "one"),
    Message("user", "two"),
    Message("assistant", "three"),
    Message("user", "four"),
  )
  for typed in CONTROL:  # of every family: another's are text, too
    for text in (typed, f"a {typed}user\nb", f"{typed}{typed}", f"{typed}\n\nx{typed}"):
      assert tokenizer.decode(tokenizer.encode(text)) == text
      assert not control & set(tokenizer.encode(text))
      said = tuple(Message(message.role, message.content + text) for message in plain)
      ids = tokenizer.chat(said)
      assert turns(ids) == turns(tokenizer.chat(plain))
      assert tokenizer.decode(ids).count(text) >= len(plain)
      knowledge = knowledge_message(text)
      skip, prefix = tokenizer.knowledge_prefix(knowledge, system=said[0])
      assert prefix + ids[skip:] == tokenizer.chat((knowledge, *said))


def test_a_control_token_that_its_name_spells_is_refused():
  tokenizer = copy.deepcopy(families.tokenizer("qwen3"))
  before = tokenizer.convert_tokens_to_ids("Good")
  # A word of the merges keeps its id.
  tokenizer.add_special_tokens({"additional_special_tokens": ["Good"]})
  assert tokenizer.added_tokens_encoder["Good"] == before
  with pytest.raises(ValueError, match="makes a control token of 'Good' in any text"):
    HuggingFaceTokenizer(tokenizer)


def test_a_response_is_split_at_the_end_of_its_thinking():
  tokenizer = wrapped("qwen3")
  thought = families.tokenizer("qwen3").encode("<think>up or down?</think>\n\n[up]<|im_end|>")
  assert tokenizer.split_response(thought) == ("up or down?", "[up]")
  assert tokenizer.split_response(thought[:-1]) == ("up or down?", "[up]")
  # Spelled out, not the token.
  assert tokenizer.split_response(tokenizer.encode("[up] </think>")) == (
    "",
    "[up] </think>",
  )
  unfinished = families.tokenizer("qwen3").encode("<think>up or [down]")
  assert tokenizer.split_response(unfinished) == ("up or [down]", "")
  opened = wrapped("qwen3-thinking")  # its prompt ends with <think>
  assert opened.split_response(
    families.tokenizer("qwen3-thinking").encode("hm [down]</think>[up]")
  ) == ("hm [down]", "[up]")
  assert opened.split_response(opened.encode("hm [down]")) == ("hm [down]", "")
  assert wrapped("llama3").split_response(
    families.tokenizer("llama3").encode("[up]<|eot_id|>")
  ) == ("", "[up]")


def test_thinking_that_the_template_closed_is_not_open():
  tokenizer = wrapped("qwen3")
  assert tokenizer.chat(PLAYED[:1], thinking=False) != tokenizer.chat(PLAYED[:1])
  assert tokenizer.split_response(tokenizer.encode("[up]"), thinking=False) == ("", "[up]")


def test_a_folder_gives_every_end_of_a_response_and_takes_the_tokenizer_back(family, tmp_path):
  own, told = families.tokenizer(family), wrapped(family)
  told.save(tmp_path)
  first = HuggingFaceTokenizer.from_folder(tmp_path)
  assert first.chat(PLAYED) == told.chat(PLAYED) and first.eos_ids == told.eos_ids
  (tmp_path / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [7, own.eos_token_id]})
  )
  again = HuggingFaceTokenizer.from_folder(tmp_path)
  assert again.eos_ids == (7, own.eos_token_id)
  assert again.pad_id == (7 if own.pad_token_id is None else own.pad_token_id)
  assert again.vocabulary == len(own)


@pytest.mark.parametrize(
  "generation, config, right",
  [
    (None, [7, 8], [7, 8]),
    (None, 9, [9]),
    (None, None, []),
    ({}, [7], [7]),
    ({"eos_token_id": None}, 7, [7]),
    ({"eos_token_id": 5}, [7, 8], [5]),  # config.json may hold a family's default
  ],
)
def test_the_ends_are_of_the_first_file_that_declares_any(generation, config, right, tmp_path):
  wrapped("qwen3").save(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": config}))
  if generation is not None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
  found = HuggingFaceTokenizer.from_folder(tmp_path).eos_ids
  assert found == tuple(right) + wrapped("qwen3").eos_ids


@pytest.mark.parametrize("value", ["<|im_end|>", [7, "8"], 7.0, True, -1])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_that_is_no_id_is_named(name, value, tmp_path):
  wrapped("qwen3").save(tmp_path)
  (tmp_path / name).write_text(json.dumps({"model_type": "qwen3", "eos_token_id": value}))
  with pytest.raises(ValueError, match=f'{name}: "eos_token_id" is ') as error:
    HuggingFaceTokenizer.from_folder(tmp_path)
  assert repr(value) in str(error.value)


def test_the_end_of_an_answer_is_the_templates_though_the_tokenizer_names_another(tmp_path):
  wrapped("qwen3").save(tmp_path)
  fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps(fields | {"eos_token": "<|endoftext|>"})
  )
  ids = families.tokenizer("qwen3").convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
  assert list(HuggingFaceTokenizer.from_folder(tmp_path).eos_ids) == ids


@pytest.mark.parametrize(
  "template, told",
  [
    (None, "has no chat template"),
    ("{{ messages[0].content }}", "leaves out the user message"),
    ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "repeats the"),
    (
      "{% for m in messages %}{{ raise_exception('only users speak') if m.role == 'system' }}{{ "
      "m.content }}{% endfor %}",
      "only users speak",
    ),
    (
      "{% for m in messages %}{{ messages|length }}{{ m.content }}<|im_end|>{% endfor %}",
      "changes the prompt",
    ),
  ],
)
def test_templates_that_cannot_be_followed_are_refused(template, told, tmp_path):
  wrapped("qwen3").save(tmp_path)
  path = tmp_path / "chat_template.jinja"
  path.unlink() if template is None else path.write_text(template)
  with pytest.raises(ValueError, match=told):
    HuggingFaceTokenizer.from_folder(tmp_path).knowledge_prefix(knowledge_message("x"))


def test_a_folder_without_a_tokenizer_is_told(tmp_path):
  with pytest.raises(ValueError, match="no tokenizer could be read"):
    HuggingFaceTokenizer.from_folder(tmp_path)
  wrapped("qwen3").save(tmp_path)
  (tmp_path / "generation_config.json").write_text("{")
  with pytest.raises(ValueError, match="generation_config.json: damaged"):
    HuggingFaceTokenizer.from_folder(tmp_path)


WITHOUT_TORCH = """
import importlib.util, runpy, sys
found = importlib.util.find_spec
none = lambda name: name.partition(".")[0] == "torch"
importlib.util.find_spec = lambda name, package=None: None if none(name) else found(name, package)
class Finder:
  def find_spec(self, name, path=None, target=None):
    if none(name):
      raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Finder())
"""
AS_MAIN = 'runpy.run_module("oel_jax.main", run_name="__main__", alter_sys=True)'


@pytest.mark.parametrize("start", ["import transformers", AS_MAIN], ids=["the library", "main"])
def test_that_there_is_no_pytorch_is_not_told(start, tmp_path):
  """The library tells it on its own; a run on a Hugging Face folder has its own line alone."""
  families.tokenizer("qwen3").save_pretrained(tmp_path)
  transformers.Qwen3Config(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    architectures=["Qwen3ForCausalLM"],
  ).save_pretrained(tmp_path)
  root = pathlib.Path(__file__).parents[1]
  done = subprocess.run(
    [
      sys.executable,
      "-c",
      WITHOUT_TORCH + start,
      f"--config={root}/experiments/frozen_lake.py:qwen3-1.7b",
      f"--config.policy.weights={tmp_path}",
      f"--workdir={tmp_path}/run",
    ],
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path()},
  )
  told = done.stderr.splitlines()
  assert len(told) == 1 and ("PyTorch was not found" in told[0]) == (start != AS_MAIN), told
  # Which shows that it came as far as the tokenizer, and no further.
  assert start != AS_MAIN or "config.policy.max_prompt_tokens is 16384" in told[0]
