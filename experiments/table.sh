#!/usr/bin/env bash
# Runs what the README's tables are made of, and prints them: the loop, its controls and the 4 × 4 board, three seeds each.
#   JOBS=8 bash experiments/table.sh DIRECTORY [--config.FIELD=VALUE ...]
# JOBS runs share the device, or the first DEVICES GPUs. Called again, it goes on with what was cut off. PYTHON, SEEDS and CONTROLS may be set.
# It ends with status 1 if a run or a table failed; the others are made all the same.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 1 ] || { echo "usage: JOBS=8 bash experiments/table.sh DIRECTORY [--config.FIELD=VALUE ...]" >&2; exit 2; }
export DIRECTORY=$1 PYTHON=${PYTHON:-.venv/bin/python} XLA_PYTHON_CLIENT_PREALLOCATE=false
shift
SEEDS=${SEEDS:-0 1 2} failed=0
CONTROLS=${CONTROLS:-own swapped empty trajectories student-forward_kl teacher-reverse_kl teacher-forward_kl teacher-imitation topk}

one() { # NAME CONFIG SEED [FLAG ...]
  mkdir -p "$DIRECTORY/$1"
  [ -z "${DEVICES:-}" ] || export CUDA_VISIBLE_DEVICES=$((${SLOT:-0} % DEVICES))
  "$PYTHON" -m oel_jax.main --config="experiments/$2" --workdir="$DIRECTORY/$1/$3" --config.seed="$3" "${@:4}" > "$DIRECTORY/$1/$3.log" 2>&1 || {
    echo "error: $1, seed $3, ended with status $?: see $DIRECTORY/$1/$3.log" >&2
    return 1
  }
}
export -f one

jobs=()
for seed in $SEEDS; do jobs+=("loop frozen_lake.py:pocket-table $seed"); done
for seed in $SEEDS; do
  for control in $CONTROLS; do jobs+=("$control controls.py:$control $seed"); done
  jobs+=("4x4 frozen_lake.py:pocket-4x4 $seed")
done
# The first goes ahead until its base is evaluated: what it compiled by then lies in the cache for the others.
one ${jobs[0]} "$@" &
first=$!
until [ -e "$DIRECTORY/loop/${SEEDS%% *}/round_0/evaluation.json" ] || ! kill -0 $first 2>/dev/null; do sleep 1; done
printf '%s\n' "${jobs[@]:1}" | xargs -P "${JOBS:-1}" --process-slot-var=SLOT -I{} bash -c 'one $1 "${@:2}"' _ {} "$@" || failed=1
wait $first || failed=1

for name in loop 4x4; do
  printf '\n%s\n\n' "$name"
  "$PYTHON" experiments/table.py "$DIRECTORY/$name"/[0-9]*/ || failed=1
done
printf '\ncontrols, after round 1\n\n'
controls=()
for control in $CONTROLS; do controls+=("$DIRECTORY/$control"); done
"$PYTHON" experiments/table.py --controls "${controls[@]}" || failed=1
exit $failed
