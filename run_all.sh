#!/usr/bin/env bash
# The whole job on one machine: ten runs (2 backbones x 5 folds), extraction, retrieval. Run it again and it goes on where it
# stopped: finished runs are skipped, a half-trained one resumes. Each card of the machine takes a run at a time.
#
#   bash run_all.sh                               input/ -> output/submission.csv, the full recipe
#   bash run_all.sh --demo                        makes a demo data set first; minutes on two CPU cores
#   bash run_all.sh --archs "nfnet_l0" --folds "0 1" --epochs 10 --size 224 --input input/mine --output output/mine
#
# --archs and --folds list the runs (default all folds, of --n-folds), or --runs "nfnet_l0/fold0 tf_efficientnet_b1/fold1" does,
# one by one; --input, --output name the folders; --rounds 2 trains once more, in output/round2, with the confident test images
# of the first round; --cards "0 2" takes these cards only (default all, or CUDA_VISIBLE_DEVICES), --cards "cpu cpu" takes two
# runs at a time to the processor, each with half of its cores; --folds-only draws the demo and the folds and stops; --vote,
# --k, --top and --reject go to retrieve.py; every other flag to train.py (--allow-outside to all scripts; --workers,
# --[no-]cache, --cache-size and --deterministic also to extract.py, --workers to expect.py).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2

ARCHS="nfnet_l0 tf_efficientnet_b1.ns_jft_in1k"
FOLDS= N_FOLDS=5 RUNS=
INPUT=input
OUTPUT=output
ROUNDS=1
CARDS=
TRAIN=(--epochs 30 --eval-every 5)  # a validation embeds all images: each epoch it would be half of a GPU's time
DEVICE=()
SCRIPTS=() EXTRACT=() RETRIEVE=() EXPECT=()  # flags of all that follow the training, and of three of them
DEMO=
FOLDS_ONLY=

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' run_all.sh; exit "$1"; }
[[ " $* " == *" --demo "* ]] && {
    DEMO=1 INPUT=input/demo OUTPUT=output/demo
    ARCHS="tf_efficientnet_lite0 tf_efficientnet_lite1"
    TRAIN=(--size 96 --epochs 4 --batch-size 16 --lr 0.003 --head-lr-scale 5 --precision fp32 --eval-every 4)
}
while (($#)); do
    [[ $1 == --*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case $1 in
        --demo) ;;
        --folds-only) FOLDS_ONLY=1 ;;
        -h|--help) usage 0 ;;
        --archs|--folds|--runs|--input|--output|--rounds|--cards)
            [[ -n ${2:-} ]] || { echo "error: $1 needs a value" >&2; exit 2; }
            name=${1#--}; declare "${name^^}=$2"; shift ;;
        --n-folds) TRAIN+=("$1" "${2:-}"); N_FOLDS=${2:-}; shift ;;
        --device) DEVICE=(--device "${2:-}"); shift ;;
        --allow-outside) TRAIN+=("$1") SCRIPTS+=("$1") ;;
        --deterministic|--cache|--no-cache) TRAIN+=("$1") EXTRACT+=("$1") ;;
        --cache-size) TRAIN+=("$1" "${2:-}") EXTRACT+=("$1" "${2:-}"); shift ;;
        --workers) TRAIN+=("$1" "${2:-}") EXTRACT+=("$1" "${2:-}") EXPECT+=("$1" "${2:-}"); shift ;;
        --vote|--k|--top|--reject) RETRIEVE+=("$1" "${2:-}"); shift ;;
        --arch|--fold) echo "error: $1 is not for run_all.sh; write --archs \"A B\" or --folds \"0 1\"" >&2; exit 2 ;;
        *) TRAIN+=("$1") ;;
    esac
    shift
done
[[ $N_FOLDS =~ ^([2-9]|[1-9][0-9]+)$ ]] || { echo "error: --n-folds $N_FOLDS: give 2, 3, ..." >&2; exit 2; }
runs=($RUNS)
((${#runs[@]})) || for arch in $ARCHS; do
    for fold in ${FOLDS:-$(seq 0 $((N_FOLDS - 1)))}; do runs+=("$arch/fold$fold"); done
done
((${#runs[@]})) || { echo "error: no runs; give --archs and --folds, or --runs" >&2; exit 2; }
for run in "${runs[@]}"; do
    fold=${run##*/fold}
    [[ $run == ?*/fold* && ($fold == all || ($fold =~ ^[0-9]+$ && 10#$fold -lt $N_FOLDS)) ]] ||
        { echo "error: $run is no run: give ARCH/fold0 .. ARCH/fold$((N_FOLDS - 1)), or ARCH/foldall" >&2; exit 2; }
done
first=(--arch "${runs[0]%/fold*}" --fold "${runs[0]##*/fold}")
[[ ${BASH_SOURCE[0]} == "$0" ]] || return 0  # scripts/slurm.sh reads its flags here

if [[ -z $DEMO && ! -f $INPUT/train.csv ]]; then
    echo "error: $INPUT/train.csv is not there. Put there: train.csv (path,label), the images it names," >&2
    echo "sample_submission.csv (filename,prediction) and the images to label in $INPUT/test/; README, 'Your own data'." >&2
    echo "To see it work first, without data: bash run_all.sh --demo" >&2
    exit 2
fi
[[ $ROUNDS =~ ^[1-9][0-9]*$ ]] || { echo "error: --rounds $ROUNDS: give 1, 2, ..." >&2; exit 2; }
if ((ROUNDS > 1)) && [[ -z $DEMO && ! -f $INPUT/sample_submission.csv ]]; then
    echo "no images to label can join the training: one round is all"
    ROUNDS=1
fi
mkdir -p "$OUTPUT" || exit 2
exec 9> "$OUTPUT/.run_all.lock" || exit 2
flock -n -E 75 9
(($? != 75)) || { echo "error: another run_all.sh is at work on $OUTPUT; wait for it or stop it" >&2; exit 2; }

cards=(${CARDS//,/ })  # those that train side by side, a run at a time on each
[[ $CARDS || -z ${CUDA_VISIBLE_DEVICES-} ]] && export CUDA_DEVICE_ORDER=PCI_BUS_ID  # nvidia-smi's numbers
if [[ -z $CARDS && -z ${DEVICE[*]} ]]; then
    found=${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2> /dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')}
    cards=(${found//,/ })
    ((${#cards[@]} > 1)) || cards=()
fi
if ((${#cards[@]} > 1)); then
    workers=$(($(env -u OMP_NUM_THREADS nproc) / ${#cards[@]}))  # it obeys that variable
    threads=${OMP_NUM_THREADS:-$((workers > 1 ? workers : 1))}
    loaders=(--workers $((workers > 16 ? 16 : workers > 1 ? workers : 1)))
    TRAIN=("${loaders[@]}" "${TRAIN[@]}") EXTRACT=("${loaders[@]}" "${EXTRACT[@]}")  # what the user says comes later and counts
fi
((${#cards[@]})) && export CUDA_VISIBLE_DEVICES=${cards[0]} || cards=("")  # one card: whichever PyTorch finds
[[ -t 1 && ${#cards[@]} == 1 ]] && export PROGRESS=1

child='' show=(cat) beside=1  # of stage: its process; how its lines are shown, how many share the time, as start_run sets them
# stage NAME LOG COMMAND...: run it, copy what it prints to LOG (without progress bars), note its seconds, side by side a share
stage() {
    local name=$1 start=$SECONDS code; log=$2; shift 2
    mkdir -p "$(dirname "$log")"
    exec {pipe}> >(tee -a "$log" | "${show[@]}"); copy=$!
    "$@" >&"$pipe" 2>&1 {pipe}>&- &
    child=$!
    wait "$child"; code=$?
    child=
    finish_log
    echo "$name,$(((SECONDS - start) / beside))" >> "$out/times.csv"
    return $code
}
finish_log() { exec {pipe}>&-; wait "$copy"; sed -i 's/.*\r//' "$log"; }  # all is printed and logged; no bars in the log

free=("${cards[@]}") run_of=() card_of=()  # the trainings at work, by process id
start_run() {  # start_run ARCH FOLD LOG: start a run on a free card; waits for a card, not for the run
    until ((${#free[@]})); do await_run; done
    (
        trap stop_all TERM
        run_of=() card_of=() common=(--arch "$1" --fold "$2" --input "$INPUT" --output "$out" "${DEVICE[@]}")
        [[ ${free[0]} ]] && export CUDA_VISIBLE_DEVICES=${free[0]}
        if ((${#cards[@]} > 1)); then
            show=(sed -u "s|^|$1 fold $2: |")  # whose line it is
            export OMP_NUM_THREADS=$threads
            beside=${#cards[@]}
        fi
        stage "training $1" "$3" "$PYTHON" train.py "${common[@]}" "${pseudo[@]}" "${TRAIN[@]}" || exit
        ((beside == 1)) || stage "extraction $1" "$3" "$PYTHON" extract.py "${common[@]}" "${SCRIPTS[@]}" "${EXTRACT[@]}" ||
            true  # tried again, and judged, with all others below
    ) &
    run_of[$!]="$1 fold $2: see $3" card_of[$!]=${free[0]} free=("${free[@]:1}")
}
await_run() {  # wait until a run ends: a failure is noted, its card is free
    wait -n "${!run_of[@]}"
    for pid in "${!run_of[@]}"; do
        kill -0 "$pid" 2> /dev/null && continue
        wait "$pid" || { broken=1 failed+=("${run_of[$pid]}"); echo "FAILED: ${failed[-1]}" >&2; }
        free+=("${card_of[$pid]}")
        unset "run_of[$pid]" "card_of[$pid]"
    done
}
stop_all() {
    ((${#run_of[@]})) && kill -TERM "${!run_of[@]}" 2> /dev/null && wait "${!run_of[@]}"
    [[ $child ]] && kill -TERM "$child" 2> /dev/null && { wait "$child"; finish_log; }
    exit 130
}
trap stop_all INT TERM

start=$SECONDS out=$OUTPUT
. scripts/setup.sh
echo "set-up,$((SECONDS - start))" >> "$out/times.csv"
fits() {  # fits SCRIPT FLAGS...: a flag that the script refuses is better known now than in the middle of the night
    "$PYTHON" -c 'import importlib, sys
sys.argv[0] = sys.argv.pop(1)
importlib.import_module(sys.argv[0][:-3]).parse_args()' "$@" || exit
}
fits train.py "${first[@]}" "${TRAIN[@]}"
((${#RETRIEVE[@]} == 0)) || fits retrieve.py "${RETRIEVE[@]}"
if [[ -n $DEMO ]]; then
    stage "demo data" "$OUTPUT/make_demo.log" "$PYTHON" scripts/make_demo.py "$INPUT" --classes 20 --test-per-class 15 || exit
fi

if [[ $FOLDS_ONLY || (${#cards[@]} -gt 1 && ! -f $OUTPUT/folds.csv) ]]; then  # drawn once, as the first run would
    stage folds "$OUTPUT/folds.log" "$PYTHON" train.py --folds-only "${first[@]}" \
        --input "$INPUT" --output "$OUTPUT" "${DEVICE[@]}" "${TRAIN[@]}" || exit
    [[ $FOLDS_ONLY ]] && exit
fi

failed=() broken=
for ((round = 1; round <= ROUNDS; round++)); do
    out=$OUTPUT pseudo=()
    if ((round > 1)); then
        [[ $broken ]] && break
        [[ -f $before/confidence.csv ]] || { failed+=("round $round: no $before/confidence.csv; see $before/expect.log"); break; }
        pseudo=(--pseudo "$before/confidence.csv") out=$OUTPUT/round$round
        mkdir -p "$out" && cp "$OUTPUT/folds.csv" "$out/" || exit 2
        rm -f "$out/bad_images.csv"
        [[ ! -f $OUTPUT/bad_images.csv ]] || cp "$OUTPUT/bad_images.csv" "$out/" || exit 2
    fi
    for run in "${runs[@]}"; do
        arch=${run%/fold*}
        start_run "$arch" "${run##*/fold}" "$out/${arch//[\/:]/_}/${run##*/}/train.log"
    done
    while ((${#run_of[@]})); do await_run; done
    for script in extract.py retrieve.py scripts/expect.py scripts/report.py scripts/summary.py; do
        name=$(basename "$script" .py) flags=("${DEVICE[@]}" "${SCRIPTS[@]}")
        case $script in
            extract.py) flags+=("${EXTRACT[@]}") ;;
            retrieve.py) flags+=("${RETRIEVE[@]}") ;;
            scripts/expect.py) flags+=("${EXPECT[@]}") ;;
        esac
        stage "$name" "$out/$name.log" "$PYTHON" "$script" --input "$INPUT" --output "$out" "${flags[@]}" ||
            { failed+=("$script: see $out/$name.log"); [[ $script == scripts/* ]] || { broken=1; break; }; }
    done
    before=$out
done

if ((${#failed[@]})); then
    printf '\n%s of the steps failed; run the same command again once they are mended:\n' "${#failed[@]}" >&2
    printf '  %s\n' "${failed[@]}" >&2
    exit 1
fi
