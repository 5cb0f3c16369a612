#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549): with a stop word, `logprobs` names tokens by what was given out at the time, and leaves out those of the stop word.
#
# A guess: there is an entry for each of usage.completion_tokens, and its `token` is that token's text, whatever the stop words are; so it is without any. Seen, on
# a GGUF file of a model whose tokens are letters, with one seed throughout:
#   - a text that may be the beginning of a stop word is held back, and its token's entry says "" for it. The next token that is let out says both: with
#     the stop word "ab", the tokens a, c are "" and "ac". The field `id` and the log-probability stay right
#   - an answer that a stop word ends has no entries for that word, though the policy drew its tokens and completion_tokens counts them: ten tokens, eight entries
#   - where the answer begins with the stop word there is no `logprobs` field at all
# So a log that is read by tokens' texts has other tokens than were drawn, and an importance weight from it lacks the decision to stop, which an end
# token of the model's own has its entry for.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6
cat > "$folder/model.py" <<'PYTHON'
import sys

import gguf
import numpy as np

WIDTH, HEADS, FEED = 64, 2, 64
shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
tokens = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))] + ["th", "<end>"]
end = len(tokens) - 1
writer = gguf.GGUFWriter(sys.argv[1], "llama")
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
writer.add_chat_template("{% for m in messages %}{{ m.role[0] + ':' + m.content + '<end>' }}{% endfor %}{{ 'A:' }}")
# Whatever is read, the last layer's norm gives sqrt(WIDTH) in the first place and 0 elsewhere.
shapes = {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
shapes |= {"blk.0.ffn_gate": (FEED, WIDTH), "blk.0.ffn_up": (FEED, WIDTH), "blk.0.ffn_down": (WIDTH, FEED)}
weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
weights |= {name: np.ones(WIDTH, np.float32) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
weights |= {name: np.zeros((end + 1, WIDTH), np.float32) for name in ("token_embd", "output")}
weights["token_embd"][:, 0], weights["output"][:, 0] = 1, -30 / WIDTH**0.5
for token, probability in {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.05, "<end>": 0.05}.items():
  weights["output"][tokens.index(token), 0] = np.log(probability) / WIDTH**0.5
for name, array in weights.items():
  writer.add_tensor(f"{name}.weight", array)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
PYTHON
cat > "$folder/ask.py" <<'PYTHON'
import json
import sys
import urllib.request

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = sys.argv[1], 2048, 4
parameters.use_jinja, parameters.warmup = True, False
server = xllamacpp.Server(parameters)


def ask(**how):
  asked = {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | how
  body, kind = json.dumps(asked).encode(), {"Content-Type": "application/json"}
  with urllib.request.urlopen(urllib.request.Request(f"{server.listening_address}/v1/chat/completions", body, kind)) as answer:
    return json.load(answer)


for stop in ([], ["ab"], ["dd"], ["cb"], ["a"]):
  found = ask(seed=103, stop=stop, max_tokens=40)
  choice = found["choices"][0]
  entries = choice.get("logprobs", {}).get("content")
  told = entries and [entry["token"] if entry["token"] or entry["id"] < 256 else "(end)" for entry in entries]
  print(f"SEEN stop {stop}: {choice['message']['content']!r}, {found['usage']['completion_tokens']} tokens, entries {told}")
PYTHON
"$folder/venv/bin/python" "$folder/model.py" "$folder/model.gguf"
"$folder/venv/bin/python" "$folder/ask.py" "$folder/model.gguf" > "$folder/printed" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
grep -a '^SEEN' "$folder/printed" | cut -c 6- > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
stop []: 'acacbaacababacbda', 18 tokens, entries ['a', 'c', 'a', 'c', 'b', 'a', 'a', 'c', 'a', 'b', 'a', 'b', 'a', 'c', 'b', 'd', 'a', '(end)']
stop ['ab']: 'acacbaac', 10 tokens, entries ['', 'ac', '', 'ac', 'b', '', '', 'aac']
stop ['dd']: 'acacbaacababacbda', 18 tokens, entries ['a', 'c', 'a', 'c', 'b', 'a', 'a', 'c', 'a', 'b', 'a', 'b', 'a', 'c', 'b', '', 'da', '(end)']
stop ['cb']: 'aca', 5 tokens, entries ['a', '', 'ca']
stop ['a']: '', 1 tokens, entries None
SEEN
