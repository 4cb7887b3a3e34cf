"""What a run needs to survive being stopped at any moment: signals, state files, and a lock on its folder."""

import fcntl
import json
import logging
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.data import DataLoader, SequentialSampler

from utils import InputError, atomic_write, is_temporary, unlinked

STATE_NAME = "train_state.pth"
LOCK_NAME = ".lock"
log = logging.getLogger(__name__)


# --- Signals ---------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """SIGINT or SIGTERM came, and everything is saved: the command exits with ``status``."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.status = 128 + signum


@contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Turn SIGINT and SIGTERM into a question: the yielded function says which came. A second one acts at once."""
    received: list[int] = []
    previous = {}

    def note(signum: int, frame: object) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    for signum in (signal.SIGINT, signal.SIGTERM):
        previous[signum] = signal.getsignal(signum)
        signal.signal(signum, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def outlive_stop_signals(worker: int) -> None:
    """A loader's ``worker_init_fn``. Terminals and schedulers signal every process of a run, but the step under way may
    still wait for a batch. A worker does not stay for long: SIGTERM is also how its own process ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))  # any other status breaks the main process's last step
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))


# --- State files -----------------------------------------------------------------------------------------------------


def plain(value: object) -> object:
    """A setting as a weights-only file holds it and as JSON gives it back, so that the two compare equal."""
    return json.loads(json.dumps(value, default=str))


def save_state(path: Path, state: Mapping) -> None:
    """Write a training state: the old file stands until the new one is complete on the disk.

    Raises:
        InputError: it cannot be written. The old file is as it was.
    """
    with atomic_write(path) as temporary:
        try:
            torch.save(dict(state), temporary)
        except RuntimeError as error:  # what a full disk looks like from there
            raise OSError(str(error).splitlines()[0]) from error


def load_state(path: Path, parts: Mapping | None = None) -> dict:
    """What `save_state` wrote, on the CPU; no code in the file is run.

    Args:
        parts: what must be in it besides the settings, see `check_parts`.

    Raises:
        InputError: a file that cannot be read, a damaged one, another kind of file, or one of another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state["settings"], dict):
            check_parts(state, {} if parts is None else parts, path)
            return state
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path}: damaged, or holds more than a training state; refused") from None
    except Exception as error:  # a damaged file can raise almost anything
        raise InputError(f"{path}: damaged, or not a training state ({type(error).__name__})") from None
    raise InputError(f"{path}: not a training state")


ANOTHER_VERSION = "it may be of another version of this command: start anew with --overwrite, or in another folder"


def check_parts(value: object, parts: object, path: Path, name: str = "the state") -> None:
    """Hold what was read from a state file against what is expected of it.

    Args:
        value: the state, or a part of it.
        parts: its type (or types), a mapping of the keys that it must have, or a list of the one kind its items are.
        path: the state file.
        name: what ``value`` is called.

    Raises:
        InputError: names the first key that is missing or holds something else.
    """
    inside = isinstance(parts, (Mapping, list))
    kinds = (dict if isinstance(parts, Mapping) else list) if inside else parts
    if not isinstance(value, kinds):
        raise InputError(f"{path}: {name} is of type {type(value).__name__}; {ANOTHER_VERSION}")
    if isinstance(parts, Mapping):
        prefix = "" if name == "the state" else f"{name}."
        for key, part in parts.items():
            if key not in value:
                raise InputError(f"{path}: {prefix}{key} is missing; {ANOTHER_VERSION}")
            check_parts(value[key], part, path, f"{prefix}{key}")
    elif inside:
        for index, item in enumerate(value):
            check_parts(item, parts[0], path, f"{name}[{index}]")


@contextmanager
def fitting(path: Path, name: str) -> Iterator[None]:
    """Around handing a part of a state to what takes it: a network that has other weights by now, say.

    Raises:
        InputError: it did not fit.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each class of PyTorch has its own way to refuse a state
        lines = [line.strip() for line in str(error).splitlines()]
        said = " ".join(lines[:2])[:200]
        raise InputError(f"{path}: {name} does not fit ({type(error).__name__}: {said}); {ANOTHER_VERSION}") from None


def restore_adam(optimizer: torch.optim.Adam, state: Mapping) -> None:
    """``load_state_dict``, which alone takes the moments of other weights, or of another optimiser, for its own.

    Raises:
        ValueError: they do not fit.
    """
    keys = [set(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, keys, strict=True):
        if missing := before - set(group):
            raise ValueError(f"no {sorted(missing)[0]} in its group")
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {})
            if moments and any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError(f"moments of weights of another shape than {tuple(parameter.shape)}")
            if moments and not isinstance(moments["step"], torch.Tensor):
                raise ValueError("no step among its moments")


def check_settings(saved: Mapping, given: Mapping, folder: Path) -> None:
    """A resumed run must be the run it resumes.

    Raises:
        InputError: names the first setting in ``given`` that the run in ``folder`` has otherwise.
    """
    for key, value in given.items():
        if saved.get(key) != plain(value):
            raise InputError(
                f"--resume: the run in {folder} has {key} {saved.get(key)}, not {plain(value)}; give the same, or "
                f"start anew with --overwrite"
            )


def random_state() -> dict:
    """The state of PyTorch's generators, CPU and CUDA; nothing in a training step draws from any other."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: Mapping) -> None:
    """Take back what `random_state` gave; GPUs that are not there any more are left out."""
    torch.set_rng_state(state["cpu"])
    for device, generator in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(generator, device)


# --- The position in an epoch ----------------------------------------------------------------------------------------


def epoch_keys(loader: DataLoader, epoch: int) -> list:
    """What the loader's batch sampler hands out in an epoch, from 0: the keys of every batch, no image loaded.

    Raises:
        ValueError: the sampler has no ``epoch`` and shuffles, so that nobody can tell.
    """
    sampler = loader.batch_sampler
    if hasattr(sampler, "epoch"):
        sampler.epoch = epoch
    elif not isinstance(getattr(sampler, "sampler", None), SequentialSampler):
        raise ValueError("the order of an epoch must be known to resume in it: use a batch sampler with an `epoch`")
    return list(sampler)


def only(loader: DataLoader, batches: Sequence, workers: int = 0) -> DataLoader:
    """A loader of these batches (lists of keys) alone, otherwise like ``loader``."""
    other = type(loader)(
        loader.dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),  # or it draws the workers' seed from the global one
    )
    if hasattr(loader, "device"):  # where a `data_loader.FaceLoader` finishes its batches
        other.device = loader.device
    return other


def from_batch(loader: DataLoader, epoch: int, done: int) -> DataLoader:
    """The batches of an epoch, from 0, without the first ``done``, which are not loaded."""
    if done:
        return only(loader, epoch_keys(loader, epoch)[done:], loader.num_workers)
    if hasattr(loader.batch_sampler, "epoch"):
        loader.batch_sampler.epoch = epoch
    return loader


# --- The run's folder ------------------------------------------------------------------------------------------------


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or is not there; a killed run's lock and half-written files do not count."""
    return not folder.is_dir() or all(path.name == LOCK_NAME or is_temporary(path) for path in folder.iterdir())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other run out of ``folder``, which is made if need be, and goes again if nothing was written.

    The lock is the operating system's: it ends with the process, however that ends. It is a record lock (``lockf``):
    loader workers would inherit the other kind (``flock``), and outlive a killed run with it for seconds.

    Raises:
        InputError: another run holds it, or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK_NAME
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            file = unlinked(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                owner = os.read(file, 100).decode(errors="replace").strip()
                os.close(file)
                raise InputError(f"{folder}: another run is writing there ({owner or 'just started'})") from None
            except OSError as error:
                log.warning("%s cannot be locked (%s): see to it that no other run writes there", folder, error)
            try:
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    break
            except FileNotFoundError:
                pass
            os.close(file)  # its owner removed it between our opening and our locking
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while still locked
        os.close(file)
        for empty in made:
            try:
                empty.rmdir()
            except OSError:  # not empty: there are results
                break
