"""The catalogue grown and shrunk without training: what is labelled then, that it can be undone, what is refused."""

import json
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import script


def stripes(seed, size=44):
    """A product that no training image shows: violet stripes."""
    image = np.random.default_rng(seed).integers(170, 255, (size, size, 3), dtype=np.uint8)
    image[:, seed % 4::8] = image[:, seed % 4 + 1::8] = (180, 20, 140)
    return image


@pytest.fixture
def new(tmp_path):
    """new.csv of four photographs of one new product; a fifth one, not in the CSV."""
    folder = tmp_path / "new"
    folder.mkdir()
    for i in range(5):
        cv2.imencode(".png", stripes(i))[1].tofile(folder / f"striped_{i}.png")
    table = pd.DataFrame({"path": [f"striped_{i}.png" for i in range(4)], "label": "näw, striped"})
    table.to_csv(folder / "new.csv", index=False)
    return folder


def results(flags, output):
    """What the scripts that label make of the output folder, as bytes or text."""
    script("retrieve.py", *flags)
    script("scripts/expect.py", *flags)
    files = [(output / name).read_bytes() for name in ("submission.csv", "neighbours.npz", "scores.json", "confidence.csv")]
    return [*files, script("scripts/classify.py", output.parent / "new" / "striped_4.png", *flags, "--json").stdout]


def test_a_new_product_is_found_and_its_removal_gives_back_the_former_result(data, finished, new):
    flags = ["--input", data, "--output", finished]
    before = results(flags, finished)
    assert json.loads(before[-1])[0]["label"] != "näw, striped"
    said = script("scripts/add_products.py", new / "new.csv", *flags).stdout
    assert "4 images added, 0 taken out; the gallery is now 28 images of 5 labels" in said
    assert not (finished / "neighbours.npz").exists(), "they would be those of another gallery"
    grown = results(flags, finished)
    row = json.loads(grown[-1])[0]
    assert row["label"] == "näw, striped" and row["neighbours"][0]["path"] == str(new / "striped_0.png")
    scores = [json.loads(result[2]) for result in (before, grown)]
    assert scores[0]["oof"]["nearest"] == scores[1]["oof"]["nearest"] and set(scores[1]["test"]) == {"nearest", "sum"}
    assert "use --vote sum" in script("retrieve.py", *flags, "--vote", "fusion", code=2).stderr, "no head fits five labels"
    script("scripts/report.py", *flags)
    script("scripts/draw_matches.py", *flags)
    assert "| all 2 runs | test |" in script("scripts/summary.py", *flags, "--ensemble-only").stdout

    said = script("scripts/add_products.py", "--remove", "näw, striped", *flags).stdout
    assert "0 images added, 4 taken out; the gallery is now 24 images of 4 labels" in said
    assert not (finished / "added.npz").exists() and results(flags, finished) == before


def test_new_images_of_a_known_product_keep_the_heads_and_name_their_rows(data, finished, tmp_path):
    """A test image joins the gallery under its true label, in the input folder: it is its own nearest image then."""
    source = shutil.copytree(data, tmp_path / "d")
    truth = pd.read_csv(source / "solution.csv", dtype=str)
    truth.head(1).set_axis(["path", "label"], axis=1).to_csv(source / "test" / "new.csv", index=False)
    flags = ["--input", source, "--output", finished]
    script("scripts/add_products.py", source / "test" / "new.csv", *flags)
    script("retrieve.py", *flags)
    assert "fusion" in json.loads((finished / "scores.json").read_text())["test"]
    with np.load(finished / "neighbours.npz") as file:
        assert file["index"][0, 0] == 24 and file["similarity"][0, 0] > 0.999, "counted on from train.csv's 24 rows"
    name = truth["filename"][0]
    row = json.loads(script("scripts/classify.py", source / "test" / name, *flags, "--json").stdout)[0]
    assert row["neighbours"][0]["path"] == f"test/{name}" and row["label"] == truth["label"][0]


def test_removed_products_are_never_said_and_rows_keep_their_numbers(data, finished, new):
    flags, train = ["--input", data, "--output", finished], pd.read_csv(data / "train.csv")
    script("scripts/add_products.py", "--remove", train["label"][0], *flags)
    script("retrieve.py", *flags)
    assert train["label"][0] not in set(pd.read_csv(finished / "submission.csv")["prediction"])
    index = np.load(finished / "neighbours.npz")["index"]
    assert index.min() >= 6 and index.max() < 24
    script("scripts/report.py", *flags)
    others = train["label"].unique()
    assert "no image of the gallery" in script("scripts/add_products.py", "--remove", others[0], *flags, code=2).stderr
    assert "fewer than two labels" in script("scripts/add_products.py", "--remove", *others[1:], *flags, code=2).stderr
    train[:6].to_csv(data / "again.csv", index=False)
    assert "6 images added" in script("scripts/add_products.py", data / "again.csv", *flags).stdout, "back by its images"


def test_duplicates_are_found_by_content(data, finished, new):
    flags, train = ["--input", data, "--output", finished], pd.read_csv(data / "train.csv")
    shutil.copy(data / train["path"][0], new / "copy.png")
    shutil.copy(new / "striped_0.png", new / "again.png")
    rows = pd.read_csv(new / "new.csv")
    more = pd.DataFrame({"path": ["copy.png", "again.png"], "label": [train["label"][0], "näw, striped"]})
    pd.concat([rows, more]).to_csv(new / "new.csv", index=False)
    assert "4 images added (2 were there already)" in script("scripts/add_products.py", new / "new.csv", *flags).stdout
    before = (finished / "added.npz").read_bytes()
    assert "nothing to do: all 6 images" in script("scripts/add_products.py", new / "new.csv", *flags).stdout
    for path, label, other in [("copy.png", "other", train["path"][0]), ("again.png", "other", "striped_0.png")]:
        pd.DataFrame({"path": [path], "label": [label]}).to_csv(new / "wrong.csv", index=False)
        refused = script("scripts/add_products.py", new / "wrong.csv", *flags, code=2).stderr
        assert f"row 2: '{path}' has the label 'other'" in refused and other in refused
    pd.DataFrame({"path": ["../o/x.png"], "label": ["x"]}).to_csv(new / "wrong.csv", index=False)
    assert "leaves its folder" in script("scripts/add_products.py", new / "wrong.csv", *flags, code=2).stderr
    pd.DataFrame({"path": ["gone.png"], "label": ["x"]}).to_csv(new / "wrong.csv", index=False)
    assert "gone.png: not there" in script("scripts/add_products.py", new / "wrong.csv", *flags, code=2).stderr
    assert (finished / "added.npz").read_bytes() == before
    cv2.imencode(".png", stripes(9))[1].tofile(new / "striped_0.png")
    assert "1 images added" in script("scripts/add_products.py", new / "new.csv", *flags).stdout
    added = np.load(finished / "added.npz")
    assert len(added["path"]) == 5, "the replaced photograph is gone, its copy has joined"


def test_an_addition_is_whole_or_not_at_all(data, finished, new, monkeypatch):
    """Stopped when it begins to embed, then before the rename."""
    flags = ["--input", data, "--output", finished]
    script("scripts/add_products.py", new / "new.csv", *flags)
    before = results(flags, finished), (finished / "added.npz").read_bytes()
    pd.DataFrame({"path": ["striped_4.png"], "label": ["more"]}).to_csv(new / "more.csv", index=False)

    def killed(*args):
        raise KeyboardInterrupt

    for place in ("extract.load_model", "pathlib.Path.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            script("scripts/add_products.py", new / "more.csv", *flags, code=130)
    assert (finished / "added.npz").read_bytes() == before[1] and not list(finished.glob(".added*"))
    assert results(flags, finished) == before[0]


def test_a_run_that_changed_since_is_refused_until_the_images_are_embedded_again(data, finished, new):
    flags = ["--input", data, "--output", finished]
    script("scripts/add_products.py", new / "new.csv", *flags)
    before = dict(np.load(finished / "added.npz"))
    script("extract.py", *flags, "--arch", "test_nfnet", "--gem-p", 2, "--workers", 1, "--precision", "fp32")
    refused = script("retrieve.py", *flags, code=2).stderr
    assert "added.npz does not come from test_nfnet/fold1 as it is now" in refused and "add_products.py" in refused
    script("retrieve.py", *flags, "--runs", "test_efficientnet/fold0")
    script("scripts/add_products.py", *flags)
    script("retrieve.py", *flags)
    after = np.load(finished / "added.npz")
    assert np.array_equal(before["embeddings"][0], after["embeddings"][0]) and after["stamps"][1] != before["stamps"][1]
    (finished / "added.npz").write_bytes(b"PK no zip")
    assert "added.npz is damaged" in script("retrieve.py", *flags, code=2).stderr
