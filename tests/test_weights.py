"""Reading, writing, converting and fetching weights: round trips, and one clear line for what cannot be read."""

import hashlib
import os

import pytest
import torch
from torch import nn

import weights
from utils import InputError
from weights import KnownWeights, fetch, load_strictly, locate, missing_message, read_weights, write_weights


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=generator).t(),  # not contiguous
        "a.bias": torch.randn(5, generator=generator),
        "count": torch.tensor([7, 8]),
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["w.pth", "w.ckpt", "w.safetensors"])
def test_what_is_written_is_read(tmp_path, state, name):
    write_weights(tmp_path / name, state)
    loaded = read_weights(tmp_path / name)
    assert same(loaded, state) and all(t.is_contiguous() for t in loaded.values())
    assert os.listdir(tmp_path) == [name]


def test_dtype_applies_to_floats_only(tmp_path, state):
    write_weights(tmp_path / "w.safetensors", state, torch.float16)
    loaded = read_weights(tmp_path / "w.safetensors")
    assert loaded["a.bias"].dtype == torch.float16 and loaded["count"].dtype == torch.int64


def test_tensors_that_share_memory_are_written(tmp_path, state):
    write_weights(tmp_path / "w.safetensors", {"a": state["a.bias"], "b": state["a.bias"]})
    assert torch.equal(read_weights(tmp_path / "w.safetensors")["b"], state["a.bias"])


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s, "epoch": 3},
    lambda s: {"state_dict": s},
    lambda s: {"model": s, "optimizer": {"m": torch.ones(1)}},
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
])  # fmt: skip
def test_wrapped_state_dicts_are_unwrapped(tmp_path, state, wrap):
    torch.save(wrap(state), tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), state)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, "w.pth")
    with pytest.raises(InputError, match="w.pth.*would run code"):
        read_weights("w.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_are_one_clear_line(tmp_path, state, suffix, keep):
    path = tmp_path / f"w{suffix}"
    write_weights(path, state)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError, match="w") as caught:
        read_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\x80\x05junk", b"\0" * 64, b"PK\x03\x04 no zip"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_foreign_files_are_one_clear_line(tmp_path, content, suffix):
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(InputError, match=f"w{suffix}"):
        read_weights(tmp_path / f"w{suffix}")


def test_what_is_no_state_dict_is_named(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    two = {"gan": {"w": torch.ones(1)}, "critic": {"w": torch.ones(1)}}
    torch.save(two, tmp_path / "two.pth")
    for name, said in (("list.pth", "list"), ("epoch.pth", "epoch"), ("two.pth", "critic")):
        with pytest.raises(InputError, match=f"{name}: expected a state dict.*{said}"):
            read_weights(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(InputError, match="is a folder"):
        read_weights(tmp_path)


def test_strict_loading_converts_and_names_what_does_not_fit():
    module = nn.Linear(2, 3).double()
    load_strictly(module, {"weight": torch.ones(3, 2).half(), "bias": torch.zeros(3)}, "f.pth")
    assert module.weight.dtype == torch.float64 and (module.weight == 1).all()
    with pytest.raises(InputError, match="f.pth.*missing bias.*unexpected other"):
        load_strictly(module, {"weight": torch.ones(3, 2), "other": torch.ones(1)}, "f.pth")
    with pytest.raises(InputError, match=r"f.pth: weight has shape \[2, 2\].*\[3, 2\]"):
        load_strictly(module, {"weight": torch.ones(2, 2), "bias": torch.zeros(3)}, "f.pth")


def no_connection(repo_id, filename):
    raise ConnectionError("no route to host\nand more")


@pytest.fixture(autouse=True)
def name_server(monkeypatch):
    """Host names resolve, wherever the tests run; nothing connects."""
    monkeypatch.setattr(weights.socket, "getaddrinfo", lambda host, port: [])


def test_without_a_name_server_nothing_is_retried(monkeypatch):
    def no_name(host, port):
        raise OSError("name or service not known")

    monkeypatch.setattr(weights.socket, "getaddrinfo", no_name)
    monkeypatch.setattr(weights, "getproxies", dict)
    with pytest.raises(InputError, match="no connection to"):
        weights.download("someone/model", "w.pth")


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_connection)


def test_locate_takes_a_file_a_folder_or_a_hub_id(tmp_path, monkeypatch):
    import huggingface_hub

    file = tmp_path / "w.pth"
    file.write_bytes(b"x")
    assert locate(file, "other.pth") == file
    assert locate(tmp_path, "w.pth") == file
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, filename: f"{repo_id}:{filename}")
    assert str(locate("someone/model", "w.pth")) == "someone/model:w.pth"
    with pytest.raises(InputError, match="has no other.pth"):
        locate(tmp_path, "other.pth")
    with pytest.raises(InputError, match="not a hub id"):
        locate(tmp_path / "a" / "b" / "c", "w.pth")


@pytest.mark.parametrize("known", weights.KNOWN.values(), ids=lambda known: known.filename)
def test_offline_messages_name_every_address_and_the_manual_path(tmp_path, offline, known, monkeypatch):
    with pytest.raises(InputError, match="someone/model.*no route to host"):
        locate("someone/model", "w.pth")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="someone/model.*HF_HUB_OFFLINE"):
        locate("someone/model", "w.pth")
    with pytest.raises(InputError) as caught:
        fetch(known, root=tmp_path)
    for text in (known.filename, known.manual_path, *known.addresses, "HF_HUB_OFFLINE"):
        assert text in str(caught.value)
    with pytest.raises(InputError, match="celeba/spnn_celebahq_256.pth"):
        locate("yamitehr/SPNN", "spnn_celebahq_256.pth")


@pytest.mark.parametrize("place", ["logs/w.pth", "cache.pth"])
def test_a_file_that_is_there_is_used_and_checked(tmp_path, monkeypatch, place):
    """At its manual path, or in the hub client's cache."""
    content = b"weights"
    known = KnownWeights("net", "a/b", "w.pth", "logs/w.pth", sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(weights, "cached_by_hub", lambda repo, filename: tmp_path / "cache.pth")
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    assert fetch(known, tmp_path) == file
    file.write_bytes(b"Weights")
    with pytest.raises(InputError, match=f"{place}: SHA-256"):
        fetch(known, tmp_path)


def test_missing_message_counts():
    known = list(weights.KNOWN.values())
    assert missing_message({known[0]: {}}).startswith("1 weight file could")
    assert missing_message(dict.fromkeys(known[:2], {})).startswith("2 weight files could")


def test_convert_command(tmp_path, state, capsys):
    write_weights(tmp_path / "a.pth", state)
    arguments = ["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), "--dtype", "float16"]
    assert weights.main(arguments) == 0
    assert "3 tensors" in capsys.readouterr().out
    assert weights.main(["convert", str(tmp_path / "b.safetensors"), str(tmp_path / "c.pth")]) == 0
    torch.testing.assert_close(read_weights(tmp_path / "c.pth")["a.weight"], state["a.weight"].half())
