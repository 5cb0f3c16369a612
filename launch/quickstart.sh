#!/usr/bin/env bash
# The whole loop on this machine: makes .venv if there is none, installs the package, runs two rounds on the embedded policy.
#   bash launch/quickstart.sh [--config.FIELD=VALUE ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
environment "$VENV" ''
exec "$VENV/bin/python" -m oel_jax.main --config=experiments/frozen_lake.py:pocket --workdir=runs/quickstart "$@"
