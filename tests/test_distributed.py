"""Several processes follow one: the same batches, losses, weights and decisions."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers import refused
from runs import figures_of, forks, pictures, prior_arguments, quick, spnn_arguments, start_two
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import loop
import train_celeba
import train_operator
from checkpoints import read_weights
from data_loader import EpochBatches, make_loaders
from DDNM import main, train_prior
from logger import MetricsTable
from loop import join_world

STAGES = "metrics_forward.csv", "metrics_r_opt.csv"


def assert_same_figures(one: Path, two: Path, tables: tuple[str, ...], rel: float) -> None:
    """But for the time, and what is rounding alone."""
    for table in tables:
        for a, b in zip(*(MetricsTable(folder / table).rows for folder in (one, two)), strict=True):
            for key in (key for key in a if key != "seconds" and "right_inverse" not in key):
                assert float(b[key]) == pytest.approx(float(a[key]), rel=rel, abs=1e-8), (table, key)


def skew(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Weights, of Cayley's B what W depends on, B - B^T: the diagonal's gradient is rounding alone."""
    return [b - b.T if name.endswith("A_unconstrained") else b for name, b in weights.items()]


def test_two_processes_follow_the_losses_of_one(faces, tmp_path):
    folders = {processes: tmp_path / f"of_{processes}" for processes in (1, 2)}
    one, two = (spnn_arguments(faces, folder, epoch=1, r_epoch=3) for folder in folders.values())
    assert train_celeba.main(one) == 0
    assert start_two(train_celeba.main, two, tmp_path)[0] == [0, 0]
    assert_same_figures(*folders.values(), STAGES, rel=1e-5)
    assert [len(MetricsTable(folders[2] / table).rows) for table in STAGES] == [1, 3]
    for name in ("best_model.pth", "best_model_r_opt_real.pth"):
        one, two = (read_weights(folder / name) for folder in folders.values())
        one, two = (torch.cat([tensor.flatten() for tensor in skew(weights)]) for weights in (one, two))
        # as a whole: if a gradient is rounding noise, Adam makes a full step of it
        assert (one - two).norm() < 1e-4 * one.norm(), name
    assert (folders[2] / "log.txt").read_text().count("stage 1: ") == 1  # one of the two reports


def test_two_processes_fit_the_operator_of_one(faces, tmp_path):
    fixed = f"--operator saturation --dataset_path {faces} --img_size 32 --hidden 8 --batch_size 4 --device cpu"
    one, two = (f"{fixed} --steps 4 --r_steps 2 --out {tmp_path / name}".split() for name in ("of_1", "of_2"))
    assert train_operator.main(one) == 0
    assert start_two(train_operator.main, two, tmp_path)[0] == [0, 0]
    assert_same_figures(tmp_path / "of_1", tmp_path / "of_2", STAGES, rel=1e-4)


def train_prior_quickly(arguments: list[str]) -> None:
    quick()
    assert train_prior.main(arguments) == 0


def test_torchrun_trains_the_prior_of_one_process(faces, tmp_path):
    """Its launcher, with processes that have everything imported."""
    assert train_prior.main(prior_arguments(faces, tmp_path / "of_1", steps=4)) == 0
    forks()
    two = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", rdzv_backend="c10d",
                       rdzv_endpoint="localhost:0", start_method="forkserver")  # fmt: skip
    elastic_launch(two, train_prior_quickly)(prior_arguments(faces, tmp_path / "of_2", steps=4))
    assert_same_figures(tmp_path / "of_1", tmp_path / "of_2", ("metrics.csv",), rel=1e-4)


def test_what_one_process_cannot_do_ends_them_all_with_a_line_each(faces, tmp_path):
    (tmp_path / "run").write_text("a file, where the leading process needs a folder")
    status, last = start_two(train_prior.main, prior_arguments(faces, tmp_path / "run"), tmp_path)
    assert status == [2, 2] and last[0].startswith("error: ") and "run" in last[0]
    assert last[1].startswith("error: ") and ("another process" in last[1] or "run" in last[1])


def test_the_parts_of_a_batch_are_the_batch(faces):
    whole = list(EpochBatches(21, 6, True, True, True, seed=3))
    parts = [list(EpochBatches(21, 6, True, True, True, seed=3, share=(rank, 2))) for rank in (0, 1)]
    assert len(whole) == 3
    for batch, *shares in zip(whole, *parts, strict=True):
        assert len(shares[0]) == len(shares[1]) == 3
        assert sorted(shares[0] + shares[1]) == sorted(batch)
    refused("batch of 5 images cannot be shared evenly by 2", make_loaders, faces, 32, 5, share=(0, 2))


TORCHRUN = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize("given, said", [
    ({"WORLD_SIZE": "2"}, "RANK expected"), ({"WORLD_SIZE": "two", **TORCHRUN}, "invalid literal.*'two'"),
    ({"WORLD_SIZE": "2", **TORCHRUN, "MASTER_PORT": "70000"}, "port"),
    ({"WORLD_SIZE": "2", **TORCHRUN, "MASTER_PORT": "0"}, ""),  # the others were never started
    ({"WORLD_SIZE": "2", **TORCHRUN, "RANK": "1"}, ""),
])  # fmt: skip
def test_processes_that_do_not_meet_are_one_line(monkeypatch, given, said):
    monkeypatch.setattr(loop, "MEETING", timedelta(seconds=0.2))
    for name in ("WORLD_SIZE", "LOCAL_RANK", *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    refused(f"processes of this run have not met: .*{said}", join_world("cpu").__enter__)


def test_two_processes_draw_the_pictures_of_one(assets, tmp_path, monkeypatch):
    flags = ["--ni", "--config", str(assets / "tiny.yml"), "--path_y", str(assets / "inputs"), "--base_rate"]
    monkeypatch.setattr(main, "SAMPLES", tmp_path)
    assert main.main([*flags, "--image_folder", "of_1"]) == 0
    arguments = [*flags, "--image_folder", "of_2"]
    assert start_two(main.main, arguments, tmp_path)[0] == [0, 0]
    one, two = tmp_path / "of_1", tmp_path / "of_2"
    assert figures_of(one) == figures_of(two) and len(figures_of(two)) == 3 and (two / "sheet.png").is_file()
    expected, got = pictures(one), pictures(two)
    assert expected.keys() == got.keys() and len(got) == 9
    assert all((expected[name] == got[name]).all() for name in expected)
    # a picture that is lost is drawn again, by whichever process has its batch
    (two / "reconstruction" / "green.png").unlink()
    assert start_two(main.main, [*arguments, "--resume"], tmp_path)[0] == [0, 0]
    assert (pictures(two)["reconstruction/green.png"] == expected["reconstruction/green.png"]).all()
