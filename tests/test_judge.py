import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import refused
from layout import write_layout
from runs import signal_at

import loop
from data_loader import ATTRIBUTES, CelebAMaskHQ
from judge import Judge, load_judge, main, one_cycle
from loop import Run, World
from utils import Stopped


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """120 pictures of 16 x 16 whose top left and bottom right corners show "Wearing_Hat" and "Wearing_Necktie"."""
    rng = np.random.default_rng(0)

    def face() -> tuple[np.ndarray, np.ndarray]:
        bits = rng.integers(0, 2, 40)
        pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        if bits[ATTRIBUTES.index("Wearing_Hat")]:
            pixels[:6] = 250
        if bits[ATTRIBUTES.index("Wearing_Necktie")]:
            pixels[-6:, 5:11] = 250
        return pixels, bits

    return write_layout(tmp_path_factory.mktemp("faces"), [face() for _ in range(120)])


def arguments(faces, out, *more: str) -> list[str]:
    small = ["--img_size", "16", "--width", "8", "--epochs", "12", "--batch_size", "16", "--device", "cpu"]
    return ["--dataset_path", str(faces), "--out", str(out), *small, *more]


@pytest.fixture(scope="module")
def trained(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    assert main(arguments(faces, out, "--dtype", "float16")) == 0
    return out


def test_size_and_shapes():
    judge = Judge()
    assert 0.5e6 <= sum(p.numel() for p in judge.parameters()) <= 0.9e6
    with torch.inference_mode():
        assert judge(torch.zeros(2, 3, 64, 64)).shape == (2, 40)
        for size in (8, 9, 32, 33):
            assert Judge(7, size, 4).eval()(torch.zeros(1, 3, size, size)).shape == (1, 7)
    with pytest.raises(ValueError, match="64, 64"):
        judge(torch.zeros(1, 3, 32, 32))


def test_training_learns_what_can_be_seen_and_the_figures_are_those_of_the_file(trained, faces, capsys):
    record = json.loads(trained.with_suffix(".json").read_text())
    assert record["attributes"] == list(ATTRIBUTES)
    by_attribute = dict(zip(ATTRIBUTES, record["test"]["by_attribute"], strict=True))
    assert by_attribute["Wearing_Hat"] >= 0.9 and by_attribute["Wearing_Necktie"] >= 0.9
    assert record["test"]["images"] == 12 and len(record["history"]) == 12
    assert record["history"][-1]["train_loss"] < record["history"][0]["train_loss"]

    test = CelebAMaskHQ(faces, "test", 16)
    judge = load_judge(trained)
    assert not judge.training and judge.mean.dtype == torch.float32
    with torch.inference_mode():
        right = (judge(test.batch(range(len(test)))[0]) > 0) == (test.labels > 0)
    assert right.float().mean(0).tolist() == pytest.approx(record["test"]["by_attribute"])
    assert main(arguments(faces, trained, "--dtype", "float16", "--resume")) == 0
    shown = capsys.readouterr().out
    assert "this training is finished" in shown and f"| mean | {record['test']['accuracy']:.4f} |" in shown
    before = trained.read_bytes()
    refused("--overwrite", main, arguments(faces, trained))
    assert trained.read_bytes() == before


@pytest.mark.parametrize("text, said", [
    (None, "judge.json"), ("{", "judge.json"), ("{}", "no network"), ('{"architecture": {"depth": 3}}', "no network"),
    ('{"architecture": {"num_classes": 40, "img_size": 16, "width": 4}}', "judge.safetensors"),
])  # fmt: skip
def test_what_is_no_judge_is_refused(tmp_path, trained, text, said):
    path = tmp_path / "judge.safetensors"
    refused("no such file", load_judge, path)
    path.write_bytes(trained.read_bytes())
    if text is not None:
        path.with_suffix(".json").write_text(text)
    refused(said, load_judge, path)


def test_the_learning_rate_goes_up_and_down_once():
    rates = [one_cycle(step / 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.04) and rates[30] == max(rates) == pytest.approx(1.0) and rates[-1] < 0.001
    assert rates[:31] == sorted(rates[:31]) and rates[30:] == sorted(rates[30:], reverse=True)


def test_a_training_that_is_stopped_goes_on_as_if_nothing_had_happened(trained, faces, tmp_path):
    out = tmp_path / "judge.safetensors"
    with signal_at(loop, "seed_step", 20), pytest.raises(Stopped):  # in the fourth epoch
        main(arguments(faces, out, "--dtype", "float16"))
    assert not out.exists()
    refused("not finished; give --resume", main, arguments(faces, out, "--dtype", "float16"))
    assert main(arguments(faces, out, "--dtype", "float16", "--resume")) == 0
    assert out.read_bytes() == trained.read_bytes()
    other = arguments(faces, out, "--dtype", "float16", "--resume", "--lr", "1e-3")
    refused("exists; give --overwrite", main, other)  # no run to resume, and no leave to replace it
    assert out.read_bytes() == trained.read_bytes()
    found, whole = (json.loads(path.with_suffix(".json").read_text()) for path in (out, trained))
    for row, other in zip(found["history"], whole["history"], strict=True):
        row["seconds"] = other["seconds"]
    assert found == whole


def test_several_processes_are_refused(faces, tmp_path, monkeypatch):
    two = Run(tmp_path, torch.device("cpu"), World(0, 2))
    monkeypatch.setattr("judge.open_run", lambda *_: nullcontext(two))
    refused("without torchrun", main, arguments(faces, tmp_path / "judge.safetensors"))
