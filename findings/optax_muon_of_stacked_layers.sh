#!/usr/bin/env bash
# optax 0.2.8: contrib.muon on layers that are stacked for a scan trains their norms' scales by Muon and their matrices by Adam, the reverse of what was meant.
#
# A guess: Muon is for hidden matrices and works on the last two axes, so the layers of a model may lie apart or be stacked in one array ([layers, in, out]) for
# a scan, as flax.linen.scan and nnx.scan do it: the steps are the same. Seen: what gets Muon goes by the number of axes alone, and it is two. A stack of matrices has three
# and gets Adam, at Muon's learning rate and without its weight decay; the stack of their scales or biases ([layers, width]) has two, so the layers'
# scales are made orthogonal to one another, and are decayed. (Embeddings get Muon in both, where its authors use Adam.) Nothing is told, and
# a small model that is written without a scan says nothing of the large one with it. muon_weight_dimension_numbers mends it: a MuonDimensionNumbers
# (reduction_axis=1, output_axis=2) for stacks of matrices, None for all else; the first axis is then one of many matrices.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 numpy==2.2.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - > "$folder/seen" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from optax import contrib

LAYERS, WIDTH = 4, 16
random = np.random.default_rng(0)
gradient = [
  {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in (("matrix", (WIDTH, WIDTH)), ("scale", (WIDTH,)))}
  for _ in range(LAYERS)
]
stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradient)


def step(gradient, weight_decay=0.0, **options):
  optimizer = contrib.muon(1.0, weight_decay=weight_decay, **options)
  weights = jax.tree.map(jnp.ones_like, gradient)
  return jax.jit(optimizer.update)(gradient, optimizer.init(weights), weights)[0]


def told(step_of, decayed_of, layer):
  for name in ("matrix", "scale"):
    found, decayed = (np.asarray(layer(tree, name), np.float64) for tree in (step_of, decayed_of))
    spread = np.abs(found).max() / np.abs(found).min()  # Adam's first step has one size throughout
    yield f"{name} by {'Adam' if spread < 1.01 else 'Muon'}, {'decayed' if np.abs(found - decayed).max() > 0.01 else 'not decayed'}"


matrices_alone = {"matrix": contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), "scale": None}
ways = {
  "layers apart": (gradient, {}, lambda tree, name: tree[0][name]),
  "layers stacked": (stacked, {}, lambda tree, name: tree[name][0]),
  "layers stacked, axes named": (stacked, {"muon_weight_dimension_numbers": matrices_alone}, lambda tree, name: tree[name][0]),
}
steps = {}
for way, (tree, options, layer) in ways.items():
  steps[way] = step(tree, **options)
  print(f"{way}: {'; '.join(told(steps[way], step(tree, 0.1, **options), layer))}")
for way in list(ways)[1:]:
  off = max(np.abs(np.asarray(steps[way][name][i] - steps["layers apart"][i][name])).max() for name in ("matrix", "scale") for i in range(LAYERS))
  print(f"{way}: the step is {'that of the layers apart' if off < 1e-4 else 'another than that of the layers apart'}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
layers apart: matrix by Muon, decayed; scale by Adam, not decayed
layers stacked: matrix by Adam, not decayed; scale by Muon, decayed
layers stacked, axes named: matrix by Muon, decayed; scale by Adam, not decayed
layers stacked: the step is another than that of the layers apart
layers stacked, axes named: the step is that of the layers apart
SEEN
