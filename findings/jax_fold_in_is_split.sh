#!/usr/bin/env bash
# jax 0.10.2: jax.random.fold_in(key, i) IS jax.random.split(key, n)[i], bit for bit, for each i and n.
#
# A guess: split and fold_in are two ways of making independent keys, and may both be used on one key as long as nothing is drawn from it. Seen, with
# the settings as they come (threefry, partitionable): they are the same keys, also for splits of two dimensions (in row-major order), for the
# implementation "rbg", and for the keys that flax's nnx.Rngs hands out. So `init, data = split(root)` beside `fold_in(root, step)` gives the noise of step 0
# the numbers of the first weights, and that of step 1 the order of the data; and host h's share of split(root, hosts) is the key of step h.
# With jax_threefry_partitionable off, as it was before jax 0.5, and with "unsafe_rbg", they differ.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 numpy==2.2.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import jax
import numpy as np
from flax import nnx


def same(one, other):
  return np.array_equal(jax.random.key_data(one), jax.random.key_data(other))


def alike(key, many):
  return sum(same(jax.random.fold_in(key, i), jax.random.split(key, many)[i]) for i in range(many))


root = jax.random.key(7)
print("fold_in(root, i) is split(root, n)[i]:", [f"{alike(root, n)} of {n}" for n in (2, 3, 100)])
print("fold_in(root, 5) is split(root, (2, 3))[1, 2]:", same(jax.random.fold_in(root, 5), jax.random.split(root, (2, 3))[1, 2]))
first, _ = jax.random.split(root)
noise = jax.random.normal(jax.random.fold_in(root, 0), (4,))
print("weights of split(root)[0] less noise of fold_in(root, 0):", np.abs(jax.random.normal(first, (4,)) - noise).max())
rngs = nnx.Rngs(params=7)
print("nnx.Rngs(params=7), two keys, are split(key(7), 3)[:2]:", [same(rngs.params(), key) for key in jax.random.split(root, 3)[:2]])
for implementation in ("rbg", "unsafe_rbg"):
  print(f"{implementation}: {alike(jax.random.key(7, impl=implementation), 8)} of 8")
with jax.threefry_partitionable(False):
  print(f"not partitionable: {alike(root, 8)} of 8")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
fold_in(root, i) is split(root, n)[i]: ['2 of 2', '3 of 3', '100 of 100']
fold_in(root, 5) is split(root, (2, 3))[1, 2]: True
weights of split(root)[0] less noise of fold_in(root, 0): 0.0
nnx.Rngs(params=7), two keys, are split(key(7), 3)[:2]: [True, True]
rbg: 8 of 8
unsafe_rbg: 0 of 8
not partitionable: 0 of 8
SEEN
