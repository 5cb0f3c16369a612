#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549): n answers of seed s + 1 are those of seed s without the first, and one new one.
#
# A guess: `seed` names a draw of all n answers, so four answers of seed 1 and four of seed 2 are eight. Seen, on a GGUF file of a random model whose next token
# does not depend on what came before: answer i of a request has the seed s + i. Three requests for four answers with seeds 1, 2 and 3 have six
# different answers among twelve; with seeds 10, 20 and 30 they have twelve. The second answer of seed 1 is, letter by letter, the one answer of seed 2.
# So an evaluation that asks for n answers to a question under seeds 1, 2, 3 counts most answers more than once and tells too small a spread, and rollouts of
# step t that are seeded by t are for the most part those of step t - 1 while the policy has hardly moved.
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


def answers(seed, n):
  asked = {"messages": [{"role": "user", "content": "hello"}], "seed": seed, "n": n, "max_tokens": 40}
  body, kind = json.dumps(asked | {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}).encode(), {"Content-Type": "application/json"}
  with urllib.request.urlopen(urllib.request.Request(f"{server.listening_address}/v1/chat/completions", body, kind)) as answer:
    return [choice["message"]["content"] for choice in sorted(json.load(answer)["choices"], key=lambda choice: choice["index"])]


found = {seed: answers(seed, 4) for seed in (101, 102, 103, 110, 120, 130)}
for seeds in ((101, 102, 103), (110, 120, 130)):
  print(f"SEEN seeds {seeds}, 4 answers each: {len({text for seed in seeds for text in found[seed]})} different ones of 12")
print("SEEN answers 2 to 4 of seed 101 are 1 to 3 of seed 102:", found[101][1:] == found[102][:3])
print("SEEN one answer each of seeds 101 to 104 are the four of seed 101:", [answers(101 + i, 1)[0] for i in range(4)] == found[101])
PYTHON
"$folder/venv/bin/python" "$folder/model.py" "$folder/model.gguf"
"$folder/venv/bin/python" "$folder/ask.py" "$folder/model.gguf" > "$folder/printed" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
grep -a '^SEEN' "$folder/printed" | cut -c 6- > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
seeds (101, 102, 103), 4 answers each: 6 different ones of 12
seeds (110, 120, 130), 4 answers each: 12 different ones of 12
answers 2 to 4 of seed 101 are 1 to 3 of seed 102: True
one answer each of seeds 101 to 104 are the four of seed 101: True
SEEN
