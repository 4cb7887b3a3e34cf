"""The laws of a pseudo-invertible network, over every block and chain.

A new layer is a new row of rows.py; a new law is a new function in `LAWS`. Weights are random throughout: at their
start values the coupling networks are zero and most laws would hold by accident. Laws are held to 1e-10 in float64,
where only algebra shows; float32 adds rounding that grows with depth, and each row has its bound of it. Each law
returns the largest relative error it met, for the report (``pytest --junitxml FILE -o junit_family=xunit1``).
"""

import functools
import math
import re
from collections.abc import Callable

import pytest
import torch
from helpers import OPTIMISERS, ForgetsShift, diy12, landscape, oblong, random, randomise, seeded, tiny
from rows import BIJECTIONS, ROWS, Row, jacobian_log_det, parts, whole
from torch import Tensor, nn

import bijections as bi
from blocks import CayleyMixing, ConvPINNBlock, HouseholderMixing, Mixing, PixelUnshuffleBlock
from models import PINN, SPNN


class Case:
    """A row's module with random weights, or ``g``, and what to hold it against."""

    def __init__(self, row: Row, dtype: torch.dtype = torch.float64, g: nn.Module | None = None):
        self.g, self.dtype, self.lossy, self.outputs = g or row.ready(dtype), dtype, row.lossy, row.outputs
        self.rtol, self.far = (1e-10, 1e-10) if dtype == torch.float64 else (row.float32, row.far)
        self.x = row.x(dtype, batch=2)
        with torch.no_grad():
            self.out_shape = tuple(self.g(self.x).shape[1:])

    def y(self, scale: float = 1.0, seed: int = 2, batch: int = 2) -> Tensor:
        """Random outputs; at scale 50 nothing that a forward pass has ever given."""
        return self.outputs(random((batch, *self.out_shape), seed, self.dtype, scale))

    def close(self, actual: Tensor, expected: Tensor, among: Tensor | None = None, rtol: float | None = None) -> float:
        """Largest error relative to the largest value, of ``expected`` or ``among``; fails above rtol, and for NaN."""
        rtol = self.rtol if rtol is None else rtol
        assert actual.shape == expected.shape
        largest = (expected if among is None else among).abs().max().clamp_min(1e-30)
        error = ((actual - expected).abs().max() / largest).item()
        assert error <= rtol, f"relative error {error:.2e}, bound {rtol:.0e}"
        return error

    def all_close(self, actual, expected, among: Tensor | None = None, rtol: float | None = None) -> float:
        """`close` over latents: a tensor, None, or a list of these."""
        actual, expected = ([z] if not isinstance(z, list) else z for z in (actual, expected))
        assert [z is None for z in actual] == [z is None for z in expected]
        pairs = zip(actual, expected, strict=True)
        return max([self.close(a, b, among, rtol) for a, b in pairs if a is not None], default=0.0)


built = functools.cache(Case)  # tests do not change its weights


# --- The laws --------------------------------------------------------------------------------------------------------


def right_inverse(case: Case) -> float:
    """g(g'(y)) = y for any y, near the data and far from it."""
    g = case.g
    near, far = case.y(), case.y(scale=50)
    return max(case.close(g(g.pinv(near)), near), case.close(g(g.pinv(far)), far, rtol=case.far))


def extreme_targets(case: Case) -> float:
    """g(g'(y)) = y if every logit is -50 or +50, and if one is so among usual ones.

    In float64 to 1e-9 (largest measured: 8e-12, of 50). In float32 a network as unsteady as random weights make it
    may lose another digit: 5e-3 measured at img_size 64. The demo's trained one has 2e-5.
    """
    g = case.g
    corners = 50 * case.y(seed=7, batch=8).sign()
    single = case.y(seed=8, batch=8).flatten(1)
    index = torch.arange(8)
    single[index, index % single.shape[1]] = 50 * (-1.0) ** index.to(single.dtype)
    single = single.view_as(corners)
    return max(case.close(g(g.pinv(y)), y, rtol=10 * case.far) for y in (corners, single))


def reflexive(case: Case) -> float:
    """g g' g = g, and g' g g' = g'."""
    g, y = case.g, case.y()
    return max(
        case.close(g(g.pinv(g(case.x))), g(case.x)),
        case.close(g.pinv(g(g.pinv(y))), g.pinv(y)),
    )


def idempotent(case: Case) -> float:
    """P = g' g is a projection: P P = P."""
    g = case.g
    projected = g.pinv(g(case.x))
    return case.close(g.pinv(g(projected)), projected)


def deterministic(case: Case) -> float:
    """The same input gives the same bits, whatever was computed in between."""
    g, y = case.g, case.y()
    before = g(case.x), g.pinv(y)
    g.pinv(g(2 * case.x))
    assert torch.equal(g(case.x), before[0]) and torch.equal(g.pinv(y), before[1])
    return 0.0


def completion_of_images(case: Case) -> float:
    """G^-1(G(x)) = x."""
    y, z = case.g(case.x, True)
    assert torch.equal(y, case.g(case.x)), "the latents change the output"
    return case.close(case.g.pinv(y, z), case.x)


def completion_of_outputs(case: Case) -> float:
    """G(G^-1(y, z)) = (y, z) for random y and z."""
    _, like = case.g(case.x, True)
    if isinstance(like, list):
        z = [None if a is None else random(a.shape, 10 + i, case.dtype) for i, a in enumerate(like)]
    else:
        z = None if like is None else random(like.shape, 10, case.dtype)
    y = case.y(scale=3)
    again, z_again = case.g(case.g.pinv(y, z), True)
    return max(case.close(again, y), case.all_close(z_again, z))


def natural_latents(case: Case) -> float:
    """The latents of g'(y), known without a forward pass, are those that a forward pass of g'(y) finds."""
    g = case.g
    worst = 0.0
    for y, rtol in ((case.y(), case.rtol), (case.y(scale=50), case.far)):
        if isinstance(g, SPNN):
            natural = g.natural(y)
            assert torch.equal(natural.y, y)
            z = natural.z
        else:
            z = g.natural_latents(y) if isinstance(g, PINN) else g.natural_latent(y)
        x = g.pinv(y)
        case.close(g.pinv(y, z), x)
        if isinstance(z, list):
            case.all_close(g.pinv(y, return_latents=True)[1], z)
        # latents are read out of x, and rounded like it
        worst = max(worst, case.all_close(g(x, True)[1], z, among=x, rtol=rtol))
    return worst


def loses_something(case: Case) -> float:
    """g'(g(x)) differs from x, unless the module says that it drops nothing: the laws above are not a bijection's."""
    x = case.x
    difference = ((case.g.pinv(case.g(x)) - x).norm() / x.norm()).item()
    assert difference > 1e-2 if case.lossy else difference <= case.rtol, f"relative difference {difference:.1e}"
    return 0.0


def batch_equals_one_by_one(case: Case) -> float:
    """An image's result does not depend on its neighbours in the batch."""
    g, x, y = case.g, random((3, *case.x.shape[1:]), 5, case.dtype), case.y(batch=3)
    return max(
        case.close(g(x), torch.cat([g(x[i : i + 1]) for i in range(3)])),
        case.close(g.pinv(y), torch.cat([g.pinv(y[i : i + 1]) for i in range(3)])),
    )


def orthogonal(case: Case) -> float:
    """W^T W = I for every mixing, and `inverse` is W^T."""
    worst = 0.0
    for mixing in case.g.modules():
        if isinstance(mixing, Mixing):
            w = mixing.matrix()
            identity = torch.eye(len(w), dtype=w.dtype)
            worst = max(worst, case.close(w.T @ w, identity), case.close(mixing.inverse(identity).T, w.T))
    return worst


def back_projection_is_the_plain_one(case: Case) -> float:
    """The closed form equals the definition: G^-1( G(x) + strength * (G(g'(target)) - G(g'(g(x)))) )."""
    g, x, target = case.g, case.x, case.y(scale=3)
    (y, z), (y_goal, z_goal), (y_from, z_from) = (g(at, True) for at in (x, g.pinv(target), g.pinv(g(x))))
    worst = 0.0
    for strength in (0.3, 0.7, 1.0):
        moved = [None if a is None else a + strength * (b - c) for a, b, c in zip(z, z_goal, z_from, strict=True)]
        plain = g.pinv(y + strength * (y_goal - y_from), moved)
        worst = max(worst, case.close(g.back_project(x, target, strength), plain))
    return worst


def back_projection_reaches(case: Case) -> float:
    """At strength 1, g(x') = y; at strength s, g(x') is s of the way."""
    g, x, y = case.g, case.x, case.y(scale=3)
    part = g(x) + 0.25 * (y - g(x))
    return max(case.close(g(g.back_project(x, y)), y), case.close(g(g.back_project(x, y, 0.25)), part))


def back_projection_stays(case: Case) -> float:
    """x' = x if g(x) = y already, and at strength 0."""
    g, x = case.g, case.x
    return max(
        case.close(g.back_project(x, g(x), 1.0), x),
        case.close(g.back_project(x, case.y(scale=3), 0.0), x),
    )


def back_projection_by_image(case: Case) -> float:
    """One strength per image equals one call per image."""
    g, x, y = case.g, case.x, case.y(scale=3)
    strengths = torch.tensor([0.2, 0.9], dtype=case.dtype)
    single = [g.back_project(x[i : i + 1], y[i : i + 1], strengths[i].item()) for i in range(2)]
    return case.close(g.back_project(x, y, strengths), torch.cat(single))


COMPLETIONS = [completion_of_images, completion_of_outputs]
LAWS = [
    right_inverse,
    reflexive,
    idempotent,
    deterministic,
    completion_of_images,
    completion_of_outputs,
    natural_latents,
    loses_something,
    batch_equals_one_by_one,
    orthogonal,
]
LAWS_OF_NETWORKS = [
    extreme_targets,
    back_projection_is_the_plain_one,
    back_projection_reaches,
    back_projection_stays,
    back_projection_by_image,
]


@pytest.mark.parametrize(
    "row, dtype",
    [
        pytest.param(row, dtype, id=f"{row.name}-{dtype}", marks=[pytest.mark.slow] * (row.slow or row.name == twice))
        for row in ROWS
        for dtype, twice in ((torch.float64, None), (torch.float32, "SPNN 64 cayley"))  # W is solved in float64 anyway
    ],
)
@torch.no_grad()
def test_laws(row, dtype, record_property):
    case, broken = built(row, dtype), []
    for law in LAWS + LAWS_OF_NETWORKS * isinstance(case.g, SPNN):
        try:
            record_property(law.__name__, law(case))
        except AssertionError as error:
            broken.append(f"{law.__name__}: {error}")
    assert not broken


# --- Log-determinants ------------------------------------------------------------------------------------------------


def log_determinant(case: Case) -> float:
    """log |det dG/dx| is that of autograd's Jacobian, an image at a time, and its one pass gives what forward gives."""
    g = whole(case.g)
    y, z, log_det = g.forward_log_det(case.x)
    expected = jacobian_log_det(g, case.x)
    assert log_det.shape == (len(case.x),)
    torch.testing.assert_close(y, g(case.x), rtol=0, atol=0)
    case.all_close(z, g(case.x, True)[1])
    torch.testing.assert_close(g.log_abs_det(case.x), log_det, rtol=0, atol=0)
    return case.close(log_det, expected, among=torch.cat([expected, torch.ones(1).to(expected)]))


@pytest.mark.parametrize("row", [row for row in ROWS if math.prod(row.shape) <= 64], ids=lambda row: row.name)
@torch.no_grad()
def test_log_determinant(row, record_property):
    record_property("largest relative error", log_determinant(built(row, torch.float64)))


# --- Gradients -------------------------------------------------------------------------------------------------------


def short() -> SPNN:
    """Two blocks, with both mixings."""
    layers = [
        ("PixelUnshuffleBlock", {"r": 2}),
        ("ConvPINNBlock", {"in_ch": 4, "out_ch": 3, "hidden": 1}),
        ("PixelUnshuffleBlock", {"r": 2}),
        ("ConvPINNBlock", {"in_ch": 12, "out_ch": 2, "hidden": 1, "feat_size": 1, "mix_type": "householder"}),
    ]
    return SPNN(img_ch=1, num_classes=2, img_size=4, layer_channels=layers)


def gradient_rows() -> list[Row]:
    kinds = [("cayley", None, (3, 2, 1)), ("cayley", 1, (3, 1, 1)), ("householder", 2, (3, 2, 2))]
    rows = [
        Row(f"{mix}, feat_size {feat}", functools.partial(ConvPINNBlock, 3, 2, 2, feat_size=feat, mix_type=mix), shape)
        for mix, feat, shape in kinds
    ]
    rows.append(Row("unshuffle", lambda: PixelUnshuffleBlock(2), (1, 2, 4), lossy=False))
    rows.append(Row("chain", short, (1, 4, 4)))
    # the others compute the same, or only move entries
    alike = re.compile("shuffle|view|extract|per entry|spline coupling 1-D|inverted residual")
    return rows + [row for row in BIJECTIONS if math.prod(row.shape) <= 16 and not alike.search(row.name)]


@pytest.mark.parametrize("row", gradient_rows(), ids=lambda row: row.name)
def test_gradients(row):
    """Derivatives of g, its latents, g' and log |det|, by inputs and by every parameter, against finite differences.

    By parameters, and through chains, in one random direction (``fast_mode``): a numerical Jacobian takes minutes.
    """
    case = Case(row, g=row.ready(seed=3))
    g, x, y = case.g, case.x.requires_grad_(), case.y().requires_grad_()
    parameters, check = tuple(g.parameters()), torch.autograd.gradcheck
    iterates = any(isinstance(m, bi.Residual) for m in g.modules())  # which takes the newer vmap alone
    fast = isinstance(g, (SPNN, PINN))
    batched = {"check_batched_grad": not (iterates or fast)}
    modes = {"check_forward_ad": not fast, **batched}

    def complete(x: Tensor, *_) -> tuple[Tensor, ...]:
        return tuple(parts(*g(x, True)))

    assert check(complete, (x,), fast_mode=fast, **modes) and check(g.pinv, (y,), fast_mode=fast, **modes)
    if isinstance(g, SPNN):  # goes through all of its blocks, both ways
        assert check(lambda x, y, *_: g.back_project(x, y, 0.7), (x, y, *parameters), fast_mode=True)
    elif parameters:
        assert check(complete, (x, *parameters), fast_mode=True, **batched)
        assert check(lambda y, *_: g.pinv(y), (y, *parameters), fast_mode=True)
    if whole(g).log_abs_det(x).requires_grad:  # not a constant
        assert check(lambda x, *_: whole(g).log_abs_det(x), (x, *parameters), fast_mode=True)


# --- Independent oracles ---------------------------------------------------------------------------------------------


LINEAR = [
    pytest.param(landscape, (3, 6, 8), id="map"),
    pytest.param(lambda: ConvPINNBlock(7, 3), (7, 2, 3), id="block"),
    pytest.param(lambda: ConvPINNBlock(6, 5, feat_size=2, mix_type="householder"), (6, 2, 2), id="block householder"),
    pytest.param(oblong, (3, 6, 10), id="oblong"),
    pytest.param(tiny, (3, 4, 4), id="tiny"),
    pytest.param(diy12, (3, 12, 12), id="12x12"),
]


@pytest.mark.parametrize("build, shape", LINEAR)
@torch.no_grad()
def test_a_linear_network_has_the_moore_penrose_inverse(build, shape):
    """With coupling networks at zero g' is the `torch.linalg.pinv` A^+ of the matrix of g, (d, D).

    Back-projection is the linear one, x + strength A^+ (y - A x).
    """
    g = build().double().eval()  # its coupling networks are still zero
    for index, mixing in enumerate(m for m in g.modules() if isinstance(m, Mixing)):
        randomise(mixing, seeded(20 + index))
    case, n = Case(Row("", build, shape), g=g), math.prod(shape)
    x, y, matrix = case.x.flatten(1), case.y(scale=5), g(torch.eye(n).double().view(n, *shape)).flatten(1).T
    back = torch.linalg.pinv(matrix).T
    case.close(g.pinv(y).flatten(1), y.flatten(1) @ back)
    for strength in (0.4, 1.0) if isinstance(g, SPNN) else ():
        expected = x + strength * (y.flatten(1) - x @ matrix.T) @ back
        case.close(g.back_project(case.x, y, strength).flatten(1), expected)


SCALES = [(9, torch.float64, 1.0), *((65, torch.float32, scale) for scale in (1.0, 1e2, 1e5))]


@pytest.mark.parametrize("channels, dtype, scale", SCALES)
@torch.no_grad()
def test_cayley_is_its_formula(channels, dtype, scale):
    """In float32 the solve would be wrong by 1e-5 at entries of 100, by 8e-3 at 1e5."""
    mixing, identity = CayleyMixing(channels).to(dtype), torch.eye(channels, dtype=torch.float64)
    mixing.A_unconstrained.copy_(random((channels, channels), 0) * scale)
    skew = mixing.A_unconstrained.double() - mixing.A_unconstrained.double().T
    w = torch.linalg.solve(identity + skew, identity - skew)
    torch.testing.assert_close(mixing.matrix(), w.to(dtype), rtol=0, atol=1e-7 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("channels", [2, 9, 40])
@torch.no_grad()
def test_householder_is_the_product_of_its_reflections(channels):
    """W = H_k ... H_1, also if there are more reflections than channels."""
    mixing = randomise(HouseholderMixing(channels).double(), seeded(0))
    product = torch.eye(channels, dtype=torch.float64)
    for v in mixing.V:
        product = (torch.eye(channels, dtype=torch.float64) - 2 * torch.outer(v, v) / v.dot(v)) @ product
    torch.testing.assert_close(mixing.matrix(), product)
    x = random((2, channels, 3, 2), seed=1)
    torch.testing.assert_close(mixing(x), torch.einsum("ij,bjhw->bihw", product, x))
    torch.testing.assert_close(mixing.inverse(x), torch.einsum("ji,bjhw->bihw", product, x))


# --- Orthogonality while training ------------------------------------------------------------------------------------


def train_a_little(g: nn.Module, case: Case, optimiser: str, steps: int = 3) -> None:
    """A few steps of an optimiser on a loss that reaches every parameter, through g and g'."""
    optimiser = OPTIMISERS[optimiser](g.parameters())
    for step in range(steps):
        optimiser.zero_grad()
        loss = g(case.x).square().mean() + (g.pinv(case.y(seed=30 + step)) - case.x).square().mean()
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 15, 64, 129])
@pytest.mark.parametrize("kind", [CayleyMixing, HouseholderMixing])
@torch.no_grad()
def test_orthogonal_whatever_a_diverging_step_leaves(kind, channels, dtype, rounding):
    """A skew matrix of odd size is singular, and beside large entries the identity in I + A is lost."""
    mixing = kind(channels).to(dtype)
    (weight,) = mixing.parameters()
    start = torch.randn(weight.shape, generator=seeded(0))
    for scale in (0.0, torch.finfo(dtype).tiny / 100, 1e-30, 1.0, 1e2, 1e5, 1e10, 1e20, 1e30, 1e38):
        weight.copy_(start.clamp(-3, 3) * scale)
        w = mixing.matrix()
        torch.testing.assert_close(w.T @ w, torch.eye(channels, dtype=dtype), rtol=0, atol=rounding)
    for value in (math.nan, math.inf):  # are no matrix that looks like one
        weight[-1, 0] = value
        assert not mixing.matrix().isfinite().all()


@pytest.mark.parametrize("optimiser, dtype", [*((name, torch.float64) for name in OPTIMISERS), ("adam", torch.float32)])
@pytest.mark.parametrize("mix_type", ["cayley", "householder"])
def test_orthogonal_at_the_start_and_after_steps(mix_type, dtype, optimiser):
    torch.manual_seed(0)
    g = tiny(mix_type=mix_type).to(dtype)
    case = Case(Row("", tiny, (3, 4, 4)), dtype, g)
    before = [m.matrix().detach() for m in g.modules() if isinstance(m, Mixing)]
    case.rtol = 1e-12 if dtype == torch.float64 else 1e-5
    with torch.no_grad():
        orthogonal(case)
    train_a_little(g, case, optimiser)
    with torch.no_grad():
        orthogonal(case)
        case.rtol = case.far = 1e-10 if dtype == torch.float64 else 1e-3
        right_inverse(case)
        reflexive(case)
        completion_of_images(case)
    after = [m.matrix().detach() for m in g.modules() if isinstance(m, Mixing)]
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(after, before, strict=True)), "training left W as it was"


# --- The suite fails where it should ---------------------------------------------------------------------------------


class StaleMixing(CayleyMixing):
    """W^T from the first weights it ever saw."""

    def inverse(self, u):
        if not hasattr(self, "first"):
            self.first = self.matrix().detach().clone()
        return torch.einsum("ji,bj...->bi...", self.first, u)


class NotOrthogonal(CayleyMixing):
    """W^-1 is not W^T: the skew part is forgotten."""

    def product(self, x, transpose):
        b, identity = self.A_unconstrained, torch.eye(len(self.A_unconstrained), dtype=x.dtype)
        w = torch.linalg.solve(identity + b, identity - b)
        return x @ (w if transpose else w.T)


class NoisyLatent(ConvPINNBlock):
    """g' with fresh noise for latents: a right inverse, but not a function."""

    def natural_latent(self, y):
        z = super().natural_latent(y)
        return z + torch.randn_like(z)


class OtherLatent(ConvPINNBlock):
    """Says other natural latents than those its inverse uses."""

    def natural_latent(self, y):
        return super().natural_latent(y) / 2

    def pinv(self, y, latent=None):
        return super().pinv(y, super().natural_latent(y) if latent is None else latent)


class IgnoresLatent(ConvPINNBlock):
    """G^-1 that falls back on the natural latent."""

    def pinv(self, y, latent=None):
        return super().pinv(y)


class ForgetsPositions(bi.Diagonal):
    """A log-determinant of one position of the map."""

    def forward_log_det(self, x):
        y, z, _ = super().forward_log_det(x)
        return y, z, self.log_scale.sum().expand(len(x))


class Unshifted(bi.BairdActivation):
    """An inverse with +c."""

    def inverse(self, y):
        return self.f(y)


def broken(kind: type = ConvPINNBlock, mixing: type = CayleyMixing) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        block = kind(7, 4, hidden=8)
        block.mix = mixing(7)
        return block

    return build


BROKEN = {  # how it is made, the shape of x, the laws that it breaks, and some that it keeps
    "forgets shift": (broken(ForgetsShift), (7, 3, 3), [right_inverse, reflexive, idempotent, *COMPLETIONS], []),
    "skewless": (broken(mixing=NotOrthogonal), (7, 3, 3), [right_inverse, completion_of_images, orthogonal], []),
    "noisy latent": (broken(NoisyLatent), (7, 3, 3), [deterministic, natural_latents, idempotent], [right_inverse]),
    "other latent": (broken(OtherLatent), (7, 3, 3), [natural_latents], [right_inverse, *COMPLETIONS]),
    "ignores latent": (broken(IgnoresLatent), (7, 3, 3), COMPLETIONS, [right_inverse]),
    "forgets positions": (lambda: ForgetsPositions(3), (3, 2, 2), [log_determinant], [completion_of_images]),
    "unshifted": (lambda: Unshifted(3), (3, 4), [right_inverse, *COMPLETIONS, loses_something], []),
    "bijection": (lambda: PixelUnshuffleBlock(1), (3, 2, 2), [loses_something], [right_inverse]),  # said to be none
}  # fmt: skip


@pytest.mark.parametrize("build, shape, breaks, keeps", BROKEN.values(), ids=BROKEN)
@torch.no_grad()
def test_the_suite_catches_what_is_broken(build, shape, breaks, keeps):
    case = Case(Row("", build, shape, lossy=not isinstance(build(), bi.Bijection)))
    for law in keeps:
        law(case)
    for law in breaks:
        with pytest.raises(AssertionError):
            law(case)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_the_suite_catches_a_stale_mixing(optimiser):
    case = Case(Row("", broken(mixing=StaleMixing), (7, 3, 3)))
    with torch.no_grad():
        right_inverse(case)  # right until the weights change
    train_a_little(case.g, case, optimiser, steps=1)
    with torch.no_grad():
        for law in (right_inverse, reflexive, completion_of_images, orthogonal):
            with pytest.raises(AssertionError):
                law(case)


@torch.no_grad()
def test_the_suite_catches_a_wrong_back_projection():
    case = Case(Row("", tiny, (3, 4, 4)))
    g, right = case.g, case.g.back_project
    g.back_project = lambda x, y, strength=1.0: x + strength * (g.pinv(y) - g.pinv(g(x)))  # right where g is linear
    for law in (back_projection_is_the_plain_one, back_projection_reaches):
        with pytest.raises(AssertionError):
            law(case)
    g.back_project = lambda x, y, strength=1.0: right(x, y, 1.0)
    with pytest.raises(AssertionError):
        back_projection_stays(case)
    g.back_project = lambda x, y, strength=1.0: right(x, y, torch.as_tensor(strength).max())
    with pytest.raises(AssertionError):
        back_projection_by_image(case)
