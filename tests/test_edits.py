"""Attributes set by name, and what follows them."""

import pytest
import torch

from DDNM.guided_diffusion.edits import Edits, contradictions, effects_of_states
from utils import InputError

NAMES = ["Hat", "Bangs", "Smiling"]
TYPICAL = [[-5.0, 4.0], [-3.0, 2.0], [-6.0, 6.0]]


def edits(*assignments, contradiction=0.3, **notes):
    notes = {"typical_logits": TYPICAL, "contradictions": {"Hat=1": {"Bangs=1": 0.1, "Smiling=0": 0.4}}} | notes
    return Edits.parse(assignments, NAMES, notes, contradiction)


def test_contradictions_are_what_labels_seldom_have_together():
    labels = torch.tensor([[1, 0, 1]] * 3 + [[1, 1, 1]] + [[0, 1, 1]] * 4 + [[0, 0, 1]] * 2).float()
    # P(bangs) = 1/2, beside a hat 1/4, without one 2/3; everybody smiles: nothing can be said of that
    assert contradictions(labels, NAMES) == {}
    labels[3, 1] = 0  # P(bangs) = 2/5, beside a hat 0; P(no bangs) = 3/5, without a hat 1/3 of that; P(hat) = 2/5
    assert contradictions(labels, NAMES) == {"Bangs=1": {"Hat=1": 0.0}, "Hat=1": {"Bangs=1": 0.0}}


def test_what_contradicts_an_edit_gets_its_other_typical_logit_or_stays_beyond_it():
    logits = torch.tensor([[-1.0, 3.0, -2.0], [2.0, -1.0, 1.0], [2.0, -9.0, 1.0]])
    said = torch.tensor([[-4.0, 1.0, -1.0], [3.0, -2.0, 1.0], [3.0, 0.5, 1.0]])
    edited, judged, followed = edits("Hat=1").apply(logits, said)
    assert torch.equal(edited, torch.tensor([[4.0, -3.0, -2.0], [4.0, -3.0, 1.0], [4.0, -9.0, 1.0]]))
    assert torch.equal(followed, torch.tensor([[False, True, False], [False] * 3, [False] * 3]))
    assert torch.equal(judged > 0, torch.tensor([[True, False, False], [True, False, True], [True, True, True]]))
    assert logits[0, 0] == -1 and said[0, 0] == -4  # what was given stays
    assert edits("Hat=1").told(followed) == "Bangs (1)"


def test_effects_are_those_of_each_state_alone():
    """Hats are of men mostly, and have no part in what beards do to the third logit."""
    draws = torch.rand(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    beard = (draws[:, 0] < 0.4).double()
    hat = (draws[:, 1] < 0.1 + 0.6 * beard).double()
    logits = torch.stack([8 * beard - 4, 8 * hat - 4 + 0.5 * beard, 3 + 0.5 * hat - 2 * beard], 1)
    effects = effects_of_states(torch.cat([logits, -torch.ones(20_000, 1)], 1))
    expected = [[8, 0.5, -2, 0], [0, 8, 0.5, 0], [0, 0, 0, 0], [0, 0, 0, 0]]  # what never changes says nothing
    torch.testing.assert_close(effects[[0, 1, 3]], torch.tensor(expected).double()[[0, 1, 3]], rtol=0, atol=0.01)


def test_the_rest_moves_by_the_effects_and_keeps_its_state():
    effects = [[9.0, 2.0, 1.0], [0.0, 9.0, -0.5], [0.0, 0.0, 9.0]]
    logits = torch.tensor([[-2.0, 3.0, 2.0], [-2.0, -9.0, 0.1], [-2.0, -0.2, -0.7], [1.0, 3.0, 2.0]])
    edited, _, followed = edits("Hat=+4", contradictions={}, effects=effects).apply(logits)
    # -0.2 and -0.7 were nearer to 0 than KEPT of the typical ones; the last had a hat
    expected = [[4.0, 5.0, 3.0], [4.0, -7.0, 1.1], [4.0, -0.2, -0.7], [4.0, 3.0, 2.0]]
    torch.testing.assert_close(edited, torch.tensor(expected))
    assert not followed.any()
    edited, _, followed = edits("Hat=1", effects=effects).apply(logits)  # bangs follow in the first: both have effects
    assert followed.nonzero().tolist() == [[0, 1], [3, 1]]
    expected = [[4.0, -3.0, 3.5], [4.0, -7.0, 1.1], [4.0, -1.0, -0.7], [4.0, -3.0, 2.5]]
    torch.testing.assert_close(edited, torch.tensor(expected))  # -0.2 went to -3 first
    weak = edits("Hat=-5", contradictions={}, effects=[[0, 0, 8.0]] + effects[1:]).apply(logits)[0]
    torch.testing.assert_close(weak[3], torch.tensor([-5.0, 3.0, 1.8]))  # 2 - 8, but KEPT of 6
    assert torch.equal(edits("Hat=+4", contradiction=0, effects=effects).apply(logits)[0][:, 1:], logits[:, 1:])


@pytest.mark.parametrize(
    "of, changed",
    [
        (edits("Hat=1", contradiction=0), [0]),
        (edits("Hat=0"), [0]),
        (edits("Hat=1", "Bangs=+1"), [0, 1]),
        (edits("Hat=1", contradiction=0.5), [0, 1, 2]),
        (edits("Hat=+4", typical_logits=None), [0]),
        (Edits.parse(["Hat=+4"], NAMES, {}), [0]),
        (Edits.parse([], NAMES, {}), []),
    ],
)
def test_nothing_else_changes(of, changed):
    logits = torch.tensor([[-9.0, 3.0, -2.0]])
    assert (of.apply(logits)[0] != logits)[0].nonzero()[:, 0].tolist() == changed


@pytest.mark.parametrize("assignment, notes, said", [
    ("Hta=1", {}, "no attribute 'Hta', did you mean 'Hat'"), ("hat=1", {}, "did you mean 'Hat'"), ("hat", {}, "'Hat'"),
    *((f"Hat={value}", {}, f"{value}' is neither 0, 1 nor a logit") for value in ("maybe", "nan", "inf", "1e99", "")),
    ("Hat=1", {"typical_logits": None}, r"record no typical logits; give one: Hat=\+4"),
])  # fmt: skip
def test_an_edit_that_makes_no_sense_is_refused(assignment, notes, said):
    with pytest.raises(InputError, match=f"--set {assignment}: .*{said}"):
        edits(assignment, **notes)
