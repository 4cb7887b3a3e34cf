"""A network whose output is a map: the classes of a face's parts, and faces from such maps alone.

    python procedural_faces.py --out data/faces_masks --count 3000 --size 64 --masks
    python experiments/segmentation.py --dataset_path data/faces_masks --out segmentation \\
        --prior DDNM/exp/logs/faces/prior

The chain ends at (19, S/4, S/4) logits instead of a vector, and everything else stays: g(g'(y)) = y for every map. A
map of classes stands for the logits y that are `SURE` higher at each place's class; training is that of
train_operator.py, with cross entropy against softmax(y) as the loss. Then faces are drawn from the test split's maps
alone, by the frozen prior steered by g, and judged by the map that an ordinary network sees in them, trained beside
(``judge``), which steers nothing. Back-projection goes to the nearest logits that say the map, not to y itself: see
`leading`. Writes diagnostics.json, table.json, table.md and sheet.png.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import read_weights, write_weights
from data_loader import MASK_CLASSES, augmented, first_items
from DDNM.guided_diffusion.guidance import NLBP, Gradient, Switched, Unguided
from DDNM.guided_diffusion.results import write_report
from diagnostics import confusion, diagnose, format_report, iou_by_class
from loop import Run, open_run
from metrics import mean_of
from networks import conv, down, located, up
from operators import Move, SPNNOperator
from procedural_faces import MASK_COLOURS
from train_operator import LEFT, Fit, Restoring, build, drawn, fit, prepare, run_stage
from utils import option, parse, run_command, write_json

CLASSES = len(MASK_CLASSES)
SURE = 5.0  # by how much the logit of a map's class is above the others, if a map is put into logits
LEAD = 2.0  # by how much at least, if a picture is moved to a map
JUDGE = "map_judge.safetensors"


@dataclass(frozen=True)
class Options:
    """Faces and maps."""

    dataset_path: Path = option(..., "folder of faces with masks, see data_loader.py")
    out: Path = option(..., "folder for weights, tables and pictures")
    size: int = option(64, "side of the images; that of the maps is a quarter", 16, 1024)
    judge_steps: int = option(1000, "of the judge's training", 1)


@dataclass(frozen=True)
class Drawing(Restoring):
    """Faces from maps alone."""

    max_move: float = option(0.06, "nlbp: largest root mean square move of a step; 0: no limit", 0)
    stop: float = option(0.0, "nlbp: none this near to y", 0)


def leading(y: Tensor, classes: Tensor, by: float = LEAD) -> Tensor:
    """The logits nearest to y, (B, K, H, W), in which ``classes``, (B, H, W), lead by at least ``by``.

    A map says which class is largest, not what the logits are: they hold as many numbers as 40 % of the picture does,
    and of a real face none that a rule could make up. Moved to `logits_of` its own map exactly, a face leaves
    the range of pictures by a multiple; moved to these, hardly anything changes.
    """
    index = classes[:, None]
    own = y.gather(1, index)  # (B, 1, H, W)
    rivals = (y + by).scatter(1, index, -torch.inf).sort(1, descending=True).values[:, :-1]  # (B, K - 1, H, W)
    count = torch.arange(2, y.shape[1] + 1, device=y.device).view(-1, 1, 1)
    # the class meets those rivals that are above their common mean there: adding any other one lowers the mean
    level = torch.cat([own, (own + rivals.cumsum(1)) / count], dim=1).amax(1, keepdim=True)
    return torch.minimum(y, level - by).scatter(1, index, level)


class ClassOperator(SPNNOperator):
    """An SPNN whose output is a map of classes: probabilities are softmax(y) at each place.

    ``distance`` is the mean total variation between them, in [0, 1]; ``loss`` the cross entropy, a mean over places.
    Back-projection reaches the nearest logits whose classes are those of y, see `leading`.
    """

    def towards(self, y: Tensor) -> Callable[[Tensor], Move]:
        classes = y.argmax(1)
        return lambda x: super(ClassOperator, self).towards(leading(self.A(x), classes))(x)

    def distance(self, y1: Tensor, y2: Tensor) -> Tensor:
        return (y1.softmax(1) - y2.softmax(1)).abs().sum(1).flatten(1).mean(1) / 2

    def loss(self, y1: Tensor, y2: Tensor) -> Tensor:
        return F.cross_entropy(y1, y2.softmax(1), reduction="none").flatten(1).mean(1)


def logits_of(masks: Tensor) -> Tensor:
    """(B, 19, H, W): logits that say these masks (B, H, W), and nothing else of a face."""
    return SURE * (F.one_hot(masks, CLASSES).movedim(-1, 1) - 1 / CLASSES)


def smaller(masks: Tensor) -> Tensor:
    """Masks (B, S, S) at (B, S/4, S/4), by nearest neighbours."""
    return masks[:, 2::4, 2::4]


def pair(x: Tensor, masks: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Faces and the logits of their maps, from faces and masks (B, S, S), both moved alike by ``augmented``."""
    if strength:
        both = augmented(torch.cat([x, 2.0 * F.one_hot(masks, CLASSES).movedim(-1, 1) - 1], dim=1), strength)
        x, masks = both[:, :3], both[:, 3:].argmax(1)
    return x, logits_of(smaller(masks))


def judge_network() -> nn.Module:
    """An ordinary network from images to logits of maps: (B, 3, S, S) -> (B, 19, S/4, S/4)."""
    layers = [located(3, 32), down(32, 64), down(64, 96), conv(96, 96), down(96, 128), conv(128, 128), up(128, 96),
              conv(96, 96), conv(96, CLASSES)]  # fmt: skip
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]


def trained_judge(run: Run, loaders, pairs, s: Fit, steps: int) -> nn.Module:
    """The judge, of the run's folder or trained now."""
    network, file = judge_network().to(run.device), run.folder / JUDGE

    def losses(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"total": F.cross_entropy(network(x).float(), y.softmax(1))}

    if run.stage in (None, "judge"):
        run_stage(run, s, "judge", network, loaders, pairs, losses, lambda: write_weights(file, network.state_dict()),
                  steps=steps, lr=2 * s.lr)  # fmt: skip
    network.load_state_dict(read_weights(file))
    return network.eval().requires_grad_(False)


# --- Faces from maps -------------------------------------------------------------------------------------------------


def coloured(masks: Tensor) -> Tensor:
    """Maps (B, H, W) as pictures (B, 3, H, W)."""
    colours = torch.tensor(MASK_COLOURS, device=masks.device).view(-1, 3) / 127.5 - 1
    return colours[masks].movedim(-1, 1)


def legend(width: int) -> Image.Image:
    """The colours of the classes with their names."""
    page, columns = Image.new("RGB", (width, 56), "white"), -(-CLASSES // 2)
    draw = ImageDraw.Draw(page)
    for index, name in enumerate(MASK_CLASSES):
        x, y = 16 + index % columns * (width - 24) // columns, 4 + index // columns * 24
        draw.rectangle((x, y, x + 14, y + 14), fill=tuple(MASK_COLOURS[3 * index : 3 * index + 3]), outline="grey")
        draw.text((x + 18, y + 1), name, "black")
    return page


@torch.no_grad()
def reconstruct_faces(
    operator: ClassOperator, judge: nn.Module, loaders, o: Options, s: Fit, r: Drawing, run: Run
) -> None:
    """Draw faces from the maps of test images; write the table and the sheet."""
    x, masks = first_items(loaders.test, r.count)
    maps = smaller(masks)
    y, gradient = logits_of(maps), Gradient(0.03)
    nlbp = NLBP(nlbp_stop_cond=r.stop, max_move=r.max_move or None, last_bp_step=400)  # the prior finishes, or the rule
    rules = {"unguided": Unguided(), "NLBP": nlbp, "gradient": gradient,
             "NLBP, then gradient": Switched(nlbp, gradient, switch=400)}  # fmt: skip
    pictures, seconds = drawn({name: (operator, rule) for name, rule in rules.items()}, y, r, s.precision, run)
    pictures = {"real": x, "g'(map)": operator.pinv(y).clamp(-1, 1), **pictures}
    rows: dict[str, dict] = {}
    seen: dict[str, Tensor] = {}
    for name, images in pictures.items():
        rows[name] = {"s/image": seconds.get(name)}
        for who, network in {"judge": judge, "g": operator.A}.items():
            seen[f"{who} sees, {name}"] = guess = network(images).argmax(1)  # (N, S/4, S/4)
            iou = iou_by_class(confusion(guess, maps, CLASSES))  # (classes,)
            right = (guess == maps).flatten(1).float().mean(1)
            rows[name] |= {f"mIoU, {who}": iou.nanmean().item(), f"places, {who}": mean_of(right)}
    best = "NLBP, then gradient"
    columns = {"map": coloured(maps), "face": pictures[best]}
    columns |= {f"{who} sees": coloured(seen[f"{who} sees, {best}"]) for who in ("g", "judge")}
    columns |= {"NLBP alone": pictures["NLBP"], "g'(map)": pictures["g'(map)"], "unguided": pictures["unguided"]}
    write_report(run.folder, rows, columns, {**asdict(o), **asdict(r)}, legend(len(columns) * 144 + 16))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see ``--help``."""
    o, s, r, _ = parse(__doc__, Options, Fit, Drawing, argv=argv)
    with open_run(o.out, s.device, save_every=500, seed=s.seed) as run:
        loaders = prepare(run, s, o.dataset_path, o.size, {"size": o.size, "judge_steps": o.judge_steps}, o.size)
        shapes = (3, o.size, o.size), (CLASSES, o.size // 4, o.size // 4)
        operator = ClassOperator(build(*shapes, s.hidden).to(run.device))
        run.begin("segmentation", {**asdict(o), **asdict(s)}, LEFT)

        def pairs(x: Tensor, masks: Tensor, training: bool) -> tuple[Tensor, Tensor]:
            return pair(x, masks, s.augment if training else 0.0)

        judge = trained_judge(run, loaders, pairs, s, o.judge_steps)
        fit(operator, loaders, pairs, s, run, {"classes": list(MASK_CLASSES)})
        if run.world.leads:
            tests = ((x, smaller(masks)) for x, masks in loaders.test)
            report = diagnose(operator.model, tests, run.device, attributes=MASK_CLASSES)
            print(format_report(report))
            write_json(run.folder / "diagnostics.json", report)
            if r.prior is not None:
                reconstruct_faces(operator, judge, loaders, o, s, r, run)
        run.world.wait()
    return 0


if __name__ == "__main__":
    run_command(main)
