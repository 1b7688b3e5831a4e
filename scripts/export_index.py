"""The gallery as an index of an existing engine, for a service or for more images than the exact search is meant for.

Reads  what retrieve.py reads
Writes output/index/<engine>/, whole or not at all. A vector is a training image's joined embedding, as retrieve.py joins the
       runs: each run's L2-normalised, side by side, of length 1 together. Blocks bound the memory beside the engine's own.
           gallery.faiss, rows.csv   of flat (exact), hnsw (a graph, all vectors in memory), ivfpq (lists of codes of D / 8
                                     bytes), ivfpq-refined (D bytes more, the nearest by the codes scored anew from them);
                                     vector number i has the path and label of row i
           gallery.lance             of lancedb: a table on disk with the columns vector, row, path, label, indexed by IVF-PQ,
                                     the nearest by the codes scored anew from the vectors
           index.json                the runs joined and their checkpoints, the settings, what was measured
Prints how many of the k truly nearest the engine finds, how often its nearest has the same label, and its speed, beside those
of the exact search: on the test images, or where there are none on training images with themselves left out.

    pip install faiss-cpu lancedb
    python scripts/export_index.py --engine hnsw
    python scripts/export_index.py --engine lancedb --runs nfnet_l0/fold0 nfnet_l0/fold1 --input input/mine --output output/mine
"""

import contextlib
import importlib
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, Unwritable, lock, pick_device, progress, run, save_json, script_parser

import numpy as np
from summary import table as markdown

from dataset import load_test, load_train, train_fingerprint
from retrieve import grow, load_runs
from search import Joined, topk
from votes import blocks

BLOCK = 8192  # rows handed over at a time
REFINE = 10  # times k of the rows that the codes find nearest are scored anew
ALIKE = 1e-6  # cosines that differ by less are equal but for rounding


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--engine", required=True, choices=ENGINES, help="what to export to: " + ", ".join(ENGINES))
    add("--runs", nargs="+", metavar="ARCH/foldK", help="runs to join; default: every finished run")
    add("--k", type="count", default=5, help="neighbours (default 5)")
    add("--n", type="count", default=2000, help="queries it is measured on, drawn at random of more (default 2000)")
    add("--recall", type="share", default=0.99, help="the index is left at the least effort that finds this share of the "
        "nearest, else at the greatest, 0..1 (default 0.99)")
    return parser.parse_args()


def need(module, package):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{package} is not installed: pip install {package}") from None


# -------------------------------------------------------------------------------------------------------------- engines


class Faiss:
    """An index of FAISS in one file. `parameter`: what its effort is called there."""

    parameter, efforts, factory = None, ["exact"], "Flat"

    def describe(self, rows, width):
        """In the words of FAISS's index_factory."""
        return self.factory

    def build(self, folder, gallery, table):
        """Index the rows of a Joined; `table` has their path and label."""
        faiss = self.faiss = need("faiss", "faiss-cpu")
        self.settings = self.describe(*gallery.shape)
        self.index = faiss.index_factory(gallery.shape[1], self.settings, faiss.METRIC_INNER_PRODUCT)
        if not self.index.is_trained:
            if ivf := faiss.try_extract_index_ivf(self.index):  # a warning for each of the codes' bytes otherwise
                ivf.cp.min_points_per_centroid = faiss.downcast_index(ivf).pq.cp.min_points_per_centroid = 1
            sample = min(len(gallery), max(64 * lists(len(gallery)), 64 * 256), 2**28 // gallery.shape[1])  # 1 GiB at most
            self.index.train(gallery[some(len(gallery), sample)].numpy())
        for part in progress(list(blocks(len(gallery), BLOCK)), "index"):
            self.index.add(gallery[part].numpy())
        table[["path", "label"]].to_csv(folder / "rows.csv", index=False)

    def search(self, queries, k, effort):
        """Rows [n, k] nearest to queries [n, D] of length 1, -1 where fewer are found."""
        self.set(effort)
        return self.index.search(queries, k)[1]

    def set(self, effort):
        if self.parameter:
            self.faiss.ParameterSpace().set_index_parameter(self.index, self.parameter, effort)

    def close(self, folder, effort):
        self.set(effort)
        try:
            self.faiss.write_index(self.index, str(folder / "gallery.faiss"))
        except RuntimeError as error:  # a full disk
            raise Unwritable(f"{folder} cannot be written ({str(error).rpartition('Error: ')[2]}); free space, or give another "
                             "--output") from None


class Hnsw(Faiss):
    parameter, efforts, factory = "efSearch", [16, 64, 256, 1024], "HNSW32"


class IvfPq(Faiss):
    parameter, efforts = "nprobe", [1, 4, 16, 64]

    def describe(self, rows, width):
        enough_for_codes(rows, "ivfpq")
        return f"IVF{lists(rows)},PQ{width // 8}np"  # np: codes are not sorted for a Hamming filter, which is not used here


class IvfPqRefined(IvfPq):
    def describe(self, rows, width):
        return super().describe(rows, width) + ",Refine(SQ8)"

    def set(self, effort):
        super().set(effort)
        self.faiss.ParameterSpace().set_index_parameter(self.index, "k_factor_rf", REFINE)


class LanceDb:
    """A table of LanceDB in a folder."""

    parameter, efforts = "nprobes", [4, 16, 64, "exact"]

    def build(self, folder, gallery, table):
        lancedb, index, pa = (need(module, "lancedb") for module in ("lancedb", "lancedb.index", "pyarrow"))
        enough_for_codes(len(gallery), "lancedb")
        width = gallery.shape[1]
        count = max(1, min(lists(len(gallery)), len(gallery) // 256))  # LanceDB learns no more lists than that
        self.settings = {"index": "IVF_PQ", "lists": count, "codes": width // 8, "refine_factor": REFINE}
        schema = pa.schema([("vector", pa.list_(pa.float32(), width)), ("row", pa.int64()), ("path", pa.string()),
                            ("label", pa.string())])

        def batches():
            for part in progress(list(blocks(len(gallery), BLOCK)), "table"):
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(gallery[part].numpy().ravel()), width)
                texts = [pa.array(table[name][part].tolist(), pa.string()) for name in ("path", "label")]
                yield pa.RecordBatch.from_arrays([vectors, pa.array(np.arange(len(gallery))[part]), *texts], schema=schema)

        self.table = lancedb.connect(folder).create_table("gallery", batches(), schema=schema)
        codes = index.IvfPq(distance_type="cosine", num_partitions=count, num_sub_vectors=width // 8)
        self.table.create_index("vector", config=codes)

    def search(self, queries, k, effort):
        index = np.full((len(queries), k), -1)
        for found, query in zip(index, queries, strict=True):
            ask = self.table.search(query).distance_type("cosine").limit(k).select(["row", "_distance"])
            ask = ask.bypass_vector_index() if effort == "exact" else ask.nprobes(effort).refine_factor(REFINE)
            rows = ask.to_arrow()["row"].to_numpy()
            found[:len(rows)] = rows
        return index

    def close(self, folder, effort):
        pass  # all is on disk; the effort is the query's


ENGINES = {"flat": Faiss, "hnsw": Hnsw, "ivfpq": IvfPq, "ivfpq-refined": IvfPqRefined, "lancedb": LanceDb}


def lists(rows):
    """Number of inverted lists: some 4 sqrt(rows), FAISS's rule, a power of two; at least 39 rows a list."""
    return 2 ** int(np.log2(np.clip(4 * rows**0.5, 1, max(1, rows / 39))))


def enough_for_codes(rows, engine):
    if rows < 256:
        raise InputError(f"--engine {engine} learns its codes from 256 images or more, and the gallery has {rows}; use flat")


# ---------------------------------------------------------------------------------------------------------- measurement


def some(rows, n):
    """n of the row numbers, ascending, drawn at random, always the same; all of them where there are no more."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:n])


def leave_out(index, own, k):
    """The first k entries of each row of [n, k + 1] that are not own[i]."""
    keep = index != own[:, None]
    keep &= keep.cumsum(1) <= k
    return index[keep].reshape(len(index), k)


def recall(index, queries, gallery, kth):
    """Share of the found rows [n, k] that are as near as the truly k-th nearest, kth [n], or nearer: equal similarities count
    as found, whichever of their rows it is (Aumueller et al., ANN-Benchmarks, 2018)."""
    hits = 0
    for part in blocks(len(index), max(1, BLOCK // index.shape[1])):
        rows = gallery[np.maximum(index[part], 0).ravel()].unflatten(0, index[part].shape).numpy()
        cosine = np.einsum("nkd,nd->nk", rows, queries[part])
        hits += ((cosine >= kth[part, None] - ALIKE) & (index[part] >= 0)).sum()
    return hits / index.size


def export(name, folder, gallery, table, queries, own, k, least, device):
    """Build the engine's index in `folder` and measure it. gallery, queries: Joined; table: the gallery's path and label;
    own [n]: the row that is the query itself, or None. Returns what index.json holds, and the printed table."""
    engine, unit, labels = ENGINES[name](), queries[:].numpy(), table["label"].to_numpy()
    k = min(k, len(gallery) - (own is not None))
    start = time.perf_counter()
    engine.build(folder, gallery, table)
    built = time.perf_counter() - start
    start = time.perf_counter()
    similarity, exact = topk(queries, gallery, k, own, device)
    seconds = time.perf_counter() - start
    rows = [["exact (search.py)", "1.0000", "1.0000", f"{len(unit) / seconds:.0f}"]]
    measured = []
    for effort in engine.efforts:
        start = time.perf_counter()
        found = engine.search(unit, k + (own is not None), effort)
        seconds = time.perf_counter() - start
        if own is not None:
            found = leave_out(found, own, k)
        share = float(recall(found, unit, gallery, similarity[:, -1]))
        same = float(((found[:, 0] >= 0) & (labels[found[:, 0]] == labels[exact[:, 0]])).mean())
        what = effort if effort == "exact" else f"{engine.parameter} {effort}"
        rows.append([f"{name}, {what}", f"{share:.4f}", f"{same:.4f}", f"{len(unit) / seconds:.0f}"])
        measured.append({"effort": effort, "recall": share, "same_label": same, "queries_per_second": len(unit) / seconds})
    chosen = next((m for m in measured if m["recall"] >= least), measured[-1])["effort"]
    engine.close(folder, chosen)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    printed = markdown(rows, [f"{len(unit)} queries, {len(gallery)} x {gallery.shape[1]}", f"recall@{k}", "same label",
                              "queries/s"])
    printed += f"\n\nbuilt in {built:.0f} s, {size / 2**20:.0f} MiB; left at {engine.parameter or 'effort'} {chosen}"
    return {"engine": name, "settings": engine.settings, "parameter": engine.parameter, "effort": chosen, "k": k,
            "rows": len(gallery), "dimensions": gallery.shape[1], "measured": measured}, printed


@contextlib.contextmanager
def whole_folder(path):
    """Yield an empty folder that takes the place of `path` when the block ends without an error."""
    temporary, old = (path.with_name(f".{path.name}.{what}") for what in ("tmp", "old"))
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main():
    args = parse_args()
    device = pick_device(args.device)
    train = load_train(args)
    test = load_test(args)
    runs, train = grow(load_runs(args.output, args.runs, train, test), args.output, train)
    train = train.reset_index(drop=True)
    gallery = Joined([r["train"] for r in runs])
    if test is None:
        own = some(len(train), args.n)
        queries = Joined([r["train"] for r in runs], own)
    else:
        own, queries = None, Joined([r["test"] for r in runs], some(len(test), args.n))
    target = Path(args.output) / "index" / args.engine
    with lock(target.parent), whole_folder(target) as folder:
        record, printed = export(args.engine, folder, gallery, train, queries, own, args.k, args.recall, device)
        record |= {"train": train_fingerprint(train), "runs": {r["name"]: r["stamp"]["checkpoint"] for r in runs}}
        save_json(folder / "index.json", record)
    print(f"{printed}\n{target}")


if __name__ == "__main__":
    run(main)
