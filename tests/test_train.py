"""Training: schedule and weights against figures, losses against the plain formulation, stages that keep their word."""

import csv
import functools
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import refused, seeded
from runs import randomised, tiny_chain

import loop
from blocks import ConvPINNBlock
from data_loader import make_loader
from images import to_float
from loop import Run
from models import SPNN
from train import (
    FORWARD_CHECKPOINT,
    R_OPT_CHECKPOINT,
    AttributeWeights,
    CelebATrainer,
    Settings,
    bce_by_attribute,
    class_weights,
    forward_losses,
    lr_factor,
    natural_losses,
    typical_logits,
)

CHAIN = tiny_chain(4, 8)
NAMES = ("one", "two", "three", "four")


def tiny_spnn(chain=CHAIN) -> SPNN:
    return randomised(SPNN(num_classes=4, img_size=8, layer_channels=chain))


class Faces:
    """Pictures in memory, as CelebAMaskHQ hands them out; the first attribute can be seen."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = seeded(seed)
        self.labels = (torch.rand(count, 4, generator=generator) > 0.5).float()
        self.pixels = torch.randint(102, 154, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        self.pixels[:, 0, :4, :4] += (128 * self.labels[:, :1, None] - 64).to(torch.int8).view(torch.uint8)
        self.files = [f"{i}.jpg" for i in range(count)]

    def __len__(self) -> int:
        return len(self.files)

    def batch_uint8(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pixels[list(indices)], self.labels[list(indices)]


def data(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    faces = Faces(count, seed)
    return to_float(faces.pixels), faces.labels


def trainer(model, folder, count: int = 12, **settings) -> CelebATrainer:
    settings = Settings(**{"epoch": 2, "r_epoch": 2, "warmup_steps": 1, "reweight_every": 2, **settings})
    loaders = make_loader(Faces(count), 4), make_loader(Faces(6, seed=1), 4)
    return CelebATrainer(model, *loaders, settings, Run(folder, torch.device("cpu")), NAMES)


def rows_of(table) -> list[dict[str, str]]:
    with open(table) as file:
        return list(csv.DictReader(file))


def copy_of(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- Schedule and weights --------------------------------------------------------------------------------------------


RATES = {0: 0.0, 1: 1e-6, 50: 5e-5, 199: 1.99e-4, 200: 2e-4, 300: 2e-4, 376: 2e-4, 377: 1.99645390070922e-4,
         500: 1.5602836879432625e-4, 939: 3.546099290780142e-7, 940: 0.0}  # fmt: skip


def test_the_learning_rate_of_940_steps_and_of_runs_shorter_than_the_warm_up():
    for step, lr in RATES.items():
        assert 2e-4 * lr_factor(step, 940) == pytest.approx(lr, rel=1e-12, abs=1e-20)
    for total in (1, 2, 3, 10, 100):
        factors = [lr_factor(step, total) for step in range(total)]
        top = factors.index(1.0)
        assert all(0 <= factor <= 1 for factor in factors) and factors[: top + 1] == sorted(factors[: top + 1])
        assert factors[top:] == sorted(factors[top:], reverse=True)


def test_attribute_weights_follow_the_hand_computation():
    weights = AttributeWeights(2, k=2)
    history = [[1.0, 2.0], [1.2, 2.0], [0.6, 1.0], [0.4, 1.5]]
    assert weights.update(torch.tensor(history[0])).tolist() == [1.0, 1.0]  # nothing to compare yet
    for losses in history[1:]:
        values = weights.update(torch.tensor(losses))
    # m1 = (1.1, 2.0), m2 = (0.5, 1.25); change (1.2, 0.6), mean 0.9; m2 over its mean 0.875
    raw = [1.2 / 0.9 * 0.5 / 0.875, 0.6 / 0.9 * 1.25 / 0.875]
    torch.testing.assert_close(values, torch.tensor([2 * r / sum(raw) for r in raw]), rtol=1e-5, atol=1e-6)
    # a fifth look pushes the first out: m1 = (0.9, 1.5), m2 = (0.4, 1.25)
    raw = [0.5 / 0.4 * 0.4, 0.25 / 1.25 * 1.25]
    expected = torch.tensor([2 * r / sum(raw) for r in raw])
    torch.testing.assert_close(weights.update(torch.tensor([0.4, 1.0])), expected, rtol=1e-5, atol=1e-6)


def test_attribute_weights_stay_finite_and_average_to_one():
    weights = AttributeWeights(3, k=5)
    for losses in ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.5], [0.0] * 3, [0.0] * 3, [2.0, 0.0, 1.0]):
        values = weights.update(torch.tensor(losses))
        assert values.isfinite().all() and (values >= 0).all()
        assert values.mean().item() == pytest.approx(1.0)


# --- The losses ------------------------------------------------------------------------------------------------------


def test_the_loss_of_stage_1_weighs_attributes():
    model, (x, labels) = tiny_spnn(), data(5)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.5])
    losses, y = forward_losses(model, x, labels, Settings(), weights)
    torch.testing.assert_close(losses["bce"], (weights * bce_by_attribute(y, labels)).sum())
    torch.testing.assert_close(losses["total"], losses["bce"] + 40 * losses["img_rec"])  # no more: it is exact


class Inexact(ConvPINNBlock):
    """A block whose pseudo-inverse misses by a little, and says so."""

    exact = False

    def pinv(self, y, latent=None):
        return super().pinv(1.01 * y, latent)


@pytest.mark.parametrize("stage", ["forward", "r_opt"])
@pytest.mark.parametrize("exact", [True, False])
def test_the_right_inverse_loss_is_trained_through_only_where_a_block_is_not_exact(stage, exact):
    chain = [*CHAIN[:3], (CHAIN[3][0] if exact else Inexact, CHAIN[3][1])]
    model = tiny_spnn(chain=chain).double()
    x, labels = (part.double() for part in data(4))
    y, passes = model(x).detach(), []
    model.register_forward_hook(lambda *_: passes.append(1))

    def total_gradient(weight):
        settings = Settings(lambda_right_inverse=weight, lambda_r_right_inverse=weight)
        if stage == "forward":
            losses = forward_losses(model, x, labels, settings)[0]
        else:
            losses = natural_losses(model, x, y, torch.zeros(1, 1, dtype=torch.float64), settings)
        return losses, torch.autograd.grad(losses["total"], list(model.parameters()), allow_unused=True)

    losses, without = total_gradient(0.0)
    assert ("right_inverse" in losses) == (not exact) and len(passes) == (stage == "forward") + (not exact)
    weighted, with_term = total_gradient(1e4)
    pairs = zip(without, with_term, strict=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs) == exact
    if not exact:
        assert weighted["right_inverse"].item() > 1e-6


# --- The stages ------------------------------------------------------------------------------------------------------


def test_stage_1_learns_by_its_schedule_and_leaves_a_checkpoint_that_explains_itself(tmp_path, monkeypatch):
    rates, honest = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    model = tiny_spnn()
    path = trainer(model, tmp_path, epoch=8, lr=2e-2, lambda_img_rec=1.0).train_forward()
    assert rates == pytest.approx([2e-2 * lr_factor(step, 24, warmup=1) for step in range(24)])
    assert path == tmp_path / FORWARD_CHECKPOINT
    rows = rows_of(tmp_path / "metrics_forward.csv")
    assert len(rows) == 8 and float(rows[-1]["train_bce"]) < 0.7 * float(rows[0]["train_bce"])
    assert all(float(row["val_right_inverse"]) < 1e-8 for row in rows)  # measured at each validation
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["attributes"] == list(NAMES) and content["training"]["lr"] == 2e-2
    assert SPNN.from_pretrained(path).state_dict().keys() == model.state_dict().keys()


STATISTICS = [*CHAIN[:1], ("BatchNorm", {"channels": 48}), ("ActNorm", {"channels": 48}), *CHAIN[1:]]


def test_stage_2_changes_the_r_networks_and_nothing_else(tmp_path):
    model, x = tiny_spnn(chain=STATISTICS), data(3)[0]
    trainer(model, tmp_path, epoch=1).train_forward()
    before, y = copy_of(model), model.eval()(x)
    path = trainer(model, tmp_path, r_lr=1e-3).optimise_r()
    assert path == tmp_path / R_OPT_CHECKPOINT
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".r." not in name), name
    rows = rows_of(tmp_path / "metrics_r_opt.csv")
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    assert torch.equal(SPNN.from_pretrained(path)(x), y) and torch.equal(model.eval()(x), y)  # g is the same


def test_training_images_alone_set_statistics(tmp_path):
    """The look at validation that attributes' weights take comes before the first step."""
    model = SPNN(num_classes=4, img_size=8, layer_channels=STATISTICS)
    run = trainer(model, tmp_path, epoch=1, reweight_every=1, lr=0.0)
    run.train_forward()
    fresh = SPNN(num_classes=4, img_size=8, layer_channels=STATISTICS)
    fresh.train()(next(iter(run.train))[0])
    expected = {name: p for name, p in fresh.named_parameters() if name.startswith("pinn.blocks.2.")}
    assert expected
    for name, parameter in expected.items():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


def test_the_best_model_by_validation_loss_is_kept(tmp_path, monkeypatch):
    losses, seen = iter([3.0, 1.0, 2.0, 1.0]), []

    def validate(self, losses_and_logits):
        seen.append(copy_of(self.model))
        return {"loss": next(losses)}

    monkeypatch.setattr(CelebATrainer, "validate", validate)
    kept = torch.load(trainer(tiny_spnn(), tmp_path, count=4, epoch=4, lr=1e-3).train_forward(), weights_only=True)
    assert all(torch.equal(kept[name], seen[1][name]) for name in kept)
    assert not all(torch.equal(kept[name], seen[3][name]) for name in kept)


def test_validation_averages_over_images_not_batches(tmp_path):
    model = tiny_spnn()
    run = trainer(model, tmp_path)
    measured = run.validate(lambda x, labels: forward_losses(model, x, labels, run.settings))
    x, labels = data(6, seed=1)
    with torch.no_grad():
        losses, y = forward_losses(model, x, labels, run.settings)
    assert measured["loss"] == pytest.approx(losses["total"].item(), rel=1e-5)
    assert measured["accuracy"] == pytest.approx(((y > 0) == (labels > 0.5)).float().mean().item())


@pytest.mark.parametrize("stage, weight, value", [
    ("train_forward", "pinn.blocks.3.r.net.0.weight", float("nan")),
    ("optimise_r", "pinn.blocks.1.r.net.0.weight", float("inf")),
])  # fmt: skip
def test_a_weight_that_is_not_finite_is_named_and_the_last_checkpoint_kept(tmp_path, stage, weight, value):
    model = tiny_spnn()
    path = getattr(trainer(model, tmp_path, count=4, epoch=1, r_epoch=1, lr=1e-3), stage)()
    before = path.read_bytes()
    with torch.no_grad():
        model.get_parameter(weight)[0] = value
    refused(f"batch 1.*{weight}.*saved before it is kept", getattr(trainer(model, tmp_path), stage))
    assert path.read_bytes() == before


def broken_gradient(run: CelebATrainer) -> None:
    weight = run.model.get_parameter("pinn.blocks.3.s.net.0.weight")
    weight.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize("harm, settings, said", [
    (broken_gradient, {}, r"batch 1 \(0.jpg, 1.jpg, .*\): .* in the gradient of pinn.blocks.3.s.net.0.weight"),
    # nothing but the validation sees the very last step: the run would return a checkpoint that it never wrote
    (lambda run: None, {"count": 4, "epoch": 1, "lr": 1e39, "warmup_steps": 0}, "validation: not a finite number"),
])  # fmt: skip
def test_what_is_not_finite_is_named_and_not_applied(tmp_path, harm, settings, said):
    run = trainer(tiny_spnn(), tmp_path, reweight_every=0, **settings)
    harm(run)
    before = copy_of(run.model)
    refused(said, run.train_forward)
    assert not (tmp_path / FORWARD_CHECKPOINT).exists()
    if harm is broken_gradient:
        assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())


# --- Typical logits --------------------------------------------------------------------------------------------------


def test_typical_logits_are_medians_of_the_images_that_are_told_right():
    logits = torch.tensor([[-3.0, 1.0, 5.0], [-1.0, 2.0, 6.0], [-2.0, 3.0, 7.0], [4.0, -9.0, -8.0], [9.0, 0.0, 1.0]])
    labels = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]]).float()
    typical = typical_logits(logits, labels)
    assert typical[0] == [-2.0, 4.0]  # of two values the lower one is the median
    assert typical[1] == [-9.0, 2.0]  # the 0 is not told right
    assert typical[2] == [-5.0, 5.0]  # no image without it: the other's, turned
    assert typical_logits(logits, 1 - labels)[2] == [-8.0, 8.0]
    json.dumps(typical, allow_nan=False)


def test_class_weights_average_to_one_and_at_one_make_both_classes_count_alike():
    labels = (torch.arange(100)[:, None] < torch.tensor([5, 50, 90])).float()  # present in 5, 50 and 90 %
    share = labels.mean(0)
    for balance in (0.0, 0.35, 1.0):
        absent, present = class_weights(labels, balance)
        assert torch.allclose((1 - share) * absent + share * present, torch.ones(3))
    assert torch.allclose((1 - share) * absent, share * present)
    absent, present = class_weights(labels, 0.35)
    assert torch.allclose(present / absent, ((1 - share) / share) ** 0.35)


def test_the_classification_loss_is_averaged_by_attribute_and_takes_class_weights():
    logits, labels = torch.randn(8, 3), torch.rand(8, 3)  # a teacher's answers are not 0 or 1
    classes = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    present, absent = labels * F.softplus(-logits), (1 - labels) * F.softplus(logits)
    assert torch.allclose(bce_by_attribute(logits, labels), (present + absent).mean(0))
    expected = (classes[1] * present + classes[0] * absent).mean(0)
    assert torch.allclose(bce_by_attribute(logits, labels, classes), expected)


def test_teachers_answers_are_part_of_stage_1s_targets(tmp_path):
    sure, unsure = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)) for _ in range(2))
    with torch.no_grad():
        for parameter in (*sure.parameters(), *unsure.parameters()):
            parameter.zero_()
        sure[1].bias.fill_(50.0)  # 1, and the other says 0.5 of everything

    run = trainer(tiny_spnn(), tmp_path, epoch=1, lr=0.0, reweight_every=0, teach=0.5)
    run.teachers = (sure, unsure)
    run.train_forward()
    (row,) = rows_of(tmp_path / "metrics_forward.csv")
    model, (x, labels) = tiny_spnn(), data(12)
    targets = labels + 0.5 * (0.75 - labels)
    expected = F.binary_cross_entropy_with_logits(model(x), targets, reduction="none").mean(0).sum()
    assert float(row["train_bce"]) == pytest.approx(expected.item(), rel=1e-4)


def test_only_weights_of_convolutions_decay():
    model = SPNN(img_size=8, num_classes=4, layer_channels=CHAIN)
    shrinks, stays = loop.decaying(model, 0.1)
    named = {id(p): name for name, p in model.named_parameters()}
    assert shrinks["weight_decay"] == 0.1
    assert {named[id(p)].rpartition(".")[2] for p in shrinks["params"]} == {"weight"}
    assert {named[id(p)].rpartition(".")[2] for p in stays["params"]} == {"bias", "A_unconstrained"}
    assert len(named) == len(shrinks["params"]) + len(stays["params"])


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """All weights after one step of a stage."""

    @functools.cache
    def run(stage: str, **settings) -> torch.Tensor:
        one = {"count": 4, "epoch": 1, "r_epoch": 1, "warmup_steps": 0}
        model = tiny_spnn()
        getattr(trainer(model, tmp_path_factory.mktemp("learned"), **one, **settings), stage)()
        return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])

    return run


@pytest.mark.parametrize("stage, name", [
    ("train_forward", "augment"), ("optimise_r", "augment"), ("train_forward", "balance"),
    ("train_forward", "weight_decay"),
])  # fmt: skip
def test_augmentation_balance_and_weight_decay_change_what_is_learned(learned, stage, name):
    plain, other = learned(stage), learned(stage, **{name: 1.0})
    assert other.isfinite().all() and not torch.equal(plain, other)
