"""A prior's U-Net, run by OpenVINO on a CPU. It computes what PyTorch does, to rounding, and keeps no gradients."""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from DDNM.guided_diffusion.prior import Prior
from utils import InputError


@functools.cache
def openvino_core():
    """OpenVINO, once for the process: each one moves the stack that signals are handled on, and when two are gone, the
    next signal (of a child process that ends, say) may find none and crash the process.

    Raises:
        InputError: it is not installed.
    """
    try:
        import openvino
    except ImportError:
        raise InputError(
            "--compile on a CPU needs OpenVINO: pip install -r requirements-openvino.txt, or leave --compile out"
        ) from None
    return openvino.Core()


def compile_for_cpu(prior: Prior) -> str:
    """Have OpenVINO run the U-Net of ``prior`` wherever no gradient is asked for; PyTorch runs it elsewhere.

    It is translated at the first use, which takes seconds. In place, under the same weights' names. A prior that runs
    under bf16 autocast gets OpenVINO's bf16 hint if the CPU computes in bf16, else float32.

    Returns:
        The precision that it computes in, "f32" or "bf16".

    Raises:
        InputError: OpenVINO is not installed.
    """
    core = openvino_core()
    bf16 = prior.autocast is torch.bfloat16 and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = "bf16" if bf16 else "f32"
    unet, plain = prior.unet, prior.unet.forward
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled: list[Callable] = []  # once it is

    def forward(h: Tensor, t: Tensor, *arguments, **keywords):
        if torch.is_grad_enabled():
            return plain(h, t, *arguments, **keywords)
        if not compiled:
            compiled.append(core.compile_model(_translated(_Plain(unet), h, t), "CPU", settings))
        inputs = h.float().contiguous().numpy(), t.long().contiguous().numpy()
        (result,) = compiled[0](inputs, share_outputs=False).values()  # its own array is written into by the next call
        return (torch.from_numpy(result),)

    unet.forward = forward  # type: ignore[method-assign]
    return precision


class _Plain(nn.Module):
    """A U-Net's own forward pass, tensors in and a tensor out."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        return type(self.unet).forward(self.unet, h, t, return_dict=False)[0]


def _translated(network: nn.Module, h: Tensor, t: Tensor):
    """An OpenVINO model of a network of ``h`` (B, C, H, W) and ``t`` (B,), for any B."""
    import openvino

    inputs = [([-1, *h.shape[1:]], openvino.Type.f32), ([-1], openvino.Type.i64)]
    example = h.float().expand(max(len(h), 2), *h.shape[1:]), t.long().expand(max(len(t), 2))  # B = 1 would be kept
    with warnings.catch_warnings(), torch.autocast("cpu", enabled=False):
        warnings.simplefilter("ignore")  # tracing takes sizes for constants: H and W are
        return openvino.convert_model(network.eval(), example_input=example, input=inputs)
