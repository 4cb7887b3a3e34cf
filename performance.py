"""Where the names of this module were before they moved to blocks.py; goes when nobody uses it."""

import platform
from collections.abc import Iterable

import torch
from torch import nn

from blocks import PRECISIONS, ConvMLP, convolutions_in, has_tf32, networks_in  # noqa: F401
from models import SPNN
from utils import InputError


def prepare_networks(model: SPNN, device: torch.device) -> SPNN:
    """Move ``model`` to ``device``, on a GPU in the memory format that is fast there; returns it."""
    return model.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)


def compile_networks(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Have ``torch.compile`` translate ``networks`` at their first use: in place, under the same weights' names.

    Raises:
        InputError: nothing can be compiled here, for want of a compiler perhaps.
    """
    try:
        torch.compile(lambda x: torch.relu(x) + 1)(torch.zeros(8, device=device))
    except Exception as error:  # torch's, the compiler's or the operating system's: as many as there are set-ups
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"torch.compile does not work here ({reason}); it needs a C++ compiler, and Triton on a GPU: "
            f"install them or leave --compile out ({platform.platform(terse=True)})"
        ) from None
    # modules share an entry point, and torch counts their shapes against one limit, 8: the ninth would stay as it is
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), 256))
    for network in networks:
        network.compile()


def inner_networks(model: SPNN) -> list[nn.Module]:
    """The layers of s, t and r of every block."""
    return [module.net for module in model.modules() if isinstance(module, ConvMLP)]


def checkpoint_activations(model: SPNN) -> SPNN:
    model.pinn.checkpoint_activations = True
    return model
