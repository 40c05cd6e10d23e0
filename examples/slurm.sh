#!/bin/bash
# sbatch examples/slurm.sh: one job that Slurm may stop and start again as often as it likes, until the run has ended.
#SBATCH --job-name=prime-fast
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

# 300 seconds before the limit Slurm sends USR1 to this script; a preemption sends TERM, at the start of its GraceTime.
# The run gets 270 of them (log.grace) to save what it has. torchrun has to hand USR1 on, and to be patient: one that
# does not know the variable kills its ranks after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1

leave() {
    again=$1
    kill -USR1 "$run" # srun hands it on to torchrun, and torchrun to every rank
}
trap 'leave requeue' USR1
trap 'leave' TERM # Slurm requeues by itself what it preempts

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-backend c10d \
    --rdzv-endpoint "$(hostname):29500" --rdzv-id "$SLURM_JOB_ID" \
    -m prime_fast train configs/eurus2-7b-8xa100.yaml log.grace=270 --resume &
run=$!
while kill -0 "$run" 2>/dev/null; do
    wait "$run" # which a signal ends, too
done
wait "$run"
code=$?
if [ "$again" = requeue ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
