"""Argument checks and the small helpers that every command shares."""

import argparse
import difflib
import hashlib
import json
import math
import os
import random
import re
import sys
import tempfile
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, field, fields
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import yaml

# bounds that settings of several commands share: beyond them is a slip of the finger
MOST = 2**63 - 1  # of any whole number: beyond it PyTorch only knows tracebacks


class InputError(ValueError):
    """A mistake in what the user gave: commands print it as one line and exit with status 2.

    It is one line whatever it quotes: a path may hold line breaks.
    """

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).splitlines()))


class InputErrors(InputError):
    """Several mistakes, in a message of several lines."""

    def __init__(self, message: str) -> None:
        ValueError.__init__(self, message)


class Stopped(Exception):
    """SIGINT or SIGTERM came, and everything is saved: the command exits with ``status``."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.status = 128 + signum


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and exit: 0 on success, 2 on an `InputError`, 128 + n after signal n.

    So do a file or folder that the system refuses, which names itself, and memory that it refuses. Any other exception
    is a bug and keeps its traceback (status 1).
    """
    try:
        status = main()
    except (MemoryError, RuntimeError) as error:  # PyTorch's own is a RuntimeError on a CPU
        out = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "allocate memory" in str(error)
        if not out and "size calculation overflowed" not in str(error):  # beyond any address
            raise
        print("error: not enough memory; make the batch, the images or the network smaller", file=sys.stderr)
        status = 2
    except (InputError, OSError) as error:
        print("error:", error if isinstance(error, InputErrors) else " ".join(str(error).split()), file=sys.stderr)
        status = 2
    except Stopped as stopped:
        status = stopped.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def check_positive(owner: str, whole: bool = False, most: float = math.inf, **values: object) -> None:
    """Refuse what is no positive, finite number of at most ``most``, or no ``whole`` one, by name: files hold them."""
    for name, value in values.items():
        if whole and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise ValueError(f"{owner}: {name} must be a whole number, got {value!r}")
        if not isinstance(value, Real) or not 0 < value <= most or value == math.inf:
            limit = "" if most == math.inf else f" and at most {most}"
            raise ValueError(f"{owner}: {name} must be positive{limit}, got {value!r}")


def sides(owner: str, name: str, size: int | Sequence[int], dims: int = 2) -> tuple[int, ...]:
    """(height, width) of a number for both, or of two. Raises ValueError naming the owner's argument."""
    each = tuple(size) if isinstance(size, (tuple, list)) else (size,) * dims
    if len(each) != dims:
        raise ValueError(f"{owner}: {name} must be a number or {dims}, as in (height, width), got {size!r}")
    for n in each:
        check_positive(owner, whole=True, **{name: n})
    return each


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for a misspelt name: ``", did you mean 'Smiling'?"``, or an empty string."""
    by_lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f", did you mean {by_lower[close[0]]!r}?" if close else ""


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``"auto"`` takes CUDA, then MPS, then the CPU.

    Raises:
        InputError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    cuda, mps = torch.cuda.device_count(), int(torch.backends.mps.is_available())
    try:
        device = torch.device(name)
        if (device.index or 0) < {"cpu": 1, "cuda": cuda, "mps": mps}.get(device.type, 0):
            return device
    except RuntimeError:
        pass
    raise InputError(f"--device {name}: not here, {cuda} CUDA devices found; use auto, cpu, cuda, cuda:N or mps")


def peak_gib(device: torch.device, reset: bool = False) -> float:
    """Peak memory since it was last reset: the GPU's, or (on Linux) all that the process holds."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**30
    status, marks = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return float("nan")
    if reset and marks.exists():
        marks.write_text("5")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def clock(device: torch.device, own: bool = False) -> float:
    """Seconds, with all that the device was given done; ``own``: on a CPU this process's alone, not the wall's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if own and device.type == "cpu" else time.perf_counter()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class _OnceLoader(yaml.SafeLoader):
    """YAML in which no key stands twice: the first would be dropped without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {twice[0]!r} is there twice")
        return super().construct_mapping(node, deep)


def shown(value: object) -> str:
    """``repr``, cut to what a message can hold."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def read_yaml(path: str | Path, known: Iterable[str], typed: Iterable[str] = ()) -> dict:
    """Read a flat YAML mapping whose keys are all among ``known`` or ``typed``.

    Returns:
        Of ``typed`` keys what YAML makes of the values, of ``known`` ones their text, to be read as on a command line:
        a folder 007 is no number 7.

    Raises:
        InputError: no such file, not a mapping, or a key that is neither (with its nearest match).
    """
    path, typed = Path(path), set(typed)
    if not path.is_file():
        raise InputError(f"config {path}: no such file")
    try:
        content = path.read_text(encoding="utf-8")
        settings, words = yaml.load(content, _OnceLoader) or {}, yaml.load(content, yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:  # ValueError: the 99th day of a month
        raise InputError(f"config {path}: not readable as YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(settings, dict):
        raise InputError(f"config {path}: expected 'key: value' lines, got a {type(settings).__name__}")
    known = typed.union(known)
    for key in settings:
        if key not in known:
            raise InputError(f"config {path}: unknown key {shown(key)}{nearest(str(key)[:80], known)}")
    # what is merged in (<<) has no text of its own
    return {key: value if key in typed else words.get(key, value) for key, value in settings.items()}


# --- Settings: dataclasses, from which flags and presets are made -----------------------------------------------------


def option(
    default: object, help: str = "", low: float | None = None, high: float | None = None,
    choices: Iterable[str] | None = None,
):  # fmt: skip
    """A field of a dataclass of settings, see `parse`.

    Args:
        default: ``...`` if the flag must be given.
        help: for ``--help``, which adds the default.
        low, high: bounds of a number, or of each of several. A whole number without ``high`` is at most `MOST`.
        choices: the values allowed; a field of type ``Literal["a", "b"]`` needs none.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=MISSING if default is ... else default, kw_only=default is ..., metadata=metadata)


_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # as YAML has them


class _Flag:
    """A field as a flag: ``--lr 1e-3``, ``--fast`` and ``--no-fast``, ``--widths 48,96``, ``--set a --set b``.

    Attributes:
        kind: type of one value.
        many: `list` for a flag that may be repeated, `tuple` for one that takes several words or commas, or None.
        optional: whether "none" is a value.
    """

    def __init__(self, of: Field, hint: object) -> None:
        self.name, self.help = of.name, of.metadata.get("help", "")
        self.low, self.high, self.choices = (of.metadata.get(key) for key in ("low", "high", "choices"))
        self.default = of.default_factory() if of.default_factory is not MISSING else of.default
        self.optional, self.many = type(None) in get_args(hint), None
        if self.optional:
            (hint,) = (each for each in get_args(hint) if each is not type(None))
        if get_origin(hint) in (list, tuple):
            self.many, hint = get_origin(hint), get_args(hint)[0]
        if get_origin(hint) is Literal:
            self.choices, hint = get_args(hint), str
        self.kind: Any = hint

    def value(self, text: str) -> object:
        """One value. Raises ArgumentTypeError."""
        try:
            value = self.kind(text)
        except ValueError:
            raise ArgumentTypeError(f"{shown(text)} is not a {'whole ' * (self.kind is int)}number") from None
        if not text or "\0" in text:
            raise ArgumentTypeError(f"{shown(text)} is empty, or holds a null character")
        if self.kind in (int, float):
            most = MOST if self.kind is int else sys.float_info.max
            low, high = -most if self.low is None else self.low, most if self.high is None else self.high
            if not low <= value <= high:  # NaN is not either
                raise ArgumentTypeError(f"{shown(text)} is out of range, must be in [{low:g}, {high:g}]")
        if self.choices is not None and value not in self.choices:
            names = [str(choice) for choice in self.choices]
            raise ArgumentTypeError(f"{shown(text)} must be one of {', '.join(names)}{nearest(text[:80], names)}")
        return value

    def word(self, text: str) -> object:
        """A word of the command line, of several values perhaps. Raises ArgumentTypeError."""
        if self.optional and text.lower() == "none":
            return None
        return [self.value(part) for part in text.split(",")] if self.many is tuple else self.value(text)

    def words(self, value: object) -> list[str]:
        """A value of a preset, see `read_yaml`, as words of the command line."""
        if self.kind is bool:
            if str(value).lower() not in _BOOLEANS:
                raise InputError(f"{self.name}: must be true or false, got {shown(value)}")
            return [f"--{'' if _BOOLEANS[str(value).lower()] else 'no-'}{self.name}"]
        if self.optional and value in ("", "~", "null"):
            value = "none"
        several = value if isinstance(value, list) and self.many else [value]
        if any(isinstance(each, (list, dict)) for each in several):
            raise InputError(f"{self.name}: expected {'values' if self.many else 'one value'}, got {shown(value)}")
        texts = [str(each) for each in several]
        return [f"--{self.name}={text}" for text in ([",".join(texts)] if self.many is tuple else texts)]

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        unsaid = self.default is None or self.default is False or self.many is list
        default = ",".join(map(str, self.default)) if self.many is tuple and self.default else self.default
        text = "must be given" if self.default is MISSING else "" if unsaid else f"default: {default}"
        text = f"{self.help} ({text})".strip() if text else self.help
        how = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if self.kind is bool:
            group.add_argument(f"--{self.name}", action=argparse.BooleanOptionalAction, **how)
        else:
            metavar = "|".join(map(str, self.choices)) if self.choices is not None else self.kind.__name__.upper()
            several = {list: {"action": "append"}, tuple: {"nargs": "+"}, None: {}}[self.many]
            group.add_argument(f"--{self.name}", type=self.word, metavar=metavar, **several, **how)

    def final(self, value: Any) -> object:
        """What the dataclass gets: words that hold several values, as one tuple."""
        if self.many is tuple and value is not None:
            return None if None in value else tuple(each for word in value for each in word)
        return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(message)


def parse(description: str, *types: type, argv: Sequence[str] | None = None, extra: Iterable[str] = (),
          presets: Path | None = None) -> tuple:  # fmt: skip
    """The settings of a command: flag given > value of the ``--config`` preset > default of the field.

    Flags are the fields' names; one name in several types is one flag. A preset is flat YAML, checked as the command
    line is; what is required may stand there.

    Args:
        description: for ``--help``; the module's docstring.
        types: dataclasses whose fields are of type bool, int, float, str, Path, ``Literal``, ``tuple[T, ...]`` (several
            words or commas), ``list[T]`` (a flag to repeat), or one of these ``| None``. The first line of a
            docstring is the group's title. A field ``config: Path`` takes the place of the usual ``--config``.
        extra: keys of presets that have no flag, an architecture say.
        presets: folder in which a ``--config`` is looked for that is no file itself.

    Returns:
        An instance of each type, and a dictionary of the ``extra`` keys that were given.

    Raises:
        InputError: in one line. ``--help`` exits.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags: dict[str, _Flag] = {}
    for kind in types:
        group = parser.add_argument_group((kind.__doc__ or "").partition("\n")[0].rstrip("."))
        hints = get_type_hints(kind)
        for each in fields(kind):
            if each.init and each.name not in flags:
                flags[each.name] = _Flag(each, hints[each.name])
                flags[each.name].add_to(group)
    if "config" not in flags:
        parser.add_argument("--config", type=Path, metavar="FILE", help="YAML preset; flags given here win")
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(f"unknown argument {shown(unknown[0])}{nearest(unknown[0], [f'--{name}' for name in flags])}")
    given, preset, others = vars(known), {}, {}
    config = given.get("config", flags["config"].default if "config" in flags else None)
    if config not in (None, MISSING):
        if presets is not None and not config.is_file():
            if not (presets / config).is_file():
                names = ", ".join(sorted(path.name for path in presets.glob("*.yml")))
                raise InputError(f"--config {config}: no such file, and none under {presets} ({names})")
            config = presets / config
        content = read_yaml(config, flags.keys() - {"config"}, extra)
        others = {key: content.pop(key) for key in list(content) if key not in flags}
        try:
            words = [word for name, value in content.items() for word in flags[name].words(value)]
            preset = vars(parser.parse_args(words))
        except InputError as error:
            raise InputError(f"config {config}: {error}") from None
    values = {name: flags[name].final(value) for name, value in {**preset, **given}.items() if name in flags}
    if missing := [f"--{name}" for name, flag in flags.items() if flag.default is MISSING and name not in values]:
        raise InputError(f"required: {', '.join(missing)}")
    chosen = ({f.name: values[f.name] for f in fields(kind) if f.name in values} for kind in types)
    return *(kind(**each) for kind, each in zip(types, chosen, strict=True)), others


def json_values(value: object) -> Any:
    """A value as JSON gives it back, so that two compare equal: paths as text, infinity and NaN as None."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises InputError: it cannot be read, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def write_json(path: str | Path, content: object) -> None:
    """Write JSON atomically; paths and the like as text. Raises InputError as `atomic_write`."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def file_name(text: str) -> str:
    """``text`` as the name of a file on any system, some suffix to come: printable, UTF-8, at most 200 bytes.

    Most names come back as they are; one that is cut ends in a hash of the whole, so that two stay apart.
    """
    plain = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in text)
    if len(plain.encode()) > 200:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        plain = f"{plain.encode()[:180].decode(errors='ignore')}_{digest}"
    return plain


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; flush it to disk and rename it into place on success.

    Raises:
        InputError: the folder cannot be written, or the disk is full. ``path`` keeps its old content then.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes the file private
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8 atomically. Raises InputError as `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_temporary(path: Path) -> bool:
    """Whether ``path`` is what `atomic_write` leaves if the process is killed while it writes."""
    named = re.fullmatch(r"\..+(\.\w+)\.[a-z0-9_]{8}\1", path.name) is not None
    return named and path.is_file() and not path.is_symlink()


def remove_temporaries(folder: str | Path) -> None:
    """Delete what a killed process left half written in ``folder``, and nothing else."""
    for path in filter(is_temporary, Path(folder).glob(".*")):
        path.unlink(missing_ok=True)
