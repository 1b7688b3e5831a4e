"""Photographs of products that are not in the catalogue: the threshold against a naive reference, what the scripts say then."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import script

import catalogue


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


def naive_log_odds(cosine, of, b):
    """Log odds of the class with the best similarity among those of the images, one list of cosines and labels."""
    best = [max(c for c, label in zip(cosine, of, strict=True) if label == name) for name in sorted(set(of))]
    first, *others = sorted(best, reverse=True)
    return b * first - np.log(sum(np.exp(b * x) for x in others))


def test_strangeness_equals_a_naive_reference(tmp_path):
    """Share of the held-out images, each without its product in the gallery, whose evidence is as high as a test image's."""
    runs, fold, labels, _ = open_set(np.random.default_rng(0), classes=6, each=15)
    b, found = catalogue.strangers(runs, fold, labels, tmp_path, "cpu")
    got = catalogue.strangeness(runs, labels, b, found, "cpu")
    x, q = ([unit(r[split].astype(np.float64)) for r in runs] for split in ("train", "test"))
    evidence = []
    for k in range(2):
        for i in np.flatnonzero(fold == k):
            cosine = x[k][labels != labels[i]] @ x[k][i]
            of = labels[labels != labels[i]]  # no image of its own product is there: it counts as one at the least similarity
            evidence.append((k, naive_log_odds([*cosine, cosine.min()], [*of, labels[i]], b)))
    for i in range(len(got)):
        mine = [naive_log_odds(x[k] @ q[k][i], labels, b) for k in range(2)]
        count = sum(e >= mine[k] for k, e in evidence)
        assert got[i] == pytest.approx((1 + count) / (1 + len(fold)), abs=1.5 / len(fold))
    assert got.min() < 0.05 and got.max() > 0.5


def test_strangers_are_kept_for_the_same_runs_only(tmp_path):
    runs, fold, labels, _ = open_set(np.random.default_rng(0))
    b, found = catalogue.strangers(runs, fold, labels, tmp_path, "cpu")
    again = catalogue.strangers(runs, fold, labels[::-1], tmp_path, "cpu")  # read, whatever else is given
    assert again[0] == b and all(np.array_equal(found[k], again[1][k]) for k in ("0", "1"))
    others = [r | {"stamp": {"k": "trained since"}, "train": r["train"] + 1} for r in runs]
    assert not np.array_equal(catalogue.strangers(others, fold, labels, tmp_path, "cpu")[1]["0"], found["0"])


def test_the_rate_of_false_accepts_is_kept(tmp_path):
    """Nothing is trained here, so held-out products are as new as the others: over many sets at most the rate is accepted."""
    accepted, kept = [], []
    for seed in range(20):
        runs, fold, labels, known = open_set(np.random.default_rng(seed))
        found = catalogue.strangers(runs, fold, labels, tmp_path / str(seed), "cpu")
        accept = catalogue.strangeness(runs, labels, *found, "cpu") <= 0.1
        accepted.append(accept[~known].mean())
        kept.append(accept[known].mean())
    assert 0.01 < np.mean(accepted) < 0.12 and np.mean(kept) > 0.8


@pytest.fixture
def output(output, tmp_path):
    return shutil.copytree(output, tmp_path / "o")


def test_rejected_photographs_are_unknown(data, output):
    flags, photos = ["--input", data, "--output", output], data / "test"
    script("retrieve.py", *flags)
    labels = pd.read_csv(output / "submission.csv", dtype=str)["prediction"]
    rejected = []
    for rate in (0.05, 0.5, 0.95):
        script("retrieve.py", *flags, "--reject", rate)
        table, truth = (pd.read_csv(f, dtype=str) for f in (output / "submission.csv", data / "solution.csv"))
        kept = table["prediction"] != "unknown"
        scores = json.loads((output / "scores.json").read_text())["reject"]
        assert table["prediction"][kept].equals(labels[kept]) and scores["kept"] == pytest.approx(kept.mean(), abs=1e-3)
        right = (table["prediction"] == truth["label"])[kept].mean()
        assert scores["accuracy_kept"] == (pytest.approx(right, abs=1e-3) if kept.any() else None)
        rejected.append(set(table["filename"][~kept]))
    assert rejected[0] >= rejected[1] >= rejected[2] and len(rejected[0]) > len(rejected[2])
    rows = json.loads(script("scripts/classify.py", photos, *flags, "--reject", rate, "--json").stdout)
    by_name = {row["photo"].rsplit("/", 1)[1]: row for row in rows}
    assert [by_name[name]["label"] for name in table["filename"]] == table["prediction"].tolist()
    assert all(by_name[name]["confidence"] is None for name in rejected[2])
    assert "--reject must be" in script("retrieve.py", *flags, "--reject", 1, code=2).stderr


def test_a_product_of_the_name_unknown_and_runs_that_held_nothing_out_are_refused(data, output):
    flags = ["--input", data, "--output", output]
    pd.DataFrame({"path": ["test/q00.jpg"], "label": ["unknown"]}).to_csv(data / "unknown.csv", index=False)
    script("scripts/add_products.py", data / "unknown.csv", *flags)
    assert "'unknown' is a label" in script("retrieve.py", *flags, "--reject", 0.1, code=2).stderr
    script("scripts/add_products.py", "--remove", "unknown", *flags)
    for stamp in output.glob("*/fold*/extract.json"):
        stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"fold": "all"}))
    assert "held images out" in script("retrieve.py", *flags, "--reject", 0.1, code=2).stderr
