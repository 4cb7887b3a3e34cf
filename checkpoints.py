"""Weights in and out: files, folders and the Hugging Face hub.

    model = SPNN.from_pretrained("yamitehr/SPNN")    # a hub id, a folder, or a file
    model.save_pretrained("my_spnn")                 # model.safetensors and config.json
    python checkpoints.py convert best_model.pth best_model.safetensors --dtype float16

A file holds a plain state dict: safetensors, or torch's own format, of which no code is run. The architecture lies
beside it as JSON, ``{"model": settings, "attributes": names, ...}``. Of networks this module knows the names and shapes
of the published ones; `Pretrained` gives one the methods above.
"""

import argparse
import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils.sha import sha_fileobj
from torch import Tensor, nn

from utils import InputError, InputErrors, atomic_write, read_json, run_command, write_text

ROOT = Path(__file__).resolve().parent
M = TypeVar("M", bound=nn.Module)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
WRAPPERS = ("state_dict", "model", "model_state_dict", "ema", "weights", "params", "net")
PREFIXES = ("module.", "model.", "_orig_mod.")  # of DataParallel and averaged models, Lightning, torch.compile
# what the weights are called in a folder or on the hub; the first that is there is taken
WEIGHTS_NAMES = ("model.safetensors", "spnn.safetensors", "best_model_r_opt_real.pth", "best_model.pth",
                 "spnn_celebahq_256.pth")  # fmt: skip

# --- Files -----------------------------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU: .safetensors, or anything ``torch.save`` wrote.

    A dict that wraps one state dict (``{"model": {...}, "epoch": 3}``) is unwrapped, `PREFIXES` that all names share
    are taken off. No code in the file is run.

    Raises:
        InputError: no such file, a damaged one, one that would run code, or no state dict of plain, finite tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights {path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    state = read_object(path)
    if not _is_state_dict(state):
        inner = {k: v for k, v in state.items() if _is_state_dict(v)} if isinstance(state, Mapping) else {}
        if len(inner) > 1:  # an optimiser's tensors, say, beside the model's
            inner = {k: v for k, v in inner.items() if k in WRAPPERS}
        if len(inner) != 1:
            what = f"keys {[str(k) for k in state][:4]}" if isinstance(state, Mapping) else type(state).__name__
            raise InputError(f"weights {path}: expected a state dict (name -> tensor), found {what}")
        (state,) = inner.values()
    check_tensors(state, path)
    return _without_prefixes(state)


def check_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises InputError: of what is in a file, a tensor that is not plain, or not finite."""
    size = path.stat().st_size
    for name, tensor in state.items():
        known = tensor.layout == torch.strided and tensor.dtype in (*DTYPES.values(), *WHOLE)
        # what is larger than the file is one number, repeated by its strides
        if not known or tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() > size:
            found = f"{tensor.dtype}, {tensor.layout}, {list(tensor.shape)}"
            raise InputError(f"weights {path}: {name} is no plain tensor of real numbers ({found})")
        if not tensor.isfinite().all():
            raise InputError(f"weights {path}: {name} holds NaN or infinity")


def read_object(path: Path, kind: str = "plain state dict") -> Any:
    """The object in ``path``, on the CPU, read without running any code that the file may carry.

    Raises:
        InputError: a damaged file, or one that would run code; ``kind`` says what was expected.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with open(path, "rb") as file:
            start = file.read(2)
        if start != b"PK" and start[:1] != pickle.PROTO:  # tar archives too: torch < 2.6 runs code in them
            raise pickle.UnpicklingError("not in torch's format")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and safetensors raise almost anything on damaged bytes
        reason = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split()) or type(error).__name__
        size = f"{path.stat().st_size:,} bytes"
        raise InputError(f"{path}: damaged, or not a {kind} ({size}; no code in it is run): {reason[:200]}") from None


def write_object(path: Path, content: Any) -> None:
    """Write what `read_object` reads, atomically: safetensors if the suffix says so, else ``torch.save``.

    Raises:
        InputError: the file cannot be written, and is as it was.
    """
    with atomic_write(path) as temporary:
        try:
            if path.suffix == ".safetensors":
                safetensors.torch.save_file(content, temporary, metadata={"format": "pt"})
            else:
                torch.save(content, temporary)
        except (RuntimeError, safetensors.SafetensorError) as error:  # what a full disk looks like from there
            raise OSError(str(error).partition("\n")[0]) from error


def _is_state_dict(value: object) -> bool:
    """Whether it maps names to tensors, at least one."""
    pairs = value.items() if isinstance(value, Mapping) else ()
    return len(pairs) > 0 and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in pairs)


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {name.replace("._orig_mod.", "."): tensor for name, tensor in state.items()}  # compiled parts
    if any(name.startswith("module.") for name in state):
        state.pop("n_averaged", None)  # the counter of torch's AveragedModel, no weight
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def write_weights(path: str | Path, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write a state dict, see `write_object`.

    Args:
        state: name -> tensor on any device; written contiguous, from the CPU.
        dtype: what floating-point tensors are stored as (None keeps each as it is).

    Raises:
        InputError: the file cannot be written, or ``dtype`` cannot hold a number.
    """
    path, tensors = Path(path), {}
    for name, tensor in state.items():
        tensor = _converted(path, name, tensor.detach().cpu(), dtype if tensor.is_floating_point() else None)
        # clone: safetensors refuses tensors that share memory, torch.save would write the whole storage of a view
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    write_object(path, tensors)


def _converted(path: str | Path, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    lost = tensor.isfinite() & ~converted.isfinite() if dtype.is_floating_point else converted != tensor
    if lost.any():
        raise InputError(f"weights {path}: {name} holds {tensor[lost].flatten()[0]:.4g}, which {dtype} cannot")
    return converted


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load ``state`` into ``module``: every name and shape must match. Floats take the module's own dtype.

    A module on the meta device takes nothing, but is checked: what settings from a stranger ask for is known that way
    before it costs memory.

    Raises:
        InputError: names what does not fit, and ``path``, where the state came from.
    """
    own = module.state_dict()
    shapes, needed = ({name: list(tensor.shape) for name, tensor in some.items()} for some in (state, own))
    wrong = [f"missing {name}" for name in own if name not in state]
    wrong += [f"unexpected {name}" for name in state if name not in own]
    wrong += [f"{k} has shape {v}, needs {needed[k]}" for k, v in shapes.items() if k in own and v != needed[k]]
    if wrong:
        said = "; ".join(wrong[:2] + wrong[2:][-2:])
        raise InputError(f"weights {path}: do not fit {type(module).__name__}: {said} ({len(wrong)} in all)")
    state = {name: _converted(path, name, tensor, own[name].dtype) for name, tensor in state.items()}
    if not any(tensor.is_meta for tensor in own.values()):
        module.load_state_dict(state)


def built(build: Callable[[], M], state: Mapping[str, Tensor], path: Path) -> M:
    """What ``build`` makes, with these weights; it is held against them before it costs memory.

    Raises:
        InputError: as `load_strictly`, or it makes nothing.
    """
    try:
        with torch.device("meta"):
            load_strictly(build(), state, path)
        model = build()
    except InputError:
        raise
    except Exception as error:  # whatever malformed settings give
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(f"weights {path}: the settings beside it make no network: {reason}") from None
    load_strictly(model, state, path)
    return model


def read_config(path: str | Path) -> dict | None:
    """What lies beside the weights at ``path``: X.json for X.pth, else config.json in the same folder.

    A config.json that describes no network (no ``model`` in it) belongs to something else and counts as none.

    Raises:
        InputError: one that cannot be read, or an X.json without ``model``.
    """
    path = Path(path)
    own, shared = path.with_suffix(".json"), path.parent / "config.json"
    for file in (own, shared):
        if file.is_file():
            if isinstance((content := read_json(file)).get("model"), dict):
                return content
            if file != shared:
                raise InputError(f"{file}: has no 'model', the settings of the network that {path.name} belongs to")
    return None


def save_spnn(path: str | Path, model: "Pretrained", notes: Mapping | None = None) -> None:
    """Write a network's weights, and ``{"model": model.config, **notes}`` beside them, each atomically.

    The JSON goes to config.json, which the checkpoints of one run share. If the folder's config.json describes another
    network or other attributes, or X.pth has an X.json already, it goes to X.json: no other file's meaning changes.

    Args:
        path: .pth or .safetensors.
        notes: what else to remember, JSON values: ``attributes``, ``typical_logits``, ... None: the model's own.

    Raises:
        InputError: the folder cannot be written.
    """
    path = Path(path)
    text = json.dumps({**(model.notes if notes is None else notes), "model": model.config}, indent=2) + "\n"
    target, own = path.parent / "config.json", path.with_suffix(".json")
    there: dict = {}
    with suppress(InputError):  # it is somebody else's
        there = read_json(target) if target.is_file() else json.loads(text)
    same = all(there.get(key) == json.loads(text).get(key) for key in ("model", "attributes"))
    write_text(target if same and not own.is_file() else own, text)
    write_weights(path, model.state_dict())


# --- The hub, and what is published ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownWeights:
    """A published file: its hub repository, further addresses for people, and its place in the project, where it may
    be put by hand and is looked for first."""

    name: str
    repo: str
    filename: str
    manual_path: str
    mirrors: tuple[str, ...] = ()
    sha256: str | None = None


KNOWN = (
    KnownWeights("SPNN classifier (CelebA-HQ, 256x256)", "yamitehr/SPNN", "spnn_celebahq_256.pth",
                 "DDNM/exp/logs/celeba/spnn_celebahq_256.pth"),
    KnownWeights("diffusion prior (CelebA-HQ, 256x256)", "gwang-kim/DiffusionCLIP-CelebA_HQ", "celeba_hq.ckpt",
                 "DDNM/exp/logs/celeba/celeba_hq.ckpt",
                 ("https://drive.google.com/file/d/1wSoA5fm_d6JBZk4RZ1SzWLMgev4WqH21/view",),
                 "6cbb630eb856ff3ebe4854fe87af3c21a052765678955999db97ea15b5eeb8a5"),
)  # fmt: skip


class NotCached(InputError):
    """Offline, a file of a hub repository that the cache neither has nor knows to be absent."""


def hub_file(repo: str, filename: str, **hub: Any) -> Path | None:
    """A file of a hub repository, from huggingface_hub's cache or fetched into it; None if the repository lacks it.

    Args:
        hub: what ``huggingface_hub.hf_hub_download`` takes besides, such as ``revision`` or ``cache_dir``.

    Raises:
        InputError: no such repository, or no way to ask (`NotCached`, if that is because the environment says so).
    """
    if not hub.get("force_download"):  # what is there is not asked for again: a cluster's nodes have no network
        cached = huggingface_hub.try_to_load_from_cache(repo, filename, hub.get("cache_dir"), hub.get("revision"))
        if cached is not None:
            return Path(cached) if isinstance(cached, str) else None
    what = f"{repo}: {filename}"
    try:
        return Path(huggingface_hub.hf_hub_download(repo, filename, **hub))
    except LocalEntryNotFoundError as error:
        if hub.get("local_files_only") or huggingface_hub.constants.HF_HUB_OFFLINE:
            raise NotCached(f"{what} is not in the cache, and the hub is not asked (HF_HUB_OFFLINE)") from None
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(f"{what} is not in the cache, and the hub cannot be reached: {reason}") from None
    except EntryNotFoundError:
        return None
    except Exception as error:  # no such repository, no permission, a broken connection: of three libraries
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{what} cannot be fetched: {type(error).__name__}: {reason}") from None


def find(source: str | Path, names: Sequence[str], **hub: Any) -> Path | None:
    """The first of these files that ``source``, a folder or a hub id, has; None if it has none of them.

    Raises:
        InputError: ``source`` is neither, or as `hub_file`; NotCached: none is here, but the hub may have one.
    """
    folder, unknown = Path(source), None
    if folder.is_dir():
        return next((folder / name for name in names if (folder / name).is_file()), None)
    if not HUB_ID.fullmatch(str(source)):
        raise InputError(f"weights {source}: no such file or folder, and not a hub id like owner/repo")
    for name in names:
        try:
            if (path := hub_file(str(source), name, **hub)) is not None:
                return path
        except NotCached as error:
            unknown = unknown or error
    if unknown is not None:
        raise unknown
    return None


def locate(*sources: str | Path, **hub: Any) -> list[str]:
    """Each source as it is or, if it names a `KNOWN` file (by hub id, file name or place), the path of that file.

    Args:
        hub: see `hub_file`.

    Raises:
        InputErrors: published files that cannot be had, all of them in one message: for each its addresses and where
            to put it by hand.
        InputError: one that is not the published file.
    """
    found, missing = [], []
    for source in map(str, sources):
        known = next((k for k in KNOWN if source in (k.repo, k.filename, k.manual_path)), None)
        if known is None or Path(source).exists():
            found.append(source)
            continue
        by_hand = ROOT / known.manual_path
        try:
            path = by_hand if by_hand.is_file() else hub_file(known.repo, known.filename, **hub)
            if path is None:
                raise InputError("the repository does not have it any more")
        except InputError as error:
            hub_address = f"{huggingface_hub.constants.ENDPOINT}/{known.repo}/resolve/main/{known.filename}"
            lines = [f"  {known.name}: {known.filename} ({error})", f"    put it at {by_hand}, from"]
            lines += [f"      {address}" for address in (hub_address, *known.mirrors)]
            missing.append("\n".join([*lines, f"      (sha256 {known.sha256})"] if known.sha256 else lines))
            continue
        with open(path, "rb") as file:
            digest = sha_fileobj(file).hex() if known.sha256 is not None else None
        if digest != known.sha256:
            raise InputError(f"weights {path}: SHA-256 {digest}, the published file has {known.sha256}")
        found.append(str(path))
    if missing:
        files = f"{len(missing)} weight file{'s' if len(missing) != 1 else ''}"
        raise InputErrors("\n".join([f"{files} could not be found or fetched:", *missing]))
    return found


class Pretrained(nn.Module, huggingface_hub.PyTorchModelHubMixin, library_name="spnn", tags=["arxiv:2602.06042"]):
    """A network that is loaded and saved with ``config``, its settings, and ``notes``, more JSON values beside them.

    ``push_to_hub(ID)`` is huggingface_hub's, which documents its options.
    """

    config: dict
    notes: dict

    @classmethod
    def config_of(cls, state: Mapping[str, Tensor]) -> dict | None:
        """The settings of the built-in architecture (hidden 128) that weights belong to, or None.

        Names and shapes decide. scale_bound is in no weight: it is taken to be the published 2.0.
        """
        mix_type = "householder" if any(name.endswith(".mix.V") for name in state) else "cayley"
        for img_size, head in ((32, 4), (64, 7), (256, 8)):  # the number of the last block
            classes = len(state.get(f"pinn.blocks.{head}.t.net.6.bias", ()))
            config = {"img_ch": 3, "num_classes": classes, "hidden": 128, "scale_bound": 2.0}
            config |= {"img_size": img_size, "mix_type": mix_type}
            with suppress(ValueError), torch.device("meta"):  # no classes, or so many that the last block drops nothing
                own = cls(**config).state_dict()
                if {name: tensor.shape for name, tensor in own.items()} == {name: t.shape for name, t in state.items()}:
                    return config
        return None

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub: Any):
        """The network in ``source``, on the CPU in eval mode; its ``notes`` hold what was saved beside its settings.

        Args:
            source: a file, a folder that holds one of `WEIGHTS_NAMES`, or a hub id. The settings come from the JSON
                beside the weights (see `read_config`); without one, from names and shapes, if these are the published
                ones.
            hub: for a hub id, what ``huggingface_hub.hf_hub_download`` takes: ``revision``, ``token``, ...

        Raises:
            InputError: nothing there, a damaged file, settings that make no network, or weights that do not fit it.
        """
        (source,) = locate(source, **hub)
        path = Path(source)
        if not path.is_file():
            if (found := find(source, WEIGHTS_NAMES, **hub)) is None:
                raise InputError(f"weights {source}: has none of {', '.join(WEIGHTS_NAMES)}")
            path = found
            find(source, (f"{path.stem}.json", "config.json"), **hub)  # from the hub to beside the weights
        state = read_weights(path)
        content = read_config(path) or {"model": cls.config_of(state)}
        if content["model"] is None:
            raise InputError(
                f"weights {path}: config.json is missing beside it, and these are no built-in architecture's weights: "
                f"copy it, or {path.stem}.json, from where the weights come from"
            )
        model = built(lambda: cls(**content["model"]), state, path)
        model.notes = {key: value for key, value in content.items() if key != "model"}
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write model.safetensors and config.json; huggingface_hub documents the options.

        Raises:
            InputError: the folder's config.json is another network's, whose weights would lose their settings.
            TypeError: a note is no JSON value; nothing has been written.
        """
        json.dumps(self.notes)  # the mixin removes config.json before it writes
        there = Path(save_directory) / "config.json"
        if there.is_file() and (read_config(there) or {}).get("model") != json.loads(json.dumps(self.config)):
            raise InputError(f"{there} belongs to another network: save into another folder")
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_spnn(save_directory / WEIGHTS_NAMES[0], self)


# --- Command ---------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert weight files between torch's format and safetensors.")
    convert = parser.add_subparsers(dest="command", required=True).add_parser(
        "convert", help="read SRC, write DST; the suffix of DST decides the format"
    )
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
