"""Every block, layer and chain under test, a row each: a new one is a new row, and is held to all laws by that."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from helpers import diy12, diy16, landscape, oblong, random, randomise, seeded, tiny
from torch import Tensor, nn

import bijections as bi
from blocks import ConvPINNBlock, PixelUnshuffleBlock, Shape
from models import PINN, SPNN
from operators import KnownPixels, LinearChain, Weights, make_operator


@dataclass(frozen=True)
class Row:
    """One module under test.

    ``float32`` bounds the relative error of every law in float32, ``far`` that of the laws at 50 times usual outputs.
    ``outputs`` takes any numbers into the range of g, if that is not everything. ``fitted``: its buffers come from
    data, by one batch in training mode or by a fit.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: Shape  # (C, H, W) of x
    lossy: bool = True
    float32: float = 1e-5
    far: float = 1e-4
    slow: bool = False
    outputs: Callable[[Tensor], Tensor] = lambda y: y
    fitted: bool = False

    def ready(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """It with random weights, in evaluation mode; those in float64 and in float32 are the same."""
        torch.manual_seed(seed)
        g = self.build()
        if self.fitted:
            data = 2 * random((20, *self.shape), seed + 7, torch.float32) + 1
            mixed = data + 0.5 * data.roll(1, dims=1)
            with torch.no_grad():
                g.fit(mixed) if isinstance(g, bi.Whitening) else g.train()(mixed)
        return randomise(g.to(dtype), seeded(seed)).eval()

    def x(self, dtype: torch.dtype = torch.float64, batch: int = 3, seed: int = 1) -> Tensor:
        """Inputs, (batch, *shape)."""
        return random((batch, *self.shape), seed, dtype)

    def y(self, g: nn.Module, dtype: torch.dtype = torch.float64, batch: int = 3) -> Tensor:
        """Outputs that are of none of them."""
        with torch.no_grad():
            return self.outputs(random((batch, *g(self.x(dtype, batch=1)).shape[1:]), 2, dtype))


def parts(y: Tensor, z) -> list[Tensor]:
    """Output and latents, (B, ...) each, of a completion: a latent is a tensor, None, or a list of these."""
    return [y, *[part for part in (z if isinstance(z, list) else [z]) if part is not None]]


def whole(g: nn.Module) -> nn.Module:
    """What has the log-determinant of g's completion."""
    return g.pinn if isinstance(g, SPNN) else g


def jacobian(g: nn.Module, image: Tensor) -> Tensor:
    """That of the completion at one image, (D, D), by autograd."""

    def flat(image: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in parts(*whole(g)(image[None], True))])

    return torch.autograd.functional.jacobian(flat, image).flatten(1)


def jacobian_log_det(g: nn.Module, x: Tensor) -> Tensor:
    """log |det| of the completion's Jacobian at each x, (B,), image by image."""
    return torch.stack([torch.linalg.slogdet(jacobian(g, image)).logabsdet for image in x])


class Asinh(bi.Activation):
    """One of a user's own, whose derivative is left to automatic differentiation."""

    def f(self, x: Tensor) -> Tensor:
        return torch.asinh(x)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.sinh(y)


class Tripled(bi.Activation):
    """One of a user's own, that gives one number for the derivatives of all entries."""

    def f(self, x: Tensor) -> Tensor:
        return 3 * x

    def inverse(self, y: Tensor) -> Tensor:
        return y / 3

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.full((), math.log(3), dtype=x.dtype, device=x.device)


def flow() -> PINN:
    """A chain of bijections, from maps to vectors."""
    blocks = [
        bi.ActNorm(2),
        bi.PixelUnshuffle(2),
        bi.Conv1x1(8),
        bi.Coupling(8, hidden=6),
        bi.BairdActivation((8, 1, 2)),
        bi.View((8, 1, 2), (16,)),
        bi.Coupling(16, kind="additive", dims=0, hidden=6, flip=True),
        bi.ResidualFC(16, hidden=6, lipschitz=0.6),
    ]
    return PINN(blocks, (2, 2, 4))


def tiny_with_bijections() -> SPNN:
    """SPNN blocks among bijections and a narrowing residual block, as a preset would name them."""
    return SPNN(
        num_classes=3,
        img_size=4,
        layer_channels=[
            ("ActNorm", {"channels": 3}),
            ("PixelUnshuffleBlock", {"r": 2}),
            ("Coupling", {"channels": 12, "mask": "checkerboard", "hidden": 4}),
            ("ConvPINNBlock", {"in_ch": 12, "out_ch": 5, "hidden": 6, "feat_size": None}),
            ("BairdActivation", {"features": 5}),
            ("ResidualConv2d", {"in_ch": 5, "out_ch": 4, "hidden": 4, "size": 2, "kernel_size": 1, "lipschitz": 0.5}),
            ("PixelUnshuffle", {"r": 2}),
            ("SVDLinear", {"channels": 16}),
            ("ConvPINNBlock", {"in_ch": 16, "out_ch": 3, "hidden": 6, "feat_size": 1}),
            ("LeakyReLU", {"slope": 0.5}),
        ],
    )


def block_rows(mix: str) -> list[Row]:
    def block(*args, **kwargs) -> Callable[[], ConvPINNBlock]:
        return lambda: ConvPINNBlock(*args, mix_type=mix, **kwargs)

    return [
        Row(f"block {mix} any size, odd and oblong", block(7, 4, hidden=8), (7, 5, 3)),
        Row(f"block {mix} feat_size 1", block(13, 5, hidden=16, feat_size=1), (13, 1, 1)),
        Row(f"block {mix} feat_size 2", block(8, 3, hidden=8, feat_size=2), (8, 2, 2)),
        Row(f"block {mix} one class", block(20, 1, hidden=8, feat_size=1), (20, 1, 1)),
        Row(f"block {mix} one channel dropped", block(6, 5, hidden=8), (6, 3, 4)),
        Row(f"block {mix} two channels", block(2, 1, hidden=1), (2, 3, 3)),
        Row(f"block {mix} that sees its place", block(7, 4, hidden=8, see_place=True), (7, 5, 3)),
        Row(f"block {mix} scale_bound 0.5", block(7, 4, hidden=8, scale_bound=0.5), (7, 4, 4)),
    ]


# Rounding of one block is amplified by the others, by S on the way up and by 1/S on the way down: exp(2 * scale_bound),
# 55 a block, at most. Near the data tanh(s) stays small, and a factor of 5 or so a block makes 1e-4 a safe bound
# (largest measured: 2e-5). Logits 50 times as large saturate it, which costs a block 55 at once (1.1e-5) and a chain
# two more digits (8e-4, at img_size 64).
CHAIN = {"float32": 1e-4, "far": 5e-3}


def built_in(img_size: int, mix_type: str = "cayley", slow: bool = False) -> Row:
    """A built-in chain at its real depth and channels, with thin networks."""
    name = f"SPNN {img_size} {mix_type}"
    build = functools.partial(SPNN, hidden=8, img_size=img_size, mix_type=mix_type)
    return Row(name, build, (3, img_size, img_size), **CHAIN, slow=slow)


def row(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], **options) -> Row:
    """Of a bijection."""
    return Row(name, build, shape, **{"lossy": False, "float32": 1e-4, **options})


def split(dims: int, **options) -> Callable[[], nn.Module]:
    return lambda: bi.Coupling(5, dims=dims, hidden=8, **options)


def residual(kind: type, *args, **options) -> Callable[[], nn.Module]:
    return lambda: kind(*args, hidden=7, **options)


BIJECTIONS = [
    # elementwise
    row("sigmoid", bi.Sigmoid, (3, 4), outputs=lambda y: torch.sigmoid(y / 2).clamp(0.02, 0.98)),
    row("tanh", bi.Tanh, (3, 2, 2), outputs=lambda y: torch.tanh(y / 4).clamp(-0.95, 0.95)),
    row("leaky relu", bi.LeakyReLU, (3, 2, 5)),
    row("prelu", lambda: bi.PReLU(3), (3, 5)),
    row("elu alpha 2", lambda: bi.ELU(2.0, 0.7), (3, 4), outputs=lambda y: y.clamp_min(-0.99)),
    row("an activation of one's own", Asinh, (3, 2), outputs=torch.tanh),
    row("one of a single slope", Tripled, (3, 2)),
    row("baird", lambda: bi.BairdActivation(4), (4, 3)),
    row("baird, one per entry", lambda: bi.BairdActivation((2, 3, 2)), (2, 3, 2)),
    row("bias", lambda: bi.Bias(6), (6,)),
    row("diagonal, spatial", lambda: bi.Diagonal(3), (3, 2, 5)),
    row("diagonal, one per entry", lambda: bi.Diagonal((3, 2)), (3, 2)),
    row("actnorm", lambda: bi.ActNorm(3), (3, 2, 4)),
    row("batch norm", lambda: bi.BatchNorm(3), (3, 2, 4), fitted=True),
    # over channels
    row("orthogonal, spatial", lambda: bi.Orthogonal(5, reflections=5), (5, 3, 2)),
    row("orthogonal, cayley", lambda: bi.Orthogonal(5, mix_type="cayley"), (5, 3)),
    row("svd", lambda: bi.SVDLinear(6), (6,)),
    row("svd, spatial", lambda: bi.SVDLinear(4, bias=False, mix_type="cayley"), (4, 3, 2)),
    row("conv 1x1", lambda: bi.Conv1x1(4), (4, 2, 3)),
    row("conv 1x1, vectors", lambda: bi.Conv1x1(5), (5,)),
    row("whitening zca", lambda: bi.Whitening(3), (3, 4), fitted=True),
    row("whitening pca", lambda: bi.Whitening(5, kind="pca"), (5,), fitted=True),
    row("shuffle", lambda: bi.Shuffle(7), (7, 2)),
    row("view", lambda: bi.View((2, 3, 2), (4, 3)), (2, 3, 2)),
    row("unshuffle 1-D", lambda: bi.PixelUnshuffle(3, dims=1), (2, 6)),
    row("unshuffle 3-D", lambda: bi.PixelUnshuffle(2, dims=3), (1, 4, 2, 6)),
    row("shuffle 2-D", lambda: bi.PixelShuffle(2), (8, 1, 3)),
    row("extract", lambda: bi.Concat(3, 2).inverted(), (5, 2), lossy=True),
    row("extract noise", lambda: bi.ConcatNoise(2, 3, noise="uniform").inverted(), (5, 2, 2), lossy=True),
    # with networks
    row("coupling affine", split(0), (5,)),
    row("coupling affine 1-D", split(1, kept=1), (5, 4)),
    row("coupling affine 2-D flipped", split(2, flip=True), (5, 2, 3)),
    row("coupling affine 3-D", split(3), (5, 1, 2, 2)),
    row("coupling additive", split(2, kind="additive", kept=4, flip=True), (5, 3, 2)),
    row("coupling mask", split(0, mask=[1.0, 0.0, 0.0, 1.0, 0.0]), (5,)),
    row("coupling mask over space", split(2, mask=[[[1, 0, 1], [0, 0, 1]]], flip=True), (5, 2, 3)),
    row("coupling checkerboard", split(2, mask="checkerboard"), (5, 3, 3)),
    row("coupling checkerboard additive", split(1, mask="checkerboard", kind="additive", flip=True), (5, 4)),
    row("spline coupling", lambda: bi.SplineCoupling(5, dims=0, hidden=6), (5,)),
    row("spline coupling 1-D", lambda: bi.SplineCoupling(3, kept=1, hidden=4, dims=1, bins=2), (3, 4)),
    row("spline coupling 2-D flipped", lambda: bi.SplineCoupling(3, flip=True, hidden=4, bound=2.0), (3, 2, 3)),
    row("residual", residual(bi.ResidualFC, 6), (6,)),
    row("residual, narrower", residual(bi.ResidualFC, 6, 2, lipschitz=0.6), (6,), lossy=True),
    row("residual 1-D", residual(bi.ResidualConv1d, 3, size=6, padding_mode="circular"), (3, 6)),
    row("residual 2-D", residual(bi.ResidualConv2d, 3, size=(3, 4)), (3, 3, 4)),
    row("residual 2-D, narrower", residual(bi.ResidualConv2d, 3, 1, size=3), (3, 3, 3), lossy=True),
    row("inverted coupling", lambda: split(0)().inverted(), (5,)),
    row("inverted residual", lambda: bi.ResidualFC(4, hidden=5).inverted(), (4,)),
    row("chain of bijections", flow, (2, 2, 4)),
]


PIXELS = (random((4, 5), seed=3) > 0).tolist()
ROWS = [
    Row("weights", lambda: Weights([[0.6, 0.8, 0.0], [0.8, -0.6, 0.0]]), (3, 2, 5)),
    Row("SPNN of sr2", lambda: make_operator("sr2", (3, 4, 6)).chain, (3, 4, 6)),
    Row("SPNN of grey", lambda: make_operator("grey", (3, 3, 5)).chain, (3, 3, 5)),
    Row("SPNN of a mask", lambda: LinearChain([(KnownPixels, {"mask": PIXELS})], (3, 4, 5)).chain, (3, 4, 5)),
    Row("SPNN of grey*sr2", lambda: make_operator("grey*sr2", (3, 4, 4)).chain, (3, 4, 4)),
    *block_rows("cayley"),
    *block_rows("householder"),
    Row("unshuffle 2", lambda: PixelUnshuffleBlock(2), (3, 4, 6), lossy=False),
    Row("unshuffle 1", lambda: PixelUnshuffleBlock(1), (2, 3, 5), lossy=False),
    Row("unshuffle 3 by 2", lambda: PixelUnshuffleBlock((3, 2)), (2, 6, 4), lossy=False),
    *BIJECTIONS,
    Row("tiny with bijections", tiny_with_bijections, (3, 4, 4), **CHAIN),
    Row("chain, oblong", oblong, (3, 6, 10), **CHAIN),
    Row("chain of one unshuffle", lambda: PINN([PixelUnshuffleBlock(3)], (1, 6, 3)), (1, 6, 3), lossy=False),
    Row("tiny cayley", tiny, (3, 4, 4), **CHAIN),
    Row("tiny householder", lambda: tiny(mix_type="householder"), (3, 4, 4), **CHAIN),
    Row("tiny, one class", lambda: tiny(num_classes=1), (3, 4, 4), **CHAIN),
    Row("tiny map", landscape, (3, 6, 8), **CHAIN),
    Row("16x16 example", diy16, (3, 16, 16), **CHAIN),
    Row("12x12, both mixings", diy12, (3, 12, 12), **CHAIN),
    built_in(32, "householder"),
    built_in(64),  # 32 is its last three blocks
    built_in(32, slow=True),
    built_in(64, "householder", slow=True),
    built_in(256, "householder", slow=True),
    built_in(256, slow=True),
]
