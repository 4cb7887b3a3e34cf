"""Training of an SPNN in two stages: g by classification, then the r-networks towards the natural pseudo-inverse.

Stage 1 minimises over all weights, with y = g(x)::

    lambda_bce * BCE(y, labels) + lambda_img_rec * |g'(y) - x|^2 + lambda_right_inverse * |g(g'(y)) - y|^2

Stage 2 minimises over the r-networks alone, g being frozen and z all latents concatenated::

    lambda_r_norm * |z(g'(y)) - z(0)|^2 + lambda_r_img_rec * |g'(y) - x|^2 + lambda_r_right_inverse * |g(g'(y)) - y|^2

BCE is summed over attributes, weighted, and averaged over the batch; squares are means over all their elements. The
last term of either is zero whatever the weights are, where every block is exact: its gradient is rounding noise. So it
is measured at every validation, and trained through only where a block declares ``exact = False``.

Source: Ehrlich, Berman and Shocher, "Pseudo-Invertible Neural Networks", arXiv 2602.06042.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from blocks import solved_once
from checkpoints import save_spnn
from diagnostics import clip_gradients, first_nonfinite
from distributed import World
from logger import MetricsTable, get_logger, plot_curves
from metrics import accuracy_by_attribute, balanced_accuracy_by_attribute
from models import SPNN, concatenated
from performance import convolutions_in, networks_in
from resume import (
    STATE_NAME,
    Stopped,
    epoch_keys,
    fitting,
    from_batch,
    only,
    random_state,
    restore_adam,
    save_state,
    set_random_state,
)
from utils import InputError

FORWARD_CHECKPOINT = "best_model.pth"
R_OPT_CHECKPOINT = "best_model_r_opt_real.pth"


class TrainingFailed(InputError):
    """Training produced numbers that are not finite; the last good checkpoint is kept."""


@dataclass(frozen=True)
class Settings:
    """Numbers of both stages; the defaults are the published ones."""

    epochs: int = 10
    lr: float = 2e-4
    lambda_bce: float = 1.0
    lambda_right_inverse: float = 40.0
    lambda_img_rec: float = 40.0
    reweight_every: int = 100  # steps between two looks of `AttributeWeights`; 0: attributes weigh the same
    warmup_steps: int = 200
    hold_share: float = 0.4
    r_epochs: int = 50
    r_lr: float = 1e-4
    lambda_r_norm: float = 0.1
    lambda_r_img_rec: float = 40.0
    lambda_r_right_inverse: float = 1.0
    grad_clip: float = 1.0
    precision: str = "float32"  # of the networks inside blocks, see `performance.networks_in`


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
            if weights.sum() > 0:  # all zero only where nothing moved at all
                self.values = weights / weights.mean()
        return self.values

    def state_dict(self) -> dict:
        return {"losses": list(self.losses), "values": self.values}

    def load_state_dict(self, state: dict) -> None:
        if any(each.shape != self.values.shape for each in (state["values"], *state["losses"])):
            raise ValueError(f"weights or losses of another number of attributes than {len(self.values)}")
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.values = state["values"]


# --- The losses ------------------------------------------------------------------------------------------------------


def is_exact(model: SPNN) -> bool:
    """Whether every block's pseudo-inverse is exact, so that the right-inverse loss is zero by construction."""
    return all(block.exact for block in model.pinn.blocks)


def bce_by_attribute(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each attribute, averaged over the batch: (B, d), (B, d) in {0, 1} -> (d,)."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0)


def right_inverse_error(model: SPNN, x: Tensor, y: Tensor) -> Tensor:
    """Mean of ``|g(x) - y|^2`` for x = g'(y): rounding, where every block is exact."""
    return F.mse_loss(model(x), y)


def forward_losses(
    model: SPNN, x: Tensor, labels: Tensor, settings: Settings, weights: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of stage 1 with their weighted sum, ``total``; and y. Images (B, C, H, W), labels and y (B, d)."""
    y = model(x)  # (B, d)
    by_attribute = bce_by_attribute(y, labels)  # (d,)
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


class KnownLogits:
    """g(x) of every training image, while g stands still: a stage computes it once where every step would.

    Args:
        keys: what the loader's batch sampler knows the images by; none where nothing is to be known.
        num_classes: d.
    """

    def __init__(self, keys: Iterable[Hashable], num_classes: int):
        self.rows = {key: row for row, key in enumerate(keys)}
        self.shape = (len(self.rows), num_classes)
        self.values: Tensor | None = None  # (len(keys), d), on the device; None until they are computed

    def __call__(self, keys: Iterable[Hashable]) -> Tensor:
        """Of a batch of images: (B, d)."""
        rows = torch.tensor([self.rows[key] for key in keys])
        if self.values.is_cuda:
            rows = rows.pin_memory()  # or the copy waits for the device
        return self.values[rows.to(self.values.device, non_blocking=True)]

    def state_dict(self) -> dict:
        return {"values": self.values}

    def load_state_dict(self, state: dict) -> None:
        values = state["values"]
        if values is not None and (values.shape != self.shape or not values.is_floating_point()):
            raise ValueError(f"numbers of type {values.dtype} and shape {tuple(values.shape)}, not {self.shape}")
        self.values = values


def freeze_g(model: SPNN) -> list[nn.Parameter]:
    """Leave nothing to train but the r-networks; returns the parameters that stand still from here on."""
    frozen = [parameter for name, parameter in model.named_parameters() if ".r." not in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def backward(losses_of: Callable[[], dict[str, Tensor]], precision: str, device: torch.device) -> dict[str, Tensor]:
    """Losses and the gradients of their ``total``; every W is solved once for both."""
    with solved_once(), convolutions_in(precision):  # g and g' share W and its gradient
        with networks_in(precision, device):
            losses = losses_of()
        losses["total"].backward()
    return losses


def step(
    model: SPNN,
    optimizer: torch.optim.Optimizer,
    losses_of: Callable[[], dict[str, Tensor]],
    settings: Settings,
    device: torch.device,
) -> dict[str, Tensor]:
    """A step of training; returns its losses.

    Raises:
        FloatingPointError: a loss or gradient is not finite, named; nothing has been applied.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = backward(losses_of, settings.precision, device)
    clip_gradients(model, settings.grad_clip, losses["total"].detach())
    optimizer.step()
    return losses


def adam(parameters: Iterable[nn.Parameter], lr: float, device: torch.device) -> torch.optim.Adam:
    """The optimiser of both stages."""
    fused = device.type in ("cpu", "cuda")  # one pass over all weights instead of one an operation
    return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), fused=fused)


# --- The trainer -----------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a stage is: what its state file holds besides weights, optimiser and random state."""

    epoch: int = 1  # under way, from 1
    batches: int = 0  # of this epoch that are done
    sums: dict[str, Tensor] = field(default_factory=dict)  # of their losses
    seconds: float = 0.0  # spent on this epoch, over all runs
    best: float = math.inf  # validation loss so far
    rows: list[dict[str, str]] = field(default_factory=list)  # of the metrics table


# what the state of each stage holds, for `resume.check_parts`
_PARTS = {
    "model": dict,
    "random": {"cpu": Tensor, "cuda": [Tensor]},
    "optimizer": dict,
    "progress": {
        "epoch": int, "batches": int, "sums": dict, "seconds": (int, float), "best": (int, float), "rows": [dict],
    },
}  # fmt: skip
STAGE_PARTS = {
    "forward": {**_PARTS, "scheduler": {"last_epoch": int}, "weights": {"losses": [Tensor], "values": Tensor}},
    "r_opt": {**_PARTS, "logits": {"values": (Tensor, type(None))}},
}


@dataclass
class Stage:
    """One of the two stages: what it minimises and with what.

    Attributes:
        losses_of: of a batch and its labels, or, where ``knows_logits``, those.
    """

    name: str
    epochs: int
    optimizer: torch.optim.Optimizer
    losses_of: Callable[[Tensor, Tensor], dict[str, Tensor]]
    checkpoint: Path
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    weights: AttributeWeights | None = None
    logits: KnownLogits | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def knows_logits(self) -> bool:
        """Whether g(x) of every training image is computed once, before the first step."""
        return self.logits is not None and len(self.logits.rows) > 0

    def _parts(self) -> dict:
        names = ("optimizer", "scheduler", "weights", "logits")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def state_dict(self) -> dict:
        progress = {f.name: getattr(self.progress, f.name) for f in fields(Progress)}
        return {"progress": progress, **{name: part.state_dict() for name, part in self._parts().items()}}

    def load_state_dict(self, state: dict, path: Path) -> None:
        """Take what the state file ``path`` held. Raises InputError where it does not fit."""
        with fitting(path, "progress"):
            self.progress = Progress(**state["progress"])
        for name, part in self._parts().items():
            with fitting(path, name):
                if part is self.optimizer:
                    restore_adam(part, state[name])
                else:
                    part.load_state_dict(state[name])


@dataclass
class CelebATrainer:
    """Runs the two stages and keeps their best models, tables, curves, log and training state in ``folder``.

    Args:
        model: on ``device`` already.
        train, val: loaders of (images (B, C, H, W) in [-1, 1], labels (B, d) in {0, 1}). The order of an epoch must be
            known to go on in the middle of it, see `resume.epoch_keys`.
        attributes: names of the d labels.
        notes: what else goes into config.json.
        run: what identifies the run, plain values; goes into the state file.
        save_every: steps between two writes of the state file, which every epoch's end writes too; 0: those alone.
        stopped: asked after every batch: the number of a signal that came, or None. Then the state is saved and
            `resume.Stopped` raised.
        state: of a state file, to go on from; it is for one of the stages.
        world: the processes that train together; ``train`` hands each its part of every batch.
    """

    model: SPNN
    train: DataLoader
    val: DataLoader
    settings: Settings
    folder: Path
    device: torch.device
    attributes: tuple[str, ...]
    notes: dict = field(default_factory=dict)
    run: dict = field(default_factory=dict)
    save_every: int = 0
    stopped: Callable[[], int | None] = lambda: None
    state: dict | None = None
    world: World = World()

    def __post_init__(self):
        self.log = get_logger("train", self.folder)
        self.notes = {"attributes": list(self.attributes), "training": asdict(self.settings), **self.notes}
        self._stage: Stage | None = None  # under way

    def train_forward(self) -> Path:
        """Stage 1. Returns the checkpoint of the lowest validation loss, `FORWARD_CHECKPOINT`.

        Raises:
            TrainingFailed: NaN or infinity; names the block, and the last good checkpoint is kept.
            Stopped: a signal came; the state is saved.
        """
        model, settings = self.model, self.settings
        total_steps = settings.epochs * len(self.train)
        optimizer = adam(model.parameters(), settings.lr, self.device)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, total_steps, settings.warmup_steps, settings.hold_share)
        )
        weights = AttributeWeights(model.num_classes, settings.reweight_every)
        val_batches = list(self.val.batch_sampler)

        def losses_of(x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            step = scheduler.last_epoch  # steps done
            if settings.reweight_every and step % settings.reweight_every == 0:
                look = step // settings.reweight_every
                with torch.no_grad(), networks_in("float32", self.device):
                    batch = next(iter(only(self.val, [val_batches[look % len(val_batches)]])))
                    val_x, val_labels = self._batch(batch)
                    weights.update(bce_by_attribute(model(val_x), val_labels))
            return forward_losses(model, x, labels, settings, weights.values)[0]

        self.log.info("stage 1: %d epochs of %d steps on %s", settings.epochs, len(self.train), self.device)
        checkpoint = self.folder / FORWARD_CHECKPOINT
        # without the reconstruction's term, nothing goes through the r-networks
        parallel = self.world.parallel(model, losses_of, all_used=settings.lambda_img_rec > 0 or not is_exact(model))
        return self._run(Stage("forward", settings.epochs, optimizer, parallel, checkpoint, scheduler, weights))

    def optimise_r(self) -> Path:
        """Stage 2. Returns the checkpoint of the lowest validation loss, `R_OPT_CHECKPOINT`.

        Raises:
            TrainingFailed: NaN or infinity; names the block, and the last good checkpoint is kept.
            Stopped: a signal came; the state is saved.
        """
        model, settings = self.model, self.settings
        frozen = freeze_g(model)
        try:
            self._origin = origin_latents(model)
            optimizer = adam([p for p in model.parameters() if p.requires_grad], settings.r_lr, self.device)
            self.log.info("stage 2: %d epochs of %d steps on %s", settings.r_epochs, len(self.train), self.device)

            # each picture has a key, where the sampler can tell them all; with fewer epochs g is asked less without
            keys = getattr(self.train.batch_sampler, "all_keys", None)
            pays = keys is not None and len(keys) < settings.r_epochs * len(self.train.dataset)
            logits = KnownLogits(keys if pays else (), model.num_classes)

            def losses_of(x: Tensor, target: Tensor) -> dict[str, Tensor]:
                with torch.no_grad():
                    y = target if pays else model(x)  # (B, d)
                return natural_losses(model, x, y, self._origin, settings)

            parallel, checkpoint = self.world.parallel(model, losses_of), self.folder / R_OPT_CHECKPOINT
            return self._run(Stage("r_opt", settings.r_epochs, optimizer, parallel, checkpoint, logits=logits))
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _batch(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return tuple(part.to(self.device, non_blocking=True) for part in batch)

    @torch.no_grad()
    def _compute(self, known: KnownLogits) -> None:
        """Ask g for the logits of every image, in the precision of training; each process has its share of them."""
        keys, size = list(known.rows), self.train.batch_sampler.batch_size
        batches = [keys[i : i + size] for i in range(0, len(keys), size)]
        loader = only(self.train, self.world.share(batches), self.train.num_workers)
        label = "g of the training images"
        bar = tqdm(loader, label, unit="batch", leave=False, dynamic_ncols=True, disable=not self.world.leads)
        logits: list[Tensor] = []
        with solved_once(), networks_in(self.settings.precision, self.device):
            for batch in bar:
                if len(logits) < len(batches) // self.world.size:  # a round in which every process has a batch
                    self._stop_if_asked()
                logits.append(self.model(self._batch(batch)[0]))  # (B, d)
        known.values = torch.empty(len(keys), self.model.num_classes, device=self.device)
        for rank, part in enumerate(self.world.gather([y.cpu() for y in logits])):
            for rows, y in zip(batches[rank :: self.world.size], part, strict=True):
                known.values[[known.rows[key] for key in rows]] = y.to(self.device)

    def _run(self, stage: Stage) -> Path:
        """The loop of both stages: epochs, validation, the best model."""
        self._stage = stage
        if self.state is not None and self.state["stage"] == stage.name:
            self._restore(stage)
        else:
            self._save()  # a run killed from here on is resumed, not begun again
        name, epochs = stage.name, stage.epochs
        if stage.knows_logits:
            if stage.logits.values is None:
                self._compute(stage.logits)
                self._save()
            stage.logits.values = stage.logits.values.to(self.device)
        if self.world.leads:
            table = MetricsTable(self.folder / f"metrics_{name}.csv", stage.progress.rows)
        while (epoch := stage.progress.epoch) <= epochs:
            means = self._epoch(stage)
            started = time.perf_counter()
            measured = self.validate(name)
            if self.world.leads:
                table.append(
                    {
                        "epoch": epoch,
                        **{f"train_{'loss' if key == 'total' else key}": value for key, value in means.items()},
                        **{f"val_{key}": value for key, value in measured.items()},
                        "lr": stage.optimizer.param_groups[0]["lr"],
                        "seconds": stage.progress.seconds + time.perf_counter() - started,
                    }
                )
                plot_curves(table.path, self.folder / f"curves_{name}.png")
            shown = ", ".join(f"{key} {value:.4g}" for key, value in measured.items())
            self.log.info("%s epoch %d/%d: train loss %.4g; val %s", name, epoch, epochs, means["total"], shown)
            best = stage.progress.best
            if measured["loss"] < best:
                best = measured["loss"]
                if self.world.leads:
                    save_spnn(stage.checkpoint, self.model, self.notes)
            stage.progress = Progress(epoch + 1, best=best, rows=table.rows if self.world.leads else [])
            self._save()
        self._stop_if_asked()
        self.log.info("%s: best validation loss %.4g, kept in %s", name, stage.progress.best, stage.checkpoint)
        self._stage = None
        self.world.wait()  # for the file
        return stage.checkpoint

    def _save(self) -> None:
        """Write the state file of the stage under way; a state with a weight that is not finite replaces none."""
        stage = self._stage
        if not all(p.isfinite().all() for p in self.model.parameters()):
            where = f"{stage.name} {stage.progress.epoch}/{stage.epochs}, before batch {stage.progress.batches + 1}"
            self._fail(where, next(iter(self.val))[0])
        if not self.world.leads:
            return
        state = {"settings": self.run, "stage": stage.name, "model": self.model.state_dict(), "random": random_state()}
        save_state(self.folder / STATE_NAME, {**state, **stage.state_dict()})

    def _restore(self, stage: Stage) -> None:
        path = self.folder / STATE_NAME
        with fitting(path, "model"):
            self.model.load_state_dict(self.state["model"])
        stage.load_state_dict(self.state, path)
        with fitting(path, "random"):
            set_random_state(self.state["random"])
        self.state = None  # as large as everything in training
        progress = stage.progress
        self.log.info("%s: resumed at epoch %d, batch %d", stage.name, progress.epoch, progress.batches + 1)

    def _stop_if_asked(self) -> None:
        """Save and raise `Stopped` where a signal came."""
        if (signum := self.stopped()) is not None:
            if self._stage is not None:
                self._save()
            raise Stopped(signum)

    def _fail(self, where: str, x: Tensor, labels: Tensor | None = None, otherwise: str = "a loss") -> None:
        """Stop, naming what is not finite first: a weight, the data, a block, or what is left."""
        culprit = first_nonfinite(self.model, x.to(self.device))
        if culprit is None and labels is not None and not labels.isfinite().all():
            culprit = "the labels"
        culprit = culprit or otherwise
        path = self._stage.checkpoint
        kept = f"the last good checkpoint is kept, {path}" if path.is_file() else "no checkpoint of this stage yet"
        message = f"{where}: not a finite number in {culprit}; {kept}. Try a lower learning rate"
        self.log.error(message)
        raise TrainingFailed(message)

    def _names(self, progress: Progress, x: Tensor) -> str:
        """The images of the batch under way: those that are not finite, if any, else all; their files if known."""
        try:
            keys = epoch_keys(self.train, progress.epoch - 1)[progress.batches]
        except ValueError:  # shuffled by a sampler that nobody can ask again
            return "its images are not known"
        files = getattr(getattr(self.train.dataset, "source", self.train.dataset), "files", None)
        indices = [key[0] if isinstance(key, tuple) else key for key in keys]  # (index, mirrored)
        names = [f"image {index}" if files is None else files[index] for index in indices]
        finite = x.isfinite().flatten(1).all(1).tolist()
        names = [name for name, good in zip(names, finite, strict=True) if not good] or names
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    def _epoch(self, stage: Stage) -> dict[str, float]:
        """One pass over the training data, or what is left of it; the means of the losses."""
        self.model.train()
        progress, count = stage.progress, len(self.train)
        label = f"{stage.name} {progress.epoch}/{stage.epochs}"
        # before the batches: to ask a sampler for an epoch's keys counts as a pass
        keys = iter(epoch_keys(self.train, progress.epoch - 1)[progress.batches :] if stage.knows_logits else ())
        batches = from_batch(self.train, progress.epoch - 1, progress.batches) if progress.batches < count else ()
        bar = tqdm(
            batches, label, count, initial=progress.batches, unit="batch", leave=False, dynamic_ncols=True,
            disable=not self.world.leads,
        )  # fmt: skip
        self._stop_if_asked()
        before = time.perf_counter()
        for batch in bar:
            x, target = self._batch(batch)
            labels = target
            if stage.knows_logits:
                target = stage.logits(next(keys))
            try:
                losses = step(
                    self.model, stage.optimizer, partial(stage.losses_of, x, target), self.settings, self.device
                )
            except FloatingPointError as error:  # weights are still good here: nothing has been applied
                where = f"{label}, batch {progress.batches + 1} ({self._names(progress, x)})"
                self._fail(where, x, labels, str(error))
            if stage.scheduler is not None:
                stage.scheduler.step()
            losses = self.world.mean({name: value.detach() for name, value in losses.items()})
            for name, value in losses.items():
                progress.sums[name] = progress.sums.get(name, 0) + value
            progress.batches += 1
            if progress.batches % 10 == 1:
                bar.set_postfix(loss=f"{losses['total'].item():.4g}")
            progress.seconds += time.perf_counter() - before
            before = time.perf_counter()
            self._stop_if_asked()
            if self.save_every and progress.batches % self.save_every == 0:
                self._save()
        return {name: (value / count).item() for name, value in progress.sums.items()}

    @torch.no_grad()
    def validate(self, stage: str) -> dict[str, float]:
        """Losses on the validation split, averaged by image, with accuracy in stage 1 and the right-inverse error.

        In float32, whatever the precision of training: the right-inverse error is that of the weights.
        """
        with networks_in("float32", self.device):
            return self._validate(stage)

    def _validate(self, stage: str) -> dict[str, float]:
        model = self.model.eval()
        sums, count, all_logits, all_labels, right_inverse = {}, 0, [], [], 0.0
        for batch in self.val if self.world.size == 1 else only(self.val, self.world.share(epoch_keys(self.val, 0))):
            if self.world.size == 1:  # several processes agree on it between steps: their parts may differ in length
                self._stop_if_asked()
            x, labels = self._batch(batch)
            if stage == "forward":
                losses, y = forward_losses(model, x, labels, self.settings)
                all_logits.append(y.cpu())
                all_labels.append(labels.cpu())
            else:
                y = model(x)
                losses = natural_losses(model, x, y, self._origin, self.settings)
            if self._stage is not None and not torch.isfinite(losses["total"]):
                where = f"{stage} {self._stage.progress.epoch}/{self._stage.epochs}, validation"
                self._fail(f"{where}, images {count} to {count + len(x) - 1}", x, labels)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(x)
            if count == 0:  # zero but for rounding: one batch tells
                right_inverse = right_inverse_error(model, model.pinv(y), y).item()
            count += len(x)
        parts = self.world.gather((sums, count, all_logits, all_labels, right_inverse))
        count = sum(part[1] for part in parts)
        means = {name: sum(part[0].get(name, 0.0) for part in parts) / count for name in parts[0][0]}
        measured = {"loss": means.pop("total"), **means, "right_inverse": parts[0][4]}
        if stage == "forward":
            logits, labels = (torch.cat([tensor for part in parts for tensor in part[k]]) for k in (2, 3))
            measured["accuracy"] = accuracy_by_attribute(logits, labels).mean().item()
            measured["balanced_accuracy"] = balanced_accuracy_by_attribute(logits, labels).nanmean().item()
        return measured


@torch.no_grad()
def typical_logits(model: SPNN, loader: DataLoader, device: torch.device) -> list[list[float]]:
    """For each attribute the median logit of the images without it and of those with it, [d][2].

    What "this attribute, set" means to a network: the value that reconstruction takes for ``--set NAME=0`` and ``=1``.
    A class without an image takes the other's, with its sign turned.
    """
    model.eval()
    pairs = [(model(x.to(device)).cpu(), labels.cpu()) for x, labels in loader]
    logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    typical = []
    for values, present in zip(logits.T, labels.T > 0.5, strict=True):
        without, having = values[~present], values[present]
        low = without.median().item() if len(without) else -having.median().item()
        high = having.median().item() if len(having) else -low
        typical.append([low, high])
    return typical
