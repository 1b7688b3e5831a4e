"""What is in the catalogue and what is not: the gallery as scripts/add_products.py left it, and what photographs of products
that it lacks look like.
"""

import json
import tempfile
from pathlib import Path

from utils import InputError, atomic, file_fingerprint, fingerprint, load_json, load_npz

import numpy as np
import pandas as pd
import torch.distributed as dist

from dataset import encode
from models import EMBEDDING
from search import Joined, topk
from votes import blocks

ADDED, LEFT_OUT = "added.npz", "left_out.json"  # below output, by scripts/add_products.py and scripts/leave_out.py

# ---------------------------------------------------------------------------------------------------------- what is in it


def load_added(output):
    """What scripts/add_products.py wrote, a dict of arrays, empty ones where it wrote nothing. path, label, content [n]: the
    added images; removed: labels of train.csv that left the gallery; runs, stamps [R]: what embedded them; embeddings
    float32 [R, n, 512]."""
    file = Path(output) / ADDED
    if not file.exists():
        texts = ("path", "label", "content", "removed", "runs", "stamps")
        return dict.fromkeys(texts, np.empty(0, dtype=str)) | {"embeddings": np.empty((0, 0, EMBEDDING), np.float32)}
    return load_npz(file, "delete it and add the products again")


def embedded_by(run):
    """What the embeddings of a run's gallery depend on, as text."""
    return json.dumps([run["stamp"][key] for key in ("checkpoint", "sizes", "gem_p")])


def grow(runs, output, train):
    """The gallery as scripts/add_products.py left it: train.csv less the removed labels, then the added images; as it was where
    nothing was added or removed.

    Returns (runs, gallery): the runs with the embeddings of the gallery's rows [m, 512] as their "train", and without a head
    where it no longer fits the classes; DataFrame path, label, whose index is the row of train.csv, counted on for the added
    images: len(train) is the first of them."""
    added = load_added(output)
    if not len(added["path"]) and not len(added["removed"]):
        return runs, train
    file, kept = Path(output) / ADDED, np.flatnonzero(~train["label"].isin(added["removed"]))
    number = np.arange(len(train), len(train) + len(added["path"]))
    new = pd.DataFrame({"path": added["path"], "label": added["label"]}, number, dtype=object)
    gallery = pd.concat([train.loc[kept, ["path", "label"]], new])
    embeddings = {name: rows for name, *rows in zip(added["runs"], added["stamps"], added["embeddings"], strict=True)}
    fits, stamp, grown = encode(gallery["label"])[0] == encode(train["label"])[0], file_fingerprint(file), []
    for r in runs:
        by, more = embeddings.get(r["name"], (None, r["train"][:0]))
        if len(new) and by != embedded_by(r):
            raise InputError(f"{file} does not come from {r['name']} as it is now; run scripts/add_products.py, it embeds the "
                             "added images again")
        grown.append(r | {"train": stacked(r["train"], kept, more, output), "kind": r["kind"] if fits else None,
                          "stamp": r["stamp"] | {"added": stamp}})
    return grown, gallery


def stacked(array, rows, more, folder):
    """The given rows of an array [N, D], then all of `more` [n, D], in a file without a name: it takes disk, not memory, and is
    gone with the process."""
    with tempfile.TemporaryFile(dir=folder) as file:
        result = np.memmap(file, np.float32, "w+", shape=(len(rows) + len(more), array.shape[1]))
    for part in blocks(len(rows)):
        result[part] = array[rows[part]]
    result[len(rows):] = more
    return result


# ---------------------------------------------------------------------------------------------------------- what is not


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
    """What photographs of products that are not in the gallery look like to each fold's runs: {fold: similarities to the
    nearest gallery image, ascending}, of the images that these runs held out, each with its product taken out of the gallery.

    own [N], numbers [m]: class numbers of train.csv's rows and of the gallery's. Kept in output/strangers.npz, since
    scripts/classify.py is to be fast."""
    file, key = Path(output) / "strangers.npz", fingerprint([[json.dumps(r["stamp"]) for r in grown]])
    if file.exists():
        arrays = load_npz(file, "delete it, it is made anew")
        if arrays.pop("key", None) == key:
            return arrays
    found = {}
    for k in range(fold.max() + 1):
        out, rows = [i for i, r in enumerate(runs) if r["fold"] == str(k)], np.flatnonzero(fold == k)
        if out and len(rows):
            gallery = Joined([grown[i]["train"] for i in out])
            near = nearest_stranger([runs[i]["train"] for i in out], rows, gallery, own[rows], numbers, device)
            found[str(k)] = np.sort(near)
    if not dist.is_initialized() or dist.get_rank() == 0:
        with atomic(file) as temporary, open(temporary, "wb") as opened:
            np.savez(opened, key=key, **found)
    return found


def strangeness(runs, found, device):
    """How likely a photograph of a product that is not in the gallery is as similar to it as a test image is, [n]: a p-value,
    the share of the `strangers` found that are, those of each fold compared by its own runs.
    Sources: the nearest similarity, Sun et al., Out-of-distribution detection with deep nearest neighbors, ICML 2022; the ranks
    over folds, Vovk, Cross-conformal predictors, Annals of Mathematics and Artificial Intelligence 2015."""
    count = np.ones(len(runs[0]["test"]))
    for k, near in found.items():
        out = [r for r in runs if r["fold"] == k]
        best = topk(Joined([r["test"] for r in out]), Joined([r["train"] for r in out]), 1, device=device)[0][:, 0]
        count += len(near) - np.searchsorted(near, best)
    return count / (1 + sum(map(len, found.values())))


def left_out(output):
    """The strangeness of products that no run trained on, by scripts/leave_out.py; None where it did not run, or for runs of
    another recipe."""
    file = Path(output) / LEFT_OUT
    if not file.exists():
        return None
    left = load_json(file)
    recorded = {name: Path(output) / name / "args.json" for name in left["recipes"]}
    same = all(path.exists() and load_json(path) == left["recipes"][name] for name, path in recorded.items())
    return np.array(left["strangeness"]) if same else None


def ranks(strange, unseen):
    """The p-values of strangeness [n] made true for products that no run trained on: their ranks among the `unseen` ones of
    such products. As they are they are too low, for the runs trained on the products of the `strangers` and keep them apart."""
    return (1 + np.searchsorted(np.sort(unseen), strange, "right")) / (1 + len(unseen))
