"""The benchmark: both formulations compute the same thing, and the command says what it measured."""

import json

import pytest
import torch

from benchmarks import back_projection, plain


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slower on several threads, and very much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return back_projection.random_model(32, 4).double()


@torch.no_grad()
def test_the_plain_passes_are_those_of_the_network(model):
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
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
    x, target = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1, torch.randn(2, 40, dtype=torch.float64)
    for strength in (0.5, 1.0):
        moved = plain.back_project(model, x, target, strength)
        torch.testing.assert_close(model.back_project(x, target, strength), moved, rtol=1e-10, atol=1e-10)
        assert (moved - x).abs().max() > 1e-2


def test_the_command_reports_both_times_their_ratio_and_the_difference(tmp_path, capsys):
    file, threads = tmp_path / "result.json", torch.get_num_threads()
    arguments = "--img_size 32 --hidden 4 --repeats 2 --batch_size 2 --device cpu --threads 2 --json"
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


def test_the_same_seed_gives_the_same_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(back_projection.SEED)
        models.append(back_projection.random_model(32, 4).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert all(tensor.any() for name, tensor in models[0].items() if name.endswith("weight"))
