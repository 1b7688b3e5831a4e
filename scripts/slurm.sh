#!/usr/bin/env bash
# The whole job on a SLURM cluster: the trainings as a job array, a task a run, and all that run_all.sh does after them as a job
# that waits for the array. All machines must see the project's folder under one path, as they see a shared home.
#
#   bash scripts/slurm.sh --partition gpu -- --gres=gpu:1 --cpus-per-task=8 --time=12:00:00
#   bash scripts/slurm.sh --archs "nfnet_l0" --folds "0 1" --input input/mine --output output/mine --epochs 10 -- --gres=gpu:1
#
# Flags are those of run_all.sh; what follows -- goes to sbatch, for each of the jobs. A task that is preempted, whose machine
# fails or whose time is up goes back into the queue and on from its last finished epoch. The same command again goes on where
# all stopped; what has failed is tried once more by the last job, too.
set -uo pipefail

case " $* " in
    *" -h "*|*" --help "*) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit ;;
    *" --restart "*) echo "error: with --restart a task would begin anew each time it is queued; delete its run instead" >&2; exit 2 ;;
esac
flags=() options=()
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        --partition) options+=(--partition "${2:-}"); shift ;;
        --partition=*) options+=("$1") ;;
        *) flags+=("$1") ;;
    esac
    shift
done
options+=("${@:2}")
set --
. "$(dirname "$0")/../run_all.sh" "${flags[@]}"  # goes to its folder and sets runs, INPUT, OUTPUT, TRAIN ...
[[ $DEMO || -f $INPUT/train.csv ]] || { echo "error: $INPUT/train.csv is not there; README, 'Your own data'" >&2; exit 2; }
command -v sbatch > /dev/null || { echo "error: no sbatch on the PATH; submit from a machine of a SLURM cluster" >&2; exit 2; }
. scripts/setup.sh  # here, since the others may have no internet
mkdir -p "$OUTPUT/slurm" || exit 2

submit() {  # submit NAME SBATCH-OPTIONS -- COMMAND...: prints the job's number
    local name=$1 own=() number
    while shift; [[ $1 != -- ]]; do own+=("$1"); done
    number=$(sbatch --parsable --job-name "$name" --requeue --signal B:USR1@60 --output "$OUTPUT/slurm/$name-%j.log" \
        --open-mode append "${options[@]}" --chdir "$PWD" --kill-on-invalid-dep yes "${own[@]}" \
        scripts/slurm_job.sh "$OUTPUT" "${runs[*]}" "${@:2}") && echo "${number%%;*}"
}
begin=$(submit folds -- bash run_all.sh --folds-only "${flags[@]}") || exit
[[ -z $FOLDS_ONLY ]] || { echo "submitted: $begin checks the data and draws the folds"; exit; }
array=$(submit train --array "0-$((${#runs[@]} - 1))" --dependency "afterok:$begin" -- \
    "$PYTHON" train.py --input "$INPUT" --output "$OUTPUT" "${DEVICE[@]}" "${TRAIN[@]}") || { scancel "$begin"; exit 1; }
end=$(submit retrieve --dependency "afterok:$begin,afterany:$array" -- bash run_all.sh "${flags[@]}") || { scancel "$begin" "$array"; exit 1; }

echo "submitted: $begin checks the data and draws the folds, $array trains (${#runs[@]} runs), $end does the rest"
echo "to follow: squeue --me; $OUTPUT/<arch>/fold<k>/train.log; the result: $OUTPUT/slurm/retrieve-$end.log"
echo "to stop:   scancel $begin $array $end"
