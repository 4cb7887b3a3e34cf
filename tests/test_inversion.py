import math

import pytest
import torch
from helpers import random, randomise, seeded, tiny
from torch import nn

import bijections
from inversion import MappingNet, fit, invert, invert_through, squared_error, train_mapping
from utils import InputError


def normal(*shape, seed=0):
    return random(shape, seed)


def network(seed=0):
    """A small, rough map from R^6 to R^4 whose weights gather no gradients."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4)).double().requires_grad_(False)


# --- Plain inversion -------------------------------------------------------------------------------------------------


def matrix(rows, columns):
    """A matrix whose singular values lie between 1 and 2, so that Adam needs few steps."""
    u, _, v = torch.linalg.svd(normal(rows, columns), full_matrices=False)
    return u @ torch.diag(torch.linspace(1, 2, min(rows, columns), dtype=torch.float64)) @ v


def test_a_linear_map_reaches_the_least_squares_solution():
    a, y = matrix(9, 5), normal(3, 9, seed=1)  # more equations than unknowns
    expected = torch.linalg.lstsq(a, y.T).solution.T
    found = invert(lambda x: x @ a.T, y, torch.zeros(3, 5, dtype=torch.float64), steps=400)
    torch.testing.assert_close(found.x, expected, rtol=1e-4, atol=1e-5)
    best = squared_error(expected @ a.T, y)
    assert (best > 0.01).all()  # not to be reached exactly
    torch.testing.assert_close(found.loss, best, rtol=1e-8, atol=0)
    wide = matrix(4, 9)  # more unknowns: exactly
    assert invert(lambda x: x @ wide.T, y[:, :4], torch.zeros(3, 9).double(), steps=400).loss.max() < 1e-8


@pytest.mark.parametrize("lr", (0.01, 1.0, 30.0))
def test_the_best_is_kept_and_is_never_worse_than_the_start(lr):
    f, y, x0 = network(), normal(8, 4, seed=1), normal(8, 6, seed=2)
    found = invert(f, y, x0, steps=15, lr=lr, keep_trajectory=True)
    start = squared_error(f(x0), y)
    assert (found.loss <= start).all()
    torch.testing.assert_close(found.loss, found.curve.min(0).values)
    torch.testing.assert_close(squared_error(f(found.x), y), found.loss)
    torch.testing.assert_close(found.curve[0], start)
    met = found.trajectory[found.best_step, torch.arange(8)]
    assert torch.equal(met, found.x)
    if lr == 30.0:  # steps this long make it worse: what counts is that the last one is not returned
        assert (found.curve[-1] > found.loss).any()
    else:
        assert (found.loss < start).all()


def test_its_step_is_adam_of_the_clipped_gradient():
    f, y, x0 = network(), normal(3, 4, seed=1) * 50, normal(3, 6, seed=2)
    clip = 0.5
    found = invert(f, y, x0, steps=3, lr=0.1, clip=clip, keep_trajectory=True)
    for i in range(3):  # each sample by itself, with the library's own clipping
        x = nn.Parameter(x0[i : i + 1].clone())
        adam = torch.optim.Adam([x], lr=0.1)
        for _ in range(3):
            adam.zero_grad()
            squared_error(f(x), y[i : i + 1]).sum().backward()
            assert nn.utils.clip_grad_norm_([x], clip) > clip
            adam.step()
        torch.testing.assert_close(found.trajectory[-1, i], x.detach()[0], rtol=1e-5, atol=1e-6)


def test_a_sample_does_not_depend_on_its_companions():
    f = randomise(tiny(5).double(), seeded(0)).eval()
    y, x0 = normal(6, 5, seed=1) * torch.logspace(-2, 3, 6)[:, None], normal(6, 3, 4, 4, seed=2)
    y[4] = math.nan  # not even one that breaks down matters
    together = invert(f, y, x0, steps=6, bounds=(-1, 1))
    for i in (0, 1, 2, 3, 5):
        alone = invert(f, y[i : i + 1], x0[i : i + 1], steps=6, bounds=(-1, 1))
        torch.testing.assert_close(together.x[i], alone.x[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together.curve[:, i], alone.curve[:, 0], rtol=1e-9, atol=1e-9)


def test_bounds_hold_from_the_start_on():
    f, y, x0 = network(), normal(5, 4, seed=1) * 9, normal(5, 6, seed=2) * 3
    found = invert(f, y, x0, steps=10, bounds=(-0.5, 1), keep_trajectory=True)
    assert found.trajectory.min() >= -0.5 and found.trajectory.max() <= 1
    assert (found.trajectory == 1).any()
    torch.testing.assert_close(found.curve[0], squared_error(f(x0.clamp(-0.5, 1)), y))


def test_a_sample_that_is_not_finite_stops_and_keeps_its_best():
    y = torch.tensor([[2.0], [0.0], [1.0]], dtype=torch.float64)
    x0 = torch.tensor([[4.0], [1.3], [0.5]], dtype=torch.float64)
    found = invert(lambda x: (x - 1).sqrt(), y, x0, steps=8, lr=0.2)  # NaN below 1
    assert found.curve.isfinite().sum(0).tolist() == [9, 2, 0]
    assert found.x.isfinite().all() and found.best_step[1] == 1 and found.loss[1] < 0.3
    assert torch.equal(found.x[2], x0[2]) and found.loss[2] == math.inf
    found = invert(lambda x: x.sqrt(), y[:2] * 0 + 2, torch.eye(2, dtype=torch.float64)[:, 1:], steps=4)
    assert found.curve.isfinite().sum(0).tolist() == [1, 5]  # the slope of the root at 0 is infinite
    assert found.x.isfinite().all() and found.loss[0] == 4 and found.loss[1] < 1


def test_it_works_inside_inference_mode_and_leaves_the_weights_alone():
    f, seen = network().requires_grad_(True), []
    with torch.inference_mode():
        y, x0 = normal(2, 4, seed=1), normal(2, 6, seed=2)
        found = invert(f, y, x0, steps=3, on_step=seen.append)
    assert seen == [1, 2, 3] and found.trajectory is None and not found.x.requires_grad
    assert (found.best_step > 0).all() and all(p.grad is None for p in f.parameters())
    assert torch.equal(invert(f, y, x0, steps=0).x, x0)
    empty = invert(f, y[:0], x0[:0], steps=2)
    assert empty.x.shape == (0, 6) and empty.curve.shape == (3, 0)


def test_losses_that_are_not_one_for_each_sample():
    with pytest.raises(ValueError, match="one value per sample"):
        invert(network(), normal(2, 4), normal(2, 6), lambda a, b: (a - b).square().mean())
    with pytest.raises(ValueError, match=r"outputs \(2, 1\) and goals \(2,\) differ in shape"):
        invert(lambda x: x[:, :1], normal(2), normal(2, 6))  # they would broadcast to (2, 2)


class ByHand(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.forward = f


@pytest.mark.parametrize("norm", [
    nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False).eval(), bijections.BatchNorm(4),
    ByHand(lambda x: x - x.mean(0)), ByHand(lambda x: x.cumsum(0)),
], ids=lambda norm: type(norm).__name__)  # fmt: skip
def test_a_network_that_mixes_the_samples_is_refused(norm):
    """As it is, on the way through a landscape, and as a landscape."""
    f, y, x0 = nn.Sequential(nn.Linear(6, 4), norm).double(), normal(3, 4), normal(3, 6)
    words = "the loss of sample 2 depends on sample 0"
    with pytest.raises(ValueError, match=words):
        invert(f, y, x0)
    theta = MappingNet((6,)).double()
    with pytest.raises(ValueError, match=words):
        invert_through(theta, f, y, x0)
    theta.register_forward_pre_hook(lambda _, given: (given[0] - given[0].mean(0), given[1]))
    with pytest.raises(ValueError, match=words):
        invert_through(theta, network(), y, x0)


# --- Landscape learning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 8, 6), (2, 5, 4)])
def test_an_untrained_theta_leaves_the_landscape_as_it_is(shape):
    theta = MappingNet(shape, width=4, scale=0.25).double()
    x = normal(2, *shape)
    torch.testing.assert_close(theta(torch.zeros_like(x), x), x)
    torch.testing.assert_close(theta(x, x), 1.25 * x)
    with pytest.raises(ValueError, match="vector"):
        MappingNet((3, 4))


def test_gradients_pass_thetas_clamp():
    theta = MappingNet((4,), bounds=(-1, 1)).double()
    z = torch.tensor([[-3.0, -0.5, 0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    x = theta(z, torch.zeros_like(z))
    torch.testing.assert_close(x.detach(), z.detach().clamp(-1, 1))
    x.sum().backward()
    assert (z.grad == 1).all()


def test_theta_is_fitted_to_every_point_of_a_buffer_with_its_own_output():
    f, y, x0, z = network(), normal(5, 4, seed=1), normal(5, 6, seed=2), normal(4, 5, 6, seed=3)
    losses = squared_error(f((x0 + z).flatten(0, 1)), y.repeat(4, 1))
    theta, seen = MappingNet((6,)).double(), []

    def noted(output, goal):
        seen.append(squared_error(output, goal))
        return seen[-1]

    still = torch.optim.SGD(theta.parameters(), lr=0.0)
    assert fit(theta, f, still, noted, z, x0, y, batch_size=8).item() == pytest.approx(losses.mean())
    torch.testing.assert_close(torch.cat(seen).sort().values, losses.sort().values)
    assert [len(each) for each in seen] == [8, 8, 4]


@pytest.mark.parametrize("first", [0, 1, 4])
def test_a_search_goes_on_where_it_ended(first):
    f = network()
    y, x0 = drawn(f)(5)
    whole = invert(f, y, x0, steps=9)
    begun = invert(f, y, x0, steps=first)
    ended = invert(f, y, torch.zeros_like(x0), steps=9, after=begun)
    for name in ("x", "loss", "best_step", "curve"):
        assert torch.equal(getattr(ended, name), getattr(whole, name)), name


def test_broken_trajectories_stay_out_of_a_buffer():
    x0, y = torch.tensor([[0.5], [4.0]], dtype=torch.float64), torch.tensor([[7.0], [2.0]], dtype=torch.float64)

    def train(f):
        return train_mapping(MappingNet((1,)).double(), f, lambda count: (y, x0), buffers=1, steps=2)

    (row,) = train(lambda x: (x - 1).sqrt())
    start = squared_error((x0[1:] - 1).sqrt(), y[1:]).item()
    assert row["start_loss"] == pytest.approx(start) and row["loss"] < 1.2 * start
    with pytest.raises(InputError, match="no trajectory"):
        train(lambda x: x * math.nan)


def drawn(f):
    """Problems of the toy: starts near the origin, outputs of other points."""

    def draw(count):
        x = torch.randn(count, 6, dtype=torch.float64)
        return f(x), 0.1 * torch.randn(count, 6, dtype=torch.float64)

    return draw


def test_training_makes_a_few_steps_go_further():
    f = network()
    torch.manual_seed(0)
    theta = MappingNet((6,), width=32, scale=0.1).double()
    untrained = MappingNet((6,), width=32, scale=0.1).double()
    history = train_mapping(theta, f, drawn(f), buffers=20, samples=32, steps=3, lr=3e-3, batch_size=32)
    y, x0 = drawn(f)(200)  # problems that training has not seen
    before, after = (invert_through(t, f, y, x0, steps=3) for t in (untrained, theta))
    assert after.loss.mean() < 0.5 * before.loss.mean()
    assert [row["step"] for row in history] == list(range(1, 21))
    assert history[-1]["end_loss"] < 0.5 * history[0]["end_loss"]
    assert not any(p.requires_grad for p in theta.parameters())
