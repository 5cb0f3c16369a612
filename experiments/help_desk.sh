#!/usr/bin/env bash
# Runs what the help desk's table is made of, and prints it: three seeds of one model, a desk for each of twelve kinds of case. SIZE=all and
# SIZE=changing (help_desk.py) have all kinds of rules, and a second table that has a line for each.
#   JOBS=3 bash experiments/help_desk.sh DIRECTORY FOLDER_OR_GGUF [--config.FIELD=VALUE ...]
# JOBS runs share the device, or the first DEVICES GPUs. Called again, it goes on with what was cut off. PYTHON, SEEDS and SIZE may be set.
# It ends with status 1 if a run or a table failed; the others are made all the same.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { echo "usage: JOBS=3 bash experiments/help_desk.sh DIRECTORY FOLDER_OR_GGUF [--config.FIELD=VALUE ...]" >&2; exit 2; }
export DIRECTORY=$1 WEIGHTS=$2 SIZE=${SIZE:-desk} PYTHON=${PYTHON:-.venv/bin/python} XLA_PYTHON_CLIENT_PREALLOCATE=false
shift 2
SEEDS=${SEEDS:-0 1 2} failed=0

one() { # SEED [FLAG ...]
  [ -z "${DEVICES:-}" ] || export CUDA_VISIBLE_DEVICES=$((${SLOT:-0} % DEVICES))
  "$PYTHON" -m oel_jax.main --config="experiments/help_desk.py:$SIZE" --workdir="$DIRECTORY/$1" --config.seed="$1" \
    --config.policy.weights="$WEIGHTS" "${@:2}" > "$DIRECTORY/$1.log" 2>&1 || {
    echo "error: seed $1 ended with status $?: see $DIRECTORY/$1.log" >&2
    return 1
  }
}
export -f one

mkdir -p "$DIRECTORY"
printf '%s\n' $SEEDS | xargs -P "${JOBS:-1}" --process-slot-var=SLOT -I{} bash -c 'one "$@"' _ {} "$@" || failed=1
"$PYTHON" experiments/table.py "$DIRECTORY"/[0-9]*/ || failed=1
[ "$SIZE" = desk ] || { echo; "$PYTHON" experiments/table.py --categories "$DIRECTORY"/[0-9]*/; } || failed=1
exit $failed
