"""Extraction beside its limit, in one run: the sides take turns, medians of the rounds. Random weights, for speed only.

    forward     the limit: the bare forward pass of an image and its mirror image, on a batch that lies on the device
    cache       extract.py's loop from the cache of decoded images
    jpeg        the same from the image files
    original    the original solution's way: float32, contiguous layout, decode and normalise in the loader, two passes
    read ...    the loader alone, from the cache and from the files; copy: batches to the device alone

Several backbones are measured one by one, then together in one pass over the images, as extract.py takes runs that are alike.
Prints images/s and the share of the limit's; then the same of processor time, which is steadier on a CPU that others use;
each turn's images/s on stderr as soon as it is known.
Reads  input/train.csv and its images; writes INPUT/.cache

    python scripts/bench_extract.py --input input/grocery --size 224 --arch tf_efficientnet_lite0 tf_efficientnet_lite2
    python scripts/bench_extract.py --arch nfnet_l0 tf_efficientnet_b1 --n 8192 --batch-size 256     # on a GPU
"""

import multiprocessing
import os
import resource
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import autocast, duration, keep_freed_memory, pick_device, pick_precision, run, script_parser

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset import Cache, Images, load_image, loader_flags, make_loader, read_train
from extract import embed_models
from models import Model, fuse_batch_norm

LIBRARIES = {"THP_MEM_ALLOC_ENABLE": "0", "GOMP_SPINCOUNT": "300000"}  # their own defaults, for the original's process


def bench_flags(parser, arch, n):
    """The flags that bench_train.py has, too."""
    add = parser.add_argument
    add("--arch", nargs="+", default=arch, help=f"backbones (default {' '.join(arch)})")
    add("--size", type="count", default=256, help="image side in pixels (default 256)")
    add("--n", type="count", default=n, help=f"images of a round (default {n}; fewer are repeated)")
    add("--repeat", type="count", default=3, help="rounds, each runs every side (default 3)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of all but the original (default auto)")
    loader_flags(parser)


def parse_args():
    parser = script_parser(__doc__)
    bench_flags(parser, ["nfnet_l0", "tf_efficientnet_b1"], 512)
    parser.add_argument("--batch-size", type="count", default=64, help="images a batch (default 64)")
    return parser.parse_args()


def timed(call, device):
    """(seconds, processor seconds of this process and its ended children) of call()."""
    def now():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return np.array([time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)])

    start = now()
    call()
    return now() - start


class Normalised(Dataset):
    """(float32 image [3, size, size], 0) of the files, as the original's loader gives them."""

    def __init__(self, files, size):
        self.files, self.size = files, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, row):
        image = torch.from_numpy(load_image(self.files[row], self.size, "squash")).permute(2, 0, 1)
        return ((image.float() / 255 - 0.5) / 0.5).contiguous(), 0


def original_embedding(model, x):
    return model.neck(model.pool(model.backbone.forward_features(x)).float())


def original(arch, files, args):
    """Seconds of the original's way; in a process of its own, whose memory is as Python leaves it."""
    device = pick_device(args.device)
    model = Model(arch, 2).to(device).eval()
    loader = DataLoader(Normalised(files, args.size), args.batch_size, num_workers=args.workers)

    def embed_all():
        with torch.inference_mode():
            for x, _ in loader:
                x = x.to(device)
                ((original_embedding(model, x) + original_embedding(model, x.flip(-1))) / 2).cpu()

    return timed(embed_all, device)


def take_turns(title, calls, last, repeat, n, device):
    """{side: `timed` of each round}, each on stderr as soon as it is known. `last`: function, arguments of the original, or
    nothing."""
    seconds = {}
    os.environ |= LIBRARIES
    print(title, file=sys.stderr, flush=True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        turns = {name: partial(timed, call, device) for name, call in calls.items()}
        if last:
            turns["original"] = lambda: other.submit(*last).result()
        for _ in range(repeat):
            for name, turn in turns.items():
                seconds.setdefault(name, []).append(turn())
                print(f"{name}: {n / seconds[name][-1][0]:.1f} images/s", file=sys.stderr, flush=True)
    return seconds


def report(title, seconds, n, limit):
    """A line a side: images/s and processor time an image, as medians, and their shares of the limit's."""
    print(f"{title}: median of {len(seconds[limit])} rounds of {n} images; random weights")
    middle = {name: np.median(rounds, 0) for name, rounds in seconds.items()}
    for name, (wall, used) in middle.items():
        print(f"  {name:12} {n / wall:9.1f} images/s  {middle[limit][0] / wall:6.3f} of {limit}'s    "
              f"{used / n * 1e3:8.2f} ms of processor  {middle[limit][1] / max(used, 1e-9):6.3f}", flush=True)
    return middle


def main():
    args = parse_args()
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    names = np.resize(read_train(args.input, args.allow_outside)["path"], args.n)
    cache = Cache(args)
    cache.add(args.input, names, [args.size], "squash")
    kept, plain = (Images(args.input, names, None, args.size, cache=c) for c in (cache, None))
    keep_freed_memory()

    def read(images):
        deque(make_loader(images, args.batch_size, args.workers, device), maxlen=0)

    for archs in [*([arch] for arch in args.arch), *([args.arch] if len(args.arch) > 1 else [])]:
        models = [Model(arch, 2).to(device, memory_format=torch.channels_last).eval() for arch in archs]
        models = [fuse_batch_norm(model, args.size) for model in models]
        host = torch.zeros(args.batch_size, args.size, args.size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        host = host.pin_memory() if device.type == "cuda" else host
        resident = torch.cat([host, host]).to(device)
        batches = -(-args.n // args.batch_size)

        def forward(models=models, resident=resident, batches=batches):
            with torch.inference_mode(), autocast(device, precision):
                for at in range(batches):
                    last = args.n - at * args.batch_size
                    for model in models:
                        model(resident[:2 * min(last, args.batch_size)])

        def run_embed(images, models=models):
            list(embed_models(models, images, device, precision, args.batch_size, args.workers, "embedding", [args.size]))

        def copy(host=host, batches=batches):
            for _ in range(batches):
                host.to(device, non_blocking=True, copy=True)

        calls = {"forward": forward, "cache": lambda: run_embed(kept), "jpeg": lambda: run_embed(plain),
                 "read cache": lambda: read(kept), "read jpeg": lambda: read(plain), "copy": copy}
        forward()
        files = [Path(args.input, name) for name in names]
        title = f"{' + '.join(archs)}, {args.size} px, {device.type} {precision}, {torch.get_num_threads()} threads"
        last = (original, *archs, files, args) if len(archs) == 1 else None
        seconds = take_turns(title, calls, last, args.repeat, args.n, device)
        middle = report(title, seconds, args.n, "forward")
        each = middle["cache"][0] / args.n
        print(f"  the contest, from the cache: five runs (of each) of 120,000 images take {duration(5 * 120e3 * each)}, "
              f"150 validations of 48,000 {duration(150 * 48e3 * each)}", flush=True)


if __name__ == "__main__":
    run(main)
