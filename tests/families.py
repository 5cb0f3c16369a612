"""Small random models of each family; and tokenizers in its manner: byte-level BPE trained here,
control tokens, a chat template.
"""

import functools

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

# Digits one by one, letters with one leading sign, signs with the line breaks after them: where the
# merges of Qwen and Llama 3 stop.
SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
  "You are a helpful assistant. How are you? I am well.\n\nGood! Experience from earlier games:\n- "
  "EXPERIENCE ITEM: H is a hole.\n",
  "system user assistant You are playing a game. Nobody tells you its rules: find out how to "
  "win.\nYour actions: [up], [down], [left], [right]\n",
  "Current Board:\n+-----+-----+\n|  P  |  H  |\n+-----+-----+\nThink first, then answer with one "
  "action.\n\nKnow this. Today: 01 Jan 2025\n",
  "This is the record of a finished game whose rules nobody told the player. What does this record "
  "teach that will help in any later game?",
)

_QWEN = """{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}{{ DEFAULT }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content.split('</think>')[-1]
    + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{{ THINK }}{% endif %}"""
_LLAMA = """{{- bos_token }}
{%- if date_string is not defined %}{%- set date_string = TODAY %}{%- endif %}
{%- set own = messages[0].content | trim if messages[0].role == 'system' else '' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: '
    + date_string + '\\n\\n' + own + '<|eot_id|>' }}
{%- for message in (messages[1:] if messages[0].role == 'system' else messages) %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n'
    + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
_ONE_SYSTEM = """{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}
{{- raise_exception('one system message, at the beginning') }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
_NO_THINKING = (
  "'<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else ''"
)


def _qwen(default: str, think: str = "''") -> str:
  system = f"'<|im_start|>system\\n{default}<|im_end|>\\n'" if default else "''"
  return _QWEN.replace("DEFAULT", system).replace("THINK", think)


def _llama(today: str) -> str:
  return _LLAMA.replace("TODAY", today)


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_HEADERS = (
  "<|begin_of_text|>",
  "<|end_of_text|>",
  "<|start_header_id|>",
  "<|end_header_id|>",
  "<|eot_id|>",
)
_ENDS = ("<|begin_of_text|>", "<|eot_id|>", None)
# Template, special tokens, added tokens that are not special, bos, eos, pad.
FAMILIES = {
  "qwen3": (
    _qwen("", _NO_THINKING),
    _CHATML,
    ("<think>", "</think>"),
    None,
    "<|im_end|>",
    "<|endoftext|>",
  ),
  "qwen3-thinking": (
    _qwen("", "'<think>\\n'"),
    _CHATML,
    ("<think>", "</think>"),
    None,
    "<|im_end|>",
    "<|endoftext|>",
  ),
  "qwen2.5": (
    _qwen("You are a helpful assistant."),
    _CHATML,
    (),
    None,
    "<|im_end|>",
    "<|endoftext|>",
  ),
  "smollm2": (
    _qwen("You are a helpful assistant, said Nobody"),
    _CHATML,
    (),
    "<|im_start|>",
    "<|im_end|>",
    "<|im_end|>",
  ),
  "qwen3.5": (_ONE_SYSTEM, _CHATML, (), None, "<|im_end|>", "<|endoftext|>"),
  "llama3.1": (_llama("'26 Jul 2024'"), _HEADERS, (), *_ENDS),
  "llama3": (_llama("strftime_now('%d %b %Y')"), _HEADERS, (), *_ENDS),
}


@functools.cache
def tokenizer(family: str) -> transformers.PreTrainedTokenizerFast:
  template, special, added, bos, eos, pad = FAMILIES[family]
  backend = tokenizers.Tokenizer(models.BPE())
  backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  backend.train_from_iterator(
    CORPUS,
    trainers.BpeTrainer(vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
  )
  names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
  made = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, **{name: token for name, token in names.items() if token}
  )
  made.add_special_tokens({"additional_special_tokens": list(special)})
  made.add_tokens(
    [tokenizers.AddedToken(token, normalized=False, special=False) for token in added]
  )
  made.chat_template = template
  return made


def model(name: str, **fields) -> "transformers.PreTrainedModel":
  """A random model of the class that begins with `name`, with norms and biases that can be told
  from ones and zeros.
  """
  import torch  # here, for the tokenizers are used where it is not installed

  torch.manual_seed(0)
  made = getattr(transformers, f"{name}ForCausalLM")(
    getattr(transformers, f"{name}Config")(**fields)
  ).eval()
  with torch.no_grad():
    for parameter in made.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.3 * torch.randn_like(parameter))
  return made
