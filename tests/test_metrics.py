import math

import pytest
import torch

from metrics import (
    accuracy_by_attribute,
    agreement,
    balanced_accuracy_by_attribute,
    bootstrap,
    halves,
    prob_error,
    psnr,
)


def test_accuracy_and_balanced_accuracy_by_hand():
    labels = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]]).float()
    logits = torch.tensor([[-1, 2, -1], [-1, 2, 1], [-1, -2, -1], [-1, 2, -1]]).float()
    torch.testing.assert_close(accuracy_by_attribute(logits, labels), torch.tensor([0.75, 0.75, 0.75]))
    balanced = balanced_accuracy_by_attribute(logits, labels)
    assert balanced[0] == 0.5  # always "absent": chance, whatever the prevalence
    assert balanced[1:].isnan().all()  # one class only


def test_a_nan_logit_is_wrong_for_either_label():
    logits, labels = torch.full((2, 1), math.nan), torch.tensor([[1.0], [0.0]])
    assert accuracy_by_attribute(logits, labels) == 0
    assert balanced_accuracy_by_attribute(logits, labels) == 0
    assert agreement(logits, logits).tolist() == [0, 0]


@pytest.mark.parametrize("metric", [accuracy_by_attribute, balanced_accuracy_by_attribute])
def test_shapes_are_checked(metric):
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        metric(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no images"):
        metric(torch.zeros(0, 3), torch.zeros(0, 3))


def test_agreement_and_prob_error():
    a = torch.tensor([[1.0, -1.0, 3.0, 0.5]])
    b = torch.tensor([[2.0, 1.0, 3.0, -0.5]])
    assert agreement(a, a).item() == 1 and prob_error(a, a).item() == 0
    assert agreement(a, b).item() == 0.5
    torch.testing.assert_close(prob_error(a, b), (a.sigmoid() - b.sigmoid()).abs().mean(1))


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([a[0], a[1] + 0.2])
    values = psnr(a, b)
    assert values[0] == math.inf
    torch.testing.assert_close(values[1], torch.tensor(10 * math.log10(4 / 0.04)), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(a, b[:1])


def test_intervals_are_those_of_the_normal_distribution():
    """Of a mean over n values of variance 1: 1.96 / sqrt(n) on each side."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    width = 1.96 * values.std().item() / 20
    for of in (bootstrap, lambda f, n: halves(f, n, 1000)):
        value, low, high = of(lambda drawn: values[drawn].mean(-1), 400)
        assert value == pytest.approx(values.mean().item())
        assert value - low == pytest.approx(width, rel=0.15) and high - value == pytest.approx(width, rel=0.15)
