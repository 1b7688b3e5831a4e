"""Label photographs by the finished runs: label, confidence, nearest training images.

Reads  PHOTO ... (files, or folders with all images below them); input/train.csv, best.pt and train.npy of the runs,
       output/expected.json (by scripts/expect.py: without it there is no confidence)
Writes a table, --csv or --json to stdout

    python scripts/classify.py photo.jpg
    python scripts/classify.py shelf/ --input input/demo --output output/demo --csv > labels.csv
"""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, load_json, pick_device, pick_precision, run, script_parser

import numpy as np
from expect import NEIGHBOURS, class_best, confide

from dataset import SUFFIXES, Images, check_images, default_workers, encode, read_train
from extract import embed, load_model
from retrieve import load_runs
from search import Joined, topk


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTO", help="image files, or folders of them")
    add("--runs", nargs="+", metavar="ARCH/foldK", help="runs to join; default: every finished run")
    add("--k", type=int, default=5, help="neighbours shown (default 5)")
    add("--batch-size", type=int, default=64, help="images a batch (default 64)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a list of objects")
    form.add_argument("--csv", action="store_true", help="a line a photograph")
    args = parser.parse_args()
    if not 1 <= args.k <= NEIGHBOURS or args.batch_size < 1:
        parser.error(f"--k must be 1..{NEIGHBOURS}, --batch-size 1 or more")
    return args


def find_photos(names):
    """Files as they are, folders as all images below them, sorted."""
    photos = []
    for name in map(Path, names):
        if name.is_dir():
            found = sorted(p for p in name.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                raise InputError(f"{name} holds no image ({', '.join(sorted(SUFFIXES))})")
            photos += found
        else:
            photos.append(name)
    return photos


def classify(photos, runs, labels, classes, args, device):
    """(class number [n], confidence [n] or None, similarity [n, k], index [n, k]) of image files by the joint runs."""
    for r in runs:
        model, stamp = load_model(Path(args.output) / r["name"], device), r["stamp"]
        images = Images(".", photos, np.zeros(len(photos), np.int64), stamp["sizes"][0], stamp["resize"])
        workers = default_workers() if len(photos) > args.batch_size else 0  # to start a process takes longer than a photo
        precision = pick_precision(stamp["precision"], device)
        r["test"] = embed(model, images, device, precision, args.batch_size, workers, r["name"], stamp["sizes"])
    similarity, index = topk(Joined([r["test"] for r in runs]), Joined([r["train"] for r in runs]), NEIGHBOURS, device=device)
    best = class_best(similarity, labels[index], classes)
    confidence, file = None, Path(args.output) / "expected.json"
    expected = load_json(file) if file.exists() else {"runs": None}
    if expected["runs"] == {r["name"]: r["stamp"]["checkpoint"] for r in runs}:
        confidence = confide(best, expected["calibration"], runs, labels, device)[0]
    else:
        print(f"no confidence: {file} is not there or of other runs; scripts/expect.py with the same --runs writes it",
              file=sys.stderr)
    return best.argmax(1), confidence, similarity[:, :args.k], index[:, :args.k]


def main():
    args = parse_args()
    device = pick_device(args.device)
    photos = find_photos(args.photos)
    check_images(".", photos)
    train = read_train(args.input)
    classes, labels = encode(train["label"])
    runs = load_runs(args.output, args.runs, train, None)
    number, confidence, similarity, index = classify(photos, runs, labels, len(classes), args, device)
    said = [{"photo": str(photo), "label": classes[number[i]],
             "confidence": None if confidence is None else round(float(confidence[i]), 4),
             "neighbours": [{"path": train["path"][j], "label": train["label"][j], "similarity": round(float(s), 4)}
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
            print(f"{row['photo']}: {row['label']}{sure}")
            for n in row["neighbours"]:
                print(f"    {n['similarity']:.3f}  {n['label']}  {n['path']}")


if __name__ == "__main__":
    run(main)
