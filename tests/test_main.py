"""The reconstruction command, end to end with weights of a few thousand numbers."""

import csv
import gc
import itertools
import logging
import math
import os
import runpy
import shutil
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub
import layout
import numpy as np
import pytest
import torch
import yaml
from helpers import landscape, refused
from PIL import Image
from runs import figures_of, on_sampling, pictures, pixels, randomised, record_of, save_judge, tiny_prior, tiny_spnn

from blocks import ConvPINNBlock, PixelUnshuffleBlock
from checkpoints import save_spnn
from data_loader import ATTRIBUTES
from DDNM import main as reconstruct
from DDNM.guided_diffusion import inputs as inputs_module
from DDNM.guided_diffusion import results
from DDNM.guided_diffusion.guidance import NLBP
from DDNM.guided_diffusion.inputs import image_names
from DDNM.guided_diffusion.prior import Prior, save_prior
from DDNM.guided_diffusion.schedule import Schedule
from judge import Judge
from models import SPNN
from operators import SPNNOperator
from utils import InputError

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("agreement", "judge_agreement", "prob_error", "psnr", "consistency", "lpips", "seconds", "steps", "seed")


@pytest.fixture(autouse=True)
def samples(tmp_path, monkeypatch):
    """Results go below the test's own folder, and nothing asks the network."""

    monkeypatch.setattr(reconstruct, "SAMPLES", tmp_path / "image_samples")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "image_samples"


@pytest.fixture
def run(assets, samples):
    def run(folder: str = "out", path=None, *flags: str, config=None, status: int = 0) -> Path:
        arguments = ["--ni", "--config", str(config or assets / "tiny.yml"), "--image_folder", folder, *flags]
        assert reconstruct.main([*arguments, "--path_y", str(path or assets / "inputs")]) == status
        return samples / folder

    return run


@pytest.fixture
def preset(assets, tmp_path):
    """A config file with some settings changed; None leaves one out."""

    def preset(**changes):
        settings = {**yaml.safe_load((assets / "tiny.yml").read_text()), **changes}
        path = tmp_path / "changed.yml"
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return path

    return preset


def tensor(path) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels(path)).permute(2, 0, 1)[None].float() / 127.5 - 1


def names_of(folder):
    return [image["name"] for image in record_of(folder)["images"]]


def logits_of(folder):
    """The rows of logits.csv: attribute -> number as text."""
    return list(csv.DictReader(open(folder / "logits.csv")))


def tables_of(folder):
    """The results but for the time they took."""
    unguided = [{k: v for k, v in i.items() if k != "seconds"} for i in record_of(folder)["unguided"]["images"]]
    return figures_of(folder), unguided, (folder / "logits.csv").read_text()


def assert_same(folder, other):
    """But for the time it took."""
    assert tables_of(folder) == tables_of(other)
    assert {p.name for p in folder.iterdir()} == {p.name for p in other.iterdir()}
    one, two = pictures(folder), pictures(other)
    assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


def stopping_at(monkeypatch, call, signum=None):
    """Make the sampler's n-th call send a signal in its midst; without one, break it. Returns the names drawn."""
    names, calls, generator = [], itertools.count(1), results.image_generator
    monkeypatch.setattr(results, "image_generator", lambda seed, name: names.append(name) or generator(seed, name))

    def stop(*_, **__):
        if next(calls) == call:
            if signum is None:
                raise MemoryError
            os.kill(os.getpid(), signum)

    on_sampling(monkeypatch, stop)
    return names


# --- Results ---------------------------------------------------------------------------------------------------------


BOTH = ("--batch_size", "2", "--base_rate")


@pytest.fixture(scope="module")
def finished(assets, tmp_path_factory):
    """One run of three inputs with unguided samples beside them."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("finished")
        patch.setattr(reconstruct, "SAMPLES", root)
        arguments = ["--ni", "--config", str(assets / "tiny.yml"), "--path_y", str(assets / "inputs")]
        assert reconstruct.main([*arguments, "--image_folder", "out", *BOTH]) == 0
    return root / "out"


def test_results_have_the_promised_structure(finished):
    record = record_of(finished)
    assert set(record) == {"settings", "images", "mean", "unguided"} and record["settings"]["batch_size"] == 2
    for part in (record, record["unguided"]):
        assert [image["name"] for image in part["images"]] == ["blue", "green", "red"]
        assert all(image["lpips"] is None for image in part["images"]) and part["mean"]["lpips"] is None
        for image in part["images"]:
            assert set(image) == {"name", *FIGURES}
            assert all(0 <= image[key] <= 1 for key in ("agreement", "judge_agreement", "prob_error"))
            assert math.isfinite(image["psnr"]) and image["seconds"] > 0
            assert image["steps"] == 3 and image["seed"] == 1234
        for key in FIGURES[:4]:
            assert part["mean"][key] == pytest.approx(sum(image[key] for image in part["images"]) / 3)
    assert record["mean"]["prob_error"] < record["unguided"]["mean"]["prob_error"]
    for row, image in zip(csv.DictReader(open(finished / "results.csv")), record["images"], strict=True):
        assert row == {key: "" if value is None else str(value) for key, value in image.items()}


def test_figures_are_measured_on_the_pictures(run, finished):
    """Not on what was clamped to make them."""
    model = tiny_spnn()
    for folder in (finished, run("out", None, "--published_rule", "--nlbp_stop_cond", "0")):
        for image in record_of(folder)["images"]:
            original, drawn = (tensor(folder / kind / f"{image['name']}.png") for kind in ("input", "reconstruction"))
            with torch.no_grad():
                error = (model(original).sigmoid() - model(drawn).sigmoid()).abs().mean().item()
            assert image["psnr"] == pytest.approx(10 * math.log10(4 / (original - drawn).square().mean()), abs=1e-3)
            assert image["prob_error"] == pytest.approx(error, abs=1e-5)


def test_inputs_and_reconstructions_are_there_as_pictures_and_in_rows_of_the_sheet(finished, assets):
    names, kinds = ("red", "green", "blue"), ("input", "reconstruction", "unguided")
    assert set(pictures(finished)) == {f"{kind}/{name}.png" for kind in kinds for name in names}
    for name in names:
        assert (pixels(finished / "input" / f"{name}.png") == pixels(assets / "inputs" / f"{name}.png")).all()
    files = {"results.json", "results.csv", "logits.csv", "sheet.png", "log.txt", "progress.jsonl"}
    assert {p.name for p in finished.iterdir() if p.is_file()} == files
    column, rows = pixels(finished / "sheet.png")[:, 96], []  # through the inputs
    for colour in ((20, 20, 210), (20, 200, 20), (220, 20, 20)):  # in the order of the names
        where = np.nonzero((column == colour).all(1))[0]
        assert len(where) > 100 and where[-1] - where[0] == len(where) - 1
        rows.append(where[0])
    assert rows[1] - rows[0] == rows[2] - rows[1] > 160


def test_a_network_of_few_attributes_works_too_and_without_a_judge(run, preset, tmp_path):
    save_spnn(tmp_path / "few.pth", tiny_spnn(7), {"attributes": list("abcdefg")})
    folder = run("few", None, "--set", "c=+4", config=preset(spnn=str(tmp_path / "few.pth"), judge=None))
    rows = logits_of(folder)
    assert list(rows[0]) == ["name", *"abcdefg"] and all(float(row["c"]) == 4 for row in rows)
    record = record_of(folder)
    assert set(record) == {"settings", "images", "mean"} and record["mean"]["judge_agreement"] is None


def test_another_operator_takes_the_place_of_the_attributes(run, preset, tmp_path):
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    Image.fromarray(mask.byte().mul(255).numpy()).save(tmp_path / "mask.png")
    flags, config = ("--operator", f"inpaint:{tmp_path}/mask.png*grey", "--base_rate"), preset(spnn=None)
    folder = run("out", None, *flags, config=config)
    record = record_of(folder)
    assert record["settings"]["guidance"] == "linear"
    assert all(image["consistency"] < 1e-6 and image["agreement"] is None for image in record["images"])
    assert all(image["consistency"] > 1e-2 for image in record["unguided"]["images"])
    assert not (folder / "logits.csv").exists()
    for kind in ("input", "measured", "reconstruction", "unguided"):
        assert len(list((folder / kind).glob("*.png"))) == 3
    run("out", None, *flags, "--resume", config=config)
    assert "resumed: 3 are finished" in (folder / "log.txt").read_text()
    noisy = run("noisy", None, *flags, "--noise", "0.2", config=config)
    assert all(image["consistency"] > 1e-3 for image in record_of(noisy)["images"])


def test_a_network_that_was_fitted_to_a_measurement_is_an_operator_too(run, preset, tmp_path):
    chain = [(PixelUnshuffleBlock, {"r": 2}), (ConvPINNBlock, {"in_ch": 12, "out_ch": 3, "hidden": 8})]
    save_spnn(tmp_path / "lens.pth", randomised(SPNN(3, 3, img_size=16, layer_channels=chain)), {})
    flags = ("--operator", str(tmp_path / "lens.pth"), "--base_rate", "--max_move", "0")
    record = record_of(run("out", None, *flags, config=preset(spnn=None)))
    assert record["settings"]["guidance"] == "nlbp"
    for image, unguided in zip(record["images"], record["unguided"]["images"], strict=True):
        assert image["consistency"] < unguided["consistency"] / 2
    save_spnn(tmp_path / "attributes.pth", tiny_spnn(), {})
    refused(r"takes \(3, 16, 16\) to \(40,\), not \(3, 16, 16\) to a picture", run, "other", None,
            "--operator", str(tmp_path / "attributes.pth"))  # fmt: skip


@pytest.mark.parametrize(
    "said, flags, taken",
    [
        ({"guidance": "gradient"}, "--operator sr4", "linear"),  # the preset's is for attributes
        ({"guidance": "gradient", "operator": "sr4"}, "", "gradient"),
        ({"operator": "sr4"}, "", "linear"),
        ({"guidance": "gradient"}, "--operator=sr4 --guidance nlbp+gradient", "nlbp+gradient"),
        ({"guidance": "gradient"}, "--guidance=auto", "nlbp"),
        ({}, "", "nlbp"),
    ],
)
def test_the_rule_is_the_one_for_what_is_measured(preset, said, flags, taken):
    config = preset(**{"guidance": None, **said})
    assert reconstruct.parse(["--config", str(config), "--path_y", "x", *flags.split()]).rule.guidance == taken


def test_what_an_operator_cannot_do_is_refused(run, preset, tmp_path):
    (tmp_path / "table.csv").write_text("name")
    for said, flags in {
        "sr3: .* must divide the size": ("--operator", "sr3"),
        "--noise: needs --operator": ("--noise", "0.1"),
        "--eta above 0": ("--operator", "sr4", "--noise", "0.1", "--eta", "0"),
        "no attribute 'Smiling'": ("--operator", "sr4", "--set", "Smiling=1"),
    }.items():
        refused(said, run, "out", None, *flags)
    refused("a table holds logits", run, "out", tmp_path / "table.csv", "--operator", "sr4")
    refused("--align: .*table.csv is a table", run, "out", tmp_path / "table.csv", "--align")
    save_spnn(tmp_path / "map.pth", landscape(), {})
    refused(r"attributes are logits \(4,\), its are \(4, 3, 2\)", run, config=preset(spnn=str(tmp_path / "map.pth")))


def test_lpips_is_measured_where_it_can_be_had_else_the_run_goes_on(run, preset, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "lpips", None)
    for size, said in ((16, "sees no image below 31x31, these are 16x16"), (64, "its weights cannot be had")):
        assert inputs_module.load_lpips(torch.device("cpu"), logging.getLogger(), size) is None and said in caplog.text
    monkeypatch.setattr(inputs_module, "load_lpips", lambda device, log, size: lambda a, b: (a - b).abs().mean())
    record = record_of(run("with", config=preset(lpips=True)))
    assert all(image["lpips"] > 0 for image in record["images"]) and record["mean"]["lpips"] > 0


def test_an_image_whose_gradient_is_not_finite_is_named_and_the_others_go_on(run, monkeypatch):
    whole = run("whole", None, "--guidance", "gradient", "--batch_size", "3")
    honest, green = SPNNOperator.loss, [float(row["Bald"]) for row in logits_of(whole)][1]

    def loss(self, said, y):
        return torch.where((y[:, ATTRIBUTES.index("Bald")] - green).abs() < 1e-4, math.nan, 1.0) * honest(self, said, y)

    monkeypatch.setattr(SPNNOperator, "loss", loss)
    folder = run("out", None, "--guidance", "gradient", "--batch_size", "3")
    assert ": not finite: green;" in (folder / "log.txt").read_text()
    for name, image in zip(("blue", "green", "red"), record_of(folder)["images"], strict=True):
        same = torch.equal(*(tensor(of / "reconstruction" / f"{name}.png") for of in (folder, whole)))
        assert same == (name != "green") == (image["psnr"] is not None) == (image["prob_error"] is not None)
        assert name != "green" or image["agreement"] == 0
    assert Image.open(folder / "sheet.png").height > 500


# --- Targets ---------------------------------------------------------------------------------------------------------


def test_logits_csv_is_the_networks_answer_and_can_be_given_back(run, finished):
    rows = logits_of(finished)
    assert list(rows[0]) == ["name", *ATTRIBUTES] and [row["name"] for row in rows] == ["blue", "green", "red"]
    with torch.no_grad():
        expected = tiny_spnn()(tensor(finished / "input" / "green.png"))[0]
    torch.testing.assert_close(torch.tensor([float(rows[1][a]) for a in ATTRIBUTES]), expected, rtol=1e-4, atol=1e-5)

    again = run("again", finished / "logits.csv", "--batch_size", "2")
    assert logits_of(again) == rows
    assert not (again / "input").exists() and (again / "sheet.png").exists()
    with torch.no_grad():  # what there is in the place of an input
        natural = tiny_spnn().pinv(expected[None])[0]
    assert (tensor(again / "natural" / "green.png") - natural.clamp(-1, 1)).abs().max() < 0.02
    assert all(image["psnr"] is None for image in record_of(again)["images"])
    for name in ("red", "green", "blue"):  # the name seeds the noise: the same picture
        picture = f"reconstruction/{name}.png"
        assert np.abs(pixels(again / picture) - pixels(finished / picture)).max() <= 1


def test_what_contradicts_a_set_follows_and_the_log_says_so(run, preset, tmp_path):
    notes = {"attributes": list(ATTRIBUTES), "typical_logits": [[-90.0, 90.0]] * 40}
    notes["contradictions"] = {"Bald=1": {"Bangs=0": 0.0}}
    save_spnn(tmp_path / "odd.pth", tiny_spnn(), notes)
    flags = ("--set", "Bald=1", "--contradiction", "0.3", "--steps", "1")
    folder = run("out", None, *flags, config=preset(spnn=str(tmp_path / "odd.pth")))
    assert {float(row["Bangs"]) for row in logits_of(folder)} == {90.0}
    assert "what contradicts it: Bangs (" in (folder / "log.txt").read_text()


# --- Inputs ----------------------------------------------------------------------------------------------------------


def test_a_name_under_exp_datasets(run, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs_module, "DATASETS", tmp_path / "datasets")
    data = tmp_path / "datasets" / "some_faces" / "face"
    data.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(data / "7.png")
    assert names_of(run("out", "some_faces")) == ["face__7"]
    refused(r"--path_y other_faces: no such.*some_faces", run, "out2", "other_faces")


def test_names_stay_apart_however_files_are_called(tmp_path):
    files = ["a/b.png", "a__b.png", "a/c.png", "a/c.jpg", "a__c.png", "d.png", "d.jpg", "d.png.png"]
    paths = [tmp_path / file for file in files]
    assert len(set(image_names(paths, tmp_path))) == len(files)


def test_a_broken_picture_is_skipped_and_named_or_refused(run, assets, tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    whole = (assets / "inputs" / "red.png").read_bytes()
    (folder / "good.png").write_bytes(whole)
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "fake.jpg").write_text("no picture")
    result = run("out", folder)
    assert names_of(result) == ["good"]
    log = (result / "log.txt").read_text()
    assert "cut.png" in log and "fake.jpg" in log
    refused("cannot read image", run, "strict", folder, "--strict")
    (folder / "good.png").unlink()
    refused("none of its 2 images can be read", run, "none", folder)


# --- Sampling --------------------------------------------------------------------------------------------------------


def test_without_guidance_the_pictures_are_the_base_rate(run, finished):
    plain = run("plain", None, "--guidance", "none", *BOTH)
    assert set(record_of(plain)) == {"settings", "images", "mean"}
    for name in ("red", "green", "blue"):
        drawn = pixels(plain / "reconstruction" / f"{name}.png")
        assert (drawn == pixels(finished / "unguided" / f"{name}.png")).all()
        assert (drawn != pixels(finished / "reconstruction" / f"{name}.png")).any()
    assert figures_of(plain) == tables_of(finished)[1]


def test_results_do_not_depend_on_the_batch_size_but_on_the_seed(run, finished):
    folder, zero = run("one", None, "--batch_size", "1"), run("zero", None, "--seed", "0")
    assert figures_of(zero)[0]["seed"] == 0
    assert figures_of(zero)[0]["prob_error"] != figures_of(finished)[0]["prob_error"]
    for one, other in zip(figures_of(folder), figures_of(finished), strict=True):
        assert all(one[key] == pytest.approx(other[key], rel=1e-3) for key in ("prob_error", "psnr"))
    expected = pictures(finished)
    assert all(np.abs(picture - expected[name]).max() <= 1 for name, picture in pictures(folder).items())


def test_settings_reach_the_sampler(run, monkeypatch):
    calls = []
    on_sampling(monkeypatch, lambda *arguments, **settings: calls.append((arguments, settings)))
    flags = "--lambda1 0.7 --lambda2 0.3 --min_bp_step 400 --nlbp_stop_cond 0.2 --no-clip_x0 --max_move 0 --eta 0.5"
    folder = run("out", None, *flags.split(), *"--steps 4 --travel_length 2 --travel_repeat 2".split())
    (*_, operator, _, rule), settings = calls[0]
    assert not any(weight.requires_grad for weight in operator.model.parameters())
    assert rule == NLBP(0.7, 0.3, 400, 0.2, None)
    assert settings == {"steps": 4, "clip_x0": False, "eta": 0.5, "travel_length": 2, "travel_repeat": 2}
    settings = record_of(folder)["settings"]
    assert settings["lambda1"] == 0.7 and settings["clip_x0"] is False and settings["eta"] == 0.5
    assert record_of(folder)["images"][0]["steps"] == 6  # 3 2 1 0 . . 1 0 -1: the jump costs two more


def test_compile_on_a_cpu_is_openvinos(run, monkeypatch):
    compiled = []
    monkeypatch.setattr(inputs_module, "compile_for_cpu", compiled.append)
    run("out", None, "--compile", "--steps", "1")
    assert len(compiled) == 1 and isinstance(compiled[0], Prior)


# --- Result folder ---------------------------------------------------------------------------------------------------


def test_results_are_kept_unless_overwriting_and_foreign_files_always(run, assets, samples, finished):
    folder = shutil.copytree(finished, samples / "out")
    mine = [folder / "mine.txt", folder / "sheet_2.png", folder / "input" / "mine.jpg"]
    for path in mine:
        path.write_text("keep")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused("not empty; give --overwrite", run)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run("out", assets / "inputs" / "red.png", "--overwrite", "--steps", "1")
    assert names_of(folder) == ["red"] and {path.name for path in folder.glob("*/*.png")} == {"red.png"}
    assert [path.read_text() for path in mine] == ["keep"] * 3
    logits = (folder / "logits.csv").read_text()
    run("out", folder / "logits.csv", "--overwrite", "--steps", "1")  # read before it is deleted
    assert (folder / "logits.csv").read_text() == logits


def test_out_takes_a_folder_anywhere_under_the_same_protections(run, samples, tmp_path):
    flags = ["--steps", "1", "--out", str(tmp_path / "a" / "b")]
    run("out", None, *flags)
    assert not samples.exists()
    assert (tmp_path / "a" / "b" / "results.json").is_file()
    refused("not empty; give --overwrite or --resume", run, "out", None, *flags)


def test_a_mistake_costs_no_results(run, preset, samples, finished, tmp_path):
    """--overwrite replaces results by results, not by an error message."""
    folder = shutil.copytree(finished, samples / "out")
    before = sorted(path.name for path in folder.rglob("*"))
    save_prior(Prior(tiny_prior().unet, schedule=Schedule(num_diffusion_timesteps=50)), tmp_path / "short")
    for said, flags, changes in (
        ("did you mean 'Smiling'", ["--set", "Smilng=1"], {}),
        ("none.pth", [], {"spnn": "none.pth"}),
        ("--steps 60", ["--steps", "60"], {"prior": str(tmp_path / "short")}),
        ("linear operators", ["--guidance", "linear"], {}),
        *((f"--{key}: give the weights", [], {key: None}) for key in ("spnn", "prior")),
        *(("nowhere.safetensors", [], {key: "nowhere.safetensors"}) for key in ("prior", "judge")),
    ):
        refused(said, run, "out", None, "--overwrite", *flags, config=preset(**changes))
        assert before == sorted(path.name for path in folder.rglob("*"))
    refused(said, run, "new", config=preset(**changes))
    assert not (samples / "new").exists()


@pytest.mark.parametrize("flags", ["--eta 0.5", "--max_move=0.1", "--guidance gradient"])
def test_the_published_rule_and_another_exclude_each_other(flags):
    arguments = ["--config", "faces.yml", "--path_y", "x", "--published_rule"]
    refused("--published_rule: .*; leave out one of the two", reconstruct.parse, [*arguments, *flags.split()])
    assert reconstruct.parse([*arguments, "--guidance", "none"]).rule.guidance == "none"


@pytest.mark.parametrize("answer, kept", [("y", False), ("", True)])
def test_without_ni_a_terminal_is_asked(samples, monkeypatch, answer, kept):
    (samples / "out").mkdir(parents=True)
    (samples / "out" / "sheet.png").write_text("old")
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": staticmethod(lambda: True)}))
    for ask, refuses in ((True, kept), (False, True)):
        with pytest.raises(InputError, match="not empty") if refuses else nullcontext():
            results.check_results(samples / "out", False, False, ask)


# --- Resume ----------------------------------------------------------------------------------------------------------


def test_a_stopped_run_writes_its_results_and_goes_on(run, finished, monkeypatch):
    with monkeypatch.context() as patch:
        stopping_at(patch, 1, signal.SIGTERM)
        folder = run("out", None, *BOTH, status=128 + signal.SIGTERM)
    assert names_of(folder) == ["blue", "green"] and (folder / "sheet.png").is_file()  # the batch was finished
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.png")}
    with monkeypatch.context() as patch:  # stopped in the last batch, with which all is done
        drawn = stopping_at(patch, 1, signal.SIGTERM)
        run("out", None, *BOTH, "--resume")
    assert drawn == ["red", "red"]  # guided and unguided
    assert len(kept) == 6 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert_same(folder, finished)


def test_a_run_that_breaks_is_resumed_without_its_cut_line(run, samples, finished, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        stopping_at(patch, 3)
        run("out", None, *BOTH)
    folder = samples / "out"
    assert not (folder / "results.json").exists()
    with open(folder / "progress.jsonl", "a") as file:
        file.write('{"name": "red", "pic')
    (folder / "reconstruction" / ".red.png.abcd_123.png").write_bytes(b"half a pict")
    refused("not empty; give --overwrite or --resume", run, "out", None, *BOTH)
    run("out", None, *BOTH, "--resume")
    assert_same(folder, finished)
    assert not list(folder.rglob(".*")) and len((folder / "progress.jsonl").read_text().splitlines()) == 4


def test_what_changed_or_is_gone_is_drawn_again_with_those_it_shares_a_batch_with(run, assets, samples, tmp_path,
                                                                                   monkeypatch):  # fmt: skip
    inputs, folder = shutil.copytree(assets / "inputs", tmp_path / "inputs"), samples / "out"
    run("out", inputs, *BOTH)
    blue = folder / "reconstruction" / "blue.png"
    before = blue.stat().st_mtime_ns
    (folder / "unguided" / "red.png").unlink()
    Image.new("RGB", (16, 16), "yellow").save(inputs / "green.png")
    for expected in (["blue", "green"] * 2 + ["red"] * 2, []):
        with monkeypatch.context() as patch:
            drawn = stopping_at(patch, 0)
            run("out", inputs, *BOTH, "--resume")
        assert drawn == expected
    assert blue.stat().st_mtime_ns == before and len(pictures(folder)) == 9
    assert (pixels(folder / "input" / "green.png") == (255, 255, 0)).all()


def test_a_resume_with_another_setting_or_other_weights_names_them(run, samples, finished, preset, tmp_path):
    shutil.copytree(finished, samples / "out")
    for flags, said in {
        ("--seed", "1"): "has seed 1234, not 1",
        ("--no-clip_x0",): "has clip_x0 True, not False",
        ("--no-base_rate",): "has base_rate True, not False",
        ("--overwrite",): "exclude each other",
    }.items():
        refused(said, run, "out", None, *BOTH, "--resume", *flags)
    notes = {"attributes": list(ATTRIBUTES), "typical_logits": [[-2.5, 3.5]] * 40}
    save_spnn(tmp_path / "other.pth", randomised(tiny_spnn(), seed=5), notes)
    config = preset(spnn=str(tmp_path / "other.pth"))
    refused("has spnn weights [0-9a-f]{16}, not", run, "out", None, *BOTH, "--resume", config=config)
    assert tables_of(samples / "out") == tables_of(finished)


@pytest.mark.parametrize("file, content, said", [
    ("progress.jsonl", b"", "progress.jsonl: damaged"), ("progress.jsonl", b"\xff", "progress.jsonl: damaged"),
    ("notes.txt", b"keep", "not empty; give --overwrite or another"),
])  # fmt: skip
def test_what_is_no_record_of_a_run_is_not_gone_on_with(run, samples, file, content, said):
    (samples / "out").mkdir(parents=True)
    (samples / "out" / file).write_bytes(content)
    refused(said, run, "out", None, "--resume")
    assert (samples / "out" / file).read_bytes() == content


# --- Many images -----------------------------------------------------------------------------------------------------


def test_no_more_pictures_are_held_the_more_images_there_are(run, preset, tmp_path, monkeypatch):
    """Nor more open files: between the third batch and the last."""
    (tmp_path / "many").mkdir()
    for i in range(12):
        layout.picture(i, 16).save(tmp_path / "many" / f"{i}.png")
    seen, calls = [], itertools.count(1)

    def look(*_, **__):
        if next(calls) in (3, 6):
            tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape[-3:] == (3, 16, 16)]
            held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // (4 * 3 * 16**2) for t in tensors}
            seen.append((sum(held.values()), len(os.listdir("/proc/self/fd"))))

    on_sampling(monkeypatch, look)
    monkeypatch.setattr(results, "SHEET_ROWS", 10)
    folder = run("out", tmp_path / "many", "--batch_size", "2", config=preset(judge=None, steps=1))
    assert len(record_of(folder)["images"]) == 12 == len(list(folder.glob("reconstruction/*.png")))
    assert "first 10 of" in (folder / "log.txt").read_text()
    assert len(seen) == 2 and seen[1] == seen[0] and seen[0][0] >= 2


# --- Configs ---------------------------------------------------------------------------------------------------------


def test_the_shipped_configs_and_the_documented_defaults():
    for name in ("celeba_hq.yml", "celeba_64.yml", "faces.yml"):
        settings = reconstruct.parse(["--config", name, "--path_y", "x"]).flat()
        assert settings["spnn"] and settings["prior"] and settings["image_folder"] == "images"
    published = reconstruct.parse(["--config", "celeba_hq.yml", "--path_y", "x"]).flat()
    documented = {
        "guidance": "nlbp", "min_bp_step": 600, "lambda1": 1.0, "lambda2": 0.5, "nlbp_stop_cond": 0.11, "clip_x0": True,
        "steps": 100, "ni": False, "overwrite": False, "eta": None,
    }  # fmt: skip
    assert {key: published[key] for key in documented} == documented
    letter = reconstruct.parse(["--config", "faces.yml", "--path_y", "x", "--published_rule"])
    rule = letter.rule.build(100)
    assert type(rule) is NLBP and rule.max_move is None and rule.last_bp_step == 0
    assert not letter.walk.clip_x0 and letter.walk.eta is None  # the preset's is 0.5


# --- Weights ---------------------------------------------------------------------------------------------------------


def test_networks_that_do_not_fit_are_refused(run, preset, tmp_path):
    save_prior(tiny_prior(8), tmp_path / "small")
    refused("draws 8x8", run, config=preset(prior=str(tmp_path / "small")))
    refused("draws 16x16 images, not 8", run, config=preset(prior_image_size=8))
    for judge, said in ((Judge(40, 8, 4), "the judge takes 8x8 images, not 16x16"), (Judge(7, 16, 4), "attributes")):
        save_judge(tmp_path / "judge.safetensors", judge)
        refused(said, run, config=preset(judge=str(tmp_path / "judge.safetensors")))
    save_spnn(tmp_path / "few.pth", tiny_spnn(7))
    refused("does not name its 7 attributes", run, config=preset(spnn=str(tmp_path / "few.pth"), judge=None))


# --- The command itself ----------------------------------------------------------------------------------------------


def test_the_command_runs_from_its_own_folder(monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "DDNM")
    monkeypatch.setattr(sys, "argv", "main.py --ni --config nope.yml --path_y nowhere".split())
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(ROOT))])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path("main.py", run_name="__main__")
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("error: --config nope.yml") and said.err.count("\n") == 1
