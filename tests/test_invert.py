import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import invert as command
from blocks import ConvPINNBlock, PixelUnshuffleBlock
from checkpoints import save_spnn, write_weights
from data_loader import ATTRIBUTES, load_image
from inversion import MappingNet, invert_through
from invert import Target, as_picture, fixed_problems, load_target, main, read_images
from judge import Judge
from models import SPNN
from utils import InputError, run_command

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with six images of 8x8, an SPNN and a judge that fit them."""
    top = tmp_path_factory.mktemp("invert")
    (top / "faces").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(top / "faces" / f"{i}.png")
    torch.manual_seed(0)
    layers = [
        (PixelUnshuffleBlock, {"r": 8}),
        (ConvPINNBlock, {"in_ch": 192, "out_ch": 64, "hidden": 4, "feat_size": 1}),
        (ConvPINNBlock, {"in_ch": 64, "out_ch": 40, "hidden": 4, "feat_size": 1}),
    ]
    model = SPNN(img_size=8, layer_channels=layers)
    with torch.no_grad():
        for p in model.parameters():  # the last layers start at zero
            p.add_(0.05 * torch.randn_like(p))
    save_spnn(top / "spnn.safetensors", model, {"attributes": list(ATTRIBUTES)})
    judge = Judge(40, 8, 2).eval()
    write_weights(top / "judge.safetensors", judge.state_dict())
    (top / "judge.json").write_text(json.dumps({"architecture": judge.config(), "attributes": list(ATTRIBUTES)}))
    return top


def train_arguments(here, out, *more):
    small = ["--buffers", "2", "--samples", "4", "--steps", "3", "--width", "4", "--batch_size", "4", "--lr", "1e-2"]
    given = ["--spnn", str(here / "spnn.safetensors"), "--data", str(here / "faces"), "--device", "cpu", "--no-lpips"]
    return ["train", *given, *small, "--out", str(out), *more]


def eval_arguments(here, out, *more):
    given = ["--spnn", str(here / "spnn.safetensors"), "--data", str(here / "faces"), "--device", "cpu", "--no-lpips"]
    judge = ["--judge", str(here / "judge.safetensors")]
    return ["eval", *given, *judge, "--steps", "3", "6", "--theta_steps", "3", "--out", str(out), *more]


@pytest.fixture(scope="module")
def trained(here):
    out = here / "landscape"
    assert main(train_arguments(here, out)) == 0
    return out


def test_training_leaves_its_record(trained):
    assert {p.name for p in trained.iterdir()} == set(command.TRAIN_FILES)
    notes = json.loads((trained / "theta.json").read_text())
    assert notes["network"] == "g" and notes["buffers"] == 2 and notes["settings"]["samples"] == 4
    assert notes["theta"] == {"shape": [3, 8, 8], "width": 4, "scale": pytest.approx(0.3), "bounds": [-1, 1]}
    rows = list(csv.DictReader(open(trained / "metrics.csv")))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(float(row["end_loss"]) < float(row["start_loss"]) for row in rows)
    Image.open(trained / "curves.png").verify()


def test_evaluation_measures_every_method(here, trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(eval_arguments(here, out, "--theta", str(trained / "theta.safetensors"))) == 0
    assert {p.name for p in out.iterdir()} == set(command.EVAL_FILES)
    record = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in record["methods"]}
    assert list(rows) == [
        "start",
        "closed form g'(y)",
        "NLBP",
        "NLBP in 20 short moves",
        "optimisation, 3 steps",
        "optimisation, 6 steps",
        "landscape, 3 steps",
    ]
    assert rows["start"]["distance"] == 0 and rows["start"]["seconds"] is None
    for exact in ("closed form g'(y)", "NLBP"):
        assert rows[exact]["error"] < 1e-4 < 1e-2 < rows["start"]["error"]
    assert rows["optimisation, 6 steps"]["error"] < rows["optimisation, 3 steps"]["error"] < rows["start"]["error"]
    assert rows["landscape, 3 steps"]["error"] < rows["start"]["error"]
    assert all(0 <= row["judge"] <= 1 and row["picture_error"] > 0 for row in rows.values())
    assert all(row["seconds"] > 0 for name, row in rows.items() if name != "start")

    by_image = list(csv.DictReader(open(out / "images.csv")))
    assert len(by_image) == 7 * 6
    errors = [float(row["error"]) for row in by_image if row["method"] == "optimisation, 6 steps"]
    assert sum(errors) / 6 == pytest.approx(rows["optimisation, 6 steps"]["error"])
    curves = list(csv.DictReader(open(out / "curves.csv")))
    assert len(curves) == 7 and set(curves[0]) == {"step", "loss_optimisation", "loss_landscape"}
    assert curves[4]["loss_landscape"] == "" and float(curves[6]["loss_optimisation"]) > 0
    sheet = Image.open(out / "sheet.png")
    assert sheet.size == (8 + 8 * 136, 40 + 6 * 154 + 8)
    printed = capsys.readouterr().out
    assert "| method | error | as a picture | distance | judge | s/image |" in printed and "| NLBP |" in printed


def test_the_figures_are_what_they_say(here, trained):
    target = load_target("g", here / "spnn.safetensors", CPU)
    names, images = read_images(here / "faces", 8, None)
    problems = fixed_problems(target, names, images, 0, 3, 4, CPU)
    for x0, wanted, y in zip(problems.x0, problems.wanted, problems.y, strict=True):
        assert not torch.equal(x0, wanted)  # nobody is moved to its own output
        torch.testing.assert_close(target.f(wanted[None])[0], y)
    assert sorted(problems.wanted.flatten(1).sum(1).tolist()) == sorted(images.flatten(1).sum(1).tolist())
    moved = problems.x0 + 0.1
    figures = command.measure(target, problems, moved, None, 4, CPU)
    assert figures["distance"] == pytest.approx([0.1] * 6, rel=1e-4) and "judge" not in figures
    expected = (target.f(moved) - problems.y).abs().mean(1).tolist()
    assert figures["error"] == pytest.approx(expected, rel=1e-4)
    judge = Judge(40, 8, 2).eval()
    assert command.measure(target, problems, problems.wanted, judge, 4, CPU)["judge"] == [1.0] * 6
    rounded = as_picture(moved)
    assert rounded.abs().max() <= 1 and not torch.equal(rounded, moved)
    assert figures["picture_error"] == pytest.approx((target.f(rounded) - problems.y).abs().mean(1).tolist(), rel=1e-4)


def test_theta_reads_back_and_belongs_to_its_network(here, trained):
    target = load_target("g", here / "spnn.safetensors", CPU)
    theta, _ = command.load_theta(trained / "theta.safetensors", target)
    x0 = load_image(here / "faces" / "0.png")[None]
    found = invert_through(theta, target.f, target.f(x0 * 0), x0, steps=2)
    fresh = invert_through(MappingNet(**theta.config()), target.f, target.f(x0 * 0), x0, steps=2)
    assert not torch.equal(found.x, fresh.x)  # it is not the untrained one
    other = load_target("pinv", here / "spnn.safetensors", CPU)
    with pytest.raises(InputError, match="trained for g"):
        command.load_theta(trained / "theta.safetensors", other)


def test_training_repeats_with_its_seed(here, trained, tmp_path):
    def weights(seed):
        main(train_arguments(here, tmp_path / f"again{seed}", "--seed", str(seed)))
        return (tmp_path / f"again{seed}" / "theta.safetensors").read_bytes()

    assert weights(0) == (trained / "theta.safetensors").read_bytes() != weights(1)


@pytest.mark.parametrize("network, closed", [("pinv", "closed form g(y)"), ("completion-inverse", "closed form G(y)")])
def test_latents_from_images(here, tmp_path, network, closed):
    theta, out = tmp_path / "theta", tmp_path / "out"
    assert main(train_arguments(here, theta, "--network", network)) == 0
    more = ["--network", network, "--theta", str(theta / "theta.safetensors")]
    assert main(eval_arguments(here, out, *more)) == 0
    rows = {row["method"]: row for row in json.loads((out / "results.json").read_text())["methods"]}
    assert rows["optimisation, 6 steps"]["error"] < rows["start"]["error"]
    assert "picture_error" not in rows["start"] and 0 <= rows[closed]["judge"] <= 1
    if network == "completion-inverse":
        assert rows[closed]["error"] < 1e-4 and rows[closed]["judge"] == 1
    assert (out / "sheet.png").is_file()


def test_the_completion_is_one_vector(here):
    target = load_target("completion-inverse", here / "spnn.safetensors", CPU)
    assert target.in_shape == (3 * 8 * 8,) and target.to_image and not target.from_image
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(target.f(target.f.encode(x)), x, rtol=1e-4, atol=1e-5)


def broken_below_zero():
    """A network without images on either side, not finite for half of its inputs."""

    class Root(nn.Module):
        in_shape = (4,)

        def forward(self, x):
            return (x + 0.05).sqrt()

    return Root()


def plain():
    f = nn.Linear(4, 2)
    f.in_shape = (4,)
    return f


def nothing():
    return nn.Linear(4, 2)


def mistaken():
    f = nn.Linear(4, 2)
    f.in_shape = (5,)
    return f


def test_a_network_of_the_users(tmp_path, capsys):
    torch.manual_seed(0)
    common = ["--network", "tests.test_invert:plain", "--device", "cpu"]
    small = ["--buffers", "1", "--samples", "4", "--steps", "2", "--batch_size", "4"]
    assert main(["train", *common, *small, "--out", str(tmp_path / "theta")]) == 0
    out = tmp_path / "out"
    theta = ["--theta", str(tmp_path / "theta" / "theta.safetensors")]
    assert main(["eval", *common, *theta, "--images", "5", "--steps", "40", "--out", str(out)]) == 0
    rows = {row["method"]: row for row in json.loads((out / "results.json").read_text())["methods"]}
    assert list(rows) == ["start", "optimisation, 40 steps", "landscape, 20 steps"]
    assert rows["optimisation, 40 steps"]["error"] < 0.2 * rows["start"]["error"]
    assert not (out / "sheet.png").exists() and "judge" not in rows["start"]
    assert "as a picture" not in capsys.readouterr().out


def test_samples_that_break_down_are_named_and_the_run_goes_on(tmp_path):
    out = tmp_path / "out"
    arguments = ["eval", "--network", "tests.test_invert:broken_below_zero", "--images", "8", "--steps", "30"]
    assert main([*arguments, "--device", "cpu", "--out", str(out)]) == 0
    assert "optimisation, 30 steps: " in (out / "log.txt").read_text()
    assert "not finite at step" in (out / "log.txt").read_text()
    record = json.loads((out / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert any(row["error"] is None for row in record["images"])  # a wanted output that is NaN


def test_results_are_kept_unless_asked(here, trained, tmp_path):
    before = (trained / "theta.safetensors").read_bytes()
    with pytest.raises(InputError, match="not empty"):
        main(train_arguments(here, trained))
    assert (trained / "theta.safetensors").read_bytes() == before
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    (out / "sheet.png").write_text("old")
    with pytest.raises(InputError, match="--overwrite"):
        main(eval_arguments(here, out, "--images", "2"))
    assert main(eval_arguments(here, out, "--images", "2", "--overwrite")) == 0
    assert (out / "mine.txt").read_text() == "kept" and (out / "sheet.png").read_bytes() != b"old"
    with pytest.raises(InputError, match="not a folder"):
        main(eval_arguments(here, out / "mine.txt"))


@pytest.mark.parametrize(
    "more, words",
    [
        (["--network", "pin"], "did you mean 'pinv'"),
        (["--network", "no_such_module:f"], "ModuleNotFoundError"),
        (["--network", "tests.test_invert:no_such_factory"], "AttributeError"),
        (["--network", "tests.test_invert:nothing"], "in_shape None"),
        (["--network", "tests.test_invert:mistaken"], r"does not take inputs of shape \(5,\)"),
        (["--data", "no_such_folder"], "no_such_folder"),
        (["--spnn", "none.safetensors"], "none.safetensors"),
        (["--theta", "none.safetensors"], "none.safetensors"),
        (["--judge", "none.safetensors"], "none.safetensors"),
        (["--images", "1"], "one image has no other"),
        (["--device", "abacus"], "no such device"),
    ],
)
def test_mistakes_are_one_line(here, tmp_path, more, words):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=words) as raised:
        main(eval_arguments(here, out, *more))
    assert "\n" not in str(raised.value)
    assert not out.exists()  # refused before anything is written


def test_images_are_asked_for_where_they_are_needed(here, tmp_path):
    arguments = ["eval", "--spnn", str(here / "spnn.safetensors"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(InputError, match="--data"):
        main(arguments)


def test_a_judge_that_does_not_fit(here, tmp_path):
    arguments = eval_arguments(here, tmp_path / "out")
    where = arguments.index("--judge") + 1
    arguments[where] = str(command.FACES / "judge.safetensors")
    with pytest.raises(InputError, match="64x64 images, not 8x8"):
        main(arguments)
    del arguments[where - 1 : where + 1]  # the demo's is left out by itself
    assert main([*arguments, "--images", "2"]) == 0
    assert "judge" not in json.loads((tmp_path / "out" / "results.json").read_text())["methods"][0]


def test_a_damaged_theta(here, trained, tmp_path):
    copy = tmp_path / "theta.safetensors"
    copy.write_bytes((trained / "theta.safetensors").read_bytes())
    target = load_target("g", here / "spnn.safetensors", CPU)
    with pytest.raises(InputError, match="cannot read its architecture"):
        command.load_theta(copy, target)
    for text in ("{", "[]", "{}", '{"theta": {"shape": 3}}', '{"theta": {"shape": [3, 8, 8], "width": 0}}'):
        copy.with_suffix(".json").write_text(text)
        with pytest.raises(InputError, match="no architecture of a theta"):
            command.load_theta(copy, target)
    config = {"theta": {"shape": [3, 8, 8], "width": 5}, "network": "g"}
    copy.with_suffix(".json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="theta.safetensors"):
        command.load_theta(copy, target)


def test_the_exit_status_says_what_happened(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: main(["eval", "--network", "nonsense", "--out", "none"]))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: --network nonsense: expected g, pinv")
    with pytest.raises(SystemExit):
        main(["eval", "--out", "none", "--x_lr", "nan"])


def test_lpips_joins_the_loss_where_it_can_be_had(monkeypatch):
    import DDNM.main

    target = Target("f", nn.Identity(), (5,), (3, 8, 8), 0.1)
    a, b = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)

    class Distance(nn.Module):
        def forward(self, a, b):
            return (a - b).abs().mean((1, 2, 3), keepdim=True) * 3

    monkeypatch.setattr(DDNM.main, "load_lpips", lambda device, log: Distance())
    assert command.make_loss(target, True, CPU, None)(a, b).tolist() == [4.0, 4.0]
    assert command.make_loss(target, False, CPU, None)(a, b).tolist() == [1.0, 1.0]
    monkeypatch.setattr(DDNM.main, "load_lpips", lambda device, log: None)
    assert command.make_loss(target, True, CPU, None)(a, b).tolist() == [1.0, 1.0]


def test_the_mean_is_over_what_is_finite():
    assert command.mean([1.0, math.nan, 3.0, math.inf]) == 2 and command.mean([math.nan]) is None
