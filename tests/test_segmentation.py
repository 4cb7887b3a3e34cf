"""A chain that ends at a map: the law holds there, IoU counts what it says, and the experiment runs."""

import json
import sys
from pathlib import Path

import torch
from helpers import randomise, seeded

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import segmentation

from data_loader import MASK_CLASSES
from procedural_faces import write_dataset


def test_a_map_comes_back_from_its_image():
    g = randomise(segmentation.build(16, 8).double(), seeded(0))
    y = torch.randn(3, 19, 4, 4, generator=seeded(1), dtype=torch.float64)
    x = g.pinv(y)
    assert x.shape == (3, 3, 16, 16)
    torch.testing.assert_close(g(x), y, rtol=1e-9, atol=1e-9)
    other = torch.randn(3, 3, 16, 16, generator=seeded(2), dtype=torch.float64)
    assert (g.pinv(g(other)) - other).abs().max() > 0.01


def test_iou_of_known_maps():
    truth = torch.tensor([[[0, 0, 1, 1], [2, 2, 1, 1]]])
    guess = torch.tensor([[[0, 1, 1, 1], [2, 0, 1, 3]]])
    iou = segmentation.IoU()
    for row in range(2):  # summed over calls
        iou.add(guess[:, row : row + 1], truth[:, row : row + 1])
    found = iou.by_class()
    torch.testing.assert_close(found[:4], torch.tensor([1 / 3, 3 / 5, 1 / 2, 0]).double())
    assert found[4:].isnan().all()


def test_the_logits_of_a_mask_say_the_mask():
    masks = torch.randint(0, 19, (2, 4, 4), generator=seeded(0))
    y = segmentation.logits_of(masks)
    assert y.shape == (2, 19, 4, 4) and (y.argmax(1) == masks).all()
    torch.testing.assert_close(y.sum(1), torch.zeros(2, 4, 4))
    assert torch.nn.functional.cross_entropy(y, masks) < 0.01


def test_the_experiment_runs(tmp_path, capsys):
    write_dataset(tmp_path / "faces", 20, 32, seed=0, workers=1, masks=True)
    argv = ["--data", str(tmp_path / "faces"), "--out", str(tmp_path / "out"), "--size", "32", "--hidden", "8"]
    assert segmentation.main([*argv, "--steps", "2", "--batch_size", "4", "--device", "cpu"]) == 0
    said = json.loads((tmp_path / "out" / "iou.json").read_text())
    assert said["steps"] == 2 and said["right_inverse"] < 1e-4
    assert set(said["iou"]) == {"mean", *MASK_CLASSES} and "cloth" in capsys.readouterr().out
    assert (tmp_path / "out" / "sheet.png").stat().st_size > 1000
