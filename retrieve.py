"""Exact top-k similarity, voting, fusion: the labels of the test images.

Reads  input/{train.csv,sample_submission.csv[,solution.csv]}, output/folds.csv, the .npy of finished runs
Writes output/{neighbours.npz,submission.csv,scores.json}

    python retrieve.py                                              # all finished runs, fusion of the 5 nearest
    python retrieve.py --runs nfnet_l0/fold0 nfnet_l0/fold1 --vote sum --k 10
"""

import argparse
import json
from pathlib import Path

from utils import (
    InputError,
    accuracy,
    atomic,
    file_fingerprint,
    load_json,
    load_npy,
    lock,
    pick_device,
    progress,
    run,
    save_json,
)

import numpy as np
import torch

from dataset import encode, load_folds, read_solution, read_test, read_train, test_fingerprint, train_fingerprint
from extract import finished_runs


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--input", default="input", help="data folder (default input)")
    add("--output", default="output", help="results folder (default output)")
    add("--runs", nargs="+", metavar="ARCH/foldK", help="runs to join; default: every finished run")
    add("--vote", choices=["nearest", "sum", "fusion"], default="fusion",
        help="label of the nearest image; sum of similarity^power over k; that sum times head^head-power (default fusion)")
    add("--k", type=int, default=5, help="neighbours (default 5)")
    add("--power", type=float, default=9.0, help="exponent of the similarity (default 9)")
    add("--head-power", type=float, default=10.0, help="exponent of the head's cosine in the fusion (default 10)")
    add("--oof", action=argparse.BooleanOptionalAction, default=True,
        help="also score each training image by the runs that did not train on it (default on)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")
    args = parser.parse_args()
    if args.k < 1:
        parser.error("--k needs at least 1 neighbour")
    return args


# --------------------------------------------------------------------------------------------------------------- search


def normalise(x):
    """Rows of a float tensor [N, D] to length 1 in float32, safe for tiny and huge ones; a zero row stays zero."""
    x = x.float()
    x = x / x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


class Joined:
    """The runs' embeddings side by side, each L2-normalised first; blocks of rows are read from the memory maps."""

    def __init__(self, arrays, rows=None):
        assert len({len(a) for a in arrays}) == 1, [a.shape for a in arrays]
        self.arrays, self.rows = arrays, np.arange(len(arrays[0])) if rows is None else np.asarray(rows)
        self.shape = (len(self.rows), sum(a.shape[1] for a in arrays))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, part):
        rows = self.rows[part]
        return torch.cat([normalise(torch.from_numpy(a[rows])) for a in self.arrays], 1)


def block(vectors, start, size, device, what):
    """Rows start .. start + size, normalised, on the device. InputError for a row that is not finite."""
    rows = vectors[start:start + size]
    rows = torch.as_tensor(np.array(rows) if isinstance(rows, np.ndarray) else rows).to(device, torch.float32)
    finite = torch.isfinite(rows).all(1)
    if not finite.all():
        raise InputError(f"row {start + int((~finite).nonzero()[0])} of the {what} is NaN or infinite; extract it again")
    return normalise(rows)


def topk_row(similarity, k):
    """Top k of each row of a block, best first, ties by lower column: (similarity [n, k], column [n, k])."""
    k = min(k, similarity.shape[1])
    value, index = similarity.topk(min(k + 1, similarity.shape[1]), sorted=True)
    # torch.topk takes any of several equal entries. Where a tie reaches over the edge, sort the whole row instead.
    edge = (value[:, k - 1] == value[:, -1]).nonzero()[:, 0] if value.shape[1] > k else []
    value, index = value[:, :k], index[:, :k]
    if len(edge):
        value, index = value.clone(), index.clone()
        v, i = similarity[edge].sort(dim=1, descending=True, stable=True)
        value[edge], index[edge] = v[:, :k], i[:, :k]
    order = index.argsort(1)
    value, index = value.gather(1, order), index.gather(1, order)
    value, order = value.sort(dim=1, descending=True, stable=True)
    return value, index.gather(1, order)


def topk(queries, gallery, k, exclude=None, device="cpu", query_block=4096, gallery_block=16384):
    """Exact k nearest gallery rows by cosine similarity, by blocks: the full similarity matrix never exists.

    queries [n, D], gallery [m, D]: arrays, memory maps, tensors or Joined, of any float type; rows are L2-normalised here.
    exclude [n]: gallery row that query i must not match (itself, in a leave-one-out search), -1 for none.
    Returns (similarity float32 [n, k], index int64 [n, k]) as NumPy arrays, best first, equal similarities by lower
    index; k beyond the gallery (less the excluded row) gives that many columns. A zero row has similarity 0 to all.
    InputError names a NaN row.
    """
    assert queries.shape[1] == gallery.shape[1], f"{queries.shape[1]} and {gallery.shape[1]} dimensions"
    device, n, m = torch.device(device), len(queries), len(gallery)
    masked = exclude is not None and bool((np.asarray(exclude) >= 0).any())
    k = max(0, min(k, m - masked))
    similarity, index = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    if k == 0:
        return similarity, index
    starts = range(0, n, query_block)
    for q in progress(starts, "search") if n * m > 10**8 else starts:
        query = block(queries, q, query_block, device, "queries")
        best = torch.empty(len(query), 0, device=device), torch.empty(len(query), 0, dtype=torch.int64, device=device)
        for g in range(0, m, gallery_block):
            product = query @ block(gallery, g, gallery_block, device, "gallery").T
            if masked:
                own = torch.as_tensor(np.asarray(exclude[q:q + query_block]), device=device) - g
                rows = ((own >= 0) & (own < product.shape[1])).nonzero()[:, 0]
                product[rows, own[rows]] = -torch.inf
            value, column = topk_row(product, k)
            value, column = torch.cat([best[0], value], 1), torch.cat([best[1], column + g], 1)
            value, order = value.sort(dim=1, descending=True, stable=True)  # earlier blocks first: ties by lower index
            best = value[:, :k], column.gather(1, order[:, :k])
        similarity[q:q + query_block], index[q:q + query_block] = (t.cpu().numpy() for t in best)
    return similarity, index


# ---------------------------------------------------------------------------------------------------------------- votes
# Each: (similarity [n, k], label [n, k] of the neighbours, number of classes, ...) -> class scores [n, C].


def vote_nearest(similarity, label, classes):
    """The best similarity of each class."""
    scores = torch.full((len(label), classes), -1.0)
    return scores.scatter_reduce(1, label, similarity, "amax", include_self=False)


def vote_sum(similarity, label, classes, power=9.0):
    """sum of similarity^power over the neighbours of each class. Negative similarities count 1e-6: a class with a
    neighbour stays ahead of one without. In float64, where such powers do not vanish."""
    scores = torch.zeros(len(label), classes, dtype=torch.float64)
    return scores.scatter_add(1, label, similarity.double().clamp(min=1e-6).pow(power))


def vote_fusion(similarity, label, classes, head, power=9.0, head_power=10.0):
    """The original solution's: vote_sum times head(c)^head_power, where head [n, C] is the mean head cosine and counts
    1e-8 outside its five best classes."""
    best = head.topk(min(5, classes), 1)
    weight = torch.full(head.shape, 1e-8, dtype=torch.float64).scatter(1, best.indices, best.values.double())
    return vote_sum(similarity, label, classes, power) * weight.clamp(min=1e-8).pow(head_power)


def head_scores(embeddings, head, kind):
    """What the classifier head says of embeddings [n, 512]: cosines (ArcFace), probabilities (softmax), float32 [n, C]."""
    if kind == "softmax":
        return (torch.from_numpy(np.array(embeddings)) @ torch.from_numpy(np.array(head)).T).softmax(1)
    return normalise(torch.from_numpy(np.array(embeddings))) @ normalise(torch.from_numpy(np.array(head))).T


def predict(similarity, index, labels, classes, heads, args, votes, step=8192):
    """Class number of each query by each of `votes`: {vote: int64 [n]}. `labels` [m]: the gallery's class numbers;
    `heads`: function of a slice of the queries -> mean head scores [n, C], or None for runs without a head."""
    result = {vote: np.empty(len(index), np.int64) for vote in votes}
    for start in range(0, len(index), step):
        part = slice(start, start + step)
        sim, lab = torch.from_numpy(similarity[part]), torch.from_numpy(labels[index[part]])
        head = heads(part) if heads else None
        scores = {"head": head, "nearest": vote_nearest(sim, lab, classes), "sum": vote_sum(sim, lab, classes, args.power)}
        if heads:
            scores["fusion"] = vote_fusion(sim, lab, classes, head, args.power, args.head_power)
        for vote in votes:
            result[vote][part] = scores[vote].argmax(1).numpy()
    return result


# ----------------------------------------------------------------------------------------------------------------- runs


def load_runs(output, names, train, test):
    """The runs' embeddings and heads, refused where they are of other rows or of another checkpoint."""
    folders = finished_runs(output) if not names else [Path(output) / name for name in names]
    runs = []
    for folder in folders:
        if not (folder / "extract.json").exists():
            raise InputError(f"{folder} has no embeddings; run extract.py first")
        stamp = load_json(folder / "extract.json")
        for what, have in [("train.csv", train_fingerprint(train)),
                           ("sample_submission.csv", test_fingerprint(test) if test is not None else stamp["test"])]:
            if stamp["train" if what == "train.csv" else "test"] != have:
                raise InputError(f"{folder} was extracted from another {what} (other rows or order); run extract.py again")
        if stamp["checkpoint"] != file_fingerprint(folder / "best.pt"):
            raise InputError(f"{folder}: best.pt is not the checkpoint that its embeddings come from; run extract.py again")
        head = load_npy(folder / "head.npy", (stamp["classes"], None))
        runs.append({"name": f"{folder.parent.name}/{folder.name}", "arch": folder.parent.name,
                     "fold": stamp["fold"], "kind": stamp["head"], "head": head,
                     "train": load_npy(folder / "train.npy", (len(train), None)),
                     "test": None if test is None else load_npy(folder / "test.npy", (len(test), None))})
    return runs


def mean_heads(runs, split, rows=None):
    """Function of a slice -> mean head scores of the runs [n, C]; None when a run has no head for these classes."""
    if any(r["kind"] is None for r in runs):
        return None
    pick = (lambda part: part) if rows is None else (lambda part: rows[part])
    return lambda part: torch.stack([head_scores(r[split][pick(part)], r["head"], r["kind"]) for r in runs]).mean(0)


def label_test(runs, labels, classes, args, votes, device):
    """Label the test images by all `runs` together: ({vote: class numbers}, similarity, index)."""
    gallery, queries = Joined([r["train"] for r in runs]), Joined([r["test"] for r in runs])
    similarity, index = topk(queries, gallery, args.k, device=device)
    return predict(similarity, index, labels, classes, mean_heads(runs, "test"), args, votes), similarity, index


def label_oof(runs, fold, labels, classes, args, votes, device):
    """Label each training image by the runs that did not train on it, against the images of the other folds.
    Returns {vote: class numbers [N], -1 where no run held the image out}."""
    result = {vote: np.full(len(labels), -1) for vote in votes}
    for k in range(fold.max() + 1):
        held, rest = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        out = [r for r in runs if r["fold"] == str(k)]
        if out:
            arrays = [r["train"] for r in out]
            similarity, index = topk(Joined(arrays, held), Joined(arrays, rest), args.k, device=device)
            said = predict(similarity, index, labels[rest], classes, mean_heads(out, "train", held), args, votes)
            for vote in votes:
                result[vote][held] = said[vote]
    return result


def score(said, truth):
    """{vote: accuracy over the rows that have a label}, or None when none has."""
    known = next(iter(said.values())) >= 0
    return {vote: round(accuracy(s[known], truth[known]), 4) for vote, s in said.items()} if known.any() else None


def retrieve(args, device, train, test, classes, labels):
    """Search, vote, write; returns the scores."""
    runs = load_runs(args.output, args.runs, train, test)
    votes = ["head", "nearest", "sum", "fusion"] if mean_heads(runs, "train") else ["nearest", "sum"]
    if args.vote not in votes:
        raise InputError("--vote fusion needs runs whose head fits these classes; use --vote sum")
    scores = {"runs": [r["name"] for r in runs], "vote": args.vote, "k": args.k, "power": args.power,
              "head_power": args.head_power, "test": None, "oof": None}

    if args.oof and any(str(r["fold"]).isdecimal() for r in runs) and (Path(args.output) / "folds.csv").exists():
        fold = load_folds(args.output, train)
        scores["oof"] = score(label_oof(runs, fold, labels, len(classes), args, votes, device), labels)
    if test is not None:
        said, similarity, index = label_test(runs, labels, len(classes), args, votes, device)
        with atomic(Path(args.output) / "neighbours.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, similarity=similarity, index=index)
        with atomic(Path(args.output) / "submission.csv") as temporary:
            test.assign(prediction=np.array(classes, object)[said[args.vote]]).to_csv(temporary, index=False)
        truth = read_solution(args.input, test["filename"])
        if truth is not None:
            number = {label: i for i, label in enumerate(classes)}
            scores["test"] = score(said, np.array([number.get(label, -2) for label in truth]))
    save_json(Path(args.output) / "scores.json", scores)
    return scores


def main():
    args = parse_args()
    device = pick_device(args.device)
    train = read_train(args.input)
    test = read_test(args.input) if (Path(args.input) / "sample_submission.csv").exists() else None
    classes, labels = encode(train["label"])
    with lock(args.output):
        scores = retrieve(args, device, train, test, classes, labels)
    print(json.dumps(scores, ensure_ascii=False))


if __name__ == "__main__":
    run(main)
