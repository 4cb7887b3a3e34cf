"""Saving and loading an SPNN with its architecture beside the weights."""

import json

import pytest
import torch
from helpers import diy12, random, randomise, seeded, tiny

from checkpoints import load_spnn, read_config, recognise, save_spnn
from models import SPNN
from utils import InputError


@pytest.fixture
def model() -> SPNN:
    return randomise(tiny(), seeded(0))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("build", [tiny, diy12], ids=lambda build: build.__name__)
def test_round_trip(tmp_path, build, suffix):
    model = randomise(build(), seeded(0))
    path, typical = tmp_path / "new" / f"best_model{suffix}", [[-2.0, 3.0]] * model.num_classes
    save_spnn(path, model, {"attributes": ["Bald"], "typical_logits": typical})
    loaded, notes = load_spnn(path)
    assert not loaded.training and notes["typical_logits"] == typical
    assert notes["model"] == json.loads(json.dumps(model.config))
    x = random((2, *model.pinn.in_shape), 1, torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x)) and torch.equal(loaded.pinv(model(x)), model.pinv(model(x)))
    assert sorted(p.name for p in path.parent.iterdir()) == [f"best_model{suffix}", "config.json"]


def test_the_weights_are_a_plain_state_dict(tmp_path, model):
    save_spnn(tmp_path / "m.pth", model)
    state = torch.load(tmp_path / "m.pth", weights_only=True)
    assert list(state) == list(model.state_dict())


def test_checkpoints_of_one_run_share_config_json(tmp_path, model):
    for name in ("best_model.pth", "best_model_r_opt_real.pth", "best_model.pth"):
        save_spnn(tmp_path / name, model, {"attributes": ["A", "B", "C"]})
    assert [p.name for p in tmp_path.glob("*.json")] == ["config.json"]


def test_another_network_in_the_folder_keeps_its_settings(tmp_path, model):
    save_spnn(tmp_path / "a.pth", model)
    other = tiny(num_classes=2, mix_type="householder")
    save_spnn(tmp_path / "b.pth", other)
    assert load_spnn(tmp_path / "a.pth")[0].num_classes == 3
    assert load_spnn(tmp_path / "b.pth")[0].num_classes == 2
    save_spnn(tmp_path / "b.pth", model)  # its own JSON, read first, must not stay behind
    assert load_spnn(tmp_path / "b.pth")[0].num_classes == 3
    save_spnn(tmp_path / "c.pth", model, {"attributes": ["A", "B", "C"]})
    assert "attributes" not in load_spnn(tmp_path / "a.pth")[1]


def test_a_file_of_its_own_comes_before_config_json(tmp_path, model):
    save_spnn(tmp_path / "m.pth", model)
    (tmp_path / "config.json").rename(tmp_path / "m.json")
    (tmp_path / "config.json").write_text('{"model": {"img_size": 31}}')
    content, source = read_config(tmp_path / "m.pth")
    assert source.name == "m.json" and content["model"]["img_size"] == 4
    load_spnn(tmp_path / "m.pth")


@pytest.mark.parametrize("img_size", [32, 64, 256])
@pytest.mark.parametrize("mix_type", ["cayley", "householder"])
def test_built_in_architectures_are_recognised(img_size, mix_type):
    """By names and shapes, which tensors on the meta device have too."""
    with torch.device("meta"):
        built = SPNN(num_classes=7, img_size=img_size, mix_type=mix_type)
    assert recognise(built.state_dict()) == built.config


def test_others_are_not_recognised():
    with torch.device("meta"):
        thin = SPNN(hidden=64, img_size=32)
        trimmed = SPNN(img_size=32).state_dict()
    trimmed.pop("pinn.blocks.1.mix.A_unconstrained")
    for state in (thin.state_dict(), trimmed, tiny().state_dict(), {"conv.weight": torch.zeros(3)}):
        assert recognise(state) is None


def test_recognised_weights_load_without_config_json(tmp_path, monkeypatch):
    """The way the published weights come. A thin network stands for them: the real one has 54 M parameters."""
    import checkpoints

    model = randomise(tiny(), seeded(0))
    save_spnn(tmp_path / "m.pth", model)
    (tmp_path / "config.json").write_text('{"model_type": "of some other tool"}')
    monkeypatch.setattr(checkpoints, "recognise", lambda state: model.config)
    loaded, notes = load_spnn(tmp_path / "m.pth")
    assert notes == {"model": model.config} and loaded.num_classes == 3


def test_missing_settings_are_named(tmp_path, model):
    save_spnn(tmp_path / "m.pth", model)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"m\.pth: config\.json is missing"):
        load_spnn(tmp_path / "m.pth")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"attributes": []}', "has no 'model'"),
        ('{"model": {"img_size": 31}}', "img_size 31 has no built-in architecture"),
        ('{"model": {"colour": 3}}', "colour"),
        ('{"model": {"layer_channels": [3], "img_size": 4}}', "block 0"),
        ('{"model": {"img_size": "big"}}', "makes no network"),
        ('{"model": {"layer_channels": 4, "img_size": 4}}', "makes no network"),
    ],
)
def test_bad_settings_are_named(tmp_path, model, text, message):
    save_spnn(tmp_path / "m.pth", model)
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_spnn(tmp_path / "m.pth")
    assert "m.json" in str(error.value)


def test_weights_of_another_network_are_named(tmp_path, model):
    save_spnn(tmp_path / "m.pth", model)
    state = torch.load(tmp_path / "m.pth", weights_only=True)
    torch.save({**state, "pinn.blocks.1.t.net.0.bias": torch.zeros(9)}, tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"pinn\.blocks\.1\.t\.net\.0\.bias has shape \[9\]"):
        load_spnn(tmp_path / "m.pth")
    state.pop("pinn.blocks.1.mix.A_unconstrained")
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"missing pinn\.blocks\.1\.mix\.A_unconstrained"):
        load_spnn(tmp_path / "m.pth")


def test_a_truncated_file_is_named(tmp_path, model):
    for name in ("m.pth", "m.safetensors"):
        path = tmp_path / name
        save_spnn(path, model)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(InputError, match=name):
            load_spnn(path)
    with pytest.raises(InputError, match="no such file"):
        load_spnn(tmp_path / "absent.pth")


def test_a_failed_write_leaves_the_old_files(tmp_path, model):
    path = tmp_path / "m.pth"
    save_spnn(path, model)
    before = path.read_bytes(), (tmp_path / "config.json").read_bytes()
    with pytest.raises(TypeError):
        save_spnn(path, model, {"attributes": object()})
    with pytest.raises(ValueError, match="use .pth or .safetensors"):
        save_spnn(tmp_path / "m.json", model)
    assert (path.read_bytes(), (tmp_path / "config.json").read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "m.pth"]


def test_half_precision_weights_load(tmp_path, model):
    from weights import write_weights

    save_spnn(tmp_path / "m.pth", model)
    write_weights(tmp_path / "m.pth", model.state_dict(), torch.float16)
    loaded, _ = load_spnn(tmp_path / "m.pth")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
