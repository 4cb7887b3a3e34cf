"""Numbers that are too large: every flag of every command refuses them in one line, as it does those too small."""

import argparse
import contextlib
import io

import pytest
import torch

import diagnostics
import invert
import judge
import procedural_faces
import train_celeba
from benchmarks import growth, peak_memory, speed, throughput
from data_loader import make_loader
from DDNM import main as reconstruct
from DDNM import train_prior
from DDNM.guided_diffusion.diffusion import image_generator
from utils import LARGEST_COUNT, LARGEST_SEED, number, run_command, seed_everything

PARSERS = {
    "train_celeba": train_celeba.parser,
    "DDNM/main": reconstruct.parser,
    "DDNM/train_prior": train_prior.build_parser,
    "judge": judge._parser,
    "invert": invert.parser,
    "diagnostics": diagnostics.parser,
    "procedural_faces": procedural_faces._parser,
    "benchmarks/speed": speed.parser,
    "benchmarks/growth": growth.parser,
    "benchmarks/peak_memory": peak_memory.parser,
    "benchmarks/throughput": throughput.parser,
}
HUGE = {"2**63": str(2**63), "2**64": str(2**64), "10**30": str(10**30), "5,000 digits": "9" * 5000}


def experiment(name: str):
    """An experiment's parser, which needs scikit-learn."""
    pytest.importorskip("sklearn")
    from experiments import digits, toy_density

    return {"digits": digits, "toy_density": toy_density}[name].build_parser


def commands(parser: argparse.ArgumentParser):
    """The parser itself, or those of its subcommands, with the words before their flags."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return [([name], sub) for name, sub in action.choices.items()]
    return [([], parser)]


def flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Those whose values are numbers: free ones, not one of a few."""
    return [a for a in parser._actions if a.type is not None and a.choices is None and refuses_words(a)]


def refuses_words(action: argparse.Action) -> bool:
    try:
        action.type("many")
    except (argparse.ArgumentTypeError, ValueError):
        return True
    return False


def said(parser: argparse.ArgumentParser, line: list[str]) -> str:
    """How a command line is refused: one message, status 2."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stop:
        parser.parse_args(line)
    assert stop.value.code == 2 and errors.getvalue().count(": error: ") == 1
    return errors.getvalue().split(": error: ")[1]


@pytest.mark.parametrize("name", [*PARSERS, "digits", "toy_density"])
@pytest.mark.parametrize("huge", HUGE)
def test_a_huge_number_is_one_line_for_every_flag(name, huge):
    parser, tried = (PARSERS[name] if name in PARSERS else experiment(name))(), []
    for words, command in commands(parser):
        for action in flags(command):
            flag = action.option_strings[0]
            try:
                action.type("0.5")
            except (argparse.ArgumentTypeError, ValueError) as error:
                if "whole" not in str(error) and action.type is not train_prior._widths:
                    raise
                message = said(parser, [*words, flag, HUGE[huge]])
                assert f"argument {flag}" in message and message.count("\n") == 1 and len(message) < 400, message
                assert "must be" in message or "not a whole number" in message
                tried.append(flag)
            else:  # a float: 10**30 is one
                message = said(parser, [*words, flag, "1e999"])
                assert f"argument {flag}: 1e999 is not a finite number" in message
    assert tried


@pytest.mark.parametrize("name", [*PARSERS, "digits", "toy_density"])
def test_every_seed_has_a_bound_that_pytorch_takes(name):
    parser, seeds = (PARSERS[name] if name in PARSERS else experiment(name))(), 0
    for _, command in commands(parser):
        for action in command._actions:
            if action.dest != "seed":
                continue
            seeds += 1
            assert action.type("0") == 0
            largest = LARGEST_SEED if name != "toy_density" else 2**32 - 2
            torch.Generator().manual_seed(action.type(str(largest)))
            for text in ("-1", str(largest + 1)):
                with pytest.raises(argparse.ArgumentTypeError, match="out of range"):
                    action.type(text)
    assert seeds or name == "digits" or name.startswith("benchmarks/")


def test_the_largest_seed_is_taken_everywhere(tmp_path):
    seed_everything(LARGEST_SEED)
    assert procedural_faces.main(["--out", str(tmp_path), "--count", "2", "--size", "16", "--seed", str(LARGEST_SEED),
                                  "--workers", "1"]) == 0  # fmt: skip
    loader = make_loader(list(range(7)), 2, 0, LARGEST_SEED, shuffle=True, flip=True)
    assert len(list(loader.batch_sampler)) == 4
    assert torch.rand(1, generator=image_generator(LARGEST_SEED, "a")).isfinite()


def test_a_whole_number_has_a_bound_of_its_own():
    assert number(int, 1)(str(LARGEST_COUNT)) == LARGEST_COUNT
    with pytest.raises(argparse.ArgumentTypeError, match=f"at most {LARGEST_COUNT}"):
        number(int, 1)(str(LARGEST_COUNT + 1))
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        number(int, 1)("0")
    assert number(int, 0, LARGEST_SEED)(str(LARGEST_SEED)) == LARGEST_SEED
    assert number(float, 0)("1e30") == 1e30


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(2**50, dtype=torch.uint8),
        lambda: torch.empty(2**40, 2**40),
        lambda: bytearray(2**60),
        lambda: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("CUDA out of memory")),
    ],
    ids=["too much for the machine", "beyond any address", "outside PyTorch", "on a GPU"],
)
def test_memory_that_cannot_be_had_is_one_line(ask, capsys):
    def main():
        result = ask()
        next(result) if hasattr(result, "__next__") else None

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: not enough memory; make the batch, the images or the network smaller\n"


def test_any_other_error_of_pytorch_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="must match"):
        run_command(lambda: torch.zeros(2) + torch.zeros(3))
