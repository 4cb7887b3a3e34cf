"""Weights in and out: files of every kind, folders, and a hub on the loopback address."""

import hashlib
import json
import os
import pickle
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from helpers import diy12, random, randomise, refused, seeded, tiny
from torch import nn

import checkpoints
from checkpoints import hub_file, load_strictly, locate, read_weights, save_spnn, write_weights
from models import SPNN
from stylegan import StyleGAN, load_generator
from utils import InputError


@pytest.fixture
def state():
    weight, bias = random((3, 5), 0, torch.float32).t(), random((5,), 1, torch.float32)  # the first is not contiguous
    return {"a.weight": weight, "a.bias": bias, "count": torch.tensor([7, 8])}


@pytest.fixture
def model() -> SPNN:
    return randomise(tiny(), seeded(0))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.ckpt", "w.safetensors"])
def test_what_is_written_is_read(tmp_path, state, name):
    write_weights(tmp_path / name, {**state, "shared": state["a.bias"]})
    loaded = read_weights(tmp_path / name)
    assert same(loaded, {**state, "shared": state["a.bias"]}) and all(t.is_contiguous() for t in loaded.values())
    assert os.listdir(tmp_path) == [name]


def test_the_command_converts_to_half_the_size_or_names_what_that_cannot_hold(tmp_path, state, capsys):
    write_weights(tmp_path / "a.pth", state)
    arguments = ["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), "--dtype", "float16"]
    assert checkpoints.main(arguments) == 0 and "3 tensors" in capsys.readouterr().out
    assert checkpoints.main(["convert", str(tmp_path / "b.safetensors"), str(tmp_path / "c.pth")]) == 0
    loaded = read_weights(tmp_path / "c.pth")
    assert torch.equal(loaded["a.weight"], state["a.weight"].half()) and loaded["count"].dtype == torch.int64
    with pytest.raises(InputError, match="b holds -7e.04, which torch.float16 cannot"):
        write_weights(tmp_path / "x.safetensors", {"b": torch.tensor([1.0, -7e4])}, torch.float16)
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "b.safetensors", "c.pth"]


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s, "epoch": 3},
    lambda s: {"state_dict": s},
    lambda s: {"model": s, "optimizer": {"m": torch.ones(1)}},
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"model._orig_mod.{k}": v for k, v in s.items()}},
    lambda s: {f"_orig_mod.module.{k}".replace("a.", "a._orig_mod."): v for k, v in s.items()},
    lambda s: {"n_averaged": torch.tensor(9), **{f"module.module.{k}": v for k, v in s.items()}},  # AveragedModel's
])  # fmt: skip
def test_wrapped_state_dicts_are_unwrapped(tmp_path, state, wrap):
    for archive in (True, False):  # torch < 1.6 wrote pickles, many published files among them
        torch.save(wrap(state), tmp_path / "w.pth", _use_new_zipfile_serialization=archive)
        assert same(read_weights(tmp_path / "w.pth"), state)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def saved(content, **how):
    return lambda path: torch.save(content, path, **how)


def raw(content: bytes):
    return lambda path: path.write_bytes(content)


CODE = {  # and whether its file would be a harmless one under the other suffix
    "archive": saved({"model": Malicious()}),
    "legacy": saved({"model": Malicious()}, _use_new_zipfile_serialization=False),
    "pickle": raw(pickle.dumps({"model": Malicious()}, protocol=2)),
    "module": saved(nn.Linear(2, 2)),
}
NO_WEIGHTS = {
    **{f"{name}.{suffix}": (write, "damaged, or not a plain state dict") for name, write in CODE.items()
       for suffix in ("pth", "safetensors")},
    **{f"page.{suffix}": (raw(b"<html>404</html>"), "damaged") for suffix in ("pth", "safetensors")},
    "nan.pth": (lambda path: write_weights(path, {"w": torch.tensor([1.0, float("nan")])}), "w holds NaN"),
    "list.pth": (saved([torch.ones(2)]), "found list"),
    "epoch.pth": (saved({"epoch": 3}), "epoch"),
    "two.pth": (saved({"gan": {"w": torch.ones(1)}, "critic": {"w": torch.ones(1)}}), "critic"),
    "complex.pth": (saved({"w": torch.zeros(2, dtype=torch.complex64)}), "no plain tensor"),
    "none.pth": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_WEIGHTS)
@pytest.mark.filterwarnings("ignore")  # torch's own, while the files are written
def test_what_is_no_plain_weight_file_is_one_line_and_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write, said = NO_WEIGHTS[name]
    write(tmp_path / name)
    assert len(refused(f"{name}: .*{said}", read_weights, tmp_path / name)) < 400 + len(name)
    assert not (tmp_path / "pwned").exists()


def test_the_code_above_would_have_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps({"model": Malicious()}, protocol=2))
    assert (tmp_path / "pwned").exists()


def test_strict_loading_converts_and_names_what_does_not_fit():
    module = nn.Linear(2, 3)
    load_strictly(module, {"weight": torch.ones(3, 2).half(), "bias": torch.zeros(3).double()}, "f.pth")
    assert module.weight.dtype == torch.float32 and (module.weight == 1).all()
    for change, said in [
        ({"bias": None, "other": torch.ones(1)}, "f.pth.*Linear: missing bias; unexpected other"),
        ({"weight": torch.ones(2, 2)}, r"f.pth.*weight has shape \[2, 2\].*\[3, 2\]"),
        ({"bias": torch.full((3,), 1e300, dtype=torch.float64)}, r"f.pth: bias holds 1e\+300"),
    ]:
        given = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)} | change
        for target in (module, nn.Linear(2, 3, device="meta")):
            refused(said, load_strictly, target, {k: v for k, v in given.items() if v is not None}, "f.pth")


# --- A network with its settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_with_its_settings_round_trips(tmp_path, suffix):
    model = randomise(diy12(), seeded(0))
    path, notes = tmp_path / "new" / f"best_model{suffix}", {"attributes": ["Bald"], "typical_logits": [[-2.0, 3.0]]}
    for _ in range(2):
        save_spnn(path, model, notes)
    loaded = SPNN.from_pretrained(path)
    assert not loaded.training and loaded.notes == notes and loaded.config == json.loads(json.dumps(model.config))
    x = random((2, *model.pinn.in_shape), 1, torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x)) and torch.equal(loaded.pinv(model(x)), model.pinv(model(x)))
    assert sorted(p.name for p in path.parent.iterdir()) == [f"best_model{suffix}", "config.json"]
    if suffix == ".pth":
        assert list(torch.load(path, weights_only=True)) == list(model.state_dict())


def test_save_pretrained_and_back(tmp_path, model):
    model.notes = {"attributes": ["A", "B", "C"]}
    model.save_pretrained(tmp_path / "a")
    loaded = SPNN.from_pretrained(tmp_path / "a")
    for _ in range(2):
        loaded.save_pretrained(tmp_path / "b")
    again = SPNN.from_pretrained(tmp_path / "b" / "model.safetensors")
    assert same(again.state_dict(), model.state_dict()) and again.notes == model.notes
    assert {"model.safetensors", "config.json"} <= {p.name for p in (tmp_path / "b").iterdir()}
    before = (tmp_path / "b" / "config.json").read_bytes()
    refused("config.json belongs to another network", tiny(num_classes=2).save_pretrained, tmp_path / "b")
    again.notes = {"attributes": torch.ones(3)}
    with pytest.raises(TypeError, match="JSON"):
        again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "config.json").read_bytes() == before


@pytest.mark.parametrize("there", ['{"model": {"num_classes": 2}}', "[1]", "{", '{"model_type": "of another tool"}'])
def test_another_config_in_the_folder_stays(tmp_path, model, there):
    (tmp_path / "config.json").write_text(there)
    save_spnn(tmp_path / "b.pth", model)
    save_spnn(tmp_path / "b.pth", model, {"attributes": ["A", "B", "C"]})  # its own JSON must not stay behind
    assert SPNN.from_pretrained(tmp_path / "b.pth").notes == {"attributes": ["A", "B", "C"]}
    assert (tmp_path / "config.json").read_text() == there


@pytest.mark.parametrize("img_size, mix_type", [(32, "cayley"), (256, "householder")])
def test_published_architectures_are_recognised(img_size, mix_type):
    """By names and shapes, which tensors on the meta device have too."""
    with torch.device("meta"):
        built = SPNN(num_classes=7, img_size=img_size, mix_type=mix_type)
        thin = SPNN(num_classes=7, hidden=64, img_size=img_size)
    assert SPNN.config_of(built.state_dict()) == built.config
    trimmed = dict(list(built.state_dict().items())[1:])
    for other in (thin.state_dict(), trimmed, tiny().state_dict(), {"conv.weight": torch.zeros(3)}):
        assert SPNN.config_of(other) is None


@pytest.mark.parametrize("text, message", [
    (None, r"m\.pth: config\.json is missing"),
    ("{", "m.json: not valid JSON"),
    ("[1]", "m.json: expected a JSON object"),
    ('{"attributes": []}', "m.json: has no 'model'"),
    ('{"model": {"img_size": 31}}', "m.pth.*makes? no network.*img_size 31"),
    ('{"model": {"colour": 3}}', "make no network.*colour"),
    ('{"model": {"layer_channels": [3], "img_size": 4}}', "block 0"),
    ('{"model": {"img_size": 32}}', r"m\.pth.*SPNN: missing pinn.*has shape .*in all"),
    ('{"model": {"img_size": 64, "hidden": 1000000}}', r"m\.pth"),  # known before it costs memory
])  # fmt: skip
def test_bad_settings_are_one_clear_line(tmp_path, model, text, message):
    write_weights(tmp_path / "m.pth", model.state_dict())
    if text is not None:
        (tmp_path / "m.json").write_text(text)
    refused(message, SPNN.from_pretrained, tmp_path / "m.pth")


# --- The hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """A hub on the loopback address that serves the files in a folder: what to give `from_pretrained` besides the id.

    Its ``files`` are the folder, its ``asked`` the requests.
    """

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def translate_path(self, path):
            server.asked.append(path)
            self.file = server.files / path.strip("/").replace("/resolve/main", "")
            return str(self.file)

        def end_headers(self):
            self.send_header("X-Repo-Commit", "a" * 40)
            if self.file.is_file():
                self.send_header("ETag", f'"{hashlib.sha256(self.file.read_bytes()).hexdigest()}"')
            else:
                self.send_header("X-Error-Code", "EntryNotFound" if self.file.parent.is_dir() else "RepoNotFound")
            super().end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked = tmp_path / "hub", []
    server.options = {"endpoint": f"http://127.0.0.1:{server.server_port}", "cache_dir": str(tmp_path / "cache")}
    # huggingface_hub < 1 keeps a connection that was made offline for the rest of the process
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_network_comes_from_the_hub_once(hub, model):
    model.notes = {"attributes": ["A", "B", "C"]}
    model.save_pretrained(hub.files / "me" / "net")
    loaded = SPNN.from_pretrained("me/net", **hub.options)
    assert same(loaded.state_dict(), model.state_dict()) and loaded.notes == model.notes
    asked = len(hub.asked)
    SPNN.from_pretrained("me/net", **hub.options)
    SPNN.from_pretrained("me/net", local_files_only=True, **hub.options)
    assert len(hub.asked) == asked


@pytest.mark.parametrize("source, file", [
    ("me/net", "best_model.pth"), ("yamitehr/SPNN", "spnn_celebahq_256.pth"),
])  # fmt: skip
def test_a_repository_may_hold_published_weights_alone(hub, model, monkeypatch, tmp_path, source, file):
    monkeypatch.setattr(checkpoints, "ROOT", tmp_path)
    monkeypatch.setattr(SPNN, "config_of", lambda state: model.config)  # of the published, the smallest has 66 million
    write_weights(hub.files / source / file, model.state_dict(), torch.float64)
    (hub.files / source / "config.json").write_text('{"model_type": "of another tool"}')
    loaded = SPNN.from_pretrained(source, **hub.options)
    assert same(loaded.state_dict(), model.state_dict()) and loaded.notes == {}
    assert loaded.config == json.loads(json.dumps(model.config))
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    SPNN.from_pretrained(source, local_files_only=True, **hub.options)  # the cache knows what is not there


def test_a_generator_comes_from_the_hub(hub):
    g = StyleGAN(8, (6, 5), dim=4, depth=1)
    write_weights(hub.files / "me" / "faces" / "stylegan.safetensors", g.state_dict())
    assert same(load_generator("me/faces", **hub.options).state_dict(), g.state_dict())
    (hub.files / "me" / "nothing").mkdir()
    with pytest.raises(InputError, match="no folder or hub id with karras2019.*the published weights are"):
        load_generator("me/nothing", **hub.options)


def test_what_the_hub_cannot_give_is_one_clear_line(hub, tmp_path, monkeypatch):
    (hub.files / "me" / "empty").mkdir(parents=True)
    assert hub_file("me/empty", "nothing.json", **hub.options) is None
    nowhere = {**hub.options, "endpoint": "http://127.0.0.1:9", "etag_timeout": 0.1}
    for source, options, said in [
        ("me/empty", hub.options, "me/empty: has none of model.safetensors"),
        ("me/none", hub.options, "me/none: model.safetensors cannot be fetched: RepositoryNotFoundError"),
        ("me/other", {**hub.options, "local_files_only": True}, "not in the cache, and the hub is not asked"),
        (tmp_path / "a" / "b" / "c", {}, "no such file or folder, and not a hub id"),
        (tmp_path, {}, "has none of model.safetensors"),
    ]:
        refused(said, SPNN.from_pretrained, source, **options)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # without the pauses between the client's attempts
    refused("not in the cache, and the hub cannot be reached: ", SPNN.from_pretrained, "me/other", **nowhere)


def test_published_files_that_are_missing_are_named_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(checkpoints, "ROOT", tmp_path)
    assert locate("mine.pth", tmp_path) == ["mine.pth", str(tmp_path)]
    with pytest.raises(InputError) as error:
        locate("yamitehr/SPNN", "mine.pth", "celeba_hq.ckpt")
    message = str(error.value)
    assert message.startswith("2 weight files could not be found") and "OFFLINE" in message
    for known in checkpoints.KNOWN:
        hub = f"https://huggingface.co/{known.repo}/resolve/main/{known.filename}"
        for text in (known.filename, str(tmp_path / known.manual_path), hub, *known.mirrors, known.sha256 or ""):
            assert text in message
    with pytest.raises(InputError, match="^1 weight file could not"):
        SPNN.from_pretrained("yamitehr/SPNN")


def test_a_published_file_that_was_put_by_hand_is_taken_and_its_hash_checked(tmp_path, monkeypatch):
    file = tmp_path / checkpoints.KNOWN[1].manual_path
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    known = replace(checkpoints.KNOWN[1], sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(checkpoints, "ROOT", tmp_path)
    monkeypatch.setattr(checkpoints, "KNOWN", [known])
    assert locate(known.repo, known.filename, known.manual_path) == [str(file)] * 3
    file.write_bytes(b"Weights")
    refused("celeba_hq.ckpt: SHA-256 .*, the published file has", locate, known.filename)
