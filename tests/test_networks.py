"""What makes training cheaper leaves it the same: recomputed activations, known logits, other forms of networks."""

import copy
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import randomise, seeded
from runs import CHAIN as SMALL_CHAIN
from runs import SIZE, spnn_arguments, without_diagnostics

import networks
import train
import train_celeba
from checkpoints import read_weights, save_spnn
from models import SPNN, concatenated
from networks import (
    StridedConv2d,
    UpConv2d,
    compile_networks,
    convolutions_in,
    full_precision,
    inner_networks,
    networks_in,
)
from train import Settings, forward_losses, natural_losses
from utils import InputError

CPU = torch.device("cpu")
CHAIN = [
    ("PixelUnshuffleBlock", {"r": 2}),
    ("ConvPINNBlock", {"in_ch": 12, "out_ch": 4, "hidden": 16, "feat_size": 8}),
    ("PixelUnshuffleBlock", {"r": 2}),
    ("ConvPINNBlock", {"in_ch": 16, "out_ch": 8, "hidden": 8, "feat_size": 4}),
    ("PixelUnshuffleBlock", {"r": 4}),
    ("ConvPINNBlock", {"in_ch": 128, "out_ch": 5, "hidden": 16, "feat_size": 1, "mix_type": "householder"}),
]


@pytest.fixture
def model():
    return randomise(SPNN(num_classes=5, img_size=16, layer_channels=CHAIN).double(), seeded(0))


def gradients(model: SPNN, stage: int) -> tuple[dict, int]:
    """Gradients by name, and the bytes that were kept for them before the backward pass."""
    torch.manual_seed(1)
    x, labels = torch.rand(3, 3, 16, 16).double() * 2 - 1, torch.ones(3, 5).double()
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if stage == 1:
            loss = forward_losses(model, x, labels, Settings())[0]["total"]
        else:
            origin = torch.zeros(1, concatenated(model.complete(x).z).shape[1]).double()
            loss = natural_losses(model, x, model(x).detach(), origin, Settings())["total"]
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_the_same_bit_for_bit_and_less_is_kept(model, stage):
    recomputing = copy.deepcopy(model)
    recomputing.pinn.checkpoint_activations = True
    recomputing = pickle.loads(pickle.dumps(recomputing))
    expected, plain_bytes = gradients(model, stage)
    got, fewer_bytes = gradients(recomputing, stage)
    assert expected.keys() == got.keys() and len(expected) > 10
    for name, gradient in expected.items():
        assert torch.equal(gradient, got[name]), name
    assert fewer_bytes < plain_bytes / 2


def test_recomputed_for_several_passes_second_derivatives_and_transforms(model):
    found, x = [], torch.rand(2, 3, 16, 16).double().requires_grad_()
    for model.pinn.checkpoint_activations in (False, True):
        y = model(x)
        loss, inputs = (y**3).sum() + model.pinv(y + 1).square().sum(), (x, model.pinn.blocks[1].mix.A_unconstrained)
        once, twice = (torch.autograd.grad(loss, inputs, create_graph=True) for _ in range(2))
        second = torch.autograd.grad(sum(g.square().sum() for g in twice), inputs)
        found.append([*once, *twice, *second, *torch.func.vjp(model, x)[1](y)])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


# --- Precision and compilation ---------------------------------------------------------------------------------------


def test_bf16_is_of_the_networks_alone(model):
    """The blocks' values stay float32, the completion's round trip as exact; what s, t and r give is coarser."""
    model, x = model.float(), torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected, _ = model(x, True)
        with networks_in("bf16", CPU):
            y, z = model(x, True)
            again = model.pinv(y, z)
    assert y.dtype == again.dtype == torch.float32
    assert 1e-5 < (y - expected).abs().max() < 0.1
    assert (again - x).abs().max() < 1e-5


def test_training_in_bf16_takes_other_steps_than_in_float32_and_loses_no_gradient(faces, tmp_path, monkeypatch):
    """What autocast converts without a gradient it would hand out again for a step that needs one, when the weights of
    attributes are renewed."""
    missing, clip = [], train.clip_gradients
    without_diagnostics(monkeypatch)

    def looked_at(model, *rest):
        missing.append([name for name, p in model.named_parameters() if p.requires_grad and p.grad is None])
        return clip(model, *rest)

    monkeypatch.setattr(train, "clip_gradients", looked_at)
    stage_1 = {"checkpoint_activations": True, "is_r_opt": False}
    for name, options in {"float32": stage_1, "bf16": {"precision": "bf16"}}.items():
        assert train_celeba.main(spnn_arguments(faces, tmp_path / name, epoch=1, **options)) == 0
    assert len(missing) == 12 and not any(missing)  # four steps of each stage
    exact, found = (read_weights(tmp_path / name / "best_model.pth") for name in ("float32", "bf16"))
    assert any(not torch.equal(weight, exact[name]) for name, weight in found.items())
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in found.values())


@pytest.mark.parametrize("products", [True, False], ids=["products", "convolutions"])
def test_a_switch_is_set_back_however_threads_overlap_that_ask_for_it(products, monkeypatch):
    """As autograd's own does while this one waits."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backend = torch.backends.cuda.matmul if products else getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
    newer = hasattr(backend, "fp32_precision")  # torch refuses to read the older switch afterwards
    name, tf32, exact = ("fp32_precision", "tf32", "ieee") if newer else ("allow_tf32", True, False)
    before = getattr(backend, name)
    setattr(backend, name, tf32)

    def look(index: int) -> bool:
        wanted = tf32 if index % 2 and not products else exact
        asked = convolutions_in("tf32" if index % 2 else "float32")
        with full_precision(SimpleNamespace(type="cuda")) if products else asked:
            time.sleep(0.001 * (index % 3))
            return getattr(backend, name) == wanted

    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast of a device that is not there
        found = [*pool.map(look, range(20)), getattr(backend, name) == tf32]
    setattr(backend, name, before)
    assert all(found)


@pytest.mark.parametrize(("precision", "message"), [("tf32", "needs an NVIDIA GPU"), ("fp8", "choose one of float32")])
def test_a_precision_that_is_not_there_is_refused(precision, message):
    with pytest.raises(InputError, match=message), networks_in(precision, CPU):
        pass


@pytest.mark.slow
def test_compiled_networks_give_the_same_gradients(model):
    compiled = copy.deepcopy(model)
    compile_networks(inner_networks(compiled), CPU)
    assert list(compiled.state_dict()) == list(model.state_dict())
    expected, _ = gradients(model, 1)
    got, _ = gradients(compiled, 1)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


def test_no_compiler_is_said_in_one_line(model, monkeypatch):
    def fail(_):
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(InputError, match=r"does not work here \(no C\+\+ compiler\); .* leave --compile out"):
        compile_networks(inner_networks(model), CPU)


# --- Convolutions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, kernel, size, is_product",  # size of the input; a product if the smaller map is 1x1 or 2x2
    [(StridedConv2d, 3, 2, True), (StridedConv2d, 3, 3, True), (StridedConv2d, 3, 4, True),
     (StridedConv2d, 3, 5, False), (UpConv2d, 4, 1, True), (UpConv2d, 4, 2, True), (UpConv2d, 4, 3, False)],
)  # fmt: skip
def test_a_convolution_as_a_product_is_the_same(form, kernel, size, is_product, monkeypatch):
    torch.manual_seed(0)
    kind = form.__mro__[1]
    product, plain = (of(6, 7, kernel, stride=2, padding=1, dtype=torch.float64) for of in (form, kind))
    plain.load_state_dict(product.state_dict())
    results, gradients = [], []
    for layer in (plain, product):
        x = torch.rand(3, 6, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        y = layer(x.requires_grad_())
        y.square().sum().backward()
        results.append(y)
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    assert results[1].is_contiguous()  # or the next convolution copies its weights to another memory format
    torch.testing.assert_close(results[1], results[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-13, atol=1e-13)
    monkeypatch.setattr(kind, "forward", lambda self, x: 1 / 0)
    with nullcontext() if is_product else pytest.raises(ZeroDivisionError):
        product(x)


# --- Logits that stand still -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs, asked", [(2, []), (3, [32])])  # 16 images and their mirror images
def test_stage_2_asks_g_for_every_picture_once_where_that_pays(faces, tmp_path, monkeypatch, epochs, asked):
    computed, compared, honest, compute = [], [], train.natural_losses, train.CelebATrainer._known_logits
    without_diagnostics(monkeypatch)
    (tmp_path / "run").mkdir()
    g = SPNN(num_classes=40, img_size=SIZE, layer_channels=SMALL_CHAIN)
    save_spnn(tmp_path / "run" / "best_model.pth", randomise(g, seeded(0)))

    def natural_losses(model, x, y, *rest):
        compared.append(len(x))
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
        return honest(model, x, y, *rest)

    def known_logits(self, keys, g):
        computed.append(len(keys))
        return compute(self, keys, g)

    monkeypatch.setattr(train, "natural_losses", natural_losses)
    monkeypatch.setattr(train.CelebATrainer, "_known_logits", known_logits)
    stage_2 = spnn_arguments(faces, tmp_path / "run", is_forward_train=False, r_epoch=epochs)
    assert train_celeba.main(stage_2) == 0
    assert computed == asked and compared.count(4) == 4 * epochs


@pytest.mark.parametrize("capability, said", [("AVX2", 1), ("AVX512", 0)])
def test_a_cpu_that_emulates_bf16_says_so_once(capability, said, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    networks.warn_if_emulated.cache_clear()
    for _ in range(2):
        with networks_in("bf16", torch.device("cpu")), networks_in("float32", torch.device("cpu")):
            pass
    assert caplog.text.count("no bf16 arithmetic") == said
    networks.warn_if_emulated.cache_clear()
