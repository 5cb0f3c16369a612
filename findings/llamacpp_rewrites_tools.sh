#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549) beside transformers 5.24.0: one chat template and one conversation with tools give two prompts.
#
# A guess: a template that both can run gives the same text, for both hand it what the request holds. Seen, on a GGUF file of a random model whose template
# writes tools and calls by `tojson`, as Qwen2.5's does: plain turns and most calls agree, but llama.cpp's server hands on its own reading of the tools and
# of the arguments:
#   - a number such as 1.0, in a call or in a parameter's default, is 1, so a call that the model wrote is not what stands in its own history
#   - a whole number of 2**63 and more, such as an id of 64 bits, comes out NEGATIVE; one below that is kept
#   - a tool's fields are put in another order (name, description, parameters), and those that it does not know, "strict" among them, are left out
# So a policy that is trained on prompts of apply_chat_template and served by llama.cpp meets other prompts in these conversations, and a log of that
# server, rendered for training, is not what its model read.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xllamacpp==2026.10.11549 gguf==0.19.0 transformers==5.24.0 jinja2==3.1.6 numpy==2.4.6
cat > "$folder/template.jinja" <<'JINJA'
{%- for tool in tools or [] %}{{ 'TOOL ' + (tool | tojson) + '\n' }}{% endfor %}
{%- for message in messages %}{{ message.role + ': ' + (message.content or '') + '\n' }}
{%- for call in message.tool_calls or [] %}{{ 'CALL ' + call.function.name + ' ' + (call.function.arguments | tojson) + '\n' }}{% endfor %}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}
JINJA
cat > "$folder/model.py" <<'PYTHON'
import sys

import gguf
import numpy as np

folder = sys.argv[1]
WIDTH, HEADS, FEED = 32, 2, 64
shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
tokens = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))] + ["th", "<end>"]
end, random = len(tokens) - 1, np.random.default_rng(0)
writer = gguf.GGUFWriter(f"{folder}/model.gguf", "llama")
writer.add_block_count(1)
writer.add_context_length(512)
writer.add_embedding_length(WIDTH)
writer.add_feed_forward_length(FEED)
writer.add_head_count(HEADS)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_rope_dimension_count(WIDTH // HEADS)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("gpt-2")
writer.add_token_list(tokens)
writer.add_token_types([gguf.TokenType.NORMAL] * end + [gguf.TokenType.CONTROL])
writer.add_token_merges(["t h"])
writer.add_eos_token_id(end)
writer.add_bos_token_id(end)
writer.add_add_bos_token(False)
with open(f"{folder}/template.jinja") as file:
  writer.add_chat_template(file.read())
shapes = {"token_embd": (end + 1, WIDTH), "output": (end + 1, WIDTH), "output_norm": (WIDTH,), "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,)}
shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
shapes |= {"blk.0.ffn_gate": (FEED, WIDTH), "blk.0.ffn_up": (FEED, WIDTH), "blk.0.ffn_down": (WIDTH, FEED)}
for name, shape in shapes.items():
  writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
PYTHON
cat > "$folder/compare.py" <<'PYTHON'
import copy
import json
import sys
import urllib.request

import xllamacpp
from transformers.utils.chat_template_utils import render_jinja_template

folder = sys.argv[1]
with open(f"{folder}/template.jinja") as file:
  TEMPLATE = file.read()
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = f"{folder}/model.gguf", 512, 1
parameters.use_jinja, parameters.warmup = True, False
server = xllamacpp.Server(parameters)


def by_llamacpp(asked):
  body, kind = json.dumps(asked).encode(), {"Content-Type": "application/json"}
  with urllib.request.urlopen(urllib.request.Request(f"{server.listening_address}/apply-template", body, kind)) as answer:
    return json.load(answer)["prompt"]


def by_transformers(asked):
  messages = copy.deepcopy(asked["messages"])
  for message in messages:
    for call in message.get("tool_calls", ()):
      call["function"]["arguments"] = json.loads(call["function"]["arguments"])
  return render_jinja_template([messages], tools=asked.get("tools"), chat_template=TEMPLATE, add_generation_prompt=True)[0][0]


def after(arguments):
  call = {"id": "1", "type": "function", "function": {"name": "seat", "arguments": arguments}}
  question, answer = {"role": "user", "content": "Where?"}, {"role": "tool", "tool_call_id": "1", "content": "Row 1.0"}
  return {"messages": [question, {"role": "assistant", "content": None, "tool_calls": [call]}, answer]}


def offered(**fields):
  return {"messages": [{"role": "user", "content": "Where?"}], "tools": [{"type": "function", "function": fields}]}


nothing = {"type": "object", "properties": {}}
share = {"type": "object", "properties": {"share": {"type": "number", "default": 1.0}}}
asked = {
  "plain": {"messages": [{"role": "system", "content": " Short. "}, {"role": "user", "content": "Where?\n"}]},
  "call": after('{"zone": "Łódź <b>", "at": [1, 2.5, null, true], "a": {}}'),
  "call, 1.0": after('{"share": 1.0}'),
  "call, 2**63 - 1": after('{"id": 9223372036854775807}'),
  "call, 2**63": after('{"id": 9223372036854775808}'),
  "tool": offered(name="seat", description="Finds it.", parameters=nothing),
  "tool, default 1.0": offered(name="seat", description="Finds it.", parameters=share),
  "tool, strict": offered(name="seat", description="Finds it.", strict=True, parameters=nothing),
  "tool, parameters first": offered(parameters=nothing, name="seat", description="Finds it."),
}
for name, what in asked.items():
  ours, theirs = by_transformers(what), by_llamacpp(what)
  print(f"SEEN {name}: {'the same' if ours == theirs else 'differs'}")
  for side, text in (("transformers", ours), ("llama.cpp", theirs)) if ours != theirs else ():
    print(f"SEEN   {side}: {next(line for line in text.splitlines() if line.startswith(('TOOL', 'CALL')))}")
PYTHON
"$folder/venv/bin/python" "$folder/model.py" "$folder"
"$folder/venv/bin/python" "$folder/compare.py" "$folder" > "$folder/printed" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
grep -a '^SEEN' "$folder/printed" | cut -c 6- > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
plain: the same
call: the same
call, 1.0: differs
  transformers: CALL seat {"share": 1.0}
  llama.cpp: CALL seat {"share": 1}
call, 2**63 - 1: the same
call, 2**63: differs
  transformers: CALL seat {"id": 9223372036854775808}
  llama.cpp: CALL seat {"id": -9223372036854775808}
tool: the same
tool, default 1.0: differs
  transformers: TOOL {"type": "function", "function": {"name": "seat", "description": "Finds it.", "parameters": {"type": "object", "properties": {"share": {"type": "number", "default": 1.0}}}}}
  llama.cpp: TOOL {"type": "function", "function": {"name": "seat", "description": "Finds it.", "parameters": {"type": "object", "properties": {"share": {"type": "number", "default": 1}}}}}
tool, strict: differs
  transformers: TOOL {"type": "function", "function": {"name": "seat", "description": "Finds it.", "strict": true, "parameters": {"type": "object", "properties": {}}}}
  llama.cpp: TOOL {"type": "function", "function": {"name": "seat", "description": "Finds it.", "parameters": {"type": "object", "properties": {}}}}
tool, parameters first: differs
  transformers: TOOL {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, "name": "seat", "description": "Finds it."}}
  llama.cpp: TOOL {"type": "function", "function": {"name": "seat", "description": "Finds it.", "parameters": {"type": "object", "properties": {}}}}
SEEN
