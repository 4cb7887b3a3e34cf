"""The benchmarks: both formulations compute the same thing, and the command says what it measured."""

import json
from functools import partial

import pytest
import torch
from helpers import random, seeded, tiny

from benchmarks import growth, peak_memory, plain, speed
from DDNM.guided_diffusion.prior import small_unet
from models import SPNN, concatenated
from train import Settings, forward_losses, natural_losses
from utils import InputError

equal = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
X = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=seeded(0)) * 2 - 1


@pytest.fixture
def model():
    torch.manual_seed(speed.SEED)
    return speed.randomise(tiny(num_classes=5)).double()


@torch.no_grad()
def test_the_plain_passes_are_those_of_the_network(model):
    y, latents = plain.forward(model, X)
    expected, expected_latents = model(X, return_latents=True)
    equal(y.flatten(1), expected)
    assert [z is None for z in latents] == [z is None for z in expected_latents]
    equal(concatenated(latents), concatenated(expected_latents))
    equal(plain.inverse(model, y, latents), X)
    equal(plain.inverse(model, y), model.pinv(expected))
    target = random((2, 5), seed=1)
    equal(model.back_project(X, target, 0.5), plain.back_project(model, X, target, 0.5))


@pytest.fixture(scope="module")
def matrix_rate() -> float:
    """Measured once: it takes a second on a CPU that emulates bf16."""
    return growth.matrix_rate(torch.device("cpu"))


@pytest.fixture
def small(small_32, matrix_rate, monkeypatch):
    """With a small prior in place of the published U-Net, of 32 residual blocks."""

    def prior(size, channels):
        return small_unet(size, (channels, channels), unshuffle=1, norm_groups=8).eval().requires_grad_(False)

    monkeypatch.setattr(growth, "matrix_rate", lambda device: matrix_rate)
    for benchmark in (speed, growth):
        monkeypatch.setattr(benchmark, "published_unet", prior)


WITHIN = {"back_projection": 1e-4, "sampling_step": 1e-3, "stage1": 1e-5, "stage2": 1e-5, "loader": 0.0}


def test_every_row_computes_the_same_as_the_plain_formulation(tmp_path, small, monkeypatch, capsys):
    def fail(prior):
        raise InputError("no OpenVINO")

    monkeypatch.setattr(speed, "compile_for_cpu", fail)  # takes a minute, and has tests of its own
    sizes = "--sampling_size 32 --training_size 32 --hidden 4 --prior_channels 32 --images 12 --image_side 40"
    run = "--repeats 1 --sampling_batch 2 --training_batch 2 --workers 0 --device cpu --threads 1 --json"
    assert speed.main([*sizes.split(), *run.split(), str(tmp_path / "result.json")]) == 0
    record, (shown, said) = json.loads((tmp_path / "result.json").read_text()), capsys.readouterr()
    rows = {row["row"]: row for row in record["rows"]}
    assert "no row for --compile: no OpenVINO" in said
    assert set(rows) == {*WITHIN, "sampling_step, bf16"}
    for name, row in rows.items():
        assert name in shown and row["ratio"] == pytest.approx(row["plain_seconds"] / row["seconds"])
        assert "bf16" in name or row["largest_difference"] <= WITHIN[name]
    assert 0 < rows["back_projection"]["largest_difference"] < 1 > rows["sampling_step, bf16"]["largest_difference"] > 0
    assert record["torch"] == torch.__version__ and "1 threads" in record["machine"] and record["date"] in shown
    assert {"device", "seed", "settings"} <= record.keys()


def test_the_losses_and_their_gradients_are_the_plain_ones(model):
    labels, settings = torch.tensor([[0.0, 1, 1, 0, 1], [1, 0, 0, 1, 1]], dtype=torch.float64), Settings()
    origin = concatenated(model.complete(torch.zeros_like(X[:1])).z)
    for got, expected, parameters in (
        (forward_losses(model, X, labels, settings)[0], plain.stage1_loss, list(model.parameters())),
        (natural_losses(model, X, model(X).detach(), origin, settings), plain.stage2_loss,
         [p for name, p in model.named_parameters() if ".r." in name]),
    ):  # fmt: skip
        losses = got["total"], expected(model, X, labels, settings)
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        equal(*(torch.autograd.grad(loss, parameters) for loss in losses), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", growth.TASKS)
def test_growth_measures_time_memory_and_where_the_time_goes(name, small):
    options = growth.Options(hidden=8, repeats=1, device="cpu", precision="bf16", prior_channels=32)
    size, depth = (64, 2) if name == "back_projection" else (32, None)
    row = growth.measure(name, size, 1, depth, options)
    assert row["peak_gib"] > 0 and row["images_per_second"] == 1 / row["seconds"] > 0
    assert sum(row[kind] for kind in growth.KINDS) == pytest.approx(1) and row["matrix product"] > 0
    assert (row["solve"] > 0) == (name == "stage1")  # elsewhere W is known
    assert row["matrix_rate_share"] > 0
    assert growth.table([row]).count("|") == 3 * (12 if depth else 11)
    shallow = growth.deep_network(1, 4)
    assert len(growth.deep_network(3, 4).pinn.blocks) == len(shallow.pinn.blocks) + 2


def test_growth_says_how_cost_rises():
    rows = [{"task": "stage1", "size": size, "batch": batch, "depth": None, "seconds": batch * size**4}
            for size in (32, 64) for batch in (1, 2)]  # fmt: skip
    assert "stage1, 32x32: seconds ~ batch^1.00" in growth.fits(rows)
    assert "stage1, batch 2: seconds ~ pixels^2.00" in growth.fits(rows)


def test_the_peak_from_shapes_is_that_of_a_real_step_and_grows_with_the_batch(small_32, tmp_path, capsys):
    """The same count over tensors with values: what the operators make does not depend on those."""
    file = tmp_path / "memory.json"
    run = f"--img_size 32 --hidden 8 --batch_size 64 --stages 1 2 --precisions float32 --json {file}"
    assert peak_memory.main(run.split()) == 0 and "GiB" in capsys.readouterr().out
    labelled, natural = json.loads(file.read_text())["rows"]
    assert labelled["recomputed"] < 0.8 * labelled["kept"]
    assert natural["what"].startswith("stage 2") and 0 < natural["kept"] < labelled["kept"]

    def real(batch: int) -> peak_memory.PeakMemory:
        with peak_memory.PeakMemory() as memory:
            peak_memory.two_steps(1, SPNN(img_size=32, hidden=8).train(), batch, "float32")
        return memory

    memory, squares = real(64), 64 * 3 * 32 * 32 * 4  # which mse_loss on a CPU keeps behind its one number
    assert memory.peak - squares == pytest.approx(2**30 * labelled["kept"], rel=0.01)
    assert memory.now < memory.peak and real(8).peak < memory.peak / 4
