"""A prior through OpenVINO computes what it computes without."""

import sys

import pytest
import torch

from DDNM.guided_diffusion.compiled import compile_for_cpu
from DDNM.guided_diffusion.prior import Prior, small_unet
from utils import InputError


def tiny_prior(autocast=None) -> Prior:
    torch.manual_seed(0)
    return Prior(small_unet(16, (8, 16), norm_groups=4, attention_size=4), autocast, channels_last=True).eval()


def test_it_gives_the_same_noise_for_any_batch_and_gradients_pass_through_pytorch():
    pytest.importorskip("openvino")
    plain, compiled = tiny_prior(), tiny_prior()
    assert compile_for_cpu(compiled) == "f32" and compiled.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part, t in ((x[:1], 5), (x, 0), (x, 999)):  # a batch of one, of which it would make a constant, first
            torch.testing.assert_close(compiled(part, t), plain(part, t), rtol=1e-4, atol=1e-4)
        first = compiled(x, 7)
        before = first.clone()
        compiled(-x, 7)
        assert torch.equal(first, before)  # no result is overwritten by the next
    got, expected = (torch.func.grad(lambda x, prior=prior: prior(x, 500).sum())(x) for prior in (compiled, plain))
    torch.testing.assert_close(got, expected)


def test_bf16_is_the_hint_of_a_cpu_that_has_it():
    openvino = pytest.importorskip("openvino")
    prior = tiny_prior(torch.bfloat16)
    has = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert compile_for_cpu(prior) == ("bf16" if has else "f32")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.testing.assert_close(prior(x, 500), tiny_prior()(x, 500), rtol=0.1, atol=0.1)


def test_without_openvino_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match="pip install -r requirements-openvino.txt"):
        compile_for_cpu(tiny_prior())
