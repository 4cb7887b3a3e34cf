"""Methods side by side: each draws the same images with the same noise, and one table says how they compare.

    python evaluate.py --methods none nlbp gradient nlbp+gradient --steps 20 50 --path_y faces --out check_points/table
    python evaluate.py --methods nlbp+gradient --edits Eyeglasses=1 Smiling=0 --path_y faces --out check_points/edits

Targets are g's logits of the inputs. The folder gets table.csv, .json and .md, sheet.png (a row per method) and the
pictures. A method that is finished is not drawn again: the same command goes on where it was stopped. Every setting of
DDNM/main.py can be given; those of --config (default: faces.yml) hold for all methods.

Columns, each but the costs with its 95 % interval: g, the share of attributes whose sign, by g, is the target's; judge,
the share on which the independent judge says of a picture what it says of the input (for a table of logits: the
target's sign); balanced, the same as a mean over attributes of the shares of present and of absent ones; error, the
mean difference of probabilities by g; KID (times 100) and, with Inception, FID against the reference; PSNR and LPIPS
against the input. The row "inputs" is what the inputs themselves get, by the judge against g's logits: a ceiling, for
the two disagree about the inputs already.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import read_json
from DDNM.guided_diffusion.diffusion import evaluations, image_generator, sample
from DDNM.guided_diffusion.guidance import RuleSettings
from DDNM.guided_diffusion.inputs import (
    CONFIGS,
    PRESET_ONLY,
    Networks,
    NetworkSettings,
    Targets,
    TargetSettings,
    WalkSettings,
    check_architecture,
    load_lpips,
    load_networks,
    parse_set,
    read_targets,
)
from DDNM.guided_diffusion.results import as_saved, contact_sheet, picture, write_csv
from images import find_images, load_image, save_image
from logger import get_logger
from loop import check_settings, locked, to_json_values
from metrics import agreement, balanced_accuracy_by_attribute, prob_error, psnr
from utils import InputError, atomic_write, json_values, option, parse, resolve_device, run_command, write_json

DRAWS = 1000  # of the bootstrap
COLUMNS = {  # figure -> its heading and digits
    "judge": ("judge", 3), "judge_balanced": ("judge, balanced", 3), "g": ("g", 3), "g_balanced": ("g, balanced", 3),
    "error": ("error", 3), "edited": ("edited attribute seen", 3), "changed": ("others changed", 3),
    "kid": ("KID x100", 2), "fid": ("FID", 2), "psnr": ("PSNR", 2), "lpips": ("LPIPS", 3),
    "evaluations": ("evaluations", 0), "gradients": ("of them with gradients", 0), "seconds": ("s/image", 2),
    "memory": ("peak GiB", 2),
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
    edits: tuple[str, ...] = option((), "NAME=VALUE: each method runs with each of these edits of its own")
    count: int = option(100, "of the first so many images", 1)
    out: Path = option(Path("check_points/evaluation"), "folder for the table and the pictures")
    reference: Path | None = option(None, "folder of real pictures for KID and FID (not given: the inputs)")
    features: str = option("auto", "of KID and FID; auto: Inception if its weights can be had, else the judge's",
                           choices=("auto", "inception", "judge"))  # fmt: skip
    lpips: bool = option(False, "measure LPIPS (fetches AlexNet's weights)")
    sheet: int = option(8, "pictures in a row of the contact sheet", 1, 100)


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
        return f"{self.method}, {self.steps} steps" + (f", {self.edit}" if self.edit else "")

    @property
    def folder(self) -> str:
        return f"{self.method}_{self.steps}" + (f"_{self.edit}" if self.edit else "")


class Counted(nn.Module):
    """A prior that counts how often it is evaluated, and how often for a gradient."""

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior, self.schedule, self.image_size = prior, prior.schedule, prior.image_size
        self.evaluations = self.gradients = 0

    def forward(self, x: Tensor, t: int) -> Tensor:
        self.evaluations += 1
        self.gradients += torch.is_grad_enabled()
        return self.prior(x, t)


# --- Drawing ---------------------------------------------------------------------------------------------------------


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (refs := Path("/proc/self/clear_refs")).exists():
        refs.write_text("5")  # Linux: the peak of the resident memory begins anew


def peak_gib(device: torch.device) -> float:
    """Peak memory since `reset_peak`: the GPU's, or all that the process holds; off Linux, since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    try:
        import resource
    except ImportError:  # Windows, which does not say
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def draw(
    case: Case, rule: RuleSettings, walk: WalkSettings, networks: Networks, targets: Targets, folder: Path, same: dict
) -> dict:
    """Draw and save the images of a case that are not there yet; its costs.

    The record beside the folder says which are there; it is written after every batch.
    """
    guidance, prior = replace(rule, guidance=case.method).build(case.steps), Counted(networks.prior)
    file = folder.parent / f"{folder.name}.json"
    record = {"settings": same, "names": [], "batches": 0, "evaluations": 0, "gradients": 0, "seconds": 0, "memory": 0}
    if file.is_file():
        record = read_json(file)
        check_settings(record["settings"], same, folder, otherwise="take another --out")
    parts = [slice(i, i + walk.batch_size) for i in range(0, len(targets.names), walk.batch_size)]
    parts = [part for part in parts if not set(targets.names[part]) <= set(record["names"])]
    total = evaluations(prior, guidance, case.steps, **walk.travel) * len(parts)
    with tqdm(total=total, desc=case.name, unit="step", leave=False, dynamic_ncols=True) as bar:
        for part in parts:
            names, target = targets.names[part], targets.logits[part].to(networks.device)
            reset_peak(networks.device)
            prior.evaluations = prior.gradients = 0
            started = time.perf_counter()
            images = sample(
                prior,
                [image_generator(walk.seed, name) for name in names],
                networks.device,
                networks.operator,
                target,
                guidance,
                steps=case.steps,
                eta=walk.eta,
                clip_x0=walk.clip_x0,
                on_step=lambda *_: bar.update(),
                **walk.travel,
            )
            pictures = as_saved(images)[0].cpu()
            record["seconds"] += time.perf_counter() - started
            record["memory"] = max(record["memory"], peak_gib(networks.device))
            for key, count in (("batches", 1), ("evaluations", prior.evaluations), ("gradients", prior.gradients)):
                record[key] += count
            for name, image in zip(names, pictures, strict=True):
                save_image(image, folder / f"{name}.png")
            record["names"] += [name for name in names if name not in record["names"]]
            write_json(file, record)
    costs = {key: record[key] / record["batches"] for key in ("evaluations", "gradients")}
    return costs | {"seconds": record["seconds"] / len(record["names"]), "memory": record["memory"]}


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
        from torchmetrics.image.fid import NoTrainInceptionV3

        self.network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])

    def forward(self, x: Tensor) -> Tensor:
        return self.network(((x + 1) * 127.5).round().to(torch.uint8))


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
            log.info("no Inception (%s): KID and FID on the judge's features", reason)
    if networks.judge is None:
        log.info("no judge either: no KID and FID")
        return None, "none"
    return JudgeFeatures(networks.judge), "judge"


@torch.no_grad()
def seen(network: nn.Module | Callable, images: Tensor, device: torch.device, size: int = 50) -> Tensor:
    """What a network says of many images, on the CPU."""
    return torch.cat([network(part.to(device)).float().cpu() for part in images.split(size)])


def kid(fake: Tensor, real: Tensor) -> float:
    """Kernel Inception distance, times 100: the unbiased squared MMD of the cubic kernel (Binkowski et al. 2018).

    torchmetrics' own estimator takes sets of one size only.
    """
    from torchmetrics.image.kid import poly_kernel

    fake, real = fake.double(), real.double()
    within = [(k.sum() - k.diag().sum()) / (len(k) * (len(k) - 1)) for k in (poly_kernel(f, f) for f in (fake, real))]
    return 100 * (within[0] + within[1] - 2 * poly_kernel(fake, real).mean()).item()


def fid(fake: Tensor, real: Tensor) -> float:
    """Fréchet Inception distance (Heusel et al. 2017)."""
    from torchmetrics.image.fid import _compute_fid

    (m1, c1), (m2, c2) = ((f.double().mean(0), torch.cov(f.double().T)) for f in (real, fake))
    return _compute_fid(m1, c1, m2, c2).item()


# --- Figures with their intervals ------------------------------------------------------------------------------------


def bootstrap(of: Callable[[Tensor], float], count: int, draws: int = DRAWS) -> tuple[float, float, float]:
    """A figure of ``count`` images, given their indices, with its 95 % interval: images drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([of(torch.randint(count, (count,), generator=generator)) for _ in range(draws)])
    low, high = values.double().nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return of(torch.arange(count)), low, high


def halves(of: Callable[[Tensor], float], count: int, draws: int = 50) -> tuple[float, float, float]:
    """The same from halves of the images, which vary as the whole does (Shao and Wu 1989, the delete-d jackknife).

    For KID and FID, to which an image that is there twice looks like a perfect match.
    """
    value, generator = of(torch.arange(count)), torch.Generator().manual_seed(0)
    if count < 4:
        return value, float("nan"), float("nan")
    spread = torch.tensor([of(torch.randperm(count, generator=generator)[: count // 2]) for _ in range(draws)]).std()
    return value, value - 1.96 * spread.item(), value + 1.96 * spread.item()


@dataclass
class Measured:
    """What is known of the inputs, and measures pictures against it."""

    networks: Networks
    targets: Targets
    inputs: Tensor | None
    features: nn.Module | None
    reference: Tensor | None
    lpips: nn.Module | None
    edits: dict[int, tuple[float, bool]]

    def of(self, pictures: Tensor, judged: Tensor | None) -> dict[str, tuple[float, float, float]]:
        """The figures of pictures (N, 3, S, S) against targets; ``judged`` (N, d) are the judge's."""
        device, count, found = self.networks.device, len(pictures), {}

        def mean(name: str, values: Tensor) -> None:
            found[name] = bootstrap(lambda i: values[i].mean().item(), count)

        def balanced(name: str, logits: Tensor, labels: Tensor) -> None:
            found[name] = bootstrap(
                lambda i: balanced_accuracy_by_attribute(logits[i], labels[i]).nanmean().item(), count, 200
            )

        g = seen(self.networks.operator.A, pictures, device)
        mean("g", agreement(g, self.targets.logits))
        balanced("g_balanced", g, (self.targets.logits > 0).float())
        mean("error", prob_error(g, self.targets.logits))
        if judged is not None:
            said = seen(self.networks.judge, pictures, device)
            mean("judge", agreement(said, judged))
            balanced("judge_balanced", said, (judged > 0).float())
            if self.edits:
                others = [i for i in range(judged.shape[1]) if i not in self.edits]
                edited = list(self.edits)
                mean("edited", agreement(said[:, edited], judged[:, edited]))
                mean("changed", 1 - agreement(said[:, others], judged[:, others]))
        if self.features is not None and self.reference is not None:
            fake = seen(self.features, pictures, device)
            found["kid"] = halves(lambda i: kid(fake[i], self.reference), count)
            if isinstance(self.features, InceptionFeatures):
                found["fid"] = halves(lambda i: fid(fake[i], self.reference), count, 10)
        if self.inputs is not None and not torch.equal(pictures, self.inputs):
            mean("psnr", psnr(pictures, self.inputs))
            if self.lpips is not None:
                pairs = zip(pictures.split(50), self.inputs.split(50), strict=True)
                with torch.no_grad():
                    mean("lpips", torch.cat([self.lpips(a.to(device), b.to(device)).cpu() for a, b in pairs]).flatten())
        return found


# --- The table -------------------------------------------------------------------------------------------------------


def shown(column: str, row: dict) -> str:
    """A figure with its interval, as the table has it."""
    value, digits = row.get(column), COLUMNS[column][1]
    if value is None:
        return ""
    if row.get(f"{column}_low") is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({row[f'{column}_low']:.{digits}f} to {row[f'{column}_high']:.{digits}f})"


def markdown(rows: Sequence[dict], note: str) -> str:
    columns = [column for column in COLUMNS if any(row.get(column) is not None for row in rows)]
    lines = [
        "| method | " + " | ".join(COLUMNS[column][0] for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += ["| " + " | ".join([row["method"], *(shown(column, row) for column in columns)]) + " |" for row in rows]
    return "\n".join(lines) + f"\n\n{note}\n"


def flat(name: str, figures: dict, costs: dict) -> dict:
    row: dict = {"method": name}
    for column in COLUMNS:
        value, *interval = figures.get(column, (costs.get(column),))
        row[column] = value
        if column not in ("evaluations", "gradients", "seconds", "memory"):
            row[f"{column}_low"], row[f"{column}_high"] = interval if interval else (None, None)
    return json_values(row)


def pictures_of(folder: Path, names: Sequence[str], size: int) -> Tensor:
    return torch.stack([load_image(folder / f"{name}.png", size) for name in names])


def main(argv: Sequence[str] | None = None) -> int:
    kinds = (Evaluation, NetworkSettings, TargetSettings, RuleSettings, WalkSettings)
    ignored = ("base_rate", "image_folder", "ni", "published_rule")  # of presets, for DDNM/main.py
    e, weights, what, rule, walk, others = parse(
        __doc__, *kinds, argv=argv, extra=(*PRESET_ONLY, *ignored), presets=CONFIGS
    )
    cases = [Case.of(m, n, edit) for edit in e.edits or (None,) for n in e.steps for m in e.methods]
    cases = list(dict.fromkeys(cases))
    for case in cases:
        replace(rule, guidance=case.method).build(case.steps)  # refuses what it does not know
    architecture = {key: value for key, value in others.items() if key in PRESET_ONLY}
    check_architecture(architecture)
    with locked(e.out):
        return evaluate(e, weights, what, rule, walk, architecture, cases)


def evaluate(
    e: Evaluation, weights: NetworkSettings, what: TargetSettings, rule: RuleSettings, walk: WalkSettings,
    architecture: dict, cases: Sequence[Case],
) -> int:  # fmt: skip
    """Draw what is not drawn yet, measure everything, write the table; the exit status."""
    device = resolve_device(weights.device)
    networks = load_networks(weights, architecture, device)
    size = networks.spnn.img_size
    typical = networks.spnn.notes.get("typical_logits")
    edits = {case.edit: parse_set([case.edit], networks.attributes, typical) for case in cases if case.edit}
    plain_targets = read_targets(what, networks, walk.batch_size, most=e.count)
    for case in cases:
        guidance = replace(rule, guidance=case.method).build(case.steps)
        guidance.towards(networks.operator, plain_targets.logits[:1].to(device))  # refuses what does not fit
        try:
            evaluations(networks.prior, guidance, case.steps, **walk.travel)
        except ValueError as error:
            raise InputError(f"--steps {case.steps}: {error}") from None
    log = get_logger("evaluate", e.out)
    for line in plain_targets.skipped:
        log.warning("skipped: %s", line)
    features, seen_by = load_features(e.features, networks, log)
    inputs = None
    if plain_targets.files is not None:
        inputs = torch.stack(plain_targets.inputs(slice(None), size))
    reference = None
    if features is not None and (e.reference is not None or inputs is not None):
        of = inputs if e.reference is None else torch.stack([load_image(p, size) for p in find_images(e.reference)])
        reference = seen(features, of, device)
    lpips = load_lpips(device, log, size) if e.lpips and inputs is not None else None
    measured = Measured(networks, plain_targets, inputs, features, reference, lpips, {})

    settings = to_json_values(asdict(rule) | asdict(walk) | asdict(what) | networks.fingerprints())
    rows, shelf = [], []
    if inputs is not None:
        rows.append(flat("inputs", measured.of(inputs, plain_targets.logits if networks.judge else None), {}))
        shelf.append(("inputs", inputs))
    for case in cases:
        targets, folder = edited(plain_targets, edits.get(case.edit, {})), e.out / "pictures" / case.folder
        costs = draw(case, rule, walk, networks, targets, folder, settings)
        pictures = pictures_of(folder, targets.names, size)
        measured.targets, measured.edits = targets, edits.get(case.edit, {})
        rows.append(flat(case.name, measured.of(pictures, targets.judged), costs))
        shelf.append((case.name, pictures))
        log.info("%s", ", ".join(f"{COLUMNS[c][0]} {shown(c, rows[-1])}" for c in COLUMNS if shown(c, rows[-1])))
        reference_is = f"{len(reference) if reference is not None else 0} pictures"
        note = (f"{len(targets.names)} images, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
                f"KID and FID on {seen_by} features against {reference_is}.")  # fmt: skip
        write_table(e.out, rows, shelf, note, settings, e.sheet)  # so that a stop costs nothing
    print((e.out / "table.md").read_text(encoding="utf-8"))
    return 0


def edited(targets: Targets, edits: dict[int, tuple[float, bool]]) -> Targets:
    """Targets with edits of their own."""
    judged = None if targets.judged is None else targets.judged.clone()
    targets = replace(targets, logits=targets.logits.clone(), judged=judged)
    for index, (logit, present) in edits.items():
        targets.logits[:, index] = logit
        if judged is not None:
            judged[:, index] = 1.0 if present else -1.0
    return targets


def write_table(
    folder: Path, rows: Sequence[dict], shelf: Sequence[tuple[str, Tensor]], note: str, settings: dict, columns: int
) -> None:
    """table.csv, .json and .md, and sheet.png."""
    write_csv(folder / "table.csv", rows)
    write_json(folder / "table.json", {"settings": settings, "note": note, "rows": rows})
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(markdown(rows, note), encoding="utf-8")
    faces = [[picture(image, 96) for image in pictures[:columns]] for _, pictures in shelf]
    contact_sheet(folder / "sheet.png", [], faces, [name for name, _ in shelf])


if __name__ == "__main__":
    run_command(main)
