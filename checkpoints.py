"""SPNN checkpoints: the weights as a plain state dict, the architecture beside them as JSON."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models import BUILT_IN, SPNN
from utils import InputError, atomic_write
from weights import check_fits, load_strictly, read_weights, write_weights


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; brackets without end
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def read_config(path: str | Path) -> tuple[dict, Path] | None:
    """What lies beside the weights at ``path``, and its file: X.json for X.pth, else config.json in the same folder.

    A config.json that describes no SPNN (no ``model`` in it) belongs to somebody else and counts as none.

    Raises:
        InputError: one that cannot be read, or an X.json without ``model``.
    """
    path = Path(path)
    own, shared = path.with_suffix(".json"), path.parent / "config.json"
    if own.is_file() and own != shared:
        content = _read_json(own)
        if not isinstance(content.get("model"), dict):
            raise InputError(f"{own}: has no 'model', the settings of the SPNN that {path.name} belongs to")
        return content, own
    if shared.is_file():
        content = _read_json(shared)
        if isinstance(content.get("model"), dict):
            return content, shared
    return None


def recognise(state: Mapping[str, Tensor]) -> dict | None:
    """The settings of the built-in architecture (hidden 128) that ``state`` belongs to, or None.

    Names and shapes decide. scale_bound is in no weight: it is taken to be the published 2.0.
    """
    biases = [m for name in state if (m := re.fullmatch(r"pinn\.blocks\.(\d+)\.t\.net\.(\d+)\.bias", name))]
    if not biases:
        return None
    num_classes = len(state[max(biases, key=lambda m: (int(m[1]), int(m[2])))[0]])
    mix_type = "householder" if any(name.endswith(".mix.V") for name in state) else "cayley"
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for img_size in BUILT_IN:
        config = {"img_ch": 3, "num_classes": num_classes, "hidden": 128, "scale_bound": 2.0}
        config |= {"img_size": img_size, "mix_type": mix_type}
        try:
            with torch.device("meta"):
                built = SPNN(**config)
        except ValueError:  # so many classes that the last block would drop nothing
            continue
        if {name: tensor.shape for name, tensor in built.state_dict().items()} == shapes:
            return config
    return None


def load_spnn(path: str | Path) -> tuple[SPNN, dict]:
    """The network in a weight file, on the CPU in eval mode, with what its JSON says.

    The architecture comes from the JSON beside the file (see `read_config`); without one, a built-in architecture is
    recognised from names and shapes, which is how the published weights come.

    Args:
        path: a .pth or .safetensors file.

    Returns:
        The network, and ``{"model": its settings, ...}`` with whatever `save_spnn` was given besides, such as
        ``attributes`` (the names of the logits).

    Raises:
        InputError: no such file, a damaged one, settings that make no network, or weights that do not fit it.
    """
    path = Path(path)
    state = read_weights(path)
    found = read_config(path)
    if found is None:
        config = recognise(state)
        if config is None:
            raise InputError(
                f"weights {path}: config.json is missing beside it, and these are no built-in architecture's weights: "
                f"copy it, or {path.stem}.json, from where the weights come from"
            )
        found = {"model": config}, path
    content, source = found
    try:
        with torch.device("meta"):
            frame = SPNN(**content["model"])
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:  # torch's, of sizes too
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{source}: its 'model' makes no network: {reason[:300]}") from None
    _check_notes(content, frame.num_classes, source)
    check_fits(frame, state, path)
    model = SPNN(**content["model"])
    load_strictly(model, state, path)
    return model.eval(), content


def _check_notes(content: Mapping, num_classes: int, source: Path) -> None:
    """Refuse attribute names and typical logits that are none: whoever uses them need not look again."""
    names, typical = content.get("attributes"), content.get("typical_logits")
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise InputError(f"{source}: its 'attributes' must be a list of names")
    if typical is not None:
        try:
            fits = torch.tensor(typical, dtype=torch.float32).isfinite().all() and len(typical) == num_classes
            fits = fits and all(len(pair) == 2 for pair in typical)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            fits = False
        if not fits:
            raise InputError(f"{source}: its 'typical_logits' must be {num_classes} pairs of finite numbers")


def save_spnn(path: str | Path, model: SPNN, extra: Mapping | None = None) -> None:
    """Write a network's weights, and ``{"model": model.config, **extra}`` beside them, each atomically.

    The JSON goes to config.json, which the checkpoints of one run share. Where the folder's config.json describes
    another network or other attributes, or X.pth has an X.json already, it goes to X.json: nobody else's changes.

    Args:
        path: .pth, or .safetensors.
        extra: what else to remember, JSON values: ``attributes``, ``typical_logits``, ...

    Raises:
        InputError: the folder cannot be written.
        ValueError: path is config.json's or X.json's own.
        TypeError: ``extra`` or the model's settings are no JSON.
    """
    path = Path(path)
    if path.suffix == ".json":
        raise ValueError(f"save_spnn writes weights to {path} and JSON beside it: use .pth or .safetensors")
    content = {**(extra or {}), "model": model.config}
    text = json.dumps(content, indent=2) + "\n"
    own, target = path.with_suffix(".json"), path.parent / "config.json"
    if own.is_file():
        target = own
    elif target.is_file():
        try:
            there = _read_json(target)
        except InputError:
            target = own
        else:
            same = json.loads(text)
            if any(there.get(key) != same.get(key) for key in ("model", "attributes")):
                target = own
    with atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_weights(path, model.state_dict())
