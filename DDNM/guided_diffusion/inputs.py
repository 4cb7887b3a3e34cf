"""What a run of the sampler starts from: its settings, its networks, and the targets that its images stand for."""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import locate
from data_loader import ATTRIBUTES
from DDNM.guided_diffusion.compiled import compile_for_cpu
from DDNM.guided_diffusion.diffusion import image_generator
from DDNM.guided_diffusion.edits import CONTRADICTION, Edits
from DDNM.guided_diffusion.guidance import Guidance
from DDNM.guided_diffusion.prior import Prior, load_prior
from DDNM.guided_diffusion.results import read_logits
from images import find_images, load_detector, load_image
from judge import load_judge
from loop import World
from models import SPNN
from networks import compile_networks, inner_networks, prepare_networks, warn_if_emulated
from operators import Operator, SPNNOperator, make_operator
from utils import InputError, file_name, option

DDNM = Path(__file__).resolve().parents[1]
CONFIGS, DATASETS = DDNM / "configs", DDNM / "exp" / "datasets"
# settings that only a preset has: the architecture of a prior in the published layout
PRESET_ONLY = ("prior_model", "prior_image_size")
# keys of presets that say what DDNM/main.py does with its pictures, and mean nothing to other commands
OF_MAIN = ("base_rate", "image_folder", "lpips", "ni", "overwrite", "resume")


@dataclass(frozen=True)
class NetworkSettings:
    """Networks."""

    spnn: str | None = option(None, "SPNN weights: a file, a folder or a hub id")
    prior: str | None = option(None, "diffusion prior: a diffusers folder, a DDPM weight file or a hub id")
    judge: str | None = option(None, "weights of the independent judge (judge.py); none: no judge's figures")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = option("float32", "of the prior's network", choices=("float32", "bf16"))
    compile: bool = option(False, "translate the networks: torch.compile, minutes at first; on a CPU OpenVINO, seconds")
    checkpoint_activations: bool = option(
        False, "recompute the prior's activations for a gradient through it: less memory, a third more time"
    )


@dataclass(frozen=True)
class TargetSettings:
    """Targets."""

    path_y: str = option(..., "input images: a name under exp/datasets, a folder or a file; or a table of logits "
                         "(.csv) as written to logits.csv")  # fmt: skip
    operator: str | None = option(None, "measure images by this, in the place of attributes: sr4, grey, inpaint:FILE "
                                  "(black pixels are missing), a product, grey*sr4, or an SPNN of train_operator.py "
                                  "(its weights)")  # fmt: skip
    set: list[str] = option([], "NAME=VALUE: set an attribute of every target; 0 or 1 for the typical logit without "
                            "or with it, or a logit such as +4")  # fmt: skip
    contradiction: float = option(
        CONTRADICTION,
        "--set: another attribute follows if the labels that the SPNN learned from have its state less than this times "
        "as often beside what is set: a hat takes bangs away; 0: no other logit changes at all",
        0,
        1,
    )
    align: bool = option(False, "find the face in each image and cut it as CelebA-HQ does (pip install mtcnn)")
    strict: bool = option(False, "refuse unreadable images instead of skipping them")


@dataclass(frozen=True)
class WalkSettings:
    """Sampler."""

    travel_length: int = option(1, "time travel", 1, 1000)
    travel_repeat: int = option(1, "time travel", 1, 1000)
    eta: float | None = option(None, "DDIM's variance; none: the published one", 0, 1)
    clip_x0: bool = option(True, "keep x0 in [-1, 1]; --no-clip_x0 is the published rule")
    seed: int = option(1234, "of the noise, with each image's name", 0)
    batch_size: int = option(1, "images at once", 1)

    @property
    def travel(self) -> dict[str, int]:
        return {"travel_length": self.travel_length, "travel_repeat": self.travel_repeat}


# --- Networks --------------------------------------------------------------------------------------------------------


@dataclass
class Networks:
    """The networks of a run, in eval mode on ``device``, of one image size and one list of attributes.

    Attributes:
        spnn, attributes: None and none if ``measures`` takes their place.
    """

    spnn: SPNN | None
    prior: Prior
    judge: nn.Module | None
    attributes: list[str]
    device: torch.device
    measures: Operator | None = None

    @property
    def operator(self) -> Operator:
        return SPNNOperator(self.spnn) if self.measures is None else self.measures

    @property
    def image_size(self) -> int:
        return self.operator.in_shape[-1]

    def edits(self, assignments: Sequence[str], contradiction: float) -> Edits:
        """`Edits` of this run's attributes. Raises InputError."""
        return Edits.parse(assignments, self.attributes, {} if self.spnn is None else self.spnn.notes, contradiction)

    def shown(self, y: Tensor) -> Tensor:
        """Measurements (B, *out_shape) as pictures (B, 3, S, S): as they are if they are pictures, else A+ of them."""
        channels, *sides = self.operator.out_shape
        if channels in (1, 3) and min(sides, default=1) > 1:
            return F.interpolate(y.expand(-1, 3, -1, -1), self.image_size)
        return self.operator.pinv(y)

    def evaluations(self, rule: Guidance, targets: "Targets", steps: int, walk: WalkSettings) -> int:
        """How often a batch evaluates the prior. Raises InputError: a rule or a number of steps that does not fit."""
        rule.towards(self.operator, targets.logits[:1].to(self.device))
        try:
            return rule.evaluations(self.prior.schedule, steps, **walk.travel)
        except ValueError as error:
            raise InputError(f"--steps {steps}: {error}") from None

    def fingerprints(self) -> dict[str, str | None]:
        """What tells these weights from others, whatever their files are called."""
        spnn = self.spnn or getattr(self.measures, "model", None)
        return {"spnn weights": fingerprint(spnn), "prior weights": fingerprint(self.prior.unet),
                "judge weights": fingerprint(self.judge)}  # fmt: skip


def fingerprint(network: nn.Module | None) -> str | None:
    """What tells a network's weights, and the notes beside them, from others."""
    if network is None:
        return None
    digest = hashlib.sha256(json.dumps(getattr(network, "notes", None), sort_keys=True).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def from_ddnm(source: str) -> str:
    """A path that is given relative to DDNM/, as the presets do, from wherever the command runs."""
    inside = DDNM / source
    return str(inside) if not Path(source).exists() and inside.exists() else source


def load_networks(
    settings: NetworkSettings, architecture: dict, device: torch.device, operator: str | None = None
) -> Networks:
    """Load and check what a run needs.

    Args:
        architecture: what a preset says of the prior (`PRESET_ONLY`).
        operator: what is measured in the place of the SPNN's attributes, see `operators.make_operator`.

    Raises:
        InputError: weights that are missing (all of them in one message) or do not fit one another.
    """
    flags = ("spnn", "prior") if operator is None else ("prior",)
    for flag in flags:
        if getattr(settings, flag) is None:
            raise InputError(f"--{flag}: give the weights, here or in the config")
    *spnn_source, prior_source = locate(*(from_ddnm(getattr(settings, flag)) for flag in flags))
    spnn, attributes, measures = None, [], None
    if operator is None:
        spnn = SPNN.from_pretrained(*spnn_source)
        if len(spnn.out_shape) > 1:
            raise InputError(f"{settings.spnn}: attributes are logits ({spnn.num_classes},), its are {spnn.out_shape}")
        attributes = spnn.notes.get("attributes") or (ATTRIBUTES if spnn.num_classes == len(ATTRIBUTES) else [])
        if len(attributes) != spnn.num_classes:
            raise InputError(f"{settings.spnn}: config.json does not name its {spnn.num_classes} attributes")
        prepare_networks(spnn, device)
    autocast = torch.bfloat16 if settings.precision == "bf16" else None
    if autocast is not None and not settings.compile:  # OpenVINO takes float32 where that is faster
        warn_if_emulated(device)
    image_size = architecture.get("prior_image_size", spnn and spnn.img_size)
    prior = load_prior(
        prior_source, architecture.get("prior_model"), image_size, autocast, True, settings.checkpoint_activations
    )
    size = prior.image_size
    if spnn is not None and size != spnn.img_size:
        raise InputError(f"the prior draws {size}x{size} images, not {spnn.img_size}x{spnn.img_size} as the SPNN takes")
    if operator is not None:
        measures = make_operator(operator, (3, size, size))
        if isinstance(measures, SPNNOperator):
            prepare_networks(measures.model, device)
    judge = None if settings.judge is None else load_judge(from_ddnm(settings.judge))
    if judge is not None and judge.img_size != size:
        raise InputError(f"the judge takes {judge.img_size}x{judge.img_size} images, not {size}x{size}")
    if judge is not None and spnn is not None and list(judge.attributes) != list(attributes):
        raise InputError(f"the judge's {judge.num_classes} attributes are not the SPNN's {spnn.num_classes}")
    for network in filter(None, (spnn, prior, judge)):
        network.to(device).eval().requires_grad_(False)
    if settings.compile and device.type == "cpu":
        compile_for_cpu(prior)  # torch.compile makes it slower there
    elif settings.compile:
        compile_networks([prior.unet, *(inner_networks(spnn) if spnn is not None else [])], device)
    return Networks(spnn, prior, judge, list(attributes), device, measures)


def load_lpips(device: torch.device, log, image_size: int = 64) -> nn.Module | None:
    """LPIPS (Zhang et al. 2018, AlexNet); None, said in one line, for images it cannot see or without its weights."""
    if image_size < 31:
        log.warning("no LPIPS: AlexNet sees no image below 31x31, these are %dx%d", image_size, image_size)
        return None
    try:
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the way in which it asks torchvision
            return lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    except Exception as error:  # torchvision fetches AlexNet's weights: any network error may come
        log.warning("no LPIPS: its weights cannot be had (%s)", " ".join(str(error).split())[:120])
        return None


# --- Targets ---------------------------------------------------------------------------------------------------------


@dataclass
class Targets:
    """N targets by name; the images they come from are not held: there may be many.

    Attributes:
        files: of the images; None for a table of logits.
        logits: (N, *out_shape), what the sampler is given; with an operator A of the images, whatever its shape.
        judged: (N, d), what the judge should see; only its sign counts.
        skipped: a line for each image that cannot be read.
        followed: attributes that followed --set, and in how many targets.
    """

    names: list[str]
    files: list[Path] | None
    logits: Tensor
    judged: Tensor | None
    skipped: list[str]
    align: bool = False
    followed: str = ""

    def add_noise(self, deviation: float, seed: int) -> None:
        """Gaussian noise into each target, which depends on the seed and the target's name alone."""
        for name, y in zip(self.names, self.logits, strict=True):
            y += deviation * torch.randn(y.shape, generator=image_generator(seed, f"noise in {name}"))

    def inputs(self, part: slice, size: int) -> list[Tensor | None]:
        """The images of a part of the targets, (3, S, S) each; None each for a table of logits."""
        return [None] * len(self.names[part]) if self.files is None else [
            load_image(file, size, self.align) for file in self.files[part]
        ]  # fmt: skip


def input_path(path_y: str) -> Path:
    """What --path_y names: a path, or a name under exp/datasets. Raises InputError with the names there."""
    for candidate in (Path(path_y), DATASETS / path_y):
        if candidate.exists():
            return candidate
    named = sorted(p.name for p in DATASETS.glob("*") if p.is_dir())
    raise InputError(f"--path_y {path_y}: no such file or folder, nor a name under exp/datasets ({', '.join(named)})")


def image_names(paths: Sequence[Path], top: Path) -> list[str]:
    """A name for each image's results: its path below ``top`` without suffix; with it if two meet."""
    relative = [path.relative_to(top if top.is_dir() else top.parent) for path in paths]
    names = [file_name("__".join(r.with_suffix("").parts)) for r in relative]
    count, apart = Counter(names), dict[str, None]()  # a set that keeps its order
    for name, r in zip(names, relative, strict=True):
        name = name if count[name] == 1 else file_name("__".join(r.parts))
        while name in apart:
            name += "_"
        apart[name] = None
    return list(apart)


def read_targets(
    settings: TargetSettings,
    networks: Networks,
    batch_size: int,
    world: World = World(),  # noqa: B008  (frozen)
    most: int | None = None,
) -> Targets:
    """What the networks see in the images, or a table says, with ``--set``'s edits. Processes share the reading.

    Args:
        most: of the first so many images.

    Raises:
        InputError: nothing to read, or an edit that makes no sense.
    """
    edits = networks.edits(settings.set, settings.contradiction)
    source = input_path(settings.path_y)
    if source.suffix.lower() == ".csv":
        if networks.spnn is None:
            raise InputError(f"--path_y {source}: a table holds logits of attributes; --operator measures images")
        if settings.align:
            raise InputError(f"--align: {source} is a table of logits and has no images")
        names, logits = read_logits(source, networks.attributes)
        targets = Targets(names[:most], None, logits[:most], logits[:most].clone(), [])
    else:
        targets = _read_images(source, networks, batch_size, world, settings, most)
    if edits.logits:
        targets.logits, targets.judged, followed = edits.apply(targets.logits, targets.judged)
        targets.followed = edits.told(followed)
    return targets


@torch.no_grad()
def _read_images(
    source: Path, networks: Networks, batch_size: int, world: World, settings: TargetSettings, most: int | None
) -> Targets:
    if settings.align:
        load_detector()  # said once, and not of each image, if they are not there
    paths, seen, skipped = find_images(source)[:most], {}, {}
    # whole batches are shared: rounding depends on what an image shares its batch with
    for start in world.share(range(0, len(paths), batch_size)):
        images = {}
        for i, path in enumerate(paths[start : start + batch_size], start):
            try:
                images[i] = load_image(path, networks.image_size, settings.align or None)
            except InputError as error:
                if settings.strict:
                    raise
                skipped[i] = str(error)
        if images:
            batch = torch.stack(list(images.values())).to(networks.device)  # (B, 3, S, S)
            logits = networks.operator.A(batch).cpu()
            judged = logits if networks.judge is None else networks.judge(batch).cpu()
            seen |= dict(zip(images, zip(logits, judged, strict=True), strict=True))
    seen, skipped = (dict(sorted(row for of in world.gather(own) for row in of.items())) for own in (seen, skipped))
    if not seen:
        raise InputError(f"{source}: none of its {len(paths)} images can be read")
    names = image_names(paths, source)
    logits, judged = map(torch.stack, zip(*seen.values(), strict=True))
    judged = None if networks.judge is None else judged
    files = [paths[i] for i in seen]
    return Targets([names[i] for i in seen], files, logits, judged, list(skipped.values()), settings.align)
