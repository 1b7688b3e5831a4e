"""The expected accuracy: evidence against a brute force, the calibration on cases with a known answer."""

import json
import shutil

from utils import InputError, load_json, save_json

import bench_expect
import expect
import numpy as np
import pandas as pd
import pytest
import torch
from alterations import ALTERATIONS, SHIFTS, AlteredImages
from conftest import script
from sklearn.dummy import DummyRegressor

from dataset import Images
from extract import embed_as_extracted


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


def test_halves_vote_by_their_nearest_image_not_of_the_own_look():
    labels, train = np.array([0, 1, 1]), np.float32([[1, 0], [0, 1], [0.6, 0.8]])
    given = [train[np.array(row)] for row in ([0, 0, 1], [0, 1, 1], [0, 0, 0])]
    votes = expect.half_votes([{"train": train}] * 3, given, labels, "cpu")
    # image 1: run 1 is alone; with another it is tied, and then 0.6 + 0.8 of the third image beats 1 + 0
    assert votes.shape == (3, 2, 3) and votes[..., 0].max() == 0 and sorted(votes[..., 1].ravel()) == [0, 0, 0, 1, 1, 1]
    strangers = expect.half_votes([{"train": train}] * 3, given, labels, "cpu", np.array([0, 0, 0]), np.arange(3))
    assert (strangers == 1).all(), "the first image is of the own look"
    assert expect.half_votes([{"train": train}], given[:1], labels, "cpu").shape == (0, 2, 3)
    near = expect.search_other_looks(train, train, 2, "cpu", np.array([0, 1, 1]), np.array([0, 1, 1]))
    assert near[1].tolist() == [[2, 1], [0, 1], [0, 1]]
    assert np.isneginf(near[0]).tolist() == [[False, False], [False, True], [False, True]]


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


def blurry_set(blur, count=400, classes=8, runs=4, seed=0, collapse=0.0):
    """Images whose similarities to their class fade with `blur`, and to class 0 grow with `collapse`: as of altered_sets."""
    rng = np.random.default_rng((seed, int(100 * blur), int(100 * collapse)))
    truth = rng.integers(0, classes, count)
    shared, own = rng.normal(size=(count, classes)), rng.normal(size=(runs, count, classes))
    each = np.eye(classes)[truth] + blur * (0.6 * shared + own) + collapse * np.eye(classes)[0]
    splits = [(s, ~s) for s in expect.halves(runs)]
    return {"names": (f"{blur} {collapse}",), "best": each.mean(0).astype(np.float32), "truth": truth,
            "votes": np.array([[each[half].mean(0).argmax(1) for half in pair] for pair in splits])}


@pytest.mark.parametrize("blur, collapse", [(0.55, 0.0), (0.9, 0.0), (0.3, 1.2)])
def test_what_is_learned_from_altered_sets_holds_on_another(blur, collapse):
    prior = np.full(8, 1 / 8)
    sets = [blurry_set(b, collapse=c) for b in (0.0, 0.2, 0.4, 0.7, 1.1) for c in (0.0, 0.5, 1.0, 1.5)]
    (learned, error), test = expect.learn(sets, prior), blurry_set(blur, seed=1, collapse=collapse)
    said = test["best"].argmax(1)
    confidence, right = expect.confide(test["best"], test["votes"], said, learned, prior), said == test["truth"]
    assert right.mean() < 0.9 and abs(confidence.mean() - right.mean()) < 0.13
    assert confidence[right].mean() > confidence[~right].mean()
    held = expect.calibrate(sets[4]["best"], sets[4]["truth"])
    if collapse:
        assert expect.probability(test["best"], held).mean() > right.mean() + 0.25, "held-out images do not know collapses"
    assert 0.03 < error < 0.2
    assert abs(learned["excess"].predict([[1e3, 1e3]])[0]) < 1e-9, "nothing is corrected far from all that is known"
    alone = expect.calibrate_alone(test["best"], test["votes"], learned, prior)
    assert np.allclose(expect.confide_alone(test["best"], test["votes"], alone), confidence)
    other = np.where(np.arange(len(said)) % 3, said, (said + 1) % 8)
    voted = expect.confide(test["best"], test["votes"], other, learned, prior, gain=0.05)
    assert voted.mean() == pytest.approx(confidence.mean() + 0.05), "of another vote: as much better as it is out-of-fold"
    assert voted[other == said].mean() > voted[other != said].mean() + 0.1


def test_the_excess_is_taken_off_within_what_the_sets_can_tell():
    prior, sets = np.full(8, 1 / 8), [blurry_set(b, count=60) for b in (0.0, 0.4, 0.8, 1.2)]
    (learned, _), test = expect.learn(sets, prior), blurry_set(0.2, seed=1)

    def mean(count, **changed):
        said = test["best"][:count].argmax(1)
        return expect.confide(test["best"][:count], test["votes"][..., :count], said, learned | changed, prior).mean()

    nothing, much = (DummyRegressor(strategy="constant", constant=c).fit([[0, 0]], [0]) for c in (0, 5))
    plain = mean(400, excess=nothing)
    some = DummyRegressor(strategy="constant", constant=0.1).fit([[0, 0]], [0])
    assert plain > 0.8 and np.isclose(mean(400, excess=some), plain - 0.1)
    assert np.isclose(mean(400, excess=much), 1 / 62), "sets of 60 do not tell of less"
    assert min(mean(n, excess=nothing) for n in (1, 2, 3)) > 0.7, "few images are no reason to doubt"
    assert mean(400, excess=nothing, offset=1e3) > 0.999 and mean(400, excess=nothing, offset=-1e3) < 0.001


def test_altered_images_go_alteration_by_alteration(data):
    paths = pd.read_csv(data / "train.csv")["path"][:2]
    images, plain = AlteredImages(data, paths, [0, 1], 48, "squash", 0), Images(data, paths, [0, 1], 48)
    at = {names: i for i, names in enumerate(ALTERATIONS)}
    assert len(images) == 2 * len(ALTERATIONS) and torch.equal(images[1][0], plain[1][0])
    grey, label = images[2 * at["grey",] + 1]
    assert label == 1 and torch.equal(grey[0], grey[1]) and not torch.equal(images[2 * at["dark",]][0], plain[0][0])
    both = images[2 * at["grey", "shadowed"]][0]
    assert torch.equal(both[0], both[2]) and torch.equal(both, images[2 * at["grey", "shadowed"]][0]), "the same each time"
    assert images.at(32)[2 * at["grey",] + 1][0].shape == (3, 32, 32)
    assert torch.equal(images[1][0], plain[1][0]), "no alteration writes into what is kept"


@pytest.mark.parametrize("name", SHIFTS)
def test_an_alteration_changes_the_pixels_and_nothing_else(name):
    for side in (50, 64, 97):
        image = torch.randint(256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))
        before = image.clone()
        altered = SHIFTS[name](image)
        assert altered.shape == image.shape and altered.dtype == torch.uint8 and torch.equal(image, before)
        assert not torch.equal(altered, image)


def test_altered_images_are_made_once_for_runs_of_one_size(data, output):
    def make(size, resize):
        made.append(size)
        return Images(data, paths, np.zeros(3, np.int64), size, resize)

    paths, made = pd.read_csv(data / "train.csv")["path"][:3], []
    names = ["test_efficientnet/fold0", "test_nfnet/fold1"]
    runs = [{"name": name, "stamp": load_json(output / name / "extract.json")} for name in names]
    found = embed_as_extracted(runs, output, make, torch.device("cpu"), 0)
    assert made == [32]
    for name in names:
        assert np.allclose(found[name], np.load(output / name / "train.npy")[:3], atol=1e-5)
    runs[0]["stamp"]["sizes"] = [48, 32]
    apart = embed_as_extracted(runs, output, make, torch.device("cpu"), 0)
    assert made[1:] == [48, 32] and np.array_equal(apart[names[1]], found[names[1]])
    assert not np.allclose(apart[names[0]], found[names[0]], atol=1e-3)


def test_crowding_by_hand():
    assert expect.collapse(np.array([0, 1, 2, 3]), np.ones(4)) == pytest.approx(np.log(2 / 5))
    assert expect.collapse(np.array([2]), np.ones(4)) == 0
    assert expect.collapse(np.zeros(500, np.int64), np.ones(4)) == pytest.approx(np.log(4), abs=1e-3)
    rng = np.random.default_rng(0)
    for classes in (4, 1000):
        for count in (10, 100, 9000):
            found = [expect.collapse(rng.integers(0, classes, count), np.ones(classes)) for _ in range(20)]
            assert np.abs(np.median(found)) < 0.3, "of any size"
            assert np.max(np.abs(found)) < 2, "few images do not tell much"


def test_baselines_by_hand():
    held, right, test = np.array([0.9, 0.8, 0.7, 0.2]), np.array([1, 1, 1, 0]), np.array([0.9, 0.6, 0.4, 0.1])
    assert expect.average_thresholded_confidence(held, right, test) == 0.5  # threshold 0.575
    assert np.isclose(expect.difference_of_confidences(held, right, test), 0.75 - (0.65 - 0.5))


def test_sets_are_told_apart_only_if_they_differ():
    x = np.random.default_rng(2).normal(size=(400, 4)).astype(np.float32)
    assert abs(expect.tell_apart(x[:200], x[200:], 0) - 0.5) < 0.1
    assert expect.tell_apart(x[:200], x[200:] + 9, 0) > 0.99
    assert expect.tell_apart(x[:3], x[200:] + 9, 0) > 0.6 and expect.tell_apart(x[:1], x, 0) is None


def test_the_expected_accuracy_is_written_beside_the_submission(data, finished):
    output = finished
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
    scores, expected = load_json(output / "scores.json"), {}
    for gain in (-0.1, -0.3):
        save_json(output / "scores.json", scores | {"oof": scores["oof"] | {"head": scores["oof"]["nearest"] + gain}})
        script("scripts/expect.py", "--input", data, "--output", output)
        expected[gain] = load_json(output / "expected.json")["expected"]
    assert expected[-0.1] - expected[-0.3] == pytest.approx(0.2, abs=2e-4)
    table = pd.read_csv(output / "confidence.csv", dtype=str)
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


def test_the_bench_alters_test_images_and_takes_parts_of_them(data, finished):
    said = script("scripts/bench_expect.py", "--input", data, "--output", finished, "--shifts", "none", "grey", "--parts", 2,
                  "--altered", 4, "--workers", 0).stdout
    table = pd.read_csv(finished / "expected.csv")
    assert table["shift"].tolist() == ["none", "grey", *(f"{w} {i} of 2" for w in ("middle", "border") for i in (1, 2))]
    assert "mean absolute error" in said and table["true"].between(0, 1).all() and table["expected"].between(0, 1).all()
    names = pd.read_csv(data / "sample_submission.csv")["filename"]
    parts = bench_expect.clusters(data / "test", names, 2, 0)
    middle = [parts[f"middle {i} of 2"] for i in (1, 2)]
    assert sorted(np.concatenate(middle)) == list(range(12))
    truth = pd.read_csv(data / "solution.csv")["label"].to_numpy()
    assert not set(truth[middle[0]]) & set(truth[middle[1]]), "the tiny set's products differ by their colours"
