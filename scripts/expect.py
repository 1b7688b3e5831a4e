"""The accuracy to expect on the test images, before their labels are known; and how likely each label is right.

1. altered_sets: training images are altered (alterations.py: darker, blurred, ...; two ways at once), a set per alteration, and
   labelled by their nearest image of another look (a cluster of alike images of a class). So it is known which are right.
2. fit: a logistic regression learns from these sets how likely a label is right, by five `signs`:
     evidence   of the image: the log odds of its class against all others
     agreement  of the image: how often two random halves of the runs both give its label
     chance     of its class: how much of the halves' agreement on it is more than chance
     evidence   of the set: its mean over the images
     collapse   of the set: how much oftener than by chance two of its images get the same label
   Each set counts alike, whatever its size, and again as the images of a quarter and of half of its classes, so that a test
   set of few products is not taken for a collapse.
3. fit: by how much step 2 says too much of whole sets is learned by their two signs (kernel ridge regression), and subtracted.
4. learn: how far that is off on alterations left out of the learning gives the width of the interval.
5. submitted: another vote than the nearest image counts as better by what it gains out-of-fold, where folds see a shift.

Reads  what retrieve.py reads and, if it ran, what it writes; training images, best.pt of the runs
Writes output/confidence.csv (filename,prediction,confidence,similarity in the order of the submission), output/expected.json,
       output/altered.npz

    python scripts/expect.py
    python scripts/expect.py --input input/demo --output output/demo
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import (
    InputError,
    accuracy,
    file_fingerprint,
    load_json,
    load_npz,
    lock,
    pick_device,
    run,
    save_csv,
    save_json,
    save_npz,
    script_parser,
)

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dataset import (
    encode,
    folds_by,
    has_test,
    load_folds,
    load_test,
    load_train,
    make_look_folds,
    number_of,
    read_csv,
    read_solution,
    read_test,
    with_bad,
    workers_flag,
)
from extract import embed_as_extracted
from retrieve import UNKNOWN, by_fold, check_submission, grow, load_runs, runs_digest
from search import Joined, merge, topk

NEIGHBOURS = 100  # looked at for the evidence: enough that several classes are among them
LOOKS = 5  # a class is split into, where the folds are not by look
SPLITS = 10  # of the runs into two halves


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", metavar="ARCH/foldK", help="runs to join, for the label of the nearest image by them; default: "
        "those of the submission, for its labels, or every finished run")
    add("--looks", type="several", default=LOOKS, help="looks a class is split into, where the folds are not by "
        f"look (default {LOOKS})")
    add("--altered", type="several", default=60, metavar="N", help="training images embedded once more, as they "
        "are and altered in 64 ways (default 60)")
    workers_flag(parser)
    add("--seed", type="seed", default=0, help="of looks and samples (default 0)")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------- evidence


def class_best(similarity, label, classes):
    """Best similarity of each class among the NEIGHBOURS nearest of the pairs [n, K] -> float32 [n, C]; a class without one
    there gets the least. Pairs at -inf do not count."""
    order = np.argsort(-similarity, 1, kind="stable")[:, :NEIGHBOURS]
    near, which = np.take_along_axis(similarity, order, 1), np.take_along_axis(label, order, 1)
    least = np.where(np.isfinite(near), near, np.inf).min(1, keepdims=True)
    best = torch.from_numpy(least).repeat(1, classes)
    return best.scatter_reduce(1, torch.from_numpy(which), torch.from_numpy(near), "amax").numpy()


def held_out(arrays, rows, labels, looks, classes, device):
    """Best class similarities of the held-out `rows` by runs that did not train on them, arrays [N, D]: against all other
    images, and against all but those of the image's own look: two float32 [n, C]."""
    alike = int(np.bincount(looks).max())  # so many neighbours may be of the own look, and then do not count
    similarity, index = topk(Joined(arrays, rows), Joined(arrays), NEIGHBOURS + alike, rows, device)
    other = np.where(looks[index] == looks[rows, None], np.float32(-np.inf), similarity)
    return tuple(class_best(part, labels[index], classes) for part in (similarity, other))


def own_looks(arrays, labels, part, looks, seed):
    """A number for the look of each image [N] int64: its `part` [N] (fold by look, or group) of the class, or, where there is
    None, its cluster of alike images."""
    part = make_look_folds(Joined(arrays)[:], labels, looks, seed) if part is None else part
    return np.unique(labels * (part.max() + 2) + part + 1, return_inverse=True)[1]  # a number per (label, part >= -1)


def known_looks(output, train, fold):
    """What tells a class's looks apart [N]: the folds where they were drawn by look, the groups where by group; or None."""
    by = folds_by(output)
    if by == "group" and "group" not in train.columns:
        raise InputError(f"{output}/folds.csv was drawn by group, and train.csv has no column 'group' now; put it back")
    if by == "look":
        return fold
    return encode(train["group"])[1] if by == "group" else None


def out_of_fold(runs, fold, part, labels, classes, device, looks=LOOKS, seed=0):
    """held_out of the training images, each by the runs of its fold; of a random part of them where [N, C] would be more than
    2^26 numbers. Returns (rows, class_best against all other images, class_best against those of other looks)."""
    found, some = [], np.random.default_rng(seed).permutation(len(labels)) < max(1000, 2**26 // classes)
    for k, out in by_fold(runs):
        arrays, rows = [r["train"] for r in out], np.flatnonzero((fold == k) & some)
        own = own_looks(arrays, labels, part, looks, seed)
        found.append((rows, *held_out(arrays, rows, labels, own, classes, device)))
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def fit_sharpness(best, truth):
    """The factor b for which softmax(b * best) [n, C] gives the true classes [n] the highest likelihood."""
    best, truth = torch.from_numpy(best).double(), torch.from_numpy(truth)  # all right: the larger, the likelier; any will do
    found = minimize_scalar(lambda log: F.cross_entropy(best * np.exp(log), truth).item(), bounds=(-5, 10))
    return float(np.exp(found.x))


def log_odds(best, sharpness, predicted=None):
    """Log odds of the class `predicted` [n] (default: the best) against all others if they compete by
    softmax(sharpness * similarity), [n, C] -> [n]."""
    score = torch.from_numpy(best * np.float32(sharpness))
    at = score.argmax(1, keepdim=True) if predicted is None else torch.from_numpy(predicted)[:, None]
    return (score.gather(1, at)[:, 0] - score.scatter(1, at, -torch.inf).logsumexp(1)).numpy()


def calibrate(best, truth, predicted=None):
    """Learn from held-out images how often the class `predicted` [n] (default: the best) is right. The softmax's sharpness is
    fitted (temperature scaling: Guo et al., On calibration, ICML 2017), then corrected by isotonic regression (Zadrozny and
    Elkan, KDD 2002), which also sees one guess right by chance, and never says more than (n + 1) / (n + 2). Returns plain
    numbers for `probability`: the sharpness, and the corners of the correcting curve."""
    sharpness, (count, classes) = fit_sharpness(best, truth), best.shape
    right = (best.argmax(1) if predicted is None else predicted) == truth
    curve = IsotonicRegression(y_min=0, y_max=(count + 1) / (count + 2))
    curve.fit(np.append(log_odds(best, sharpness, predicted), -np.log(classes - 1)), np.append(right, 1 / classes))
    return {"sharpness": sharpness, "log_odds": curve.X_thresholds_.tolist(), "probability": curve.y_thresholds_.tolist()}


def probability(best, calibration, predicted=None):
    """Probability that the class `predicted` [n] (default: the best) is right, [n, C] -> [n], by what `calibrate` learned."""
    return np.interp(log_odds(best, calibration["sharpness"], predicted), calibration["log_odds"], calibration["probability"])


def halves(count):
    """Up to SPLITS random ways to split so many runs into two halves, True and False: bool [S, count]; S = 0 for one run."""
    if count < 2:
        return np.empty((0, count), bool)
    drawn = np.array([np.random.default_rng(i).permutation(count) < count // 2 for i in range(SPLITS)])
    return np.unique(drawn ^ drawn[:, :1], axis=0)  # turned so that the first run is False: a split and its opposite are one


def half_votes(runs, queries, labels, device, own=None, looks=None):
    """The label of each query's nearest image by each half of the runs: int64 [S, 2, n]. queries: their embeddings, an array a
    run. own [n], looks [N]: if given, images of the query's own look do not count."""
    def nearest(members):
        part = [Joined([arrays[i] for i in members]) for arrays in (queries, [r["train"] for r in runs])]
        return labels[search_other_looks(*part, 1, device, own, looks)[1][:, 0]]

    sides = [[np.flatnonzero(split == which) for which in (False, True)] for split in halves(len(runs))]
    return np.array([[nearest(half) for half in pair] for pair in sides], np.int64).reshape(-1, 2, len(queries[0]))


def search_other_looks(queries, gallery, k, device, own=None, looks=None):
    """topk, best first, but for rows of the query's `own` look [n] of `looks` [N]."""
    if own is None:
        return topk(queries, gallery, k, device=device)
    similarity, index = topk(queries, gallery, k + int(np.bincount(looks).max()), device=device)
    similarity = np.where(looks[index] == own[:, None], np.float32(-np.inf), similarity)
    return tuple(part.numpy() for part in merge(torch.from_numpy(similarity), torch.from_numpy(index), k))


def beyond_chance(votes, prior):
    """How much of the halves' agreement on a class is more than chance, 0..1 [C]; votes int64 [S, 2, n], prior [C].
    The halves are taken to know a share of the images (Cohen's kappa, 1960), and to guess the others with the frequencies p of
    their votes. Guesses agree on class c with probability p_c^2 and are right with p_c prior_c; the difference is subtracted:
    a class predicted too often, as when a shift drives all images to it, loses."""
    count, classes = votes.shape[2], len(prior)
    if count < 2 or not len(votes):
        return np.ones(classes)
    share = np.array([[np.bincount(half, minlength=classes) / count for half in pair] for pair in votes])  # [S, 2, C]
    same = votes[:, 0] == votes[:, 1]
    chance = (count * share.prod(1).sum(1).mean() - same.mean()) / (count - 1)  # over pairs of different images
    guessed = min(1.0, (1 - same.mean()) / (1 - chance)) if chance < 1 else 1.0  # 1 - kappa
    agreed = np.bincount(votes[:, 0][same], minlength=classes) / same.size
    p = share.mean((0, 1))
    return np.clip(1 - guessed * p * (p - prior) / agreed.clip(min=1e-12), 0, 1)


def agreement(votes, predicted):
    """How often both halves give the labels `predicted` [n]: 0..1 [n]; 1 where there is one run."""
    return (votes == predicted).all(1).mean(0) if len(votes) else np.ones(len(predicted))


def collapse(predicted, prior):
    """Log of the pairs of images [n] with one label, divided by those to expect if all classes with a `prior` were equally
    frequent; with one pair more above and below, so that few images tell little. 0 for one image."""
    pairs, count = len(predicted) * (len(predicted) - 1.0), np.bincount(predicted)
    return np.log(((count * (count - 1.0)).sum() + 2) / (pairs / np.count_nonzero(prior) + 2))


def signs(best, votes, predicted, sharpness, prior):
    """The five signs of errors, in the order of the text above, of a set of images: float64 [n, 5]. best [n, C]: of class_best;
    votes [S, 2, n]: of half_votes; predicted [n]: the labels; prior [C]: how frequent the classes are."""
    odds = log_odds(best, sharpness, predicted)
    whole = np.tile([odds.mean(), collapse(predicted, prior)], (len(predicted), 1))
    return np.column_stack([odds, agreement(votes, predicted), beyond_chance(votes, prior)[predicted], whole])


def observe(part, sharpness, prior):
    """[(signs [m, 5], right [m])] of a set of altered_sets: all its images, and those of a quarter and half the classes."""
    predicted, found = part["best"].argmax(1), []
    there = np.flatnonzero(prior)
    some = [np.random.default_rng(n).permutation(there)[:max(3, len(there) // n)] for n in (4, 2)]
    for keep in [slice(None), *(np.isin(part["truth"], classes) for classes in some)]:
        if len(predicted[keep]) > 1:
            found.append((signs(part["best"][keep], part["votes"][..., keep], predicted[keep], sharpness, prior),
                          predicted[keep] == part["truth"][keep]))
    return found


def learn(sets, prior):
    """(what `fit` learns from all the altered_sets, its error): each altered set's accuracy is expected by what is learned from
    the sets that share no alteration with it; the error is how far that is off, root mean square."""
    sharpness, least = fit_sharpness(sets[0]["best"], sets[0]["truth"]), 1 / (len(sets[0]["truth"]) + 2)  # sets[0]: unaltered
    observed, errors = [observe(part, sharpness, prior) for part in sets], []
    for own in (part for part in sets if part["names"]):
        others = [seen for part, seen in zip(sets, observed, strict=True) if not set(part["names"]) & set(own["names"])]
        predicted = own["best"].argmax(1)
        expected = confide(own["best"], own["votes"], predicted, fit(others, sharpness, least), prior).mean()
        errors.append(expected - accuracy(predicted, own["truth"]))
    return fit(observed, sharpness, least), np.mean(np.square(errors)) ** 0.5


def fit(observed, sharpness, least):
    """What is learned from sets that were `observe`d, a dict. A label is right with probability expit(signs @ "weights" +
    "offset"); "excess", a regression [m, 2] -> [m], says by how much the mean of these is too high for a set with these last
    two signs (0 far from all sets). "least": the smallest share that sets of this size tell from 0; "sharpness": as given."""
    parts, right = zip(*(pair for seen in observed for pair in seen), strict=True)
    weight = np.concatenate([np.full(len(part), 1 / len(part)) for part in parts])  # each part counts 1
    x, y = np.concatenate(parts), np.concatenate(right)
    mean, scale = x.mean(0), x.std(0).clip(min=1e-9)
    x, y = np.vstack([(x - mean) / scale, np.zeros((2, 5))]), np.append(y, [True, False])  # sklearn needs one of each
    model = LogisticRegression(max_iter=1000).fit(x, y, np.append(weight, [1 / len(parts)] * 2))
    weights = model.coef_[0] / scale  # for signs that are not standardised
    offset = float(model.intercept_[0] - weights @ mean)
    too_high = [(expit(part @ weights + offset) - true).mean() for part, true in zip(parts, right, strict=True)]
    excess = make_pipeline(StandardScaler(), KernelRidge(alpha=0.3, kernel="rbf", gamma=0.5))
    excess.fit([part[0, 3:] for part in parts], too_high)
    return {"sharpness": sharpness, "weights": weights.tolist(), "offset": offset, "excess": excess, "least": least}


def odds_of_right(best, votes, predicted, learned, prior, gain=0.0):
    """Log odds that the labels `predicted` [n] of a set of test images are right [n]. All are moved by one number, so that
    their mean probability is the wanted one: that of the nearest images' labels, less its learned excess, plus `gain`; no
    closer to 0 or 1 than the learned sets can tell."""
    nearest = signs(best, votes, best.argmax(1), learned["sharpness"], prior)
    wanted = expit(nearest @ learned["weights"] + learned["offset"]).mean()
    least = np.clip(min(wanted, 1 - wanted), 1e-6, learned["least"])
    wanted = np.clip(wanted - learned["excess"].predict(nearest[:1, 3:])[0] + gain, least, 1 - least)
    odds = signs(best, votes, predicted, learned["sharpness"], prior) @ learned["weights"] + learned["offset"]
    return odds - brentq(lambda less: expit(odds - less).mean() - wanted, odds.min() - 20, odds.max() + 20)


def confide(best, votes, predicted, learned, prior, gain=0.0):
    """How likely the labels `predicted` [n] of a set of test images are right [n]; see odds_of_right."""
    return expit(odds_of_right(best, votes, predicted, learned, prior, gain))


def calibrate_alone(best, votes, learned, prior):
    """What confide_alone goes by. classify.py's photograph is judged as if it were one of these test images: what the signs of
    the whole set add to its odds is the same for all of them, and goes into the "offset"."""
    predicted, sharpness, weights = best.argmax(1), learned["sharpness"], learned["weights"][:3]
    first = signs(best, votes, predicted, sharpness, prior)[0, :3] @ weights
    return {"sharpness": sharpness, "weights": weights, "kept": beyond_chance(votes, prior),
            "offset": float(odds_of_right(best, votes, predicted, learned, prior)[0] - first)}


def confide_alone(best, votes, calibration):
    """How likely the nearest image's labels are right, of photographs one by one [n], by what expected.json keeps; "kept"
    [C] by class number."""
    predicted = best.argmax(1)
    each = np.column_stack([log_odds(best, calibration["sharpness"]), agreement(votes, predicted),
                            calibration["kept"][predicted]])
    return expit(each @ calibration["weights"] + calibration["offset"])


def altered_sets(runs, part, labels, train, args, device):
    """(sets, prior [C]). A set is n training images altered alike, searched among the images of other looks, a dict: "names" of
    the alterations (() for the first: none), "best" [n, C] of class_best, "votes" [S, 2, n] of half_votes, "truth" [n]. prior:
    how frequent the classes are. The embeddings are kept in output/altered.npz: another processor's differ by rounding."""
    from alterations import ALTERATIONS, AlteredImages  # torchvision takes seconds, and classify.py needs none

    looks = own_looks([runs[0]["train"]], labels, part, args.looks, args.seed)
    count = [len(np.unique(looks[labels == c])) for c in range(labels.max() + 1)]
    rows = np.flatnonzero(np.array(count)[labels] > 1)  # others have no image of another look
    prior = np.bincount(labels[rows], minlength=labels.max() + 1) / max(1, len(rows))
    rows = np.sort(np.random.default_rng(args.seed).permutation(rows)[:args.altered])
    if len(rows) < 2:
        raise InputError("no class has images of two looks or groups, so nothing tells what to expect of another; without "
                         "scripts/expect.py the submission is complete")
    file = Path(args.output) / "altered.npz"
    key = json.dumps([runs_digest(runs), train["path"].iloc[rows].tolist(), ALTERATIONS, args.seed])
    kept = load_npz(file, "delete it, it is made anew") if file.exists() else {}
    if str(kept.get("key")) != key:
        def altered(size, resize):
            return AlteredImages(args.input, train["path"].iloc[rows], labels[rows], size, resize, args.seed)

        kept = {"key": key} | embed_as_extracted(runs, args.output, altered, device, args.workers)
        save_npz(file, **kept)
    queries, own = [kept[r["name"]] for r in runs], np.tile(looks[rows], len(ALTERATIONS))
    similarity, index = search_other_looks(Joined(queries), Joined([r["train"] for r in runs]), NEIGHBOURS, device, own, looks)
    best = class_best(similarity, labels[index], labels.max() + 1)
    votes = half_votes(runs, queries, labels, device, own, looks)
    places = [slice(at, at + len(rows)) for at in range(0, len(best), len(rows))]
    return [{"names": names, "best": best[place], "votes": votes[..., place], "truth": labels[rows]}
            for names, place in zip(ALTERATIONS, places, strict=True)], prior


# ------------------------------------------------------------------------------------------------- baselines, and the shift


def average_thresholded_confidence(held, right, test):
    """Share of the test images above the confidence that the right share of the held-out ones exceeds.
    Source: Garg et al., Leveraging unlabeled data to predict out-of-distribution performance, ICLR 2022."""
    return float((test >= np.quantile(held, 1 - right.mean())).mean())


def difference_of_confidences(held, right, test):
    """Accuracy held out, less the drop of the mean confidence.
    Source: Guillory et al., Predicting with confidence on unseen distributions, ICCV 2021."""
    return float(right.mean() - (held.mean() - test.mean()))


def tell_apart(held, test, seed, most=2000):
    """Balanced accuracy of telling held-out training images from test images by one run's embeddings, cross-validated logistic
    regression on equally many of both: 0.5 they look alike, 1 every image gives itself away. None for fewer than two of each.
    Source: the classifier two-sample test, Lopez-Paz and Oquab, ICLR 2017."""
    rng, count = np.random.default_rng(seed), min(len(held), len(test), most)
    if count < 2:
        return None
    x = np.concatenate([part[np.sort(rng.permutation(len(part))[:count])] for part in (held, test)])
    split = StratifiedKFold(min(5, count), shuffle=True, random_state=seed)
    score = cross_val_score(LogisticRegression(C=100, max_iter=1000), x, np.repeat([0, 1], count), cv=split).mean()
    return round(float(score), 4)


def shift(run_, fold, seed, device):
    """How far the test images lie from the training images, by one run that held some out."""
    rows = np.flatnonzero(fold == int(run_["fold"]))
    gallery, held, test = Joined([run_["train"]]), Joined([run_["train"]], rows), Joined([run_["test"]])
    near = [topk(queries, gallery, 1, own, device)[0][:, 0] for queries, own in [(held, rows), (test, None)]]
    apart = tell_apart(held[:], test[:], seed)
    return {"told_apart": apart, "similarity_held_out": round(float(np.median(near[0])), 4),
            "similarity_test": round(float(np.median(near[1])), 4)}


# ------------------------------------------------------------------------------------------------------------- the work


def expect(runs, fold, part, labels, grown, numbers, sets, set_prior, args, device, predicted=None, gain=0.0):
    """(confidence [n], class number [n], nearest similarity [n], figures for expected.json) of the test images' labels.
    predicted [n]: the labels, default the nearest images', which also stand in where it is -1; gain: see `submitted`.
    runs, labels: of train.csv's rows, and so sets, set_prior (altered_sets); grown, numbers: of the gallery's rows (`grow`)."""
    rows, random, look = out_of_fold(runs, fold, part, labels, labels.max() + 1, device, args.looks, args.seed)
    truth = labels[rows]
    queries = [r["test"] for r in grown]
    similarity, index = topk(Joined(queries), Joined([r["train"] for r in grown]), NEIGHBOURS, device=device)
    best = class_best(similarity, numbers[index], numbers.max() + 1)
    nearest = numbers[index[:, 0]]
    predicted = nearest if predicted is None else np.where(predicted < 0, nearest, predicted)
    votes, evidence = half_votes(grown, queries, numbers, device), probability(best, calibrate(look, truth), predicted)
    prior = np.bincount(numbers) / len(numbers)
    learned, error = learn(sets, set_prior)
    confidence = confide(best, votes, predicted, learned, prior, gain)
    calibration = calibrate_alone(best, votes, learned, prior)
    expected = float(confidence.mean())
    reach = 1.64 * (error**2 + expected * (1 - expected) / len(confidence)) ** 0.5  # 90 %: error of the learned, chance among n
    sharpness = fit_sharpness(random, truth)
    held, right, test = log_odds(random, sharpness), random.argmax(1) == truth, log_odds(best, sharpness)
    figures = {"expected": expected, "low": max(0.0, expected - reach), "high": min(1.0, expected + reach),
               "by_evidence": evidence.mean(), "by_agreement": agreement(votes, predicted).mean() if len(votes) else None,
               "held_out": right.mean(), "held_out_other_looks": accuracy(look.argmax(1), truth),
               "average_thresholded_confidence": average_thresholded_confidence(held, right, test),
               "difference_of_confidences": difference_of_confidences(expit(held), right, expit(test))}
    figures = {name: value if value is None else round(float(value), 4) for name, value in figures.items()}
    figures |= shift(next(r for r in runs if r["fold"]), fold, args.seed, device)
    figures |= {"runs": {r["name"]: runs_digest([r]) for r in runs}, "calibration": calibration}
    return confidence, predicted, similarity[:, 0], figures


def submitted(args, test, classes, grown):
    """(vote, its class numbers of the test images [n], -1 for rejected ones, its gain) of the submission. The gain: by how much
    its accuracy out-of-fold is above that of the nearest image; 0 where folds at random see no shift."""
    output = Path(args.output)
    scores = load_json(output / "scores.json", vote=str)
    table = read_csv(output / "submission.csv", ["filename", "prediction"])
    table = table[table["filename"].isin(test["filename"])].reset_index(drop=True)  # less those in bad_images.csv
    check_submission(output, scores, grown)
    if not table["filename"].equals(test["filename"]):
        raise InputError(f"{output}/submission.csv is of other images than there are now; run retrieve.py again")
    vote, oof = scores["vote"], scores.get("oof") or {}
    gain = oof[vote] - oof["nearest"] if vote in oof and folds_by(output) != "random" else 0.0
    return vote, number_of(table["prediction"], classes), gain


def forget(output):
    """Delete an earlier expectation: from here on it is none of these test images."""
    for name in ("confidence.csv", "expected.json"):
        (Path(output) / name).unlink(missing_ok=True)


def main():
    args = parse_args()
    device = pick_device(args.device)
    with lock(args.output):
        tell(args, device)


def tell(args, device):
    if not has_test(args.input):
        forget(args.output)
        print("no test images, nothing to expect")
        return
    train, good, test = load_train(args), load_test(args), read_test(args.input, args.allow_outside)
    scores = Path(args.output) / "scores.json"
    nearest = args.runs or not scores.exists()
    runs = load_runs(args.output, args.runs if nearest else list(load_json(scores, runs=dict)["runs"]), train, good)
    grown, gallery = grow(runs, args.output, train)
    labels, (classes, numbers) = encode(train["label"])[1], encode(gallery["label"])
    vote, predicted, gain = ("nearest", None, 0.0) if nearest else submitted(args, good, classes, grown)
    if not by_fold(runs):
        forget(args.output)
        print("no run held images out, so nothing is known of the accuracy to expect; train runs of folds, not of 'all'")
        return
    fold = load_folds(args.output, train)
    part = known_looks(args.output, train, fold)
    sets = altered_sets(runs, part, labels, train, args, device)
    confidence, number, similarity, figures = expect(runs, fold, part, labels, grown, numbers, *sets, args, device, predicted,
                                                     gain)
    forget(args.output)

    kept = zip(classes, figures["calibration"]["kept"], strict=True)
    # by name, since products may come or go
    figures["calibration"]["kept"] = {label: round(float(share), 4) for label, share in kept if share < 1}
    number = with_bad(test, good, number, np.bincount(numbers).argmax())  # images in bad_images.csv: as retrieve.py labels them
    confidence, similarity = with_bad(test, good, confidence, 0), with_bad(test, good, similarity, 0)
    share = len(good) / len(test)  # of readable images: the others count as wrong
    figures |= {name: round(figures[name] * share, 4) for name in ("expected", "low", "high")}
    table = test[["filename"]].assign(prediction=np.array(classes, object)[number], confidence=confidence.round(4),
                                      similarity=similarity.round(4))
    rejected = np.zeros(len(test), bool) if predicted is None else with_bad(test, good, predicted < 0, False)
    if rejected.any():
        table.loc[rejected, ["prediction", "confidence"]] = UNKNOWN, 0.0
        print(f"{rejected.sum()} of {len(test)} test images are rejected; the expectation is of all, those by their nearest")
    truth = read_solution(args.input, test["filename"])
    figures["vote"] = vote
    figures["true"] = None if truth is None else round(accuracy(number, number_of(truth, classes)), 4)
    save_csv(Path(args.output) / "confidence.csv", table)
    figures["confidence_csv"] = file_fingerprint(Path(args.output) / "confidence.csv")
    save_json(Path(args.output) / "expected.json", figures)
    print(f"held out {figures['held_out']:.2f} ({figures['held_out_other_looks']:.2f} against other looks); on these "
          f"test images expect {figures['expected']:.2f} ({figures['low']:.2f}-{figures['high']:.2f}) of the vote {vote}")
    print(f"test images are told from held-out training images with accuracy {figures['told_apart'] or 0.5:.2f} (0.50: they "
          f"look alike); nearest image at {figures['similarity_test']:.2f}, held out {figures['similarity_held_out']:.2f}")
    if any(r["stamp"].get("adapt_bn") for r in runs):
        print("the test images were embedded with --adapt-bn and the altered training images without: it fits them less")
    if any(load_json(Path(args.output) / r["name"] / "args.json").get("pseudo") for r in runs):
        print("these runs trained on confident test images: their expectation confirms itself, that of the round before counts")
    least = table[table["filename"].isin(good["filename"])].sort_values("similarity", kind="stable").head(5)
    print("least like anything in the gallery: " + ", ".join(f"{n} ({s:.2f})" for n, s in
                                                             zip(least["filename"], least["similarity"], strict=True)))


if __name__ == "__main__":
    run(main)
