#!/usr/bin/env bash
# jax 0.10.2: jax.random.categorical of bfloat16 (or float16) logits draws from another distribution than their softmax.
# Seen the same with jax 0.11.2, but for mode="high", which is nearly right there.
#
# A guess: a narrow type rounds the logits, by 0.4% of each at most, and the draws follow the softmax of what is left, as they do for float32.
# Seen, with a vocabulary of 4,096 whose shares fall as words' do, and 20,000 draws: the Gumbel noise is made in the logits' type, too, from a uniform
# number that has 128 values in bfloat16. Its largest value comes once in 128 numbers, and is no larger than 4.9. So
#   - bfloat16: the likeliest ten ids, 53% of the mass, are 83% of the draws; none of the ids past the 200th is drawn, which hold 17%
#   - equal logits: the first hundred of the 4,096 ids are 55% of the draws, for among equals the first one is taken
#   - mode="high" does not mend it but errs the other way: 44% for the ten, 29% past the 200th
#   - float16: 68% and 1%; float32: right
# So a model sampled from bfloat16 logits, which is what a model in bfloat16 returns, is far surer than it is, and its samples are not on its policy.
# Logits have to be float32 before the draw.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.2.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY, DRAWS = 4096, 20000
zipf = -1.2 * jnp.log(jnp.arange(1, VOCABULARY + 1.0))
equal = jnp.zeros(VOCABULARY)


def drawn(logits, mode):
  draw = jax.jit(lambda key: jax.random.categorical(key, logits, shape=(1000,), mode=mode))
  ids = np.concatenate([np.asarray(draw(key)) for key in jax.random.split(jax.random.key(0), DRAWS // 1000)])
  return np.bincount(ids, minlength=VOCABULARY) / DRAWS


for dtype, mode in (("float32", None), ("float16", None), ("bfloat16", None), ("bfloat16", "high")):
  logits = zipf.astype(dtype)
  right = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)), np.float64)
  found = drawn(logits, mode)
  for name, some in (("first 10", slice(0, 10)), ("past 200", slice(200, None))):
    print(f"{dtype} mode={mode} falling, {name}: softmax {right[some].sum():.2f} drawn {found[some].sum():.2f}")
  print(f"{dtype} mode={mode} falling, largest id drawn: {np.flatnonzero(found).max()}")
  first = drawn(equal.astype(dtype), mode)[:100].sum()
  print(f"{dtype} mode={mode} equal, first 100: softmax {100 / VOCABULARY:.2f} drawn {first:.2f}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
float32 mode=None falling, first 10: softmax 0.53 drawn 0.53
float32 mode=None falling, past 200: softmax 0.17 drawn 0.16
float32 mode=None falling, largest id drawn: 4093
float32 mode=None equal, first 100: softmax 0.02 drawn 0.02
float16 mode=None falling, first 10: softmax 0.53 drawn 0.68
float16 mode=None falling, past 200: softmax 0.17 drawn 0.01
float16 mode=None falling, largest id drawn: 492
float16 mode=None equal, first 100: softmax 0.02 drawn 0.09
bfloat16 mode=None falling, first 10: softmax 0.53 drawn 0.83
bfloat16 mode=None falling, past 200: softmax 0.17 drawn 0.00
bfloat16 mode=None falling, largest id drawn: 110
bfloat16 mode=None equal, first 100: softmax 0.02 drawn 0.55
bfloat16 mode=high falling, first 10: softmax 0.53 drawn 0.44
bfloat16 mode=high falling, past 200: softmax 0.17 drawn 0.29
bfloat16 mode=high falling, largest id drawn: 4095
bfloat16 mode=high equal, first 100: softmax 0.02 drawn 0.03
SEEN
