"""The exact search beside its peers: same data, same threads, one after the other in one run, repeated, medians.

Data: embeddings clustered like real ones, or a run's .npy files. Peers: FAISS IndexFlatIP, scikit-learn brute force, plain
float32 torch product + topk by blocks, and, as the limit, the bare product in the screen's precision with nothing else.
Prints seconds, the ratio to FAISS, GFLOP/s, peak memory beside the arrays (Linux), and how far the results agree.

    pip install faiss-cpu
    python scripts/bench_retrieve.py --dim 5120
    python scripts/bench_retrieve.py --n 72000 --methods ours --votes propagation expansion --repeat 1    # the contest's size
    python scripts/bench_retrieve.py --dim 512 --n 2048 --methods ours --engines flat hnsw ivfpq lancedb --repeat 1
    python scripts/bench_retrieve.py --gallery output/nfnet_l0/fold0/train.npy --queries output/nfnet_l0/fold0/test.npy
"""

import platform
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import load_npy, pick_device, run, script_parser

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from export_index import ENGINES, export, need

from search import QUERIES, SCREENS, TILE, Joined, pick_screen, topk
from votes import VOTES, WITH_HEAD, label, vote_flags

METHODS = ["ours", "faiss", "sklearn", "torch", "limit"]


def parse_args():
    parser = script_parser(__doc__, folders=False)
    add = parser.add_argument
    add("--gallery", help="a .npy to search; default: clustered random rows")
    add("--queries", help="the .npy of queries, with --gallery")
    add("--rows", type="count", default=48000, help="gallery rows (default 48000)")
    add("--n", type="count", default=8192, help="queries (default 8192)")
    add("--dim", type="count", default=5120, help="dimensions (default 5120)")
    add("--classes", type="count", default=1000, help="clusters (default 1000)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="default all")
    votes = [vote for vote in VOTES[2:] if vote not in WITH_HEAD]
    add("--votes", nargs="*", choices=votes, default=[], metavar="VOTE",
        help=f"also time these votes once, search included, and their accuracy on the clusters: {' '.join(votes)}")
    add("--engines", nargs="*", choices=ENGINES, default=[], metavar="ENGINE", help="also build export_index.py's indices of "
        f"the same rows and print its table of recall and speed: {' '.join(ENGINES)}")
    add("--repeat", type="count", default=3, help="rounds, each runs every method (default 3)")
    add("--seed", type="seed", default=0, help="of the data (default 0)")
    vote_flags(parser)
    args = parser.parse_args()
    if (args.votes or args.engines) and args.gallery:
        parser.error("--votes and --engines need the labels of clustered rows; leave --gallery out")
    if bool(args.gallery) != bool(args.queries):
        parser.error("--gallery and --queries go together")
    if "faiss" in args.methods:
        need("faiss", "faiss-cpu")
    return args


def clustered(folder, args):
    """Two .npy files: classes around random centres of some 100 effective dimensions, within a class cosines about 0.75."""
    rng = np.random.default_rng(args.seed)
    basis = rng.normal(size=(100, args.dim)).astype(np.float32)
    centre = rng.normal(size=(args.classes, 100)).astype(np.float32) @ basis
    files = []
    for name, count, spread in [("gallery", args.rows, 0.45), ("queries", args.n, 0.6)]:
        label = rng.integers(0, args.classes, count)
        rows = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (count, args.dim))
        for at in range(0, count, 4096):
            part = label[at:at + 4096]
            own = rng.normal(size=(len(part), 100)).astype(np.float32) @ basis
            noise = rng.standard_normal(size=(len(part), args.dim), dtype=np.float32)
            rows[at:at + 4096] = centre[part] + spread * own + 3 * noise
        rows.flush()
        np.save(folder / f"{name}_labels.npy", label)
        files.append(folder / f"{name}.npy")
    return files


class PeakMemory:
    """Most anonymous memory of this process above that at the start, in GiB, while the block runs."""

    def __enter__(self):
        self.start, self.top, self.stop = self.now(), 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    def watch(self):
        while not self.stop.wait(0.02):
            self.top = max(self.top, self.now() - self.start)

    @staticmethod
    def now():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 2**20


def unit_rows(array):
    return F.normalize(torch.from_numpy(np.array(array))).numpy()


def ours(queries, gallery, args, device):
    return topk(queries, gallery, args.k, device=device, screen=args.screen, memory=args.memory)


def by_faiss(queries, gallery, args, device):
    import faiss

    index = faiss.IndexFlatIP(gallery.shape[1])
    for at in range(0, len(gallery), 8192):
        index.add(unit_rows(gallery[at:at + 8192]))
    return index.search(unit_rows(queries), args.k)


def by_sklearn(queries, gallery, args, device):
    from sklearn.neighbors import NearestNeighbors

    found = NearestNeighbors(n_neighbors=args.k, algorithm="brute").fit(unit_rows(gallery))
    distance, index = found.kneighbors(unit_rows(queries))
    return 1 - distance**2 / 2, index


def by_torch(queries, gallery, args, device):
    other = torch.from_numpy(unit_rows(gallery)).to(device).T
    parts = [(torch.from_numpy(unit_rows(queries[at:at + QUERIES])).to(device) @ other).topk(args.k)
             for at in range(0, len(queries), QUERIES)]
    return tuple(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))


def limit(queries, gallery, args, device):
    """The bare product: codes at hand, blocks as in our search, results thrown away."""
    screen = pick_screen(args.screen, device, len(queries) * len(gallery) * queries.shape[1])
    fill = (lambda n: torch.randint(-127, 128, (n, queries.shape[1]), dtype=torch.int8, device=device)) if screen == "int8" \
        else (lambda n: torch.randn(n, queries.shape[1], device=device).to(SCREENS[screen]))
    left, right = fill(QUERIES), fill(TILE)
    multiply = torch._int_mm if screen == "int8" else torch.mm
    blocks = -(-len(queries) // QUERIES) * -(-len(gallery) // TILE)
    share = len(queries) * len(gallery) / (blocks * QUERIES * TILE)
    start = time.perf_counter()
    for _ in range(blocks):
        result = multiply(left, right.T)
    result[0, 0].item()
    return (time.perf_counter() - start) * share


def agreement(found, reference):
    """How two results agree: the largest difference of similarity, and the share of equal neighbours. Others are ties but
    for rounding, since the similarities at equal places agree."""
    off = np.abs(found[0] - reference[0]).max()
    return f"similarity within {off:.0e}, {(found[1] == reference[1]).mean():.4%} of the neighbours equal"


def report(seconds, memory, results, flops, args):
    """A line a method: seconds, ratio to FAISS, rate, memory, agreement with ours."""
    base = np.median(seconds.get("faiss") or seconds[args.methods[0]])
    reference = results.get("ours")
    for name in args.methods:
        middle = np.median(seconds[name])
        same = "" if name in ("ours", "limit") or reference is None else agreement(results[name], reference)
        print(f"{name:8} {middle:7.2f} s (least {min(seconds[name]):.2f})  {base / middle:5.2f} x  "
              f"{flops / middle / 1e9:6.0f} GFLOP/s  {memory[name]:5.2f} GiB  {same}")


def main():
    args = parse_args()
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        files = (args.gallery, args.queries) if args.gallery else clustered(Path(folder), args)
        gallery, queries = (load_npy(file) for file in files)
        flops = 2 * len(gallery) * len(queries) * queries.shape[1]
        screen = pick_screen(args.screen, device, flops / 2)
        print(f"{len(queries)} queries, {len(gallery)} rows, {queries.shape[1]} dimensions, k {args.k}; screen {screen}; "
              f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, torch {torch.__version__}")
        calls = {"ours": ours, "faiss": by_faiss, "sklearn": by_sklearn, "torch": by_torch, "limit": limit}
        seconds, memory, results = {name: [] for name in args.methods}, {}, {}
        for _ in range(args.repeat):
            for name in args.methods:
                with PeakMemory() as peak:
                    start = time.perf_counter()
                    result = calls[name](queries, gallery, args, device)
                    took = time.perf_counter() - start
                seconds[name].append(result if name == "limit" else took)
                memory[name], results[name] = peak.top, result
        report(seconds, memory, results, flops, args)
        for vote in args.votes:
            labels, truth = (np.load(Path(folder) / f"{name}_labels.npy") for name in ("gallery", "queries"))
            with PeakMemory() as peak:
                start = time.perf_counter()
                predicted = label(Joined([queries]), Joined([gallery]), labels, args.classes, None, args, [vote], device,
                                  Path(folder) / "scratch")[0][vote]
                took = time.perf_counter() - start
            print(f"vote {vote:12} {took:7.1f} s  {peak.top:5.2f} GiB  right {(predicted == truth).mean():.4f}")
        for engine in args.engines:
            labels = np.load(Path(folder) / "gallery_labels.npy").astype(str)
            table = pd.DataFrame({"path": np.arange(len(labels)).astype(str), "label": labels})
            with tempfile.TemporaryDirectory() as index:
                print("\n" + export(engine, Path(index), Joined([gallery]), table, Joined([queries]), None, args.k, 0.99,
                                    device)[1])


if __name__ == "__main__":
    run(main)
