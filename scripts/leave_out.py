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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, atomic, load_json, pick_device, run, save_json, script_parser

import numpy as np

from dataset import encode, load_folds, read_train
from extract import embed_files, finished_runs, run_folder
from retrieve import LEFT_OUT, load_runs, strangeness, strangers

ROOT = Path(__file__).resolve().parent.parent
NOT_REPEATED = {"pseudo", "pseudo_min"}  # pseudo-labels may be those of products left out


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", metavar="ARCH/foldK", help="runs whose recipe is repeated; default: the first of each backbone")
    add("--share", type=float, default=0.25, help="share of the products left out, 0..1 (default 0.25)")
    add("--seed", type=int, default=0, help="of which ones (default 0)")
    args = parser.parse_args()
    if not 0 < args.share < 1:
        parser.error("--share must be more than 0 and less than 1")
    return args


def draw(labels, count, seed):
    """`count` of the labels, at random."""
    return np.sort(np.random.default_rng(seed).permutation(encode(labels)[0])[:count])


def without(source, folder, left, test=False):
    """Make `folder` the data folder `source` without the training images of the labels `left`, by links; `test`: with the test
    images. Returns the rows of train.csv that are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    kept_back = {"train.csv"} if test else {"train.csv", "sample_submission.csv", "solution.csv"}
    for entry in Path(source).absolute().iterdir():
        link = folder / entry.name
        if entry.name not in kept_back and not entry.name.startswith(".") and not link.is_symlink():
            link.symlink_to(entry)
    train = read_train(source)
    out = train["label"].isin(left)
    with atomic(folder / "train.csv") as temporary:
        train[~out].to_csv(temporary, index=False)
    return train[out]


def train_again(recorded, source, output, device):
    """Train and extract a run of the recorded arguments (args.json), on another data folder."""
    flags = ["--input", source, "--output", output, "--device", device]
    for name, value in recorded.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None and name not in NOT_REPEATED:
            flags += [f"--{flag}", *(value if isinstance(value, list) else [value])]
    for command in (["train.py", *flags], ["extract.py", *flags[:6], "--arch", recorded["arch"], "--fold", recorded["fold"]]):
        done = subprocess.run([sys.executable, ROOT / command[0], *map(str, command[1:])])
        if done.returncode:
            raise InputError(f"{command[0]} on {source} failed, see above; the same command goes on from there")


def main():
    args = parse_args()
    device, output = pick_device(args.device), Path(args.output)
    folders = [output / name for name in args.runs] if args.runs else finished_runs(output)
    recipes = [load_json(folder / "args.json") for folder in folders]
    recipes = [r for r in recipes if str(r["fold"]).isdecimal()]  # these were trained here and held images out
    if not args.runs:
        recipes = list({r["arch"]: r for r in reversed(recipes)}.values())
    if not recipes:
        raise InputError("no run was trained on folds; train one by train.py first, or name it by --runs")
    labels = read_train(args.input)["label"]
    source, beside = output / "left_out" / "input", output / "left_out"
    rows = without(args.input, source, draw(labels, round(args.share * labels.nunique()), args.seed))
    for recipe in recipes:
        train_again(recipe, source, beside, args.device)

    train = read_train(source)
    names = [str(run_folder(beside, r["arch"], r["fold"]).relative_to(beside)) for r in recipes]
    runs = load_runs(beside, names, train, None)
    numbers = encode(train["label"])[1]
    found = strangers(runs, runs, load_folds(beside, train), numbers, numbers, beside, device)
    for r in runs:
        r["test"] = embed_files(beside / r["name"], args.input, rows["path"], device)
    strange = np.sort(strangeness(runs, found, device))
    save_json(output / LEFT_OUT, {"labels": sorted(set(rows["label"])), "recipes": dict(zip(names, recipes, strict=True)),
                                  "strangeness": strange.tolist()})
    print(f"of {len(rows)} photographs of {rows['label'].nunique()} products that no run trained on, a share of "
          f"{(strange <= 0.05).mean():.3f} is as similar to the gallery as 0.05 of the others; --reject allows for it now")


if __name__ == "__main__":
    run(main)
