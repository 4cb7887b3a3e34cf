"""Speed against the plain formulation: same weights, same inputs, one process, the difference of the results beside it.

    python benchmarks/speed.py
    python benchmarks/speed.py --rows back_projection stage1 --repeats 9 --threads 2 --json result.json

The plain formulation (benchmarks/plain.py) writes every equation out: seven passes for a back-projection, three for a
step of stage 1, four for one of stage 2, the Cayley systems solved in each pass, Adam's default loop over the weights,
a float32 U-Net as it is built, images decoded and resized in every epoch. The two take turns, so that whatever else
the machine does meets both; figures are medians.
"""

import copy
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import plain
from data_loader import ANNOTATION_FILE, ATTRIBUTES, IMAGE_FOLDER, CelebAMaskHQ, make_loader
from DDNM.guided_diffusion.compiled import compile_for_cpu
from DDNM.guided_diffusion.ddpm_layout import ddpm_unet
from DDNM.guided_diffusion.diffusion import renoise
from DDNM.guided_diffusion.guidance import NLBP, Denoiser, Steer
from DDNM.guided_diffusion.prior import Prior
from DDNM.guided_diffusion.schedule import Schedule
from logger import format_table
from models import SPNN, BackProjection
from networks import networks_in, prepare_networks
from operators import SPNNOperator
from train import Settings, adam, backward, forward_losses, freeze_g, natural_losses, origin_latents
from train import step as take_step
from utils import InputError, option, parse, resolve_device, run_command, write_json

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
STEP = (500, 490)  # t and the next one, of a sampling step
SIZES = (32, 64, 256)  # of the published architectures
ROW_NAMES = ("back_projection", "sampling_step", "stage1", "stage2", "loader")


@dataclass(frozen=True)
class Common:
    """Measuring."""

    repeats: int = option(5, "timed runs of each", 1)
    hidden: int = option(128, "width of the networks", 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    threads: int | None = option(None, "of PyTorch on the CPU (default: its own choice)", 1, 1024)
    json: Path | None = option(None, "also write the figures there")


@dataclass(frozen=True)
class Options(Common):
    """What is compared."""

    rows: tuple[str, ...] = option(ROW_NAMES, "what is compared", choices=ROW_NAMES)
    sampling_size: int = option(256, "of images", choices=SIZES)
    training_size: int = option(64, "of images", choices=SIZES)
    sampling_batch: int = option(1, "images", 1)
    training_batch: int = option(8, "images per step", 1)
    images: int = option(1000, "of the loader's row", 10)
    image_side: int = option(1024, "their size", 8)
    workers: int = option(2, "loader workers: processes of the plain one, threads here", 0, 1024)
    prior_channels: int = option(128, "of the U-Net", 32)


# --- Measuring -------------------------------------------------------------------------------------------------------


def seconds(compute: Callable[[], object], device: torch.device) -> float:
    """How long ``compute`` takes, the device's queue included."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    started = time.perf_counter()
    compute()
    wait()
    return time.perf_counter() - started


def take_turns(ways: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each of ``ways``, after one untimed run of each."""
    for compute in ways.values():
        compute()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, compute in ways.items():
            times[name].append(seconds(compute, device))
    return {name: statistics.median(values) for name, values in times.items()}


def row(name: str, medians: dict[str, float], difference: float, scale: float, note: str, kind: str = "") -> dict:
    """A row of the table; ``difference`` is absolute for images, relative for a loss."""
    ours = medians["ours" + kind]
    return {"row": name + kind, "plain_seconds": medians["plain"], "seconds": ours, "ratio": medians["plain"] / ours,
            "largest_difference": difference, "largest_value": scale, "note": note}  # fmt: skip


def apart(expected: Tensor, got: Tensor) -> tuple[float, float]:
    """The largest difference, and the largest value that was expected."""
    return (expected - got).abs().max().item(), expected.abs().max().item()


def begin(options: Common) -> torch.device:
    """The device that is measured, with as many threads as were asked for."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return resolve_device(options.device)


def record(options: Common, rows: Iterable[dict], table: Callable[[Sequence[dict]], str]) -> dict:
    """Take measured rows one after the other, with what their figures need beside them; print them as a table."""
    device, date = begin(options), datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    kept = {"machine": machine(device), "device": str(device), "torch": torch.__version__, "date": date, "seed": SEED,
            "settings": asdict(options), "rows": []}  # fmt: skip
    print(f"{kept['machine']}, {device}, torch {torch.__version__}, {date}", flush=True)
    for measured in rows:
        kept["rows"].append(measured)
        print(table([measured]).splitlines()[-1], file=sys.stderr, flush=True)
        if options.json is not None:  # after every row: an interruption keeps what is measured
            write_json(options.json, kept)
    print(table(kept["rows"]))
    return kept


def machine(device: torch.device) -> str:
    """The hardware in a few words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return f"{[*models, platform.processor() or platform.machine()][0]}, {torch.get_num_threads()} threads"


# --- Networks and inputs ---------------------------------------------------------------------------------------------


@torch.no_grad()
def randomise(model: SPNN) -> SPNN:
    """Give a new network random mixing and random last layers, which start at zero; in eval mode."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_unconstrained"):
            parameter.normal_(0, 0.5 / len(parameter) ** 0.5)
        elif parameter.ndim == 4 and not parameter.any():
            parameter.normal_(0, 0.3 / parameter[0].numel() ** 0.5)
    return model.eval()


def network(size: int, hidden: int, device: torch.device) -> SPNN:
    torch.manual_seed(SEED)
    return randomise(SPNN(img_size=size, hidden=hidden)).to(device)


def images(batch: int, size: int, device: torch.device) -> Tensor:
    return (torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(SEED)) * 2 - 1).to(device)


def published_unet(size: int, channels: int) -> nn.Module:
    """The U-Net of DDNM/configs/celeba_hq.yml, random, its widths scaled from 128 to ``channels``."""
    config = yaml.safe_load((ROOT / "DDNM" / "configs" / "celeba_hq.yml").read_text(encoding="utf-8"))["prior_model"]
    torch.manual_seed(SEED)
    unet = ddpm_unet({**config, "ch": channels}, size).to_empty(device="cpu")
    for module in unet.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return unet.eval().requires_grad_(False)


# --- The rows --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def back_projection(args: Options, device: torch.device) -> Iterable[dict]:
    """As the sampler does it: the target's latents, and W of unchanged weights, are known from a run's first step."""
    model = network(args.sampling_size, args.hidden, device)
    prepared = prepare_networks(copy.deepcopy(model), device)
    x = images(args.sampling_batch, args.sampling_size, device)
    target = torch.randn(len(x), model.num_classes).to(device)
    goal = prepared.natural(target)
    ways = {
        "plain": lambda: plain.back_project(model, x, target),
        "ours": lambda: BackProjection(prepared, x, goal)(1.0),
    }
    note = f"{args.sampling_size}x{args.sampling_size}, batch {len(x)}, float32"
    medians = take_turns(ways, device, args.repeats)
    yield row("back_projection", medians, *apart(ways["plain"](), ways["ours"]()), note)


@torch.no_grad()
def step_of_sampling(prior: Prior, steer: Steer, x: Tensor, noise: Tensor) -> Tensor:
    """x_t to the next, less noisy x."""
    abar, abar_next = (Schedule().abar(t).to(x.device) for t in STEP)
    x0, eps, *_ = steer(Denoiser(prior), x, STEP[0])
    return renoise(x0, eps, noise, abar, abar_next, None)


@torch.no_grad()
def sampling_step(args: Options, device: torch.device) -> Iterable[dict]:
    """U-Net, clean image, back-projection at full strength, next noisy image: as DDNM/main.py does it."""
    size, batch = args.sampling_size, args.sampling_batch
    model = network(size, args.hidden, device)
    prepared = prepare_networks(copy.deepcopy(model), device)
    unet = published_unet(size, args.prior_channels).to(device)
    priors = {name: Prior(copy.deepcopy(unet), autocast, channels_last=True)
              for name, autocast in {"ours": None, "ours, bf16": torch.bfloat16}.items()}  # fmt: skip
    try:
        for name, prior in copy.deepcopy(priors).items() if device.type == "cpu" else ():
            if (compile_for_cpu(prior) == "bf16") == ("bf16" in name):
                priors[f"{name}, compiled"] = prior
    except InputError as error:
        print(f"no row for --compile: {error}", file=sys.stderr)
    noise, target = torch.randn(batch, 3, size, size).to(device), torch.randn(batch, model.num_classes).to(device)
    abar, abar_next = (Schedule().abar(t).to(device) for t in STEP)
    x = abar.sqrt() * images(batch, size, device) + (1 - abar).sqrt() * noise
    ways: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: plain.sampling_step(unet, model, x, target, noise, STEP[0], abar, abar_next)
    }
    # every image, the whole way: what the plain step does
    steer = NLBP(nlbp_stop_cond=0.0, max_move=None).towards(SPNNOperator(prepared), target)
    ways |= {name: partial(step_of_sampling, prior, steer, x, noise) for name, prior in priors.items()}
    results = {name: compute() for name, compute in ways.items()}
    medians = take_turns(ways, device, args.repeats)
    for name in priors:
        note = f"{size}x{size}, batch {batch}, prior included, {'bf16' if 'bf16' in name else 'float32'} prior"
        yield row("sampling_step", medians, *apart(results["plain"], results[name]), note, name.removeprefix("ours"))


def stage_losses(
    stage: int, model: SPNN, x: Tensor, labels: Tensor, settings: Settings
) -> Callable[[], dict[str, Tensor]]:
    """The losses of a step of training on one batch; in stage 2 what g gives is known from a run's start."""
    if stage == 1:
        return lambda: forward_losses(model, x, labels, settings)[0]
    freeze_g(model)
    with torch.no_grad(), networks_in(settings.precision, x.device):
        y = model(x)
    return partial(natural_losses, model, x, y, origin_latents(model), settings)


def training(stage: int, args: Options, device: torch.device) -> Iterable[dict]:
    """Losses, backward, clipping and Adam (in stage 2 on the r-networks), each way on its own copy of the network.

    They are compared at the first step.
    """
    settings, x = Settings(), images(args.training_batch, args.training_size, device)
    start = network(args.training_size, args.hidden, device).train()
    models = {"plain": start, "ours": prepare_networks(copy.deepcopy(start), device)}
    labels = (torch.rand(len(x), start.num_classes) < 0.5).float().to(device)
    losses_of = {kind: stage_losses(stage, model, x, labels, settings) for kind, model in models.items()}
    weights = {kind: [p for p in model.parameters() if p.requires_grad] for kind, model in models.items()}
    optimizers = {"plain": torch.optim.Adam(weights["plain"], lr=1e-6), "ours": adam(weights["ours"], 1e-6, device)}

    plain_loss = {1: plain.stage1_loss, 2: plain.stage2_loss}[stage]

    def plain_step() -> None:
        optimizers["plain"].zero_grad(set_to_none=True)
        plain_loss(start, x, labels, settings).backward()
        nn.utils.clip_grad_norm_(weights["plain"], 1.0)
        optimizers["plain"].step()

    (loss := plain_loss(start, x, labels, settings)).backward()
    own = backward(losses_of["ours"], "float32", device)["total"]
    gradients = [torch.cat([p.grad.flatten() for p in each if p.grad is not None]) for each in weights.values()]
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    note = (f"{args.training_size}x{args.training_size}, batch {len(x)}; difference of the loss is relative; "
            f"gradients {error:.1e} apart, relative")  # fmt: skip
    our_step = partial(take_step, models["ours"], optimizers["ours"], losses_of["ours"], settings, device)
    medians = take_turns({"plain": plain_step, "ours": our_step}, device, args.repeats)
    yield row(f"stage{stage}", medians, ((loss - own).abs() / loss.abs()).item(), loss.item(), note)


def loader(args: Options, device: torch.device) -> Iterable[dict]:
    """An epoch over JPEGs once the cache is built, unshuffled, so that the tensors can be compared."""
    size = 256
    with tempfile.TemporaryDirectory(prefix="spnn_bench_") as temporary:
        root = Path(temporary)
        write_jpegs(root, args.images, args.image_side)
        source = CelebAMaskHQ(root, "all", size)  # builds the cache
        decoding = plain.Images(source.paths, source.labels, size)
        # `fork`ed once: starting processes is not what is measured
        keep = args.workers > 0
        loaders = {"plain": DataLoader(decoding, 32, num_workers=args.workers, persistent_workers=keep),
                   "ours": make_loader(source, 32, args.workers)}  # fmt: skip
        worst = max(apart(a[0], b[0])[0] for a, b in zip(*loaders.values(), strict=True))
        ways = {name: lambda batches=batches: [x.shape for x, _ in batches] for name, batches in loaders.items()}
        medians = take_turns(ways, torch.device("cpu"), min(args.repeats, 3))
    note = f"second epoch of {args.images} {args.image_side}x{args.image_side} JPEGs at {size}, {args.workers} workers"
    yield row("loader", medians, worst, 1.0, note)


def write_jpegs(root: Path, count: int, side: int) -> None:
    """``count`` smooth random pictures in CelebAMask-HQ's layout."""
    (root / IMAGE_FOLDER).mkdir()
    generator = np.random.default_rng(SEED)
    rows = [str(count), " ".join(ATTRIBUTES)]
    for i in range(count):
        small = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(root / IMAGE_FOLDER / f"{i}.jpg", quality=90)
        rows.append(f"{i}.jpg " + " ".join(generator.choice(["1", "-1"], len(ATTRIBUTES))))
    (root / ANNOTATION_FILE).write_text("\n".join(rows) + "\n", encoding="utf-8")


# --- The command -----------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table."""
    columns = {"plain_seconds": ("plain, s", ".3g"), "seconds": ("here, s", ".3g"), "ratio": ("ratio", ".1f"),
               "largest_difference": ("difference", ".1e"), "largest_value": ("of values up to", ".2g")}  # fmt: skip
    return format_table([{**r, "what": f"{r['row']}: {r['note']}"} for r in rows], "what", columns)


def main(argv: Sequence[str] | None = None) -> int:
    options, _ = parse(__doc__, Options, argv=argv)
    device = begin(options)
    measurements = back_projection, sampling_step, partial(training, 1), partial(training, 2), loader
    rows = dict(zip(ROW_NAMES, measurements, strict=True))

    def measured() -> Iterable[dict]:
        for name in options.rows:
            torch.manual_seed(SEED)
            yield from rows[name](options, device)

    record(options, measured(), table)
    return 0


if __name__ == "__main__":
    run_command(main)
