#!/usr/bin/env bash
# The whole job on one card: ten runs (2 backbones x 5 folds), extraction, retrieval. Run it again and it goes on where it
# stopped: finished runs are skipped, a half-trained one resumes.
#
#   bash run_all.sh                               input/ -> output/submission.csv, the full recipe
#   bash run_all.sh --demo                        makes a demo data set first; minutes on two CPU cores
#   bash run_all.sh --archs "nfnet_l0" --folds "0 1" --epochs 10 --size 224 --input input/mine --output output/mine
#
# --archs and --folds list the runs; --input, --output name the folders; every other flag goes to train.py as it is.
set -uo pipefail
cd "$(dirname "$0")" || exit 2

ARCHS="nfnet_l0 tf_efficientnet_b1.ns_jft_in1k"
FOLDS="0 1 2 3 4"
INPUT=input
OUTPUT=output
TRAIN=(--epochs 30)
DEMO=

usage() { sed -n '2,10s/^# \{0,1\}//p' run_all.sh; exit "$1"; }
[[ " $* " == *" --demo "* ]] && {
    DEMO=1 INPUT=input/demo OUTPUT=output/demo
    ARCHS="tf_efficientnet_lite0 tf_efficientnet_lite1"
    TRAIN=(--size 96 --epochs 5 --batch-size 16 --head-lr-scale 5 --precision fp32 --eval-every 5)
}
while (($#)); do
    case $1 in
        --demo) ;;
        -h|--help) usage 0 ;;
        --archs|--folds|--input|--output)
            [[ -n ${2:-} ]] || { echo "error: $1 needs a value" >&2; exit 2; }
            name=${1#--}; declare "${name^^}=$2"; shift ;;
        *) TRAIN+=("$1") ;;
    esac
    shift
done

if [[ -z $DEMO && ! -f $INPUT/train.csv ]]; then
    echo "error: $INPUT/train.csv is not there. Put there: train.csv (path,label), the images it names," >&2
    echo "sample_submission.csv (filename,prediction) and the images to label in $INPUT/test/; README, 'Your own data'." >&2
    echo "To see it work first, without data: bash run_all.sh --demo" >&2
    exit 2
fi
mkdir -p "$OUTPUT" || exit 2
exec 9> "$OUTPUT/.run_all.lock"
flock -n 9 || { echo "error: another run_all.sh is at work on $OUTPUT; wait for it or stop it" >&2; exit 2; }
[[ -t 1 ]] && export PROGRESS=1

stage() {  # stage NAME LOG COMMAND...: run it, copy what it prints to LOG (without progress bars), note its seconds
    local name=$1 log=$2 start=$SECONDS code; shift 2
    mkdir -p "$(dirname "$log")"
    "$@" > >(tee >(sed -u 's/.*\r//' >> "$log")) 2>&1 &
    child=$!
    wait "$child"; code=$?
    echo "$name,$((SECONDS - start))" >> "$OUTPUT/times.csv"
    return $code
}
stop() { kill -TERM "${child:-}" 2>/dev/null && wait "$child"; exit 130; }
trap stop INT TERM

start=$SECONDS
. scripts/setup.sh
echo "set-up,$((SECONDS - start))" >> "$OUTPUT/times.csv"
if [[ -n $DEMO ]]; then
    stage "demo data" "$OUTPUT/make_demo.log" "$PYTHON" scripts/make_demo.py "$INPUT" || exit
fi

failed=()
for arch in $ARCHS; do
    for fold in $FOLDS; do
        log=$OUTPUT/${arch//[\/:]/_}/fold$fold/train.log
        stage "training $arch" "$log" "$PYTHON" train.py --arch "$arch" --fold "$fold" --input "$INPUT" --output "$OUTPUT" \
            "${TRAIN[@]}" || { failed+=("$arch fold $fold: see $log"); echo "FAILED: ${failed[-1]}" >&2; }
    done
done
stage extraction "$OUTPUT/extract.log" "$PYTHON" extract.py --input "$INPUT" --output "$OUTPUT" &&
    stage retrieval "$OUTPUT/retrieve.log" "$PYTHON" retrieve.py --input "$INPUT" --output "$OUTPUT" &&
    stage summary "$OUTPUT/summary.log" "$PYTHON" scripts/summary.py --input "$INPUT" --output "$OUTPUT" ||
    failed+=("extraction or retrieval: see above")

if ((${#failed[@]})); then
    printf '\n%s of the steps failed; run the same command again once they are mended:\n' "${#failed[@]}" >&2
    printf '  %s\n' "${failed[@]}" >&2
    exit 1
fi
