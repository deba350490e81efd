#!/usr/bin/env bash
# GKE by XPK: a cluster of TPU slices, and a workload on it that is started again where it is preempted.
#
#   CLUSTER=jaxft PROJECT=my-project ZONE=us-east5-a TYPE=v5litepod-256 IMAGE=REGION-docker.pkg.dev/my-project/jaxft/jaxft \
#       MODEL=/mnt/base TRAIN=/mnt/train.jsonl RUN=/mnt/run experiments/pods/xpk.sh
#
# IMAGE holds jaxft and its extra `tpu` (experiments/pods/Dockerfile). /mnt is a storage attached to the cluster
# (`xpk storage attach`), which every host sees. DRY_RUN=1 prints what would run.
set -euo pipefail
: "${CLUSTER:=jaxft}" "${PROJECT:=my-project}" "${ZONE:=us-east5-a}" "${TYPE:=v5litepod-256}" "${IMAGE:=jaxft}"
run() { if [[ "${DRY_RUN:-}" == 1 ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }
where=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
training="$(DRY_RUN=1 EXTRA="--distributed ${EXTRA:-}" bash "$(dirname "$0")/train.sh")"
run xpk cluster create "${where[@]}" --tpu-type="$TYPE" --num-slices=1 ${SPOT:+--spot}
run xpk workload create "${where[@]}" --tpu-type="$TYPE" --num-slices=1 --workload=jaxft-train \
  --docker-image="$IMAGE" --max-restarts=10 --command="$training"
