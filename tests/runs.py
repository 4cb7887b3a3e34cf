"""Commands that several test files run: their small data, weights and flags, and what a run leaves."""

import csv
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import seeded
from layout import write_layout
from PIL import Image

import loop
import train_celeba
from blocks import ConvPINNBlock, PixelUnshuffleBlock
from checkpoints import read_weights, save_spnn, write_weights
from data_loader import ATTRIBUTES
from DDNM import main as reconstruct
from DDNM import train_prior
from DDNM.guided_diffusion import results
from DDNM.guided_diffusion.diffusion import image_generator, sample
from DDNM.guided_diffusion.guidance import NLBP, Unguided
from DDNM.guided_diffusion.prior import Prior, save_prior, small_unet
from DDNM.guided_diffusion.schedule import Schedule
from judge import Judge
from models import SPNN
from operators import as_operator
from utils import run_command

SIZE = 32
CHAIN = [
    ["PixelUnshuffleBlock", {"r": 4}],
    ["ConvPINNBlock", {"in_ch": 48, "out_ch": 1, "hidden": 4, "feat_size": 8}],
    ["PixelUnshuffleBlock", {"r": 8}],
    ["ConvPINNBlock", {"in_ch": 64, "out_ch": 40, "hidden": 8, "feat_size": 1}],
]
SETTINGS = {
    "layer_channels": CHAIN, "img_size": SIZE, "is_forward_train": True, "is_r_opt": True, "epoch": 2, "r_epoch": 1,
    "batch_size": 4, "workers": 0, "warmup_steps": 2, "reweight_every": 2, "lr": 1e-3, "r_lr": 1e-3, "device": "cpu",
    "diagnose_samples": 2, "save_every": 2,
}  # fmt: skip


# --- Training ---


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """20 pictures of 32x32 in CelebAMask-HQ's layout: 16 to train on, four batches per epoch."""
    rng = np.random.default_rng(0)
    pictures = [(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), rng.integers(0, 2, 40)) for _ in range(20)]
    return write_layout(tmp_path_factory.mktemp("faces"), pictures)


def spnn_arguments(faces: Path, folder: Path, **changes) -> list[str]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    preset = folder.parent / f"{folder.name}.yml"
    preset.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    return ["--config", str(preset), "--dataset_path", str(faces), "--checkpoint_dir", str(folder)]


def prior_arguments(faces: Path, folder: Path, steps: int = 12, augment: float = 0.0) -> list[str]:
    return [
        "--images", str(faces), "--out", str(folder), "--img_size", str(SIZE), "--channels", "8,16", "--norm_groups",
        "4", "--attention_size", "0", "--batch_size", "4", "--steps", str(steps), "--warmup", "1", "--log_every", "2",
        "--save_every", "2", "--samples", "0", "--device", "cpu", "--threads", "1",
        "--augment", str(augment), "--dropout", str(augment / 5),
    ]  # fmt: skip


COMMANDS = {"spnn": (train_celeba.main, spnn_arguments), "prior": (train_prior.main, prior_arguments)}


def outcome(folder: Path) -> dict:
    """What a run leaves: every weight, and the tables but for the time that was spent."""
    found = {}
    for path in sorted([*folder.glob("*.pth"), *folder.glob("*.safetensors")]):
        if path.name != "train_state.pth":
            found |= {f"{path.name}/{name}": tensor for name, tensor in read_weights(path).items()}
    for path in sorted(folder.glob("*.csv")):
        rows = csv.DictReader(open(path))
        found[path.name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return found


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and len(one) > 5
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


@contextmanager
def signal_at(
    owner: object, name: str, calls: float, signum: int = signal.SIGTERM, before: Callable | None = None
) -> Iterator[None]:
    """The n-th call of ``owner.name`` sends this process a signal; ``before`` it, something gets the same arguments."""
    honest, count = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        if next(count) == calls:
            if before is not None:
                before(*args, **kwargs)
            os.kill(os.getpid(), signum)
        return honest(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield


def without_diagnostics(patch: pytest.MonkeyPatch) -> None:
    """They take longer than the trainings here."""
    patch.setattr(train_celeba, "diagnose", lambda *_, **__: {})
    patch.setattr(train_celeba, "format_report", str)


CURVES = loop.plot_curves, loop.tensorboard_events


def without_curves() -> None:
    """The picture takes longer than the trainings here, and so does TensorBoard's import."""
    loop.plot_curves = lambda table, picture: picture.touch()
    loop.tensorboard_events = lambda folder, begin: nullcontext(lambda figures, step: None)


# --- Reconstruction ---


def randomised(module, seed: int = 0, strength: float = 0.7):
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(parameter[0].numel(), 1)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * strength / fan**0.5)
    return module.eval()


def tiny_chain(num_classes: int, size: int) -> list:
    side = size // 4
    return [
        (PixelUnshuffleBlock, {"r": 4}),
        (ConvPINNBlock, {"in_ch": 48, "out_ch": 6, "hidden": 8, "feat_size": side}),
        (PixelUnshuffleBlock, {"r": side}),
        (ConvPINNBlock, {"in_ch": 6 * side**2, "out_ch": num_classes, "hidden": 8, "feat_size": 1}),
    ]


def tiny_spnn(num_classes: int = 40, size: int = 16, seed: int = 0, strength: float = 0.7) -> SPNN:
    """With random weights; ``strength`` multiplies them."""
    chain = tiny_chain(num_classes, size)
    return randomised(SPNN(num_classes=num_classes, img_size=size, layer_channels=chain), seed, strength)


def tiny_prior(size: int = 16) -> Prior:
    torch.manual_seed(0)
    return Prior(small_unet(size, (4,), unshuffle=2, norm_groups=2, attention_size=0))


def save_judge(path, judge, **notes):
    write_weights(path, judge.state_dict())
    path.with_suffix(".json").write_text(json.dumps({"architecture": judge.config(), **notes}))


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Weights, a config and three plain pictures: red, green and blue."""
    folder = tmp_path_factory.mktemp("assets")
    typical = [[-2.5, 3.5]] * 40
    save_spnn(folder / "spnn.pth", tiny_spnn(), {"attributes": list(ATTRIBUTES), "typical_logits": typical})
    save_prior(tiny_prior(), folder / "prior")
    save_judge(folder / "judge.safetensors", randomised(Judge(40, 16, 4), 1), attributes=list(ATTRIBUTES))
    (folder / "inputs").mkdir()
    for name, colour in (("red", (220, 20, 20)), ("green", (20, 200, 20)), ("blue", (20, 20, 210))):
        Image.new("RGB", (16, 16), colour).save(folder / "inputs" / f"{name}.png")
    files = {"spnn": folder / "spnn.pth", "prior": folder / "prior", "judge": folder / "judge.safetensors"}
    settings = {"steps": 3, "nlbp_stop_cond": 0.02, "lpips": False, "device": "cpu"}
    settings |= {name: str(file) for name, file in files.items()}
    (folder / "tiny.yml").write_text(yaml.safe_dump(settings))
    return folder


def record_of(folder):
    return json.loads((folder / "results.json").read_text())


def figures_of(folder, key="images"):
    """The figures but for the time they took."""
    return [{k: v for k, v in image.items() if k != "seconds"} for image in record_of(folder)[key]]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def pictures(folder):
    return {str(path.relative_to(folder)): pixels(path) for path in folder.glob("*/*.png")}


def on_sampling(monkeypatch, hook) -> None:
    """Whatever a command has the sampler draw: ``hook`` is called with the same arguments first."""
    honest = results.sampling
    monkeypatch.setattr(results, "sampling", lambda *a, **settings: (hook(*a, **settings), honest(*a, **settings))[1])


# --- The sampler, on images of 8x8 and 5 logits ---

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)
SCHEDULE = Schedule()


def spnn8(seed: int = 0, strength: float = 1.0) -> SPNN:
    return tiny_spnn(5, SHAPE[-1], seed, strength).requires_grad_(False)


def as_prior(predict):
    predict.schedule, predict.image_size = SCHEDULE, SHAPE[-1]
    return predict


@as_prior
def gaussian_prior(x, t):
    """The exact noise predictor of images whose pixels are independent, of mean 0.1 and deviation 0.3."""
    abar = gaussian_prior.schedule.abar(t).view(-1, 1, 1, 1)
    return (1 - abar).sqrt() * (x - abar.sqrt() * 0.1) / (abar * 0.3**2 + 1 - abar)


def unet_prior(dtype: torch.dtype | None = None, **options) -> Prior:
    torch.manual_seed(0)
    unet = small_unet(SHAPE[-1], channels=(8, 16), norm_groups=4, attention_size=2)
    return Prior(unet, dtype, **options).requires_grad_(False).eval()


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=seeded(seed)) * 2 - 1


def logits(count: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(count, 5, generator=seeded(seed)) * scale


def draw(names, prior=gaussian_prior, seed=0, steps=10, model=None, target=None, guidance=None, of=sample, **settings):
    """Of a model, or of any operator; with one and no rule: NLBP."""
    generators = [image_generator(seed, name) for name in names]
    operator = None if model is None else as_operator(model)
    guidance = guidance or (Unguided() if model is None else NLBP())
    return of(prior, generators, CPU, operator, target, guidance, steps=steps, **settings)


# --- Processes ---


def forks():
    """The context of processes that are forks of one in which everything is imported, once for all test files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_celeba", "train_operator", "DDNM.main", "DDNM.train_prior", "torch._dynamo"])
    return context


def exit_code(target, *arguments) -> int:
    """Of such a process."""
    process = forks().Process(target=target, args=arguments)
    process.start()
    process.join(300)
    process.kill()
    return process.exitcode


def quick() -> None:
    """Leave out what takes longer than the trainings here."""
    torch.set_num_threads(1)
    without_curves()
    without_diagnostics(pytest.MonkeyPatch())


def member(rank: int, port: int, command, arguments: list[str], samples: Path, errors: Path) -> None:
    """A process of a run of two, with the variables that torchrun sets."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    quick()
    reconstruct.SAMPLES, sys.stderr = samples, open(errors / f"{rank}.txt", "w", buffering=1)
    run_command(lambda: command(arguments))


def start_two(command, arguments: list[str], folder: Path) -> tuple[list[int], list[str]]:
    """Exit status and last line of each of two processes; results of DDNM/main.py go below ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    started = [forks().Process(target=member, args=(i, port, command, arguments, folder, folder)) for i in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(900)
        process.kill()
    last = [(folder / f"{rank}.txt").read_text().strip().rpartition("\n")[2] for rank in (0, 1)]
    return [process.exitcode for process in started], last
