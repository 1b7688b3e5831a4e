#!/usr/bin/env bash
# A job that slurm.sh submits: runs COMMAND, in a task of the array with the --arch and --fold of its number.
#
#   sbatch OPTIONS scripts/slurm_job.sh OUTPUT "ARCH/foldK ..." COMMAND...
#
# SIGTERM (preempted, requeued, cancelled) goes on to the command, which leaves its last checkpoint; SLURM knows what comes next.
# SIGUSR1 says that the time is nearly up: the same, and the job puts itself back into the queue, unless it has got nowhere.
set -uo pipefail
output=$1 folder=$1 runs=($2) job=$SLURM_JOB_ID name='' late=''
shift 2
if [[ ${SLURM_ARRAY_TASK_ID:-} ]]; then
    run=${runs[SLURM_ARRAY_TASK_ID]}
    arch=${run%/fold*} fold=${run##*/fold}
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID  # one task has the number of the whole array as its own
    name="training $arch" folder=$output/${arch//[\/:]/_}/fold$fold
    mkdir -p "$folder" && exec >> "$folder/train.log" 2>&1 || exit 2
    set -- "$@" --arch "$arch" --fold "$fold"
fi
echo "job $job on $(hostname), start ${SLURM_RESTART_COUNT:-0}"
begun=$(mktemp "$folder/.begun.XXXXXX") || exit 2

"$@" &
child=$!
trap 'kill -TERM $child' TERM
trap 'late=1; kill -TERM $child' USR1
while wait "$child"; code=$?; kill -0 "$child" 2> /dev/null; do :; done  # a signal ends the wait, not the child

[[ $name ]] && echo "$name,$SECONDS" >> "$output/times.csv"
done=$(find "$folder" -newer "$begun" \( -name '*.pt' -o -name '*.npy' \) -print -quit)
rm -f "$begun"
if [[ $late && $code != 0 ]]; then
    trap '' TERM
    [[ $done ]] && scontrol requeue "$job" && exit "$code"
    echo "error: the time was up before one epoch (or step) was done; give a longer one: -- --time=HH:MM:SS" >&2
fi
exit "$code"
