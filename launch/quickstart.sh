#!/usr/bin/env bash
# The whole loop on this machine: makes .venv if there is none, installs the package, runs two rounds on the embedded policy.
#   bash launch/quickstart.sh [--config.FIELD=VALUE ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
environment "$VENV" ''
# XLA takes memory for each program that runs and gives it back: in large pages, which glibc then asks Linux for, that costs little. Elsewhere nobody reads this.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1"
exec "$VENV/bin/python" -m oel_jax.main --config=experiments/frozen_lake.py:pocket --workdir=runs/quickstart "$@"
