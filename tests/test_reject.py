"""Photographs of products that are not in the catalogue: the threshold against a naive reference, what the scripts say then."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from utils import load_json, save_json

import app
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import script

import retrieve
from dataset import read_image, read_train


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def open_set(rng, classes=12, each=10, noise=0.35):
    """Two runs of clustered images in two folds: (runs with test images, half of them of products that are not in the gallery,
    fold, labels, whether a test image is known)."""
    labels = np.repeat(np.arange(classes), each)
    fold = rng.permutation(classes * each) % 2
    runs = []
    for k in range(2):
        centres = rng.normal(size=(2 * classes, 16))
        test = np.repeat(np.arange(2 * classes), each)
        x, q = (centres[of] + noise * rng.normal(size=(len(of), 16)) for of in (labels, test))
        runs.append({"fold": str(k), "train": x.astype(np.float32), "test": q.astype(np.float32), "stamp": {"k": k}})
    return runs, fold, labels, test < classes


def naive_strangeness(runs, fold, labels):
    """Share of held-out images, each without its product in the gallery, that are as near to it as a test image; one by one."""
    found, result = [], []
    for k, r in enumerate(runs):
        x = unit(r["train"].astype(np.float64))
        found.append([max(x[i] @ x[j] for j in range(len(x)) if labels[j] != labels[i]) for i in np.flatnonzero(fold == k)])
    for i in range(len(runs[0]["test"])):
        count = 1
        for near, r in zip(found, runs, strict=True):
            best = (unit(r["train"].astype(np.float64)) @ unit(r["test"][i:i + 1].astype(np.float64))[0]).max()
            count += sum(s >= best for s in near)
        result.append(count / (1 + sum(map(len, found))))
    return np.array(result)


def test_strangeness_equals_a_naive_reference(tmp_path):
    runs, fold, labels, _ = open_set(np.random.default_rng(0), classes=6, each=30)
    found = retrieve.strangers(runs, runs, fold, labels, labels, tmp_path, "cpu")
    expected = naive_strangeness(runs, fold, labels)
    near = retrieve.nearest_by_fold(runs, "cpu")
    assert np.allclose(retrieve.strangeness(near, found), expected, atol=2.5 / len(fold)) and expected.min() < 0.1
    again = retrieve.strangers(runs, runs, fold, labels, labels, tmp_path, "cpu")
    assert all(np.array_equal(found[k], again[k]) for k in found | again)
    other = [r | {"stamp": {"k": "trained since"}, "train": r["train"] + 1} for r in runs]
    assert not np.array_equal(retrieve.strangers(other, other, fold, labels, labels, tmp_path, "cpu")["0"], found["0"])


def test_the_nearest_of_another_label_is_found_behind_many_of_the_own():
    rng = np.random.default_rng(1)
    x = np.concatenate([np.eye(8)[0] + 0.05 * rng.normal(size=(700, 8)), rng.normal(size=(5, 8))]).astype(np.float32)
    labels, rows = np.repeat([0, 1], [700, 5]), np.array([3, 699, 702])
    near = retrieve.nearest_stranger([x], rows, retrieve.Joined([x]), labels[rows], labels, "cpu")
    cosine = unit(x) @ unit(x).T
    assert np.allclose(near, [cosine[i, labels != labels[i]].max() for i in rows], atol=1e-6)


def test_the_rate_of_false_accepts_is_the_wanted_one(tmp_path):
    """Nothing is trained here, so the held-out products are as new as the others: over many sets the rate is kept."""
    accepted, kept = [], []
    for seed in range(30):
        runs, fold, labels, known = open_set(np.random.default_rng(seed))
        found = retrieve.strangers(runs, runs, fold, labels, labels, tmp_path / str(seed), "cpu")
        accept = retrieve.strangeness(retrieve.nearest_by_fold(runs, "cpu"), found) <= 0.1
        accepted.append(accept[~known].mean())
        kept.append(accept[known].mean())
    assert 0.02 < np.mean(accepted) < 0.12 and np.mean(kept) > 0.8, "two runs averaged: at most the rate, rather less"


def test_products_left_out_correct_the_rate():
    strange = np.array([0.001, 0.02, 0.05, 0.9])
    assert np.allclose(retrieve.calibrated(strange, [0.5, 0.01, 0.04]), [1 / 4, 2 / 4, 3 / 4, 1])


def test_rejected_photographs_are_unknown(data, finished, monkeypatch):
    flags, photos = ["--input", data, "--output", finished], data / "test"
    script("retrieve.py", *flags)
    labels = pd.read_csv(finished / "submission.csv", dtype=str)["prediction"]
    said, rejected = script("retrieve.py", *flags, "--reject", 0.5), []
    assert "leave_out.py measures" in said.stderr
    assert "photographs tell what is strange, so give 0.091 or more" in script(
        "retrieve.py", *flags, "--reject", 0.05, code=2).stderr
    for rate in (0.1, 0.5, 0.95):
        script("retrieve.py", *flags, "--reject", rate)
        table, truth = (pd.read_csv(f, dtype=str) for f in (finished / "submission.csv", data / "solution.csv"))
        kept = table["prediction"] != "unknown"
        scores = json.loads((finished / "scores.json").read_text())["reject"]
        assert table["prediction"][kept].equals(labels[kept]) and scores["kept"] == pytest.approx(kept.mean(), abs=1e-3)
        right = (table["prediction"] == truth["label"])[kept].mean()
        assert scores["accuracy_kept"] == (pytest.approx(right, abs=1e-3) if kept.any() else None)
        rejected.append(set(table["filename"][~kept]))
    script("scripts/expect.py", *flags, "--altered", 4)
    of_all = load_json(finished / "expected.json")["true"]
    assert of_all == load_json(finished / "scores.json")["test"]["nearest"]
    assert rejected[0] >= rejected[1] >= rejected[2] and len(rejected[0]) > len(rejected[2])
    rows = json.loads(script("scripts/classify.py", photos, *flags, "--reject", rate, "--json").stdout)
    by_name = {row["photo"].rsplit("/", 1)[1]: row for row in rows}
    assert [by_name[name]["label"] for name in table["filename"]] == table["prediction"].tolist()
    assert all(by_name[name]["confidence"] is None for name in rejected[2])
    monkeypatch.setattr(sys, "argv", ["app.py", *map(str, flags), "--reject", str(rate)])
    labeller = app.Labeller(app.parse_args(), torch.device("cpu"))
    assert [labeller.label(read_image(photos / name))["label"] for name in table["filename"]] == table["prediction"].tolist()
    recipe = load_json(finished / "test_nfnet" / "fold1" / "args.json")
    stamp = load_json(finished / "test_nfnet" / "fold1" / "extract.json")
    left = {"recipes": {"test_nfnet/fold1": recipe}, "embedded": {"test_nfnet/fold1": retrieve.embedding_settings(stamp)},
            "train": stamp["train"], "strangeness": [0.0] * 99}
    (finished / "left_out.json").write_text(json.dumps(left))
    assert "leave_out.py" not in script("retrieve.py", *flags, "--reject", 0.95).stderr
    assert (pd.read_csv(finished / "submission.csv")["prediction"] == "unknown").all(), "all left out look known"
    for other in ({"recipes": {"test_nfnet/fold1": recipe | {"lr": 9}}}, {"train": "of other images"},
                  {"embedded": {"test_nfnet/fold1": [[64], None, False, "squash"]}}):
        (finished / "left_out.json").write_text(json.dumps(left | other))
        assert retrieve.left_out(finished, read_train(data)) is None
    assert "leave_out.py measures" in script("retrieve.py", *flags, "--reject", 0.95).stderr, "it was for another recipe"
    assert "--reject: 1 is no number in (0, 1)" in script("retrieve.py", *flags, "--reject", 1, code=2).stderr


def test_left_out_products_are_trained_without_and_measured(data, finished, monkeypatch):
    flags = ["--input", data, "--output", finished]

    def here(command):
        script(Path(command[1]).name, *command[2:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("subprocess.run", here)  # in this process: sooner done
    said = script("scripts/leave_out.py", *flags, "--runs", "test_efficientnet/fold0").stdout
    figures = json.loads((finished / "left_out.json").read_text())
    assert len(figures["labels"]) == 1 and len(figures["strangeness"]) == 6 and "of 6 photographs of 1 products" in said
    assert not set(pd.read_csv(finished / "left_out" / "input" / "train.csv")["label"]) & set(figures["labels"])
    logs = [pd.read_csv(folder / "test_efficientnet/fold0/log.csv") for folder in (finished, finished / "left_out")]
    assert logs[0]["retrieval_acc"].isna().tolist() == logs[1]["retrieval_acc"].isna().tolist(), "validated as often"
    recipes = [json.loads((folder / "test_efficientnet" / "fold0" / "args.json").read_text())
               for folder in (finished, finished / "left_out")]
    assert recipes[0] == recipes[1]
    assert "leaves out 0 of 4" in script("scripts/leave_out.py", *flags, "--share", 0.1, code=2).stderr
    assert "is of other products" in script("scripts/leave_out.py", *flags, "--seed", 1, code=2).stderr


def test_a_product_of_the_name_unknown_and_runs_that_held_nothing_out_are_refused(data, finished):
    flags = ["--input", data, "--output", finished]
    pd.DataFrame({"path": ["test/q00.jpg"], "label": ["unknown"]}).to_csv(data / "unknown.csv", index=False)
    script("scripts/add_products.py", data / "unknown.csv", *flags)
    assert "'unknown' is a label" in script("retrieve.py", *flags, "--reject", 0.1, code=2).stderr
    script("scripts/add_products.py", "--remove", "unknown", *flags)
    for stamp in finished.glob("*/fold*/extract.json"):
        save_json(stamp, load_json(stamp) | {"fold": "all"})
    assert "held images out" in script("retrieve.py", *flags, "--reject", 0.1, code=2).stderr
