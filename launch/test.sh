#!/usr/bin/env bash
# Runs the test suite on a bare machine: makes .venv if there is none, installs what the tests need, runs them.
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
exec env JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" .venv/bin/python -m pytest "$@"
