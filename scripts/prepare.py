"""Public data sets in this project's form; a contest's CSVs; and a plain tree of one folder a label.

    grocery       Grocery Store, github.com/marcusklasson/GroceryStoreDataset: its train + val against its test, 81 labels
    products10k   Products-10K, products-10k.github.io: train.csv against test_kaggletest.csv
    rp2k          RP2K, pinlandata.com/rp2k_dataset: all/train/<label>/ against all/test/<label>/
    sop           Stanford Online Products: its labels of train and test do not overlap, so the last photograph of each label of
                  Ebay_test.txt becomes a test image, the others the training images
    csv           SRC/train.csv with a column of images and one of labels, SRC/sample_submission.csv with one of images and one
                  to fill in; --hand-in writes a submission with that file's own columns and names
    folders       SRC/train/<label>/ (and SRC/val/<label>/) against SRC/test/<label>/, or against the photographs to label in
                  SRC/test/; without these, SRC/<label>/, and of each label the share --test-share, drawn at random, becomes
                  test images

Reads  SRC, the unpacked data set
       with --hand-in a submission.csv or top.csv
Writes OUT/{train.csv,sample_submission.csv,solution.csv} and the links OUT/images and OUT/test to SRC (or, --copy, the images);
       without images to label no sample_submission.csv, where their labels are not known no solution.csv; with --hand-in only
       hand_in.csv beside it

    python scripts/prepare.py grocery ~/GroceryStoreDataset
    python scripts/prepare.py folders ~/photos --output input/mine --test-share 0
    python scripts/prepare.py csv ~/contest --columns image label_group --images train_images --test-images test_images
    python scripts/prepare.py csv ~/contest --hand-in output/submission.csv          # with --suffix as before, if there was one
"""

import shutil
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, progress, reading, run, save_csv, script_parser

import numpy as np
import pandas as pd

from dataset import SUFFIXES, check_paths, read_train

# Flags that one form only takes.
ONLY = {"folders": ("test_share", "seed"), "csv": ("columns", "group", "images", "test_images", "suffix", "hand_in")}


def parse_args():
    parser = script_parser(__doc__, folders=False, device=False)
    add = parser.add_argument
    add("form", choices=FORMS, metavar="|".join(FORMS), help="which data set SRC holds")
    add("source", metavar="SRC", help="folder of the unpacked data set")
    add("--output", help="default input/<form>")
    add("--test-share", type="part", help="folders without train/ and test/: share of test images; 0 = "
        "none, all train (default 0.2)")
    add("--seed", type="seed", default=0, help="of that draw (default 0)")
    add("--copy", action="store_true", help="copy the images instead of linking to SRC")
    add("--columns", nargs=2, metavar=("IMAGE", "LABEL"), help="csv: those of train.csv (default its first two)")
    add("--group", metavar="COLUMN", help="csv: of train.csv, the shop or session of an image (default none)")
    add("--images", default=".", metavar="FOLDER", help="csv: folder of the training images in SRC (default SRC itself)")
    add("--test-images", default=".", metavar="FOLDER", help="csv: that of the images to label")
    add("--suffix", default="", help="csv: what the names in the CSVs lack, e.g. .jpg")
    add("--hand-in", metavar="SUBMISSION", help="csv: only write hand_in.csv beside this submission.csv or top.csv, in the "
        "form of SRC/sample_submission.csv")
    args = parser.parse_args()
    for form, names in ONLY.items():
        for name in names:
            if args.form != form and getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is for {form}")
    args.output = args.output or f"input/{args.form}"
    return args


def read_table(file, **options):
    if not Path(file).is_file():
        raise InputError(f"{file} is not there; give the folder of the unpacked data set, and its form")
    with reading(file, "unpack the data set again", "no list of this data set"):
        table = pd.read_csv(file, dtype=str, keep_default_na=False, **options)
    if not isinstance(table.index, pd.RangeIndex):
        raise InputError(f"{file}: its rows have more fields than its header; put text with commas in quotes")
    return table


def column(table, name, file):
    if name not in table.columns:
        raise InputError(f"{file} has no column {name!r}, only {', '.join(map(repr, table.columns))}; is this the data set?")
    return table[name]


# ------------------------------------------- each form: (train, test), DataFrames of path below SRC and label


def grocery(source, args):
    if not (source / "classes.csv").exists():
        source = source / "dataset"
    file = source / "classes.csv"
    classes = read_table(file)
    names = dict(zip(column(classes, "Class ID (int)", file), column(classes, "Class Name (str)", file), strict=True))
    parts = []
    for split in ("train", "val", "test"):
        rows = read_table(source / f"{split}.txt", names=["path", "label", "coarse"], skipinitialspace=True)
        parts.append(pd.DataFrame({"path": rows["path"], "label": rows["label"].map(names)}))
    return source, pd.concat(parts[:2], ignore_index=True), parts[2]


def products10k(source, args):
    def rows(name, folder):
        table = read_table(source / name)
        path = folder + "/" + column(table, "name", source / name)
        return pd.DataFrame({"path": path, "label": column(table, "class", source / name)})  # its group is a kind of product

    test = next((n for n in ("test_kaggletest.csv", "test.csv") if (source / n).exists()), "test_kaggletest.csv")
    return source, rows("train.csv", "train"), rows(test, "test")


def rp2k(source, args):
    source = source / "all" if (source / "all").is_dir() else source
    return source, tree(source, "train"), tree(source, "test")


def sop(source, args):
    file = source / "Ebay_test.txt"
    table = read_table(file, sep=" ")
    table = pd.DataFrame({"path": column(table, "path", file), "label": column(table, "class_id", file)})
    last = ~table["label"].duplicated(keep="last") & table["label"].duplicated(keep="first")
    return source, table[~last].reset_index(drop=True), table[last].reset_index(drop=True)


def csv(source, args):
    file = source / "train.csv"
    table, sample = read_table(file), source / "sample_submission.csv"
    if len(table.columns) < 2:
        raise InputError(f"{file} has one column only; there must be one of images and one of labels")
    image, label = args.columns or table.columns[:2]
    train = pd.DataFrame({"path": column(table, image, file), "label": column(table, label, file)})
    if args.group:
        train["group"] = column(table, args.group, file)
    train["path"] = below(args.images, train["path"], args.suffix)
    return source, train, pd.DataFrame({"path": below(args.test_images, read_table(sample).iloc[:, 0], args.suffix)}
                                       if sample.exists() else {"path": []})


def below(folder, names, suffix):
    return ("" if folder == "." else folder.rstrip("/") + "/") + names + suffix


def hand_in(source, args):
    """The labels of a submission.csv, or of a top.csv, several in a row with spaces between, in the form of
    SRC/sample_submission.csv, its second column filled."""
    file, sample = args.hand_in, read_table(source / "sample_submission.csv")
    table = read_table(file)
    names = zip(column(table, "filename", file), sample.iloc[:, 0] + args.suffix, strict=False)
    if len(sample.columns) < 2 or len(sample) != len(table) or not all(ours.endswith(theirs) for ours, theirs in names):
        raise InputError(f"{file} does not fit {source}/sample_submission.csv: it wants the same images in the same order, and "
                         "a second column to fill in")
    result, several = Path(file).with_name("hand_in.csv"), table.filter(regex=r"^label\d+$")
    if several.apply(lambda labels: labels.str.contains(r"\s")).any(axis=None):
        raise InputError(f"{file}: labels with spaces cannot be joined by spaces; write hand_in.csv by hand")
    said = several.agg(" ".join, axis=1).str.rstrip() if len(several.columns) else column(table, "prediction", file)
    save_csv(result, sample.assign(**{sample.columns[1]: said}))
    print(f"{result}: {len(table)} labels")


def folders(source, args):
    parts = [name for name in ("train", "val", "test") if (source / name).is_dir()]
    if "train" in parts and "test" in parts:
        if args.test_share is not None:
            raise InputError(f"{source} has train/ and test/, so --test-share has nothing to share out; leave it out")
        train = pd.concat([tree(source, name) for name in parts[:-1]], ignore_index=True)
        if photographs(source / "test", "*/**/*"):
            return source, train, tree(source, "test")
        return source, train, pd.DataFrame({"path": relative(photographs(source / "test", "*"), source)})
    if parts and {p.name for p in source.iterdir() if p.is_dir() and not p.name.startswith(".")} == {*parts}:
        raise InputError(f"{source} holds {' and '.join(parts)} only, which would be labels; name the folders of photographs "
                         f"train and test, or give {source}/{parts[0]} as SRC")
    table, share = tree(source, ""), 0.2 if args.test_share is None else args.test_share
    order = np.random.default_rng(args.seed).permutation(len(table))
    place = table.iloc[order].groupby("label").cumcount().reindex(table.index)
    size = table.groupby("label")["path"].transform("size")
    test = place < (share * size).round().clip(upper=size - 1)  # one at least stays to train with
    return source, table[~test].reset_index(drop=True), table[test].reset_index(drop=True)


def tree(source, split):
    """Images of SRC/split/<label>/..."""
    base = source / split
    files, loose = photographs(base, "*/**/*"), photographs(base, "*")
    if files and loose:
        raise InputError(f"{loose[0]} lies beside the folders of labels; move it into one of them, or away")
    if not files:
        raise InputError(f"{base} holds no folders of images ({', '.join(sorted(SUFFIXES))})")
    return pd.DataFrame({"path": relative(files, source), "label": [p.relative_to(base).parts[0] for p in files]})


def photographs(base, pattern):
    """The images among the files of a pattern, in order; says which kinds of files are left out."""
    files = sorted(p for p in base.glob(pattern) if p.is_file()
                   and not any(part.startswith(".") for part in p.relative_to(base).parts))  # ._x: of macOS
    if other := Counter(p.suffix.lower() for p in files if p.suffix.lower() not in SUFFIXES):
        kinds = ", ".join(f"{count} {kind or 'without a suffix'}" for kind, count in other.items())
        print(f"{base}: no images by their names, left out: {kinds}", file=sys.stderr)
    return [p for p in files if p.suffix.lower() in SUFFIXES]


def relative(files, source):
    """Their paths below SRC, as text."""
    if odd := [p for p in files if any("\ud800" <= character <= "\udfff" for character in str(p))]:
        raise InputError(f"{odd[0]}: its name is no UTF-8, which a CSV cannot hold; rename it")
    return [p.relative_to(source).as_posix() for p in files]


FORMS = {"grocery": grocery, "products10k": products10k, "rp2k": rp2k, "sop": sop, "csv": csv, "folders": folders}


# ------------------------------------------------------------------------------------------------------------- the work


def place(source, output, train, test, copy):
    """Links OUT/images and OUT/test to SRC, or copies of the images."""
    for name, table in (("images", train), ("test", test)):
        target = output / name
        link = target.is_symlink()
        if table.empty:  # photographs to label may be put there later
            if link:
                target.unlink()
            continue
        if (copy or target.resolve() != source) if link else (target.exists() and not copy):
            raise InputError(f"{target} is there already, of another SRC or with --copy; delete {output}, or give another "
                             "--output")
        if not copy:
            if not link:
                target.symlink_to(source)
            continue
        for path in progress(table["path"], f"copying {name}"):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            old, new = (folder / path for folder in (target, source))
            if not old.exists() or (old.stat().st_size, old.stat().st_mtime) != (new.stat().st_size, new.stat().st_mtime):
                shutil.copy2(new, old)


def main():
    args = parse_args()
    source, output = Path(args.source).resolve(), Path(args.output)
    if not source.is_dir():
        raise InputError(f"{source} is no folder; give that of the unpacked data set")
    if args.hand_in:
        return hand_in(source, args)
    if output.resolve() == source or (args.form == "folders" and source in output.resolve().parents):
        raise InputError(f"--output {output} is in {source}, whose images are read; give another")
    source, train, test = FORMS[args.form](source, args)
    for table in (train, test):
        check_paths(table, "path", args.source, otherwise="")
    if train.empty:
        raise InputError(f"{args.source} has no training images")
    output.mkdir(parents=True, exist_ok=True)
    place(source, output, train, test, args.copy)
    test = test.rename(columns={"path": "filename"})
    tables = {"solution.csv": test[["filename", "label"]] if "label" in test.columns else test[:0],
              "sample_submission.csv": test[["filename"]].assign(prediction=train["label"].iloc[0]),
              "train.csv": train.assign(path="images/" + train["path"])}
    for name, table in tables.items():
        if len(table):
            save_csv(output / name, table)
        else:
            (output / name).unlink(missing_ok=True)
    read_train(output, least=1)  # is it what the other scripts take?
    print(f"{output}: {len(train)} training and {len(test)} test images of {train['label'].nunique()} labels")


if __name__ == "__main__":
    run(main)
