"""The report of diagnostics.py, and that it catches what it is there to catch."""

import copy
import json
import math
import weakref

import pytest
import torch
from helpers import ForgetsShift, random, randomise, seeded, tiny

import diagnostics
from checkpoints import save_spnn
from data_loader import ATTRIBUTES, CelebAMaskHQ, make_loader
from diagnostics import IDENTITIES, accuracy, diagnose, first_nonfinite, format_report, map_accuracy, penrose
from metrics import accuracy_by_attribute, predict
from models import SPNN
from utils import InputError


@pytest.fixture
def model() -> SPNN:
    return randomise(tiny(), seeded(0))


@pytest.fixture
def images() -> torch.Tensor:
    return random((5, 3, 4, 4), seed=1, dtype=torch.float32).clamp(-1, 1)


def loader(images: torch.Tensor, classes: int = 3, batch: int = 2) -> list:
    labels = (torch.rand((len(images), classes), generator=seeded(4)) > 0.5).float()
    return list(zip(images.split(batch), labels.split(batch), strict=True))


def test_penrose_measures_rounding_and_leaves_the_model_alone(model, images):
    model.train()
    before = copy.deepcopy(model.state_dict())
    single, double = (penrose(model, images, precision=p) for p in ("float32", "float64"))
    for name in IDENTITIES:
        assert double[name]["relative_max"] < 1e-10 < single[name]["relative_max"] < 1e-3, name
        for figures in (single[name], double[name]):
            assert figures["absolute_rms"] <= figures["absolute_max"]
    assert single["lost"] == pytest.approx(double["lost"], rel=1e-4) and double["lost"] > 0.01
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])
    assert model.training and penrose(model, images, precision="float64") == double
    one = penrose(model, images, precision="float64", batch_size=1)
    for key in ("naturalness_norm", "natural_distance", "lost"):
        assert one[key] == pytest.approx(double[key], rel=1e-9)


def test_naturalness_is_what_it_says(model, images):
    figures = penrose(model, images, precision="float64")
    model = model.double()
    with torch.no_grad():
        y = model(images.double())
        natural, zero = model.natural(y).z, model(torch.zeros(1, 3, 4, 4).double(), True)[1]
        squares = [(a - b).square().flatten(1) for a, b in zip(natural, zero, strict=True) if a is not None]
        assert figures["natural_distance"] == pytest.approx(torch.cat(squares, 1).mean().item())
        assert figures["naturalness_norm"] == pytest.approx(model.pinv(y).square().flatten(1).sum(1).mean().item())


def test_a_fresh_network_can_be_measured_and_no_images_cannot(model, images):
    figures = penrose(tiny(), torch.zeros(2, 3, 4, 4))  # g = 0
    assert figures["right_inverse"]["relative_max"] < 1e-5 and figures["lost"] == 0
    for measure in (lambda: penrose(tiny(), images[:0]), lambda: accuracy(model, [], "cpu")):
        with pytest.raises(ValueError, match="no images"):
            measure()


def test_the_report_catches_a_broken_pinv(images):
    model = tiny()
    model.pinn.blocks[1] = ForgetsShift(12, 5, hidden=6)
    figures = penrose(randomise(model, seeded(0)), images, precision="float64")
    for name in IDENTITIES:
        assert figures[name]["relative_rms"] > 1e-3, name


def test_accuracy(model, images):
    with torch.no_grad():
        truth = (model(images) > 0).float()
    truth[:, 1] = 1 - truth[:, 1]
    figures = accuracy(model.train(), [(images[:2], truth[:2]), (images[2:], truth[2:])], "cpu")
    assert figures["by_attribute"] == [1.0, 0.0, 1.0] and figures["images"] == 5 and model.training
    assert figures["accuracy"] == pytest.approx(2 / 3)


# --- Maps ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mapper() -> SPNN:
    """Oblong images of odd height to maps of 4 channels, 3x4."""
    blocks = [
        ("PixelUnshuffleBlock", {"r": (3, 2)}),
        ("ConvPINNBlock", {"in_ch": 18, "out_ch": 4, "hidden": 6, "see_place": True}),
    ]
    return randomise(SPNN(3, 4, img_size=(9, 8), layer_channels=blocks), seeded(0))


def test_iou_of_known_maps():
    truth = torch.tensor([[[0, 0, 1, 1], [2, 2, 1, 1]]])
    guess = torch.tensor([[[0, 1, 1, 1], [2, 0, 1, 3]]])
    found = diagnostics.iou_by_class(diagnostics.confusion(guess, truth, 5))
    torch.testing.assert_close(found, torch.tensor([1 / 3, 3 / 5, 1 / 2, 0, math.nan]).double(), equal_nan=True)


def test_maps_of_classes_and_pictures_are_measured(mapper):
    x = random((5, 3, 9, 8), seed=1, dtype=torch.float32)
    with torch.no_grad():
        y = mapper(x)
    seen = y.argmax(1)
    wrong = (seen + 1) % 4
    report = diagnose(mapper, [(x[:3], seen[:3]), (x[3:], wrong[3:])], attributes=["a", "b", "c", "d"], samples=4)
    assert report["accuracy"]["places"] == pytest.approx(3 / 5) and report["accuracy"]["images"] == 5
    table = torch.bincount(4 * torch.cat([seen[:3], wrong[3:]]).flatten() + seen.flatten(), minlength=16).view(4, 4)
    union = table.sum(0) + table.sum(1) - table.diag()
    assert report["accuracy"]["by_class"] == pytest.approx((table.diag() / union).tolist())
    for precision, most in {"float64": 1e-10, "float32": 1e-3}.items():
        figures = report["penrose"][precision]
        assert all(figures[name]["relative_max"] < most for name in IDENTITIES)
    assert figures["lost"] > 0.01 and report["nonfinite"] is None
    shown = format_report(report)
    assert "intersection over union" in shown and "\n| d | " in shown
    picture = diagnose(mapper, [(x, 1.1 * y)], precisions=["float32"])
    assert picture["accuracy"]["relative_rms"] == pytest.approx(0.1 / 1.1, rel=1e-4)
    assert "measured picture: rms error" in format_report(picture)


def test_targets_that_do_not_fit_a_map_name_both_shapes(mapper):
    x = random((2, 3, 9, 8), seed=1, dtype=torch.float32)
    for target in (torch.zeros(2, 9, 8, dtype=torch.long), torch.zeros(2, 4), torch.zeros(2, 3, 4)):
        shape = ", ".join(map(str, target.shape[1:]))
        with pytest.raises(ValueError, match=rf"maps are \(4, 3, 4\), the targets \({shape}"):
            map_accuracy(mapper, [(x, target)], "cpu")
    with pytest.raises(ValueError, match="no images"):
        map_accuracy(mapper, [], "cpu")


# --- The first number that is not finite -----------------------------------------------------------------------------


@torch.no_grad()
def spoil(model: SPNN, block: int, value: float) -> None:
    model.pinn.blocks[block].s.net[0].weight[0, 0] = value


def test_first_nonfinite_names_a_weight_or_the_images(model, images):
    assert first_nonfinite(model, images) is None
    assert first_nonfinite(model, images * math.inf) == "the images"
    spoil(model, 2, math.nan)
    spoil(model, 4, math.inf)
    assert first_nonfinite(model, images) == "weight pinn.blocks.2.s.net.0.weight"


BROKEN = {
    "latent": ("forward", lambda x, return_latent: (x, x * math.nan)),
    "output": ("forward", lambda x, return_latent: (x * math.nan, None)),
    "natural latent": ("natural_latent", lambda y: y * math.inf),
    "pseudo-inverse": ("pinv", lambda y, latent: y * math.nan),
}


@pytest.mark.parametrize("where", BROKEN)
def test_first_nonfinite_names_the_block(model, images, monkeypatch, where):
    monkeypatch.setattr(model.pinn.blocks[2], *BROKEN[where])
    assert first_nonfinite(model, images) == f"block 2 ConvPINNBlock(5->4), its {where}"


def test_diagnose_is_json_and_a_table(model, images):
    report = diagnose(model, loader(images), samples=3, attributes=["Bald", "Young", "Male"])
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["penrose"]["float64"]["images"] == 3 and report["accuracy"]["images"] == 5
    table = format_report(report)
    for text in ("g g' (y) = y", "float64", "Young", "first number that is not finite: none"):
        assert text in table
    one_class = format_report(diagnose(model, [(images, torch.ones(5, 3))], precisions=["float32"]))
    assert "balanced nan (5 images)" in one_class and " | nan |\n| logit 1 | " in one_class
    with pytest.raises(ValueError, match="2 attribute names for 3 logits"):
        diagnose(model, loader(images), attributes=["Bald", "Young"])


def test_diagnose_holds_no_more_images_than_it_measures(model, images):
    """Not the batches of the others: a data set has many."""
    batches: list[weakref.ref] = []

    def loader():
        for _ in range(5):
            batch = images.clone()
            batches.append(weakref.ref(batch.untyped_storage()))
            yield batch, torch.ones(len(images), 3)
        assert sum(storage() is not None for storage in batches) < 4  # the first, and the one in the loop

    diagnose(model, loader(), samples=1, precisions=["float32"])


def test_diagnose_of_a_model_with_nan_is_a_report(model, images):
    spoil(model, 4, math.nan)
    report = diagnose(model, loader(images))
    json.dumps(report, allow_nan=False)
    assert report["nonfinite"] == "weight pinn.blocks.4.s.net.0.weight"
    assert report["penrose"]["float32"]["right_inverse"]["relative_max"] is None
    assert "| nan | nan |" in format_report(report)


# --- The command -----------------------------------------------------------------------------------------------------


def checkpoint(folder, **notes):
    """A network of 8x8 images with 3 logits, saved with these notes."""
    save_spnn(folder / "best_model.pth", randomise(tiny(img_size=8), seeded(0)), notes)
    return folder / "best_model.pth"


def test_command(faces, tmp_path, capsys):
    target, names = tmp_path / "report.json", ["Smiling", "Male", "Eyeglasses"]
    weights = checkpoint(tmp_path, attributes=names)
    arguments = ["--checkpoint", weights, "--dataset_path", faces, "--json", target, "--device", "cpu"]
    assert diagnostics.main([str(a) for a in [*arguments, "--samples", 4, "--batch_size", 3, "--split", "all"]]) == 0
    assert "Eyeglasses" in capsys.readouterr().out
    report = json.loads(target.read_text())
    assert report["accuracy"]["images"] == 20 and report["penrose"]["float32"]["images"] == 4
    assert report["attributes"] == names and report["settings"]["split"] == "all"
    batches = list(make_loader(CelebAMaskHQ(faces, "all", 8), 20))
    logits, labels = predict(SPNN.from_pretrained(weights), batches, "cpu")
    expected = accuracy_by_attribute(logits, labels[:, [ATTRIBUTES.index(name) for name in names]])
    assert report["accuracy"]["by_attribute"] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("notes, said", [
    ({}, "3 logits, but no attribute names"), ({"attributes": ["Male"]}, "3 logits, but 1 attribute names"),
    ({"attributes": ["Male", "Smiley", "Young"]}, "unknown attribute 'Smiley', did you mean 'Smiling'"),
])  # fmt: skip
def test_command_refuses_unknown_labels(tmp_path, notes, said):
    weights = str(checkpoint(tmp_path, **notes))
    with pytest.raises(InputError, match=said):
        diagnostics.main(["--checkpoint", weights, "--dataset_path", "anywhere", "--device", "cpu"])
