"""What people look at and use: the report in a real browser, the labels of single photographs."""

import io
import json
import shutil
from pathlib import Path

from utils import load_json, save_json

import numpy as np
import pandas as pd
import pytest
import report
from browser import CHROMIUM, Browser
from conftest import script

import dataset
from dataset import read_image, read_test, read_train


def test_a_photo_is_labelled_as_in_the_submission(data, labelled, tmp_path):
    output = shutil.copytree(labelled, tmp_path / "o")
    flags = ["--input", data, "--output", output]

    def check():
        table = pd.read_csv(output / "confidence.csv", dtype={"filename": str, "prediction": str})
        said = json.loads(script("scripts/classify.py", data / "test", *flags, "--json", "--batch-size", 5).stdout)
        by_name = {Path(row["photo"]).name: row for row in said}
        neighbours, paths = np.load(output / "neighbours.npz"), pd.read_csv(data / "train.csv")["path"]
        for i, row in table.iterrows():
            mine = by_name[row["filename"]]
            assert mine["label"] == row["prediction"] and mine["confidence"] == pytest.approx(row["confidence"], abs=2e-3)
            near = [n["path"] for n in mine["neighbours"]]
            assert len(near) == 5 and near[0] == paths[neighbours["index"][i, 0]]

    check()
    (data / "test" / "._q00.jpg").write_bytes(b"left by a Mac")
    check()
    (data / "test" / "._q00.jpg").unlink()
    script("extract.py", *flags, "--arch", "test_nfnet", "--test-size", 32, 48, "--workers", 1)
    script("retrieve.py", *flags)
    assert not (output / "confidence.csv").exists()  # it was of the former submission
    script("scripts/expect.py", *flags)
    check()  # runs that see a photograph at other sizes
    of_both, alone = (output / "expected.json").read_bytes(), ["--runs", "test_nfnet/fold1"]
    mine = json.loads(script("scripts/classify.py", data / "test", *flags, *alone, "--json").stdout)
    assert all(0 < row["confidence"] < 1 for row in mine)  # expected.json is of both: that of held-out images counts
    script("scripts/expect.py", *flags, *alone)
    mine = json.loads(script("scripts/classify.py", data / "test", *flags, *alone, "--json").stdout)
    expected = load_json(output / "expected.json")
    for wrong in ({"weights": [1, 2]}, {"kept": [0.5]}, {"offset": "none"}):
        save_json(output / "expected.json", expected | {"calibration": expected["calibration"] | wrong})
        assert "run it again" in script("scripts/classify.py", data / "test", *flags, *alone, code=2).stderr
    theirs = pd.read_csv(output / "confidence.csv").set_index("filename")["confidence"]
    assert all(row["confidence"] == pytest.approx(theirs[Path(row["photo"]).name], abs=2e-3) for row in mine)
    (output / "expected.json").write_bytes(of_both)
    one = script("scripts/classify.py", data / "test" / "q00.jpg", *flags, "--k", 2).stdout.splitlines()
    assert len(one) == 3 and "confidence" in one[0]
    sheet = pd.read_csv(io.StringIO(script("scripts/classify.py", data / "test" / "q00.jpg", *flags, "--csv").stdout))
    assert sheet.columns[:5].tolist() == ["photo", "label", "confidence", "path1", "similarity1"] and len(sheet) == 1
    assert "no such.jpg" in script("scripts/classify.py", "no such.jpg", *flags, code=2).stderr
    (tmp_path / "cut.jpg").write_bytes((data / "test" / "q00.jpg").read_bytes()[:40])
    assert "leave them out" in script("scripts/classify.py", data / "test", tmp_path / "cut.jpg", *flags, code=2).stderr
    (data / "empty").mkdir(exist_ok=True)
    assert "holds no image" in script("scripts/classify.py", data / "empty", *flags, code=2).stderr


def test_the_report_shows_what_the_files_hold(data, labelled, tmp_path):
    source, output = shutil.copytree(data, tmp_path / "d"), shutil.copytree(labelled, tmp_path / "o")
    flags = ["--input", source, "--output", output]

    def page():
        script("scripts/report.py", *flags)
        text = (output / "report.html").read_text()
        assert text.count("</script>") == 2 and "https://" not in text.replace("http://www.w3.org/2000/svg", "")
        return json.loads(text.split('type="application/json">')[1].split("</script>")[0])

    first = page()
    table = pd.read_csv(output / "confidence.csv", dtype={"filename": str, "prediction": str}).set_index("filename")
    truth = pd.read_csv(source / "solution.csv", dtype=str).set_index("filename")["label"]
    assert {q["file"] for q in first["queries"]} == set(table.index) and len(first["runs"]) == 2
    for q in first["queries"]:
        assert (q["label"], q["truth"]) == (table["prediction"][q["file"]], truth[q["file"]]) and len(q["near"]) == 5
        assert q["confidence"] == table["confidence"][q["file"]] and q["thumb"].startswith("data:image/jpeg;base64,")
        assert first["gallery"][q["near"][0][0]]["label"] == q["label"]
    assert sum(int(pair["says"].rsplit(" ", 1)[1]) for pair in first["confused"]) == (table["prediction"] != truth).sum()
    (source / "solution.csv").unlink()
    (output / "confidence.csv").unlink()
    assert all(q["truth"] is None for q in page()["queries"])
    script("extract.py", *flags, "--arch", "test_nfnet", "--test-size", 48, "--workers", 1)
    assert "run retrieve.py again" in script("scripts/report.py", *flags, code=2).stderr, "it would show former neighbours"


def test_the_surest_errors_are_shown():
    sure = np.linspace(0.5, 1, 40)
    table = pd.DataFrame({"confidence": sure, "similarity": 0.9, "prediction": "a", "truth": ["a", "b"] * 20})
    assert {39, 37, 35} <= set(report.choose(table, 12, 0)) and {0, 1, 2} <= set(report.choose(table, 12, 0))
    assert {39, 1} <= set(report.choose(table.assign(confidence=np.nan, similarity=sure[::-1]), 4, 0)), "by similarity, then"


HOSTILE = '</script><img src=x onerror="window.hit = 1">\'"&amp;', "\"'><img src=x onerror=window.hit=1>.jpg"  # label, file


def renamed(data, output, tmp_path):
    """The data set and its finished runs with a label and a test image of hostile names."""
    source, output = shutil.copytree(data, tmp_path / "d"), shutil.copytree(output, tmp_path / "renamed")
    for folder, name in [(source, "train"), (source, "sample_submission"), (source, "solution"), (output, "folds")]:
        table = pd.read_csv(folder / f"{name}.csv", dtype=str)
        table = table.replace({"tube": HOSTILE[0], "q00.jpg": HOSTILE[1]})
        table.drop(columns="check", errors="ignore").to_csv(folder / f"{name}.csv", index=False)
    (source / "test" / "q00.jpg").rename(source / "test" / HOSTILE[1])
    for stamp in output.glob("*/*/extract.json"):
        mine = {"train": dataset.train_fingerprint(read_train(source)), "test": dataset.test_fingerprint(read_test(source))}
        save_json(stamp, load_json(stamp) | mine | {"held_out": None})
    for name in ("retrieve", "scripts/expect", "scripts/report"):
        script(f"{name}.py", "--input", source, "--output", output)
    return source, output


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_works_in_a_browser(data, output, tmp_path):
    source, output = renamed(data, output, tmp_path)
    table = pd.read_csv(output / "confidence.csv", dtype=str).merge(pd.read_csv(source / "solution.csv", dtype=str))
    table["confidence"] = table["confidence"].astype(float)
    right = table["prediction"] == table["label"]
    with Browser(tmp_path / "profile") as browser:
        browser.open((output / "report.html").as_uri())

        def files(**controls):
            """File names in the grid, in order, after these controls were set."""
            for name, value in controls.items():
                browser.run(f"$('{name}').value = {json.dumps(value)}; $('{name}').dispatchEvent(new Event('input'))")
            return browser.run("[...document.querySelectorAll('#grid .head figcaption')].map(f => f.textContent)")

        def confidence(names):
            return table.set_index("filename").loc[names, "confidence"].tolist()

        assert sorted(files()) == sorted(table["filename"]) and confidence(files()) == sorted(table["confidence"])
        assert files(order="file") == sorted(table["filename"])
        wrong_first = files(order="wrong")
        assert set(wrong_first[:(~right).sum()]) == set(table["filename"][~right])
        assert confidence(wrong_first[:(~right).sum()]) == sorted(table["confidence"][~right], reverse=True)
        assert files(file="ONERROR") == [HOSTILE[1]] and files(file="nowhere") == []
        named = (table["prediction"] == HOSTILE[0]) | (table["label"] == HOSTILE[0])
        assert set(files(file="", label=HOSTILE[0])) == set(table["filename"][named]) and named.any()
        browser.run("$('file').focus()")
        browser.call("Input.insertText", text="q1")
        assert set(files()) == {name for name in table["filename"][named] if "q1" in name}, "typed"
        files(label="", file="")
        browser.run("$('wrong').focus()")
        browser.key(" ")
        assert set(files()) == set(table["filename"][~right]), "the space bar ticks the box"
        assert browser.run("document.querySelectorAll('svg').length") == 4
        runs = browser.run("[...document.querySelectorAll('#runs tbody tr')].map(r => [...r.cells].map(c => c.textContent))")
        log = pd.read_csv(output / "test_nfnet" / "fold1" / "log.csv")
        assert len(runs) == 2 and runs[1][0] == "test_nfnet/fold1" and float(runs[1][2]) == round(log["retrieval_acc"].max(), 4)
        for width, dark in ((360, True), (1100, False)):
            assert browser.size(width, dark=dark) == 0, "nothing sticks out to the side"
        assert not browser.errors and not browser.run("window.hit")


def test_the_onnx_model_embeds_as_extract_does(data, output):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run = output / "test_nfnet" / "fold1"
    said = script("scripts/export_onnx.py", "--run", "test_nfnet/fold1", "--input", data, "--output", output).stdout
    assert "model.onnx" in said and "at least" in said
    session = runtime.InferenceSession(str(run / "model.onnx"), providers=["CPUExecutionProvider"])
    names = pd.read_csv(data / "sample_submission.csv", dtype=str)["filename"]
    photos = np.stack([read_image(data / "test" / name) for name in names])
    found = session.run(None, {"images": photos})[0]
    stored = np.load(run / "test.npy")
    cosine = (found * stored).sum(1) / np.linalg.norm(stored, axis=1)
    assert found.shape == (12, 512) and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5) and cosine.min() > 0.9
    assert "has no embeddings" in script("scripts/export_onnx.py", "--run", "x/fold9", "--output", output, code=2).stderr


def test_without_test_images_there_is_nothing_to_expect_or_report(data, finished, tmp_path):
    source = shutil.copytree(data, tmp_path / "d")
    (finished / "expected.json").touch()
    (source / "sample_submission.csv").unlink()
    for name in ("expect", "report"):
        assert "no test images" in script(f"scripts/{name}.py", "--input", source, "--output", finished).stdout
    assert not (finished / "expected.json").exists(), "an old expectation is no expectation"
