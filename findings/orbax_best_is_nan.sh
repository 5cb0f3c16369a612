#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: a metric that is NaN is the best one while it is the latest, and the checkpoints that were better than all others may be deleted for it.
#
# A guess: with `best_fn` and `max_to_keep` a NaN ranks below every number, or saving with it is refused. Seen: the checkpoints are sorted by Python's `sorted`,
# in which a NaN stays where it stands and lets nothing pass it. So a run whose last evaluation was NaN, most often one that has just diverged, has that
# checkpoint for its best, and with max_to_keep=1 it alone is left; after a NaN in the middle, what came before it counts as worse than what came
# after: 0.9 is deleted, 0.3 and 0.4 stay. It is so for "max" and for "min", and for preservation_policy=BestN. Nothing is said. With a NaN that
# `best_fn` replaces (-inf for "max", inf for "min") all is as one would think.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.2.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - "$folder" > "$folder/seen" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import itertools
import math
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import BestN

NAN = float("nan")
folders = (f"{sys.argv[1]}/run_{i}" for i in itertools.count())


def left_of(metrics, **options):
  with ocp.CheckpointManager(next(folders), options=ocp.CheckpointManagerOptions(**options)) as manager:
    for step, metric in enumerate(metrics):
      manager.save(step, args=ocp.args.StandardSave({"weight": jnp.ones(2)}), metrics={"metric": metric})
      manager.wait_until_finished()
    return f"left {[metrics[step] for step in manager.all_steps()]}, best {metrics[manager.best_step()]}"


def metric_of(metrics):
  return metrics["metric"]


def number_of(metrics):
  return -math.inf if math.isnan(metrics["metric"]) else metrics["metric"]


for keep, metrics in ((1, [0.5, 0.9, 0.3, NAN]), (2, [0.5, 0.9, 0.3, NAN]), (2, [0.5, 0.9, NAN, 0.3, 0.4]), (2, [0.5, 0.9, 0.3, 0.4])):
  print(f"max, keep {keep} of {metrics}:", left_of(metrics, best_fn=metric_of, best_mode="max", max_to_keep=keep))
for keep, metrics in ((1, [2.0, 1.1, 1.4, NAN]), (2, [1.4, 1.1, NAN, 2.0, 1.9]), (2, [1.4, 1.1, 2.0, 1.9])):
  print(f"min, keep {keep} of {metrics}:", left_of(metrics, best_fn=metric_of, best_mode="min", max_to_keep=keep))
metrics = [0.5, 0.9, NAN, 0.3, 0.4]
print(f"BestN(2) of {metrics}:", left_of(metrics, best_fn=metric_of, preservation_policy=BestN(get_metric_fn=metric_of, n=2)))
print(f"max, keep 2 of {metrics}, NaN as -inf:", left_of(metrics, best_fn=number_of, best_mode="max", max_to_keep=2))
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
max, keep 1 of [0.5, 0.9, 0.3, nan]: left [nan], best nan
max, keep 2 of [0.5, 0.9, 0.3, nan]: left [0.9, nan], best nan
max, keep 2 of [0.5, 0.9, nan, 0.3, 0.4]: left [0.3, 0.4], best 0.4
max, keep 2 of [0.5, 0.9, 0.3, 0.4]: left [0.5, 0.9], best 0.9
min, keep 1 of [2.0, 1.1, 1.4, nan]: left [nan], best nan
min, keep 2 of [1.4, 1.1, nan, 2.0, 1.9]: left [2.0, 1.9], best 1.9
min, keep 2 of [1.4, 1.1, 2.0, 1.9]: left [1.4, 1.1], best 1.1
BestN(2) of [0.5, 0.9, nan, 0.3, 0.4]: left [0.3, 0.4], best 0.4
max, keep 2 of [0.5, 0.9, nan, 0.3, 0.4], NaN as -inf: left [0.5, 0.9], best 0.9
SEEN
