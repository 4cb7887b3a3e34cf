"""Draw labelled portrait faces: a data set that may be passed on, in the layout of CelebAMask-HQ.

Every picture is drawn from nothing by the code below (polygons and soft masks, supersampled): background, clothes,
neck, hair, head, shading, features, and whatever the 40 attributes of CelebA ask for. Geometric attributes come from
two ranges with a gap between them, so that a label is never a matter of taste.

Image ``index`` of ``seed`` is the same whatever the number of images or processes: it has a generator of its own, which
first draws the attributes, then the `Variation` (pose, light, colours, shape within the ranges), both free of the size
in pixels.

With ``--masks`` the classes of what is seen are written too, the 19 of CelebAMask-HQ (`data_loader.MASK_CLASSES`), as
palette pictures masks/0.png ... Left is the person's own left, as there. A beard is skin; lenses belong to the glasses,
eyes and brows behind them do not.

Rules for the names that are not drawn as such, or that depend on others:

* Attractive: Young, and none of Bags_Under_Eyes, Big_Nose, Chubby, Double_Chin.
* No_Beard: none of 5_o_Clock_Shadow, Goatee, Mustache. If none of these holds and No_Beard does not hold either, a
  full beard is drawn on cheeks and jaw. Only men have beards or sideburns.
* At most one of the four hair colours holds; with none of them the hair is red, or the head is bald. Straight and wavy
  hair exclude each other; with neither it is smooth and matt.
* Bald excludes every hair colour and cut, and a hat; hat, bangs and a receding hairline exclude one another; Chubby
  excludes Oval_Face; a necktie excludes a necklace.

::

    python procedural_faces.py --out DIR --count N --size S --seed K [--masks] [--overwrite]
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

from data_loader import ANNOTATION_FILE, ATTRIBUTES, IMAGE_FOLDER, MASK_CLASSES, MASK_FOLDER
from utils import InputError, option, parse, run_command, write_json, write_text

MARK = "procedural_faces.json"  # says that a folder's pictures were drawn here

HAIR_COLOURS = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")
BEARDS = ("5_o_Clock_Shadow", "Goatee", "Mustache")
UNATTRACTIVE = ("Bags_Under_Eyes", "Big_Nose", "Chubby", "Double_Chin")

# Colours, 0 to 255.
SKIN_TONES = ((228, 180, 146), (206, 152, 115), (176, 120, 84), (142, 94, 66))
PALE_SKIN = (252, 236, 228)
HAIR = {  # and the sheen of straight hair
    "Black_Hair": ((30, 26, 34), (104, 108, 140)),
    "Blond_Hair": ((236, 202, 112), (255, 248, 214)),
    "Brown_Hair": ((96, 54, 26), (178, 124, 78)),
    "Gray_Hair": ((178, 182, 190), (248, 250, 252)),
    "red": ((190, 66, 26), (254, 172, 112)),
    "bald": ((70, 50, 40), (70, 50, 40)),
}
BACKGROUNDS = ((120, 168, 190), (132, 178, 150), (170, 150, 196), (196, 178, 140), (150, 170, 214))
EYE_COLOURS = ((84, 52, 28), (52, 104, 158), (66, 122, 76), (108, 84, 44))
MEN_CLOTHES = ((44, 62, 100), (60, 66, 72), (48, 84, 76), (92, 52, 52))
WOMEN_CLOTHES = ((196, 84, 112), (120, 92, 176), (56, 150, 150), (214, 138, 60))
HATS = ((38, 96, 190), (26, 140, 92), (146, 40, 150), (214, 116, 20))
TIES = ((206, 24, 40), (30, 70, 200), (20, 150, 80), (230, 150, 10))
MAKEUP = ((40, 70, 235), (130, 40, 225), (20, 140, 230))
LIPSTICKS = ((208, 8, 44), (224, 10, 84), (176, 4, 30))
FRAMES = ((24, 22, 26), (96, 16, 24), (20, 34, 84))
BLACK, WHITE, INK = (0, 0, 0), (255, 255, 255), (34, 22, 22)
MASK_COLOURS = [value for k in range(len(MASK_CLASSES)) for value in (k * 67 % 256, k * 151 % 256, k * 211 % 256)]


# ---------------------------------------------------------------- what is drawn: attributes and variation


CHANCES = (  # of an attribute if another one holds, and if it does not
    ("Arched_Eyebrows", "Male", 0.14, 0.44),
    ("Big_Lips", "Male", 0.18, 0.32),
    ("Bushy_Eyebrows", "Male", 0.30, 0.12),
    ("Heavy_Makeup", "Male", 0.02, 0.42),
    ("High_Cheekbones", "Male", 0.20, 0.36),
    ("Rosy_Cheeks", "Male", 0.08, 0.28),
    ("Sideburns", "Male", 0.32, 0.0),
    ("Wearing_Earrings", "Male", 0.05, 0.38),
    ("Wearing_Necktie", "Male", 0.26, 0.03),
    ("Bags_Under_Eyes", "Young", 0.14, 0.40),
    ("Chubby", "Young", 0.10, 0.18),
    ("Eyeglasses", "Young", 0.14, 0.26),
    ("Double_Chin", "Chubby", 0.50, 0.08),
    ("Oval_Face", "Chubby", 0.0, 0.34),
    *((name, name, p, p) for name, p in {"Blurry": 0.06, "Mouth_Slightly_Open": 0.42, "Narrow_Eyes": 0.20,
      "Pale_Skin": 0.15, "Pointy_Nose": 0.30, "Smiling": 0.46}.items()),
)  # fmt: skip


def sample_attributes(rng: np.random.Generator) -> dict[str, bool]:
    """Draw the 40 attributes: correlated as in portraits, never contradictory (see the module's rules)."""
    chance = dict(zip(ATTRIBUTES, rng.random(len(ATTRIBUTES)), strict=True))
    a = dict.fromkeys(ATTRIBUTES, False)

    def decide(name: str, probability: float) -> bool:
        a[name] = bool(chance[name] < probability)
        return a[name]

    male, young = decide("Male", 0.48), decide("Young", 0.62)
    for name, other, if_so, if_not in CHANCES:
        decide(name, if_so if a[other] else if_not)
    decide("Big_Nose", (0.28 if male else 0.12) + (0.0 if young else 0.08))
    decide("Wearing_Lipstick", 0.02 if male else 0.75 if a["Heavy_Makeup"] else 0.36)
    decide("Wearing_Necklace", 0.0 if a["Wearing_Necktie"] else 0.06 if male else 0.30)

    if not decide("Bald", (0.12 if young else 0.24) if male else 0.03):
        if not decide("Wearing_Hat", 0.14) and not decide("Bangs", 0.16 if male else 0.36):
            decide("Receding_Hairline", (0.16 if young else 0.55) if male else (0.04 if young else 0.14))
        if not decide("Straight_Hair", 0.36):
            decide("Wavy_Hair", 0.45 if male else 0.68)
        upper = np.cumsum((0.31, 0.22, 0.29, 0.04) if young else (0.18, 0.12, 0.18, 0.42))
        for name in HAIR_COLOURS[int((chance["Black_Hair"] >= upper).sum()) :][:1]:
            a[name] = True

    a["No_Beard"] = not male or bool(chance["No_Beard"] < 0.22)
    if not a["No_Beard"] and chance["No_Beard"] > 0.38:  # between the two bounds: a full beard only
        if not any([decide(name, 0.42) for name in BEARDS]):
            a[BEARDS[int(chance["Goatee"] * 1e4) % 3]] = True
    a["Attractive"] = young and not any(a[name] for name in UNATTRACTIVE)
    return a


@dataclasses.dataclass(frozen=True)
class Variation:
    """What differs between two faces of equal attributes: values uniform in [0, 1], free of the image's size."""

    roll: float  # head tilt, 0.5 upright
    yaw: float  # turn of the head, 0.5 frontal
    scale: float
    shift_x: float
    shift_y: float
    light: float  # below 0.5: from the left
    skin: float
    width: float  # of the face, within the range its attributes give
    length: float
    eyes: float
    eye_colour: float
    brows: float
    nose: float
    mouth: float
    hair_length: float
    hair_volume: float
    hair_shade: float
    parting: float
    background: float
    background_tilt: float
    clothes: float
    accessory: float  # colour of hat, tie, make-up, glasses


def sample_variation(rng: np.random.Generator) -> Variation:
    """Draw a `Variation`."""
    return Variation(*rng.random(len(dataclasses.fields(Variation))).tolist())


# ---------------------------------------------------------------- colours and curves


def mix(one, other, t: float) -> tuple[int, int, int]:
    """The colour at ``t`` (0 to 1) of the way from one to the other."""
    return tuple(int(round(p + (q - p) * t)) for p, q in zip(one, other, strict=True))


def pick(colours, t: float):
    """One of the colours, by t in [0, 1]."""
    return colours[min(int(t * len(colours)), len(colours) - 1)]


def between(low: float, high: float, t: float) -> float:
    """The number at ``t`` (0 to 1) of the way from low to high."""
    return low + (high - low) * t


def spline(points, closed: bool = False, steps: int = 7) -> np.ndarray:
    """A Catmull-Rom curve through the points, (n, 2) to (m, 2)."""
    p = np.asarray(points, float)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    windows = np.stack([p[i : len(p) - 3 + i] for i in range(4)], 1)  # (segments, 4, 2)
    t = np.linspace(0, 1, steps, endpoint=False)
    weights = np.stack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2], 1)
    curve = (0.5 * weights @ windows).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-2:-1]])


def resample(curve: np.ndarray, count: int) -> np.ndarray:
    """``count`` points at equal distances along the curve."""
    distance = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(curve, axis=0).T))])
    at = np.linspace(0, distance[-1], count)
    return np.stack([np.interp(at, distance, curve[:, i]) for i in (0, 1)], 1)


def normals(curve: np.ndarray) -> np.ndarray:
    """Unit vectors at right angles to the curve, on its left seen along it with v downwards."""
    tangent = np.empty_like(curve)
    tangent[1:-1] = curve[2:] - curve[:-2]
    tangent[0], tangent[-1] = curve[1] - curve[0], curve[-1] - curve[-2]
    x, y = tangent.T
    length = np.maximum(np.sqrt(x * x + y * y), 1e-9)
    return np.stack([y / length, -x / length], 1)


def ribbon(curve, width, ends: float = 0.25) -> np.ndarray:
    """The outline of a brush stroke along the curve, ``width`` in the middle and ``ends`` times that at both ends."""
    curve = np.asarray(curve, float)
    taper = 1 - np.linspace(-1, 1, len(curve))[:, None] ** 2
    side = 0.5 * width * (ends + (1 - ends) * taper) * normals(curve)
    return np.concatenate([curve + side, (curve - side)[::-1]])


def ellipse(x: float, y: float, rx: float, ry: float, count: int = 28) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return (x, y) + np.stack([np.cos(angle), np.sin(angle)], 1) * (rx, ry)


def mirror(points) -> np.ndarray:
    return np.asarray(points, float) * (-1, 1)


def both(*shapes) -> list[np.ndarray]:
    """Shapes of the right half, each with its mirror image."""
    return [side for shape in shapes for side in (np.asarray(shape, float), mirror(shape))]


def arch(right_half) -> np.ndarray:
    """A curve from the left end over the middle to the right end, given its right half from the middle outwards."""
    right_half = np.asarray(right_half, float)
    return spline(np.concatenate([mirror(right_half[:0:-1]), right_half]))


def loop(right_half) -> np.ndarray:
    """A closed symmetric curve, given its right half from top to bottom."""
    right_half = np.asarray(right_half, float)
    left_half = mirror(right_half)[::-1]
    return spline(np.concatenate([right_half, left_half[left_half[:, 0] != 0]]), closed=True)


def stroke(points, width: float, ends: float = 0.25) -> np.ndarray:
    """A `ribbon` along the smooth curve through the points."""
    return ribbon(spline(points), width, ends)


def scallop(curve: np.ndarray, depth: float, period: float) -> np.ndarray:
    """The curve with round bumps on its outer (left-hand) side."""
    length = np.hypot(*np.diff(curve, axis=0).T).sum()
    bumps = max(int(round(length / period)), 1)
    curve = resample(curve, 10 * bumps + 1)
    height = np.abs(np.sin(np.pi * bumps * np.linspace(0, 1, len(curve))))
    return curve + depth * height[:, None] * normals(curve)


# ---------------------------------------------------------------- the canvas


class Canvas:
    """A supersampled picture, and the classes of what it shows, drawn in the coordinates of the head or of the body.

    The head's coordinates have their origin between the eyes, u to the right and v down, in units of the picture's
    width; roll, scale and yaw are applied here. Yaw shifts a part by its depth: 0 for the middle of the head, 1 for the
    eyes, more for the nose. The body's have v of the picture, and u from the middle of the body, which does not roll.
    """

    def __init__(self, size: int, v: Variation):
        self.size = size
        # enough samples for smooth edges, fewer if the picture itself is fine enough
        self.pixels = size * (4 if size <= 96 else 3 if size <= 192 else 2)
        self.image = Image.new("RGB", (self.pixels, self.pixels))
        self.classes = Image.new("L", self.image.size)  # of what is seen, as numbers
        self.yaw = between(-0.026, 0.026, v.yaw)
        angle = np.deg2rad(between(-6, 6, v.roll))
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        self.turn = between(0.95, 1.05, v.scale) * turn
        self.origin = np.array([0.5 + between(-0.012, 0.012, v.shift_x), 0.455 + between(-0.012, 0.012, v.shift_y)])
        self.body = 0.5 * (0.5 + self.head([(0, 0.4)])[0, 0])  # its middle in the picture

    def head(self, points, depth: float = 0.0) -> np.ndarray:
        """Map points of the head, (n, 2), to the unit square."""
        return (np.asarray(points, float) + (self.yaw * depth, 0)) @ self.turn + self.origin

    def _in_pixels(self, shapes, depth: float | None) -> list[np.ndarray]:
        """Of one outline, or several: of the head at this depth, or of the body when depth is None."""
        shapes = shapes if isinstance(shapes, list) else [shapes]
        return [(s + (self.body, 0) if depth is None else self.head(s, depth)) * self.pixels for s in shapes]

    def fill(self, shapes, colour, depth: float | None = None, alpha: float = 1.0, blur: float = 0.0, clip=None,
             part: str | None = None) -> None:  # fmt: skip
        """Fill one outline, or several at once; of the head at this depth, or of the body when depth is None.

        ``alpha`` is the opacity, ``blur`` the standard deviation of a soft edge as a part of the picture's width,
        ``clip`` a mask outside which nothing is drawn (see `inside`), and ``part`` what the outlines show, by its name
        in `data_loader.MASK_CLASSES`, "_eye" for one of a pair, of which the right half of the picture shows the left.
        """
        shapes = self._in_pixels(shapes, depth)
        if part is not None:
            classes, middle = ImageDraw.Draw(self.classes), self.head([(0, 0)])[0, 0] * self.pixels
            for shape in shapes:
                side = ("l" if shape[:, 0].mean() > middle else "r") if part[0] == "_" else ""
                classes.polygon(shape.ravel().tolist(), fill=MASK_CLASSES.index(side + part))
        if alpha == 1 and not blur and clip is None:
            for shape in shapes:
                ImageDraw.Draw(self.image).polygon(shape.ravel().tolist(), fill=colour)
            return
        margin = 2.6 * blur * self.pixels + 1
        points = np.concatenate(shapes)
        low = np.clip(np.floor(points.min(0) - margin), 0, self.pixels).astype(int)
        high = np.clip(np.ceil(points.max(0) + margin), 0, self.pixels).astype(int)
        if (high <= low).any():
            return
        mask = Image.new("L", tuple((high - low).tolist()))
        for shape in shapes:
            ImageDraw.Draw(mask).polygon((shape - low).ravel().tolist(), fill=int(round(255 * alpha)))
        if blur:
            mask = mask.filter(ImageFilter.GaussianBlur(blur * self.pixels))
        box = (*low.tolist(), *high.tolist())
        self.image.paste(colour, box, mask if clip is None else ImageChops.multiply(mask, clip.crop(box)))

    def inside(self, outline, depth: float | None = None) -> Callable[..., None]:
        """`fill` at this depth, unless it is given another, that draws nothing outside the outline."""
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).polygon(self._in_pixels(outline, depth)[0].ravel().tolist(), fill=255)
        return functools.partial(self.fill, depth=depth, clip=mask)

    def finish(self, blurry: bool) -> tuple[Image.Image, Image.Image]:
        """The picture and its mask at their final size."""
        image = self.image.resize((self.size, self.size), Image.Resampling.BOX)
        mask = self.classes.resize(image.size, Image.Resampling.NEAREST)
        mask.putpalette(MASK_COLOURS)
        return image.filter(ImageFilter.GaussianBlur(1.15 * self.size / 64)) if blurry else image, mask


# ---------------------------------------------------------------- the plan of a face


TOP = -0.29  # v of the skull's highest point
MOUTH = 0.205
LONG_HAIR = 0.16  # hair that ends below this v falls in locks at the sides of the face
HEADS = {  # half the width at the eyes and at the mouth, from least to most, and at the chin; and the chin's v
    "Chubby": ((0.232, 0.240), (0.246, 0.256), 0.175, 0.305),
    "Oval_Face": ((0.178, 0.186), (0.126, 0.134), 0.070, 0.345),
    "neither": ((0.208, 0.216), (0.176, 0.186), 0.118, 0.292),
}


class Face:
    """Attributes and variation turned into lengths (head coordinates) and colours, from the ranges attributes give."""

    def __init__(self, a: dict[str, bool], v: Variation) -> None:
        self.a, self.v = a, v
        widths, jaws, chin_width, chin = HEADS[next((name for name in HEADS if a.get(name)), "neither")]
        self.width = width = between(*widths, v.width)
        self.jaw = jaw = between(*jaws, v.width) + (0.012 if a["Male"] else 0)
        self.chin_width = chin_width = chin_width + (0.022 if a["Male"] else 0)
        self.chin = chin = chin + between(-0.006, 0.006, v.length)
        skull = [(0, TOP), (0.60 * width, TOP + 0.034), (0.92 * width, -0.17), (width, -0.05), (0.99 * width, 0.06)]
        lower = [(jaw, 0.19), (chin_width, chin - 0.045), (0.5 * chin_width, chin - 0.008), (0, chin)]
        self.outline = arch(skull + lower)
        i, t = divmod(v.skin * (len(SKIN_TONES) - 1), 1)
        self.skin = PALE_SKIN if a["Pale_Skin"] else mix(SKIN_TONES[int(i)], SKIN_TONES[int(i) + 1], t)
        self.shadow, self.light = mix(self.skin, (96, 40, 40), 0.42), mix(self.skin, (255, 246, 226), 0.5)
        self.lit_side = -1 if v.light < 0.5 else 1  # left, right
        name = next((name for name in HAIR_COLOURS if a[name]), "bald" if a["Bald"] else "red")
        colour, self.streak = HAIR[name]
        self.hair = hair = mix(colour, BLACK if v.hair_shade < 0.5 else WHITE, 0.10 * abs(2 * v.hair_shade - 1))
        self.hair_dark, self.hair_light = mix(hair, BLACK, 0.42), mix(hair, (255, 250, 235), 0.30)
        self.beard = mix(hair, BLACK, 0.25)
        self.beard_light = mix(self.beard, WHITE, 0.25)
        short = v.hair_length < (0.88 if a["Male"] else 0.14)
        end = 0.03 if short else 0.24 if v.hair_length < 0.42 else between(0.38, 0.46, v.hair_length)
        # v where the hair ends at the sides; below a hat none would show else
        self.hair_end = max(end, 0.20) if a["Wearing_Hat"] else end
        self.volume = between(0.0, 0.014, v.hair_volume) + (0.012 if a["Wavy_Hair"] else 0)

    def edge(self, *heights: float, beyond: float = 0.0) -> np.ndarray:
        """Points (n, 2) of the head's right edge at heights v, or to the right of it."""
        right = self.outline[self.outline[:, 0] >= 0]
        right = right[np.argsort(right[:, 1])]
        return np.stack([np.interp(heights, right[:, 1], right[:, 0]) + beyond, heights], 1)


# ---------------------------------------------------------------- what is drawn, from back to front


def draw_background(c: Canvas, f: Face) -> None:
    """A soft gradient of one colour, darker towards the corners."""
    base = mix(pick(BACKGROUNDS, f.v.background), WHITE, 0.15)
    y, x = np.mgrid[0:24, 0:24] / 23.0 - 0.5
    angle = 2 * np.pi * f.v.background_tilt
    ramp = 1 - 0.16 * (x * np.cos(angle) + y * np.sin(angle)) * 2 - 0.35 * (x**2 + y**2)
    small = np.clip(np.array(base) * ramp[..., None], 0, 255).astype(np.uint8)
    c.image.paste(Image.fromarray(small).resize(c.image.size, Image.Resampling.BILINEAR))


def draw_body(c: Canvas, f: Face) -> None:
    """Neck, shoulders, clothes, and what is worn there."""
    a, male = f.a, f.a["Male"]
    neck, shoulder, drop = (0.128, 0.60, 0.835) if male else (0.074, 0.40, 0.885)
    cloth = pick(MEN_CLOTHES if male else WOMEN_CLOTHES, f.v.clothes)
    right = spline([(0.9 * neck, 0.80), (neck + 0.05, drop + 0.005), (0.72 * shoulder, drop + 0.035), (shoulder, 1.02)])
    c.fill(np.concatenate([right, mirror(right)[::-1]]), cloth, part="cloth")
    fold = stroke([(0.62 * shoulder, drop + 0.06), (0.58 * shoulder, 0.96), (0.60 * shoulder, 1.03)], 0.02)
    c.fill(both(fold), mix(cloth, BLACK, 0.4), alpha=0.6, blur=0.008)
    left, right = c.head([(-neck * 0.96, 0.15), (neck * 0.96, 0.15)]) - (c.body, 0)
    throat = np.array([left, right, (neck, 0.85), (0, 0.90), (-neck, 0.85)])
    c.fill(throat, f.skin, part="neck")
    if male:
        c.fill(loop([(0, 0.875), (neck + 0.02, 0.84), (0, 0.915)]), f.skin, part="neck")
        collar = ribbon(arch([(0, 0.912), (0.06, 0.895), (neck + 0.025, 0.835)]), 0.022, 0.8)
        c.fill(collar, mix(cloth, WHITE, 0.25), part="cloth")
        c.fill(ellipse(0, 0.835, 0.020, 0.030), f.shadow, alpha=0.75, blur=0.010)  # Adam's apple
    else:
        chest = loop([(0, 0.85), (neck, 0.86), (0.19, drop + 0.02), (0.11, 0.975), (0, 0.995)])
        c.fill(chest, f.skin, part="neck")
        bone = stroke([(0.03, 0.912), (0.08, 0.902), (0.14, 0.895)], 0.012)
        c.fill(both(bone), f.shadow, alpha=0.6, blur=0.006)
    under_chin = ellipse(-0.02 * f.lit_side, f.chin + 0.005, 0.95 * f.jaw, 0.062)
    c.inside(throat)(under_chin, f.shadow, depth=0.2, alpha=0.85, blur=0.016)
    if a["Wearing_Necktie"]:
        draw_necktie(c, pick(TIES, f.v.accessory))
    if a["Wearing_Necklace"]:
        t = np.linspace(-1, 1, 11)
        beads = list(zip((neck + 0.03) * t, 0.935 - 0.085 * t**2, strict=True))
        c.fill([ellipse(x, y, 0.0185, 0.0185, 14) for x, y in beads], (40, 30, 60), part="neck_l")
        c.fill([ellipse(x, y, 0.0150, 0.0150, 14) for x, y in beads], (70, 236, 250))
        c.fill([ellipse(x - 0.004, y - 0.004, 0.006, 0.006, 10) for x, y in beads], WHITE)


def draw_necktie(c: Canvas, colour) -> None:
    """A tie below a white collar."""
    for flap in both([(0, 0.885), (0.115, 0.815), (0.150, 0.86), (0.085, 0.965)]):
        c.fill(flap, (246, 246, 250), part="cloth")
        c.fill(ribbon(flap[[0, 3, 2]], 0.007, 1), (120, 120, 140), alpha=0.7)
    knot = np.array([(-0.036, 0.872), (0.036, 0.872), (0.026, 0.925), (-0.026, 0.925)])
    c.fill(knot, mix(colour, BLACK, 0.25), part="cloth")
    c.fill(np.array([(-0.026, 0.925), (0.026, 0.925), (0.062, 1.02), (-0.062, 1.02)]), colour, part="cloth")


def hair_outline(f: Face, end: float) -> np.ndarray:
    """The outer edge of the hair, from its left end over the crown to its right end."""
    w, vol = f.width, f.volume
    half = [(0, TOP - 0.045 - vol), (0.58 * w, TOP - 0.022 - vol), (w + 0.004 + vol, -0.20), (w + 0.030 + vol, -0.06)]
    half.append((w + 0.030 + vol, 0.035))
    if end > LONG_HAIR:
        widest = max(w, f.edge(0.15)[0, 0])
        half += [(widest + 0.052 + vol, 0.15), (widest + 0.050 + vol, end - 0.05), (widest + 0.03, end)]
    curve = arch(half)
    return scallop(curve, 0.030, 0.078) if f.a["Wavy_Hair"] else curve


def draw_back_hair(c: Canvas, f: Face) -> None:
    """The hair behind neck and ears."""
    colour = f.hair_dark if f.hair_end > LONG_HAIR else f.hair
    c.fill(hair_outline(f, f.hair_end), colour, -0.1, part="hair")


def hairline(f: Face) -> np.ndarray:
    """The inner edge of the hair on the forehead, from the left ear to the right one."""
    w = f.width
    if f.a["Receding_Hairline"]:
        temple = [(0.52 * w, -0.285), (0.80 * w, -0.235), (0.90 * w, -0.13), (0.97 * w, 0.02)]
        return arch([(0, -0.222), (0.22 * w, -0.235), *temple])
    part = between(-0.02, 0.02, f.v.parting)
    return arch([(0, -0.200), (0.42 * w, -0.192), (0.74 * w, -0.165), (0.90 * w, -0.09), (0.97 * w, 0.02)]) + (part, 0)


def comb_hair(within: Callable, f: Face, outer: np.ndarray, inner: np.ndarray, parted: bool) -> None:
    """Brush strokes along the hair between its two edges: dark and light waves, or a straight sheen, or none.

    ``parted`` strokes start together at the crown, as combed hair does, and need edges that run from ear to ear.
    """
    outer, inner = resample(outer, 60), resample(inner, 60)
    middle, wavy, combs = len(outer) // 2, f.a["Wavy_Hair"], []
    if wavy:
        combs = [((0.10, 0.42, 0.74), 0.014, f.hair_dark, 0.9), ((0.26, 0.58, 0.90), 0.012, f.hair_light, 0.6)]
    elif f.a["Straight_Hair"]:
        combs = [((0.34, 0.66), 0.010, f.hair_dark, 0.7), ((0.20, 0.50, 0.82), 0.014, f.streak, 0.9)]
    spread = np.abs(np.linspace(-1, 1, len(outer)))[:, None]
    spread = np.clip(spread / 0.5, 0, 1) ** 0.7
    crown = 0.75 * outer[middle] + 0.25 * inner[middle] + (between(-0.03, 0.03, f.v.parting), 0)
    wave = np.sin(np.linspace(0, 2 * np.pi * len(outer) / 13, len(outer)))[:, None]
    for places, width, colour, alpha in combs:
        strokes = []
        for t in places:  # from the outer edge, 0, to the inner one, 1
            curve = (1 - t) * outer + t * inner
            if parted:
                curve = spread * curve + (1 - spread) * crown
            if wavy:
                curve = curve + 0.011 * wave * normals(curve)
            halves = (curve[: middle + 1], curve[middle:]) if parted else (curve,)
            strokes += [ribbon(half, width) for half in halves]
        within(strokes, colour, alpha=alpha)


def draw_front_hair(c: Canvas, f: Face) -> None:
    """The hair on top of the head, the locks beside the face, and the fringe."""
    if f.hair_end > LONG_HAIR:
        draw_locks(c, f)
    if not f.a["Wearing_Hat"]:
        outer, inner = hair_outline(f, 0.0), hairline(f)
        cap = np.concatenate([outer, inner[::-1]])
        c.fill(cap, f.hair, 0.1, part="hair")
        within = c.inside(cap, 0.1)
        within(ellipse(f.lit_side * 0.4 * f.width, TOP + 0.01, 0.13, 0.055), f.hair_light, alpha=0.55, blur=0.025)
        within(ellipse(-f.lit_side * f.width, -0.12, 0.07, 0.14), f.hair_dark, alpha=0.55, blur=0.03)
        comb_hair(within, f, outer, inner, parted=True)
    if f.a["Bangs"]:
        draw_bangs(c, f)


def draw_locks(c: Canvas, f: Face) -> None:
    """Long hair at both sides of the face."""
    end = f.hair_end
    inner = f.edge(-0.16, -0.05, 0.06, 0.16, max(0.24, 0.6 * end), end, beyond=-0.016)
    inner[4:, 0] = np.minimum(inner[3, 0], (0.175, 0.150))
    right = resample(hair_outline(f, end)[::-1], 120)
    outer = right[(right[:, 0] > 0) & (right[:, 1] > -0.17)][::-1]
    inner = spline(inner)
    for side in (1, -1):
        edge, inside = outer * (side, 1), inner * (side, 1)
        lock = np.concatenate([edge, inside[::-1]])
        c.fill(lock, f.hair, 0.1, part="hair")
        within, away = c.inside(lock, 0.1), 0.60 if side != f.lit_side else 0.35
        within(ellipse(side * (f.width + 0.02), end, 0.07, 0.15), f.hair_dark, alpha=away, blur=0.05)
        comb_hair(within, f, edge, inside, parted=False)


def draw_bangs(c: Canvas, f: Face) -> None:
    """A fringe of seven tufts."""
    w = f.width
    tips = np.linspace(-0.86 * w, 0.86 * w, 8)
    lower = []
    for i, u in enumerate(tips[:-1]):
        lower += [(u, -0.126), (0.5 * (u + tips[i + 1]), -0.108)]
    lower.append((tips[-1], -0.126))
    upper = [(0.93 * w, -0.16), (0.6 * w, -0.245), (0, -0.27), (-0.6 * w, -0.245), (-0.93 * w, -0.16)]
    shape = np.array(lower + upper)
    c.fill(shape + (0, 0.018), f.shadow, 0.3, alpha=0.55, blur=0.008)
    c.fill(shape, f.hair, 0.3, part="hair")
    lines = [ribbon([(0.75 * u, -0.24), (0.95 * u, -0.17), (u, -0.115)], 0.009, 0.4) for u in tips[1:-1]]
    c.fill(lines, f.hair_dark, 0.3, alpha=0.8)
    if f.a["Straight_Hair"]:
        lines = [ribbon([(0.75 * u + 0.01, -0.24), (0.97 * u + 0.012, -0.11)], 0.008, 0.4) for u in tips[1:-1]]
        c.fill(lines, f.streak, 0.3, alpha=0.9)


def draw_hat(c: Canvas, f: Face) -> None:
    """A hat with band and brim over the top of the head."""
    colour = pick(HATS, f.v.accessory)
    w = f.width + f.volume
    crown = arch([(0, -0.425), (0.55 * w, -0.410), (0.95 * w, -0.32), (w + 0.025, -0.17)])
    c.fill(ellipse(0, -0.125, w, 0.05), f.shadow, 0.2, alpha=0.6, blur=0.012)
    c.fill(crown, colour, 0.1, part="hat")
    within = c.inside(crown, 0.1)
    within(ellipse(f.lit_side * 0.09, -0.34, 0.06, 0.09), mix(colour, WHITE, 0.6), alpha=0.6, blur=0.03)
    within(ellipse(-f.lit_side * 0.20, -0.26, 0.07, 0.16), BLACK, alpha=0.45, blur=0.03)
    band = np.array([(-w - 0.03, -0.245), (w + 0.03, -0.245), (w + 0.03, -0.16), (-w - 0.03, -0.16)])
    within(band, mix(colour, WHITE, 0.75))
    brim = loop([(0, -0.205), (w + 0.115, -0.165), (0.6 * w, -0.135), (0, -0.128)])
    c.fill(brim, mix(colour, BLACK, 0.22), 0.1, part="hat")


def draw_ears(c: Canvas, f: Face) -> None:
    """Both ears; the head covers what yaw turns away."""
    for side in (-1, 1):
        x = side * (f.width + 0.010)
        c.fill(ellipse(x, 0.03, 0.030, 0.058), f.skin, -0.3, part="_ear")
        c.fill(ellipse(x + side * 0.002, 0.026, 0.016, 0.036), f.shadow, -0.3, alpha=0.7, blur=0.006)


def draw_head(c: Canvas, f: Face) -> Callable:
    """The head's skin and its modelling by the light; returns what draws on the face alone, see `Canvas.inside`."""
    if f.a["Double_Chin"]:
        half = min(f.chin_width + 0.030, 0.158)
        roll = [(half + 0.02, f.chin - 0.09), (half, f.chin), (0.6 * half, f.chin + 0.052), (0, f.chin + 0.064)]
        c.fill(loop(roll) + (0, 0.022), mix(f.shadow, BLACK, 0.35), 0.2, alpha=0.8, blur=0.008)
        c.fill(loop(roll), mix(f.skin, f.light, 0.4), 0.2, part="skin")
        crease = arch([(0, f.chin + 0.020), (0.5 * half, f.chin + 0.008), (half, f.chin - 0.05)])
        c.fill(ribbon(crease, 0.030, 0.4), mix(f.shadow, BLACK, 0.45), 0.2, blur=0.004)
    c.fill(f.outline, f.skin, 0.2, part="skin")
    face, w, jaw, lit = c.inside(f.outline, 0.2), f.width, f.jaw, f.lit_side
    shade = [(0.62 * w, -0.30), (1.3 * w, -0.2), (1.4 * w, 0.1), (0.9 * jaw, 0.36), (0.25 * jaw, 0.33)]
    shade = spline([*shade, (0.78 * jaw, 0.15), (0.86 * w, -0.05)], closed=True) * (-lit, 1)
    face(shade, f.shadow, alpha=0.62, blur=0.03)
    face(ellipse(lit * 0.06, -0.15, 0.085, 0.06), f.light, depth=0.5, alpha=0.6, blur=0.035)
    face(ellipse(lit * 0.115, 0.085, 0.04, 0.035), f.light, depth=0.8, alpha=0.5, blur=0.022)
    face(ellipse(0.01 * lit, f.chin - 0.045, 0.035, 0.02), f.light, depth=0.8, alpha=0.5, blur=0.015)
    face(both(ellipse(0.095, -0.028, 0.058, 0.032)), f.shadow, depth=1, alpha=0.42, blur=0.016)
    if f.a["Bald"]:
        face(ellipse(lit * 0.07, TOP + 0.075, 0.055, 0.028), WHITE, depth=0.3, alpha=0.75, blur=0.012)
    return face


def draw_cheeks(face: Callable, f: Face) -> None:
    """Rosy discs, and the light and the hollow that high cheekbones give."""
    if f.a["Rosy_Cheeks"]:
        face(both(ellipse(0.128, 0.105, 0.046, 0.040)), (240, 60, 90), depth=0.8, alpha=0.72, blur=0.010)
    if f.a["High_Cheekbones"]:
        hollow = stroke([(0.195, 0.105), (0.150, 0.150), (0.105, 0.185)], 0.042, 0.5)
        face(both(hollow), mix(f.shadow, (70, 20, 20), 0.55), depth=0.7, alpha=0.85, blur=0.007)
        bone = stroke([(0.190, 0.035), (0.150, 0.075), (0.105, 0.088)], 0.030, 0.4)
        face(both(bone), (255, 248, 232), depth=0.7, alpha=0.85, blur=0.006)


def draw_age(face: Callable, f: Face) -> None:
    """Wrinkles: forehead, crow's feet, from nose to mouth, beside the chin."""
    ink = mix(f.shadow, (60, 26, 26), 0.5)
    lines = [arch([(0, y + 0.004), (0.05, y - 0.004), (0.115, y + 0.008)]) for y in (-0.180, -0.150, -0.120)]
    face([ribbon(line, 0.012) for line in lines], ink, depth=0.8, alpha=0.8, blur=0.002)
    folds = [
        stroke([(0.058, 0.100), (0.092, 0.140), (0.108, 0.190), (0.104, 0.225)], 0.018, 0.35),
        ribbon([(0.152, -0.006), (0.172, -0.018), (0.192, -0.034)], 0.010, 0.5),
        ribbon([(0.152, 0.006), (0.174, 0.008), (0.196, 0.008)], 0.010, 0.5),
        ribbon([(0.150, 0.018), (0.170, 0.032), (0.188, 0.050)], 0.010, 0.5),
        stroke([(0.100, 0.235), (0.104, 0.260), (0.094, 0.285)], 0.013, 0.35),
    ]
    face(both(*folds), ink, depth=0.8, alpha=0.85, blur=0.002)


def draw_beard(c: Canvas, face: Callable, f: Face) -> None:
    """What grows below the mouth and on the cheeks; the moustache is drawn after the mouth."""
    a, chin = f.a, f.chin
    if a["5_o_Clock_Shadow"]:
        right = np.concatenate([[(0.05, 0.135), (0.11, 0.150)], f.edge(0.115, 0.16, 0.22, 0.27, chin, beyond=0.01)])
        area = np.concatenate([right, mirror(right)[::-1]])
        face(area, (62, 76, 104), depth=0.4, alpha=0.62, blur=0.007)
    if a["Sideburns"]:
        edge = f.edge(-0.12, -0.05, 0.02, 0.08, 0.125, beyond=0.002)
        inner = edge - np.stack([(0.022, 0.036, 0.048, 0.060, 0.068), (0, 0, 0, 0, -0.016)], 1)
        c.fill(both(np.concatenate([spline(edge), spline(inner)[::-1]])), f.beard, 0.2)
        hairs = [ribbon([(x - 0.018, y - 0.05), (x - 0.030, y + 0.01)], 0.007) for x, y in edge[1:]]
        c.fill(both(*hairs), f.beard_light, 0.2, alpha=0.6)
    if not a["No_Beard"] and not any(a[name] for name in BEARDS):
        edge = f.edge(0.095, 0.16, 0.20, 0.24, 0.27, beyond=0.010)
        tip = [(0.75 * f.chin_width, chin + 0.020), (0, chin + 0.036)]
        inner = [(0, 0.262), (0.055, 0.256), (0.105, 0.225), (0.80 * edge[1, 0], 0.180), (edge[0, 0] - 0.02, 0.10)]
        c.fill(both(np.concatenate([spline([*edge, *tip]), spline(inner)])), f.beard, 0.4, part="skin")
        hairs = [ribbon([(u, 0.27), (0.97 * u, chin + 0.012)], 0.007) for u in np.linspace(-0.1, 0.1, 7)]
        c.fill(hairs, f.beard_light, 0.5, alpha=0.6)
    if a["Goatee"]:
        patch = loop([(0, 0.262), (0.058, 0.250), (0.062, chin - 0.015), (0.032, chin + 0.030), (0, chin + 0.044)])
        c.fill(patch, f.beard, 0.8, part="skin")
        hairs = [ribbon([(u, 0.265), (0.7 * u, chin + 0.028)], 0.006) for u in (-0.036, -0.012, 0.012, 0.036)]
        c.fill(hairs, f.beard_light, 0.8, alpha=0.6)


def draw_mustache(c: Canvas, f: Face) -> None:
    """Two drooping halves between nose and mouth."""
    lower = [(0.112, 0.196), (0.074, 0.186), (0.03, 0.180), (0, 0.176)]
    c.fill(both(spline([(0, 0.140), (0.045, 0.138), (0.085, 0.158), *lower])), f.beard, 1.1, part="skin")
    hairs = [ribbon([(0.012 + 0.5 * u, 0.146), (u + 0.012, 0.176)], 0.005) for u in (0.015, 0.035, 0.055)]
    c.fill(both(*hairs), f.beard_light, 1.1, alpha=0.6)


def draw_eye(c: Canvas, f: Face, side: int) -> None:
    """The left (side -1) or right (side 1) eye with lid, lashes, make-up, and the bag below it."""
    a, v, made_up = f.a, f.v, f.a["Heavy_Makeup"]
    x, half = side * between(0.093, 0.099, v.eyes), 0.050
    height = between(0.0080, 0.0100, v.eyes) if a["Narrow_Eyes"] else between(0.028, 0.032, v.eyes)
    upper = arch([(0, -height), (0.5 * half, -0.78 * height), (half, 0.002)]) + (x, 0)
    lower = arch([(0, 0.82 * height), (0.5 * half, 0.66 * height), (half, 0.002)])[::-1] + (x, 0)
    if made_up:
        brow_bone = (upper - (x, 0)) * (1.16, 0.3) + (x + side * 0.010, -0.050)
        lid = np.concatenate([upper + (side * 0.006, 0), brow_bone[::-1]])
        c.fill(lid, pick(MAKEUP, v.accessory), 1, alpha=0.92, blur=0.004)
    if a["Bags_Under_Eyes"]:
        bag = ribbon(arch([(0, 0.056), (0.026, 0.050), (0.052, 0.026)]) + (x, 0), 0.030, 0.4)
        c.fill(bag, (74, 46, 92), 0.95, alpha=0.82, blur=0.004)
    almond = np.concatenate([upper, lower])
    c.fill(almond, (252, 250, 248), 1, part="_eye")
    within, iris, gaze = c.inside(almond, 1), pick(EYE_COLOURS, v.eye_colour), x + 0.35 * c.yaw
    within(ellipse(gaze, -0.002, 0.0245, 0.0245), mix(iris, BLACK, 0.45))
    within(ellipse(gaze, 0.000, 0.0200, 0.0200), iris)
    within(ellipse(gaze, -0.001, 0.0105, 0.0105), (12, 8, 8))
    within(upper + (0, 0.006), BLACK, alpha=0.30, blur=0.005)
    within(ellipse(gaze + f.lit_side * 0.008, -0.010, 0.0062, 0.0062, 12), WHITE)
    c.fill(ribbon(upper, 0.017 if made_up else 0.010 if a["Male"] else 0.014, 0.5), INK, 1)
    c.fill(ribbon(lower, 0.005, 0.3), mix(f.shadow, INK, 0.5), 1, alpha=0.8)
    if not a["Narrow_Eyes"] and not made_up:
        c.fill(ribbon(upper + (0, -0.014), 0.006, 0.2), mix(f.shadow, INK, 0.4), 1, alpha=0.8)
    if made_up or not a["Male"]:
        reach, width = (0.034, 0.011) if made_up else (0.016, 0.007)
        lashes = []
        for along, sideways in ((0.35, 0.35), (0.65, 0.6), (0.95, 0.9)):
            u, root = upper[np.argmin(abs(upper[:, 0] - x - side * half * along))]
            lashes.append(ribbon([(u, root), (u + side * reach * sideways, root - 0.75 * reach)], width, 0.6))
        c.fill(lashes, INK, 1)


def draw_brows(c: Canvas, f: Face) -> None:
    """Flat and thin, arched, bushy, or both."""
    a, v = f.a, f.v
    if a["Arched_Eyebrows"]:
        curve = spline([(0.046, -0.060), (0.080, -0.090), (0.112, -0.112), (0.136, -0.090), (0.160, -0.052)])
    else:
        y = between(-0.067, -0.073, v.brows)
        curve = spline([(0.042, y + 0.003), (0.075, y - 0.003), (0.110, y - 0.004), (0.152, y + 0.006)])
    colour, width, ends = mix(f.hair if a["Gray_Hair"] else f.hair_dark, INK, 0.35), (0.0135, 0.0165), 0.35
    if a["Bushy_Eyebrows"]:
        colour, width, ends = mix(colour, (20, 14, 12), 0.7), (0.044, 0.044), 0.65
    c.fill(both(ribbon(curve, between(*width, v.brows), ends)), colour, 1, part="_brow")


def draw_nose(c: Canvas, f: Face) -> None:
    """A small or a big one, round or as a sharp pyramid with one side in the shade."""
    big, dark = f.a["Big_Nose"], -f.lit_side
    half = between(0.062, 0.068, f.v.nose) if big else between(0.029, 0.033, f.v.nose)
    tip = 0.128 if big else 0.112
    strong = mix(f.shadow, (60, 16, 16), 0.45)
    bridge = stroke([(dark * 0.020, -0.035), (dark * 0.018, 0.02), (dark * 0.7 * half, 0.085)], 0.020, 0.5)
    whole = np.array([(-0.016, -0.03), (0.016, -0.03), (half, tip - 0.01), (0, tip), (-half, tip - 0.01)])
    c.fill(whole, f.skin, 1.3, alpha=0, part="nose")  # has no edges of its own in the picture
    c.fill(bridge, f.shadow, 1.2, alpha=0.6, blur=0.008)
    c.fill(ribbon([(0, -0.03), (0, 0.03), (0, 0.075)], 0.016, 0.5), f.light, 1.35, alpha=0.7, blur=0.006)
    if f.a["Pointy_Nose"]:
        tip += 0.022
        left, right, top = (-half - 0.012, tip - 0.024), (half + 0.012, tip - 0.024), (0, -0.020)
        c.fill(np.array([top, left, (0, tip), right]), f.light, 1.4, part="nose")
        c.fill(np.array([top, (dark * (half + 0.012), tip - 0.024), (0, tip)]), strong, 1.4)
        nostrils = both(ellipse(0.45 * half + 0.008, tip - 0.016, 0.30 * half, 0.007))
        c.fill(nostrils, mix(strong, BLACK, 0.55), 1.3)
        return
    c.fill(ellipse(0, tip + 0.010, 1.25 * half, 0.016), f.shadow, 1.2, alpha=0.7, blur=0.007)
    wing, ball = (0.026, 0.046) if big else (0.014, 0.024)
    wings = both(ellipse(half - 0.5 * wing, tip - wing, wing, 1.05 * wing))
    c.fill(wings, mix(f.skin, f.shadow, 0.55), 1.25, part="nose")
    c.fill(ellipse(0, tip - 0.62 * ball, ball, 0.86 * ball), mix(f.skin, f.shadow, 0.18), 1.45, part="nose")
    shade = ellipse(dark * 0.4 * ball, tip - 0.5 * ball, 0.6 * ball, 0.6 * ball)
    c.fill(shade, f.shadow, 1.45, alpha=0.55, blur=0.006)
    shine = ellipse(-dark * 0.25 * ball, tip - 0.95 * ball, 0.36 * ball, 0.28 * ball)
    c.fill(shine, WHITE, 1.45, alpha=0.65, blur=0.004)
    nostrils = both(ellipse(0.55 * half, tip - 0.003, 0.30 * half, 0.0085 if big else 0.006))
    c.fill(nostrils, mix(strong, BLACK, 0.55), 1.35)
    if big:
        rim = stroke([(half + 0.006, tip - 0.045), (half + 0.016, tip - 0.022), (half + 0.004, tip)], 0.012, 0.5)
        c.fill(both(rim), strong, 1.25, alpha=0.9)


def draw_mouth(c: Canvas, f: Face) -> None:
    """Lips, thin or full; corners level or up; closed, or open on a row of teeth."""
    a, v = f.a, f.v
    big, smile = a["Big_Lips"], a["Smiling"]
    half = between(0.068, 0.074, v.mouth) + (0.008 if big else 0) + (0.028 if smile else 0)
    lift = 0.050 if smile else between(0.002, 0.007, v.mouth)
    up, low = (0.036, 0.044) if big else (0.014, 0.019)
    gap = 0.017 if a["Mouth_Slightly_Open"] else 0.0
    y = MOUTH + (0.012 if smile else 0.0)
    corner, bow = (half, y - lift), y - 0.1 * lift - gap
    low_edge, side_lift = y + 0.1 * lift + 1.3 * gap, 0.24 * lift
    inner_up = arch([(0, bow), (0.5 * half, y - side_lift - gap), corner])
    inner_low = arch([(0, low_edge), (0.55 * half, y - 0.18 * lift + 1.1 * gap), corner])[::-1]
    peaks = [(0.16 * half, bow - 0.05 * lift - 1.1 * up), (0.45 * half, y - 0.30 * lift - gap - 0.8 * up)]
    outer_up = arch([(0, bow - 0.85 * up), *peaks, corner])
    full = (0.6 * half, y - 0.3 * lift + 1.1 * gap + 0.75 * low)
    outer_low = arch([(0, low_edge + 1.1 * low), full, corner])[::-1]
    lip = pick(LIPSTICKS, v.mouth) if a["Wearing_Lipstick"] else mix(f.skin, (204, 68, 84), 0.6)
    c.fill(outer_low + (0, 0.016), f.shadow, 1, alpha=0.5, blur=0.008)
    c.fill(np.concatenate([outer_up, outer_low]), lip, 1, part="l_lip")
    c.fill(np.concatenate([outer_up, inner_up[::-1]]), mix(lip, BLACK, 0.22), 1, part="u_lip")
    shine = ellipse(f.lit_side * 0.012, y + 1.3 * gap + 0.55 * low, 0.024, 0.30 * low)
    c.fill(shine, mix(lip, WHITE, 0.65), 1, alpha=0.75, blur=0.004)
    if gap:
        hole = np.concatenate([inner_up, inner_low])
        c.fill(hole, (52, 8, 14), 1, part="mouth")
        teeth = np.concatenate([inner_up, 0.45 * inner_low + 0.55 * inner_up[::-1]])
        c.inside(hole, 1)(teeth * (0.86, 1), (250, 248, 242))
    else:
        c.fill(ribbon(inner_up, 0.008, 0.5), mix(lip, (30, 0, 0), 0.65), 1)
    if smile:
        dimple = [(half + 0.006, y - lift - 0.030), (half + 0.022, y - lift), (half + 0.014, y - lift + 0.026)]
        c.fill(both(stroke(dimple, 0.017, 0.3)), mix(f.shadow, (60, 20, 20), 0.35), 0.9, alpha=0.9)


def draw_glasses(c: Canvas, f: Face) -> None:
    """Dark frames, hardly tinted lenses."""
    colour, before = pick(FRAMES, f.v.accessory), c.classes.copy()
    top = [(0.024, -0.038), (0.096, -0.046), (0.170, -0.038), (0.172, 0.022)]
    ring = spline([*top, (0.150, 0.058), (0.096, 0.066), (0.042, 0.056), (0.024, 0.020)], closed=True)
    c.fill(both(ring), (225, 240, 255), 1.1, alpha=0.16, part="eye_g")
    c.fill(both(ribbon(np.concatenate([ring, ring[:2]]), 0.017, 1)), colour, 1.1, part="eye_g")
    c.fill(stroke([(-0.026, -0.012), (0, -0.020), (0.026, -0.012)], 0.017, 1), colour, 1.2, part="eye_g")
    c.fill(both(ribbon([(0.168, -0.015), (f.width, -0.012)], 0.015, 1)), colour, 0.8, part="eye_g")
    behind = [MASK_CLASSES.index(name) for name in ("l_eye", "r_eye", "l_brow", "r_brow")]
    c.classes.paste(before, mask=before.point([255 if k in behind else 0 for k in range(256)]))


def draw_earrings(c: Canvas, f: Face) -> None:
    """Golden discs below the ears."""
    x, y = f.width + 0.022, 0.118
    c.fill(both(ellipse(x, y, 0.041, 0.041)), (110, 66, 0), -0.3, part="ear_r")
    c.fill(both(ellipse(x, y, 0.034, 0.034)), (255, 206, 20), -0.3)
    c.fill([ellipse(side * x - 0.010, y - 0.011, 0.012, 0.012) for side in (-1, 1)], (255, 255, 220), -0.3)


# ---------------------------------------------------------------- pictures


def render(a: dict[str, bool], variation: Variation, size: int) -> tuple[Image.Image, Image.Image]:
    """Draw the face with attributes ``a``, ``size`` pixels square, RGB; and what is seen there. Free of chance.

    Returns:
        picture, mask: the mask as a palette picture of the classes `data_loader.MASK_CLASSES`.
    """
    c, f = Canvas(size, variation), Face(a, variation)
    draw_background(c, f)
    if not a["Bald"]:
        draw_back_hair(c, f)
    draw_body(c, f)
    draw_ears(c, f)
    face = draw_head(c, f)
    draw_cheeks(face, f)
    if not a["Young"]:
        draw_age(face, f)
    if not a["Bald"]:
        draw_front_hair(c, f)
        if a["Wearing_Earrings"] and f.hair_end > LONG_HAIR:
            draw_ears(c, f)  # before the hair
    draw_beard(c, face, f)
    draw_nose(c, f)
    draw_mouth(c, f)
    if a["Mustache"]:
        draw_mustache(c, f)
    for side in (-1, 1):
        draw_eye(c, f, side)
    draw_brows(c, f)
    for name, draw in (("Eyeglasses", draw_glasses), ("Wearing_Hat", draw_hat), ("Wearing_Earrings", draw_earrings)):
        if a[name]:
            draw(c, f)
    return c.finish(a["Blurry"])


def sample_face(seed: int, index: int) -> tuple[dict[str, bool], Variation]:
    """What image ``index`` of ``seed`` (both 0 or more) shows. Raises ValueError when one is negative."""
    rng = np.random.default_rng([seed, index])
    return sample_attributes(rng), sample_variation(rng)


def draw_face(seed: int, index: int, size: int) -> tuple[Image.Image, dict[str, bool]]:
    """Image ``index`` of ``seed``, ``size`` pixels square, with its 40 attributes, as `sample_face` has them."""
    attributes, variation = sample_face(seed, index)
    return render(attributes, variation, size)[0], attributes


def _write_face(index: int, out: Path, seed: int, size: int, masks: bool) -> str:
    attributes, variation = sample_face(seed, index)
    image, mask = render(attributes, variation, size)
    image.save(out / IMAGE_FOLDER / f"{index}.jpg", quality=95, subsampling=0)
    if masks:
        mask.save(out / MASK_FOLDER / f"{index}.png")
    return f"{index}.jpg  " + " ".join("1" if attributes[name] else "-1" for name in ATTRIBUTES)


def write_dataset(
    out: str | Path, count: int, size: int, seed: int, workers: int | None = None, overwrite: bool = False,
    masks: bool = False,
) -> None:  # fmt: skip
    """Write ``count`` faces, and with ``masks`` those, into the folder ``out``, laid out as CelebAMask-HQ is.

    procedural_faces.json says what was drawn, and that it was: only such a folder is ever overwritten. With
    ``overwrite`` the numbered pictures and the annotation are replaced; anything else in the folder stays. The files do
    not depend on ``workers``, processes that draw. On Linux they are forks; elsewhere they import the script that calls
    this, which has to do so below ``if __name__ == "__main__":``.

    Raises:
        InputError: ``out`` holds something and ``overwrite`` is not set; a process that draws ends before its time.
    """
    out = Path(out)
    _prepare_folder(out, overwrite, {"count": count, "size": size, "seed": seed}, masks)
    write = functools.partial(_write_face, out=out, seed=seed, size=size, masks=masks)
    progress = functools.partial(tqdm, total=count, unit="face", desc="drawing faces")
    if workers == 1:
        lines = list(progress(map(write, range(count))))
    else:
        start = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        try:
            with ProcessPoolExecutor(workers, start) as pool:
                lines = list(progress(pool.map(write, range(count), chunksize=32)))
        except BrokenProcessPool:
            raise InputError(
                'a process that draws has ended: a script calls this below `if __name__ == "__main__":`'
            ) from None
    write_text(out / ANNOTATION_FILE, "\n".join([str(count), " ".join(ATTRIBUTES), *lines]) + "\n")


def _prepare_folder(out: Path, overwrite: bool, settings: dict, masks: bool) -> None:
    """Make the folders for the pictures, without those of an earlier run (beyond a smaller count they would linger)."""
    folders = {IMAGE_FOLDER: "*.jpg", MASK_FOLDER: "*.png"}
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InputError(f"--out {out}: not empty; name another folder, or replace its faces with --overwrite")
        if not (out / MARK).is_file() and any((out / name).exists() for name in folders):
            # real photographs have the same names
            raise InputError(f"--out {out}: its pictures were not drawn here ({MARK} is missing); name another")
    (out / IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
    if masks:
        (out / MASK_FOLDER).mkdir(exist_ok=True)
    write_json(out / MARK, settings)  # before the first picture: an interrupted run may be replaced too
    (out / ANNOTATION_FILE).unlink(missing_ok=True)
    for name, pattern in folders.items():
        for old in (out / name).glob(pattern):
            if old.stem.isdecimal():
                old.unlink()


@dataclasses.dataclass
class Options:
    """What to draw, and where to."""

    out: Path = option(..., "folder to write; new or empty")
    count: int = option(..., "number of faces", 1)
    size: int = option(64, "width and height in pixels", 16, 4096)
    seed: int = option(0, "same seed, same faces", 0, 2**63 - 1)
    workers: int | None = option(None, "processes; none: one for each core", 1, 1024)
    overwrite: bool = option(False, "replace the faces in a folder that is not empty")
    masks: bool = option(False, "also write the mask of each face, 19 classes")


def main(argv: list[str] | None = None) -> int:
    """The command; see ``--help``."""
    (o, _) = parse("Draw labelled faces in the layout of CelebAMask-HQ.", Options, argv=argv)
    write_dataset(o.out, o.count, o.size, o.seed, o.workers, o.overwrite, o.masks)
    return 0


if __name__ == "__main__":
    run_command(main)
