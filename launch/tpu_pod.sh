#!/usr/bin/env bash
# A run on all workers of a Cloud TPU slice, one process each, by gcloud's ssh. Assumes: the slice is there (gcloud compute tpus tpu-vm
# create); gcloud is logged in and may ssh to its workers; they have a network; --workdir and the weights are under one path that all
# workers see (Filestore, or a bucket that gcsfuse mounts), for gs:// is refused.
#   TPU_NAME=NAME ZONE=ZONE bash launch/tpu_pod.sh [--dry-run] --config=FILE --workdir=FOLDER [other flags of oel_jax.main]
# PROJECT: if it is not gcloud's own. The working tree, without what git ignores, is copied to ~/oel_jax of each worker: relative paths
# count from there. The run ends with the connection (start it in tmux); the same command goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
read_arguments "$@"
needs TPU_NAME ZONE

where=("--zone=$ZONE" --worker=all)
if [ -n "${PROJECT-}" ]; then where+=("--project=$PROJECT"); fi
if [ -z "$dry_run" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  files_here | tar --null --files-from=- --create --gzip --file="$folder/oel_jax.tar.gz"
else
  folder=/tmp
fi
printf -v flags ' %q' "${arguments[@]}"
act gcloud compute tpus tpu-vm scp "$folder/oel_jax.tar.gz" "$TPU_NAME:oel_jax.tar.gz" "${where[@]}"
act gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --command="mkdir -p oel_jax && tar -xzf oel_jax.tar.gz -C oel_jax && bash oel_jax/launch/worker.sh$flags"
