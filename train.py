"""Training of an SPNN in two stages: g by classification, then the r-networks towards the natural pseudo-inverse.

Stage 1 minimises over all weights, with y = g(x)::

    lambda_bce * BCE(y, labels) + lambda_img_rec * |g'(y) - x|^2 + lambda_right_inverse * |g(g'(y)) - y|^2

Stage 2 minimises over the r-networks alone, g being frozen and z all latents concatenated::

    lambda_r_norm * |z(g'(y)) - z(0)|^2 + lambda_r_img_rec * |g'(y) - x|^2 + lambda_r_right_inverse * |g(g'(y)) - y|^2

BCE is summed over attributes, weighted, and averaged over the batch; squares are means over all their elements. The
last term of either is zero whatever the weights are, if every block is exact: its gradient is rounding noise. So it
is measured at every validation, and trained through only if a block declares ``exact = False``.

Source: Ehrlich, Berman and Shocher, "Pseudo-Invertible Neural Networks", arXiv 2602.06042.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from blocks import solved_once
from checkpoints import save_spnn
from data_loader import FaceLoader, Key, augmented, batches_from, with_batches
from diagnostics import first_nonfinite
from images import listed
from loop import Loop, Run, adam, clip_gradients, decaying
from metrics import accuracy_by_attribute, balanced_accuracy_by_attribute, evaluating
from models import SPNN, concatenated
from networks import convolutions_in, networks_in
from utils import option

FORWARD_CHECKPOINT = "best_model.pth"
R_OPT_CHECKPOINT = "best_model_r_opt_real.pth"
Batches = Iterator[tuple[list[Key], tuple[Tensor, Tensor]]]  # each with the keys of its pictures


@dataclass(frozen=True)
class Settings:
    """Training. The defaults are the published ones."""

    epoch: int = option(10, "epochs of stage 1", 1)
    lr: float = option(2e-4, "learning rate of stage 1, after warm-up", 0)
    warmup_steps: int = option(200, "steps of linear warm-up", 0)
    hold_share: float = option(0.4, "share of stage 1 after which the learning rate falls, linearly to 0", 0, 1)
    lambda_bce: float = option(1.0, "weight of the classification loss", 0)
    lambda_right_inverse: float = option(40.0, "weight of the right-inverse loss", 0)
    lambda_img_rec: float = option(40.0, "weight of the image reconstruction loss", 0)
    balance: float = option(
        0.0, "how much an attribute's rarer class counts more: 0, each image alike; 1, both classes alike", 0, 1
    )
    weight_decay: float = option(0.0, "of convolutions and matrices in stage 1", 0)
    augment: float = option(0.0, "how far training pictures are shifted, scaled, turned and lit: 0 to 1", 0, 1)
    teach: float = option(0.7, "what the --teachers' answers count in the targets; labels are the rest", 0, 1)
    reweight_every: int = option(100, "steps between two updates of the attributes' weights; 0: all weigh the same", 0)
    r_epoch: int = option(50, "epochs of stage 2", 1)
    r_lr: float = option(1e-4, "learning rate of stage 2", 0)
    lambda_r_norm: float = option(0.1, "weight of the latents' distance from those of the zero image", 0)
    lambda_r_img_rec: float = option(40.0, "weight of the image reconstruction loss in stage 2", 0)
    lambda_r_right_inverse: float = option(1.0, "weight of the right-inverse loss in stage 2", 0)
    grad_clip: float = option(1.0, "largest norm of the gradients, both stages", 0)
    precision: str = "float32"  # of the networks inside blocks, see `networks_in`


# --- Stage 1's schedule and weights ----------------------------------------------------------------------------------


def lr_factor(step: int, total: int, warmup: int = 200, hold_share: float = 0.4) -> float:
    """Factor on the learning rate at ``step`` of ``total``: up over ``warmup`` steps, held, then linearly to 0.

    It is held up to ``hold_share * total``. In runs so short that this comes before the warm-up's end, the warm-up
    ends there.
    """
    hold_until = int(hold_share * total)
    warmup = min(warmup, hold_until)
    if step < warmup:
        return step / warmup
    if step <= hold_until:
        return 1.0
    return max(0.0, (total - step) / (total - hold_until))


class AttributeWeights:
    """Weights of the attributes in the loss, from how their validation losses move.

    Of the last 2k losses, m1 and m2 are the means of the older and newer half. An attribute weighs in proportion to
    its relative change ``|m2 - m1| / m2`` times its loss ``m2``, each over its mean, and the weights average to 1.

    Source: He et al., "Adaptively Weighted Multi-task Deep Network for Person Attribute Classification", 2017.

    Args:
        num_classes: d.
        k: half the number of losses looked at.
    """

    def __init__(self, num_classes: int, k: int = 100):
        self.losses: deque[Tensor] = deque(maxlen=2 * max(k, 1))
        self.values = torch.ones(num_classes)

    def update(self, losses: Tensor) -> Tensor:
        """Take one more validation loss by attribute, (d,), and return the weights, (d,)."""
        self.losses.append(losses.detach().float().cpu())
        half = len(self.losses) // 2
        if half:
            history = torch.stack(list(self.losses))  # (n, d)
            older, newer = history[-2 * half : -half].mean(0), history[-half:].mean(0)
            change = (newer - older).abs() / newer.clamp_min(1e-12)
            weights = change / change.mean().clamp_min(1e-12) * newer / newer.mean().clamp_min(1e-12)
            if weights.sum() > 0:  # all zero only if nothing moved at all
                self.values = weights / weights.mean()
        return self.values

    def state_dict(self) -> dict:
        return {"losses": list(self.losses), "values": self.values}

    def load_state_dict(self, state: dict) -> None:
        self.losses, self.values = deque(state["losses"], self.losses.maxlen), state["values"]


# --- The losses ------------------------------------------------------------------------------------------------------


def is_exact(model: SPNN) -> bool:
    """Whether every block's pseudo-inverse is exact, so that the right-inverse loss is zero by construction."""
    return all(block.exact for block in model.pinn.blocks)


def class_weights(labels: Tensor, balance: float) -> Tensor:
    """What an absent and a present attribute count in the classification loss, (2, d), from all labels (N, d).

    An image counts in proportion to (1 / the share of its class) ** ``balance``; an attribute's mean weight is 1.
    """
    present = labels.mean(0).clamp(1e-3, 1 - 1e-3)
    shares = torch.stack([1 - present, present])  # (2, d)
    weights = shares**-balance
    return weights / (weights * shares).sum(0)


def bce_by_attribute(logits: Tensor, labels: Tensor, classes: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of each attribute, averaged over the batch: (B, d), (B, d) in [0, 1] -> (d,).

    Args:
        classes: `class_weights`; None: all 1.
    """
    absent, present = torch.ones(2, labels.shape[1], device=labels.device) if classes is None else classes
    losses = F.binary_cross_entropy_with_logits(logits, labels, absent, pos_weight=present / absent, reduction="none")
    return losses.mean(0)


def right_inverse_error(model: SPNN, x: Tensor, y: Tensor) -> Tensor:
    """Mean of ``|g(x) - y|^2`` for x = g'(y): rounding, if every block is exact."""
    return F.mse_loss(model(x), y)


def forward_losses(
    model: SPNN,
    x: Tensor,
    labels: Tensor,
    settings: Settings,
    weights: Tensor | None = None,
    classes: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of stage 1 with their weighted sum, ``total``; and y. Images (B, C, H, W), labels and y (B, d).

    Args:
        weights: of the attributes, (d,). classes: of their classes, see `class_weights`.
    """
    y = model(x)  # (B, d)
    by_attribute = bce_by_attribute(y, labels, classes)  # (d,)
    losses = {"bce": (by_attribute if weights is None else weights.to(y.device) * by_attribute).sum()}
    total = settings.lambda_bce * losses["bce"]
    if settings.lambda_img_rec or not is_exact(model):
        natural = model.pinv(y)  # (B, C, H, W)
        losses["img_rec"] = F.mse_loss(natural, x)
        total = total + settings.lambda_img_rec * losses["img_rec"]
        if not is_exact(model):
            losses["right_inverse"] = right_inverse_error(model, natural, y)
            total = total + settings.lambda_right_inverse * losses["right_inverse"]
    return {"total": total, **losses}, y


def natural_losses(model: SPNN, x: Tensor, y: Tensor, origin: Tensor, settings: Settings) -> dict[str, Tensor]:
    """The terms of stage 2 and their weighted sum, ``total``.

    Args:
        x: (B, C, H, W).
        y: g(x), (B, d): constant, as g is frozen.
        origin: z(0), the concatenated latents of the zero image, (1, total): constant as well.
    """
    natural, latents = model.pinv(y, return_latents=True)  # the r-outputs on the way down are z(g'(y))
    losses = {
        "r_norm": (concatenated(latents) - origin).square().mean(),
        "img_rec": F.mse_loss(natural, x),
    }
    total = settings.lambda_r_norm * losses["r_norm"] + settings.lambda_r_img_rec * losses["img_rec"]
    if not is_exact(model):
        losses["right_inverse"] = right_inverse_error(model, natural, y)
        total = total + settings.lambda_r_right_inverse * losses["right_inverse"]
    return {"total": total, **losses}


def origin_latents(model: SPNN) -> Tensor:
    """z(0), the concatenated latents of the zero image, (1, total)."""
    with torch.no_grad():
        zero = torch.zeros(1, *model.pinn.in_shape, device=next(model.parameters()).device)
        return concatenated(model.complete(zero).z)


def freeze_g(model: SPNN) -> None:
    """Leave nothing to train but the r-networks. The statistics of g's layers stand still as well: in eval mode."""
    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".r." in name)


def backward(losses_of: Callable[[], dict[str, Tensor]], precision: str, device: torch.device) -> dict[str, Tensor]:
    """Losses and the gradients of their ``total``; every W is solved once for both."""
    with solved_once(), convolutions_in(precision):
        with networks_in(precision, device):
            losses = losses_of()
        losses["total"].backward()
    return losses


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses_of: Callable[..., dict[str, Tensor]],
    settings: Settings,
    device: torch.device,
    *batch: Tensor,
) -> dict[str, Tensor]:
    """A step of training on the losses of a batch, whose images come first; returns the losses.

    Raises:
        FloatingPointError: a loss or gradient is not finite; names what is not first. Nothing has been applied.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = backward(lambda: losses_of(*batch), settings.precision, device)
    try:
        clip_gradients(model, settings.grad_clip, losses["total"].detach())
    except FloatingPointError as error:  # a weight, or a block, says more
        named = first_nonfinite(model, batch[0]) if isinstance(model, SPNN) and batch else None
        raise FloatingPointError(named or str(error)) from None
    optimizer.step()
    return losses


# --- The trainer -----------------------------------------------------------------------------------------------------


@dataclass
class CelebATrainer:
    """Runs the two stages; their best models, tables, curves, log and training state go to the run's folder.

    Args:
        model: on the run's device already.
        train, val: loaders of images (B, C, H, W) in [-1, 1] and labels (B, d) in {0, 1}, on the run's device. With
            several processes ``train`` hands each its part of every batch.
        attributes: names of the d labels.
        teachers: classifiers, images -> logits (B, d), whose mean probability is part of stage 1's targets: what they
            are unsure of teaches more than a label (Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a
            Neural Network").
    """

    model: SPNN
    train: FaceLoader
    val: FaceLoader
    settings: Settings
    run: Run
    attributes: Sequence[str]
    teachers: Sequence[nn.Module] = ()

    def train_forward(self) -> Path:
        """Stage 1. Returns the checkpoint of the lowest validation loss, `FORWARD_CHECKPOINT`.

        Raises:
            TrainingFailed: NaN or infinity; names the block, and the last good checkpoint is kept.
            Stopped: a signal came; the state is saved.
        """
        model, settings, run = self.model.train(), self.settings, self.run
        optimizer = adam(decaying(model, settings.weight_decay), settings.lr, run.device)
        balanced = settings.balance > 0
        classes = class_weights(self.train.dataset.labels, settings.balance).to(run.device) if balanced else None
        weights = AttributeWeights(model.num_classes, settings.reweight_every)
        steps, looks = settings.epoch * len(self.train), list(self.val.batch_sampler)

        def losses_of(x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return forward_losses(model, x, labels, settings, weights.values, classes)[0]

        # without the reconstruction's term, nothing goes through the r-networks
        parallel = run.world.parallel(model, losses_of, all_used=settings.lambda_img_rec > 0 or not is_exact(model))

        @torch.no_grad()
        def look_at_validation(turn: int) -> None:
            x, labels = next(iter(with_batches(self.val, [looks[turn % len(looks)]])))
            with evaluating(model), networks_in("float32", run.device):
                weights.update(bce_by_attribute(model(x), labels))

        def batches(done: int) -> Batches:
            for number, (keys, (x, labels)) in enumerate(batches_from(self.train, done), start=done):
                if settings.reweight_every and number % settings.reweight_every == 0:
                    look_at_validation(number // settings.reweight_every)
                x = augmented(x, settings.augment)
                yield keys, (x, self._taught(x, labels))

        return self._loop(
            "forward",
            settings.epoch,
            FORWARD_CHECKPOINT,
            parallel,
            batches,
            optimizer,
            rate=lambda done, _: settings.lr * lr_factor(done, steps, settings.warmup_steps, settings.hold_share),
            measure=lambda: self.validate(
                lambda x, labels: forward_losses(model, x, labels, settings, classes=classes)
            ),
            weights=weights,
        )

    def optimise_r(self) -> Path:
        """Stage 2. Returns the checkpoint of the lowest validation loss, `R_OPT_CHECKPOINT`; g stays frozen.

        Raises: as `train_forward`.
        """
        model, settings, run = self.model, self.settings, self.run
        freeze_g(model)
        origin = origin_latents(model)
        optimizer = adam([p for p in model.parameters() if p.requires_grad], settings.r_lr, run.device)
        parallel = run.world.parallel(model, lambda x, y: natural_losses(model, x, y, origin, settings))

        @torch.no_grad()
        def g(x: Tensor) -> Tensor:
            with networks_in(settings.precision, run.device):
                return model(x)  # (B, d)

        def batches(done: int) -> Batches:
            keys = self.train.batch_sampler.all_keys  # each stands for a picture, if none is augmented
            # with fewer epochs g is asked less without knowing it for all pictures
            pays = settings.augment == 0 and len(keys) < settings.r_epoch * len(self.train.dataset)
            logits_of = self._known_logits(keys, g) if pays else None
            for some, (x, _) in batches_from(self.train, done):
                x = augmented(x, settings.augment)
                yield some, (x, g(x) if logits_of is None else logits_of(some))

        def losses_and_logits(x: Tensor, _) -> tuple[dict[str, Tensor], Tensor]:
            y = model(x)
            return natural_losses(model, x, y, origin, settings), y

        return self._loop(
            "r_opt",
            settings.r_epoch,
            R_OPT_CHECKPOINT,
            parallel,
            batches,
            optimizer,
            rate=lambda done, _: settings.r_lr,
            measure=lambda: self.validate(losses_and_logits),
        )

    def _loop(
        self, name: str, epochs: int, file: str, losses: Callable[..., dict[str, Tensor]],
        batches: Callable[[int], Batches], optimizer: torch.optim.Optimizer, *, rate, measure, **parts,
    ) -> Path:  # fmt: skip
        """Train on the ``losses`` of what ``batches`` gives; ``parts`` change in training as well."""
        model, checkpoint = self.model, self.run.folder / file
        notes = {**model.notes, "attributes": list(self.attributes), "training": asdict(self.settings)}
        Loop(
            self.run,
            name,
            step=partial(step, model, optimizer, losses, self.settings, self.run.device),
            batches=batches,
            steps=epochs * len(self.train),
            row_every=len(self.train),
            parts={"model": model, "optimizer": optimizer, **parts},
            rate=rate,
            measure=measure,
            keep=lambda: save_spnn(checkpoint, model, notes),
            images=lambda keys, _: listed([self.train.dataset.files[index] for index, _ in keys]),
        ).train()
        return checkpoint

    @torch.no_grad()
    def _taught(self, x: Tensor, labels: Tensor) -> Tensor:
        """The targets: labels (B, d), and what the teachers say of these very pictures."""
        if not self.teachers:
            return labels
        with networks_in(self.settings.precision, self.run.device):
            answers = torch.stack([teacher(x).float().sigmoid() for teacher in self.teachers])  # (n, B, d)
        return labels.lerp(answers.mean(0), self.settings.teach)

    def _known_logits(self, keys: Sequence[Key], g: Callable[[Tensor], Tensor]) -> Callable[[list], Tensor]:
        """g of every picture, computed once, each process its share: a function from keys to logits, (B, d)."""
        world, size = self.run.world, self.train.batch_sampler.batch_size
        parts = [keys[i : i + size] for i in range(0, len(keys), size)]
        loader = with_batches(self.train, world.share(parts), self.train.num_workers)
        shown = tqdm(loader, "g of the training images", unit="batch", leave=False, disable=not world.leads)
        found: list[tuple[list[Key], Tensor]] = []
        for i, (some, batch) in enumerate(zip(world.share(parts), shown, strict=True)):
            if i < len(parts) // world.size:  # a round in which every process has a batch
                self.run.stop_if_asked()
            found.append((some, g(batch[0]).cpu()))
        found = [each for of_one in world.gather(found) for each in of_one]
        rows = {key: row for row, key in enumerate(key for some, _ in found for key in some)}
        values = torch.cat([y for _, y in found]).to(self.run.device)
        return lambda some: values[[rows[key] for key in some]]

    @torch.no_grad()
    def validate(self, losses_and_logits: Callable[[Tensor, Tensor], tuple[dict[str, Tensor], Tensor]]) -> dict:
        """Losses on the validation split, averaged by image, with accuracy and the right-inverse error.

        In float32, whatever the precision of training: the right-inverse error is that of the weights.

        Raises:
            FloatingPointError: a loss is not finite; names what is not first.
        """
        model, world = self.model, self.run.world
        found, right_inverse = [], 0.0  # of each batch its size, losses, logits and labels
        shared = self.val if world.size == 1 else with_batches(self.val, world.share(list(self.val.batch_sampler)))
        with evaluating(model), networks_in("float32", self.run.device):
            for x, labels in shared:
                if world.size == 1:  # several processes agree on it between steps: their parts may differ in length
                    self.run.stop_if_asked()
                losses, y = losses_and_logits(x, labels)
                if not found:  # zero but for rounding: one batch tells
                    right_inverse = right_inverse_error(model, model.pinv(y), y).item()
                if not torch.isfinite(losses["total"]):
                    raise FloatingPointError(first_nonfinite(model, x) or "a loss")
                found.append((len(x), {name: value.item() for name, value in losses.items()}, y.cpu(), labels.cpu()))
        sizes, each, logits, truth = zip(*(batch for part in world.gather(found) for batch in part), strict=True)
        means = {k: sum(n * of[k] for n, of in zip(sizes, each, strict=True)) / sum(sizes) for k in each[0]}
        y, labels = torch.cat(logits), torch.cat(truth)  # (N, d)
        return {
            "loss": means.pop("total"),
            **means,
            "right_inverse": world.gather(right_inverse)[0],
            "accuracy": accuracy_by_attribute(y, labels).mean().item(),
            "balanced_accuracy": balanced_accuracy_by_attribute(y, labels).nanmean().item(),
        }


def typical_logits(logits: Tensor, labels: Tensor) -> list[list[float]]:
    """For each attribute the median logit of the images without it and of those with it, [d][2], that g tells right.

    What "this attribute, set" means to a network: the value that reconstruction takes for ``--set NAME=0`` and ``=1``.
    If none is told right, all count; a class without an image takes the other's, with its sign turned.

    Args:
        logits, labels: of many images, (N, d).
    """
    typical = []
    for values, present in zip(logits.T, labels.T > 0.5, strict=True):
        without, having = values[~present], values[present]
        without = without[without < 0] if (without < 0).any() else without
        having = having[having > 0] if (having > 0).any() else having
        low = without.median().item() if len(without) else -having.median().item()
        high = having.median().item() if len(having) else -low
        typical.append([low, high])
    return typical
