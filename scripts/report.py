"""One page to look at: the numbers, photographs with their nearest training images, confused labels, learning curves, shift.

Reads  input/{train.csv[,solution.csv]} and images; output/{submission.csv,neighbours.npz,scores.json} and, if scripts/expect.py
       ran, output/{confidence.csv,expected.json}; log.csv and embeddings of the runs; scripts/report.html, the page's frame
Writes output/report.html: self-contained, opens from disk

    python scripts/report.py
    python scripts/report.py --input input/demo --output output/demo --most 300
"""

import base64
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, duration, load_json, pick_device, progress, reading, run, save_text, script_parser

import cv2
import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from dataset import bad_images, has_test, load_folds, load_train, read_csv, read_image, read_solution, resize
from retrieve import check_submission, grow, load_neighbours, load_runs
from search import Joined, topk

SIDE, NEAR = 110, 5  # pixels of a picture on the page; neighbours shown
DOTS = 800  # images of each split on the map


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--most", type="count", default=400, help="photographs shown: the least confident, the least like the gallery, the "
        "surest wrong ones, a quarter each, and some at random (default 400)")
    add("--seed", type="seed", default=0, help="of the random ones (default 0)")
    return parser.parse_args()


def thumbnail(path):
    """The image as a JPEG data URI of at most SIDE pixels."""
    ok, data = cv2.imencode(".jpg", resize(read_image(path), SIDE, "pad")[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 70])
    assert ok, path
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def thumbnails(paths, what):
    with ThreadPoolExecutor() as pool:
        return list(progress(pool.map(thumbnail, paths), what, len(paths)))


def choose(table, most, seed):
    """Rows of the test images to show: a quarter each of the least confident, the least similar, the wrong and surest, where
    these are known; the others at random."""
    sure = table["confidence"].fillna(table["similarity"])  # as the page sorts them
    wrong = table["truth"].notna() & (table["truth"] != table["prediction"])
    order = [table["confidence"].dropna(), table["similarity"], -sure[wrong]]
    order = [part.sort_values(kind="stable").index[:max(1, most // 4)] for part in order]
    chosen = dict.fromkeys(int(i) for part in (*order, np.random.default_rng(seed).permutation(len(table))) for i in part)
    return list(chosen)[:most]


def confused(table, index, gallery, source, most=12):
    """The pairs of labels that are mixed up most: by the truth where it is known, else label and next label among the
    neighbours. A list of {says, pictures}."""
    known = table["truth"].notna().any()
    if known:
        other = table["truth"].to_numpy()
    else:
        near = gallery["label"].loc[index.ravel()].to_numpy().reshape(index.shape)
        other = np.array([next((n for n in row if n != said), None)
                          for row, said in zip(near, table["prediction"], strict=True)], object)
    pairs = pd.DataFrame({"said": table["prediction"], "other": other, "row": np.arange(len(table))}).dropna()
    pairs, result = pairs[pairs["said"] != pairs["other"]], []
    for (said, true), rows in sorted(pairs.groupby(["said", "other"])["row"], key=lambda pair: -len(pair[1]))[:most]:
        files = {source / "test" / table["filename"][i]: "test image" for i in rows[:3]}
        files |= {source / gallery["path"][i]: label for label in (said, true)
                  for i in gallery.index[gallery["label"] == label][:1]}
        says = f"{true} taken for {said}: {len(rows)}" if known else f"{said}, next {true}: {len(rows)}"
        result.append({"says": says, "pictures": [(thumbnail(f), text) for f, text in files.items()]})
    return result


def curves(output, runs):
    """{name, head, nearest, time, accuracy, loss} of each run: accuracies on its held-out fold in the epoch that was kept (None
    where nothing was held out), time of the training; points (epoch, value)."""
    result = []
    for r in runs:
        log = output / r["name"] / "log.csv"
        if log.exists():
            with reading(log, "delete it; train.py writes it anew"):
                table = pd.read_csv(log)
                points = {key: table[["epoch", name]].dropna().astype(float).values.tolist()
                          for key, name in [("accuracy", "retrieval_acc"), ("loss", "train_loss")]}
                best = table[table["retrieval_acc"] == table["retrieval_acc"].max()]
                kept, seconds = best[["head_acc", "retrieval_acc"]].astype(float).values.tolist(), float(table["seconds"].sum())
            head, nearest = kept[-1] if kept else (None, None)
            result.append({"name": r["name"], "head": head, "nearest": nearest, "time": duration(seconds), **points})
    return result


def shift(runs, fold, device, seed):
    """Histogram of nearest similarities and map of embeddings, held-out training images against test images, by one run."""
    r = next((r for r in runs if r["fold"]), None)
    if r is None or fold is None:
        return [], []
    rows, gallery = np.flatnonzero(fold == int(r["fold"])), Joined([r["train"]])
    sets = {"held-out training": (Joined([r["train"]], rows), rows, "#2563c9"), "test": (Joined([r["test"]]), None, "#d9822b")}
    near = {name: topk(vectors, gallery, 1, own, device)[0][:, 0] for name, (vectors, own, _) in sets.items()}
    edges = np.linspace(min(map(np.min, near.values())), max(1, *map(np.max, near.values())), 31)  # rounding may exceed 1
    histogram, rng, samples = [], np.random.default_rng(seed), {}
    for name, (vectors, _, colour) in sets.items():
        share = np.histogram(near[name], edges)[0] / len(vectors)
        points = np.stack([(edges[1:] + edges[:-1]) / 2, share], 1).round(4)
        histogram.append({"name": name, "colour": colour, "points": points.tolist()})
        samples[name] = vectors[np.sort(rng.permutation(len(vectors))[:DOTS])].numpy()
    flat = PCA(2, random_state=seed).fit(np.concatenate(list(samples.values())))
    dots = [{"name": name, "colour": sets[name][2], "points": flat.transform(x).round(3).tolist()}
            for name, x in samples.items()]
    return histogram, dots


def tiles(output, scores, expected, runs):
    """The numbers at the top: (value, what it is)."""
    said = []
    if expected:
        span = f"({expected['low']:.2f}-{expected['high']:.2f})"
        said.append((f"{expected['expected']:.3f}", f"expected accuracy of {expected['vote']} {span}"))
    for split, name in [("test", "on the test images"), ("oof", "out-of-fold")]:
        for vote, value in (scores[split] or {}).items():
            if vote in ("head", "nearest", scores["vote"]):
                said.append((f"{value:.3f}", f"accuracy of {vote} {name}"))
    if expected and expected["told_apart"] is not None:
        said.append((f"{expected['told_apart']:.2f}", "how well test images are told from training images (0.50: not at all)"))
    said.append((str(len(runs)), "runs"))
    if (output / "times.csv").exists():
        seconds = pd.read_csv(output / "times.csv", names=["stage", "seconds"])["seconds"].sum()
        said.append((duration(seconds), "time, all stages"))
    return said


def main():
    args = parse_args()
    source, output, device = Path(args.input), Path(args.output), pick_device(args.device)
    if not has_test(source):
        print("no test images, nothing to report")
        return
    for name in ("submission.csv", "neighbours.npz", "scores.json"):
        if not (output / name).exists():
            raise InputError(f"{output / name} is not there; run retrieve.py first")
    train, table = load_train(args), read_csv(output / "submission.csv", ["filename", "prediction"])
    good = ~table["filename"].isin(bad_images(output, "test")).to_numpy()
    table = table[good].reset_index(drop=True)
    scores = load_json(output / "scores.json", runs=dict, vote=str)
    runs = load_runs(output, list(scores["runs"]), train, table)
    gallery = grow([], output, train)[1]
    check_submission(output, scores, runs)
    similarity, index = (part[good, :NEAR] for part in load_neighbours(output, len(good), gallery.index.max() + 1))
    expected = None  # without confidence.csv, which a new submission deletes, it is of a former one
    if all((output / name).exists() for name in ("confidence.csv", "expected.json")):
        expected = load_json(output / "expected.json", expected=float, runs=dict)
        if expected["runs"].keys() != scores["runs"].keys():  # by expect.py --runs
            expected = None
    truth = read_solution(source, table["filename"])
    table = table.assign(truth=truth, similarity=similarity[:, 0], confidence=np.nan)
    if (output / "confidence.csv").exists():
        sure = read_csv(output / "confidence.csv", ["filename", "prediction", "confidence"])
        sure = table[["filename", "prediction"]].merge(sure, "left")  # expect.py --runs: another label may be meant
        table["confidence"] = pd.to_numeric(sure["confidence"], errors="coerce")
    chosen = choose(table, args.most, args.seed)
    shown = np.unique(index[chosen])  # the neighbours are named by the index of `gallery`
    place = {row: i for i, row in enumerate(shown)}
    photos = thumbnails([source / "test" / table["filename"][i] for i in chosen], "photographs")
    pictures = thumbnails([source / gallery["path"][j] for j in shown], "gallery")
    histogram, dots = shift(runs, load_folds(output, train) if (output / "folds.csv").exists() else None, device, args.seed)
    page = {
        "title": f"{len(table)} photographs, {gallery['label'].nunique()} labels, {len(gallery)} gallery images",
        "tiles": tiles(output, scores, expected, runs),
        "chosen": f"{len(chosen)} of {len(table)} photographs: the least confident (if that is known), the least like any "
                  "training image, wrong ones where the answers are known, and some at random.",
        "queries": [{"file": table["filename"][i], "thumb": photo, "label": table["prediction"][i], "truth": table["truth"][i],
                     "confidence": None if np.isnan(table["confidence"][i]) else float(table["confidence"][i]),
                     "similarity": float(similarity[i, 0]),
                     "near": [[place[j], float(s)] for j, s in zip(index[i], similarity[i], strict=True)]}
                    for i, photo in zip(chosen, photos, strict=True)],
        "gallery": [{"path": gallery["path"][j], "label": gallery["label"][j], "thumb": photo}
                    for j, photo in zip(shown, pictures, strict=True)],
        "confused": confused(table, index, gallery, source),
        "confused_says": "Test images with another true label, most frequent first." if truth is not None else
                         "The label given and the next one among the neighbours; the true labels are not known.",
        "runs": curves(output, runs), "histogram": histogram, "map": dots}
    text = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")  # a label cannot end the script
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    save_text(output / "report.html", template.replace(">DATA<", f">{text}<"))
    print(f"{output / 'report.html'}: {(output / 'report.html').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
