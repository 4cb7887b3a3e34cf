"""An independent judge of attributes: a plain convolutional classifier that shares nothing with the SPNN.

Reconstructions are steered by the SPNN's own logits, so the SPNN cannot grade them. The judge is another network
(convolution, batch norm, ReLU; no coupling, no inverse), trained by itself on the same labels:

    python judge.py --dataset_path data/faces_10k --out check_points/judge.safetensors

It writes the weights, and beside them one JSON with the architecture, the settings and the figures on the test split;
and judge_training/ with table, curves, log and state, from which ``--resume`` goes on.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from checkpoints import DTYPES, built, read_weights, write_weights
from data_loader import ATTRIBUTES, CelebAMaskHQ, Loaders, augmented, batches_from, download_dataset, make_loaders
from diagnostics import accuracy
from logger import MetricsTable, format_table, get_logger
from loop import DONE, Loop, Run, adam, decaying, open_run
from metrics import accuracy_by_attribute, balanced_accuracy_by_attribute, predict
from utils import InputError, json_values, option, parse, read_json, run_command, seed_everything, write_json


@dataclass(frozen=True)
class Training:
    """Training."""

    img_size: int = option(64, "side of the images", 8, 4096)
    width: int = option(32, "channels of the first stage", 1)
    epochs: int = option(12, "passes over the training split", 1)
    batch_size: int = option(128, "images per step", 1)
    lr: float = option(2e-3, "peak learning rate", 1e-8, 1)
    weight_decay: float = option(0.0, "of convolutions and matrices", 0)
    augment: float = option(0.0, "how far training pictures are shifted, scaled, turned and lit: 0 to 1", 0, 1)
    seed: int = option(0, "of weights, order and mirroring", 0)


@dataclass(frozen=True)
class Machine:
    """Files and machine."""

    out: Path = option(..., "weights file, .safetensors or .pth")
    dataset_path: Path | None = option(None, "data set folder (default: download from Kaggle)")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    workers: int = option(0, "threads that read ahead; 0: none", 0, 1024)
    dtype: str = option("float32", "of the stored weights", choices=DTYPES)
    strict: bool = option(False, "refuse unreadable images instead of leaving them out")
    overwrite: bool = option(False, "replace an existing weights file")
    resume: bool = option(False, "continue a training that was stopped; begin it if there is none")
    save_every: int = option(500, "steps between saved states; epoch ends are saved too", 0)


class Judge(nn.Module):
    """A strided convolutional classifier, (B, 3, S, S) in [-1, 1] -> attribute logits (B, num_classes).

    Every stage halves the picture until it is at most 8 x 8. The head flattens that grid instead of averaging over it:
    the place of something (a hat, a collar, a receding hairline) is half of what the attributes ask.

    Args:
        num_classes: number of attributes.
        img_size: S, at least 8.
        width: channels of the first stage; 32 gives 0.57 M parameters at 64 x 64 and 40 attributes.
        dropout: on the head's hidden layer.
    """

    def __init__(self, num_classes: int = 40, img_size: int = 64, width: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        self.num_classes, self.img_size, self.width, self.dropout = num_classes, img_size, width, dropout
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))  # of the training pixels
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.5))

        layers: list[nn.Module] = []
        channels, size, out = 3, img_size, width
        while size > 8 or channels == 3:
            layers += [*_conv(channels, out, stride=2), *_conv(out, out)]
            channels, size, out = out, (size + 1) // 2, min(2 * out, 4 * width)
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            *_conv(channels, width, kernel=1),  # keeps the flattened grid small
            nn.Flatten(),
            nn.Linear(width * size * size, 4 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (3, self.img_size, self.img_size):
            raise ValueError(f"judge: expected (B, 3, {self.img_size}, {self.img_size}), got {tuple(x.shape)}")
        x = (x - self.mean) / self.std  # (B, 3, S, S)
        return self.head(self.features(x))  # (B, 4 width, 8, 8) -> (B, num_classes)

    def config(self) -> dict[str, int | float]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in ("num_classes", "img_size", "width", "dropout")}


def _conv(channels: int, out: int, stride: int = 1, kernel: int = 3) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True)


def load_judge(path: str | Path) -> Judge:
    """The judge saved at ``path``, in float32 on the CPU, in eval mode, built from the JSON beside its weights.

    Its ``attributes`` are the names of its logits, those of `ATTRIBUTES` if the JSON gives none.

    Raises:
        InputError: a file is missing or malformed, or weights and architecture do not fit.
    """
    path = Path(path)
    state, content = read_weights(path), read_json(path.with_suffix(".json"))
    judge = built(lambda: Judge(**content["architecture"]), state, path)
    judge.attributes = tuple(content.get("attributes", ATTRIBUTES[: judge.num_classes]))
    return judge.eval()


def one_cycle(progress: float) -> float:
    """Factor on the peak learning rate: a cosine up from 1/25 over the first 0.3 of a training, and one down to 0.

    Source: Smith and Topin 2019, "Super-Convergence".
    """
    if progress < 0.3:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * progress / 0.3))
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.3) / 0.7))


def begin(train: CelebAMaskHQ, width: int) -> Judge:
    """A judge that knows the training pixels' mean and deviation, and the attributes' base rates."""
    judge = Judge(len(ATTRIBUTES), train.img_size, width)
    sample = torch.linspace(0, len(train) - 1, min(len(train), 1024)).long().tolist()
    pixels = train.batch(sample)[0]
    judge.mean.copy_(pixels.mean((0, 2, 3)).view(1, 3, 1, 1))
    judge.std.copy_(pixels.std((0, 2, 3)).clamp_min(1e-3).view(1, 3, 1, 1))
    prevalence = train.labels.mean(0)  # (C,)
    with torch.no_grad():  # so the first steps are not spent on learning them
        judge.head[-1].bias.copy_(torch.logit(prevalence, eps=1e-3))
    parameters = sum(p.numel() for p in judge.parameters()) / 1e6
    get_logger("judge").info("%d training images, %.3f M parameters", len(train), parameters)
    return judge


def train_judge(loaders: Loaders, settings: Training, run: Run) -> Judge:
    """Train a judge: Adam, one cycle of the learning rate, binary cross-entropy, random mirroring.

    Returns:
        The one of the epoch with the lowest validation loss (on the CPU, eval mode).

    Raises:
        TrainingFailed: the loss is not finite.
        Stopped: a signal came; the state is saved.
    """
    s, device, loader = settings, run.device, loaders.train
    judge = begin(loader.dataset, s.width).to(device, memory_format=torch.channels_last)  # 1.8 times as fast on a CPU
    optimizer, best = adam(decaying(judge, s.weight_decay), s.lr, device), copy.deepcopy(judge)

    def step(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = F.binary_cross_entropy_with_logits(judge.train()(augmented(images, s.augment)), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    def measure() -> dict[str, float]:
        logits, labels = predict(judge, run.until_stopped(loaders.val), device)
        return {
            "loss": F.binary_cross_entropy_with_logits(logits, labels).item(),
            "accuracy": accuracy_by_attribute(logits, labels).mean().item(),
            "balanced_accuracy": balanced_accuracy_by_attribute(logits, labels).nanmean().item(),
        }

    Loop(
        run,
        "judge",
        step=step,
        batches=lambda done: batches_from(loader, done),
        steps=s.epochs * len(loader),
        row_every=len(loader),
        parts={"model": judge, "optimizer": optimizer, "best": best},
        rate=lambda done, progress: s.lr * one_cycle(progress),
        measure=measure,
        keep=lambda: best.load_state_dict(judge.state_dict()),
    ).train()
    return best.to("cpu", memory_format=torch.contiguous_format).eval()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see ``--help``."""
    settings, machine, _ = parse(__doc__, Training, Machine, argv=argv)
    out, folder = machine.out, machine.out.with_name(f"{machine.out.stem}_training")
    root = machine.dataset_path if machine.dataset_path is not None else download_dataset()
    seed_everything(settings.seed)
    with open_run(folder, machine.device, machine.save_every, settings.seed) as run:
        if run.world.size > 1:
            raise InputError("a judge is trained by one process: start judge.py without torchrun")
        loaders = make_loaders(root, settings.img_size, settings.batch_size, machine.workers, settings.seed,
                               strict=machine.strict, device=run.device)  # fmt: skip
        used = {**asdict(settings), "images": len(loaders.train.dataset)}
        run.find_state(used, machine.resume, machine.overwrite, out)
        if run.stage == DONE:
            print(f"{folder}: this training is finished")
        else:
            judge = train_judge(loaders, settings, run)
            write_weights(out, judge.state_dict(), DTYPES[machine.dtype])
            rows = MetricsTable(folder / "metrics_judge.csv").rows
            history = [{name: float(value) for name, value in row.items()} for row in rows]
            how = {**used, "dtype": machine.dtype, "device": run.device.type, "torch": torch.__version__}
            write_json(out.with_suffix(".json"), {"architecture": judge.config(), "attributes": list(ATTRIBUTES),
                                                  "history": history, "training": how})  # fmt: skip
            run.finish()  # and not before: a finished run writes nothing any more
    judge = load_judge(out).to(run.device)  # what is measured is the file, rounding of its weights included
    measured = json_values(accuracy(judge, loaders.test, run.device))
    write_json(out.with_suffix(".json"), {**read_json(out.with_suffix(".json")), "test": measured})
    rows = list(zip(ATTRIBUTES, measured["by_attribute"], measured["balanced_by_attribute"], strict=True))
    rows.append(("mean", measured["accuracy"], measured["balanced_accuracy"]))
    columns = "attribute", "accuracy", "balanced"
    rows = [dict(zip(columns, row, strict=True)) for row in rows]
    print(format_table(rows, "attribute", {name: (name, ".4f") for name in columns[1:]}))
    get_logger("judge").info("%d test images, weights %s", measured["images"], out)
    return 0


if __name__ == "__main__":
    run_command(main)
