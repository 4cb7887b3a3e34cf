"""The published implementation's figures (golden/): its layouts of weights, what its networks compute, its walks.

No weight file is needed: every weight follows from its name and shape (`by_name`), there and here. Of an output,
figures.json keeps the shape, the root mean square and numbers at even distances.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import diy16

from DDNM.guided_diffusion.ddpm_layout import ddpm_config
from DDNM.guided_diffusion.prior import prior_from_ddpm
from DDNM.guided_diffusion.schedule import time_travel_steps
from models import SPNN

GOLDEN = Path(__file__).parent / "golden"
FIGURES = json.loads((GOLDEN / "figures.json").read_text())
LAYOUTS = json.loads((GOLDEN / "layouts.json").read_text())
NETWORKS = [case for case in FIGURES if case.startswith(("spnn", "diy"))]
RTOL = 2e-4  # of the root mean square; another order of summing makes 1e-5
CUSTOM = {"diy16_cayley": diy16().config["layer_channels"]}


def by_name(name: str, shape) -> torch.Tensor:
    """Numbers in [-1, 1) that depend on the name alone, float64."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(generator.random(tuple(shape)) * 2 - 1)


def weights(shapes) -> dict[str, torch.Tensor]:
    """By-name weights, scaled so that activations stay near 1."""
    state = {}
    for name, shape in shapes.items():
        values = by_name(name, shape)
        if name.endswith("A_unconstrained"):
            values *= 0.5 / shape[0] ** 0.5
        elif name.endswith("mix.V"):
            pass
        elif len(shape) > 1:
            values *= (3 / values[0].numel()) ** 0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values *= 0.05
        state[name] = values.float()
    return state


def shapes_of(module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def assert_published(tensor, figures, said):
    numbers = tensor.double().flatten()
    assert list(tensor.shape) == figures["shape"], said
    at = torch.tensor(figures["at"], dtype=torch.float64)
    here = numbers[torch.from_numpy(np.linspace(0, numbers.numel() - 1, len(at)).astype(int))]
    worst = max((here - at).abs().max().item(), abs(numbers.square().mean().sqrt().item() - figures["rms"]))
    assert worst < RTOL * figures["rms"], f"{said}: {worst / figures['rms']:.1e}"


@pytest.mark.parametrize("case", [case for case in LAYOUTS if case.startswith("spnn")])
def test_published_spnn_weights_have_these_names_and_shapes(case):
    """In both mixings: a Householder mixing has 8 vectors where a Cayley mixing has a matrix."""
    config, layout = LAYOUTS[case]["config"], LAYOUTS[case]["state_dict"]
    for mix_type in ("cayley", "householder"):
        with torch.device("meta"):
            here = shapes_of(SPNN(**{**config, "mix_type": mix_type}))
        expected = {}
        for name, shape in layout.items():
            block = name.rpartition("mix.")[0]
            if mix_type == "cayley" and name.endswith("mix.V"):
                name, shape = f"{block}mix.A_unconstrained", [shape[1], shape[1]]
            elif mix_type == "householder" and name.endswith("mix.A_unconstrained"):
                name, shape = f"{block}mix.V", [8, shape[1]]
            expected[name] = shape
        assert here == expected


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A network with by-name weights, the case's name and its figures."""
    figures = FIGURES[request.param]
    blocks = {"layer_channels": CUSTOM[request.param]} if request.param in CUSTOM else {}
    with torch.device("meta"):  # no random weights are drawn first
        model = SPNN(**figures["config"], **blocks).eval()
    assert shapes_of(model) == figures["state_dict"]
    model.load_state_dict(weights(shapes_of(model)), assign=True)
    return model, request.param, figures


@torch.no_grad()
def test_published_weights_compute_what_they_did(network):
    model, case, figures = network
    x = by_name(f"image:{case}", (2, *model.pinn.in_shape)).float()
    target = 2 * by_name(f"target:{case}", (2, model.num_classes)).float()
    y, latents = model(x, return_latents=True)
    assert_published(y, figures["logits"], "g(x)")
    for index, (latent, published) in enumerate(zip(latents, figures["latents"], strict=True)):
        assert (latent is None) == (published is None)
        if latent is not None:
            assert_published(latent, published, f"latent {index}")
    assert_published(model.pinv(target), figures["pinv_target"], "g'(target)")
    assert_published(model.pinv(y), figures["pinv_logits"], "g'(g(x))")
    for strength in (0.7, 1.0):
        moved = model.back_project(x, target, strength)
        assert_published(moved, figures[f"back_project_{strength}"], f"back-projection at {strength}")


@torch.no_grad()
def test_the_losses_of_published_weights_are_what_they_were(network):
    """Stage 1's cross entropy, summed over attributes, and both squares."""
    model, case, figures = network
    x = by_name(f"image:{case}", (2, *model.pinn.in_shape)).float()
    y = model(x)
    labels = (by_name(f"labels:{case}", y.shape) > 0).float()
    difference = model.natural(y).each(torch.sub, model.complete(torch.zeros_like(x)))
    found = {
        "bce": F.binary_cross_entropy_with_logits(y, labels, reduction="none").sum(1).mean(),
        "img_rec": (model.pinv(y) - x).square().mean(),
        "r_norm": torch.cat([z.flatten() for z in difference.z if z is not None]).square().mean(),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(figures["losses"], rel=RTOL)


@torch.no_grad()
def test_published_ddpm_weights_compute_what_they_did():
    figures = FIGURES["unet_tiny"]
    state, t = weights(figures["state_dict"]), torch.tensor(figures["timesteps"])
    x = by_name("image:unet_tiny", (len(t), 3, figures["image_size"], figures["image_size"])).float()
    for config, size in ((figures["model"], figures["image_size"]), (None, None)):  # given, or read off the weights
        assert_published(prior_from_ddpm(state, config, size)(x, t), figures["out"], "eps")


def test_celeba_hq_ckpt_has_this_layout():
    layout, published = LAYOUTS["unet_celeba_hq"]["state_dict"], LAYOUTS["unet_celeba_hq"]["config"]
    with torch.device("meta"):  # without the memory
        state = {name: torch.empty(shape) for name, shape in layout.items()}
    config, image_size = ddpm_config(state)
    assert image_size == 256 and config == {key: published[key] for key in config}
    for prior in (prior_from_ddpm(state), prior_from_ddpm(state, published, 256)):
        assert sum(p.numel() for p in prior.parameters()) == 113_673_219


@pytest.mark.parametrize("walk", FIGURES["time_travel"])
def test_the_walks_are_the_published_ones(walk):
    assert time_travel_steps(*map(int, walk.split(","))) == FIGURES["time_travel"][walk]
