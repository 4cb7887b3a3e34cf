"""Several processes that work as one: ``torchrun`` starts them, each takes its share. One process is the case of one.

torchrun --nproc_per_node 4 train_celeba.py --is_forward_train --is_r_opt
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from utils import InputError, resolve_device

T = TypeVar("T")


class _Losses(nn.Module):
    """A loss as a module, which is what `DistributedDataParallel` wraps: its forward is g and g' together."""

    def __init__(self, model: nn.Module, losses_of: Callable[..., dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.losses_of = model, losses_of

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        return self.losses_of(*batch)


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one among them.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of ``items``: every size-th."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Go on when all are here."""
        if self.size > 1:
            distributed.barrier()

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run the block in the leading process, then in the others: they find what it has made."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def gather(self, value: T) -> list[T]:
        """The ``value`` of every process, in order."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The means over the processes of some numbers, which every process has."""
        if self.size == 1:
            return values
        together = torch.stack(list(values.values()))
        distributed.all_reduce(together)
        return dict(zip(values, together / self.size, strict=True))

    def agreed(self, stopped: Callable[[], int | None]) -> Callable[[], int | None]:
        """``stopped``, answered alike everywhere: as soon as one process was asked to stop, all are."""

        def ask() -> int | None:  # after every step: one number, where `gather` would pickle and send twice
            gpu = distributed.get_backend() == "nccl"
            signum = torch.tensor(stopped() or 0, device=torch.cuda.current_device() if gpu else None)
            distributed.all_reduce(signum, distributed.ReduceOp.MAX)
            return signum.item() or None

        return ask if self.size > 1 else stopped

    def parallel(
        self, model: nn.Module, losses_of: Callable[..., dict[str, Tensor]], all_used: bool = True
    ) -> Callable[..., dict[str, Tensor]]:
        """``losses_of`` of this process's part of a batch, with gradients that are averaged over all of them.

        Args:
            model: whose parameters with ``requires_grad`` the losses depend on.
            all_used: whether every one of them has a part in the losses.
        """
        if self.size == 1:
            return losses_of
        device = next(model.parameters()).device
        return nn.parallel.DistributedDataParallel(
            _Losses(model, losses_of),
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=not all_used,
        )


@contextmanager
def world(device: str) -> Iterator[tuple[World, torch.device]]:
    """The run that this process belongs to, from the variables that ``torchrun`` sets, and the device it works on.

    Args:
        device: as in `utils.resolve_device`; "auto" and "cuda" become one GPU a process.

    Raises:
        InputError: more processes on a machine than GPUs, or a device that they would share.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(), resolve_device(device)
        return
    local = int(os.environ["LOCAL_RANK"])
    own = resolve_device(device)
    if own.type == "cuda":
        if device not in ("auto", "cuda"):
            raise InputError(f"--device {device}: {size} processes cannot share it; give cuda")
        if local >= torch.cuda.device_count():
            raise InputError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    distributed.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield World(distributed.get_rank(), size), own
    finally:
        distributed.destroy_process_group()
