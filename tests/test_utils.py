"""The small helpers of every command: exit statuses, presets, devices, and files that are whole or not there."""

import os

import pytest
import torch

import utils
from utils import InputError, InputErrors, atomic_write, nearest, resolve_device, run_command


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("main, status, said", [
    (lambda: 3, 3, ""),
    (failing(InputError("no  such\tfolder")), 2, "error: no such folder\n"),
    (failing(InputErrors("two:\n  one\n  other")), 2, "error: two:\n  one\n  other\n"),
    (failing(FileNotFoundError(2, "No such file", "a\nb")), 2, "error: [Errno 2] No such file: 'a\\nb'\n"),
    (failing(MemoryError()), 2, "error: not enough memory; make the batch, the images or the network smaller\n"),
    (lambda: torch.empty(2**62, 3), 2, "error: not enough memory; make the batch, the images or the network smaller\n"),
    (failing(KeyboardInterrupt()), 130, "interrupted\n"),
])  # fmt: skip
def test_a_command_exits_with_its_status_and_one_line(main, status, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    assert stopped.value.code == status and capsys.readouterr().err == said
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run_command(lambda: 1 / 0)


# --- Names, devices, numbers -----------------------------------------------------------------------------------------


def test_nearest_finds_a_slip_of_the_finger_and_nothing_far_off():
    names = ["Smiling", "Eyeglasses", "Wearing_Hat"]
    assert nearest("Smilng", names) == nearest("SMILING", names) == ", did you mean 'Smiling'?"
    assert nearest("wearing hat", names) == ", did you mean 'Wearing_Hat'?"
    assert nearest("xyzzy", names) == nearest("", names) == nearest("Smiling", []) == ""


def test_auto_takes_the_best_device_there_is_and_what_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:7", "mps", "gpu", "cuda:", "meta"):
        with pytest.raises(InputError, match="--device.*use "):
            resolve_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda") and resolve_device("cuda:1").index == 1


# --- atomic_write ----------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_in_a_folder_made_for_it(tmp_path):
    target = tmp_path / "a" / "b" / "file.txt"
    with atomic_write(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".txt"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new" and os.listdir(target.parent) == ["file.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("error", [RuntimeError("half way"), OSError(28, "No space left"), "fsync"])
def test_a_failure_keeps_the_old_content_and_leaves_nothing_else(tmp_path, error, monkeypatch):
    target = tmp_path / "file.txt"
    target.write_text("old")
    if error == "fsync":  # the disk is full at the last moment
        monkeypatch.setattr(utils.os, "fsync", lambda _: failing(OSError(28, "No space left"))())
    with pytest.raises(RuntimeError if isinstance(error, RuntimeError) else InputError), atomic_write(target) as part:
        part.write_text("ne")
        if error != "fsync":
            raise error
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]
    with pytest.raises(InputError, match="cannot write .*below.txt"), atomic_write(target / "below.txt"):
        pass
