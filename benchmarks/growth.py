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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the command runs from any folder

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.speed import SIZES, Common, images, network, randomise, record, seconds  # noqa: E402
from models import SPNN, BackProjection  # noqa: E402
from networks import prepare_networks  # noqa: E402
from train import Settings, backward, forward_losses  # noqa: E402
from utils import option, parse, peak_gib, resolve_device, run_command, write_json  # noqa: E402

TASKS = ("back_projection", "stage1")
KINDS = {  # parts of operator names, looked for in this order
    "solve": ("linalg_inv", "linalg_lu", "triangular"),
    "matrix product": ("conv", "mm", "addmm", "linear", "mkldnn", "cudnn"),
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
        labels = torch.zeros(batch, model.num_classes, device=device)
        model.train()

        def step() -> None:
            model.zero_grad(set_to_none=True)
            backward(lambda: forward_losses(model, x, labels, Settings())[0], "float32", device)

        return step
    target = torch.randn(batch, model.num_classes).to(device)
    with torch.no_grad():
        goal = model.natural(target)

    @torch.no_grad()
    def project() -> None:
        BackProjection(model, x, goal)(1.0)

    return project


def measure(name: str, size: int, batch: int, depth: int | None, args: Options) -> dict:
    """One row. Runs in its own process."""
    device = resolve_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = network(size, args.hidden, device) if depth is None else deep_network(depth, args.hidden // 2)
    model = prepare_networks(model, device)
    peak_gib(device, reset=True)
    run = task(name, model, batch, device)
    run()
    peak = peak_gib(device)  # before the profiler, which keeps its own books
    median = statistics.median(seconds(run, device) for _ in range(args.repeats))
    with torch.profiler.profile() as profile:
        run()
    shares = dict.fromkeys((*KINDS, "memory traffic"), 0.0)
    for event in profile.key_averages():
        spent = event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
        kind = next((k for k, parts in KINDS.items() if any(part in event.key for part in parts)), "memory traffic")
        shares[kind] += spent
    total = sum(shares.values())
    return {
        "task": name, "size": size, "batch": batch, "depth": depth, "seconds": median, "peak_gib": peak,
        "shares": {kind: spent / total for kind, spent in shares.items()},
        "parameters": sum(p.numel() for p in nn.Module.parameters(model)),
    }  # fmt: skip


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The a of ``y ~ x^a``, least squares on logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def fits(rows: Sequence[dict], args: Options) -> list[str]:
    """One sentence per fit."""
    lines = []
    for name in TASKS:
        plain = [r for r in rows if r["task"] == name and r["depth"] is None]
        for size in args.sizes:
            line = [r for r in plain if r["size"] == size]
            if len(line) > 1:
                a = exponent([r["batch"] for r in line], [r["seconds"] for r in line])
                lines.append(f"{name}, {size}x{size}: seconds ~ batch^{a:.2f}")
        for batch in args.batches:
            line = [r for r in plain if r["batch"] == batch]
            if len(line) > 1:
                b = exponent([r["size"] ** 2 for r in line], [r["seconds"] for r in line])
                lines.append(f"{name}, batch {batch}: seconds ~ pixels^{b:.2f}")
        line = [r for r in rows if r["task"] == name and r["depth"] is not None]
        if len(line) > 1:
            slope, start = np.polyfit([r["depth"] for r in line], [r["seconds"] for r in line], 1)
            lines.append(f"{name}, depth n: seconds ~ {start:.3g} + {slope:.3g} n")
    return lines


def table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| task | size | batch | added blocks | seconds | peak GiB | most of the time |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        kind, share = max(r["shares"].items(), key=lambda item: item[1])
        depth, peak = "" if r["depth"] is None else r["depth"], f"{r['peak_gib']:.2f}"
        cells = (r["task"], r["size"], r["batch"], depth, f"{r['seconds']:.3g}", peak, f"{kind}, {share:.0%}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    options, _ = parse(__doc__, Options, argv=argv)
    cases = [(name, size, batch, None) for name in TASKS for size in options.sizes for batch in options.batches]
    cases += [(name, 64, 4, depth) for name in TASKS for depth in options.depths]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        kept = record(options, (pool.apply(measure, (*case, options)) for case in cases), table)
    kept["fits"] = fits(kept["rows"], options)
    print(*kept["fits"], sep="\n")
    if options.json is not None:
        write_json(options.json, kept)
    return 0


if __name__ == "__main__":
    run_command(main)
