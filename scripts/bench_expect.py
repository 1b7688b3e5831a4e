"""How true the expected accuracy is: the test images shifted further in known ways, the expectation beside the accuracy got.

Each shift alters the test photographs of a prepared set with a solution, the finished runs embed them, and scripts/expect.py's
estimate, which has not learned from that alteration, is compared with the truth; so are the evidence of held-out images, how
often halves of the runs agree, and the baselines that look at random hold-outs. With --parts the test photographs come in
clusters, too, by the colours of their middle (the products) and of their border (the places), as of one sort or one shop.
Reads  what scripts/expect.py reads, input/solution.csv, best.pt of the runs
Writes OUTPUT/expected.csv, a line a shift; OUTPUT/altered.npz

    python scripts/bench_expect.py --input input/grocery --output output/grocery
    python scripts/bench_expect.py --input input/demo --output output/demo --shifts none jpeg grey --parts 3
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, pick_device, run, save_csv, script_parser

import cv2
import numpy as np
import pandas as pd
from alterations import SHIFTS, altered_by
from expect import altered_sets, expect, known_looks
from sklearn.cluster import KMeans

from dataset import Images, encode, load_folds, load_image, load_test, load_train, read_solution, workers_flag
from extract import embed_as_extracted
from retrieve import by_fold, load_runs

FEW = ["none", *list(SHIFTS)[:11]]


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", metavar="ARCH/foldK", help="runs to join; default: every finished run")
    add("--shifts", nargs="+", choices=["none", *SHIFTS], default=FEW, metavar="SHIFT",
        help=f"default {' '.join(FEW)}; there are also {', '.join(name for name in SHIFTS if name not in FEW)}")
    add("--parts", type="whole", default=0, help="clusters by middle and by border, as many of each (default 0: none)")
    add("--n", type="count", default=600, help="test images, drawn at random (default 600)")
    add("--looks", type="several", default=5, help="see scripts/expect.py (default 5)")
    add("--altered", type="several", default=60, help="see scripts/expect.py (default 60)")
    add("--seed", type="seed", default=0, help="of the test images and looks (default 0)")
    workers_flag(parser)
    return parser.parse_args()


def clusters(folder, names, count, seed):
    """{name of a cluster: rows} of images in `count` clusters each by the mean colours of their middle and of their border."""
    small = np.stack([cv2.cvtColor(load_image(Path(folder) / name, 16, "squash"), cv2.COLOR_RGB2LAB) for name in names])
    middle = np.zeros((16, 16), bool)
    middle[4:12, 4:12] = True
    found = {}
    for what, pixels in ("middle", small[:, middle]), ("border", small[:, ~middle]):
        own = KMeans(count, n_init=4, random_state=seed).fit_predict(pixels.mean(1))
        found |= {f"{what} {k + 1} of {count}": np.flatnonzero(own == k) for k in range(count)}
    return found


def main():
    args = parse_args()
    device = pick_device(args.device)
    train, test = load_train(args), load_test(args)
    truth = read_solution(args.input, test["filename"])
    if truth is None:
        raise InputError(f"{args.input}/solution.csv is not there; without it nothing tells how true an expectation is")
    classes, labels = encode(train["label"])
    runs, fold = load_runs(args.output, args.runs, train, test), load_folds(args.output, train)
    if not by_fold(runs):
        raise InputError("no run held images out, so there is nothing to expect; train runs of folds, not of 'all'")
    part = known_looks(args.output, train, fold)
    picked = np.sort(np.random.default_rng(args.seed).permutation(len(test))[:args.n])
    (sets, prior), rows = altered_sets(runs, part, labels, train, args, device), []
    parts = clusters(Path(args.input) / "test", test["filename"], args.parts, args.seed) if args.parts else {}
    for shift in [*args.shifts, *parts]:
        def altered(size, resize, shift=shift):
            return Images(Path(args.input) / "test", test["filename"].iloc[picked], None, size, resize,
                          altered_by([] if shift == "none" else [shift]), args.seed)

        which = parts.get(shift, picked)
        embedded = ({r["name"]: r["test"][which] for r in runs} if shift in parts else
                    embed_as_extracted(runs, args.output, altered, device, args.workers))
        shifted = [r | {"test": embedded[r["name"]]} for r in runs]
        _, number, _, figures = expect(shifted, fold, part, labels, shifted, labels,
                                       [s for s in sets if shift not in s["names"]], prior, args, device)
        right = np.array(classes, object)[number] == truth[which]
        del figures["calibration"], figures["runs"]
        rows.append({"shift": shift, "true": round(float(right.mean()), 4), **figures})
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    save_csv(Path(args.output) / "expected.csv", table)
    print("mean absolute error:")
    for name in ("expected", "by_evidence", "by_agreement", "held_out", "held_out_other_looks",
                 "average_thresholded_confidence", "difference_of_confidences"):
        print(f"  {name:32} {(table[name] - table['true']).abs().mean():.3f}")
    inside = ((table["low"] <= table["true"]) & (table["true"] <= table["high"])).mean()
    print(f"inside the interval: {inside:.2f}")


if __name__ == "__main__":
    run(main)
