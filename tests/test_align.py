"""Faces are found and cut as CelebA-HQ's; without the weights, on what needs none."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import images
import procedural_faces as faces
from data_loader import ATTRIBUTES
from DDNM.guided_diffusion.inputs import TargetSettings, read_targets
from images import Face, align_face, find_faces, frame, load_image, misalignment, warn_unaligned
from utils import InputError

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


@pytest.mark.parametrize("angle", [0, 25, -70, 180])
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
@pytest.mark.parametrize("angle", [0, 20, -20])
def test_a_face_is_found_where_it_was_put(portrait, angle):
    (whole,) = find_faces(portrait)
    (found,) = find_faces(placed(portrait, angle))
    a = np.deg2rad(angle)
    turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    expected = (whole.points / 256 * 200 - 100) @ turn + (320, 240)
    np.testing.assert_allclose(found.points, expected, atol=8)
    assert np.ptp(found.box[::2]) > 60


@needs_weights
@pytest.mark.parametrize("angle", [3, -18, 35])
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
    return SimpleNamespace(operator=operator, spnn=spnn, judge=None, attributes=ATTRIBUTES, device="cpu")


@needs_weights
def test_the_reconstruction_command_aligns_its_targets(portrait, tmp_path):
    placed(portrait, 18).save(tmp_path / "a.png")
    Image.new("RGB", (200, 200), "grey").save(tmp_path / "b.png")
    targets = read_targets(TargetSettings(path_y=str(tmp_path), align=True), networks(), 1)
    expected = load_image(tmp_path / "a.png", 32, align=True).mean((1, 2))
    assert targets.names == ["a"] and torch.equal(targets.logits[0], expected)
    assert len(targets.skipped) == 1 and "b.png: no face found" in targets.skipped[0]


def test_the_command_says_once_that_the_weights_are_missing(portrait, tmp_path, monkeypatch):
    images.load_detector.cache_clear()
    for name in "ab":
        portrait.save(tmp_path / f"{name}.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install mtcnn"):
        read_targets(TargetSettings(path_y=str(tmp_path), align=True), networks(), 1)


def test_suppression_keeps_the_best_of_what_overlaps():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [2, 2, 6, 6]])
    scores = torch.tensor([0.8, 0.9, 0.7, 0.6])
    assert images._keep(boxes, scores, 0.5).tolist() == [1, 2, 3]  # 9/11 of the union with the first; 16/100
    assert images._keep(boxes, scores, 0.5, of_smaller=True).tolist() == [1, 2]
