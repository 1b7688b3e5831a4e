"""A tiny data set, made once, and a way to run the real scripts on it."""

import base64
import contextlib
import io
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same digits on every machine; "0" runs the tests that want a GPU

import utils  # noqa: F401  it bounds the images that cv2 reads

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GROCERY = Path(os.environ.get("GROCERY", ROOT / "../shared/data/grocery")).resolve()
os.environ["HF_HUB_OFFLINE"] = "1"


# 24 x 16 pixels, red, green, blue and transparent quarters, to be turned by 90 degrees.
TURNED_HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWl4AAAAAG1pZjFoZWl4bWlhZgAAAq1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAAEZpbG9jAAAAAERAAAMAAQ"
    "AAAAAC0QABAAAAAAAAAFcAAgAAAAADKAABAAAAAAAAADYAAwAAAAADXgABAAAAAAAAACQAAABNaWluZgAAAAAAAwAAABVpbmZlAgAAAAABAABodmMxAAAAABVp"
    "bmZlAgAAAAACAABodmMxAAAAABVpbmZlAgAAAQADAABFeGlmAAAAAA5waXRtAAAAAAABAAABt2lwcnAAAAGNaXBjbwAAAHdodmNDAQQIAAAAnjgAAAAAHvAA/P"
    "/4+AAADwNgAAEAF0ABDAH//wQIAAADAJ44AAADAAAeugJAYQABACpCAQEECAAAAwCeOAAAAwAAHpAEECCy3VXTXNwENBgQAAADAZAAAAMAEIBiAAEACEQBwXMY"
    "MBiQAAAAE2NvbHJuY2x4AAEADQAGgAAAABRpc3BlAAAAAAAAAEAAAABAAAAAKGNsYXAAAAAYAAAAAQAAABAAAAAB////2AAAAAL////QAAAAAgAAABBwaXhpAA"
    "AAAAMICAgAAAAJaXJvdAMAAABxaHZjQwEECAAAAJ/4AAAAAB7wAPz8+PgAAA8DYAABABdAAQwB//8ECAAAAwCf+AAAAwAAHroCQGEAAQAmQgEBBAgAAAMAn/gA"
    "AAMAAB7AggQWW6q6a5sCAAADADIAAAMAAhBiAAEABkQBwXPBiQAAAA5waXhpAAAAAAEIAAAAJ2F1eEMAAAAAdXJuOm1wZWc6aGV2YzoyMDE1OmF1eGlkOjEAAA"
    "AAImlwbWEAAAAAAAAAAgABBoECAwWEhgACBocDCImEhgAAAChpcmVmAAAAAAAAAA5hdXhsAAIAAQABAAAADmNkc2MAAwABAAEAAAC5bWRhdAAAAFMoAa8JyG0I"
    "GiOZnz/ZP/7HyEAREBCvksezzH5usMi8fm6RVedU/CUkesBJ7UlIRKL1NTIgJaq1M9kXpW6A9Yawttg0ykqA57k2CaVzQOBgSV3PHAAAADIoAa4TkLcxYHRJk8"
    "ZzWlAP/bEVXPXuTrXfR+k3MExYVaZHfzk1dw3e/iRHR0DZFRwoLgAAAAZFeGlmAABNTQAqAAAACAABARIAAwAAAAEABgAAAAAAAA==")


def draw(label, rng, size=40):
    """A coloured shape on a noisy ground: colour and shape tell the class."""
    image = rng.integers(170, 255, (size, size + 8, 3), dtype=np.uint8)
    colour = [(200, 30, 30), (30, 180, 40), (40, 60, 210), (200, 190, 20)][label]
    x, y = (int(v) for v in rng.integers(14, 28, 2))
    if label % 2:
        cv2.circle(image, (x, y), 11, colour[::-1], -1)
    else:
        cv2.rectangle(image, (x - 10, y - 10), (x + 10, y + 10), colour[::-1], -1)
    return image


def make_data(folder, labels=("bottle", "can, \"0.5\" l", "우유", "tube"), train_each=6, test_each=3, seed=0):
    """The contract of the README in `folder`: train.csv, train/, test/, sample_submission.csv, solution.csv."""
    rng = np.random.default_rng(seed)
    (folder / "train").mkdir(parents=True)
    (folder / "test").mkdir()
    train, test = [], []
    for number, label in enumerate(labels):
        for i in range(train_each):
            name = f"train/{label.split(',')[0]}_{i}.png"
            cv2.imencode(".png", draw(number, rng))[1].tofile(folder / name)
            train.append((name, label))
        for i in range(test_each):
            name = f"q{i}{number}.jpg"
            cv2.imencode(".jpg", draw(number, rng))[1].tofile(folder / "test" / name)
            test.append((name, label))
    order = rng.permutation(len(test))
    pd.DataFrame(train, columns=["path", "label"]).to_csv(folder / "train.csv", index=False)
    test = pd.DataFrame(test, columns=["filename", "label"]).iloc[order]
    test.to_csv(folder / "solution.csv", index=False)
    test[["filename"]].assign(prediction=labels[0]).to_csv(folder / "sample_submission.csv", index=False)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


TINY = ["--size", "32", "--batch-size", "8", "--weights", "none", "--workers", "1", "--precision", "fp32"]


def script(name, *args, code=0):
    """Run a script as `python name args` would, in this process: importing torch anew takes longer than most of them.
    Checks the exit code, and that code 2 comes without a traceback. Returns what it printed: .stdout, .stderr."""
    out, error, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, args)])
        patch.chdir(ROOT)
        patch.syspath_prepend(str((ROOT / name).parent))  # as Python does for a script
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    done = SimpleNamespace(stdout=out.getvalue(), stderr=error.getvalue())
    assert status == code, f"{name} {args}: {status}\n{done.stdout}\n{done.stderr}"
    assert code != 2 or (done.stderr and "Traceback" not in done.stderr), done.stderr
    return done


def train(data, output, arch="test_efficientnet", fold=0, *more, **options):
    epochs = () if "--epochs" in more else ("--epochs", "3")
    return script("train.py", "--arch", arch, "--fold", fold, "--input", data, "--output", output, *TINY, *epochs, *more,
                  **options)


@pytest.fixture(scope="session")
def output(data, tmp_path_factory):
    """Two finished runs, extracted."""
    folder = tmp_path_factory.mktemp("output")
    train(data, folder, "test_efficientnet", 0)
    train(data, folder, "test_nfnet", 1, "--clip", "agc:0.01")
    script("extract.py", "--input", data, "--output", folder, "--workers", 1, "--precision", "fp32")
    return folder


@pytest.fixture(scope="session")
def labelled(data, output, tmp_path_factory):
    """A copy of these, with a submission and what to expect of it."""
    folder = shutil.copytree(output, tmp_path_factory.mktemp("labelled") / "o")
    script("retrieve.py", "--input", data, "--output", folder)
    script("scripts/expect.py", "--input", data, "--output", folder)
    return folder


@pytest.fixture
def finished(output, tmp_path):
    """A copy of the two finished runs, to be changed."""
    return shutil.copytree(output, tmp_path / "o")


def same(a, b):
    """Whether two state dicts hold the same tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
