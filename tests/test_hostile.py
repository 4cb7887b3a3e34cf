"""Files from strangers: weights, pictures, configs and paths that mean harm, or are merely odd."""

import json
import os
import pickle
import struct
import warnings

import numpy as np
import pytest
import torch
import yaml
from helpers import randomise, seeded, tiny
from layout import write_dataset
from PIL import Image
from torch import nn

from checkpoints import read_weights, save_spnn
from data_loader import CelebAMaskHQ
from DDNM import main as reconstruct
from DDNM.guided_diffusion.inputs import Networks, TargetSettings, parse_set, read_targets
from DDNM.guided_diffusion.prior import Prior, load_prior, save_prior, small_unet
from DDNM.guided_diffusion.results import read_logits
from images import find_images, load_image
from models import SPNN
from utils import InputError, read_yaml

# --- Weights ---------------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def raw(protocol):
    def write(path):
        path.write_bytes(pickle.dumps({"model": Malicious()}, protocol=protocol))

    return write


CPU = torch.device("cpu")

CODE = {
    "archive": lambda path: torch.save({"model": Malicious()}, path),
    "legacy": lambda path: torch.save({"model": Malicious()}, path, _use_new_zipfile_serialization=False),
    "pickle 2": raw(2),
    "a whole module": lambda path: torch.save(nn.Linear(2, 2), path),
}


@pytest.mark.parametrize("write", CODE.values(), ids=CODE)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_code_in_a_weight_file_is_not_run(tmp_path, monkeypatch, write, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=f"{name}: damaged, or not a plain state dict") as error:
            read_weights(tmp_path / name)
    assert not (tmp_path / "pwned").exists() and "\n" not in str(error.value)


def test_the_code_above_would_have_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw(2)(tmp_path / "w.pth")
    pickle.loads((tmp_path / "w.pth").read_bytes())
    assert (tmp_path / "pwned").exists()


def safetensors_file(header: bytes, content: bytes = b"", length: int | None = None):
    return lambda path: path.write_bytes(
        struct.pack("<Q", len(header) if length is None else length) + header + content
    )


def header(**tensor):
    return json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **tensor}}).encode()


def saved(**state):
    return lambda path: torch.save(state, path)


NO_WEIGHTS = {
    "complex.pth": (saved(w=torch.zeros(2, dtype=torch.complex64)), "no plain tensor"),
    "nan.pth": (saved(ok=torch.zeros(2), w=torch.tensor([0, float("nan")])), "w holds NaN"),
    "long.safetensors": (safetensors_file(header(), b"1234", 1 << 62), "damaged"),
    "kind.safetensors": (safetensors_file(header(dtype="F99"), b"1234"), "damaged"),
    "nan.safetensors": (safetensors_file(header(), struct.pack("<f", float("nan"))), "w holds NaN"),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
@pytest.mark.filterwarnings("ignore")  # torch's own, while the files are written
def test_what_is_no_plain_weight_file_is_one_line(tmp_path, name):
    write, said = NO_WEIGHTS[name]
    write(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: .*{said}") as error:
        read_weights(tmp_path / name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def small_prior() -> Prior:
    return Prior(small_unet(8, (4,), unshuffle=2, norm_groups=2, attention_size=0))


def test_a_prior_that_holds_nan_is_named(tmp_path):
    prior = small_prior()
    nn.init.constant_(prior.unet.conv_out.bias, float("nan"))
    save_prior(prior, tmp_path)
    with pytest.raises(InputError, match="conv_out.bias holds NaN"):
        load_prior(tmp_path)


# --- Pictures --------------------------------------------------------------------------------------------------------

RED, GREEN = (200, 20, 30), (10, 180, 40)


def halves(mode: str = "RGB") -> Image.Image:
    """Red on the left, green on the right."""
    image = Image.new("RGB", (16, 8), RED)
    image.paste(GREEN, (8, 0, 16, 8))
    return image.convert(mode)


def sides(path, size=None):
    """The 8-bit colours left and right of the middle."""
    image = ((load_image(path, size) + 1) * 127.5).round()  # (3, H, W)
    h, w = image.shape[1:]
    return tuple(tuple(int(v) for v in image[:, h // 2, x]) for x in (w // 4, w - 1 - w // 4))


def near(a, b, by: int = 12) -> bool:
    return all(abs(p - q) <= by for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True))


def sixteen_bit_colour(path):
    """A PNG of 16-bit RGB, which Pillow itself cannot write."""
    import zlib

    row = b"\0" + b"".join(struct.pack(">HHH", *(v * 257 for v in c)) for c in [RED] * 8 + [GREEN] * 8)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 16, 8, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * 8)),
        (b"IEND", b""),
    ]
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, body in chunks:
            file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))


def animated(**how):
    return lambda path: halves().save(path, save_all=True, append_images=[Image.new("RGB", (16, 8), "blue")], **how)


WORK = {
    "plain.png": lambda path: halves().save(path),
    "palette.png": lambda path: halves().quantize().save(path),
    "palette.gif": lambda path: halves().save(path),
    "animated.gif": animated(),
    "animated.png": animated(),
    "animated.webp": animated(lossless=True),
    "pages.tiff": animated(),
    "cmyk.jpg": lambda path: halves("CMYK").save(path, quality=100),
    "cmyk.tiff": lambda path: halves("CMYK").save(path),
    "ycbcr.jpg": lambda path: halves().save(path, quality=100, subsampling=0),
    "alpha.png": lambda path: halves("RGBA").save(path),
    "sixteen.png": sixteen_bit_colour,
    "a png.jpg": lambda path: halves().save(path, format="PNG"),
    "UPPER.PNG": lambda path: halves().save(path, format="PNG"),
}


@pytest.mark.parametrize("name", WORK)
def test_pictures_of_every_kind_look_as_they_should(tmp_path, name):
    WORK[name](tmp_path / name)
    assert find_images(tmp_path) == [tmp_path / name]
    assert near(sides(tmp_path / name), (RED, GREEN)), sides(tmp_path / name)


@pytest.mark.parametrize("values, expected", [
    (np.array([[0, 65535]]), (0, 255)), (np.array([[20, 200]]), (0, 1)), (np.array([[257 * 7, 257 * 99]]), (7, 99)),
])  # fmt: skip
def test_sixteen_bits_of_grey_are_scaled_however_dark(tmp_path, values, expected):
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "grey.png")
    image = ((load_image(tmp_path / "grey.png") + 1) * 127.5).round()
    assert image[:, 0].tolist() == [list(map(float, expected))] * 3


def test_half_transparent_pixels_are_laid_over_white(tmp_path):
    Image.new("RGBA", (2, 2), (200, 0, 0, 128)).save(tmp_path / "half.png")
    image = ((load_image(tmp_path / "half.png") + 1) * 127.5).round()[:, 0, 0].tolist()
    assert image == pytest.approx([227, 127, 127], abs=1)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9])
    palette.save(tmp_path / "clear.gif", transparency=0)
    assert (load_image(tmp_path / "clear.gif") == 1).all()


@pytest.mark.parametrize("orientation, expected", [(1, (RED, GREEN)), (2, (GREEN, RED)), (3, (GREEN, RED))])
def test_exif_turns_a_picture_upright(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    halves().save(tmp_path / "a.png", exif=exif)
    assert near(sides(tmp_path / "a.png"), expected)


def test_exif_that_is_damaged_costs_nothing(tmp_path):
    halves().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=100, subsampling=0)
    assert near(sides(tmp_path / "a.jpg"), (RED, GREEN))


@pytest.mark.parametrize("shape", [(1, 1), (20_000, 8), (8, 20_000), (20_000, 1)])
def test_pictures_of_any_shape_are_cropped_to_their_middle(tmp_path, shape):
    image = Image.new("RGB", shape, RED)
    image.putpixel((shape[0] // 2, shape[1] // 2), GREEN)
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 16)
    assert loaded.shape == (3, 16, 16) and loaded.isfinite().all()
    assert (loaded[1] > loaded[1].min()).any() or min(shape) == 1, "the middle is in it"


def declared(width, height):
    """A PNG that says to be of that size, with hardly any content."""

    def write(path):
        sixteen_bit_colour(path)
        content = bytearray(path.read_bytes())
        content[16:24] = struct.pack(">II", width, height)
        import zlib

        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        path.write_bytes(content)

    return write


def cut(path):
    halves().resize((256, 256)).save(path)
    path.write_bytes(path.read_bytes()[:-200])


POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(pwned) (w) file closefile\nshowpage\n%%EOF\n"
)
REFUSED = {
    "bomb.png": (declared(60_000, 60_000), "bomb"),
    "promised.png": (declared(3000, 3000), "truncated|cannot read"),
    "cut.png": (cut, "truncated"),
    "cut.jpg": (cut, "truncated"),
    "nothing.jpg": (lambda path: path.touch(), "not a picture"),
    "text.jpg": (lambda path: path.write_text("no picture"), "not a picture"),
    "postscript.jpg": (lambda path: path.write_bytes(POSTSCRIPT), "not a picture"),
    "pipe.jpg": (lambda path: os.mkfifo(path), "not a file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_named_and_skipped_or_refused(tmp_path, name):
    write, said = REFUSED[name]
    write(tmp_path / name)
    halves().save(tmp_path / "good.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=f"{name}: .*({said})") as error:
            load_image(tmp_path / name, 8)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
        model = tiny()
        networks = Networks(model, None, None, list("abc")[: model.num_classes], CPU)
        found = read_targets(TargetSettings(path_y=str(tmp_path)), networks, 1)
    assert found.names == ["good"] and len(found.files) == 1 and [name in line for line in found.skipped] == [True]
    with pytest.raises(InputError, match=name):
        read_targets(TargetSettings(path_y=str(tmp_path), strict=True), networks, 1)


def test_a_data_set_leaves_out_what_is_no_picture(tmp_path):
    root = write_dataset(tmp_path, 10)
    for index, kind in ((1, "bomb.png"), (3, "cut.jpg"), (5, "postscript.jpg"), (7, "text.jpg")):
        (root / "CelebA-HQ-img" / f"{index}.jpg").unlink()
        REFUSED[kind][0](root / "CelebA-HQ-img" / f"{index}.jpg")
    for cache in (True, False):
        assert CelebAMaskHQ(root, "all", 8, cache=cache).files == [f"{i}.jpg" for i in (0, 2, 4, 6, 8, 9)]
    with pytest.raises(InputError, match="1.jpg"):
        CelebAMaskHQ(root, "all", 8, strict=True)


# --- Names and paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "n" * 300, "line\nbreak", "bell\a"])
def test_a_name_in_a_table_is_a_file_name(tmp_path, name):
    (tmp_path / "t.csv").write_text(f'name,a\n"{name}",1\n')
    with pytest.raises(InputError, match="line 2: (name|expected)"):
        read_logits(tmp_path / "t.csv", ["a"])


def test_a_logit_beyond_float32_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("name,a\nx,1e99\n")
    with pytest.raises(InputError, match="line 2: a value is not finite"):
        read_logits(tmp_path / "t.csv", ["a"])
    with pytest.raises(InputError, match="1e99"):
        parse_set(["a=1e99"], ["a"], None)


@pytest.mark.parametrize("text", ["name,a\nx,1,2\n", "a,name\n1\n", "name,a\nx\n"])
def test_a_table_whose_rows_are_too_long_or_short_is_one_line(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match="line 2: expected"):
        read_logits(tmp_path / "t.csv", ["a"])


@pytest.fixture
def samples(tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruct, "SAMPLES", tmp_path / "samples")
    (tmp_path / "samples").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0.png").write_text("mine")
    return tmp_path / "samples"


@pytest.mark.parametrize("name", ["..", ".", "", "a/../..", "../mine", "{mine}", "link", "link/x", "a/../../mine"])
def test_results_stay_in_their_root(samples, tmp_path, name):
    (samples / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="must be inside"):
        reconstruct.result_folder(reconstruct.Run(config=tmp_path, image_folder=name.format(mine=tmp_path / "mine")))


def test_only_caches_of_its_own_are_deleted(tmp_path):
    root = write_dataset(tmp_path, 10)
    CelebAMaskHQ(root, "train", 8)
    (old,) = (root / ".cache").glob("*.npy")
    (root / ".cache" / "train_8_notes.txt").write_text("mine")
    (root / ".cache" / f"train_8_{'0' * 16}.txt").write_text("mine")
    os.utime(root / "CelebA-HQ-img" / "0.jpg")
    CelebAMaskHQ(root, "train", 8)
    left = {path.name for path in (root / ".cache").iterdir()}
    assert old.name not in left and {"train_8_notes.txt", f"train_8_{'0' * 16}.txt"} <= left and len(left) == 3


# --- Configs ---------------------------------------------------------------------------------------------------------

CONFIGS = {
    "code": ("a: !!python/object/apply:os.mkdir [pwned]\n", "could not determine a constructor"),
    "twice": ("a: 1\na: 2\n", "'a' is there twice"),
    "bytes": (b"a: \xff\xfe", "not readable"),
    "unknown": ("k" * 1000 + ": 1", "unknown key"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_means_harm_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text, said = CONFIGS[name]
    (tmp_path / "c.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"config .*c.yml: .*({said})") as error:
        read_yaml(tmp_path / "c.yml", "abcdefghi")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("key, value", [
    ("steps", 0), ("steps", 10**9), ("steps", "many"), ("steps", [1]), ("steps", 1.5), ("seed", -1), ("seed", 2**64),
    ("eta", float("nan")), ("eta", 2), ("travel_repeat", 10**9), ("travel_length", 10**9), ("batch_size", 10**9),
    ("lambda1", float("inf")), ("guidance", "magic"), ("ni", "yes"), ("path_y", {"a": 1}), ("spnn", "a\0b"),
    ("image_folder", "a\0b"), ("prior_image_size", -64), ("prior_image_size", True), ("prior_model", [1]),
])  # fmt: skip
def test_types_and_ranges_of_a_config_are_checked(tmp_path, key, value):
    (tmp_path / "c.yml").write_text(yaml.safe_dump({"path_y": "x", key: value}))
    with pytest.raises(InputError, match=key):
        reconstruct.parse(["--config", str(tmp_path / "c.yml")])


def test_random_weights_are_accepted_all_the_same(tmp_path):
    """What the tests above refuse is refused for what is wrong with it."""
    model = randomise(tiny(), seeded(0))
    save_spnn(tmp_path / "m.pth", model, {"attributes": ["a", "b", "c"], "typical_logits": [[-1, 1]] * 3})
    assert SPNN.from_pretrained(tmp_path / "m.pth").notes["attributes"] == ["a", "b", "c"]
    save_prior(small_prior(), tmp_path / "prior")
    assert load_prior(tmp_path / "prior").image_size == 8
