"""Products that no run has seen: how well they are rejected, and how well they are found once they are in the gallery.

Some products of a prepared set with a solution are left out of training and gallery. Their test photographs should be rejected;
then their training photographs join the gallery, 1, 5, 20 of each product drawn at random or all, without training, and the
labels are compared with those of runs that trained on all products.
Reads  input/{train.csv,solution.csv ...}; runs train.py and extract.py
Writes OUT/{known,all}/ (the runs without these products, and with them) and OUT/open.json; finished runs are not trained again

    python scripts/bench_open.py --input input/grocery --output output/bench_open
    python scripts/bench_open.py --input input/grocery --output output/bench_open --arch tf_efficientnet_lite2 --folds 0 1 2
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, accuracy, pick_device, run, save_json, script_parser

import numpy as np
import pandas as pd
from expect import NEIGHBOURS, class_best, fit_sharpness, known_looks, log_odds, out_of_fold
from leave_out import draw, train_again, without
from sklearn.metrics import roc_auc_score

from dataset import encode, load_folds, read_solution, read_test, read_train
from extract import embed_files, run_folder
from retrieve import calibrated, load_runs, nearest_by_fold, strangeness, strangers
from search import Joined, topk

RECIPE = {"epochs": 5, "eval_every": 5, "fold_by": "look", "scale": 20, "margin": 0.2, "lr": 0.006, "head_lr_scale": 5}
RATES = (0.01, 0.05, 0.1, 0.2)
SHOTS = (1, 5, 20, None)  # images of each added product; None: all


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--arch", default="tf_efficientnet_lite0", help="backbone (default tf_efficientnet_lite0)")
    add("--size", type="count", default=160, help="image side in pixels (default 160)")
    add("--folds", type="whole", nargs="+", default=[0], help="runs, by the fold that they hold out (default 0)")
    add("--classes", type="count", default=20, help="products left out (default 20)")
    add("--looks", type="several", default=5, help="see scripts/expect.py (default 5)")
    add("--draws", type="count", default=5, help="draws of the added images (default 5)")
    add("--seed", type="seed", default=0, help="of the products left out and the draws (default 0)")
    return parser.parse_args()


def evidence(best, sharpness):
    """Kinds of evidence that an image shows one of the classes, {name: [n]}, from its best similarity to each, [n, C]."""
    second, first = np.sort(best, 1)[:, -2:].T
    return {"nearest similarity": first, "margin": first - second, "log odds": log_odds(best, sharpness)}


def auroc(known, unknown):
    return round(float(roc_auc_score(np.arange(len(known) + len(unknown)) < len(known), np.append(known, unknown))), 4)


def nearest(runs, gallery, labels, device):
    """Label of the nearest gallery row of each test image, by the runs' gallery arrays."""
    return labels[topk(Joined([r["test"] for r in runs]), Joined(gallery), 1, device=device)[1][:, 0]]


def rejection(runs, output, known, rows, added, truth, args, device):
    """Test images of the known products, which have the rows `known`, against those of the products left out: how well kinds of
    evidence tell them apart, beside what was known without test images; and what comes of the wanted rates. The correction is
    by half of the products left out, their training `rows` and embeddings `added`; the other half's test images count."""
    classes, labels = encode(known["label"])
    fold, seen = load_folds(output, known), np.isin(truth, classes)
    predicted = nearest(runs, [r["train"] for r in runs], known["label"].to_numpy(), device)

    part = known_looks(output, known, fold)
    held, random, look = out_of_fold(runs, fold, part, labels, len(classes), device, args.looks, args.seed)
    sharpness = fit_sharpness(look, labels[held])
    random[np.arange(len(held)), labels[held]] = -1  # as if the image's own product were not in the gallery
    similarity, index = topk(*(Joined([r[split] for r in runs]) for split in ("test", "train")), NEIGHBOURS, device=device)
    ours, strange, test = (evidence(best, sharpness) for best in
                           (look, random, class_best(similarity, labels[index], len(classes))))
    kinds = {name: {"auroc_held_out": auroc(ours[name], strange[name]), "auroc_test": auroc(x[seen], x[~seen])}
             for name, x in test.items()}
    found = strangers(runs, runs, fold, labels, labels, output, device)
    p = strangeness(nearest_by_fold(runs, device), found)
    kinds["strangeness"] = {"auroc_test": auroc(-p[seen], -p[~seen])}

    others = [r | {"test": more} for r, more in zip(runs, added, strict=True)]
    unseen = strangeness(nearest_by_fold(others, device), found)
    rates = []
    for number in range(args.draws):
        half = draw(rows["label"], args.classes // 2, (args.seed, number))
        strange = ~seen & ~np.isin(truth, half)
        for by, value in [("strangers", p), ("products left out", calibrated(p, unseen[rows["label"].isin(half)]))]:
            for rate in RATES:
                kept = value <= rate
                rates.append({"by": by, "rate": rate, "false_accepts": kept[strange].mean(), "known_kept": kept[seen].mean(),
                              "accuracy_kept": accuracy(predicted[kept & seen], truth[kept & seen])})
    return {"known": int(seen.sum()), "unknown": int((~seen).sum()), "accuracy_known": accuracy(predicted[seen], truth[seen]),
            "evidence": kinds}, pd.DataFrame(rates).groupby(["by", "rate"], sort=False).agg(["mean", "std"])


def growth(runs, known, rows, added, trained, truth, args, device):
    """Accuracy by the nearest image on the test images of the added products, and of the others, with few images of each added
    or all, against the runs `trained` with them. added: embeddings of the `rows`, an array a run."""
    new, result = np.isin(truth, rows["label"]), []
    everything = read_train(args.input, args.allow_outside)["label"].to_numpy(object)

    def row(name, predicted):
        by = [accuracy(predicted[part], truth[part]) for part in (new, ~new, slice(None))]
        result.append({"added": name, **dict(zip(("added_products", "other_products", "all"), by, strict=True))})

    for shots in SHOTS:
        for draw_number in range(args.draws if shots else 1):
            order = np.random.default_rng((args.seed, draw_number)).permutation(len(rows))
            place = rows.iloc[order].groupby("label").cumcount().to_numpy()
            picked = np.sort(order[place < (shots or len(rows))])
            gallery = [np.concatenate([r["train"], more[picked]]) for r, more in zip(runs, added, strict=True)]
            grown = np.append(known["label"], rows["label"].to_numpy()[picked])
            row(f"{shots or 'all'} images each", nearest(runs, gallery, grown, device))
    row("trained with all", nearest(trained, [r["train"] for r in trained], everything, device))
    return pd.DataFrame(result).groupby("added", sort=False).agg(["mean", "std"])


def main():
    args = parse_args()
    output = Path(args.output)
    test, train = read_test(args.input, args.allow_outside), read_train(args.input, args.allow_outside)
    labels = train["label"]
    truth = read_solution(args.input, test["filename"])
    if truth is None:
        raise InputError(f"{args.input}/solution.csv is not there; without it nothing is measured")
    if args.classes > labels.nunique() - 2:
        raise InputError(f"--classes {args.classes} of {labels.nunique()}: two or more must be left in")
    source = output / "known" / "input"
    rows = without(args.input, train, source, draw(labels, args.classes, args.seed), test=True)
    for fold in args.folds:
        recipe = RECIPE | {"arch": args.arch, "size": args.size, "fold": fold}
        train_again(recipe, source, output / "known", args)
        train_again(recipe, args.input, output / "all", args)
    device = pick_device(args.device)

    names = [str(run_folder("", args.arch, fold)) for fold in args.folds]
    known = read_train(source, args.allow_outside)
    runs = load_runs(output / "known", names, known, test)
    embedded = embed_files(runs, output / "known", args.input, rows["path"], device)
    added = [embedded[r["name"]] for r in runs]
    figures, rates = rejection(runs, output / "known", known, rows, added, truth, args, device)
    print(json.dumps(figures, indent=1))
    trained = load_runs(output / "all", names, train, test)
    for name, table in [("rates", rates), ("growth", growth(runs, known, rows, added, trained, truth, args, device))]:
        print(table.round(4).to_string())
        table = table.round(4).reset_index()
        table.columns = [" ".join(filter(None, column)) for column in table.columns]
        figures[name] = json.loads(table.to_json(orient="records"))
    save_json(output / "open.json", {"arguments": vars(args)} | figures)


if __name__ == "__main__":
    run(main)
