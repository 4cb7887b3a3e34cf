"""What it costs, by image size, batch and depth: seconds, images per second, peak memory, and where the time goes.

    python benchmarks/growth.py
    python benchmarks/growth.py --tasks stage1 stage2 --sizes 256 --batches 256 --depths none --precision bf16
    python benchmarks/growth.py --tasks back_projection unguided sampling --sizes 256 --batches 1 16 64 --depths none

A task is a step of training (losses, backward, clipping, Adam), one back-projection, or a step of the sampler with a
bf16 prior, with back-projection or without; a drawn image takes as many of these as the sampler has steps. Weights are
random: none of it depends on their values. Each measurement has a process of its own, so that one's peak memory is not
another's.

What the time goes into is torch's profiler's view of the operators, summed by kind: matrix products (convolutions
included), linear solves, and the rest, which moves memory. The share of the matrix rate counts the multiply-adds of
convolutions and matrix products (two operations each) against a product of two large matrices, timed in the same
process, of float32 or bf16, what is faster there. The fit is least squares on logarithms: ``seconds ~ batch^a``,
``seconds ~ pixels^b``.
"""

import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.speed import (
    SIZES,
    Common,
    begin,
    images,
    network,
    published_unet,
    randomise,
    record,
    seconds,
    stage_losses,
    step_of_sampling,
)
from DDNM.guided_diffusion.guidance import NLBP, Unguided
from DDNM.guided_diffusion.prior import Prior
from logger import format_table
from models import SPNN, BackProjection
from networks import PRECISIONS, prepare_networks
from operators import SPNNOperator
from train import Settings, adam, step
from utils import option, parse, peak_gib, run_command, write_json

TASKS = ("back_projection", "stage1", "stage2", "unguided", "sampling")
KINDS = {  # parts of operator names, looked for in this order
    "solve": ("linalg_inv", "linalg_lu", "triangular"),
    "matrix product": ("conv", "mm", "linear", "mkldnn", "cudnn"),
    "memory traffic": ("",),
}


@dataclass(frozen=True)
class Options(Common):
    """What is measured."""

    repeats: int = option(3, "timed runs of each", 1)
    tasks: tuple[str, ...] = option(TASKS[:2], "what is timed", choices=TASKS)
    sizes: tuple[int, ...] = option(SIZES, "of images", choices=SIZES)
    batches: tuple[int, ...] = option((1, 4, 16), "images at a time", 1)
    depths: tuple[int, ...] | None = option((1, 4, 16), "blocks added at 64x64, batch 4", 0, 43)
    precision: str = option("float32", "of the SPNN's networks in training", choices=PRECISIONS)
    prior_channels: int = option(128, "of the U-Net", 32)


def deep_network(depth: int, hidden: int) -> SPNN:
    """A 64x64 network with ``depth`` equal blocks that drop one channel each at 16x16."""
    torch.manual_seed(0)

    def coupling(in_ch: int, out_ch: int, size: int) -> tuple[str, dict]:
        return "ConvPINNBlock", {"in_ch": in_ch, "out_ch": out_ch, "hidden": hidden, "feat_size": size}

    chain = [
        ("PixelUnshuffleBlock", {"r": 4}),
        *(coupling(48 - i, 47 - i, 16) for i in range(depth)),
        coupling(48 - depth, 4, 16),
        ("PixelUnshuffleBlock", {"r": 4}),
        coupling(64, 8, 4),
        ("PixelUnshuffleBlock", {"r": 4}),
        coupling(128, 40, 1),
    ]
    return randomise(SPNN(img_size=64, layer_channels=chain))


@torch.no_grad()
def task(name: str, model: SPNN, batch: int, args: Options, device: torch.device) -> Callable[[], object]:
    """What is timed."""
    x = images(batch, model.img_size, device)
    target = torch.randn(batch, model.num_classes).to(device)
    if name.startswith("stage"):
        settings = Settings(precision=args.precision)
        losses_of = stage_losses(int(name[-1]), model.train(), x, (target > 0).float(), settings)
        optimizer = adam([p for p in model.parameters() if p.requires_grad], 1e-6, device)
        run = partial(step, model, optimizer, losses_of, settings, device)
    elif name == "back_projection":
        goal = model.natural(target)
        run = torch.no_grad()(lambda: BackProjection(model, x, goal)(1.0))
    else:
        unet = published_unet(model.img_size, args.prior_channels).to(device)
        prior = Prior(unet, torch.bfloat16, channels_last=True)
        rule = Unguided() if name == "unguided" else NLBP(nlbp_stop_cond=0.0, max_move=None)
        steer = rule.towards(SPNNOperator(model), target)
        run = partial(step_of_sampling, prior, steer, x, torch.randn_like(x))
    return run


def matrix_rate(device: torch.device) -> float:
    """Operations per second in a product of two matrices, float32 or bf16: some CPUs only emulate bf16."""
    side = 8192 if device.type == "cuda" else 512
    a = torch.randn(side, side, device=device)
    products = (partial(torch.matmul, m, m) for m in (a, a.bfloat16()))
    return 2 * side**3 / min(seconds(product, device) for product in products for _ in range(5))


def measure(name: str, size: int, batch: int, depth: int | None, args: Options) -> dict:
    """One row. Runs in its own process."""
    device = begin(args)
    rate = matrix_rate(device)
    model = network(size, args.hidden, device) if depth is None else deep_network(depth, args.hidden // 2).to(device)
    run = task(name, prepare_networks(model, device), batch, args, device)
    peak_gib(device, reset=True)
    run()
    peak = peak_gib(device)  # before the profiler, which keeps its own books
    median = statistics.median(seconds(run, device) for _ in range(args.repeats))
    with FlopCounterMode(display=False) as counter:
        run()
    with torch.profiler.profile() as profile:
        run()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profile.key_averages():
        kind = next(kind for kind, parts in KINDS.items() if any(part in event.key for part in parts))
        spent[kind] += event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
    shares = {kind: time / sum(spent.values()) for kind, time in spent.items()}
    return {"task": name, "size": size, "batch": batch, "depth": depth, "seconds": median,
            "images_per_second": batch / median, "peak_gib": peak, **shares,
            "matrix_rate_share": counter.get_total_flops() / median / rate}  # fmt: skip


def fits(rows: Sequence[dict]) -> list[str]:
    """One sentence per fit: a power of batch or pixels, a line over depth."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r in rows:
        points = {"depth n": r["depth"]} if r["depth"] is not None else {
            f"{r['size']}x{r['size']}: seconds ~ batch": r["batch"],
            f"batch {r['batch']}: seconds ~ pixels": r["size"] ** 2,
        }  # fmt: skip
        for what, x in points.items():
            groups.setdefault((r["task"], what), []).append((x, r["seconds"]))
    lines = []
    for (name, what), points in groups.items():
        x, y = np.array(points).T
        if len(points) > 1 and what == "depth n":
            slope, start = np.polyfit(x, y, 1)
            lines.append(f"{name}, {what}: seconds ~ {start:.3g} + {slope:.3g} n")
        elif len(points) > 1:
            lines.append(f"{name}, {what}^{np.polyfit(np.log(x), np.log(y), 1)[0]:.2f}")
    return lines


def table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table."""
    columns = {"size": ("size", ".0f"), "batch": ("batch", ".0f"), "depth": ("added blocks", ".0f"),
               "seconds": ("seconds", ".3g"), "images_per_second": ("images/s", ".3g"), "peak_gib": ("peak GiB", ".2f"),
               **{kind: (kind, ".0%") for kind in KINDS},
               "matrix_rate_share": ("of the matrix rate", ".0%")}  # fmt: skip
    return format_table(rows, "task", columns)


def main(argv: Sequence[str] | None = None) -> int:
    options, _ = parse(__doc__, Options, argv=argv)
    cases = [(name, size, batch, None) for name in options.tasks for size in options.sizes for batch in options.batches]
    cases += [(name, 64, 4, depth) for name in options.tasks for depth in options.depths or ()]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        kept = record(options, (pool.apply(measure, (*case, options)) for case in cases), table)
    kept["fits"] = fits(kept["rows"])
    print(*kept["fits"], sep="\n")
    if options.json is not None:
        write_json(options.json, kept)
    return 0


if __name__ == "__main__":
    run_command(main)
