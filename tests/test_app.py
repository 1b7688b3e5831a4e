"""The page that labels a photograph: over plain HTTP, and driven in a real browser."""

import http.client
import io
import json
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import app
import cv2
import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import ROOT, TURNED_HEIC, script
from PIL import Image


@pytest.fixture(scope="module")
def server(data, labelled):
    """The app on the two tiny runs, listening."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["app.py", "--input", str(data), "--output", str(labelled), "--port", "0"])
        args = app.parse_args()
    with app.Server(args, app.Labeller(args, torch.device("cpu"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, method, path, body=None, **headers):
    """(status, kind, body) of a request; JSON comes as an object."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    kind, content = reply.headers["Content-Type"], reply.read()
    connection.close()
    return reply.status, kind, json.loads(content) if "json" in kind else content


def state(*folders):
    return {p: p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*")}


def test_a_photo_in_its_label_out(data, server):
    before, photo = state(data, ROOT / "scripts"), data / "test" / "q00.jpg"
    status, _, said = ask(server, "POST", "/classify", photo.read_bytes())
    expected = json.loads(script("scripts/classify.py", photo, "--input", data, "--output", server.labeller.args.output,
                                 "--json").stdout)[0]
    assert status == 200 and said["label"] == expected["label"] and 0 < said["confidence"] == expected["confidence"]
    assert len(said["neighbours"]) == 5
    for mine, theirs in zip(said["neighbours"], expected["neighbours"], strict=True):
        assert (mine["path"], mine["label"]) == (theirs["path"], theirs["label"])
        assert mine["similarity"] == pytest.approx(theirs["similarity"], abs=2e-4)
    status, kind, image = ask(server, "GET", "/" + said["neighbours"][0]["image"])
    shown = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
    original = cv2.imread(str(data / said["neighbours"][0]["path"]))
    assert (status, kind, shown.shape) == (200, "image/jpeg", original.shape)
    assert cv2.absdiff(cv2.blur(shown, (7, 7)), cv2.blur(original, (7, 7))).mean() < 4, "its noise is JPEG's prey"
    status, kind, page = ask(server, "GET", "/")
    assert status == 200 and "4 labels, 24 training images, 2 runs" in page.decode()
    assert state(data, ROOT / "scripts") == before, "nothing is written"


def test_a_phone_s_heic_gets_its_label(server, monkeypatch):
    pytest.importorskip("pi_heif")
    status, _, said = ask(server, "POST", "/classify", TURNED_HEIC)
    assert status == 200 and len(said["neighbours"]) == 5
    monkeypatch.setattr("app.MOST_PIXELS", 100)
    assert ask(server, "POST", "/classify", TURNED_HEIC)[0] == 413


def test_what_is_no_photo_is_refused_in_a_sentence(data, server, monkeypatch):
    photo = (data / "test" / "q00.jpg").read_bytes()
    for body in (b"", b"hello", b"\x89PNG\r\n\x1a\n", photo[:200]):
        status, _, said = ask(server, "POST", "/classify", body)
        assert status == 415 and "no image" in said["error"], body
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("POST", "/classify", iter([photo]), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    assert connection.getresponse().status == 411
    for number in ("-1", "1e9", "9" * 40, None):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.putrequest("POST", "/classify")
        if number:
            connection.putheader("Content-Length", number)
        connection.endheaders()
        assert connection.getresponse().status == 411
    with monkeypatch.context() as patch:
        patch.setattr(app, "MOST_BYTES", 2**20)
        status, _, said = ask(server, "POST", "/classify", bytes(9 * 2**20))
        assert status == 413 and "more than 1 MB" in said["error"], "the whole body is taken, so that the sentence arrives"
    with monkeypatch.context() as patch:
        patch.setattr(app, "MOST_PIXELS", 1000)
        status, _, said = ask(server, "POST", "/classify", photo)
        assert status == 413 and "megapixels" in said["error"]
    huge = io.BytesIO()
    Image.new("1", (9000, 9000)).save(huge, "PNG")
    status, _, said = ask(server, "POST", "/classify", huge.getvalue())
    assert status == 413 and "megapixels" in said["error"], "a small file that would unfold to a large image"
    assert ask(server, "POST", "/classify", photo)[0] == 200
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        head = f"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(photo)}\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(999).startswith(b"HTTP/1.1 100 "), "as curl does with large files"
        connection.sendall(photo)
        assert b" 200 " in connection.recv(999)


def test_no_path_leads_out(data, server):
    for path in ("/image/../../etc/passwd", "/image/%2e%2e/%2e%2e/etc/passwd", "/../app.py", "//etc/passwd", "/image/-1",
                 "/image/24", "/image/1.5", "/image/", "/image/0/../1", "/image/%B2", "/image/" + "9" * 5000, "/train.csv",
                 "/scripts/app.py", "/image/train/bottle_0.png"):
        status, _, said = ask(server, "GET", path)
        assert status == 404 and "error" in said, path
    assert ask(server, "GET", "/image/23?x=1")[0] == 200
    assert ask(server, "POST", "/elsewhere", b"x")[0] == 404 and ask(server, "PUT", "/")[0] == 501
    status, _, said = ask(server, "GET", "/", Host="evil.example")
    assert status == 403 and "evil" not in said["error"], "another name for this machine is another site's"
    assert ask(server, "GET", "/", Host=f"localhost:{server.server_port}")[0] == 200


def test_many_at_once_get_what_each_alone_gets(data, server):
    photos = [p.read_bytes() for p in sorted((data / "test").iterdir())[:app.WAITING]]

    def said(photo):
        status, _, answer = ask(server, "POST", "/classify", photo)
        return status, answer.get("label"), [n["path"] for n in answer.get("neighbours", [])]

    alone = [said(photo) for photo in photos]
    with ThreadPoolExecutor(len(photos)) as pool:
        assert list(pool.map(said, photos)) == alone and {a[0] for a in alone} == {200}
    for _ in range(app.WAITING):
        server.waiting.acquire()
    try:
        assert said(photos[0])[0] == 503
    finally:
        for _ in range(app.WAITING):
            server.waiting.release()


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_in_a_browser(data, server, tmp_path, monkeypatch):
    hostile = '</script><img src=x onerror="window.hit = 1">'
    monkeypatch.setattr(server.labeller, "classes", [hostile, *server.labeller.classes[1:]])
    photos = sorted((data / "test").glob("q0*.jpg"))
    answers = [ask(server, "POST", "/classify", p.read_bytes())[2] for p in photos]
    assert hostile in {a["label"] for a in answers} | {n["label"] for a in answers for n in a["neighbours"]}
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{server.server_port}/")
        browser.key("Tab")
        first = browser.run("document.activeElement.id")
        browser.key("Tab")
        assert (first, browser.run("document.activeElement.id")) == ("file", "camera"), "the keyboard reaches both buttons"
        browser.give("#file", *photos)
        browser.wait("$('status').textContent.includes('labelled')")
        browser.wait("[...document.images].every(image => image.complete)")
        shown = browser.run("""[...document.querySelectorAll("article")].map(a => [a.querySelector("h2").textContent,
            a.querySelector("meter").value,
            [...a.querySelectorAll("li")].map(item => [item.title, item.querySelector("b").textContent])])""")
        for (label, confidence, near), answer in zip(reversed(shown), answers, strict=True):
            assert (label, confidence) == (answer["label"], answer["confidence"])
            assert near == [[n["path"], f"{n['similarity']:.3f}"] for n in answer["neighbours"]]
        assert browser.run("[...document.images].every(image => image.naturalWidth > 0)") and not browser.run("window.hit")
        for width, dark in ((360, True), (1000, False)):
            assert browser.size(width, dark=dark) == 0, "nothing sticks out to the side"
            browser.picture(tmp_path / f"{width}.png")
        assert not browser.errors
        browser.give("#file", data / "train.csv", photos[0])
        browser.wait("$('status').className === 'bad'")
        assert "no image" in browser.run("$('status').textContent")
        assert browser.run("document.querySelectorAll('article').length") == len(photos) + 1, "the others are labelled"
