#!/usr/bin/env bash
# optax 0.2.8: global_norm, and clip_by_global_norm with it, adds up the squares of bfloat16 leaves in bfloat16, and stops after some hundreds of them.
# Seen the same on jax 0.10.2 and 0.11.2.
#
# A guess: the norm is made in float32, or is off by bfloat16's rounding, 0.4%. Seen: each leaf's sum of squares comes out in the leaf's type, and these are
# added one after the other in it. A leaf that has less than a 512th of what is there already adds nothing. So the error grows with the number of
# arrays: gradients of 64 layers with 11 arrays each (Qwen3-32B's), all of norm 1, have norm 22.6 instead of 26.5, and "clipped to 1" keep 1.17; those of
# 94 layers keep 1.42. With 28 layers all is well, and so it is with float32, or with the layers stacked in one array for a scan: what was
# tried on a small model says nothing of a deep one. It is so under jax.jit, too.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 numpy==2.2.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
import optax

clip = optax.clip_by_global_norm(1.0)


def right(tree):
  return np.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree)))


for layers in (28, 64, 94):
  random = np.random.default_rng(0)
  arrays = {f"layer {i}": [random.normal(size=(64, 64)) / 64 for _ in range(11)] for i in range(layers)}
  stacked = [np.stack([arrays[f"layer {i}"][name] for i in range(layers)]) for name in range(11)]
  for name, tree, dtype in (("apart", arrays, "bfloat16"), ("apart", arrays, "float32"), ("stacked", stacked, "bfloat16")):
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)
    norms = [float(norm(tree)) for norm in (optax.global_norm, jax.jit(optax.global_norm))]
    clipped = clip.update(tree, clip.init(tree))[0]
    print(f"{layers} layers {name}, {dtype}: norm {right(tree):.1f}, by optax {norms[0]:.1f}, jitted {norms[1]:.1f}; clipped to 1: {right(clipped):.2f}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
28 layers apart, bfloat16: norm 17.6, by optax 17.6, jitted 17.6; clipped to 1: 1.00
28 layers apart, float32: norm 17.6, by optax 17.6, jitted 17.6; clipped to 1: 1.00
28 layers stacked, bfloat16: norm 17.6, by optax 17.5, jitted 17.5; clipped to 1: 1.00
64 layers apart, bfloat16: norm 26.5, by optax 22.6, jitted 22.6; clipped to 1: 1.17
64 layers apart, float32: norm 26.5, by optax 26.5, jitted 26.5; clipped to 1: 1.00
64 layers stacked, bfloat16: norm 26.5, by optax 26.5, jitted 26.5; clipped to 1: 1.00
94 layers apart, bfloat16: norm 32.1, by optax 22.6, jitted 22.6; clipped to 1: 1.42
94 layers apart, float32: norm 32.1, by optax 32.1, jitted 32.1; clipped to 1: 1.00
94 layers stacked, bfloat16: norm 32.1, by optax 32.2, jitted 32.2; clipped to 1: 1.00
SEEN
