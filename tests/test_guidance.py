"""Rules of guidance against their equations, written out here, and what all of them owe the sampler."""

import dataclasses
import math
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import refused
from runs import CPU, SCHEDULE, SHAPE, as_prior, gaussian_prior, images, logits, spnn8, unet_prior
from runs import draw as plainly

from DDNM.guided_diffusion.diffusion import image_generator, sample
from DDNM.guided_diffusion.guidance import (
    NLBP,
    RULES,
    Denoiser,
    Gradient,
    Linear,
    RuleSettings,
    Switched,
    Unguided,
    noise_brought,
    predict_x0,
    unit,
)
from DDNM.guided_diffusion.schedule import time_pairs
from operators import LinearOperator, SPNNOperator, make_operator
from utils import InputError

NETWORK_RULES = [name for name in RULES if name != "linear"]


def rule(name: str, **settings):
    return dataclasses.replace(RuleSettings(), guidance=name, **settings).build(50)


def draw(guidance, names="abc", prior=None, model=None, target=None, steps=6, **settings):
    model, target = model or spnn8(strength=0.4), logits(len(names), scale=1.0) if target is None else target
    return plainly(names, prior or gaussian_prior, 0, steps, model, target, guidance, eta=0.5, **settings)


# --- The equations ---------------------------------------------------------------------------------------------------


def one_by_one(model, x, y, of):
    """Unit gradients of the binary cross-entropy by x, each image alone, with nothing of the module under test."""
    found = []
    for i in range(len(x)):
        leaf = x[i : i + 1].clone().requires_grad_()
        said = model(of(leaf))
        (grad,) = torch.autograd.grad((F.softplus(said) - y[i : i + 1].sigmoid() * said).mean(), leaf)
        found.append(grad / grad.square().mean().sqrt().clamp_min(1e-30))  # 0 where all of x0 is clamped
    return torch.cat(found)


@pytest.mark.parametrize("t", [990, 500, 10])
def test_gradient_is_the_unit_gradient_through_the_prior(t):
    model, prior, y, x = spnn8(), unet_prior(), logits(3), images(3)
    abar = SCHEDULE.abar(t)
    x0, eps, correction, _ = Gradient(0.05).towards(SPNNOperator(model), y)(Denoiser(prior), x, t)
    expected = predict_x0(x, prior(x, t), abar).clamp(-1, 1)
    torch.testing.assert_close(x0, expected)
    torch.testing.assert_close(eps, prior(x, t))
    grad = one_by_one(model, x, y, lambda x: predict_x0(x, prior(x, t), abar).clamp(-1, 1))
    correction = correction()
    torch.testing.assert_close(correction, -0.05 * (1 - abar).sqrt() * grad, rtol=1e-3, atol=1e-5)
    assert not (x0.requires_grad or eps.requires_grad or correction.requires_grad)


def test_clean_gradient_moves_x0_and_asks_the_prior_for_no_gradient():
    model, y, x, t = spnn8(), logits(3), images(3), 300
    asked = []

    @as_prior
    def prior(x, t):
        asked.append(torch.is_grad_enabled())
        return gaussian_prior(x, t)

    with torch.no_grad():
        x0, _, correction, _ = Gradient(0.0, 0.05).towards(SPNNOperator(model), y)(Denoiser(prior), x, t)
    start = predict_x0(x, gaussian_prior(x, t), SCHEDULE.abar(t)).clamp(-1, 1)
    expected = start - 0.05 * (1 - SCHEDULE.abar(t)).sqrt() * one_by_one(model, start, y, lambda x: x)
    torch.testing.assert_close(x0, expected.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    assert correction is None and asked == [False]


def test_tfg_has_the_others_as_special_cases():
    model, y, x = SPNNOperator(spnn8()), logits(3), images(3)
    both = Gradient(0.05, 0.02).towards(model, y)(Denoiser(gaussian_prior), x, 500)
    through = Gradient(0.05).towards(model, y)(Denoiser(gaussian_prior), x, 500)
    clean = Gradient(0.0, 0.02).towards(model, y)(Denoiser(gaussian_prior), x, 500)
    torch.testing.assert_close(both.correction(), through.correction())
    torch.testing.assert_close(both.x0, clean.x0)
    nothing = Gradient(0.0, 0.0)
    torch.testing.assert_close(draw(nothing), draw(Unguided()))


@pytest.mark.parametrize("walk, count", [({}, 5), ({"travel_length": 2, "travel_repeat": 2}, 7)])
def test_a_gradient_is_taken_only_if_x_next_is_used(walk, count, monkeypatch):
    """It is not at the last step, nor before a jump back: these go on with x0'."""
    losses, loss = [], SPNNOperator.loss
    monkeypatch.setattr(SPNNOperator, "loss", lambda *given: losses.append(1) or loss(*given))
    draw(Gradient(0.05), "a", steps=6, **walk)
    steps = [t_next < t for t, t_next in time_pairs(1000, 6, **walk)]
    assert len(losses) == count == sum(now and after for now, after in zip(steps, steps[1:], strict=False))


def test_the_activations_of_a_step_are_gone_at_the_next():
    seen, alive = [], []

    @as_prior
    def prior(x, t):
        alive.append(any(x() is not None for x in seen))
        seen.append(weakref.ref(x))
        return gaussian_prior(x, t)

    draw(Gradient(0.05), "a", prior, steps=6, travel_length=2, travel_repeat=2)
    assert len(alive) == 10 and not any(alive)


def test_recurrences_take_x_back_to_t_with_fresh_noise():
    """Two recurrences of every step, written out."""
    got = draw(Gradient(0.0, 0.0, 2, 1000, 0), "a", steps=2)
    source = image_generator(0, "a")
    x = torch.randn(SHAPE, generator=source)[None]
    pairs = time_pairs(1000, 2)
    assert len(pairs) == 2
    for t, t_next in pairs:
        a, b = SCHEDULE.abar(t), SCHEDULE.abar(t_next)
        for again in (True, False):
            eps = gaussian_prior(x, t)
            x0 = predict_x0(x, eps, a).clamp(-1, 1)
            s2 = 0.25 * (1 - b) / (1 - a) * (1 - a / b)
            x = b.sqrt() * x0 + (1 - b - s2).clamp_min(0).sqrt() * eps
            x = x + s2.sqrt() * torch.randn(SHAPE, generator=source)
            if again:
                x = (a / b).sqrt() * x + (1 - a / b).sqrt() * torch.randn(SHAPE, generator=source)
    torch.testing.assert_close(got[0], x0[0])


def test_a_composition_is_its_first_rule_at_noisy_steps_and_its_second_at_clean_ones():
    model, y, x = SPNNOperator(spnn8()), logits(2), images(2)
    both = Switched(NLBP(), Gradient(0.05), 400).towards(model, y)
    denoise = Denoiser(gaussian_prior)
    for t, alone in ((400, NLBP()), (399, Gradient(0.05))):
        for got, expected in zip(both(denoise, x, t), alone.towards(model, y)(denoise, x, t), strict=True):
            got, expected = (each() if callable(each) else each for each in (got, expected))
            assert got is expected or torch.equal(got, expected)
    assert Switched(Unguided(), Gradient(0.1, 0.0, 4, 1000, 0), 400).recurrences(399) == 4


def test_the_linear_rule_keeps_what_was_measured_and_refuses_a_network():
    operator = make_operator("sr2", (3, 8, 8))
    y = operator.A(images(2, seed=3) * 0.3)
    nlbp = NLBP(lambda2=1.0, nlbp_stop_cond=0.0, max_move=None)
    drawn, same = (draw(r, "ab", model=operator, target=y, steps=10, clip_x0=False) for r in (Linear(), nlbp))
    torch.testing.assert_close(operator.A(drawn), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn, same, rtol=1e-4, atol=1e-4)
    refused("linear is for linear operators", draw, Linear())


@pytest.mark.parametrize("noise", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("sigma", [0.4, 0.02])
@torch.no_grad()
def test_noise_in_the_target_follows_ddnm_plus(noise, sigma):
    """DDNM+, equations 17 to 19: lambda, what is added, and the covariance that x_next has around a clean image."""
    operator, x, t, a = make_operator("grey*sr2", (3, 4, 4)), images(1)[..., :4, :4].double(), 500, torch.tensor(0.8)
    y, z = torch.randn(1, 1, 2, 2, dtype=torch.float64), torch.eye(48, dtype=torch.float64).view(48, 3, 4, 4)
    steer = Linear(noise).towards(operator, y)
    x0, _, _, settle = steer(Denoiser(gaussian_prior), x, t)
    moved, _ = settle(z[:1], a, torch.tensor(sigma))
    strength = 1.0 if sigma >= 0.8 * noise / operator.gain else sigma * operator.gain / (0.8 * noise)
    torch.testing.assert_close(moved, x0 + strength * operator.pinv(y - operator.A(x0)), rtol=0, atol=1e-6)
    added = sigma * settle(z, a, torch.tensor(sigma))[1].flatten(1).T  # of z, (48, 48)
    brought = 0.8 * strength * noise * operator.pinv(torch.eye(4, dtype=z.dtype).view(4, 1, 2, 2)).flatten(1).T
    covariance = added @ added.T + brought @ brought.T
    torch.testing.assert_close(covariance, sigma**2 * torch.eye(48, dtype=z.dtype), rtol=0, atol=1e-6 * sigma)


@pytest.mark.parametrize("sigma", [0.0, 0.02, 1.5])
@torch.no_grad()
def test_back_projection_is_no_stronger_than_the_noise_it_brings_in_allows(sigma):
    """Exactly as strong as DDNM+ with a linear operator, image by image with a network."""
    operator, a, z = make_operator("sr4", (3, 8, 8)), torch.tensor(0.8), torch.zeros(2, 3, 8, 8)
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, *operator.out_shape)
    torch.testing.assert_close(noise_brought(operator, y, 0.3), torch.full((2,), 0.3 / operator.gain))
    rule = NLBP(1.0, 1.0, nlbp_stop_cond=0.0, max_move=None, noise=0.3)
    found = [r.towards(operator, y)(Denoiser(gaussian_prior, False), x, 500).settle(z, a, torch.tensor(sigma))[0]
             for r in (rule, Linear(0.3))]  # fmt: skip
    torch.testing.assert_close(*found)
    model, rule, sigma = SPNNOperator(spnn8()), dataclasses.replace(rule, max_move=0.1), torch.tensor(sigma)
    x, y = images(3), logits(3)
    together, alone = (rule.towards(model, y[i])(Denoiser(gaussian_prior), x[i], 500).settle(None, a, sigma)[0]
                       for i in (slice(None), slice(1, 2)))  # fmt: skip
    torch.testing.assert_close(together[1:2], alone)
    apart = (together - Denoiser(gaussian_prior)(x, 500)[0]).abs().max()
    assert apart > 1e-3 if sigma > 0 else apart < 1e-4


def test_an_operator_of_other_images_or_a_target_of_another_shape_is_refused():
    refused = partial(sample, gaussian_prior, [image_generator(0, "a")], CPU, guidance=Linear(), steps=2)
    with pytest.raises(ValueError, match=r"draws images \(3, 8, 8\), the operator measures images \(3, 4, 4\)"):
        refused(make_operator("sr2", (3, 4, 4)), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"targets must have shape \(1, 3, 4, 4\), got \(1, 5\)"):
        refused(make_operator("sr2", (3, 8, 8)), torch.zeros(1, 5))
    with pytest.raises(InputError, match="more than one"):
        Linear(0.1).towards(LinearOperator(torch.diff, torch.diff, (3, 8, 8), (3, 8, 7)), torch.zeros(1, 3, 8, 7))


# --- What every rule owes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NETWORK_RULES, "nlbp+gradient"])
def test_an_image_is_the_same_alone_in_a_batch_and_in_another_order(name):
    steps = 4 if "+" in name else 2  # so that both parts come to something
    target, draws = logits(3), partial(draw, rule(name), prior=unet_prior(), steps=steps)
    together, alone, model = draws("abc", target=target), draws("b", target=target[1:2]), spnn8(strength=0.4)
    with torch.inference_mode():  # in which no rule could take a gradient
        turned = draws("ca", model=model, target=target[[2, 0]])
    torch.testing.assert_close(torch.cat([alone, turned]), together[[1, 2, 0]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in NETWORK_RULES if name != "none"])
def test_every_rule_brings_images_nearer_to_their_targets(name):
    model, target = spnn8(strength=0.4), logits(6, scale=1.0)

    def error(guidance):
        drawn = draw(guidance, "abcdef", model=model, target=target, steps=10)
        return (model(drawn).sigmoid() - target.sigmoid()).abs().mean()

    guidance = rule(name, gradient_scale=0.2, clean_scale=0.2, nlbp_stop_cond=0.02)
    assert error(guidance) < 0.8 * error(Unguided())


@pytest.mark.parametrize("name", ["nlbp", "gradient", "clean_gradient"])
def test_a_bf16_prior_works_with_every_kind_of_rule(name):
    drawn = draw(rule(name), "ab", unet_prior(torch.bfloat16), steps=2)
    assert drawn.isfinite().all() and drawn.dtype == torch.float32 and not drawn.requires_grad


@pytest.mark.parametrize("name", ["gradient", "clean_gradient", "tfg", "nlbp+gradient"])
def test_a_gradient_that_is_not_finite_stops_its_image_and_no_other(name):
    """The target of the second image is broken, so that its gradient is."""
    target = logits(3)
    broken = target.clone()
    broken[1] = math.nan
    guidance = rule(name)
    expected, got = draw(guidance, target=target), draw(guidance, target=broken)
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-4)
    if name != "nlbp+gradient":
        assert not got[1].isfinite().all()


def test_a_gradient_of_zero_moves_nothing():
    assert torch.equal(unit(torch.zeros(2, *SHAPE)), torch.zeros(2, *SHAPE))
    tiny = unit(torch.full((1, *SHAPE), 1e-15))
    torch.testing.assert_close(tiny, torch.ones(1, *SHAPE))


# --- Settings --------------------------------------------------------------------------------------------------------


def test_rules_by_name():
    assert rule("none") == Unguided() and rule("nlbp") == NLBP(1.0, 0.5, 600, 0.11, 0.15, 0)
    assert rule("nlbp", max_move=0).max_move is None
    assert rule("nlbp", total_move=3).max_move == 0.06 and rule("nlbp", total_move=3, max_move=0.1).max_move == 0.1
    assert rule("gradient", gradient_scale=0.1) == Gradient(0.1)
    assert rule("freedom") == Gradient(0.03, 0.0, 2, 700, 300)
    assert [rule("freedom").recurrences(t) for t in (999, 700, 699, 300, 299, 0)] == [1, 1, 2, 2, 1, 1]
    assert rule("nlbp+gradient", switch=300) == Switched(NLBP(), Gradient(0.03), 300)
    assert RuleSettings(guidance="nlbp+tfg").through_the_prior
    assert not RuleSettings(guidance="nlbp+clean_gradient").through_the_prior


def test_an_unknown_rule_is_one_line_with_the_known_ones():
    for name, said in {"nlbp+gradiant": "mean 'gradient'.*known are none, nlbp", "nlbp+tfg+nlbp": "two rules"}.items():
        refused(said, rule, name)
