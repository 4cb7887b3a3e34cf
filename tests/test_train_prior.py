"""The prior's training command: resume is exact, nothing is lost or overwritten unasked, mistakes are one line."""

import pytest
import torch
from helpers import refused
from layout import picture
from PIL import Image

from checkpoints import read_weights
from DDNM import train_prior
from DDNM.guided_diffusion.prior import Prior, load_prior, small_unet
from DDNM.guided_diffusion.schedule import Schedule
from logger import MetricsTable

MODEL = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "nested").mkdir()
    for i in range(8):
        picture(i, (24, 20)).save(folder / ("nested" if i % 2 else ".") / f"{i}.png")
    return folder


def run(images, out, *options):
    """The exit status of a short run."""
    return train_prior.main([
        "--images", str(images), "--out", str(out), "--img_size", "16", "--channels", "8,16", "--norm_groups", "4",
        "--attention_size", "4", "--batch_size", "4", "--steps", "3", "--warmup", "1", "--log_every", "1",
        "--samples", "0", "--device", "cpu", "--threads", "1", *options,
    ])  # fmt: skip


def test_threads_share_the_batch_and_change_nothing_and_init_begins_where_another_run_ended(images, tmp_path):
    found = []
    for name, flags in {"1": (), "3": ("--threads", "3"), "on": ("--init", str(tmp_path / "1"), "--lr", "0")}.items():
        assert run(images, tmp_path / name, *flags) == 0
        found.append(read_weights(tmp_path / name / MODEL))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[2], found[0])
    other = tmp_path / "other", "--init", str(tmp_path / "1"), "--channels", "8,8"
    refused(f"{tmp_path / '1'}: do not fit UNet2DModel", run, images, *other)


def test_the_result_is_a_prior_with_everything_beside_it(images, tmp_path, monkeypatch, curves):
    monkeypatch.setattr(train_prior, "SAMPLE_STEPS", 3)
    assert run(images, tmp_path, "--save_every", "2", "--samples", "3", "--save_dtype", "float16") == 0
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*") if "events" not in path.parts}
    assert names == {
        "config.json", "scheduler_config.json", MODEL, "train_state.pth", "metrics.csv", "log.txt", "curves.png",
        "settings.json", "samples/step_000002.png", "samples/step_000003.png",
    }  # fmt: skip
    assert Image.open(tmp_path / "samples" / "step_000003.png").size == (48, 16)
    ema = torch.load(tmp_path / "train_state.pth", weights_only=True)["ema"]
    stored = read_weights(tmp_path / MODEL)
    assert all(torch.equal(tensor, ema[f"unet.{k}"].half()) for k, tensor in stored.items())
    assert load_prior(tmp_path, image_size=16)(torch.zeros(1, 3, 16, 16), 10).shape == (1, 3, 16, 16)


def test_results_are_kept_and_another_run_is_refused_unless_overwriting(images, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    assert run(images, tmp_path, "--steps", "1", "--overwrite") == 0
    assert (tmp_path / "mine.txt").read_text() == "keep"
    refused("--resume to continue it or --overwrite", run, images, tmp_path)
    refused("has seed 0, not 1", run, images, tmp_path, "--resume", "--seed", "1")
    refused("has images 8, not 4", run, images / "nested", tmp_path, "--resume")
    (tmp_path / "train_state.pth").unlink()
    refused("not empty", run, images, tmp_path, "--resume")


def test_a_clock_ends_the_run(images, tmp_path):
    assert run(images, tmp_path, "--steps", "100000", "--minutes", "0.01") == 0
    rows = MetricsTable(tmp_path / "metrics.csv").rows
    assert float(rows[-1]["seconds"]) >= 0.6 and len(rows) < 100000


@pytest.mark.parametrize("folder, options, said", [
    ("images", ("--channels", "8,10"), "divisible"), ("images", ("--img_size", "18"), "divisible by 4"),
    ("images", ("--lr", "1e30", "--warmup", "0", "--steps", "50"), "step [0-9]+ .*not a finite number"),
    ("none", (), "no such"), ("empty", (), "no images"),
])  # fmt: skip
def test_what_cannot_work_is_one_line_and_leaves_no_folder(images, tmp_path, folder, options, said):
    (tmp_path / "empty").mkdir()
    refused(said, run, images if folder == "images" else tmp_path / folder, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists() or "finite" in said


def test_resume_begins_a_run_of_which_nothing_was_saved(images, tmp_path):
    """So one command line serves a scheduler that starts it again and again."""
    (tmp_path / ".train_state.pth.abcd1234.pth").write_bytes(b"killed while it wrote this")
    (tmp_path / ".lock").write_text("process 1")
    assert run(images, tmp_path, "--resume", "--steps", "1") == 0
    assert not list(tmp_path.glob(".*"))


def test_a_gradient_that_is_not_finite_names_the_images_and_the_weight(images, tmp_path, monkeypatch):
    honest = train_prior.Images.batch

    def batch(self, indices):
        chosen = honest(self, indices)
        chosen[1] = float("nan")
        return chosen

    monkeypatch.setattr(train_prior.Images, "batch", batch)
    refused(r"step 1 \(\d.png, \d.png.*\): not a finite number in the gradient of \w+", run, images, tmp_path)
    assert torch.load(tmp_path / "train_state.pth", weights_only=True)["progress"]["done"] == 0


def test_learning_rate_warms_up_and_decays():
    rates = [train_prior.learning_rate(s / 100, s, 1.0, 10) for s in range(100)]
    assert max(rates) == rates[10] and rates[0] < 0.1 and rates[-1] < 0.01


def test_images_too_many_for_memory_are_read_again(images, monkeypatch):
    whole = train_prior.Images(images, 16, torch.device("cpu"))
    monkeypatch.setattr(train_prior, "IN_MEMORY_BYTES", 0)
    lazy = train_prior.Images(images, 16, torch.device("cpu"))
    assert lazy.pixels is None and whole.pixels is not None
    batch = lazy.batch(torch.tensor([5, 0]))
    assert torch.equal(batch, whole.batch(torch.tensor([5, 0])))
    assert batch.shape == (2, 3, 16, 16) and -1 <= batch.min() < batch.max() <= 1


def test_the_loss_is_the_error_of_what_the_network_predicts(monkeypatch):
    prior = Prior(small_unet(16, (8, 16), norm_groups=4, attention_size=4), prediction_type="v_prediction")
    abar, t = prior.schedule.abar(torch.arange(1000)), torch.tensor([0, 10, 500, 999])
    x0, noise = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = []
    monkeypatch.setattr(prior, "predict", lambda x, t: seen.append(x) or 0 * x)
    loss = train_prior.diffusion_loss(prior, abar, x0, noise, t)
    torch.testing.assert_close(loss, prior.target(x0, noise, t).square().mean())
    a = abar[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(seen[0], a.sqrt() * x0 + (1 - a).sqrt() * noise)


def test_drawn_steps_have_their_distribution():
    torch.manual_seed(1)
    every = Schedule().abar(torch.arange(1000))
    drawn = train_prior.draw_steps(every, 4000)
    abar = every[drawn]
    log_sigma = ((1 - abar) / abar).log() / 2
    assert abs(log_sigma.median() + 0.8) < 0.02 and drawn.min() == 0 and drawn.max() > 900
    assert abs(log_sigma[log_sigma > -0.8].sub(-0.8).median() / (0.6745 * 1.4) - 1) < 0.05  # a normal's quartile
