#!/usr/bin/env bash
# A run on all NVIDIA GPUs of this machine, in one process. Assumes: a driver for CUDA 13, GPUs that nobody else uses, a network the first time.
#   bash launch/gpu.sh [--dry-run] --config=FILE --workdir=FOLDER [other flags of oel_jax.main]
# Several machines without a scheduler: on each the same command, with its own number at the end. Assumes besides: the same code and weights
# on all, one FOLDER that all see, and that they reach the first one's port.
#   bash launch/gpu.sh --config=FILE --workdir=FOLDER --coordinator_address=FIRST:8476 --num_processes=2 --process_id=0
# XLA_PYTHON_CLIENT_MEM_FRACTION: the share of a GPU that JAX takes; .95 if it is not set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
read_arguments "$@"

if [ -z "$dry_run" ]; then
  nvidia-smi --list-gpus >/dev/null 2>&1 || stop "nvidia-smi finds no GPU: this launcher is for NVIDIA's; launch/quickstart.sh runs on a CPU"
fi
act environment "$VENV" '[hf,cuda]'
act exec env XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.95}" "$VENV/bin/python" -m oel_jax.main "${arguments[@]}"
