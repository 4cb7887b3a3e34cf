"""What augmentation does to pictures, and what it leaves."""

import torch

from augmentation import augmented


def smooth(count: int, size: int = 32) -> torch.Tensor:
    """Pictures that interpolation does not change much."""
    ramp = torch.linspace(-0.8, 0.8, size)
    picture = torch.stack([ramp[None] + 0 * ramp[:, None], ramp[:, None] + 0 * ramp[None], ramp[None] * ramp[:, None]])
    return picture.expand(count, 3, size, size).clone()


def test_strength_zero_returns_the_pictures_themselves():
    x = smooth(2)
    assert augmented(x, 0.0) is x


def test_each_picture_changes_its_own_way_and_stays_in_range():
    torch.manual_seed(0)
    x = smooth(8)
    y = augmented(x, 1.0)
    assert y.shape == x.shape and y.abs().max() <= 1
    moved = (y - x).flatten(1).abs().amax(1)
    assert moved.min() > 0.01
    assert len({round(value, 5) for value in moved.tolist()}) == 8


def test_more_strength_moves_further():
    x = smooth(64)
    moved = []
    for strength in (0.1, 1.0):
        torch.manual_seed(1)  # the same draws
        moved.append((augmented(x, strength) - x).abs().mean().item())
    assert moved[1] > 3 * moved[0]


def test_a_share_of_the_pictures_is_left_alone():
    torch.manual_seed(0)
    x = smooth(400, 8).double()
    left = (augmented(x, 1.0, share=0.25) - x).flatten(1).abs().amax(1) < 1e-6
    assert 250 < left.sum() < 350  # 300 expected, deviation 9


def test_the_global_seed_decides():
    x = smooth(4)
    torch.manual_seed(3)
    first = augmented(x, 1.0)
    torch.manual_seed(3)
    assert torch.equal(augmented(x, 1.0), first)
