"""The CSVs of design's contract, folds, reading of images, transforms, loaders.

    train.csv               path,label[,group]    paths relative to the CSV's folder; labels are any text
    sample_submission.csv   filename,prediction   files lie in test/
    solution.csv            filename,label        optional: the true labels of the test images
"""

import os
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from utils import InputError, atomic, fingerprint, lock, progress

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

# --------------------------------------------------------------------------------------------------------------- tables


def read_csv(path, columns):
    """A CSV as text columns; `columns` must be there, have no empty entry and, the first, no entry twice."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} is not there; README, 'Your own data', says what goes into it") from None
    except (ValueError, pd.errors.ParserError) as error:  # not UTF-8, no rows at all, ragged rows
        raise InputError(f"{path} is no readable CSV in UTF-8: {str(error).strip()}") from None
    if not isinstance(table.index, pd.RangeIndex):
        raise InputError(f"{path}: its rows have more fields than its header; put text with commas in quotes")
    for column in columns:
        if column not in table.columns:
            raise InputError(f"{path} has no column {column!r}, only {', '.join(map(repr, table.columns[:9]))}")
        empty = table.index[table[column].str.strip() == ""]
        if len(empty):
            raise InputError(f"{path}, row {empty[0] + 2}: empty {column}; fill it in or delete the row")
    if table.empty:
        raise InputError(f"{path} has a header but no rows")
    twice = table.index[table[columns[0]].duplicated()]
    if len(twice):
        raise InputError(f"{path}, row {twice[0] + 2}: {table[columns[0]][twice[0]]!r} is there twice; keep one")
    return table


def inside(table, column, path):
    """Refuse a path that would leave its folder."""
    for row, name in enumerate(table[column]):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise InputError(f"{path}, row {row + 2}: {name!r} leaves its folder; use a path below it")


def read_train(folder):
    """train.csv of `folder`: DataFrame path, label[, group], all text."""
    path = Path(folder) / "train.csv"
    table = read_csv(path, ["path", "label"])
    if "group" in table.columns:
        read_csv(path, ["path", "group"])
    inside(table, "path", path)
    if table["label"].nunique() < 2:
        raise InputError(f"{path} has one label only ({table['label'][0]!r}); classification needs two or more")
    return table


def read_test(folder):
    """sample_submission.csv of `folder`, all its columns as text."""
    path = Path(folder) / "sample_submission.csv"
    table = read_csv(path, ["filename"])
    if "prediction" not in table.columns:
        raise InputError(f"{path} has no column 'prediction', only {', '.join(map(repr, table.columns[:9]))}")
    inside(table, "filename", path)
    return table


def read_solution(folder, filenames):
    """True labels of the test images in the order of `filenames`, or None when there is no solution.csv."""
    path = Path(folder) / "solution.csv"
    if not path.exists():
        return None
    table = read_csv(path, ["filename", "label"]).set_index("filename")["label"]
    missing = [name for name in filenames if name not in table.index]
    if missing:
        raise InputError(f"{path} lacks {len(missing)} test images, the first {missing[0]!r}; complete it or delete it")
    return table.loc[list(filenames)].to_numpy()


def train_fingerprint(table):
    return fingerprint(zip(table["path"], table["label"], strict=True))


def test_fingerprint(table):
    return fingerprint(zip(table["filename"]))


def encode(labels):
    """Labels (text) -> (sorted classes, class number of each row [N] int64)."""
    classes, numbers = np.unique(np.asarray(labels, dtype=object).astype(str), return_inverse=True)
    return classes.tolist(), numbers.astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------- folds


def make_folds(labels, groups=None, folds=5, seed=9999):
    """Fold number of each row [N] int64, stratified by label; with `groups`, whole groups go to one fold.
    A group whose classes are all seen in no other group (without groups: the single image of a class) gets -1: it stays
    in every fold's training part. A class seen in one group only that shares it with others is held out with it: no
    run can know it then, and its images count as errors."""
    labels = np.asarray(labels)
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    seen = pd.DataFrame({"label": labels, "group": groups}).groupby("label")["group"].transform("nunique").to_numpy()
    fold, rows = np.full(len(labels), -1), np.flatnonzero(np.isin(groups, groups[seen > 1]))
    if len(np.unique(groups[rows])) < folds:
        raise InputError(f"{folds} folds need {folds} images (or groups) of classes with two or more; use fewer --n-folds")
    # scikit-learn refuses when every class is smaller than the number of folds; a class of stand-ins makes it deal on.
    y = np.append(labels[rows].astype(object), ["\U0010ffff"] * folds).astype(str)
    g = np.append(groups[rows].astype(object).astype(str), [f"\0{i}" for i in range(folds)])
    split = StratifiedKFold if len(np.unique(groups)) == len(groups) else StratifiedGroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # small classes: load_folds says so once
        for number, (_, held) in enumerate(split(folds, shuffle=True, random_state=seed).split(y, y, g)):
            fold[rows[held[held < len(rows)]]] = number
    return fold


def write_folds(path, train, folds, seed):
    """Draw the folds once; says which classes are too small for them."""
    sizes = train["label"].value_counts()
    small = sizes.index[sizes < folds]
    if len(small):
        print(f"{len(small)} classes have fewer images than the {folds} folds, e.g. {small[0]!r}: fine, but their "
              "validation is thin; single images stay in every fold's training part")
    fold = make_folds(train["label"], train.get("group"), folds, seed)
    with atomic(path) as temporary:
        train[["path", "label"]].assign(fold=fold).to_csv(temporary, index=False)


def load_folds(output, train, folds=None, seed=9999):
    """Fold number of each row of train.csv, from output/folds.csv. With `folds`, their number is checked, and the file
    is written where there is none yet: the first run does so."""
    path = Path(output) / "folds.csv"
    if folds and not path.exists():
        with lock(output, wait=True):  # runs may start side by side
            if not path.exists():
                write_folds(path, train, folds, seed)
    table = read_csv(path, ["path", "label", "fold"])
    if train_fingerprint(table) != train_fingerprint(train):
        raise InputError(f"{path} was written for another train.csv; use another --output, or delete it with its runs")
    fold = pd.to_numeric(table["fold"], errors="coerce").to_numpy()
    if not (np.isin(fold, np.arange(-1, len(fold))).all() and set(np.unique(fold)) >= set(range(int(fold.max()) + 1))):
        raise InputError(f"{path}: the column fold is damaged; delete the file and run train.py again")
    if folds and fold.max() != folds - 1:
        raise InputError(f"{path} holds {int(fold.max()) + 1} folds, not {folds}; give --n-folds {int(fold.max()) + 1}, or "
                         "choose another --output")
    return fold.astype(np.int64)


# --------------------------------------------------------------------------------------------------------------- images


def read_image(path):
    """Upright RGB uint8 [H, W, 3] of any image OpenCV reads: grey, 16-bit, CMYK, EXIF-rotated; transparency over white."""
    try:
        data = np.fromfile(path, np.uint8)  # not cv2.imread: that one fails on non-ASCII paths on some systems
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) if len(data) else None
        if image is None:
            raise InputError(f"{path} is no image that OpenCV reads; replace it or take it out of its CSV")
        if data[:2].tobytes() != b"\xff\xd8":  # no JPEG: it may have an alpha channel
            raw = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
            if raw.ndim == 3 and raw.shape[2] == 4 and raw.shape[:2] == image.shape[:2]:
                alpha = raw[..., 3:] / np.float32(np.iinfo(raw.dtype).max)
                image = np.rint(image * alpha + 255 * (1 - alpha)).astype(np.uint8)
    except (OSError, cv2.error) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or str(error).strip()}") from None
    return image


def resize(image, size, how="squash"):
    """uint8 [H, W, 3] -> [size, size, 3] with the whole product: squashed, or padded with black to a square first."""
    height, width = image.shape[:2]
    if how == "pad" and height != width:
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        image = cv2.copyMakeBorder(image, top, side - height - top, left, side - width - left, cv2.BORDER_CONSTANT)
    shrink = image.shape[0] * image.shape[1] > size * size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)


def check_images(folder, names, full=False):
    """Raise one InputError that lists every missing or unreadable image (20 named, then a count).
    full=False reads headers only; full=True decodes every image."""

    def problem(name):
        path = Path(folder) / name
        try:
            if full:
                read_image(path)
            else:
                with Image.open(path):
                    pass
        except InputError:
            return f"{path}: unreadable"
        except FileNotFoundError:
            return f"{path}: not there"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return f"{path}: unreadable"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bad = [p for p in progress(pool.map(problem, names), f"checking {Path(folder).name or folder}", len(names)) if p]
    if bad:
        more = [f"... and {len(bad) - 20} more"] if len(bad) > 20 else []
        raise InputError("\n  ".join([f"{len(bad)} images are missing or unreadable; replace them or take them out of "
                                      "their CSV:", *bad[:20], *more]))


def check_test(folder, full=False):
    """read_test and check_images of the test part, and its solution if there is one; nothing without a test part."""
    if (Path(folder) / "sample_submission.csv").exists():
        test = read_test(folder)
        check_images(Path(folder) / "test", test["filename"], full)
        read_solution(folder, test["filename"])


def augmentation(flip=0.5, jpeg=99, shift=0.2, scale=0.2, rotation=10, affine_p=0.7, cutout=0.4, cutout_p=0.5):
    """The recipe's four for uint8 [3, H, W]; a zero switches its part off. Units: see train.py --help."""
    steps = [v2.RandomHorizontalFlip(flip)]
    if jpeg:
        steps.append(v2.JPEG((jpeg, 100)))
    if affine_p:
        affine = v2.RandomAffine(rotation, (shift, shift), (1 - scale, 1 + scale),
                                 interpolation=v2.InterpolationMode.BILINEAR, fill=0)
        steps.append(v2.RandomApply([affine], affine_p))
    if cutout and cutout_p:
        steps.append(v2.RandomErasing(cutout_p, (cutout**2, cutout**2), (1, 1), value=0))
    return v2.Compose(steps)


# -------------------------------------------------------------------------------------------------------------- loaders


class Images(Dataset):
    """(uint8 image [3, size, size], class number) of rows of a CSV. An item (epoch, row) is augmented from a random
    state that is a function of (seed, epoch, row): the same whichever worker draws it, before and after a resume."""

    def __init__(self, folder, names, labels, size, how="squash", augment=None, seed=0):
        self.folder, self.names, self.labels = Path(folder), list(names), torch.as_tensor(labels)
        self.size, self.how, self.augment, self.seed = size, how, augment, seed

    def __len__(self):
        return len(self.names)

    def __getitem__(self, item):
        epoch, row = item if isinstance(item, tuple) else (0, item)
        image = resize(read_image(self.folder / self.names[row]), self.size, self.how)
        image = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                state = np.random.SeedSequence((self.seed, epoch, row)).generate_state(1, np.uint64)
                torch.default_generator.manual_seed(int(state[0]))
                image = self.augment(image)
        return image, self.labels[row]


class EpochSampler(Sampler):
    """Items (epoch, row), all rows once in an order that is a function of (seed, epoch). Set .epoch before each pass."""

    def __init__(self, rows, seed):
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self):
        return self.rows

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)
        return iter([(self.epoch, int(row)) for row in order])


def default_workers():
    return min(8, max(1, (os.cpu_count() or 1) - 1))  # a core is left to the training process


def _start_worker(_):
    cv2.setNumThreads(0)  # one thread a worker: OpenCV's own pool would fight the others for the cores
    for number in (signal.SIGINT, signal.SIGTERM):  # a Ctrl-C reaches the whole group; the main process ends its workers
        signal.signal(number, signal.SIG_IGN)


def make_loader(images, batch_size, workers, device, sampler=None):
    """Batches (uint8 [B, 3, H, W], int64 [B]), in order, or in the sampler's order with a last short batch dropped."""
    return DataLoader(images, batch_size, sampler=sampler, num_workers=workers, worker_init_fn=_start_worker,
                      pin_memory=device.type == "cuda", persistent_workers=workers > 0 and sampler is not None,
                      drop_last=sampler is not None and len(images) > batch_size)
