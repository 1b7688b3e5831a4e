"""Draw a synthetic shop catalogue: studio photos to train on, photos taken "in the shop" to test on.

Reads nothing. A product is a family (form, palette, layout, brand) and a variant (flavour, volume); the variants of
some families differ in one detail only. Every picture has its own random generator, so the same arguments give the
same bytes whatever the number of workers. Writes into OUT:

    train.csv               path,label            train/*.jpg: plain light background, even light, every side
    sample_submission.csv   filename,prediction   test/*.jpg: clutter, colour cast, occlusion, blur, noise, glare
    solution.csv            filename,label        the answers for test/
    demo.json               the arguments; named so last of all, hence its presence means that the demo is complete

Examples:
    python scripts/make_demo.py input/demo
    python scripts/make_demo.py input/large --classes 1000 --train-per-class 48 --test-per-class 72 --size 256
"""

import argparse
import csv
import json
import os
import shutil
import sys
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from demo_art import INK, MOST_CLASSES, PAPER, catalogue, draw_product, draw_shapes, draw_text, hsv, mix, shade
from tqdm import tqdm

# How much harder the shop is than the studio: chances are per picture, (low, high) are ranges drawn from evenly.
SHOP_SCALE = (0.85, 1.15)  # height as a share of the studio height
SHOP_TURN = 0.12  # whole turns, standard deviation: shops turn the front to the customer
SHOP_ROLL = 7.0  # degrees, standard deviation of the in-plane rotation
SHOP_CLUTTER = 0.55  # contrast of the background, against the studio's light grey
SHOP_CAST = 0.07  # largest relative gain or loss of one colour channel
SHOP_EXPOSURE = (0.80, 1.15)  # gain
SHOP_GAMMA = (0.85, 1.20)
SHOP_UNEVEN = 0.20  # strength of the large soft shadows and lamps
SHOP_GLARE = 0.30  # chance of a specular patch on the product
SHOP_OCCLUDED = 0.4  # chance of a hand, a price tag or a neighbour in front
SHOP_BLUR = (0.0, 0.005)  # radius as a share of the picture size; half of it is defocus, half motion
SHOP_NOISE = (1.0, 6.0)  # grey levels, standard deviation
SHOP_JPEG = (30, 80)  # quality
STUDIO_JPEG = 92

SCENES, PROPS = 24, 36  # distinct shop backgrounds and distinct products of other catalogues standing in them
TILTS = (0.02, 0.07, 0.12, 0.18, 0.25)  # sine of the camera's elevation: few, so that the geometry can be cached
DETAIL = 1.5  # texture pixels per picture pixel: sprites are drawn about twice as large as they are shown


def place(picture, sprite, foot, scale, roll, shadow, lean=0.5):
    """Put a sprite on the picture in place, standing at `foot`, with a soft shadow; returns its coverage."""
    h, w = picture.shape[:2]
    stand = np.array([.5, .97]) * sprite.shape[1::-1]
    turn = cv2.getRotationMatrix2D(stand, roll, scale)
    turn[:, 2] += foot - stand
    shown = cv2.warpAffine(sprite, turn, (w, h))
    cover = shown[..., 3].astype(np.float32) / 255
    small = cv2.resize(cover, (w // 4, h // 4), interpolation=cv2.INTER_AREA)
    lying = np.array([[1.04, -lean, lean * foot[1] / 4 - .01 * foot[0]], [0, .22, .195 * foot[1]]])
    soft = cv2.GaussianBlur(cv2.warpAffine(small, lying, (w // 4, h // 4)), (0, 0), w / 160)
    soft = cv2.resize(soft + .35 * cv2.GaussianBlur(small, (0, 0), w / 60), (w, h))
    ground = shade(picture, 1 - shadow * np.clip(soft, 0, 1))
    picture[:] = cv2.blendLinear(cv2.cvtColor(shown, cv2.COLOR_RGBA2RGB), ground, cover, 1 - cover)
    return cover


@lru_cache(maxsize=2)
def noise_field(size):
    """Unit noise twice as large as a picture: a random crop of it costs less than new noise."""
    return np.random.default_rng(size).standard_normal((2 * size, 2 * size, 3), np.float32)


def add_noise(rng, picture, level):
    """The picture with noise of this many grey levels."""
    y, x = rng.integers(len(picture), size=2)
    return cv2.add(picture, level * noise_field(len(picture))[y:y + len(picture), x:x + len(picture)], dtype=cv2.CV_8U)


def studio_photo(rng, p, size):
    """One product on a plain light background in even light."""
    paper = np.array(hsv(rng.random(), rng.uniform(0, .05), rng.uniform(.92, 1)))
    level = np.linspace(.95, 1.02, size)[:, None] - .08 * rng.random() * np.linspace(-1, 1, size)[None] ** 2
    picture = np.clip(paper * level[..., None], 0, 255).astype(np.uint8)
    light = rng.uniform(-.6, .6), rng.uniform(.62, .78), rng.uniform(.4, 1)
    sprite = draw_product(p, rng.random(), TILTS[rng.integers(len(TILTS))], light, round(DETAIL * size))
    foot = np.array([.5, .9]) * size + rng.normal(0, .012 * size, 2)
    place(picture, sprite, foot, p.height / DETAIL * rng.uniform(.92, 1.1), rng.normal(0, 1), .35, -light[0])
    return add_noise(rng, picture, 1.2), STUDIO_JPEG


@lru_cache(maxsize=PROPS)
def prop(seed, index, size):
    """A product of another catalogue: its sprite and the scale at which it is shown."""
    p = catalogue(seed + 1_000_003, PROPS)[index]
    turn = np.random.default_rng([seed, 3, index]).normal(0, .05)
    return draw_product(p, turn, .07, (.3, .6, .6), round(DETAIL * size)), p.height / DETAIL


@lru_cache(maxsize=8)
def hand(index, size):
    """An RGBA sprite of four fingers that reach in from the left."""
    rng = np.random.default_rng([4, index])
    skin_tone = mix((240, 194, 162), (122, 80, 58), rng.random())
    image = np.full((size, size, 4), (*skin_tone, 0), np.uint8)
    tones = {"shade": (*mix(skin_tone, (70, 20, 10), .35), 255), "skin": (*skin_tone, 255),
             "nail": (*mix(skin_tone, PAPER, .4), 255)}
    for y, x in zip((.3, .47, .64, .8), rng.uniform((.62, .78, .72, .55), (.72, .88, .82, .65)), strict=True):
        finger = [("shade", 0, y + .015, x, .098, 3), ("skin", 0, y - .005, x - .02, .085, 3),
                  ("nail", x - .1, y + .02, .055, .042, 5)]
        draw_shapes(image, finger, 0, size, tones)
    return cv2.GaussianBlur(image, (0, 0), size / 150)


@lru_cache(maxsize=8)
def price_tag(index, size):
    """An RGBA sprite of a price tag."""
    rng = np.random.default_rng([5, index])
    colour, ink = (((255, 221, 40), INK), (PAPER, INK), ((226, 38, 44), PAPER))[index % 3]
    image = np.full((round(.6 * size), size, 4), (*colour, 255), np.uint8)
    draw_text(image, "SPECIAL PRICE", (.5 * size, .12 * size), (.8 * size, .07 * size), (*ink, 255))
    price = f"{rng.integers(1, 9)}.{rng.integers(10)}9"
    draw_text(image, price, (.5 * size, .38 * size), (.8 * size, .3 * size), (*ink, 255))
    return cv2.copyMakeBorder(image, 3, 3, 3, 3, cv2.BORDER_CONSTANT, value=(*mix(colour, INK, .3), 0))


@lru_cache(maxsize=SCENES)
def scene(seed, index, size):
    """A shop out of focus, 1.4 pictures wide and high, where things stand at 1.09 pictures from the top."""
    rng = np.random.default_rng([seed, 5, index])
    side, floor = round(1.4 * size), round(1.09 * size)
    picture = np.full((side, side, 3), hsv(rng.random(), rng.uniform(0, .25), rng.uniform(.25, .8)), np.uint8)
    shelves = [floor - round(1.02 * size), floor, side + .65 * size] if index % 3 < 2 else []
    if not shelves:  # a table in front of an aisle far away
        for _ in range(60):
            tones = {"spot": hsv(rng.random(), rng.uniform(.1, .7), rng.uniform(.2, 1))}
            centre, axes = rng.uniform(0, floor, 2) * (1.3, 1), rng.uniform(.03, .16, 2) * size
            draw_shapes(picture, [("spot", 0, 0, 1, 1, 0)], centre, axes, tones)
        picture = cv2.GaussianBlur(picture, (0, 0), .03 * size)
        picture[round(.98 * size):] = hsv(rng.uniform(.05, .12), rng.uniform(.1, .6), rng.uniform(.35, .9))
    board = hsv(rng.random(), rng.uniform(0, .3), rng.uniform(.5, .95))
    for foot in shelves:
        x, zoom = -.1 * size, rng.uniform(.8, 1.1)
        while x < 1.5 * size:
            sprite, scale = prop(seed, int(rng.integers(PROPS)), size)
            for _ in range(rng.integers(1, 4)):  # shops show several of a kind side by side
                place(picture, sprite, (x, foot - .02 * size), zoom * scale, 0, .5)
                x += sprite.shape[1] * zoom * scale + .03 * size
    for foot in shelves[:2]:
        rail = round(.1 * size)
        picture[foot:foot + rail] = board
        picture[foot:foot + max(1, size // 90)] = mix(board, PAPER, .6)
        picture[foot + rail:foot + rail + size // 30] //= 3
        for x in np.arange(rng.uniform(0, .2), 1.4, .33) * size:
            tones = {"tag": (PAPER, (255, 221, 40))[rng.integers(2)]}
            draw_shapes(picture, [("tag", [(0, .1), (2.2, .1), (2.2, .9), (0, .9)])], (x, foot), rail, tones)
            price = f"{rng.integers(1, 9)}.{rng.integers(10, 99)}"
            draw_text(picture, price, (x + 1.1 * rail, foot + .5 * rail), (1.8 * rail, .5 * rail), INK)
    grain = cv2.resize(noise_field(size)[:48, :6], (side, side), interpolation=cv2.INTER_CUBIC)
    picture = cv2.GaussianBlur(picture, (0, 0), size * rng.uniform(.006, .02)) + 6 * grain
    return np.uint8(np.clip(215 + SHOP_CLUTTER * (picture - 215), 0, 255))


def add_glare(rng, picture, cover, middle, height):
    """Lay a soft white patch over the product in place."""
    size = len(picture)
    lamp = np.zeros((size // 4, size // 4), np.uint8)
    spot, axes = (middle + rng.normal(0, .12 * height, 2)) / 4, rng.uniform((.02, .06), (.08, .25)) * height / 4
    draw_shapes(lamp, [("on", 0, 0, 1, 1, 0)], spot, axes, {"on": 255})
    lamp = cv2.resize(cv2.GaussianBlur(lamp, (0, 0), size / 90), (size, size)) * cover * rng.uniform(.4, .9)
    cv2.add(picture, cv2.merge([lamp] * 3), picture, dtype=cv2.CV_8U)


def add_obstacle(rng, picture, seed, foot, height):
    """Put a neighbour, a hand or a price tag in front of a part of the product, in place."""
    size, kind, edge = len(picture), rng.integers(3), rng.choice([-1, 1])
    if kind == 0:
        sprite, scale = prop(seed, int(rng.integers(PROPS)), size)
        shift = np.array([edge * rng.uniform(.3, .42), .04]) * size
    elif kind == 1:
        sprite, scale = hand(int(rng.integers(8)), size)[:, ::-edge], rng.uniform(.4, .6) * height / size
        shift = np.array([edge * rng.uniform(.34, .46), rng.uniform(-.5, 0)]) * height
    else:
        sprite, scale = price_tag(int(rng.integers(8)), size), rng.uniform(.3, .5) * height / size
        shift = np.array([edge * rng.uniform(.1, .3), rng.uniform(-.4, 0)]) * height
    place(picture, sprite, foot + shift, scale, rng.normal(0, 6), .25)


def develop(rng, picture):
    """Uneven coloured light, exposure, gamma, blur and noise: what the camera makes of the scene."""
    size = len(picture)
    gain = np.exp(rng.uniform(*np.log(SHOP_EXPOSURE))) * (1 + rng.uniform(-SHOP_CAST, SHOP_CAST, 3))
    curve = np.linspace(0, 1, 256)[:, None, None] ** rng.uniform(*SHOP_GAMMA) * gain * 255
    picture = cv2.LUT(picture, np.uint8(np.clip(curve, 0, 255)))
    lamps = rng.uniform(1 - SHOP_UNEVEN, 1 + SHOP_UNEVEN, (3, 3)).astype(np.float32)
    lamps = cv2.resize(lamps, (size, size), interpolation=cv2.INTER_CUBIC)
    picture = shade(picture, lamps)
    radius, angle = rng.uniform(*SHOP_BLUR) * size, rng.uniform(0, np.pi)
    if rng.random() < .5:
        picture = cv2.GaussianBlur(picture, (0, 0), max(.2, radius))
    else:
        reach = int(np.ceil(2 * radius))
        t = np.arange(-reach, reach + 1)
        path = np.zeros((len(t), len(t)), np.float32)
        path[reach + np.round(t * np.sin(angle)).astype(int), reach + np.round(t * np.cos(angle)).astype(int)] = 1
        picture = cv2.filter2D(picture, -1, path / path.sum())
    return add_noise(rng, picture, rng.uniform(*SHOP_NOISE))


def shop_photo(rng, p, size, seed):
    """One product in the shop, as hard as the constants at the top say."""
    y, x = (rng.uniform((.13, 0), (.27, .4)) * size).astype(int)
    picture = scene(seed, int(rng.integers(SCENES)), size)[y:y + size, x:x + size].copy()
    light = rng.uniform(-1, 1), rng.uniform(.4, .7), rng.uniform(.6, 1.6)
    sprite = draw_product(p, rng.normal(0, SHOP_TURN), TILTS[rng.integers(len(TILTS))], light, round(DETAIL * size))
    height = rng.uniform(*SHOP_SCALE) * p.height * size
    foot = np.array([rng.uniform(.36, .64) * size, min(1.11 * size - y, .97 * size)])
    roll, shadow = rng.normal(0, SHOP_ROLL), rng.uniform(.4, .8)
    cover = place(picture, sprite, foot, height / DETAIL / size, roll, shadow, -light[0])
    if rng.random() < SHOP_GLARE:
        add_glare(rng, picture, cover, foot - (0, height / 2), height)
    if rng.random() < SHOP_OCCLUDED:
        add_obstacle(rng, picture, seed, foot, height)
    return develop(rng, picture), int(rng.integers(*SHOP_JPEG))


def draw_class(task):
    """Draw and write all pictures of one product, so that its label art is drawn once; returns their number."""
    args, k, *names = task
    cv2.setNumThreads(0)  # the processes fill the cores already
    p = catalogue(args.seed, args.classes)[k]
    for split, folder in enumerate(("train", "test")):
        for i, name in enumerate(names[split]):
            rng = np.random.default_rng([args.seed, split, k, i])
            picture, quality = shop_photo(rng, p, args.size, args.seed) if split else studio_photo(rng, p, args.size)
            _, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
            (args.out / folder / name).write_bytes(data)
    return len(names[0]) + len(names[1])


def write_table(path, header, rows):
    """Write a CSV under a temporary name first, so that no half-written table is ever found."""
    part = path.with_suffix(".part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    part.replace(path)


def parse_arguments():
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the demo into")
    parser.add_argument("--classes", type=int, default=24, help=f"number of products, 2 to {MOST_CLASSES} (24)")
    parser.add_argument("--train-per-class", type=int, default=20, help="number of studio photos of each product (20)")
    parser.add_argument("--test-per-class", type=int, default=20, help="number of shop photos of each product (20)")
    parser.add_argument("--size", type=int, default=160, help="width and height in pixels, 32 or more (160)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random, 0 or more (0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="number of processes (one per core)")
    args = parser.parse_args()
    leasts = {"classes": 2, "train_per_class": 1, "test_per_class": 1, "size": 32, "seed": 0, "workers": 1}
    for name, least in leasts.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if args.classes > MOST_CLASSES:
        parser.error(f"--classes must be at most {MOST_CLASSES}")
    return args


def fail(message):
    """Say what the user can mend, in one line, and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    """Draw the demo, unless it is there already."""
    args = parse_arguments()
    out, done, begun = args.out, args.out / "demo.json", args.out / "demo.json.part"
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "workers")}
    if done.exists() and (out / "train.csv").exists():
        if done.read_text(errors="replace") != json.dumps(settings):
            fail(f"{out} holds a demo drawn with other arguments; name another folder or delete this one")
        print(f"{out}: already there")
        return
    foreign = any((out / name).exists() for name in ("train.csv", "train", "test")) and not begun.exists()
    if foreign or out.is_file():
        fail(f"{out} is there already and is not a demo; name another folder")
    for name in ("train", "test"):  # if they exist, a killed run left them
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    begun.write_text(json.dumps(settings))

    per_train, per_test = args.train_per_class, args.test_per_class
    order = np.random.default_rng([args.seed, 6]).permutation(args.classes * per_test)
    test = [[f"{n:06d}.jpg" for n in part] for part in order.reshape(args.classes, per_test)]
    train = [[f"{k:04d}_{i:03d}.jpg" for i in range(per_train)] for k in range(args.classes)]
    tasks = [(args, k, train[k], test[k]) for k in range(args.classes)]
    total = args.classes * (per_train + per_test)
    hide = None if os.environ.get("PROGRESS") != "1" else False  # as utils.progress; importing that would load torch
    with get_context("spawn").Pool(args.workers) as pool, tqdm(total=total, disable=hide) as progress:
        for count in pool.imap_unordered(draw_class, tasks):
            progress.update(count)

    labels = [p.label for p in catalogue(args.seed, args.classes)]
    answers = sorted((name, label) for names, label in zip(test, labels, strict=True) for name in names)
    photos = [(f"train/{name}", label) for names, label in zip(train, labels, strict=True) for name in names]
    write_table(out / "solution.csv", ("filename", "label"), answers)
    write_table(out / "sample_submission.csv", ("filename", "prediction"), [(name, labels[0]) for name, _ in answers])
    write_table(out / "train.csv", ("path", "label"), photos)
    begun.replace(done)
    print(f"{out}: {len(photos)} studio photos and {len(answers)} shop photos of {args.classes} products")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("interrupted; the same command draws it anew", file=sys.stderr)
        sys.exit(130)
