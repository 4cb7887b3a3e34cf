import csv
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import random, randomise, seeded, tiny
from PIL import Image
from runs import save_judge
from safetensors.torch import load_file
from torch import nn

import invert as command
import loop
from checkpoints import save_spnn, write_weights
from data_loader import ATTRIBUTES
from DDNM.guided_diffusion.results import as_saved
from images import load_image, save_image
from invert import Settings, Target, load_problems, load_targets, main, make_loss
from judge import Judge
from models import SPNN
from stylegan import StyleGAN
from utils import InputError


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with six images of 8x8, and an SPNN, a judge and a StyleGAN that fit them."""
    top = tmp_path_factory.mktemp("invert")
    (top / "faces").mkdir()
    for i, image in enumerate(2 * torch.rand(6, 3, 8, 8, generator=seeded(0)) - 1):
        save_image(image, top / "faces" / f"{i}.png")
    model = randomise(tiny(40, img_size=8), seeded(0))
    save_spnn(top / "spnn.safetensors", model, {"attributes": list(ATTRIBUTES)})
    save_judge(top / "judge.safetensors", Judge(40, 8, 2).eval(), attributes=list(ATTRIBUTES))
    torch.manual_seed(0)
    generator = StyleGAN(8, (8, 6), dim=5, depth=2)
    for p in generator.parameters():  # biases and noise start at zero
        p.data.add_(0.2 * torch.randn_like(p))
    write_weights(top / "g.safetensors", generator.state_dict())
    return top


@pytest.fixture(scope="module")
def generator(here):
    return command.load_generator(here / "g.safetensors")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Their pictures take longer than the searches here."""
    monkeypatch.setattr(command, "plot_curves", lambda table, picture: picture.touch())


def flags(here, command, out, *more):
    own = {
        "train": "--buffers 2 --samples 4 --steps 3 --width 4 --batch_size 4 --lr 1e-2",
        "eval": f"--judge {here / 'judge.safetensors'} --steps 3 6 --theta_steps 3",
        "find": f"--weights {here / 'g.safetensors'} --batch_size 4 --steps 9",
    }[command]
    given = f"--spnn {here / 'spnn.safetensors'} --data {here / 'faces'} --device cpu --loss mse --out {out}"
    return [command, *given.split(), *own.split(), *more]


@pytest.fixture(scope="module")
def trained(here):
    out = here / "landscape"
    assert main(flags(here, "train", out)) == 0
    return out


def test_training_leaves_its_record_and_is_resumed(here, trained, tmp_path):
    """Two buffers, then two more, are four; the SPNN has moved meanwhile."""
    written = {"settings.json", "theta.safetensors", "theta.json", "metrics.csv", "curves.png", "log.txt"}
    assert {p.name for p in trained.iterdir()} == {*written, loop.STATE_NAME}
    notes = json.loads((trained / "theta.json").read_text())
    assert notes["network"] == "g" and notes["buffers"] == 2 and notes["settings"]["samples"] == 4
    assert notes["peak_gib"] > 0.01 or not Path("/proc/self/status").exists()
    assert notes["theta"] == {"shape": [3, 8, 8], "width": 4, "scale": pytest.approx(0.3), "bounds": [-1, 1]}
    whole, parts, moved = tmp_path / "whole", tmp_path / "parts", tmp_path / "spnn.safetensors"
    shutil.copytree(trained, parts)
    SPNN.from_pretrained(here / "spnn.safetensors").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(moved)
    assert main(flags(here, "train", whole, "--buffers", "4")) == 0
    more = flags(here, "train", parts, "--buffers", "4", "--resume", "--spnn", str(moved))
    with pytest.raises(InputError, match="the run in .* has width 4, not 5"):
        main([*more, "--width", "5"])
    assert main(more) == 0
    assert (whole / "theta.safetensors").read_bytes() == (parts / "theta.safetensors").read_bytes()
    rows = [[row | {"seconds": ""} for row in csv.DictReader(open(f / "metrics.csv"))] for f in (whole, parts)]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == ["1", "2", "3", "4"]
    assert all(float(row["end_loss"]) < float(row["start_loss"]) for row in rows[0])
    with pytest.raises(InputError, match="has command train, not eval"):  # nor is the folder cleared
        main(flags(here, "eval", parts, "--resume"))
    assert (parts / "theta.safetensors").is_file()


def settings(here, **more):
    return Settings(out=here / "out", spnn=here / "spnn.safetensors", batch_size=4, loss="mse", device="cpu", **more)


def load_target(network, here):
    return load_targets(network, settings(here))[0]


def methods(out):
    """The rows of an evaluation by the name of the method."""
    return {row["method"]: row for row in json.loads((out / "results.json").read_text())["methods"]}


def test_evaluation_measures_every_method(here, trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(flags(here, "eval", out, "--theta", str(trained / "theta.safetensors"))) == 0
    record = json.loads((out / "results.json").read_text())
    rows = methods(out)
    assert list(rows) == ["start", "closed form g'(y)", "NLBP", "NLBP in 20 short moves", "optimisation, 3 steps",
                          "optimisation, 6 steps", "landscape, 3 steps"]  # fmt: skip
    assert rows["start"]["distance"] == 0 and rows["start"]["seconds"] is None
    for exact in ("closed form g'(y)", "NLBP"):
        assert rows[exact]["error"] < 1e-4 < 1e-2 < rows["start"]["error"]
    assert rows["optimisation, 6 steps"]["error"] < rows["optimisation, 3 steps"]["error"] < rows["start"]["error"]
    assert rows["landscape, 3 steps"]["error"] < rows["start"]["error"]
    assert rows["landscape, 3 steps"]["error"] != rows["optimisation, 3 steps"]["error"]  # it is trained
    assert all(0 <= row["judge"] <= 1 and row["picture_error"] > 0 for row in rows.values())
    assert all(row["seconds"] > 0 for name, row in rows.items() if name != "start")

    errors = [row["error"] for row in record["images"] if row["method"] == "optimisation, 6 steps"]
    assert sum(errors) / 6 == pytest.approx(rows["optimisation, 6 steps"]["error"])
    curves = list(csv.DictReader(open(out / "curves.csv")))
    assert len(curves) == 7 and set(curves[0]) == {"step", "loss_optimisation", "loss_landscape"}
    assert curves[4]["loss_landscape"] == "" and float(curves[6]["loss_optimisation"]) > 0
    assert Image.open(out / "sheet.png").size == (16 + 8 * 272, 40 + 6 * 288)
    printed = capsys.readouterr().out
    assert "| method | error | as a picture | distance | judge | s/image |" in printed and "| NLBP |" in printed


def test_the_figures_are_what_they_say(here, trained):
    target = load_target("g", here)
    problems = load_problems(target, settings(here, data=here / "faces", seed=3))
    for x0, wanted, y in zip(problems.x0, problems.wanted, problems.y, strict=True):
        assert not torch.equal(x0, wanted)  # nobody is moved to its own output
        torch.testing.assert_close(target.f(wanted[None])[0], y)
    assert sorted(problems.wanted.flatten(1).sum(1).tolist()) == sorted(problems.x0.flatten(1).sum(1).tolist())

    def measured(x, output, judge=None):
        return command.figures_of(target, problems, x, problems.x0, output, judge, settings(here))

    moved = problems.x0 + 0.1
    figures = measured(moved, target.f(moved))
    torch.testing.assert_close(figures["distance"], torch.full((6,), 0.1), rtol=1e-4, atol=0)
    torch.testing.assert_close(figures["error"], (target.f(moved) - problems.y).abs().mean(1), rtol=1e-4, atol=0)
    perfect = measured(problems.wanted, problems.y, Judge(40, 8, 2).eval())
    assert "judge" not in figures and perfect["judge"].tolist() == [1.0] * 6
    rounded, _ = as_saved(moved)
    assert rounded.abs().max() <= 1 and not torch.equal(rounded, moved)
    expected = (target.f(rounded) - problems.y).abs().mean(1)
    torch.testing.assert_close(figures["picture_error"], expected, rtol=1e-4, atol=0)


def test_a_theta_belongs_to_its_network(here, trained, tmp_path):
    arguments = flags(here, "eval", tmp_path / "out", "--theta", str(trained / "theta.safetensors"))
    with pytest.raises(InputError, match="has network g, not pinv"):
        main([*arguments, "--network", "pinv"])
    other = SPNN.from_pretrained(here / "spnn.safetensors")
    next(other.parameters()).data.add_(1)
    save_spnn(tmp_path / "spnn.safetensors", other)
    with pytest.raises(InputError, match="weights of the network"):
        main([*arguments, "--spnn", str(tmp_path / "spnn.safetensors")])


@pytest.mark.parametrize("network, closed", [("pinv", "closed form g(y)"), ("completion-inverse", "closed form G(y)")])
def test_latents_from_images(here, tmp_path, network, closed):
    out = tmp_path / "out"
    assert main(flags(here, "eval", out, "--network", network, "--images", "2", "--x_lr", "0.02")) == 0
    rows = methods(out)
    assert rows["optimisation, 6 steps"]["error"] < rows["start"]["error"]
    assert "picture_error" not in rows["start"] and 0 <= rows[closed]["judge"] <= 1
    if network == "completion-inverse":
        assert rows[closed]["error"] < 1e-4 and rows[closed]["judge"] == 1
        assert load_target(network, here).in_shape == (3 * 8 * 8,)
    assert (out / "sheet.png").is_file()


def network_of(shape, forward=None):
    """A user's, from four numbers to two, that says it takes ``shape``."""
    torch.manual_seed(0)
    f = nn.Linear(4, 2)
    f.in_shape, f.forward = shape, forward or f.forward
    return f


plain, nothing, mistaken = (partial(network_of, shape) for shape in ((4,), None, (5,)))
broken_below_zero = partial(network_of, (4,), lambda x: (x + 0.05).sqrt())  # not finite for half of its inputs


def test_a_network_of_the_users(tmp_path, capsys):
    common = ["--network", "tests.test_invert:plain", "--device", "cpu"]
    small = ["--buffers", "1", "--samples", "4", "--steps", "2", "--batch_size", "4"]
    assert main(["train", *common, *small, "--out", str(tmp_path / "theta")]) == 0
    out = tmp_path / "out"
    theta = ["--theta", str(tmp_path / "theta" / "theta.safetensors")]
    assert main(["eval", *common, *theta, "--images", "5", "--steps", "40", "--out", str(out)]) == 0
    rows = methods(out)
    assert list(rows) == ["start", "optimisation, 40 steps", "landscape, 20 steps"]
    assert rows["optimisation, 40 steps"]["error"] < 0.2 * rows["start"]["error"]
    assert not (out / "sheet.png").exists() and "judge" not in rows["start"]
    assert "as a picture" not in capsys.readouterr().out


def test_samples_that_break_down_are_named_and_the_run_goes_on(tmp_path):
    out = tmp_path / "out"
    given = ["eval", "--network", "tests.test_invert:broken_below_zero", "--images", "8", "--steps", "30"]
    assert main([*given, "--device", "cpu", "--out", str(out)]) == 0
    assert "broken_below_zero, 30 steps: 1: loss or gradient not finite at step" in (out / "log.txt").read_text()
    record = json.loads((out / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert any(row["error"] is None for row in record["images"])  # a wanted output that is NaN


def test_results_are_kept_unless_asked(here, trained, tmp_path):
    before = (trained / "theta.safetensors").read_bytes()
    for more, words in (([], "--overwrite"), (["--overwrite", "--loss", "vgg"], "--loss vgg: compares images")):
        with pytest.raises(InputError, match=words):  # before anything is deleted
            main(flags(here, "train", trained, *more))
    assert (trained / "theta.safetensors").read_bytes() == before
    for name in ("mine.txt", "sheet.png", "results.json"):  # of another command, say
        (tmp_path / name).write_text("old")
    arguments = [each for each in flags(here, "eval", tmp_path, "--images", "2") if "judge" not in each]
    with pytest.raises(InputError, match="not empty.*--overwrite"):
        main([*arguments, "--resume"])
    assert (tmp_path / "sheet.png").read_text() == (tmp_path / "results.json").read_text() == "old"
    assert main([*arguments, "--overwrite"]) == 0
    assert "judge" not in methods(tmp_path)["start"]  # the demo's does not fit
    assert (tmp_path / "mine.txt").read_text() == "old"


def test_the_commands_are_named(capsys):
    with pytest.raises(InputError, match="fnd: expected find, train, eval, did you mean 'find'?"):
        main(["fnd"])
    assert main(["--help"]) == 0 and "find,train,eval" in capsys.readouterr().out


@pytest.fixture
def loss(here, monkeypatch):
    """The loss of images with settings, LPIPS being three times the mean difference."""
    monkeypatch.setattr(command, "lpips_or_none", lambda device, size: lambda a, b: 3 * (a - b).abs().mean((1, 2, 3)))
    target = Target("f", nn.Identity(), in_shape=(5,), out_shape=(3, 8, 8))
    return lambda **more: make_loss(target, replace(settings(here), **more))


def test_lpips_joins_the_loss_if_it_can_be_had(here, loss, monkeypatch):
    a, b = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    assert loss(loss="auto")(a, b).tolist() == loss(loss="lpips")(a, b).tolist() == [4.0, 4.0]
    assert loss(loss="lpips", perceptual_weight=(2.0,))(a, b).tolist() == [7.0, 7.0]
    assert loss(loss="mse")(a, b).tolist() == [1.0, 1.0]
    monkeypatch.setattr(command, "lpips_or_none", lambda device, size: None)
    assert loss(loss="auto")(a, b).tolist() == [1.0, 1.0]
    with pytest.raises(InputError, match="--loss lpips: cannot be had"):
        loss(loss="lpips")
    with pytest.raises(InputError, match="--loss vgg: compares images, and g gives none"):
        make_loss(load_target("g", here), replace(settings(here), loss="vgg"))


def test_the_features_of_vgg_join_the_loss(loss, monkeypatch):
    """By hand for a network of two layers, and torchvision's that cannot be fetched."""
    import torchvision

    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)).requires_grad_(False)
    a, b = torch.rand(2, 2, 3, 8, 8) * 2 - 1
    two = {"loss": "vgg", "vgg_layers": (0, 2), "perceptual_weight": (3.0, 5.0)}
    zero_one = [(x + 1) / 2 for x in (a, b)]
    shallow, deep = ([f(x) for x in zero_one] for f in (layers[0], layers))
    weighted = (1, zero_one), (3, shallow), (5, deep)
    expected = sum(weight * (x - y).square().flatten(1).mean(1) for weight, (x, y) in weighted)
    with monkeypatch.context() as patch:
        patch.setattr(command, "load_vgg", lambda: layers)
        torch.testing.assert_close(loss(**two)(a, b), expected)
        for wrong in ({"vgg_layers": (0, 3)}, {"perceptual_weight": (1.0, 2.0, 3.0)}):
            with pytest.raises(InputError, match="--vgg_layers|--perceptual_weight"):
                loss(**two | wrong)
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights: load_file("no route"))
    with pytest.raises(InputError, match="--loss vgg: VGG-16's weights cannot be had .*no route.*put"):
        loss(**two)


# --- StyleGAN --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space, rows", [("z", 1), ("w", 1), ("w+", 4)])
def test_the_latent_of_an_image(here, generator, tmp_path, space, rows):
    out = tmp_path / "out"
    assert main(flags(here, "find", out, "--spaces", space, "--images", "2")) == 0
    images = [f"{i}.{kind}" for i in range(2) for kind in ("png", "safetensors")]
    written = {"settings.json", "results.csv", "curves.csv", "curves.png", "sheet.png", "log.txt", *images}
    assert {p.name for p in out.iterdir()} == {*written, command.SEARCHES, loop.STATE_NAME}
    found = load_file(out / "1.safetensors")
    assert found["w_plus"].shape == (4, 5) and len(found["w_plus"].unique(dim=0)) == rows
    assert found["curve"].shape == (10,) and found["curve"].min() < found["curve"][0]
    made = generator.synthesis(found["w_plus"][None], generator.draw_noise(1, seeded(0)))
    assert torch.equal(as_saved(made)[0][0], load_image(out / "1.png"))
    row = list(csv.DictReader(open(out / "results.csv")))[1]
    error = (made[0] - load_image(here / "faces" / "1.png")).square()
    assert row["image"] == "1" and float(row["loss"]) == pytest.approx(error.mean().item(), rel=1e-4)
    assert float(row["loss"]) == pytest.approx(found["curve"].min().item())
    assert Image.open(out / "sheet.png").size == (16 + 3 * 272, 40 + 2 * 288)


class Killed(BaseException):
    pass


def kill_at(monkeypatch, number):
    """The process dies after so many states."""
    saves, save = [], command.save_state

    def killed(path, state):
        save(path, state)
        saves.append(path)
        if len(saves) == number:
            raise Killed

    monkeypatch.setattr(command, "save_state", killed)


def test_one_space_after_another_and_resumed(here, tmp_path, monkeypatch):
    """A search that is killed in its second space, and goes on, finds what one that is not finds, noise drawn anew."""
    arguments = "--spaces z w w+ --noise new --steps 5 --start best --draws 5 --images 5".split()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setattr(command, "SAVE_STEPS", 2)
    assert main(flags(here, "find", whole, *arguments)) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 6)
        main(flags(here, "find", parts, *arguments))
    assert not (parts / "0.png").exists()
    with pytest.raises(InputError, match="--resume"):
        main(flags(here, "find", parts, *arguments))
    with pytest.raises(InputError, match="the run in .* has spaces"):
        main(flags(here, "find", parts, "--resume", "--spaces", "w+"))
    assert main(flags(here, "find", parts, *arguments, "--resume")) == 0
    for i in range(5):
        a, b = (load_file(folder / f"{i}.safetensors") for folder in (whole, parts))
        assert all(torch.equal(a[key], b[key]) for key in ("x", "w_plus", "curve"))
        assert len(a["curve"]) == 18
    time = (parts / "0.png").stat().st_mtime_ns
    assert main(flags(here, "find", parts, *arguments, "--resume")) == 0  # nothing is left to do
    assert (parts / "0.png").stat().st_mtime_ns == time


def test_starts(here, generator):
    s = settings(here, weights=str(here / "g.safetensors"), draws=3)
    target = load_targets("stylegan", s)[0]
    drawn = target.f.draw(2, seeded(0))
    for kind, expected in (("best", drawn), ("average", generator.average().repeat(2, 4)), ("zero", drawn * 0)):
        start = command.starts(target, target.f(drawn), replace(s, start=kind), make_loss(target, s))
        torch.testing.assert_close(start, expected)


def test_the_landscape_of_stylegan(here, tmp_path, capsys, monkeypatch):
    """Two seeds of it, beside plain searches and the SPNN, with LPIPS."""
    out = tmp_path / "out"
    of_stylegan = ["--network", "stylegan", "--weights", str(here / "g.safetensors")]
    assert main(flags(here, "train", tmp_path / "0", *of_stylegan)) == 0
    notes = json.loads((tmp_path / "0" / "theta.json").read_text())
    assert notes["network"] == "stylegan w+" and notes["theta"]["shape"] == [20]
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    notes["settings"]["seed"] = 1
    (tmp_path / "1" / "theta.json").write_text(json.dumps(notes))
    thetas = [str(tmp_path / seed / "theta.safetensors") for seed in "01"]
    monkeypatch.setattr(command, "lpips_or_none", lambda device, size: lambda a, b: (a - b)[:, :1, :1, :1].abs())
    with pytest.raises(InputError, match="landscape of seed 0 is there twice"):
        main(flags(here, "eval", out, *of_stylegan, "--theta", *thetas[:1] * 2))
    assert main(flags(here, "eval", out, *of_stylegan, "--theta", *thetas, "--images", "3", "--spaces", "z", "w+")) == 0
    rows = methods(out)
    assert list(rows) == [
        *("z, start", "z, optimisation, 3 steps", "z, optimisation, 6 steps"),
        *("w+, start", "SPNN, g'(g(x))", "SPNN, NLBP of the start", "w+, optimisation, 3 steps"),
        *("w+, optimisation, 6 steps", "w+, landscape of seed 0, 3 steps", "w+, landscape of seed 1, 3 steps"),
    ]
    assert all(0 <= row["lpips_low"] <= row["lpips"] <= row["lpips_high"] <= 2 for row in rows.values())
    for space in ("z", "w+"):
        figures = [rows[f"{space}, {method}"]["psnr"] for method in ("start", "optimisation, 3 steps")]
        assert figures[0] < figures[1] < rows[f"{space}, optimisation, 6 steps"]["psnr"]
    assert rows["w+, optimisation, 6 steps"]["seconds"] > rows["w+, optimisation, 3 steps"]["seconds"] > 0
    assert "distance" not in rows["z, start"] and 0 <= rows["w+, start"]["judge"] <= 1
    curves = list(csv.DictReader(open(out / "curves.csv")))
    seeds = [f"w+, landscape of seed {seed}" for seed in "01"]
    assert list(curves[0]) == ["step", *(f"loss_{name}" for name in ("z, optimisation", "w+, optimisation", *seeds))]
    for told, name in zip(json.loads((out / "results.json").read_text())["landscapes"], seeds, strict=True):
        plain = [float(row["loss_w+, optimisation"]) for row in curves]
        assert told["theta"] == name and told["steps"] == 3
        assert told["plain_steps"] == next(i for i, loss in enumerate(plain) if loss <= told["loss"])
    assert "| theta | steps | loss |" in (printed := capsys.readouterr().out) and "| LPIPS |" in printed


def test_an_evaluation_is_resumed(here, generator, tmp_path, monkeypatch):
    """A killed one finds what a whole one finds, noise drawn anew; what is found is not searched for again."""
    write_weights(tmp_path / "g.safetensors", generator.state_dict())
    faces = shutil.copytree(here / "faces", tmp_path / "faces")
    more = f"--network stylegan --weights {tmp_path / 'g.safetensors'} --spaces z w+ --noise new --images 3".split()
    more += ["--data", str(faces)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setattr(command, "SAVE_STEPS", 2)
    assert main(flags(here, "eval", whole, *more)) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 7)  # in the second space
        main(flags(here, "eval", parts, *more))
    with pytest.raises(InputError, match="--resume"):
        main(flags(here, "eval", parts, *more))
    with pytest.raises(InputError, match=r"has seed 0, not 7"):
        main(flags(here, "eval", parts, *more, "--resume", "--seed", "7"))
    assert main(flags(here, "eval", parts, *more, "--resume")) == 0
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (whole, parts))
    assert a["images"] == b["images"] and len(a["images"]) == 8 * 3
    monkeypatch.setattr(command, "invert", lambda *args, **kwargs: pytest.fail("searched again"))
    assert main(flags(here, "eval", parts, *more, "--resume", "--steps", "3")) == 0
    fewer = json.loads((parts / "results.json").read_text())["images"]
    assert fewer == [row for row in b["images"] if "6 steps" not in row["method"]]
    for row in b["methods"]:  # the seconds as well
        assert "3 steps" not in row["method"] or row == methods(parts)[row["method"]]
    shutil.copy(faces / "0.png", faces / "1.png")
    with pytest.raises(InputError, match="1.png: not what the run in .* found of that name"):
        main(flags(here, "eval", parts, *more, "--resume", "--steps", "3"))
    shutil.copy(here / "faces" / "1.png", faces / "1.png")
    write_weights(tmp_path / "g.safetensors", {name: tensor + 1 for name, tensor in generator.state_dict().items()})
    with pytest.raises(InputError, match="--resume with its settings"):
        main(flags(here, "eval", parts, *more, "--resume"))


def test_a_morph(here, generator, tmp_path):
    for i in range(2):
        write_weights(tmp_path / f"{i}.safetensors", {"w_plus": random((4, 5), i, torch.float32)})
    ends = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    assert main(flags(here, "find", tmp_path / "out", "--morph", *ends, "--frames", "2")) == 0
    frames = [f"frame_{i:04d}.png" for i in range(3)]
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {*frames, "frames.png"}
    middle = torch.stack([load_file(path)["w_plus"] for path in ends]).mean(0, keepdim=True)
    made = generator.synthesis(middle, generator.draw_noise(1, seeded(0)))
    assert torch.equal(load_image(tmp_path / "out" / frames[1]), as_saved(made)[0][0])
    write_weights(tmp_path / "1.safetensors", {"w_plus": torch.zeros(3, 5)})
    for path, words in (
        (ends[1], r"\(3, 5\), the generator needs \(4, 5\)"),
        (here / "g.safetensors", r"shape \(0,\)"),
    ):
        with pytest.raises(InputError, match=words):
            main(flags(here, "find", tmp_path / "other", "--morph", ends[0], str(path)))


@pytest.mark.parametrize("name, more, words", [
    ("eval", "--network pin", "--network pin: expected g, pinv.*did you mean 'pinv'"),
    ("eval", "--network no_such_module:f", "ModuleNotFoundError"),
    ("eval", "--network tests.test_invert:no_such_factory", "AttributeError"),
    ("eval", "--network tests.test_invert:nothing", "nn.Module with in_shape"),
    ("eval", "--network tests.test_invert:mistaken", "on an input of its in_shape: RuntimeError"),
    ("eval", "--images 1", "one image has no other"),
    ("eval", f"--judge {command.FACES / 'judge.safetensors'}", "64x64 images, g has 8"),
    *(("eval", f"--{flag} none.safetensors", "none.safetensors") for flag in ("data", "spnn", "theta", "judge")),
    ("find", "--weights none.pt", "none.pt: no such file"),
    ("find", "--spaces w+ w", "from z to w to w"),
    ("find", "--spaces v", "must be one of z, w, w"),
    ("find", "--network g", "gives no image"),
    ("find", "--morph one.safetensors", "takes two latents, got 1"),
    ("find", "--morph one.safetensors two.safetensors", "one.safetensors: no such file"),
    ("find", "--data no_such_image.png", "no_such_image.png"),
])  # fmt: skip
def test_mistakes_are_one_line(here, tmp_path, name, more, words):
    with pytest.raises(InputError, match=words) as raised:
        main(flags(here, name, tmp_path / "out", *more.split()))
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()  # refused before anything is written
