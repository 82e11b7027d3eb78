#!/usr/bin/env bash
# Trains on several nodes under Slurm, one process a GPU:
#
#   sbatch --nodes=4 --gpus-per-node=8 experiments/launch/slurm.sh \
#     --config configs/grin_tiny.py --workdir /shared/runs/grin --set mesh.data=32
#
# .venv needs JAX for the GPUs, installed once: pip install -r requirements.txt 'jax[cuda13]'.
# Everything after the script's name goes to experiments.train. The working folder, its .venv and
# --workdir must be on a file system that all nodes share. Five minutes before the time limit the
# run is told to write a checkpoint; then the job is queued again and goes on from it.
#SBATCH --job-name=moejax
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

gpus=${SLURM_GPUS_ON_NODE:-1}
status=0
srun --ntasks-per-node="$gpus" --gpus-per-task=1 --kill-on-bad-exit=1 \
  "${VENV:-.venv}/bin/python" -m experiments.train "$@" || status=$?

# experiments.train ends with 75 when a signal stopped it before its last step.
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
else
  exit "$status"
fi
