"""Data sets as they lie on disks, whole and broken; loaders that repeat, resume and share."""

import itertools
import json
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import refused
from layout import annotation_text, circle, picture, write_dataset
from PIL import Image

import data_loader
from data_loader import (
    ATTRIBUTES,
    MASK_CLASSES,
    CelebAMaskHQ,
    augmented,
    batches_from,
    download_dataset,
    find_dataset,
    make_loader,
    make_loaders,
    mirror_masks,
    read_annotations,
    split_indices,
    with_batches,
)
from images import load_image
from utils import InputError


@pytest.fixture
def root(tmp_path):
    return write_dataset(tmp_path / "faces")


# Annotations ---------------------------------------------------------------------------------------------------------


def test_annotations_tolerate_bom_crlf_blank_lines_tabs_zeros_and_any_order_of_names(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(annotation_text(3))
    expected = read_annotations(path)
    assert expected.files == ["0.jpg", "1.jpg", "2.jpg"]
    assert expected.labels.shape == (3, 40) and set(np.unique(expected.labels)) == {0, 1}
    text = annotation_text(3, end="\r\n").replace("  ", "\t ").replace("-1", "0")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n \r\n")
    assert (read_annotations(path).labels == expected.labels).all()
    row = " ".join("1" if name == "Smiling" else "-1" for name in ATTRIBUTES[::-1])
    path.write_text(f"1\n{' '.join(ATTRIBUTES[::-1])}\n0.jpg {row}\n")
    labels = read_annotations(path).labels
    assert labels.sum() == 1 and labels[0, ATTRIBUTES.index("Smiling")] == 1


def edited(line: int, change) -> str:
    lines = annotation_text(3).splitlines()
    lines[line - 1] = change(lines[line - 1])
    return "\n".join(lines)


@pytest.mark.parametrize("text, message", [
    ("", "line 2: expected the 40 attribute names"),
    (edited(1, lambda s: "5"), "the count says '5' images, the file lists 3"),
    (edited(2, lambda s: s.replace("Smiling", "Smilling")), "line 2: expected the 40 attribute names; missing Smiling"),
    (edited(4, lambda s: s + " 1"), "line 4: 1.jpg has 41 values, expected 40"),
    (edited(4, lambda s: s.rsplit(" ", 1)[0] + " 2"), "line 4: 1.jpg has the value '2', expected 1 or -1"),
    (edited(4, lambda s: s.replace("1.jpg", "0.jpg")), "line 4: 0.jpg is listed twice, first on line 3"),
])  # fmt: skip
def test_annotation_errors_name_file_and_line(tmp_path, text, message):
    (tmp_path / "anno.txt").write_text(text)
    refused(f"anno.txt.*{message}", read_annotations, tmp_path / "anno.txt")


# Folders and splits --------------------------------------------------------------------------------------------------


def test_a_download_is_found_where_it_lies_and_its_failures_name_the_flag(monkeypatch, tmp_path):
    nested, asked = write_dataset(tmp_path / "versions" / "1" / "CelebAMask-HQ", 1), []
    hub = types.SimpleNamespace(dataset_download=lambda handle: asked.append(handle) or str(tmp_path))
    monkeypatch.setitem(sys.modules, "kagglehub", hub)
    assert download_dataset() == nested == find_dataset(nested)[0] and asked == ["liusonghua/celebamaskhq"]
    hub.dataset_download = lambda handle: 1 / 0
    refused("division by zero; pip install kagglehub.*--dataset_path", download_dataset)


def test_splits():
    assert split_indices(30000, "train") == range(0, 24000)
    assert split_indices(30000, "val") == range(24000, 27000)
    assert split_indices(30000, "test") == range(27000, 30000)
    for n in (1, 7, 10, 23):
        assert [i for split in ("train", "val", "test") for i in split_indices(n, split)] == list(range(n))


# Data set ------------------------------------------------------------------------------------------------------------


def test_cached_and_uncached_are_equal(root, caplog):
    """Items are those of the numbers, not of the names, and what `load_image` makes of the files, of any shape."""
    circle(89, 109).save(root / "CelebA-HQ-img" / "19.jpg", quality=95)
    (root / ".cache").write_text("in the way")
    unwritable, plain = CelebAMaskHQ(root, "test", 8), CelebAMaskHQ(root, "test", 8, cache=False)
    assert "no cache of resized images" in caplog.text
    (root / ".cache").unlink()
    cached = CelebAMaskHQ(root, "test", 8)
    assert cached._images.kept is not None and plain._images.kept is None and len(cached) == 2
    annotations = read_annotations(root / "CelebAMask-HQ-attribute-anno.txt")
    for dataset in (cached, plain, unwritable):
        assert dataset.files == ["18.jpg", "19.jpg"]
        for i, (image, labels) in enumerate(dataset, start=18):
            assert torch.equal(image, load_image(root / "CelebA-HQ-img" / f"{i}.jpg", 8))
            assert torch.equal(labels, torch.from_numpy(annotations.labels[i]).float())


def test_cache_is_built_once_and_again_when_the_source_changes(root, monkeypatch):
    built, write = [], data_loader.atomic_write
    monkeypatch.setattr(data_loader, "atomic_write", lambda file: built.append(file.name) or write(file))
    old, _ = (CelebAMaskHQ(root, "test", 8) for _ in range(2))
    assert built == ["test_8x8.npy"]
    before = old[0][0]
    picture(99).save(root / "CelebA-HQ-img" / "18.jpg", quality=95)
    after = CelebAMaskHQ(root, "test", 8)[0][0]
    assert built == ["test_8x8.npy"] * 2 and not torch.equal(before, after) and torch.equal(old[0][0], before)
    assert {file.name for file in (root / ".cache").iterdir()} == {"test_8x8.npy", "test_8x8.json"}
    kept = (root / "CelebA-HQ-img" / "18.jpg").rename(root / "kept.jpg")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # killed between the cache's two files
        patch.setattr(data_loader, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        CelebAMaskHQ(root, "test", 8)
    kept.rename(root / "CelebA-HQ-img" / "18.jpg")
    assert torch.equal(CelebAMaskHQ(root, "test", 8)[0][0], after)
    (root / ".cache" / "test_8x8.json").write_text("{")  # what is damaged is made again
    assert torch.equal(CelebAMaskHQ(root, "test", 8)[0][0], after)
    assert json.loads((root / ".cache" / "test_8x8.json").read_text())["bad"] == {}


@pytest.mark.parametrize("cache", [True, False])
def test_bad_images_are_left_out_and_named_or_refused(root, caplog, cache):
    folder = root / "CelebA-HQ-img"
    (folder / "2.jpg").unlink()
    (folder / "3.jpg").write_text("no picture")
    (folder / "5.jpg").write_bytes((folder / "5.jpg").read_bytes()[:-100])
    for _ in range(2):  # built, then found
        caplog.clear()
        dataset = CelebAMaskHQ(root, "train", 8, cache=cache)
        assert all(name in caplog.text for name in ("2.jpg", "3.jpg", "5.jpg"))
        assert dataset.files == [f"{i}.jpg" for i in range(16) if i not in (2, 3, 5)]
        assert torch.equal(dataset[2][0], load_image(folder / "4.jpg", 8))
    for file in (root / ".cache").glob("train_8x8.npy"):
        assert len(np.load(file, mmap_mode="r")) == 15  # a part of CelebA is no larger for what it lacks
    for said in ("2.jpg: no such file", r"3.jpg.*and 1 more"):
        refused(said, CelebAMaskHQ, root, "train", 8, strict=True, cache=cache)
        picture(2).save(folder / "2.jpg")


def test_a_split_of_which_nothing_is_left_is_refused(root, tmp_path, caplog):
    refused("val split of 3 images is empty", CelebAMaskHQ, write_dataset(tmp_path / "three", 3), "val", 8)
    picture(0).save(root / "CelebA-HQ-img" / "20.jpg")
    for i in (18, 19):
        (root / "CelebA-HQ-img" / f"{i}.jpg").unlink()
    refused("no image of the test split", CelebAMaskHQ, root, "test", 8)
    assert "left out 1 pictures without labels: 20.jpg" in caplog.text


# CelebA --------------------------------------------------------------------------------------------------------------


def write_celeba(folder, form: str, n: int = 12):
    """CelebA's layout with ``n`` pictures; of five, one is of the validation, one of the test split."""
    inside = {"kaggle": "img_align_celeba/img_align_celeba", "published": "Img/img_align_celeba",
              "nested": "Img/img_align_celeba/img_align_celeba", "png": "Img/img_align_celeba_png"}  # fmt: skip
    images, csv = folder / inside.get(form, "img_align_celeba"), form in ("kaggle", "quoted")
    images.mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, n + 1)]
    for i, name in enumerate(names):
        picture(i, (178, 218)).save((images / name).with_suffix(".png" if form == "png" else ".jpg"))
    bits = [line.split()[1:] for line in annotation_text(n).splitlines()[2:]]
    if form == "quoted":  # and floats, as pandas writes a column with gaps
        bits = [[f'"{bit}.0"' for bit in row] for row in bits]
    attributes = [["image_id", *ATTRIBUTES], *([name, *row] for name, row in zip(names, bits, strict=True))]
    partition = [["image_id", "partition"], *([name, "01200"[i % 5]] for i, name in enumerate(names))]
    for table, inner, rows in (("list_attr_celeba", "Anno", attributes), ("list_eval_partition", "Eval", partition)):
        head = [str(n), " ".join(ATTRIBUTES)] if inner == "Anno" else []
        lines = [",".join(row) for row in rows] if csv else [*head, *(" ".join(row) for row in rows[1:])]
        below = inner if form in ("published", "nested", "png") else ""
        target = folder / below / f"{table}.{'csv' if csv else 'txt'}"
        target.parent.mkdir(exist_ok=True)
        target.write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("form", ["torchvision", "kaggle", "quoted", "published", "nested", "png"])
def test_celeba_is_found_and_split_as_published(tmp_path, form):
    assert find_dataset(write_celeba(tmp_path / "deep" / "celeba", form)) == find_dataset(tmp_path)
    parts = {split: CelebAMaskHQ(tmp_path, split, 16) for split in ("train", "val", "test", "all")}
    suffix = "png" if form == "png" else "jpg"
    for split, numbers in {"val": (2, 7, 12), "test": (3, 8), "train": (1, 4, 5, 6, 9, 10, 11)}.items():
        assert parts[split].files == [f"{i:06d}.{suffix}" for i in numbers]
    (tmp_path / "anno.txt").write_text(annotation_text(12))
    labels = torch.from_numpy(read_annotations(tmp_path / "anno.txt").labels).float()
    assert len(parts["all"]) == 12 and torch.equal(parts["all"].labels, labels)
    assert torch.equal(parts["test"][1][1], labels[7])


def shorter(path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


@pytest.mark.parametrize("form, harm, said", [
    ("", lambda r: shorter(r / "list_eval_partition.txt", 26), "partition.txt: no split for 000011.jpg, 000012.jpg"),
    ("", lambda r: (r / "list_eval_partition.txt").write_text("1.jpg 7\n"), "line 1: expected a file name and 0, 1"),
    ("", lambda r: (r / "list_eval_partition.txt").unlink(), "list_eval_partition.txt is missing in"),
    ("kaggle", lambda r: shorter(r / "list_attr_celeba.csv", 30), "line 13: 000012.jpg has .* values, expected 40"),
    ("", lambda r: shutil.rmtree(r) or r.mkdir() or (r / "img.zip").touch(), "unpack img.zip first; expected a fol"),
    ("", shutil.rmtree, "no such folder; unpack an archive first; expected a folder with CelebA-HQ-img/ and"),
])  # fmt: skip
def test_a_data_set_that_does_not_fit_is_one_line(tmp_path, form, harm, said):
    root = write_celeba(tmp_path / "celeba", form)
    harm(root)
    refused(said, CelebAMaskHQ, root, "train", 8)


# Masks ---------------------------------------------------------------------------------------------------------------


def write_masks(root, parts: bool = False):
    """A mask for each of the 20 images as palette pictures, with ``parts`` as the published parts too; the masks."""
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 19, (20, 24, 24)).astype(np.uint8)
    (root / "masks").mkdir()
    if parts:
        (root / "CelebAMask-HQ-mask-anno" / "0").mkdir(parents=True)
    for i, mask in enumerate(masks):
        palette = Image.fromarray(mask)
        palette.putpalette(list(range(57)))
        palette.save(root / "masks" / f"{i}.png")
        for number, part in enumerate(MASK_CLASSES[1:] if parts else (), start=1):
            # what a later part covers belongs to an earlier one too
            shown = (mask == number) | ((mask > number) & (rng.random(mask.shape) < 0.3))
            if shown.any():
                name = f"{i:05d}_{part}.png"
                Image.fromarray(shown.astype(np.uint8) * 255).save(root / "CelebAMask-HQ-mask-anno" / "0" / name)
    return torch.from_numpy(masks).long()


def test_masks_of_parts_and_of_palettes_are_the_same(root):
    masks = write_masks(root, parts=True)
    parts = CelebAMaskHQ(root, "all", 12, mask_size=24)
    assert torch.equal(parts.batch(range(20))[1], masks) and parts[0][1].dtype == torch.int64
    assert torch.equal(CelebAMaskHQ(root, "test", 12, mask_size=8)[1][1], masks[19, 1::3, 1::3])  # nearest
    for cache in (True, False):  # oblong ones too
        image, mask = CelebAMaskHQ(root, "test", (6, 12), mask_size=(12, 24), cache=cache)[1]
        assert torch.equal(image, load_image(root / "CelebA-HQ-img" / "19.jpg", (6, 12)))
        assert torch.equal(mask, masks[19, 6:18])
    shutil.rmtree(root / "CelebAMask-HQ-mask-anno")
    assert torch.equal(CelebAMaskHQ(root, "all", 12, mask_size=24).batch(range(20))[1], masks)


def test_a_folder_of_images_and_masks_with_attributes_where_known(root, caplog):
    masks = write_masks(root)
    (root / "CelebA-HQ-img").rename(root / "images")
    (root / "CelebAMask-HQ-attribute-anno.txt").unlink()
    unlabelled = CelebAMaskHQ(root, "all", 8, mask_size=24)
    assert torch.equal(unlabelled.batch(range(20))[1], masks)
    refused("no image of the all split can be used: 0.jpg: attributes unknown", CelebAMaskHQ, root, "all", 8)
    rows = [f"{i},somewhere," + ",".join(["-1"] * 40 if i % 3 else [""] * 40) for i in range(20)]
    (root / "labels.csv").write_text("\n".join([f"idx,source,{','.join(ATTRIBUTES)}", *rows]))
    assert len(CelebAMaskHQ(root, "all", 8, mask_size=24)) == 20
    caplog.clear()
    labelled = CelebAMaskHQ(root, "all", 8)
    assert labelled.files == [f"{i}.jpg" for i in range(20) if i % 3] and labelled.labels.unique().tolist() == [0]
    assert "left out 7 of 20 images: 0.jpg: attributes unknown" in caplog.text


def test_a_mask_belongs_to_the_picture_as_it_is_seen(root):
    """A camera that was held upright writes a lying picture, and how to turn it."""
    write_masks(root)
    turned = Image.Exif()
    turned[0x0112] = 6
    for i, size in ((1, (12, 20)), (3, (20, 12))):
        picture(i, (20, 12)).save(root / "CelebA-HQ-img" / f"{i}.jpg", exif=turned)
        Image.new("P", size, 3).save(root / "masks" / f"{i}.png")
    assert CelebAMaskHQ(root, "all", 8, mask_size=8).files == [f"{i}.jpg" for i in range(20) if i != 3]


def test_left_and_right_change_sides_with_the_picture(root):
    masks = write_masks(root)
    names = dict(enumerate(MASK_CLASSES))
    other = {"l_eye": "r_eye", "l_brow": "r_brow", "l_ear": "r_ear"}
    other |= {right: left for left, right in other.items()}
    expected = torch.tensor([MASK_CLASSES.index(other.get(names[k], names[k])) for k in range(19)])[masks.flip(-1)]
    assert torch.equal(mirror_masks(masks), expected) and torch.equal(mirror_masks(expected), masks)
    images = CelebAMaskHQ(root, "train", 24).batch(range(16))[0]
    loader = make_loaders(root, 24, 16, mask_size=24).train
    (x, y) = next(iter(loader))
    turned = 0
    for (index, mirrored), image, mask in zip(loader.batch_sampler.batches(0)[0], x, y, strict=True):
        assert torch.equal(image, images[index].flip(-1) if mirrored else images[index])
        assert torch.equal(mask, expected[index] if mirrored else masks[index])
        turned += mirrored
    assert y.dtype == torch.int64 and 2 <= turned <= 14


def test_masks_that_do_not_fit_are_one_line(root, caplog):
    refused("no masks; expected CelebAMask-HQ-mask-anno/", CelebAMaskHQ, root, "train", 8, mask_size=8)
    write_masks(root, parts=True)
    folder = root / "CelebAMask-HQ-mask-anno" / "0"
    for file in folder.glob("00003_*"):
        file.unlink()
    shorter(folder / "00004_hair.png", 40)
    Image.new("L", (9, 8)).save(folder / "00005_hair.png")
    assert len(CelebAMaskHQ(root, "train", 8, mask_size=8)) == 13
    for said in ("00003_skin.png: cannot read", "00004_hair.png: cannot read", "00005_hair.png: a mask of 9x8"):
        assert said in caplog.text
    shutil.rmtree(root / "CelebAMask-HQ-mask-anno")
    Image.new("RGB", (24, 24)).save(root / "masks" / "2.png")
    Image.fromarray(np.full((24, 24), 19, np.uint8)).save(root / "masks" / "7.png")
    Image.new("P", (24, 20)).save(root / "masks" / "9.png")
    with pytest.raises(InputError, match="2.png: not a mask; expected a palette picture of classes 0 to 18"):
        CelebAMaskHQ(root, "train", 8, mask_size=8, strict=True)
    caplog.clear()
    assert len(CelebAMaskHQ(root, "train", 8, mask_size=8)) == 13
    assert "7.png: not a mask" in caplog.text and "9.png: a mask of 24x20 for an image of 12x12" in caplog.text


# Loaders -------------------------------------------------------------------------------------------------------------


def batches(root, start: int, count: int, **settings) -> list:
    return list(itertools.islice(batches_from(make_loaders(root, 8, 5, **settings).train, start), count))


def equal(one, other) -> bool:
    return all(
        keys == others and torch.equal(x, a) and torch.equal(y, b)
        for (keys, (x, y)), (others, (a, b)) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_depend_on_the_seed_and_the_step_alone(root, workers):
    reference = batches(root, 0, 9)
    assert reference[0][1][0].shape == (5, 3, 8, 8) and reference[0][1][1].shape == (5, 40)
    torch.manual_seed(7)  # the global generator has no say
    assert equal(reference, batches(root, 0, 9, workers=workers, cache=workers == 1))
    assert equal(reference[5:], batches(root, 5, 4, workers=workers))  # after a resume
    orders = [[keys for keys, _ in some] for some in (reference[:3], reference[3:6], batches(root, 0, 3, seed=2))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    loader = make_loaders(root, 8, 5, workers=workers).train
    assert torch.equal(next(iter(loader))[0], reference[0][1][0])  # left early
    (x, y), _ = with_batches(loader, [keys for keys, _ in reference[4:6]], workers)
    assert torch.equal(x, reference[4][1][0]) and torch.equal(y, reference[4][1][1])


def test_a_loader_leaves_every_other_thread_its_own_number_of_threads(root):
    own = torch.get_num_threads()
    torch.set_num_threads(3)
    assert len(list(make_loaders(root, 8, 5, workers=2).train)) == 3
    with ThreadPoolExecutor(1) as pool:
        seen = torch.get_num_threads(), pool.submit(torch.get_num_threads).result()
    torch.set_num_threads(own)
    assert seen == (3, 3)


def test_evaluation_sees_every_image_in_order_and_training_drops_a_remainder(root):
    loaders = make_loaders(root, 8, 3, flip=False)
    assert len(loaders.train) == 5 and sum(len(x) for x, _ in loaders.train) == 15
    for split in ("val", "test"):
        dataset = CelebAMaskHQ(root, split, 8)
        assert torch.equal(torch.cat([x for x, _ in getattr(loaders, split)]), torch.stack([x for x, _ in dataset]))
    assert [len(x) for x, _ in make_loaders(root, 8, 100).train] == [16]  # never an empty epoch
    dataset = CelebAMaskHQ(root, "train", 8)
    assert all(any(torch.equal(image, x) for x, _ in dataset) for image in next(iter(loaders.train))[0])  # unmirrored
    assert [len(x) for x, _ in make_loader(dataset, 7)] == [7, 7, 2]
    images, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))  # the plain loader works too
    assert torch.equal(images, dataset.batch(range(4))[0]) and torch.equal(labels, dataset.labels[:4])


# Augmentation --------------------------------------------------------------------------------------------------------


def test_each_picture_changes_its_own_way_stays_in_range_and_moves_with_strength():
    def drawn(strength: float, share: float = 1.0) -> torch.Tensor:
        torch.manual_seed(0)
        return augmented(x, strength, share)

    ramp = torch.linspace(-0.8, 0.8, 16, dtype=torch.float64)  # interpolation does not change it much
    x = torch.stack([ramp[None].expand(16, 16), ramp[:, None].expand(16, 16), ramp[None] * ramp[:, None]]).repeat(
        400, 1, 1, 1
    )
    assert drawn(0.0) is x and torch.equal(drawn(1.0), drawn(1.0))
    assert drawn(1.0).shape == x.shape and drawn(1.0).abs().max() <= 1
    moved = (drawn(1.0) - x).flatten(1).abs().amax(1)
    assert moved.min() > 0.005 and len({round(value, 9) for value in moved.tolist()}) == 400
    assert (drawn(1.0) - x).abs().mean() > 3 * (drawn(0.1) - x).abs().mean()
    left = (drawn(1.0, share=0.25) - x).flatten(1).abs().amax(1) < 1e-6
    assert 250 < left.sum() < 350  # 300 expected, deviation 9
