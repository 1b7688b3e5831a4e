"""How new products look to the runs: the recipe trained once more without some of the products, whose photographs are then new.

retrieve.py --reject compares photographs with held-out images whose product was taken out of the gallery. But the runs trained
on those products and keep them apart from others; truly new ones come closer. This measures by how much.
Reads  what train.py reads, args.json of the runs
Writes output/left_out/ (a data folder of links and the runs) and output/left_out.json, which --reject goes by from then on

    python scripts/leave_out.py                                  # one run a backbone, a quarter of the products left out
    python scripts/leave_out.py --runs nfnet_l0/fold0 nfnet_l0/fold1 --share 0.2
"""

import subprocess
import sys
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, load_json, pick_device, run, save_csv, save_json, script_parser

import numpy as np
import pandas as pd

from dataset import encode, load_folds, load_train, read_train, train_fingerprint
from extract import embed_files, finished_runs, is_finished, run_folder
from retrieve import LEFT_OUT, embedding_settings, load_runs, nearest_by_fold, strangeness, strangers

ROOT = Path(__file__).resolve().parent.parent
NOT_REPEATED = {"pseudo", "pseudo_min"}  # pseudo-labels may be those of products left out


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", metavar="ARCH/foldK", help="runs whose recipe is repeated; default: the first of each backbone")
    add("--share", type="rate", default=0.25, help="share of the products left out (default 0.25)")
    add("--seed", type="seed", default=0, help="of which ones (default 0)")
    return parser.parse_args()


def draw(labels, count, seed):
    """`count` of the labels, at random."""
    return np.sort(np.random.default_rng(seed).permutation(encode(labels)[0])[:count])


def without(source, train, folder, left, test=False):
    """Make `folder` the data folder `source`, of the images in `train`, without those of the labels `left`, by links; `test`:
    with the test images. Returns the rows of `train` that are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    kept_back = {"train.csv"} if test else {"train.csv", "sample_submission.csv", "solution.csv"}
    for entry in Path(source).absolute().iterdir():
        link = folder / entry.name
        if entry.name not in kept_back and not entry.name.startswith(".") and not link.is_symlink():
            link.symlink_to(entry)
    out = train["label"].isin(left)
    paths = [str(Path(source).absolute() / p) if ".." in PurePosixPath(p).parts else p for p in train["path"]]
    save_csv(folder / "train.csv", train.assign(path=paths)[~out])
    return train[out]


def train_again(recorded, source, output, args):
    """Train and extract a run of the recorded arguments (args.json, eval_every), on another data folder."""
    flags = ["--input", source, "--output", output, "--device", args.device, *["--allow-outside"] * args.allow_outside]
    shared = len(flags)
    for name, value in recorded.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None and name not in NOT_REPEATED:
            flags += [f"--{flag}", *(value if isinstance(value, list) else [value])]
    run_ = ["--arch", recorded["arch"], "--fold", recorded["fold"]]
    for command in (["train.py", *flags], ["extract.py", *flags[:shared], *run_]):
        done = subprocess.run([sys.executable, ROOT / command[0], *map(str, command[1:])])
        if done.returncode:
            raise InputError(f"{command[0]} on {source} failed, see above; the same command goes on from there")


def main():
    args = parse_args()
    output, train = Path(args.output), load_train(args)
    folders = [output / name for name in args.runs] if args.runs else finished_runs(output)
    if open_ := [folder for folder in folders if not is_finished(folder)]:
        raise InputError(f"{open_[0]} is no finished run; train it to its end first")
    recipes = [load_json(folder / "args.json") for folder in folders]
    recipes = [r for r in recipes if str(r["fold"]).isdecimal()]  # these were trained here and held images out
    if not args.runs:
        recipes = list({r["arch"]: r for r in reversed(recipes)}.values())
    if not recipes:
        raise InputError("no run was trained on folds; train one by train.py first, or name it by --runs")
    products = train["label"].nunique()
    count = round(args.share * products)
    if not 1 <= count <= products - 2:
        raise InputError(f"--share {args.share} leaves out {count} of {products} products; give one that leaves one or more "
                         "out and two or more in")
    beside, stamp = output / "left_out", train_fingerprint(train)
    source, drawn = beside / "input", {"train": stamp, "share": args.share, "seed": args.seed, "recipes": recipes}
    if beside.exists() and not ((beside / "drawn.json").exists() and load_json(beside / "drawn.json") == drawn):
        raise InputError(f"{beside} is of other products, images or runs; delete it, it is made anew")
    beside.mkdir(exist_ok=True)
    save_json(beside / "drawn.json", drawn)
    rows = without(args.input, train, source, draw(train["label"], count, args.seed))
    for recipe in recipes:
        log = pd.read_csv(run_folder(output, recipe["arch"], recipe["fold"]) / "log.csv")
        first = int(log["epoch"][log["retrieval_acc"].notna()].min())  # it was validated every so many epochs
        train_again(recipe | {"eval_every": first}, source, beside, args)
    device = pick_device(args.device)

    rest = read_train(source, args.allow_outside)
    names = [str(run_folder(beside, r["arch"], r["fold"]).relative_to(beside)) for r in recipes]
    runs = load_runs(beside, names, rest, None)
    numbers = encode(rest["label"])[1]
    found = strangers(runs, runs, load_folds(beside, rest), numbers, numbers, beside, device)
    embedded = embed_files(runs, beside, args.input, rows["path"], device)
    runs = [r | {"test": embedded[r["name"]]} for r in runs]
    strange = np.sort(strangeness(nearest_by_fold(runs, device), found))
    save_json(output / LEFT_OUT, {"labels": sorted(set(rows["label"])), "recipes": dict(zip(names, recipes, strict=True)),
                                  "train": stamp, "embedded": {r["name"]: embedding_settings(r["stamp"]) for r in runs},
                                  "strangeness": strange.tolist()})
    print(f"of {len(rows)} photographs of {rows['label'].nunique()} products that no run trained on, a share of "
          f"{(strange <= 0.05).mean():.3f} is as similar to the gallery as 0.05 of the others; --reject allows for it now")


if __name__ == "__main__":
    run(main)
