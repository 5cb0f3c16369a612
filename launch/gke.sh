#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster, one process a host, by XPK. Assumes: xpk (pip install xpk), gcloud and Docker here, logged in; a
# cluster that `xpk cluster create` has made; a storage attached to it (`xpk storage attach`), in which --workdir and the weights lie.
#   CLUSTER=NAME PROJECT=ID ZONE=ZONE TPU_TYPE=v5litepod-16 STORAGE=NAME \
#     bash launch/gke.sh [--dry-run] --config=FILE --workdir=FOLDER [other flags of oel_jax.main]
# NUM_SLICES: 1 if it is not set. RESTARTS: of the job where a host is lost, 10; it goes on from what is saved. WORKLOAD: its name.
# IMAGE: what the working tree, without what git ignores, is put into as /app; python:3.12, where each start installs the package.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
read_arguments "$@"
needs CLUSTER PROJECT ZONE TPU_TYPE STORAGE

if [ -z "$dry_run" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  files_here | tar --null --files-from=- --create | tar --extract --directory="$folder"
else
  folder=/tmp/oel_jax
fi
printf -v flags ' %q' "${arguments[@]}"
act xpk workload create \
  --workload="${WORKLOAD:-oel-$(date +%m%d-%H%M%S)}" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --tpu-type="$TPU_TYPE" --num-slices="${NUM_SLICES:-1}" --storage="$STORAGE" --max-restarts="${RESTARTS:-10}" \
  --base-docker-image="${IMAGE:-python:3.12}" --script-dir="$folder" --command="bash launch/worker.sh$flags"
