#!/usr/bin/env bash
# A Cloud TPU slice by gcloud alone: makes it, installs jaxft on every host, trains, and takes it down again.
#
#   NAME=jaxft ZONE=us-east5-a TYPE=v5litepod-16 MODEL=/mnt/base TRAIN=/mnt/train.jsonl RUN=/mnt/run \
#       SOURCE=git+https://github.com/OWNER/jaxft experiments/pods/gcloud.sh
#
# RUN, MODEL and TRAIN stand on a file system that every host mounts (Filestore, or a bucket through gcsfuse):
# RUN and TRAIN may be gs:// instead. MOUNT is the command that mounts it. DRY_RUN=1 prints what would run.
set -euo pipefail
: "${NAME:=jaxft}" "${ZONE:=us-east5-a}" "${TYPE:=v5litepod-16}" "${VERSION:=v2-alpha-tpuv5-lite}" "${MOUNT:=true}"
run() { if [[ "${DRY_RUN:-}" == 1 ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }
everywhere() {
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}
training="$(DRY_RUN=1 EXTRA="--distributed ${EXTRA:-}" bash "$(dirname "$0")/train.sh")"
run gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION" ${SPOT:+--spot}
everywhere "$MOUNT && python3 -m venv ~/env && ~/env/bin/pip install --quiet 'jaxft[tpu] @ $SOURCE'"
everywhere "PATH=~/env/bin:\$PATH $training"
run gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet
