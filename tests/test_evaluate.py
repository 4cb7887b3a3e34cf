"""Methods side by side: what the table says is what its pictures are, and a stopped evaluation goes on."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_main import assets, tiny_spnn  # noqa: F401  (a fixture)

import evaluate
from evaluate import bootstrap, halves, kid
from utils import InputError


@pytest.fixture
def run(assets, tmp_path):  # noqa: F811
    def run(*flags: str, count: int = 3):
        arguments = ["--config", str(assets / "tiny.yml"), "--path_y", str(assets / "inputs"), "--count", str(count)]
        arguments += ["--out", str(tmp_path / "out"), "--features", "judge", "--batch_size", "2", *flags]
        assert evaluate.main(arguments) == 0
        return json.loads((tmp_path / "out" / "table.json").read_text())

    return run


@pytest.fixture
def drawn(monkeypatch):
    """How many images the sampler was asked for, call by call."""
    counts, honest = [], evaluate.sample

    def sample(prior, generators, *arguments, **settings):
        counts.append(len(generators))
        return honest(prior, generators, *arguments, **settings)

    monkeypatch.setattr(evaluate, "sample", sample)
    return counts


def test_the_table_has_a_row_per_method_and_says_what_its_pictures_are(run, tmp_path):
    record = run("--methods", "none", "nlbp+gradient@3", "--steps", "2")
    ceiling, none, both = record["rows"]
    assert [row["method"] for row in record["rows"]] == ["inputs", "none, 2 steps", "nlbp+gradient, 3 steps"]
    folder, model = tmp_path / "out", tiny_spnn()
    files = [folder / "pictures" / "none_2" / f"{name}.png" for name in ("blue", "green", "red")]
    pictures = [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 127.5 - 1 for file in files]
    inputs = [torch.tensor(c).view(3, 1, 1).expand(3, 16, 16) / 127.5 - 1
              for c in ((20.0, 20, 210), (20, 200, 20), (220, 20, 20))]  # fmt: skip
    with torch.no_grad():
        logits, targets = model(torch.stack(pictures).float()), model(torch.stack(inputs))
    assert none["g"] == pytest.approx(((logits > 0) == (targets > 0)).float().mean().item(), abs=1e-6)
    assert none["error"] == pytest.approx((logits.sigmoid() - targets.sigmoid()).abs().mean().item(), abs=1e-5)
    assert none["judge_low"] <= none["judge"] <= none["judge_high"] and 0 <= none["error"] <= 1
    assert (none["evaluations"], none["gradients"], both["evaluations"]) == (2, 0, 3) and both["gradients"] > 0
    assert ceiling["g"] == 1 and ceiling["error"] < 1e-6 and ceiling["psnr"] is None and none["psnr"] > 0
    assert none["kid"] is not None and none["seconds"] > 0 and none["memory"] > 0
    rows = list(csv.DictReader(open(folder / "table.csv")))
    assert [row["method"] for row in rows] == [row["method"] for row in record["rows"]]
    text = (folder / "table.md").read_text()
    assert "| nlbp+gradient, 3 steps |" in text and "judge features against 3 pictures" in text
    assert Image.open(folder / "sheet.png").height > 3 * 96


def test_what_is_drawn_is_not_drawn_again_and_more_images_are_added(run, drawn):
    run("--methods", "none", "--steps", "2", count=2)
    assert drawn == [2]
    first = run("--methods", "none", "--steps", "2")
    assert drawn == [2, 1]
    again = run("--methods", "none", "--steps", "2")
    assert drawn == [2, 1] and first["rows"] == again["rows"]
    run("--methods", "none", "nlbp", "--steps", "2")
    assert drawn == [2, 1, 2, 1]
    with pytest.raises(InputError, match="has seed 1234, not 5"):
        run("--methods", "none", "--steps", "2", "--seed", "5")


def test_edits_are_seen_or_not_and_the_others_counted(run):
    record = run("--methods", "nlbp", "--steps", "2", "--edits", "Smiling=1", "Bald=-3")
    _, smiling, bald = record["rows"]
    assert smiling["method"] == "nlbp, 2 steps, Smiling=1" and bald["method"] == "nlbp, 2 steps, Bald=-3"
    assert smiling["edited"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1) and 0 <= bald["changed"] <= 1


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--methods", "nlpb"], "no rule 'nlpb', did you mean 'nlbp'"),
        (["--methods", "nlbp@x"], "RULE@STEPS"),
        (["--methods", "linear"], "linear is for linear operators"),
        (["--steps", "0"], "steps"),
        (["--edits", "Smilng=1"], "did you mean 'Smiling'"),
        (["--features", "inception"], "inception"),
    ],
)
def test_a_mistake_is_one_line_and_draws_nothing(run, drawn, monkeypatch, flags, said):
    def none():
        raise OSError("no network")

    monkeypatch.setattr(evaluate, "InceptionFeatures", none)
    with pytest.raises(InputError, match=said) as error:
        run(*flags)
    assert "\n" not in str(error.value) and drawn == []


def test_kid_is_torchmetrics_own_for_sets_of_one_size():
    from torchmetrics.image.kid import poly_mmd

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    assert kid(a, b) == pytest.approx(100 * poly_mmd(b, a).item(), rel=1e-9)
    assert kid(a, b + 1) > 10 * abs(kid(a, b)) and abs(kid(a[:30], b)) < 0.05 * kid(a[:30], b + 1)


def test_intervals_are_those_of_the_normal_distribution():
    """Of a mean over n values of variance 1: 1.96 / sqrt(n) on each side."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    width = 1.96 * values.std().item() / 20
    for of in (bootstrap, lambda f, n: halves(f, n, 1000)):
        value, low, high = of(lambda i: values[i].mean().item(), 400)
        assert value == pytest.approx(values.mean().item())
        assert value - low == pytest.approx(width, rel=0.15) and high - value == pytest.approx(width, rel=0.15)
