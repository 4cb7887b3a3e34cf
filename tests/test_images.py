"""Pictures are found, read whatever they are, and made square, everywhere alike; faces are cut as CelebA-HQ's."""

import importlib.util
import struct
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import refused
from layout import circle, picture
from PIL import Image, ImageDraw

import images
import procedural_faces as faces
from data_loader import ATTRIBUTES
from DDNM.guided_diffusion.inputs import TargetSettings, read_targets
from images import align_face, find_faces, find_images, frame, load_image, save_image, to_uint8, warn_unaligned

POINTS = np.array([[69.5, 111.0], [107.5, 111.0], [88.0, 130.0], [73.0, 152.0], [104.0, 152.0]])  # CelebA's mean face


def touch(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found_in(folder) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_images(folder)]


def test_find_images_is_natural_nested_skips_hidden_and_names_the_rest(tmp_path, caplog):
    touch(tmp_path, "10.JPG", "2.jpg", "1.png", "sub/3.webp", "6.jfif", ".hidden.jpg", ".cache/5.jpg", "notes.txt")
    touch(tmp_path, "a.heic", "b.ico", "empty/.c.jpg")
    assert found_in(tmp_path) == ["1.png", "2.jpg", "6.jfif", "10.JPG", "sub/3.webp"]
    assert "left out" in caplog.text and "a.heic, b.ico, notes.txt" in caplog.text
    assert find_images(tmp_path / "10.JPG") == [tmp_path / "10.JPG"]
    for name, said in (("nowhere", "no such file or folder"), ("notes.txt", "no images"), ("empty", "no images")):
        refused(f"{name}: {said}", find_images, tmp_path / name)


@pytest.mark.parametrize("images, masks", [("CelebA-HQ-img", "CelebAMask-HQ-mask-anno/0"), ("images", "masks")])
def test_find_images_leaves_the_masks_of_a_data_set(tmp_path, images, masks):
    touch(tmp_path, f"{images}/0.jpg", f"{masks}/0.png", "other/masks/1.png")
    assert found_in(tmp_path) == [f"{images}/0.jpg", "other/masks/1.png"]


# --- Every kind of picture -------------------------------------------------------------------------------------------

RED, GREEN = (200, 20, 30), (10, 180, 40)


def halves(mode: str = "RGB", left=RED, right=GREEN) -> Image.Image:
    """Of two colours, side by side."""
    image = Image.new("RGB", (16, 8), left)
    image.paste(right, (8, 0, 16, 8))
    return image.convert(mode)


def values(left: float, right: float, dtype) -> Image.Image:
    return Image.fromarray(np.repeat(np.array([[left, right]], dtype), 8, 1).repeat(8, 0))


def saved(image: Image.Image, **how):
    return lambda path: image.save(path, **how)


def pgm(image: Image.Image):
    """16 bits, which older Pillows read and cannot write."""
    pixels = np.asarray(image).astype(">u2")
    header = "P5 {1} {0} 65535\n".format(*pixels.shape)
    return lambda path: path.write_bytes(header.encode() + pixels.tobytes())


def animated(**how):
    return saved(halves(), save_all=True, append_images=[Image.new("RGB", (16, 8), "blue")], **how)


def png(path, rows: bytes, size=(16, 8)):
    """A PNG of one's own; Pillow itself cannot write 16-bit RGB."""
    header = struct.pack(">IIBBBBB", *size, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, body in parts:
            file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def clear(mode: str, colour, **how):
    """Transparent on the left."""
    image = Image.new(mode, (16, 8), colour)
    image.paste(how.pop("right"), (8, 0, 16, 8))
    if mode == "P":
        image.putpalette([9, 9, 9, *GREEN])
    return saved(image, **how)


DEEP = b"".join(struct.pack(">HHH", *(v * 257 for v in c)) for c in [RED] * 8 + [GREEN] * 8)
LOOKS = {  # how it is written, and what must be seen left and right of the middle, in 8 bits
    "plain.png": saved(halves()),
    "palette.gif": saved(halves()),
    "animated.gif": animated(),
    "animated.webp": animated(lossless=True),
    "pages.tiff": animated(),
    "cmyk.jpg": saved(halves("CMYK"), quality=100),
    "sixteen.png": lambda path: png(path, (b"\0" + DEEP) * 8),
    "a png.jpg": saved(halves(), format="PNG"),
    "upside down.png": saved(halves(left=GREEN, right=RED), exif=exif(3)),
    "on its side.jpg": saved(halves().rotate(90, expand=True), exif=exif(6), quality=100, subsampling=0),
    "damaged exif.jpg": saved(halves(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=100, subsampling=0),
    "half clear.png": (saved(Image.new("RGBA", (16, 8), (200, 0, 0, 128))), (227, 127, 127), (227, 127, 127)),
    "clear grey.png": (clear("LA", (0, 0), right=(60, 255)), 255, 60),
    "clear.gif": (clear("P", 0, right=1, transparency=0), 255, GREEN),
    "grey.png": (saved(halves("L", (9, 9, 9), (99, 99, 99))), 9, 99),
    "dark.png": (saved(values(20, 200, np.uint16)), 0, 1),
    "wide.png": (saved(values(257 * 7, 65535, np.uint16)), 7, 255),
    "dark.pgm": (pgm(values(20, 200, np.uint16)), 0, 1),
    "dark.tiff": (saved(values(20, 200, np.uint16)), 0, 1),
}


@pytest.mark.parametrize("name", LOOKS)
def test_pictures_of_every_kind_look_as_they_should(tmp_path, caplog, name):
    write, *expected = LOOKS[name] if isinstance(LOOKS[name], tuple) else (LOOKS[name], RED, GREEN)
    write(tmp_path / name)
    assert find_images(tmp_path) == [tmp_path / name]
    image = ((load_image(tmp_path / name) + 1) * 127.5).round()  # in 8 bits
    assert image.shape == (3, 8, 16)
    for x, colour in zip((4, 12), expected, strict=True):
        colour = torch.tensor(colour if isinstance(colour, tuple) else [colour] * 3).float()
        torch.testing.assert_close(image[:, 4, x], colour, atol=12 if name[-3:] == "jpg" else 1, rtol=0)
    assert ("the first is used" in caplog.text) == name.startswith(("animated", "pages"))


def cut(path):
    halves().resize((256, 256)).save(path)
    path.write_bytes(path.read_bytes()[:-200])


POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(pwned) (w) file closefile\nshowpage\n%%EOF\n"
)
REFUSED = {
    "bomb.png": (lambda path: png(path, b"", (60_000, 60_000)), "bomb"),
    "cut.jpg": (cut, "truncated"),
    "text.jpg": (lambda path: path.write_text("no picture"), "cannot identify"),
    "postscript.jpg": (lambda path: path.write_bytes(POSTSCRIPT), "cannot identify"),
    "missing.jpg": (lambda path: None, "No such file"),
    "float.tiff": (saved(values(0, 1, np.float32)), "pixels of mode F, expected 8 or 16 bits"),
    "wide.tiff": (saved(values(0, 70000, np.int32)), "pixels of mode I, expected 8 or 16 bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_one_line(tmp_path, name):
    write, said = REFUSED[name]
    write(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(refused(f"{name}: .*({said})", load_image, tmp_path / name, 8)) < 400


# --- Sizes and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (20_000, 8), (8, 20_000)])
def test_pictures_of_any_shape_are_cropped_to_their_middle(tmp_path, shape):
    image = Image.new("RGB", shape, RED)
    image.putpixel((shape[0] // 2, shape[1] // 2), GREEN)
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 16)
    assert loaded.shape == (3, 16, 16) and ((loaded[1] > loaded[1].min()).any() or min(shape) == 1)


@pytest.mark.parametrize("size", [(48, 64), (7, 90)])
@pytest.mark.parametrize("picture_size", [(100, 100), (300, 120), (178, 218)])
def test_oblong_sizes_keep_proportions_too(tmp_path, size, picture_size):
    circle(*picture_size).save(tmp_path / "a.png")
    dark = load_image(tmp_path / "a.png", size).mean(0) < 0
    assert dark.shape == size
    wide, high = dark[size[0] // 2].sum(), dark[:, size[1] // 2].sum()
    shown = min(int(wide), size[1] - 1), min(int(high), size[0] - 1)  # what is cut off ends at the edge
    assert abs(shown[0] - shown[1]) <= 2 or size[1] - 1 in shown or size[0] - 1 in shown


def test_a_picture_that_is_not_square_is_named_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images, "_cropped", [])
    for i in range(3):
        circle(20 + i, 30).save(tmp_path / f"{i}.png")
        load_image(tmp_path / f"{i}.png", 8)
    (record,) = caplog.records
    assert "0.png is 20x30" in record.getMessage() and "the middle is used" in record.getMessage()


def test_load_image_is_antialiased(tmp_path):
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    Image.fromarray(stripes).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 8)[:, 2:-2, 2:-2].abs().max() < 0.1  # grey, where sampling gives 1 or -1


def test_uint8_round_trip_and_save(tmp_path):
    picture(3).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    save_image(image, tmp_path / "out" / "b.png")
    assert torch.equal(load_image(tmp_path / "out" / "b.png"), image)
    every = torch.arange(256)
    assert torch.equal(to_uint8(every.float().div(127.5).sub(1)), every.to(torch.uint8))
    assert to_uint8(torch.tensor([-9.0, 9.0, float("nan")])).tolist() == [0, 255, 0]


def test_celeba_is_framed_as_celeba_hq(tmp_path):
    """Where the rule of CelebA-HQ puts the mean eyes: level, a quarter of the width apart, at 48 % of the height."""
    eyes, (upper_left, *_, upper_right) = POINTS[:2], frame(POINTS)
    expected = (eyes - upper_left) / (upper_right - upper_left)[0]
    image = Image.new("RGB", (178, 218), "white")
    for x, y in eyes:
        ImageDraw.Draw(image).ellipse([x - 5, y - 5, x + 5, y + 5], fill="black")
    image.save(tmp_path / "a.png")
    dark = 1 - (load_image(tmp_path / "a.png", 128).mean(0) + 1) / 2
    for half, (x, y) in zip((slice(0, 64), slice(64, 128)), expected, strict=True):
        weight = dark[:, half] / dark[:, half].sum()
        at = torch.arange(128) + 0.5
        got = torch.stack([(weight.sum(0) * at[half]).sum(), (weight.sum(1) * at).sum()]) / 128
        torch.testing.assert_close(got, torch.tensor([x, y]).float(), atol=0.01, rtol=0)


# Faces, found and framed ---------------------------------------------------------------------------------------------

needs_weights = pytest.mark.skipif(not images.can_align(), reason="needs mtcnn")


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    """A drawn face; the detector takes some of them for one."""
    plain = {**dict.fromkeys(ATTRIBUTES, False), "Male": True, "Young": True, "No_Beard": True, "Brown_Hair": True}
    return faces.render(plain, faces.sample_variation(np.random.default_rng(1)), 256)[0]


def placed(image: Image.Image, angle: float, size: int = 200) -> Image.Image:
    """In a larger picture, turned."""
    canvas = Image.new("RGB", (640, 480), (128, 150, 140))
    canvas.paste(image.resize((size, size), Image.Resampling.LANCZOS), (320 - size // 2, 240 - size // 2))
    return canvas.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(128, 150, 140))


def test_the_frame_of_an_upright_face():
    """By the rule: side max(4 |eyes|, 3.6 |eyes to mouth|), middle a tenth of the latter below the eyes."""
    eyes, mouth = POINTS[:2].mean(0), POINTS[3:].mean(0)
    side = max(4 * 38.0, 3.6 * 41.0)
    middle = eyes + 0.1 * (mouth - eyes)
    expected = middle + side / 2 * np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]])
    np.testing.assert_allclose(frame(POINTS), expected, atol=1e-9)


@pytest.mark.parametrize("angle", [25, -70])
def test_the_frame_turns_scales_and_moves_with_the_face(angle):
    a = np.deg2rad(angle)
    turn = 1.7 * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    np.testing.assert_allclose(frame(POINTS @ turn.T + (30, -12)), frame(POINTS) @ turn.T + (30, -12), atol=1e-9)


def test_a_turned_face_is_looked_at_again_upright(monkeypatch):
    """What the detector says of the turned picture is replaced by what it says of the upright one, turned back."""
    angle, middle = 0.5, frame(POINTS).mean(0)
    turned = images._turned(POINTS, angle, middle)
    seen = []

    def found(image):
        seen.append(image)
        noise = np.array([[0, 0], [0, 0], [0, 0], [4, 0], [4, 0]])  # of the corners of the mouth, turned only
        return [turned + noise] if len(seen) == 1 else [POINTS + image.size[0] * 1000, POINTS]

    monkeypatch.setattr(images, "find_faces", found)
    corners = images.find_frame(Image.new("RGB", (178, 218)), "a.png")
    expected = images._turned(frame(POINTS), angle, middle)
    assert len(seen) == 2 and np.hypot(*(corners - expected).T).max() < 12
    square = np.hypot(*(corners - np.roll(corners, 1, 0)).T)
    np.testing.assert_allclose(square, np.hypot(*(expected[0] - expected[1])))


def test_the_picture_is_cut_along_the_frame(monkeypatch):
    """Its corners are the frame's, whatever lies beyond the picture is its mirror image."""
    y, x = np.mgrid[0:218, 0:178]
    picture = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    monkeypatch.setattr(images, "find_faces", lambda image: [POINTS])
    cut = np.asarray(align_face(picture)).astype(float)
    corners = frame(POINTS)
    side = len(cut)
    assert cut.shape == (side, side, 3) and side == round(np.hypot(*(corners[3] - corners[0])))
    for row, column, corner in ((0, 0, 0), (side - 1, 0, 1), (side - 1, side - 1, 2), (0, side - 1, 3)):
        np.testing.assert_allclose(cut[row, column, :2], corners[corner], atol=1.5)
    monkeypatch.setattr(images, "find_faces", lambda image: [POINTS - (60, 0)])
    cut = np.asarray(align_face(picture)).astype(float)
    np.testing.assert_allclose(cut[0, 0, 0], -(corners[0, 0] - 60), atol=1.5)


def test_without_the_weights_one_line_says_what_to_install(portrait, monkeypatch, caplog):
    images.load_detector.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("pip install mtcnn", align_face, portrait)
    warn_unaligned(portrait, "a.jpg")
    assert caplog.text == ""


@needs_weights
def test_other_weights_are_refused(monkeypatch):
    images.load_detector.cache_clear()
    monkeypatch.setitem(images._SHA256, "onet", "0" * 64)
    refused("onet.lz4: not the weights of mtcnn 1.0.0", images.load_detector)


@needs_weights
def test_an_aligned_face_has_level_eyes_where_celeba_hq_has_them(portrait, tmp_path):
    placed(portrait, 35).save(tmp_path / "a.png")
    cut = align_face(Image.open(tmp_path / "a.png"))
    (found,) = find_faces(cut)
    eyes = found[:2] / cut.width
    assert abs(eyes[0, 1] - eyes[1, 1]) < 0.02
    assert 0.44 < eyes[:, 1].mean() < 0.51 and abs(eyes[:, 0].mean() - 0.5) < 0.03
    image = load_image(tmp_path / "a.png", 32, align=True)
    assert image.shape == (3, 32, 32)
    assert (image - load_image(tmp_path / "a.png", 32)).abs().mean() > 0.1


@needs_weights
def test_pictures_without_a_face_or_with_several_are_named(portrait, tmp_path, caplog):
    Image.new("RGB", (200, 150), "grey").save(tmp_path / "none.png")
    two = Image.new("RGB", (512, 256))
    two.paste(portrait, (0, 0))
    two.paste(portrait, (256, 0))
    two.save(tmp_path / "two.png")
    Image.new("RGB", (9, 5)).save(tmp_path / "tiny.png")
    for name, said in (("none.png", "no face found"), ("tiny.png", "no face found"), ("two.png", "2 faces found")):
        refused(f"{name}: {said}", load_image, tmp_path / name, 32, align=True)
        load_image(tmp_path / name, 32, align=None)
    assert caplog.text == "" or "not square" in caplog.text


@needs_weights
def test_only_a_picture_far_from_the_frame_is_warned_of(portrait, caplog):
    for image, name in ((portrait, "near.png"), (placed(portrait, 0, 150), "far.png")):
        warn_unaligned(image, name)
    assert "far.png: its face is not where" in caplog.text and "near.png" not in caplog.text


@needs_weights
def test_the_reconstruction_command_aligns_its_targets(portrait, tmp_path):
    operator, spnn = SimpleNamespace(A=lambda x: x.mean((2, 3))), SimpleNamespace(img_size=32, notes={})
    networks = SimpleNamespace(operator=operator, spnn=spnn, image_size=32, judge=None, attributes=ATTRIBUTES,
                               device="cpu", edits=lambda *_: SimpleNamespace(logits={}))  # fmt: skip
    placed(portrait, 18).save(tmp_path / "a.png")
    Image.new("RGB", (200, 200), "grey").save(tmp_path / "b.png")
    targets = read_targets(TargetSettings(path_y=str(tmp_path), align=True), networks, 1)
    expected = load_image(tmp_path / "a.png", 32, align=True).mean((1, 2))
    assert targets.names == ["a"] and torch.equal(targets.logits[0], expected)
    assert len(targets.skipped) == 1 and "b.png: no face found" in targets.skipped[0]
