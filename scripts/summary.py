"""The closing table: accuracy by head, nearest neighbour, vote and fusion, for one run, each backbone and all runs
together, out-of-fold and on the test images; which labels are confused most often; and where the time went.

Reads  what retrieve.py reads, output/{scores.json,oof.csv} and output/times.csv (seconds of each stage, by run_all.sh)
Writes output/summary.md

    python scripts/summary.py
    python scripts/summary.py --input input/demo --output output/demo
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, duration, load_json, lock, pick_device, printable, run, save_text, script_parser

from dataset import encode, load_folds, load_test, load_train, number_of, read_csv, read_solution, read_test, with_bad
from retrieve import fitting, grow, label_oof, label_test, load_runs, score, scratch
from votes import DEFAULT_VOTES, VOTES, vote_flags

CONFUSED = 10  # pairs of labels that are shown
NAMES = {"head": "classifier head", "nearest": "nearest neighbour"}


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--votes", nargs="+", choices=VOTES, default=DEFAULT_VOTES, metavar="VOTE",
        help=f"columns (default {' '.join(DEFAULT_VOTES)}), of {' '.join(VOTES)}")
    add("--ensemble-only", action="store_true", help="only the row of all runs together")
    vote_flags(parser)
    return parser.parse_args()


def groups(runs):
    """{row title: runs}: the first run of each backbone, each backbone's runs, all runs."""
    archs = dict.fromkeys(r["arch"] for r in runs)
    of = {arch: [r for r in runs if r["arch"] == arch] for arch in archs}
    rows = {of[arch][0]["name"]: of[arch][:1] for arch in archs}
    rows |= {f"{arch}, {len(of[arch])} runs": of[arch] for arch in archs if len(of[arch]) > 1}
    if len(archs) > 1:
        rows[f"all {len(runs)} runs"] = runs
    return rows


def table(rows, columns):
    """Markdown table; the first column left, the others right-aligned."""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main():
    args = parse_args()
    device = pick_device(args.device)
    with lock(args.output):  # retrieve.py's scratch is ours, too
        summarise(args, device)


def summarise(args, device):
    train, good = load_train(args), load_test(args)
    test = None if good is None else read_test(args.input, args.allow_outside)
    truth = None if test is None else read_solution(args.input, test["filename"])
    runs = load_runs(args.output, None, train, good)
    grown, gallery = grow(runs, args.output, train)
    (train_classes, labels), (classes, numbers) = encode(train["label"]), encode(gallery["label"])
    votes = fitting(grown, args.votes)
    if not votes:
        raise InputError(f"--votes {' '.join(args.votes)}: all need runs whose head fits these classes; add sum")
    fold = load_folds(args.output, train) if (Path(args.output) / "folds.csv").exists() else None

    lines = []
    rows = {f"all {len(runs)} runs": runs} if args.ensemble_only else groups(runs)
    for title, members in rows.items():
        results = []
        if fold is not None:
            predicted = label_oof(members, fold, labels, len(train_classes), args, votes, device)
            results.append(("out-of-fold", score(predicted, labels)))
        if truth is not None:
            after = [r for r in grown if r["name"] in [member["name"] for member in members]]
            predicted = label_test(after, numbers, len(classes), args, votes, device)[0]
            predicted = {vote: with_bad(test, good, x, np.bincount(numbers).argmax()) for vote, x in predicted.items()}
            results.append(("test", score(predicted, number_of(truth, classes))))
        lines += [[title, split, *(f"{result[vote]:.4f}" for vote in votes)] for split, result in results if result]
    shutil.rmtree(scratch(args), ignore_errors=True)
    report = table(lines, ["accuracy", "images", *(NAMES.get(vote, vote) for vote in votes)])
    submitted = Path(args.output) / "scores.json"
    if submitted.exists() and not args.ensemble_only:
        scores = load_json(submitted, vote=str)
        got = [f"{split} {scores[key][scores['vote']]:.4f}" for key, split in [("oof", "out-of-fold"), ("test", "test")]
               if scores.get(key) and scores["vote"] in scores[key]]
        report += "\n\n" + ", ".join([f"the submission's labels are those of the vote {scores['vote']}", *got])
    report += "\n\nout-of-fold: each training image by those of the runs that did not train on it (one of each backbone)"

    held = Path(args.output) / "oof.csv"
    if held.exists():
        images = read_csv(held, ["path", "label"])
        if "prediction" not in images.columns:
            raise InputError(f"{held} has no column 'prediction': it is damaged; run retrieve.py again")
        wrong = images[(images["prediction"] != "") & (images["prediction"] != images["label"])]
        pairs = wrong.groupby(["label", "prediction"]).size().sort_values(ascending=False, kind="stable").head(CONFUSED)
        lines = [[*(printable(label).replace("|", "\\|") for label in pair), str(count)] for pair, count in pairs.items()]
        report += "\n\n" + table(lines, ["confused most often, out-of-fold", "labelled", "images"]) if lines else ""

    times = Path(args.output) / "times.csv"
    if times.exists():
        seconds = pd.read_csv(times, names=["stage", "seconds"]).groupby("stage", sort=False)["seconds"].sum()
        total = seconds.sum()
        spent = [[stage, duration(s), f"{s / max(total, 1):.0%}"] for stage, s in seconds.items()]
        report += "\n\n" + table([*spent, ["total", duration(total), ""]], ["where the time went", "time", "share"])
    save_text(Path(args.output) / "summary.md", report + "\n")
    print(report)


if __name__ == "__main__":
    run(main)
