"""Load runs, search, vote, write: the labels of the test images.

Reads  input/{train.csv,sample_submission.csv[,solution.csv]}, output/folds.csv, the .npy of finished runs; output/added.npz (by
       scripts/add_products.py) and, to reject, output/left_out.json (by scripts/leave_out.py)
Writes output/{neighbours.npz,submission.csv,scores.json,oof.csv}; to reject, output/strangers.npz

    python retrieve.py                                              # all finished runs, label of the nearest image
    python retrieve.py --runs nfnet_l0/fold0 nfnet_l0/fold1 --vote sum --k 10
    python retrieve.py --reject 0.05                                # 'unknown' where it may be none of the products
    torchrun --nproc_per_node 4 retrieve.py                         # the gallery shared among processes, one GPU each
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from utils import (
    InputError,
    accuracy,
    atomic,
    file_fingerprint,
    fingerprint,
    load_json,
    load_npy,
    load_npz,
    lock,
    new_npy,
    normalise,
    pick_device,
    processes,
    run,
    save_json,
    script_parser,
)

import numpy as np
import torch
import torch.distributed as dist

import votes
from catalogue import grow, left_out, ranks, strangeness, strangers
from dataset import (
    encode,
    folds_by,
    load_folds,
    load_test,
    load_train,
    read_solution,
    read_test,
    test_fingerprint,
    train_fingerprint,
    with_bad,
)
from extract import finished_runs
from search import SCREENS, Joined, Store, merge, topk

UNKNOWN = "unknown"  # the label of a photograph that --reject takes for none of the products
EXPLAINED = votes.INDUCTIVE | votes.TRANSDUCTIVE
VOTES = ["head", *EXPLAINED]
DEFAULT_VOTES = ["head", "nearest", "sum", "fusion"]  # always scored, for comparison


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", metavar="ARCH/foldK", help="runs to join; default: every finished run")
    add("--vote", choices=["auto", *VOTES], default="auto", metavar="VOTE", help="which labels the submission gets (default "
        "auto: where folds were drawn by look or group, the vote that is right most often out-of-fold; else nearest, since "
        "folds at random do not see the shift). " + "; ".join(f"{name}: {what}" for name, what in EXPLAINED.items())
        + ". The last three use that all test images are there at once; a label then depends on which others came with it")
    add("--oof", action=argparse.BooleanOptionalAction, default=True,
        help="also score each training image by the runs that did not train on it (default on)")
    reject_flag(parser)
    vote_flags(parser)
    args = parser.parse_args()
    check_vote_flags(parser, args)
    check_reject_flag(parser, args)
    return args


def reject_flag(parser):
    parser.add_argument("--reject", type=float, metavar="RATE", help=f"label {UNKNOWN!r} what may be none of the products: of "
        "photographs of products that are not in the gallery this share still gets a label, 0..1, e.g. 0.05 (default: every "
        "photograph gets one). scripts/leave_out.py makes the rate true")


def check_reject_flag(parser, args):
    if args.reject is not None and not 0 < args.reject < 1:
        parser.error("--reject must be more than 0 and less than 1")


def vote_flags(parser):
    """The flags of search and votes, for every script that labels."""
    add = parser.add_argument
    add("--k", type=int, default=5, help="neighbours (default 5)")
    add("--power", type=float, default=9.0, help="sum, fusion: exponent of the similarity (default 9)")
    add("--head-power", type=float, default=10.0, help="fusion: exponent of the head's cosine (default 10)")
    add("--mix", type=float, default=0.5, help="mix: share of the similarity, 0..1 (default 0.5)")
    add("--graph-k", type=int, default=10, help="expansion, propagation: neighbours (default 10)")
    add("--alpha", type=float, default=3.0, help="expansion, propagation: exponent of the similarity (default 3)")
    add("--damping", type=float, default=0.9, help="propagation: share that comes from neighbours, 0..1 (default 0.9)")
    add("--centre", choices=["own", "joint"], default="own", help="centring: queries and gallery each lose their own mean, or "
        "that of both together (default own)")
    add("--temperature", type=float, default=0.05, help="recentring: of the softmax over cosines (default 0.05)")
    add("--screen", choices=["auto", *SCREENS], default="auto", help="precision of the search's first look; the result is the "
        "same (default auto: the fastest here)")
    add("--memory", type=float, help="GiB that the search may use (default 1; on a GPU half of what is free)")


def check_vote_flags(parser, args):
    if min(args.k, args.graph_k) < 1 or (args.memory is not None and not args.memory > 0) or not args.temperature > 0:
        parser.error("--k and --graph-k need at least 1 neighbour, --memory and --temperature more than 0")
    if not (0 <= args.mix <= 1 and 0 <= args.damping < 1):
        parser.error("--mix must be 0..1, --damping 0 or more and below 1")


# -------------------------------------------------------------------------------------------------------------- labels


def head_scores(embeddings, head, kind, centres=1):
    """What the classifier head says of embeddings [n, 512]: cosines (ArcFace), probabilities (softmax), float32 [n, C].
    head [C, 512]; with sub-centres [C * centres, 512], the nearest of a class counts."""
    if kind == "softmax":
        return (torch.from_numpy(np.array(embeddings)) @ torch.from_numpy(np.array(head)).T).softmax(1)
    cosine = normalise(torch.from_numpy(np.array(embeddings))) @ normalise(torch.from_numpy(np.array(head))).T
    return cosine.unflatten(1, (-1, centres)).amax(2)


def label(queries, gallery, labels, classes, heads, args, wanted, device, scratch, store=None):
    """Class numbers of the queries by each of the votes `wanted`: ({vote: int64 [n]}, similarity, index).

    queries, gallery: Joined. labels [m]: the gallery's class numbers. heads: function of a slice of the queries -> mean head
    scores [n, C], or None. scratch: folder for embeddings that a vote changes.
    """
    def search(left, right, k, exclude=None, store=None):
        return topk(left, right, k, exclude, device, args.screen, args.memory, store)

    def changed(name, like):
        scratch.mkdir(parents=True, exist_ok=True)
        return new_npy(scratch / f"{name}.npy", np.float32, like.shape)

    def nearest_of(left, right):
        return labels[search(left, right, 1)[1][:, 0]]

    similarity, index = search(queries, gallery, args.k, store=store)
    result = {vote: np.empty(len(queries), np.int64) for vote in wanted}
    for part in votes.blocks(len(queries), 8192):
        near, number = torch.from_numpy(similarity[part]), torch.from_numpy(labels[index[part]])
        head = heads(part) if heads else None
        for vote in result.keys() - votes.OF_EMBEDDINGS:
            scores = votes.of_neighbours(vote, near, number, classes, head, args)
            result[vote][part] = scores.argmax(1).numpy()
    if "centroid" in wanted:
        result["centroid"] = votes.centroid(queries, gallery, labels, classes).argmax(1).numpy()
    if "recentring" in wanted:
        result["recentring"] = votes.recentring(queries, gallery, labels, classes, args.temperature).argmax(1).numpy()
    if "centring" in wanted:
        both = votes.mean_row(queries, gallery) if args.centre == "joint" else None
        result["centring"] = nearest_of(*(votes.centred(x, votes.mean_row(x) if both is None else both, changed(name, x))
                                          for name, x in [("q", queries), ("g", gallery)]))
    if "expansion" in wanted:
        near = search(queries, gallery, args.graph_k), search(gallery, gallery, args.graph_k, np.arange(len(gallery)))
        result["expansion"] = nearest_of(*(votes.expanded(x, gallery, *found, changed(name, x), args.alpha)
                                           for name, x, found in zip("qg", (queries, gallery), near, strict=True)))
    if "propagation" in wanted:
        graph = joint_graph(queries, gallery, args.graph_k, search)
        result["propagation"] = votes.propagation(*graph, labels, classes, args.damping, args.alpha).argmax(1).numpy()
    return result, similarity, index


def joint_graph(queries, gallery, k, search):
    """Neighbours of all nodes, the gallery first, then the queries, among all nodes but themselves: (similarity, index)."""
    m, n = len(gallery), len(queries)
    rows = []
    for nodes, own in [(gallery, (np.arange(m), None)), (queries, (None, np.arange(n)))]:
        found = [search(nodes, others, k, exclude) for others, exclude in zip((gallery, queries), own, strict=True)]
        near, which = (torch.from_numpy(np.concatenate(pair, 1)) for pair in
                       [(found[0][0], found[1][0]), (found[0][1], found[1][1] + m)])
        rows.append(merge(near, which, k))
    width = min(r[0].shape[1] for r in rows)
    return tuple(torch.cat([r[i][:, :width] for r in rows]).numpy() for i in range(2))


# ----------------------------------------------------------------------------------------------------------------- runs


def load_runs(output, names, train, test):
    """The runs' embeddings and heads, refused where they are of other rows or of another checkpoint, or not as written."""
    folders = finished_runs(output) if not names else [Path(output) / name for name in names]
    fold = load_folds(output, train) if (Path(output) / "folds.csv").exists() else None
    runs = []
    for folder in folders:
        if not (folder / "extract.json").exists():
            raise InputError(f"{folder} has no embeddings; run extract.py first")
        stamp = load_json(folder / "extract.json", train=str, checkpoint=str, classes=int, centres=int, sizes=list, resize=str,
                          files=dict)
        for what, have in [("train.csv", train_fingerprint(train)),
                           ("sample_submission.csv", test_fingerprint(test) if test is not None else stamp.get("test"))]:
            if stamp["train" if what == "train.csv" else "test"] != have:
                raise InputError(f"{folder} was extracted from another {what} (other rows or order); run extract.py again")
        if stamp["checkpoint"] != file_fingerprint(folder / "best.pt"):
            raise InputError(f"{folder}: best.pt is not the checkpoint that its embeddings come from; run extract.py again")
        if fold is not None and stamp.get("held_out") and str(stamp.get("fold")).isdecimal() and (
                stamp["held_out"] != train_fingerprint(train[fold == int(stamp.get("fold"))])):
            raise InputError(f"{folder} held out other images than {output}/folds.csv says; put the old folds.csv back, or use "
                             "another --output")
        centres = stamp["centres"]

        def embeddings(name, rows, folder=folder, files=stamp["files"]):
            return load_npy(folder / name, (rows, None), files.get(name, "none"))

        runs.append({"name": f"{folder.parent.name}/{folder.name}", "arch": folder.parent.name,
                     "fold": stamp.get("fold"), "stamp": stamp, "kind": stamp.get("head"), "centres": centres,
                     "head": embeddings("head.npy", stamp["classes"] * centres),
                     "train": embeddings("train.npy", len(train)),
                     "test": None if test is None else embeddings("test.npy", len(test))})
    return runs


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
    pick = (lambda part: part) if rows is None else (lambda part: rows[part])
    return lambda part: torch.stack([head_scores(r[split][pick(part)], r["head"], r["kind"], r["centres"])
                                     for r in runs]).mean(0)


def label_test(runs, labels, classes, args, wanted, device, store=None):
    """Label the test images by all `runs` together: ({vote: class numbers}, similarity, index)."""
    gallery, queries = Joined([r["train"] for r in runs]), Joined([r["test"] for r in runs])
    return label(queries, gallery, labels, classes, mean_heads(runs, "test"), args, wanted, device, scratch(args), store)


def label_oof(runs, fold, labels, classes, args, wanted, device):
    """Label each training image by the runs that did not train on it, against the images of the other folds.
    Returns {vote: class numbers [N], -1 where no run held the image out}."""
    result = {vote: np.full(len(labels), -1) for vote in wanted}
    for k in range(fold.max() + 1):
        held, rest = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        out = [r for r in runs if r["fold"] == str(k)]
        if out and len(held):
            arrays = [r["train"] for r in out]
            said = label(Joined(arrays, held), Joined(arrays, rest), labels[rest], classes, mean_heads(out, "train", held),
                         args, wanted, device, scratch(args))[0]
            for vote in wanted:
                result[vote][held] = said[vote]
    return result


def reject(runs, grown, train, classes, numbers, args, device):
    """Which of the test images --reject takes for none of the products, bool [n]."""
    if UNKNOWN in classes:
        raise InputError(f"--reject: {UNKNOWN!r} is a label of the gallery; rename it")
    if not any(str(r["fold"]).isdecimal() for r in runs):
        raise InputError("--reject needs runs that held images out; train runs of folds, not of 'all'")
    number = {label: i for i, label in enumerate(classes)}
    own = np.array([number.get(label, -1) for label in train["label"]])
    found = strangers(runs, grown, load_folds(args.output, train), own, numbers, args.output, device)
    strange, unseen = strangeness(grown, found, device), left_out(args.output)
    if unseen is None:
        print("the rate of --reject is that of products which the runs trained on; that of new ones is higher: "
              "scripts/leave_out.py measures by how much, and corrects it", file=sys.stderr)
        return strange > args.reject
    return ranks(strange, unseen) > args.reject


def scratch(args):
    """Folder of this process for what a search leaves while it runs."""
    return Path(args.output) / "search" / (f"process{dist.get_rank()}" if dist.is_initialized() else "process0")


def fitting(runs, names):
    """Those of the votes that these runs allow: some need heads that fit the classes."""
    return [name for name in names if name not in votes.WITH_HEAD or mean_heads(runs, "train")]


def score(said, truth):
    """{vote: accuracy over the rows that have a label}, or None when none has."""
    known = next(iter(said.values())) >= 0
    return {vote: round(accuracy(s[known], truth[known]), 4) for vote, s in said.items()} if known.any() else None


def retrieve(args, device, train, test):
    """Search, vote, write; returns the scores. Under torchrun only the first process writes."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    runs = load_runs(args.output, args.runs, train, test)
    grown, gallery = grow(runs, args.output, train)
    (trained, labels), (classes, numbers) = encode(train["label"]), encode(gallery["label"])
    vote, by = "nearest" if args.vote == "auto" else args.vote, folds_by(args.output)
    if not fitting(grown, [vote]):
        raise InputError(f"--vote {vote} needs runs whose head fits these classes; use --vote sum")
    scores = {"runs": {r["name"]: r["stamp"]["checkpoint"] for r in runs}, "vote": vote, "k": args.k, "power": args.power,
              "head_power": args.head_power, "test": None, "oof": None}
    if first:
        (Path(args.output) / "oof.csv").unlink(missing_ok=True)

    if args.oof and by and any(str(r["fold"]).isdecimal() for r in runs):
        choose = args.vote == "auto" and by != "random"
        wanted, fold = fitting(runs, VOTES if choose else [*DEFAULT_VOTES, vote]), load_folds(args.output, train)
        said = label_oof(runs, fold, labels, len(trained), args, wanted, device)
        scores["oof"] = score(said, labels)
        if choose and scores["oof"]:
            vote = scores["vote"] = max(["nearest", *fitting(grown, wanted)], key=scores["oof"].get)  # of equal ones the first
        if first:
            with atomic(Path(args.output) / "oof.csv") as temporary:
                names = np.array([*trained, ""], object)  # the last, -1: no run held the image out
                train[["path", "label"]].assign(fold=fold, prediction=names[said[vote]]).to_csv(temporary, index=False)
    wanted = list(dict.fromkeys([*fitting(grown, DEFAULT_VOTES), vote]))
    if test is not None:
        begun = Path(args.output) / "search"
        key = fingerprint([(args.k, *(json.dumps(r["stamp"]) for r in grown))])
        store = Store(begun, key) if first else None
        said, similarity, index = label_test(grown, numbers, len(classes), args, wanted, device, store)
        strange = reject(runs, grown, train, classes, numbers, args, device) if args.reject else np.zeros(len(test), bool)
        if not first:
            return scores
        good, test = test, read_test(args.input, args.allow_outside)  # an image in bad_images.csv gets the most frequent label
        said = {name: with_bad(test, good, own, np.bincount(numbers).argmax()) for name, own in said.items()}
        strange, similarity = with_bad(test, good, strange, False), with_bad(test, good, similarity, 0)
        index = with_bad(test, good, gallery.index.to_numpy()[index], -1)
        with atomic(Path(args.output) / "neighbours.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, similarity=similarity, index=index)
        with atomic(Path(args.output) / "submission.csv") as temporary:
            prediction = np.where(strange, UNKNOWN, np.array(classes, object)[said[vote]])
            test.assign(prediction=prediction).to_csv(temporary, index=False)
        truth = read_solution(args.input, test["filename"])
        if truth is not None:
            number = {label: i for i, label in enumerate(classes)}
            true = np.array([number.get(label, -2) for label in truth])
            scores["test"] = score(said, true)
        if args.reject:
            scores["reject"] = {"rate": args.reject, "kept": round(1 - strange.mean(), 4)}
            if truth is not None:
                right = said[vote] == true
                scores["reject"] |= {"accuracy_kept": None if strange.all() else round(right[~strange].mean(), 4),
                                     "false_accepts": None if (true >= 0).all() else round(1 - strange[true < 0].mean(), 4)}
    if first:
        save_json(Path(args.output) / "scores.json", scores)
        shutil.rmtree(Path(args.output) / "search", ignore_errors=True)
    return scores


def main():
    args = parse_args()
    train, test = load_train(args), load_test(args)
    device = pick_device(args.device)
    with processes(device) as first, lock(args.output):
        scores = retrieve(args, device, train, test)
    if first:
        print(json.dumps(scores, ensure_ascii=False))


if __name__ == "__main__":
    run(main)
