"""Residual blocks by the kernel of winograd.cpp: the same numbers, and plain ones wherever it does not serve."""

import copy
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from DDNM.guided_diffusion import winograd
from DDNM.guided_diffusion.winograd import (
    FEW_PIXELS,
    FusedResnetBlock2D,
    compile_convolutions,
    kernels,
    norm_affine,
    pack_weight,
)
from performance import Col2imConvTranspose2d, Im2colConv2d
from utils import InputError

pytestmark = pytest.mark.skipif(
    shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0]) is None, reason="no C++ compiler"
)
DIRECT_ROUNDING = 1e-6  # of the same sums, term by term
NETWORK_ROUNDING = 1e-5  # of a U-Net: what its layers' roundings add up to
SUMMED = 5e-6  # of a mean of values around 1, some hundred of which are summed in float32
ROUNDING = 3e-6  # of F(4x4, 3x3) in float32 with up to 128 channels: root mean square, relative; directly it is 7e-7


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


# --- The kernel ------------------------------------------------------------------------------------------------------

SHAPES = [  # B, C, O, H, W
    (1, 16, 32, 4, 4),
    (1, 32, 64, 1, 1),
    (2, 48, 32, 5, 7),
    (3, 32, 96, 18, 30),
    (2, 48, 144, 8, 8),
    (1, 16, 16, 9, 6),
    (1, 128, 128, 33, 64),
]


WAYS = {"Winograd": (3, 1), "3x3": (3, 1), "3x3, stride 2": (3, 2), "1x1": (1, 1), "1x1, stride 2": (1, 2)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activated", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_the_kernel_is_the_convolution(shape, activated, way):
    b, c, o, h, w = shape
    kernel, stride = WAYS[way]
    torch.manual_seed(0)
    x, bias, affine = torch.randn(b, h, w, c), torch.randn(b, o), torch.randn(b, 2, c)
    weight, skip = torch.randn(o, c, kernel, kernel), torch.randn(b, (h - 1) // stride + 1, (w - 1) // stride + 1, o)
    images = x.double().permute(0, 3, 1, 2)
    if activated:
        scale, shift = affine.double()[..., None, None].unbind(1)
        images = F.silu(images * scale + shift)
    expected = F.conv2d(images, weight.double(), stride=stride, padding=kernel // 2) + bias.double()[..., None, None]
    expected = expected.permute(0, 2, 3, 1)
    u, scale_and_shift = pack_weight(weight, way == "Winograd"), affine if activated else None
    for added, total in ((None, expected), (skip, expected + skip)):
        y, moments = kernels().convolve([x], scale_and_shift, u, bias, added, 1, stride)
        assert relative_error(y, total) < (ROUNDING if way == "Winograd" else DIRECT_ROUNDING)
        assert_moments_are_of(y, moments)


def assert_moments_are_of(y, moments):
    mean, square = y.double().mean((1, 2)), y.double().square().mean((1, 2))  # (B, C) each
    largest = y.abs().max().item()
    torch.testing.assert_close(moments, torch.stack([mean, square], 1), rtol=1e-5, atol=SUMMED * largest)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activated, winograd", [(True, True), (False, True), (True, False)])
def test_parts_stand_for_their_concatenation(shape, activated, winograd):
    b, c, o, h, w = shape
    torch.manual_seed(0)
    parts = [torch.randn(b, h, w, channels) for channels in (c, 16, 2 * c)]
    channels = sum(part.shape[3] for part in parts)
    affine = torch.randn(b, 2, channels) if activated else None
    u, bias = pack_weight(torch.randn(o, channels, 3, 3), winograd), torch.randn(b, o)
    whole = kernels().convolve([torch.cat(parts, 3)], affine, u, bias, None)
    for got, expected in zip(kernels().convolve(parts, affine, u, bias, None), whole, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activated, winograd", [(True, True), (False, True), (True, False)])
def test_a_map_is_enlarged_as_by_nearest_neighbours(shape, activated, winograd):
    b, c, o, h, w = shape
    torch.manual_seed(0)
    x, affine = torch.randn(b, h, w, c), torch.randn(b, 2, c) if activated else None
    u, bias = pack_weight(torch.randn(o, c, 3, 3), winograd), torch.randn(b, o)
    large = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for got, expected in zip(
        kernels().convolve([x], affine, u, bias, None, 2),
        kernels().convolve([large], affine, u, bias, None),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 3, 5, 48), (3, 40, 40, 16), (1, 12, 11, 128)], ids=str)
def test_moments_are_means_and_means_of_squares(shape, offset):
    torch.manual_seed(0)
    x = torch.randn(shape) + offset
    mean, square = kernels().moments(x).unbind(1)
    pixels = x.double().flatten(1, 2)
    torch.testing.assert_close(mean, pixels.mean(1), rtol=0, atol=SUMMED)
    torch.testing.assert_close(square - mean**2, pixels.var(1, correction=0), rtol=0, atol=4 * SUMMED)


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_the_result_does_not_depend_on_the_threads(threads):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 20, 20, 32), torch.randn(160, 32, 3, 3), torch.zeros(2, 160)
    u = pack_weight(weight, True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, moments = kernels().convolve([x], None, u, bias, None)
        torch.set_num_threads(threads)  # tasks of 2 or 3 panels, of 1 or 2, of 1
        again, its_moments = kernels().convolve([x], None, u, bias, None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(again, alone) and torch.equal(its_moments, moments)
    expected = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), padding=1)
    assert relative_error(alone.permute(0, 3, 1, 2), expected) < ROUNDING


@pytest.mark.parametrize("lo, hi", [(-200, -20), (-20, 20), (20, 200), (-1e30, -1e29), (1e29, 1e30)])
def test_silu_from_end_to_end_of_the_range(lo, hi):
    x = torch.zeros(1, 4, 400, 16)  # a value in each tile, as rounding is relative to a tile's largest
    x[0, 1, 1::4] = torch.linspace(lo, hi, 1600).reshape(100, 16)
    weight = torch.zeros(32, 16, 3, 3)
    weight[range(16), range(16), 1, 1] = 1  # the identity
    affine = torch.stack([torch.ones(1, 16), torch.zeros(1, 16)], 1)
    y, _ = kernels().convolve([x], affine, pack_weight(weight, True), torch.zeros(1, 32), None)
    got = y[0, 1, 1::4, :16]
    torch.testing.assert_close(got.double(), F.silu(x[0, 1, 1::4].double()), rtol=3e-6, atol=1e-7)


def test_what_is_not_finite_stays_so():
    x = torch.zeros(1, 4, 4, 16)
    x[0, 1, 1, 3] = torch.nan
    weight, affine = torch.ones(32, 16, 3, 3), torch.ones(1, 2, 16)
    y, moments = kernels().convolve([x], affine, pack_weight(weight, True), torch.zeros(1, 32), None)
    assert y[0, 1, 1].isnan().all() and moments.isnan().all()


@pytest.mark.parametrize("groups, offset", [(4, 0.0), (32, 0.0), (1, 1000.0), (8, 1000.0)])
def test_the_affine_map_is_the_normalisation(groups, offset):
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, 32, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, 21, 13, 32) * torch.rand(32).add(0.5) + torch.randn(32) + offset
    parts = [kernels().moments(part.contiguous()) for part in x.split([16, 16], 3)]
    scale, shift = norm_affine(norm, parts).double().unbind(1)  # (B, C) each
    got = x.double() * scale[:, None, None] + shift[:, None, None]
    expected = copy.deepcopy(norm).double()(x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert relative_error(got, expected) < 3e-7 * (
        1 + offset
    )  # scale and shift are float32, the latter as large as the offset


@pytest.mark.parametrize(
    "change",
    [
        {"x": []},
        {"x": [torch.zeros(1, 4, 4, 20)]},
        {"x": [torch.zeros(1, 4, 4, 16), torch.zeros(1, 4, 5, 16)]},
        {"x": [torch.zeros(1, 4, 4, 32), torch.zeros(1, 4, 4, 16)]},
        {"x": [torch.zeros(0, 4, 4, 32)]},
        {"x": [torch.zeros(1, 4, 4, 32).double()]},
        {"x": [torch.zeros(1, 4, 32, 4).transpose(2, 3)]},
        {"scale_factor": 3},
        {"stride": 2},
        {"stride": 2, "scale_factor": 2, "u": torch.zeros(1, 1, 288, 32)},
        {"u": torch.zeros(1, 1, 64, 32)},
        {"affine": torch.zeros(1, 2, 16)},
        {"bias": torch.zeros(2, 32)},
        {"bias": torch.zeros(1, 0)},
        {"u": torch.zeros(36, 1, 32, 8)},
        {"skip": torch.zeros(1, 4, 4, 16)},
    ],
)
def test_a_tensor_of_another_form_is_refused(change):
    given = {"x": [torch.zeros(1, 4, 4, 32)], "affine": None, "u": pack_weight(torch.zeros(32, 32, 3, 3), True),
             "bias": torch.zeros(1, 32), "skip": None, "scale_factor": 1, "stride": 1}  # fmt: skip
    kernels().convolve(*given.values())
    with pytest.raises(RuntimeError, match="convolve: "):
        kernels().convolve(*(given | change).values())


@pytest.mark.parametrize("x", [torch.zeros(1, 4, 4, 20), torch.zeros(4, 4, 32), torch.zeros(1, 0, 4, 32)])
def test_moments_of_another_form_are_refused(x):
    with pytest.raises(RuntimeError, match="moments: expected"):
        kernels().moments(x)


@pytest.mark.parametrize(
    "moments, channels",
    [(torch.zeros(1, 2, 32), 32), (torch.zeros(1, 2, 32).double(), 48), (torch.zeros(1, 1, 32).double(), 32)],
)
def test_an_affine_map_of_another_form_is_refused(moments, channels):
    with pytest.raises(RuntimeError, match="affine: expected"):
        norm_affine(nn.GroupNorm(8, channels), [moments])


# --- Networks --------------------------------------------------------------------------------------------------------


def unet(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    form = {
        "sample_size": 32, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    network = UNet2DModel(**form | changes).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return network


def kinds(network: nn.Module) -> dict[str, int]:
    layers = [type(m).__name__ for m in network.modules() if type(m).__module__ == winograd.__name__]
    return {kind: layers.count(kind) for kind in sorted(set(layers))}


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_compiled_network_computes_the_same(channels_last, batch):
    plain = unet().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    compiled = copy.deepcopy(plain)
    compile_convolutions(compiled)
    assert kinds(compiled) == {
        "DeferredGroupNorm": 1, "DeferredSiLU": 1, "FusedAttnUpBlock2D": 1, "FusedResnetBlock2D": 8,
        "FusedUpBlock2D": 1, "FusedUpsample2D": 1, "CompiledConv2d": 24,
    }  # fmt: skip
    assert list(compiled.state_dict()) == list(plain.state_dict())
    x, t = torch.randn(batch, 3, 32, 32), torch.arange(batch) * 100
    expected = copy.deepcopy(plain).double()(x.double(), t).sample
    got = compiled(x, t).sample
    assert relative_error(got, expected) < NETWORK_ROUNDING and not torch.equal(got, plain(x, t).sample)


PLAIN = [ResnetBlock2D, Upsample2D, UpBlock2D, AttnUpBlock2D]


@pytest.mark.parametrize("plain", PLAIN, ids=[c.__name__ for c in PLAIN])
def test_the_kernel_is_what_computes(monkeypatch, plain):
    compiled = unet()
    compile_convolutions(compiled)
    monkeypatch.setattr(plain, "forward", lambda *_, **__: 1 / 0)
    for side in (32, 8):
        compiled(torch.randn(1, 3, side, side), 5)
    if plain in (ResnetBlock2D, Upsample2D):
        with pytest.raises(ZeroDivisionError), torch.autocast("cpu", torch.bfloat16):
            compiled(torch.randn(1, 3, 32, 32), 5)


def test_the_last_normalisation_is_computed_in_the_last_convolution(monkeypatch):
    compiled = unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False)
    compile_convolutions(compiled)
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda *_: 1 / 0)
    compiled(torch.randn(1, 3, 32, 32), 5)


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_layers_of_an_spnn_compute_the_same(side, batch, monkeypatch):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(32, 48, 3, padding=1), nn.Conv2d(32, 48, 3, 2, 1), nn.Conv2d(32, 48, 1),
        nn.ConvTranspose2d(32, 48, 4, 2, 1),
    ]  # fmt: skip
    layers[1].__class__, layers[3].__class__ = Im2colConv2d, Col2imConvTranspose2d  # as `prepare_networks` makes them
    layers = nn.ModuleList(layers).requires_grad_(False)
    x = torch.randn(batch, 32, side, side)
    expected = [layer(x.double()) for layer in copy.deepcopy(layers).double()]
    compile_convolutions(layers)
    for layer, total in zip(layers, expected, strict=True):
        winograd = layer is layers[0] and batch * side * side >= FEW_PIXELS
        assert relative_error(layer(x), total) < (ROUNDING if winograd else DIRECT_ROUNDING)
    for plain in (Im2colConv2d, Col2imConvTranspose2d):
        monkeypatch.setattr(plain, "forward", lambda *_: 1 / 0)
    for i, layer in enumerate(layers):
        pixels = batch * side * side // (4 if i == 1 else 1)
        if i == 0 or pixels < FEW_PIXELS:
            layer(x)
        else:
            with pytest.raises(ZeroDivisionError):
                layer(x)


def test_nothing_is_concatenated(monkeypatch):
    compiled = unet()
    compile_convolutions(compiled)
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda x, *args, **kwargs: 1 / 0 if x[0].ndim == 4 else cat(x, *args, **kwargs))
    for side in (32, 8):
        compiled(torch.randn(1, 3, side, side), 5)


def test_a_copy_of_a_compiled_network_is_its_own(monkeypatch):
    compiled = unet()
    compile_convolutions(compiled)
    twin, x = copy.deepcopy(compiled), torch.randn(1, 3, 32, 32)
    assert twin.conv_norm_out.convolution[0] is twin.conv_out is not compiled.conv_out
    assert torch.equal(twin(x, 5).sample, compiled(x, 5).sample)


def test_what_has_been_written_to_is_normalised_by_its_new_moments():
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=32, temb_channels=None, groups=8).eval().requires_grad_(False)
    plain = copy.deepcopy(block)
    compile_convolutions(block)
    x = block(torch.randn(1, 32, 16, 16), None)
    for change in (lambda: x, lambda: x.mul_(3).add_(1), lambda: x.permute(0, 2, 3, 1)[:, :8].zero_()):
        change()
        assert relative_error(block(x, None), plain(x, None).double()) < ROUNDING
    with torch.inference_mode():
        x = block(torch.randn(1, 32, 16, 16), None)
        x.mul_(3)
        assert relative_error(block(x, None), plain(x, None).double()) < ROUNDING


@pytest.mark.parametrize("channels", [(32, 32), (24, 40), (16, 48)])
@pytest.mark.parametrize("out", [32, 64])
def test_a_block_takes_the_parts_of_a_concatenation(channels, out):
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=64, out_channels=out, temb_channels=8, groups=8).eval().requires_grad_(False)
    compiled = copy.deepcopy(block)
    compile_convolutions(compiled)
    for side in (16, 4):  # by Winograd's way, and directly
        parts, temb = [torch.randn(2, c, side, side) for c in channels], torch.randn(2, 8)
        assert relative_error(compiled(parts, temb), block(torch.cat(parts, 1), temb).double()) < ROUNDING


@pytest.mark.parametrize("way", ["FreeU", "checkpoints"])
def test_an_up_block_that_does_more_is_computed_as_before(way):
    plain = unet(up_block_types=("UpBlock2D",) * 2)
    if way == "checkpoints" and not plain._supports_gradient_checkpointing:
        pytest.skip("diffusers is too old")
    compiled = copy.deepcopy(plain)
    compile_convolutions(compiled)
    x, results = torch.randn(1, 3, 32, 32), []
    for network in (plain, compiled):
        for block in network.up_blocks:
            if way == "FreeU":
                block.s1, block.s2, block.b1, block.b2, block.resolution_idx = 0.5, 0.5, 1.5, 1.5, 0
            else:
                network.enable_gradient_checkpointing()
        results.append(network(x, 5).sample)
    assert relative_error(results[1], results[0].double()) < NETWORK_ROUNDING
    if way == "FreeU":
        unchanged = unet(up_block_types=("UpBlock2D",) * 2)(x, 5).sample
        assert relative_error(results[1], unchanged.double()) > 1e-3


def test_weights_that_change_are_transformed_again():
    plain = unet()
    compiled = copy.deepcopy(plain)
    compile_convolutions(compiled)
    x = torch.randn(1, 3, 32, 32)
    compiled(x, 5)
    for network in (plain, compiled):
        network.down_blocks[0].resnets[0].conv1.weight.mul_(-2)
        network.mid_block.resnets[0].conv2.weight = nn.Parameter(torch.ones(64, 64, 3, 3), requires_grad=False)
    assert relative_error(compiled(x, 5).sample, plain(x, 5).sample.double()) < NETWORK_ROUNDING
    plain, compiled = plain.half().float(), compiled.half().float()
    assert relative_error(compiled(x, 5).sample, plain(x, 5).sample.double()) < NETWORK_ROUNDING


def test_a_copy_is_its_own_network_and_leaves_the_transformed_weights():
    layer = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    compile_convolutions(nn.Sequential(layer))
    x = torch.randn(1, 32, 16, 16)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert "_packed" in layer.__dict__ and "_packed" not in twin.__dict__
    assert torch.equal(twin(x), y)
    twin.weight.zero_()
    assert torch.equal(layer(x), y) and not torch.equal(twin(x), y)


@pytest.mark.parametrize("out", [48, 40, 3])
def test_a_convolution_of_its_own_is_computed_by_the_kernel(monkeypatch, out):
    layer = nn.Conv2d(32, out, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 32, 16, 16)
    expected = copy.deepcopy(layer).double()(x.double())
    compile_convolutions(nn.Sequential(layer))
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *_: 1 / 0)
    assert relative_error(layer(x), expected) < ROUNDING


def test_gradients_autocast_and_other_types_are_computed_as_before():
    plain = unet()
    compiled = copy.deepcopy(plain)
    compile_convolutions(compiled)
    gradients = []
    for network in (plain, compiled):
        x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        network(x, 5).sample.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    x = x.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x, 5).sample, compiled(x, 5).sample)
    assert torch.equal(plain.double()(x.double(), 5).sample, compiled.double()(x.double(), 5).sample)


def test_a_derivative_forwards_is_there():
    layer = nn.Conv2d(32, 48, 3, padding=1).requires_grad_(False)
    x, direction = torch.randn(2, 2, 32, 16, 16)
    expected = torch.func.jvp(layer, (x,), (direction,))
    compile_convolutions(nn.Sequential(layer))
    for got, total in zip(torch.func.jvp(layer, (x,), (direction,)), expected, strict=True):
        assert torch.equal(got, total)


def test_other_channels_are_refused():
    layer = nn.Conv2d(16, 48, 3, padding=1).requires_grad_(False)
    compile_convolutions(nn.Sequential(layer))
    with pytest.raises(RuntimeError, match="expected 16 channels"):  # which would be right for 1x1
        layer(torch.randn(1, 144, 4, 4))


@pytest.mark.parametrize("of", ["weights", "x", "temb"])
def test_every_gradient_that_is_asked_for_is_there(of):
    block = ResnetBlock2D(in_channels=32, temb_channels=8, groups=8).requires_grad_(of == "weights")
    compiled = copy.deepcopy(block)
    compile_convolutions(compiled)
    gradients = []
    for b in (block, compiled):
        torch.manual_seed(1)
        inputs = {"x": torch.randn(1, 32, 16, 16), "temb": torch.randn(1, 8)}
        asked = b.conv1.weight if of == "weights" else inputs[of].requires_grad_()
        b(inputs["x"], inputs["temb"]).square().sum().backward()
        gradients.append(asked.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)  # of up to 100; what precedes temb is the kernel's


@pytest.mark.parametrize(
    "form", [{"up": True}, {"down": True}, {"time_embedding_norm": "scale_shift"}, {"output_scale_factor": 2.0},
             {"non_linearity": "relu"}, {"skip_time_act": True}, {"temb_channels": None}, {"out_channels": 64},
             {"in_channels": 36, "out_channels": 44, "groups": 4}],
)  # fmt: skip
def test_a_block_of_any_form_computes_the_same(form):
    torch.manual_seed(0)
    block = ResnetBlock2D(**{"in_channels": 32, "temb_channels": 8, "groups": 8, **form}).eval().requires_grad_(False)
    compiled = copy.deepcopy(block)
    compile_convolutions(compiled)
    assert isinstance(compiled, FusedResnetBlock2D) == (form.keys() <= {"temb_channels", "out_channels"})
    x = torch.randn(2, form.get("in_channels", 32), 16, 16)
    temb = None if "temb_channels" in form else torch.randn(2, 8)
    assert relative_error(compiled(x, temb), block(x, temb).double()) < ROUNDING


def test_a_network_in_training_drops_out():
    block = ResnetBlock2D(in_channels=32, temb_channels=8, groups=8, dropout=0.5).requires_grad_(False)
    plain = copy.deepcopy(block).eval()
    compile_convolutions(block)
    x, temb = torch.randn(1, 32, 16, 16), torch.randn(1, 8)
    assert not torch.equal(block(x, temb), block(x, temb))
    assert relative_error(block.eval()(x, temb), plain(x, temb).double()) < ROUNDING


# --- Compiling -------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.cache_clear()
    yield tmp_path / "spnn"
    kernels.cache_clear()


def test_a_setting_that_cannot_be_read_is_one_line(nothing_compiled, monkeypatch):
    monkeypatch.setenv("CXX", "g++ 'and no end")
    with pytest.raises(InputError, match="winograd.cpp: No closing quotation: .* leave --compile out"):
        kernels()


@pytest.mark.parametrize("shape", [(32, 40, 40), (0, 32, 8, 8)], ids=str)
def test_an_image_without_a_batch_and_a_batch_without_images_are_computed_as_before(shape):
    layer = nn.Conv2d(32, 48, 3, padding=1).requires_grad_(False)
    x = torch.randn(shape)
    expected = layer(x)
    compile_convolutions(nn.Sequential(layer))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_compiler_that_fails_is_one_line(nothing_compiled, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(
        InputError, match=r"^winograd.cpp cannot be compiled here \(.+\); it needs GCC: .* --compile out"
    ):
        kernels()
    assert not nothing_compiled.exists()


def test_the_compilers_own_words_are_passed_on(nothing_compiled, monkeypatch, tmp_path):
    source = tmp_path / "winograd.cpp"
    source.write_text("int broken(")
    monkeypatch.setattr(winograd, "SOURCE", source)
    with pytest.raises(InputError, match=r"winograd\.cpp:1:\d+: error"):
        kernels()


def test_a_library_that_is_damaged_is_one_line(nothing_compiled, monkeypatch):
    monkeypatch.setattr(winograd, "_compile", lambda command, library: library.write_bytes(b"no library"))
    nothing_compiled.mkdir()
    with pytest.raises(InputError, match=r"winograd-\w+\.so cannot be loaded .* delete it, or leave --compile out"):
        kernels()


def test_a_second_process_finds_the_library_compiled():
    kernels()
    code = "from DDNM.guided_diffusion.winograd import kernels; print(kernels().lanes())"
    root = Path(winograd.__file__).parents[2]
    code = f"from DDNM.guided_diffusion import winograd; winograd._compile = None; {code}"
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert shown.stdout.strip() == str(kernels().lanes()), shown.stderr
