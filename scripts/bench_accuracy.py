"""Variants of the recipe side by side on a prepared set: the same images, folds, seeds and number of passes for each.

Each variant is train.py's flags on top of the base; it is judged by the held-out looks, never by the test labels. Two peers on
the same backbone: the plain softmax classifier, and ArcFace as pytorch-metric-learning has it, with its nearest neighbour.
Reads  input/<set>/train.csv and its images; runs train.py
Writes OUT/<variant>/ (the runs) and appends to OUT/accuracy.csv; what is there already is skipped

    python scripts/bench_accuracy.py --input input/grocery --output output/bench_grocery
    python scripts/bench_accuracy.py --input input/grocery --output output/bench_grocery --variants base ema --folds 0 1 2
"""

import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, atomic, autocast, pick_device, pick_precision, run, save_csv, script_parser, seed_everything

import pandas as pd
import torch
import torch.nn.functional as F
from export_index import need

from dataset import (
    EpochSampler,
    Images,
    augmentation,
    augmentation_flags,
    default_workers,
    encode,
    load_folds,
    make_loader,
    read_train,
)
from extract import embed_model, run_folder
from models import EMBEDDING, Model, load_weights
from train import lr_factor

PEER = "pytorch-metric-learning"
BASE = ["--scale", "20", "--margin", "0.2", "--lr", "0.006", "--head-lr-scale", "5"]
VARIANTS = {
    "base": [],
    "softmax": ["--head", "softmax", "--lr", "0.02"],
    PEER: None,
    "s45 m0.4": ["--scale", "45", "--margin", "0.4", "--lr", "0.003"],
    "s30 m0.3": ["--scale", "30", "--margin", "0.3"],
    "crop": ["--crop", "0.4"],
    "colour": ["--colour", "0.4"],
    "blur+grey": ["--blur", "0.2", "--grey", "0.1"],
    "randaugment": ["--randaugment", "9"],
    "mixup": ["--mixup", "0.2"],
    "cutmix": ["--cutmix", "1", "--cutout", "0"],
    "no cutout": ["--cutout", "0"],
    "ema": ["--ema", "0.99"],
    "head-first": ["--head-first", "1", "--epochs", "-1"],
    "freeze 1": ["--freeze", "1"],
    "freeze 2": ["--freeze", "2"],
    "freeze 3": ["--freeze", "3"],
    "freeze 4": ["--freeze", "4"],
    "sub-centres": ["--sub-centres", "3"],
    "gem fixed": ["--no-train-gem"],
    "mean pooling": ["--gem-p", "1", "--no-train-gem"],
    "larger test": ["--test-size", "+25%"],
    "two test sizes": ["--test-size", "0%", "+25%"],
    "lr x2": ["--lr", "0.012"],
    "lr /2": ["--lr", "0.003"],
    "head lr x1": ["--head-lr-scale", "1"],
    "head lr x10": ["--head-lr-scale", "10"],
}


def parse_args():
    parser = script_parser(__doc__, folders=False, device=False)
    add = parser.add_argument
    add("--input", required=True, help="data folder")
    add("--output", required=True, help="folder of the results")
    add("--arch", default="tf_efficientnet_lite0", help="backbone (default tf_efficientnet_lite0)")
    add("--size", type="count", default=128, help="image side in pixels (default 128)")
    add("--epochs", type="count", default=4, help="passes of each variant, those of its head alone included (default 4)")
    add("--fold-by", default="look", choices=["random", "group", "look"], help="what is held out (default look)")
    add("--folds", nargs="+", type="whole", default=[0], help="folds held out, one run each (default 0)")
    add("--seeds", nargs="+", type="seed", default=[9999], help="default 9999")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help=f"default all: {', '.join(VARIANTS)}")
    args = parser.parse_args()
    if PEER in args.variants:
        need("pytorch_metric_learning", "pytorch-metric-learning")
    if args.epochs < 2 and any("-1" in (VARIANTS[name] or []) for name in args.variants):
        parser.error(f"--epochs {args.epochs}: one epoch of some --variants is its head's; give two or more")
    return args


def flags_of(variant, args):
    """train.py's flags of a variant; '-1' epochs and '+25%' sizes are relative to the budget's."""
    flags, size = [*BASE, "--epochs", str(args.epochs), *VARIANTS[variant]], args.size
    if flags[-2:] == ["--epochs", "-1"]:
        flags[-1] = str(args.epochs - 1)
    sizes = {"0%": size, "+25%": round(size * 1.25 / 32) * 32}
    return [str(sizes.get(flag, flag)) for flag in flags]


def train(variant, fold, seed, args):
    """One run in its own folder, unless it is finished; returns its accuracies and seconds."""
    output = Path(args.output) / f"{variant.replace(' ', '_')}_seed{seed}"
    folds = Path(args.output) / "folds.csv"
    if folds.exists() and not (output / "folds.csv").exists():  # the same folds for all variants and seeds
        with atomic(output / "folds.csv") as temporary:
            temporary.write_bytes(folds.read_bytes())
    command = [sys.executable, Path(__file__).resolve().parent.parent / "train.py", "--arch", args.arch, "--fold", fold,
               "--input", args.input, "--output", output, "--size", args.size, "--fold-by", args.fold_by, "--seed", seed,
               "--eval-every", "1000", *flags_of(variant, args)]
    start = time.time()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{variant}, fold {fold}, seed {seed} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    if not folds.exists():
        folds.write_bytes((output / "folds.csv").read_bytes())
    last = pd.read_csv(run_folder(output, args.arch, fold) / "log.csv").iloc[-1]
    return last[["head_acc", "retrieval_acc"]].to_dict() | {"seconds": round(time.time() - start)}


def train_peer(fold, seed, args):
    """pytorch-metric-learning's ArcFace, with its own margin, scale and nearest-neighbour accuracy, on our backbone, images,
    order, augmentation, precision and schedule; no class weights, and weight decay on all. Returns what train does."""
    from pytorch_metric_learning.losses import ArcFaceLoss
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    start, device, workers = time.time(), pick_device(), default_workers()
    precision, embedding = (pick_precision("auto", device, training) for training in (True, False))
    precision = "fp32" if precision == "fp16" else precision  # there is no scaler here
    if not (Path(args.output) / "folds.csv").exists():
        raise InputError(f"{args.output}/folds.csv is not there; run another variant first, it draws the folds")
    parser = script_parser("", folders=False, device=False)
    augmentation_flags(parser)
    recipe = parser.parse_args([])
    recipe.size = args.size
    table = read_train(args.input)
    classes, labels = encode(table["label"])
    folds = load_folds(args.output, table)
    parts = []
    for rows, augment in [(folds != fold, augmentation(recipe)), (folds != fold, None), (folds == fold, None)]:
        parts.append(Images(args.input, table["path"][rows], labels[rows], args.size, augment=augment, seed=seed))
    seed_everything(seed)
    model = Model(args.arch, len(classes))
    load_weights(model, args.arch, "auto")
    model.to(device, memory_format=torch.channels_last)
    loss = ArcFaceLoss(len(classes), EMBEDDING).to(device)
    sampler = EpochSampler(len(parts[0]), seed, 32)
    loader = make_loader(parts[0], sampler, workers, device)
    lr, scale = (float(BASE[BASE.index(flag) + 1]) for flag in ("--lr", "--head-lr-scale"))
    new = [*model.pool.parameters(), *model.neck.parameters(), *loss.parameters()]
    optimiser = torch.optim.SGD([{"params": model.backbone.parameters(), "scale": 1.0}, {"params": new, "scale": scale}], lr,
                                momentum=0.9, weight_decay=1e-4, nesterov=True)
    for epoch in range(args.epochs):
        model.train()
        sampler.epoch = epoch
        for step, (batch, truth) in enumerate(loader):
            for group in optimiser.param_groups:
                group["lr"] = lr * group["scale"] * lr_factor(epoch + (step + 1) / len(loader), args.epochs, 1.0)
            with autocast(device, precision):
                embedded = model(batch.to(device))
            loss(embedded, truth.to(device)).backward()
            optimiser.step()
            optimiser.zero_grad()
    gallery, query = (torch.from_numpy(embed_model(model, part, device, embedding, workers=workers)) for part in parts[1:])
    said = AccuracyCalculator(include=("precision_at_1",), k=1).get_accuracy(
        F.normalize(query), parts[2].labels, F.normalize(gallery), parts[1].labels)
    return {"head_acc": float("nan"), "retrieval_acc": said["precision_at_1"], "seconds": round(time.time() - start)}


def main():
    args = parse_args()
    file = Path(args.output) / "accuracy.csv"
    rows = pd.read_csv(file).to_dict("records") if file.exists() else []
    keys = ("variant", "arch", "size", "epochs", "fold_by", "fold", "seed")
    for seed in args.seeds:
        for fold in args.folds:
            for variant in args.variants:
                key = (variant, args.arch, args.size, args.epochs, args.fold_by, fold, seed)
                if any(tuple(row[k] for k in keys) == key for row in rows):
                    continue
                found = train_peer(fold, seed, args) if variant == PEER else train(variant, fold, seed, args)
                rows.append(dict(zip(keys, key, strict=True)) | found)
                save_csv(file, pd.DataFrame(rows))
                print(rows[-1], flush=True)
    budget = args.arch, args.size, args.epochs, args.fold_by
    rows = [row for row in rows if tuple(row[k] for k in keys[1:5]) == budget]
    table = pd.DataFrame(rows).groupby("variant", sort=False)[["head_acc", "retrieval_acc", "seconds"]]
    print(table.agg(["mean", "std", "count"]).round(4).to_string())


if __name__ == "__main__":
    run(main)
