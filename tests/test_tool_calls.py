"""Calls of tools as models write them, and what is no call and stays text."""

import json

import families
import pytest
import tool_families
from test_chat_tools import SAID, TOOLS, ours, theirs

from oel_jax.conversations.schema import Message, ToolCall
from oel_jax.policy.tokenizers import HuggingFaceTokenizer
from oel_jax.policy.tokenizers.tool_calls import offered, parse, read_response

NAMES = ("clock", "desks")
CLOCK = ToolCall("", "clock", '{"zone": "UTC"}')
DESKS = ToolCall("", "desks", "{}")
CLOCK_TEXT = '{"name": "clock", "arguments": {"zone":"UTC"}}'


@pytest.mark.parametrize(
  "answer, content, calls",
  [
    (f"<tool_call>\n{CLOCK_TEXT}\n</tool_call>", "", (CLOCK,)),
    (f"I look.\n<tool_call>\n{CLOCK_TEXT}\n</tool_call>", "I look.", (CLOCK,)),
    (
      f'<tool_call>{CLOCK_TEXT}</tool_call>\n<tool_call>{{"name": "desks", "arguments": {{}}}}'
      "</tool_call>",
      "",
      (CLOCK, DESKS),
    ),
    (f"<tool_call>\n{CLOCK_TEXT}", "", (CLOCK,)),  # the response ends where the mark would stand
    ('<tool_call>{"name": "x", "arguments": {}}</tool_call>', "", (ToolCall("", "x", "{}"),)),
    ('<tool_call>{"name": "desks", "arguments": "{}"}</tool_call>', "", (DESKS,)),
    ('{"name": "clock", "parameters": {"zone": "UTC"}}', "", (CLOCK,)),
    ('{\n"name": "clock",\n"arguments": {\n"zone": "UTC"\n}\n}', "", (CLOCK,)),
    (f"```json\n{CLOCK_TEXT}\n```", "", (CLOCK,)),
    (f"```\n{CLOCK_TEXT}\n```\n", "", (CLOCK,)),
    ('<|python_tag|>{"name": "clock", "parameters": {"zone": "UTC"}}', "", (CLOCK,)),
    (
      '{"name": "clock", "parameters": {"zone": "UTC"}}; {"name": "desks", "parameters": {}}',
      "",
      (CLOCK, DESKS),
    ),
    ('<tool_call>{"name": "clock", "arguments": {"zone": "Łódź"}}</tool_call>', "",
     (ToolCall("", "clock", '{"zone": "Łódź"}'),)),
  ],
)  # fmt: skip
def test_calls_are_read(answer, content, calls):
  assert parse(answer, NAMES) == (content, calls)


@pytest.mark.parametrize(
  "answer",
  [
    "",
    "It is noon.",
    "{}",
    "[1, 2]",
    '{"name": "clock"}',
    '{"name": "Ann", "parameters": {"age": 3}}',  # a user may ask for JSON
    'Use {"name": "clock", "parameters": {}} for it.',
    '{"name": "clock", "parameters": {}} and more',
    '<tool_call>{"name": "clock", "arguments": {"zone": "UT',
    '<tool_call>{"name": "clock", "arguments": {}}</tool_call><tool_call>{"name": </tool_call>',
    '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "clock", "arguments": "UTC"}</tool_call>',
    "<tool_call></tool_call>",
    f"So:\n```json\n{CLOCK_TEXT}\n```",
    '```json\n{"name": "Ann", "arguments": {}}\n```',
    "</tool_call>",
    '<tool_call>' + '{"name": ' * 20_000,
    '{"name": "clock", "parameters": ' + "[" * 20_000,
  ],
)  # fmt: skip
def test_what_is_no_whole_call_stays_text(answer):
  assert parse(answer, NAMES) == (answer, ())


@pytest.mark.parametrize("family", tool_families.TOOL_FAMILIES)
def test_what_the_template_writes_for_a_call_is_read_back(family):
  """The ids that stand between the header and the end of an answer in the template's own prompt."""
  before, whole = (ours(family).chat(SAID[:end], tools=TOOLS) for end in (1, 3))
  response = whole[len(before) :]
  response = response[: 1 + response.index(ours(family).eos_ids[0])]
  found = read_response(ours(family), response, NAMES, thinking=True)
  [made], [right] = found.tool_calls, SAID[1].tool_calls
  assert (found.content, found.response_tokens) == ("", len(response))
  assert made.name == right.name and json.loads(made.arguments) == json.loads(right.arguments)
  # Asked for no call, all of it is text, and control tokens are left out as ever.
  plain = read_response(ours(family), response, (), thinking=True)
  assert (
    plain.tool_calls == () and '"clock"' in plain.content and "<tool_call>" not in plain.content
  )
  said = (SAID[0], found, *SAID[2:])
  assert ours(family).chat(said, tools=TOOLS) == ours(family).chat(SAID, tools=TOOLS)


def test_the_names_of_tools_that_are_offered():
  """A provider's own tool may have no name, or no function."""
  odd = ('{"type": "web_search"}', '{"type": "function", "function": {}}', '{"function": "clock"}')
  assert offered((*odd, *TOOLS)) == offered(TOOLS) and "clock" in offered(TOOLS)
  assert offered(odd) == ()


def test_a_call_behind_thinking():
  text = f"<think>Look.</think>\n\nNow.\n<tool_call>\n{CLOCK_TEXT}\n</tool_call><|im_end|>"
  ids = theirs("qwen3").encode(text)
  assert read_response(ours("qwen3"), ids, NAMES, thinking=True) == Message(
    "assistant", "Now.", (CLOCK,), thinking="Look.", response_tokens=len(ids)
  )
  thought = theirs("qwen3").encode(f"<think>Look.<tool_call>\n{CLOCK_TEXT}\n</tool_call>")
  assert read_response(ours("qwen3"), thought, NAMES, thinking=True).tool_calls == ()


def test_a_tokenizer_without_the_marks_reads_them_spelled():
  tokenizer = HuggingFaceTokenizer(families.tokenizer("smollm2"))
  ids = tokenizer.encode(f"<tool_call>{CLOCK_TEXT}</tool_call>")
  assert read_response(tokenizer, ids, NAMES, thinking=True).tool_calls == (CLOCK,)
