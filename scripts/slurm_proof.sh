#!/usr/bin/env bash
# Shows on one machine that slurm.sh does what run_all.sh does: starts a SLURM of its own (munged, slurmctld, slurmd; no root
# needed), submits a tiny demo, requeues one training midway as a preemption does, lets the time of another run out, and compares
# all that comes out with a local run, byte for byte. A few minutes; the machine's own SLURM, if it has one, is left alone.
#
#   sudo apt-get install slurmctld slurmd slurm-client munge && bash scripts/slurm_proof.sh
#   bash scripts/slurm_proof.sh FOLDER       keeps data, results and SLURM's logs there
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin
for program in munged slurmctld slurmd sbatch; do
    command -v $program > /dev/null || { echo "error: no $program; apt-get install slurmctld slurmd slurm-client munge" >&2; exit 2; }
done
keep=${1:-} folder=${1:-$(mktemp -d)}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd)
set --  # a sourced file would take them for its own
. scripts/setup.sh
export SLURM_CONF=$folder/slurm.conf OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
stop() {
    code=$?
    set +e
    scancel --user "$(id -un)" 2> /dev/null; sleep 2
    kill $(jobs -p) 2> /dev/null; wait
    [[ $keep ]] || rm -rf "$folder"
    exit $code
}
trap stop EXIT
trap 'exit 130' INT TERM

# ------------------------------------------------------------------------------------------------- a SLURM of one machine
mkdir -p "$folder"/{state,spool}
dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
chmod 400 "$folder/munge.key"
port=$((20000 + RANDOM % 20000)) host=$(hostname -s) user=$(id -un)
cat > "$SLURM_CONF" <<EOF
ClusterName=proof
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
NodeName=$host NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" 2> /dev/null &
sleep 1
slurmctld -D &> "$folder/slurmctld.log" &
slurmd -D &> "$folder/slurmd.log" &
for _ in {1..30}; do sinfo --noheader 2> /dev/null | grep -q idle && break; sleep 1; done
sinfo --noheader | grep -q idle || { echo "error: SLURM did not start; see $folder/slurm*.log" >&2; exit 1; }

# --------------------------------------------------------------------------------------------- the same, here and by SLURM
"$PYTHON" scripts/make_demo.py "$folder/input" --classes 4 --train-per-class 8 --test-per-class 4 --size 64
flags=(--input "$folder/input" --archs "test_efficientnet test_nfnet" --folds "0 1" --fold-by look --size 32 --batch-size 8
    --weights none --workers 1 --precision fp32 --epochs 40 --eval-every 10 --device cpu)
log=$folder/submit.log
bash scripts/slurm.sh "${flags[@]}" --output "$folder/slurm" -- --cpus-per-task=1 --time=60 | tee "$log"
array=$(sed -n 's/.*folds, \([0-9]*\) trains.*/\1/p' "$log") last=$(sed -n 's/.*runs), \([0-9]*\) does.*/\1/p' "$log")

queued() { squeue --noheader --jobs "$1" 2> /dev/null | grep -q .; }
midway() {  # wait until a run has finished its first epoch
    until [[ -f $folder/slurm/$1/last.pt ]]; do
        queued "$last" || { echo "FAILED: the jobs ended early; see $folder/slurm/slurm" >&2; exit 1; }
        sleep 0.2
    done
}
midway test_efficientnet/fold1
echo "requeueing a task, as a preemption does"
scontrol requeue "${array}_1"
midway test_nfnet/fold1  # the array's last task: its number is that of the whole array, too
echo "telling another that its time is nearly up"
scancel --batch --signal=USR1 "${array}_3"
bash run_all.sh "${flags[@]}" --output "$folder/local" > "$folder/local.log" 2>&1
while queued "$last"; do sleep 2; done

# -------------------------------------------------------------------------------------------------------------- the proof
cat "$folder/slurm/slurm/retrieve-$last.log"
for run in test_efficientnet/fold1 test_nfnet/fold1; do
    for said in "interrupted; the same" "start 1" "resuming after epoch"; do
        grep -q "$said" "$folder/slurm/$run/train.log" || { echo "FAILED: $run was not interrupted and resumed: no '$said'"; exit 1; }
    done
done
equal=0
for file in folds.csv submission.csv confidence.csv neighbours.npz scores.json $(cd "$folder/local" && echo */fold*/{best.pt,train.npy,test.npy}); do
    cmp "$folder/local/$file" "$folder/slurm/$file" || exit 1
    equal=$((equal + 1))
done
echo "passed: two of four trainings were interrupted and went on; $equal files are equal to the local run's, byte for byte"
