"""How cost grows: seconds, peak memory and where the time goes, by image size, batch and depth.

    python benchmarks/growth.py
    python benchmarks/growth.py --sizes 32 64 --batches 1 8 --json benchmarks/results/growth.json

Each measurement has a process of its own, so that one's peak memory is not another's. What the time goes into is
torch's profiler's view of the operators, summed by kind: matrix products (convolutions included), linear solves, and
the rest, which moves memory. The fit is least squares on logarithms: ``seconds ~ batch^a``, ``seconds ~ pixels^b``.
"""

import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.speed import SIZES, Common, begin, images, network, randomise, record, seconds, stage_losses
from logger import format_table
from models import SPNN, BackProjection
from networks import prepare_networks
from train import Settings, backward
from utils import option, parse, peak_gib, run_command, write_json

TASKS = ("back_projection", "stage1")
KINDS = {  # parts of operator names, looked for in this order
    "solve": ("linalg_inv", "linalg_lu", "triangular"),
    "matrix product": ("conv", "mm", "linear", "mkldnn", "cudnn"),
    "memory traffic": ("",),
}


@dataclass(frozen=True)
class Options(Common):
    """What is measured."""

    repeats: int = option(3, "timed runs of each", 1)
    sizes: tuple[int, ...] = option(SIZES, "of images", choices=SIZES)
    batches: tuple[int, ...] = option((1, 4, 16), "images at a time", 1)
    depths: tuple[int, ...] = option((1, 4, 16), "blocks added at 64x64, batch 4", 0, 43)


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


def task(name: str, model: SPNN, batch: int, device: torch.device) -> Callable[[], object]:
    """What is timed: one back-projection, or one forward and backward of stage 1."""
    x = images(batch, model.img_size, device)
    if name == "stage1":
        losses_of = stage_losses(1, model.train(), x, torch.zeros(batch, model.num_classes, device=device), Settings())

        def step() -> None:
            model.zero_grad(set_to_none=True)
            backward(losses_of, "float32", device)

        return step
    with torch.no_grad():
        goal = model.natural(torch.randn(batch, model.num_classes).to(device))
    return torch.no_grad()(lambda: BackProjection(model, x, goal)(1.0))


def measure(name: str, size: int, batch: int, depth: int | None, args: Options) -> dict:
    """One row. Runs in its own process."""
    device = begin(args)
    model = network(size, args.hidden, device) if depth is None else deep_network(depth, args.hidden // 2)
    model = prepare_networks(model, device)
    peak_gib(device, reset=True)
    run = task(name, model, batch, device)
    run()
    peak = peak_gib(device)  # before the profiler, which keeps its own books
    median = statistics.median(seconds(run, device) for _ in range(args.repeats))
    with torch.profiler.profile() as profile:
        run()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profile.key_averages():
        kind = next(kind for kind, parts in KINDS.items() if any(part in event.key for part in parts))
        spent[kind] += event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
    shares = {kind: time / sum(spent.values()) for kind, time in spent.items()}
    parameters = sum(p.numel() for p in model.parameters())
    return {"task": name, "size": size, "batch": batch, "depth": depth, "seconds": median, "peak_gib": peak, **shares,
            "parameters": parameters}  # fmt: skip


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
               "seconds": ("seconds", ".3g"), "peak_gib": ("peak GiB", ".2f")}  # fmt: skip
    return format_table(rows, "task", columns | {kind: (kind, ".0%") for kind in KINDS})


def main(argv: Sequence[str] | None = None) -> int:
    options, _ = parse(__doc__, Options, argv=argv)
    cases = [(name, size, batch, None) for name in TASKS for size in options.sizes for batch in options.batches]
    cases += [(name, 64, 4, depth) for name in TASKS for depth in options.depths]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        kept = record(options, (pool.apply(measure, (*case, options)) for case in cases), table)
    kept["fits"] = fits(kept["rows"])
    print(*kept["fits"], sep="\n")
    if options.json is not None:
        write_json(options.json, kept)
    return 0


if __name__ == "__main__":
    run_command(main)
