#!/bin/bash
# A training on several machines, as a job of Slurm's; what follows the script's name goes to the command:
#
#     sbatch --nodes 4 --gpus-per-node 8 examples/slurm.sh --preset paper --amp bf16
#
# The job's folder has to be one that all machines see. Before its time is over, or when it is preempted, the training is
# saved and the job goes back into the queue; it then goes on where it was. RUN=folder names the run, PYTHON=… an interpreter.
#
#SBATCH --job-name=immunity
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@180
# (One task a machine: torchrun, which starts a process for each GPU. USR1 comes 180 seconds before the end, to this shell.)

set -euo pipefail

# The job's number stays the same when it is queued again.
run=${RUN:-runs/${SLURM_JOB_NAME}-${SLURM_JOB_ID}}
where=(--out "$run")
if [[ -f $run/config.json ]]; then
    where=(--resume "$run")
fi

# The first machine's torchrun is where all processes meet.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export PYTHON=${PYTHON:-python}
export PROCESSES=${PROCESSES:-gpu} # a machine; or a number
# Cores for each process' own threads, and seconds that torchrun gives its processes to save (PyTorch 2.14; before: 30).
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150

again() {
    trap '' USR1 TERM
    echo "$(date): the training is saved, and the job goes back into the queue"
    kill -TERM "$task" 2>/dev/null || true # srun passes it on to each torchrun, which passes it on to its processes
    wait "$task" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap again USR1 TERM

# SLURM_NODEID is each machine's own: it is not for this shell.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --wait=0 bash -c '
    exec "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --nproc-per-node "$PROCESSES" \
        -m immunity_fast.train "$@"
' train "${where[@]}" "$@" &
task=$!

status=0
wait "$task" || status=$?
exit "$status"
