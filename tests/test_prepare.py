"""Public data sets in miniature, as published, become the contract of the README."""

import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import GROCERY, draw, script

from dataset import check_images, has_test, read_image, read_solution, read_test, read_train


def photos(folder, names):
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imencode(".jpg", draw(i % 4, rng))[1].tofile(folder / name)


def prepared(form, source, tmp_path, *flags):
    """Run the script; every image that the tables name is there. Returns (train, test) with the labels of the solution."""
    output = tmp_path / "out"
    script("scripts/prepare.py", form, source, "--output", output, *flags)
    train, test = read_train(output), read_test(output)
    check_images(output, train["path"])
    check_images(output / "test", test["filename"])
    return train, test.assign(label=read_solution(output, test["filename"]))


def test_grocery(tmp_path):
    source = tmp_path / "GroceryStoreDataset" / "dataset"
    names = {split: [f"{split}/Fruit/{c}/{c}_{i}.jpg" for c in ("Kiwi", "Pear") for i in range(2)]
             for split in ("train", "val", "test")}
    photos(source, [name for rows in names.values() for name in rows])
    (source / "classes.csv").write_text("Class Name (str),Class ID (int),Coarse\nKiwi,0,0\nPear,1,1\n")
    for split, rows in names.items():
        (source / f"{split}.txt").write_text("".join(f"{row}, {int('Pear' in row)}, 0\n" for row in rows))
    train, test = prepared("grocery", source.parent, tmp_path)
    assert (len(train), len(test)) == (8, 4) and test["label"].tolist() == ["Kiwi", "Kiwi", "Pear", "Pear"]


def test_products10k_without_its_groups_which_are_kinds_of_products(tmp_path):
    source = tmp_path / "p"
    photos(source, ["train/0.jpg", "train/1.jpg", "train/2.jpg", "test/7.jpg"])
    (source / "train.csv").write_text("name,class,group\n0.jpg,12,3\n1.jpg,12,3\n2.jpg,15,4\n")
    (source / "test_kaggletest.csv").write_text("name,class,Usage\n7.jpg,15,Public\n")
    train, test = prepared("products10k", source, tmp_path)
    assert list(train.columns) == ["path", "label"] and train["label"].tolist() == ["12", "12", "15"]
    assert test["label"].tolist() == ["15"]


def test_rp2k_and_its_labels_in_any_script(tmp_path):
    source = tmp_path / "r"
    photos(source, [f"all/{split}/{label}/{i}.jpg" for split in ("train", "test") for label in ("可乐", "茶") for i in (0, 1)])
    train, test = prepared("rp2k", source, tmp_path)
    assert set(train["label"]) == {"可乐", "茶"} and len(test) == 4


def test_sop_holds_out_the_last_photograph_of_each_label(tmp_path):
    source = tmp_path / "s"
    names = [f"{name}.JPG" for name in ("bicycle_final/1_0", "bicycle_final/1_1", "bicycle_final/1_2", "chair_final/2_0",
                                        "chair_final/2_1", "chair_final/3_0")]
    photos(source, names)
    rows = [f"{i + 1} {name.split('/')[1][0]} 1 {name}" for i, name in enumerate(names)]
    (source / "Ebay_test.txt").write_text("image_id class_id super_class_id path\n" + "\n".join(rows) + "\n")
    train, test = prepared("sop", source, tmp_path)
    assert test["filename"].tolist() == ["bicycle_final/1_2.JPG", "chair_final/2_1.JPG"]
    assert test["label"].tolist() == ["1", "2"]
    assert "3" in set(train["label"]), "a single photograph stays in the gallery"


def test_a_plain_tree_is_split_by_label_and_can_be_copied(tmp_path):
    source = tmp_path / "f"
    photos(source, [f"{label}/deep/{i}.jpg" for label in ("a", "b") for i in range(5)])
    (source / "a" / "deep" / "._0.jpg").write_bytes(b"what macOS adds to an archive")
    photos(source, [".trash/a/0.jpg", "a/.thumbs/0.jpg"])
    train, test = prepared("folders", source, tmp_path, "--test-share", 0.4, "--copy")
    assert sorted(train["label"]) == list("aaabbb") and sorted(test["label"]) == list("aabb")
    assert not (tmp_path / "out" / "test").is_symlink()
    assert len(list((tmp_path / "out" / "test").rglob("*.jpg"))) == 4, "only the test images are copied there"
    assert read_image(tmp_path / "out" / "test" / test["filename"][0]).shape == (40, 48, 3)
    other = (source / "b" / "deep" / "1.jpg").read_bytes() + b"another file"
    (source / "a" / "deep" / "0.jpg").write_bytes(other)
    prepared("folders", source, tmp_path, "--test-share", 0.4, "--copy")
    (copied,) = (tmp_path / "out").glob("*/a/deep/0.jpg")
    assert copied.read_bytes() == other
    train, test = prepared("folders", source, tmp_path / "links", "--test-share", 0.99)
    assert sorted(train["label"]) == list("ab") and len(test) == 8, "one of each is left to train with"
    photos(tmp_path / "g", ["a/0.jpg", "b/0.jpg"])
    for folder in ("out", "links/out"):
        again = script("scripts/prepare.py", "folders", tmp_path / "g", "--output", tmp_path / folder, code=2)
        assert "is there already" in again.stderr


def test_photographs_without_labels_and_none_to_label(tmp_path):
    source, output = tmp_path / "f", tmp_path / "out"
    photos(source, [f"train/{label}/{i}.jpg" for label in ("a", "b") for i in range(3)] + ["test/8.jpg", "test/9.jpg"])
    (source / "train" / "b" / "3.DNG").write_bytes(b"as a camera takes them")
    said = script("scripts/prepare.py", "folders", source, "--output", output).stderr
    assert "left out: 1 .dng" in said
    assert read_test(output)["filename"].tolist() == ["test/8.jpg", "test/9.jpg"] and len(read_train(output)) == 6
    assert read_solution(output, ["test/8.jpg"]) is None
    check_images(output / "test", read_test(output)["filename"])
    photos(source, ["test/a/7.jpg"])
    assert "beside the folders of labels" in script("scripts/prepare.py", "folders", source, "--output", output, code=2).stderr
    for name in ("8.jpg", "9.jpg"):
        (source / "test" / name).unlink()
    script("scripts/prepare.py", "folders", source, "--output", output)
    assert read_test(output)["filename"].tolist() == ["test/a/7.jpg"] and read_solution(output, ["test/a/7.jpg"]) == ["a"]
    script("scripts/prepare.py", "folders", source / "train", "--output", tmp_path / "all", "--test-share", 0)
    assert len(read_train(tmp_path / "all")) == 6 and not has_test(tmp_path / "all")
    assert not (tmp_path / "all" / "test").exists(), "a link to SRC, where photographs to label would fall among the others"
    photos(source, ["val/a/5.jpg"])
    script("scripts/prepare.py", "folders", source, "--output", output)
    assert len(read_train(output)) == 7, "val/ trains, too"
    for flags, message in [(("--test-share", 0), "nothing to share out"), (("--suffix", ".png"), "--suffix is for csv"),
                           (("--output", source / "out"), "whose images are read")]:
        assert message in script("scripts/prepare.py", "folders", source, *flags, code=2).stderr
    photos(tmp_path / "new", ["cola/1.jpg", "cola/2.jpg"])
    script("scripts/prepare.py", "folders", tmp_path / "new", "--output", tmp_path / "one", "--test-share", 0)
    assert (tmp_path / "one" / "train.csv").read_text().count("cola\n") == 2, "one new product, for add_products.py"
    shutil.rmtree(source / "test")
    assert "would be labels" in script("scripts/prepare.py", "folders", source, "--output", output, code=2).stderr


def test_the_csvs_of_a_contest_there_and_back(tmp_path):
    source, output = tmp_path / "c", tmp_path / "out"
    photos(source, [f"pictures/{i}.jpg" for i in range(4)] + ["unseen/8.jpg", "unseen/9.jpg"])
    (source / "train.csv").write_text("id,hash,product,shop\n0,x,a,s\n1,x,a,t\n2,x,b,s\n3,x,b,t\n")
    (source / "sample_submission.csv").write_text("Id,Category,note\n9,?,n\n8,?,m\n")
    flags = ("--columns", "id", "product", "--group", "shop", "--suffix", ".jpg", "--images", "pictures", "--test-images",
             "unseen/", "--output", output)
    script("scripts/prepare.py", "csv", source, *flags)
    train, test = read_train(output), read_test(output)
    assert train["label"].tolist() == list("aabb") and train["group"].tolist() == list("stst")
    assert test["filename"].tolist() == ["unseen/9.jpg", "unseen/8.jpg"] and read_solution(output, test["filename"]) is None
    check_images(output, train["path"])
    check_images(output / "test", test["filename"])
    test.assign(prediction=["b", "a"]).to_csv(tmp_path / "submission.csv", index=False)
    back = ("scripts/prepare.py", "csv", source, "--suffix", ".jpg", "--hand-in")
    script(*back, tmp_path / "submission.csv")
    assert (tmp_path / "hand_in.csv").read_text() == "Id,Category,note\n9,b,n\n8,a,m\n"
    test.assign(label1=["b", "a"], label2=["a", ""]).to_csv(tmp_path / "top.csv", index=False)
    script(*back, tmp_path / "top.csv")
    assert (tmp_path / "hand_in.csv").read_text() == "Id,Category,note\n9,b a,n\n8,a,m\n"
    test[::-1].assign(prediction=["b", "a"]).to_csv(tmp_path / "submission.csv", index=False)
    assert "same order" in script(*back, tmp_path / "submission.csv", code=2).stderr
    test.assign(label1="Cola 0.5 l", label2="a").to_csv(tmp_path / "top.csv", index=False)
    assert "labels with spaces" in script(*back, tmp_path / "top.csv", code=2).stderr
    assert "whose images are read" in script("scripts/prepare.py", "csv", source, "--output", source, code=2).stderr
    for rows, message in [("../../0,a", "use a path below it\n"), ("0,Cola, 0.5 l", "text with commas in quotes"),
                          ("0,a\n1,", "empty label")]:
        (source / "train.csv").write_text(f"id,product\n{rows}\n")
        assert message in script("scripts/prepare.py", "csv", source, "--output", output, code=2).stderr
    assert "no column 'label'" in script("scripts/prepare.py", "csv", source, "--columns", "id", "label", code=2).stderr


def test_the_wrong_data_set_is_a_sentence(tmp_path):
    photos(tmp_path / "x", ["a.jpg"])
    for form, message in [("grocery", "classes.csv"), ("products10k", "train.csv"), ("rp2k", "no folders"),
                          ("csv", "train.csv"), ("sop", "Ebay_test"), ("folders", "no folders")]:
        assert message in script("scripts/prepare.py", form, tmp_path / "x", "--output", tmp_path / "o", code=2).stderr
    assert "no folder" in script("scripts/prepare.py", "sop", tmp_path / "nowhere", "--output", tmp_path / "o", code=2).stderr


@pytest.mark.skipif(not GROCERY.exists(), reason=f"the Grocery Store data set is not at {GROCERY}")
def test_the_real_grocery_set(tmp_path):
    script("scripts/prepare.py", "grocery", GROCERY, "--output", tmp_path)
    train, test = read_train(tmp_path), read_test(tmp_path)
    assert (len(train), len(test), train["label"].nunique()) == (2936, 2485, 81)
    assert pd.Series(read_solution(tmp_path, test["filename"])).isin(train["label"]).all()
    check_images(tmp_path, train["path"][::50])
