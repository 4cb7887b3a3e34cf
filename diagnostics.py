"""Diagnostics of an SPNN: the Penrose identities, how natural its pseudo-inverse is, its accuracy, its first NaN.

Its output may be logits, a map of classes (intersection over union of each) or a picture (error of what it measures).

    python diagnostics.py --checkpoint check_points/best_model.pth --dataset_path CelebAMask-HQ
    python diagnostics.py --operator 'grey*sr4' --dataset_path DDNM/exp/datasets/faces   # any folder of images

A library and a command. The identities hold for every weight, by algebra: what is measured here is rounding, which
grows with depth, and float64 beside float32 tells rounding from a mistake.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data_loader import ATTRIBUTES, CelebAMaskHQ, make_loader
from images import find_images, load_image
from logger import format_table
from metrics import accuracy_by_attribute, balanced_accuracy_by_attribute, evaluating, predict
from models import SPNN, concatenated
from networks import PRECISIONS, networks_in
from operators import DEGRADATIONS, is_linear, is_network, make_operator
from utils import (
    InputError,
    json_values,
    nearest,
    option,
    parse,
    resolve_device,
    run_command,
    write_json,
)

IDENTITIES = {
    "right_inverse": "g g' (y) = y",
    "reflexive_g": "g g' g = g",
    "reflexive_pinv": "g' g g' = g'",
    "completion": "G^-1 G = 1",
    "natural_latents": "G g' (y) = (y, r)",
    "consistency": "g(x to y) = y",  # of back-projection
}
SYMMETRY = {"symmetric": "(A+ A)^T = A+ A"}  # of linear operators: with it, g' is the Moore-Penrose inverse
ARITHMETICS = ("float64", *PRECISIONS)  # that the identities can be measured in


# --- Penrose identities and naturalness ------------------------------------------------------------------------------


class _Error:
    """Errors of one identity, gathered over batches, in float64 whatever was measured."""

    def __init__(self) -> None:
        self.largest = torch.zeros(2, dtype=torch.float64)  # of differences, and of what was expected
        self.squares = torch.zeros(2, dtype=torch.float64)
        self.count = 0

    def add(self, actual: Tensor, expected: Tensor) -> None:
        for i, values in enumerate((actual - expected, expected)):
            values = values.cpu().double()  # MPS has no float64
            if values.numel():
                self.largest[i] = torch.maximum(self.largest[i], values.abs().max())  # NaN if one is
            self.squares[i] += values.square().sum()
        self.count += actual.numel()

    def figures(self) -> dict[str, float]:
        def ratio(pair: Tensor) -> float:
            error, expected = pair.tolist()
            return 0.0 if error == 0 else (pair[0] / expected).item()

        return {
            "relative_max": ratio(self.largest),
            "relative_rms": ratio(self.squares.sqrt()),
            "absolute_max": self.largest[0].item(),
            "absolute_rms": (self.squares[0] / max(self.count, 1)).sqrt().item(),
        }


@torch.no_grad()
def penrose(model: SPNN, images: Tensor, precision: str = "float32", seed: int = 0, batch_size: int = 32) -> dict:
    """Errors of the identities, and the naturalness of g'.

    The right inverse and g' g g' = g' are measured at N random logits from a normal distribution of three times the
    spread of g(images): far from the data, where a mere fit to it would fail.

    Args:
        images: (N, C, H, W) in [-1, 1].
        seed: of the random logits.
        precision: what to compute in, one of `ARITHMETICS`; the model itself stays as it is. "tf32" and "bf16" are of
            the networks inside blocks alone.

    Returns:
        For every name in `IDENTITIES`, and `SYMMETRY` of a chain that is linear, errors: ``absolute_max`` and
        ``absolute_rms`` over all elements, ``relative_max`` and ``relative_rms`` against the largest expected value and
        the expected root mean square. ``consistency`` is that of back-projection to another image's y. Besides, over
        y = g(images):

        ``naturalness_norm``: mean |g'(y)|^2 of an image, summed over its pixels.
        ``natural_distance``: mean squared difference of the latents of g'(y) from those of the zero image, over all
        latents; what stage 2 of training brings down.
        ``lost``: |g'(g(x)) - x| / |x|: what the projection on natural images takes away. No error.

    Raises:
        ValueError: no images.
        InputError: a precision that there is not, or not on the model's device.
    """
    if not len(images):
        raise ValueError("penrose: no images to measure")
    dtype, inside = (torch.float64, "float32") if precision == "float64" else (torch.float32, precision)
    first = next(model.parameters(), images)
    device = torch.device("cpu") if first.device.type == "mps" and dtype == torch.float64 else first.device  # has none
    if (first.dtype, first.device) != (dtype, device):
        model = copy.deepcopy(model).to(device=device, dtype=dtype)
    identities = {**IDENTITIES, **(SYMMETRY if is_linear(model) else {})}
    errors = {name: _Error() for name in (*identities, "norm", "distance", "lost")}
    with evaluating(model), networks_in(inside, device):
        logits = [_measure_image(model, x.to(device, dtype), errors) for x in images.split(batch_size)]
        found, generator = torch.cat(logits), torch.Generator().manual_seed(seed)
        spread = 3 * found.cpu().double().square().mean().sqrt().item() or 1.0  # fresh networks may give g = 0
        targets = spread * torch.randn(found.shape, generator=generator, dtype=torch.float64)
        for y in targets.split(batch_size):
            _measure_target(model, y.to(device, dtype), errors)
    return {
        **{name: errors[name].figures() for name in identities},
        "naturalness_norm": errors["norm"].squares[0].item() / len(images),
        "natural_distance": errors["distance"].figures()["absolute_rms"] ** 2,
        "lost": errors["lost"].figures()["relative_rms"],
        "images": len(images),
    }


def _measure_image(model: SPNN, x: Tensor, errors: dict[str, _Error]) -> Tensor:
    """Add what can be measured on images x, (B, C, H, W); returns g(x), (B, *out_shape)."""
    _, z_zero = model(torch.zeros_like(x[:1]), return_latents=True)
    y, z = model(x, return_latents=True)
    natural = model.pinv(y)  # g'(g(x))
    errors["reflexive_g"].add(model(natural), y)
    errors["completion"].add(model.pinv(y, z), x)
    others = y.roll(1, 0)
    errors["consistency"].add(model(model.back_project(x, others)), others)
    if "symmetric" in errors:
        products = natural.flatten(1) @ x.flatten(1).T  # <A+ A x_i, x_j>
        errors["symmetric"].add(products, products.T)
    errors["norm"].add(natural, torch.zeros_like(natural))
    errors["distance"].add(concatenated(model.natural(y).z), concatenated(z_zero))
    errors["lost"].add(natural, x)
    return y


def _measure_target(model: SPNN, y: Tensor, errors: dict[str, _Error]) -> None:
    """Add what can be measured at logits y, (B, *out_shape)."""
    x = model.pinv(y)
    y_again, z = model(x, return_latents=True)
    errors["right_inverse"].add(y_again, y)
    errors["reflexive_pinv"].add(model.pinv(y_again), x)
    natural = concatenated([y, *model.natural(y).z])  # (B, D)
    errors["natural_latents"].add(concatenated([y_again, *z]), natural)


# --- Accuracy --------------------------------------------------------------------------------------------------------


def accuracy(model: SPNN, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device | str) -> dict:
    """Accuracy of the attributes over a loader of (images (B, C, H, W), labels (B, d) in {0, 1}).

    Returns:
        ``by_attribute`` and ``balanced_by_attribute``, lists of d figures in [0, 1] (NaN if an attribute is always
        or never present), their means ``accuracy`` and ``balanced_accuracy`` (over attributes that have one), and the
        number of ``images``.

    Raises:
        ValueError: no images, or another number of labels than logits.
    """
    logits, labels = predict(model, loader, device)
    plain, balanced = accuracy_by_attribute(logits, labels), balanced_accuracy_by_attribute(logits, labels)
    return {
        "accuracy": plain.mean().item(),
        "balanced_accuracy": balanced.nanmean().item(),
        "by_attribute": plain.tolist(),
        "balanced_by_attribute": balanced.tolist(),
        "images": len(logits),
    }


def confusion(guess: Tensor, truth: Tensor, classes: int) -> Tensor:
    """How many places of maps (B, H, W) are of which class, and are guessed as which: (classes, classes), int64."""
    pairs = (truth * classes + guess).flatten().cpu()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def iou_by_class(table: Tensor) -> Tensor:
    """Intersection over union of each class of a `confusion`: (classes,); NaN for one that is in neither map."""
    both = table.diag().double()
    return both / (table.sum(0) + table.sum(1) - both)


@torch.no_grad()
def map_accuracy(model: SPNN, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device | str) -> dict:
    """How right maps are over a loader of (images (B, C, H, W), targets).

    Returns:
        For targets that are maps of classes, (B, H', W'): ``mean_iou`` over the classes that occur, ``by_class``, the
        share of ``places`` that are right. For pictures, (B, K, H', W'): ``relative_rms`` and ``absolute_rms`` of the
        difference. Both with the number of ``images``.

    Raises:
        ValueError: no images, or targets that are neither; both shapes are named.
    """
    table = torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64)
    error, images = _Error(), 0
    with evaluating(model):
        for x, truth in loader:
            y, truth = model(x.to(device)).float().cpu(), truth.cpu()  # (B, K, H', W')
            if truth.shape == y.shape:
                error.add(y, truth)
            elif truth.shape == y[:, 0].shape and not truth.is_floating_point():
                table += confusion(y.argmax(1), truth, model.num_classes)
            else:
                shapes = f"{tuple(y.shape[1:])}, the targets {tuple(truth.shape[1:])}"
                raise ValueError(f"map_accuracy: the model's maps are {shapes}: neither classes nor pictures of theirs")
            images += len(x)
    if not images:
        raise ValueError("map_accuracy: no images to measure")
    if error.count:
        figures = {key: value for key, value in error.figures().items() if key.endswith("rms")}
    else:
        by_class = iou_by_class(table)
        figures = {"mean_iou": by_class.nanmean().item(), "by_class": by_class.tolist(),
                   "places": (table.diag().sum() / table.sum()).item()}  # fmt: skip
    return {**figures, "images": images}


# --- The first number that is not finite -----------------------------------------------------------------------------


def _numbers(model: SPNN, x: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    """All that a pass up and a pass down compute, by name, in this order; what a block does not have is None."""
    yield from ((f"weight {name}", parameter) for name, parameter in model.named_parameters())
    yield "the images", x
    blocks = [(f"block {i} {getattr(b, 'name', type(b).__name__)}", b) for i, b in enumerate(model.pinn.blocks)]
    for name, block in blocks:
        x, z = block(x, return_latent=True)
        yield f"{name}, its latent", z
        yield f"{name}, its output", x
    for name, block in reversed(blocks):
        z = block.natural_latent(x)
        yield f"{name}, its natural latent", z
        x = block.pinv(x, z)
        yield f"{name}, its pseudo-inverse", x


@torch.no_grad()
def first_nonfinite(model: SPNN, x: Tensor) -> str | None:
    """Where NaN or infinity appears first: in a weight, the images, a block on the way up, or one on the way down.

    Args:
        x: images, (B, C, H, W).

    Returns:
        A phrase that names it, such as "weight pinn.blocks.3.s.net.0.weight" or
        "block 3 ConvPINNBlock(192->48), its latent", or None if all is finite.
    """
    with evaluating(model):
        broken = (name for name, value in _numbers(model, x) if value is not None and not value.isfinite().all())
        return next(broken, None)


# --- Everything at once ----------------------------------------------------------------------------------------------


def diagnose(
    model: SPNN,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    samples: int = 64,
    seed: int = 0,
    attributes: Sequence[str] | None = None,
    batch_size: int = 32,
    precisions: Sequence[str] = ("float32", "float64"),
) -> dict:
    """All diagnostics of a model: accuracy over the whole loader, identities over its first images.

    Args:
        loader: of (images (B, C, H, W) in [-1, 1], labels (B, d) in {0, 1}), or, if the output is a map, what
            `map_accuracy` takes.
        device: where the model is.
        samples: images for the identities.
        seed: of the random targets.
        attributes: names of the logits, for the report.
        batch_size: images at a time in the identities.
        precisions: to measure the identities in. float64 takes a copy of the model, of twice its memory.

    Returns:
        ``{"accuracy": see accuracy and map_accuracy, "penrose": {precision: see penrose}, "nonfinite": str | None,
        "attributes": names | None}``: JSON values only. A figure that is NaN or infinite is None there.

    Raises:
        ValueError: no images, or names that are not one per logit.
    """
    if attributes is not None and len(attributes) != model.num_classes:
        raise ValueError(f"diagnose: {len(attributes)} attribute names for {model.num_classes} logits")
    kept: list[Tensor] = []

    def keeping() -> Iterable[tuple[Tensor, Tensor]]:
        """The loader, its first ``samples`` images remembered: one pass over the data is enough."""
        for images, labels in loader:
            if (missing := samples - sum(map(len, kept))) > 0:  # an empty part would hold its whole batch
                kept.append(images[:missing])
            yield images, labels

    measured = (accuracy if len(model.out_shape) == 1 else map_accuracy)(model, keeping(), device)
    images = torch.cat(kept)
    errors = {precision: penrose(model, images, precision, seed, batch_size) for precision in precisions}
    broken = first_nonfinite(model, images[:batch_size].to(device))
    return json_values({"accuracy": measured, "penrose": errors, "nonfinite": broken, "attributes": attributes})


def format_report(report: dict) -> str:
    """What `diagnose` returned, as text for the screen; "nan" for a figure that is not finite, or that there is not."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    rows = []
    for key, formula in (IDENTITIES | SYMMETRY).items():
        row: dict = {"relative error": f"{key}: {formula}"}
        for precision, errors in report["penrose"].items():
            if key in errors:
                row[f"{precision} max"] = number(errors[key]["relative_max"])
                row[f"{precision} rms"] = number(errors[key]["relative_rms"])
        if len(row) > 1:
            rows.append(row)
    columns = {name: (name, ".1e") for name in list(rows[0])[1:]}
    natural = report["penrose"].get("float64", next(iter(report["penrose"].values())))
    lines = [
        format_table(rows, "relative error", columns),
        f"naturalness: mean |g'(y)|^2 {number(natural['naturalness_norm']):.4g}, "
        f"distance of latents from the zero image's {number(natural['natural_distance']):.4g}, "
        f"|g'(g(x)) - x| / |x| {number(natural['lost']):.3f} ({natural['images']} images)",
        f"first number that is not finite: {report['nonfinite'] or 'none'}",
    ]
    measured = report["accuracy"] or {}
    words = {"accuracy": "accuracy", "balanced_accuracy": "balanced", "mean_iou": "intersection over union",
             "places": "places", "absolute_rms": "measured picture: rms error", "relative_rms": "relative"}  # fmt: skip
    if said := [f"{words[key]} {number(measured[key]):.4f}" for key in words if key in measured]:
        lines.append(f"{', '.join(said)} ({measured['images']} images)")
    words = {"by_attribute": "accuracy", "balanced_by_attribute": "balanced", "by_class": "intersection over union"}
    if columns := {key: (word, ".4f") for key, word in words.items() if key in measured}:
        names = report["attributes"] or [f"logit {i}" for i in range(len(measured[next(iter(columns))]))]
        rows = [{"output": name, **{key: number(measured[key][i]) for key in columns}} for i, name in enumerate(names)]
        lines.append(format_table(rows, "output", columns))
    return "\n".join(lines)


# --- Command ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Penrose identities, naturalness and accuracy of an SPNN on images with labels or masks."""

    checkpoint: Path | None = option(None, "SPNN weights, .pth or .safetensors")
    operator: str | None = option(None, "in its place: sr4, grey, inpaint:FILE, a product, or weights")
    img_size: int = option(64, "of an operator that is a word: side of the images", 1, 4096)
    dataset_path: Path = option(..., "a folder in CelebAMask-HQ's layout; of images, for an operator that is a word")
    split: Literal["train", "val", "test", "all"] = option("test", "of the data set")
    batch_size: int = option(32, "images at a time", 1)
    samples: int = option(64, "images for the identities", 1)
    precision: tuple[str, ...] = option(
        ("float32", "float64"), "of the identities' arithmetic; tf32 and bf16 inside the networks only",
        choices=ARITHMETICS,
    )  # fmt: skip
    json: Path | None = option(None, "write the report there too")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    seed: int = option(0, "of the random targets", 0)


def targets_for(model: SPNN, options: Options) -> tuple[list[str] | None, Iterable[tuple[Tensor, Tensor]]]:
    """Names of the logits, and images with what the network should give for them, by its notes.

    Raises:
        InputError: notes that do not say what the output stands for.
    """
    where, shape = f"weights {options.checkpoint}", model.out_shape
    split = options.dataset_path, options.split, model.img_size
    names = model.notes.get("attributes" if len(shape) == 1 else "classes")
    if len(shape) == 1:
        names = names or (list(ATTRIBUTES) if model.num_classes == len(ATTRIBUTES) else None)
        if names is None or len(names) != model.num_classes:
            count = "no" if names is None else len(names)
            raise InputError(f"{where}: {model.num_classes} logits, but {count} attribute names beside it: "
                             "their labels are unknown")  # fmt: skip
        if unknown := [name for name in names if name not in ATTRIBUTES]:
            raise InputError(f"{where}: unknown attribute {unknown[0]!r}{nearest(unknown[0], ATTRIBUTES)}")
        columns, data = (
            [ATTRIBUTES.index(name) for name in names],
            make_loader(CelebAMaskHQ(*split), options.batch_size),
        )
        return names, ((images, labels[:, columns]) for images, labels in data)
    if names is not None:
        return names, make_loader(CelebAMaskHQ(*split, mask_size=shape[1:]), options.batch_size)
    if model.notes.get("operator") not in DEGRADATIONS:
        raise InputError(f"{where}: gives maps {shape}, and config.json names neither their classes nor a measurement "
                         f"of operators.py: what they should be is unknown")  # fmt: skip
    function = DEGRADATIONS[model.notes["operator"]]
    return None, ((images, function(images)) for images, _ in make_loader(CelebAMaskHQ(*split), options.batch_size))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see ``--help``."""
    options, _ = parse(__doc__, Options, argv=argv)
    device = resolve_device(options.device)
    if (options.checkpoint is None) == (options.operator is None):
        raise InputError("give --checkpoint or --operator, one of them")
    if options.operator is not None and not is_network(options.operator):
        shape = 3, options.img_size, options.img_size
        operator, files = make_operator(options.operator, shape), find_images(options.dataset_path)
        images = torch.stack([load_image(file, options.img_size) for file in files[: options.samples]]).to(device)
        found = {p: penrose(operator.chain, images, p, options.seed, options.batch_size) for p in options.precision}
        broken = first_nonfinite(operator.chain, images)  # no accuracy: the operator is given and not learned
        report = json_values({"accuracy": None, "penrose": found, "nonfinite": broken, "attributes": None})
    else:
        options = replace(options, checkpoint=options.checkpoint or Path(options.operator))
        model = SPNN.from_pretrained(options.checkpoint)
        if model.config["img_ch"] != 3:
            raise InputError(
                f"weights {options.checkpoint}: takes {model.config['img_ch']} channels, photographs have 3"
            )
        names, loader = targets_for(model, options)
        how = options.samples, options.seed, names, options.batch_size, options.precision
        report = diagnose(model.to(device), loader, device, *how)
    print(format_report(report))
    if options.json is not None:
        kept = ("checkpoint", "operator", "dataset_path", "split", "samples", "seed")
        settings = {key: getattr(options, key) for key in kept}
        write_json(options.json, {"settings": settings, **report})
    return 0


if __name__ == "__main__":
    run_command(main)
