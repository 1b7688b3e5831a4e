"""What people look at and use: the report in a real browser, the labels of single photographs."""

import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import script

from dataset import read_image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def output(data, output, tmp_path):
    """The finished runs, labelled, in a folder of the test's own."""
    folder = shutil.copytree(output, tmp_path / "o")
    script("retrieve.py", "--input", data, "--output", folder)
    script("scripts/expect.py", "--input", data, "--output", folder)
    return folder


def test_a_photo_is_labelled_as_in_the_submission(data, output):
    table = pd.read_csv(output / "confidence.csv", dtype={"filename": str, "prediction": str})
    flags = ["--input", data, "--output", output]
    said = json.loads(script("scripts/classify.py", data / "test", *flags, "--json").stdout)
    by_name = {Path(row["photo"]).name: row for row in said}
    neighbours, paths = np.load(output / "neighbours.npz"), pd.read_csv(data / "train.csv")["path"]
    for i, row in table.iterrows():
        mine = by_name[row["filename"]]
        assert mine["label"] == row["prediction"] and mine["confidence"] == pytest.approx(row["confidence"], abs=2e-3)
        near = [n["path"] for n in mine["neighbours"]]
        assert len(near) == 5 and near[0] == paths[neighbours["index"][i, 0]]
    one = script("scripts/classify.py", data / "test" / "q00.jpg", *flags, "--k", 2).stdout.splitlines()
    assert len(one) == 3 and "confidence" in one[0]
    sheet = pd.read_csv(io.StringIO(script("scripts/classify.py", data / "test" / "q00.jpg", *flags, "--csv").stdout))
    assert sheet.columns[:5].tolist() == ["photo", "label", "confidence", "path1", "similarity1"] and len(sheet) == 1
    assert "no such.jpg" in script("scripts/classify.py", "no such.jpg", *flags, code=2).stderr
    (data / "empty").mkdir(exist_ok=True)
    assert "holds no image" in script("scripts/classify.py", data / "empty", *flags, code=2).stderr


def test_the_report_shows_what_the_files_hold(data, output, tmp_path):
    source = shutil.copytree(data, tmp_path / "d")
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


DRIVE = """<script>
const rows = () => document.querySelectorAll("#grid .query").length;
const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input")); return rows(); };
const all = rows(), one = set("file", "q00"), none = set("file", "nowhere");
set("file", "");
$("wrong").click();
document.title = JSON.stringify([all, one, none, rows(), document.querySelectorAll("svg").length]);
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_works_in_a_browser(data, output, tmp_path):
    script("scripts/report.py", "--input", data, "--output", output)
    table = pd.read_csv(output / "confidence.csv", dtype=str).merge(pd.read_csv(data / "solution.csv", dtype=str))
    page = tmp_path / "driven.html"
    page.write_text((output / "report.html").read_text().replace("</body>", DRIVE + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
               f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    assert json.loads(title) == [12, 1, 0, (table["prediction"] != table["label"]).sum(), 4]


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


def test_without_test_images_there_is_nothing_to_expect_or_report(data, output, tmp_path):
    source = shutil.copytree(data, tmp_path / "d")
    (source / "sample_submission.csv").unlink()
    for name in ("expect", "report"):
        assert "no test images" in script(f"scripts/{name}.py", "--input", source, "--output", output).stdout
    assert not (output / "expected.json").exists(), "an old expectation is no expectation"
