"""The CSVs, folds, reading of images, the cache of decoded ones, transforms, loaders.

    train.csv               path,label[,group]    paths relative to the CSV's folder; labels are any text
    sample_submission.csv   filename,prediction   files lie in test/
    solution.csv            filename,label        optional: the true labels of the test images
"""

import argparse
import contextlib
import copy
import csv
import functools
import io
import math
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from utils import (
    CONTROL,
    MAX_PIXELS,
    InputError,
    Unwritable,
    file_fingerprint,
    fingerprint,
    hand_back_memory,
    load_json,
    lock,
    my_rows,
    on_first,
    printable,
    progress,
    rank_and_world,
    reading,
    regular,
    save_csv,
    save_json,
    save_text,
    within,
)

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic"}  # of images, where a folder is searched
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")  # that OpenCV reads, by Pillow's names
HEIC = b"ftypheic", b"ftypheix", b"ftypmif1"  # where such a file says what it is
NO_TYPE = re.compile(rb"infe(?:\x02.{7}|\x03.{9}).{0,3}[\x80-\xff]", re.S)  # an item type, not ASCII: pi-heif 1.4 crashes
BAD = ["split", "path", "problem"]  # columns of bad_images.csv
COLUMNS = 10_000  # the most of a CSV
Image.MAX_IMAGE_PIXELS = None  # Pillow reads headers only here, and what they say is compared with limits of our own

# --------------------------------------------------------------------------------------------------------------- tables


def read_csv(path, columns, unique=True):
    """A CSV as text columns; `columns` must be there, have no empty entry and, if `unique`, the first no entry twice."""
    try:
        data = Path(regular(path)).read_bytes()
        if b"\0" in data:  # pandas would end a field there
            raise ValueError("NUL bytes, as UTF-16 has them")
        rows = (row for row in csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")) if row)
        header, first = next(rows, []), next(rows, [])
        if len(header) > COLUMNS:
            raise ValueError(f"{len(header)} columns")
        more = len(first) > len(header) > 0  # pandas would make an index of the first columns
        table = None if more else pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} is not there; README, 'Your own data', says what goes into it") from None
    except (ValueError, csv.Error) as error:  # not UTF-8, no rows at all, ragged rows
        raise InputError(f"{path} is no readable CSV in UTF-8: {str(error).strip()[:200]}; save it anew") from None
    if more or not isinstance(table.index, pd.RangeIndex):
        raise InputError(f"{path}: its rows have more fields than its header; put text with commas in quotes")
    for column in columns:
        if column not in table.columns:
            raise InputError(f"{path} has no column {column!r}, only {', '.join(map(short, table.columns[:9]))}")
        empty = table.index[table[column].str.strip() == ""]
        if len(empty):
            raise InputError(f"{path}, row {empty[0] + 2}: empty {column}; fill it in or delete the row")
    for column in table.columns:
        returns = table.index[table[column].str.contains("\r", regex=False)]  # pandas writes them without quotes: a new row
        if len(returns):
            raise InputError(f"{path}, row {returns[0] + 2}: a carriage return within the {column}; take it out")
    if table.empty:
        raise InputError(f"{path} has a header but no rows")
    twice = table.index[table[columns[0]].duplicated()]
    if unique and len(twice):
        raise InputError(f"{path}, row {twice[0] + 2}: {short(table[columns[0]][twice[0]])} is there twice; keep one")
    return table


def short(text):
    """repr of a text, its beginning only where it is long."""
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}..."


def check_paths(table, column, path, outside=False, otherwise=", or --allow-outside"):
    """Refuse a path that would leave its folder, unless `outside`; and control characters, which no photograph's name has.
    otherwise: what else than another path the user may give."""
    for row, name in enumerate(table[column]):
        if not outside and (PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts):
            raise InputError(f"{path}, row {row + 2}: {short(name)} leaves its folder; use a path below it{otherwise}")
        if CONTROL.search(name):
            raise InputError(f"{path}, row {row + 2}: {short(name)} has a control character; rename the file")


def read_train(folder, outside=False, least=2):
    """train.csv of `folder`: DataFrame path, label[, group], all text. outside: paths may leave the folder; least: labels."""
    path = Path(folder) / "train.csv"
    table = read_csv(path, ["path", "label"])
    if "group" in table.columns:
        read_csv(path, ["path", "group"])
    check_paths(table, "path", path, outside)
    if table["label"].nunique() < least:
        raise InputError(f"{path} has one label only ({short(table['label'][0])}); classification needs two or more")
    seen = {}
    for label in table["label"].unique():
        twin = seen.setdefault(unicodedata.normalize("NFC", label.strip()), label)
        if twin != label:
            raise InputError(f"{path}: the labels {twin!a} and {label!a} look the same; write them alike")
    return table


def read_test(folder, outside=False):
    """sample_submission.csv of `folder`, all its columns as text. outside: names may leave test/."""
    path = Path(folder) / "sample_submission.csv"
    table = read_csv(path, ["filename"])
    if "prediction" not in table.columns:
        raise InputError(f"{path} has no column 'prediction', only {', '.join(map(short, table.columns[:9]))}")
    check_paths(table, "filename", path, outside)
    return table


def has_test(folder):
    return (Path(folder) / "sample_submission.csv").exists()


def load_train(args):
    """read_train of --input, less the images that --output/bad_images.csv lists: the gallery of every script."""
    table = read_train(args.input, args.allow_outside)
    good = table[~table["path"].isin(bad_images(args.output, "train"))].reset_index(drop=True)
    if good["label"].nunique() < 2:
        raise InputError(f"{args.output}/bad_images.csv leaves images of fewer than two labels of {args.input}/train.csv")
    return good


def load_test(args):
    """The test images less those that --output/bad_images.csv lists, None without a test part; see `with_bad`."""
    if not has_test(args.input):
        return None
    table = read_test(args.input, args.allow_outside)
    good = table[~table["filename"].isin(bad_images(args.output, "test"))].reset_index(drop=True)
    if good.empty:
        raise InputError(f"{args.output}/bad_images.csv leaves no test image; look at them, then delete that file")
    return good


def with_bad(table, good, values, fill):
    """Values [n, ...] of the rows `good` of a test table at their places among all its rows [N, ...]; `fill` at the others."""
    result = np.full((len(table), *values.shape[1:]), fill, values.dtype)
    result[table["filename"].isin(good["filename"]).to_numpy()] = values
    return result


def read_solution(folder, filenames):
    """True labels of the test images in the order of `filenames`, or None when there is no solution.csv."""
    path = Path(folder) / "solution.csv"
    if not path.exists():
        return None
    table = read_csv(path, ["filename", "label"]).set_index("filename")["label"]
    missing = [name for name in filenames if name not in table.index]
    if missing:
        raise InputError(f"{path} lacks {len(missing)} test images, the first {short(missing[0])}; complete it or delete it")
    return table.loc[list(filenames)].to_numpy()


def read_pseudo(path, least, classes, outside=False):
    """Rows of a confidence.csv with that much confidence or more: DataFrame filename, number (of the predicted class)."""
    table = read_csv(path, ["filename", "prediction", "confidence"])
    check_paths(table, "filename", path, outside)
    written = Path(path).with_name("expected.json")
    if written.exists() and load_json(written).get("confidence_csv") not in (None, file_fingerprint(path)):
        raise InputError(f"{path} is not what scripts/expect.py wrote with {written.name}; run it again, or give a copy of "
                         "the file in another folder if it was changed on purpose")
    confidence = pd.to_numeric(table["confidence"], errors="coerce")
    number = number_of(table["prediction"], classes)
    bad = confidence.isna() | ((number < 0) & (confidence >= least))
    if bad.any():
        row = int(bad.to_numpy().argmax())
        raise InputError(f"{path}, row {row + 2}: no number as confidence, or a label that train.csv lacks; write it anew")
    return table.assign(number=number)[confidence >= least]


def train_fingerprint(table):
    return fingerprint(zip(table["path"], table["label"], strict=True))


def test_fingerprint(table):
    return fingerprint(zip(table["filename"]))


def encode(labels):
    """Labels (text) -> (sorted classes, class number of each row [N] int64)."""
    labels = [str(label) for label in labels]
    classes = sorted(set(labels))  # not np.unique: it would give each row the room of the longest label
    return classes, number_of(labels, classes)


def number_of(labels, classes):
    """Class number of each label (text) [N] int64, -1 for one that is none of the classes."""
    return pd.Index(classes, dtype=object).get_indexer(labels)


# ---------------------------------------------------------------------------------------------------------------- folds


def make_folds(labels, groups=None, folds=5, seed=9999):
    """Fold number of each row [N] int64, stratified by label; with `groups`, whole groups go to one fold (without, each image
    is a group). A group of which no class is in another group gets -1: it stays in every fold's training part. But where one
    of its classes is, the whole group is held out, also the classes that are in no other; these then count as errors."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # takes seconds, and folds are drawn once

    labels = np.asarray(labels)
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    groups_of_label = pd.DataFrame({"label": labels, "group": groups}).groupby("label")["group"].transform("nunique").to_numpy()
    rows = np.flatnonzero(np.isin(groups, groups[groups_of_label > 1]))  # that may be held out
    fold = np.full(len(labels), -1)
    if not len(rows) and len(np.unique(labels)) < len(labels):
        raise InputError("every label's images are in one group, so a fold of groups would hold out labels that its run never "
                         "sees; take --fold-by look or random, or leave the column group out")
    if len(np.unique(groups[rows])) < folds:
        raise InputError(f"{folds} folds need {folds} images (or groups) of classes with two or more; use fewer --n-folds")
    # scikit-learn refuses where every class is smaller than the number of folds. So a class of `folds` stand-ins, each a group
    # of its own and named as nothing in a CSV, comes behind the rows; its folds are dropped.
    y = encode([*labels[rows], *["\U0010ffff"] * folds])[1]
    g = encode([*groups[rows], *(f"\0{i}" for i in range(folds))])[1]
    split = StratifiedKFold if len(np.unique(groups)) == len(groups) else StratifiedGroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # small classes: load_folds says so once
        for number, (_, held) in enumerate(split(folds, shuffle=True, random_state=seed).split(y, y, g)):
            fold[rows[held[held < len(rows)]]] = number
    return fold


def make_look_folds(features, labels, folds=5, seed=9999):
    """Fold number of each row [N] int64. k-means splits the features [N, D] of each class into as many looks as there are folds
    (or different images, if fewer), and whole looks are held out: a held-out image looks different from the training images of
    its class, as a new photograph does. A class's largest look goes to the fold that is smallest so far, and so on. A class
    with one look only gets -1: it stays in every fold's training part."""
    from sklearn.cluster import KMeans
    from sklearn.preprocessing import normalize

    features, labels = normalize(features), np.asarray(labels)
    fold, size = np.full(len(labels), -1), np.zeros(folds, np.int64)
    for rows in pd.Series(labels).groupby(labels).indices.values():
        count = min(folds, len(np.unique(features[rows], axis=0)))
        if count < 2:
            continue
        look = KMeans(count, n_init=4, random_state=seed).fit_predict(features[rows])
        largest_first, smallest_first = np.argsort(-np.bincount(look), kind="stable"), np.argsort(size, kind="stable")
        fold_of = dict(zip(largest_first, smallest_first, strict=False))  # looks may be fewer than folds
        fold[rows] = [fold_of[number] for number in look]
        size += np.bincount(fold[rows], minlength=folds)
    if (size == 0).any():
        raise InputError(f"{folds} looks need classes of {folds} or more different images; use fewer --n-folds (or --looks)")
    return fold


def write_folds(path, train, folds, seed, by, features):
    """Draw the folds once; says which classes are too small for them."""
    sizes = train["label"].value_counts()
    small = sizes.index[sizes < folds]
    if len(small):
        print(f"{len(small)} classes have fewer images than the {folds} folds, e.g. {small[0]!r}: fine, but their "
              "validation is thin; single images stay in every fold's training part")
    if by == "group" and "group" not in train.columns:
        raise InputError("--fold-by group: train.csv has no column 'group'; add it, or take random or look")
    if by == "look":
        fold = make_look_folds(features(), train["label"], folds, seed)
    else:
        fold = make_folds(train["label"], train["group"] if by == "group" else None, folds, seed)
    table = train[["path", "label"]].assign(fold=fold, by=by)
    save_csv(path, table.assign(check=folds_check(table)))


def folds_check(table):
    """16 hex digits that a flipped bit in path, label, fold or by changes."""
    return fingerprint(zip(table["path"], table["label"], table["fold"], table["by"], strict=True))[:16]


def load_folds(output, train, folds=None, seed=9999, by=None, features=None):
    """Fold number of each row of train.csv, from output/folds.csv. With `folds`, their number is checked, and the file
    is written where there is none yet: the first run does so. by: 'random', 'group', 'look', or None: by group where
    train.csv has them, else at random. features: function that gives the features [N, D] that tell looks apart."""
    path = Path(output) / "folds.csv"
    if folds and by is None and "group" in train.columns:
        by = "group"
    if folds and not path.exists():
        with lock(output, wait=True):  # runs may start side by side
            if not path.exists():
                write_folds(path, train, folds, seed, by or "random", features)
    elif not path.exists():
        raise InputError(f"{path} is not there; put it back, or run train.py again, which draws the folds")
    table = read_csv(path, ["path", "label", "fold"])
    if "check" in table.columns and ("by" not in table.columns or (table["check"] != folds_check(table)).any()):
        raise InputError(f"{path} is damaged, or was changed by hand; delete it and run train.py again, which draws the same "
                         "folds (or, if the change is meant, delete its column check)")
    if train_fingerprint(table) != train_fingerprint(train):
        raise InputError(f"{path} was written for another train.csv; use another --output, or delete it with its runs")
    fold = pd.to_numeric(table["fold"], errors="coerce").to_numpy()
    if not np.isin(fold, np.arange(-1, len(fold))).all() or not np.isin(np.arange(fold.max() + 1), fold).all():  # a gap
        raise InputError(f"{path}: the column fold is damaged; delete the file and run train.py again")
    if by and "by" in table.columns and table["by"][0] != by:
        raise InputError(f"{path} was drawn with --fold-by {table['by'][0]}, not {by}; give the same, or another --output")
    if folds and fold.max() != folds - 1:
        raise InputError(f"{path} holds {int(fold.max()) + 1} folds, not {folds}; give --n-folds {int(fold.max()) + 1}, or "
                         "choose another --output")
    return fold.astype(np.int64)


def folds_by(output):
    """How output/folds.csv was drawn: 'random', 'group' or 'look'; None without it."""
    path = Path(output) / "folds.csv"
    by = read_csv(path, ["path"]).get("by", ["random"])[0] if path.exists() else None
    if by not in (None, "random", "group", "look"):
        raise InputError(f"{path}: the column by says {short(by)}, not random, group or look; mend it")
    return by


# --------------------------------------------------------------------------------------------------------------- images


def read_image(path):
    """Upright RGB uint8 [H, W, 3] of any image OpenCV reads, and HEIC, up to MAX_PIXELS: grey, 16-bit, CMYK, EXIF-rotated;
    transparency over white."""
    try:
        return decode_image(np.fromfile(regular(path), np.uint8), path)  # not cv2.imread: that fails on some non-ASCII paths
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def decode_image(data, name):
    """read_image of a file's bytes, uint8 [n]; `name` says in an error which image it is."""
    try:
        image = raw = None
        if data[4:12].tobytes() in HEIC:
            with reading(name, "replace it or leave it out", "no HEIC photograph that can be read"):
                heic = open_heic(io.BytesIO(data), name)
                if math.prod(heic.size) <= MAX_PIXELS:
                    raw = np.array(heic.to_pillow().convert("RGBA"))
                    image = raw[..., :3].copy()
        elif len(data):
            image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise InputError(f"{name} is no image that can be read, or has more than {MAX_PIXELS // 10**6} megapixels; "
                             "replace it or leave it out")
        if data[:2].tobytes() != b"\xff\xd8":  # no JPEG: it may have an alpha channel
            raw = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if raw is None else raw
            if raw is not None and raw.ndim == 3 and raw.shape[2] == 4:
                if data[:4].tobytes() in (b"\x89PNG", b"RIFF"):  # OpenCV has turned `image` upright, but not `raw`
                    raw = upright(raw, data, name)
                for part in np.array_split(np.arange(len(image)), -(-image.size // 2**22)):  # float32 of a large one is GiBs
                    rows = slice(part[0], part[-1] + 1)
                    alpha = raw[rows, :, 3:] / np.float32(1 if raw.dtype.kind == "f" else np.iinfo(raw.dtype).max)
                    image[rows] = np.rint(image[rows] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    except (ValueError, MemoryError, cv2.error) as error:
        raise InputError(f"{name} cannot be read: {str(error).strip()}") from None
    return image


def upright(pixels, data, name):
    """The pixels [H, W, ...] of an image file's bytes turned as its EXIF orientation says."""
    with reading(name, "replace it or leave it out"):
        file, exif = Image.open(io.BytesIO(data)), Image.Exif()
        file.getexif()  # finds what stands behind a PNG's pixels, but also what OpenCV does not go by, as XMP
        exif.load(file.info.get("exif", b""))
        turn = exif.get(0x112, 1)
    pixels = pixels.swapaxes(0, 1) if turn in (5, 6, 7, 8) else pixels
    return pixels[::-1 if turn in (3, 4, 7, 8) else 1, ::-1 if turn in (2, 3, 6, 7) else 1]


class NoHeic(InputError):
    """A HEIC photograph, and the package that reads them is not installed."""


def open_heic(file, name):
    """An open HEIC file, its header read; OpenCV reads none."""
    try:
        import pi_heif
    except ImportError:
        raise NoHeic(f"{name} is a HEIC photograph; to have them read: pip install pi-heif") from None
    data = file.read()
    if NO_TYPE.search(data):
        raise InputError(f"{name} is damaged; replace it or leave it out")
    return pi_heif.open_heif(data)


def count_pixels(file, name, formats=FORMATS):
    """Pixels of an open image file, as its header says."""
    with reading(name, "replace it or leave it out", "no image that can be read"):
        start = file.read(12)
        file.seek(0)
        header = open_heic(file, name) if start[4:] in HEIC else Image.open(file, formats=formats)
        return math.prod(header.size)


def resize(image, size, how="squash"):
    """uint8 [H, W, 3] -> [size, size, 3] with the whole product: squashed, or with its proportions, amid black."""
    sides, to = image.shape[:2], (size, size)
    if how == "pad":
        to = tuple(max(1, round(side * size / max(sides))) for side in sides)
    shrink = sides[0] * sides[1] > to[0] * to[1]
    image = cv2.resize(image, (to[1], to[0]), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)
    if to == (size, size):
        return image
    top, left = ((size - side) // 2 for side in to)
    bottom, right = size - to[0] - top, size - to[1] - left
    return cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT)


def load_image(path, size, how):
    return resize(read_image(path), size, how)


@functools.lru_cache(maxsize=8)  # once a process: loader workers that are not forked open it themselves
def open_cache(path, inode, rows, size):
    """Memory map of a cache's file; None where it is gone, or another file has taken its place."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        if os.fstat(file.fileno()).st_ino == inode:
            return np.memmap(file, np.uint8, "r", shape=(rows, record_bytes(size)))
    return None


def record_bytes(size):
    """Of a cached image and its CRC-32, 4 bytes."""
    return size * size * 3 + 4


def image_crc(file, pixels):
    """CRC-32 of a cached image and its file's name."""
    return zlib.crc32(pixels, zlib.crc32(os.fsencode(file)))


class Cache:
    """Images below --input, decoded and resized, on disk for all runs, epochs and processes. In INPUT/.cache, or OUTPUT/.cache
    where the input is read-only, 256-squash.u8 holds one uint8 [256, 256, 3] and its CRC-32 after the other;
    256-squash.json names for each file its row, its bytes and its time, and a file that has changed gets a new row. Rows are
    written before they are named and never again, so what is named is whole, also for those who read while others add. The
    CRC-32 is of the file's name and the pixels: what another process has put in the place of the file is no match."""

    def __init__(self, args):
        self.root, self.on, self.most = args.input, args.cache, args.cache_size
        self.place = Path(self.root if os.access(self.root, os.W_OK) else args.output) / ".cache"
        self.found = {}  # (size, how) -> {file: row}, as far as this process has looked at the files

    def files(self, folder, names):
        prefix = Path(os.path.relpath(folder, self.root))
        return [os.path.normpath(prefix / name) for name in names]

    def add(self, folder, names, sizes, how):
        """Decode what is not there yet at these sizes, on all cores; where there is no room, say so and leave it out. Under
        torchrun the first process decodes for all."""
        for size in dict.fromkeys(sizes) if self.on else []:
            found = self.found.setdefault((size, how), {})
            found |= on_first(self.update, [file for file in self.files(folder, names) if file not in found], size, how)

    def update(self, files, size, how):
        """{file: row} of the files, what is not there yet decoded first; {} where there can be no cache."""
        stats = {file: Path(self.root, file).stat() for file in files}
        try:
            with lock(self.place, wait=True):
                return self.add_new({file: [s.st_size, s.st_mtime_ns] for file, s in stats.items()}, size, how)
        except (OSError, Unwritable) as error:
            said = getattr(error, "strerror", None) or error
            print(f"no cache in {self.place}: {said}; images are decoded in every pass", flush=True)
            return {}

    def add_new(self, stamps, size, how):
        """{file: row} of the files {file: [bytes, time]}, those that are new or have changed decoded first."""
        data, image_bytes, known = self.path(size, how), record_bytes(size), {}  # known: {file: [row, bytes, time]}
        with contextlib.suppress(FileNotFoundError, InputError):  # a damaged index: all anew
            known = load_json(data.with_suffix(".json"), files=dict)["files"]
        rows = 1 + max((row for row, *_ in known.values()), default=-1)
        if not data.exists() or data.stat().st_size < rows * image_bytes:
            known, rows = {}, 0
        new = [file for file, stamp in stamps.items() if file not in known or known[file][1:] != stamp]
        need, room = len(new) * image_bytes, shutil.disk_usage(self.place).free / 2
        if self.most is not None:
            room = self.most * 1e9 - sum(f.stat().st_size for f in self.place.glob("*.u8") if f != data) - rows * image_bytes
        where, said = self.place, f"{len(new)} images at {size} px, {need / 1e9:.1f} GB"
        if need > room:
            print(f"no cache of {said}: room in {where} for {max(0, room) / 1e9:.1f} GB (--cache-size); images are decoded "
                  "in every pass", flush=True)
        elif new:
            print(f"decoding {said}, once, into {where} (--no-cache: in every pass)", flush=True)
            self.decode(new, stamps, known, rows, size, how)
        return {file: known[file][0] for file, stamp in stamps.items() if file in known and known[file][1:] == stamp}

    def decode(self, new, stamps, known, rows, size, how):
        """Decode the new files behind the `rows` that are there, and name them in `known`, on disk every half a minute."""
        data, saved = self.path(size, how), time.monotonic()
        save_text(self.place / ".gitignore", "*\n")
        if not known:  # others may still read the file: they keep it
            data.with_suffix(".json").unlink(missing_ok=True)
            data.unlink(missing_ok=True)
        cv2.setNumThreads(0)  # all cores by our own pool
        with open(data, "ab") as file, ThreadPoolExecutor(os.cpu_count()) as pool, progress(None, "decoding", len(new)) as bar:
            file.truncate(rows * record_bytes(size))  # what a kill has left unnamed
            for at in range(0, len(new), 256):  # images in memory
                part = new[at:at + 256]
                images = pool.map(lambda name: load_image(Path(self.root, name), size, how), part)
                for name, image in zip(part, images, strict=True):
                    file.write(image)
                    file.write(image_crc(name, image).to_bytes(4, "little"))
                known |= {name: [rows + at + i, *stamps[name]] for i, name in enumerate(part)}
                bar.update(len(part))
                if at + 256 >= len(new) or time.monotonic() - saved > 30:
                    file.flush()
                    os.fsync(file.fileno())
                    save_json(data.with_suffix(".json"), {"files": known})
                    saved = time.monotonic()

    def path(self, size, how):
        return self.place / f"{size}-{how}.u8"

    def rows(self, folder, names, size, how):
        """Row of each image, -1 for those that are not there."""
        found = self.found.get((size, how), {})
        return np.array([found.get(file, -1) for file in self.files(folder, names)])


def check_images(folder, names, full=False, instead="take them out of their CSV"):
    """Raise one InputError that lists every missing or unreadable image (20 named, then a count).
    full=False reads headers only; full=True decodes every image. instead: what the user can do but replace them."""
    bad = [f"{printable(Path(folder) / name)}: {said}" for name, said in find_bad(folder, names, full).items()]
    if bad:
        more = [f"... and {len(bad) - 20} more"] if len(bad) > 20 else []
        raise InputError("\n  ".join([f"{len(bad)} images are missing or unreadable; replace them or {instead}:", *bad[:20],
                                      *more]))


def find_bad(folder, names, full=False):
    """{name: what is wrong} of the images that are missing or unreadable, see check_images."""
    def problem(name):
        path = Path(folder) / name
        try:
            regular(path)
            if full:
                read_image(path)
            else:
                with open(path, "rb") as file:
                    if count_pixels(file, name) > MAX_PIXELS:
                        return f"more than {MAX_PIXELS // 10**6} megapixels"
        except FileNotFoundError:
            twins = [Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD")]
            alike = ", but under a name that looks the same (NFC, NFD): rename it"
            return "not there" + (alike if any(p.exists() for p in twins) else "")
        except NoHeic:
            return "HEIC: pip install pi-heif"
        except Exception:  # Pillow raises all kinds for a damaged header
            return "unreadable"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = progress(pool.map(problem, names), f"checking {Path(folder).name or folder}", len(names))
        return {name: problem for name, problem in zip(names, said, strict=True) if problem}


def skip_bad_images(args):
    """--skip-bad-images: decode every image once and list those that cannot be read in --output/bad_images.csv, written
    once as folds.csv is: what it lists, every script leaves out."""
    path = Path(args.output) / "bad_images.csv"
    with lock(args.output, wait=True):  # runs may start side by side
        if not path.exists():
            parts = {"train": (Path(args.input), read_train(args.input, args.allow_outside)["path"])}
            if has_test(args.input):
                parts["test"] = Path(args.input) / "test", read_test(args.input, args.allow_outside)["filename"]
            bad = [(split, name, said) for split, (folder, names) in parts.items()
                   for name, said in find_bad(folder, names, full=True).items()]
            save_csv(path, pd.DataFrame(bad, columns=BAD))


def bad_images(output, split):
    """Names of the images of 'train' or 'test' that output/bad_images.csv lists; none without it."""
    path = Path(output) / "bad_images.csv"
    if not path.exists() or path.read_bytes().strip() == ",".join(BAD).encode():  # all are good
        return set()
    table = read_csv(path, BAD, unique=False)
    return set(table["path"][table["split"] == split])


def check_inputs(args, full=False):
    """Check every image that is to be read, and the solution if there is one: known before the work, not after it."""
    if args.skip_bad_images:
        skip_bad_images(args)
    train, test, listed = load_train(args), load_test(args), Path(args.output) / "bad_images.csv"
    instead = "take them out of their CSV, or " + (
        f"delete {listed}, which was written before they broke, and list them anew by --skip-bad-images" if listed.exists() else
        "do without them by --skip-bad-images")
    names = [] if test is None else [Path("test", name) for name in test["filename"]]
    check_images(args.input, [*train["path"], *names], full, instead)
    if test is not None:
        read_solution(args.input, read_test(args.input, args.allow_outside)["filename"])
    left_out = [f"{len(bad)} {split} images" for split in ("train", "test") if (bad := bad_images(args.output, split))]
    if left_out:
        print(f"{' and '.join(left_out)} are left out, see {args.output}/bad_images.csv")
    return train, test


def augmentation_flags(parser):
    """The flags of `augmentation`. The recipe has flip, jpeg, shift, zoom, rotate and cutout; the others, off, are against a
    shift. To add one: a flag here, its step in `augmentation`, its name in README's table; see also train.NOT_RECORDED."""
    add = parser.add_argument
    add("--flip", type="share", default=0.5, help="probability of a horizontal flip (default 0.5)")
    add("--jpeg", type=within("[0, 100]", int), default=99, help="lowest JPEG quality, up to 100; 0 = off (default 99)")
    add("--shift", type="share", default=0.2, help="largest shift, share of the side (default 0.2)")
    add("--zoom", type="part", default=0.2, help="scale by 1 - zoom .. 1 + zoom (default 0.2)")
    add("--rotate", type=within("[0, 180]"), default=10.0, help="largest rotation, degrees (default 10)")
    add("--affine-p", type="share", default=0.7, help="probability of shift, zoom and rotation together (default 0.7)")
    add("--cutout", type="share", default=0.4, help="side of the black square, share of the image's (default 0.4)")
    add("--cutout-p", type="share", default=0.5, help="probability of the black square (default 0.5)")
    add("--crop", type="share", default=0.0, help="crop a part of at least this share of the area, stretched by up to 4:3; "
        "0 = off (default 0)")
    add("--colour", type=within("[0, 10]"), default=0.0, help="largest change of brightness, contrast and saturation, a tenth "
        "of it for the hue (default 0)")
    add("--grey", type="share", default=0.0, help="probability of a grey image (default 0)")
    add("--blur", type="share", default=0.0, help="probability of a Gaussian blur of up to 2 %% of the side (default 0)")
    add("--randaugment", type=within("[0, 30]", int), default=0, help="magnitude 1..30 of two random operations (Cubuk et al., "
        "2020); 0 = off (default 0)")


class ByOpenCV:
    """A random transform of torchvision in a third of its time: torchvision draws the parameters, and OpenCV, in the method
    `make` of a subclass, computes the pixels [H, W, 3] from them."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image):
        pixels, drawn = np.ascontiguousarray(image.permute(1, 2, 0).numpy()), self.transform.make_params([image])
        return torch.from_numpy(self.make(pixels, **drawn)).permute(2, 0, 1)


class Affine(ByOpenCV):
    """v2.RandomAffine without shear, bilinear, black beside the image."""

    @staticmethod
    def make(pixels, angle, translate, scale, **_):
        height, width = pixels.shape[:2]
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -angle, scale)
        matrix[:, 2] += translate
        return cv2.warpAffine(pixels, matrix, (width, height))


class Jpeg(ByOpenCV):
    """v2.JPEG."""

    @staticmethod
    def make(pixels, quality, **_):
        data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, quality))[1]
        return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def augmentation(args):
    """uint8 [3, H, W] -> the same, by the flags of augmentation_flags; a zero switches its part off."""
    from torchvision.transforms import v2  # takes seconds, and only a training needs it

    steps = [v2.RandomHorizontalFlip(args.flip)]
    if args.crop:
        steps.append(v2.RandomResizedCrop(args.size, (args.crop, 1), antialias=True))
    if args.randaugment:
        steps.append(v2.RandAugment(2, args.randaugment))
    if args.colour:
        steps.append(v2.ColorJitter(args.colour, args.colour, args.colour, min(0.5, args.colour / 10)))
    if args.grey:
        steps.append(v2.RandomGrayscale(args.grey))
    if args.blur:
        sigma = args.size / 50  # the largest; the kernel reaches 2 sigma to each side
        steps.append(v2.RandomApply([v2.GaussianBlur(2 * round(2 * sigma) + 1, (sigma / 10, sigma))], args.blur))
    if args.jpeg:
        steps.append(Jpeg(v2.JPEG((args.jpeg, 100))))
    if args.affine_p:
        affine = v2.RandomAffine(args.rotate, (args.shift, args.shift), (1 - args.zoom, 1 + args.zoom))
        steps.append(v2.RandomApply([Affine(affine)], args.affine_p))
    if args.cutout and args.cutout_p:
        area = min(args.cutout, 1 - 1 / args.size) ** 2  # RandomErasing does nothing where the square is the whole image
        steps.append(v2.RandomErasing(args.cutout_p, (area, area), (1, 1), value=0))
    return v2.Compose(steps)


def mix_batch(batch, labels, mixup, cutmix):
    """Mix each image of a batch [B, 3, H, W] with another of it. Returns (batch, the other images' labels, share of the own
    label). Sources: mixup, Zhang et al., ICLR 2018; CutMix, Yun et al., ICCV 2019."""
    order, strength = torch.randperm(len(batch)).to(batch.device), mixup or cutmix
    share = np.random.beta(strength, strength)
    if mixup:
        return batch.float().lerp(batch[order].float(), 1 - share).round().to(batch.dtype), labels[order], share
    (height, width), side = batch.shape[2:], (1 - share) ** 0.5  # side of the box, a share of the image's
    y, x = np.random.randint(height), np.random.randint(width)
    rows = slice(max(0, round(y - side * height / 2)), round(y + side * height / 2))
    columns = slice(max(0, round(x - side * width / 2)), round(x + side * width / 2))
    batch[..., rows, columns] = batch[order][..., rows, columns]  # batch[order] is a copy
    pasted = batch[0, 0, rows, columns].numel() / (height * width)  # less at the border, where the box is cut off
    return batch, labels[order], 1 - pasted


# -------------------------------------------------------------------------------------------------------------- loaders


class Images(Dataset):
    """(uint8 image [3, size, size], class number) of rows of a CSV; class 0 where there are no labels. An item (epoch, row) is
    augmented from a random state that is a function of (seed, epoch, row): the same whichever worker draws it, before and
    after a resume."""

    def __init__(self, folder, names, labels, size, how="squash", augment=None, seed=0, cache=None):
        self.folder, self.names = Path(folder), list(names)
        self.labels = torch.as_tensor(np.zeros(len(self.names), np.int64) if labels is None else labels)
        self.how, self.augment, self.seed, self.cache = how, augment, seed, cache
        self.resized_to(size)

    def resized_to(self, size):
        self.size, self.cache_rows = size, np.full(len(self.names), -1)  # -1: not in the cache
        if self.cache:
            self.cache_rows = self.cache.rows(self.folder, self.names, size, self.how)
            if rows := int(self.cache_rows.max(initial=-1)) + 1:
                path = self.cache.path(size, self.how)
                self.stored = path, path.stat().st_ino, rows, size
                open_cache(*self.stored)  # held open from now on, so that no other file gets its inode number

    def __len__(self):
        return len(self.names)

    def at(self, size):
        """The same images at another size."""
        other = copy.copy(self)
        other.resized_to(size)
        return other

    def part(self, rows):
        """Those of a slice of rows."""
        other = copy.copy(self)
        other.names, other.labels, other.cache_rows = self.names[rows], self.labels[rows], self.cache_rows[rows]
        return other

    def cached(self, row):
        """The image from the cache; None where its bits have changed on disk, or it is another file's."""
        stored = open_cache(*self.stored)
        if stored is None:
            return None
        record, (file,) = np.array(stored[self.cache_rows[row]]), self.cache.files(self.folder, [self.names[row]])
        pixels, crc = record[:-4], int.from_bytes(record[-4:].tobytes(), "little")
        return pixels.reshape(self.size, self.size, 3) if image_crc(file, pixels) == crc else None

    def decoded(self, row):
        """uint8 [size, size, 3], from the cache or else from the file."""
        image = self.cached(row) if self.cache_rows[row] >= 0 else None
        return load_image(self.folder / self.names[row], self.size, self.how) if image is None else image

    def __getitem__(self, item):
        epoch, row = item if isinstance(item, tuple) else (0, item)
        image = torch.from_numpy(self.decoded(row)).permute(2, 0, 1)
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                state = np.random.SeedSequence((self.seed, epoch, row)).generate_state(1, np.uint64)
                torch.default_generator.manual_seed(int(state[0]))
                image = self.augment(image)
        return image, self.labels[row]


class EpochSampler(Sampler):
    """Batches of items (epoch, row): every row once, in an order drawn from (seed, epoch), less a last short batch. Set .epoch
    before each pass. A batch is computed in `parts` (--grad-accum) of at least two images. Under torchrun each process has its
    share of each part: .sizes [parts], and .mine, their places in the batch."""

    def __init__(self, rows, seed, batch_size, parts=1):
        if rows < 2:
            raise InputError("this run has one image to train on, and batch norm wants two; give it more, or other folds")
        self.rows, self.seed, self.epoch, self.batch_size = rows, seed, 0, min(batch_size, rows)
        places = torch.arange(self.batch_size).tensor_split(max(1, min(parts, self.batch_size // 2)))  # batch norm wants two
        if (ranks := rank_and_world()[1]) > (least := min(map(len, places))):
            raise InputError(f"{ranks} processes cannot share {least} images, a batch or its part: start fewer, "
                             "or give a larger --batch-size or a smaller --grad-accum")
        mine = [part[my_rows(len(part))] for part in places]
        self.sizes, self.mine = list(map(len, mine)), torch.cat(mine).numpy()

    def __len__(self):
        return self.rows // self.batch_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)
        for batch in order[:len(self) * self.batch_size].reshape(-1, self.batch_size):
            yield [(self.epoch, int(row)) for row in batch[self.mine]]


def default_workers():
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(16, max(1, cores - 1))  # a core is left to the training process


def workers_flag(parser):
    parser.add_argument("--workers", type="whole", default=default_workers(),
                        help="loader processes (default min(16, cores - 1))")


def loader_flags(parser):
    """The flags of the scripts that load images by Cache and make_loader."""
    workers_flag(parser)
    parser.add_argument("--cache", action=argparse.BooleanOptionalAction, default=True, help="decode and resize each image "
                        "once for all runs and epochs, into INPUT/.cache, where the disk has room (default on)")
    parser.add_argument("--cache-size", type=within("[0, inf]"), metavar="GB", help="most that the cache may take (default: "
                        "half of the free disk)")


def input_flags(parser):
    """The flags of the scripts that embed the images of --input."""
    loader_flags(parser)
    parser.add_argument("--deterministic", action="store_true", help="on a GPU, only algorithms that give the same digits each "
                        "time; slower. On a CPU they always do, for the same number of threads")
    parser.add_argument("--skip-bad-images", action="store_true", help="decode every image once; list those that cannot be "
                        "read in OUTPUT/bad_images.csv and do without: a test image among them gets the most frequent label")


def _start_worker(_):
    cv2.setNumThreads(0)  # one thread a worker: OpenCV's own pool would fight the others for the cores
    for number in (signal.SIGINT, signal.SIGTERM):  # a Ctrl-C reaches the whole group; the main process ends its workers
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # its errors go to the main process; when that has gone there is no one to tell


def _collate(items):
    images, labels = zip(*items, strict=True)  # channels last, as they come from the decoder and as the backbones want them
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2), torch.stack(labels)


def make_loader(images, batches, workers, device, collate=_collate):
    """Loader of batches (uint8 [B, 3, H, W], int64 [B]). batches: an EpochSampler, or a batch size for the images in order. Its
    random generator is its own, since starting workers, in the first epoch and after a resume, draws from it."""
    ordered = isinstance(batches, int)
    by = {"batch_size": batches} if ordered else {"batch_sampler": batches}
    if workers:
        hand_back_memory()
    return DataLoader(images, **by, num_workers=workers, worker_init_fn=_start_worker, collate_fn=collate,
                      generator=torch.Generator(), pin_memory=device.type == "cuda",
                      persistent_workers=workers > 0 and not ordered)
