"""Maps of classes: what stands for them, the moves of maps and faces together, and the experiment from end to end."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import random, seeded
from runs import tiny_prior

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import segmentation

import diagnostics
from data_loader import MASK_CLASSES
from DDNM.guided_diffusion.inputs import NetworkSettings, load_networks
from DDNM.guided_diffusion.prior import save_prior
from procedural_faces import write_dataset
from train_operator import build
from utils import InputError


def maps(*shape: int) -> torch.Tensor:
    return torch.randint(0, 19, shape, generator=seeded(0))


def test_logits_distance_and_loss_of_maps():
    operator, masks = segmentation.ClassOperator(None), maps(2, 4, 4)
    y = segmentation.logits_of(masks)
    assert y.shape == (2, 19, 4, 4) and (y.argmax(1) == masks).all()
    torch.testing.assert_close(y.sum(1), torch.zeros(2, 4, 4))
    other = y.clone()
    other[0] = y[0].roll(1, 0)  # another class everywhere
    sure = y.softmax(1).amax()
    torch.testing.assert_close(operator.distance(y, y), torch.zeros(2))
    torch.testing.assert_close(operator.distance(other, y)[0], sure - y.softmax(1).amin())
    guess = y.clone().requires_grad_()
    (slope,) = torch.autograd.grad(operator.loss(guess, y).sum(), guess)
    assert slope.abs().max() < 1e-6  # the target itself is best
    assert (operator.loss(other, y) - operator.loss(y, y))[0] > 1


def test_faces_and_masks_move_together():
    masks = torch.zeros(4, 32, 32, dtype=torch.long)
    masks[:, 8:24, 12:20] = 13
    x = (masks == 13).float()[:, None].expand(-1, 3, -1, -1) - 0.5
    torch.manual_seed(0)
    moved, y = segmentation.pair(x, masks, 1.0)
    bright = moved.mean(1)[:, 2::4, 2::4] > 0
    assert ((y.argmax(1) == 13) == bright).float().mean() > 0.97
    assert (y.argmax(1) != segmentation.smaller(masks)).any()
    still, y = segmentation.pair(x, masks, 0.0)
    assert still is x and (y.argmax(1) == segmentation.smaller(masks)).all()


def test_the_experiment_runs(tmp_path, capsys, monkeypatch):
    faces, out, prior = tmp_path / "faces", tmp_path / "out", tmp_path / "prior"
    write_dataset(faces, 20, 32, seed=0, workers=1, masks=True)
    save_prior(tiny_prior(16), prior)
    argv = ["--dataset_path", faces, "--out", out, "--size", 16, "--hidden", 8, "--augment", 1, "--batch_size", 4,
            "--device", "cpu", "--steps", 2, "--r_steps", 1, "--judge_steps", 2, "--seed", 1]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(segmentation, "diagnose", lambda *_, **__: {})
        patch.setattr(segmentation, "format_report", str)
        assert segmentation.main([str(word) for word in argv]) == 0
    again = [*argv, "--resume", "--prior", prior, "--sampling_steps", 1, "--count", 2]
    assert segmentation.main([str(word) for word in again]) == 0
    said = json.loads((out / "diagnostics.json").read_text())
    assert said["attributes"] == list(MASK_CLASSES) and len(said["accuracy"]["by_class"]) == 19
    assert said["penrose"]["float64"]["right_inverse"]["relative_max"] < 1e-9
    assert "cloth" in capsys.readouterr().out
    rows = json.loads((out / "table.json").read_text())["rows"]
    assert list(rows) == ["real", "g'(map)", "unguided", "NLBP", "gradient", "NLBP, then gradient"]
    assert rows["g'(map)"]["mIoU, g"] == 1 > rows["real"]["mIoU, g"]  # g g' = 1
    assert (out / "sheet.png").stat().st_size > 1000

    weights = out / "best_model.pth"
    measure = ["--checkpoint", str(weights), "--dataset_path", str(faces), "--device", "cpu"]
    assert diagnostics.main([*measure, "--samples", "2"]) == 0
    assert "intersection over union" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"attributes are logits \(19,\), its are \(19, 4, 4\)"):
        load_networks(NetworkSettings(spnn=str(weights), prior=str(prior)), {}, torch.device("cpu"))


def test_the_nearest_logits_that_say_a_map():
    """A projection on a convex set: no point of it is on the far side of the plane through the nearest one."""
    y, classes = random((2, 19, 4, 4), seed=0, scale=3), maps(2, 4, 4)

    def lead(logits):
        others = logits.scatter(1, classes[:, None], -torch.inf).amax(1)
        return logits.gather(1, classes[:, None])[:, 0] - others

    nearest = segmentation.leading(y, classes)
    torch.testing.assert_close(lead(nearest).clamp(max=2), torch.full((2, 4, 4), 2.0, dtype=y.dtype))
    torch.testing.assert_close(segmentation.leading(nearest, classes), nearest)
    for seed in range(1, 6):
        inside = random(y.shape, seed=seed, scale=3)
        inside.scatter_(1, classes[:, None], inside.amax(1, keepdim=True) + 2)
        assert ((y - nearest) * (inside - nearest)).sum(1).max() < 1e-9


def test_a_step_of_back_projection_reaches_the_map_and_moves_no_more_than_it_must():
    operator = segmentation.ClassOperator(build((3, 16, 24), (19, 4, 6), 8).double())
    x, y = random((2, 3, 16, 24), seed=0), segmentation.logits_of(maps(2, 4, 6)).double()
    moved = operator.back_project(x, y)
    torch.testing.assert_close(operator.A(moved), segmentation.leading(operator.A(x), y.argmax(1)))
    assert (operator.A(moved).argmax(1) == y.argmax(1)).all()
    torch.testing.assert_close(operator.back_project(moved, y), moved)
    exactly = operator.model.back_project(x, y)
    assert (moved - x).norm() < (exactly - x).norm()
