#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549): presence_penalty and frequency_penalty count the prompt's last 64 tokens, the chat template's end of a turn among them.
#
# A guess: they count what the answer holds so far, as vLLM does, so the first token, be it the end, is drawn as without them. Seen, on a GGUF file of a model
# that says a, b, c, d or ends with probabilities 0.4, 0.3, 0.2, 0.05 and 0.05, whatever it has read:
#   - presence_penalty 2 after the question "hello" lowers the end alone, which the template has put behind the question: an answer ends at
#     once with probability 0.007 instead of 0.05
#   - after the question "aaa" it lowers a, too, to 0.089; frequency_penalty 1 counts all three and leaves 0.034
#   - a word that lies further back is free: behind 70 other letters a is as likely as without a penalty
# So an answer is pushed off the words of its question and off its own end, and one setting samples another policy than where the answer alone is counted.
# repeat_last_n=0 switches both penalties off; no value of it leaves out the prompt and counts the answer.
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
parameters.model.path, parameters.n_ctx, parameters.n_parallel = sys.argv[1], 2048, 1
parameters.use_jinja, parameters.warmup = True, False
server = xllamacpp.Server(parameters)


def first(question, **how):
  """The probabilities from which the first token of an answer is drawn."""
  asked = {"messages": [{"role": "user", "content": question}], "seed": 1, "max_tokens": 1}
  asked |= {"logprobs": True, "top_logprobs": 5, "post_sampling_probs": True}
  asked |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | how
  body, kind = json.dumps(asked).encode(), {"Content-Type": "application/json"}
  with urllib.request.urlopen(urllib.request.Request(f"{server.listening_address}/v1/chat/completions", body, kind)) as answer:
    found = json.load(answer)["choices"][0]["logprobs"]["content"][0]["top_probs"]
  return " ".join(f"{token} {p:.3f}" for token, p in sorted((each["token"] or "end", each["prob"]) for each in found))


for question in ("hello", "aaa", "a" + "h" * 70):
  for how in ({}, {"presence_penalty": 2.0}, {"frequency_penalty": 1.0}, {"presence_penalty": 2.0, "repeat_last_n": 0}):
    print(f"SEEN {question[:5]} {how}: {first(question, **how)}")
PYTHON
"$folder/venv/bin/python" "$folder/model.py" "$folder/model.gguf"
"$folder/venv/bin/python" "$folder/ask.py" "$folder/model.gguf" > "$folder/printed" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
grep -a '^SEEN' "$folder/printed" | cut -c 6- > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
hello {}: a 0.400 b 0.300 c 0.200 d 0.050 end 0.050
hello {'presence_penalty': 2.0}: a 0.418 b 0.314 c 0.209 d 0.052 end 0.007
hello {'frequency_penalty': 1.0}: a 0.413 b 0.310 c 0.207 d 0.052 end 0.019
hello {'presence_penalty': 2.0, 'repeat_last_n': 0}: a 0.400 b 0.300 c 0.200 d 0.050 end 0.050
aaa {}: a 0.400 b 0.300 c 0.200 d 0.050 end 0.050
aaa {'presence_penalty': 2.0}: a 0.089 b 0.491 c 0.327 d 0.082 end 0.011
aaa {'frequency_penalty': 1.0}: a 0.034 b 0.510 c 0.340 d 0.085 end 0.031
aaa {'presence_penalty': 2.0, 'repeat_last_n': 0}: a 0.400 b 0.300 c 0.200 d 0.050 end 0.050
ahhhh {}: a 0.400 b 0.300 c 0.200 d 0.050 end 0.050
ahhhh {'presence_penalty': 2.0}: a 0.418 b 0.314 c 0.209 d 0.052 end 0.007
ahhhh {'frequency_penalty': 1.0}: a 0.413 b 0.310 c 0.207 d 0.052 end 0.019
ahhhh {'presence_penalty': 2.0, 'repeat_last_n': 0}: a 0.400 b 0.300 c 0.200 d 0.050 end 0.050
SEEN
