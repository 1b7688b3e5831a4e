"""The expected accuracy: evidence against a brute force, the calibration on cases with a known answer."""

import json
import shutil
import sys

from utils import InputError, load_json, save_json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, script

sys.path.insert(0, str(ROOT / "scripts"))
import expect


def test_evidence_by_hand():
    similarity, label = np.array([[0.9, 0.8, 0.5, 0.4]], np.float32), np.array([[2, 2, 0, 1]])
    best = expect.class_best(similarity, label, 4)
    assert np.allclose(best, [[0.5, 0.4, 0.9, 0.4]])
    chance = np.exp(1.8) / np.exp(2 * best).sum()
    assert np.allclose(expect.log_odds(best, 2.0), np.log(chance / (1 - chance)))
    gone = np.array([[-np.inf, -np.inf, 0.5, 0.4]], np.float32)
    assert np.allclose(expect.class_best(gone, label, 4), [[0.5, 0.4, 0.4, 0.4]])


def test_held_out_images_meet_all_others_or_only_other_looks():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 8)).astype(np.float32), np.repeat(np.arange(5), 12)
    looks = labels * 3 + np.tile(np.repeat([0, 1, 2], 4), 5)
    rows = np.flatnonzero(rng.random(60) < 0.4)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = unit[rows] @ unit.T
    cosine[np.arange(len(rows)), rows] = -1
    strange = np.where(looks[None] == looks[rows, None], -1, cosine)
    random, look = expect.held_out([x], rows, labels, looks, 5, "cpu")
    for got, all_of_them in ((random, cosine), (look, strange)):
        assert np.allclose(got, np.stack([all_of_them[:, labels == c].max(1) for c in range(5)], 1), atol=1e-5)


def test_looks_are_folds_or_clusters():
    labels, fold = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 0, 0, -1, 1])
    looks = expect.own_looks([np.zeros((6, 2), np.float32)], labels, fold, 5, 0)
    assert looks[0] == looks[2] and len(set(looks)) == 5
    x = np.array([[1, 0], [1, 0.01], [0, 1], [1, 0], [0, 1], [0.01, 1]], np.float32)
    looks = expect.own_looks([x], labels, None, 2, 0)
    assert looks[0] == looks[1] != looks[2] and looks[4] == looks[5] != looks[3] and len(set(looks)) == 4


@pytest.mark.parametrize("by, expected", [("look", [0, 1, 1, 0]), ("group", [1, 0, 0, 1]), ("random", None)])
def test_looks_are_known_where_folds_were_drawn_by_them(tmp_path, by, expected):
    train = pd.DataFrame({"path": list("abcd"), "label": list("xxyy"), "group": ["shop", "market", "market", "shop"]})
    train[["path", "label"]].assign(fold=[0, 1, 1, 0], by=by).to_csv(tmp_path / "folds.csv", index=False)
    known = expect.known_looks(tmp_path, train, np.array([0, 1, 1, 0]))
    if by == "group":
        with pytest.raises(InputError, match="put it back"):
            expect.known_looks(tmp_path, train.drop(columns="group"), np.array([0, 1, 1, 0]))
    assert known is None if expected is None else known.tolist() == expected


def test_calibration_finds_the_true_probability():
    """Similarities whose classes truly compete by a softmax: the calibrated mean is the accuracy, on other data, too."""
    rng = np.random.default_rng(1)
    best = rng.uniform(0.2, 0.9, (20000, 5)).astype(np.float32)
    chance = np.exp(12 * best.astype(np.float64))
    chance /= chance.sum(1, keepdims=True)
    truth = (chance.cumsum(1) < rng.random((20000, 1))).sum(1)
    assert abs(expect.fit_sharpness(best[:10000], truth[:10000]) - 12) < 0.5
    calibration = expect.calibrate(best[:10000], truth[:10000])
    easy = best[10000:] * 1.1  # another distribution of the same evidence
    chance = np.exp(12 * easy.astype(np.float64))
    chance /= chance.sum(1, keepdims=True)
    assert np.abs(expect.probability(easy, calibration) - chance.max(1)).mean() < 0.03


def test_perfect_held_out_images_make_no_certainty():
    best = np.tile(np.float32([0.9, 0.1, 0.1]), (50, 1))
    calibration = expect.calibrate(best, np.zeros(50, np.int64))
    assert expect.probability(best, calibration).max() <= 51 / 52
    assert expect.probability(np.float32([[0.5, 0.5, 0.5]]), calibration) == pytest.approx(1 / 3, abs=1e-3)


def test_many_images_a_class_do_not_blunt_the_evidence():
    """More images a class than neighbours looked at: test images as the held-out ones get the same evidence."""
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(3), 200)
    x = (np.eye(3, 8)[labels] + 0.3 * rng.normal(size=(600, 8))).astype(np.float32)
    rows = np.arange(0, 600, 3)
    held = expect.held_out([x], rows, labels, np.arange(600), 3, "cpu")
    similarity, index = expect.topk(x[rows], x, expect.NEIGHBOURS, rows)
    assert all(np.allclose(part, expect.class_best(similarity, labels[index], 3)) for part in held)


def test_halves_are_different_splits_of_all_runs():
    assert expect.halves(1).shape == (0, 1) and expect.halves(2).tolist() == [[False, True]] and len(expect.halves(3)) == 3
    for count in (4, 5, 10, 40):
        split = expect.halves(count)
        assert len(np.unique(np.concatenate([split, ~split]), axis=0)) == 2 * len(split) and 2 < len(split) <= expect.SPLITS
        assert set(split.sum(1)) <= {count // 2, (count + 1) // 2}


def test_agreement_is_of_both_halves():
    labels, train = np.array([0, 1]), np.eye(2, dtype=np.float32)
    given = [np.eye(2, dtype=np.float32)[np.array(row)] for row in ([0, 0, 1], [0, 1, 1], [0, 0, 0])]
    runs = [{"train": train, "test": test} for test in given]
    votes = expect.half_votes(runs, labels, "cpu")
    # image 1: run 1 is alone; with another it is tied, and the label 0 has the lower index: it says 1 only as a half of its own
    one = 0.5 + 0.6 / 3
    assert votes.shape == (3, 2, 3)
    said, level = expect.agreement(votes, np.array([0, 0, 0]), np.ones(3), np.ones(2), 3)
    assert np.allclose(said, [1, (2 + one * level) / 3, one * level])
    assert level == pytest.approx(said.mean())
    said = expect.agreement(votes, np.array([0, 0, 1]), np.array([0.5, 1, 0.8]), np.array([0.5, 1]), 3, 0.5)[0]
    assert np.allclose(said, [0.25, (1 + one * 0.5) / 3, one * 0.5])
    said = expect.agreement(np.array([[[1, 0], [1, 1]]]), np.array([0, 0]), np.ones(2), np.ones(2), 3, 0.5)[0]
    assert np.allclose(said, [one * 0.25, one * 0.5])
    assert expect.half_votes(runs[:1], labels, "cpu").shape == (0, 2, 3)


@pytest.mark.parametrize("guess", [[0.25] * 4, [0.85, 0.05, 0.05, 0.05], [0.1, 0.2, 0.3, 0.4]])
@pytest.mark.parametrize("known", [0.0, 0.4, 0.9, 1.0])
def test_agreement_by_chance_is_no_accuracy(guess, known):
    """Both halves know a share of the images and guess the others: agreement beyond chance is the accuracy of a half where all
    classes are guessed alike, and else lies between it (less what rare classes would gain) and the agreement."""
    rng, count = np.random.default_rng(4), 40000
    truth = rng.integers(0, 4, count)
    sure = rng.random(count) < known
    votes = np.array([[np.where(sure, truth, rng.choice(4, count, p=guess)) for _ in range(2)] for _ in range(3)])
    kept, right = expect.beyond_chance(votes, np.full(4, 0.25)), (votes[:, 0] == truth).mean()
    got, plain = (((votes[:, 0] == votes[:, 1]) * k[votes[:, 0]]).mean() for k in (kept, np.ones(4)))
    assert right - 0.05 < got <= plain and (known or got < right + 0.01)
    assert abs(got - right) < 0.01 or guess[0] != 0.25
    assert expect.beyond_chance(votes[:, :, :1], np.full(4, 0.25)).tolist() == [1] * 4, "one image tells nothing"


def test_runs_that_disagree_lower_the_confidence_and_one_run_has_the_evidence():
    rng = np.random.default_rng(5)
    best, truth = rng.random((400, 3)).astype(np.float32), rng.integers(0, 3, 400)
    calibration, said = expect.calibrate(best, truth), best.argmax(1)
    agreed = np.broadcast_to(said, (10, 2, 400))
    confidence, evidence, level = expect.confide(best, calibration, agreed, np.ones(3), 10, said)
    assert np.array_equal(confidence, evidence) and level == pytest.approx(evidence.mean())
    votes = np.where(rng.random((10, 2, 400)) < 0.8, said, (said + 1) % 3)
    confidence, evidence, level = expect.confide(best, calibration, votes, np.ones(3), 10, said)
    assert level == pytest.approx(confidence.mean()) and 0 < level < evidence.mean()
    alone = expect.confide(best, calibration, votes[:0], np.ones(3), 10, said)
    assert (alone[0] == evidence).all() and alone[2] == evidence.mean()


def test_baselines_by_hand():
    held, right, test = np.array([0.9, 0.8, 0.7, 0.2]), np.array([1, 1, 1, 0]), np.array([0.9, 0.6, 0.4, 0.1])
    assert expect.average_thresholded_confidence(held, right, test) == 0.5  # threshold 0.575
    assert np.isclose(expect.difference_of_confidences(held, right, test), 0.75 - (0.65 - 0.5))


def test_sets_are_told_apart_only_if_they_differ():
    x = np.random.default_rng(2).normal(size=(400, 4)).astype(np.float32)
    assert abs(expect.tell_apart(x[:200], x[200:], 0) - 0.5) < 0.1
    assert expect.tell_apart(x[:200], x[200:] + 9, 0) > 0.99
    assert expect.tell_apart(x[:3], x[200:] + 9, 0) > 0.6 and expect.tell_apart(x[:1], x, 0) is None


def test_the_expected_accuracy_is_written_beside_the_submission(data, output):
    script("retrieve.py", "--input", data, "--output", output)
    said = script("scripts/expect.py", "--input", data, "--output", output).stdout
    table = pd.read_csv(output / "confidence.csv", dtype={"filename": str, "prediction": str})
    assert table["filename"].tolist() == pd.read_csv(data / "sample_submission.csv", dtype=str)["filename"].tolist()
    figures = json.loads((output / "expected.json").read_text())
    assert figures["expected"] == pytest.approx(table["confidence"].mean(), abs=1e-3)
    assert 0 <= figures["low"] < figures["expected"] < figures["high"] <= 1 and "on these test images expect" in said
    submission = pd.read_csv(output / "submission.csv", dtype=str)
    assert submission["prediction"].tolist() == table["prediction"].tolist()
    scores = json.loads((output / "scores.json").read_text())
    assert figures["vote"] == "nearest" and figures["true"] == scores["test"]["nearest"]


def test_the_expectation_is_of_the_submitted_vote(data, output, tmp_path):
    output = shutil.copytree(output, tmp_path / "output")
    folds = pd.read_csv(output / "folds.csv")
    folds.drop(columns="check").assign(by="look").to_csv(output / "folds.csv", index=False)
    script("retrieve.py", "--input", data, "--output", output, "--vote", "head")
    script("scripts/expect.py", "--input", data, "--output", output)
    table, scores = pd.read_csv(output / "confidence.csv", dtype=str), load_json(output / "scores.json")
    assert table["prediction"].tolist() == pd.read_csv(output / "submission.csv", dtype=str)["prediction"].tolist()
    assert json.loads((output / "expected.json").read_text())["vote"] == "head"
    held = pd.read_csv(output / "oof.csv", dtype=str).dropna()
    assert (held["prediction"] == held["label"]).mean() == pytest.approx(scores["oof"]["head"], abs=1e-4)
    for old in ({"stamps": "of embeddings before these"}, {"submission": "of one before this"}):
        save_json(output / "scores.json", scores | old)
        assert "retrieve.py again" in script("scripts/expect.py", "--input", data, "--output", output, code=2).stderr
        assert (output / "confidence.csv").exists(), "what fails deletes nothing"


def test_another_label_than_the_nearest_has_odds_of_its_own():
    best = np.array([[0.9, 0.8, 0.1], [0.9, 0.2, 0.1]], np.float32)
    chance = np.exp(10 * best.astype(np.float64))
    chance /= chance.sum(1, keepdims=True)
    assert np.allclose(expect.log_odds(best, 10.0, np.array([1, 0])), np.log(1 / (1 / chance[[0, 1], [1, 0]] - 1)), atol=1e-4)
    truth, said = np.array([1] * 50 + [0] * 50), np.array([1] * 100)
    calibration = expect.calibrate(np.repeat(best, 50, 0), truth, said)
    assert expect.probability(best, calibration, said[:2]).round(1).tolist() == [1, 0]
