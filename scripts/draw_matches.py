"""A picture of the result: test images, each with its nearest training images; right ones framed green, wrong ones red.

Reads  input/{train.csv[,solution.csv]} and images, output/{neighbours.npz,submission.csv}
Writes output/matches.jpg

    python scripts/draw_matches.py
    python scripts/draw_matches.py --input input/demo --output output/demo --rows 6 --seed 3
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, atomic, run, script_parser, within

import cv2
import numpy as np

from dataset import load_train, read_csv, read_image, read_solution, resize
from retrieve import grow, load_neighbours

GREEN, RED, GREY, INK = (46, 160, 67), (207, 60, 50), (140, 140, 140), (40, 40, 40)


def parse_args():
    parser = script_parser(__doc__, device=False)
    add = parser.add_argument
    add("--rows", type="count", default=6, help="test images drawn (default 6)")
    add("--seed", type="seed", default=0, help="which test images (default 0)")
    add("--tile", type=within("[40, inf)", int), default=160, help="side of a picture in pixels (default 160)")
    return parser.parse_args()


def tile(path, side, frame):
    """The image as a square of `side` with a frame in the given colour."""
    picture = resize(read_image(path), side - 16, "pad")
    picture = cv2.copyMakeBorder(picture, 5, 5, 5, 5, cv2.BORDER_CONSTANT, value=frame)
    return cv2.copyMakeBorder(picture, 3, 3, 3, 3, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def caption(width, texts, step):
    """A strip of text, one text each `step` pixels."""
    strip = np.full((26, width, 3), 255, np.uint8)
    for i, text in enumerate(texts):
        cv2.putText(strip, text, (i * step + 6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.45, INK, 1, cv2.LINE_AA)
    return strip


def main():
    args = parse_args()
    source, output = Path(args.input), Path(args.output)
    gallery = grow([], output, load_train(args))[1]
    submission = read_csv(output / "submission.csv", ["filename", "prediction"])
    similarity, index = load_neighbours(output, len(submission), gallery.index.max() + 1)
    good = index[:, 0] >= 0  # the others are in bad_images.csv
    submission, similarity, index = submission[good].reset_index(drop=True), similarity[good], index[good]
    truth = read_solution(source, submission["filename"])
    rows = []
    for i in np.sort(np.random.default_rng(args.seed).permutation(len(submission))[:args.rows]):
        label = submission["prediction"][i] if truth is None else truth[i]
        frame = GREY if truth is None else GREEN if submission["prediction"][i] == label else RED
        tiles = [tile(source / "test" / submission["filename"][i], args.tile, frame)]
        near = [(source / gallery["path"][j], gallery["label"][j]) for j in index[i]]
        tiles += [tile(path, args.tile, GREEN if of == label else RED) for path, of in near]
        gap = np.full((args.tile, 24, 3), 255, np.uint8)
        rows.append(np.hstack([tiles[0], gap, *tiles[1:]]))
        rows.append(caption(rows[0].shape[1], ["", *(f"   similarity {s:.2f}" for s in similarity[i])], args.tile))
    heads = ["new photograph", *(f"   nearest {n + 1}" for n in range(index.shape[1]))]
    with atomic(output / "matches.jpg") as temporary:
        ok, data = cv2.imencode(".jpg", np.vstack([caption(rows[0].shape[1], heads, args.tile), *rows])[..., ::-1])
        if not ok:
            raise InputError("the picture is too large for a JPEG (65,500 pixels a side); fewer --rows, or a smaller --tile")
        data.tofile(temporary)
    print(output / "matches.jpg")


if __name__ == "__main__":
    run(main)
