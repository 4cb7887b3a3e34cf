"""Peak memory of a training step, from shapes alone: no GPU and none of that memory is needed.

    python benchmarks/peak_memory.py
    python benchmarks/peak_memory.py --img_size 256 --batch_size 256 --stages 1 --json benchmarks/results/memory.json

A step (losses, backward, Adam) runs on tensors that have shapes and no values, and every storage is counted from the
operator that makes it to the moment that nothing refers to it. What a device adds is not in it: the workspaces of
convolutions, an allocator's gaps, the context. ``torch.cuda.max_memory_allocated`` is what to compare with.
"""

import sys
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.speed import stage_losses
from logger import format_table
from models import SPNN
from train import Settings, adam, backward
from utils import option, parse, run_command, write_json

CPU = torch.device("cpu")


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operators make inside the block.

    Attributes:
        now: bytes alive.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if storage not in self._known:
                self._known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result


def two_steps(stage: int, model: SPNN, batch: int, precision: str) -> None:
    """Two steps of a stage, as `train.CelebATrainer` takes them: Adam's state is there in the second."""
    settings = Settings(precision=precision)
    x, labels = torch.rand(batch, *model.pinn.in_shape), torch.rand(batch, model.num_classes)
    losses_of = stage_losses(stage, model, x, labels, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adam(trained, settings.lr, CPU)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        backward(losses_of, precision, CPU)
        nn.utils.clip_grad_norm_(trained, settings.grad_clip)
        optimizer.step()


def peak_gib(stage: int, size: int, batch: int, precision: str, recompute: bool, hidden: int) -> float:
    """Of two steps."""
    with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory:
        model = SPNN(img_size=size, hidden=hidden).train()
        if recompute:
            model.pinn.checkpoint_activations = True
        two_steps(stage, model, batch, precision)
        return memory.peak / 2**30


@dataclass(frozen=True)
class Options:
    """What is counted."""

    stages: tuple[int, ...] = option((1, 2), "of training", choices=(1, 2))
    img_size: int = option(256, "of images", choices=(32, 64, 256))
    batch_size: tuple[int, ...] = option((64, 256), "images per step", 1)
    precisions: tuple[str, ...] = option(
        ("float32", "bf16"), "of the networks inside blocks; tf32 takes what float32 takes",
        choices=("float32", "bf16"),
    )  # fmt: skip
    hidden: int = option(128, "width of the networks", 1)
    json: Path | None = option(None, "also write the figures there")


def main(argv: Sequence[str] | None = None) -> int:
    o, _ = parse(__doc__, Options, argv=argv)
    columns = {"kept": ("peak, GiB", ".1f"), "recomputed": ("with --checkpoint_activations", ".1f")}
    rows = []
    for stage, batch, precision in product(o.stages, o.batch_size, o.precisions):
        peaks = [peak_gib(stage, o.img_size, batch, precision, recompute, o.hidden) for recompute in (False, True)]
        what = f"stage {stage}, {o.img_size}x{o.img_size}, batch {batch}, {precision}"
        rows.append({"what": what, **dict(zip(columns, peaks, strict=True))})
    print(f"torch {torch.__version__}, from shapes\n{format_table(rows, 'what', columns)}")
    if o.json is not None:
        write_json(o.json, {"torch": torch.__version__, "settings": asdict(o), "rows": rows})
    return 0


if __name__ == "__main__":
    run_command(main)
