"""The sampler against its equations, and against a plain sampler written out here."""

import math

import pytest
import torch
from helpers import random
from runs import SCHEDULE, SHAPE, draw, gaussian_prior, images, logits, spnn8, unet_prior
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from DDNM.guided_diffusion import guidance as rules
from DDNM.guided_diffusion.diffusion import BEST, image_generator, reconstruct, renoise, sampling
from DDNM.guided_diffusion.guidance import NLBP, Gradient, Switched, Unguided
from DDNM.guided_diffusion.prior import Prior, small_unet
from DDNM.guided_diffusion.schedule import Schedule
from models import BackProjection, Completion
from operators import SPNNOperator


def moved(model, x0, target, strength, rule, clip=True):
    """x0 after one step of a rule, as it is for a prior that sees x0 in anything."""

    def same(x, t):
        return x

    same.in_range = lambda x: x.clamp(-1, 1) if clip else x
    project = SPNNOperator(model).towards(target)(x0)
    far = (project.y.sigmoid() - target.sigmoid()).abs().mean(1) > rule.nlbp_stop_cond
    return rules.guide(project, x0, far, strength, rule.max_move, same.in_range)


# --- One step --------------------------------------------------------------------------------------------------------


def test_renoise_with_eta_1_is_the_posterior_of_ddpm():
    """Ho et al. 2020, equations 6 and 7, with alpha = abar_t / abar_next for a stride above one."""
    x0, eps, noise = random((3, 1, *SHAPE), 0)
    abar, abar_next = SCHEDULE.abar(600).double(), SCHEDULE.abar(590).double()
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    alpha = abar / abar_next
    mean = (abar_next.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - abar_next) * x) / (1 - abar)
    variance = (1 - abar_next) / (1 - abar) * (1 - alpha)
    expected = mean + variance.sqrt() * noise
    torch.testing.assert_close(renoise(x0, eps, noise, abar, abar_next, 1.0), expected, rtol=1e-10, atol=1e-10)


# --- The loop, unguided ----------------------------------------------------------------------------------------------


def plain_sampler(names, prior, seed, steps, walk, eta=None, clip=False):
    """DDNM's sampler without its operator, written out with nothing of the module under test."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abars = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)]).float()
    sources = [image_generator(seed, name) for name in names]
    x = torch.stack([torch.randn(SHAPE, generator=source) for source in sources])
    pictures = []
    for index, following in zip(walk, walk[1:], strict=False):
        t, t_next = index * (1000 // steps), following * (1000 // steps) if following >= 0 else -1
        a, b = abars[t + 1], abars[t_next + 1]
        if following > index:
            noise = torch.stack([torch.randn(SHAPE, generator=source) for source in sources])
            x = b.sqrt() * pictures[-1] + (1 - b).sqrt() * noise
            continue
        eps = prior(x, torch.full((len(names),), t))
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        if clip:
            x0 = torch.clamp(x0, -1, 1)
        pictures.append(x0)
        variance = 1 - a / b
        if eta is not None:
            variance = eta**2 * (1 - b) / (1 - a) * variance
        noise = torch.stack([torch.randn(SHAPE, generator=source) for source in sources])
        x = b.sqrt() * x0 + torch.clamp(1 - b - variance, min=0).sqrt() * eps + variance.sqrt() * noise
    return pictures


DOWN = list(range(9, -2, -1))
TRAVELLING = [9, 8, 7, 6, 7, 8, 7, 6, 5, 4, 5, 6, 5, 4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0, -1]


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [None, 0.5])
@pytest.mark.parametrize("walk, length, repeat", [(DOWN, 1, 1), (TRAVELLING, 2, 2)])
def test_without_guidance_it_is_the_plain_sampler(clip, eta, walk, length, repeat):
    expected = plain_sampler("ab", gaussian_prior, 0, 10, walk, eta, clip)
    settings = {"eta": eta, "travel_length": length, "travel_repeat": repeat, "clip_x0": clip}
    steps, drawn = zip(*draw("ab", of=sampling, **settings), strict=True)
    torch.testing.assert_close(drawn, tuple(expected))
    assert list(steps) == [100 * a for a, b in zip(walk, walk[1:], strict=False) if b < a]
    assert torch.equal(draw("ab", **settings), drawn[-1])
    assert Unguided().evaluations(SCHEDULE, 10, length, repeat) == len(steps)


@pytest.mark.parametrize("clip", [True, False])
def test_with_strength_0_it_is_the_plain_sampler(clip):
    """Exactly so but for the rounding of G^-1(G(x)): the operator is asked, and moves nothing."""
    rule = NLBP(lambda1=0.0, lambda2=0.0, max_move=None)
    expected = plain_sampler("ab", gaussian_prior, 0, 10, DOWN, None, clip)[-1]
    drawn = draw("ab", model=spnn8(), target=logits(2), guidance=rule, clip_x0=clip)
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


def test_the_exact_prior_of_a_gaussian_gives_its_samples():
    drawn = torch.cat([draw([f"{i}" for i in range(64)], steps=250, eta=eta) for eta in (0.0, 1.0)])
    assert drawn.mean().item() == pytest.approx(0.1, abs=0.01)
    assert drawn.std().item() == pytest.approx(0.3, abs=0.01)


# --- Noise -----------------------------------------------------------------------------------------------------------


def test_the_noise_of_an_image_depends_on_its_seed_and_name_alone():
    def first(seed, name):
        return torch.randn(4, generator=image_generator(seed, name)).tolist()

    assert first(0, "a") == first(0, "a")
    assert len({tuple(first(seed, name)) for seed in (0, 1, 1234) for name in ("a", "b", "0", "1:a")}) == 12


# --- Guidance --------------------------------------------------------------------------------------------------------


def test_the_published_rule_ends_on_the_target_exactly():
    """At strength 1 the last step reaches y, whatever the prior says: the law of back-projection."""
    model, target = spnn8(strength=0.5), logits(3, scale=0.5)
    rule = NLBP(nlbp_stop_cond=0.0, max_move=None)
    drawn = draw("abc", model=model, target=target, guidance=rule, clip_x0=False)
    torch.testing.assert_close(model(drawn), target, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("total", [1000, 50, 4000])
def test_thresholds_are_of_1000_steps_whatever_the_schedules_length(total, monkeypatch):
    used = []
    monkeypatch.setattr(rules, "guide", lambda project, x0, far, strength, *others: used.append(strength) or x0)
    rule = Switched(NLBP(lambda1=0.9, lambda2=0.4, min_bp_step=300), Gradient(0.0, 0.0, 2, 100, 0), switch=200)
    monkeypatch.setattr(gaussian_prior, "schedule", Schedule(num_diffusion_timesteps=total))
    stepped = list(draw("a", of=sampling, model=spnn8(), target=logits(1), guidance=rule))
    assert used == [0.4] * 7 + [0.9]  # t = 900 ... 300, then 200
    assert [t for t, _ in stepped] == [t * total // 1000 for t in (900, 800, 700, 600, 500, 400, 300, 200, 100, 0, 0)]


def test_the_target_is_descended_once_a_run(monkeypatch):
    model, calls = spnn8(), []
    honest = model.natural
    monkeypatch.setattr(model, "natural", lambda y: calls.append(y) or honest(y))
    draw("ab", model=model, target=logits(2), steps=5)
    assert len(calls) == 6  # the target's, and one for the logits of every step


def test_gradients_of_g_solve_every_w_once_a_run(solves):
    for steps in (2, 8):
        solves.clear()
        model = spnn8().requires_grad_()  # as from_pretrained gives it
        draw(["a"], model=model, target=logits(1), guidance=Gradient(through=0.03), steps=steps)
        assert sorted(solves) == [24, 48]


def test_the_stop_condition_is_each_images_own_mean_probability_error():
    model, x0, target = spnn8(), images(6), logits(6)
    error = (model(x0).sigmoid() - target.sigmoid()).abs().mean(1)
    threshold = error.sort().values[2:4].mean().item()  # between the third and the fourth
    after = moved(model, x0, target, 0.5, NLBP(nlbp_stop_cond=threshold))
    stayed = (after == x0).flatten(1).all(1)
    assert stayed.tolist() == (error <= threshold).tolist() and stayed.sum() == 3


def test_max_move_halves_the_strength_and_nothing_else():
    model, x0 = spnn8(), images(4)
    target = logits(4, scale=4)
    rule = NLBP(max_move=0.1, nlbp_stop_cond=0.0)
    project = BackProjection(model, x0, model.natural(target))
    for i, after in enumerate(moved(model, x0, target, 1.0, rule)):
        one = slice(i, i + 1)
        proposals = [project(0.5**k, one).clamp(-1, 1)[0] for k in range(rules.HALVINGS + 1)]
        allowed = [p for p in proposals if (p - x0[i]).square().mean().sqrt() <= 0.1]
        torch.testing.assert_close(after, allowed[0] if allowed else x0[i], rtol=1e-5, atol=1e-5)


def test_without_a_limit_and_a_clamp_it_is_the_published_back_projection():
    model, x0, target = spnn8(), images(4) * 3, logits(4, scale=4)
    after = moved(model, x0, target, 0.5, NLBP(nlbp_stop_cond=0.0, max_move=None), clip=False)
    torch.testing.assert_close(after, model.back_project(x0, target, 0.5), rtol=1e-5, atol=1e-5)
    assert after.abs().max() > 1


def test_the_loop_never_asks_for_a_number_that_a_gpu_would_have_to_be_waited_for():
    """Run on tensors that have shapes and no values: whoever looks at one raises."""
    values = FakeTensorMode(allow_non_fake_inputs=True)
    with pytest.raises(DataDependentOutputException), values:
        torch.zeros(1).item()
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet = small_unet(8, channels=(8,), norm_groups=4, attention_size=0)
        prior = Prior(unet, prediction_type="v_prediction", schedule=SCHEDULE)  # which needs abar too
        settings = {"prior": prior, "steps": 2, "model": spnn8(), "target": logits(2), "travel_repeat": 2}
        assert draw("ab", guidance=NLBP(max_move=None), **settings).shape == (2, *SHAPE)
        with pytest.raises(DynamicOutputShapeException):  # the search for a shorter move has to look
            draw("ab", guidance=NLBP(max_move=0.1), **settings)


class Broken:
    """An operator whose inverse, or whose logits, are not finite wherever an image's first pixel is positive."""

    in_shape, out_shape = SHAPE, (5,)

    def __init__(self, where: str, value: float):
        self.where, self.value = where, value

    def complete(self, x):
        rest = x.flatten(1)
        y = rest[:, :5].clone()
        if self.where == "logits":
            y[y[:, 0] > 0] = self.value
        return Completion(y, [rest[:, 5:]])

    def natural(self, y):
        return Completion(y, [torch.zeros(len(y), 187)])

    def pinv(self, y, latents=None):
        x = torch.cat([y, latents[0]], dim=1).view(-1, *SHAPE)
        if self.where == "inverse":
            x[y[:, 4] > 0] = self.value
        return x


@pytest.mark.parametrize("where", ["inverse", "logits"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [True, False])
def test_nan_of_an_operator_never_passes_where_moves_are_limited(where, value, clip):
    rule = NLBP(max_move=0.15, nlbp_stop_cond=0.0)
    drawn = draw("abcdefgh", model=Broken(where, value), target=logits(8), guidance=rule, clip_x0=clip)
    assert drawn.isfinite().all()


def test_one_broken_image_does_not_keep_the_others_from_moving():
    x0, target = images(4) * 0.3, torch.full((4, 5), 0.5)
    x0[:, 0, 0, 4], target[:, 4] = 0.4, 0.5  # the pixel that breaks the inverse
    x0[1, 0, 0, 4], target[1, 4] = -0.4, -0.5
    after = moved(Broken("inverse", math.nan), x0, target, 1.0, NLBP(max_move=0.3))
    assert after.isfinite().all()
    assert torch.equal(after[[0, 2, 3]], x0[[0, 2, 3]]) and not torch.equal(after[1], x0[1])


# --- From Python -----------------------------------------------------------------------------------------------------


def test_reconstruct_draws_what_the_sampler_draws_and_leaves_the_networks_as_they_are():
    """With weights that want gradients, as a network has them that was just trained."""
    prior, model, target = unet_prior().train().requires_grad_(), spnn8().requires_grad_(), logits(2)
    for given, names, seed in (({}, "01", 1234), ({"seed": 3, "names": "10"}, "10", 3)):
        drawn = reconstruct(model, prior, target, steps=5, **given)
        expected = draw(names, prior, seed, 5, model, target, BEST.build(5), eta=0.5)
        torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    assert not drawn.requires_grad and all(p.requires_grad and p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match=r"shape \(1, 5\), got \(2, 5\)"):  # which would broadcast
        reconstruct(model, prior, target, names=["0"])


def test_more_steps_than_the_prior_has_are_refused():
    with pytest.raises(ValueError, match="1000, got 1001"):
        Unguided().evaluations(SCHEDULE, 1001)
