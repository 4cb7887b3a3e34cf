"""An independent judge of attributes: a plain convolutional classifier that shares nothing with the SPNN.

Reconstructions are steered by the SPNN's own logits, so the SPNN cannot grade them. The judge is another network
(convolution, batch norm, ReLU; no coupling, no inverse), trained by itself on the same labels:

    python judge.py --dataset_path data/faces_10k --out check_points/judge.safetensors

It writes the weights, and beside them one JSON with the architecture, the settings and the figures on the test split.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoints import DTYPES, load_strictly, read_weights, write_weights
from data_loader import ATTRIBUTES, CelebAMaskHQ, download_dataset, make_loader
from logger import get_logger
from metrics import accuracy_by_attribute, balanced_accuracy_by_attribute
from utils import (
    LARGEST_BATCH,
    LARGEST_CREW,
    LARGEST_SEED,
    LARGEST_SIDE,
    LARGEST_WIDTH,
    InputError,
    atomic_write,
    number,
    resolve_device,
    run_command,
    seed_everything,
)


class Judge(nn.Module):
    """A strided convolutional classifier, (B, 3, S, S) in [-1, 1] -> attribute logits (B, num_classes).

    Every stage halves the picture until it is at most 8 x 8. The head flattens that grid instead of averaging over it:
    where something is (a hat, a collar, a receding hairline) is half of what the attributes ask.

    Args:
        num_classes: number of attributes.
        img_size: S, at least 8.
        width: channels of the first stage; 32 gives 0.57 M parameters at 64 x 64 and 40 attributes.
        dropout: on the head's hidden layer.
    """

    def __init__(self, num_classes: int = 40, img_size: int = 64, width: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        if img_size < 8 or width < 1 or num_classes < 1:
            raise InputError(f"judge: img_size {img_size} (at least 8), width {width} and num_classes {num_classes}")
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
        names = ("num_classes", "img_size", "width", "dropout")
        return {name: getattr(self, name) for name in names}


def _conv(channels: int, out: int, stride: int = 1, kernel: int = 3) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True)


def config_path(weights: str | Path) -> Path:
    """The JSON beside a weights file."""
    return Path(weights).with_suffix(".json")


def load_judge(path: str | Path) -> Judge:
    """The judge saved at ``path``, in float32 on the CPU, in eval mode, built from the JSON beside its weights.

    Its ``attributes`` are the names of its logits, those of `ATTRIBUTES` where the JSON gives none.

    Raises:
        InputError: a file is missing or malformed, or weights and architecture do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"judge {path}: no such file; train one with: python judge.py --out {path}")
    file = config_path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        with torch.device("meta"):
            frame = Judge(**content["architecture"])
        attributes = content.get("attributes", list(ATTRIBUTES[: frame.num_classes]))
        if not (isinstance(attributes, list) and all(isinstance(name, str) for name in attributes)):
            raise ValueError("attributes must be a list of names")
    except OSError as error:
        raise InputError(f"judge {path}: cannot read its architecture {file}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError, AttributeError) as error:
        reason = next(iter(repr(error).splitlines()))[:300]
        raise InputError(f"judge {path}: {file} holds no architecture of a judge: {reason}") from None
    state = read_weights(path)
    load_strictly(frame, state, path)  # what the JSON asks for, before it costs memory
    judge = Judge(**content["architecture"])
    load_strictly(judge, state, path)
    judge.attributes = tuple(attributes)
    return judge.eval()


@torch.inference_mode()
def predict(judge: nn.Module, loader: DataLoader, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits and labels, both (N, C) float32 on the CPU, of everything in a loader, in its order."""
    judge.eval()
    logits, labels = [], []
    for images, truth in loader:
        logits.append(judge(images.to(device)).float().cpu())
        labels.append(truth.cpu())
    return torch.cat(logits), torch.cat(labels)


def _rounded(value: float | Tensor) -> float | None:
    value = float(value)
    return round(value, 5) if math.isfinite(value) else None  # JSON has no NaN


def figures(logits: Tensor, labels: Tensor) -> dict:
    """Accuracy, balanced accuracy and prevalence by attribute, with mean and worst; ready for JSON.

    Args:
        logits, labels: (N, 40), labels in {0, 1}. An attribute of one class only has no balanced accuracy (None) and
            stays out of its mean.
    """
    accuracy = accuracy_by_attribute(logits, labels)  # (C,)
    balanced = balanced_accuracy_by_attribute(logits, labels)  # (C,)
    told = ~balanced.isnan()
    worst = [(value, name) for value, name in zip(balanced.tolist(), ATTRIBUTES, strict=True) if value == value]
    rows = zip(ATTRIBUTES, accuracy, balanced, labels.mean(0), strict=True)
    return {
        "images": len(labels),
        "bce": _rounded(F.binary_cross_entropy_with_logits(logits, labels)),
        "accuracy_mean": _rounded(accuracy.mean()),
        "accuracy_worst": _rounded(accuracy.min()),
        "balanced_accuracy_mean": _rounded(balanced[told].mean()),
        "balanced_accuracy_worst": _rounded(min(worst)[0]) if worst else None,
        "balanced_accuracy_worst_attribute": min(worst)[1] if worst else None,
        "attributes_of_one_class": [name for name, known in zip(ATTRIBUTES, told.tolist(), strict=True) if not known],
        "by_attribute": {
            name: {"accuracy": _rounded(a), "balanced_accuracy": _rounded(b), "prevalence": _rounded(p)}
            for name, a, b, p in rows
        },
    }


def format_table(measured: dict) -> str:
    """`figures` as lines of text."""

    def cell(value: float | None) -> str:
        return f"{'-':>10}" if value is None else f"{value:10.4f}"

    lines = [f"{'attribute':<20}{'accuracy':>10}{'balanced':>10}{'prevalence':>12}"]
    for name, row in measured["by_attribute"].items():
        lines.append(f"{name:<20}{cell(row['accuracy'])}{cell(row['balanced_accuracy'])}  {cell(row['prevalence'])}")
    lines.append(f"{'mean':<20}{cell(measured['accuracy_mean'])}{cell(measured['balanced_accuracy_mean'])}")
    lines.append(f"{'worst':<20}{cell(measured['accuracy_worst'])}{cell(measured['balanced_accuracy_worst'])}")
    return "\n".join(lines)


def train_judge(
    train: CelebAMaskHQ,
    val: CelebAMaskHQ,
    *,
    epochs: int = 12,
    batch_size: int = 128,
    lr: float = 2e-3,
    width: int = 32,
    seed: int = 0,
    workers: int = 0,
    device: torch.device,
) -> tuple[Judge, list[dict]]:
    """Train a judge: Adam, one-cycle learning rate, binary cross-entropy, random mirroring.

    Returns:
        The weights of the epoch with the lowest validation loss (on the CPU, eval mode), and one record an epoch.

    Raises:
        InputError: the loss is not finite.
    """
    log = get_logger("judge")
    seed_everything(seed)
    judge = Judge(len(ATTRIBUTES), train.img_size, width)
    sample = torch.linspace(0, len(train) - 1, min(len(train), 1024)).long().tolist()
    pixels = train.batch(sample)[0]
    judge.mean.copy_(pixels.mean((0, 2, 3)).view(1, 3, 1, 1))
    judge.std.copy_(pixels.std((0, 2, 3)).clamp_min(1e-3).view(1, 3, 1, 1))
    prevalence = train.labels.mean(0)  # (C,)
    with torch.no_grad():  # starts at the base rates, so the first steps are not spent on learning them
        judge.head[-1].bias.copy_(torch.logit(prevalence, eps=1e-3))
    rare = [name for name, share in zip(ATTRIBUTES, prevalence.tolist(), strict=True) if not 0.01 <= share <= 0.99]
    log.info("%d training images, %.3f M parameters", len(train), sum(p.numel() for p in judge.parameters()) / 1e6)
    log.info("labels: %.1f of %d present on average", prevalence.sum().item(), len(ATTRIBUTES))
    if rare:
        log.warning("present in fewer than 1 %% or more than 99 %% of the training images: %s", ", ".join(rare))

    judge.to(device, memory_format=torch.channels_last)  # 1.8 times as fast on a CPU
    drop = len(train) > batch_size
    loader = make_loader(train, batch_size, workers, seed, shuffle=True, flip=True, drop_last=drop, device=device)
    val_loader = make_loader(val, batch_size, workers, seed, device=device)
    optimiser = torch.optim.Adam(judge.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=max(2, epochs * len(loader)))
    history, best, best_state = [], math.inf, None
    for epoch in range(1, epochs + 1):
        judge.train()
        start, total, seen = time.perf_counter(), torch.zeros((), device=device), 0
        for images, labels in tqdm(loader, desc=f"epoch {epoch}/{epochs}", unit="batch", leave=False, disable=None):
            loss = F.binary_cross_entropy_with_logits(judge(images), labels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.detach() * len(images)
            seen += len(images)
        train_loss = total.item() / seen
        logits, truth = predict(judge, val_loader, device)
        val_loss = F.binary_cross_entropy_with_logits(logits, truth).item()
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            raise InputError(f"judge: loss is not finite in epoch {epoch} ({train_loss}, {val_loss}); lower lr")
        record = {
            "epoch": epoch,
            "train_loss": _rounded(train_loss),
            "val_loss": _rounded(val_loss),
            "val_accuracy": _rounded(accuracy_by_attribute(logits, truth).mean()),
            "val_balanced_accuracy": _rounded(balanced_accuracy_by_attribute(logits, truth).nanmean()),
            "seconds": round(time.perf_counter() - start, 2),
        }
        history.append(record)
        log.info("  ".join(f"{key} {value}" for key, value in record.items()))
        if val_loss < best:
            best, best_state = val_loss, {name: value.cpu().clone() for name, value in judge.state_dict().items()}
    judge.to("cpu", memory_format=torch.contiguous_format).load_state_dict(best_state)
    return judge.eval(), history


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train the independent attribute classifier, or measure one, on CelebAMask-HQ or procedural faces."
    )
    whole = number(int, 1)
    parser.add_argument("--dataset_path", help="data set folder; default: download from Kaggle")
    parser.add_argument("--out", type=Path, required=True, help="weights file, .safetensors or .pth")
    parser.add_argument(
        "--img_size", type=number(int, 8, LARGEST_SIDE), default=64, help="side of the images (%(default)s)"
    )
    parser.add_argument("--epochs", type=whole, default=12, help="passes over the training split (%(default)s)")
    parser.add_argument(
        "--batch_size", type=number(int, 1, LARGEST_BATCH), default=128, help="images a step (%(default)s)"
    )
    parser.add_argument("--lr", type=number(float, 1e-8, 1), default=2e-3, help="peak learning rate (%(default)s)")
    parser.add_argument(
        "--width", type=number(int, 1, LARGEST_WIDTH), default=32, help="channels of the first stage (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=number(int, 0, LARGEST_SEED), default=0, help="of weights, order and mirroring (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (%(default)s)")
    parser.add_argument(
        "--workers", type=number(int, 0, LARGEST_CREW), default=0, help="loader processes (%(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the stored weights (%(default)s)")
    parser.add_argument("--strict", action="store_true", help="refuse unreadable images instead of leaving them out")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing weights file")
    parser.add_argument("--evaluate", action="store_true", help="train nothing: measure --out on the test split")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; see ``--help``."""
    args = _parser().parse_args(argv)
    log = get_logger("judge")
    device = resolve_device(args.device)
    if not args.evaluate and args.out.exists() and not args.overwrite:
        raise InputError(f"{args.out} exists; pass --overwrite to replace it, or --evaluate to measure it")
    if args.evaluate:
        args.img_size = load_judge(args.out).img_size  # before the data: a wrong path should not cost a download
    root = args.dataset_path if args.dataset_path is not None else download_dataset()

    if not args.evaluate:
        train, val = (CelebAMaskHQ(root, split, args.img_size, args.strict) for split in ("train", "val"))
        judge, history = train_judge(
            train, val, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, width=args.width, seed=args.seed,
            workers=args.workers, device=device,
        )  # fmt: skip
        settings = {name: getattr(args, name) for name in ("epochs", "batch_size", "lr", "seed", "dtype")}
        record = {
            "architecture": judge.config(),
            "attributes": list(ATTRIBUTES),
            "training": {**settings, "images": len(train), "device": device.type, "torch": torch.__version__},
            "history": history,
        }
        write_weights(args.out, judge.state_dict(), DTYPES[args.dtype])
        _write_json(record, args.out)

    test = CelebAMaskHQ(root, "test", args.img_size, args.strict)
    judge = load_judge(args.out).to(device)  # what is measured is the file, rounding of its weights included
    measured = figures(*predict(judge, make_loader(test, args.batch_size, args.workers), device))
    if not args.evaluate:
        _write_json({**record, "test": measured}, args.out)
    print(format_table(measured))
    log.info("%d test images, weights %s", measured["images"], args.out)
    return 0


def _write_json(record: dict, weights: Path) -> None:
    with atomic_write(config_path(weights)) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
