"""What is in the catalogue: the gallery as scripts/add_products.py left it."""

import json
import tempfile
import zipfile
from pathlib import Path

from utils import InputError, file_fingerprint

import numpy as np
import pandas as pd

from dataset import encode
from models import EMBEDDING
from votes import blocks

ADDED = "added.npz"  # below output


def load_added(output):
    """What scripts/add_products.py wrote, a dict of arrays, empty ones where it wrote nothing. path, label, content [n]: the
    added images; removed: labels of train.csv that left the gallery; runs, stamps [R]: what embedded them; embeddings
    float32 [R, n, 512]."""
    file = Path(output) / ADDED
    if not file.exists():
        texts = ("path", "label", "content", "removed", "runs", "stamps")
        return dict.fromkeys(texts, np.empty(0, dtype=str)) | {"embeddings": np.empty((0, 0, EMBEDDING), np.float32)}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} is damaged ({error}); delete it and add the products again") from None


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
