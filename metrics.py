"""What networks say of data, and figures of merit for attribute logits and images. torch only.

Shapes: N images, C attributes. Logits are (N, C) real, labels (N, C) in {0, 1}, images (N, 3, H, W) in [-1, 1].
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Figure = tuple[float, float, float]  # a value and its 95 % interval


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode inside the block, in its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def predict(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Logits and labels, both (N, C) float32 on the CPU, of everything in a loader; the model is in eval mode for it.

    Raises:
        ValueError: no images.
    """
    with evaluating(model):
        pairs = [(model(images.to(device)).float().cpu(), labels.cpu()) for images, labels in loader]
    if not pairs:
        raise ValueError("no images to measure")
    logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    return logits, labels


def _hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each prediction is right, and whether each label is positive; both (N, C) bool."""
    if logits.shape != labels.shape or logits.ndim != 2:
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"expected logits and labels of one shape (N, C), got {shapes}")
    if logits.shape[0] == 0:
        raise ValueError("no images to measure")
    positive = labels > 0.5
    # a NaN logit is neither positive nor negative: wrong for either label
    return torch.where(positive, logits > 0, logits <= 0), positive


def accuracy_by_attribute(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right predictions of each attribute, (C,) in [0, 1]; a logit above 0 predicts "present"."""
    hits, _ = _hits(logits, labels)
    return hits.sum(0) / hits.shape[0]  # (C,)


def balanced_accuracy_by_attribute(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of sensitivity and specificity of each attribute, (C,) in [0, 1]; 0.5 is chance.

    NaN if an attribute is present in every image or in none: it cannot be told then.
    """
    hits, positive = _hits(logits, labels)
    sensitivity = (hits & positive).sum(0) / positive.sum(0)  # 0 / 0 is NaN
    specificity = (hits & ~positive).sum(0) / (~positive).sum(0)
    return (sensitivity + specificity) / 2  # (C,)


def agreement(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """Share of attributes on which two sets of logits say the same, by image: (N, C), (N, C) -> (N,) in [0, 1]."""
    known = ~(logits_a.isnan() | logits_b.isnan())
    return (((logits_a > 0) == (logits_b > 0)) & known).float().mean(-1)  # (N,)


def prob_error(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """Mean absolute difference of probabilities, by image: (N, C), (N, C) -> (N,) in [0, 1]."""
    return (logits_a.float().sigmoid() - logits_b.float().sigmoid()).abs().mean(-1)  # (N,)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, by image: (N, 3, H, W) in [-1, 1], twice -> (N,); infinite if equal."""
    if a.shape != b.shape:
        raise ValueError(f"psnr: images differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    error = (a.float() - b.float()).square().flatten(1).mean(1)  # (N,)
    return 10 * torch.log10(4 / error)  # the range is 2, its square 4


# --- Figures with their intervals ------------------------------------------------------------------------------------


def bootstrap(of: Callable[[Tensor], Tensor], count: int, draws: int = 1000) -> Figure:
    """A figure of ``count`` images with its 95 % interval: images drawn with replacement.

    Args:
        of: the figures of many draws at once, from the images' indices, (M, count) -> (M,).
    """
    drawn = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(0))
    values = torch.cat([of(some) for some in drawn.split(64)]).cpu().double()  # all at once would take much memory
    low, high = values.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return of(torch.arange(count)[None]).item(), low, high


def halves(of: Callable[[Tensor], float], count: int, draws: int = 50) -> Figure:
    """The same from halves of the images, which vary as the whole does (Shao and Wu 1989, the delete-d jackknife).

    For KID and FID, to which an image that is there twice looks like a perfect match.
    """
    value, generator = of(torch.arange(count)), torch.Generator().manual_seed(0)
    if count < 4:
        return value, float("nan"), float("nan")
    spread = torch.tensor([of(torch.randperm(count, generator=generator)[: count // 2]) for _ in range(draws)]).std()
    return value, value - 1.96 * spread.item(), value + 1.96 * spread.item()


def mean_of(values: Tensor) -> Figure:
    """The mean over images of one figure of each, (N,)."""
    values = values.cpu().double()
    return bootstrap(lambda drawn: values[drawn].mean(1), len(values))
