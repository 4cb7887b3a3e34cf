"""Weights: the one place where they are read, written, converted and found.

python weights.py convert best_model.pth best_model.safetensors --dtype float16
"""

import argparse
import os
import pickle
import re
import socket
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit
from urllib.request import getproxies

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from download import Unavailable, download_file, offline, sha256_of
from utils import InputError, InputErrors, atomic_write, run_command

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
WRAPPERS = ("state_dict", "model", "model_state_dict", "ema", "weights", "params", "net")


@dataclass(frozen=True)
class KnownWeights:
    """A published weight file: where it is, where to put it by hand, and how to recognise it.

    ``repo`` is a hub id ``owner/name`` (None where the file is on no hub), ``manual_path`` is relative to the
    repository root, ``mirrors`` are further addresses of the file itself.
    """

    name: str
    repo: str | None
    filename: str
    manual_path: str
    mirrors: tuple[str, ...] = ()
    sha256: str | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every address of the file, the hub's first."""
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        on_hub = (f"{hub}/{self.repo}/resolve/main/{quote(self.filename)}",) if self.repo is not None else ()
        return on_hub + self.mirrors


KNOWN = {
    known.name: known
    for known in (
        KnownWeights(
            name="SPNN classifier (CelebA-HQ, 256x256)",
            repo="yamitehr/SPNN",
            filename="spnn_celebahq_256.pth",
            manual_path="DDNM/exp/logs/celeba/spnn_celebahq_256.pth",
        ),
        KnownWeights(
            name="diffusion prior (CelebA-HQ, 256x256)",
            repo="gwang-kim/DiffusionCLIP-CelebA_HQ",
            filename="celeba_hq.ckpt",
            manual_path="DDNM/exp/logs/celeba/celeba_hq.ckpt",
            mirrors=(
                "https://drive.usercontent.google.com/download?id=1wSoA5fm_d6JBZk4RZ1SzWLMgev4WqH21"
                "&export=download&confirm=t",
            ),
            sha256="6cbb630eb856ff3ebe4854fe87af3c21a052765678955999db97ea15b5eeb8a5",
        ),
        KnownWeights(
            name="alternative diffusion prior (CelebA-HQ, 256x256, Apache-2.0)",
            repo="google/ddpm-ema-celebahq-256",
            filename="diffusion_pytorch_model.safetensors",
            manual_path="DDNM/exp/logs/ddpm-ema-celebahq-256/diffusion_pytorch_model.safetensors",
        ),
    )
}


# Reading and writing --------------------------------------------------------------------------------------------


def _load_file(path: Path) -> object:
    """The object in ``path``, read without running any code that the file may carry."""
    damaged = f"weights {path}: truncated or damaged ({path.stat().st_size:,} bytes); fetch or write it again"
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with open(path, "rb") as file:
            start = file.read(2)
        if start == b"PK":
            with zipfile.ZipFile(path) as archive:  # torch.save stores; what is compressed may unpack to any size
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise InputError(f"weights {path}: a compressed archive, which torch.save does not write; refused")
        elif start[:1] != pickle.PROTO:  # tar archives too, which older versions of torch unpack
            raise InputError(damaged if not start else f"weights {path}: not a weight file, or a damaged one")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said once, here
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        # torch's own advice comes before its reason
        if re.search(r"global|class|trying to|can only", str(error).rpartition("WeightsUnpickler error")[2].lower()):
            raise InputError(
                f"weights {path}: holds more than tensors and would run code when loaded; refused. Save it as a plain "
                f"state dict, or get it from a source that offers one"
            ) from None
        raise InputError(f"weights {path}: not a weight file, or a damaged one") from None
    except PermissionError as error:
        raise InputError(f"weights {path}: cannot be read: {error.strerror}") from None
    except Exception:  # torch.load and safetensors raise almost anything on damaged bytes
        raise InputError(damaged) from None


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU: .safetensors, or anything ``torch.save`` wrote.

    A dict that wraps exactly one state dict (``{"model": {...}}``) is unwrapped, and a ``module.`` prefix that all
    names share is stripped. No code in the file is run.

    Raises:
        InputError: no such file, a damaged one, one that would run code, or one that holds no state dict of plain,
            finite tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights {path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    loaded = _load_file(path)
    if not _is_state_dict(loaded):
        inner = {k: v for k, v in loaded.items() if _is_state_dict(v)} if isinstance(loaded, Mapping) else {}
        if len(inner) > 1:  # an optimiser's tensors, say, beside the model's
            inner = {k: v for k, v in inner.items() if k in WRAPPERS}
        if len(inner) != 1:
            keys = isinstance(loaded, Mapping)
            what = f"keys {[str(k) for k in list(loaded)[:4]]}" if keys else f"a {type(loaded).__name__}"
            raise InputError(f"weights {path}: expected a state dict (name -> tensor), found {what}")
        (loaded,) = inner.values()
    for name, tensor in loaded.items():
        check_tensor(name, tensor, path)
    if all(name.startswith("module.") for name in loaded):  # written from inside DataParallel
        loaded = {name.removeprefix("module."): tensor for name, tensor in loaded.items()}
    return dict(loaded)


def check_tensor(name: str, tensor: Tensor, path: str | Path) -> None:
    """Refuse what is no plain tensor of finite numbers.

    Args:
        path: the file it came from: a tensor cannot be larger than that.

    Raises:
        InputError: names the tensor and what is wrong with it.
    """
    kinds = (*DTYPES.values(), torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
    if tensor.layout != torch.strided or tensor.dtype not in kinds or tensor.device.type != "cpu":
        raise InputError(f"weights {path}: {name} is no plain tensor of real numbers ({tensor.dtype}, {tensor.layout})")
    if tensor.numel() * tensor.element_size() > Path(path).stat().st_size:  # one number, repeated by its strides
        raise InputError(f"weights {path}: {name} claims shape {list(tensor.shape)}, more than the file holds")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise InputError(f"weights {path}: {name} holds NaN or infinity")


def write_weights(path: str | Path, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write a state dict atomically: safetensors where the suffix says so, else ``torch.save``.

    Args:
        state: name -> tensor on any device; written contiguous, from the CPU.
        dtype: what floating-point tensors are stored as (None keeps each as it is).

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)

    def stored(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        # clone: safetensors refuses tensors that share memory, torch.save would write the whole storage of a view
        return tensor.detach().to(device="cpu", dtype=kind).clone(memory_format=torch.contiguous_format)

    tensors = {name: stored(tensor) for name, tensor in state.items()}
    with atomic_write(path) as temporary:
        try:
            if path.suffix == ".safetensors":
                safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
            else:
                torch.save(tensors, temporary)
        except (RuntimeError, safetensors.SafetensorError) as error:  # what a full disk looks like from there
            raise OSError(str(error)) from error


def check_fits(module: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse a state dict that is not the module's own: every name and shape must match, and floats be floats.

    Args:
        module: may be on the meta device: what a stranger's settings ask for is then known before it costs memory.
        path: where ``state`` came from, for the message.

    Raises:
        InputError: names the first missing and unexpected tensors, or a tensor with both its shapes or types.
    """
    own = module.state_dict()
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    if missing or extra:

        def some(names: list[str]) -> str:
            return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

        parts = ([f"missing {some(missing)}"] if missing else []) + ([f"unexpected {some(extra)}"] if extra else [])
        raise InputError(f"weights {path}: do not fit {type(module).__name__}: {'; '.join(parts)}")
    for name, tensor in state.items():
        needs = f"{type(module).__name__} needs"
        if tensor.shape != own[name].shape:
            raise InputError(f"weights {path}: {name} has shape {list(tensor.shape)}, {needs} {list(own[name].shape)}")
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise InputError(f"weights {path}: {name} is {tensor.dtype}, {needs} {own[name].dtype}")


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load ``state`` into ``module``: every name and shape must match. Floats take the module's own dtype.

    Raises:
        InputError: as `check_fits`.
    """
    check_fits(module, state, path)
    module.load_state_dict(state, strict=True)  # copies in place, which converts to the module's dtype


# Finding --------------------------------------------------------------------------------------------------------


def check_file(path: str | Path, known: KnownWeights) -> None:
    """Compare a file's SHA-256 with the published one (a second for 455 MB); nothing where none is known.

    Raises:
        InputError: another one.
    """
    if known.sha256 is not None and (found := sha256_of(path)) != known.sha256:
        raise InputError(f"weights {path}: SHA-256 {found}, the published file has {known.sha256}; fetch it again")


def missing_message(missing: Mapping[KnownWeights, Mapping[str, str]]) -> str:
    """One message for every weight file that could not be had: where to put it by hand, and its addresses, each with
    the reason why it did not give the file."""
    lines = [f"{len(missing)} weight file{'s' if len(missing) != 1 else ''} could not be found or fetched:"]
    for known, reasons in missing.items():
        lines += [f"  {known.name}: {known.filename}", f"    put it at {known.manual_path}, from any of"]
        lines += [f"      {a} ({reasons[a]})" if a in reasons else f"      {a}" for a in known.addresses]
        if known.sha256 is not None:
            lines.append(f"      (sha256 {known.sha256})")
    return "\n".join(lines)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def cached_by_hub(repo: str, filename: str) -> Path | None:
    """A file of a Hugging Face hub repository in that client's own cache, or None."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    cached = try_to_load_from_cache(repo, filename)
    return Path(cached) if isinstance(cached, str) else None


def download(repo: str, filename: str) -> Path:
    """A file of any Hugging Face hub repository, from the hub client's cache where it is already there.

    Raises:
        InputError: no connection, no such repository or file, or huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.utils import logging as hub_logging
    except ImportError:
        raise InputError(f"{repo}/{filename}: fetching needs huggingface_hub: pip install huggingface_hub") from None
    if (cached := cached_by_hub(repo, filename)) is not None:
        return cached
    if offline():
        raise InputError(f"{repo}/{filename}: not in the hub client's cache, and HF_HUB_OFFLINE is set")
    if not getproxies():  # without a name server the client would retry for half a minute before it says so
        host = urlsplit(constants.ENDPOINT).hostname
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            raise InputError(f"{repo}/{filename}: cannot be fetched: no connection to {host}") from None
    hub_logging.set_verbosity_error()  # what went wrong is said once, below
    try:
        return Path(hf_hub_download(repo_id=repo, filename=filename))
    except Exception as error:  # the hub client raises its own, requests', httpx' and the OS's exceptions
        raise InputError(f"{repo}/{filename}: cannot be fetched from the hub: {_first_line(error)}") from None


def locate(source: str | Path, filename: str) -> Path:
    """The local path of ``filename`` from ``source``: a file, a folder that holds it, or a hub id ``owner/repo``.

    Raises:
        InputError: names what was looked for and, for a file in `KNOWN`, where to get it and where to put it.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if (path / filename).is_file():
            return path / filename
        raise InputError(f"weights: folder {path} has no {filename}")
    known = next((k for k in KNOWN.values() if k.filename == filename and str(source) == k.repo), None)
    if not HUB_ID.fullmatch(str(source)):
        raise InputError(f"weights {source}: no such file or folder, and not a hub id like owner/repo")
    if known is not None:
        return fetch(known)
    try:
        return download(str(source), filename)
    except InputError as error:
        raise InputError(f"weights {source}: no such local file or folder; {error}") from None


class MissingWeights(InputErrors):
    """A known file is neither at its manual path nor to be fetched.

    Attributes:
        known: which one. reasons: its addresses -> why each did not give it, one line.
    """

    def __init__(self, known: KnownWeights, reasons: Mapping[str, str]) -> None:
        super().__init__(missing_message({known: reasons}))
        self.known, self.reasons = known, reasons


def fetch(known: KnownWeights, root: str | Path = Path(__file__).parent) -> Path:
    """A known file: at its manual path under ``root``, in the hub client's cache, else fetched to the manual path.

    Its SHA-256 is checked wherever it comes from.

    Raises:
        MissingWeights: it is nowhere to be had.
        InputError: a file that is not the published one, or a folder that cannot be written.
    """
    path = Path(root) / known.manual_path
    if not path.is_file():
        if known.repo is not None and (cached := cached_by_hub(known.repo, known.filename)) is not None:
            path = cached
        else:
            try:
                return download_file(known.addresses, path, known.sha256)
            except Unavailable as error:
                raise MissingWeights(known, error.reasons) from None
    check_file(path, known)
    return path


# Command --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert weight files between torch's format and safetensors.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="read SRC, write DST; the suffix of DST decides the format")
    convert.add_argument("source", type=Path, metavar="SRC")
    convert.add_argument("target", type=Path, metavar="DST", help=".safetensors, or .pth for torch's own format")
    convert.add_argument("--dtype", choices=sorted(DTYPES), help="store floats as this (default: as they are)")
    args = parser.parse_args(argv)
    state = read_weights(args.source)
    write_weights(args.target, state, DTYPES[args.dtype] if args.dtype is not None else None)
    count = sum(tensor.numel() for tensor in state.values())
    print(f"{args.target}: {len(state)} tensors, {count:,} numbers, {args.target.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    run_command(main)
