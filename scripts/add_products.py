"""Products that the catalogue got after the training: added to the gallery with the models as they are, or taken out.

NEW.csv has path,label like train.csv, its paths relative to its own folder; labels may be new ones or known ones. Only the new
images are embedded. An image that the gallery holds already, by the content of its file, is skipped.
Reads  NEW.csv and its images; input/train.csv, best.pt and train.npy of the finished runs
Writes output/added.npz, whole or not at all: retrieve.py and the scripts count it to the gallery. Deleting it undoes everything

    python scripts/add_products.py new/new.csv
    python scripts/add_products.py --remove "Cola 0.5 l" "Cola 1 l"
    python scripts/add_products.py                       # embeds the added images again by runs that were trained since
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, file_fingerprint, lock, pick_device, progress, run, save_npz, script_parser

import numpy as np
import pandas as pd

from dataset import check_images, check_paths, load_train, read_csv
from extract import embed_files
from models import EMBEDDING
from retrieve import ADDED, gallery_key, grow, load_added, load_runs

COLUMNS = ("path", "label", "content")


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("csv", nargs="?", metavar="NEW.csv", help="images to add: path,label")
    add("--remove", nargs="+", default=[], metavar="LABEL", help="labels to take out of the gallery, before NEW.csv is added")
    add("--batch-size", type="count", default=64, help="images a batch (default 64)")
    return parser.parse_args()


def content(path):
    """What tells an image file's content, as text: its size in bytes and its hash."""
    return f"{path.stat().st_size} {file_fingerprint(path)}"


def read_new(file, source, outside):
    """Rows of NEW.csv: DataFrame path (below `source`, the input folder, or else absolute), label, content, says (where)."""
    table, base, source = read_csv(file, ["path", "label"]), Path(file).parent.absolute(), Path(source).absolute()
    check_paths(table, "path", file, outside)
    check_images(base, table["path"])
    paths = [base / name for name in table["path"]]
    return pd.DataFrame({
        "path": [str(p.relative_to(source) if p.is_relative_to(source) else p) for p in paths], "label": table["label"],
        "content": [content(p) for p in progress(paths, "reading")],
        "says": [f"{file}, row {row + 2}: {name!r}" for row, name in enumerate(table["path"])]})


def training_contents(source, train, rows):
    """{content: (path, label)} of the training images that may equal one of the `rows`, by the size of their files. Files that
    are gone are left out."""
    sizes, known = {int(c.split()[0]) for c in rows["content"]}, {}
    for name, label in zip(train["path"], train["label"], strict=True):
        path = Path(source) / name
        if path.exists() and path.stat().st_size in sizes:
            known[content(path)] = name, label
    return known


def without_duplicates(rows, known):
    """The rows whose content is not `known`, {content: (path, label)}, nor that of a row before. Refuses a row whose image has
    another label there."""
    known, fresh = dict(known), []
    for row in rows.itertuples():
        fresh.append(row.content not in known)
        name, label = known.setdefault(row.content, (row.path, row.label))
        if label != row.label:
            raise InputError(f"{row.says} has the label {row.label!r}, but {name}, the same image, {label!r}; correct one")
    return rows[np.array(fresh, bool)]


def embed_added(rows, before, runs, args, device):
    """Embeddings [runs, n, 512] of the added images; those that `before` has of a run as it is now are taken over."""
    # had: {(run, as it was): {content: embedding}}; known: {run: those of it as it is}; some: the runs that lack an image
    had = {(name, by): dict(zip(before["content"], vectors, strict=True))
           for name, by, vectors in zip(before["runs"], before["stamps"], before["embeddings"], strict=True)}
    known = {r["name"]: had.get((r["name"], gallery_key(r)), {}) for r in runs}
    some = [r for r in runs if not known[r["name"]].keys() >= {*rows["content"]}]
    todo = rows[np.array([any(c not in known[r["name"]] for r in some) for c in rows["content"]], bool)]
    check_images(args.input, todo["path"])
    new = embed_files(some, args.output, args.input, todo["path"], device, args.batch_size)
    known |= {name: dict(zip(todo["content"], vectors, strict=True)) | known[name] for name, vectors in new.items()}
    return np.array([[known[r["name"]][c] for c in rows["content"]] for r in runs],
                    np.float32).reshape(len(runs), len(rows), EMBEDDING)


def change(before, new, train, runs, args, device):
    """What added.npz shall hold: `before`, less the labels --remove, and the rows `new`."""
    rows, removed = pd.DataFrame({name: before[name] for name in COLUMNS}, dtype=object), {*before["removed"].tolist()}
    for label in args.remove:
        if label not in {*rows["label"]} | {*train["label"]} - removed:
            raise InputError(f"--remove {label!r}: no image of the gallery has this label")
    rows, removed = rows[~rows["label"].isin(args.remove)], removed | {*args.remove} & {*train["label"]}
    rows = pd.concat([rows.assign(says=[f"the added image {path}" for path in rows["path"]]), new])
    rows = rows.groupby("path", sort=False, as_index=False).last()  # a file may have been replaced by another image
    left = train[~train["label"].isin(removed)]
    rows = without_duplicates(rows, training_contents(args.input, left, rows))
    if len({*left["label"], *rows["label"]}) < 2:
        raise InputError("this would leave fewer than two labels in the gallery; classification needs two or more")
    if not len(rows):
        runs = []
    texts = {name: rows[name].tolist() for name in COLUMNS} | {"removed": sorted(removed)}
    texts |= {"runs": [r["name"] for r in runs], "stamps": [gallery_key(r) for r in runs]}
    return {name: np.array(text, dtype=str) for name, text in texts.items()} | {
        "embeddings": embed_added(rows, before, runs, args, device)}


def main():
    args = parse_args()
    device, train, file = pick_device(args.device), load_train(args), Path(args.output) / ADDED
    new = read_new(args.csv, args.input, args.allow_outside) if args.csv else None
    with lock(args.output):
        before, was = load_added(args.output), grow([], args.output, train)[1]
        after = change(before, new, train, load_runs(args.output, None, train, None), args, device)
        if all(np.array_equal(before[name], after[name]) for name in after):
            print(f"nothing to do: {'no added images' if new is None else f'all {len(new)} images are in the gallery already'}")
            return
        (Path(args.output) / "neighbours.npz").unlink(missing_ok=True)  # they would be of another gallery
        if len(after["path"]) or len(after["removed"]):
            save_npz(file, **after)
        else:
            file.unlink()
    gallery, fresh = grow([], args.output, train)[1], (~np.isin(after["content"], before["content"])).sum()
    skipped = f" ({len(new) - fresh} were there already)" if new is not None and len(new) > fresh else ""
    print(f"{fresh} images added{skipped}, {len(was) + fresh - len(gallery)} taken out; the gallery is now {len(gallery)} "
          f"images of {gallery['label'].nunique()} labels. retrieve.py and the scripts that label see it from now on")


if __name__ == "__main__":
    run(main)
