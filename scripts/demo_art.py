"""What the products of the synthetic catalogue are and how one is drawn, for make_demo.py.

A product is a family (form, palette, layout, brand) and a variant (flavour, volume); the variants of some families
differ in one detail only. `catalogue` lists the products of a seed. `draw_product` draws one: its label is painted
flat, then wrapped around a body of revolution or laid on the faces of a box, turned, tilted and lit.
"""

import colorsys
from functools import lru_cache
from itertools import product as pairs

import cv2
import numpy as np

MOST_CLASSES = 2000  # the brand names suffice for this many
INK, PAPER, STEEL = (32, 30, 38), (252, 249, 240), (200, 204, 209)

# Bodies of revolution: (height from the top, radius, depth / width of the section), lengths in heights.
ROUND = {
    "can": [(0, .222, 1), (.02, .228, 1), (.06, .268, 1), (.94, .268, 1), (.985, .235, 1), (1, .22, 1)],
    "bottle": [(0, .064, 1), (.075, .064, 1), (.08, .053, 1), (.16, .058, 1), (.26, .082, 1), (.37, .147, 1),
               (.43, .166, 1), (.95, .166, 1), (1, .145, 1)],
    "jar": [(0, .29, 1), (.015, .305, 1), (.18, .305, 1), (.185, .27, 1), (.21, .28, 1), (.28, .325, 1),
            (.93, .325, 1), (1, .285, 1)],
    "tube": [(0, .235, 0), (.05, .235, .05), (.3, .222, .5), (.8, .18, 1), (.815, .14, 1), (.82, .135, 1), (1, .13, 1)],
}
# Where the cap ends, where the label begins and ends, in heights from the top.
ZONES = {"can": (.03, .06, .94), "bottle": (.077, .45, .87), "jar": (.182, .31, .88), "tube": (.05, .05, .8)}
FLAT = {"carton": (.40, .36), "box": (.62, .20), "pouch": (.68, 0)}  # width and depth in heights
FORMS = {  # height in pictures, gloss, kinds, volumes
    "can": (.72, .55, ("Juice", "Soda", "Iced Tea", "Cold Brew"), ("330 ml", "500 ml")),
    "carton": (.76, .1, ("Milk", "Juice", "Soy Drink", "Tea"), ("500 ml", "1 l")),
    "jar": (.60, .6, ("Jam", "Spread", "Yoghurt", "Compote"), ("250 g", "400 g")),
    "pouch": (.76, .3, ("Crisps", "Granola", "Candy", "Coffee"), ("90 g", "175 g")),
    "bottle": (.82, .65, ("Juice", "Lemonade", "Syrup", "Shampoo"), ("500 ml", "1 l")),
    "box": (.72, .1, ("Cookies", "Cereal", "Tea Bags", "Wafers"), ("200 g", "350 g")),
    "tube": (.80, .3, ("Hand Cream", "Toothpaste", "Lotion", "Balm"), ("75 ml", "120 ml")),
}
FLAVOURS = {  # name: (in Korean, colour, icon)
    "Cherry": ("체리", (165, 12, 60), "cherry"), "Lemon": ("레몬", (250, 222, 40), "citrus"),
    "Orange": ("오렌지", (246, 116, 14), "citrus"), "Lime": ("라임", (134, 194, 38), "citrus"),
    "Grape": ("포도", (128, 44, 146), "grape"), "Mint": ("민트", (54, 178, 140), "leaf"),
    "Apple": ("사과", (226, 56, 34), "apple"), "Peach": ("복숭아", (255, 172, 140), "apple"),
    "Coffee": ("커피", (84, 52, 34), "bean"), "Almond": ("아몬드", (178, 122, 74), "bean"),
    "Honey": ("꿀", (222, 168, 30), "comb"), "Vanilla": ("바닐라", (236, 214, 150), "flower"),
    "Hibiscus": ("히비스커스", (216, 36, 130), "flower"), "Coconut": ("코코넛", (112, 196, 230), "drop"),
    "Blueberry": ("블루베리", (72, 66, 158), "grape"), "Original": ("오리지널", (26, 104, 196), "drop"),
}
KOREAN = ["ha하", "na나", "bit빛", "sol솔", "dal달", "ma마", "ru루", "bom봄", "sae새", "byul별", "gang강", "mi미",
          "so소", "dam담", "no노", "eul을"]
STARTS = ["Al", "Bel", "Cor", "Del", "El", "Fin", "Gal", "Hel", "Il", "Jun", "Kal", "Lum", "Mar", "Nor", "Or", "Pal",
          "Quin", "Ros", "Sol", "Tar", "Ul", "Ver", "Win", "Zel"]
ENDS = ["pina", "mont", "dora", "vita", "kara", "lino", "sana", "bury", "tano", "mira", "fresh", "nova", "rella", "sti",
        "way"]
FONTS = (cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_TRIPLEX, cv2.FONT_HERSHEY_COMPLEX,
         cv2.FONT_HERSHEY_TRIPLEX | cv2.FONT_ITALIC)


def ring(tone, count, distance, rx, ry):
    """Ellipses around the origin, each pointing away from it."""
    return [(tone, distance * np.cos(a), distance * np.sin(a), rx, ry, np.degrees(a))
            for a in np.arange(count) * 2 * np.pi / count - np.pi / 2]


def bar(tone, top, bottom):
    """A band across the whole panel."""
    return tone, [(-9, top), (9, top), (9, bottom), (-9, bottom)]


# Shapes are (tone, polygon) or (tone, x, y, rx, ry, degrees), here within -1..1; a product says what its tones are.
TWIG = ("green", .38, -.78, .36, .15, -22)
ICONS = {
    "cherry": [("green", [(-.42, .3), (.12, -.95), (.2, -.95), (-.3, .3)]), TWIG,
               ("green", [(.4, .2), (.12, -.95), (.2, -.95), (.52, .2)]), ("flavour", -.4, .5, .42, .42, 0),
               ("flavour", .46, .4, .42, .42, 0), ("pale", -.54, .36, .1, .13, 30), ("pale", .32, .26, .1, .13, 30)],
    "citrus": [("flavour", 0, 0, .95, .95, 0), ("pale", 0, 0, .82, .82, 0), *ring("flavour", 8, .44, .31, .13)],
    "leaf": [("flavour", -.2, .1, .85, .36, -48), ("pale", -.2, .1, .8, .03, -48), ("green", .45, .4, .55, .22, -110)],
    "grape": [TWIG, *[("flavour", x / 2 - (2 - y) / 4, y * .42 - .35, .29, .29, 0)
                      for y in range(3) for x in range(3 - y)], ("pale", -.08, -.43, .07, .07, 0)],
    "apple": [("flavour", -.27, .15, .56, .72, 8), ("flavour", .27, .15, .56, .72, -8), TWIG,
              ("dark", [(-.05, -.4), (.02, -.98), (.1, -.96), (.06, -.4)]), ("pale", -.45, -.08, .11, .2, 25)],
    "bean": [("flavour", -.3, .2, .42, .72, 25), ("dark", -.3, .2, .05, .66, 25), ("flavour", .42, -.2, .4, .66, -20),
             ("dark", .42, -.2, .05, .6, -20)],
    "comb": [("flavour", [(x + .36 * np.cos(a), y + .36 * np.sin(a)) for a in np.arange(.5, 6) * np.pi / 3])
             for x, y in ((-.34, -.58), (.34, -.58), (-.68, 0), (0, 0), (.68, 0), (-.34, .58), (.34, .58))],
    "flower": [*ring("flavour", 6, .55, .42, .22), ("pale", 0, 0, .26, .26, 0), ("dark", 0, 0, .1, .1, 0)],
    "drop": [("flavour", [(0, -.98), (.56, .2), (-.56, .2)]), ("flavour", 0, .32, .6, .58, 0),
             ("pale", -.24, .4, .1, .24, 15)],
}
EMBLEMS = {
    "disc": [("second", 0, 0, 1, 1, 0), ("paper", 0, 0, .86, .86, 0), ("second", 0, 0, .78, .78, 0)],
    "diamond": [("paper", [(0, -1.15), (1.15, 0), (0, 1.15), (-1.15, 0)]),
                ("second", [(0, -1), (1, 0), (0, 1), (-1, 0)])],
    "sun": [*ring("second", 12, .85, .3, .1), ("second", 0, 0, .74, .74, 0)],
}
# Label layouts: shapes with x in half widths of the front and y in heights; brand and flavour as (y, height, ground);
# icon and emblem as (x, y, radius).
LAYOUTS = {
    "band": ([bar("paper", .455, .685), bar("flavour", .47, .67)],
             (.29, .17, "base"), (.57, .12, "flavour"), (0, .83, .42), (0, .11, .26)),
    "oval": ([("paper", 0, .6, .98, .27, 0), ("flavour", 0, .6, .92, .245, 0), ("paper", 0, .6, .66, .175, 0)],
             (.2, .18, "base"), (.93, .085, "base"), (0, .6, .42), (-.8, .4, .2)),
    "arch": ([("flavour", 0, 1.02, 1.7, .54, 0), ("paper", 0, 1.06, 1.5, .50, 0)],
             (.33, .18, "base"), (.92, .1, "paper"), (0, .71, .46), (0, .13, .27)),
    "sweep": ([("paper", [(-9, 2.57), (9, -1.4), (9, 9), (-9, 9)]),
               ("flavour", [(-9, 2.6), (9, -1.36), (9, 9), (-9, 9)])],
              (.24, .18, "base"), (.90, .1, "flavour"), (.3, .65, .48), (-.72, .46, .22)),
    "frame": ([("second", [(-1.08, .05), (1.08, .05), (1.08, .95), (-1.08, .95)]),
               ("paper", [(-1.02, .07), (1.02, .07), (1.02, .7), (-1.02, .7)]),
               ("flavour", [(-1.02, .7), (1.02, .7), (1.02, .93), (-1.02, .93)])],
              (.30, .15, "paper"), (.815, .12, "flavour"), (0, .535, .36), (0, .14, .17)),
    "header": ([bar("second", 0, .38), bar("paper", .375, .39), bar("flavour", .83, 1)],
               (.2, .18, "second"), (.915, .1, "flavour"), (0, .61, .5), (.8, .47, .2)),
}
PATTERNS = {  # where positive, the second tone tints the base; x and y in radians
    "plain": lambda x, y: np.full_like(x, -1), "stripes": lambda x, y: np.cos(x) - .2,
    "diagonal": lambda x, y: np.cos(x + y) - .1, "dots": lambda x, y: np.cos(x) * np.cos(y) - .5,
    "waves": lambda x, y: np.cos(1.3 * y + 1.3 * np.sin(x)) - .3, "checks": lambda x, y: np.cos(x / 2) * np.cos(y / 2),
    "zigzag": lambda x, y: np.cos(y + np.arccos(np.cos(x))) - .2,
    "rays": lambda x, y: np.cos(14 * np.arctan2(y - 9, x - x.mean())) - .1,
}


class Product:
    """What decides how one product looks; compared by identity, so that it can be the key of a cache."""

    def __init__(self, **traits):
        vars(self).update(traits)


def hsv(hue, saturation, value):
    """An RGB colour from hue, saturation and value in 0..1."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def mix(a, b, share):
    """The colour `share` of the way from a to b."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def ink_on(ground):
    """Dark or light, whichever reads better on this ground."""
    return INK if np.dot(ground, (.3, .59, .11)) > 150 else PAPER


@lru_cache(maxsize=4)
def catalogue(seed, classes):
    """The products of this seed: families of three to five variants."""
    rng = np.random.default_rng([seed, 2])
    latin = [(a + b, a + b) for a, b in pairs(STARTS, ENDS)]
    korean = [("".join(s[:-1] for s in w).title(), "".join(s[-1] for s in w)) for w in pairs(KOREAN, repeat=3)]
    names = [[group[i] for i in rng.permutation(len(group))] for group in (latin, korean)]
    products = []
    for family in range(classes):
        shown, written = names[family % 3 == 2].pop()
        form = list(FORMS)[family % len(FORMS)]
        height, gloss, kinds, volumes = FORMS[form]
        hue, style = rng.random(), rng.integers(4)
        base = (hsv(hue, .75, .85), hsv(hue, .8, .42), hsv(hue, .12, .97), hsv(hue, .45, .92))[style]
        second = hsv(hue + rng.choice([.08, .42, .5, .58]), .7, (.45, .8, .65, .5)[style])
        traits = {name: str(rng.choice(list(table))) for name, table in
                  (("kind", kinds), ("layout", LAYOUTS), ("pattern", PATTERNS), ("emblem", EMBLEMS))}
        traits |= {"form": form, "height": height, "gloss": gloss, "brand": shown, "period": rng.integers(3, 9),
                   "font": FONTS[rng.integers(len(FONTS))]}
        girth, cap, by_flavour = rng.uniform(.88, 1.12), rng.integers(4), rng.random() < .7
        detail = rng.choice(["all", "words", "volume"], p=[.8, .06, .14])  # what tells the variants apart
        flavours = rng.permutation(list(FLAVOURS))[:2 if detail == "volume" else rng.integers(3, 6)].tolist()
        for flavour, volume in pairs(flavours, volumes if detail == "volume" else volumes[:1]):
            _, colour, icon = FLAVOURS[flavours[0] if detail == "words" else flavour]
            tint = colour if by_flavour else second
            tones = {"base": base, "second": tint, "ground": mix(base, tint, .45), "paper": PAPER, "flavour": colour,
                     "dark": mix(colour, INK, .6), "pale": mix(colour, PAPER, .72), "green": (74, 140, 58), "ink": INK,
                     "cap": (PAPER, INK, tint, (214, 178, 92))[cap]}
            taste = flavour if shown == written else FLAVOURS[flavour][0]
            label = f"{written} {traits['kind']} {taste} {volume} {form}"
            products.append(Product(**traits, flavour=flavour, volume=volume, icon=icon, tones=tones, label=label,
                                    girth=girth * (1.07 if volume == volumes[1] else 1)))
        if len(products) >= classes:
            return products[:classes]


def shade(image, gain):
    """The picture times a gain of 0..2 per pixel, in bytes: mixing types would cost OpenCV fifty times as long."""
    return cv2.multiply(image, cv2.merge([np.uint8(np.clip(gain * 127.5, 0, 255))] * 3), scale=1 / 127.5)


def draw_shapes(image, shapes, centre, scale, tones):
    """Draw polygons and ellipses given in their own units, anti-aliased and to a 16th of a pixel."""
    for tone, *shape in shapes:
        if len(shape) == 1:
            cv2.fillPoly(image, [np.int32((np.array(shape[0]) * scale + centre) * 16)], tones[tone], cv2.LINE_AA, 4)
        else:
            middle = np.int32((np.array(shape[:2]) * scale + centre) * 16).tolist()
            axes = np.int32(np.array(shape[2:4]) * scale * 16).tolist()
            cv2.ellipse(image, middle, axes, shape[4], 0, 360, tones[tone], -1, cv2.LINE_AA, 4)


def draw_text(image, text, centre, box, colour, font=cv2.FONT_HERSHEY_DUPLEX):
    """Draw a line of text around a centre, as large as the box allows; in pixels."""
    (w, h), _ = cv2.getTextSize(text, font, 1, 1)
    size = min(box[0] / w, box[1] / h)
    origin = round(centre[0] - w * size / 2), round(centre[1] + h * size / 2)
    cv2.putText(image, text, origin, font, size, colour, max(1, round(size * h * .13)), cv2.LINE_AA)


def draw_front(p, width, height, half):
    """The front of a label; words and pictures keep within `half` pixels of its middle."""
    turn = 2 * np.pi * p.period / width
    x, y = np.meshgrid(np.arange(width) * turn, np.arange(height) * turn)
    share = np.clip(PATTERNS[p.pattern](x, y) / turn * .7 + .5, 0, 1)[..., None] * .5
    art = np.array(p.tones["base"]) * (1 - share) + np.array(p.tones["ground"]) * share
    art = np.clip(art * np.linspace(1.04, .88, height)[:, None, None], 0, 255).astype(np.uint8)
    shapes, brand, flavour, icon, emblem = LAYOUTS[p.layout]
    draw_shapes(art, shapes, (width / 2, 0), (half, height), p.tones)
    unit = min(half, .42 * height)
    badge = (.78 if icon[0] <= 0 else -.72, .745, .31)
    for shapes, (x, y, r) in ((ICONS[p.icon], icon), (EMBLEMS[p.emblem], emblem), (EMBLEMS["disc"], badge)):
        draw_shapes(art, shapes, (width / 2 + x * half, y * height), r * unit, p.tones)
    for text, (x, y, r) in ((p.brand[0], emblem), (p.volume, badge)):
        box = (1.4 * r * unit, .9 * r * unit)
        draw_text(art, text, (width / 2 + x * half, y * height), box, ink_on(p.tones["second"]))
    kind = (brand[0] + brand[1] / 2 + .035, .042, brand[2])
    for text, (y, tall, ground), wide, font in ((p.brand, brand, 1.9, p.font), (p.flavour, flavour, 1.8, FONTS[0]),
                                                (p.kind.upper(), kind, 1.2, FONTS[0])):
        draw_text(art, text, (width / 2, y * height), (wide * half, tall * height), ink_on(p.tones[ground]), font)
    return art


def draw_side(p, width, height):
    """The side of a label: brand, icon, flavour and a barcode."""
    art = np.full((height, width, 3), p.tones["base"], np.uint8)
    lines = np.random.default_rng(list(p.label.encode())).uniform(.2, .78, 20)
    code = [("ink", [(x, .75), (x + .015, .75), (x + .015, .89), (x, .89)]) for x in lines]
    sheet = ("paper", [(.1, .72), (.9, .72), (.9, .92), (.1, .92)])
    draw_shapes(art, [bar("flavour", .54, .67), sheet, *code], (0, 0), (width, height), p.tones)
    draw_shapes(art, ICONS[p.icon], (width / 2, .35 * height), min(.3 * width, .14 * height), p.tones)
    for text, y, ground in ((p.brand, .13, "base"), (p.flavour, .605, "flavour")):
        draw_text(art, text, (width / 2, y * height), (.8 * width, .08 * height), ink_on(p.tones[ground]), p.font)
    return art


@lru_cache(maxsize=48)
def skin(p, unit):
    """The unrolled surface of a round product, twice side by side so that any turn of it is one slice."""
    heights, radii, _ = np.array(ROUND[p.form]).T
    cap, top, bottom = np.round(np.array(ZONES[p.form]) * unit).astype(int)
    half = round(np.pi * np.interp(.6, heights, radii) * p.girth * unit)
    body = {"can": STEEL, "bottle": mix(p.tones["flavour"], INK, .25), "jar": p.tones["flavour"]}
    art = np.full((unit, 2 * half, 3), body.get(p.form, p.tones["base"]), float)
    art[top:bottom] = np.hstack([draw_front(p, half, bottom - top, .3 * half)] * 2)
    side = draw_side(p, round(.3 * half), round(.8 * (bottom - top)))
    y, x = top + (bottom - top) // 10, half - side.shape[1] // 2
    art[y:y + len(side), x:x + side.shape[1]] = side
    ribs = .9 + .1 * np.cos(np.arange(2 * half) * 2 * np.pi / max(4, unit // 60))[:, None]
    if p.form != "can":
        art[slice(round(.82 * unit), None) if p.form == "tube" else slice(cap)] = p.tones["cap"] * ribs
    slope = np.gradient(np.interp(np.arange(unit) / unit, heights, radii), 1 / unit)  # what faces up is lighter
    relief = 1 + .22 * np.clip(cv2.GaussianBlur(slope[:, None], (1, 9), 2), -1, 1)
    for seam in (cap, top, bottom):
        relief[seam:seam + max(1, unit // 250)] *= .8
    return np.tile(np.clip(art * relief[..., None], 0, 255).astype(np.uint8), (1, 2, 1))


@lru_cache(maxsize=48)
def unrolling(form, girth, tilt, unit):
    """For every pixel of a tilted round product: turn and depth on its skin, 0..255 across it, its coverage; centre."""
    h, r, flat = np.array(ROUND[form]).T
    h, r = h * unit, r * unit * girth
    rise = np.sqrt(1 - tilt ** 2)
    x = np.arange(-np.ceil(r.max()) - 3, np.ceil(r.max()) + 4)[None]
    y = np.arange(-np.ceil(tilt * r[0]) - 3, np.ceil(unit * rise + tilt * r[-1]) + 4)[:, None]
    depth = y / rise + 0 * x
    for _ in range(4):  # the depth below the rim and the radius there depend on each other: iterate
        radius = np.interp(depth, h, r)
        across = np.clip(x / radius, -1, 1)
        depth = (y - tilt * radius * np.interp(depth, h, flat) * np.sqrt(1 - across ** 2)) / rise
    cover = np.clip(radius - abs(x) + .5, 0, 1) * np.clip(unit - depth + .5, 0, 1) * np.clip(depth + .5, 0, 1)
    turn = (np.arcsin(across) / (2 * np.pi) + .25).astype(np.float32)
    return (turn, depth.astype(np.float32), np.uint8(127.5 * (across + 1)), np.uint8(255 * cover),
            (-float(x[0, 0]), -float(y[0, 0])))


def draw_round(p, turn, tilt, light, unit):
    """An RGBA sprite of a can, bottle, jar or tube; `turn` in whole turns, `light` as (side, ambient, gloss)."""
    art = skin(p, unit)
    u, v, across, cover, centre = unrolling(p.form, p.girth, tilt, unit)
    around = art.shape[1] // 2
    start = int(turn % 1 * around)
    seen = art[:, start:start + around // 2 + 2]
    image = cv2.remap(seen, u * around, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    side, ambient, gloss = light
    s = np.linspace(-1, 1, 256)
    gain = ambient + (1.12 - ambient) * np.clip(np.cos(np.arcsin(s) - side), 0, 1) - .25 * abs(s) ** 6
    shine = np.exp(-((s - .8 * np.sin(side)) / .1) ** 2) + .4 * np.exp(-((s + .72) / .05) ** 2)
    shine = np.uint8(np.clip(shine * gloss * p.gloss * 150, 0, 255))
    image = cv2.add(shade(image, gain.astype(np.float32)[across]), cv2.merge([shine[across]] * 3))
    _, radius, flat = ROUND[p.form][0]
    if flat:
        metal = STEEL if p.form == "can" else p.tones["cap"]
        tones = {"lid": mix(metal, PAPER, .15), "edge": mix(metal, INK, .3), "on": 255}
        lid = [("lid", 0, 0, 1, 1, 0), ("edge", 0, 0, .9, .9, 0), ("lid", 0, .05, .86, .86, 0)]
        pull = [("edge", 0, .35, .22, .34, 0), ("lid", 0, .3, .16, .24, 0), ("edge", 0, -.4, .3, .25, 0)]
        size = np.array((1, tilt)) * radius * p.girth * unit
        draw_shapes(image, lid + pull * (p.form == "can"), centre, size, tones)
        cover = cover.copy()
        draw_shapes(cover, [("on", 0, 0, 1, 1, 0)], centre, size, tones)
    return np.dstack([image, cover])


@lru_cache(maxsize=48)
def faces(p, unit):
    """The flat RGBA art of the front and the side of a carton, box or pouch."""
    wide, deep = (round(s * p.girth * unit) for s in FLAT[p.form])
    tall = round(.76 * unit) if p.form == "carton" else unit
    front = draw_front(p, wide, tall, .44 * wide)
    if p.form != "pouch":
        return [np.dstack([a, np.full(a.shape[:2], 255, np.uint8)]) for a in (front, draw_side(p, deep, tall))]
    creases = np.random.default_rng(list(p.brand.encode())).standard_normal((9, 6))
    creases = cv2.GaussianBlur(cv2.resize(creases, (wide, tall), interpolation=cv2.INTER_CUBIC), (0, 0), 4)
    v, u = np.mgrid[-1:1:tall * 1j, -1:1:wide * 1j]
    slope = (np.gradient(creases, axis=1) * .016 * (1 - .6 * u ** 2) + np.gradient(creases, axis=0) * .011) * unit
    seal = .97 + .07 * np.cos(v * unit * .55)
    gain = np.where(abs(v) > .9, seal, 1.04 - .35 * abs(u) ** 4 - .12 * u + slope)
    front = np.clip(front * gain[..., None] + 255 * np.clip(slope - .1, 0, .5)[..., None], 0, 255)
    cover = np.clip((.955 + .03 * abs(v) ** 3 + .012 * np.cos(7 * v + 2) - abs(u)) * wide / 2, 0, 1)
    return [np.uint8(np.dstack([front, 255 * cover]))] * 2


def solid(p):
    """The outer faces of a carton, box or pouch: corners clockwise from outside, and 0 front, 1 side or 2 plain."""
    w, d = (s * p.girth / 2 for s in FLAT[p.form])
    if p.form == "pouch":
        return [([(-w, 0, 0), (w, 0, 0), (w, 1, 0), (-w, 1, 0)], 0)]
    top = .24 if p.form == "carton" else 0
    base = [(-w, -d), (w, -d), (w, d), (-w, d)]
    walls = [([(a, top, b), (e, top, f), (e, 1, f), (a, 1, b)], k % 2)
             for k, ((a, b), (e, f)) in enumerate(zip(base, base[1:] + base[:1], strict=True))]
    if p.form == "box":
        return [*walls, ([(-w, 0, d), (w, 0, d), (w, 0, -d), (-w, 0, -d)], 2)]
    a, b, fin = (-w, .07, 0), (w, .07, 0), [(-w, 0, 0), (w, 0, 0), (w, .07, 0), (-w, .07, 0)]
    front, back = [(w, top, -d), (-w, top, -d)], [(-w, top, d), (w, top, d)]
    roof = [[a, b, *front], [b, a, *back], [b, back[1], front[0]], [a, front[1], back[0]], fin, fin[::-1]]
    return walls + [(corners, 2) for corners in roof]


def draw_flat(p, turn, tilt, light, unit):
    """An RGBA sprite of a carton, box or pouch, with perspective; `turn` in whole turns, `light` as in draw_round."""
    if p.form == "pouch":  # both sides look alike, and nobody looks at the edge
        turn = (turn * 2 % 1 - .5) / 3.2
    c, s, rise = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn), np.sqrt(1 - tilt ** 2)
    view = np.array([[1, 0, 0], [0, rise, -tilt], [0, tilt, rise]]) @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    size = round(1.4 * unit)
    image = np.zeros((size, size, 4), np.uint8)
    image[..., :3] = plain = mix(p.tones["base"], p.tones["second"], .5)
    lamp = np.array([np.sin(light[0]), -.55, -np.cos(light[0])])
    for corners, kind in solid(p):
        points = (np.array(corners) - (0, .5, 0)) @ view.T
        shown = np.float32(points[:, :2] * 3.4 / (3.4 + points[:, 2:]) * unit + size / 2)
        if cv2.contourArea(shown, oriented=True) <= 0:
            continue
        normal = np.cross(points[1] - points[0], points[2] - points[0])
        gain = light[1] + (1.08 - light[1]) * max(0, -normal @ lamp / np.linalg.norm(normal))
        if kind == 2:
            lit = (*np.clip(np.array(plain) * gain, 0, 255).tolist(), 255)
            draw_shapes(image, [("plain", shown)], 0, 1, {"plain": lit})
            continue
        art = faces(p, unit)[kind]
        h, w = art.shape[:2]
        x, y, *box = cv2.boundingRect(shown)
        warp = cv2.getPerspectiveTransform(np.float32([(0, 0), (w, 0), (w, h), (0, h)]), shown - np.float32((x, y)))
        face = cv2.warpPerspective(art, warp, box)
        lit = cv2.convertScaleAbs(face, alpha=gain)
        lit[..., 3] = face[..., 3]
        cv2.copyTo(lit, face[..., 3], image[y:y + box[1], x:x + box[0]])
    x, y, w, h = cv2.boundingRect(image[..., 3])
    return image[y - 4:y + h + 4, x - 4:x + w + 4]


def draw_product(p, turn, tilt, light, unit):
    """An RGBA sprite of a product about `unit` pixels high; the tilt is the sine of the camera's elevation."""
    return (draw_round if p.form in ROUND else draw_flat)(p, turn, tilt, light, unit)
