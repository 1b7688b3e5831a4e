"""The accuracy to expect on the test images, before their labels are known; and how likely each label is right.

Two estimates, joined:
  agreement  Whether two halves of the runs both give a test image this label, less what they would by chance. Needs no labels
             and sees any shift that confuses the runs; blind to errors that they share.
  evidence   Held-out images are labelled by the runs that did not train on them, against images of other looks only (a look
             is a cluster of alike images of a class). How often they are right at a given evidence is applied to the
             evidence of the test images. Sees errors that the runs share, on held-out images, too; blind to a shift that
             changes more than the looks do.
Where both halves give the label, the evidence counts; where one does or neither, a share of the accuracy on the whole. One run
alone has only the evidence.
It is for the labels of the submission, by whatever vote; before there is one, for those of the nearest image.

Reads  what retrieve.py reads and, if it ran, what it writes
Writes output/confidence.csv (filename,prediction,confidence,similarity in the order of the submission), output/expected.json

    python scripts/expect.py
    python scripts/expect.py --input input/demo --output output/demo
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, accuracy, atomic, file_fingerprint, load_json, pick_device, run, save_json, script_parser

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score

from dataset import (
    encode,
    folds_by,
    has_test,
    load_folds,
    load_test,
    load_train,
    make_look_folds,
    read_csv,
    read_solution,
    read_test,
    with_bad,
)
from retrieve import UNKNOWN, grow, load_runs, stamps_of
from search import Joined, topk

NEIGHBOURS = 100  # looked at for the evidence: enough that several classes are among them
LOOKS = 5  # a class is split into, where the folds are not by look
SPLITS = 10  # of the runs into two halves
LEAST_ERROR = 0.05  # half the interval at least, by the errors measured; see RESULTS.md


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", metavar="ARCH/foldK", help="runs to join, for the label of the nearest image by them; default: "
        "those of the submission, for its labels, or every finished run")
    add("--looks", type=int, default=LOOKS, help="looks a class is split into, where the folds are not by look "
        f"(default {LOOKS})")
    add("--seed", type=int, default=0, help="of looks and samples (default 0)")
    args = parser.parse_args()
    if args.looks < 2:
        parser.error("--looks must be 2 or more")
    return args


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
    alike = int(np.bincount(looks).max())
    similarity, index = topk(Joined(arrays, rows), Joined(arrays), NEIGHBOURS + alike, rows, device)
    other = np.where(looks[index] == looks[rows, None], np.float32(-np.inf), similarity)
    return tuple(class_best(part, labels[index], classes) for part in (similarity, other))


def own_looks(arrays, labels, part, looks, seed):
    """A number for the look of each image [N] int64: its `part` [N] (fold by look, or group) of the class, or, where there is
    None, its cluster of alike images."""
    part = make_look_folds(Joined(arrays)[:], labels, looks, seed) if part is None else part
    return np.unique(labels * (part.max() + 2) + part + 1, return_inverse=True)[1]


def known_looks(output, train, fold):
    """What tells a class's looks apart [N]: the folds where they were drawn by look, the groups where by group; or None."""
    by = folds_by(output)
    if by == "group" and "group" not in train.columns:
        raise InputError(f"{output}/folds.csv was drawn by group, and train.csv has no column 'group' now; put it back")
    return fold if by == "look" else np.array(encode(train["group"])[1]) if by == "group" else None


def out_of_fold(runs, fold, part, labels, classes, device, looks=LOOKS, seed=0):
    """held_out of all images by the runs of their fold: (rows, against all, against other looks)."""
    found = []
    for k in range(fold.max() + 1):
        arrays, rows = [r["train"] for r in runs if r["fold"] == str(k)], np.flatnonzero(fold == k)
        if arrays and len(rows):
            own = own_looks(arrays, labels, part, looks, seed)
            found.append((rows, *held_out(arrays, rows, labels, own, classes, device)))
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def fit_sharpness(best, truth):
    """The factor b for which softmax(b * best) [n, C] gives the true classes [n] the highest likelihood."""
    log = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    best, truth = torch.from_numpy(best).double(), torch.from_numpy(truth)
    optimiser = torch.optim.LBFGS([log], max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = F.cross_entropy(best * log.exp(), truth)
        value.backward()
        return value

    optimiser.step(loss)
    return log.exp().item()


def log_odds(best, sharpness, said=None):
    """Log odds of the class `said` [n] (default: the best) against all others if they compete by
    softmax(sharpness * similarity), [n, C] -> [n]."""
    score = torch.from_numpy(best * np.float32(sharpness))
    at = score.argmax(1, keepdim=True) if said is None else torch.from_numpy(said)[:, None]
    return (score.gather(1, at)[:, 0] - score.scatter(1, at, -torch.inf).logsumexp(1)).numpy()


def calibrate(best, truth, said=None):
    """Learn from held-out images how often the class `said` [n] (default: the best) is right. The softmax's sharpness is fitted
    (temperature scaling: Guo et al., On calibration, ICML 2017), then corrected by isotonic regression (Zadrozny and Elkan, KDD
    2002), which also sees one guess right by chance, and never says more than (n + 1) / (n + 2). Returns plain numbers for
    `probability`: the sharpness, and the corners of the correcting curve."""
    sharpness, (count, classes) = fit_sharpness(best, truth), best.shape
    right = (best.argmax(1) if said is None else said) == truth
    curve = IsotonicRegression(y_min=0, y_max=(count + 1) / (count + 2))
    curve.fit(np.append(log_odds(best, sharpness, said), -np.log(classes - 1)), np.append(right, 1 / classes))
    return {"sharpness": sharpness, "log_odds": curve.X_thresholds_.tolist(), "probability": curve.y_thresholds_.tolist()}


def probability(best, calibration, said=None):
    """Probability that the class `said` [n] (default: the best) is right, [n, C] -> [n], by what `calibrate` learned."""
    return np.interp(log_odds(best, calibration["sharpness"], said), calibration["log_odds"], calibration["probability"])


def halves(count):
    """Up to SPLITS random ways to split so many runs into two halves, True and False: bool [S, count]; S = 0 for one run."""
    if count < 2:
        return np.empty((0, count), bool)
    drawn = np.array([np.random.default_rng(i).permutation(count) < count // 2 for i in range(SPLITS)])
    return np.unique(drawn ^ drawn[:, :1], axis=0)  # the first run is in the half False


def half_votes(runs, labels, device):
    """The label that each half of the runs gives each test image, by its nearest image: int64 [S, 2, n]."""
    def nearest(members):
        return labels[topk(*(Joined([r[split] for r in members]) for split in ("test", "train")), 1, device=device)[1][:, 0]]

    sides = [[[r for r, side in zip(runs, split, strict=True) if side == which] for which in (False, True)]
             for split in halves(len(runs))]
    return np.array([[nearest(half) for half in pair] for pair in sides], np.int64).reshape(-1, 2, len(runs[0]["test"]))


def beyond_chance(votes, prior):
    """How much of the halves' agreement on a class is more than chance, 0..1 [C]; votes int64 [S, 2, n], prior [C].
    Cohen's kappa (1960) of the two halves is the share of the images that they know; the others they guess by their own
    frequencies p of the classes. So they agree on c by chance with p_c^2, and are right then with p_c prior_c: a class
    that is said too often, as when a shift drives all images to it, loses. Chance is counted over pairs of different images,
    lest it be too high for few."""
    count, classes = votes.shape[2], len(prior)
    if count < 2 or not len(votes):
        return np.ones(classes)
    share = np.array([[np.bincount(half, minlength=classes) / count for half in pair] for pair in votes])  # [S, 2, C]
    same = votes[:, 0] == votes[:, 1]
    chance = (count * share.prod(1).sum(1).mean() - same.mean()) / (count - 1)
    guessed = min(1.0, (1 - same.mean()) / (1 - chance)) if chance < 1 else 1.0  # 1 - kappa
    agreed = np.bincount(votes[:, 0][same], minlength=classes) / same.size
    p = share.mean((0, 1))
    return np.clip(1 - guessed * p * (p - prior) / agreed.clip(min=1e-12), 0, 1)


def agreement(votes, said, evidence, kept, runs, level=None):
    """How likely the labels `said` [n] by so many `runs` are right, [n], and the `level`, their accuracy on the whole. Of the
    splits in which both halves give this very label the evidence [n] counts, times what `beyond_chance` leaves of its class,
    `kept` [C]. Where one half does, the label is right `divided` times as often as on the whole, where neither does, half that:
    shares that were measured (RESULTS.md). By default the level is the mean that comes of it."""
    count, divided = (votes == said).sum(1), 0.5 + 0.6 / runs
    sure = (count == 2).mean(0) * evidence * kept[said]
    rest = divided * ((count == 1).mean(0) + (count == 0).mean(0) / 2)
    level = sure.mean() / (1 - rest.mean()) if level is None else level
    return sure + level * rest, level


def confide(best, calibration, votes, kept, runs, said):
    """(confidence [n], evidence [n], level) of the labels `said` [n] of test images by so many `runs`: best [n, C] of
    class_best, votes [S, 2, n] of half_votes. Without votes, of one run, the evidence is all there is."""
    evidence = probability(best, calibration, said)
    confidence, level = agreement(votes, said, evidence, kept, runs) if len(votes) else (evidence, evidence.mean())
    return confidence, evidence, float(level)


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
    return round(cross_val_score(LogisticRegression(C=100, max_iter=1000), x, np.repeat([0, 1], count), cv=split).mean(), 4)


def shift(run_, fold, seed, device):
    """How far the test images lie from the training images, by one run that held some out."""
    rows = np.flatnonzero(fold == int(run_["fold"]))
    gallery, held, test = Joined([run_["train"]]), Joined([run_["train"]], rows), Joined([run_["test"]])
    near = [topk(queries, gallery, 1, own, device)[0][:, 0] for queries, own in [(held, rows), (test, None)]]
    apart = tell_apart(held[:], test[:], seed)
    return {"told_apart": apart, "similarity_held_out": round(float(np.median(near[0])), 4),
            "similarity_test": round(float(np.median(near[1])), 4)}


# ------------------------------------------------------------------------------------------------------------- the work


def expect(runs, fold, part, labels, grown, numbers, args, device, said=None, held=None):
    """(confidence [n], class number [n], nearest similarity [n], figures for expected.json) of the labels `said` [n] (default:
    of the nearest images; so where it is -1); `held` [N]: what the same vote says of the training images out-of-fold.
    labels: class numbers of the rows of train.csv, which the estimate learns from; grown, numbers: the runs and class numbers
    of the gallery."""
    rows, random, look = out_of_fold(runs, fold, part, labels, labels.max() + 1, device, args.looks, args.seed)
    truth = labels[rows]
    similarity, index = topk(*(Joined([r[split] for r in grown]) for split in ("test", "train")), NEIGHBOURS, device=device)
    best = class_best(similarity, numbers[index], numbers.max() + 1)
    nearest = best.argmax(1)
    said = nearest if said is None else np.where(said < 0, nearest, said)
    votes, calibration = half_votes(grown, numbers, device), calibrate(look, truth)
    kept = beyond_chance(votes, np.bincount(numbers) / len(numbers))
    own = calibration if held is None else calibrate(look, truth, held[rows])
    confidence, evidence, _ = confide(best, own, votes, kept, len(grown), said)
    calibration |= {"expected": confide(best, calibration, votes, kept, len(grown), nearest)[2], "kept": kept.round(4).tolist()}
    both = (votes == said).all(1).mean(0) if len(votes) else None
    spread = 0.0 if both is None else (votes == said).mean() - both.mean()
    expected = float(confidence.mean())
    half = (LEAST_ERROR**2 + spread**2 + 1.64**2 * expected * (1 - expected) / len(confidence)) ** 0.5
    sharpness = fit_sharpness(random, truth)
    held, right, test = log_odds(random, sharpness), random.argmax(1) == truth, log_odds(best, sharpness)
    figures = {"expected": expected, "low": max(0.0, expected - half), "high": min(1.0, expected + half),
               "by_evidence": evidence.mean(), "by_agreement": None if both is None else (both * kept[said]).mean(),
               "held_out": right.mean(), "held_out_other_looks": accuracy(look.argmax(1), truth),
               "average_thresholded_confidence": average_thresholded_confidence(held, right, test),
               "difference_of_confidences": difference_of_confidences(expit(held), right, expit(test))}
    figures = {name: value if value is None else round(float(value), 4) for name, value in figures.items()}
    first = next(r for r in runs if str(r["fold"]).isdecimal())
    figures |= shift(first, fold, args.seed, device)
    figures |= {"runs": {r["name"]: stamps_of([r]) for r in runs}, "calibration": calibration}
    return confidence, said, similarity[:, 0], figures


def submitted(args, test, trained, classes, grown):
    """(vote, its class numbers of the test images [n], -1 for rejected ones, and out-of-fold [N] or None) of the submission.
    Test images have the `classes` of the gallery, training images those of train.csv, `trained`."""
    output, number, before = Path(args.output), *({label: i for i, label in enumerate(c)} for c in (classes, trained))
    scores = load_json(output / "scores.json", vote=str)
    table = read_csv(output / "submission.csv", ["filename", "prediction"])
    table = table[table["filename"].isin(test["filename"])].reset_index(drop=True)  # less those in bad_images.csv
    if scores.get("submission") != file_fingerprint(output / "submission.csv"):
        raise InputError(f"{output}/submission.csv is not what retrieve.py wrote with scores.json; run retrieve.py again")
    if scores.get("stamps") != stamps_of(grown) or not table["filename"].equals(test["filename"]):
        raise InputError(f"{output}/submission.csv is of other runs, embeddings or images than there are now; run retrieve.py "
                         "again")
    if scores["vote"] == "nearest" or folds_by(output) == "random" or not (output / "oof.csv").exists():
        held = None  # random folds flatter any vote; then the nearest image's odds against other looks have to do
    else:
        held = read_csv(output / "oof.csv", ["path"])["prediction"].map(before).fillna(-1).to_numpy(np.int64)
    return scores["vote"], table["prediction"].map(number).fillna(-1).to_numpy(np.int64), held


def forget(output):
    """Delete an earlier expectation: from here on it is none of these test images."""
    for name in ("confidence.csv", "expected.json"):
        (Path(output) / name).unlink(missing_ok=True)


def main():
    args = parse_args()
    device = pick_device(args.device)
    if not has_test(args.input):
        forget(args.output)
        print("no test images, nothing to expect")
        return
    train, good, test = load_train(args), load_test(args), read_test(args.input, args.allow_outside)
    scores = Path(args.output) / "scores.json"
    nearest = args.runs or not scores.exists()
    runs = load_runs(args.output, args.runs if nearest else list(load_json(scores, runs=dict)["runs"]), train, good)
    grown, gallery = grow(runs, args.output, train)
    (trained, labels), (classes, numbers) = encode(train["label"]), encode(gallery["label"])
    vote, said, held = ("nearest", None, None) if nearest else submitted(args, good, trained, classes, grown)
    forget(args.output)
    if not any(str(r["fold"]).isdecimal() for r in runs):
        print("no run held images out, so nothing is known of the accuracy to expect; train runs of folds, not of 'all'")
        return
    fold = load_folds(args.output, train)
    part = known_looks(args.output, train, fold)
    confidence, number, similarity, figures = expect(runs, fold, part, labels, grown, numbers, args, device, said, held)

    kept = zip(classes, figures["calibration"]["kept"], strict=True)
    figures["calibration"]["kept"] = {label: share for label, share in kept if share < 1}  # by name: products may come or go
    number = with_bad(test, good, number, np.bincount(numbers).argmax())  # images in bad_images.csv: as retrieve.py labels them
    confidence, similarity = with_bad(test, good, confidence, 0), with_bad(test, good, similarity, 0)
    share = len(good) / len(test)
    figures |= {name: round(figures[name] * share, 4) for name in ("expected", "low", "high")}
    table = test[["filename"]].assign(prediction=np.array(classes, object)[number], confidence=confidence.round(4),
                                      similarity=similarity.round(4))
    said = None if said is None else with_bad(test, good, said, 0)
    if said is not None and (said < 0).any():
        table.loc[said < 0, ["prediction", "confidence"]] = UNKNOWN, 0.0
        print(f"{(said < 0).sum()} of {len(said)} test images are rejected; the expectation is of all, those by their nearest")
    truth = read_solution(args.input, test["filename"])
    figures["vote"] = vote
    figures["true"] = None if truth is None else round(float((table["prediction"] == truth).mean()), 4)
    with atomic(Path(args.output) / "confidence.csv") as temporary:
        table.to_csv(temporary, index=False)
    figures["confidence_csv"] = file_fingerprint(Path(args.output) / "confidence.csv")
    save_json(Path(args.output) / "expected.json", figures)
    print(f"held out {figures['held_out']:.2f} ({figures['held_out_other_looks']:.2f} against other looks); on these "
          f"test images expect {figures['expected']:.2f} ({figures['low']:.2f}-{figures['high']:.2f}) of the vote {vote}")
    print(f"test images are told from held-out training images with accuracy {figures['told_apart'] or 0.5:.2f} (0.50: they "
          f"look alike); nearest image at {figures['similarity_test']:.2f}, held out {figures['similarity_held_out']:.2f}")
    if any(load_json(Path(args.output) / r["name"] / "args.json").get("pseudo") for r in runs):
        print("these runs trained on confident test images: their expectation confirms itself, that of the round before counts")
    least = table.sort_values("similarity", kind="stable").head(5)
    print("least like anything in the gallery: " + ", ".join(f"{n} ({s:.2f})" for n, s in
                                                             zip(least["filename"], least["similarity"], strict=True)))


if __name__ == "__main__":
    run(main)
