"""The public Grocery Store data set in this project's form: train = its train + val, with a solution from its test list.

Reads  SRC/{train,val,test}.txt, SRC/classes.csv and the photographs; SRC is a clone of marcusklasson/GroceryStoreDataset
       (or its folder `dataset`)
Writes OUT/{train.csv,sample_submission.csv,solution.csv} and links (or copies) OUT/{train,val,test}

    python scripts/prepare_grocery.py ~/GroceryStoreDataset
    python scripts/prepare_grocery.py ~/GroceryStoreDataset --output input/grocery --copy
"""

import shutil
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, atomic, run, script_parser


def parse_args():
    parser = script_parser(__doc__, folders=False, device=False)
    parser.add_argument("source", metavar="SRC", help="folder with train.txt, val.txt, test.txt, classes.csv")
    parser.add_argument("--output", default="input/grocery", help="default input/grocery")
    parser.add_argument("--copy", action="store_true", help="copy the photographs instead of linking their folders")
    return parser.parse_args()


def read_list(source, split, names):
    """Rows 'path, fine label, coarse label' of <split>.txt -> DataFrame path, label."""
    file = source / f"{split}.txt"
    try:
        table = pd.read_csv(file, names=["path", "label", "coarse"], skipinitialspace=True)
        return pd.DataFrame({"path": table["path"], "label": table["label"].map(names)})
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as a list of the Grocery Store data set: {error}") from None


def save(table, path):
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)


def main():
    args = parse_args()
    source, output = Path(args.source).resolve(), Path(args.output)
    if not (source / "train.txt").exists() and (source / "dataset" / "train.txt").exists():
        source = source / "dataset"
    if not (source / "classes.csv").exists():
        raise InputError(f"{source} has no classes.csv; give the folder of the Grocery Store data set")
    table = pd.read_csv(source / "classes.csv")
    names = dict(zip(table["Class ID (int)"], table["Class Name (str)"], strict=True))
    train = pd.concat([read_list(source, split, names) for split in ("train", "val")])
    test = read_list(source, "test", names)
    test["filename"] = test["path"].str.removeprefix("test/")
    output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        target = output / split
        if target.is_symlink() or target.exists():
            continue
        if args.copy:
            shutil.copytree(source / split, target.with_name(f".{split}.tmp"), dirs_exist_ok=True)
            target.with_name(f".{split}.tmp").rename(target)
        else:
            target.symlink_to(source / split)
    save(test[["filename", "label"]], output / "solution.csv")
    save(test[["filename"]].assign(prediction=train["label"].iloc[0]), output / "sample_submission.csv")
    save(train, output / "train.csv")
    print(f"{output}: {len(train)} training and {len(test)} test images of {train['label'].nunique()} classes")


if __name__ == "__main__":
    run(main)
