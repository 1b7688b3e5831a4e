"""Time and memory as the work grows: one run through the pipeline, on ever larger demo catalogues up to the contest's size.

Reads  nothing
Writes WORK/<catalogue>/ (data and results), WORK/cost.csv (what is there is not measured again) and WORK/cost.png

    python scripts/bench_cost.py --work output/cost
    python scripts/bench_cost.py --work output/cost --catalogues 20x20+15 80x20+15 --arch nfnet_l0 --size 256
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, atomic, duration, run, script_parser

import pandas as pd
import summary

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["train", "extract", "retrieve", "expect", "report"]


def parse_args():
    parser = script_parser(__doc__, folders=False)
    add = parser.add_argument
    add("--work", default="output/cost", help="folder to work in (default output/cost)")
    add("--catalogues", nargs="+", default=["20x20+15", "80x20+15", "320x20+15", "1000x48+72"], metavar="CxN+M",
        help="products, training and test photographs of each (default 1, 4 and 16 times the demo, and the contest's)")
    add("--arch", default="tf_efficientnet_lite0", help="backbone (default tf_efficientnet_lite0)")
    add("--size", type="count", default=96, help="image side in pixels (default 96)")
    add("--epochs", type="count", default=1, help="of the training (default 1)")
    args = parser.parse_args()
    for text in args.catalogues:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*\+[1-9]\d*", text):
            parser.error(f"--catalogues {text}: write products x training photographs + test photographs, e.g. 20x20+15")
    return args


def measured(*command):
    """(seconds, GiB at most in one process) of `python command`."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        _, status, used = os.wait4(process.pid, 0)
    except BaseException:  # a SIGTERM reaches this process alone
        process.terminate()
        raise
    if status:
        raise InputError(f"{command[0]} failed, see above")
    return time.perf_counter() - start, used.ru_maxrss / 2**20


def measure(folder, classes, train, test, args):
    """A row of cost.csv."""
    sizes = {"--classes": classes, "--train-per-class": train, "--test-per-class": test}
    measured("scripts/make_demo.py", folder / "data", *(x for pair in sizes.items() for x in pair))
    for old in ("output", "data/.cache"):  # of another backbone, or of a measurement that was stopped
        shutil.rmtree(folder / old, ignore_errors=True)
    where = ["--input", folder / "data", "--output", folder / "output"]
    recipe = ["--arch", args.arch, "--fold", 0, "--size", args.size, "--epochs", args.epochs,
              "--batch-size", 16, "--lr", 0.003, "--head-lr-scale", 5, "--fold-by", "random"]
    row = {"products": classes, "train": classes * train, "test": classes * test}
    for stage in STAGES:
        script = f"scripts/{stage}.py" if stage in ("expect", "report") else f"{stage}.py"
        row[f"{stage} s"], row[f"{stage} GiB"] = measured(script, *where, *(recipe if stage == "train" else []), "--device",
                                                          args.device)
        print(f"{folder.name}: {stage} {duration(row[f'{stage} s'])}, {row[f'{stage} GiB']:.2f} GiB", flush=True)
    return row


def draw(table, path):
    """Seconds and memory over the number of images, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    figure = Figure((8, 3.2), dpi=100, layout="constrained")
    for axes, unit, title in zip(figure.subplots(1, 2), ("s", "GiB"), ("seconds", "peak memory, GiB"), strict=True):
        for stage in STAGES:
            axes.plot(table["train"] + table["test"], table[f"{stage} {unit}"], marker="o", label=stage)
        axes.set(title=title, xlabel="images, train and test", xscale="log")
        axes.set(**{"yscale": "log"} if unit == "s" else {"ylim": (0, None)})
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main():
    args = parse_args()
    work = Path(args.work).resolve()
    path, rows = work / "cost.csv", []
    known = pd.read_csv(path, index_col=0) if path.exists() else pd.DataFrame()
    for text in args.catalogues:
        name = f"{text} {args.arch} {args.size} px {args.epochs} epochs"
        if name not in known.index:
            row = measure(work / text, *map(int, re.findall(r"\d+", text)), args)
            known = pd.concat([known, pd.DataFrame([row], [name])])
            with atomic(path) as temporary:
                known.to_csv(temporary, index_label="run")
        rows.append(name)
    table = known.loc[rows]
    draw(table, work / "cost.png")
    lines = [[f"{int(row['train']):,} + {int(row['test']):,}", f"{1000 * row['train s'] / row['train'] / args.epochs:.1f} s",
              *(f"{duration(row[f'{stage} s'])}, {row[f'{stage} GiB']:.2f} GiB" for stage in STAGES)]
             for _, row in table.iterrows()]
    print("\n" + summary.table(lines, ["images, train + test", "an epoch of 1,000", *STAGES]))
    last = table.iloc[-1]
    rate = (last["train"] + last["test"]) / last["extract s"]
    print(f"\nby these rates, a gallery of 10 million images, one run: embedding {duration(1e7 / rate)} ({rate:.0f} images/s); "
          f"its cache {3 * args.size**2 / 100:.0f} GB, its embeddings 20 GB")


if __name__ == "__main__":
    run(main)
