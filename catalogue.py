"""What is in the catalogue and what is not: the gallery as scripts/add_products.py left it, and what photographs of products
that it lacks look like.
"""

import json
import tempfile
import zipfile
from pathlib import Path

from utils import InputError, atomic, file_fingerprint, fingerprint

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dataset import encode
from models import EMBEDDING
from search import Joined, topk
from votes import blocks

ADDED = "added.npz"  # below output
NEIGHBOURS = 100  # looked at for the evidence: enough that several classes are among them

# ---------------------------------------------------------------------------------------------------------- what is in it


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


# ---------------------------------------------------------------------------------------------------------- what is not


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


def strangers(runs, fold, labels, output, device):
    """What photographs of products that are not in the gallery look like to each fold's runs: (sharpness of the evidence,
    {fold: log odds, ascending}), the evidence of the images of train.csv that these runs held out, each with its product taken
    out of the gallery. Kept in output/strangers.npz, since scripts/classify.py is to be fast."""
    file, key = Path(output) / "strangers.npz", fingerprint([[json.dumps(r["stamp"]) for r in runs]])
    if file.exists():
        with np.load(file, allow_pickle=False) as arrays:
            if arrays["key"] == key:
                return float(arrays["sharpness"]), {k: arrays[k] for k in arrays["folds"]}
    held, best = [], {}
    for k in range(fold.max() + 1):
        arrays, rows = [r["train"] for r in runs if r["fold"] == str(k)], np.flatnonzero(fold == k)
        if arrays and len(rows):
            known, best[str(k)] = held_out(arrays, rows, labels, labels, labels.max() + 1, device)
            held.append((known, labels[rows]))
    sharpness = fit_sharpness(*(np.concatenate(parts) for parts in zip(*held, strict=True)))
    found = {k: np.sort(log_odds(strange, sharpness)) for k, strange in best.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        with atomic(file) as temporary, open(temporary, "wb") as opened:
            np.savez(opened, key=key, sharpness=sharpness, folds=list(found), **found)
    return sharpness, found


def strangeness(runs, numbers, sharpness, found, device):
    """How likely a photograph of a product that is not in the gallery looks as much like one of the products as a test image
    does, [n]: a p-value, the share of the strangers found whose evidence is as high, each fold's compared by its own runs.
    numbers [m]: class numbers of the gallery. Source: Vovk, Cross-conformal predictors, Annals of Mathematics and Artificial
    Intelligence 2015."""
    count = np.ones(len(runs[0]["test"]))
    for k, evidence in found.items():
        out = [r for r in runs if r["fold"] == k]
        similarity, index = topk(*(Joined([r[split] for r in out]) for split in ("test", "train")), NEIGHBOURS, device=device)
        best = class_best(similarity, numbers[index], numbers.max() + 1)
        count += len(evidence) - np.searchsorted(evidence, log_odds(best, sharpness))
    return count / (1 + sum(map(len, found.values())))
