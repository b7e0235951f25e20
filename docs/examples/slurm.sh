#!/bin/bash
# Trains a run on several machines with Slurm, and goes on after the time limit:
#
#     sbatch slurm.sh RECIPE NAME [OUT]
#
# With OUT the recovery follows, and the model is written to that directory. Start it in a directory that all machines
# share. The first job makes the run, every later one goes on with it.
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

recipe=${1:?usage: sbatch slurm.sh RECIPE NAME [OUT]}
name=${2:?usage: sbatch slurm.sh RECIPE NAME [OUT]}
out=${3:-}

# The time limit is near: every launcher saves a checkpoint and ends. scancel's signals go to the step, not to this script.
limit=no
trap 'limit=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# Ends this script with the exit code $1. Near the time limit the job is queued again first: a command that is complete
# then ends at once.
leave() {
  if [ "$limit" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$1"
}

# Runs a command as a step, with its options of srun before it, and returns once it has ended well.
step() {
  if [ "$limit" = yes ]; then
    leave 143
  fi
  # From version 22.05 on srun has to be told of the CPUs, or each task gets one.
  srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} "$@" &
  local pid=$! code=0
  wait "$pid" || code=$?
  if [ "$limit" = yes ]; then
    # The signal ended the first wait. Bash keeps the code of a command that has ended since.
    code=0
    wait "$pid" || code=$?
  fi
  if [ "$code" -ne 0 ]; then
    leave "$code"
  fi
}

# One task a machine: each starts a process for each of its GPUs. --nnodes, --node-rank and --rdzv-endpoint come from
# Slurm.
step lighthouse pretrain "$recipe" --name "$name" --or-resume
if [ -n "$out" ]; then
  step lighthouse recover "$name" --or-done
  step --nodes=1 --ntasks=1 lighthouse strip "$name" "$out"
fi
