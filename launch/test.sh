#!/usr/bin/env bash
# Runs the test suite on a bare machine: makes .venv if there is none, installs what the tests need, runs them on two cores.
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh '[test]'
exec env JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
