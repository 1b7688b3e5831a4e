"""Mutated inputs of every kind, each given to the functions of the project that read such a thing: scripts/torture.py runs
thousands, tests/test_torture.py a few dozen."""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import traceback
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, Store, load_checkpoint, load_json, load_npy, save_json

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image

import dataset
import train
from extract import is_finished, load_run
from models import Model, load_weights
from retrieve import load_neighbours, load_runs
from search import topk

NET = "test_efficientnet"
LETTERS = ["=", "+", "-", "@", "\"", ",", "'", "\n", " ", "a", "é", "우", "\u202e", "\U0001f600", "\x1b", "<", "NA"]


def flip(data, rng, bits=1):
    data = bytearray(data)
    for place in rng.integers(0, len(data) * 8, bits):
        data[place // 8] ^= 1 << place % 8
    return bytes(data)


def cut(data, rng):
    return data[:int(rng.integers(len(data)))]


def mutate(data, rng):
    """One of: cut, one bit or many flipped, a piece taken out, doubled, overwritten by noise, bytes before or after."""
    a, b = np.sort(rng.integers(0, len(data) + 1, 2))
    noise = rng.bytes(int(rng.integers(1, 50)))
    return [cut(data, rng), flip(data, rng), flip(data, rng, 30), data[:a] + data[b:], data[:b] + data[a:], noise + data,
            data[:a] + noise + data[a + len(noise):], data + noise, b""][int(rng.integers(9))]


def png(width, height, raw, colour=0, depth=1):
    """A PNG with any header over any data."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


class Code:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (Path(self.canary),)


class Cases:
    """Mutated inputs by seed, each given to the functions of the project that read such a thing."""

    KINDS = ("image", "image", "special", "table", "table", "labels", "npy", "neighbours", "checkpoint", "json", "search")

    def __init__(self, folder, whole, data):
        self.folder, self.whole, self.data = folder, whole, data
        self.canary = folder / "code-ran"
        folder.mkdir()
        picture = cv2.imread(str(data / "train" / "0_0.png"))
        frames = [Image.fromarray(picture), Image.fromarray(255 - picture)]
        self.images = {"deep.png": cv2.imencode(".png", picture.astype(np.uint16) * 257)[1].tobytes()}
        for name, options in {"a.png": {}, "b.jpg": {}, "c.webp": {}, "d.tif": {}, "e.bmp": {}, "g.ppm": {},
                              "moving.gif": {"save_all": True, "append_images": frames[1:]},
                              "moving.webp": {"save_all": True, "append_images": frames[1:]},
                              "moving.png": {"save_all": True, "append_images": frames[1:]},
                              "lzw.tif": {"compression": "tiff_lzw"}}.items():
            frames[0].save(folder / name, **options)
            self.images[name] = (folder / name).read_bytes()
        for name, mode in (("cmyk.jpg", "CMYK"), ("cmyk.tif", "CMYK"), ("clear.png", "RGBA"), ("bits.png", "1"),
                           ("grey.jpg", "L"), ("palette.png", "P")):
            frames[0].convert(mode).save(folder / name)
            self.images[name] = (folder / name).read_bytes()
        self.images["1x1.png"] = cv2.imencode(".png", picture[:1, :1])[1].tobytes()
        self.images["huge.png"] = png(30000, 30000, bytes(30000 * 3751))  # a true one, of 113 KB: 2.7 GB when decoded

    def run(self, seed):
        """Make the case of a seed and read it. Returns (kind, 'accepted' | 'refused' | 'fault', what was said)."""
        rng = np.random.default_rng(seed)
        kind = self.KINDS[int(rng.integers(len(self.KINDS)))]
        folder = self.folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            getattr(self, kind)(folder, rng)
            end, said = "accepted", ""
        except InputError as error:
            said = str(error)
            end = "refused" if self.name in said else "fault"
        except OSError as error:  # a script says the file's name and the reason, see utils.run
            said = repr(error)
            end = "refused" if error.filename and self.name in str(error.filename) else "fault"
        except BaseException as error:
            end, said = "fault", "".join(traceback.format_exception(error))
        if self.canary.exists():
            end, said = "fault", "code was run"
        return kind, end, f"{self.name}: {said}"

    def check(self, folder, name):
        """An image through all that reads images."""
        self.name = name
        with contextlib.suppress(InputError):
            dataset.check_images(folder, [name])
        dataset.check_images(folder, [name], full=True)
        image, _ = dataset.Images(folder, [name], [0], 32)[0]
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8

    def image(self, folder, rng):
        name = list(self.images)[int(rng.integers(len(self.images)))]
        data = self.images[name]
        if rng.integers(8) and name != "huge.png":
            data = mutate(data, rng)
        if not rng.integers(4):
            name = f"wrong.{['jpg', 'png', 'tif', 'txt'][int(rng.integers(4))]}"
        (folder / name).write_bytes(data)
        self.check(folder, name)

    def special(self, folder, rng):
        path = folder / "special.png"
        kind = int(rng.integers(10))
        if kind == 0:
            os.mkfifo(path)
        elif kind == 1:
            path.mkdir()
        elif kind == 2:
            path.symlink_to("special.png")
        elif kind == 3:
            path.symlink_to("/dev/zero")
        elif kind == 4:
            path.symlink_to("nowhere")
        elif kind == 5:
            with open(path, "wb") as file:
                file.truncate(50 * 2**30)
        elif kind == 6:
            path.write_bytes(png(*rng.integers(0, 2**31, 2), b"\0" * 1000, int(rng.integers(7)), 2 ** int(rng.integers(5))))
        elif kind == 7:
            path.write_bytes(png(5000, 5000, bytes(5000 * 40001), 6, 16) if not rng.integers(8) else png(0, 0, b""))
        elif kind == 8:
            path.symlink_to("/dev/stdin")
        else:
            path.write_bytes(rng.bytes(2000))
        self.check(folder, path.name)

    def table(self, folder, rng):
        """A CSV of a finished job, mutated, through its readers."""
        name = ["train.csv", "sample_submission.csv", "solution.csv", "folds.csv", "confidence.csv", "bad_images.csv"][
            int(rng.integers(6))]
        self.name = name
        source = {"folds.csv": self.whole, "confidence.csv": self.whole}.get(name, self.data)
        data = b"split,path,problem\ntrain,train/0_0.png,unreadable\n"
        data = data if name == "bad_images.csv" else (source / name).read_bytes()
        wide = ",".join(f"c{i}" for i in range(10**6)).encode()
        odd = [b"/etc/passwd", b"a\x1b[2Jb", b"\"a\nb\"", b"\xff\xfe", b"x" * 10**6, b" "][int(rng.integers(6))]
        kinds = [lambda: mutate(data, rng), lambda: mutate(data, rng), lambda: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"),
                 lambda: data.replace(b"\n", b"," + wide + b"\n", 1), lambda: data + wide + b"\n",
                 lambda: data.replace(b"\n", b"\n" + wide + b"\n", 1), lambda: data.decode().encode("utf-16"),
                 lambda: data.replace(b",", b",\"", 3), lambda: data.replace(b"_", b"\0", 1), lambda: data * 2,
                 lambda: data.replace(b"0_1", b"../" * int(rng.integers(1, 9)) + b"etc/passwd"),
                 lambda: data.replace(b"0_1", odd), lambda: data.replace(b"\n", b"\r"), lambda: data.replace(b",", b";"),
                 lambda: data.replace(b"0", b"1e999"), lambda: b"\n" * 10**6 + data, lambda: b"\"" + data]
        made = kinds[int(rng.integers(len(kinds)))]()
        train, test = dataset.read_train(self.data), dataset.read_test(self.data)
        file = folder / name
        file.write_bytes(made)
        if name == "train.csv":
            table = dataset.read_train(folder)
            dataset.encode(table["label"])
            dataset.load_folds(folder / "o", table, 2)
            self.name = folder.name  # from here on it is the images that are missing
            dataset.check_images(folder, table["path"])
        elif name == "sample_submission.csv":
            dataset.read_test(folder)
        elif name == "solution.csv":
            dataset.read_solution(folder, test["filename"])
        elif name == "folds.csv":
            fold = dataset.load_folds(folder, train)
            dataset.folds_by(folder)
            assert np.array_equal(fold, dataset.load_folds(self.whole, train)), "another fold came through"
        elif name == "bad_images.csv":
            dataset.bad_images(folder, "train")
        else:
            shutil.copy(self.whole / "expected.json", folder)
            dataset.read_pseudo(file, 0.5, ["=1+1", "bottle", "우유"])
            assert made == data, "a changed file came through"

    def labels(self, folder, rng):
        """Labels of any text come back as they are, and go to the classes."""
        labels = ["".join(rng.choice(LETTERS, int(rng.integers(1, 30)))) for _ in range(6)]
        labels += ["b" * int(10 ** rng.uniform(0, 5))]
        self.name = "train.csv"
        table = pd.DataFrame({"path": [f"{i}.png" for i in range(len(labels))], "label": labels})
        table.to_csv(folder / "train.csv", index=False)
        read = dataset.read_train(folder)["label"].tolist()
        classes, numbers = dataset.encode(read)
        assert read == labels and [classes[n] for n in numbers] == labels

    def npy(self, folder, rng):
        path = folder / "train.npy"
        self.name = path.name
        x = np.asarray(rng.normal(size=(30, 512)), np.float32)
        some = rng.random(x.shape) < 0.001
        made = [lambda: x[:7], lambda: x.astype(np.float64), lambda: x.astype(">f4"), lambda: np.asfortranarray(x),
                lambda: x[0], lambda: np.where(some, np.float32(np.nan), x), lambda: np.array([Code(self.canary)], object),
                lambda: x * np.float32(1e38), lambda: x[None], lambda: np.zeros((0, 512), np.float32), lambda: x]
        kind = int(rng.integers(len(made)))
        buffer = io.BytesIO()
        np.save(buffer, made[kind](), allow_pickle=True)
        data = buffer.getvalue()
        if kind == len(made) - 1:
            data = mutate(data, rng)
            if not rng.integers(3):
                buffer = io.BytesIO()
                np.savez(buffer, a=x)
                data = buffer.getvalue()
            elif not rng.integers(3):
                shapes = [b"(-3, 512)", b"(30, -51)", b"(9**99,1)", b"(3,)*9**9"]
                data = data.replace(b"(30, 512)", shapes[int(rng.integers(4))])
        path.write_bytes(data)
        array = load_npy(path, (30, None))
        self.name = "row"  # the search names the row of what is not finite
        topk(array, array, 3)

    def neighbours(self, folder, rng):
        self.name = "neighbours.npz"
        data = (self.whole / self.name).read_bytes()
        kind = int(rng.integers(4))
        if kind == 0:
            with open(folder / self.name, "wb") as file:
                np.savez(file, similarity=np.zeros((9, 5), np.float32), index=np.array([Code(self.canary)] * 9, object))
        elif kind == 1:
            with open(folder / self.name, "wb") as file:
                np.savez(file, similarity=np.zeros((9, 5), np.float32), index=np.full((9, 5), int(rng.integers(-99, 99))))
        else:
            (folder / self.name).write_bytes(mutate(data, rng))
        similarity, index = load_neighbours(folder, 9, 30)
        assert similarity.shape == index.shape and index.max() < 30

    def checkpoint(self, folder, rng):
        name = ["best.pt", "last.pt"][int(rng.integers(2))]
        self.name, source = name, self.whole / NET / "fold0"
        file, kind = folder / name, int(rng.integers(7))
        state = load_checkpoint(source / name)
        stamps = {key: state.get(key) for key in ("train", "held_out")}
        if kind == 0:
            torch.save({"model": Code(self.canary)}, file)
        elif kind == 1:
            file.write_bytes(pickle.dumps(Code(self.canary)))
        elif kind == 2:
            key = list(state)[int(rng.integers(len(state)))]
            state[key] = [None, 7, "x", [], {}, torch.zeros(2), float("nan")][int(rng.integers(7))]
            torch.save(state, file)
        elif kind == 3:
            model = state["model"]
            model[list(model)[int(rng.integers(len(model)))]] = torch.zeros(3)
            torch.save(state, file)
        elif kind == 4:
            torch.save([torch.zeros(3), {"a": state}][int(rng.integers(2))], file)
        else:
            file.write_bytes(mutate((source / name).read_bytes(), rng))
        if name == "best.pt":
            load_run(folder)
            load_weights(Model(NET, 3), NET, str(file))
        else:
            train.load_last(folder, stamps)

    def json(self, folder, rng):
        """args.json, extract.json, scores.json, expected.json of a job: mutated bytes, or a key of another type."""
        name = ["args.json", "extract.json"][int(rng.integers(2))]
        shutil.copytree(self.whole, folder / "o", ignore=shutil.ignore_patterns("fold[1-4]", "last.pt", "*.html"))
        self.name, file = name, folder / "o" / NET / "fold0" / name
        if rng.integers(2):
            file.write_bytes(mutate(file.read_bytes(), rng))
        else:
            value = load_json(file)
            for _ in range(int(rng.integers(1, 4))):
                key = list(value)[int(rng.integers(len(value)))]
                value[key] = [None, 7, -1, "x", [], {}, [[]], 1e999, True, "../../x"][int(rng.integers(10))]
            value = [value, value, [value], "x", None][int(rng.integers(5))]
            if isinstance(value, dict):
                save_json(file, value)
            else:
                file.write_text(json.dumps(value))
        train, test = dataset.read_train(self.data), dataset.read_test(self.data)
        is_finished(file.parent)
        self.name = NET  # the run is named, and what to do
        load_runs(folder / "o", [f"{NET}/fold0"], train, test)

    def search(self, folder, rng):
        """What an interrupted search left, damaged: the result is right all the same."""
        self.name = "state.json"
        x = np.asarray(rng.normal(size=(40, 16)), np.float32)
        right = topk(x, x, 3)
        topk(x, x, 3, store=Store(folder / "s", "key"))
        file = folder / "s" / ["state.json", "similarity.npy", "index.npy"][int(rng.integers(3))]
        file.write_bytes(mutate(file.read_bytes(), rng))
        again = topk(x, x, 3, store=Store(folder / "s", "key"))
        assert all(np.array_equal(a, b) for a, b in zip(again, right, strict=True))
