"""Pictures are found, read whatever they are, and made square, everywhere alike."""

import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_data_loader import circle, picture

import images
from images import find_images, load_image, save_image, to_uint8
from utils import InputError


def test_find_images_is_natural_nested_and_skips_hidden(tmp_path):
    names = ["10.JPG", "2.jpg", "1.png", "sub/3.webp", ".hidden.jpg", "._4.jpg", ".cache/5.jpg", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path, tmp_path / "loop")
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == [
        "1.png", "2.jpg", "10.JPG", "sub/3.webp",
    ]  # fmt: skip
    assert find_images(tmp_path / "10.JPG") == [tmp_path / "10.JPG"]


def test_find_images_takes_every_suffix_of_a_format_and_names_the_rest(tmp_path, caplog):
    for name in ("1.jfif", "2.JPE", "3.apng", "4.ppm", "5.dib", "6.jp2", "a.heic", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.stem for path in find_images(tmp_path)] == ["1", "2", "3", "4", "5", "6"]
    (record,) = caplog.records
    assert "left out" in record.getMessage() and "a.heic, notes.txt" in record.getMessage()


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


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (32, 32), (7, 90)])
@pytest.mark.parametrize("picture_size", [(100, 100), (300, 120), (120, 300), (178, 218)])
def test_oblong_sizes_keep_proportions_too(tmp_path, size, picture_size):
    circle(*picture_size).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", size)
    assert image.shape == (3, *size)
    dark = image.mean(0) < 0
    wide, high = dark[size[0] // 2].sum(), dark[:, size[1] // 2].sum()
    shown = min(int(wide), size[1] - 1), min(int(high), size[0] - 1)  # what is cut off ends at the edge
    assert abs(shown[0] - shown[1]) <= 2 or size[1] - 1 in shown or size[0] - 1 in shown


def test_a_picture_that_is_not_square_is_named_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images, "_CROPPED", threading.Lock())
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
        (np.array([[0, np.nan]], np.float32), "not finite"),
    ],
)
def test_values_that_eight_bits_cannot_hold_are_refused(tmp_path, values, said):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=f"a.tiff.*{said}"):
        load_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
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
