#!/usr/bin/env bash
# What tpu_pod.sh and gke.sh have each worker of a TPU slice run: one process of the run. Makes .venv if there is none. A worker without
# Python 3.11 to 3.13 (TPU VMs have 3.10) gets 3.12 by uv; for that it needs pip.
#   bash launch/worker.sh [--dry-run] --config=FILE --workdir=FOLDER [other flags of oel_jax.main]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
read_arguments "$@"

PYTHON=${PYTHON:-python3}
if [ -z "$dry_run" ] && [ ! -x "$VENV/bin/python" ] && ! "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
  "$PYTHON" -m pip install --quiet --user uv
  "$PYTHON" -m uv python install --quiet 3.12
  PYTHON=$("$PYTHON" -m uv python find 3.12)
fi
act environment "$VENV" '[hf,tpu]'
act exec "$VENV/bin/python" -m oel_jax.main --distributed "${arguments[@]}"
