"""The examples of three documents on invertible networks, by the names here: shapes, inverses, log-determinants.

An i-ResNet library (fully connected, 1-D and 2-D blocks, batch norm, Real NVP), a library of invertible layers (its
interface, mixins, and the network of its notebook), and a lab session on i-RevNets and i-ResNets. docs/family.md has
the table of their names, and where each of the lab's questions is answered.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import random, seeded
from rows import jacobian_log_det
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal, TransformedDistribution

import bijections as bi
from density import Density, as_transform
from models import PINN

STANDARD = Normal(0.0, 1.0)


# --- The i-ResNet library --------------------------------------------------------------------------------------------


def same_as_printed(x: Tensor, again: Tensor) -> None:
    """To the four decimals that the document prints, and what it prints of zeros: 2e-7."""
    torch.testing.assert_close(again, x, rtol=1e-6, atol=1e-6)
    assert [f"{a:.4f}" for a in again.flatten().tolist()] == [f"{a:.4f}" for a in again.flatten().round(decimals=4)]


VECTORS = [[1, 2], [3, 4]]
LINES = [[[1, 2, 3, 4, 5], [-1, -2, -3, -4, -5]], [[1, 2, 0, 4, 5], [-1, -2, 0, -4, -5]]]
SQUARES = [[[[1, 1, 1], [0, 1, 0], [0, 1, 0]], [[0, 1, 0], [1, 1, 1], [0, 1, 0]]]]
IRESNETS = {
    "iResNet.FCN(2, 2)": (lambda: [bi.ResidualFC(2, 2)], VECTORS),
    "iResNet.Sequential(iResNet.FCN(2, 2), ...)": (lambda: [bi.ResidualFC(2, 2) for _ in range(3)], VECTORS),
    "iResNet.Conv1d(channel=2, kernel_size=3), then 1, then 3": (
        lambda: [bi.ResidualConv1d(2, size=5, kernel_size=k) for k in (3, 1, 3)], LINES,
    ),
    "iResNet.Conv2d(channel=2, kernel_size=3), six times": (
        lambda: [bi.ResidualConv2d(2, size=3, kernel_size=3) for _ in range(6)], SQUARES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("build, x", IRESNETS.values(), ids=IRESNETS)
def test_an_iresnet(build, x):
    """``y, logp, logdet = model(x)``, ``model.inverse(y)``: what every example of the document shows."""
    torch.manual_seed(0)
    x = torch.tensor(x, dtype=torch.float32)
    model = PINN(build(), x.shape[1:]).train()
    y, logp, logdet = Density(model).terms(x)
    assert y.shape == x.shape and logp.shape == logdet.shape == (len(x),)
    assert torch.equal(logp, torch.zeros(len(x)))  # nothing is dropped
    assert y.requires_grad and logdet.requires_grad and not x.requires_grad  # x need not
    same_as_printed(x, model.pinv(y.detach()))
    torch.testing.assert_close(Density(model).log_prob(x), STANDARD.log_prob(y).flatten(1).sum(1) + logp + logdet)
    torch.testing.assert_close(logdet, jacobian_log_det(model, x).float(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_log_p_is_inherited_from_the_features_that_a_block_drops():
    """iResNet.FCN(4, 2): log p of the two that go, log det of all; each adds to what came before."""
    torch.manual_seed(0)
    first, second = bi.ResidualFC(4, 3), bi.ResidualFC(3, 2)
    chain, x = PINN([first, second], (4,)), random((5, 4), 1, torch.float32)
    middle, log_p0, log_det0 = Density(PINN([first], (4,))).terms(x)
    y, log_p, log_det = Density(PINN([second], (3,))).terms(middle)
    whole = Density(chain).terms(x)
    torch.testing.assert_close(whole[0], y)
    torch.testing.assert_close(whole[1], log_p0 + log_p)
    torch.testing.assert_close(whole[2], log_det0 + log_det)
    z = chain(x, return_latents=True)[1]
    torch.testing.assert_close(whole[1], sum(STANDARD.log_prob(part).sum(1) for part in z))
    torch.testing.assert_close(Density(chain).log_prob(x), STANDARD.log_prob(y).sum(1) + whole[1] + whole[2])
    torch.testing.assert_close(chain.pinv(y, z), x)


def test_real_nvp():
    """iResNet.Sequential(iResNet.RealNVP(4), iResNet.RealNVP(4)): a chessboard mask, log(s) within [-clip, clip]."""
    torch.manual_seed(0)
    layers = [bi.Coupling(4, dims=0, mask="checkerboard", flip=flip, hidden=4 * 4, scale_bound=1) for flip in (0, 1)]
    model = PINN(layers, (4,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.tensor([[1.0, 2.0, 3.0, -1.0], [4.0, 5.0, -6.0, 6.0]])
    y, logp, logdet = Density(model).terms(x)
    assert y.shape == (2, 4) and logp.tolist() == [0, 0] and logdet.shape == (2,)
    same_as_printed(x, model.pinv(y))
    assert torch.equal(layers[0](x)[:, 1::2], x[:, 1::2]) and (layers[0](x)[:, ::2] != x[:, ::2]).all()
    assert torch.equal(layers[1](x)[:, ::2], x[:, ::2])
    assert (logdet.abs() <= 4).all() and logdet.abs().max() > 0.5  # four log(s) of at most 1
    anywhere = as_transform(model, (4,))  # input: (*, dim)
    assert anywhere(x.view(2, 1, 1, 4)).shape == (2, 1, 1, 4)
    torch.testing.assert_close(anywhere.log_abs_det_jacobian(x.view(2, 1, 4), None), logdet.view(2, 1))


# --- The library of invertible layers --------------------------------------------------------------------------------


class Tanh(bi.Activation):
    """class InvertibleTanh(InvertibleComponentwiseMixin, InvertibleModule, nn.Tanh)"""

    def f(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def inverse(self, output: Tensor) -> Tensor:
        return 0.5 * (torch.log(1 + output) - torch.log(1 - output))


def test_a_componentwise_layer_needs_a_function_and_its_inverse():
    x = random((4, 3, 2), 1).requires_grad_()
    y, _, log_det = Tanh().forward_log_det(x)
    expected = bi.Tanh().forward_log_det(x)
    torch.testing.assert_close((y, log_det), (expected[0], expected[2]))
    torch.testing.assert_close(Tanh().pinv(y), x)
    gradient, expected = (torch.autograd.grad(value.sum(), x)[0] for value in (log_det, expected[2]))
    torch.testing.assert_close(gradient, expected)  # to train by


def test_a_volume_preserving_layer_needs_a_map_and_its_inverse():
    """InvertibleVolumePreservingMixin, whose ones would be the logarithms of e: here they are zeros, one per image."""

    class Reverse(bi.VolumePreserving):
        def g(self, x: Tensor) -> Tensor:
            return x.flip(1)

        def pinv(self, y: Tensor, latent: None = None) -> Tensor:
            return y.flip(1)

    x = random((4, 3), 1)
    y, z, log_det = Reverse().forward_log_det(x)
    assert torch.equal(y, x.flip(1)) and z is None and torch.equal(log_det, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(jacobian_log_det(Reverse(), x), log_det)
    assert torch.equal(Reverse().inverted()(y), x)


@torch.no_grad()
def test_a_sigmoid_far_from_zero():
    """In [28]: torch.sigmoid(torch.ones(1, dtype=torch.float64)*-50.0)"""
    x = -50.0 * torch.ones(1, 1, dtype=torch.float64)
    assert str(bi.Sigmoid()(x)[0]) == "tensor([1.9287e-22], dtype=torch.float64)"
    torch.testing.assert_close(bi.Sigmoid().pinv(bi.Sigmoid()(x)), x)
    torch.testing.assert_close(bi.Sigmoid().log_abs_det(x), torch.tensor([-50.0]).double())


def create_mlp(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, 16), nn.ReLU(), nn.Linear(16, after), nn.Softsign())


def test_the_network_of_the_notebook():
    """In [11] and In [4], which end in a NameError there: a batch of ten vectors of ten numbers, out and back."""
    torch.manual_seed(0)
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    model = PINN(
        [
            *(bi.Orthogonal(10, reflections=10), bi.Bias(10), bi.Diagonal(10)),
            *(bi.Orthogonal(10, reflections=10), bi.Bias(10), bi.BairdActivation((10,))),
            *(bi.Orthogonal(10, reflections=10), bi.Bias(10), bi.Shuffle(10, order=reversed(range(10)))),
            *(bi.Concat(10, 10), bi.Diagonal(20)),
            bi.Shuffle(20, order=order),
            bi.Coupling(20, kept=8, s=create_mlp(8, 12), t=create_mlp(8, 12), dims=0),
            bi.Shuffle(20, order=order),
            bi.Coupling(20, kept=12, s=create_mlp(12, 8), t=create_mlp(12, 8), dims=0),
            *(bi.Orthogonal(20, reflections=20), bi.Bias(20), bi.LeakyReLU()),
        ],
        (10,),
    ).double()
    concat = next(block for block in model.blocks if isinstance(block, bi.Concat))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        input_b = torch.eye(10).double()
        a = random((10, 10), 1)
        b = a
        for block in model.blocks:  # with an input_b for each image; a learned constant without
            b = block(b, e=input_b) if block is concat else block(b)
        assert b.shape == (10, 20)
        torch.testing.assert_close(model.pinv(b), a)
        restored = b
        for block in reversed(model.blocks):
            if block is concat:
                break
            restored = block.pinv(restored)
        torch.testing.assert_close(concat.split(restored)[1], input_b)  # restored_input
    model(a).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_a_matrix_that_is_not_square_has_its_least_squares_inverse():
    """Reflections, a diagonal and reflections of other sizes: g' is the Moore-Penrose inverse."""
    torch.manual_seed(0)
    wide = PINN(
        [bi.Orthogonal(5, reflections=5), bi.Concat(3, 2).inverted(), bi.Diagonal(3), bi.Orthogonal(3)], (5,)
    ).double()
    wide.blocks[2].log_scale.copy_(random((3,), 2))
    matrix = wide(torch.eye(5).double()).T
    y = random((4, 3), 1)
    torch.testing.assert_close(wide.pinv(y), y @ torch.linalg.pinv(matrix).T)
    torch.testing.assert_close(torch.linalg.svdvals(matrix), random((3,), 2).exp().sort(descending=True).values)


@torch.no_grad()
def test_adaptive_whitening_is_a_transform_of_distributions():
    """AdaptiveInverseWhiteningTransformer: it correlates independent noise, and takes the correlation out again."""
    torch.manual_seed(0)
    mixing = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-1.0, 1.0, 0.3]]).double()
    seen = random((40000, 3), 1) @ mixing.T + torch.tensor([1.0, -2.0, 0.5])
    whitening = bi.Whitening(3).double()
    for i, part in enumerate(seen.split(4000)):  # it adapts to one batch after the other
        whitening.fit(part, momentum=0.5 if i else 1.0)
    transform = as_transform(whitening.inverted(), (3,))
    noise = Independent(Normal(torch.zeros(3).double(), 1.0), 1)
    correlated = TransformedDistribution(noise, [transform])
    drawn = correlated.sample((20000,))
    torch.testing.assert_close(torch.cov(drawn.T), mixing @ mixing.T, rtol=0, atol=0.4)
    independent = transform.inv(seen)
    torch.testing.assert_close(torch.cov(independent.T), torch.eye(3).double(), rtol=0, atol=0.1)
    covariance = torch.linalg.inv(whitening.whiten.T @ whitening.whiten)
    expected = MultivariateNormal(whitening.mean[:, 0], covariance)
    torch.testing.assert_close(correlated.log_prob(seen), expected.log_prob(seen))

    layer, x = bi.ConcatNoise(2, 3, noise=correlated), random((5, 2, 4), 3)  # correlated noise at four positions
    y, _, log_det = layer.forward_log_det(x)
    e = layer.split(y)[1]
    torch.testing.assert_close(log_det, -expected.log_prob(e.movedim(1, -1)).sum(1))
    assert torch.equal(layer.pinv(y), x) and layer.inverted().pinv(x).shape == (5, 5, 4)


@torch.no_grad()
def test_whitening_adapts_to_the_mixture_of_what_it_has_seen():
    a, b = 2 * random((60, 3), 1) + 1, random((30, 3), 2) - 2
    once = bi.Whitening(3).double().fit(a)
    assert torch.equal(once.whiten, bi.Whitening(3).double().fit(b).fit(a, momentum=1.0).whiten)
    once.fit(b, momentum=0.25)
    mean = 0.75 * a.mean(0) + 0.25 * b.mean(0)
    shift = a.mean(0) - b.mean(0)
    covariance = 0.75 * torch.cov(a.T) + 0.25 * torch.cov(b.T) + 0.75 * 0.25 * torch.outer(shift, shift)
    torch.testing.assert_close(once.mean[:, 0], mean)
    torch.testing.assert_close(torch.linalg.inv(once.whiten.T @ once.whiten), covariance)


# --- The lab ---------------------------------------------------------------------------------------------------------
# Images of 28x28 pixels read as 16 channels of 7x7, four layers of 7x7 convolutions, a linear head.


def digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten patterns with noise, (count, 16, 7, 7), and which of them each is."""
    patterns = random((10, 16, 7, 7), 99, torch.float32)
    labels = torch.randint(10, (count,), generator=seeded(seed))
    return patterns[labels] + 0.5 * random((count, 16, 7, 7), seed, torch.float32), labels


class Net(nn.Module):
    """Question 2: the VGG-like network; questions 7, 10 and 14: the same with other layers."""

    def __init__(self, features: nn.Module):
        super().__init__()
        self.features, self.fc = features, nn.Linear(28 * 28, 10)

    def forward(self, x: Tensor, classif: bool = True) -> Tensor:
        x = self.features(x)
        return self.fc(x.flatten(1)) if classif else x

    def inverse(self, x: Tensor) -> Tensor:
        return self.features.pinv(x)


def train(net: nn.Module, x: Tensor, labels: Tensor, n_epoch: int, learning_rate: float = 0.05) -> list[float]:
    """Question 2."""
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate, momentum=0.9)
    losses = []
    for _ in range(n_epoch):
        for inputs, goals in zip(x.split(20), labels.split(20), strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(inputs), goals)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    return (net.eval()(x).argmax(1) == labels).float().mean().item()


def vgg() -> nn.Module:
    return nn.Sequential(*[part for _ in range(4) for part in (nn.Conv2d(16, 16, 7, padding=3), nn.ReLU())])


def i_revnet() -> PINN:
    """Questions 5 to 7: halves of the channels, ``(x, x~) -> (x, x~ + F(x))``, and the halves change places."""

    def f() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 8, 7, padding=3), nn.ReLU())

    return PINN([bi.Coupling(16, kind="additive", t=f(), flip=bool(i % 2)) for i in range(4)], (16, 7, 7))


def i_resnet() -> PINN:
    """Questions 13 and 14: layers of norm 0.9 at most, at every step of training."""
    return PINN([bi.ResidualConv2d(16, hidden=16, size=7, kernel_size=7, lipschitz=0.9) for _ in range(4)], (16, 7, 7))


@pytest.mark.parametrize("features, n_epoch", [(vgg, 20), (i_revnet, 4), (i_resnet, 3)])
def test_the_networks_of_the_lab(features, n_epoch):
    """Questions 2, 8, 9, 14, 15: they train, and the invertible ones are, before and after."""
    torch.manual_seed(0)
    net = Net(features())
    x, labels = digits(60, seed=1)
    losses = train(net, x, labels, n_epoch)
    assert losses[-1] < 0.5 * losses[0] and accuracy(net, *digits(60, seed=2)) > 0.8
    if features is not vgg:
        x = torch.randn(1, 16, 7, 7, generator=seeded(0))
        with torch.no_grad():
            code = net(x, classif=False)
            torch.testing.assert_close(net.inverse(code), x, rtol=0, atol=1e-5)
            assert (code - x).abs().max() > 0.1


@torch.no_grad()
def test_how_many_iterations_an_inverse_needs():
    """Question 11: h with constant rho < 1 makes x -> y - h(x) a contraction: log(epsilon) / log(rho) steps."""
    torch.manual_seed(0)
    block = bi.ResidualFC(6, lipschitz=0.5).double()
    x = random((3, 6), 1)
    y = block(x)
    guess, errors = y, [(y - x).norm().item()]
    for _ in range(30):
        guess = y - block.h(guess)
        errors.append((guess - x).norm().item())
    assert all(after <= 0.5 * before + 1e-14 for before, after in zip(errors, errors[1:], strict=False))
    needed = math.ceil(math.log(1e-6) / math.log(0.5))
    assert errors[needed] <= 1e-6 * errors[0]


@torch.no_grad()
def test_a_line_between_two_codes_leads_from_image_to_image():
    """Question 16: Phi^-1((1 - t) Phi x0 + t Phi x1)."""
    torch.manual_seed(0)
    phi = i_resnet()
    x0, x1 = torch.randn(2, 1, 16, 7, 7, generator=seeded(0))
    t = torch.linspace(0, 1, 5).view(-1, 1, 1, 1)
    line = phi.pinv((1 - t) * phi(x0) + t * phi(x1))
    torch.testing.assert_close(line[[0, -1]], torch.cat([x0, x1]), rtol=0, atol=1e-5)
    assert (line[2] - (x0 + x1)[0] / 2).abs().max() > 1e-4  # and is no straight line
