"""The gallery in other engines: what comes back by query, the measured recall, whole-or-absent output."""

import json
import shutil
import sys
from importlib.util import find_spec

from utils import InputError

import export_index
import numpy as np
import pandas as pd
import pytest
from conftest import script

from search import Joined, topk


def clusters(rows=600, n=50, width=64, classes=12):
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(classes, width))
    number = rng.integers(0, classes, rows + n)
    x = (centre[number] + 0.5 * rng.normal(size=(rows + n, width))).astype(np.float32)
    table = pd.DataFrame({"path": [f"photo {i}.jpg" for i in range(rows)], "label": [f'"{c}", l' for c in number[:rows]]})
    return x[:rows], x[rows:], table


def test_an_exact_index_gives_the_exact_neighbours_with_paths_and_labels(data, output, finished):
    faiss = pytest.importorskip("faiss")
    said = script("scripts/export_index.py", "--engine", "flat", "--input", data, "--output", finished).stdout
    assert "| flat, exact | 1.0000 | 1.0000 |" in said
    folder = finished / "index" / "flat"
    rows = pd.read_csv(folder / "rows.csv", dtype=str)
    assert rows.equals(pd.read_csv(data / "train.csv", dtype=str)[["path", "label"]])
    record = json.loads((folder / "index.json").read_text())
    assert list(record["runs"]) == ["test_efficientnet/fold0", "test_nfnet/fold1"] and record["dimensions"] == 1024
    gallery, queries = (Joined([np.load(output / name / f"{split}.npy") for name in record["runs"]])
                        for split in ("train", "test"))
    similarity, index = topk(queries, gallery, 5)
    found = faiss.read_index(str(folder / "gallery.faiss")).search(queries[:].numpy(), 5)
    assert np.allclose(found[0], similarity, atol=1e-6) and (found[1] == index).mean() > 0.95, "ties may differ"


def test_the_index_is_of_the_grown_gallery(data, finished):
    pytest.importorskip("faiss")
    flags = ["--input", data, "--output", finished]
    script("scripts/add_products.py", "--remove", "bottle", *flags)
    script("scripts/export_index.py", "--engine", "flat", *flags)
    train = pd.read_csv(data / "train.csv", dtype=str)
    rows = pd.read_csv(finished / "index" / "flat" / "rows.csv", dtype=str)
    assert rows["path"].tolist() == train["path"][train["label"] != "bottle"].tolist()


def test_without_test_images_it_is_measured_on_training_images_less_themselves(data, finished, tmp_path):
    pytest.importorskip("faiss")
    shutil.copytree(data, tmp_path / "d")
    (tmp_path / "d" / "sample_submission.csv").unlink()
    said = script("scripts/export_index.py", "--engine", "hnsw", "--input", tmp_path / "d", "--output", finished,
                  "--runs", "test_nfnet/fold1", "--n", 20, "--k", 3).stdout
    assert "| 20 queries, 24 x 512 | recall@3 |" in said and "| hnsw, efSearch 1024 | 1.0000 | 1.0000 |" in said


@pytest.mark.parametrize("engine, least", [("ivfpq", 0.3), ("ivfpq-refined", 0.95), ("lancedb", 1)])
def test_codes_find_the_label_and_fields_come_back(engine, least, tmp_path):
    pytest.importorskip("lancedb" if engine == "lancedb" else "faiss")
    x, queries, table = clusters()
    with export_index.whole_folder(tmp_path / "index") as folder:
        record, printed = export_index.export(engine, folder, Joined([x]), table, Joined([queries]), None, 5, 0.9, "cpu")
    most = record["measured"][-1]  # LanceDB's is its exact search
    assert most["same_label"] > 0.95 and most["recall"] >= least, printed
    if engine != "lancedb":
        return
    import lancedb

    query = Joined([queries])[:1][0].numpy()
    ask = lancedb.connect(tmp_path / "index").open_table("gallery").search(query).limit(3).bypass_vector_index()
    said, index = ask.to_arrow().to_pylist(), topk(queries[:1], x, 3)[1][0]
    assert [row["path"] for row in said] == table["path"][index].tolist()
    assert [row["label"] for row in said] == table["label"][index].tolist()


def test_recall_counts_equal_similarities_and_not_what_is_missing():
    gallery = Joined([np.array([[1, 0], [1, 0], [0, 1], [1, 1]], np.float32)])
    queries = np.array([[1, 0], [0, 1]], np.float32)
    kth = np.array([1, 0.7071068], np.float32)  # the second nearest of each
    found = np.array([[1, 0], [2, -1]])
    assert export_index.recall(found, queries, gallery, kth) == 0.75
    assert export_index.recall(np.array([[0, 3], [1, 2]]), queries, gallery, kth) == 0.5
    assert export_index.leave_out(np.array([[4, 1, 2], [0, 5, 1]]), np.array([1, 9]), 2).tolist() == [[4, 2], [0, 5]]


def test_what_fails_leaves_nothing_and_what_was_there(data, finished, tmp_path, monkeypatch):
    flags = ["--input", data, "--output", finished]
    for engine, package in (("ivfpq", "faiss"), ("lancedb", "lancedb")):
        if find_spec(package):
            assert "256 images" in script("scripts/export_index.py", "--engine", engine, *flags, code=2).stderr
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "pip install faiss-cpu" in script("scripts/export_index.py", "--engine", "flat", *flags, code=2).stderr
    assert [p.name for p in (finished / "index").iterdir()] == [".lock"]
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "old").touch()
    with pytest.raises(InputError), export_index.whole_folder(tmp_path / "i") as folder:
        (folder / "new").touch()
        raise InputError("x")
    assert [p.name for p in (tmp_path / "i").iterdir()] == ["old"]
    with export_index.whole_folder(tmp_path / "i") as folder:
        (folder / "new").touch()
    assert [p.name for p in (tmp_path / "i").iterdir()] == ["new"] and not list(tmp_path.glob(".i.*"))
