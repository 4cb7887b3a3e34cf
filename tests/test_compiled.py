"""A prior through OpenVINO computes what it computes without."""

import faulthandler
import gc
import os
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import seeded
from runs import exit_code
from torch import nn

from DDNM.guided_diffusion import compiled as module
from DDNM.guided_diffusion.compiled import compile_for_cpu, openvino_core
from DDNM.guided_diffusion.prior import Prior, small_unet
from utils import InputError


def tiny_prior(autocast=None) -> Prior:
    torch.manual_seed(0)
    unet = small_unet(16, (8, 16), unshuffle=1, norm_groups=4, attention_size=8)
    return Prior(unet, autocast, channels_last=True).eval()


class Convolution(nn.Module):
    """In the place of a U-Net, which takes seconds to translate."""

    def __init__(self, unet=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3, generator=seeded(0)))

    def forward(self, h, t):
        return F.conv2d(h, self.weight, padding=1) + t.view(-1, 1, 1, 1)


def test_it_gives_the_same_noise_for_any_batch_and_gradients_pass_through_pytorch():
    pytest.importorskip("openvino")
    plain, compiled = tiny_prior(), tiny_prior()
    assert compile_for_cpu(compiled) == "f32" and compiled.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(3, 3, 16, 16, generator=seeded(0))
    with torch.no_grad():
        for part, t in ((x[:1], 5), (x, 0), (x, 999)):  # a batch of one, of which it would make a constant, first
            torch.testing.assert_close(compiled(part, t), plain(part, t), rtol=1e-4, atol=1e-4)
        first = compiled(x, 7)
        before = first.clone()
        compiled(-x, 7)
        assert torch.equal(first, before)  # no result is overwritten by the next
    got, expected = (torch.func.grad(lambda x, prior=prior: prior(x, 500).sum())(x) for prior in (compiled, plain))
    torch.testing.assert_close(got, expected)


def test_bf16_is_the_hint_of_a_cpu_that_has_it(monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(module, "_Plain", Convolution)
    prior = tiny_prior(torch.bfloat16)
    has = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert compile_for_cpu(prior) == ("bf16" if has else "f32")
    x = torch.randn(2, 3, 16, 16, generator=seeded(0))
    with torch.no_grad():
        torch.testing.assert_close(prior(x, 5), Convolution()(x, torch.tensor([5, 5])), rtol=0.1, atol=0.1)


def two_come_and_go() -> None:
    faulthandler.enable()  # as pytest has it: signals have a stack of their own
    module._Plain = Convolution
    priors = [tiny_prior() for _ in range(2)]
    for prior in priors:
        compile_for_cpu(prior)
        with torch.no_grad():
            prior(torch.zeros(1, 3, 16, 16), 5)
    for prior in priors:
        del prior.unet.forward  # and with it what was compiled, in the order in which it came
        gc.collect()
    signal.signal(signal.SIGUSR1, lambda *_: None)
    os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_after_compiled_networks_are_gone_does_no_harm():
    pytest.importorskip("openvino")
    assert exit_code(two_come_and_go) == 0


def test_without_openvino_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(module, "openvino_core", openvino_core.__wrapped__)
    with pytest.raises(InputError, match="pip install -r requirements-openvino.txt"):
        compile_for_cpu(tiny_prior())
