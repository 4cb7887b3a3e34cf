"""The reconstruction command, end to end with weights of a few thousand numbers."""

import csv
import gc
import logging
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from helpers import landscape
from PIL import Image
from runs import figures_of, pictures, pixels, randomised, record_of, save_judge, tiny_prior, tiny_spnn

import checkpoints
from blocks import ConvPINNBlock, PixelUnshuffleBlock
from checkpoints import save_spnn
from data_loader import ATTRIBUTES
from DDNM import main as reconstruct
from DDNM.guided_diffusion import ddpm_layout, results
from DDNM.guided_diffusion import inputs as inputs_module
from DDNM.guided_diffusion.guidance import NLBP
from DDNM.guided_diffusion.inputs import image_names
from DDNM.guided_diffusion.prior import Prior, save_prior
from DDNM.guided_diffusion.schedule import Schedule
from judge import Judge
from loop import locked
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
    def run(folder: str = "out", path=None, *flags: str, config=None) -> Path:
        path = assets / "inputs" if path is None else path
        config = assets / "tiny.yml" if config is None else config
        arguments = ["--ni", "--config", str(config), "--path_y", str(path), "--image_folder", folder, *flags]
        assert reconstruct.main(arguments) == 0
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


def refused(said, call, *arguments, **keywords):
    """``call`` refuses with one line that matches ``said``."""
    with pytest.raises(InputError, match=said) as error:
        call(*arguments, **keywords)
    return str(error.value)


# --- Results ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(assets, tmp_path_factory):
    """One run of three inputs with unguided samples beside them."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("finished")
        patch.setattr(reconstruct, "SAMPLES", root)
        arguments = ["--ni", "--config", str(assets / "tiny.yml"), "--path_y", str(assets / "inputs")]
        assert reconstruct.main([*arguments, "--image_folder", "out", "--batch_size", "2", "--base_rate"]) == 0
    return root / "out"


def test_results_have_the_promised_structure(finished, run, preset):
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
    plain = record_of(run(config=preset(judge=None)))
    assert set(plain) == {"settings", "images", "mean"} and plain["mean"]["judge_agreement"] is None


@pytest.mark.parametrize("flags", [(), ("--published_rule", "--nlbp_stop_cond", "0")])
def test_figures_are_measured_on_the_pictures(run, flags):
    """Not on what was clamped to make them."""
    model, folder = tiny_spnn(), run("out", None, *flags)
    for image in record_of(folder)["images"]:
        pair = [pixels(folder / kind / f"{image['name']}.png") for kind in ("input", "reconstruction")]
        original, drawn = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1 for picture in pair)
        with torch.no_grad():
            target, logits = model(original.float()), model(drawn.float())
        assert image["psnr"] == pytest.approx(10 * math.log10(4 / (original - drawn).square().mean().item()), abs=1e-3)
        error = (target.sigmoid() - logits.sigmoid()).abs().mean().item()
        assert image["prob_error"] == pytest.approx(error, abs=1e-5)


def test_inputs_and_reconstructions_are_there_as_pictures(finished, assets):
    assert set(pictures(finished)) == {
        f"{kind}/{name}.png" for kind in ("input", "reconstruction", "unguided") for name in ("red", "green", "blue")
    }
    for name in ("red", "green", "blue"):
        assert (pixels(finished / "input" / f"{name}.png") == pixels(assets / "inputs" / f"{name}.png")).all()
        assert pixels(finished / "reconstruction" / f"{name}.png").shape == (16, 16, 3)
    assert {p.name for p in finished.iterdir() if p.is_file()} == {
        "results.json", "results.csv", "logits.csv", "sheet.png", "log.txt", "progress.jsonl",
    }  # fmt: skip


def test_the_sheet_has_a_row_for_every_input(finished):
    sheet = pixels(finished / "sheet.png")
    rows = []
    for colour in ((20, 20, 210), (20, 200, 20), (220, 20, 20)):  # in the order of the names
        where = np.nonzero((sheet[:, 96] == colour).all(1))[0]  # a column of pixels through the inputs
        assert len(where) > 100 and where[-1] - where[0] == len(where) - 1
        rows.append(where[0])
    assert rows == sorted(rows) and rows[1] - rows[0] == rows[2] - rows[1] > 160


def test_a_long_sheet_goes_on_on_further_pages(tmp_path):
    rows = [[results.picture(None, 160), results.picture(torch.zeros(3, 8, 8), 160)]] * 23
    pages = results.write_sheet(tmp_path, ["input", "drawn"], rows, ["caption"] * len(rows), ATTRIBUTES)
    assert [page.name for page in pages] == ["sheet.png", "sheet_2.png", "sheet_3.png"]
    heights = [Image.open(page).height for page in pages]
    assert heights[0] == heights[1] > heights[2]


def test_a_network_of_few_attributes_works_too(run, preset, tmp_path):
    save_spnn(tmp_path / "few.pth", tiny_spnn(7), {"attributes": list("abcdefg")})
    folder = run("few", None, "--set", "c=+4", config=preset(spnn=str(tmp_path / "few.pth"), judge=None))
    rows = list(csv.DictReader(open(folder / "logits.csv")))
    assert list(rows[0]) == ["name", *"abcdefg"] and all(float(row["c"]) == 4 for row in rows)


@pytest.mark.parametrize("spec", ["sr4", "inpaint:MASK*grey"])
def test_another_operator_takes_the_place_of_the_attributes(run, preset, tmp_path, spec):
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    Image.fromarray(mask.byte().mul(255).numpy()).save(tmp_path / "mask.png")
    spec, config = spec.replace("MASK", str(tmp_path / "mask.png")), preset(spnn=None)  # needs none
    folder = run("out", None, "--operator", spec, "--base_rate", config=config)
    record = record_of(folder)
    assert record["settings"]["guidance"] == "linear"
    assert all(image["consistency"] < 1e-6 and image["agreement"] is None for image in record["images"])
    assert all(image["consistency"] > 1e-2 for image in record["unguided"]["images"])
    assert not (folder / "logits.csv").exists()
    for kind in ("input", "measured", "reconstruction", "unguided"):
        assert len(list((folder / kind).glob("*.png"))) == 3
    before = pictures(folder)
    run("out", None, "--operator", spec, "--base_rate", "--resume", config=config)
    assert "resumed: 3 are finished" in (folder / "log.txt").read_text()
    assert all((pixels == before[name]).all() for name, pixels in pictures(folder).items())
    noisy = run("noisy", None, "--operator", spec, "--noise", "0.2", config=config)
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
    "said, flags, taken, noted",
    [
        ({"guidance": "gradient"}, ["--operator", "sr4"], "linear", True),  # the preset's is for attributes
        ({"guidance": "gradient", "operator": "sr4"}, [], "gradient", False),
        ({"operator": "sr4"}, [], "linear", False),
        ({"guidance": "gradient"}, ["--operator=sr4", "--guidance", "nlbp+gradient"], "nlbp+gradient", False),
        ({"guidance": "gradient"}, ["--guidance=auto"], "nlbp", False),
        ({}, [], "nlbp", False),
    ],
)
def test_the_rule_that_was_asked_for_is_taken_or_the_log_says_why_not(preset, said, flags, taken, noted):
    config = preset(**{"guidance": None, **said})
    s = reconstruct.parse(["--config", str(config), "--path_y", "x", *flags])
    assert (s.rule.guidance, "--guidance decides" in s.note) == (taken, noted)


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


def test_lpips_is_measured_where_it_can_be_had(run, preset, monkeypatch):
    monkeypatch.setattr(inputs_module, "load_lpips", lambda device, log, size: lambda a, b: (a - b).abs().mean())
    record = record_of(run(config=preset(lpips=True)))
    assert all(image["lpips"] > 0 for image in record["images"]) and record["mean"]["lpips"] > 0


def test_where_lpips_cannot_be_had_the_run_goes_on(run, preset, monkeypatch, caplog):
    folder = run(config=preset(lpips=True))
    assert record_of(folder)["mean"]["lpips"] is None
    assert "no LPIPS: AlexNet sees no image below 31x31, these are 16x16" in (folder / "log.txt").read_text()
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert inputs_module.load_lpips(torch.device("cpu"), logging.getLogger(), 64) is None
    assert "its weights cannot be had" in caplog.text


def test_an_image_whose_gradient_is_not_finite_is_named_and_the_others_go_on(run, monkeypatch):
    whole = run("whole", None, "--guidance", "gradient", "--batch_size", "3")
    honest, green = SPNNOperator.loss, [float(row["Bald"]) for row in csv.DictReader(open(whole / "logits.csv"))][1]

    def loss(self, said, y):
        return torch.where((y[:, ATTRIBUTES.index("Bald")] - green).abs() < 1e-4, math.nan, 1.0) * honest(self, said, y)

    monkeypatch.setattr(SPNNOperator, "loss", loss)
    folder = run("out", None, "--guidance", "gradient", "--batch_size", "3")
    assert "not finite: green;" in (folder / "log.txt").read_text()
    for name, image in zip(("blue", "green", "red"), record_of(folder)["images"], strict=True):
        same = (
            pixels(folder / "reconstruction" / f"{name}.png") == pixels(whole / "reconstruction" / f"{name}.png")
        ).all()
        assert same == (name != "green") == (image["psnr"] is not None) == (image["prob_error"] is not None)
        assert name != "green" or image["agreement"] == 0
    assert Image.open(folder / "sheet.png").height > 500


# --- Targets ---------------------------------------------------------------------------------------------------------


def test_logits_csv_is_the_networks_answer_and_can_be_given_back(run, finished):
    rows = list(csv.DictReader(open(finished / "logits.csv")))
    assert list(rows[0]) == ["name", *ATTRIBUTES] and [row["name"] for row in rows] == ["blue", "green", "red"]
    image = torch.from_numpy(pixels(finished / "input" / "green.png")).permute(2, 0, 1).float() / 127.5 - 1
    with torch.no_grad():
        expected = tiny_spnn()(image[None])[0]
    torch.testing.assert_close(torch.tensor([float(rows[1][a]) for a in ATTRIBUTES]), expected, rtol=1e-4, atol=1e-5)

    again = run("again", finished / "logits.csv", "--batch_size", "2")
    assert (again / "logits.csv").read_text() == (finished / "logits.csv").read_text()
    assert not (again / "input").exists() and (again / "sheet.png").exists()
    with torch.no_grad():  # what there is in the place of an input
        natural = tiny_spnn().pinv(expected[None])[0]
    saved = torch.from_numpy(pixels(again / "natural" / "green.png")).permute(2, 0, 1).float() / 127.5 - 1
    assert (saved - natural.clamp(-1, 1)).abs().max() < 0.02
    for one, other in zip(record_of(again)["images"], record_of(finished)["images"], strict=True):
        assert one["psnr"] is None and one["lpips"] is None
        assert one["prob_error"] == pytest.approx(other["prob_error"], abs=1e-3)
    for name in ("red", "green", "blue"):  # the name seeds the noise: the same picture
        picture = f"reconstruction/{name}.png"
        assert np.abs(pixels(again / picture) - pixels(finished / picture)).max() <= 1


@pytest.mark.parametrize(
    "edit, said",
    [
        (lambda text: text.replace("Smiling", "Smilling"), "unknown column 'Smilling', did you mean 'Smiling'"),
        (lambda text: text.replace("name,", "nom,"), "unknown column 'nom'"),
        (lambda text: text.splitlines()[0], "no rows"),
        (lambda text: "", "no rows"),
        (lambda text: text.replace(text.splitlines()[2].split(",")[5], "nan"), "line 3: a value is not finite"),
        (
            lambda text: text.replace(text.splitlines()[1].split(",")[7], "much"),
            "line 2: expected a name and 40 numbers",
        ),
        (lambda text: text.rstrip().rpartition(",")[0], "line 4: expected a name and 40 numbers"),
        (lambda text: text.replace("green", "blue", 1), "line 3: name 'blue' must be a file name, and each one's own"),
    ],
)
def test_a_table_of_logits_with_a_mistake_is_refused(run, finished, tmp_path, edit, said):
    table = tmp_path / "edited.csv"
    table.write_text(edit((finished / "logits.csv").read_text()))
    assert "edited.csv" in refused(said, run, "out", table)


def test_set_takes_typical_logits_for_0_and_1_and_logits_as_they_are(run, finished):
    wanted = {"Smiling": ("1", 3.5), "Eyeglasses": ("0", -2.5), "Bald": ("+4", 4.0), "Young": ("-0.5", -0.5)}
    flags = [word for name, (value, _) in wanted.items() for word in ("--set", f"{name}={value}")]
    folder = run("out", None, "--batch_size", "2", *flags)
    rows, before = (list(csv.DictReader(open(path / "logits.csv"))) for path in (folder, finished))
    for row, old in zip(rows, before, strict=True):
        assert {key: float(row[key]) for key in row if row[key] != old[key]} == {k: v for k, (_, v) in wanted.items()}
    assert any((pictures(folder)[name] != pictures(finished)[name]).any() for name in pictures(folder))


def test_what_contradicts_a_set_follows_and_the_log_says_so(run, preset, tmp_path):
    notes = {"attributes": list(ATTRIBUTES), "typical_logits": [[-90.0, 90.0]] * 40}
    notes["contradictions"] = {"Bald=1": {"Bangs=0": 0.0}}
    save_spnn(tmp_path / "odd.pth", tiny_spnn(), notes)
    bangs = {}
    for share in ("0", "0.3"):
        flags = ("--set", "Bald=1", "--contradiction", share)
        folder = run(share, None, *flags, config=preset(spnn=str(tmp_path / "odd.pth")))
        bangs[share] = {float(row["Bangs"]) for row in csv.DictReader(open(folder / "logits.csv"))}
    assert max(bangs["0"]) < 90 and bangs["0.3"] == {90.0}
    assert "what contradicts it: Bangs (" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    "assignment, said",
    [
        ("Smilng=1", "no attribute 'Smilng', did you mean 'Smiling'"),
        ("smiling=1", "no attribute 'smiling', did you mean 'Smiling'"),
        ("Smiling=maybe", "'maybe' is neither 0, 1 nor a logit"),
        ("Smiling=nan", "'nan' is neither 0, 1 nor a logit"),
        ("Smiling=inf", "'inf' is neither"),
        ("Smiling=", "'' is neither"),
        ("Smiling", "expected NAME=VALUE"),
    ],
)
def test_a_set_that_makes_no_sense_is_refused(run, samples, assignment, said):
    refused(said, run, "out", None, "--set", assignment)
    assert not samples.exists()


def test_set_without_typical_logits_asks_for_one(run, preset, tmp_path):
    save_spnn(tmp_path / "plain.pth", tiny_spnn(), {"attributes": list(ATTRIBUTES)})
    config = preset(spnn=str(tmp_path / "plain.pth"))
    refused(r"record no typical logits.*Smiling=\+4", run, "out", None, "--set", "Smiling=1", config=config)
    run("out", None, "--set", "Smiling=+1", config=config)


# --- Inputs ----------------------------------------------------------------------------------------------------------


def names_of(folder):
    return [image["name"] for image in record_of(folder)["images"]]


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
    refused("cut.png: cannot read image", run, "strict", folder, "--strict")
    (folder / "good.png").unlink()
    refused("none of its 2 images can be read", run, "none", folder)


# --- Sampling --------------------------------------------------------------------------------------------------------


def test_without_guidance_the_pictures_are_the_base_rate(run, finished):
    plain = run("plain", None, "--guidance", "none", "--batch_size", "2", "--base_rate")
    assert set(record_of(plain)) == {"settings", "images", "mean"}
    for name in ("red", "green", "blue"):
        drawn = pixels(plain / "reconstruction" / f"{name}.png")
        assert (drawn == pixels(finished / "unguided" / f"{name}.png")).all()
        assert (drawn != pixels(finished / "reconstruction" / f"{name}.png")).any()
    unguided = [{k: v for k, v in i.items() if k != "seconds"} for i in record_of(finished)["unguided"]["images"]]
    assert figures_of(plain) == unguided


def test_a_seed_repeats_and_another_differs(run, finished):
    again = run("again", None, "--batch_size", "2", "--base_rate")
    assert figures_of(again) == figures_of(finished)
    one, other = pictures(again), pictures(finished)
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    zero = run("zero", None, "--seed", "0")
    assert record_of(zero)["images"][0]["seed"] == 0
    assert figures_of(zero)[0]["prob_error"] != figures_of(finished)[0]["prob_error"]


def test_results_do_not_depend_on_the_batch_size(run, finished):
    for size in ("1", "5"):
        folder = run(f"of_{size}", None, "--batch_size", size)
        for one, other in zip(figures_of(folder), figures_of(finished), strict=True):
            for key in ("prob_error", "psnr"):
                assert one[key] == pytest.approx(other[key], rel=1e-3)
        for name in ("red", "green", "blue"):
            picture = f"reconstruction/{name}.png"
            assert np.abs(pixels(folder / picture) - pixels(finished / picture)).max() <= 1


def test_settings_reach_the_sampler(run, monkeypatch):
    calls, honest = [], reconstruct.sample

    def sample(*arguments, **settings):
        calls.append((arguments[-1], settings))
        return honest(*arguments, **settings)

    monkeypatch.setattr(reconstruct, "sample", sample)
    flags = "--lambda1 0.7 --lambda2 0.3 --min_bp_step 400 --nlbp_stop_cond 0.2 --no-clip_x0 --max_move 0 --eta 0.5"
    folder = run("out", None, *flags.split(), *"--steps 4 --travel_length 2 --travel_repeat 2".split())
    rule, settings = calls[0]
    assert (rule.lambda1, rule.lambda2, rule.min_bp_step, rule.nlbp_stop_cond) == (0.7, 0.3, 400, 0.2)
    assert settings["clip_x0"] is False and rule.max_move is None
    assert settings["eta"] == 0.5 and settings["travel_length"] == settings["travel_repeat"] == 2
    settings = record_of(folder)["settings"]
    assert settings["lambda1"] == 0.7 and settings["clip_x0"] is False and settings["eta"] == 0.5
    assert record_of(folder)["images"][0]["steps"] == 6  # 3 2 1 0 . . 1 0 -1: the jump costs two more


def test_compile_on_a_cpu_draws_the_same_pictures(run):
    pytest.importorskip("openvino")
    plain, compiled = run("plain"), run("out", None, "--compile")
    for name, picture in pictures(plain).items():
        assert np.abs(pictures(compiled)[name] - picture).max() <= 1


# --- Result folder ---------------------------------------------------------------------------------------------------


def test_results_are_kept_unless_overwriting_and_foreign_files_always(run, assets):
    folder = run()
    mine = [folder / "mine.txt", folder / "sheet_of_mine.png", folder / "input" / "mine.jpg"]
    for path in mine:
        path.write_text("keep")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused("not empty; give --overwrite", run)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "sheet_2.png").write_bytes(b"of an earlier, longer run")
    run("out", assets / "inputs" / "red.png", "--overwrite", "--steps", "1")
    assert names_of(folder) == ["red"] and {path.name for path in folder.glob("*/*.png")} == {"red.png"}
    assert [path.read_text() for path in mine] == ["keep"] * 3
    assert not (folder / "sheet_2.png").exists()


def test_results_may_be_drawn_anew_from_their_own_logits(run):
    """The inputs lie in the folder that is about to be overwritten: they are read first."""
    folder = run("out", None, "--steps", "1")
    before = (folder / "logits.csv").read_text()
    run("out", folder / "logits.csv", "--overwrite", "--steps", "1")
    assert (folder / "logits.csv").read_text() == before


def test_out_takes_a_folder_anywhere_under_the_same_protections(assets, samples, tmp_path):
    arguments = ["--ni", "--config", str(assets / "tiny.yml"), "--path_y", str(assets / "inputs"), "--steps", "1"]
    arguments += ["--out", str(tmp_path / "a" / "b")]
    assert reconstruct.main(arguments) == 0 and not samples.exists()
    assert (tmp_path / "a" / "b" / "results.json").is_file()
    refused("not empty; give --overwrite or --resume", reconstruct.main, arguments)
    (tmp_path / "file").write_text("mine")
    refused("File exists", reconstruct.main, [*arguments[:-1], str(tmp_path / "file")])
    refused("must be inside", reconstruct.main, [*arguments[:-2], "--image_folder", "../outside"])


def test_a_mistake_costs_no_results(run, preset, tmp_path):
    """--overwrite replaces results by results, not by an error message."""
    folder = run("out", None, "--steps", "1")
    before = sorted(path.name for path in folder.rglob("*"))
    save_prior(Prior(tiny_prior().unet, schedule=Schedule(num_diffusion_timesteps=50)), tmp_path / "short")
    for said, flags, changes in (
        ("did you mean 'Smiling'", ["--set", "Smilng=1"], {}),
        ("none.pth", [], {"spnn": "none.pth"}),
        ("--steps 60", ["--steps", "60"], {"prior": str(tmp_path / "short")}),
        ("linear operators", ["--guidance", "linear"], {}),
    ):
        refused(said, run, "out", None, "--overwrite", *flags, config=preset(**changes))
        assert before == sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("flags", ["--eta 0.5", "--max_move=0.1", "--guidance gradient"])
def test_the_published_rule_and_another_exclude_each_other(flags):
    arguments = ["--config", "faces.yml", "--path_y", "x", "--published_rule"]
    refused("--published_rule: .*; leave out one of the two", reconstruct.parse, [*arguments, *flags.split()])
    assert reconstruct.parse([*arguments, "--guidance", "none"]).rule.guidance == "none"


@pytest.mark.parametrize("answer, kept", [("y", False), ("", True), ("no", True)])
def test_without_ni_a_terminal_is_asked(assets, samples, monkeypatch, answer, kept):
    (samples / "out").mkdir(parents=True)
    (samples / "out" / "sheet.png").write_text("old")
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or answer)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": staticmethod(lambda: True)}))
    arguments = ["--config", str(assets / "tiny.yml"), "--path_y", str(assets / "inputs"), "--image_folder", "out"]
    arguments += ["--steps", "1"]
    if kept:
        refused("not empty", reconstruct.main, arguments)
        assert (samples / "out" / "sheet.png").read_text() == "old"
    else:
        assert reconstruct.main(arguments) == 0 and (samples / "out" / "results.json").is_file()
    assert len(asked) == 1
    refused("not empty", reconstruct.main, [*arguments, "--ni"])
    assert len(asked) == 1


# --- Resume ----------------------------------------------------------------------------------------------------------


def tables_of(folder):
    """The results but for the time they took."""
    record = record_of(folder)
    parts = [record["images"], record.get("unguided", {"images": []})["images"]]
    figures = [[{key: value for key, value in i.items() if key != "seconds"} for i in part] for part in parts]
    return figures, (folder / "logits.csv").read_text()


def stopping_at(monkeypatch, call, signum=None):
    """Make the sampler's n-th call send a signal in its midst; without one, break it. Returns the names drawn."""
    names, calls, honest = [], [], reconstruct.sample
    generator = reconstruct.image_generator
    monkeypatch.setattr(reconstruct, "image_generator", lambda seed, name: names.append(name) or generator(seed, name))

    def sample(*arguments, **settings):
        calls.append(1)
        if len(calls) == call:
            if signum is None:
                raise MemoryError
            os.kill(os.getpid(), signum)
        return honest(*arguments, **settings)

    monkeypatch.setattr(reconstruct, "sample", sample)
    return names


@pytest.fixture
def command(assets):
    def command(folder: str, *flags: str) -> int:
        arguments = ["--ni", "--config", str(assets / "tiny.yml"), "--path_y", str(assets / "inputs")]
        return reconstruct.main([*arguments, "--image_folder", folder, "--batch_size", "2", "--base_rate", *flags])

    return command


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_writes_its_results_and_goes_on(command, samples, finished, monkeypatch, signum):
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        stopping_at(patch, 1, signum)
        assert command("out") == 128 + signum
    assert signal.getsignal(signum) == before
    folder = samples / "out"
    assert names_of(folder) == ["blue", "green"] and (folder / "sheet.png").is_file()  # the batch was finished
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.png")}
    assert len(kept) == 6
    with monkeypatch.context() as patch:
        drawn = stopping_at(patch, 0)
        assert command("out", "--resume") == 0
    assert drawn == ["red", "red"]  # guided and unguided
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert tables_of(folder) == tables_of(finished)
    for path in ("sheet.png", *(f"reconstruction/{name}.png" for name in ("red", "green", "blue"))):
        if path != "sheet.png":  # its captions hold seconds
            assert (folder / path).read_bytes() == (finished / path).read_bytes()
    assert pixels(folder / "sheet.png").shape == pixels(finished / "sheet.png").shape
    assert {p.name for p in folder.iterdir()} == {p.name for p in finished.iterdir()}


def test_a_run_that_breaks_is_resumed_without_its_cut_line(command, samples, finished, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        stopping_at(patch, 3)
        command("out")
    folder = samples / "out"
    assert not (folder / "results.json").exists()
    with open(folder / "progress.jsonl", "a") as file:
        file.write('{"name": "red", "pic')
    (folder / "reconstruction" / ".red.png.abcd_123.png").write_bytes(b"half a pict")
    refused("not empty; give --overwrite or --resume", command, "out")
    assert command("out", "--resume") == 0
    assert tables_of(folder) == tables_of(finished)
    assert not list(folder.rglob(".*")) and len((folder / "progress.jsonl").read_text().splitlines()) == 4


def test_a_picture_that_is_damaged_or_gone_is_drawn_again(command, samples, finished, monkeypatch):
    assert command("out") == 0
    folder = samples / "out"
    path = folder / "reconstruction" / "green.png"
    path.write_bytes(path.read_bytes()[:-20])
    (folder / "unguided" / "red.png").unlink()
    with monkeypatch.context() as patch:
        drawn = stopping_at(patch, 0)
        assert command("out", "--resume") == 0
    assert drawn == ["blue", "green"] * 2 + ["red"] * 2  # with those they share a batch with: rounding stays the same
    assert tables_of(folder) == tables_of(finished)
    for name, picture in pictures(finished).items():
        assert (pictures(folder)[name] == picture).all()
    with monkeypatch.context() as patch:
        drawn = stopping_at(patch, 0)
        assert command("out", "--resume") == 0
    assert drawn == []


def test_an_input_that_changed_is_drawn_again(assets, samples, tmp_path, monkeypatch):
    shutil.copytree(assets / "inputs", tmp_path / "inputs")
    arguments = ["--ni", "--config", str(assets / "tiny.yml"), "--path_y", str(tmp_path / "inputs")]
    arguments += ["--image_folder", "out"]
    assert reconstruct.main(arguments) == 0
    Image.new("RGB", (16, 16), "yellow").save(tmp_path / "inputs" / "green.png")
    Image.new("RGB", (16, 16), "white").save(tmp_path / "inputs" / "white.png")
    drawn = stopping_at(monkeypatch, 0)
    assert reconstruct.main([*arguments, "--resume"]) == 0
    assert drawn == ["green", "white"]
    assert names_of(samples / "out") == ["blue", "green", "red", "white"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--steps", "2"], "has steps 3, not 2"),
        (["--seed", "1"], "has seed 1234, not 1"),
        (["--no-clip_x0"], "has clip_x0 True, not False"),
        (["--no-base_rate"], "has base_rate True, not False"),
        (["--overwrite"], "exclude each other"),
    ],
)
def test_a_resume_with_another_setting_names_it(command, samples, finished, flags, said):
    shutil.copytree(finished, samples / "out")
    refused(said, command, "out", "--resume", *flags)
    assert tables_of(samples / "out") == tables_of(finished)


def test_a_resume_with_other_weights_names_them(assets, samples, finished, preset, tmp_path):
    shutil.copytree(finished, samples / "out")
    other = randomised(tiny_spnn(), seed=5)
    save_spnn(tmp_path / "other.pth", other, {"attributes": list(ATTRIBUTES), "typical_logits": [[-2.5, 3.5]] * 40})
    config = str(preset(spnn=str(tmp_path / "other.pth")))
    arguments = ["--ni", "--config", config, "--path_y", str(assets / "inputs"), "--image_folder", "out", "--base_rate"]
    refused("has spnn weights [0-9a-f]{16}, not", reconstruct.main, [*arguments, "--resume"])


@pytest.mark.parametrize("content", ["", '{"settings": 3}\n', "\xff"])
def test_a_record_that_is_none_is_one_line(command, samples, content):
    (samples / "out").mkdir(parents=True)
    (samples / "out" / "progress.jsonl").write_text(content, encoding="latin-1")
    refused("progress.jsonl: damaged", command, "out", "--resume")


def test_resume_begins_where_there_is_nothing_and_keeps_what_is_not_its_own(command, samples, finished):
    assert command("out", "--resume") == 0
    assert tables_of(samples / "out") == tables_of(finished)
    (samples / "mine").mkdir()
    (samples / "mine" / "notes.txt").write_text("keep")
    refused("not empty; give --overwrite or another", command, "mine", "--resume")


def test_a_second_run_into_one_folder_is_refused(command, samples, finished):
    """Its own process: a lock does not keep out the process that holds it."""
    context = multiprocessing.get_context("fork")
    held = context.Event()

    def hold():
        with locked((samples / "out").resolve()):
            held.set()
            time.sleep(600)

    other = context.Process(target=hold, daemon=True)
    other.start()
    try:
        assert held.wait(60)
        refused(f"another run is writing there .process {other.pid}", command, "out", "--overwrite")
    finally:
        other.kill()
        other.join()
    assert command("out") == 0  # it ended with its process
    assert tables_of(samples / "out") == tables_of(finished)


# --- Many images -----------------------------------------------------------------------------------------------------


def usage(size: int) -> tuple[float, int, int]:
    """Resident memory in MiB, open files, and pictures of this size that are held."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.shape[-3:] == (3, size, size):
            held[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes() // (4 * 3 * size**2)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")), sum(held.values())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_images(run, preset, samples, tmp_path, monkeypatch, count):
    """Before: the inputs and the pictures of a whole run, 24 KiB an image at this size. Now: its figures, 1 KiB or so.

    The allocator keeps what it likes, so memory is compared between the third batch and the last, and tells at many
    images only; the number of pictures that are held tells at few.
    """
    size, chain = 32, [
        (PixelUnshuffleBlock, {"r": 4}),
        (ConvPINNBlock, {"in_ch": 48, "out_ch": 1, "hidden": 4, "feat_size": 8}),
        (PixelUnshuffleBlock, {"r": 8}),
        (ConvPINNBlock, {"in_ch": 64, "out_ch": 40, "hidden": 8, "feat_size": 1}),
    ]  # fmt: skip
    save_spnn(tmp_path / "s.pth", randomised(SPNN(num_classes=40, img_size=size, layer_channels=chain)),
              {"attributes": list(ATTRIBUTES)})  # fmt: skip
    save_prior(tiny_prior(size), tmp_path / "p")
    (tmp_path / "many").mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "many" / f"{i}.png")
    batch, seen, honest = 25, [], reconstruct.sample

    def sample(*arguments, **settings):
        seen.append(usage(size))
        return honest(*arguments, **settings)

    monkeypatch.setattr(reconstruct, "sample", sample)
    config = preset(spnn=str(tmp_path / "s.pth"), prior=str(tmp_path / "p"), judge=None, steps=1)
    folder = run("out", tmp_path / "many", "--batch_size", str(batch), config=config)
    assert len(record_of(folder)["images"]) == count == len(list(folder.glob("reconstruction/*.png")))
    assert len(list(folder.glob("sheet*.png"))) == 10 and "first 100 of" in (folder / "log.txt").read_text()
    assert len(seen) == count // batch and seen[-1][1:] == seen[2][1:] and seen[2][2] >= batch
    grown = seen[-1][0] - seen[2][0]
    print(f"{count} images: {grown:.1f} MiB more at the last batch than at the third")
    assert count < 1000 or grown < 4 + 3 * count / 1024


# --- Configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"lamda1": 1.0}, "unknown key 'lamda1', did you mean 'lambda1'"),
        ({"guidance": "ddrm"}, "no rule 'ddrm'; known are none, nlbp"),
        ({"device": "cuda"}, "--device cuda: 0 CUDA devices found"),
        ({"spnn": None}, "--spnn: give the weights"),
        ({"prior": None}, "--prior: give the weights"),
        *(({key: "nowhere.safetensors"}, "nowhere.safetensors") for key in ("spnn", "prior", "judge")),
    ],
)
def test_a_config_with_a_mistake_is_one_line(run, preset, samples, monkeypatch, changes, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "\n" not in refused(said, run, config=preset(**changes)) and not samples.exists()


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


@pytest.fixture
def nothing_local(monkeypatch, tmp_path):
    """The published weights, at manual paths where there is nothing."""
    moved = [replace(k, manual_path=str(tmp_path / "manual" / k.filename)) for k in checkpoints.KNOWN]
    monkeypatch.setattr(checkpoints, "KNOWN", moved)
    return moved


def known_for(known, filename):
    return next(k for k in known if k.filename == filename)


def test_missing_weights_are_named_all_at_once_with_addresses_and_places(run, nothing_local):
    message = refused("2 weight files could not be found", run, config="celeba_hq.yml")
    for name in ("spnn_celebahq_256.pth", "celeba_hq.ckpt"):
        known = known_for(nothing_local, name)
        assert known.name in message and name in message and known.manual_path in message
        assert all(address in message for address in known.mirrors)
        if known.sha256 is not None:
            assert known.sha256 in message
    assert "https://huggingface.co/yamitehr/SPNN" in message


def test_networks_that_do_not_fit_are_refused(run, preset, tmp_path):
    save_prior(tiny_prior(8), tmp_path / "small")
    refused("draws 8x8", run, config=preset(prior=str(tmp_path / "small")))
    refused("draws 16x16 images, not 8", run, config=preset(prior_image_size=8))
    for judge, said in ((Judge(40, 8, 4), "the judge takes 8x8 images, not 16x16"), (Judge(7, 16, 4), "attributes")):
        save_judge(tmp_path / "judge.safetensors", judge)
        refused(said, run, config=preset(judge=str(tmp_path / "judge.safetensors")))
    save_spnn(tmp_path / "few.pth", tiny_spnn(7))
    refused("does not name its 7 attributes", run, config=preset(spnn=str(tmp_path / "few.pth"), judge=None))


DDPM = {
    "type": "simple", "ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3,
    "out_ch": 3, "dropout": 0.0, "resamp_with_conv": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def ddpm_weights(tmp_path_factory):
    """A weight file in the published layout."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, tensor in ddpm_layout.ddpm_unet(DDPM, 16).state_dict().items():
        shape = list(tensor.shape) + [1, 1] * (".attentions." in name and tensor.ndim == 2)
        published = ddpm_layout.ddpm_name(name, len(DDPM["ch_mult"]))
        state[published] = torch.randn(shape, generator=generator) * 0.05
    path = tmp_path_factory.mktemp("ddpm") / "prior.ckpt"
    torch.save(state, path)
    assert "temb.dense.0.weight" in state and state["mid.attn_1.q.weight"].ndim == 4
    return path


def test_a_prior_in_the_published_layout(run, preset, ddpm_weights):
    config = preset(prior=str(ddpm_weights), prior_model=DDPM, prior_image_size=16)
    folder = run(config=config)
    assert record_of(folder)["settings"]["prior_model"] == DDPM
    record = record_of(run("bf16", None, "--precision", "bf16", "--steps", "1", config=config))
    assert record["settings"]["precision"] == "bf16"


@pytest.mark.parametrize(
    "model, said",
    [
        ({**DDPM, "ch_mult": [1, 2]}, "do not fit"),
        ({key: value for key, value in DDPM.items() if key != "ch"}, "'ch'"),
        ({**DDPM, "ch": 20}, "prior"),
    ],
)
def test_a_prior_that_does_not_fit_its_configuration_is_refused(run, preset, ddpm_weights, model, said):
    refused(said, run, config=preset(prior=str(ddpm_weights), prior_model=model))


# --- The command itself ----------------------------------------------------------------------------------------------


def test_the_command_runs_from_the_root_and_from_its_own_folder():
    commands = [
        (".", "DDNM/main.py --help"),
        ("DDNM", "main.py --ni --config nope.yml --path_y nowhere"),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, *line.split()], cwd=ROOT / at, **pipes) for at, line in commands]
    (help, _, well), (shown, said, status) = [(*process.communicate(), process.returncode) for process in started]
    assert well == 0 and "--path_y" in help and "--nlbp_stop_cond" in help
    lines = said.strip().splitlines()
    assert status == 2 and not shown
    assert len(lines) == 1 and lines[0].startswith("error: --config nope.yml")
