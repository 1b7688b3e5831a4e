"""Try it in the browser: drop a photograph, or take one with the phone's camera, and see label, confidence, nearest training
images.

Reads  what scripts/classify.py reads, input/train.csv's images and scripts/app.html, the page's frame
Writes nothing (but what retrieve.py --reject keeps): a photograph stays in memory while it is labelled

    python scripts/app.py                                      then open http://127.0.0.1:8000
    python scripts/app.py --input input/demo --output output/demo --host 0.0.0.0          for phones in the same network
    curl --data-binary @photo.jpg http://127.0.0.1:8000/classify                          the same as JSON
"""

import html
import io
import ipaddress
import json
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import BoundedSemaphore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, pick_device, run, script_parser, within

import cv2
import numpy as np
from classify import classify, load, load_calibration
from expect import NEIGHBOURS

from dataset import NoHeic, count_pixels, decode_image, encode, read_image
from retrieve import UNKNOWN, reject_flag, rejecter

MOST_BYTES, MOST_PIXELS = 32 * 2**20, 64 * 10**6  # of a photograph; the largest phones' by default take 12 MB, 50 megapixels
WAITING = 8  # photographs that may wait for their label at a time, each in memory
SIDE = 480  # pixels of a training image on the page
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF"]
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Content-Security-Policy":
           "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; script-src 'unsafe-inline'; "
           "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", metavar="ARCH/foldK", help="runs to join; default: every finished run")
    add("--k", type=within(f"[1, {NEIGHBOURS}]", int), default=5, help="training images shown (default 5)")
    reject_flag(parser)
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: everyone who reaches this machine may use the page "
        "and see the training images (default 127.0.0.1, this machine only)")
    add("--port", type=within("[0, 65535]", int), default=8000, help="0 = any free one (default 8000)")
    args = parser.parse_args()
    args.batch_size = 1
    return args


class Refused(Exception):
    """What a request gets instead of an answer: (HTTP status, sentence)."""


def decode(data):
    """Bytes of an uploaded image -> upright RGB uint8 [H, W, 3]. Its size is known from its header, before it takes memory."""
    try:
        pixels = count_pixels(io.BytesIO(data), "the photograph", FORMATS)
        if pixels <= MOST_PIXELS:
            return decode_image(np.frombuffer(data, np.uint8), "the photograph")
    except NoHeic as error:
        raise Refused(415, f"{error}.") from None
    except InputError:
        raise Refused(415, f"This is no image that can be read here ({', '.join(FORMATS)}).") from None
    raise Refused(413, f"The image has more than {MOST_PIXELS / 1e6:.0f} megapixels; make it smaller.")


class Labeller:
    """The loaded runs. One thread computes, whichever asks: the processor is shared and memory is bounded."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.runs, self.gallery, train, trained = load(args, device)
        self.classes, self.labels = encode(self.gallery["label"])
        self.calibration = load_calibration(args, train, trained, self.classes, device)
        self.rejects = rejecter(trained, self.runs, train, self.classes, self.labels, args, device)
        self.computing, self.reading = ThreadPoolExecutor(1), ThreadPoolExecutor(2)
        self.computing.submit(self.label, np.zeros((64, 64, 3), np.uint8)).result()  # the first is slow, faults show now

    def label(self, photo):
        """The answer for an image uint8 [H, W, 3], ready for JSON."""
        start = time.time()
        number, confidence, similarity, index, near_by_fold = classify([photo], self.runs, self.labels, len(self.classes),
                                                                  self.calibration, self.args, self.device)
        strange = bool(self.rejects and self.rejects(near_by_fold)[0])
        near = [{"image": f"image/{j}", "path": self.gallery["path"].iloc[j], "label": self.classes[self.labels[j]],
                 "similarity": round(float(s), 4)} for s, j in zip(similarity[0], index[0], strict=True)]
        return {"label": UNKNOWN if strange else self.classes[number[0]],
                "confidence": None if confidence is None or strange else round(float(confidence[0]), 4),
                "neighbours": near, "seconds": round(time.time() - start, 3)}

    def answer(self, data):
        """label of an uploaded file's bytes; to be called by any thread."""
        return self.computing.submit(lambda: self.label(decode(data))).result()

    def training_image(self, row):
        """JPEG of at most SIDE pixels of a row of the gallery; to be called by any thread."""
        def read():
            image = read_image(Path(self.args.input) / self.gallery["path"].iloc[row])
            scale = min(1, SIDE / max(image.shape[:2]))
            height, width = (max(1, round(side * scale)) for side in image.shape[:2])
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
        return self.reading.submit(read).result()


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, /image/<row of the gallery> a training image; POST /classify, the body an image file, its label."""

    timeout = 30  # seconds that a connection may be silent

    def send(self, status, kind, body):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), **HEADERS}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def say(self, status, value):
        self.send(status, "application/json; charset=utf-8", json.dumps(value, ensure_ascii=False).encode())

    def respond(self, action):
        """Run action(path). What it refuses gets a sentence, and is read to its end, lest the sentence get lost on the way."""
        length = self.headers.get("Content-Length", "" if self.command == "POST" else "0")
        known = length.isascii() and length.isdecimal() and len(length) < 16 and "Transfer-Encoding" not in self.headers
        self.length = int(length) if known else None
        try:
            host = self.headers.get("Host", "").partition(":")[0]
            if self.server.only and host not in self.server.only:  # a foreign name for this machine: DNS rebinding
                raise Refused(403, f"This page is served for {', '.join(sorted(self.server.only))} only.")
            action(self.path.partition("?")[0])
        except Refused as error:
            self.say(error.args[0], {"error": error.args[1]})
            left = 16 * MOST_BYTES if self.length is None else min(self.length, 16 * MOST_BYTES)
            if self.length is None:
                self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (part := self.rfile.read(min(left, 2**20))):
                left -= len(part)

    def do_GET(self):
        self.respond(self.get)

    def do_POST(self):
        self.respond(self.post)

    def get(self, path):
        labeller, row = self.server.labeller, path.removeprefix("/image/")
        if path == "/":
            self.send(200, "text/html; charset=utf-8", self.server.page)
        elif path != row and row.isascii() and row.isdecimal() and len(row) < 10 and int(row) < len(labeller.labels):
            try:
                self.send(200, "image/jpeg", labeller.training_image(int(row)))
            except InputError as error:
                raise Refused(404, str(error)) from None
        else:
            raise Refused(404, "There is nothing here.")

    def post(self, path):
        if path != "/classify":
            raise Refused(404, "There is nothing here.")
        if self.length is None:
            raise Refused(411, "The request must say its length, and its body must be the image file.")
        if self.length > MOST_BYTES:
            raise Refused(413, f"The file has more than {MOST_BYTES / 2**20:.0f} MB; make it smaller.")
        if not self.server.waiting.acquire(timeout=self.timeout):
            raise Refused(503, "Many photographs are waiting for their label; try again in a moment.")
        try:
            self.say(200, self.server.labeller.answer(self.body()))
        finally:
            self.server.waiting.release()

    def body(self):
        """The bytes of the request, which others may wait for."""
        if self.headers.get("Expect", "").lower() == "100-continue":  # curl waits for it before more than 1 MB
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        data, until = bytearray(), time.monotonic() + 2 * self.timeout
        while self.length and (part := self.rfile.read1(min(self.length, 2**16))):
            data += part
            self.length -= len(part)
            if time.monotonic() > until:
                raise Refused(408, "The photograph took too long to arrive; try again.")
        return data


class Server(ThreadingHTTPServer):
    def __init__(self, args, labeller):
        super().__init__((args.host, args.port), Handler)
        self.labeller, self.waiting = labeller, BoundedSemaphore(WAITING)
        local = ipaddress.ip_address(self.server_address[0]).is_loopback
        self.only = {"localhost", "127.0.0.1", args.host} if local else None
        about = (f"{len(labeller.classes)} labels, {len(labeller.labels)} training images, {len(labeller.runs)} "
                 f"run{'s' * (len(labeller.runs) > 1)}")
        page = (Path(__file__).parent / "app.html").read_text(encoding="utf-8")
        self.page = page.replace("ABOUT", html.escape(about)).replace("MOST_BYTES", str(MOST_BYTES)).encode()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a browser that left before its answer
            super().handle_error(request, client_address)


def main():
    args = parse_args()
    labeller = Labeller(args, pick_device(args.device))
    try:
        server = Server(args, labeller)
    except OSError as error:
        raise InputError(f"--host {args.host} --port {args.port}: {error.strerror}; choose another") from None
    with server:
        print(f"http://{args.host}:{server.server_port}   Ctrl-C ends it", flush=True)
        if server.only is None:
            print("anyone who reaches this machine may use the page and see the training images", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    run(main)
