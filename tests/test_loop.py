"""Runs that are stopped or killed: nothing is lost, and what comes out is what an undisturbed run gives."""

import errno
import functools
import importlib
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import refused
from runs import CHAIN, COMMANDS, assert_same, exit_code, forks, outcome, quick, signal_at, without_diagnostics

import data_loader
import loop
import train
import train_celeba
import utils
from loop import load_state, locked, stop_signals
from train import CelebATrainer
from utils import Stopped, remove_temporaries, run_command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def no_diagnostics():
    with pytest.MonkeyPatch.context() as patch:
        without_diagnostics(patch)
        yield


@pytest.fixture(scope="module")
def undisturbed(faces, tmp_path_factory):
    """What each command gives when nothing happens to it."""

    @functools.cache
    def run(kind: str, **changes) -> dict:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        main, arguments = COMMANDS[kind]
        assert main(arguments(faces, folder, **changes)) == 0
        return outcome(folder)

    return run


# --- Killed ----------------------------------------------------------------------------------------------------------


def victim(kind: str, arguments: list[str], die_at: tuple[str, int] | None) -> None:
    """A training process; with ``die_at`` it kills itself at the n-th call of a function that every write goes through,
    or every step: ``fsync`` cuts the temporary file in two first, as a machine that crashes may.
    """
    quick()
    name, calls = die_at or ("fsync", math.inf)
    owner, before = loop if name == "seed_step" else os, halve if name == "fsync" else None
    with signal_at(owner, name, calls, signal.SIGKILL, before):
        run_command(lambda: COMMANDS[kind][0](arguments))


def halve(file: int) -> None:
    os.ftruncate(file, os.fstat(file).st_size // 2)


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_as_the_undisturbed_one(kind, kills, faces, undisturbed, tmp_path):
    longer = {} if kills == 3 else {"epoch": 30, "r_epoch": 30} if kind == "spnn" else {"steps": 250}
    arguments = COMMANDS[kind][1](faces, tmp_path / "run", augment=0.5, **longer)  # draws in every step
    rng = random.Random(0)
    for attempt in range(kills + 1):
        die_at = (rng.choice(["fsync", "replace", "seed_step"]), rng.randint(1, 6)) if attempt < kills else None
        assert exit_code(victim, kind, [*arguments, "--resume"], die_at) == (-signal.SIGKILL if die_at else 0)
    assert_same(outcome(tmp_path / "run"), undisturbed(kind, augment=0.5, **longer))
    assert not list((tmp_path / "run").glob(".*"))  # nothing half written is left


# --- Stopped at every single place -----------------------------------------------------------------------------------


def spnn(faces, folder, *flags, **changes) -> int:
    try:
        return train_celeba.main([*COMMANDS["spnn"][1](faces, folder, **changes), *flags])
    except Stopped as stopped:
        return stopped.status


def test_a_run_that_is_stopped_again_and_again_saves_and_goes_on(faces, undisturbed, tmp_path):
    settings, folder, reached = {"epoch": 2, "r_epoch": 3}, tmp_path / "run", []
    for signum, owner, name, calls in (
        (signal.SIGINT, CelebATrainer, "validate", 1),
        (signal.SIGTERM, train, "right_inverse_error", 2),  # in the last validation
        (signal.SIGINT, train_celeba, "predict", 1),
        (signal.SIGTERM, data_loader, "to_float", 5),  # while all images' logits are asked for
    ):
        with signal_at(owner, name, calls, signum):
            assert spnn(faces, folder, "--resume", **settings) == 128 + signum
        state = load_state(folder / "train_state.pth")
        reached.append((state["stage"], state["progress"]["done"]))
        torch.manual_seed(123)  # a resume must not lean on what the generators happen to be
    assert reached == [("forward", 4), ("forward", 8), ("forward", 8), ("r_opt", 0)]
    assert spnn(faces, folder, "--resume", **settings) == 0
    assert_same(outcome(folder), undisturbed("spnn", **settings))
    assert {path.name for path in folder.glob("diag*")} == {"diagnostics_forward.json", "diagnostics_r_opt.json"}


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_once(faces, tmp_path_factory):
    """A run of stage 1 with a state file, stopped after its second step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with signal_at(loop, "seed_step", 2):
        assert spnn(faces, folder) == 128 + signal.SIGTERM
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped_once, tmp_path / "run")


def fewer(faces: Path, folder: Path) -> Path:
    (shutil.copytree(faces, folder / "fewer") / "CelebA-HQ-img" / "3.jpg").unlink()
    return folder / "fewer"


def spoilt(change):
    """A row of the table below: a resume of a state that is changed."""

    def harm(path: Path) -> None:
        changed = change(torch.load(path, weights_only=True))
        path.write_bytes(changed) if isinstance(changed, bytes) else torch.save(changed, path)

    return ["--resume"], {"harm": harm}, "^{path}: (damaged|a state of another version|does not fit)"


@pytest.mark.parametrize("flags, changes, said", [
    (["--resume"], {"lr": 2e-3}, "the run in {run} has lr 0.001, not 0.002"),
    (["--resume"], {"layer_channels": CHAIN[:-2]}, "the run in {run} has layer_channels"),
    (["--resume"], {"data": fewer}, "has images in its train split 16, not 15"),
    (["--resume", "--overwrite"], {}, "exclude each other"),
    ([], {}, "not finished; give --resume.*or --overwrite"),
    spoilt(lambda state: b"junk"),
    spoilt(lambda state: {**state, "best": Stopped(2)}),  # reading it would run code
    spoilt(lambda state: {**state, "version": loop.STATE_VERSION + 1}),
    spoilt(lambda state: {key: value for key, value in state.items() if key != "optimizer"}),
    spoilt(lambda state: {**state, "progress": {"step": 3}}),
])  # fmt: skip
def test_what_a_run_does_not_go_on_from_is_one_line_and_stays(faces, stopped, tmp_path, flags, changes, said):
    path, changes = stopped / "train_state.pth", dict(changes)
    changes.pop("harm", lambda path: None)(path)
    data, before = changes.pop("data", lambda faces, folder: faces)(faces, tmp_path), path.read_bytes()
    message = refused(said.format(run=stopped, path=path), spnn, data, stopped, *flags, **changes)
    assert len(message) < 1000 and path.read_bytes() == before


def test_a_run_is_begun_again_if_asked_and_left_alone_when_it_is_finished(faces, stopped, tmp_path, capsys):
    settings, folder = {"epoch": 1, "is_r_opt": False}, tmp_path / "run"
    assert spnn(faces, stopped, "--overwrite", **settings) == 0
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert spnn(faces, folder, "--resume", **settings) == 0 and "finished" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    two = {"is_forward_train": False, "r_epoch": 1}  # stage 1's end is no obstacle to stage 2
    assert spnn(faces, folder, "--resume", **two) == 0 and (folder / "best_model_r_opt_real.pth").is_file()


# --- A disk that does not take it ------------------------------------------------------------------------------------


def test_a_full_disk_costs_a_line(faces, undisturbed, tmp_path, monkeypatch):
    main, arguments = COMMANDS["prior"]
    arguments, path = [*arguments(faces, tmp_path / "run", augment=0.5), "--resume"], tmp_path / "run/train_state.pth"
    for owner, function, full in (
        (os, "fsync", OSError(errno.ENOSPC, "No space left")),
        (torch, "save", RuntimeError("[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed")),
    ):
        kept, honest = [], getattr(owner, function)

        def fails(*args, kept=kept, honest=honest, full=full):
            if path.exists() and load_state(path)["progress"]["done"]:
                kept.append(path.read_bytes())
                raise full
            return honest(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, function, fails)
            refused("cannot write .*(space|Writer)", main, arguments)
        assert path.read_bytes() == kept[0]  # the last one stands, whole
        assert not list(path.parent.glob(".*"))
    assert main(arguments) == 0
    assert_same(outcome(path.parent), undisturbed("prior", augment=0.5))


# --- The parts -------------------------------------------------------------------------------------------------------


def test_a_state_with_a_broken_weight_replaces_none(faces, stopped, monkeypatch):
    honest = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        honest(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    refused("forward 1/2, batch 4.*not a finite number in weight pinn.blocks.1", spnn, faces, stopped, "--resume")
    state = load_state(stopped / "train_state.pth")
    assert state["progress"]["done"] == 2 and all(tensor.isfinite().all() for tensor in state["model"].values())


def test_averaged_weights_are_the_weighted_mean():
    model = torch.nn.Linear(1, 1, bias=False)
    ema, expected = loop.Ema(model, 0.5), model.weight.item()
    for step in range(8):
        torch.nn.init.constant_(model.weight, float(step))
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.model.weight.item() == pytest.approx(expected, rel=1e-6) and not ema.model.weight.requires_grad


def spoil(tensor: torch.Tensor, value: float) -> None:
    tensor.flatten()[0] = value


@pytest.mark.parametrize("harm, loss, said", [
    (lambda linear: None, float("inf"), "the loss"),
    (lambda linear: spoil(linear.weight.grad, float("inf")), 0.5, "the gradient of 1.weight"),
    (lambda linear: spoil(linear.weight.data, float("nan")) or spoil(linear.weight.grad, float("nan")), 0.5,
     "^weight 1.weight"),
])  # fmt: skip
def test_clipping_names_what_is_not_finite_and_spreads_it_nowhere(harm, loss, said):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    gradients = [torch.full_like(parameter, 2.0) for parameter in module.parameters()]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient
    assert loop.clip_gradients(module, 1.0, torch.tensor(0.5)) == norm
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in module.parameters()]).norm(), torch.tensor(1.0))
    harm(module[1])
    with pytest.raises(FloatingPointError, match=said):
        loop.clip_gradients(module, 1.0, torch.tensor(loss))
    assert all(module[i].bias.grad.isfinite().all() for i in (0, 1))
    module[1].requires_grad_(False)  # frozen: what it was left with counts for nothing
    assert loop.clip_gradients(module, 1.0, torch.tensor(0.5)).isfinite()


def test_a_second_signal_acts_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts with &
    with stop_signals() as stopped, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def hold(folder: Path, ready, go) -> None:
    with locked(folder):
        ready.set()
        go.wait(60)


def test_a_folder_is_one_runs_and_free_again_when_that_is_killed(tmp_path):
    folder = tmp_path / "a" / "b"
    ready, go = forks().Event(), forks().Event()
    process = forks().Process(target=hold, args=(folder, ready, go))
    process.start()
    assert ready.wait(60)
    refused(f"{folder}: another run is writing there .process {process.pid} on ", locked(folder).__enter__)
    process.kill()
    process.join()
    assert (folder / ".lock").exists() and loop.is_empty(folder)
    with locked(folder):
        (folder / "result").write_text("")
    assert [path.name for path in folder.iterdir()] == ["result"]
    with locked(tmp_path / "c" / "d"):
        assert (tmp_path / "c" / "d").is_dir()
    assert not (tmp_path / "c").exists()  # nothing was written


def without_posix(folder: Path) -> None:
    """Import everything anew without what Windows lacks of the modules os, signal and fcntl."""
    sys.modules |= dict.fromkeys(("fcntl", "grp", "pwd", "resource", "termios"))
    for owner, names in ((os, ("O_NOFOLLOW", "sched_getaffinity", "fork")), (signal, ("SIGALRM", "alarm", "SIGKILL"))):
        for name in names:
            delattr(owner, name)
    own = [path.stem for path in ROOT.glob("*.py") if path.stem != "deepinv_bridge"]  # deepinv may not be there
    for name in [name for name in sys.modules if name in own or name.startswith("DDNM")]:
        del sys.modules[name]
    for name in (*own, "DDNM.main", "DDNM.train_prior"):
        importlib.import_module(name)
    with sys.modules["loop"].locked(folder):
        sys.modules["logger"].get_logger("run", folder).info("hello")


def test_everything_imports_where_there_is_no_posix(tmp_path):
    """As far as that can be shown here."""
    assert exit_code(without_posix, tmp_path / "run") == 0
    assert "hello" in (tmp_path / "run" / "log.txt").read_text()


def test_only_half_written_files_are_removed(tmp_path):
    keep = ["a.pth", ".hidden", ".lock", ".a.pth.abc.pth", ".a.pth.abcdefgh.txt", ".vimrc.12345678"]
    for name in [*keep, ".train_state.pth.ab_d3fgh.pth", ".sheet.png.abcdefgh.png"]:
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(keep)
    with utils.atomic_write(tmp_path / "new.csv") as temporary:
        assert utils.is_temporary(temporary)
