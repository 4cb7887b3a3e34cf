"""The training command, end to end on a few pictures."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import refused
from PIL import Image
from runs import CHAIN, SIZE, spnn_arguments, without_diagnostics

import train_celeba
from checkpoints import read_weights, write_weights
from data_loader import ATTRIBUTES
from judge import Judge
from models import SPNN
from train import CelebATrainer
from train_celeba import main
from utils import write_json


def run(faces, folder, *flags: str, **changes) -> int:
    stages = {"is_forward_train": False, "is_r_opt": False}
    return main([*spnn_arguments(faces, folder / "run", **{**stages, "epoch": 1, **changes}), *flags])


@pytest.fixture(scope="module")
def finished(faces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert run(faces, folder, "--is_forward_train", "--is_r_opt", "--epoch", "1", epoch=2) == 0
    return folder / "run"


def test_both_stages_leave_everything_that_is_promised(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "settings.json", "log.txt"} <= names and not [n for n in names if n.startswith(".")]
    assert json.loads((finished / "settings.json").read_text())["epoch"] == 1  # the command line wins over the preset
    for stage, file in (("forward", "best_model.pth"), ("r_opt", "best_model_r_opt_real.pth")):
        assert {f"curves_{stage}.png", f"diagnostics_{stage}.json"} <= names
        with Image.open(finished / f"natural_{stage}.png") as picture:  # the test split's 2 images, and under them g'
            assert picture.size == (2 * SIZE, 2 * SIZE)
        (row,) = csv.DictReader(open(finished / f"metrics_{stage}.csv"))
        assert np.isfinite(float(row["val_loss"]))
        state = torch.load(finished / file, weights_only=True)
        assert all(isinstance(tensor, torch.Tensor) and key.startswith("pinn.blocks.") for key, tensor in state.items())
        model = SPNN.from_pretrained(finished / file)
        assert model.notes["attributes"] == list(ATTRIBUTES) and np.shape(model.notes["typical_logits"]) == (40, 2)
        assert {state.split("=")[0] for state in model.notes["contradictions"]} & set(ATTRIBUTES)
        assert np.shape(model.notes["effects"]) == (40, 40) and np.isfinite(model.notes["effects"]).all()
        assert np.isfinite(model.notes["typical_logits"]).all() and model.config["layer_channels"] == CHAIN
    log = (finished / "log.txt").read_text()
    assert "stage 1" in log and "stage 2" in log and "test split after stage" in log and "done; " in log


def test_a_seed_repeats_and_stage_2_alone_is_that_of_both(finished, faces, tmp_path, monkeypatch):
    without_diagnostics(monkeypatch)
    refused("best_model.pth: no such file; run stage 1 first", run, faces, tmp_path, "--is_r_opt")
    assert run(faces, tmp_path, "--is_forward_train") == 0
    one, other = (read_weights(folder / "best_model.pth") for folder in (finished, tmp_path / "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert not (tmp_path / "run" / "best_model_r_opt_real.pth").exists()

    forward = (tmp_path / "run" / "best_model.pth").read_bytes()
    refused("takes 32x32 images, but --img_size is 8", run, faces, tmp_path, "--is_r_opt", img_size=8)
    assert run(faces, tmp_path, "--is_r_opt") == 0
    refused("best_model_r_opt_real.pth exists; give --overwrite", run, faces, tmp_path, "--is_r_opt", r_lr=1.0)
    both, alone = (read_weights(folder / "best_model_r_opt_real.pth") for folder in (finished, tmp_path / "run"))
    assert (tmp_path / "run" / "best_model.pth").read_bytes() == forward
    assert all(torch.equal(alone[key], both[key]) for key in both)
    assert all(torch.equal(alone[key], one[key]) == (".r." not in key) for key in one)  # g is left alone
    assert SPNN.from_pretrained(tmp_path / "run" / "best_model_r_opt_real.pth").notes["typical_logits"]


def test_it_begins_with_given_weights_and_teachers_if_they_fit(finished, faces, tmp_path, monkeypatch):
    for name, size, attributes in (("32", SIZE, ATTRIBUTES), ("8", 8, ATTRIBUTES), ("turned", SIZE, ATTRIBUTES[::-1])):
        teacher = Judge(40, size, width=4)
        write_weights(tmp_path / f"{name}.safetensors", teacher.state_dict())
        write_json(tmp_path / f"{name}.json", {"architecture": teacher.config(), "attributes": attributes})
    without_diagnostics(monkeypatch)
    given, asked = str(finished / "best_model.pth"), []
    monkeypatch.setattr(CelebATrainer, "_taught", lambda self, x, labels: asked.append(len(self.teachers)) or labels)
    flags = ["--is_forward_train", "--init", given, "--teachers", str(tmp_path / "32.safetensors")]
    assert run(faces, tmp_path, *flags, lr=1e-12) == 0
    one, other = (read_weights(folder / "best_model.pth") for folder in (finished, tmp_path / "run"))
    assert all(torch.allclose(one[key], other[key], atol=1e-9) for key in one) and asked == [1] * 4
    flags.append("--overwrite")
    refused("best_model.pth: do not fit SPNN", run, faces, tmp_path, *flags, layer_channels=changed(1, hidden=5))
    for name in ("8", "turned"):
        flags[-2] = str(tmp_path / f"{name}.safetensors")
        refused(f"{name}.safetensors: not of the 40 attributes of 32x32 images", run, faces, tmp_path, *flags)


def changed(index, **arguments):
    chain = [[kind, dict(given)] for kind, given in CHAIN]
    chain[index][1].update(arguments)
    return chain


@pytest.mark.parametrize("changes, said", [
    ({"is_forward_train": False}, "nothing to do: give --is_forward_train"),
    ({"epohc": 3}, "unknown key 'epohc', did you mean 'epoch'"),
    ({"layer_channels": None, "img_size": 16}, "img_size 16 is none of"),
    ({"mix_type": "givens"}, "mix_type: 'givens' must be one of"),
    ({"device": "abacus"}, "--device abacus"),
    ({"layer_channels": changed(0, r=5)}, r"architecture: block 0: .*r=5.*must divide the size, got 32x32"),
    ({"layer_channels": changed(1, out_ch=40)[:2]}, "attributes need a chain that ends at 1x1, it ends at 8x8"),
    ({"layer_channels": [*CHAIN[:3], ["ConvBlock", {}]]}, "block 3: unknown block 'ConvBlock'"),
    ({"layer_channels": 5}, "architecture: "),
    ({}, "nowhere: no such folder"),  # and nothing before needed the data
])  # fmt: skip
def test_a_mistake_is_one_clear_line(tmp_path, changes, said):
    refused(said, run, tmp_path / "nowhere", tmp_path, **{"is_forward_train": True, **changes})
    assert not list(tmp_path.glob("run/*.pth"))


def test_the_published_command_line_parses():
    line = "--dataset_path x --is_forward_train --is_r_opt --img_size 256 --epoch 10 --batch_size 256 --mix_type cayley"
    task, settings, machine, chain = train_celeba.read_command(line.split())
    assert chain is None and settings.lr == 2e-4 and settings.lambda_bce == 1.0
    assert settings.lambda_right_inverse == settings.lambda_img_rec == 40.0 and settings.precision == "float32"
    assert settings.r_epoch == 50 and settings.r_lr == 1e-4 and settings.epoch == 10 and task.batch_size == 256
    assert task.img_size == 256 and task.mix_type == "cayley" and machine.checkpoint_dir == "check_points/"
    line += " --grad_clip 0.5 --hold_share 0.3 --precision bf16"
    task, settings, machine, _ = train_celeba.read_command(line.split())
    assert (settings.grad_clip, settings.hold_share, machine.precision) == (0.5, 0.3, "bf16")
