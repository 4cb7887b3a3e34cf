import builtins
import logging
import os
import pickle
import sys
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data_loader
from data_loader import (
    ATTRIBUTES,
    CelebAMaskHQ,
    attribute_indices,
    download_dataset,
    find_dataset,
    find_images,
    load_image,
    make_loader,
    make_loaders,
    read_annotations,
    save_image,
    split_indices,
    to_uint8,
)
from utils import InputError


def picture(seed: int, size: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def annotation_text(n: int, names=ATTRIBUTES, end: str = "\n") -> str:
    rng = np.random.default_rng(n)
    rows = [f"{i}.jpg  " + " ".join("1" if bit else "-1" for bit in rng.integers(0, 2, len(names))) for i in range(n)]
    return end.join([str(n), " ".join(names), *rows]) + end


def write_dataset(folder, n: int = 20):
    (folder / "CelebA-HQ-img").mkdir(parents=True)
    for i in range(n):
        picture(i).save(folder / "CelebA-HQ-img" / f"{i}.jpg", quality=95)
    (folder / "CelebAMask-HQ-attribute-anno.txt").write_text(annotation_text(n))
    return folder


@pytest.fixture
def root(tmp_path):
    return write_dataset(tmp_path / "faces")


# Images --------------------------------------------------------------------------------------------------------------


def test_forty_names():
    assert len(ATTRIBUTES) == len(set(ATTRIBUTES)) == 40
    assert ATTRIBUTES[0] == "5_o_Clock_Shadow" and ATTRIBUTES[20] == "Male" and ATTRIBUTES[-1] == "Young"


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


def circle(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    middle, radius = (width / 2, height / 2), 0.4 * min(width, height)
    box = [middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius]
    ImageDraw.Draw(image).ellipse(box, fill="black")
    return image


@pytest.mark.parametrize("size", [(89, 109), (109, 89), (64, 64), (101, 300)])
@pytest.mark.parametrize("cache", [True, False])
def test_training_and_use_see_a_picture_alike(tmp_path, size, cache):
    """A circle stays one, and lies at the same place, by the data set as by `load_image`."""
    root = write_dataset(tmp_path, 10)
    for path in (root / "CelebA-HQ-img").iterdir():
        circle(*size).save(path, quality=95)
    image = CelebAMaskHQ(root, "all", 32, cache=cache)[0][0]
    assert torch.equal(image, load_image(root / "CelebA-HQ-img" / "0.jpg", 32))
    dark = image.mean(0) < 0
    assert dark.any(0).sum() == dark.any(1).sum() and 24 <= dark.any(0).sum() <= 28
    torch.testing.assert_close(image, image.flip(-1), atol=0.2, rtol=0)


def test_a_picture_that_is_not_square_is_named_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(data_loader, "_CROPPED", threading.Lock())
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


# Annotations ---------------------------------------------------------------------------------------------------------


def test_annotations_tolerate_bom_crlf_blank_lines_and_tabs(tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text(annotation_text(3))
    expected = read_annotations(plain)
    assert expected.files == ["0.jpg", "1.jpg", "2.jpg"] and expected.attributes == ATTRIBUTES
    assert expected.labels.shape == (3, 40) and set(np.unique(expected.labels)) == {0, 1}
    odd = tmp_path / "odd.txt"
    odd.write_bytes(b"\xef\xbb\xbf" + annotation_text(3, end="\r\n").replace("  ", "\t ").encode() + b"\r\n \r\n")
    assert (read_annotations(odd).labels == expected.labels).all()
    odd.write_text(annotation_text(3).replace("-1", "0"))
    assert (read_annotations(odd).labels == expected.labels).all()


def test_annotations_reorder_the_names(tmp_path):
    names = ATTRIBUTES[::-1]
    row = " ".join("1" if name == "Smiling" else "-1" for name in names)
    (tmp_path / "a.txt").write_text(f"1\n{' '.join(names)}\n0.jpg {row}\n")
    labels = read_annotations(tmp_path / "a.txt").labels
    assert labels.sum() == 1 and labels[0, ATTRIBUTES.index("Smiling")] == 1


def edited(line: int, change) -> str:
    lines = annotation_text(3).splitlines()
    lines[line - 1] = change(lines[line - 1])
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty"),
        (edited(1, lambda s: "many"), "line 1: expected the number of images, got 'many'"),
        (edited(1, lambda s: "5"), "line 1: the count says 5 images, the file lists 3"),
        ("3\n", "expected the 40 attribute names"),
        (annotation_text(3).split("\n", 1)[1], "line 1: expected the number of images"),
        (edited(2, lambda s: s.replace(" Young", "")), "line 2: 39 attribute names, expected 40; missing Young"),
        (edited(2, lambda s: s.replace("Smiling", "Smilling")), "line 2: unknown attribute 'Smilling'.*'Smiling'"),
        (edited(2, lambda s: s.replace("Young", "Male")), "line 2: attribute 'Male' is named twice"),
        (edited(4, lambda s: s + " 1"), "line 4: 1.jpg has 41 values, expected 40"),
        (edited(4, lambda s: s.rsplit(" ", 1)[0]), "line 4: 1.jpg has 39 values"),
        (edited(4, lambda s: s.rsplit(" ", 1)[0] + " 2"), "line 4: Young of 1.jpg is '2', expected 1 or -1"),
        (edited(4, lambda s: s.replace("1.jpg", "0.jpg")), "line 4: 0.jpg is listed twice, first on line 3"),
        (edited(4, lambda s: s.replace("1.jpg", "../1.jpg")), "line 4: '../1.jpg' is not a plain file name"),
    ],
)
def test_annotation_errors_name_file_and_line(tmp_path, text, message):
    (tmp_path / "anno.txt").write_text(text)
    with pytest.raises(InputError, match=f"anno.txt.*{message}"):
        read_annotations(tmp_path / "anno.txt")


def test_annotation_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot read annotations"):
        read_annotations(tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"3\n\xff\xfe\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_annotations(tmp_path / "bytes.txt")


def test_attribute_indices():
    assert attribute_indices(["Male", "Young"]) == [20, 39]
    with pytest.raises(InputError, match="'Smile'.*'Smiling'"):
        attribute_indices(["Smile"])


# Folders and splits --------------------------------------------------------------------------------------------------


def test_find_dataset_searches_below(tmp_path):
    nested = write_dataset(tmp_path / "versions" / "1" / "CelebAMask-HQ", 1)
    assert find_dataset(tmp_path) == nested == find_dataset(nested)


def test_find_dataset_failures(tmp_path):
    with pytest.raises(InputError, match="no such folder.*CelebA-HQ-img"):
        find_dataset(tmp_path / "none")
    with pytest.raises(InputError, match="CelebAMask-HQ-attribute-anno.txt"):
        find_dataset(tmp_path)
    (tmp_path / "CelebA-HQ-img").mkdir()
    with pytest.raises(InputError, match="attribute-anno.txt is missing in"):
        find_dataset(tmp_path)


def test_download_failures_name_the_flag(monkeypatch):
    def refuse(handle):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=refuse))
    with pytest.raises(InputError, match="no network.*--dataset_path"):
        download_dataset()
    monkeypatch.delitem(sys.modules, "kagglehub")
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "kagglehub":
            raise ImportError
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match="pip install kagglehub.*--dataset_path"):
        download_dataset()


def test_download_finds_the_nested_folder(monkeypatch, tmp_path):
    nested = write_dataset(tmp_path / "CelebAMask-HQ", 1)
    asked = []
    hub = types.SimpleNamespace(dataset_download=lambda handle: asked.append(handle) or str(tmp_path))
    monkeypatch.setitem(sys.modules, "kagglehub", hub)
    assert download_dataset() == nested and asked == ["liusonghua/celebamaskhq"]


def test_splits():
    assert split_indices(30000, "train") == range(0, 24000)
    assert split_indices(30000, "val") == range(24000, 27000)
    assert split_indices(30000, "test") == range(27000, 30000)
    for n in (1, 7, 10, 23):
        assert [i for split in ("train", "val", "test") for i in split_indices(n, split)] == list(range(n))
    with pytest.raises(InputError, match="'tests'.*'test'"):
        split_indices(10, "tests")


# Data set ------------------------------------------------------------------------------------------------------------


def test_items_splits_and_labels(root):
    dataset = CelebAMaskHQ(root, "test", 8)
    assert dataset.files == ["18.jpg", "19.jpg"]  # by number, not by text
    image, labels = dataset[1]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and -1 <= image.min() < image.max() <= 1
    annotations = read_annotations(root / "CelebAMask-HQ-attribute-anno.txt")
    assert torch.equal(labels, torch.from_numpy(annotations.labels[19]).float())
    assert torch.equal(image, load_image(root / "CelebA-HQ-img" / "19.jpg", 8))
    with pytest.raises(IndexError):
        dataset[2]
    assert len(list(dataset)) == 2


def test_cached_and_uncached_are_equal(root):
    cached, plain = CelebAMaskHQ(root, "train", 8), CelebAMaskHQ(root, "train", 8, cache=False)
    assert cached._cache_file is not None and plain._cache_file is None
    for a, b in zip(cached, plain, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    copy = pickle.loads(pickle.dumps(cached))  # what a spawned worker gets
    assert copy._pixels is None and torch.equal(copy[3][0], cached[3][0])


def test_cache_is_built_once_and_again_when_the_source_changes(root, monkeypatch):
    built = []
    build = CelebAMaskHQ._build_cache
    monkeypatch.setattr(CelebAMaskHQ, "_build_cache", lambda self, *args: built.append(1) or build(self, *args))
    before = CelebAMaskHQ(root, "test", 8)[0][0]
    CelebAMaskHQ(root, "test", 8)
    assert len(built) == 1
    picture(99).save(root / "CelebA-HQ-img" / "18.jpg", quality=95)
    after = CelebAMaskHQ(root, "test", 8)[0][0]
    assert len(built) == 2 and not torch.equal(before, after)
    assert len(list((root / ".cache").iterdir())) == 2  # the old one is gone: an array and its notes
    file = next((root / ".cache").glob("*.npy"))
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(CelebAMaskHQ(root, "test", 8)[0][0], after) and len(built) == 3


def test_unwritable_cache_is_a_warning(root, caplog):
    (root / ".cache").write_text("in the way")
    dataset = CelebAMaskHQ(root, "test", 8)
    assert "no cache of resized images" in caplog.text and dataset[0][0].shape == (3, 8, 8)


@pytest.mark.parametrize("cache", [True, False])
def test_bad_images_are_left_out_and_named_or_refused(root, caplog, cache):
    folder = root / "CelebA-HQ-img"
    (folder / "2.jpg").unlink()
    (folder / "3.jpg").write_text("no picture")
    (folder / "5.jpg").write_bytes((folder / "5.jpg").read_bytes()[:-100])
    for _ in range(2):  # built, then found
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            dataset = CelebAMaskHQ(root, "train", 8, cache=cache)
        assert all(name in caplog.text for name in ("2.jpg", "3.jpg", "5.jpg"))
        assert dataset.files == [f"{i}.jpg" for i in range(16) if i not in (2, 3, 5)]
        assert torch.equal(dataset[2][0], load_image(folder / "4.jpg", 8))
    with pytest.raises(InputError, match="2.jpg: no such file"):
        CelebAMaskHQ(root, "train", 8, strict=True, cache=cache)
    picture(2).save(folder / "2.jpg")
    with pytest.raises(InputError, match=r"3.jpg.*and 1 more"):
        CelebAMaskHQ(root, "train", 8, strict=True, cache=cache)


def test_data_sets_that_make_no_sense(root, tmp_path):
    with pytest.raises(InputError, match="val split of 3 images is empty"):
        CelebAMaskHQ(write_dataset(tmp_path / "three", 3), "val", 8)
    with pytest.raises(InputError, match="img_size"):
        CelebAMaskHQ(root, "train", 0)
    for i in (18, 19):
        (root / "CelebA-HQ-img" / f"{i}.jpg").unlink()
    with pytest.raises(InputError, match="no image of the test split"):
        CelebAMaskHQ(root, "test", 8)


# Loaders -------------------------------------------------------------------------------------------------------------


def epochs(root, count: int = 2, **settings) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = make_loaders(root, 8, 5, **settings).train
    return [batch for _ in range(count) for batch in loader]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_same_seed_same_batches_for_any_number_of_workers(root):
    reference = epochs(root, seed=1)
    assert len(reference) == 6 and reference[0][0].shape == (5, 3, 8, 8) and reference[0][1].shape == (5, 40)
    torch.manual_seed(7)  # the global generator has no say
    torch.rand(3)
    assert equal(reference, epochs(root, seed=1))
    assert equal(reference, epochs(root, seed=1, workers=2))
    assert equal(reference, epochs(root, seed=1, cache=False))
    assert not equal(reference, epochs(root, seed=2))
    assert not equal(reference[:3], reference[3:])  # another epoch, another order


def test_an_epoch_is_the_same_after_a_resume(root):
    reference = epochs(root, 3)
    loader = make_loaders(root, 8, 5).train
    loader.batch_sampler.epoch = 2
    assert equal(reference[6:], list(loader))


def test_training_images_are_mirrored_at_random(root):
    dataset = CelebAMaskHQ(root, "train", 8)
    mirrored = 0
    for images, _ in make_loaders(root, 8, 16).train:
        for image in images:
            whole = any(torch.equal(image, original) for original, _ in dataset)
            assert whole or any(torch.equal(image.flip(-1), original) for original, _ in dataset)
            mirrored += not whole
    assert 2 <= mirrored <= 14
    plain = next(iter(make_loaders(root, 8, 16, flip=False).train))[0]
    assert all(any(torch.equal(image, original) for original, _ in dataset) for image in plain)


def test_evaluation_sees_every_image_in_order_and_training_drops_a_remainder(root):
    loaders = make_loaders(root, 8, 3)
    assert len(loaders.train) == 5 and sum(len(x) for x, _ in loaders.train) == 15
    for split in ("val", "test"):
        dataset = CelebAMaskHQ(root, split, 8)
        assert torch.equal(torch.cat([x for x, _ in getattr(loaders, split)]), torch.stack([x for x, _ in dataset]))
    assert [len(x) for x, _ in make_loaders(root, 8, 100).train] == [16]  # never an empty epoch
    dataset = CelebAMaskHQ(root, "train", 8)
    assert [len(x) for x, _ in make_loader(dataset, 7)] == [7, 7, 2]


def test_the_plain_loader_works_too(root):
    dataset = CelebAMaskHQ(root, "train", 8)
    images, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert torch.equal(images, dataset.batch(range(4))[0]) and torch.equal(labels, dataset.labels[:4])


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"batch_size": 2, "workers": -1}])
def test_loader_settings_that_make_no_sense(root, settings):
    with pytest.raises(InputError, match="batch_size"):
        make_loaders(root, 8, **settings)


def test_import_is_light():
    assert not hasattr(data_loader, "kagglehub")
