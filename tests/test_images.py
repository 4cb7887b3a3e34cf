"""Pictures are found, read whatever they are, and made square, everywhere alike; faces are cut as CelebA-HQ's."""

import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from layout import circle, picture
from PIL import Image, ImageDraw

import images
import procedural_faces as faces
from data_loader import ATTRIBUTES
from DDNM.guided_diffusion.inputs import TargetSettings, read_targets
from images import (
    Face,
    align_face,
    find_faces,
    find_images,
    frame,
    load_image,
    misalignment,
    save_image,
    to_uint8,
    warn_unaligned,
)
from utils import InputError


def test_find_images_is_natural_nested_skips_hidden_and_names_the_rest(tmp_path, caplog):
    names = ["10.JPG", "2.jpg", "1.png", "sub/3.webp", "6.jfif", ".hidden.jpg", ".cache/5.jpg", "notes.txt", "a.heic"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path, tmp_path / "loop")
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == [
        "1.png", "2.jpg", "6.jfif", "10.JPG", "sub/3.webp",
    ]  # fmt: skip
    assert "left out" in caplog.text and "a.heic, notes.txt" in caplog.text
    assert find_images(tmp_path / "10.JPG") == [tmp_path / "10.JPG"]


@pytest.mark.parametrize("images, masks", [("CelebA-HQ-img", "CelebAMask-HQ-mask-anno/0"), ("images", "masks")])
def test_find_images_leaves_the_masks_of_a_data_set(tmp_path, images, masks):
    for name in (f"{images}/0.jpg", f"{masks}/0.png", "other/masks/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert names == [f"{images}/0.jpg", "other/masks/1.png"]


def test_find_images_failures(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="no images found"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match="notes.txt: not an image"):
        find_images(tmp_path / "notes.txt")


def test_load_image_crops_the_centre_square(tmp_path):
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, 2:6] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").shape == (3, 4, 8)
    assert (load_image(tmp_path / "a.png", 4) == 1).all()
    assert (load_image(tmp_path / "a.png", 2) == 1).all()


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (7, 90)])
@pytest.mark.parametrize("picture_size", [(100, 100), (300, 120), (178, 218)])
def test_oblong_sizes_keep_proportions_too(tmp_path, size, picture_size):
    circle(*picture_size).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", size)
    assert image.shape == (3, *size)
    dark = image.mean(0) < 0
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


def test_load_image_applies_exif_rotation(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (3, 8, 4)


def test_load_image_modes(tmp_path):
    rgba = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0] + [0] * 765)
    cases = {
        "alpha.png": (rgba, (1, 1, 1)),
        "la.png": (Image.new("LA", (4, 4), (0, 0)), (1, 1, 1)),
        "palette.png": (palette, (1, -1, -1)),
        "grey.png": (Image.new("L", (4, 4), 255), (1, 1, 1)),
        "bits.png": (Image.new("1", (4, 4), 1), (1, 1, 1)),
        "sixteen.png": (Image.fromarray(np.full((4, 4), 65535 // 5, dtype=np.uint16)), (51 / 127.5 - 1,) * 3),
        "float.tiff": (Image.fromarray(np.full((4, 4), 1.0, dtype=np.float32)), (1, 1, 1)),
        "cmyk.tiff": (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), (1, 1, 1)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        got = load_image(tmp_path / name)
        assert got.shape == (3, 4, 4) and got.dtype == torch.float32
        torch.testing.assert_close(got[:, 1, 1], torch.tensor(expected).float(), msg=name)


@pytest.mark.parametrize(
    "values, said",
    [
        (np.array([[-0.1, 1.0]], np.float32), "from -0.1 to 1, expected 0 to 1"),
        (np.array([[0, 300]], np.float32), "from 0 to 300, expected 0 to 255"),
        (np.array([[0, 70000]], np.int32), "from 0 to 70000, expected 0 to 65535"),
        (np.array([[-5, 9]], np.int32), "from -5 to 9, expected 0 to 255"),
        (np.array([[0, np.nan]], np.float32), "from nan to nan"),
    ],
)
def test_values_that_eight_bits_cannot_hold_are_refused(tmp_path, values, said):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=f"a.tiff.*{said}"):
        load_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", ["gif", "png", "tiff"])
def test_of_an_animation_the_first_frame_is_taken_and_said_so(tmp_path, caplog, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black", "red")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / f"b.{suffix}")
    for name in "ab":
        assert (load_image(tmp_path / f"{name}.{suffix}") == 1).all()
    (record,) = caplog.records
    assert f"a.{suffix}: of several frames or pages, the first is used" in record.getMessage()


def test_load_image_failures_name_the_file(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    for suffix in ("jpg", "png"):
        picture(0, 64).save(tmp_path / f"whole.{suffix}")
        (tmp_path / f"cut.{suffix}").write_bytes((tmp_path / f"whole.{suffix}").read_bytes()[:-2000])
    for name in ("text.jpg", "empty.jpg", "cut.jpg", "cut.png", "missing.jpg"):
        with pytest.raises(InputError, match=name):
            load_image(tmp_path / name)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    picture(0, 64).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="big.png.*bomb"):
        load_image(tmp_path / "big.png")


def test_uint8_round_trip_and_save(tmp_path):
    picture(3).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    save_image(image, tmp_path / "out" / "b.png")
    assert torch.equal(load_image(tmp_path / "out" / "b.png"), image)
    every = torch.arange(256)
    assert torch.equal(to_uint8(every.float().div(127.5).sub(1)), every.to(torch.uint8))
    assert to_uint8(torch.tensor([-9.0, 9.0, float("nan")])).tolist() == [0, 255, 0]
    with pytest.raises(ValueError, match="expected"):
        save_image(image[None], tmp_path / "c.png")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save_image(image, tmp_path / "file" / "d.png")


def test_a_grid_puts_images_side_by_side():
    pictures = torch.stack([torch.full((3, 2, 2), float(i)) for i in range(3)])
    sheet = images.grid(pictures, columns=2)
    assert sheet.shape == (3, 4, 4)
    assert sheet[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 1, 1], [2, 2, 1, 1]]


def test_celeba_is_framed_as_celeba_hq(tmp_path):
    """Where the rule of CelebA-HQ puts the mean eyes: level, a quarter of the width apart, at 48 % of the height."""
    eyes, mouth = np.array([[69.5, 111], [107.5, 111]]), np.array([88.5, 152])
    middle, across = eyes.mean(0), eyes[1] - eyes[0]
    down = mouth - middle
    side = max(4 * np.hypot(*across), 3.6 * np.hypot(*down))
    expected = (eyes - (middle + 0.1 * down - side / 2)) / side
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

POINTS = np.array([[69.5, 111.0], [107.5, 111.0], [88.0, 130.0], [73.0, 152.0], [104.0, 152.0]])
needs_weights = pytest.mark.skipif(not images.can_align(), reason="needs mtcnn")


def face(points: np.ndarray) -> Face:
    return Face(np.array([*points.min(0), *points.max(0)]), points)


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    """A drawn face; the detector takes some of them for one."""
    plain = {**dict.fromkeys(ATTRIBUTES, False), "Male": True, "Young": True, "No_Beard": True, "Brown_Hair": True}
    return faces.render(plain, faces.sample_variation(np.random.default_rng(1)), 256)


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
    np.testing.assert_allclose(frame(face(POINTS)), expected, atol=1)  # the mouth is not quite below the eyes
    straight = POINTS - (POINTS[3:].mean(0) - eyes) * [1, 0] * (np.arange(5) > 2)[:, None]
    np.testing.assert_allclose(frame(face(straight)), middle * [0, 1] + [88.5, 0] + expected - middle, atol=1e-9)


@pytest.mark.parametrize("angle", [25, -70])
def test_the_frame_turns_scales_and_moves_with_the_face(angle):
    a = np.deg2rad(angle)
    turn = 1.7 * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    moved = frame(face(POINTS @ turn.T + (30, -12)))
    np.testing.assert_allclose(moved, frame(face(POINTS)) @ turn.T + (30, -12), atol=1e-9)
    sides = np.hypot(*(moved - np.roll(moved, 1, 0)).T)
    np.testing.assert_allclose(sides, sides[0])


def test_a_turned_face_is_looked_at_again_upright(monkeypatch):
    """What the detector says of the turned picture is replaced by what it says of the upright one, turned back."""
    angle, middle = 0.5, frame(face(POINTS)).mean(0)
    turned = images._turned(POINTS, angle, middle)
    seen = []

    def found(image):
        seen.append(image)
        noise = np.array([[0, 0], [0, 0], [0, 0], [4, 0], [4, 0]])  # of the corners of the mouth, turned only
        return [face(turned + noise)] if len(seen) == 1 else [face(POINTS + image.size[0] * 1000), face(POINTS)]

    monkeypatch.setattr(images, "find_faces", found)
    corners = images.find_frame(Image.new("RGB", (178, 218)), "a.png")
    expected = images._turned(frame(face(POINTS)), angle, middle)
    assert len(seen) == 2 and np.hypot(*(corners - expected).T).max() < 12
    square = np.hypot(*(corners - np.roll(corners, 1, 0)).T)
    np.testing.assert_allclose(square, np.hypot(*(expected[0] - expected[1])))


def test_the_picture_is_cut_along_the_frame(monkeypatch):
    """Its corners are the frame's, whatever lies beyond the picture is its mirror image."""
    y, x = np.mgrid[0:218, 0:178]
    picture = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    monkeypatch.setattr(images, "find_faces", lambda image: [face(POINTS)])
    cut = np.asarray(align_face(picture)).astype(float)
    corners = frame(face(POINTS))
    side = len(cut)
    assert cut.shape == (side, side, 3) and side == round(np.hypot(*(corners[3] - corners[0])))
    for row, column, corner in ((0, 0, 0), (side - 1, 0, 1), (side - 1, side - 1, 2), (0, side - 1, 3)):
        np.testing.assert_allclose(cut[row, column, :2], corners[corner], atol=1.5)
    monkeypatch.setattr(images, "find_faces", lambda image: [face(POINTS - (60, 0))])
    cut = np.asarray(align_face(picture)).astype(float)
    np.testing.assert_allclose(cut[0, 0, 0], -(corners[0, 0] - 60), atol=1.5)


def test_without_the_weights_one_line_says_what_to_install(portrait, monkeypatch, caplog):
    images.load_detector.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install mtcnn"):
        align_face(portrait)
    warn_unaligned(portrait, "a.jpg")
    assert caplog.text == ""


@needs_weights
def test_other_weights_are_refused(monkeypatch):
    images.load_detector.cache_clear()
    monkeypatch.setitem(images._SHA256, "onet", "0" * 64)
    with pytest.raises(InputError, match="onet.lz4: not the weights of mtcnn 1.0.0"):
        images.load_detector()


@needs_weights
@pytest.mark.parametrize("angle", [0, 20])
def test_a_face_is_found_where_it_was_put(portrait, angle):
    (whole,) = find_faces(portrait)
    (found,) = find_faces(placed(portrait, angle))
    a = np.deg2rad(angle)
    turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    expected = (whole.points / 256 * 200 - 100) @ turn + (320, 240)
    np.testing.assert_allclose(found.points, expected, atol=8)
    assert np.ptp(found.box[::2]) > 60


@needs_weights
@pytest.mark.parametrize("angle", [-18, 35])
def test_an_aligned_face_has_level_eyes_where_celeba_hq_has_them(portrait, tmp_path, angle):
    placed(portrait, angle).save(tmp_path / "a.png")
    cut = align_face(Image.open(tmp_path / "a.png"))
    (found,) = find_faces(cut)
    eyes = found.points[:2] / cut.width
    assert abs(eyes[0, 1] - eyes[1, 1]) < 0.02
    assert 0.44 < eyes[:, 1].mean() < 0.51 and abs(eyes[:, 0].mean() - 0.5) < 0.03
    assert misalignment(cut) < 0.12 < 0.3 < misalignment(Image.open(tmp_path / "a.png"))
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
        with pytest.raises(InputError, match=f"{name}: {said}"):
            load_image(tmp_path / name, 32, align=True)
        load_image(tmp_path / name, 32, align=None)
    assert caplog.text == "" or "not square" in caplog.text


@needs_weights
def test_only_a_picture_far_from_the_frame_is_warned_of(portrait, tmp_path, caplog):
    portrait.save(tmp_path / "near.png")
    placed(portrait, 0, 150).save(tmp_path / "far.png")
    for name in ("near.png", "far.png"):
        load_image(tmp_path / name, 32, align=None)
    said = [record.getMessage() for record in caplog.records if "--align" in record.getMessage()]
    assert len(said) == 1 and "far.png" in said[0]


def networks() -> SimpleNamespace:
    operator = SimpleNamespace(A=lambda x: x.mean((2, 3)))
    spnn = SimpleNamespace(img_size=32, notes={})
    return SimpleNamespace(operator=operator, spnn=spnn, image_size=32, judge=None, attributes=ATTRIBUTES, device="cpu")


@needs_weights
def test_the_reconstruction_command_aligns_its_targets(portrait, tmp_path):
    placed(portrait, 18).save(tmp_path / "a.png")
    Image.new("RGB", (200, 200), "grey").save(tmp_path / "b.png")
    targets = read_targets(TargetSettings(path_y=str(tmp_path), align=True), networks(), 1)
    expected = load_image(tmp_path / "a.png", 32, align=True).mean((1, 2))
    assert targets.names == ["a"] and torch.equal(targets.logits[0], expected)
    assert len(targets.skipped) == 1 and "b.png: no face found" in targets.skipped[0]


def test_suppression_keeps_the_best_of_what_overlaps():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [2, 2, 6, 6]])
    scores = torch.tensor([0.8, 0.9, 0.7, 0.6])
    assert images._keep(boxes, scores, 0.5).tolist() == [1, 2, 3]  # 9/11 of the union with the first; 16/100
    assert images._keep(boxes, scores, 0.5, of_smaller=True).tolist() == [1, 2]
