#!/usr/bin/env bash
# optax 0.2.8: adamw inside inject_hyperparams gives NaN from the first step on where all parameters are bfloat16; one float32 array among them mends it.
#
# A guess: inject_hyperparams, which makes a schedule's learning rate readable in the state, changes nothing else: steps are those of the optimizer alone,
# or off by rounding. Seen: every hyperparameter becomes an array of the widest type among the parameters. Where all are bfloat16 the usual
# b2, 0.999, is 1, the correction of the second moment's bias is 1 - 1, and nothing is told. 0.998 is 0.996, a memory half as long, 0.99 is
# 0.988; the learning rate is off by up to 0.4%. A single float32 array in the tree (a norm's scale) makes all of them float32 and right, for the
# bfloat16 arrays, too. adamw by itself is finite on the same gradients. hyperparam_dtype=float32 mends it.
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
import optax

ways = {
  "adamw alone": optax.adamw,
  "injected": optax.inject_hyperparams(optax.adamw),
  "injected as float32": optax.inject_hyperparams(optax.adamw, hyperparam_dtype=jnp.float32),
}
trees = {"float32": ("float32",), "bfloat16": ("bfloat16",), "both": ("bfloat16", "float32")}


def first_step(way, types, b2):
  optimizer = way(learning_rate=1e-3, b2=b2, weight_decay=0.0)
  weights = [jnp.ones(4, kind) for kind in types]
  step, state = jax.jit(optimizer.update)(weights, optimizer.init(weights), weights)
  return [f"{float(found[0]):.4f}" for found in step], getattr(state, "hyperparams", None)


def tell(tree, name, b2):
  step, hyper = first_step(ways[name], trees[tree], b2)
  used = f", b2 used {float(hyper['b2']):.4f} ({hyper['b2'].dtype})" if hyper else ""
  print(f"b2 {b2}, weights {tree}, {name}: first step {' '.join(step)}{used}")


for tree in trees:
  for name in ways:
    tell(tree, name, 0.999)
for b2 in (0.998, 0.99):
  tell("bfloat16", "injected", b2)
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
b2 0.999, weights float32, adamw alone: first step -0.0010
b2 0.999, weights float32, injected: first step -0.0010, b2 used 0.9990 (float32)
b2 0.999, weights float32, injected as float32: first step -0.0010, b2 used 0.9990 (float32)
b2 0.999, weights bfloat16, adamw alone: first step -0.0010
b2 0.999, weights bfloat16, injected: first step nan, b2 used 1.0000 (bfloat16)
b2 0.999, weights bfloat16, injected as float32: first step -0.0010, b2 used 0.9990 (float32)
b2 0.999, weights both, adamw alone: first step -0.0010 -0.0010
b2 0.999, weights both, injected: first step -0.0010 -0.0010, b2 used 0.9990 (float32)
b2 0.999, weights both, injected as float32: first step -0.0010 -0.0010, b2 used 0.9990 (float32)
b2 0.998, weights bfloat16, injected: first step -0.0010, b2 used 0.9961 (bfloat16)
b2 0.99, weights bfloat16, injected: first step -0.0010, b2 used 0.9883 (bfloat16)
SEEN
