"""scripts/slurm.sh against stand-ins of sbatch and scontrol; scripts/slurm_proof.sh runs it on a real SLURM."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY


@pytest.fixture
def cluster(tmp_path):
    """An environment whose sbatch and scontrol note their arguments in `said`; sbatch gives the numbers 11, 12, 13."""
    (tmp_path / "bin").mkdir()
    for name, answer in [("sbatch", f"echo $((10 + $(grep -c sbatch {tmp_path}/said)))';cluster'"), ("scontrol", ":")]:
        program = tmp_path / "bin" / name
        program.write_text(f"#!/usr/bin/env bash\necho {name} \"${{@@Q}}\" >> {tmp_path}/said\n{answer}\n")
        program.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def said(tmp_path):
    return [shlex.split(line) for line in (tmp_path / "said").read_text().splitlines()]


def slurm(env, *args, code=0):
    done = subprocess.run(["bash", "scripts/slurm.sh", *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_three_jobs_that_wait_for_each_other(data, tmp_path, cluster):
    flags = ["--archs", "a/b c", "--folds", "0 1 3", "--input", data, "--output", tmp_path / "o", "--lr", "0.1"]
    done = slurm(cluster, "--partition", "gpu", *flags, "--", "--gres=gpu:1", "--comment", "two words")
    assert "11 checks" in done.stdout and "12 trains (6 runs), 13 does the rest" in done.stdout
    folds, train, rest = said(tmp_path)
    for job in (folds, train, rest):
        assert "--requeue" in job and job[job.index("--partition") + 1] == "gpu" and "--gres=gpu:1" in job
        assert job[job.index("--comment") + 1] == "two words" and job[job.index("--signal") + 1].startswith("B:USR1")
    assert train[train.index("--array") + 1] == "0-5"
    assert train[train.index("--dependency") + 1] == "afterok:11"
    assert rest[rest.index("--dependency") + 1] == "afterok:11,afterany:12"
    assert folds[folds.index("run_all.sh"):] == ["run_all.sh", "--folds-only", *map(str, flags)]
    assert rest[rest.index("run_all.sh"):] == ["run_all.sh", *map(str, flags)]
    words = train[train.index("scripts/slurm_job.sh"):]
    assert "14 checks" in slurm(cluster, *flags, "--folds-only").stdout and len(said(tmp_path)) == 4, "no training"
    assert words[1:3] == [str(tmp_path / "o"), "a/b/fold0 a/b/fold1 a/b/fold3 c/fold0 c/fold1 c/fold3"]
    assert words[4] == "train.py" and "--lr" in words


def test_what_cannot_be_submitted_is_said(data, tmp_path, cluster):
    assert "nothing/train.csv is not there" in slurm(cluster, "--input", tmp_path / "nothing", code=2).stderr
    assert "begin anew" in slurm(cluster, "--input", data, "--restart", code=2).stderr
    (tmp_path / "few").mkdir()
    for program in ("bash", "dirname", "seq"):
        (tmp_path / "few" / program).symlink_to(shutil.which(program))
    assert "no sbatch" in slurm(cluster | {"PATH": str(tmp_path / "few")}, "--input", data, code=2).stderr
    assert not (tmp_path / "said").exists()


def test_a_task_whose_time_is_up_leaves_its_checkpoint_and_queues_itself(data, tmp_path, cluster):
    runs = "test_nfnet/fold0 test_nfnet/fold1 test_efficientnet/fold0 test_efficientnet/fold1"
    task = cluster | {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    command = [sys.executable, "train.py", "--input", data, "--output", tmp_path, "--epochs", "500", *TINY]
    job = subprocess.Popen(["bash", "scripts/slurm_job.sh", tmp_path, runs, *command], cwd=ROOT, env=task)
    run = tmp_path / "test_efficientnet" / "fold1"
    while not (run / "last.pt").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=120) == 130
    assert said(tmp_path) == [["scontrol", "requeue", "17_3"]]
    log = (run / "train.log").read_text()
    assert "job 17_3 on" in log and "fold 1: " in log and log.count("interrupted") == 1
    assert (tmp_path / "times.csv").read_text().startswith("training test_efficientnet,")
    assert not list(run.glob(".begun*"))
