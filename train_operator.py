"""Fit an SPNN to a measurement of pictures that is given as a function, and undo it by the network and a frozen prior.

    python train_operator.py --operator lens --dataset_path data/faces_64 --out check_points/lens
    python train_operator.py --operator my.module:camera --dataset_path /path/to/faces --out check_points/camera
    python train_operator.py ... --resume --prior DDNM/exp/logs/faces/prior     # restores test images, into --out

A measurement takes images (B, 3, H, W) in [-1, 1] to pictures (B, C, H', W') of fewer numbers: lens, saturation and
jpeg of degradations.py, or a function of yours. Stage 1 minimises, over all weights, with y what is measured of x,

    lambda_data * |g(x) - y|^2 / 2 + lambda_img_rec * |g'(y) - x|^2

and stage 2, over the r-networks, what train.py says. With a prior, test images are restored from y alone by g' and by
back-projection (NLBP), beside what needs no network: the prior unguided, and the gradient of the true measurement (DPS)
if it has one. Writes table.json, table.md and sheet.png.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import ConvPINNBlock, PixelUnshuffleBlock, solved_once
from checkpoints import locate, save_spnn
from data_loader import Loaders, augmented, batches_from, make_loaders
from DDNM.guided_diffusion.diffusion import reconstruct
from DDNM.guided_diffusion.guidance import NLBP, Gradient, Guidance, Unguided
from DDNM.guided_diffusion.inputs import load_lpips
from DDNM.guided_diffusion.prior import load_prior
from DDNM.guided_diffusion.results import contact_sheet, picture
from degradations import find_function, measured_shape
from evaluate import bootstrap
from logger import get_logger
from loop import DONE, Loop, Run, adam, open_run
from metrics import psnr
from models import SPNN
from networks import PRECISIONS, networks_in
from operators import LinearOperator, Operator, SPNNOperator
from train import FORWARD_CHECKPOINT, R_OPT_CHECKPOINT, Settings, freeze_g, lr_factor, natural_losses, origin_latents
from train import step as training_step
from utils import (
    LARGEST_BATCH,
    LARGEST_SEED,
    LARGEST_SIDE,
    InputError,
    option,
    parse,
    run_command,
    seed_everything,
    write_json,
)


@dataclass(frozen=True)
class Fit:
    """Training."""

    steps: int = option(2000, "of stage 1", 1)
    r_steps: int = option(500, "of stage 2", 0)
    batch_size: int = option(32, "images per step", 1, LARGEST_BATCH)
    hidden: int = option(48, "width of the coupling networks", 1)
    depth: int = option(2, "blocks after each pixel unshuffle", 1)
    scale_bound: float = option(1.0, "bound of their log-scales", 1e-6)
    lr: float = option(1e-3, "of Adam in stage 1; a third of it in stage 2", 0)
    lambda_data: float = option(1.0, "weight of the loss between g(x) and what is measured", 0)
    lambda_img_rec: float = option(1.0, "weight of |g'(y) - x|^2", 0)
    augment: float = option(0.0, "how far training pictures are shifted, scaled, turned and lit: 0 to 1", 0, 1)
    precision: str = option("float32", "of the networks inside blocks in training", choices=PRECISIONS)
    seed: int = option(0, "of weights, order and mirroring", 0, LARGEST_SEED)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    overwrite: bool = option(False, "train anew where a trained network is")
    resume: bool = option(False, "go on where the run in --out was stopped; a finished one is only measured again")


@dataclass(frozen=True)
class Options:
    """What is fitted."""

    operator: str = option(..., "lens, saturation, jpeg, or package.module:function")
    dataset_path: Path = option(..., "faces, in a layout of data_loader.py")
    out: Path = option(..., "folder for weights, tables and pictures")
    img_size: int = option(64, "side of the images", 2, LARGEST_SIDE)
    count: int = option(24, "test images to restore", 1)
    dps_step: float = option(0.1, "step of the gradient of the true measurement", 0)


@dataclass(frozen=True)
class Restoring:
    """Restoration."""

    prior: str | None = option(None, "diffusion prior: a diffusers folder or a hub id; none: no restoration")
    sampling_steps: int = option(50, "of the sampler", 1, 1000)
    eta: float = option(0.5, "DDIM's variance", 0, 1)
    max_move: float = option(0.15, "nlbp: largest root mean square move of a step; 0: no limit", 0)
    stop: float = option(0.0, "nlbp: none below this distance from what is measured", 0)
    sampling_seed: int = option(1234, "of the noise", 0, LARGEST_SEED)


class PictureOperator(SPNNOperator):
    """An SPNN whose output is a picture: ``distance`` and ``loss`` are those of linear operators."""

    distance, loss = LinearOperator.distance, LinearOperator.loss


# --- The network and its training ------------------------------------------------------------------------------------


def chain(in_shape: Sequence[int], out_shape: Sequence[int], s: Fit) -> list:
    """``layer_channels`` from images (C, H, W) to maps (K, H', W'): pixels into channels by 2 (a factor that is left by
    itself at last), and after each ``depth`` blocks that drop about the same share of the channels.
    """
    (c, h, w), (k, *small) = in_shape, out_shape
    rest = [h // small[0], w // small[1]]
    levels: list[tuple[int, int]] = []
    while rest[0] % 2 == 0 and rest[1] % 2 == 0:
        levels, rest = [*levels, (2, 2)], [r // 2 for r in rest]
    if rest != [1, 1] or not levels:
        levels.append((rest[0], rest[1]))
    share = (k * small[0] * small[1] / (c * h * w)) ** (1 / len(levels) / s.depth)  # that a block keeps
    layers: list = []
    for level, (rh, rw) in enumerate(levels):
        h, w, c = h // rh, w // rw, c * rh * rw
        layers.append(("PixelUnshuffleBlock", {"r": (rh, rw)}))
        size = None if h % 2 or w % 2 else (h, w)
        left = (len(levels) - level) * s.depth  # blocks to come
        for index in range(s.depth):
            to_come = left - index - 1
            after = max(k + to_come, round(c * share)) if to_come < s.depth else round(c * share)
            after = k if to_come == 0 else min(c - 1, after)
            if not 0 < after < c:
                raise InputError(
                    f"architecture: no {left} blocks from {tuple(in_shape)} to {tuple(out_shape)}; lower --depth"
                )
            layers.append(("ConvPINNBlock", {"in_ch": c, "out_ch": after, "hidden": s.hidden, "feat_size": size,
                                             "scale_bound": s.scale_bound, "see_place": True}))  # fmt: skip
            c = after
    return layers


def averages(channels: int, places: int) -> Tensor:
    """An orthogonal matrix (C n, C n) that the Cayley transform reaches: of C groups of n, the averages come first."""
    generator, eye = torch.Generator().manual_seed(0), torch.eye(channels, dtype=torch.float64)

    def one() -> tuple[float, Tensor]:
        drawn = torch.randn(places, places, generator=generator, dtype=torch.float64)
        drawn[:, 0] = 1
        basis = torch.linalg.qr(drawn).Q.T  # its first row constant up to its sign
        basis[0].abs_()
        w = torch.einsum("ij,pq->pijq", eye, basis).reshape(channels * places, -1)
        w[-1] *= torch.linalg.det(w).sign()  # or -1 is an eigenvalue
        return torch.linalg.svdvals(torch.eye(len(w), dtype=w.dtype) + w).min().item(), w

    return max((one() for _ in range(100)), key=lambda pair: pair[0])[1]  # the farthest from an eigenvalue of -1


@torch.no_grad()
def start_as_averages(model: SPNN) -> SPNN:
    """Let g begin as averages over pixels, and so g' as their Moore-Penrose inverse: there is less to learn from there.

    The mixing after each pixel unshuffle of r^2 pixels is set to W above, ``A = (I - W) (I + W)^-1``, and S to 1 / r.
    """
    for before, block in zip(model.pinn.blocks, model.pinn.blocks[1:], strict=False):
        if isinstance(before, PixelUnshuffleBlock) and isinstance(block, ConvPINNBlock):
            places = before.rh * before.rw
            w = averages(block.in_ch // places, places)
            one = torch.eye(len(w), dtype=w.dtype)
            block.mix.A_unconstrained.copy_(torch.linalg.solve((one + w).T, (one - w).T).T / 2)
            share = -math.log(places) / 2 / block.scale_bound
            block.s.net[-1].bias[: block.in_ch // places] = math.atanh(max(share, -0.95))
    return model


Pair = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def run_stage(
    run: Run, s: Fit, name: str, model: nn.Module, loaders: Loaders, pair: Pair, losses, save, **what
) -> None:
    """A training of ``model`` on ``losses(x, y)`` with their ``total``, by the one loop.

    Args:
        pair: of a loader's images and targets, and whether they are for training, x and y.
        save: writes the best weights so far, by the losses of the validation split, to ``checkpoint``.
        what: steps, lr and checkpoint.
    """
    settings, steps = Settings(precision=s.precision), what["steps"]
    optimizer = adam([p for p in model.parameters() if p.requires_grad], what["lr"], run.device)

    def one_step(*batch: Tensor) -> dict[str, Tensor]:
        x, y = pair(batch[0], batch[1], True)
        return training_step(model, optimizer, lambda: losses(x, y), settings, run.device)

    @torch.no_grad()
    def measure() -> dict[str, float]:
        sums: dict[str, float] = {}
        with solved_once(), networks_in("float32", run.device):
            for batch in loaders.val:
                run.stop_if_asked()
                for key, value in losses(*pair(batch[0], batch[1], False)).items():
                    sums[key] = sums.get(key, 0.0) + value.item() * len(batch[0])
        means = {key: value / len(loaders.val.dataset) for key, value in sums.items()}
        return {"loss": means.pop("total"), **means}

    Loop(run, name, steps=steps, row_every=min(200, steps), axis="step", step=one_step, measure=measure, keep=save,
         batches=lambda done: batches_from(loaders.train, done), checkpoint=what["checkpoint"],
         parts={"model": model, "optimizer": optimizer},
         rate=lambda done, _: what["lr"] * lr_factor(done, steps, 50, 0.3)).train()  # fmt: skip


def fit(operator: SPNNOperator, loaders: Loaders, pair: Pair, s: Fit, run: Run, notes: dict) -> SPNN:
    """Train ``operator.model`` to measure y in x, and its g' to give x back; returns the best, which is in the folder.

    Raises:
        TrainingFailed, Stopped: as `loop.Loop`.
    """
    model, settings = operator.model, Settings()
    first, second = run.folder / FORWARD_CHECKPOINT, run.folder / R_OPT_CHECKPOINT
    stage = None if run.state is None else run.state["stage"]

    def forward(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        data, image = operator.loss(model(x), y).mean(), F.mse_loss(model.pinv(y), x)
        return {"total": s.lambda_data * data + s.lambda_img_rec * image, "data": data, "img_rec": image}

    if stage in (None, "forward"):
        run_stage(run, s, "forward", model, loaders, pair, forward, lambda: save_spnn(first, model, notes),
                  steps=s.steps, lr=s.lr, checkpoint=first)  # fmt: skip
    if s.r_steps and stage != DONE:
        model.load_state_dict(SPNN.from_pretrained(first).state_dict())
        freeze_g(model)
        origin = origin_latents(model)
        run_stage(run, s, "r_opt", model, loaders, pair, lambda x, y: natural_losses(model, x, y, origin, settings),
                  lambda: save_spnn(second, model, notes), steps=s.r_steps, lr=s.lr / 3, checkpoint=second)  # fmt: skip
    run.finish()
    best = SPNN.from_pretrained(second if s.r_steps else first).to(run.device).eval()
    operator.model = best.requires_grad_(False)
    return best


def find_run(run: Run, s: Fit, identity: dict) -> None:
    """Take up the run in the folder, or begin one. Raises InputError where it would replace a trained network."""
    free = ("device", "overwrite", "resume")
    run.find_state({**identity, **{k: v for k, v in asdict(s).items() if k not in free}}, s.resume, s.overwrite)
    if run.state is None and (run.folder / FORWARD_CHECKPOINT).exists() and not s.overwrite:
        raise InputError(f"{run.folder / FORWARD_CHECKPOINT} exists; give --overwrite, --resume or another --out")


# --- Restoration -----------------------------------------------------------------------------------------------------


def drawn(rules: dict[str, tuple[Operator | None, Guidance]], y: Tensor, r: Restoring, device: torch.device):
    """For each rule its images (N, 3, H, W) of what is measured, y, by the frozen prior, and seconds per image."""
    (source,) = locate(r.prior)
    prior = load_prior(source).to(device).eval().requires_grad_(False)
    pictures, seconds = {}, {}
    for name, (operator, rule) in rules.items():
        began = time.perf_counter()
        parts = [reconstruct(operator, prior, part, guidance=rule, steps=r.sampling_steps, eta=r.eta,
                             seed=r.sampling_seed, names=[f"{i * 8 + j}" for j in range(len(part))])
                 for i, part in enumerate(y.split(8))]  # fmt: skip
        pictures[name], seconds[name] = torch.cat(parts), (time.perf_counter() - began) / len(y)
    return pictures, seconds


def markdown(rows: dict[str, dict[str, tuple[float, float, float] | float]]) -> str:
    """Figures with their 95 % intervals as a table."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))

    def cell(value) -> str:
        if value is None:
            return ""
        return f"{value:.3g}" if isinstance(value, float) else "{:.3g} [{:.3g}, {:.3g}]".format(*value)

    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_interval(values: Tensor) -> tuple[float, float, float]:
    """A mean over images, (N,), and its 95 % interval."""
    return bootstrap(lambda some: values[some].double().mean().item(), len(values))


def restore(operator: PictureOperator, function, loader, o: Options, r: Restoring, run: Run) -> None:
    """Restore test images from what is measured of them; write the table and the sheet."""
    log = get_logger("train_operator")
    x = torch.cat([batch[0] for batch in loader])[: o.count].to(run.device)  # (N, 3, H, W)
    y = function(x)
    true = LinearOperator(
        function, operator.pinv, operator.in_shape, operator.out_shape
    )  # of it a gradient asks A alone
    nlbp = NLBP(1.0, 1.0, nlbp_stop_cond=r.stop, max_move=r.max_move or None)
    rules: dict[str, tuple] = {"prior, unguided": (operator, Unguided()), "NLBP": (operator, nlbp)}
    if function(x[:1].clone().requires_grad_()).requires_grad:
        rules["DPS, true measurement"] = (true, Gradient(o.dps_step))
    began = time.perf_counter()
    pictures, seconds = {"g'(y)": operator.pinv(y).clamp(-1, 1)}, {"g'(y)": (time.perf_counter() - began) / len(x)}
    for found, more in zip((pictures, seconds), drawn(rules, y, r, run.device), strict=True):
        found |= more
    lpips = load_lpips(run.device, log, o.img_size)
    rows = {}
    for name, images in pictures.items():
        rows[name] = {"PSNR, dB": with_interval(psnr(images, x))}
        if lpips is not None:
            rows[name]["LPIPS"] = with_interval(lpips(images, x).flatten())
        rows[name] |= {"|A(x') - y|": with_interval(true.distance(function(images), y)), "s/image": seconds[name]}
    write_json(
        run.folder / "table.json", {"operator": o.operator, "images": len(x), "settings": asdict(r), "rows": rows}
    )
    (run.folder / "table.md").write_text(markdown(rows) + "\n")
    print(markdown(rows))
    columns = {"input": x, "measured": y, **pictures}
    side = [[picture(images[i], 128) for images in columns.values()] for i in range(min(len(x), 6))]
    contact_sheet(run.folder / "sheet.png", [name.split(",")[0] for name in columns], side, [""] * len(side))


# --- Command ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see ``--help``."""
    o, s, r, _ = parse(__doc__, Options, Fit, Restoring, argv=argv)
    function, in_shape = find_function(o.operator), (3, o.img_size, o.img_size)
    out_shape = measured_shape(function, in_shape, f"--operator {o.operator}")
    layers = chain(in_shape, out_shape, s)
    with open_run(o.out, s.device, save_every=500, seed=s.seed) as run:
        find_run(run, s, {"operator": o.operator, "img_size": o.img_size})
        seed_everything(s.seed)
        loaders = make_loaders(o.dataset_path, o.img_size, s.batch_size, seed=s.seed, device=run.device)
        model = start_as_averages(SPNN(3, out_shape[0], img_size=o.img_size, layer_channels=layers)).to(run.device)
        operator = PictureOperator(model)

        def pair(x: Tensor, _: Tensor, training: bool) -> tuple[Tensor, Tensor]:
            x = augmented(x, s.augment if training else 0.0)
            return x, function(x)

        fit(operator, loaders, pair, s, run, {"operator": o.operator})
        if r.prior is not None:
            restore(operator, function, loaders.test, o, r, run)
    return 0


if __name__ == "__main__":
    run_command(main)
