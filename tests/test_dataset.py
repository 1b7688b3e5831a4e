"""CSV checks, folds, image reading and augmentation."""

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
from types import SimpleNamespace

from utils import InputError, Unwritable, script_parser

import cv2
import numpy as np
import pytest
import torch
from conftest import TURNED_HEIC
from PIL import Image, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import dataset
from dataset import (
    Affine,
    Cache,
    EpochSampler,
    Images,
    Jpeg,
    augmentation,
    augmentation_flags,
    check_images,
    check_inputs,
    encode,
    find_bad,
    load_folds,
    make_folds,
    make_loader,
    make_look_folds,
    mix_batch,
    read_image,
    read_pseudo,
    read_solution,
    read_test,
    read_train,
    resize,
)


@pytest.mark.parametrize("text, message", [
    ("path,name\na.png,x\n", "no column 'label'"),
    ("path,label\n", "no rows"),
    ("", "no readable CSV"),
    ("path,label\na.png,x\na.png,y\n", "row 3: 'a.png' is there twice"),
    ("path,label\na.png,x\nb.png, \n", "row 3: empty label"),
    ("path,label\na.png,x\n../b.png,y\n", "row 3: '../b.png' leaves its folder; use a path below it, or --allow-outside"),
    ("path,label\na.png,x\n/etc/b.png,y\n", "leaves its folder"),
    ("path,label\na.png,x\nb.png,x\n", "one label only"),
    ("path,label\na.png,x\nb.png,y\nc.png,x \n", "'x' and 'x ' look the same"),
    ("path,label\na.png,x\nb.png,y,z,w\n", "no readable CSV"),
    ("path,label\na.png,x,1\nb.png,y,2\n", "more fields than its header"),
    ("path,label\na.png,x,\nb.png,y,\n", "more fields than its header"),
    ("path,label,group\na.png,x,shop\nb.png,y,\n", "row 3: empty group"),
    ("path,label\na\0.png,x\nb.png,y\n", "NUL bytes"),
    ("path,label," + ",".join(map(str, range(20000))) + "\na.png,x\n", "20002 columns"),
    ("path,label\na.png,x" + ",1" * 20000 + "\nb.png,y\n", "more fields than its header"),
    ("path,label\n\"a\n.png\",x\nb.png,y\n", "control character"),
    ("path,label\na\x1b[2J.png,x\nb.png,y\n", "control character"),
    ("path,label\na.png,\"x\ry\"\nb.png,y\n", "carriage return within the label"),
])
def test_a_bad_train_csv_is_one_sentence(tmp_path, text, message):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_train(tmp_path)
    assert "train.csv" in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 400


def test_labels_are_any_text(tmp_path):
    (tmp_path / "train.csv").write_bytes("\ufeffpath,label\r\n사진/ㄱ.png,우유\r\nb.png,NA\r\nc.png,007\r\n".encode())
    train = read_train(tmp_path)
    assert train["label"].tolist() == ["우유", "NA", "007"] and train["path"][0] == "사진/ㄱ.png"
    classes, numbers = encode(train["label"])
    assert [classes[n] for n in numbers] == ["우유", "NA", "007"]


def test_missing_files_and_columns_of_the_test_part(tmp_path):
    with pytest.raises(InputError, match=r"train\.csv is not there"):
        read_train(tmp_path)
    (tmp_path / "sample_submission.csv").write_text("filename,label\na.jpg,x\n")
    with pytest.raises(InputError, match="no column 'prediction'"):
        read_test(tmp_path)
    assert read_solution(tmp_path, ["a.jpg"]) is None
    (tmp_path / "solution.csv").write_text("filename,label\nb.jpg,x\na.jpg,y\n")
    assert read_solution(tmp_path, ["a.jpg", "b.jpg"]).tolist() == ["y", "x"]
    with pytest.raises(InputError, match=r"lacks 1 test images, the first 'c.jpg'"):
        read_solution(tmp_path, ["a.jpg", "c.jpg"])


def test_folds_are_stratified_and_a_single_image_is_never_held_out():
    labels = ["a"] * 10 + ["b"] * 10 + ["c"] * 2 + ["d"]
    fold = make_folds(labels, folds=5)
    assert fold[-1] == -1 and (fold[:-1] >= 0).all()
    assert all((np.bincount(fold[i:i + 10], minlength=5) == 2).all() for i in (0, 10))
    assert fold[20] != fold[21], "two images of a class must not be held out together"
    assert (fold == make_folds(labels, folds=5)).all() and (fold != make_folds(labels, folds=5, seed=1)).any()


def test_folds_when_every_class_is_smaller_than_their_number():
    fold = make_folds(list("aabbcc"), folds=5)
    assert set(fold) == set(range(5)) and all(fold[i] != fold[i + 1] for i in (0, 2, 4))
    with pytest.raises(InputError, match="fewer --n-folds"):
        make_folds(list("abc"), folds=2)


def test_groups_stay_whole():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 4, 200), rng.integers(0, 20, 200)
    fold = make_folds(labels, groups, folds=5)
    assert all(len(set(fold[groups == g])) == 1 for g in range(20)) and set(fold) == set(range(5))
    labels[groups == 7] = np.where(np.arange((groups == 7).sum()) % 2, 9, labels[groups == 7])  # 9 is in this group only
    labels[groups == 8] = 10  # and this group holds nothing else
    fold = make_folds(labels, groups, folds=5)
    assert all(len(set(fold[groups == g])) == 1 for g in range(20)) and set(fold[groups == 8]) == {-1}
    with pytest.raises(InputError, match="--fold-by look or random"):
        make_folds(list("aabb"), list("sstt"), folds=2)  # each label in one group


def test_look_folds_hold_out_whole_looks():
    """Three looks of 5, 4 and 3 images a class, far apart: no look is split, all folds of a class differ."""
    rng = np.random.default_rng(0)
    look = np.tile(np.repeat([0, 1, 2], [5, 4, 3]), 4)
    labels = np.repeat(["a", "b", "c", "d"], 12)
    features = np.eye(3)[look] + 0.01 * rng.normal(size=(48, 3))
    fold = make_look_folds(features, labels, 3)
    for label in "abcd":
        mine = labels == label
        assert len({(a, b) for a, b in zip(look[mine], fold[mine], strict=True)}) == 3 == len(set(fold[mine]))
    assert np.bincount(fold).max() - np.bincount(fold).min() <= 2, "folds of about one size"
    alone = make_look_folds(np.append(features, [[1, 0, 0]], 0), [*labels, "single"], 3)
    assert alone[-1] == -1 and np.array_equal(alone[:-1], fold)
    same = make_look_folds(np.append(features, np.ones((2, 3)), 0), [*labels, "twin", "twin"], 3)
    assert (same[-2:] == -1).all(), "equal images are one look"


def test_folds_by_look_are_drawn_from_features_and_guarded(data, tmp_path):
    train = read_train(data)
    features = np.random.default_rng(1).normal(size=(24, 5))
    fold = load_folds(tmp_path, train, 3, by="look", features=lambda: features)
    assert np.array_equal(fold, make_look_folds(features, train["label"], 3))
    assert np.array_equal(load_folds(tmp_path, train, 3), fold)
    with pytest.raises(InputError, match="--fold-by look, not random"):
        load_folds(tmp_path, train, 3, by="random")
    with pytest.raises(InputError, match="no column 'group'"):
        load_folds(tmp_path / "other", train, 3, by="group")
    with pytest.raises(InputError, match="--fold-by look, not group"):
        load_folds(tmp_path, train.assign(group=train["path"]), 3)  # the groups came later


def test_mix_keeps_the_shares_it_says():
    np.random.seed(0)
    torch.manual_seed(0)
    batch, labels = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 20, 30) * 60, torch.arange(4)
    for mixup, cutmix in ((0.5, 0), (0, 1.0)):
        mixed, others, share = mix_batch(batch.clone(), labels, mixup, cutmix)
        expected = share * labels * 60 + (1 - share) * others * 60
        assert 0 <= share <= 1 and mixed.dtype == torch.uint8
        assert torch.allclose(mixed.float().mean((1, 2, 3)), expected.float(), atol=0.5)


def test_pseudo_labels_are_the_confident_ones(tmp_path):
    file = tmp_path / "confidence.csv"
    file.write_text("filename,prediction,confidence\na.jpg,x,0.95\nb.jpg,y,0.5\nc.jpg,y,0.9\n")
    assert read_pseudo(file, 0.9, ["x", "y"])[["filename", "number"]].values.tolist() == [["a.jpg", 0], ["c.jpg", 1]]
    with pytest.raises(InputError, match="row 4"):
        read_pseudo(file, 0.9, ["x"])


def test_folds_csv_is_written_once_and_guarded(data, tmp_path, capsys):
    train = read_train(data)
    fold = load_folds(tmp_path, train, 5)
    before = (tmp_path / "folds.csv").read_bytes()
    assert (load_folds(tmp_path, train) == fold).all() and (tmp_path / "folds.csv").read_bytes() == before
    with pytest.raises(InputError, match="holds 5 folds, not 4"):
        load_folds(tmp_path, train, 4)
    with pytest.raises(InputError, match=r"another train\.csv"):
        load_folds(tmp_path, train.iloc[::-1].reset_index(drop=True), 5)


@pytest.fixture
def photo():
    """A smooth picture, so that JPEG keeps it nearly as it is: red rises to the right, green downwards, blue is 60."""
    y, x = np.mgrid[0:60, 0:90]
    return np.dstack([x * 2 + 20, y * 3 + 20, np.full_like(x, 60)]).astype(np.uint8)


def near(a, b, tolerance=6):
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).mean() < tolerance


def test_every_kind_of_image_comes_out_as_upright_rgb(photo, tmp_path):
    image = Image.fromarray(photo)
    image.save(tmp_path / "rgb.png")
    image.save(tmp_path / "rgb.jpg", quality=98)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    for name in ("rgb.png", "rgb.jpg", "cmyk.jpg"):
        assert near(read_image(tmp_path / name), photo), name
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=98, exif=exif)
    assert near(read_image(tmp_path / "turned.jpg"), photo)
    image.convert("L").save(tmp_path / "grey.png")
    assert near(read_image(tmp_path / "grey.png"), np.array(image.convert("L").convert("RGB")))
    cv2.imwrite(str(tmp_path / "deep.png"), photo[..., ::-1].astype(np.uint16) * 257)
    assert near(read_image(tmp_path / "deep.png"), photo)
    alpha = np.dstack([photo, np.where(np.mgrid[0:60, 0:90][1] < 45, 255, 0).astype(np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "우유.png")
    rgba = read_image(tmp_path / "우유.png")
    assert near(rgba[:, :45], photo[:, :45]) and (rgba[:, 45:] == 255).all()
    Image.fromarray(alpha).save(tmp_path / "clear.webp", lossless=True)
    assert (read_image(tmp_path / "clear.webp")[:, 45:] == 255).all()
    for turn in range(2, 9):  # the mask is turned with the colours
        exif[0x0112] = turn
        for kind, how in (("png", {}), ("webp", {"lossless": True})):
            Image.fromarray(alpha).save(tmp_path / f"turned.{kind}", exif=exif, **how)
            shown = np.array(ImageOps.exif_transpose(Image.open(tmp_path / f"turned.{kind}")))
            white = shown[..., 3] == 0
            image = read_image(tmp_path / f"turned.{kind}")
            assert (image[white] == 255).all() and (image[~white] == shown[~white][:, :3]).all(), (kind, turn)
    note = PngImagePlugin.PngInfo()  # XMP: OpenCV does not turn the colours by it
    note.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>')
    Image.fromarray(alpha).save(tmp_path / "note.png", pnginfo=note)
    assert Image.open(tmp_path / "note.png").getexif()[0x0112] == 6 and (read_image(tmp_path / "note.png")[:, 45:] == 255).all()


def test_a_phone_s_heic_is_read_or_the_package_named(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(TURNED_HEIC)
    (tmp_path / "cut.heic").write_bytes(TURNED_HEIC[:400])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pi_heif", None)  # not installed
        for full in (True, False):
            assert find_bad(tmp_path, ["a.heic"], full) == {"a.heic": "HEIC: pip install pi-heif"}
    pytest.importorskip("pi_heif")
    image = read_image(tmp_path / "a.heic")
    assert image.shape == (24, 16, 3)
    corners = [image[3, 3], image[3, -4], image[-4, 3], image[-4, -4]]
    assert near(np.array(corners), np.array([(30, 60, 200), (200, 30, 30), (255, 255, 255), (30, 160, 40)]))
    for full in (True, False):
        assert find_bad(tmp_path, ["a.heic"], full) == {}
    assert find_bad(tmp_path, ["cut.heic"], full=True) == {"cut.heic": "unreadable"}
    at = TURNED_HEIC.index(b"infe\2") + 12
    for byte in range(at, at + 4):
        (tmp_path / "cut.heic").write_bytes(TURNED_HEIC[:byte] + b"\xf8" + TURNED_HEIC[byte + 1:])
        assert find_bad(tmp_path, ["cut.heic"], full=True) == {"cut.heic": "unreadable"}, "it would crash the process"
    monkeypatch.setattr("dataset.MAX_PIXELS", 100)
    assert "megapixels" in find_bad(tmp_path, ["a.heic"])["a.heic"]
    with pytest.raises(InputError, match="megapixels"):
        read_image(tmp_path / "a.heic")


def test_resize_keeps_the_whole_product(photo):
    assert resize(photo, 32).shape == (32, 32, 3)
    padded = resize(photo, 90, "pad")
    assert padded.shape == (90, 90, 3) and (padded[:15] == 0).all() and near(padded[15:75], photo)
    line = resize(np.full((1, 900_000, 3), 9, np.uint8), 31, "pad")
    assert line.shape == (31, 31, 3) and (line[15] == 9).all() and line.sum() == 9 * 31 * 3


def test_bad_images_are_listed_in_one_go(data, tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    names = ["good.png", "empty.jpg", "text.jpg", *(f"gone{i}.jpg" for i in range(30))]
    for full in (False, True):
        with pytest.raises(InputError) as error:
            check_images(tmp_path, names, full)
        lines = str(error.value).splitlines()
        assert lines[0].startswith("32 images are missing or unreadable") and len(lines) == 22
        assert "empty.jpg" in lines[1] and "... and 12 more" in lines[-1] and "good.png" not in str(error.value)
    train = read_train(data)
    check_images(data, train["path"])
    check_images(data, train["path"], full=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "\u1112\u1161.png")  # as macOS writes the syllable
    assert "NFC, NFD" in find_bad(tmp_path, ["\ud558.png"])["\ud558.png"]


def test_bad_training_and_test_images_are_listed_together(data, tmp_path):
    source = shutil.copytree(data, tmp_path / "d")
    for name in ("train/tube_3.png", "test/q10.jpg"):
        (source / name).unlink()
    args = argparse.Namespace(input=source, output=tmp_path, allow_outside=False, skip_bad_images=False)
    with pytest.raises(InputError, match=r"(?s)2 images are missing.*tube_3\.png.*q10\.jpg"):
        check_inputs(args)


def test_a_bad_body_is_found_by_the_full_check_only(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])
    check_images(tmp_path, ["cut.png"])
    with pytest.raises(InputError, match=r"cut\.png"):
        check_images(tmp_path, ["cut.png"], full=True)


def augment(*flags):
    """augmentation() at 50 px by flags."""
    parser = script_parser("", folders=False, device=False)
    augmentation_flags(parser)
    args = parser.parse_args([str(flag) for flag in flags])
    args.size = 50
    return augmentation(args)


@pytest.mark.parametrize("transform, mine, median, mean", [
    (v2.JPEG((50, 100)), Jpeg, 0, 0.5),
    (v2.RandomAffine(10, (0.2, 0.2), (0.8, 1.2), interpolation=v2.InterpolationMode.BILINEAR), Affine, 0, 1.5)])
def test_opencv_makes_the_pixels_that_torchvision_makes(transform, mine, median, mean):
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(cv2.resize(rng.integers(0, 256, (7, 7, 3), np.uint8), (50, 40)), (5, 5), 0)
    image = torch.from_numpy(image).permute(2, 0, 1)
    for seed in range(5):
        torch.manual_seed(seed)
        wanted, after = transform(image.contiguous()), torch.rand(1)
        torch.manual_seed(seed)
        made = mine(transform)(image)
        assert torch.equal(torch.rand(1), after)
        apart = (made.int() - wanted.int()).abs().float()
        assert apart.mean() <= mean and apart.median() <= median and not torch.equal(made, image)


def test_augmentation_parts_and_their_switches():
    image = torch.full((3, 50, 50), 200, dtype=torch.uint8)
    image[:, :, :25] = 100
    off = ["--flip", "0", "--jpeg", "0", "--affine-p", "0", "--cutout-p", "0"]
    assert torch.equal(augment(*off)(image), image)
    assert torch.equal(augment(*off, "--flip", "1")(image), image.flip(-1))
    cut = augment(*off, "--cutout", "0.4", "--cutout-p", "1")(image)
    assert (cut == 0).all(0).sum() == 20 * 20
    for part in (["--affine-p", "1"], ["--crop", "0.3"], ["--colour", "0.4"], ["--grey", "1"], ["--blur", "1"],
                 ["--randaugment", "20"]):
        torch.manual_seed(0)
        image = torch.randint(0, 256, (3, 50, 50), dtype=torch.uint8)
        moved = augment(*off, *part)(image)
        assert moved.shape == image.shape and moved.dtype == torch.uint8 and not torch.equal(moved, image), part


def test_items_do_not_depend_on_the_workers(data):
    train = read_train(data)
    images = Images(data, train["path"], encode(train["label"])[1], 32, augment=augment(), seed=3)
    sampler = EpochSampler(len(images), 3, 5)
    sampler.epoch = 2
    passes = [list(DataLoader(images, batch_sampler=sampler, num_workers=w)) for w in (0, 2)]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(*passes, strict=True))
    before = torch.get_rng_state()
    assert not torch.equal(images[(1, 0)][0], images[(2, 0)][0]) and torch.equal(before, torch.get_rng_state())


def test_no_part_of_a_batch_is_a_single_image():
    assert EpochSampler(13, 0, 32, 4).sizes == [4, 3, 3, 3] and EpochSampler(3, 0, 32, 2).sizes == [3]


@pytest.fixture
def folder(data, tmp_path):
    """The data set without what other tests have cached."""
    return shutil.copytree(data, tmp_path / "d", ignore=shutil.ignore_patterns(".cache"))


def make_cache(folder, size=None, on=True):
    return Cache(SimpleNamespace(input=str(folder), output=str(folder / "o"), cache=on, cache_size=size))


def filled(folder, names, sizes=(32,), how="squash", part=""):
    cache = make_cache(folder)
    cache.add(folder / part, names, sizes, how)
    return cache


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(a[i][0], b[i][0]) for i in range(len(a)))


def test_cached_images_equal_decoded_ones_bit_for_bit(folder):
    names, test = read_train(folder)["path"], read_test(folder)["filename"]
    for how, sizes in (("squash", (32, 51)), ("pad", (20,))):
        cache = filled(folder, names[3:], sizes, how)
        for size, steps in ((s, a) for s in sizes for a in (None, augment())):
            plain = Images(folder, names, [0] * len(names), size, how, steps)
            kept = Images(folder, names, [0] * len(names), sizes[0], how, steps, cache=cache).at(size)
            assert (kept.cache_rows >= 0).sum() == len(names) - 3 and equal(plain, kept)
    loaded = torch.cat([batch for batch, _ in make_loader(kept, 5, 2, torch.device("cpu"))])
    assert torch.equal(loaded, torch.stack([plain[i][0] for i in range(len(plain))]))
    cache = filled(folder, test, part="test")
    pair = [Images(base, names, [0] * 12, 32, cache=c) for base, names, c in
            ((folder / "test", test, None), (folder, "test/" + test, cache))]
    assert (pair[1].cache_rows >= 0).all() and equal(*pair), "a file is known by whatever folder it is named from"
    assert (folder / ".cache" / ".gitignore").read_text() == "*\n"


def test_a_changed_file_is_decoded_anew_and_nothing_else(folder, monkeypatch, capsys):
    names, decoded = read_train(folder)["path"], []
    filled(folder, names)
    before = Images(folder, names, [0] * 24, 32, cache=filled(folder, names))
    old = before[5][0]
    monkeypatch.setattr(dataset, "load_image", lambda *a, load=dataset.load_image: decoded.append(a) or load(*a))
    assert capsys.readouterr().out.count("decoding 24 images at 32 px, 0.0 GB") == 1
    cv2.imencode(".png", np.full((40, 40, 3), 77, np.uint8))[1].tofile(folder / names[5])
    (folder / names[7]).touch()
    after = Images(folder, names, [0] * 24, 32, cache=filled(folder, names))
    assert len(decoded) == 2 and (after[5][0] == 77).all() and equal(after, Images(folder, names, [0] * 24, 32))
    assert torch.equal(before[5][0], old), "who has begun with the old image goes on with it"


def test_no_cache_where_there_is_no_room_or_no_wish(folder, capsys, monkeypatch):
    names = read_train(folder)["path"]
    for cache, said in ((make_cache(folder, on=False), ""), (make_cache(folder, 7e-5), "no cache of 24 images at 32 px")):
        cache.add(folder, names, [32], "squash")
        assert said in capsys.readouterr().out and not (folder / ".cache" / "32-squash.u8").exists()
        assert equal(Images(folder, names, [0] * 24, 32, cache=cache), Images(folder, names, [0] * 24, 32))
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "save_json", lambda *_: (_ for _ in ()).throw(Unwritable("index.json cannot be written (full)")))
        filled(folder, names)
    assert "index.json cannot be written (full); images are decoded" in capsys.readouterr().out
    cache = make_cache(folder, 7.4e-5)
    cache.add(folder, names, [32, 16], "squash")
    assert len(cache.found[32, "squash"]) == 24 and "no cache of 24 images at 16 px" in capsys.readouterr().out


def in_process(*args):
    process = multiprocessing.get_context("fork").Process(target=filled, args=args)
    process.start()
    return process


def test_two_builders_at_once_decode_once(folder, monkeypatch):
    names, log = read_train(folder)["path"], folder / "log"
    monkeypatch.setattr(dataset, "load_image", lambda path, *a, load=dataset.load_image: (
        os.write(os.open(log, os.O_APPEND | os.O_CREAT | os.O_WRONLY), b"."), load(path, *a))[1])
    both = [in_process(folder, names) for _ in range(2)]
    assert [process.join(60) or process.exitcode for process in both] == [0, 0] and log.stat().st_size == 24
    assert equal(Images(folder, names, [0] * 24, 32, cache=filled(folder, names)), Images(folder, names, [0] * 24, 32))


def test_a_builder_that_is_killed_leaves_what_was_whole(folder, monkeypatch):
    names, index = read_train(folder)["path"], folder / ".cache" / "32-squash.json"

    def killed(path, *args, load=dataset.load_image):
        if path == folder / names[20]:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "load_image", killed)
        for known in (names[:0], names[:12]):  # nothing was there before; something was
            if len(known):
                filled(folder, known)
            before = index.read_bytes() if index.exists() else None
            process = in_process(folder, names)
            process.join(60)
            assert process.exitcode == -signal.SIGKILL and before == (index.read_bytes() if index.exists() else None)
    with open(index.with_suffix(".u8"), "ab") as file:
        file.write(b"half an image")
    assert equal(Images(folder, names, [0] * 24, 32, cache=filled(folder, names)), Images(folder, names, [0] * 24, 32))
    data = bytearray(index.with_suffix(".u8").read_bytes())
    data[7000] ^= 4  # a bad disk: this image is decoded
    index.with_suffix(".u8").write_bytes(data)
    first = filled(folder, names)
    assert equal(Images(folder, names, [0] * 24, 32, cache=first), Images(folder, names, [0] * 24, 32))
    index.write_text(index.read_text().replace("0", "1", 1))  # damaged: built anew, in another order; the first still goes on
    filled(folder, names[::-1])
    assert equal(Images(folder, names, [0] * 24, 32, cache=first), Images(folder, names, [0] * 24, 32))
    images, plain = (Images(folder, names, [0] * 24, 32, cache=c) for c in (filled(folder, names), None))
    index.with_suffix(".u8").rename(folder / "old")
    index.with_suffix(".u8").write_bytes(bytes(reversed((folder / "old").read_bytes())))
    dataset.open_cache.cache_clear()
    assert equal(images, plain), "its row numbers are those of the file that was"
    (folder / "old").rename(index.with_suffix(".u8"))
    os.truncate(index.with_suffix(".u8"), 5000)
    assert equal(Images(folder, names, [0] * 24, 32, cache=filled(folder, names)), Images(folder, names, [0] * 24, 32))
