"""Load runs, search, vote, write: the labels of the test images.

Reads  input/{train.csv,sample_submission.csv[,solution.csv]}, output/folds.csv, the .npy of finished runs; output/added.npz (by
       scripts/add_products.py) and, to reject, output/left_out.json (by scripts/leave_out.py)
Writes output/{neighbours.npz,submission.csv,scores.json,oof.csv}; with --top, output/top.csv; to reject, output/strangers.npz

    python retrieve.py                                              # all finished runs, the vote by --vote auto
    python retrieve.py --runs nfnet_l0/fold0 nfnet_l0/fold1 --vote sum --k 10
    python retrieve.py --reject 0.05                                # 'unknown' where it may be none of the products
    torchrun --nproc_per_node 4 retrieve.py                         # the gallery shared among processes, one GPU each
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

from utils import (
    InputError,
    Store,
    Unwritable,
    accuracy,
    file_fingerprint,
    fingerprint,
    is_first,
    load_json,
    load_npy,
    load_npz,
    lock,
    on_first,
    pick_device,
    processes,
    rank_and_world,
    reserve,
    run,
    save_csv,
    save_json,
    save_npz,
    script_parser,
    within,
)

import numpy as np
import pandas as pd
import torch

from dataset import (
    encode,
    folds_by,
    load_folds,
    load_test,
    load_train,
    number_of,
    read_solution,
    read_test,
    test_fingerprint,
    train_fingerprint,
    with_bad,
)
from extract import finished_runs
from models import EMBEDDING
from search import Joined, topk
from votes import (
    DEFAULT_VOTES,
    EXPLAINED,
    TRANSDUCTIVE,
    VOTES,
    WITH_HEAD,
    blocks,
    head_scores,
    label,
    vote_flags,
)

ADDED, LEFT_OUT = "added.npz", "left_out.json"  # below output, by scripts/add_products.py and scripts/leave_out.py
UNKNOWN = "unknown"  # the label of a photograph that --reject takes for none of the products


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", metavar="ARCH/foldK", help="runs to join; default: every finished run")
    add("--vote", choices=["auto", *VOTES], default="auto", metavar="VOTE", help="which labels the submission gets (default "
        "auto: where folds were drawn by look or group, and with --oof, the vote that is right most often out-of-fold; else "
        "nearest, since folds at random do not see the shift). "
        + "; ".join(f"{name}: {what}" for name, what in EXPLAINED.items())
        + f". {', '.join(TRANSDUCTIVE)} use that all test images are there at once; a label then depends on which others came "
        "with it")
    add("--oof", action=argparse.BooleanOptionalAction, default=True,
        help="also score each training image by the runs that did not train on it (default on)")
    add("--top", type=within("[0, 1000]", int), default=0, metavar="N", help="also write top.csv, the N likeliest labels of "
        "each test image, for contests scored by MAP@N (default 0: no)")
    reject_flag(parser)
    vote_flags(parser)
    return parser.parse_args()


def reject_flag(parser):
    parser.add_argument("--reject", type="rate", metavar="RATE", help=f"label {UNKNOWN!r} what may be none of the "
        "products: of photographs of products that are not in the gallery this share still gets a label, e.g. 0.05 "
        "(default: every photograph gets one). scripts/leave_out.py makes the rate true")


# -------------------------------------------------------------------------------------------------- runs and their gallery


def load_runs(output, names, train, test):
    """The runs' embeddings and heads, refused where they are of other rows or of another checkpoint, or not as written.

    A run is a dict. name: ARCH/foldK; arch; fold: the fold it held out, a number as text, or None; stamp: its extract.json;
    train, test: embeddings [N, 512], [n, 512] or None; head: class centres [C x centres, 512]; kind: of the head, 'arcface',
    'softmax', or None where it does not fit the classes."""
    folders = dict.fromkeys(Path(output) / name for name in names) if names else finished_runs(output)
    fold = load_folds(output, train) if (Path(output) / "folds.csv").exists() else None
    wanted = {"train": ("train.csv", train_fingerprint(train))}
    wanted |= {} if test is None else {"test": ("sample_submission.csv", test_fingerprint(test))}
    runs = []
    for folder in folders:
        if not (folder / "extract.json").exists():
            raise InputError(f"{folder} has no embeddings; run extract.py first")
        stamp = load_json(folder / "extract.json", train=str, checkpoint=str, classes=int, centres=int, sizes=list, resize=str,
                          files=dict)
        for part, (file, have) in wanted.items():
            if stamp.get(part) != have:
                raise InputError(f"{folder} was extracted from another {file} (other rows or order); run extract.py again")
        if stamp["checkpoint"] != file_fingerprint(folder / "best.pt"):
            raise InputError(f"{folder}: best.pt is not the checkpoint that its embeddings come from; run extract.py again")
        held = stamp["fold"] if str(stamp.get("fold")).isdecimal() else None
        if fold is not None and held and stamp.get("held_out") and (
                stamp["held_out"] != train_fingerprint(train[fold == int(held)])):
            raise InputError(f"{folder} held out other images than {output}/folds.csv says; put the old folds.csv back, or use "
                             "another --output")

        def embeddings(name, rows, folder=folder, files=stamp["files"]):
            return load_npy(folder / name, (rows, None), files.get(name, "none"))

        runs.append({"name": f"{folder.parent.name}/{folder.name}", "arch": folder.parent.name,
                     "fold": held, "stamp": stamp, "kind": stamp.get("head"),
                     "head": embeddings("head.npy", stamp["classes"] * stamp["centres"]),
                     "train": embeddings("train.npy", len(train)),
                     "test": None if test is None else embeddings("test.npy", len(test))})
    return runs


def by_fold(runs):
    """(number of the fold, the runs that held it out) of each fold that any of the runs held out."""
    return [(int(k), [r for r in runs if r["fold"] == k]) for k in sorted({r["fold"] for r in runs if r["fold"]}, key=int)]


def load_added(output):
    """What scripts/add_products.py wrote, a dict of arrays, empty ones where it wrote nothing. path, label, content [n]: the
    added images; removed: labels of train.csv that left the gallery; runs, stamps [R]: what embedded them; embeddings
    float32 [R, n, 512]."""
    file = Path(output) / ADDED
    if not file.exists():
        texts = ("path", "label", "content", "removed", "runs", "stamps")
        return dict.fromkeys(texts, np.empty(0, dtype=str)) | {"embeddings": np.empty((0, 0, EMBEDDING), np.float32)}
    return load_npz(file, "delete it and add the products again")


def gallery_key(run):
    """What the embeddings of a run's gallery depend on, as text."""
    return json.dumps([run["stamp"][key] for key in ("checkpoint", "sizes", "gem_p")])


def runs_digest(runs):
    """SHA-256 of the extract.json of each run: of all that its embeddings come from. Grown runs, whose stamp names added.npz,
    have another."""
    return fingerprint([[json.dumps(r["stamp"], sort_keys=True) for r in runs]])


def check_submission(output, scores, runs):
    """Refuse a submission.csv that is not what retrieve.py wrote with these scores, of scores.json, or not by the runs and the
    gallery that there are now."""
    more = added_stamp(output, load_added(output))
    grown = [r | {"stamp": r["stamp"] | more} for r in runs]
    if scores.get("submission") != file_fingerprint(Path(output) / "submission.csv"):
        raise InputError(f"{output}/submission.csv is not what retrieve.py wrote with scores.json; run retrieve.py again")
    if scores.get("stamps") != runs_digest(grown):
        raise InputError(f"{output}/submission.csv is of other runs or embeddings than there are now; run retrieve.py again")


def added_stamp(output, added):
    """What the stamp of each grown run says of the `added` of load_added; {} where nothing was added or removed."""
    return {"added": file_fingerprint(Path(output) / ADDED)} if len(added["path"]) or len(added["removed"]) else {}


def grow(runs, output, train):
    """The gallery as scripts/add_products.py left it: train.csv less the removed labels, then the added images; as it was where
    nothing was added or removed.

    Returns (runs, gallery): the runs with the embeddings of the gallery's rows [m, 512] as their "train", and without a head
    where it no longer fits the classes; DataFrame path, label, whose index is the row of train.csv, counted on for the added
    images: len(train) is the first of them."""
    added = load_added(output)
    if not (more_stamp := added_stamp(output, added)):
        return runs, train
    file, kept = Path(output) / ADDED, np.flatnonzero(~train["label"].isin(added["removed"]))
    number = np.arange(len(train), len(train) + len(added["path"]))
    new = pd.DataFrame({"path": added["path"], "label": added["label"]}, number, dtype=object)
    gallery = pd.concat([train.loc[kept, ["path", "label"]], new])
    # {run: (the gallery_key by which it embedded the added images, their embeddings)}
    embeddings = {name: rows for name, *rows in zip(added["runs"], added["stamps"], added["embeddings"], strict=True)}
    if gallery["label"].nunique() < 2:
        raise InputError(f"{file} leaves fewer than two labels in the gallery; delete it and add the products again")
    fits, grown = encode(gallery["label"])[0] == encode(train["label"])[0], []
    for r in runs:
        by, more = embeddings.get(r["name"], (None, r["train"][:0]))
        if len(new) and by != gallery_key(r):
            raise InputError(f"{file} does not come from {r['name']} as it is now; run scripts/add_products.py, it embeds the "
                             "added images again")
        grown.append(r | {"train": stacked(r["train"], kept, more, output), "kind": r["kind"] if fits else None,
                          "stamp": r["stamp"] | more_stamp})
    return grown, gallery


def stacked(array, rows, more, folder):
    """The given rows of an array [N, D], then all of `more` [n, D], in a file without a name: it takes disk, not memory, and is
    gone with the process."""
    folder = folder if os.access(folder, os.W_OK) else tempfile.gettempdir()
    with tempfile.TemporaryFile(dir=folder) as file:
        reserve(file, 4 * (len(rows) + len(more)) * array.shape[1], folder)
        result = np.memmap(file, np.float32, "w+", shape=(len(rows) + len(more), array.shape[1]))
    for part in blocks(len(rows)):
        result[part] = array[rows[part]]
    result[len(rows):] = more
    return result


def load_neighbours(output, queries, gallery):
    """(similarity, index) of output/neighbours.npz, [queries, k], both of them checked: rows of the test images and of the
    training images. Images in bad_images.csv have the index -1."""
    path, mend = Path(output) / "neighbours.npz", "run retrieve.py again"
    if not path.exists():
        raise InputError(f"{path} is not there; run retrieve.py first")
    file = load_npz(path, mend)
    similarity, index = (file.get(name, np.empty(0)) for name in ("similarity", "index"))
    if not (similarity.dtype == np.float32 and index.dtype == np.int64 and index.ndim == 2 and len(index) == queries and (
            similarity.shape == index.shape and (index >= -1).all() and (index < gallery).all())):
        raise InputError(f"{path} is of other images; {mend}")
    return similarity, index


def mean_heads(runs, split, rows=None):
    """Function of a slice -> mean head scores of the runs [n, C]; None when a run has no head for these classes."""
    if any(r["kind"] is None for r in runs):
        return None

    def mean(part):
        which = part if rows is None else rows[part]
        return torch.stack([head_scores(r[split][which], r["head"], r["kind"], r["stamp"]["centres"]) for r in runs]).mean(0)

    return mean


def label_test(runs, labels, classes, args, wanted, device, store=None):
    """Label the test images by all `runs` together: ({vote: class numbers}, similarity, index)."""
    gallery, queries = Joined([r["train"] for r in runs]), Joined([r["test"] for r in runs])
    return label(queries, gallery, labels, classes, mean_heads(runs, "test"), args, wanted, device, scratch(args), store)


def label_oof(runs, fold, labels, classes, args, wanted, device):
    """Label each training image by the runs that did not train on it, against the images of the other folds.
    Returns {vote: class numbers [N], -1 where no run held the image out}."""
    result = {vote: np.full(len(labels), -1) for vote in wanted}
    for k, out in by_fold(runs):
        held, rest, arrays = np.flatnonzero(fold == k), np.flatnonzero(fold != k), [r["train"] for r in out]
        predicted = label(Joined(arrays, held), Joined(arrays, rest), labels[rest], classes, mean_heads(out, "train", held),
                          args, wanted, device, scratch(args))[0]
        for vote in wanted:
            result[vote][held] = predicted[vote]
    return result


def nearest_classes(queries, gallery, numbers, count, args, device):
    """Class numbers [n, count] of each query's nearest classes, by their nearest rows; -1 where the gallery has no more.
    numbers [m]: the gallery's class numbers. Queries with too few classes among their k neighbours are searched more deeply."""
    result, todo, k = np.full((len(queries), count), -1), np.arange(len(queries)), 100
    there = min(count, len(np.unique(numbers)))
    while len(todo):
        rows = Joined(queries.arrays, todo)
        index = topk(rows, gallery, k, None, device, args.screen, args.memory)[1]
        for row, near in zip(todo, numbers[index], strict=True):
            classes = list(dict.fromkeys(near))[:count]
            result[row, :len(classes)] = classes
        todo, k = todo[result[todo, there - 1] < 0], k * 8
    return result


def scratch(args):
    """Folder of this process for what a search leaves while it runs."""
    return Path(args.output) / "search" / f"process{rank_and_world()[0]}"


def fitting(runs, names):
    """Those of the votes that these runs allow: some need heads that fit the classes."""
    heads = all(r["kind"] for r in runs)
    return [name for name in names if heads or name not in WITH_HEAD]


def score(predicted, truth):
    """{vote: accuracy over the rows that have a label}, or None when none has."""
    known = next(iter(predicted.values())) >= 0
    return {vote: round(accuracy(s[known], truth[known]), 4) for vote, s in predicted.items()} if known.any() else None


# ------------------------------------------------------------------------------------------- what is not in the gallery

# --reject. `strangers`: how near the gallery a photograph comes whose product is not in it, measured on held-out images whose
# product is taken out. `strangeness` of a photograph: the share of these strangers that come at least as near. It is UNKNOWN if
# that is above the rate. The runs have trained on the strangers' products, and tell them apart better than new ones; so, where
# leave_out.py has measured the strangeness of products that no run trained on, `calibrated`, the rank among these, counts.


def nearest_stranger(arrays, rows, gallery, own, labels, device):
    """Similarity of the `rows` of the arrays [N, D] to the nearest gallery row of another label, float32 [n]. own [n], labels
    [m]: class numbers."""
    best, todo, k = np.full(len(rows), -1.0, np.float32), np.arange(len(rows)), 64
    while len(todo):
        similarity, index = topk(Joined(arrays, rows[todo]), gallery, k, device=device)
        other = labels[index] != own[todo, None]
        first, found = other.argmax(1), other.any(1)
        best[todo] = np.take_along_axis(similarity, first[:, None], 1)[:, 0]
        todo, k = todo[~found], k * 8
    return best


def strangers(runs, grown, fold, own, numbers, output, device):
    """How near photographs of products come that are not in the gallery, by each fold's runs: {fold: similarities to the
    nearest gallery image, ascending}, of the images that these runs held out, each with its product taken out of the gallery.

    own [N], numbers [m]: class numbers of train.csv's rows and of the gallery's. Kept in output/strangers.npz, since
    scripts/classify.py is to be fast."""
    file, key = Path(output) / "strangers.npz", runs_digest(grown)
    arrays = on_first(lambda: load_npz(file, "delete it, it is made anew") if file.exists() else {})
    if arrays.pop("key", None) == key:
        return arrays
    found = {}
    for (k, out), (_, after) in zip(by_fold(runs), by_fold(grown), strict=True):
        rows, gallery = np.flatnonzero(fold == k), Joined([r["train"] for r in after])
        found[str(k)] = np.sort(nearest_stranger([r["train"] for r in out], rows, gallery, own[rows], numbers, device))
    if is_first():
        with contextlib.suppress(Unwritable):
            save_npz(file, own=True, key=key, **found)  # own: not of retrieve.py alone, which holds the lock
    return found


def nearest_by_fold(runs, device):
    """{fold: similarity of each test image to the nearest gallery image by the runs of that fold [n]}."""
    return {str(k): topk(Joined([r["test"] for r in out]), Joined([r["train"] for r in out]), 1, device=device)[0][:, 0]
            for k, out in by_fold(runs)}


def strangeness(near, found):
    """p-value [n] of "none of the products", high where a photograph is strange: the share of the strangers of all folds
    (`found` by `strangers`) that are at least as similar to the gallery as it, by their fold's runs. near: nearest_by_fold's.
    Sources: the nearest similarity, Sun et al., Out-of-distribution detection with deep nearest neighbors, ICML 2022; the ranks
    over folds, Vovk, Cross-conformal predictors, Annals of Mathematics and Artificial Intelligence 2015."""
    count = 1 + sum(len(others) - np.searchsorted(others, near[k]) for k, others in found.items())
    return count / (1 + sum(map(len, found.values())))


def embedding_settings(stamp):
    """What of an extract.json changes the embeddings of a checkpoint."""
    return [stamp[key] for key in ("sizes", "gem_p", "adapt_bn", "resize")]


def left_out(output, train):
    """The strangeness of products that no run trained on, by scripts/leave_out.py; None where it did not run, or for other
    training images, runs of another recipe or otherwise embedded."""
    file = Path(output) / LEFT_OUT
    if not file.exists():
        return None
    left = load_json(file, recipes=dict, embedded=dict, strangeness=list)
    same = left.get("train") == train_fingerprint(train)
    for name, recipe in left["recipes"].items():
        args, stamp = (Path(output) / name / file for file in ("args.json", "extract.json"))
        same = same and args.exists() and stamp.exists() and load_json(args) == recipe
        same = same and embedding_settings(load_json(stamp)) == left["embedded"].get(name)
    return np.array(left["strangeness"]) if same else None


def calibrated(strange, unseen):
    """The rank [n] of each photograph's strangeness among `unseen`, that of photographs of products that no run trained on: the
    p-value for really new products, where `strangeness` is too low, since the runs trained on the strangers' products."""
    return (1 + np.searchsorted(np.sort(unseen), strange, "right")) / (1 + len(unseen))


def rejecter(runs, grown, train, classes, numbers, args, device):
    """None without --reject; else a function of what nearest_by_fold says -> bool [n], True where a photograph is UNKNOWN."""
    if not args.reject:
        return None
    if UNKNOWN in classes:
        raise InputError(f"--reject: {UNKNOWN!r} is a label of the gallery; rename it")
    if not by_fold(runs):
        raise InputError("--reject needs runs that held images out; train runs of folds, not of 'all'")
    own = number_of(train["label"], classes)
    found = strangers(runs, grown, load_folds(args.output, train), own, numbers, args.output, device)
    unseen = left_out(args.output, train)
    count = sum(map(len, found.values())) if unseen is None else len(unseen)
    if args.reject < 1 / (1 + count):
        least = math.ceil(1e4 / (1 + count)) / 1e4
        raise InputError(f"--reject {args.reject}: {count} photographs tell what is strange, so give {least:g} or more")
    if unseen is None and is_first():
        print("the rate of --reject is that of products which the runs trained on; that of new ones is higher: "
              "scripts/leave_out.py measures by how much, and corrects it", file=sys.stderr)

    def rejects(near):
        strange = strangeness(near, found)
        return (strange if unseen is None else calibrated(strange, unseen)) > args.reject

    return rejects


# ------------------------------------------------------------------------------------------------------------- the work


def score_oof(args, runs, grown, train, labels, classes, vote, device):
    """Score the votes out-of-fold and write oof.csv. Returns (vote, {vote: accuracy}): the given vote, or with --vote auto the
    best, but where folds were drawn at random, which do not see a shift."""
    fold = load_folds(args.output, train)
    choose = args.vote == "auto" and folds_by(args.output) != "random"
    wanted = fitting(runs, VOTES if choose else [*DEFAULT_VOTES, vote])
    predicted = label_oof(runs, fold, labels, len(classes), args, wanted, device)
    scores = score(predicted, labels)
    if choose and scores:
        vote = max(["nearest", *fitting(grown, wanted)], key=scores.get)  # of equally good ones the first
        vote = on_first(lambda: vote)  # the same in all processes, whose processors may round differently
    if is_first():
        names = np.array([*classes, ""], object)  # the last, -1: no run held the image out
        save_csv(Path(args.output) / "oof.csv", train[["path", "label"]].assign(fold=fold, prediction=names[predicted[vote]]))
    return vote, scores


def search_test(args, runs, grown, train, classes, numbers, vote, device):
    """What all processes do together for the test images: ({vote: class numbers}, similarity, index, which are strange, the
    nearest classes for --top or None)."""
    key = fingerprint([(args.k, runs_digest(grown))])
    store = Store(Path(args.output) / "search", key) if is_first() else None
    wanted = list(dict.fromkeys([*fitting(grown, DEFAULT_VOTES), vote]))
    rejects, top = rejecter(runs, grown, train, classes, numbers, args, device), None
    predicted, similarity, index = label_test(grown, numbers, len(classes), args, wanted, device, store)
    strange = rejects(nearest_by_fold(grown, device)) if rejects else np.zeros(len(index), bool)
    if args.top:
        gallery, queries = (Joined([r[split] for r in grown]) for split in ("train", "test"))
        top = nearest_classes(queries, gallery, numbers, args.top, args, device)
    return predicted, similarity, index, strange, top


def write_test(args, test, good, truth, gallery, classes, numbers, vote, predicted, similarity, index, strange, top):
    """Write what search_test found of the readable images `good` of `test`; an image in bad_images.csv gets the most frequent
    label. truth: true labels, or None. Returns what scores.json says of it."""
    output = Path(args.output)
    predicted = {name: with_bad(test, good, own, np.bincount(numbers).argmax()) for name, own in predicted.items()}
    strange, similarity = with_bad(test, good, strange, False), with_bad(test, good, similarity, 0)
    save_npz(output / "neighbours.npz", similarity=similarity,
             index=with_bad(test, good, gallery.index.to_numpy()[index], -1))
    for name in ("confidence.csv", "top.csv"):  # of the former submission
        (output / name).unlink(missing_ok=True)
    names = np.array([*classes, ""], object)
    prediction = np.where(strange, UNKNOWN, names[predicted[vote]])
    save_csv(output / "submission.csv", test.assign(prediction=prediction))
    if args.top:
        likeliest = np.column_stack([prediction, names[with_bad(test, good, top, -1)]])  # the submission's label comes first
        rows = [[*dict.fromkeys(row), *[""] * args.top][:args.top] for row in likeliest]  # none twice
        columns = [f"label{i + 1}" for i in range(args.top)]
        save_csv(output / "top.csv", test[["filename"]].join(pd.DataFrame(rows, test.index, columns)))
    scores = {"submission": file_fingerprint(output / "submission.csv")}
    if truth is not None:
        true = number_of(truth, classes)
        scores["test"] = score(predicted, true)
    if args.reject:
        scores["reject"] = {"rate": args.reject, "kept": round(1 - strange.mean(), 4)}
        if truth is not None:
            right = predicted[vote] == true
            scores["reject"] |= {"accuracy_kept": None if strange.all() else round(right[~strange].mean(), 4),
                                 "false_accepts": None if (true >= 0).all() else round(1 - strange[true < 0].mean(), 4)}
    return scores


def retrieve(args, device, train, good):
    """Search, vote, write; returns the scores. good: the readable test images, or None. Under torchrun only the first process
    writes."""
    first = is_first()
    runs = load_runs(args.output, args.runs, train, good)
    grown, gallery = grow(runs, args.output, train)
    # Out-of-fold scores are of train.csv: runs, train, train_classes, labels. Test images are labelled by the gallery, which
    # scripts/add_products.py may have changed: grown, gallery, classes, numbers. (labels, numbers: class numbers of the rows.)
    (train_classes, labels), (classes, numbers) = encode(train["label"]), encode(gallery["label"])
    vote = "nearest" if args.vote == "auto" else args.vote
    if not fitting(grown, [vote]):
        raise InputError(f"--vote {vote} needs runs whose head fits these classes; use --vote sum")
    if good is not None:
        test = read_test(args.input, args.allow_outside)
        truth = read_solution(args.input, test["filename"])  # better refused before the search
    scores = {"runs": {r["name"]: r["stamp"]["checkpoint"] for r in runs}, "stamps": runs_digest(grown), "vote": vote,
              "k": args.k, "power": args.power, "head_power": args.head_power, "test": None, "oof": None}
    if first:
        (Path(args.output) / "oof.csv").unlink(missing_ok=True)
    if args.oof and folds_by(args.output) and by_fold(runs):
        vote, scores["oof"] = score_oof(args, runs, grown, train, labels, train_classes, vote, device)
        scores["vote"] = vote
    if good is not None:
        found = search_test(args, runs, grown, train, classes, numbers, vote, device)
        if first:
            scores |= write_test(args, test, good, truth, gallery, classes, numbers, vote, *found)
    if first:
        save_json(Path(args.output) / "scores.json", scores)
        shutil.rmtree(Path(args.output) / "search", ignore_errors=True)
    return scores


def main():
    args = parse_args()
    train, test = load_train(args), load_test(args)
    device = pick_device(args.device)
    with processes(device), lock(args.output):
        print(json.dumps(retrieve(args, device, train, test), ensure_ascii=False))


if __name__ == "__main__":
    run(main)
