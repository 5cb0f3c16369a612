#!/usr/bin/env bash
# Runs the test suite on a bare machine: makes .venv and .venv-hf if need be, installs what the tests need, runs them on two cores.
#   bash launch/test.sh [pytest arguments]
#   bash launch/test.sh -m gpu    those that need a GPU, in one process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

# The expression that pytest's -m has last, without what it excludes.
marks=''
arguments=("$@")
for ((i = 0; i < $#; i++)); do
  case ${arguments[i]} in
    -m) marks=${arguments[i + 1]-} ;;
    -m*) marks=${arguments[i]#-m} ;;
  esac
done
marks=${marks//not gpu/}

if [[ " $marks " =~ [^a-z_]gpu[^a-z_] ]]; then
  environment "$VENV" '[test,cuda]'
  exec "$VENV/bin/python" -m pytest "$@"
fi
environment "$VENV" '[test]'
# A second environment with one extra alone, for tests/test_installed.py: made anew, so that nothing is left of what setup.cfg no longer names.
cmp -s setup.cfg "$VENV-hf/installed[hf]" || clear_environment "$VENV-hf"
environment "$VENV-hf" '[hf]'
exec env JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" "$VENV/bin/python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
