"""Throughput on one device: training in images per second, sampling in seconds per image, and what part g' takes.

    python benchmarks/throughput.py                                  # full size, for a GPU
    python benchmarks/throughput.py --img_size 64 --training_batch 8 --batches 1 --steps 2 --repeats 1

Training steps are those of `train.CelebATrainer` (losses, backward, clipping, Adam) on a batch that is on the device
already. A sampling step is the prior, the clean image, the back-projection of every image without a move limit, and the
next noisy image; an image takes ``--steps`` of them. Weights are random: none of it depends on their values. The share
of the matrix rate counts the multiply-adds of convolutions and matrix products (two operations each) against a product
of two large bf16 matrices, timed in the same run.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.speed import SIZES, Common, begin, images, network, published_unet, record, seconds, stage_losses
from DDNM.guided_diffusion.diffusion import image_generator, sample
from DDNM.guided_diffusion.guidance import NLBP, Guidance, Unguided
from DDNM.guided_diffusion.prior import Prior
from logger import format_table
from networks import PRECISIONS, compile_networks, inner_networks, prepare_networks
from operators import SPNNOperator
from train import Settings, adam, step
from utils import option, parse, peak_gib, run_command


@dataclass(frozen=True)
class Options(Common):
    """What is measured."""

    img_size: int = option(256, "of images", choices=SIZES)
    training_batch: int = option(256, "images per step", 1)
    precisions: tuple[str, ...] | None = option(None, "of training (default: all the device has)", choices=PRECISIONS)
    batches: tuple[int, ...] = option((1, 16, 64), "images drawn at once", 1)
    steps: int = option(100, "of the sampler", 1, 1000)
    timed_steps: int = option(5, "that are timed of them", 1, 1000)
    prior_channels: int = option(128, "of the U-Net", 32)
    compile: bool = option(False, "the SPNN's networks and the U-Net through torch.compile")


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of ``repeats`` runs after an untimed one."""
    run()
    return statistics.median(seconds(run, device) for _ in range(repeats))


def matrix_rate(device: torch.device, side: int) -> float:
    """Operations per second in a product of two bf16 matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: a @ b, device, 5)


def operations(run: Callable[[], object]) -> int:
    """In the convolutions and matrix products of a run, two per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def training(args: Options, device: torch.device, rate: float, stage: int, precision: str) -> dict:
    """Images per second in a stage."""
    model = prepare_networks(network(args.img_size, args.hidden, device).train(), device)
    x = images(args.training_batch, args.img_size, device)
    labels = (torch.rand(len(x), model.num_classes) < 0.5).float().to(device)
    settings = Settings(precision=precision)
    losses_of = stage_losses(stage, model, x, labels, settings)
    optimizer = adam([p for p in model.parameters() if p.requires_grad], 1e-6, device)
    run = partial(step, model, optimizer, losses_of, settings, device)
    count = operations(run)  # before the compiler, whose kernels it cannot count
    if args.compile:
        compile_networks(inner_networks(model), device)
    peak_gib(device, reset=True)
    median = median_seconds(run, device, args.repeats)
    return {"what": f"stage {stage}, {precision}", "batch": len(x), "images_per_second": len(x) / median,
            "peak_gib": peak_gib(device), "matrix_rate_share": count / median / rate}  # fmt: skip


@torch.no_grad()
def sampling(args: Options, device: torch.device, rate: float, batch: int) -> dict:
    """Seconds per image, guided and not, and what is the back-projection's."""
    model = prepare_networks(network(args.img_size, args.hidden, device), device)
    unet = published_unet(args.img_size, args.prior_channels).to(device)
    prior = Prior(unet, torch.bfloat16, channels_last=True)
    target = torch.randn(batch, model.num_classes).to(device)
    generators = [image_generator(0, str(i)) for i in range(batch)]
    draw = partial(sample, prior, generators, device, SPNNOperator(model), target)

    def a_step(cost: Callable[[Callable[[], object]], float], rule: Guidance) -> float:
        """What one more step costs, whatever is paid once per run; a step costs the same wherever it is."""
        short, long = (cost(partial(draw, rule, steps=n)) for n in (args.timed_steps, 2 * args.timed_steps))
        return (long - short) / args.timed_steps

    always = NLBP(nlbp_stop_cond=0.0, max_move=None)
    count = a_step(operations, always)
    if args.compile:
        compile_networks([unet, *inner_networks(model)], device)
    peak_gib(device, reset=True)
    timed = partial(median_seconds, device=device, repeats=args.repeats)
    plain, with_nlbp = a_step(timed, Unguided()), a_step(timed, always)
    return {"what": "sampling, bf16 prior", "batch": batch, "seconds_per_image": with_nlbp * args.steps / batch,
            "against_unguided": with_nlbp / plain, "back_projection_share": 1 - plain / with_nlbp,
            "peak_gib": peak_gib(device), "matrix_rate_share": count / with_nlbp / rate}  # fmt: skip


def table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table."""
    return format_table(rows, "what", {
        "batch": ("batch", ".0f"), "images_per_second": ("images/s", ".3g"), "seconds_per_image": ("s/image", ".3g"),
        "matrix_rate_share": ("of the matrix rate", ".0%"), "against_unguided": ("times unguided", ".2f"),
        "back_projection_share": ("of it NLBP", ".0%"), "peak_gib": ("peak GiB", ".1f"),
    })  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options, _ = parse(__doc__, Options, argv=argv)
    device = begin(options)
    gpu = device.type == "cuda"
    precisions = options.precisions or [p for p in PRECISIONS if gpu or p != "tf32"]
    rate = matrix_rate(device, 8192 if gpu else 1024)
    print(f"bf16 product {rate / 1e12:.3g} T/s")
    jobs = [partial(training, options, device, rate, stage, precision) for stage in (1, 2) for precision in precisions]
    jobs += [partial(sampling, options, device, rate, batch) for batch in options.batches]
    record(options, (job() for job in jobs), table, bf16_operations_per_second=rate)
    return 0


if __name__ == "__main__":
    run_command(main)
