#!/usr/bin/env bash
# What every process runs, whatever launched it: the one command. MODEL, TRAIN, RUN and MESH come from the launcher.
#
#   MODEL  the base's folder       TRAIN  a JSONL file       RUN  the run's folder, on a file system that all see
#   MESH   e.g. "--config.mesh.data=1 --config.mesh.fsdp=-1"
#   RECIPE (configs/sft.py:lora)   EXTRA  further flags      DRY_RUN=1 prints the command instead of running it
set -euo pipefail
command=(jaxft train --config "${RECIPE:-configs/sft.py:lora}" --workdir "$RUN"
  --config.model="$MODEL" --config.data.train="$TRAIN"
  --config.dtype=bfloat16 --config.param_dtype=bfloat16 --config.remat=full
  ${MESH:---config.mesh.data=1 --config.mesh.fsdp=-1} ${EXTRA:-})
if [[ "${DRY_RUN:-}" == 1 ]]; then
  printf '%q ' "${command[@]}"; echo
else
  exec "${command[@]}"
fi
