"""Tokenizers whose chat templates show tools, in the manner of real ones: where the definitions
stand, what a call's arguments must be, how a result is quoted, what is refused.
"""

import copy
import functools

import families
import tokenizers
import transformers

# Definitions behind the system text. A call's arguments go through `tojson`, a text's once more.
_QWEN = """{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + SEPARATOR }}{% else %}
{{- DEFAULT }}{% endif %}
{{- '# Tools\\n\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}
{{- '\\n</tools>\\n\\nA call: <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>' }}
{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- elif PLAIN %}{{- '<|im_start|>system\\n' + PLAIN + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- elif message.role != 'system' or not loop.first %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls %}
{%- if message.content or not loop.first %}{{- '\\n' }}{% endif %}
{%- set call = call.function %}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- ARGUMENTS }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Definitions before the first user's words. A message that has a field `tool_calls` calls one tool,
# and says nothing else; a result is quoted as JSON, being a text and so iterable.
_LLAMA = """{{- bos_token }}
{%- set own = '' %}
{%- if messages[0].role == 'system' %}
{%- set own = messages[0].content | trim %}{% set messages = messages[1:] %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{% endif %}
{{- 'Today: 26 Jul 2024\\n\\n' + own + '<|eot_id|>' }}
{%- if tools is not none %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with JSON for a call.\\n\\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{% endfor %}
{{- messages[0].content | trim + '<|eot_id|>' }}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
{%- if 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at once') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name }}
{{- '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
{%- if message.content is iterable %}{{- message.content | tojson }}{% else %}
{{- message.content }}{% endif %}{{- '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""


def _qwen(default: str, arguments: str) -> str:
  """With a default system text, its definitions follow it; without, they begin the message."""
  words = {"DEFAULT": f"'{default}\\n\\n'" if default else "''", "SEPARATOR": "'\\n\\n'"}
  words |= {"PLAIN": f"'{default}'", "ARGUMENTS": arguments}
  template = _QWEN
  for name, value in words.items():
    template = template.replace(name, value)
  return template


_JSON = "call.arguments | tojson"
_JSON_OR_TEXT = "call.arguments if call.arguments is string else call.arguments | tojson"
_MARKS = ("<tool_call>", "</tool_call>")
# The family whose vocabulary it is, template, further added tokens that are not special.
TOOL_FAMILIES = {
  "qwen2.5": ("qwen2.5", _qwen("You are a helpful assistant.", _JSON), _MARKS),
  "qwen3": ("qwen3", _qwen("", _JSON_OR_TEXT), (*_MARKS, "<tool_response>", "</tool_response>")),
  "llama3.1": ("llama3.1", _LLAMA, ()),
}


@functools.cache
def tokenizer(family: str) -> transformers.PreTrainedTokenizerFast:
  base, template, added = TOOL_FAMILIES[family]
  made = copy.deepcopy(families.tokenizer(base))
  made.add_tokens([tokenizers.AddedToken(name, normalized=False, special=False) for name in added])
  made.chat_template = template
  return made
