"""The real scripts on a few generated images: train, kill, resume, extract, retrieve; two runs through run_all.sh."""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from utils import load_checkpoint, load_json, save_checkpoint, save_json, seed_everything

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY, make_data, same, script, train

from dataset import Images, read_test, read_train
from extract import adapt_bn, embed_model
from models import Model, build
from retrieve import VOTES
from search import Joined
from train import EVENTS, Graphed, event_bytes, make_backward, parse_args, write_log


def weights(folder):
    return load_checkpoint(folder / "last.pt")["model"]


def test_a_run_leaves_what_the_contract_says(output):
    run = output / "test_nfnet" / "fold1"
    names = {p.name for p in run.iterdir() if not p.name.startswith(".")}
    assert names == {"args.json", "log.csv", "last.pt", "best.pt", "train.npy", "test.npy", "head.npy", "extract.json"}
    log = pd.read_csv(run / "log.csv")
    assert log["epoch"].tolist() == [1, 2, 3] and not log.isna().any().any()
    best = load_checkpoint(run / "best.pt")
    assert best["args"]["arch"] == "test_nfnet" and len(best["classes"]) == 4
    assert log["retrieval_acc"][log["epoch"] == best["epoch"]].item() == log["retrieval_acc"].max()
    assert (log["retrieval_acc"][best["epoch"]:] < log["retrieval_acc"].max()).all(), "the later epoch on ties"
    for name, rows in [("train", 24), ("test", 12), ("head", 4)]:
        array = np.load(run / f"{name}.npy")
        assert array.shape == (rows, 512) and array.dtype == np.float32


def test_killed_and_started_again_ends_bit_identical(data, tmp_path):
    """SIGKILL after the first epoch's checkpoint, twice over: same weights as the run that nobody disturbed. With all that has
    a state or draws random numbers."""
    flags = ["--head-first", "1", "--ema", "0.9", "--cutmix", "1", "--fold-by", "look"]
    flags += ["--tensorboard"] * bool(importlib.util.find_spec("tensorboard"))
    train(data, tmp_path / "undisturbed", "test_efficientnet", 0, *flags)
    command = [sys.executable, "train.py", "--arch", "test_efficientnet", "--fold", "0", "--input", str(data), "--output",
               str(tmp_path), "--epochs", "3", *TINY, *flags]
    last = tmp_path / "test_efficientnet" / "fold0" / "last.pt"
    for _ in range(2):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == before):
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = train(data, tmp_path, "test_efficientnet", 0, *flags)
    assert "resuming after epoch" in done.stdout or "finished already" in done.stdout
    undisturbed = tmp_path / "undisturbed" / "test_efficientnet" / "fold0"
    assert same(weights(last.parent), weights(undisturbed))
    assert (last.parent / "best.pt").read_bytes() == (undisturbed / "best.pt").read_bytes()
    if "--tensorboard" in flags:
        for folder in (last.parent, undisturbed):
            assert_events_equal_the_log(folder)


def assert_events_equal_the_log(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    log = pd.read_csv(folder / "log.csv").set_index("epoch")
    assert set(events.Tags()["scalars"]) == set(log.columns)
    for name, column in log.items():
        column, points = column.dropna(), events.Scalars(name)
        assert [p.step for p in points] == column.index.tolist(), (name, "a point an epoch, none twice")
        assert np.allclose([p.value for p in points], column, rtol=1e-6)


def test_events_go_on_where_they_are_right_and_are_mended_where_not(tmp_path):
    pytest.importorskip("tensorboard")
    path = tmp_path / EVENTS
    history = [{"epoch": e, "train_loss": 1 / (e + 2), "retrieval_acc": None if e == 1 else 0.5, "seconds": 2.0}
               for e in range(-1, 4)]
    whole = event_bytes(history)
    write_log(tmp_path, history[:2], True)
    inode = path.stat().st_ino
    write_log(tmp_path, history, True)
    assert path.read_bytes() == whole and path.stat().st_ino == inode, "a reader keeps its place"
    for torn in (whole[:-5], whole[:100], b"", whole + b"torn", b"foreign"):
        path.write_bytes(torn)
        write_log(tmp_path, history, True)
        assert path.read_bytes() == whole
    assert_events_equal_the_log(tmp_path)


def test_tensorboard_that_is_not_there_is_named_before_training(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    assert "pip install tensorboard" in train(data, tmp_path, "test_nfnet", 0, "--tensorboard", code=2).stderr
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs a C compiler" in train(data, tmp_path, "test_nfnet", 0, "--compile", code=2).stderr
    assert not (tmp_path / "test_nfnet").exists()


def test_ctrl_c_says_one_line(data, tmp_path):
    process = subprocess.Popen([sys.executable, "train.py", "--arch", "test_nfnet", "--fold", "0", "--input", str(data),
                                "--output", str(tmp_path), "--epochs", "999", *TINY], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    while "epoch 1/999" not in (line := process.stdout.readline()):
        assert line or process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and error.startswith("interrupted") and len(error.splitlines()) == 1, error


def test_torchrun_s_own_restart_throws_no_run_away(monkeypatch):
    for count, restart in [("0", True), ("1", False)]:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert parse_args(["--arch", "test_nfnet", "--fold", "0", "--restart"]).restart is restart


def test_a_run_that_failed_before_its_first_epoch_takes_other_arguments(data, tmp_path):
    script("train.py", "--arch", "test_nfnet", "--fold", 0, "--input", data, "--output", tmp_path, "--size", 32, code=2)
    train(data, tmp_path, "test_nfnet", 0, "--epochs", "1")


def test_a_missing_test_image_is_known_before_training(tmp_path):
    broken = make_data(tmp_path / "d")
    (broken / "test" / "q00.jpg").unlink()
    assert "q00.jpg" in train(broken, tmp_path / "o", code=2).stderr


def test_other_arguments_are_refused_by_name_and_restart_begins_anew(data, finished):
    refused = train(data, finished, "test_efficientnet", 0, "--lr", "0.1", code=2)
    assert "--lr 0.002 (now 0.1)" in refused.stderr and "--restart" in refused.stderr
    again = train(data, finished)
    assert "finished already" in again.stdout
    run, best = finished / "test_efficientnet" / "fold0", finished / "test_efficientnet" / "fold0" / "best.pt"
    (run / "args.json").unlink()
    refused = train(data, finished, "test_efficientnet", 0, "--lr", "0.1", code=2)
    assert "--lr 0.002 (now 0.1)" in refused.stderr, "it is in last.pt, too"
    before = best.read_bytes()
    for flags, message in [(("--weights", "none.pth"), "no such file"), (("--pseudo", "none.csv"), "none.csv is not there"),
                           (("--weights", best, "--freeze", 99), "--freeze 99"), (("--arch", "no_net"), "--arch no_net")]:
        assert message in train(data, finished, "test_efficientnet", 0, "--restart", *flags, code=2).stderr
    assert best.read_bytes() == before, "what cannot be trained throws nothing away"
    anew = train(data, finished, "test_efficientnet", 0, "--lr", "0.1", "--epochs", "1", "--restart")
    assert "epoch 1/1" in anew.stdout


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(data, tmp_path):
    failed = train(data, tmp_path, "test_efficientnet", 0, "--lr", "1e30", "--epochs", "4", "--head", "softmax", code=2)
    assert "--clip" in failed.stderr and "--precision fp32" in failed.stderr


@pytest.mark.parametrize("kind, code, said", [(RuntimeError, 1, "RuntimeError: out of memory. Tried"),
                                              (torch.OutOfMemoryError, 2, "error: out of memory; compute a batch in parts"),
                                              (os.kill, 2, "with fewer --workers goes on")])
def test_an_error_of_the_device_ends_the_run_and_its_loader(data, tmp_path, monkeypatch, kind, code, said):
    def fail(*_):
        if kind is os.kill:  # as the system does where memory is short
            kind(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(60)
        raise kind("out of memory. Tried")

    monkeypatch.setattr("models.Model.forward", fail)
    assert said in train(data, tmp_path, "test_nfnet", 0, code=code).stderr
    assert not multiprocessing.active_children(), "a process that stays keeps the script from ending, and run_all.sh waiting"


@pytest.mark.parametrize("flags", [("--head", "softmax"), ("--grad-accum", "2", "--clip", "norm:1"), ("--precision", "bf16"),
                                   ("--no-class-weights", "--resize", "pad", "--eval-every", "2"),
                                   ("--head-first", "1", "--ema", "0.5", "--mixup", "0.4", "--sub-centres", "2", "--gem-p", "2",
                                    "--no-train-gem", "--test-size", "32", "48", "--fold-by", "look")])
def test_flags_run(data, tmp_path, flags):
    train(data, tmp_path, "test_nfnet", 2, *flags, "--epochs", "2")
    log = pd.read_csv(tmp_path / "test_nfnet" / "fold2" / "log.csv")
    assert np.isfinite(log["train_loss"]).all() and log["retrieval_acc"].iloc[-1] >= 0
    if "--sub-centres" in flags:
        assert log["epoch"].tolist() == [0, 1, 2], "the head's own epoch comes before the first"
        best = load_checkpoint(tmp_path / "test_nfnet" / "fold2" / "best.pt")["model"]
        assert best["pool.p"].item() == 2 and not same(best, weights(tmp_path / "test_nfnet" / "fold2")), "the average is kept"
        script("extract.py", "--input", data, "--output", tmp_path)
        said = script("retrieve.py", "--input", data, "--output", tmp_path, "--vote", "fusion")
        assert json.loads(said.stdout)["test"]["head"] >= 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and CUDA_VISIBLE_DEVICES that names it")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_cuda_graph_gives_the_gradients_of_plain_kernels(precision):
    device, models, calls, scalers = torch.device("cuda"), [], [], []
    for more in ([], ["--no-cuda-graph"]):
        torch.manual_seed(0)
        models.append(Model("test_efficientnet", 5).to(device).train())
        models[-1].backbone.conv_stem.requires_grad_(False)
        scalers.append(torch.amp.GradScaler("cuda", init_scale=64.0, enabled=precision == "fp16"))
        args = parse_args(["--arch", "test_efficientnet", "--fold", "all", *more])
        calls.append(make_backward(models[-1], scalers[-1], torch.ones(5, device=device), args, device, precision))
    for number in range(8):
        images, labels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.randint(5, (8,))
        batch = images.to(device), labels.to(device), torch.tensor(8.0 + number, device=device)
        losses = [call(*batch).item() for call in calls]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
        for mine, plain in zip(*(m.parameters() for m in models), strict=True):
            assert (mine.grad is None) == (plain.grad is None)
            if plain.grad is not None:
                assert (mine.grad - plain.grad).norm() <= 0.03 * plain.grad.norm() + 1e-4
                mine.grad = plain.grad = None
        for mine, plain in zip(*(m.buffers() for m in models), strict=True):
            assert torch.allclose(mine.float(), plain.float(), rtol=0.03, atol=1e-3)
        for scaler in scalers:
            scaler.update(32.0 + number)
    assert calls[0].graph


def test_a_cuda_graph_that_does_not_fit_is_done_without(monkeypatch, capsys):
    def graph(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    model = torch.nn.Linear(2, 1)
    step = Graphed(lambda images, labels, total: model(images).sum().backward() or total, model)
    for _ in range(6):
        assert step(torch.ones(3, 2), torch.zeros(3), torch.tensor(2.0)).item() == 2
        assert model.weight.grad.tolist() == [[3, 3]]
        model.zero_grad()
    assert capsys.readouterr().out.count("no memory for a CUDA graph") == 1


def test_the_head_s_own_epochs_leave_the_backbone_as_it_was(data, tmp_path):
    flags = ["--head-first", "2", "--epochs", "1", "--head-lr-scale", "1e7", "--lr", "1e-9"]  # the last epoch hardly moves it
    train(data, tmp_path, "test_nfnet", 0, *flags)
    state = weights(tmp_path / "test_nfnet" / "fold0")
    log = pd.read_csv(tmp_path / "test_nfnet" / "fold0" / "log.csv")
    assert log["epoch"].tolist() == [-1, 0, 1]
    seed_everything(9999)
    start = Model("test_nfnet", 4).state_dict()
    moved = {name for name in start if (state[name] - start[name]).abs().max() > 1e-5}
    assert not any(name.startswith("backbone") for name in moved) and {"neck.0.weight", "head.weight"} <= moved


def test_adapted_batch_norm_and_sizes_at_extraction(data, finished):
    flags = ["--input", data, "--output", finished, "--arch", "test_efficientnet", "--precision", "fp32"]
    run = finished / "test_efficientnet" / "fold0"
    plain = {name: np.load(run / f"{name}.npy") for name in ("train", "test")}
    script("extract.py", *flags, "--adapt-bn")
    assert np.array_equal(np.load(run / "train.npy"), plain["train"]), "the gallery keeps its statistics"
    stamp = (run / "extract.json").read_bytes()
    assert "two or more" in script("extract.py", *flags, "--adapt-bn", "--batch-size", 1, code=2).stderr
    assert (run / "extract.json").read_bytes() == stamp, "known before the pass"
    assert not np.allclose(np.load(run / "test.npy"), plain["test"], atol=1e-3)
    model = build(load_checkpoint(run / "best.pt"))
    images = Images(data / "test", read_test(data)["filename"], [0] * 12, 32)
    adapt_bn(model, images, torch.device("cpu"))
    first = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert first.running_mean.abs().sum() > 0 and not first.training
    assert np.allclose(embed_model(model, images, torch.device("cpu")), np.load(run / "test.npy"), atol=1e-4)
    script("extract.py", *flags, "--test-size", 32, 64)
    double = embed_model(build(load_checkpoint(run / "best.pt")), images.at(64), torch.device("cpu"))
    assert np.allclose(np.load(run / "test.npy"), (plain["test"] + double) / 2, atol=1e-4)


def test_confident_test_images_join_a_second_round(data, tmp_path):
    names = pd.read_csv(data / "solution.csv", dtype=str)
    names.assign(prediction=names["label"], confidence=np.linspace(0, 1, 12)).to_csv(tmp_path / "c.csv", index=False)
    said = train(data, tmp_path, "test_nfnet", 0, "--pseudo", str(tmp_path / "c.csv"), "--pseudo-min", "0.5", "--epochs", "1")
    alone = train(data, tmp_path, "test_nfnet", 1, "--epochs", "1")
    count = [int(out.stdout.split(" images, ")[0].split()[-1]) for out in (said, alone)]
    fold = pd.read_csv(tmp_path / "folds.csv")["fold"]
    assert count == [(fold != 0).sum() + 6, (fold != 1).sum()]
    again = ["--pseudo", str(tmp_path / "c.csv"), "--epochs", "1", "--pseudo-min"]
    assert "finished already" in train(data, tmp_path, "test_nfnet", 0, *again, "0.5").stdout
    elsewhere = ["--pseudo", shutil.copy(tmp_path / "c.csv", tmp_path / "d.csv"), *again[2:]]
    assert "finished already" in train(data, tmp_path, "test_nfnet", "00", *elsewhere, "0.5").stdout
    names.assign(prediction=names["label"], confidence=np.linspace(1, 0, 12)).to_csv(tmp_path / "c.csv", index=False)
    assert "of other training images or pseudo labels" in train(data, tmp_path, "test_nfnet", 0, *again, "0.5", code=2).stderr


def test_train_on_everything(data, tmp_path):
    train(data, tmp_path, "test_nfnet", "all", "--epochs", "1")
    script("extract.py", "--input", data, "--output", tmp_path)
    said = script("retrieve.py", "--input", data, "--output", tmp_path)
    scores = json.loads(said.stdout)
    assert scores["oof"] is None and scores["test"]["nearest"] >= 0


def test_extract_skips_what_is_up_to_date_and_redoes_what_is_not(data, finished):
    run = finished / "test_nfnet" / "fold1"
    (run / ".extract").mkdir()
    said = script("extract.py", "--input", data, "--output", finished).stdout
    assert said.count("up to date") == 2 and not (run / ".extract").exists()
    before = (run / "train.npy").read_bytes()
    (run / "train.npy").unlink()
    said = script("extract.py", "--input", data, "--output", finished, "--arch", "test_nfnet", "--batch-size", 64,
                  "--precision", "fp32").stdout
    assert "embeddings/s" in said and (run / "train.npy").read_bytes() == before


def test_runs_extracted_in_one_pass_are_those_extracted_alone(data, finished):
    flags = ["--input", data, "--output", finished, "--precision", "fp32", "--test-size", 32, 64, "--workers", 1]
    runs = [finished / name for name in ("test_efficientnet/fold0", "test_nfnet/fold1")]
    assert "2 runs in one pass: 36 images" in script("extract.py", *flags).stdout
    jointly = [(run / f"{split}.npy").read_bytes() for run in runs for split in ("train", "test", "head")]
    for run in runs:
        (run / "extract.json").unlink()
        script("extract.py", *flags, "--arch", run.parent.name)
    assert jointly == [(run / f"{split}.npy").read_bytes() for run in runs for split in ("train", "test", "head")]


def test_other_photographs_under_the_same_names_are_extracted_anew(data, finished, tmp_path):
    shutil.copytree(data, tmp_path / "data", copy_function=shutil.copyfile)  # other times, the same bytes
    flags = ["--input", tmp_path / "data", "--output", finished]
    assert script("extract.py", *flags).stdout.count("up to date") == 2
    one, *_, other = sorted((tmp_path / "data" / "test").iterdir())
    shutil.copyfile(other, one)
    assert script("extract.py", *flags).stdout.count("up to date") == 0
    assert script("extract.py", *flags).stdout.count("up to date") == 2


def test_a_damaged_image_in_a_loader_s_process_ends_the_script(data, tmp_path):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    image = tmp_path / "data" / pd.read_csv(data / "train.csv")["path"][3]
    image.write_bytes(image.read_bytes()[:200])  # its header is whole
    command = ["train.py", "--arch", "test_nfnet", "--fold", 0, "--input", tmp_path / "data", "--output", tmp_path / "o", *TINY]
    done = subprocess.run([sys.executable, *map(str, [*command, "--no-cache"])], cwd=ROOT, capture_output=True, text=True,
                          timeout=200)  # it once waited for ever
    assert done.returncode == 2 and image.name in done.stderr and "Traceback" not in done.stderr


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import extract, utils
done, count = utils.Store.done, int(sys.argv.pop(1))
def kill(self, rows):
    global count
    done(self, rows)
    count -= 1
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)
utils.Store.done, extract.SAVE = kill, 0
utils.run(extract.main)
"""


def test_extraction_killed_inside_a_pass_goes_on_there(data, finished, tmp_path):
    """SIGKILL after the training images and one of the two batches of test images: the same bytes as undisturbed."""
    for stamp in finished.glob("*/*/extract.json"):
        stamp.unlink()
    for name in ("undisturbed", "one", "both", "marked"):
        shutil.copytree(finished, tmp_path / name)

    def extract(name, saved=None):
        flags = ["--input", data, "--output", tmp_path / name, "--precision", "fp32", "--batch-size", "8", "--workers", "0"]
        if saved is None:
            script("extract.py", *flags)
        else:
            died = subprocess.run([sys.executable, "-c", KILLED, ROOT, str(saved), *map(str, flags)])
            assert died.returncode == -signal.SIGKILL
        return {path.parent.parent.name + path.name: path.read_bytes() for path in (tmp_path / name).glob("*/*/t*.npy")}

    undisturbed = extract("undisturbed")
    extract("one", 7)  # three batches of training images by two runs, then one of test images by the first
    assert extract("one") == undisturbed and not list((tmp_path / "one").glob("*/*/.extract"))
    extract("both", 8)
    assert extract("both") == undisturbed
    extract("marked", 8)
    run = tmp_path / "marked" / "test_nfnet" / "fold1"
    for part, rows in (("train", 24), ("test", 8)):  # marked as by extract.py, which would see a changed number
        piece = run / ".extract" / f"{part}0" / "32"
        (array := np.load(piece / "embedding.npy", mmap_mode="r+"))[0] = 7
        state = load_json(piece / "state.json")
        assert state["done"] == rows
        save_json(piece / "state.json", state | {"digests": [hashlib.sha256(array[:rows]).hexdigest()]})
    extract("marked")
    for part in ("train", "test"):
        found, before = np.load(run / f"{part}.npy"), undisturbed[f"test_nfnet{part}.npy"]
        assert (found[0] == 7).all() and found[1:].tobytes() == before[-found[1:].nbytes:], "nothing is computed twice"


def test_a_run_without_numbers_does_not_stop_the_others_of_its_pass(data, finished):
    run, other = (finished / name for name in ("test_efficientnet/fold0", "test_nfnet/fold1"))
    checkpoint = load_checkpoint(run / "best.pt")
    checkpoint["model"]["neck.0.weight"] *= float("nan")
    save_checkpoint(run / "best.pt", checkpoint)
    (other / "extract.json").unlink()
    refused = script("extract.py", "--input", data, "--output", finished, code=2).stderr
    assert f"{run}: " in refused and "NaN" in refused and (other / "extract.json").exists()
    assert not (run / ".extract").exists(), "embedded anew the next time"
    assert script("extract.py", "--input", data, "--output", finished, code=2).stdout.count("up to date") == 1


def test_two_recipes_of_one_vision_transformer_side_by_side(data, tmp_path):
    for arch, size in (("test_vit", 32), ("test_vit@larger", 48)):
        train(data, tmp_path, arch, 0, "--epochs", 1, "--size", size)
    script("extract.py", "--input", data, "--output", tmp_path, "--arch", "test_vit@larger", "--workers", 1)
    script("extract.py", "--input", data, "--output", tmp_path, "--workers", 1)
    refused = script("extract.py", "--input", data, "--output", tmp_path, "--workers", 1, "--test-size", 32, 40, code=2)
    assert refused.stderr.count("takes no images of 40 px") == 2, "before any pass"
    script("retrieve.py", "--input", data, "--output", tmp_path)
    runs = load_json(tmp_path / "scores.json")["runs"]
    assert list(runs) == ["test_vit/fold0", "test_vit@larger/fold0"] and len(set(runs.values())) == 2


def test_a_begun_run_keeps_its_precision(data, tmp_path):
    train(data, tmp_path, "test_nfnet", 0, "--epochs", "1", "--precision", "bf16")
    assert "finished already" in train(data, tmp_path, "test_nfnet", 0, "--epochs", "1", "--precision", "auto").stdout
    args = json.loads((tmp_path / "test_nfnet" / "fold0" / "args.json").read_text())
    assert args["precision"] == args["embed_precision"] == "bf16"
    refused = train(data, tmp_path, "test_nfnet", 0, "--epochs", "1", "--precision", "fp16", code=2)
    assert "--precision bf16 (now fp16)" in refused.stderr
    refused = train(data, tmp_path, "test_nfnet", 0, "--epochs", "1", "--precision", "auto", "--embed-precision", "fp32",
                    code=2)
    assert "--embed-precision bf16 (now fp32)" in refused.stderr


def test_embeddings_are_the_flip_average(data, output):
    run = output / "test_efficientnet" / "fold0"
    model = build(load_checkpoint(run / "best.pt"))
    image = Images(data, read_train(data)["path"], [0] * 24, 32)[5][0][None]
    with torch.inference_mode():
        expected = (model(image) + model(image.flip(-1))) / 2
    assert np.allclose(np.load(run / "train.npy")[5], expected[0], atol=1e-4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("FIND was unable to find an engine to execute this computation")])
def test_a_batch_that_does_not_fit_is_halved(data, error):
    def forward(batch):
        sizes.append(len(batch))
        if len(batch) > most:
            raise error
        return model.features(batch)

    images, sizes, most = Images(data, [f"train/bottle_{i}.png" for i in range(6)], np.zeros(6, np.int64), 32), [], 99
    model = Model("test_nfnet", 4)
    model.forward, width = forward, model.neck[0].in_features
    whole = embed_model(model, images, torch.device("cpu"), batch_size=6, width=width)
    most, sizes[:] = 4, []
    halved = embed_model(model, images, torch.device("cpu"), batch_size=6, width=width)
    assert sizes == [12, 6, 2, 2, 2, 2, 2, 2] and np.allclose(halved, whole, rtol=1e-4, atol=1e-6)
    most = 1
    with pytest.raises(RuntimeError, match=str(error)):
        embed_model(model, images, torch.device("cpu"), batch_size=6, width=width)


def test_retrieve_writes_the_submission_in_its_order(data, output):
    said = script("retrieve.py", "--input", data, "--output", output)
    sample, done = (pd.read_csv(p, dtype=str) for p in (data / "sample_submission.csv", output / "submission.csv"))
    assert done.columns.tolist() == sample.columns.tolist() and done["filename"].equals(sample["filename"])
    truth = pd.read_csv(data / "solution.csv", dtype=str).set_index("filename")["label"][done["filename"]].to_numpy()
    scores = load_json(output / "scores.json")
    assert scores == json.loads(said.stdout)
    assert scores["test"][scores["vote"]] == pytest.approx((done["prediction"].to_numpy() == truth).mean(), abs=1e-4)
    neighbours = np.load(output / "neighbours.npz")
    assert neighbours["index"].shape == (12, 5) and neighbours["similarity"].dtype == np.float32
    assert (np.diff(neighbours["similarity"], axis=1) <= 0).all()


def test_the_likeliest_labels_begin_with_the_submission_s(data, finished):
    flags = ["--input", data, "--output", finished]
    script("retrieve.py", *flags, "--top", 3, "--vote", "sum")
    done, top = (pd.read_csv(finished / name, dtype=str) for name in ("submission.csv", "top.csv"))
    assert top.columns.tolist() == ["filename", "label1", "label2", "label3"] and top["label1"].equals(done["prediction"])
    labels, runs = pd.read_csv(data / "train.csv")["label"].to_numpy(), ["test_efficientnet/fold0", "test_nfnet/fold1"]
    gallery, queries = (Joined([np.load(finished / run / f"{split}.npy") for run in runs])[:].numpy()
                        for split in ("train", "test"))
    for own, second, near in zip(top["label1"], top["label2"], labels[(-queries @ gallery.T).argsort(1)], strict=True):
        assert second == near[near != own][0]
    script("retrieve.py", *flags, "--top", 5, "--reject", 0.1)
    top = pd.read_csv(finished / "top.csv", dtype=str)
    strange = top["label1"] == "unknown"
    assert strange.any() and top["label5"].notna().equals(strange), "four products, and the unknown before them"
    script("retrieve.py", *flags)
    assert not (finished / "top.csv").exists(), "it was of the former submission"


def test_out_of_fold_equals_doing_it_by_hand(data, output):
    """test_efficientnet fold 0 alone: its held-out images against the rest, by its own embeddings."""
    script("retrieve.py", "--input", data, "--output", output, "--runs", "test_efficientnet/fold0", "--vote", "nearest")
    scores = json.loads((output / "scores.json").read_text())
    fold = pd.read_csv(output / "folds.csv")
    x = np.load(output / "test_efficientnet" / "fold0" / "train.npy").astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    held, rest = fold.index[fold["fold"] == 0], fold.index[fold["fold"] != 0]
    nearest = rest[(x[held] @ x[rest].T).argmax(1)]
    expected = (fold["label"][nearest].to_numpy() == fold["label"][held].to_numpy()).mean()
    assert scores["oof"]["nearest"] == pytest.approx(expected, abs=1e-4)
    log = pd.read_csv(output / "test_efficientnet" / "fold0" / "log.csv")
    assert log["retrieval_acc"].max() == pytest.approx(expected, abs=1e-4), "training measures the same thing"


def test_the_submission_takes_the_vote_and_the_summary_knows_all(data, output):
    script("retrieve.py", "--input", data, "--output", output, "--vote", "propagation")
    scores = json.loads((output / "scores.json").read_text())
    assert 0 <= scores["oof"]["propagation"] <= 1 and scores["vote"] == "propagation" and not (output / "search").exists()
    labels = set(pd.read_csv(data / "train.csv")["label"])
    assert set(pd.read_csv(output / "submission.csv")["prediction"]) <= labels
    said = script("scripts/summary.py", "--input", data, "--output", output, "--votes", *VOTES, "--ensemble-only").stdout
    rows = [line.split("|")[3:-1] for line in said.splitlines() if line.startswith("| all ")]
    assert [len(row) for row in rows] == [len(VOTES)] * 2 and all(0 <= float(share) <= 1 for row in rows for share in row)


def test_the_summary_names_the_labels_that_are_confused_most_often(data, finished):
    flags = ["--input", data, "--output", finished, "--ensemble-only"]
    table = pd.read_csv(data / "train.csv").assign(fold=0)
    table["prediction"] = table["label"].replace({"tube": "bottle"})
    table.loc[table.index[table["label"] == "bottle"][:2], "prediction"] = ["a | b", ""]  # the last: no run held it out
    table.to_csv(finished / "oof.csv", index=False)
    said = script("scripts/summary.py", *flags).stdout
    assert "| tube | bottle | 6 |\n| bottle | a \\| b | 1 |\n" in said + "\n" and "images |\n|---|" in said
    (finished / "oof.csv").unlink()
    assert "confused" not in script("scripts/summary.py", *flags).stdout


def test_folds_that_see_a_shift_choose_the_vote(data, finished):
    flags = ["--input", data, "--output", finished]
    assert json.loads(script("retrieve.py", *flags).stdout)["vote"] == "nearest", "folds at random choose nothing"
    folds = pd.read_csv(finished / "folds.csv")
    folds.drop(columns="check").assign(by="look").to_csv(finished / "folds.csv", index=False)
    scores = json.loads(script("retrieve.py", *flags).stdout)
    assert set(scores["oof"]) == set(VOTES) and scores["oof"][scores["vote"]] == max(scores["oof"].values())
    assert scores["vote"] in scores["test"]
    assert json.loads(script("retrieve.py", *flags, "--vote", "sum").stdout)["vote"] == "sum"


def test_torchrun_gives_the_same_submission(data, output, tmp_path):
    for folder in ("one", "two"):
        shutil.copytree(output, tmp_path / folder)
    flags = ["--input", data, "--vote", "propagation", "--reject", "0.5", "--output"]
    script("retrieve.py", *flags, tmp_path / "one")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    ROOT / "retrieve.py", *flags, tmp_path / "two"], check=True, timeout=120)
    for name in ("submission.csv", "scores.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = (np.load(tmp_path / folder / "neighbours.npz") for folder in ("one", "two"))
    assert all(np.array_equal(one[key], two[key]) for key in ("similarity", "index"))


def test_a_run_named_twice_counts_once(data, finished):
    flags, one = ["--input", data, "--output", finished], "test_nfnet/fold1"
    script("retrieve.py", *flags, "--runs", one, one)
    assert list(load_json(finished / "scores.json")["runs"]) == [one]
    script("scripts/report.py", *flags)


def test_retrieve_refuses_what_does_not_belong_together(data, finished, tmp_path):
    other = make_data(tmp_path / "other", test_each=2)
    refused = script("retrieve.py", "--input", other, "--output", finished, code=2)
    assert "sample_submission.csv" in refused.stderr and "extract.py" in refused.stderr
    run = finished / "test_nfnet" / "fold1"
    shutil.copy(run / "last.pt", run / "best.pt")
    refused = script("retrieve.py", "--input", data, "--output", finished, code=2)
    assert "test_nfnet/fold1: best.pt is not the checkpoint" in refused.stderr
    np.save(run / "test.npy", np.zeros((3, 512), np.float32))
    script("retrieve.py", "--input", data, "--output", tmp_path / "nowhere", code=2)


def test_original_weights_embed_and_retrieve_without_training(tmp_path):
    from test_models import original_state

    numbers = ["2", "10", "1", "30"]  # sorted as numbers in the checkpoint, as text here
    data = make_data(tmp_path / "data", numbers)
    flags = ["--input", data, "--arch", "test_nfnet", "--fold", 0, "--size", 32, "--precision", "fp32"]

    def extract(name, state):
        torch.save(state, tmp_path / f"{name}.pth")
        return script("extract.py", *flags, "--weights", tmp_path / f"{name}.pth", "--output", tmp_path / name).stdout

    state = original_state("test_nfnet", classes=4)
    assert "in another order" in extract("strange", state)
    embedded = np.load(tmp_path / "strange/test_nfnet/fold0/train.npy").astype(np.float64)
    labels = pd.read_csv(data / "train.csv", dtype=str)["label"].to_numpy()
    wanted = labels[:, None] == sorted(numbers, key=int)
    state["head.weight"] = torch.from_numpy((np.linalg.pinv(embedded) @ wanted).T).float()
    assert "order" not in extract("original", state) and "up to date" in extract("original", state)
    script("retrieve.py", "--input", data, "--output", tmp_path / "original", "--vote", "fusion")
    save_checkpoint(tmp_path / "original.pth", {name: tensor + 1 for name, tensor in state.items()})
    assert "holds another run" in script("extract.py", *flags, "--weights", tmp_path / "original.pth", "--output",
                                         tmp_path / "original", code=2).stderr, "other weights of the same name"
    assert "holds weights that extract.py has imported" in train(data, tmp_path / "original", "test_nfnet", 0, code=2).stderr
    assert len(pd.read_csv(tmp_path / "original" / "submission.csv")) == 12
    extract("nine", original_state("test_nfnet", classes=9))
    for name in ("strange", "nine"):
        refused = script("retrieve.py", "--input", data, "--output", tmp_path / name, "--vote", "fusion", code=2)
        assert "--vote sum" in refused.stderr
        script("retrieve.py", "--input", data, "--output", tmp_path / name, "--vote", "sum")


@pytest.mark.parametrize("command, message", [
    (("train.py", "--arch", "test_nfnet", "--fold", "9"), "--fold 9"),
    (("train.py", "--arch", "test_nfnet", "--fold", "0", "--lrr", "1"), "--lrr"),
    (("train.py", "--arch", "test_nfnet", "--fold", "0", "--clip", "hard"), "--clip: hard: give none, norm:MAX"),
    (("train.py", "--arch", "test_nfnet", "--fold", "0", "--crop", "2"), "--crop: 2 is no number in [0, 1]"),
    (("train.py", "--arch", "test_nfnet", "--fold", "0", "--momentum", "0"), "--momentum: 0 is no number in (0, inf)"),
    (("train.py", "--arch", "test_nfnet", "--fold", "0", "--workers", "-1"), "--workers: -1 is no whole number in [0, inf)"),
    (("train.py", "--arch", "test_nfnet", "--fold", "0", "--seed", "2.5"), "--seed: 2.5 is no whole number in [0, 4294967295]"),
    (("train.py", "--arch", "test_nfnet", "--fold", "0", "--weights", "none", "--freeze", "1"), "--freeze keeps pretrained"),
    (("train.py", "--arch", "test_nfnet", "--fold", "0", "--mixup", "1", "--cutmix", "1"), "exclude each other"),
    (("train.py", "--arch", "test_nfnet", "--fold", "0", "--weights", "none", "--pseudo", "no.csv"), "no.csv is not there"),
    (("train.py", "--arch", "test_nfnett", "--fold", "0", "--weights", "none"), "did you mean test_nfnet"),
    (("train.py", "--arch", "test_nfnet", "--fold", "0"), "--weights none"),
    (("train.py", "--arch", "test_nfnet", "--fold", "0", "--device", "cud"), "--device cud"),
    (("extract.py", "--arch", "test_nfnet", "--fold", "0", "--weights", "none"), "brings no neck"),
    (("train.py", "--arch", "test_nfnet", "--fold", "0", "--input", "nowhere"), "nowhere/train.csv is not there"),
    (("extract.py",), "run train.py first"),
    (("extract.py", "--size", "64"), "--size is for --weights"),
    (("train.py", "--arch", "test_nfnet", "--fold", "0", "--warmup", "31"), "--warmup 31: the run has 30 epochs"),
    (("train.py", "--arch", "efficientvit_b0", "--fold", "0", "--weights", "none"), "--arch efficientvit_b0"),
    (("retrieve.py", "--runs", "test_nfnet/fold0"), "run extract.py first"),
    (("retrieve.py", "--power", "nan"), "--power: nan is no number in [0, 100]"),
])
def test_bad_flags_are_one_sentence_and_code_2(data, tmp_path, command, message):
    where = () if "--input" in command else ("--input", data)
    assert message in script(*command, *where, "--output", tmp_path, code=2).stderr


def run_all(*args, code=0):
    done = subprocess.run(["bash", "run_all.sh", *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_run_all_two_runs_side_by_side_then_skips_them_and_names_a_failure(data, output, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else half of them each, which rounds otherwise
    alone, output = output / "test_efficientnet" / "fold0", tmp_path / "o"
    flags = ["--input", data, "--output", output, *TINY, "--epochs", 3, "--cards", "cpu cpu"]
    first = run_all("--archs", "test_efficientnet", "--folds", "0 1", *flags)
    assert "| test_efficientnet, 2 runs | test |" in first.stdout and "where the time went" in first.stdout
    assert "\ntest_efficientnet fold 1: epoch 3/3" in first.stdout
    assert "\nepoch 3/3" in (output / "test_efficientnet" / "fold1" / "train.log").read_text()
    assert same(weights(output / "test_efficientnet" / "fold0"), weights(alone))
    submission = (output / "submission.csv").read_bytes()
    second = run_all("--archs", "nosuchnet test_efficientnet", "--folds", "0", *flags, code=1)
    assert "nosuchnet fold 0: see" in second.stderr and "Unknown model" in (output / "nosuchnet/fold0/train.log").read_text()
    assert second.stdout.count("finished already") == 1 and second.stdout.count("up to date") == 3
    assert (output / "submission.csv").read_bytes() == submission


def test_run_all_in_two_rounds(data, tmp_path):
    flags = ["--runs", "test_nfnet/fold0", "--input", data, "--output", tmp_path, *TINY, "--epochs", 1, "--rounds", 2,
             "--pseudo-min", 0, "--vote", "sum", "--top=2"]
    assert run_all(*flags).stdout.count("on these test images expect") == 2
    assert (tmp_path / "round2" / "folds.csv").read_bytes() == (tmp_path / "folds.csv").read_bytes()
    first, second = ((tmp_path / f / "test_nfnet/fold0/train.log").read_text() for f in (".", "round2"))
    count = [int(log.split(" images, ")[0].split()[-1]) for log in (first, second)]
    assert count[1] == count[0] + 12
    assert json.loads((tmp_path / "round2" / "scores.json").read_text())["vote"] == "sum"
    assert list(pd.read_csv(tmp_path / "round2" / "top.csv")) == ["filename", "label1", "label2"]
    source = shutil.copytree(data, tmp_path / "d")
    (source / "sample_submission.csv").unlink()
    assert "one round is all" in run_all(*flags, "--input", source, "--folds-only").stdout


SCRIPTS = [p for p in sorted([*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]) if "if __name__" in p.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_starts_and_the_readme_has_its_flags(path):
    name = str(path.relative_to(ROOT))
    shown = set(re.findall(r"--(?!no-|help|input|output|device|allow-outside)[a-z][a-z-]*",
                           script(name, "--help").stdout.split("\n\n")[0]))
    table = (ROOT / "README.md").read_text().split("## Every script")[1].split("## Troubleshooting")[0]
    row = next(line for line in table.splitlines() if line.startswith("| `") and f"`{name}`" in line.split("|")[1])
    listed = set(re.findall(r"--[a-z][a-z-]*", row.replace("[no-]", "")))
    if "flags of search and votes" in row:
        listed |= {f"--{flag}" for flag in ("k", "power", "head-power", "mix", "graph-k", "alpha", "damping", "centre",
                                            "temperature", "screen", "memory")}
    assert shown <= listed, shown - listed


def test_run_all_takes_the_folds_that_there_are():
    for flags, runs in [((), "a/fold0 a/fold1 a/fold2 a/fold3 a/fold4 b/fold0 b/fold1 b/fold2 b/fold3 b/fold4"),
                        (("--n-folds", "2"), "a/fold0 a/fold1 b/fold0 b/fold1"),
                        (("--n-folds=3", "--folds=1"), "a/fold1 b/fold1"),
                        (("--runs", "hf-hub:c/d/fold0 b/foldall"), "hf-hub:c/d/fold0 b/foldall")]:
        done = subprocess.run(["bash", "-c", '. ./run_all.sh "$@"; echo "${runs[*]}"', "", "--archs", "a b", *flags], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.stdout.strip() == runs
    assert "--n-folds three" in run_all("--n-folds", "three", code=2).stderr
    for flags in (("--archs", "b", "--folds", "0 9"), ("--runs", "a/fold0 b/fold9"), ("--runs", "b/fold9 a")):
        assert "error: b/fold9 is no run: give ARCH/fold0 .. ARCH/fold4" in run_all(*flags, code=2).stderr


def test_run_all_says_what_is_missing_and_refuses_a_second_copy(data, tmp_path):
    assert "--archs" in run_all("--arch", "test_nfnet", code=2).stderr
    missing = run_all("--input", tmp_path / "nothing", "--output", tmp_path / "o", code=2)
    assert len(missing.stderr.splitlines()) == 3 and "--demo" in missing.stderr
    for flag, name in [("--epoch", "train.py"), ("--k", "retrieve.py")]:
        wrong = run_all("--input", data, "--output", tmp_path / "w", flag, "none", code=2)
        assert f"{name}: error: " in wrong.stderr and not [*(tmp_path / "w").glob("*/fold*")]
    flags = ["--archs", "test_nfnet", "--folds", "0 1 2", "--input", data, "--output", tmp_path / "o", *TINY, "--epochs", 500,
             "--cards", "cpu,cpu"]
    first = subprocess.Popen(["bash", "run_all.sh", *map(str, flags)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.STDOUT, start_new_session=True)
    waiting = {"test_nfnet fold 0: epoch 1/500", "test_nfnet fold 1: epoch 1/500"}  # both before either has ended
    while waiting:
        line = first.stdout.readline()
        assert line or first.poll() is None
        waiting -= {line.partition("  ")[0]}
    assert "--rounds two" in run_all("--rounds", "two", *flags, code=2).stderr
    assert "another run_all.sh is at work" in run_all(*flags, code=2).stderr
    os.kill(first.pid, signal.SIGTERM)
    rest = first.communicate(timeout=120)[0]
    assert first.returncode == 130 and rest.count("interrupted") == 2 and not (tmp_path / "o/test_nfnet/fold2").exists()
