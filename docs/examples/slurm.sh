#!/bin/bash
# Trains a run on several machines with Slurm, and goes on after the time limit:
#
#     sbatch slurm.sh RECIPE NAME
#
# Start it in a directory that all machines share. The first job makes the run, every later one goes on with it.
#SBATCH --job-name=lighthouse
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# To this script alone, ten minutes before the time limit. Give a large checkpoint more.
#SBATCH --signal=B:USR1@600
set -euo pipefail

recipe=${1:?usage: sbatch slurm.sh RECIPE NAME}
name=${2:?usage: sbatch slurm.sh RECIPE NAME}

# The time limit is near: every launcher saves a checkpoint and ends. scancel's signals go to the step, not to this script.
limit=no
trap 'limit=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# One task a machine: each starts a process for each of its GPUs. --nnodes, --node-rank and --rdzv-endpoint come from
# Slurm. From version 22.05 on srun has to be told of the CPUs, or each task gets one.
srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
  lighthouse pretrain "$recipe" --name "$name" --or-resume &
step=$!
code=0
wait "$step" || code=$?
if [ "$limit" = yes ]; then
  # The signal ended the first wait.
  code=0
  wait "$step" || code=$?
  # 0: the run was complete before the signal came.
  if [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
