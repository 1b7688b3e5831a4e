"""Label photographs by the finished runs: label, confidence, nearest training images.

Reads  PHOTO ... (files, or folders with all images below them); input/train.csv, best.pt and train.npy of the runs,
       output/{folds.csv,added.npz} and, if scripts/expect.py ran, expected.json; to reject, the files that retrieve.py
       --reject reads
Writes a table, --csv or --json to stdout; to reject, output/strangers.npz where it is not of these runs and gallery

    python scripts/classify.py photo.jpg
    python scripts/classify.py photo.jpg --reject 0.05          # 'unknown' where it may be none of the products
    python scripts/classify.py photos/ --input input/demo --output output/demo --csv > labels.csv
"""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import (
    InputError,
    keep_freed_memory,
    load_json,
    pick_device,
    pick_precision,
    printable,
    progress,
    reading,
    run,
    script_parser,
    within,
)

import numpy as np
import torch
import torch.nn.functional as F
from expect import NEIGHBOURS, calibrate, class_best, confide_alone, halves, known_looks, out_of_fold, probability
from torch.utils.data import Dataset, default_collate

from dataset import (
    SUFFIXES,
    check_images,
    default_workers,
    encode,
    load_folds,
    load_train,
    make_loader,
    read_image,
    resize,
)
from extract import embed_one_size, load_model
from retrieve import UNKNOWN, by_fold, grow, load_runs, reject_flag, rejecter, runs_digest
from search import as_tensor, merge


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTO", help="image files, or folders of them")
    add("--runs", nargs="+", metavar="ARCH/foldK", help="runs to join; default: every finished run")
    add("--k", type=within(f"[1, {NEIGHBOURS}]", int), default=5, help="neighbours shown (default 5)")
    add("--batch-size", type="count", default=64, help="images a batch (default 64)")
    reject_flag(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a list of objects")
    form.add_argument("--csv", action="store_true", help="a line a photograph")
    return parser.parse_args()


def find_photos(names):
    """Files as they are, folders as all images below them but hidden ones, sorted."""
    photos = []
    for name in map(Path, names):
        if name.is_dir():
            files = (p for p in name.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            found = sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(name).parts))
            if not found:
                raise InputError(f"{name} holds no image ({', '.join(sorted(SUFFIXES))})")
            photos += found
        else:
            photos.append(name)
    return photos


class Views(Dataset):
    """Photographs, image files or decoded ones (uint8 [H, W, 3]): each is decoded once and resized to all `views` (size, how)
    that runs want. An item is a list of uint8 [3, size, size]."""

    def __init__(self, photos, views):
        self.photos, self.views = photos, views

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, row):
        photo = self.photos[row]
        image = photo if isinstance(photo, np.ndarray) else read_image(photo)
        return [torch.from_numpy(resize(image, *view)).permute(2, 0, 1).contiguous() for view in self.views], 0


def load(args, device):
    """What labels photographs, loaded once: (runs, gallery, train, trained). The runs of retrieve.grow, each with its model,
    its views and the inverse norms of its gallery; gallery: DataFrame path, label of their rows; train, trained: the rows of
    train.csv and the runs of load_runs."""
    keep_freed_memory()
    train = load_train(args)
    trained = load_runs(args.output, args.runs, train, None)
    runs, gallery = grow(trained, args.output, train)
    for r in runs:
        r["model"] = load_model(Path(args.output) / r["name"], r["stamp"], device).eval()
        r["views"] = [(size, r["stamp"]["resize"]) for size in r["stamp"]["sizes"]]
        r["inverse"] = 1 / torch.linalg.vector_norm(as_tensor(r["train"]), dim=1).clamp(min=1e-12)
    return runs, gallery, train, trained


def load_calibration(args, train, trained, classes, device):
    """What gives the label of the nearest image, one of `classes`, its confidence: as scripts/expect.py wrote it, or, for other
    runs than those, learned now from held-out images only, as of photographs like them. None, and a word, where no run held
    images out."""
    file = Path(args.output) / "expected.json"
    expected = load_json(file, runs=dict, calibration=dict) if file.exists() else {"runs": None}
    same = expected["runs"] == {r["name"]: runs_digest([r]) for r in trained}
    if same:
        with reading(file, "run it again", "not what scripts/expect.py wrote"):
            found, kept = expected["calibration"], expected["calibration"]["kept"]
            found = {name: np.asarray(found[name], float) for name in ("sharpness", "weights", "offset")}
            found["kept"] = np.array([float(kept.get(label, 1.0)) for label in classes])
            if found["weights"].shape != (3,) or found["offset"].ndim or found["sharpness"].ndim:
                raise ValueError("not three weights, an offset and a sharpness")
        return found
    if by_fold(trained):
        labels, fold = encode(train["label"])[1], load_folds(args.output, train)
        rows, _, look = out_of_fold(trained, fold, known_looks(args.output, train, fold), labels, labels.max() + 1, device)
        print("confidences are those of photographs like the training ones; scripts/expect.py makes them those of the test "
              "images", file=sys.stderr)
        return calibrate(look, labels[rows])
    print("no confidence: no run held images out", file=sys.stderr)
    return None


def embed_all(photos, runs, device, batch_size):
    """Yields the embeddings of a batch of photographs by each of the runs: a list of float32 [n, 512]."""
    views = list(dict.fromkeys(view for r in runs for view in r["views"]))
    workers = default_workers() if len(photos) > batch_size else 0  # to start a process takes longer than a photo
    with progress(None, "photographs", len(photos)) as bar:
        for batches, zeros in make_loader(Views(photos, views), batch_size, workers, device, default_collate):
            images = {view: list(zip(batch, zeros, strict=True)) for view, batch in zip(views, batches, strict=True)}
            result = []
            for r in runs:
                precision = pick_precision(r["stamp"]["precision"], device)
                each = [embed_one_size([r["model"]], images[view], device, precision, batch_size, 0, r["name"])[0]
                        for view in r["views"]]
                result.append(np.mean(each, 0))
            yield result
            bar.update(len(zeros))


def search_each(embedded, runs):
    """Cosine similarities of photographs to the gallery by each run, [R, n, m]. Not by topk, which prepares the gallery anew at
    each call: 5 s at 48,000 x 5,120, 2 cores, where this takes 0.1 s for a photograph."""
    return torch.stack([F.normalize(torch.from_numpy(rows)) @ as_tensor(r["train"]).T * r["inverse"]
                        for rows, r in zip(embedded, runs, strict=True)])


def classify(photos, runs, labels, classes, calibration, args, device):
    """(class number [n], confidence [n] or None, similarity [n, k], index [n, k]; of retrieve.nearest_by_fold {fold: [n]}) of
    photographs by the joint `runs` of load. It is what retrieve.py and scripts/expect.py say of test images, but for the
    rounding of similarities."""
    found, folds = [], {str(k): [r["fold"] == str(k) for r in runs] for k, _ in by_fold(runs) if args.reject}
    for embedded in embed_all(photos, runs, device, args.batch_size):
        step = max(1, 2**26 // (len(runs) * len(labels)))  # of the similarities, so that they take 256 MiB
        for at in range(0, len(embedded[0]), step):
            each = search_each([rows[at:at + step] for rows in embedded], runs)
            total = each.sum(0)
            similarity, index = (t.numpy() for t in merge(*(total / len(runs)).topk(min(NEIGHBOURS, len(labels))), NEIGHBOURS))
            best, confidence = class_best(similarity, labels[index], classes), None
            if calibration and "weights" in calibration:
                votes = [[labels[each[half].sum(0).argmax(1)] for half in (~split, split)] for split in halves(len(runs))]
                confidence = confide_alone(best, np.array(votes), calibration)
            elif calibration:
                confidence = probability(best, calibration)
            near = [each[out].mean(0).amax(1).numpy() for out in folds.values()]
            found.append((labels[index[:, 0]], confidence, similarity[:, :args.k], index[:, :args.k], *near))
    joined = [None if parts[0] is None else np.concatenate(parts) for parts in zip(*found, strict=True)]
    return *joined[:4], dict(zip(folds, joined[4:], strict=True))


def main():
    args = parse_args()
    device = pick_device(args.device)
    photos = find_photos(args.photos)
    check_images(".", photos, full=True, instead="leave them out")  # all are decoded first, lest one lose what others took
    runs, gallery, train, trained = load(args, device)
    classes, labels = encode(gallery["label"])
    calibration = load_calibration(args, train, trained, classes, device)
    rejects = rejecter(trained, runs, train, classes, labels, args, device)
    number, confidence, similarity, index, near = classify(photos, runs, labels, len(classes), calibration, args, device)
    strange = rejects(near) if rejects else np.zeros(len(photos), bool)
    said = [{"photo": str(photo), "label": UNKNOWN if strange[i] else classes[number[i]],
             "confidence": None if confidence is None or strange[i] else round(float(confidence[i]), 4),
             "neighbours": [{"path": gallery["path"].iloc[j], "label": classes[labels[j]], "similarity": round(float(s), 4)}
                            for s, j in zip(similarity[i], index[i], strict=True)]} for i, photo in enumerate(photos)]
    if args.json:
        print(json.dumps(said, indent=1, ensure_ascii=False))
    elif args.csv:
        sheet = csv.writer(sys.stdout)
        places = range(1, similarity.shape[1] + 1)
        sheet.writerow(["photo", "label", "confidence", *(f"{what}{p}" for p in places for what in ("path", "similarity"))])
        for row in said:
            near = [cell for n in row["neighbours"] for cell in (n["path"], n["similarity"])]
            sheet.writerow([row["photo"], row["label"], row["confidence"], *near])
    else:
        for row in said:
            sure = "" if row["confidence"] is None else f"  confidence {row['confidence']:.2f}"
            print(printable(f"{row['photo']}: {row['label']}{sure}"))
            for n in row["neighbours"]:
                print(printable(f"    {n['similarity']:.3f}  {n['label']}  {n['path']}"))


if __name__ == "__main__":
    run(main)
