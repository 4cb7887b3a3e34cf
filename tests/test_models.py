"""Networks as objects: what they refuse, what they are called in a state dict, and that W is never stale."""

import json
from contextlib import nullcontext

import pytest
import torch
from helpers import OPTIMISERS, diy12, diy16, landscape, random, randomise, seeded, tiny

import models
from blocks import CayleyMixing, ConvPINNBlock, solved_once
from models import SPNN

# --- Refusals --------------------------------------------------------------------------------------------------------


def custom(*blocks, **settings) -> SPNN:
    return SPNN(**{"num_classes": 3, "img_size": 4, **settings}, layer_channels=list(blocks))


UNSHUFFLE = ("PixelUnshuffleBlock", {"r": 4})


def head(**changes) -> tuple[str, dict]:
    return ("ConvPINNBlock", {"in_ch": 48, "out_ch": 3, **changes})


REFUSED = {
    "channels": (lambda: custom(UNSHUFFLE, head(in_ch=40)), r"block 1: ConvPINNBlock\(40->3\): in_ch is 40, but 48"),
    "size": (lambda: custom(("PixelUnshuffleBlock", {"r": 3})), r"block 0: PixelUnshuffleBlock\(r=3\).*4x4"),
    "num_classes": (lambda: custom(UNSHUFFLE, head(), num_classes=5), r"block 1: num_classes is 5.* 3 channels"),
    "odd feat_size": (lambda: custom(UNSHUFFLE, head(feat_size=3)), r"block 1: .*\(48->3\): feat_size .* got 3"),
    "other feat_size": (lambda: custom(UNSHUFFLE, head(feat_size=4)), r"block 1: .*\(48->3\): feat_size is 4, .* 1x1"),
    "out_ch equal to in_ch": (lambda: ConvPINNBlock(5, 5), r"ConvPINNBlock\(5->5\): .* out_ch 5, in_ch 5"),
    "mix_type": (lambda: SPNN(img_size=32, mix_type="qr"), r"cayley.*householder.*'qr'"),
    "an unknown block": (lambda: custom(UNSHUFFLE, ("ConvBlock", {})), r"block 1: unknown block 'ConvBlock', known"),
    "an unknown argument": (lambda: custom(UNSHUFFLE, head(width=2)), r"block 1: .*width"),
    "no pair": (lambda: custom(UNSHUFFLE, "ConvPINNBlock"), r"block 1: "),
    "img_size without architecture": (lambda: SPNN(img_size=48), r"img_size 48 .*32, 64, 256"),
    "hidden": (lambda: ConvPINNBlock(5, 3, hidden=0), r"ConvPINNBlock\(5->3\): .*hidden.* 0"),
    "scale_bound": (lambda: ConvPINNBlock(5, 3, scale_bound=-1.0), r"scale_bound.* -1"),
}


@pytest.mark.parametrize("build, message", REFUSED.values(), ids=REFUSED)
def test_refused_when_built(build, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build()


def test_wrong_inputs_are_named():
    g = tiny()
    with pytest.raises(ValueError, match=r"\(B, 3, 4, 4\), got \(2, 3, 8, 8\)"):
        g(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\(B, 3, 4, 4\), got \(3, 4, 4\)"):
        g(torch.zeros(3, 4, 4))
    for logits in (torch.zeros(2, 5), torch.zeros(3), torch.zeros(2, 3, 1, 1)):
        for call in (g.pinv, g.natural, lambda y: g.back_project(torch.zeros(2, 3, 4, 4), y)):
            with pytest.raises(ValueError, match=r"\(B, 3\), got"):
                call(logits)
    with pytest.raises(ValueError, match=r"\(B, 4, 3, 2\), got \(1, 4\)"):
        landscape().pinv(torch.zeros(1, 4))  # logits of an image, for those of a map


def test_back_projection_of_a_batch():
    """By one target for all, of some images only, and with strengths of another type."""
    g = randomise(tiny().double(), seeded(0))
    x, y = random((4, 3, 4, 4), 1), random((4, 3), 2)
    torch.testing.assert_close(g.back_project(x, y[:1]), g.back_project(x, y[:1].expand(4, 3)))
    assert g.back_project(x[:0], y[:0]).shape == (0, 3, 4, 4)
    nlbp = models.BackProjection(g, x, g.natural(y))
    torch.testing.assert_close(nlbp(0.5, [1, 3]), nlbp(0.5)[[1, 3]])
    strength = torch.tensor([0.5, 1.0, 0.25, 0.0])
    assert torch.equal(nlbp(strength), nlbp(strength.double()))


def test_coupling_starts_at_zero():
    """A fresh network's last layers are zero, so that g is linear and training starts from the orthogonal map."""
    for block in (b for b in tiny().pinn.blocks if b.lossy):
        for net in (block.s, block.t, block.r):
            assert not net.net[-1].weight.any() and not net.net[-1].bias.any()


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny, diy12, diy16, lambda: SPNN(num_classes=4, hidden=4, img_size=32)])
def test_a_network_is_rebuilt_from_its_settings(build):
    with torch.device("meta"):
        model = build()
        same = [SPNN(**config) for config in (model.config, json.loads(json.dumps(model.config)))]
    for again in same:
        assert again.config == model.config
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
        assert [str(b) for b in again.pinn.blocks] == [str(b) for b in model.pinn.blocks]


# --- W is never stale ------------------------------------------------------------------------------------------------


def one_block() -> SPNN:
    """With a Cayley mixing, for no other keeps its W."""
    return custom(("PixelUnshuffleBlock", {"r": 2}), head(in_ch=12, hidden=1, feat_size=1), img_size=2)


def holds(g: SPNN) -> None:
    """g and g' use the W of the weights as they are: against matrices solved from a copy that remembers nothing."""
    dtype = next(g.parameters()).dtype
    fresh = type(g)(**g.config).to(dtype)
    fresh.load_state_dict(g.state_dict())
    x, y = random((2, 3, 2, 2), 1, dtype), random((2, 3), 2, dtype)
    with torch.no_grad():
        assert torch.equal(g(x), fresh(x)) and torch.equal(g.pinv(y), fresh.pinv(y))
    assert torch.equal(g(x), fresh(x)) and torch.equal(g.pinv(y), fresh.pinv(y))


def by_load_state_dict(g):
    g.load_state_dict(randomise(one_block(), seeded(9)).state_dict())


def by_assignment(g):
    g.load_state_dict(randomise(one_block(), seeded(9)).state_dict(), assign=True)
    g.requires_grad_()


def by_data(g):
    """Behind torch's back, which counts no such change: a switch of mode follows, as it does in any training."""
    for p in g.parameters():
        p.data.mul_(1.5)
        p.data[0] += 0.1
    g.eval()


def by_hand(g):
    """As by_data, after a backward pass: the oldest step there is."""
    (g(random((2, 3, 2, 2), 1, torch.float32)).sum() + g.pinv(torch.ones(1, 3)).sum()).backward()
    for p in g.parameters():
        p.data -= 0.1 * p.grad


def by_no_grad(g):
    with torch.no_grad():
        for p in g.parameters():
            p[0] += 0.3


def by_swapped_data(g):
    for p in g.parameters():
        p.data = p.data * 2 + 0.1


def by_optimiser(kind):
    def change(g):
        x = random((2, 3, 2, 2), 1, torch.float32)
        optimiser = OPTIMISERS[kind](g.parameters())
        (g(x).square().mean() + g.pinv(torch.ones(1, 3)).square().mean()).backward()
        optimiser.step()

    return change


CHANGES = {
    "load_state_dict": by_load_state_dict,
    "load_state_dict(assign)": by_assignment,
    "data": by_data,
    "hand": by_hand,
    "no_grad": by_no_grad,
    "swapped data": by_swapped_data,
    "double": lambda g: g.double(),
    "bfloat16 and back": lambda g: g.bfloat16().float(),
    **{kind: by_optimiser(kind) for kind in OPTIMISERS},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("grad", [False, True])
def test_changed_weights_change_w(change, grad):
    g = randomise(one_block(), seeded(0))
    with torch.set_grad_enabled(grad):
        g(random((1, 3, 2, 2), 1, torch.float32))
    change(g)
    holds(g)


# --- Solved once -----------------------------------------------------------------------------------------------------


def test_w_is_solved_once_for_its_weights(solves):
    g = randomise(tiny(), seeded(0))
    mixings = sum(isinstance(m, CayleyMixing) for m in g.modules())
    x = random((2, 3, 4, 4), 1, torch.float32).requires_grad_()
    for trains, once, times in ((False, False, 1), (True, True, 1), (True, False, 3)):  # g, g' and a back-projection
        solves.clear()
        with torch.set_grad_enabled(trains), solved_once() if once else nullcontext():
            y = g(x)
            loss = (g.pinv(y) - x).square().mean() + g.back_project(x, y.detach() + 1).mean()
            if trains:
                loss.backward()
        assert len(solves) == times * mixings
        by_no_grad(g)
    solves.clear()
    g.requires_grad_(False)
    for _ in range(3):
        g(x).sum().backward()
    assert len(solves) == mixings and x.grad.any()  # of frozen weights for good


def test_w_in_inference_mode_first_then_gradients():
    g = randomise(tiny(), seeded(0))
    x = random((2, 3, 4, 4), 1, torch.float32)
    with torch.inference_mode():
        g(x)
    g(x).sum().backward()
    assert all(m.A_unconstrained.grad.any() for m in g.modules() if isinstance(m, CayleyMixing))


# --- Containers ------------------------------------------------------------------------------------------------------


def test_another_number_of_latents_is_refused():
    """Latents of another network must not be taken for this one's."""
    for number in (0, 1, 3):
        with pytest.raises(ValueError, match=r"one latent per block \(5\)"):
            tiny().pinn.pinv(torch.zeros(1, 3, 1, 1), [None] * number)


def test_natural_latents_skip_the_largest_inverse(monkeypatch):
    g = tiny()
    called = []
    monkeypatch.setattr(g.pinn.blocks[1], "pinv", lambda *_: called.append(1))
    assert [z is None for z in g.natural(torch.zeros(1, 3)).z] == [True, False, False, True, False]
    assert not called
