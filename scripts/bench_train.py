"""Training beside its limit, in one run: the sides take turns, medians of the rounds. Random weights, for speed only.

    step        the limit: bare forward, backward and optimiser step, on a batch that lies on the device
    plain step  the same without the CUDA graph, on a GPU
    cache       train.py's epoch from the cache of decoded images
    jpeg        the same from the image files
    original    the original solution's way: float32, contiguous layout, decode and normalise in the loader
    read ...    the loader alone, augmentation included, from the cache and from the files; copy: batches to the device alone

Prints images/s and the share of the limit's; then the same of processor time, which is steadier on a CPU that others use;
each turn's images/s on stderr as soon as it is known.
Reads  input/train.csv and its images; writes INPUT/.cache

    python scripts/bench_train.py --input input/grocery --size 224 --arch tf_efficientnet_lite0 tf_efficientnet_lite2
    python scripts/bench_train.py --arch nfnet_l0 tf_efficientnet_b1 --n 4096     # on a GPU
"""

import math
import sys
from collections import deque
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import duration, keep_freed_memory, pick_device, pick_precision, run, script_parser

import numpy as np
import torch
from bench_extract import bench_flags, original_embedding, report, take_turns, timed

import train
from dataset import Cache, EpochSampler, Images, augmentation, encode, make_loader, read_train
from models import Model, freeze, loss_sum


def parse_args():
    parser = script_parser(__doc__)
    bench_flags(parser, ["nfnet_l0", "tf_efficientnet_b1"], 256)
    parser.add_argument("--batch-size", type="several", default=32, help="images a step (default 32)")
    parser.add_argument("--freeze", type="whole", default=0, metavar="N",
                        help="train.py's, of all but the original (default 0)")
    parser.add_argument("--compile", action="store_true", help="train.py's, of all but the original")
    args = parser.parse_args()
    if args.batch_size > args.n:
        parser.error("--batch-size must be no more than --n")
    return args


def prepare(arch, args, classes, device, layout):
    """(model, optimiser, train.py's arguments) at a learning rate that random weights bear."""
    recipe = train.parse_args(["--arch", arch, "--fold", "all", "--size", str(args.size), "--batch-size", str(args.batch_size),
                               "--lr", "1e-5", "--freeze", str(args.freeze), *["--compile"] * args.compile])
    model = Model(arch, classes).to(device, memory_format=layout).train()
    return model, train.make_optimiser(model, recipe), recipe


def original(arch, names, labels, args):
    """Seconds of the original's way; in a process of its own, whose memory is as Python leaves it."""
    device, classes = pick_device(args.device), int(labels.max()) + 1
    model, optimiser, recipe = prepare(arch, args, classes, device, torch.contiguous_format)
    images = Images(args.input, names, labels, args.size, augment=augmentation(recipe))
    loader, weights = make_loader(images, EpochSampler(args.n, 0, args.batch_size), args.workers, device), torch.ones(classes)

    def epoch():
        for batch, truth in loader:
            x, truth = ((batch.contiguous().float() / 255 - 0.5) / 0.5).to(device), truth.to(device)
            logits = model.head(original_embedding(model, x), truth)
            (loss_sum(logits, truth, weights.to(device)) / len(x)).backward()
            optimiser.step()
            optimiser.zero_grad()

    return timed(epoch, device)


def main():
    args = parse_args()
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device, training=True)
    table = read_train(args.input, args.allow_outside)
    classes, labels = encode(table["label"])
    names, labels = np.resize(table["path"], args.n), np.resize(labels, args.n)
    cache = Cache(args)
    cache.add(args.input, names, [args.size], "squash")
    keep_freed_memory()
    for arch in args.arch:
        model, optimiser, recipe = prepare(arch, args, len(classes), device, torch.channels_last)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        weights = torch.ones(len(classes), device=device)
        images = {name: Images(args.input, names, labels, args.size, augment=augmentation(recipe), cache=c)
                  for name, c in (("cache", cache), ("jpeg", None))}
        host, truth = torch.zeros(args.batch_size, args.size, args.size, 3, dtype=torch.uint8), torch.as_tensor(labels)
        host = (host.pin_memory() if device.type == "cuda" else host).permute(0, 3, 1, 2)
        batch, truth = host.to(device), truth[:args.batch_size].to(device)
        steps = args.n // args.batch_size

        backward = train.make_backward(model, scaler, weights, recipe, device, precision)
        total = weights[truth].sum()

        def step(backward=backward, model=model, optimiser=optimiser, scaler=scaler, batch=batch, truth=truth, total=total,
                 steps=steps):
            model.train()
            freeze(model.backbone, args.freeze)
            for _ in range(steps):
                backward(batch, truth, total)
                scaler.step(optimiser)
                scaler.update()
                optimiser.zero_grad(set_to_none=True)

        def loader(name, images=images):  # a new one each time: its workers end with it, and their time counts
            return make_loader(images[name], EpochSampler(args.n, 0, args.batch_size), args.workers, device)

        def epoch(name, model=model, optimiser=optimiser, scaler=scaler, weights=weights, recipe=recipe, backward=backward):
            train.train_epoch(model, None, loader(name), optimiser, scaler, weights, 1, recipe, device, backward)

        def copy(host=host, steps=steps):
            for _ in range(steps):
                host.to(device, non_blocking=True, copy=True)

        calls = {"step": step, "cache": lambda: epoch("cache"), "jpeg": lambda: epoch("jpeg"),
                 "read cache": lambda: deque(loader("cache"), 0), "read jpeg": lambda: deque(loader("jpeg"), 0), "copy": copy}
        if isinstance(backward, train.Graphed):
            calls["plain step"] = partial(step, backward.backward)
        step()
        while isinstance(backward, train.Graphed) and backward.graph is None and backward.plain < math.inf:
            step()
        title = f"{arch}, {args.size} px, {device.type} {precision}, {torch.get_num_threads()} threads"
        seconds = take_turns(title, calls, (original, arch, names, labels, args), args.repeat, steps * args.batch_size, device)
        middle = report(title, seconds, steps * args.batch_size, "step")
        each = middle["cache"][0] / (steps * args.batch_size)
        print(f"  the contest, from the cache: five runs of 30 epochs of 38,400 images take {duration(150 * 38400 * each)}",
              flush=True)


if __name__ == "__main__":
    run(main)
