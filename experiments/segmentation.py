"""A network whose output is a map: the classes of a face's parts, and faces from such maps alone.

    python procedural_faces.py --out data/faces_masks --count 4000 --size 64 --masks
    python experiments/segmentation.py --data data/faces_masks --out segmentation

The chain ends at (19, S/4, S/4) logits instead of a vector, and everything else stays: g(g'(y)) = y for every map.
Trained by cross entropy and, as in stage 1, on its own pseudo-inverse: on g'(g(x)), and on g' of the mask alone, since
a map has room for the picture too. Prints and writes the intersection over union (IoU) of each class on the test
split, beside that of a constant guess, the commonest class of each place, and a sheet: faces, their masks, what g
sees, g' of that, and g' of the mask alone.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from blocks import ConvPINNBlock, PixelUnshuffleBlock, solved_once
from data_loader import MASK_CLASSES, FaceLoader, batches_from, make_loaders
from images import grid, save_image
from models import PINN
from procedural_faces import MASK_COLOURS
from utils import option, parse, resolve_device, run_command, seed_everything, write_json

CLASSES = len(MASK_CLASSES)
SURE = 8.0  # by how much the logit of a mask's class is above the others


@dataclass
class Settings:
    """Settings."""

    data: Path = option(..., "folder of faces with masks, see data_loader.py")
    out: Path = option(..., "folder for table, sheet and weights")
    size: int = option(64, "side of the images; that of the maps is a quarter", 16, 1024)
    minutes: float = option(10.0, "of training", 0.0)
    steps: int | None = option(None, "stop after this many steps", 1)
    batch_size: int = option(32, "images at once", 1)
    hidden: int = option(48, "width of the coupling networks", 1)
    lr: float = option(1e-3, "of Adam", 0.0)
    lambda_img_rec: float = option(10.0, "weight of |g'(y) - x|^2 beside the cross entropy", 0.0)
    lambda_mask_rec: float = option(10.0, "weight of the same with the logits of x's mask in place of y", 0.0)
    seed: int = option(0, "of weights and batches", 0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")


def build(size: int, hidden: int) -> PINN:
    """(3, S, S) -> (19, S/4, S/4)."""
    settings = {"hidden": hidden, "scale_bound": 1.0}
    return PINN(
        [
            PixelUnshuffleBlock(2),  # (12, S/2, S/2)
            ConvPINNBlock(12, 9, feat_size=size // 2, **settings),  # (9, S/2, S/2)
            PixelUnshuffleBlock(2),  # (36, S/4, S/4)
            ConvPINNBlock(36, 28, feat_size=size // 4, **settings),
            ConvPINNBlock(28, 22, feat_size=size // 4, **settings),
            ConvPINNBlock(22, CLASSES, feat_size=size // 4, **settings),  # (19, S/4, S/4)
        ],
        (3, size, size),
    )


def logits_of(masks: Tensor) -> Tensor:
    """(B, 19, H, W): logits that say these masks (B, H, W), and nothing else of a face."""
    return SURE * (F.one_hot(masks, CLASSES).movedim(-1, 1) - 1 / CLASSES)


def train(g: PINN, loader: FaceLoader, s: Settings) -> int:
    """Cross entropy and image losses until the time or the steps are over; returns the steps."""
    optimizer = torch.optim.Adam(g.parameters(), s.lr)
    end, done = time.monotonic() + 60 * s.minutes, 0
    with tqdm(total=s.steps, unit="step", disable=None) as bar:
        for _, (x, masks) in batches_from(loader, 0):
            if time.monotonic() > end or done == s.steps:
                return done
            with solved_once():
                y = g(x)  # (B, 19, H, W)
                entropy, image = F.cross_entropy(y, masks), F.mse_loss(g.pinv(y), x)
                alone = F.mse_loss(g.pinv(logits_of(masks)), x)  # or g hides the picture in its logits
                (entropy + s.lambda_img_rec * image + s.lambda_mask_rec * alone).backward()
            torch.nn.utils.clip_grad_norm_(g.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            bar.update()
            if done % 20 == 0:  # not after each step: a GPU would be waited for
                bar.set_postfix(cross_entropy=entropy.item(), image=image.item(), alone=alone.item())
    return done


class IoU:
    """Intersection and union of each class, summed over maps."""

    def __init__(self) -> None:
        self.table = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)  # truth x guess

    def add(self, guess: Tensor, truth: Tensor) -> None:
        """Maps (B, H, W) of classes."""
        pairs = (truth * CLASSES + guess).flatten().cpu()
        self.table += torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES)

    def by_class(self) -> Tensor:
        """(19,): the intersection of truth and guess over their union; NaN for a class that is in neither."""
        both = self.table.diag().double()
        return both / (self.table.sum(0) + self.table.sum(1) - both)


@torch.no_grad()
def commonest(loader: FaceLoader) -> Tensor:
    """(H, W): the class that each place has most often."""
    counts = sum(F.one_hot(masks, CLASSES).sum(0) for _, masks in loader)
    return counts.argmax(-1)


def coloured(masks: Tensor, size: int) -> Tensor:
    """Maps (B, H, W) as pictures (B, 3, size, size)."""
    colours = torch.tensor(MASK_COLOURS, device=masks.device).view(-1, 3) / 127.5 - 1
    return F.interpolate(colours[masks].movedim(-1, 1), size=size)


@torch.no_grad()
def sheet(g: PINN, loader: FaceLoader, size: int) -> Tensor:
    """Rows of eight: faces, masks, what g sees, g' of it, g' of the mask."""
    x, masks = (part[:8] for part in next(iter(loader)))
    y = g(x)
    rows = [x, coloured(masks, size), coloured(y.argmax(1), size), g.pinv(y), g.pinv(logits_of(masks))]
    return grid(torch.cat(rows), len(x))


def main(argv: list[str] | None = None) -> int:
    """The command; see ``--help``."""
    (s, _) = parse(__doc__, Settings, argv=argv)
    device = resolve_device(s.device)
    seed_everything(s.seed)
    loaders = make_loaders(s.data, s.size, s.batch_size, seed=s.seed, device=device, mask_size=s.size // 4)
    g = build(s.size, s.hidden).to(device)
    steps = train(g, loaders.train, s)
    g.eval()
    with torch.no_grad(), solved_once():
        constant, seen, guessed, returned = commonest(loaders.val), IoU(), IoU(), 0.0
        for x, masks in loaders.test:
            y = g(x)
            seen.add(y.argmax(1), masks)
            guessed.add(constant.expand_as(masks), masks)
            returned = max(returned, (g(g.pinv(y)) - y).abs().max().item())
        picture = sheet(g, loaders.test, s.size)
    rows = {"mean": (seen.by_class().nanmean(), guessed.by_class().nanmean())}
    rows |= dict(zip(MASK_CLASSES, zip(seen.by_class(), guessed.by_class(), strict=True), strict=True))
    print(f"{steps} steps; |g(g'(y)) - y| at most {returned:.1e}\n{'IoU':12}      g  constant")
    for name, (ours, base) in rows.items():
        print(f"{name:12} {ours:6.3f}  {base:8.3f}")
    s.out.mkdir(parents=True, exist_ok=True)
    save_image(picture, s.out / "sheet.png")
    torch.save(g.state_dict(), s.out / "g.pth")
    figures = {name: {"g": float(ours), "constant": float(base)} for name, (ours, base) in rows.items()}
    write_json(s.out / "iou.json", {"steps": steps, "right_inverse": returned, "iou": figures})
    return 0


if __name__ == "__main__":
    run_command(main)
