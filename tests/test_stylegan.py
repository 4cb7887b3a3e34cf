import functools
import json
import math
import os
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checkpoints import write_weights
from experiments import train_stylegan
from experiments.train_stylegan import Classifier, Gaussian, main, mapped, standardised
from stylegan import (
    SPACES,
    Blur,
    Latents,
    StyleGAN,
    UpConvolution,
    generator_from_state_dict,
    load_generator,
    truncate,
)
from utils import InputError, Stopped

PUBLISHED = json.loads((Path(__file__).parent / "golden" / "stylegan.json").read_text())


def uniform(name, shape):
    """Numbers in [-1, 1) that belong to a name."""
    bits = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return (2 * bits.random(math.prod(shape)) - 1).reshape(shape)


def unit(name, shape):
    """The same with variance 1, rounded to float32 as the figures' inputs were."""
    return torch.from_numpy(np.sqrt(3.0) * uniform(name, tuple(shape))).float().double()


def by_formula(name, shape):
    """A weight of the figures' networks."""
    u = uniform(name, tuple(shape))
    if name.endswith("kernel"):
        u = np.outer([1, 2, 1], [1, 2, 1])[None, None] / 16
    elif name.startswith("g_mapping"):
        u = u * (100 * np.sqrt(3.0) if name.endswith("weight") else 20)
    elif name.endswith("noise.weight"):
        u = u * (0.002 if "4x4.epi1" in name else 0.2)
    elif name.endswith(("4x4.const", "4x4.bias")):
        u = u * 0.01
    else:
        u = u * (np.sqrt(3.0) if name.endswith("weight") else 0.3)
    return torch.from_numpy(np.asarray(u)).float()


@functools.lru_cache(maxsize=1)
def published(resolution):
    """The generator of the figures, in float64."""
    shapes = PUBLISHED["state_dict"][str(resolution)]
    weights = {name: by_formula(name, shape) for name, shape in shapes.items()}
    return generator_from_state_dict(weights, resolution).double().requires_grad_(False)


def assert_figures(tensor, figures):
    """Shape, root mean square and forty places, which were rounded to float32 when they were stored."""
    assert list(tensor.shape) == figures["shape"]
    flat = tensor.detach().flatten()
    places = np.linspace(0, flat.numel() - 1, len(figures["at"])).astype(int)
    expected = torch.tensor([figures["rms"], *figures["at"]], dtype=torch.float64)
    found = torch.cat([flat.square().mean().sqrt()[None], flat[places]])
    torch.testing.assert_close(found, expected, rtol=2**-24, atol=2e-9 * figures["rms"])


QUICK = "mapping", "truncated_64", "wplus_64"  # what others ask goes through these, and through a layer's own test


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name, case in PUBLISHED["cases"].items()
        if case["kind"] != "fresh_noise"
    ],
)
def test_published_figures(name):
    case = PUBLISHED["cases"][name]
    resolution, seed, silent = case["resolution"], case["seed"], case.get("silent", False)  # weights of noise are 0
    generator = published(resolution)
    assert generator.layers == 2 * math.log2(resolution) - 2
    if case["kind"] == "mapping":
        rows = torch.tensor(case["z_row_scale"], dtype=torch.float32)[:, None]
        z = unit("z:" + seed, (3, 512)).float() * rows  # rounded once more there
        return assert_figures(generator.mapping(z.double()), case["w"])
    batch = case["batch"]
    shapes = generator.noise_shapes
    noise = [unit(f"noise:{seed}:{i}", (batch, *shape)) * (not silent) for i, shape in enumerate(shapes)]
    if case["kind"] == "wplus":
        w_plus = unit("w_plus:" + seed, (batch, generator.layers, 512)).requires_grad_("grad" in case)
    else:
        w = generator.mapping(unit("z:" + seed, (batch, 512)))
        assert_figures(w, case["w"])
        w_plus = generator.spread(w)
    if "psi" in case:
        average = generator.mapping(unit("average:" + seed, (case["average_of"], 512))).mean(0)
        assert_figures(average, case["w_avg"])
        w_plus = truncate(w_plus, average, case["psi"], case["cutoff"])
    with torch.set_grad_enabled("grad" in case):
        image = generator.synthesis(w_plus, noise)
        assert_figures(image, case["image"])
    if "grad" in case:
        (gradient,) = torch.autograd.grad((image * unit("probe:" + seed, image.shape)).sum(), w_plus)
        assert_figures(gradient, case["grad"])


@pytest.mark.parametrize("r", [64, 128, 256])
def test_upconvolution_is_doubling_then_a_convolution(r):
    torch.manual_seed(0)
    layer = UpConvolution(3, 5, r).double()
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    kernel = layer.scaled().flip(2, 3) if r > 64 else layer.scaled()
    doubled = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), kernel, padding=1)
    torch.testing.assert_close(layer(x), Blur().double()(doubled) + layer.bias[:, None, None], rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def small():
    """A small generator with noise and biases that show."""
    torch.manual_seed(0)
    generator = StyleGAN(16, (6, 5, 4), dim=7, depth=2)
    with torch.no_grad():
        for p in generator.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return generator.eval()


def test_noise_is_drawn_anew_or_given(small):
    w_plus = small.spread(torch.randn(1, 7)).expand(2, -1, -1)
    first = small.synthesis(w_plus)
    assert first.shape == (2, 3, 16, 16)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, small.synthesis(w_plus))
    noise = small.draw_noise(1, torch.Generator().manual_seed(1))
    assert [tuple(n.shape) for n in noise] == [(1, 1, r, r) for r in (4, 4, 8, 8, 16, 16)]
    given = small.synthesis(w_plus, noise)
    torch.testing.assert_close(given[0], given[1])
    assert torch.equal(given, small.synthesis(w_plus, small.draw_noise(1, torch.Generator().manual_seed(1))))


def test_truncation_pulls_to_an_average_that_is_kept(small):
    average = small.average()
    assert small.average() is average
    z = torch.randn(10_000, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(average, small.mapping(z).mean(0))
    noise, z = small.draw_noise(1), torch.randn(2, 7)
    w_plus = small.spread(small.mapping(z))
    pulled = truncate(w_plus, small.average(), 0.5, 4)
    torch.testing.assert_close(pulled[:, :4], (w_plus[:, :4] + small.average()) / 2)
    assert torch.equal(pulled[:, 4:], w_plus[:, 4:])
    assert torch.equal(small(z, psi=0.5, cutoff=4, noise=noise), small.synthesis(pulled, noise))
    with torch.no_grad():
        small.g_mapping["dense1"].bias.add_(1.0)
    assert not torch.allclose(small.average(), average)


@pytest.mark.parametrize("name", ["karras2019stylegan-ffhq-1024x1024.for_g_all.pt", "stylegan.safetensors"])
def test_weights_read_back(small, tmp_path, name):
    write_weights(tmp_path / name, small.state_dict(), torch.float16)
    again = load_generator(tmp_path / name)
    of_folder = load_generator(tmp_path).state_dict()
    assert all(torch.equal(of_folder[key], tensor) for key, tensor in again.state_dict().items())
    assert (again.resolution, again.channels, again.dim, len(again.g_mapping)) == (16, (6, 5, 4), 7, 2)
    noise, z = small.draw_noise(2), torch.randn(2, 7)
    torch.testing.assert_close(again(z, noise=noise), small(z, noise=noise), rtol=2e-2, atol=2e-2)


def in_tensorflow(state):
    """A state dict as NVIDIA's code names and lays out its variables."""
    named = {"G_synthesis/ToRGB_lod1/weight": torch.ones(1, 1, 4, 3), "G_synthesis/ToRGB_lod1/bias": torch.ones(3)}
    for name, tensor in state.items():
        first, second = ("Const", "Conv") if ".4x4." in name else ("Conv0_up", "Conv1")
        for published, theirs in (
            *(("g_", "G_"), (".blocks", ""), ("torgb", "ToRGB_lod0"), ("dense", "Dense"), (".conv", ".Conv")),
            *(("4x4.const", "4x4.Const.const"), ("4x4.bias", "4x4.Const.bias")),
            *(("epi1.top_epi.noise", f"{first}.Noise"), ("epi1.style_mod.lin", f"{first}.StyleMod")),
            *(("epi2.top_epi.noise", f"{second}.Noise"), ("epi2.style_mod.lin", f"{second}.StyleMod"), (".", "/")),
        ):
            name = name.replace(published, theirs)
        if name.endswith("weight") and tensor.dim() > 1:
            tensor = tensor.T if tensor.dim() == 2 else tensor.permute(2, 3, 1, 0)
        if not name.endswith("kernel"):
            named[name] = tensor
    return named


def test_the_list_with_tensorflow_names_is_converted(small, tmp_path):
    state = small.state_dict()
    named = in_tensorflow(state)
    assert "G_synthesis/4x4/Const/const" in named and "G_synthesis/8x8/Conv0_up/StyleMod/weight" in named
    torch.save([{}, {}, named], tmp_path / "g.pt")
    again = load_generator(tmp_path / "g.pt").state_dict()
    assert set(again) == set(state) and all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_weights_that_do_not_fit_are_named(small, tmp_path):
    state, name = small.state_dict(), "g_synthesis.blocks.8x8.epi2.top_epi.noise.weight"
    for wrong, resolution, words in (
        ({**state, name: torch.ones(4)}, None, rf"{name} has shape \[4\], needs \[5\]"),
        ({key: t for key, t in state.items() if key != name}, None, f"missing {name}"),
        ({}, None, "it has no g_mapping.dense0.weight"),
        (state, 32, "32x32: it has no g_synthesis.blocks.32x32"),
        (state, 8, "torgb.weight has shape"),
    ):
        with pytest.raises(InputError, match=words):
            generator_from_state_dict(wrong, resolution)
    torch.save(3, tmp_path / "g.pt")
    torch.save({**state, name: torch.full((5,), torch.nan)}, tmp_path / "nan.pt")
    for source, words in (
        (tmp_path / "g.pt", "expected one dict of tensors by name, got a int"),
        (tmp_path / "nan.pt", f"{name} holds NaN"),
        (tmp_path / "none.pt", "no such file, and no folder or hub id with .*Releases"),
        (tmp_path, "no folder or hub id with"),
    ):
        with pytest.raises(InputError, match=words):
            load_generator(source)


def test_latents_of_another_shape(small):
    for shape in ((1, 5, 7), (1, 6, 8), (6, 7)):
        with pytest.raises(ValueError, match=r"expected a latent of shape \(B, 6, 7\)"):
            small.synthesis(torch.zeros(shape))
    with pytest.raises(ValueError, match="power of two"):
        StyleGAN(48)
    with pytest.raises(ValueError, match="3 blocks"):
        StyleGAN(16, (4, 4))


def test_training_writes_what_load_generator_reads_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    whole, parts, step = tmp_path / "whole", tmp_path / "parts", train_stylegan.Autoencoder.step
    small = "--size 16 --channels 6,5,4 --dim 64 --depth 2 --width 6 --batch_size 8 --count 6 --device cpu --steps 6"

    def train(out, *more):
        return main(["--out", str(out), *small.split(), *more])

    with pytest.raises(InputError, match="no multiple of 8"):
        train(whole, "--batch_size", "12")
    monkeypatch.setattr(train_stylegan.Autoencoder, "FIT_EVERY", 2)
    assert train(whole, "--save_every", "1") == 0  # to save changes nothing

    def asked_to_stop(self, done, progress):
        if done == 4:  # the discriminator came after the third
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, done, progress)

    monkeypatch.setattr(train_stylegan.Autoencoder, "step", asked_to_stop)
    with pytest.raises(Stopped):
        train(parts)
    monkeypatch.setattr(train_stylegan.Autoencoder, "step", step)
    assert train(parts, "--resume") == 0
    assert (parts / "stylegan.safetensors").read_bytes() == (whole / "stylegan.safetensors").read_bytes()
    written = (whole / "stylegan.safetensors").stat().st_mtime_ns
    assert train(whole, "--resume") == 0  # and nothing is trained
    assert (whole / "stylegan.safetensors").stat().st_mtime_ns == written
    notes = json.loads((whole / "stylegan.json").read_text())
    assert notes["steps"] == 6 and notes["settings"]["channels"] == [6, 5, 4]
    generator = load_generator(whole / "stylegan.safetensors", 16)
    assert generator.g_synthesis["torgb"].bias.any()  # it has learned
    assert generator(torch.randn(2, 64)).isfinite().all()


def test_standard_normal_z_has_the_distribution_of_what_was_encoded(small):
    """The mapping of z without its normalisation, after the fold, is that of mean + root z."""
    of, n = Gaussian(7), 20_000
    mean, log_variance = torch.randn(n, 7) @ torch.randn(7, 7) + 3, torch.randn(n, 7)
    of.fit(mean, log_variance)
    z = mean + torch.randn(n, 7) * (log_variance / 2).exp()
    drawn = of.draw(n)
    torch.testing.assert_close(drawn.mean(0), z.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(drawn.T.cov(), z.T.cov(), rtol=0.05, atol=0.5)
    new, e = standardised(small, of), torch.randn(3, 7)
    assert mapped(new, e).shape == (3, 6, 7)
    torch.testing.assert_close(mapped(new, e), mapped(small, of.mean + e @ of.root.T))
    e = e * e.square().mean(1, keepdim=True).rsqrt()
    torch.testing.assert_close(new.spread(new.mapping(e)), mapped(new, e))


@pytest.mark.parametrize("compares", [True, False])
def test_a_discriminator_sees_what_sets_images_apart_and_an_encoder_each_alone(compares):
    torch.manual_seed(0)
    network, x = Classifier(16, 6, 3, compares), torch.randn(8, 3, 16, 16)
    y, beside_others = network(x), network(torch.cat([x[:1], x[1:] / 2]))
    assert y.shape == (8, 3) and torch.allclose(beside_others[0], y[0], atol=1e-5) != compares


@pytest.mark.parametrize("space", SPACES)
def test_the_spaces_of_latents(small, space):
    noise = small.draw_noise(1)
    latents = Latents(small, space, noise)
    assert latents.in_shape == ((42,) if space == "w+" else (7,))
    x = latents.draw(3, torch.Generator().manual_seed(0))
    z = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents(x), small(z, noise=noise))
    assert latents.w_plus(x).shape == (3, 6, 7) and latents.average().shape == latents.in_shape
    if space == "z":
        w = small.mapping(latents.draw(1000, torch.Generator().manual_seed(0)))
        distance = (w - small.average()).norm(dim=1)
        found = (small.mapping(latents.average()[None])[0] - small.average()).norm()
        torch.testing.assert_close(found, distance.min())
    else:
        assert torch.equal(latents.enter(latents.w_plus(x)), x)
        torch.testing.assert_close(latents.w_plus(latents.average()[None])[0], small.average().expand(6, 7))
    assert not torch.equal(Latents(small, space)(x), Latents(small, space)(x))  # noise drawn anew
    rounded = Latents(small, space, noise, bf16=True)(x)
    error = (rounded - latents(x)).square().mean().sqrt() / latents(x).square().mean().sqrt()
    assert rounded.dtype == torch.float32 and 0 < error < 0.02
