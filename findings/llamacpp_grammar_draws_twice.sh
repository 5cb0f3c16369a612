#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549): a grammar together with top_k samples from neither the grammar's top k nor the top k's grammatical ones.
#
# A guess: the grammar takes out tokens first and the best k of the rest are drawn from, as with a mask on the logits; or the other way round. Seen, on a GGUF
# file of a model that says a, b, c, d with probabilities 0.4, 0.3, 0.2, 0.05 (or ends), under a grammar that lets it say b or d, 4,000 first tokens: a token is
# drawn without the grammar, and only if that one is refused a second one with it. Without top_k that makes no difference, and b has its 86%.
# With top_k=2 the first draw is from a and b, the second from b and d: b has 0.43 + 0.57 * 0.86 = 92%, where the first guess says 86% and the
# second 100%. `post_sampling_probs` tells of the draw that was taken: one and the same b, after one and the same prompt, has 0.43 in some answers and 0.86 in others.
# So what a constrained answer was drawn from is no single softmax: an importance weight that divides by a masked one, or by what the server reports, is off.
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
import collections
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


def share(**how):
  """How often the first letter is b, beside d, to the nearest of what the guesses and the two draws give."""
  drawn = collections.Counter()
  for seed in range(0, 4000, 4):
    drawn.update(choice["message"]["content"] for choice in ask(seed=seed, n=4, max_tokens=1, grammar='root ::= "b" | "d"', **how)["choices"])
  assert set(drawn) <= {"b", "d"}, drawn
  found = drawn["b"] / drawn.total()
  masked, first = 0.3 / 0.35, 0.3 / 0.7
  expected = {"the grammar first": masked, "top k first": 1.0, "two draws": first + (1 - first) * masked}
  name = min(expected, key=lambda name: abs(expected[name] - found))
  return f"b within 2% of {expected[name]:.3f}, {name}" if abs(found - expected[name]) < 0.02 else f"b {found}"


for how in ({}, {"top_k": 2}):
  print(f"SEEN {how}: {share(**how)}")
told = set()
for seed in range(100):
  (choice,) = ask(seed=seed, max_tokens=1, grammar='root ::= "b" | "d"', top_k=2, top_logprobs=5, post_sampling_probs=True)["choices"]
  (entry,) = choice["logprobs"]["content"]
  told.add(f"SEEN said {entry['token']}, told: " + ", ".join(f"{each['token']} {each['prob']:.2f}" for each in entry["top_probs"]))
print("\n".join(sorted(told)))
PYTHON
"$folder/venv/bin/python" "$folder/model.py" "$folder/model.gguf"
"$folder/venv/bin/python" "$folder/ask.py" "$folder/model.gguf" > "$folder/printed" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
grep -a '^SEEN' "$folder/printed" | cut -c 6- > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
{}: b within 2% of 0.857, the grammar first
{'top_k': 2}: b within 2% of 0.918, two draws
said b, told: a 0.57, b 0.43
said b, told: b 0.86, d 0.14
said d, told: b 0.86, d 0.14
SEEN
