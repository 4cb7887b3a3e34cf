"""Back-projection: the closed form against the plain formulation, in one process, on the same weights and images.

    python benchmarks/back_projection.py
    python benchmarks/back_projection.py --img_size 64 --batch_size 9 --threads 2 --json result.json

The two take turns, so that whatever else the machine does meets both. The closed form is timed as the sampler uses it:
the target's latents, and the mixing matrices of unchanged weights, are known from the first step of a run.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the command runs from any folder

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import plain  # noqa: E402
from models import BUILT_IN, SPNN, BackProjection  # noqa: E402
from utils import atomic_write, number, resolve_device, run_command  # noqa: E402

SEED = 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--img_size", type=int, choices=sorted(BUILT_IN), default=256, help="default %(default)s")
    p.add_argument("--batch_size", type=number(int, 1), default=1, help="images at once (default %(default)s)")
    p.add_argument("--repeats", type=number(int, 1), default=5, help="timed runs of each (default %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    p.add_argument("--threads", type=number(int, 1), help="of PyTorch on the CPU (default: its own choice)")
    p.add_argument("--hidden", type=number(int, 1), default=128, help="width of the networks (default %(default)s)")
    p.add_argument("--json", metavar="FILE", help="also write the figures here")
    return p


@torch.no_grad()
def randomise(model: SPNN) -> SPNN:
    """Give a new network random mixing and random last layers, which start at zero; in eval mode."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_unconstrained"):
            parameter.normal_(0, 0.5 / len(parameter) ** 0.5)
        elif parameter.ndim == 4 and not parameter.any():
            parameter.normal_(0, 0.3 / parameter[0].numel() ** 0.5)
    return model.eval()


def seconds(compute: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """How long ``compute`` takes, and its result."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    started = time.perf_counter()
    result = compute()
    wait()
    return time.perf_counter() - started, result


@torch.no_grad()
def measure(model: SPNN, x: Tensor, target: Tensor, repeats: int) -> dict:
    """Median seconds of both, after one untimed run of each, their ratio, and how far their results differ."""
    goal = model.natural(target)
    ways = {
        "plain": lambda: plain.back_project(model, x, target),
        "closed_form": lambda: BackProjection(model, x, goal)(1.0),
    }
    results = {name: compute() for name, compute in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, compute in ways.items():
            took, results[name] = seconds(compute, x.device)
            times[name].append(took)
    medians = {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    return {
        **medians,
        "ratio": medians["plain_seconds"] / medians["closed_form_seconds"],
        "largest_difference": (results["plain"] - results["closed_form"]).abs().max().item(),
        "largest_value": results["plain"].abs().max().item(),
    }


def machine(device: torch.device) -> str:
    """The hardware in a few words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device = resolve_device(args.device)
    threads = torch.get_num_threads()
    try:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        torch.manual_seed(SEED)
        model = randomise(SPNN(img_size=args.img_size, hidden=args.hidden)).to(device)
        x = (torch.rand(args.batch_size, 3, args.img_size, args.img_size) * 2 - 1).to(device)
        target = torch.randn(args.batch_size, model.num_classes).to(device)
        record = {
            "machine": machine(device),
            "device": str(device),
            "torch": torch.__version__,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "seed": SEED,
            **{key: getattr(args, key) for key in ("img_size", "batch_size", "repeats", "hidden")},
            **measure(model, x, target, args.repeats),
        }
    finally:
        torch.set_num_threads(threads)
    size, images = args.img_size, f"{args.batch_size} image{'s' if args.batch_size > 1 else ''}"
    print(f"back-projection, {images} of {size}x{size}, hidden {args.hidden}, median of {args.repeats}, seed {SEED}")
    print(f"{record['machine']}, {record['device']}, torch {record['torch']}, {record['date']}")
    print(f"plain        {record['plain_seconds']:10.4f} s")
    print(f"closed form  {record['closed_form_seconds']:10.4f} s")
    print(f"ratio        {record['ratio']:10.2f}")
    print(f"largest difference {record['largest_difference']:.2e}, on values up to {record['largest_value']:.2f}")
    if args.json is not None:
        with atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_command(main)
