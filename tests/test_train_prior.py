"""The prior's training command: resume is exact, nothing is lost or overwritten unasked, mistakes are one line."""

import csv
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import read_weights
from DDNM import train_prior
from DDNM.guided_diffusion.prior import PREDICTIONS, Prior, load_prior, small_unet
from DDNM.guided_diffusion.schedule import Schedule
from utils import InputError, Stopped

MODEL = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    (folder / "nested").mkdir()
    for i in range(8):
        picture = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        picture.save(folder / ("nested" if i % 2 else ".") / f"{i}.png")
    return folder


def run(images, out, *options):
    """The exit status of a short run."""
    try:
        return train_prior.main([
        "--images", str(images), "--out", str(out), "--img_size", "16", "--channels", "8,16", "--norm_groups", "4",
        "--attention_size", "4", "--batch_size", "4", "--steps", "3", "--warmup", "1", "--log_every", "1",
        "--samples", "0", "--device", "cpu", *options,
        ])  # fmt: skip
    except Stopped as stopped:
        return stopped.status


def stop_after(monkeypatch, steps, signum):
    """Make the process send itself a signal in the middle of a step."""
    honest = train_prior.Trainer.step

    def step(self):
        if self.loop.done + 1 == steps:
            os.kill(os.getpid(), signum)
        return honest(self)

    monkeypatch.setattr(train_prior.Trainer, "step", step)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run of three steps that nothing disturbs, with a row of means after two of them and at the end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(images, folder, "--log_every", "2", "--threads", "1") == 0
    return folder


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_and_resumed_run_is_the_undisturbed_one(whole, images, tmp_path, monkeypatch, signum):
    """It is stopped between two rows: the means over its steps survive."""
    before, options = signal.getsignal(signum), ("--log_every", "2", "--threads", "1")
    with monkeypatch.context() as patch:
        stop_after(patch, 1, signum)
        assert run(images, tmp_path, *options) == 128 + signum
    assert signal.getsignal(signum) == before
    torch.manual_seed(123)  # a resume must not lean on the global generator
    assert run(images, tmp_path, "--resume", *options) == 0
    folders = whole, tmp_path
    whole, parts = (torch.load(folder / "train_state.pth", weights_only=True) for folder in folders)
    assert whole["progress"]["done"] == parts["progress"]["done"] == 3
    for kind in ("model", "ema"):
        assert all(torch.equal(whole[kind][k], parts[kind][k]) for k in whole[kind])
    for k, moments in whole["optimizer"]["state"].items():
        assert all(torch.equal(moments[m], parts["optimizer"]["state"][k][m]) for m in moments)
    assert (folders[0] / MODEL).read_bytes() == (folders[1] / MODEL).read_bytes()
    rows = [list(csv.DictReader(open(folder / "metrics.csv"))) for folder in folders]
    for one, other in zip(*rows, strict=True):
        assert all(one[key] == other[key] for key in ("step", "loss", "lr", "grad_norm"))
    assert len(rows[0]) == 2


def test_threads_share_the_batch_and_change_nothing(whole, images, tmp_path):
    assert run(images, tmp_path, "--threads", "3") == 0
    one, three = (read_weights(folder / MODEL) for folder in (whole, tmp_path))
    for name, tensor in one.items():
        torch.testing.assert_close(three[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_result_is_a_prior_with_everything_beside_it(images, tmp_path, monkeypatch, curves):
    monkeypatch.setattr(train_prior, "SAMPLE_STEPS", 3)
    assert run(images, tmp_path, "--save_every", "2", "--samples", "3", "--save_dtype", "float16") == 0
    names = {
        str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and p.parent.parent.name != "events"
    }
    assert names == {
        "config.json", "scheduler_config.json", MODEL, "train_state.pth", "metrics.csv", "log.txt", "curves.png",
        "settings.json", "samples/step_000002.png", "samples/step_000003.png",
    }  # fmt: skip
    assert Image.open(tmp_path / "samples" / "step_000003.png").size == (48, 16)
    ema = torch.load(tmp_path / "train_state.pth", weights_only=True)["ema"]
    stored = read_weights(tmp_path / MODEL)
    assert all(torch.equal(tensor, ema[f"unet.{k}"].half()) for k, tensor in stored.items())
    prior = load_prior(tmp_path, image_size=16)
    assert prior(torch.zeros(1, 3, 16, 16), 10).shape == (1, 3, 16, 16)


def test_results_are_kept_and_another_run_is_refused_unless_overwriting(images, tmp_path):
    assert run(images, tmp_path, "--steps", "1") == 0
    with pytest.raises(InputError, match="not empty"):
        run(images, tmp_path)
    (tmp_path / "mine.txt").write_text("keep")
    assert run(images, tmp_path, "--steps", "1", "--overwrite") == 0
    assert (tmp_path / "mine.txt").read_text() == "keep"
    with pytest.raises(InputError, match="exclude"):
        run(images, tmp_path, "--overwrite", "--resume")
    with pytest.raises(InputError, match="has seed 0, not 1"):
        run(images, tmp_path, "--resume", "--seed", "1")
    with pytest.raises(InputError, match="has images 8, not 4"):
        run(images / "nested", tmp_path, "--resume")
    (tmp_path / "train_state.pth").write_bytes(b"junk")
    with pytest.raises(InputError, match="damaged"):
        run(images, tmp_path, "--resume")


def test_a_clock_ends_the_run(images, tmp_path):
    assert run(images, tmp_path, "--steps", "100000", "--minutes", "0.01") == 0
    rows = list(csv.DictReader(open(tmp_path / "metrics.csv")))
    assert float(rows[-1]["seconds"]) >= 0.6 and len(rows) < 100000


@pytest.mark.parametrize("options, said", [
    (("--channels", "8,10"), "multiples of norm_groups"),
    (("--img_size", "18"), "divisible by 4"),
    (("--lr", "1e30", "--warmup", "0", "--steps", "50"), "step [0-9]+ .*not a finite number"),
])  # fmt: skip
def test_settings_that_cannot_work_are_one_line(images, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        run(images, tmp_path / "out", *options)


def test_a_mistake_leaves_no_folder_behind(images, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, said in ((tmp_path / "none", "no such"), (tmp_path / "empty", "no images")):
        with pytest.raises(InputError, match=said):
            run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_resume_begins_a_run_of_which_nothing_was_saved(images, tmp_path):
    """So one command line serves a scheduler that starts it again and again."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".train_state.pth.abcd1234.pth").write_bytes(b"killed while it wrote this")
    (tmp_path / "a" / ".lock").write_text("process 1")
    for out in (tmp_path / "a", tmp_path / "b"):
        assert run(images, out, "--resume", "--steps", "1") == 0
        assert not list(out.glob(".*"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        run(images, tmp_path / "foreign", "--resume")


def test_a_gradient_that_is_not_finite_names_the_images_and_the_weight(images, tmp_path, monkeypatch):
    honest = train_prior.Images.batch

    def batch(self, indices):
        chosen = honest(self, indices)
        chosen[1] = float("nan")
        return chosen

    monkeypatch.setattr(train_prior.Images, "batch", batch)
    said = r"step 1 \(\d.png, \d.png.*\): not a finite number in the gradient of \w+"
    with pytest.raises(InputError, match=said):
        run(images, tmp_path)
    assert torch.load(tmp_path / "train_state.pth", weights_only=True)["progress"]["done"] == 0


def test_learning_rate_warms_up_and_decays():
    rates = [train_prior.learning_rate(s / 100, s, 1.0, 10, "cosine") for s in range(100)]
    assert max(rates) == rates[10] and rates[0] < 0.1 and rates[-1] < 0.01
    assert train_prior.learning_rate(1.0, 100, 1.0, 0, "constant") == 1.0
    assert train_prior.learning_rate(0.5, 100, 1.0, 0, "linear") == 0.5


def test_images_too_many_for_memory_are_read_again(images, monkeypatch):
    whole = train_prior.Images(images, 16, torch.device("cpu"))
    monkeypatch.setattr(train_prior, "IN_MEMORY_BYTES", 0)
    lazy = train_prior.Images(images, 16, torch.device("cpu"))
    assert lazy.pixels is None and whole.pixels is not None
    batch = lazy.batch(torch.tensor([5, 0]))
    assert torch.equal(batch, whole.batch(torch.tensor([5, 0])))
    assert batch.shape == (2, 3, 16, 16) and -1 <= batch.min() < batch.max() <= 1


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_error_of_what_the_network_predicts(prediction):
    prior = Prior(small_unet(16, (8, 16), norm_groups=4, attention_size=4), prediction_type=prediction)
    torch.nn.init.zeros_(prior.unet.conv_out.weight)
    torch.nn.init.zeros_(prior.unet.conv_out.bias)
    schedule, generator = Schedule(), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, 16, 16, generator=generator)
    t = torch.tensor([0, 10, 500, 999])
    abar = schedule.abar(t).view(-1, 1, 1, 1)
    v = abar.sqrt() * noise - (1 - abar).sqrt() * x0
    wanted = {"epsilon": noise, "v_prediction": v, "sample": x0}[prediction]
    loss = train_prior.diffusion_loss(prior, schedule.abar(torch.arange(1000)), x0, noise, t)
    torch.testing.assert_close(loss, wanted.square().mean())  # a network that predicts zero


def test_drawn_steps_have_their_distribution():
    torch.manual_seed(0)
    every = Schedule().abar(torch.arange(1000))
    uniform = train_prior.draw_steps(every, 4000, "uniform")
    assert uniform.min() == 0 and uniform.max() == 999
    assert abs(uniform.float().mean() - 499.5) < 2 and abs(uniform.float().std() - 288.7) < 2
    lognormal = train_prior.draw_steps(every, 4000, "lognormal")
    abar = every[lognormal]
    log_sigma = ((1 - abar) / abar).log() / 2
    assert abs(log_sigma.median() + 0.8) < 0.02 and lognormal.min() == 0 and lognormal.max() > 900
    assert abs(log_sigma[log_sigma > -0.8].sub(-0.8).median() / (0.6745 * 1.4) - 1) < 0.05  # a normal's quartile
