"""The small helpers of every command: exit statuses, presets, devices, and files that are whole or not there."""

import argparse
import os
import tempfile

import pytest
import torch

import utils
from utils import (
    InputError,
    InputErrors,
    atomic_write,
    nearest,
    number,
    read_yaml,
    resolve_device,
    run_command,
)

# --- run_command -----------------------------------------------------------------------------------------------------


def status_of(main):
    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    return stopped.value.code


@pytest.mark.parametrize("returned, status", [(0, 0), (None, None), (3, 3)])
def test_a_command_exits_with_what_main_returns(returned, status, capsys):
    assert status_of(lambda: returned) == status
    assert capsys.readouterr().err == ""


def failing(error):
    def main():
        raise error

    return main


def test_a_mistake_of_the_user_is_one_line_and_status_2(capsys):
    assert status_of(failing(InputError("no  such\tfolder"))) == 2
    assert capsys.readouterr().err == "error: no such folder\n"


def test_a_message_of_several_lines_keeps_them(capsys):
    assert status_of(failing(InputErrors("two missing:\n  one\n  other"))) == 2
    assert capsys.readouterr().err == "error: two missing:\n  one\n  other\n"


@pytest.mark.parametrize("breaks", ["\n", "\r\n", "\x85", "\u2028", "\n\n\v"])
def test_a_line_break_in_a_name_makes_no_second_line(breaks, capsys):
    error = InputError(f"--config faces{breaks}.yml: no such file")
    assert len(str(error).splitlines()) == 1
    assert status_of(failing(error)) == 2
    assert capsys.readouterr().err == "error: --config faces .yml: no such file\n"


def test_an_interruption_is_status_130(capsys):
    assert status_of(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


# --- Names, devices, numbers -----------------------------------------------------------------------------------------


def test_nearest_finds_a_slip_of_the_finger_and_nothing_far_off():
    names = ["Smiling", "Eyeglasses", "Wearing_Hat"]
    assert nearest("Smilng", names) == ", did you mean 'Smiling'?"
    assert nearest("smiling", names) == nearest("SMILING", names) == ", did you mean 'Smiling'?"
    assert nearest("wearing hat", names) == ", did you mean 'Wearing_Hat'?"
    assert nearest("xyzzy", names) == nearest("", names) == nearest("Smiling", []) == ""


def test_auto_takes_the_best_device_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7", "mps", "gpu", "", "cuda:x"])
def test_a_device_that_is_not_there_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["meta", "xpu"])
def test_a_device_that_no_command_knows_is_refused(name):
    with pytest.raises(InputError, match="use auto, cpu, cuda, cuda:N or mps"):
        resolve_device(name)


def test_a_cuda_device_needs_its_index(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1").index == 1
    with pytest.raises(InputError, match="2 CUDA devices found"):
        resolve_device("cuda:2")


def test_numbers_keep_to_their_bounds():
    assert number(int, 0)("7") == 7 and number(float, 0, 1)("0.5") == 0.5
    assert number(float, 0, 1)("0") == 0 and number(float, 0, 1)("1") == 1 and number(float)("-3e8") == -3e8
    for parse, text, said in [
        (number(int), "1.5", "not a whole number"),
        (number(float), "much", "not a number"),
        (number(float), "nan", "not a finite number"),
        (number(float), "-inf", "not a finite number"),
        (number(int, 1), "0", r"in \[1, 1000000000\]"),
        (number(float, high=2), "3", "at most 2"),
        (number(float, 0, 1), "1.01", r"in \[0, 1\]"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            parse(text)


# --- Presets ---------------------------------------------------------------------------------------------------------


def config(tmp_path, text):
    path = tmp_path / "preset.yml"
    path.write_text(text, encoding="utf-8")
    return path


def test_read_yaml_takes_a_flat_mapping(tmp_path):
    assert read_yaml(config(tmp_path, "# nothing yet\n"), []) == {}
    assert read_yaml(config(tmp_path, "steps: 5\nname: é\n"), ["steps", "name"]) == {"steps": 5, "name": "é"}


@pytest.mark.parametrize(
    "text, said",
    [
        ("stepz: 5", "unknown key 'stepz', did you mean 'steps'"),
        ("- steps\n- 5", "got a list"),
        ("just words", "got a str"),
        ("steps: [1", "not readable as YAML"),
        ("1: 2", "unknown key 1"),
    ],
)
def test_read_yaml_refuses_anything_else_in_one_line(tmp_path, text, said):
    with pytest.raises(InputError, match=said) as error:
        read_yaml(config(tmp_path, text), ["steps"])
    assert "preset.yml" in str(error.value) and "\n" not in str(error.value)


def test_read_yaml_names_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(InputError, match="none.yml: no such file"):
        read_yaml(tmp_path / "none.yml", [])
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="binary.yml: not readable"):
        read_yaml(tmp_path / "binary.yml", [])


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


@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_a_failure_keeps_the_old_content_and_leaves_nothing_else(tmp_path, error):
    target = tmp_path / "file.txt"
    target.write_text("old")
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_write(target) as temporary:
        temporary.write_text("ne")
        raise error
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_a_full_disk_at_the_last_moment_keeps_the_old_content(tmp_path, monkeypatch):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.os, "fsync", full)
    with pytest.raises(InputError, match="file.txt: No space left on device"), atomic_write(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write .*below.txt"), atomic_write(tmp_path / "file" / "below.txt"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write .*folder"), atomic_write(tmp_path / "folder") as temporary:
        temporary.write_text("a folder has this name")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]

    def refused(**_):  # permissions do not hold for root, so they are played
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refused)
    with pytest.raises(InputError, match="new.txt: Permission denied"), atomic_write(tmp_path / "new.txt"):
        pass
