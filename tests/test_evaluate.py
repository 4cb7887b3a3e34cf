"""Methods side by side: what the table says is what its pictures are, and a stopped evaluation goes on."""

import csv
import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import on_sampling, start_two, tiny_spnn
from torch import nn

import evaluate
from DDNM.guided_diffusion.edits import Edits
from DDNM.guided_diffusion.inputs import Targets
from evaluate import Measured, assignments, fid, kid
from utils import InputError


def arguments_of(assets, out, *flags: str) -> list[str]:
    arguments = ["--config", str(assets / "tiny.yml"), "--path_y", str(assets / "inputs"), "--count", "3"]
    return [*arguments, "--out", str(out), "--features", "judge", "--batch_size", "2", *flags]


def table_of(assets, out, *flags: str) -> dict:
    assert evaluate.main(arguments_of(assets, out, *flags)) == 0
    return json.loads((out / "table.json").read_text())


@pytest.fixture
def run(assets, tmp_path):
    return partial(table_of, assets, tmp_path / "out")


TWO = ("--methods", "none", "nlbp+gradient@3", "--steps", "2")


@pytest.fixture(scope="module")
def finished(assets, tmp_path_factory):
    """The folder of one run of two methods, and its table."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, table_of(assets, folder, *TWO)


@pytest.fixture
def drawn(monkeypatch):
    """How many images the sampler was asked for, call by call."""
    counts = []
    on_sampling(monkeypatch, lambda prior, generators, *_, **__: counts.append(len(generators)))
    return counts


def test_operators_are_measured_by_what_they_measure(run, drawn):
    record = run("--operator", "sr4", "--methods", "linear", "none", "--steps", "2")
    inputs, linear, none = record["rows"]
    assert inputs["judge"] == 1 and inputs["psnr"] is inputs["consistency"] is linear["g"] is linear["error"] is None
    assert linear["consistency"] < 1e-6 < 1e-2 < none["consistency"] and linear["psnr"] > none["psnr"]
    again = run("--operator", "sr4", "--methods", "linear", "none", "--steps", "2")
    assert again["rows"] == record["rows"] and len(drawn) == 4


def test_the_table_has_a_row_per_method_and_says_what_its_pictures_are(finished):
    (folder, record), model = finished, tiny_spnn()
    ceiling, none, both = record["rows"]
    assert [row["method"] for row in record["rows"]] == ["inputs", "none, 2 steps", "nlbp+gradient, 3 steps"]
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


def test_what_is_drawn_is_not_drawn_again_and_more_images_are_added(run, drawn, assets, tmp_path):
    shutil.copytree(assets / "inputs", tmp_path / "inputs")
    flags = ["--methods", "none", "--steps", "2", "--path_y", str(tmp_path / "inputs")]
    run(*flags, "--count", "2")
    assert drawn == [2]
    first = run(*flags)
    assert drawn == [2, 1]
    record = tmp_path / "out" / "pictures" / "none_2.jsonl"
    with open(record, "a") as file:
        file.write('{"images": {"re')  # cut by a kill
    again = run(*flags)
    assert drawn == [2, 1] and first["rows"] == again["rows"]
    assert all(json.loads(line) for line in record.read_text().splitlines())
    for more, said in {("--seed", "5"): "has seed 1234, not 5", ("--precision", "bf16"): "has precision float32",
                       ("--set", "Bald=1"): "has set "}.items():  # fmt: skip
        with pytest.raises(InputError, match=said):
            run(*flags, *more)
    Image.new("RGB", (16, 16), "yellow").save(tmp_path / "inputs" / "green.png")  # drawn again, with its batch
    flags[1:2] = ["none", "nlbp"]
    run(*flags)
    assert drawn == [2, 1, 2, 2, 1]


def test_two_processes_draw_what_one_draws(finished, assets, tmp_path):
    assert start_two(evaluate.main, arguments_of(assets, tmp_path / "two", *TWO), tmp_path / "logs")[0] == [0, 0]
    one, two = finished[1], json.loads((tmp_path / "two" / "table.json").read_text())
    for a, b in zip(one["rows"], two["rows"], strict=True):
        a, b = ({k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in (a, b))
        assert b.pop("method") == a.pop("method") and b == pytest.approx(a, abs=1e-5)
    assert "2 x" in two["note"] and len(list((tmp_path / "two" / "pictures").glob("*/*.png"))) == 6
    lines = [json.loads(line) for line in (tmp_path / "two" / "pictures" / "none_2.jsonl").read_text().splitlines()]
    assert sorted(name for line in lines[1:] for name in line["images"]) == ["blue", "green", "red"]


def test_edits_run_beside_the_method_without_one(run):
    record = run("--methods", "nlbp", "--steps", "2", "--edits", "Smiling=1", "Bald=+3+Bangs=0")
    _, plain, smiling, bald, mean = record["rows"]
    assert plain["method"] == "nlbp, 2 steps" and plain["edited"] is None
    assert smiling["method"] == "nlbp, 2 steps, Smiling=1" and bald["method"] == "nlbp, 2 steps, Bald=+3+Bangs=0"
    assert assignments("Bald=+3+Bangs=0") == ["Bald=+3", "Bangs=0"]
    assert mean["method"] == "nlbp, 2 steps, mean of 2 edits"
    assert mean["edited"] == pytest.approx((smiling["edited"] + bald["edited"]) / 2)


def colours(*rows) -> torch.Tensor:
    """Plain pictures, (N, 3, 8, 8)."""
    return torch.tensor(rows, dtype=torch.float32)[:, :, None, None].expand(-1, 3, 8, 8)


def test_what_an_edit_changed_is_told_from_what_the_method_changes_anyway():
    """To this judge, and this g, an attribute is a colour that is there."""

    def judge(x):
        return x.mean((2, 3))

    operator = SimpleNamespace(A=judge)
    networks = SimpleNamespace(judge=judge, operator=operator, device=torch.device("cpu"))
    inputs = colours((-1, 1, 1), (1, -1, 1), (-1, -1, -1), (-1, 1, -1))
    said = judge(inputs)
    targets = Targets(list("abcd"), [], said, said, [])
    measured = Measured(networks, targets, inputs, None, None, None, judge)
    plain = measured.of(colours((-1, 1, -1), (1, -1, 1), (-1, -1, -1), (-1, 1, -1)), said, said)
    assert "edited" not in plain and plain["judge"][0] == pytest.approx(11 / 12)
    notes = {"typical_logits": [[-1.0, 1.0]] * 3, "contradictions": {"r=1": {"b=1": 0.0}}}
    _, wanted, measured.followed = Edits.parse(["r=+3"], list("rgb"), notes).apply(said, said)
    measured.edits = [0]
    drawn = measured.of(colours((1, 1, -1), (1, 1, 1), (1, -1, -1), (-1, 1, -1)), wanted, said)
    values = {key: value for key, (value, _, _) in drawn.items()}
    assert (values["before"], values["edited"]) == (0.25, 0.75)
    assert (values["floor"], values["changed"], values["followed"]) == pytest.approx((1 / 8, 2 / 8, 2 / 8))
    assert values["identity"] == pytest.approx((-1 / 3 + 1 / 3 + 1 / 3 + 1) / 4, abs=1e-6)


class Few(nn.Module):
    """In the place of networks that see pictures."""

    def forward(self, x):
        return x.flatten(1)[:, ::97]


def test_inception_is_taken_where_it_can_be_had_and_a_given_network_measures_identity(run, monkeypatch, tmp_path):
    shapes = ({0: torch.export.Dim("batch")},)
    faces = torch.export.export(Few(), (torch.zeros(2, 3, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(faces, tmp_path / "faces.pt2")
    monkeypatch.setattr(evaluate, "InceptionFeatures", Few)
    flags = ["--features", "auto", "--identity", str(tmp_path / "faces.pt2")]
    ceiling, none = run("--methods", "none", "--steps", "2", *flags)["rows"]
    assert none["fid"] > 0 and ceiling["fid"] == pytest.approx(0, abs=1e-3) and none["kid"] is not None
    assert "Inception features against 3 pictures" in (tmp_path / "out" / "table.md").read_text()
    assert ceiling["identity"] is None and -1 <= none["identity_low"] <= none["identity"] <= none["identity_high"] <= 1


def test_fid_is_that_of_two_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(500, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    b = 2 * b + 1
    (m, c), (n, d) = ((x.mean(0), np.cov(x.numpy().T)) for x in (a, b))
    roots = np.linalg.eigvals(c @ d).real ** 0.5  # of a product of positive matrices: the trace of its root
    assert fid(a, b) == pytest.approx(((m - n).square().sum() + np.trace(c + d) - 2 * roots.sum()).item(), rel=1e-5)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--methods", "nlpb"], "no rule 'nlpb', did you mean 'nlbp'"),
        (["--methods", "nlbp@x"], "RULE@STEPS"),
        (["--methods", "linear"], "linear is for linear operators"),
        (["--steps", "0"], "steps"),
        (["--edits", "Smilng=1"], "did you mean 'Smiling'"),
        (["--features", "inception"], "inception"),
        (["--identity", "none.pt2"], "--identity none.pt2: no exported network"),
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
    near, far, some = kid(a, b)(torch.arange(40)), kid(a, b + 1), torch.randperm(40)[:30]
    assert near == pytest.approx(100 * poly_mmd(b, a).item(), rel=1e-9)
    assert far(some) == pytest.approx(kid(a[some], b + 1)(torch.arange(30)), rel=1e-9) and far(some) > 10 * abs(near)


def test_a_preset_of_the_reconstruction_command_loses_nothing_that_decides_pictures(run, assets, tmp_path):
    preset, own = (assets / "tiny.yml").read_text(), tmp_path / "own.yml"
    own.write_text(f"{preset}\noverwrite: true\nimage_folder: other\n")  # of its files
    flags = "--config", str(own), "--methods", "none", "--steps", "1"
    assert run(*flags, "--count", "1")["rows"][1]["method"] == "none, 1 steps"
    own.write_text(f"{preset}\npublished_rule: true\n")
    with pytest.raises(InputError, match="unknown key 'published_rule'"):
        run(*flags)
