"""Nothing is lost and nobody gets in: each fault that scripts/torture.py found, and a short campaign."""

import os
import shutil
import signal
import subprocess
import sys
import time

from utils import InputError, Store, load_checkpoint, load_json, load_npy, new_npy, run, save_checkpoint, save_json

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, make_data, same, script, train

from dataset import (
    Images,
    bad_images,
    check_images,
    encode,
    load_folds,
    read_image,
    read_pseudo,
    read_test,
    read_train,
)
from extract import embed_model, is_finished
from models import Model, load_weights
from search import topk
from train import load_last


def flip(path, place, bit=0):
    """Flip one bit of a file; a negative place counts from the end."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_a_short_campaign(tmp_path):
    """Two kills, a Ctrl-C, a SIGTERM and sixty mutated inputs, each in a process of its own."""
    flags = ["--parts", "kills", "signals", "input", "--folds", 1, "--kills", 2, "--signals", 2, "--inputs", 60]
    done = subprocess.run([sys.executable, "scripts/torture.py", *map(str, flags), "--work", tmp_path], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| input | all | 60 | 60 |" in done.stdout and "FAULT" not in done.stderr


# ------------------------------------------------------------------------------------------------------------- bad disks


def test_a_flipped_bit_in_embeddings_is_found_and_mended(data, finished):
    file = finished / "test_nfnet" / "fold1" / "test.npy"
    before = file.read_bytes()
    flip(file, -700)
    flags = ["--input", data, "--output", finished]
    refused = script("retrieve.py", *flags, code=2)
    assert "test_nfnet/fold1/test.npy is not what extract.py wrote" in refused.stderr and "extract.py again" in refused.stderr
    assert script("extract.py", *flags, "--workers", 1, "--precision", "fp32").stdout.count("up to date") == 1
    assert file.read_bytes() == before


def test_a_flipped_bit_in_a_checkpoint_is_refused_and_a_lost_best_is_trained_again(data, finished):
    run = finished / "test_efficientnet" / "fold0"
    before = load_checkpoint(run / "best.pt")["model"]
    flip(run / "best.pt", (run / "best.pt").stat().st_size // 2)
    (finished / "test_nfnet/fold1/extract.json").unlink()
    refused = script("extract.py", "--input", data, "--output", finished, code=2)
    assert "test_efficientnet/fold0/best.pt is damaged" in refused.stderr and "delete it" in refused.stderr
    assert (finished / "test_nfnet/fold1/extract.json").exists(), "one bad run does not stop the others"
    (run / "best.pt").unlink()
    assert "best.pt is gone: training anew" in train(data, finished).stdout
    assert same(load_checkpoint(run / "best.pt")["model"], before)


def test_a_whole_log_without_checkpoints_does_not_call_the_next_first_epoch_finished(finished):
    run = finished / "test_nfnet" / "fold1"
    assert load_last(run, {"train": load_checkpoint(run / "last.pt")["train"]})["epoch"] == 3 and is_finished(run)
    for name in ("last.pt", "best.pt"):
        (run / name).rename(run / f"old {name}")
    assert load_last(run, {})["epoch"] == 0
    (run / "old best.pt").rename(run / "best.pt")  # as the first epoch leaves it, if a kill comes before its last.pt
    assert not is_finished(run)


def test_a_log_of_other_epochs_than_all_is_no_finished_run(finished):
    run = finished / "test_nfnet" / "fold1"
    log = (run / "log.csv").read_text().splitlines(keepends=True)
    assert is_finished(run)
    (run / "log.csv").write_text("".join(log[:2] + ["3" + log[2][1:]]))  # a flipped bit makes a 2 a 3, the last epoch
    assert not is_finished(run)


def test_records_know_what_was_written(tmp_path):
    save_json(tmp_path / "a.json", {"size": 224, "names": ["우유"]})
    assert load_json(tmp_path / "a.json", size=int) == {"size": 224, "names": ["우유"]}
    with pytest.raises(InputError, match="no proper 'names'"):
        load_json(tmp_path / "a.json", names=dict)
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace("224", "234"))
    with pytest.raises(InputError, match=r"a\.json is damaged"):
        load_json(tmp_path / "a.json")


def test_folds_changed_on_disk_or_other_than_the_run_s_are_refused(data, finished):
    fold = load_folds(finished, read_train(data))
    before = (finished / "folds.csv").read_text()
    (finished / "folds.csv").write_text(before.replace(",0,random", ",1,random", 1))
    with pytest.raises(InputError, match=r"folds\.csv is damaged, or was changed"):
        load_folds(finished, read_train(data))
    (finished / "folds.csv").write_text(before.replace(",by,check", ",drawn,check", 1))
    with pytest.raises(InputError, match=r"folds\.csv is damaged, or was changed"):
        load_folds(finished, read_train(data))
    (finished / "folds.csv").write_text(before)
    pd.read_csv(finished / "folds.csv").assign(fold=(fold + 1) % 5).drop(columns="check").to_csv(finished / "folds.csv",
                                                                                                index=False)
    refused = script("retrieve.py", "--input", data, "--output", finished, code=2)
    assert "held out other images" in refused.stderr


def test_pseudo_labels_are_those_that_were_written(data, finished):
    script("scripts/expect.py", "--input", data, "--output", finished)
    file, classes = finished / "confidence.csv", encode(read_train(data)["label"])[0]
    assert len(read_pseudo(file, 0, classes)) == 12
    table = pd.read_csv(file)
    table.iloc[:5].to_csv(file, index=False)
    with pytest.raises(InputError, match=r"confidence\.csv is not what scripts/expect\.py wrote"):
        read_pseudo(file, 0, classes)


def test_a_damaged_search_begins_anew(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    right = topk(x, x, 3)
    topk(x, x, 3, store=Store(tmp_path, "key"))
    arrays = {"similarity": (np.float32, (50, 3)), "index": (np.int64, (50, 3))}
    assert Store(tmp_path, "key").open(**arrays)[2] == 50
    flip(tmp_path / "index.npy", -40)
    assert Store(tmp_path, "key").open(**arrays)[2] == 0
    assert all(np.array_equal(a, b) for a, b in zip(topk(x, x, 3, store=Store(tmp_path, "key")), right, strict=True))


def test_a_write_that_fails_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", {"epoch": 1})

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534\nframe #0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"last\.pt cannot be written .*free space"):
        save_checkpoint(tmp_path / "last.pt", {"epoch": 2})
    assert load_checkpoint(tmp_path / "last.pt", epoch=int) == {"epoch": 1} and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"a\.npy cannot be written \(No space left"):
        new_npy(tmp_path / "a.npy", np.float32, (10, 3))


def test_an_interrupt_while_an_object_is_deleted_is_not_lost(monkeypatch, capsys):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    class Loader:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def main():
        Loader()
        time.sleep(5)

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 130 and capsys.readouterr().err.startswith("interrupted")


def test_what_an_interrupt_breaks_is_no_fault_of_its_own(capsys):
    def main():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("DataLoader worker exited unexpectedly") from None

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 130 and capsys.readouterr().err.startswith("interrupted")
    with pytest.raises(SystemExit) as end:
        run(lambda: exec("raise RuntimeError('a fault')"))
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.startswith("Traceback") and said.endswith("RuntimeError: a fault\n")


def test_two_fresh_runs_give_the_same_files_without_workers_and_cache_too(data, output, tmp_path):
    assert (data / ".cache" / "32-squash.json").exists()
    train(data, tmp_path, "test_efficientnet", 0, "--deterministic", "--workers", "0", "--no-cache")
    script("extract.py", "--input", data, "--output", tmp_path, "--workers", 0, "--precision", "fp32", "--deterministic")
    torch.use_deterministic_algorithms(False)
    run = "test_efficientnet/fold0"
    for name in ("last.pt", "best.pt"):
        assert same(*(load_checkpoint(folder / run / name)["model"] for folder in (tmp_path, output)))
    for name in ("train.npy", "test.npy", "head.npy"):
        assert (tmp_path / run / name).read_bytes() == (output / run / name).read_bytes(), name


# ----------------------------------------------------------------------------------------------------------- hostile input


def test_a_path_may_leave_the_folder_by_a_flag_only(data, tmp_path):
    inside = shutil.copytree(data, tmp_path / "d")
    for name, column in (("train.csv", "path"), ("sample_submission.csv", "filename")):
        table = pd.read_csv(inside / name)
        table.loc[0, column] = str(data / ("." if name == "train.csv" else "test") / table.loc[0, column])
        table.to_csv(inside / name, index=False)
    (inside / "solution.csv").unlink()
    assert "--allow-outside" in train(inside, tmp_path / "o", code=2).stderr
    with pytest.raises(InputError, match="allow-outside"):
        read_test(inside)
    train(inside, tmp_path / "o", "test_efficientnet", 0, "--epochs", 1, "--allow-outside")
    flags = ["--input", inside, "--output", tmp_path / "o", "--allow-outside"]
    script("extract.py", *flags)
    script("retrieve.py", *flags)


def test_no_pipe_device_or_huge_image_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with open(tmp_path / "long.png", "wb") as file:
        file.truncate(2**31)
    cv2.imwrite(str(tmp_path / "large.png"), np.zeros((10001, 10000), np.uint8))
    os.mkfifo(tmp_path / "train.csv")
    names = ["pipe.png", "zero.png", "long.png", "large.png"]
    for full in (False, True):
        with pytest.raises(InputError, match="4 images are missing or unreadable") as error:
            check_images(tmp_path, names, full)
        assert all(name in str(error.value) for name in names)
    for name in names:
        with pytest.raises(InputError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match=r"train\.csv is no file"):
        read_train(tmp_path)


def test_a_tensor_where_a_checkpoint_has_plain_values_is_refused(data, finished):
    file = finished / "test_efficientnet" / "fold0" / "best.pt"
    torch.save(load_checkpoint(file) | {"held_out": torch.zeros(2)}, file)
    refused = script("extract.py", "--input", data, "--output", finished, code=2)
    assert "fold0/best.pt is damaged or no plain checkpoint" in refused.stderr and "Tensor" in refused.stderr


def test_compressed_checkpoints_and_archives_as_npy_are_refused(tmp_path):
    import zipfile

    torch.save({"a": torch.zeros(10)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(InputError, match=r"b\.pt is damaged .*compressed"):
        load_checkpoint(tmp_path / "b.pt")
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(InputError, match=r"a\.npz is damaged"):
        load_npy(tmp_path / "a.npz")


def test_weights_that_are_nan_are_refused(tmp_path):
    model = Model("test_nfnet", 3)
    model.neck[0].weight.data[0, 0] = torch.nan
    torch.save(model.state_dict(), tmp_path / "nan.pt")
    with pytest.raises(InputError, match=r"nan\.pt: neck\.0\.weight is NaN"):
        load_weights(Model("test_nfnet", 3), "test_nfnet", str(tmp_path / "nan.pt"))


def test_a_zero_embedding_is_caught_with_its_file(data):
    names = read_train(data)["path"]

    class Zero(torch.nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), 4)

    with pytest.raises(InputError, match=f"{names[0]} gives a NaN, infinite or zero embedding"):
        embed_model(Zero(), Images(data, names, np.zeros(len(names)), 8), torch.device("cpu"), width=4)


# --------------------------------------------------------------------------------------------------------- skipping images


def test_unreadable_images_are_skipped_as_if_they_were_not_there(tmp_path):
    """The labels of the other test images are those of a job whose CSVs lack the bad rows."""
    bad, good = make_data(tmp_path / "bad"), make_data(tmp_path / "good")
    names = {"train.csv": ("path", "train/tube_3.png"), "sample_submission.csv": ("filename", "q10.jpg"),
             "solution.csv": ("filename", "q10.jpg")}
    for file, (column, name) in names.items():
        table = pd.read_csv(good / file)
        table[table[column] != name].to_csv(good / file, index=False)
    for name in ("train/tube_3.png", "test/q10.jpg"):
        (bad / name).write_bytes((bad / name).read_bytes()[:40])  # the header is whole
    for data, flags in ((bad, ["--skip-bad-images"]), (good, [])):
        train(data, tmp_path / data.name / "o", "test_efficientnet", 0, *flags)
        for name in ("extract.py", "retrieve.py", "scripts/expect.py", "scripts/report.py", "scripts/summary.py"):
            script(name, "--input", data, "--output", tmp_path / data.name / "o")
    output = tmp_path / "bad" / "o"
    assert bad_images(output, "train") == {"train/tube_3.png"} and bad_images(output, "test") == {"q10.jpg"}
    run = "o/test_efficientnet/fold0"
    for name in ("train.npy", "test.npy"):
        assert (bad / run / name).read_bytes() == (good / run / name).read_bytes(), name
    for name in ("submission.csv", "confidence.csv"):
        full, part = (pd.read_csv(tmp_path / data / "o" / name).set_index("filename") for data in ("bad", "good"))
        assert full.drop(index="q10.jpg").equals(part) and len(full) == 12
        assert full.index.tolist() == pd.read_csv(bad / "sample_submission.csv")["filename"].tolist()
        assert full["prediction"]["q10.jpg"] == "bottle", "the most frequent label, the first of equal ones"
    assert full["confidence"]["q10.jpg"] == 0
    scores = load_json(output / "scores.json")["test"]["nearest"]
    truth = pd.read_csv(bad / "solution.csv").set_index("filename")["label"]
    submission = pd.read_csv(output / "submission.csv").set_index("filename")["prediction"]
    assert scores == pytest.approx((submission == truth[submission.index]).mean(), abs=1e-4), "the bad image counts, too"
    script("scripts/draw_matches.py", "--input", bad, "--output", output, "--rows", 12)
