"""Measurements of pictures, the network that is fitted to them, and what is restored with it."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import random, randomise, refused, seeded
from runs import tiny_prior

import diagnostics
import operators
import train_operator
from DDNM.guided_diffusion.prior import save_prior
from models import SPNN
from operators import DEGRADATIONS, find_function, measured_shape
from procedural_faces import write_dataset
from train_operator import PictureOperator, averages, build
from utils import InputError

# --- Measurements ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_measurement_makes_smaller_pictures_in_range(name):
    x = random((2, 3, 16, 24), seed=0, dtype=torch.float32).clamp(-1, 1)
    y = DEGRADATIONS[name](x)
    assert y.abs().max() <= 1 and y.shape[1:] == measured_shape(DEGRADATIONS[name], (3, 16, 24))
    assert y[0].numel() < x[0].numel()
    torch.testing.assert_close(DEGRADATIONS[name](x[1:]), y[1:])  # image by image


def test_a_lens_and_a_gain_that_do_nothing_are_averages():
    x = random((2, 3, 16, 24), seed=0, scale=0.3).clamp(-0.9, 0.9)
    torch.testing.assert_close(operators.lens(x, 0, 0, 1), F.avg_pool2d(x, 2), atol=2e-3, rtol=0)
    even = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(operators.saturation(even, 1, 0), torch.full((1, 3, 4, 4), 0.3))
    torch.testing.assert_close(operators.saturation(even), torch.full((1, 3, 4, 4), 0.9))
    torch.testing.assert_close(operators.saturation(even + 0.3), torch.ones(1, 3, 4, 4))  # not 1.44


def test_a_lens_bends_shades_and_keeps_the_middle_and_jpeg_has_a_quality():
    rows = torch.linspace(-1, 1, 32).view(1, 1, 32, 1).expand(1, 3, 32, 32)
    bent = operators.lens(rows, shade=0.0, gamma=1.0)[0, 0]
    assert (bent[:8, 8] > F.avg_pool2d(rows, 2)[0, 0, :8, 8]).all()  # the upper edge comes from farther inside
    white = operators.lens(torch.ones(1, 3, 32, 32))[0, 0]
    assert white[8, 8] > 0.99 and white[0, 0] < white[0, 8] < white[8, 8]
    x = random((1, 3, 16, 16), seed=0, dtype=torch.float32).clamp(-1, 1)
    fine, coarse = ((operators.jpeg(x, q) - F.avg_pool2d(x, 2)).square().mean() for q in (95, 5))
    assert coarse > 2 * fine


@pytest.mark.parametrize("function, message", [
    ("lense", "no such measurement.*did you mean 'lens'"), ("no_such_module:f", "No module named"),
    (lambda x: x, r"\(3, 8, 8\) holds no fewer numbers than \(3, 8, 8\)"),
    (lambda x: x.mean(), r"of images \(2, 3, 8, 8\).*it makes \(\)"),
    (lambda x: x[..., :3, :3], r"sides divide theirs, it makes \(2, 3, 3, 3\)"),
    (lambda x: F.avg_pool2d(x, 2).log(), "finite"), (lambda x: None, "it makes NoneType"),
    (lambda x: operators.saturation(x[..., :2, :2]), r"cannot measure images \(3, 8, 8\): [^\n]*$"),
])  # fmt: skip
def test_a_measurement_that_no_network_can_fit_is_one_line(function, message):
    refused(
        message, lambda: measured_shape(find_function(function) if isinstance(function, str) else function, (3, 8, 8))
    )


# --- The network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_shape, out_shape", [
    ((3, 16, 24), (3, 4, 6)), ((3, 64, 64), (19, 16, 16)), ((3, 12, 12), (1, 2, 2)),
    ((3, 15, 10), (3, 5, 5)),  # odd, and another factor on each side
    ((3, 8, 8), (1, 8, 8)),  # no smaller at all: grey, say
])  # fmt: skip
def test_a_chain_leads_to_any_map_and_keeps_the_law(in_shape, out_shape):
    g = randomise(build(in_shape, out_shape, 8).double(), seeded(0))
    assert g.out_shape == out_shape
    y = random((2, *out_shape), seed=1)
    torch.testing.assert_close(g(g.pinv(y)), y, rtol=1e-9, atol=1e-9)
    x = random((2, *in_shape), seed=2)
    assert (g.pinv(g(x)) - x).abs().max() > 0.01


def test_a_map_that_is_too_large_is_one_line():
    refused("architecture: block 1.*out_ch must be below in_ch", build, (3, 8, 8), (11, 4, 4), 8)


@pytest.mark.parametrize("channels, places", [(3, 4), (8, 4), (2, 9)])
def test_averages_come_first_in_an_orthogonal_matrix(channels, places):
    w = averages(channels, places)
    torch.testing.assert_close(w @ w.T, torch.eye(len(w), dtype=w.dtype))
    x = random((channels, places), seed=0)
    torch.testing.assert_close((w @ x.flatten())[:channels], x.mean(1) * places**0.5)
    least = torch.linalg.svdvals(torch.eye(len(w), dtype=w.dtype) + w).min()
    assert least > 0.1  # within reach of the Cayley transform


@pytest.mark.parametrize("by", [2, 4])
def test_a_network_starts_as_averages_and_their_pseudo_inverse(by):
    g = build((3, 16, 24), (3, 16 // by, 24 // by), 8).double()
    x = random((2, 3, 16, 24), seed=0)
    torch.testing.assert_close(g(x), F.avg_pool2d(x, by), rtol=1e-6, atol=1e-6)  # its weights are float32's
    torch.testing.assert_close(g.pinv(g(x)), F.interpolate(g(x), scale_factor=by), rtol=1e-5, atol=1e-5)


def test_distances_of_pictures():
    a, b = (random((2, 3, 4, 4), seed=seed) for seed in (0, 1))
    mean = (a - b).square().mean((1, 2, 3))
    torch.testing.assert_close(PictureOperator(None).distance(a, b), mean.sqrt())
    torch.testing.assert_close(PictureOperator(None).loss(a, b), mean / 2)


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    write_dataset(folder, 20, 16, seed=0, workers=1)
    return folder


@pytest.fixture(scope="module")
def prior(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prior")
    save_prior(tiny_prior(), folder)
    return folder


def run(faces: Path, out: Path, *more, operator: str = "lens") -> int:
    fixed = ["--operator", operator, "--dataset_path", faces, "--out", out, "--img_size", 16, "--device", "cpu"]
    short = ["--steps", 5, "--r_steps", 2, "--batch_size", 4, "--hidden", 8, "--lr", 3e-3, "--count", 3]
    return train_operator.main([str(word) for word in (*fixed, *short, *more)])


def test_the_command_fits_measures_and_restores(faces, prior, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_operator, "load_lpips", lambda *_: lambda a, b: (a - b).abs().mean((1, 2, 3)))
    assert run(faces, tmp_path) == 0
    assert len((tmp_path / "metrics_forward.csv").read_text().splitlines()) == 2
    refused("exists; give --overwrite, --resume", run, faces, tmp_path)
    assert run(faces, tmp_path, "--resume", "--prior", prior, "--sampling_steps", 2) == 0
    table = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert list(table) == ["g'(y)", "unguided", "NLBP, g", "DPS, g", "DPS, true A"]
    assert "'DPS, true A': 0." in json.loads((tmp_path / "table.json").read_text())["settings"]["DPS steps"]
    assert set(table["NLBP, g"]) == {"PSNR, dB", "LPIPS", "s/image", "error of A(x'), true A"}
    low, high = table["NLBP, g"]["PSNR, dB"][1:]
    assert low <= table["NLBP, g"]["PSNR, dB"][0] <= high
    assert "| NLBP, g |" in capsys.readouterr().out and (tmp_path / "sheet.png").stat().st_size > 1000
    # the diagnostics know what its output stands for
    weights = ["--operator", str(tmp_path / "best_model.pth"), "--dataset_path", str(faces), "--device", "cpu"]
    assert diagnostics.main([*weights, "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert 0 < report["accuracy"]["relative_rms"] < 0.9
    assert report["penrose"]["float64"]["right_inverse"]["relative_max"] < 1e-9
    assert "measured picture" in capsys.readouterr().out


def test_a_function_of_ones_own_without_a_gradient(faces, prior, tmp_path, monkeypatch):
    flags = "--prior", prior, "--sampling_steps", 1, "--dps_step", 0.1
    assert run(faces, tmp_path, *flags, operator="operators:jpeg") == 0
    assert "DPS, true A" not in json.loads((tmp_path / "table.json").read_text())["rows"]
    model = SPNN.from_pretrained(tmp_path / "best_model_r_opt_real.pth")
    assert model.notes["operator"] == "operators:jpeg" and model.out_shape == (3, 8, 8)
    weights = ["--checkpoint", str(tmp_path / "best_model.pth"), "--dataset_path", str(faces), "--device", "cpu"]
    refused(r"gives maps \(3, 8, 8\).*unknown", diagnostics.main, weights)  # code that a file names is not run
    # what is wrong about another run costs nothing
    with monkeypatch.context() as patch:
        patch.setattr(train_operator, "build", lambda *_: (_ for _ in ()).throw(InputError("no such network")))
        refused("no such network", run, faces, tmp_path, "--overwrite")
    assert SPNN.from_pretrained(tmp_path).notes["operator"] == "operators:jpeg" and (tmp_path / "table.md").is_file()
    # a shorter run in its place leaves nothing of it that would be taken for its own
    (tmp_path / "notes.txt").write_text("mine")
    assert run(faces, tmp_path, "--overwrite", "--r_steps", 0, "--hidden", 12) == 0
    model = SPNN.from_pretrained(tmp_path)
    assert model.config["layer_channels"][1][1]["hidden"] == 12 and model.notes["operator"] == "lens"
    assert not [*tmp_path.glob("*r_opt*"), *tmp_path.glob("table.*")] and (tmp_path / "notes.txt").is_file()


def test_a_fit_learns(faces, tmp_path):
    run(faces, tmp_path, "--steps", 8, "--r_steps", 0, "--lambda_img_rec", 0, "--lr", 2e-2, operator="saturation")
    x = torch.rand(8, 3, 16, 16, generator=seeded(0)) * 2 - 1
    model, y = SPNN.from_pretrained(tmp_path / "best_model.pth"), operators.saturation(x)
    averaged = F.mse_loss(F.avg_pool2d(x, 4), y)  # where it began
    assert F.mse_loss(model(x), y) < 0.9 * averaged


def test_a_fit_that_fails_names_the_block(faces, tmp_path, monkeypatch):
    def huge(*given):
        model = build(*given)
        torch.nn.init.constant_(model.pinn.blocks[1].t.net[0].weight, 3e38)  # finite itself
        return model

    monkeypatch.setattr(train_operator, "build", huge)
    refused(r"step 1 .*: not a finite number in block \d ConvPINNBlock", run, faces, tmp_path)
