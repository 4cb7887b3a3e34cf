"""The noise schedule against its definition, and the walk with its jumps back."""

import pytest
import torch

from DDNM.guided_diffusion.schedule import Schedule, sampling_timesteps, time_pairs, time_travel_steps


def test_abar_is_the_running_product_and_one_for_the_clean_image():
    schedule = Schedule(1e-4, 0.02, 1000)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    for t in (0, 1, 500, 999):
        torch.testing.assert_close(schedule.abar(t).double(), (1 - betas[: t + 1]).prod(), rtol=1e-6, atol=0)
    assert schedule.abar(-1) == 1
    assert schedule.abar(torch.tensor([[-1, 0], [5, 999]])).shape == (2, 2)
    assert schedule.abar(3).dtype == torch.float32


@pytest.mark.parametrize("t", [-2, 1000, 0.5, torch.tensor([0, 1000])])
def test_abar_refuses_what_is_no_step(t):
    with pytest.raises(ValueError, match="t must be"):
        Schedule().abar(t)


def test_any_betas_make_a_schedule():
    linear, betas = Schedule(), torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    same = Schedule(betas=betas)
    assert same == linear and hash(same) == hash(linear) and linear.linear and not same.linear
    steps = torch.arange(-1, 1000)
    assert torch.equal(same.abar(steps), linear.abar(steps))
    other = Schedule(betas=[0.1, 0.3, 1.0])
    assert other != linear and other.num_diffusion_timesteps == 3
    torch.testing.assert_close(other.abar(torch.tensor([-1, 0, 1])), torch.tensor([1.0, 0.9, 0.63]))
    assert 0 < other.abar(2) < 1e-8  # pure noise, and yet no division by zero


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [1.0, 0.5], [0.1, float("nan")], [[0.1]], [-0.1], [1.1]])
def test_impossible_schedules_are_refused(betas):
    with pytest.raises(ValueError, match="betas must be"):
        Schedule(betas=betas)
    with pytest.raises(ValueError, match="betas must be"):
        Schedule(0.0, 0.02, 10)


def test_the_published_walk_where_the_steps_divide():
    assert sampling_timesteps(1000, 4) == [0, 250, 500, 750]
    assert sampling_timesteps(1000, 100) == list(range(0, 1000, 10))
    assert sampling_timesteps(7, 7) == list(range(7))
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="sampling steps"):
            sampling_timesteps(1000, steps)


@pytest.mark.parametrize("total", [1000, 7, 1])
def test_every_number_of_steps_begins_next_to_the_noise(total):
    for steps in range(1, total + 1):
        times = sampling_timesteps(total, steps)
        assert len(times) == steps and times == sorted(set(times)) and times[0] >= 0
        divides = steps > 1 and total % steps == 0
        assert times[-1] == (total - total // steps if divides else total - 1)


@pytest.mark.parametrize("arguments", [(10, 1, 1), (10, 2, 3), (20, 5, 2), (3, 10, 4), (1, 1, 5)])
def test_the_walk_moves_one_index_at_a_time_to_the_end(arguments):
    walk = time_travel_steps(*arguments)
    assert max(walk) == walk[0] == arguments[0] - 1 and walk[-1] == -1 and walk.count(-1) == 1
    assert all(abs(a - b) == 1 for a, b in zip(walk[:-1], walk[1:], strict=True))


@pytest.mark.parametrize("arguments", [(0, 1, 1), (10, 0, 1), (10, 1, 0)])
def test_no_walk_is_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        time_travel_steps(*arguments)


def test_time_pairs_are_in_training_time_and_end_at_the_clean_image():
    assert time_pairs(1000, 4) == [(750, 500), (500, 250), (250, 0), (0, -1)]
    pairs = time_pairs(1000, 6, 2, 2)
    assert pairs[2:6] == [(599, 400), (400, 599), (599, 799), (799, 599)]
    assert time_pairs(1000, 1) == [(999, -1)]
    assert all(a[1] == b[0] for a, b in zip(pairs[:-1], pairs[1:], strict=True))
