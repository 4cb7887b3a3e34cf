"""The benchmark: both formulations compute the same thing, and the command says what it measured."""

import json

import pytest
import torch

from benchmarks import back_projection, plain
from models import BUILT_IN, POINTWISE, SPNN, UNET, BlockNets, ConvPINNBlock, PixelUnshuffleBlock


def tiny_spnn() -> SPNN:
    torch.manual_seed(back_projection.SEED)
    chain = [
        (PixelUnshuffleBlock, {"r": 4}),
        (ConvPINNBlock, {"in_ch": 48, "out_ch": 6, "hidden": 8, "feat_size": 2}),
        (PixelUnshuffleBlock, {"r": 2}),
        (ConvPINNBlock, {"in_ch": 24, "out_ch": 5, "hidden": 8, "feat_size": 1}),
    ]
    return back_projection.randomise(SPNN(num_classes=5, img_size=8, layer_channels=chain))


@pytest.fixture
def model():
    return tiny_spnn().double()


@torch.no_grad()
def test_the_plain_passes_are_those_of_the_network(model):
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    y, latents = plain.forward(model, x)
    expected, expected_latents = model(x, return_latents=True)
    torch.testing.assert_close(y.flatten(1), expected, rtol=1e-10, atol=1e-10)
    for z, own in zip(latents, expected_latents, strict=True):
        assert (z is None) == (own is None)
        if z is not None:
            torch.testing.assert_close(z, own, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plain.inverse(model, y, latents), x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plain.inverse(model, y), model.pinv(expected), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_closed_form_is_the_plain_formulation(model):
    x, target = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1, torch.randn(2, 5, dtype=torch.float64)
    for strength in (0.5, 1.0):
        moved = plain.back_project(model, x, target, strength)
        torch.testing.assert_close(model.back_project(x, target, strength), moved, rtol=1e-10, atol=1e-10)
        assert (moved - x).abs().max() > 1e-2


def test_the_command_reports_both_times_their_ratio_and_the_difference(tmp_path, capsys, monkeypatch):
    # the published chain solves 2048 x 2048 systems, fourteen times over: seconds that show nothing more
    chain = ((4, 48, 2, BlockNets(UNET, UNET, 128)), (8, 128, None, BlockNets(POINTWISE, POINTWISE, 128)))
    monkeypatch.setitem(BUILT_IN, 32, chain)
    file, threads = tmp_path / "result.json", torch.get_num_threads()
    arguments = "--img_size 32 --hidden 4 --repeats 3 --batch_size 2 --device cpu --threads 2 --json"
    assert back_projection.main([*arguments.split(), str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["ratio"] == pytest.approx(record["plain_seconds"] / record["closed_form_seconds"])
    assert 0 < record["largest_difference"] < 1e-4 * record["largest_value"]
    assert record["torch"] == torch.__version__ and "2 threads" in record["machine"]
    assert {"date", "device", "seed", "img_size", "batch_size", "repeats", "hidden"} <= record.keys()
    assert torch.get_num_threads() == threads
    shown = capsys.readouterr().out
    for part in ("plain", "closed form", "ratio", "largest difference", torch.__version__, record["date"]):
        assert part in shown


def test_the_same_seed_gives_the_same_weights_and_none_stays_zero():
    one, other = tiny_spnn().state_dict(), tiny_spnn().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(tensor.any() for name, tensor in one.items() if not name.endswith("bias"))
