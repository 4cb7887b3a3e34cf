"""Throughput on one device: training in images per second, sampling in seconds per image, and what part g' takes.

    python benchmarks/throughput.py                                  # full size, for a GPU
    python benchmarks/throughput.py --img_size 64 --training_batch 8 --batches 1 --steps 2 --repeats 1

Training steps are those of `train.CelebATrainer` (losses, backward, clipping, Adam) on a batch that is on the device
already. A sampling step is the prior, the clean image, the back-projection of every image without a move limit, and the
next noisy image; an image takes ``--steps`` of them. Weights are random: none of it depends on their values. The share
of the matrix rate counts the multiply-adds of convolutions and matrix products (two operations each) against a product
of two large bf16 matrices, timed in the same run.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the command runs from any folder

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks.speed import add_common_flags, images, network, provenance, published_unet, seconds  # noqa: E402
from DDNM.guided_diffusion.diffusion import image_generator, sample  # noqa: E402
from DDNM.guided_diffusion.guidance import NLBP, Unguided  # noqa: E402
from DDNM.guided_diffusion.prior import Prior  # noqa: E402
from networks import (  # noqa: E402
    PRECISIONS,
    compile_networks,
    inner_networks,
    networks_in,
    prepare_networks,
)
from operators import SPNNOperator  # noqa: E402
from train import Settings, adam, forward_losses, freeze_g, natural_losses, origin_latents, step  # noqa: E402
from utils import LARGEST_WIDTH, number, resolve_device, run_command, write_json  # noqa: E402


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--img_size", type=int, choices=(32, 64, 256), default=256, help="default %(default)s")
    p.add_argument("--training_batch", type=number(int, 1), default=256, help="images per step (default %(default)s)")
    p.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="of training (default: all the device has)")
    p.add_argument("--batches", type=number(int, 1), nargs="+", default=[1, 16, 64], help="images drawn at once")
    p.add_argument("--steps", type=number(int, 1, 1000), default=100, help="of the sampler (default %(default)s)")
    p.add_argument(
        "--timed_steps", type=number(int, 1, 1000), default=5, help="that are timed of them (default %(default)s)"
    )
    p.add_argument(
        "--prior_channels", type=number(int, 32, LARGEST_WIDTH), default=128, help="of the U-Net (default %(default)s)"
    )
    p.add_argument("--checkpoint_activations", action="store_true", help="as in training")
    p.add_argument("--compile", action="store_true", help="the SPNN's networks and the U-Net through torch.compile")
    return add_common_flags(p, repeats=5)


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of ``repeats`` runs after an untimed one."""
    run()
    return statistics.median(seconds(run, device) for _ in range(repeats))


def matrix_rate(device: torch.device, side: int) -> float:
    """Operations a second in a product of two bf16 matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: a @ b, device, 5)


def operations(run: Callable[[], object]) -> int:
    """In the convolutions and matrix products of a run, two a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def training(args: argparse.Namespace, device: torch.device, rate: float, stage: int, precision: str) -> dict:
    """Images a second in a stage."""
    model = prepare_networks(network(args.img_size, args.hidden, device).train(), device)
    x = images(args.training_batch, args.img_size, device)
    labels = (torch.rand(len(x), model.num_classes) < 0.5).float().to(device)
    settings = Settings(precision=precision)
    if stage == 1:

        def losses_of() -> dict:
            return forward_losses(model, x, labels, settings)[0]

    else:
        freeze_g(model)
        with torch.no_grad(), networks_in(precision, device):
            y = model(x)
        losses_of = partial(natural_losses, model, x, y, origin_latents(model), settings)
    if args.checkpoint_activations:
        model.pinn.checkpoint_activations = True
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adam(trained, 1e-6, device)
    run = partial(step, model, optimizer, losses_of, settings, device)
    count = operations(run)  # before the compiler, whose kernels it cannot count
    if args.compile:
        compile_networks(inner_networks(model), device)
    reset_peak(device)
    median = median_seconds(run, device, args.repeats)
    return {
        "what": f"stage {stage}, {precision}",
        "batch": len(x),
        "images_per_second": len(x) / median,
        "peak_bytes": peak_bytes(device),
        "matrix_rate_share": count / median / rate,
    }


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Since `reset_peak`; None where nobody counts (benchmarks/growth.py does, by one process per row)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@torch.no_grad()
def sampling(args: argparse.Namespace, device: torch.device, rate: float, batch: int) -> dict:
    """Seconds per image, guided and not, and what is the back-projection's."""
    model = prepare_networks(network(args.img_size, args.hidden, device), device)
    unet = published_unet(args.img_size, args.prior_channels).to(device)
    prior = Prior(unet, torch.bfloat16, channels_last=True)
    target = torch.randn(batch, model.num_classes).to(device)
    generators = [image_generator(0, str(i)) for i in range(batch)]
    always = NLBP(nlbp_stop_cond=0.0, max_move=None)

    def draw(steps: int, guidance=Unguided()) -> None:  # noqa: B008
        sample(prior, generators, device, SPNNOperator(model), target, guidance, steps=steps)

    def a_step(cost: Callable[[Callable[[], object]], float], **guided) -> float:
        """What one more step costs, whatever is paid once per run; a step costs the same wherever it is."""
        short, long = (cost(partial(draw, n, **guided)) for n in (args.timed_steps, 2 * args.timed_steps))
        return (long - short) / args.timed_steps

    guided = {"guidance": always}
    count = a_step(operations, **guided)
    if args.compile:
        compile_networks([unet, *inner_networks(model)], device)
    reset_peak(device)
    timed = partial(median_seconds, device=device, repeats=args.repeats)
    plain, with_nlbp = a_step(timed), a_step(timed, **guided)
    return {
        "what": "sampling, bf16 prior",
        "batch": batch,
        "seconds_per_image": with_nlbp * args.steps / batch,
        "against_unguided": with_nlbp / plain,
        "back_projection_share": 1 - plain / with_nlbp,
        "peak_bytes": peak_bytes(device),
        "matrix_rate_share": count / with_nlbp / rate,
    }


def table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | batch | rate | of the matrix rate | against unguided | peak |", "|---|---|---|---|---|---|"]
    for r in rows:
        if "images_per_second" in r:
            speed, ratio = f"{r['images_per_second']:.3g} images/s", ""
        else:
            speed = f"{r['seconds_per_image']:.3g} s/image"
            ratio = f"{r['against_unguided']:.2f}x, NLBP {r['back_projection_share']:.0%}"
        cells = (r["what"], r["batch"], speed, f"{r['matrix_rate_share']:.0%}", ratio,
                 "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.1f} GiB")  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device = resolve_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    gpu = device.type == "cuda"
    precisions = args.precisions or [p for p in PRECISIONS if gpu or p != "tf32"]
    rate = matrix_rate(device, 8192 if gpu else 1024)
    record = {**provenance(device), "settings": vars(args), "bf16_operations_per_second": rate, "rows": []}
    print(f"{record['machine']}, torch {record['torch']}, {record['date']}; bf16 product {rate / 1e12:.3g} T/s")
    jobs = [partial(training, args, device, rate, stage, precision) for stage in (1, 2) for precision in precisions]
    jobs += [partial(sampling, args, device, rate, batch) for batch in args.batches]
    for job in jobs:
        record["rows"].append(job())
        print(table(record["rows"][-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        if args.json is not None:  # after every row: an interruption keeps what is measured
            write_json(args.json, record)
    print(table(record["rows"]))
    return 0


if __name__ == "__main__":
    run_command(main)
