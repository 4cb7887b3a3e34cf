"""The faces: determinism, layout, prevalence, consistency, and that every attribute can be seen."""

import itertools
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import procedural_faces as faces
from data_loader import ATTRIBUTES, MASK_CLASSES, CelebAMaskHQ, read_annotations
from utils import InputError

PLAIN = {**dict.fromkeys(ATTRIBUTES, False), "Male": True, "Young": True, "No_Beard": True, "Brown_Hair": True}


EXCLUSIVE = (  # never hold together
    *itertools.combinations(faces.HAIR_COLOURS, 2),
    *(("Bald", other) for other in (*faces.HAIR_COLOURS, "Straight_Hair", "Wavy_Hair", "Bangs", "Receding_Hairline")),
    *(("No_Beard", other) for other in faces.BEARDS),
    *itertools.combinations(("Wearing_Hat", "Bangs", "Receding_Hairline"), 2),
    ("Bald", "Wearing_Hat"),
    ("Straight_Hair", "Wavy_Hair"),
    ("Chubby", "Oval_Face"),
    ("Wearing_Necktie", "Wearing_Necklace"),
)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_attributes_are_neither_rare_nor_the_rule_and_never_contradict_each_other():
    sampled = [faces.sample_attributes(np.random.default_rng([0, i])) for i in range(5000)]
    prevalence = {name: np.mean([a[name] for a in sampled]) for name in ATTRIBUTES}
    assert {name: p for name, p in prevalence.items() if not 0.04 <= p <= 0.65} == {}
    assert 0.18 < np.mean(list(prevalence.values())) < 0.28
    for a in sampled:
        assert tuple(a) == ATTRIBUTES
        assert [pair for pair in EXCLUSIVE if a[pair[0]] and a[pair[1]]] == []
        assert a["Attractive"] == (a["Young"] and not any(a[name] for name in faces.UNATTRACTIVE))
        assert a["Male"] or (a["No_Beard"] and not a["Sideburns"])


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_attribute_can_be_seen_at_64_pixels(name):
    men = {*faces.BEARDS, "Sideburns", "No_Beard", "Bald", "Receding_Hairline", "Wearing_Necktie", "Bushy_Eyebrows"}
    base = PLAIN | {"Male": name in {*men, "Double_Chin"}, "Brown_Hair": name not in faces.HAIR_COLOURS}
    drawn = "Young" if name == "Attractive" else name
    variation = faces.sample_variation(np.random.default_rng(3))
    one, other = (pixels(faces.render({**base, drawn: there}, variation, 64)[0]) for there in (False, True))
    clearly = np.abs(one - other).max(2) > 25
    assert clearly.sum() >= 16, f"{clearly.sum()} pixels differ clearly"


def test_the_same_face_twice_is_the_same_and_others_differ():
    image, attributes = faces.draw_face(5, 7, 32)
    again, attributes_again = faces.draw_face(5, 7, 32)
    assert image.tobytes() == again.tobytes() and attributes == attributes_again
    for seed, index in ((5, 8), (6, 7), (7, 5)):
        assert faces.draw_face(seed, index, 32)[0].tobytes() != image.tobytes()


@pytest.mark.parametrize("size", [16, 33, 100, 256])
def test_any_size_shows_the_same_face(size):
    image, attributes = faces.draw_face(1, 4, size)
    reference, reference_attributes = faces.draw_face(1, 4, 64)
    assert image.mode == "RGB" and image.size == (size, size) and attributes == reference_attributes
    shrunk = [pixels(i.resize((16, 16), Image.Resampling.BOX)) for i in (image, reference)]
    assert np.abs(shrunk[0] - shrunk[1]).mean() < 8


def test_the_folder_holds_what_was_drawn_and_the_loader_reads_it(tmp_path):
    with_masks, without = tmp_path / "with", tmp_path / "without"
    for folder in (with_masks, without):
        faces.write_dataset(folder, 3, 32, seed=2, workers=1, masks=folder is with_masks)
    assert {path.name for path in without.iterdir()} == {faces.IMAGE_FOLDER, faces.ANNOTATION_FILE, faces.MARK}
    plain = files_of(without)
    assert {name: data for name, data in files_of(with_masks).items() if not name.startswith("masks/")} == plain
    found = read_annotations(without / faces.ANNOTATION_FILE)
    data = CelebAMaskHQ(with_masks, "all", 32, mask_size=32)
    assert found.files == ["0.jpg", "1.jpg", "2.jpg"] and len(data) == 3
    for index, name in enumerate(found.files):
        attributes, variation = faces.sample_face(2, index)
        image, mask = faces.render(attributes, variation, 32)
        assert found.labels[index].tolist() == list(attributes.values())
        written = Image.open(without / faces.IMAGE_FOLDER / name)
        assert np.abs(pixels(written.convert("RGB")) - pixels(image)).mean() < 4
        assert (data[index][1].numpy() == np.asarray(mask)).all()
    faces.write_dataset(with_masks, 1, 32, seed=2, workers=1, overwrite=True)
    assert list((with_masks / "masks").iterdir()) == []


def test_files_depend_neither_on_count_nor_on_workers(tmp_path):
    """Of a script without a main guard too, which processes that import it would run again."""
    faces.write_dataset(tmp_path / "one", 3, 16, seed=1, workers=1)
    script = f"from procedural_faces import write_dataset\nwrite_dataset({str(tmp_path / 'two')!r}, 4, 16, 1, 2)\n"
    (tmp_path / "script.py").write_text(script)
    runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    pictures = [name for name in one if name.endswith(".jpg")]
    assert len(pictures) == 3 and all(one[name] == two[name] for name in pictures)
    rows = [files[faces.ANNOTATION_FILE].split(b"\n") for files in (one, two)]
    assert rows[0][2:5] == rows[1][2:5]


def ends(index: int, **_) -> None:
    os._exit(1)


def test_a_process_that_ends_before_its_time_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(faces, "_write_face", ends)
    with pytest.raises(InputError, match="a process that draws has ended: .* __name__ "):
        faces.write_dataset(tmp_path / "new", 2, 16, seed=0, workers=2)


def photographs(folder: Path) -> None:
    """CelebA's own pictures have the same names."""
    (folder / faces.IMAGE_FOLDER).mkdir(parents=True)
    (folder / faces.IMAGE_FOLDER / "0.jpg").write_text("a photograph")


@pytest.mark.parametrize("prepare, overwrite, said", [
    (lambda out: out.mkdir() or (out / "note.txt").write_text("mine"), False, "not empty.*--overwrite"),
    (photographs, True, "not drawn here"),
])  # fmt: skip
def test_what_was_not_drawn_here_is_kept(tmp_path, prepare, overwrite, said):
    prepare(tmp_path / "out")
    before = files_of(tmp_path)
    with pytest.raises(InputError, match=said):
        faces.write_dataset(tmp_path / "out", 2, 16, seed=0, workers=1, overwrite=overwrite)
    assert files_of(tmp_path) == before


def test_overwriting_replaces_the_faces_and_nothing_else(tmp_path):
    faces.write_dataset(tmp_path, 3, 16, seed=0, workers=1)
    (tmp_path / "note.txt").write_text("mine")
    (tmp_path / faces.IMAGE_FOLDER / "holiday.jpg").write_text("mine")
    faces.write_dataset(tmp_path, 2, 16, seed=1, workers=1, overwrite=True)
    names = {name.removeprefix(faces.IMAGE_FOLDER + "/") for name in files_of(tmp_path)}
    assert names == {"0.jpg", "1.jpg", "holiday.jpg", "note.txt", faces.ANNOTATION_FILE, faces.MARK}


# Masks ---------------------------------------------------------------------------------------------------------------


def classes(changes: dict[str, bool], size: int = 128) -> dict[str, np.ndarray]:
    """Where each class shows on a plain man's face with some attributes changed."""
    _, mask = faces.render(PLAIN | changes, faces.sample_variation(np.random.default_rng(1)), size)
    return {name: np.asarray(mask) == number for number, name in enumerate(MASK_CLASSES)}


def test_every_class_of_the_masks_is_drawn():
    seen = np.zeros(len(MASK_CLASSES))
    for index in range(40):
        _, mask = faces.render(*faces.sample_face(0, index), 48)
        assert mask.mode == "P" and mask.size == (48, 48)
        seen += np.bincount(np.asarray(mask).ravel(), minlength=len(MASK_CLASSES)) > 0
    assert {name: n for name, n in zip(MASK_CLASSES, seen, strict=True) if n < 2} == {}
    always = ("background", "skin", "nose", "l_eye", "r_eye", "u_lip", "l_lip", "neck", "cloth")
    assert all(seen[MASK_CLASSES.index(name)] > 32 for name in always)


def test_left_is_the_persons_own_left():
    where = classes({})
    for part in ("eye", "brow", "ear"):
        left, right = (np.argwhere(where[f"{side}_{part}"])[:, 1].mean() for side in "lr")
        assert right < 64 < left


def test_what_is_worn_or_open_has_its_class_and_only_then():
    plain, glasses = classes({}), classes({"Eyeglasses": True})
    worn = {"Wearing_Hat": "hat", "Wearing_Earrings": "ear_r", "Wearing_Necklace": "neck_l"}
    for attribute, name in {**worn, "Mouth_Slightly_Open": "mouth"}.items():
        assert not plain[name].any() and classes({attribute: True})[name].sum() > 40, name
    assert not plain["eye_g"].any() and glasses["eye_g"].sum() > 40
    assert (glasses["l_eye"] == plain["l_eye"]).all()  # they hide no eye
    assert not classes({"Bald": True, "Brown_Hair": False})["hair"].any()


def test_hair_in_the_mask_has_the_colour_of_hair():
    image, mask = faces.render(PLAIN | {"Brown_Hair": False}, faces.sample_variation(np.random.default_rng(1)), 128)
    hue = np.asarray(image.convert("HSV"))[..., 0].astype(int)
    is_hair = np.asarray(mask) == MASK_CLASSES.index("hair")
    inside = np.median(hue[is_hair])
    assert np.abs(hue[is_hair] - inside).mean() < 6 < np.abs(hue[np.asarray(mask) == 0] - inside).mean()
