"""The one training loop, and what a run needs to survive being stopped at any moment.

A training hands `Loop` a step: a function of a batch that changes the weights and returns its losses. The loop counts
steps, sets the learning rate, fills the table, has the weights measured and the best ones kept, saves states, stops
if a signal asks it to, and goes on from a state as if nothing had happened. Several processes, started by
``torchrun``, work as one; one process is the case of one.
"""

import copy
import hashlib
import logging
import math
import os
import platform
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from checkpoints import read_object, write_object
from logger import MetricsTable, get_logger, plot_curves, tensorboard_events
from utils import InputError, Stopped, is_temporary, json_values, resolve_device, write_json

try:
    import fcntl
except ImportError:  # Windows has no such locks: nothing there keeps a second run out of a folder
    fcntl = None

STATE_NAME = "train_state.pth"
STATE_VERSION = 2  # of what a state file holds
LOCK_NAME = ".lock"
MEETING = timedelta(minutes=10)  # what processes have to find each other
T = TypeVar("T")
log = logging.getLogger(__name__)


# --- Signals ---------------------------------------------------------------------------------------------------------


@contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Turn SIGINT and SIGTERM into a question: the yielded function says which came. A second one acts at once."""
    received: list[int] = []

    def note(signum: int, frame: object) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}  # before one may come
    for signum in previous:
        signal.signal(signum, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


# --- State files -----------------------------------------------------------------------------------------------------


def save_state(path: Path, state: Mapping) -> None:
    """Write a training state, see `write_object`: the old file stands until the new one is complete on the disk."""
    write_object(path, {"version": STATE_VERSION, **state})


def load_state(path: Path) -> dict:
    """What `save_state` wrote. Raises InputError: as `read_object`, or one of another version."""
    state = read_object(path, "training state")
    if not isinstance(state, dict) or repr(state.get("version")) != repr(STATE_VERSION):  # tensors do not compare
        raise InputError(f"{path}: a state of another version of this command, or none; {START_ANEW}")
    return state


START_ANEW = "start anew with --overwrite, or in another folder"


def check_settings(saved: Mapping, given: Mapping, folder: Path, otherwise: str = START_ANEW) -> None:
    """A resumed run must be the run it resumes; ``otherwise`` says what to do if it is not meant to be.

    Raises:
        InputError: names the first setting in ``given`` that the run in ``folder`` has otherwise.
    """
    for key, value in given.items():
        has, value = saved.get(key), json_values(value)
        if has != value:
            raise InputError(f"the run in {folder} has {key} {has}, not {value}; give the same, or {otherwise}")


# --- The run's folder ------------------------------------------------------------------------------------------------


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or is not there; a killed run's lock and half-written files do not count."""
    return not folder.is_dir() or all(path.name == LOCK_NAME or is_temporary(path) for path in folder.iterdir())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other run out of ``folder``, which is made if need be, and goes again if nothing was written.

    The lock is the operating system's: it ends with the process, however that ends. It is a record lock (``lockf``):
    forks would inherit the other kind (``flock``), and outlive a killed run with it for seconds.

    Raises:
        InputError: another run holds it. OSError: the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK_NAME
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise InputError(f"{folder}: another run is writing there ({file.read().strip()})") from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): see to it that no other run writes there", folder, error)
        file.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
        try:
            yield
        finally:
            with suppress(OSError):  # the folder is not empty: there are results; or Windows, where the file is open
                path.unlink()
                for empty in made:
                    empty.rmdir()


# --- Processes -------------------------------------------------------------------------------------------------------


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
        self.largest(0)

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
        if self.size == 1 or not values:
            return values
        together = torch.stack(list(values.values()))
        distributed.all_reduce(together)
        return dict(zip(values, together / self.size, strict=True))

    def largest(self, number: float) -> float:
        """The largest of this number that a process has. It is on the CPU: no GPU is waited for."""
        if self.size == 1:
            return number
        together = torch.tensor(number, dtype=torch.float64)
        distributed.all_reduce(together, distributed.ReduceOp.MAX)
        return together.item()

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
def join_world(device: str) -> Iterator[tuple[World, torch.device]]:
    """The run that this process belongs to, from the variables that ``torchrun`` sets, and the device it works on.

    Args:
        device: as in `utils.resolve_device`; "auto" and "cuda" become one GPU per process.

    Raises:
        InputError: variables that are no torchrun's, processes that do not meet within `MEETING`, or a device that is
            not there or that they would share; inside, if another process of the run has ended: whatever one cannot do
            ends them all.
    """
    own = resolve_device(device)
    if os.environ.get("WORLD_SIZE", "") in ("", "1"):
        yield World(), own
        return
    if own.type == "cuda":
        if device not in ("auto", "cuda"):
            raise InputError(f"--device {device}: several processes cannot share it; give cuda")
        own = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', '')}")
        torch.cuda.set_device(own)
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=MEETING))
        # the others wait while one downloads, fills the cache or measures: NCCL's own 10 minutes are too few
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(hours=6))
    except (ValueError, RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0][:200]
        raise InputError(f"the processes of this run have not met: {said}; start them with torchrun") from None
    try:
        world = World(rank, size)
        world.wait()  # until all have met: who failed before would leave the others looking for it
        yield world, own
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise InputError("another process of this run has ended; what it said is the reason") from None
    finally:
        time.sleep(0.1)  # gloo's thread may still drop a tensor, for which it takes the GIL: a deadlock in torch 2.4
        distributed.destroy_process_group()


# what gloo says of a process that is gone
_LOST = re.compile("(closed|reset) by peer|Broken pipe", re.IGNORECASE)


# --- Averaged weights ------------------------------------------------------------------------------------------------


class Ema:
    """The moving average of a network's weights, ``ema <- d ema + (1 - d) model``; ``model`` is a network with them.

    d = min(decay, (1 + step) / (10 + step)): it forgets the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        average(list(self.model.parameters()), list(model.parameters()), None)


# --- Gradients -------------------------------------------------------------------------------------------------------


def adam(parameters: Iterable, lr: float, device: torch.device) -> torch.optim.AdamW:
    """The optimiser of every training here, of parameters or of `decaying` groups of them."""
    fused = device.type in ("cpu", "cuda")  # one pass over all weights instead of one per operation
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=0.0, fused=fused)


def decaying(module: nn.Module, weight_decay: float) -> list[dict]:
    """Groups of parameters for `adam`: convolutions' and matrices' weights shrink by lr times ``weight_decay`` a step.

    Biases, scales and the parameters of orthogonal mixing, whose size means nothing alike, do not. Source: Loshchilov
    and Hutter 2019, "Decoupled Weight Decay Regularization".
    """
    groups: tuple[list, list] = [], []
    for name, parameter in module.named_parameters():
        groups[parameter.ndim > 1 and ".mix." not in name].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False]}]


def clip_gradients(module: nn.Module, limit: float, loss: Tensor | None = None) -> Tensor:
    """Scale the gradients of what is trained of ``module`` to a norm of at most ``limit``; returns the norm they had.

    Args:
        loss: it and the norm must be finite; None asks for neither, and so waits for no GPU.

    Raises:
        FloatingPointError: names the first weight or gradient that is not finite. Nothing is scaled: that would spread
            NaN to all of them.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if loss is None or loss.isfinite():
        with suppress(RuntimeError):  # the norm is not finite
            return nn.utils.clip_grad_norm_(trained.values(), limit, error_if_nonfinite=loss is not None)
    gradients = {f"the gradient of {name}": p.grad for name, p in trained.items() if p.grad is not None}
    raise FloatingPointError(
        first_broken({f"weight {name}": p for name, p in trained.items()} | gradients)
        or "the loss, or the norm of gradients that are each finite"
    )


def first_broken(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first of some tensors that holds a number that is not finite. A GPU is waited for once."""
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return next((name for name, good in zip(tensors, finite, strict=True) if not good), None)


# --- The loop --------------------------------------------------------------------------------------------------------


class TrainingFailed(InputError):
    """Training produced numbers that are not finite; what was saved before is kept."""


@dataclass
class Run:
    """Where trainings run, one after the other: what they have in common.

    Attributes:
        folder: of all files; None writes none, and keeps the table in memory.
        settings: what decides the weights, as JSON values; a resumed run must have the same.
        save_every: steps between two states.
        seed: of what steps draw.
        stopped: asked after every step: the number of a signal that came to this process, or None.
        state: that of a state file, to go on from; its stage's `Loop` takes it.
        stage: of that state, as long as the run lasts; None if there was none.
    """

    folder: Path | None
    device: torch.device
    world: World = World()
    settings: dict = field(default_factory=dict)
    save_every: int = 0
    seed: int = 0
    stopped: Callable[[], int | None] = lambda: None
    state: dict | None = None
    stage: str | None = None

    def find_state(
        self, settings: Mapping, resume: bool, overwrite: bool, result: Path | None = None, alone: bool = False
    ) -> None:
        """Take ``settings``, and the state to go on from, if there is one.

        Args:
            result: a file that a finished run leaves, and another one may not replace.
            alone: whether a new run wants the folder for itself.

        Raises:
            InputError: a run that is not finished and neither to be resumed nor overwritten, or one of other settings;
                a result, or with ``alone`` anything, that is not to be overwritten.
        """
        self.settings, path = json_values(settings), self.folder / STATE_NAME
        if resume and overwrite:
            raise InputError("--resume and --overwrite exclude each other")
        state = None if overwrite or not path.is_file() else load_state(path)
        if state and state["stage"] == DONE and (not resume or state["settings"] | self.settings != state["settings"]):
            state = None  # an earlier run, stage 1 perhaps, is no obstacle to the next
        if state is None:
            if result is not None and result.exists() and not overwrite:
                raise InputError(f"{result} exists; give --overwrite, --resume with its settings, or another folder")
            if alone and self.world.leads and not (overwrite or is_empty(self.folder)):  # the others may be late
                raise InputError(f"{self.folder} is not empty, nor a run to resume; give --overwrite or another")
            return
        if not resume:
            raise InputError(f"{path}: a run that is not finished; give --resume to continue it or --overwrite")
        check_settings(state["settings"], self.settings, self.folder)
        self.state, self.stage = state, state["stage"]

    def add_settings(self, settings: Mapping) -> None:
        """Take more ``settings``, known only now. Raises InputError: the run that is resumed has others."""
        if self.state is not None:
            check_settings(self.state["settings"], settings, self.folder)
        self.settings |= json_values(settings)

    def begin(self, name: str, settings: dict, stale: Iterable[str]) -> logging.Logger:
        """Write settings.json and log.txt; what an earlier run left, by these names, must not stand beside them."""
        if self.world.leads:
            old = [path for each in (STATE_NAME, *stale) for path in self.folder.glob(each) if self.state is None]
            for path in [*filter(is_temporary, self.folder.iterdir()), *old]:
                path.unlink()
            write_json(self.folder / "settings.json", settings)
        self.world.wait()
        return get_logger(name, self.folder if self.world.leads else None)

    def finish(self) -> None:
        """Note that nothing is left to do, in place of what training held."""
        if self.world.leads:
            save_state(self.folder / STATE_NAME, {"settings": self.settings, "stage": DONE})

    def stop_if_asked(self, save: Callable[[], None] = lambda: None, together: bool = True) -> None:
        """Raise `Stopped` if a signal came, everything saved: in all processes together, or in this one alone."""
        asked = self.stopped() or 0
        if signum := int(self.world.largest(asked)) if together else asked:
            save()
            get_logger("loop").info("%s: saved; continue with --resume", signal.Signals(signum).name)
            raise Stopped(signum)

    def until_stopped(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of what one process does alone, as long as no signal comes."""
        for batch in batches:
            self.stop_if_asked(together=False)
            yield batch


DONE = "done"  # the stage of a run that has come to its end


@contextmanager
def open_run(folder: Path, device: str, save_every: int = 0, seed: int = 0) -> Iterator[Run]:
    """A run in ``folder``, which is locked: its processes have found each other, and signals only ask it to stop."""
    with join_world(device) as (world, own), locked(folder) if world.leads else nullcontext(), stop_signals() as asked:
        if not world.leads:
            logging.disable(logging.INFO)
        yield Run(folder, own, world, {}, save_every, seed, asked)


@dataclass
class Loop:
    """A training: steps, one after the other, and everything around them.

    A step may depend on its batch, on ``parts`` and on torch's generators, which its number seeds before the batch is
    made; on nothing else, or a resumed run would not be the run that was stopped.

    Attributes:
        run: where it runs.
        name: "forward" writes metrics_forward.csv and curves_forward.png; "" writes metrics.csv and curves.png.
        step: takes a batch, makes one step of the optimiser, returns the losses. It may raise FloatingPointError, which
            names what is not finite; losses that are not are found at the next row.
        batches: of a number of steps done, the batches of all steps to come, each as (keys, what ``step`` takes).
        steps: how many.
        row_every: steps between two rows of the table, which hold the means of the losses.
        parts: everything that changes in training, by name, with ``state_dict`` and ``load_state_dict``: a "model", an
            "optimizer", and what else there is.
        rate: the learning rate of the next step, of the number of steps done and of `progress`.
        axis: what rows count: "epoch" or "step".
        measure: called before each row, for figures to add. Those of "loss" say which weights are best, and states are
            saved at rows then.
        keep: called if the weights are the best so far, in the leading process.
        saved: called after a state is saved, in the leading process; told whether the run goes on.
        images: of keys and batch, the names of the images, for a message.
        minutes: to end after.
    """

    run: Run
    name: str
    step: Callable[..., dict[str, Tensor]]
    batches: Callable[[int], Iterator[tuple[object, Sequence]]]
    steps: int
    row_every: int
    parts: dict[str, Any]
    rate: Callable[[int, float], float]
    axis: str = "epoch"
    measure: Callable[[], dict[str, float]] | None = None
    keep: Callable[[], None] = lambda: None
    saved: Callable[[bool], None] = lambda goes_on: None
    images: Callable[[Any, Sequence], str] = lambda keys, batch: "its images"
    minutes: float | None = None
    done: int = field(default=0, init=False)  # steps
    seconds: float = field(default=0.0, init=False)  # spent, over all runs
    sums: dict[str, Tensor] = field(default_factory=dict, init=False)  # of the losses since the last row
    counted: int = field(default=0, init=False)  # steps in them
    best: float = field(default=math.inf, init=False)
    rows: list[dict[str, str]] = field(default_factory=list, init=False)

    def train(self) -> None:
        """Go on to the end.

        Raises:
            TrainingFailed: a number is not finite; nothing good is lost.
            Stopped: a signal came; the state is saved.
        """
        self._begin()
        run, batches, began = self.run, self.batches(self.done), self.done
        writes = run.world.leads and run.folder is not None
        events = tensorboard_events(run.folder / "events" / (self.name or "training") if writes else None, began + 1)
        hidden = None if run.world.leads else True  # None: if there is no terminal
        bar = tqdm(desc=self.name or None, total=self.steps, initial=began, unit="step", leave=False, disable=hidden)
        with events as self._write_events, bar:
            while True:
                ends = self.progress() == 1
                if self.counted and (ends or self.done % self.row_every == 0):
                    bar.set_postfix(loss=f"{self._add_row():.4g}")
                if ends:
                    break
                if run.save_every and self.done % run.save_every == 0 and self.done > began:
                    self.save()
                run.stop_if_asked(lambda: self.save(goes_on=False))
                seed_step(run, self.done)
                self._make_step(*next(batches))
                bar.update()
        if self.measure is None:
            self.save()
        run.stop_if_asked()
        run.world.wait()  # for the files

    def progress(self) -> float:
        """How far it is, in [0, 1]: by steps, or by the clock if that is ahead."""
        share = self.done / self.steps
        if self.minutes is not None:
            share = max(share, self.seconds / (60 * self.minutes))
        return min(share, 1.0)

    def _make_step(self, keys: object, batch: Sequence) -> None:
        started = time.perf_counter()
        rate = self.rate(self.done, self.progress())
        for group in self.parts["optimizer"].param_groups:
            group["lr"] = rate
        try:
            losses = self.step(*batch)
        except FloatingPointError as error:  # weights are still good here: nothing has been applied
            self._fail(f"{self._place()} ({self.images(keys, batch)})", error)
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.done, self.counted = self.done + 1, self.counted + 1
        self.seconds += time.perf_counter() - started
        if self.minutes is not None:
            self.seconds = self.run.world.largest(self.seconds)

    def _add_row(self) -> float:
        """Measure, write a row, keep what is best; returns the mean loss."""
        world, started = self.run.world, time.perf_counter()
        unit = 1 if self.axis == "step" else self.row_every
        place = f"{self.name} {self.axis} {self.done // unit}/{self.steps // unit}".strip()
        means = {name: (value / self.counted).item() for name, value in world.mean(self.sums).items()}
        means = {"loss" if name == "total" else name: value for name, value in means.items()}
        if not all(map(math.isfinite, means.values())):
            self._fail(place, f"the losses of the last {self.counted} steps")
        if self.measure is not None:
            try:
                measured = self.measure()
                if not math.isfinite(measured["loss"]):
                    raise FloatingPointError("the loss")
            except Stopped:
                self.save(goes_on=False)
                raise
            except FloatingPointError as error:
                self._fail(f"{place}, validation", error)
            means = {f"train_{name}": value for name, value in means.items()}
            means |= {f"val_{name}": value for name, value in measured.items()}
            self.seconds += time.perf_counter() - started
            if measured["loss"] < self.best:
                self.best = measured["loss"]
                if world.leads:
                    self.keep()
        if world.leads:
            rate = self.parts["optimizer"].param_groups[0]["lr"]
            self.table.append({self.axis: self.done // unit, **means, "lr": rate, "seconds": self.seconds})
            self._write_events({**means, "lr": rate}, self.done)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.log.info("%s: %s", place, figures)
        self.sums, self.counted = {}, 0
        if self.measure is not None:
            self.save()
        return next(iter(means.values()))

    def save(self, goes_on: bool = True) -> None:
        """Write the state, then what can be made of it. A weight that is not finite writes nothing."""
        run = self.run
        if (broken := first_broken(dict(self.parts["model"].named_parameters()))) is not None:
            self._fail(f"before {self._place()}", f"weight {broken}")
        self.sums = run.world.mean(self.sums)  # the leader's sums alone are in the file
        if not run.world.leads or run.folder is None:
            return
        progress = {name: getattr(self, name) for name in _PROGRESS}
        states = {name: part.state_dict() for name, part in self.parts.items()}
        state = {"settings": run.settings, "stage": self.name, "progress": progress, **states}
        save_state(run.folder / STATE_NAME, state)
        if self.done:
            self.saved(goes_on)
        if self.rows:
            plot_curves(self.table.path, run.folder / f"curves{self._suffix}.png")

    def _begin(self) -> None:
        """Take up a state, or save the first: a run that is killed from here on is resumed, not begun again."""
        run, self._suffix = self.run, f"_{self.name}" if self.name else ""
        self.log = get_logger("loop", run.folder)
        if run.state is not None and run.state["stage"] == self.name:
            try:
                for name, part in self.parts.items():
                    part.load_state_dict(run.state[name])
                for name in _PROGRESS:
                    setattr(self, name, run.state["progress"][name])
                sums = {name: value.to(run.device) for name, value in self.sums.items()}
            except Exception as error:  # each class of PyTorch has its own way to refuse a state
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                raise InputError(f"{run.folder / STATE_NAME}: does not fit ({said}); {START_ANEW}") from None
            self.sums, run.state = sums, None  # the state is as large as everything in training
            self.log.info("resumed at %s", self._place())
        if run.world.leads:
            file = None if run.folder is None else run.folder / f"metrics{self._suffix}.csv"
            self.table = MetricsTable(file, self.rows)
            self.rows = self.table.rows
        if not self.done:
            self.save()

    def _place(self) -> str:
        """Of the step under way, for a message."""
        if self.axis == "step":
            return f"step {self.done + 1}"
        epoch, batch = divmod(self.done, self.row_every)
        return f"{self.name} {epoch + 1}/{self.steps // self.row_every}, batch {batch + 1}".strip()

    def _fail(self, where: str, culprit: object) -> NoReturn:
        message = f"{where}: not a finite number in {culprit}. What was saved before it is kept; try a lower lr"
        self.log.error(message)
        raise TrainingFailed(message) from None


_PROGRESS = ("done", "seconds", "sums", "counted", "best", "rows")


def seed_step(run: Run, step: int) -> None:
    """Seed torch's generators for a step: what it draws depends on nothing before it, and is alike everywhere."""
    digest = hashlib.sha256(f"{run.seed} {step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
