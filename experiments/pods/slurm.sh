#!/usr/bin/env bash
#SBATCH --job-name=jaxft
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
#
# GPUs under Slurm: MODEL=... TRAIN=... RUN=... sbatch experiments/pods/slurm.sh
# JAX finds the processes by Slurm's own variables; a requeued job goes on from the last checkpoint.
# DRY_RUN=1 experiments/pods/slurm.sh prints what would run.
set -euo pipefail
here="${SLURM_SUBMIT_DIR:-.}/experiments/pods"
[[ -d "$here" ]] || here="$(dirname "$0")"
launch=(srun --kill-on-bad-exit=1 --wait=60 bash "$here/train.sh")
if [[ "${DRY_RUN:-}" == 1 ]]; then
  echo "${launch[*]}"
  bash "$here/train.sh"
else
  exec "${launch[@]}"
fi
