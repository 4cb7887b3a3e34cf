"""Fit an SPNN to a measurement of pictures that is given as a function, and undo it by the network and a frozen prior.

    python train_operator.py --operator lens --dataset_path data/faces_64 --out check_points/lens
    python train_operator.py --operator my.module:camera --dataset_path /path/to/faces --out check_points/camera
    python train_operator.py ... --resume --prior DDNM/exp/logs/faces/prior     # restores test images, into --out
    torchrun --nproc_per_node 4 train_operator.py ...                           # the same batches, shared

A measurement takes images (B, 3, H, W) in [-1, 1] to pictures (B, C, H', W') of fewer numbers: lens, saturation and
jpeg of operators.py, or a function of yours. Stage 1 minimises, over all weights, with y what is measured of x,

    lambda_data * |g(x) - y|^2 / 2 + lambda_img_rec * |g'(y) - x|^2

and stage 2, over the r-networks, what train.py says. With a prior, test images are restored from y alone by g' and by
back-projection (NLBP), beside the prior unguided, and the gradient (DPS) of g and of the true measurement, if it has
one. Writes table.json, table.md and sheet.png.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from blocks import PixelUnshuffleBlock
from checkpoints import locate, save_spnn
from data_loader import Loaders, augmented, batches_from, first_items, make_loaders
from DDNM.guided_diffusion.diffusion import reconstruct
from DDNM.guided_diffusion.guidance import NLBP, Gradient, Guidance, Unguided
from DDNM.guided_diffusion.inputs import load_lpips
from DDNM.guided_diffusion.prior import load_prior
from DDNM.guided_diffusion.results import compare, write_report
from judge import load_judge
from logger import get_logger
from loop import DONE, Loop, Run, adam, open_run
from metrics import mean_of, psnr
from models import SPNN
from networks import PRECISIONS, networks_in
from operators import Function, LinearOperator, Operator, PictureOperator, SPNNOperator, find_function, measured_shape
from train import FORWARD_CHECKPOINT, R_OPT_CHECKPOINT, Settings, freeze_g, lr_factor, natural_losses, origin_latents
from train import step as training_step
from utils import InputError, clock, option, parse, run_command, seed_everything


@dataclass(frozen=True)
class Fit:
    """Training."""

    steps: int = option(1000, "of stage 1", 1)
    r_steps: int = option(100, "of stage 2", 0)
    batch_size: int = option(16, "images per step", 1)
    hidden: int = option(24, "width of the coupling networks", 1)
    lr: float = option(2e-3, "of Adam in stage 1; a third of it in stage 2", 0)
    lambda_data: float = option(10.0, "weight of the loss between g(x) and what is measured", 0)
    lambda_img_rec: float = option(1.0, "weight of |g'(y) - x|^2", 0)
    augment: float = option(0.0, "how far training pictures are shifted, scaled, turned and lit: 0 to 1", 0, 1)
    precision: str = option("float32", "of blocks' networks in training, and of the prior's", choices=PRECISIONS)
    seed: int = option(0, "of weights, order and mirroring", 0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    overwrite: bool = option(False, "train anew although a trained network is there")
    resume: bool = option(False, "go on with the run in --out; a finished one is only measured again")


@dataclass(frozen=True)
class Options:
    """What is fitted."""

    operator: str = option(..., "lens, saturation, jpeg, or package.module:function")
    dataset_path: Path = option(..., "faces, in a layout of data_loader.py")
    out: Path = option(..., "folder for weights, tables and pictures")
    img_size: int = option(64, "side of the images", 2, 4096)
    judge: Path | None = option(None, "weights of judge.py: which attributes it still tells in what is restored")
    dps_step: float | None = option(
        None, "DPS: step of the gradient; none: the best of 0.01, 0.03, 0.1, 0.3 on four validation images (PSNR)", 0
    )


@dataclass(frozen=True)
class Restoring:
    """Restoration."""

    prior: str | None = option(None, "diffusion prior: a diffusers folder or a hub id; none: no restoration")
    count: int = option(24, "test images", 1)
    sampling_steps: int = option(50, "of the sampler", 1, 1000)
    max_move: float = option(0.15, "nlbp: largest root mean square move of a step; 0: no limit", 0)
    stop: float | None = option(None, "nlbp: none this near to y; none: what g is wrong by on other images", 0)


# --- The network and its training ------------------------------------------------------------------------------------


DEPTH = 2  # blocks after each pixel unshuffle
VALIDATED = 256  # images, each time


def chain(in_shape: Sequence[int], out_shape: Sequence[int], hidden: int) -> list:
    """``layer_channels`` from images (C, H, W) to maps (K, H', W'): pixels into channels by 2 (a factor that is left by
    itself at last), and after each `DEPTH` blocks that keep about the same share of the channels.
    """
    (c, h, w), (k, *small) = in_shape, out_shape
    rest, levels = (h // small[0], w // small[1]), []
    while rest[0] % 2 == 0 and rest[1] % 2 == 0:
        levels, rest = [*levels, (2, 2)], (rest[0] // 2, rest[1] // 2)
    if rest != (1, 1) or not levels:
        levels.append(rest)
    share = (k * small[0] * small[1] / (c * h * w)) ** (1 / len(levels) / DEPTH)  # that a block keeps
    layers: list = []
    for level, (rh, rw) in enumerate(levels, 1):
        h, w, c = h // rh, w // rw, c * rh * rw
        layers.append(("PixelUnshuffleBlock", {"r": (rh, rw)}))
        for to_come in reversed(range(DEPTH)):
            least = k + to_come if level == len(levels) else 1
            after = max(least, min(c - 1, round(c * share))) if to_come or level < len(levels) else k
            layers.append(("ConvPINNBlock", {"in_ch": c, "out_ch": after, "hidden": hidden, "scale_bound": 1.0,
                           "feat_size": None if h % 2 or w % 2 else (h, w), "see_place": True}))  # fmt: skip
            c = after
    return layers


def averages(channels: int, places: int) -> Tensor:
    """An orthogonal matrix (C n, C n), n places, whose first C rows average each channel's places."""
    generator, eye = torch.Generator().manual_seed(0), torch.eye(channels, dtype=torch.float64)
    found, least = eye, -1.0
    for _ in range(100):
        drawn = torch.randn(places, places, generator=generator, dtype=torch.float64)
        drawn[:, 0] = 1
        basis = torch.linalg.qr(drawn).Q.T  # its first row constant up to its sign
        basis[0].abs_()
        w = torch.einsum("ij,pq->pijq", eye, basis).reshape(channels * places, -1)
        w[-1] *= torch.linalg.det(w).sign()  # or -1 is an eigenvalue, which the Cayley transform does not reach
        nearest = torch.linalg.svdvals(torch.eye(len(w), dtype=w.dtype) + w).min().item()
        if nearest > least:
            found, least = w, nearest
    return found


@torch.no_grad()
def build(in_shape: Sequence[int], out_shape: Sequence[int], hidden: int) -> SPNN:
    """The network of `chain`, which begins as averages over pixels, and so g' as their Moore-Penrose inverse.

    For that the mixing after each unshuffle of n pixels is W, `averages`, by ``A = (I - W) (I + W)^-1``, S 1 / sqrt(n).

    Raises:
        InputError: no such chain.
    """
    try:
        model = SPNN(3, out_shape[0], img_size=in_shape[1:], layer_channels=chain(in_shape, out_shape, hidden))
    except ValueError as error:
        raise InputError(f"architecture: {error}") from None
    for before, block in zip(model.pinn.blocks, model.pinn.blocks[1:], strict=False):
        if isinstance(before, PixelUnshuffleBlock):
            n = math.prod(before.factors)
            w, one = averages(block.in_ch // n, n), torch.eye(block.in_ch, dtype=torch.float64)
            block.mix.A_unconstrained.copy_(torch.linalg.solve((one + w).T, (one - w).T).T / 2)
            block.s.net[-1].bias[: block.in_ch // n] = math.atanh(max(-math.log(n) / 2 / block.scale_bound, -0.95))
    return model


Pair = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def run_stage(
    run: Run, s: Fit, name: str, model: nn.Module, loaders: Loaders, pair: Pair, losses, save, steps: int, lr: float
) -> None:
    """A training of ``model`` on ``losses(x, y)`` with their ``total``, by the one loop.

    Args:
        pair: of a loader's images and targets, and whether they are for training, x and y.
        save: writes the best weights so far, by the losses of the validation split.
    """
    optimizer = adam([p for p in model.parameters() if p.requires_grad], lr, run.device)
    parallel, settings = run.world.parallel(model, losses), Settings(precision=s.precision)

    @torch.no_grad()
    def measure() -> dict[str, float]:
        found = []
        with networks_in("float32", run.device):
            for batch in islice(loaders.val, max(1, VALIDATED // s.batch_size)):
                run.stop_if_asked()
                found.append(losses(*pair(*batch, False)))
        means = {key: torch.stack([each[key] for each in found]).mean().item() for key in found[0]}
        return {"loss": means.pop("total"), **means}

    Loop(run, name, steps=steps, row_every=min(200, steps), axis="step", measure=measure, keep=save,
         step=partial(training_step, model, optimizer, parallel, settings, run.device),
         batches=lambda done: ((keys, pair(*batch, True)) for keys, batch in batches_from(loaders.train, done)),
         parts={"model": model, "optimizer": optimizer},
         rate=lambda done, _: lr * lr_factor(done, steps, 50, 0.3)).train()  # fmt: skip


def fit(operator: SPNNOperator, loaders: Loaders, pair: Pair, s: Fit, run: Run, notes: dict) -> None:
    """Train ``operator.model`` to measure y in x, and its g' to give x back; it becomes the best one, of the folder.

    Raises:
        TrainingFailed, Stopped: as `loop.Loop`.
    """
    model, settings = operator.model, Settings()
    first, second = run.folder / FORWARD_CHECKPOINT, run.folder / R_OPT_CHECKPOINT

    def forward(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        data, image = operator.loss(model(x), y).mean(), F.mse_loss(model.pinv(y), x)
        return {"total": s.lambda_data * data + s.lambda_img_rec * image, "data": data, "img_rec": image}

    if run.stage not in ("r_opt", DONE):
        run_stage(run, s, "forward", model, loaders, pair, forward, lambda: save_spnn(first, model, notes),
                  s.steps, s.lr)  # fmt: skip
    if s.r_steps and run.stage != DONE:
        model.load_state_dict(SPNN.from_pretrained(first).state_dict())
        freeze_g(model)
        origin = origin_latents(model)
        run_stage(run, s, "r_opt", model, loaders, pair, lambda x, y: natural_losses(model, x, y, origin, settings),
                  lambda: save_spnn(second, model, notes), s.r_steps, s.lr / 3)  # fmt: skip
    run.finish()
    best = SPNN.from_pretrained(second if s.r_steps else first)
    operator.model = best.to(run.device).eval().requires_grad_(False)


# what a run leaves in its folder: another one, which may be shorter, must not find it there
LEFT = (FORWARD_CHECKPOINT, R_OPT_CHECKPOINT, "config.json", "best_model*.json", "metrics_r_opt.csv", "curves_*.png",
        "table.*", "sheet.png", "diagnostics.json", "log.txt")  # fmt: skip


def prepare(run: Run, s: Fit, path: Path, size: int, identity: dict, mask_size: int | None = None) -> Loaders:
    """Find the run in the folder, if there is one to go on with; and the data, of which each process has its part.

    ``run.begin``, which deletes what an earlier run has `LEFT`, comes when nothing else can fail.

    Raises:
        InputError: it would replace a trained network, or there are no such data.
    """
    free = ("device", "overwrite", "resume")
    seed_everything(s.seed)
    given = {**identity, **{k: v for k, v in asdict(s).items() if k not in free}}
    run.find_state(given, s.resume, s.overwrite, run.folder / FORWARD_CHECKPOINT, alone=True)
    with run.world.leader_first():  # it builds the cache
        share = run.world.rank, run.world.size
        return make_loaders(path, size, s.batch_size, seed=s.seed, device=run.device, share=share, mask_size=mask_size)


# --- Restoration -----------------------------------------------------------------------------------------------------


def drawn(rules: dict[str, tuple[Operator, Guidance]], y: Tensor, r: Restoring, precision: str, run: Run):
    """For each rule its images (N, 3, H, W) by the frozen prior, of what is measured, y; seconds (on a CPU its own)."""
    (source,) = locate(r.prior)
    autocast = torch.bfloat16 if precision == "bf16" else None
    prior = load_prior(source, autocast=autocast, channels_last=True).to(run.device).eval().requires_grad_(False)
    pictures, seconds = {}, {}
    for name, (operator, rule) in rules.items():
        began = clock(run.device, own=True)
        names = [str(i) for i in range(len(y))]  # an image's noise follows from its number
        batches = tqdm(range(0, len(y), 8), str(name), unit="batch", disable=None, leave=False)
        parts = [
            reconstruct(operator, prior, y[i : i + 8], guidance=rule, steps=r.sampling_steps, names=names[i : i + 8])
            for i in run.until_stopped(batches)
        ]
        pictures[name], seconds[name] = torch.cat(parts), (clock(run.device, own=True) - began) / len(y)
    return pictures, seconds


DPS_STEPS, TUNED = (0.01, 0.03, 0.1, 0.3), 4


@torch.no_grad()
def restore(
    operator: PictureOperator, function: Function, loaders: Loaders, o: Options, s: Fit, r: Restoring, run: Run
) -> None:
    """Restore test images from what is measured of them; write the table and the sheet."""
    x, other = first_items(loaders.test, r.count)[0], next(iter(loaders.val))[0]  # (N, 3, H, W)
    y = function(x)
    # linear or not: of the true measurement a gradient asks A and its distances alone
    true = LinearOperator(function, operator.pinv, operator.in_shape, operator.out_shape)
    wrong = operator.distance(operator.A(other), function(other)).mean().item()  # what g is wrong by
    nlbp = NLBP(1.0, 1.0, nlbp_stop_cond=wrong if r.stop is None else r.stop, max_move=r.max_move or None)
    gradients: dict[str, Operator] = {"DPS, g": operator}
    with torch.enable_grad():
        if function(x[:1].clone().requires_grad_()).requires_grad:
            gradients["DPS, true A"] = true
    steps = dict.fromkeys(gradients, o.dps_step)
    if o.dps_step is None:  # each rival with the step that suits it, chosen on other images than are reported
        few = other[:TUNED]
        tried = {(name, step): (g, Gradient(step)) for name, g in gradients.items() for step in DPS_STEPS}
        found = drawn(tried, function(few), r, s.precision, run)[0]
        quality = {key: psnr(images, few).mean().item() for key, images in found.items()}
        steps = {name: max(DPS_STEPS, key=lambda step: quality[name, step]) for name in gradients}  # noqa: B023
    rules: dict[str, tuple] = {"unguided": (operator, Unguided()), "NLBP, g": (operator, nlbp)}
    rules |= {name: (each, Gradient(steps[name])) for name, each in gradients.items()}
    pictures, seconds = drawn(rules, y, r, s.precision, run)
    pictures = {"g'(y)": operator.pinv(y).clamp(-1, 1), **pictures}
    judge = None if o.judge is None else load_judge(o.judge).to(run.device)
    lpips = load_lpips(run.device, get_logger("train_operator"), x.shape[-1])
    rows = compare(pictures, x, seconds, judge, lpips)
    for name, images in pictures.items():
        rows[name]["error of A(x'), true A"] = mean_of(true.distance(function(images), y))
    settings = {**asdict(o), **asdict(r), "what g is wrong by": wrong, "DPS steps": steps}
    write_report(run.folder, rows, {"input": x, "measured": y, **pictures}, settings)


# --- Command ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see ``--help``."""
    o, s, r, _ = parse(__doc__, Options, Fit, Restoring, argv=argv)
    function, in_shape = find_function(o.operator), (3, o.img_size, o.img_size)
    out_shape = measured_shape(function, in_shape, f"--operator {o.operator}")
    with open_run(o.out, s.device, save_every=500, seed=s.seed) as run:
        loaders = prepare(run, s, o.dataset_path, o.img_size, {"operator": o.operator, "img_size": o.img_size})
        operator = PictureOperator(build(in_shape, out_shape, s.hidden).to(run.device))
        run.begin("train_operator", {**asdict(o), **asdict(s)}, LEFT)

        def pair(x: Tensor, _: Tensor, training: bool) -> tuple[Tensor, Tensor]:
            x = augmented(x, s.augment if training else 0.0)
            return x, function(x)

        fit(operator, loaders, pair, s, run, {"operator": o.operator})
        if r.prior is not None and run.world.leads:
            restore(operator, function, loaders, o, s, r, run)
        run.world.wait()
    return 0


if __name__ == "__main__":
    run_command(main)
