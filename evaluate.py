"""Methods side by side: each draws the same images with the same noise, and one table says how they compare.

    python evaluate.py --methods none nlbp gradient nlbp+gradient --steps 20 50 --path_y faces --out check_points/table
    python evaluate.py --methods nlbp+gradient --edits Eyeglasses=1 Smiling=0 --path_y faces --out check_points/edits
    python evaluate.py --operator sr4 --methods linear gradient none --path_y faces --out check_points/larger

Targets are g's logits of the inputs, or what --operator measures of them. The folder gets table.csv, .json and .md,
sheet.png (a row per method) and the pictures. What is drawn is not drawn again: the same command goes on where it was
stopped, and torchrun's processes share the images. Every setting of DDNM/main.py can be given; those of --config
(default: faces.yml) hold for all methods.

Columns, each but the costs with its 95 % interval: g, the share of attributes whose sign, by g, is the target's; judge,
the share on which the independent judge says of a picture what it says of the input (for a table of logits: the
target's sign); balanced, the same as a mean over attributes of the shares of present and of absent ones; error, the
mean difference of probabilities by g; KID (times 100) and, with Inception, FID against the reference; PSNR, LPIPS and
identity (the cosine of face embeddings) against the input. The row "inputs" is what the inputs themselves get, by the
judge against g's logits: a ceiling, for the two disagree about the inputs already. With --operator there is no g, but
|A x - y|, the root mean square over what is measured, before pictures have 8 bits.

With --edits each method also runs without an edit. By the judge: the share of pictures in which the edited attribute is
seen, and of inputs in which it was before; the share of the other attributes that differ from the input, of the same
ones in the picture without the edit, which is the floor, and the share that should, for they contradict the edit
(--contradiction). More can be set with it: Smiling=1+Young=1.
"""

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from DDNM.guided_diffusion.guidance import Guidance, RuleSettings
from DDNM.guided_diffusion.inputs import (
    CONFIGS,
    OF_MAIN,
    PRESET_ONLY,
    Networks,
    NetworkSettings,
    Targets,
    TargetSettings,
    WalkSettings,
    load_lpips,
    load_networks,
    read_targets,
)
from DDNM.guided_diffusion.results import Record, as_saved, contact_sheet, contents, draw, picture, write_csv
from images import find_images, load_image, save_image, to_uint8
from logger import format_table, get_logger
from loop import World, join_world, locked
from metrics import Figure, agreement, balanced_accuracy_by_attribute, bootstrap, halves, mean_of, prob_error, psnr
from utils import InputError, json_values, option, parse, peak_gib, run_command, write_json, write_text

SHEET_COLUMNS = 8
COLUMNS = {  # figure -> its heading and format
    "judge": ("judge", ".3f"), "judge_balanced": ("judge, balanced", ".3f"), "g": ("g", ".3f"),
    "g_balanced": ("g, balanced", ".3f"), "error": ("error", ".3f"), "before": ("attribute seen before", ".3f"),
    "edited": ("after", ".3f"), "floor": ("others changed without the edit", ".3f"), "changed": ("with it", ".3f"),
    "followed": ("of them meant", ".3f"),
    "kid": ("KID x100", ".2f"), "fid": ("FID", ".2f"), "consistency": ("|A x - y|", ".1e"), "psnr": ("PSNR", ".2f"),
    "lpips": ("LPIPS", ".3f"), "identity": ("identity", ".3f"), "evaluations": ("evaluations", ".0f"),
    "gradients": ("of them with gradients", ".0f"), "seconds": ("s/image", ".2f"), "memory": ("peak GiB", ".2f"),
}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """Evaluation."""

    config: Path = option(Path("faces.yml"), "preset: a file under DDNM/configs, or a path; flags given here win")
    methods: tuple[str, ...] = option(
        ("none", "nlbp", "gradient", "clean_gradient", "freedom", "tfg", "nlbp+gradient"),
        "rules of guidance; RULE@STEPS has steps of its own",
    )
    steps: tuple[int, ...] = option((50,), "numbers of sampling steps; each method runs with each", 1, 1000)
    edits: tuple[str, ...] = option(
        (),
        "NAME=VALUE, or NAME=VALUE+NAME=VALUE, the first being the one that is looked for: each method runs with each",
    )
    count: int = option(100, "of the first so many images", 1)
    out: Path = option(Path("check_points/evaluation"), "folder for the table and the pictures")
    reference: Path | None = option(None, "folder of real pictures for KID and FID (not given: the inputs)")
    features: str = option("auto", "of KID and FID; auto: Inception (requirements-inception.txt), else the judge's",
                           choices=("auto", "inception", "judge"))  # fmt: skip
    lpips: bool = option(False, "measure LPIPS (fetches AlexNet's weights)")
    identity: Path | None = option(None, "a face embedding, (B, 3, S, S) in [-1, 1] -> (B, F), as torch.export.save "
                                   "leaves it (.pt2): a program, so give one that you trust")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A method with its number of steps and, maybe, an edit."""

    method: str
    steps: int
    edit: str | None = None

    @classmethod
    def of(cls, method: str, steps: int, edit: str | None) -> "Case":
        """A method as given, ``RULE`` or ``RULE@STEPS``. Raises InputError."""
        rule, at, own = method.partition("@")
        if at and not (own.isdecimal() and 1 <= int(own) <= 1000):
            raise InputError(f"--methods {method}: expected RULE or RULE@STEPS")
        return cls(rule, int(own) if at else steps, edit)

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.method, f"{self.steps} steps", self.edit)))

    @property
    def folder(self) -> str:
        return "_".join(filter(None, (self.method, str(self.steps), self.edit)))


# --- Drawing ---------------------------------------------------------------------------------------------------------


def draw_case(
    case: Case, guidance: Guidance, walk: WalkSettings, networks: Networks, targets: Targets, folder: Path,
    settings: dict, world: World, log: logging.Logger,
) -> dict[str, float]:  # fmt: skip
    """Draw and save the images of a case that are not there yet; its costs.

    FOLDER.jsonl beside the pictures has a line per batch, with what was in its images, and its costs: evaluations and
    gradients, seconds, |A x - y| in the mean, the largest memory.
    """
    record = Record(folder.parent / f"{folder.name}.jsonl", settings, otherwise="take another --out")
    content = contents(targets.files, targets.logits)
    kept = record.read() if record.path.is_file() else []
    world.wait()
    if world.leads:
        record.begin(kept)  # without a line that was cut
    world.wait()
    there = {name: said for batch in kept for name, said in batch["images"].items()}
    parts = [slice(i, i + walk.batch_size) for i in range(0, len(targets.names), walk.batch_size)]
    todo = [p for p in parts if any(there.get(n) != c for n, c in zip(targets.names[p], content[p], strict=True))]
    own = world.share(todo)
    with_gradient: list[bool] = []  # each evaluation of the prior
    hook = networks.prior.register_forward_pre_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    for done, part in enumerate(own):
        names, target = targets.names[part], targets.logits[part].to(networks.device)
        label = f"{case.name}, batch {done + 1}/{len(own)}"
        peak_gib(networks.device, reset=True)
        with_gradient.clear()
        images, costs = draw(networks, names, target, guidance, case.steps, walk, label, world.leads, log)
        if target.ndim > 2:  # before the pictures have 8 bits
            distance = networks.operator.distance(networks.operator.A(images), target)
            costs["consistency"] = distance.mean().item()
        for name, image in zip(names, as_saved(images)[0].cpu(), strict=True):
            save_image(image, folder / f"{name}.png")
        record.append([costs | {
            "images": dict(zip(names, content[part], strict=True)), "evaluations": len(with_gradient),
            "gradients": sum(with_gradient), "seconds": costs["seconds"] * len(names),
            "memory": peak_gib(networks.device),
        }])  # fmt: skip
    hook.remove()
    world.wait()
    batches = record.read()
    count = sum(len(batch["images"]) for batch in batches)
    costs = {key: fmean(batch[key] for batch in batches) for key in ("evaluations", "gradients")}
    costs["seconds"] = sum(batch["seconds"] for batch in batches) / count
    if "consistency" in batches[0]:
        costs["consistency"] = sum(batch["consistency"] * len(batch["images"]) for batch in batches) / count
    return costs | {"memory": max(batch["memory"] for batch in batches)}


# --- Features --------------------------------------------------------------------------------------------------------


class JudgeFeatures(nn.Module):
    """The judge's last grid, flattened, each picture's of unit root mean square, (B, F)."""

    def __init__(self, judge: nn.Module) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, x: Tensor) -> Tensor:
        grid = self.judge.head[:4](self.judge.features((x - self.judge.mean) / self.judge.std))  # (B, F)
        return nn.functional.normalize(grid.flatten(1)) * grid[0].numel() ** 0.5


class InceptionFeatures(nn.Module):
    """torchmetrics' Inception v3 with the weights of the published FID, (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.network = FrechetInceptionDistance(feature=2048).inception

    def forward(self, x: Tensor) -> Tensor:
        return self.network(to_uint8(x))


def load_features(wanted: str, networks: Networks, log) -> tuple[nn.Module | None, str]:
    """What sees pictures for KID and FID, and its name. Raises InputError if what is asked for cannot be had."""
    reason = None
    if wanted in ("auto", "inception"):
        try:
            return InceptionFeatures().to(networks.device).eval(), "Inception"
        except Exception as error:  # no torch-fidelity, or its weights cannot be fetched: any network error may come
            reason = " ".join(str(error).split())[:120]
            if wanted == "inception":
                raise InputError(f"--features inception: cannot be had ({reason})") from None
            log.info("no Inception (%s): no FID, and KID on the judge's features", reason)
    if networks.judge is None:
        log.info("no judge either: no KID and FID")
        return None, "none"
    return JudgeFeatures(networks.judge), "judge"


@torch.no_grad()
def seen(network: nn.Module | Callable, images: Tensor, device: torch.device, size: int = 50) -> Tensor:
    """What a network says of many images, on the CPU."""
    return torch.cat([network(part.to(device)).float().cpu() for part in images.split(size)])


def kid(fake: Tensor, real: Tensor) -> Callable[[Tensor], float]:
    """Kernel Inception distance, times 100, of those of the pictures whose indices it is given.

    The unbiased squared MMD of the cubic kernel (Binkowski et al. 2018). torchmetrics' own estimator takes sets of one
    size only.
    """
    from torchmetrics.image.kid import poly_kernel

    def within(k: Tensor) -> Tensor:
        return (k.sum() - k.diag().sum()) / (len(k) * (len(k) - 1))

    fake, real = fake.double(), real.double()
    of_fake, between, of_real = poly_kernel(fake, fake), poly_kernel(fake, real), within(poly_kernel(real, real))
    return lambda i: 100 * (within(of_fake[i][:, i]) + of_real - 2 * between[i].mean()).item()


def fid(fake: Tensor, real: Tensor) -> float:
    """Fréchet Inception distance (Heusel et al. 2017)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    seen_already = nn.Identity()
    seen_already.num_features = fake.shape[1]
    distance = FrechetInceptionDistance(feature=seen_already)
    distance.update(real, real=True)
    distance.update(fake, real=False)
    return distance.compute().item()


def load_identity(path: Path, device: torch.device) -> nn.Module:
    """A face embedding, as `torch.export.save` leaves it. Raises InputError: none."""
    try:
        return torch.export.load(path).module().to(device)
    except Exception as error:  # each part of the archive has its own way to be refused
        raise InputError(f"--identity {path}: no exported network ({' '.join(str(error).split())[:120]})") from None


# --- Figures with their intervals ------------------------------------------------------------------------------------


def balanced(logits: Tensor, wanted: Tensor) -> Figure:
    """Balanced agreement of logits with the signs of others, (N, d) each."""

    def of(drawn: Tensor) -> Tensor:
        return torch.stack([balanced_accuracy_by_attribute(logits[i], wanted[i] > 0).nanmean() for i in drawn])

    return bootstrap(of, len(logits), 200)


@dataclass
class Measured:
    """What is known of the inputs, and measures pictures against it.

    Attributes:
        embedding: measures identity.
    """

    networks: Networks
    targets: Targets
    inputs: Tensor | None  # (N, 3, S, S)
    features: nn.Module | None
    reference: Tensor | None  # (M, F), as features sees others
    lpips: nn.Module | None
    embedding: nn.Module | None
    edits: Sequence[int] = ()  # attributes that are set, the one that is looked for first
    followed: Tensor | None = None  # those that followed, (N, d), see `Edits`
    unedited: Tensor | None = None  # what the judge says of the method's pictures without the edit, (N, d)

    def of(self, pictures: Tensor, judged: Tensor | None, before: Tensor | None = None) -> dict[str, Figure]:
        """The figures of pictures (N, 3, S, S) against targets.

        Args:
            judged: what the judge should say, (N, d). before: what it says of the inputs.
        """
        device, count = self.networks.device, len(pictures)
        found: dict[str, Figure] = {}
        if self.targets.logits.ndim == 2:
            g, y = seen(self.networks.operator.A, pictures, device), self.targets.logits
            found = {"g": mean_of(agreement(g, y)), "g_balanced": balanced(g, y), "error": mean_of(prob_error(g, y))}
        if judged is not None:
            said = seen(self.networks.judge, pictures, device)
            found |= {"judge": mean_of(agreement(said, judged)), "judge_balanced": balanced(said, judged)}
            if not self.edits:
                self.unedited = said
            else:
                edited, others = self.edits[:1], [i for i in range(judged.shape[1]) if i not in self.edits]
                found |= {
                    "before": mean_of(agreement(before[:, edited], judged[:, edited])),
                    "edited": mean_of(agreement(said[:, edited], judged[:, edited])),
                    "floor": mean_of(1 - agreement(self.unedited[:, others], before[:, others])),
                    "changed": mean_of(1 - agreement(said[:, others], before[:, others])),
                    "followed": mean_of(self.followed[:, others].double().mean(1)),
                }
        if self.features is not None and self.reference is not None:
            fake = seen(self.features, pictures, device)
            found["kid"] = halves(kid(fake, self.reference), count)
            if isinstance(self.features, InceptionFeatures):
                found["fid"] = halves(lambda i: fid(fake[i], self.reference), count, 10)
        if self.inputs is not None and not torch.equal(pictures, self.inputs):
            found["psnr"] = mean_of(psnr(pictures, self.inputs))
            if self.lpips is not None:
                pairs = torch.stack([pictures, self.inputs], 1)  # (N, 2, 3, S, S)
                found["lpips"] = mean_of(seen(lambda pair: self.lpips(pair[:, 0], pair[:, 1]).flatten(), pairs, device))
            if self.embedding is not None:
                embeddings = (seen(self.embedding, of, device).flatten(1) for of in (pictures, self.inputs))
                found["identity"] = mean_of(nn.functional.cosine_similarity(*embeddings))
        return found


# --- The table -------------------------------------------------------------------------------------------------------


def flat(name: str, figures: dict, costs: dict) -> dict:
    row: dict = {"method": name}
    for column in COLUMNS:
        row[column], *interval = figures.get(column, (costs.get(column), None, None))
        if column not in ("consistency", "evaluations", "gradients", "seconds", "memory"):
            row[f"{column}_low"], row[f"{column}_high"] = interval
    return json_values(row)


def averaged(rows: Sequence[dict], name: str) -> dict:
    """A row of the means of rows, without intervals."""
    known = {column: [row[column] for row in rows if row[column] is not None] for column in COLUMNS}
    return flat(name, {}, {column: fmean(values) for column, values in known.items() if values})


def main(argv: Sequence[str] | None = None) -> int:
    kinds = (Evaluation, NetworkSettings, TargetSettings, RuleSettings, WalkSettings)
    e, weights, what, rule, walk, others = parse(
        __doc__, *kinds, argv=argv, extra=(*PRESET_ONLY, *OF_MAIN), presets=CONFIGS
    )
    edits = (None, *e.edits)  # without one first: the others are compared with it
    cases = dict.fromkeys(Case.of(m, n, edit) for n in e.steps for m in e.methods for edit in edits)
    rules = {case: replace(rule, guidance=case.method).build(case.steps) for case in cases}  # refuses unknown ones
    architecture = {key: value for key, value in others.items() if key in PRESET_ONLY}
    with join_world(weights.device) as (world, device), locked(e.out) if world.leads else nullcontext():
        networks = load_networks(weights, architecture, device, what.operator)
        targets = read_targets(what, networks, walk.batch_size, world, most=e.count)
        targets.add_noise(rule.noise, walk.seed)
        for case, guidance in rules.items():
            networks.evaluations(guidance, targets, case.steps, walk)  # refuses what does not fit
        said = {name: getattr(what, name) for name in ("set", "contradiction", "align", "operator")}
        said |= {"precision": weights.precision, "compile": weights.compile, "device": device.type}
        same = asdict(rule) | asdict(walk) | said | networks.fingerprints()
        return evaluate(e, rules, walk, networks, targets, json_values(same), world)


def evaluate(
    e: Evaluation, rules: dict[Case, Guidance], walk: WalkSettings, networks: Networks, targets: Targets,
    settings: dict, world: World,
) -> int:  # fmt: skip
    """Draw what is not drawn yet, measure everything, write the table; the exit status."""
    size, device = networks.image_size, networks.device
    edits = {case.edit: networks.edits(assignments(case.edit), settings["contradiction"]) for case in rules}
    if not world.leads:
        logging.disable(logging.INFO)
    log = get_logger("evaluate", e.out)
    for line in targets.skipped:
        log.warning("skipped: %s", line)
    measured, seen_by = measures(e, networks, targets, log) if world.leads else (None, "")
    rows: list[dict] = []
    of_edits: dict[str, list[dict]] = {}
    shelf: list[tuple[str, Tensor]] = []
    if measured is not None and measured.inputs is not None:
        said = targets.logits if networks.spnn is not None and networks.judge is not None else targets.judged
        rows.append(flat("inputs", measured.of(measured.inputs, said), {}))
        shelf.append(("inputs", measured.inputs))
    for case, guidance in rules.items():
        logits, judged, followed = edits[case.edit].apply(targets.logits, targets.judged)
        own, folder = replace(targets, logits=logits, judged=judged), e.out / "pictures" / case.folder
        costs = draw_case(case, guidance, walk, networks, own, folder, settings, world, log)
        if measured is None:
            continue
        pictures = torch.stack([load_image(folder / f"{name}.png", size) for name in own.names])
        measured.targets, measured.edits, measured.followed = own, list(edits[case.edit].logits), followed
        rows.append(flat(case.name, measured.of(pictures, own.judged, targets.judged), costs))
        shelf.append((case.name, pictures))
        log.info("%s", format_table(rows[-1:], "method", COLUMNS))
        note = (f"{len(own.names)} images, {device}, {world.size} x {torch.get_num_threads()} threads, prior in "
                f"{settings['precision']}, torch {torch.__version__}; KID and FID on {seen_by}.")  # fmt: skip
        if case.edit:
            of_edits.setdefault(f"{case.method}, {case.steps} steps", []).append(rows[-1])
        means = [averaged(of, f"{name}, mean of {len(of)} edits") for name, of in of_edits.items() if len(of) > 1]
        write_table(e.out, [*rows, *means], shelf, note, settings)  # so that a stop costs nothing
    if world.leads:
        print((e.out / "table.md").read_text(encoding="utf-8"))
    return 0


def measures(e: Evaluation, networks: Networks, targets: Targets, log: logging.Logger) -> tuple[Measured, str]:
    """What measures the pictures, and what KID and FID are taken on."""
    size, device = networks.image_size, networks.device
    embedding = None if e.identity is None else load_identity(e.identity, device)
    features, seen_by = load_features(e.features, networks, log)
    inputs = None if targets.files is None else torch.stack(targets.inputs(slice(None), size))
    real = inputs if e.reference is None else torch.stack([load_image(p, size) for p in find_images(e.reference)])
    reference = None if features is None or real is None else seen(features, real, device)
    lpips = load_lpips(device, log, size) if e.lpips and inputs is not None else None
    measured = Measured(networks, targets, inputs, features, reference, lpips, embedding)
    return measured, f"{seen_by} features against {0 if reference is None else len(reference)} pictures"


def assignments(edit: str | None) -> list[str]:
    """The parts of ``A=1+B=+4``."""
    return [] if edit is None else re.split(r"\+(?=\w+=)", edit)


def write_table(
    folder: Path, rows: Sequence[dict], shelf: Sequence[tuple[str, Tensor]], note: str, settings: dict
) -> None:
    """table.csv, .json and .md, and sheet.png."""
    write_csv(folder / "table.csv", rows)
    write_json(folder / "table.json", {"settings": settings, "note": note, "rows": rows})
    write_text(folder / "table.md", f"{format_table(rows, 'method', COLUMNS)}\n\n{note}\n")
    faces = [[picture(image, 96) for image in pictures[:SHEET_COLUMNS]] for _, pictures in shelf]
    contact_sheet(folder / "sheet.png", [], faces, [name for name, _ in shelf])


if __name__ == "__main__":
    run_command(main)
