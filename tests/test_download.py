"""Fetching over HTTP, from a server on the loopback address that does everything wrong that servers do."""

import email.utils
import hashlib
import multiprocessing
import os
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import download
import weights
from download import Unavailable, download_file
from utils import InputError
from weights import KnownWeights, MissingWeights, fetch

CONTENT = bytes(torch.randint(0, 256, (300_000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers by the path's first word; the server remembers every request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status=200, body=b"", cut=None, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        self.close_connection = True

    def ranged(self, content=CONTENT, cut=None, **headers):
        """A server as it should be, which may break off after ``cut`` bytes."""
        wanted = self.headers.get("Range")
        if wanted is not None and self.headers.get("If-Range") in (None, headers.get("ETag")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send(416, Content_Range=f"bytes */{len(content)}")
            where = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.send(206, content[start:], cut, Content_Range=where, **headers)
        return self.send(200, content, cut, **headers)

    def do_GET(self):
        kind, times = self.path.strip("/").split("/")[0], self.server.count(self.path)
        self.server.asked.append((self.path, dict(self.headers)))
        match kind:
            case "good":
                self.ranged(ETag='"one"')
            case "plain":  # no ETag, no date
                self.ranged()
            case "breaks":  # twice, then the rest
                self.ranged(cut=100_000 if times <= 2 else None, ETag='"one"')
            case "breaks-always":
                self.send(200, CONTENT, cut=1000)
            case "changes":  # another file after the first break
                self.ranged(CONTENT if times > 1 else b"old" * 100_000, cut=50_000 if times == 1 else None,
                            ETag='"two"' if times > 1 else '"one"')  # fmt: skip
            case "no-ranges":
                self.send(200, CONTENT, cut=120_000 if times == 1 else None, ETag='"one"')
            case "wrong-range":
                self.send(
                    206 if times > 1 else 200, CONTENT, 9000 if times == 1 else None, Content_Range="bytes 5-9/10"
                )
            case "claims-more":
                self.send(200, CONTENT, length=len(CONTENT) + 5000)
            case "claims-less":
                self.send(200, CONTENT, length=len(CONTENT) - 5000)
            case "no-length":
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(CONTENT)
                self.close_connection = True
            case "huge":
                self.send(200, b"", length=1 << 60)
            case "other":
                self.send(200, b"<html>please sign in</html>")
            case "moved":
                self.send(302, Location="/good/w.pth")
            case "announced":  # as the hub does
                said = DIGEST if "right" in self.path else hashlib.sha256(b"?").hexdigest()
                self.send(302, Location="/plain/w.pth", X_Linked_Etag=f'"{said}"')
            case "loop":
                self.send(302, Location=self.path)
            case "chain":
                self.send(302, Location=f"/chain/{times}/{len(self.server.asked)}")
            case "to-ftp":
                self.send(302, Location="ftp://127.0.0.1/w.pth")
            case "to-file":
                self.send(302, Location="file:///etc/hostname")
            case "busy":  # twice
                self.send(429, Retry_After="7") if times <= 2 else self.ranged()
            case "busy-until":
                self.send(503, Retry_After=email.utils.formatdate(time.time() + 20)) if times == 1 else self.ranged()
            case "busy-for-long":
                self.send(429, Retry_After="86400")
            case "sick":
                self.send(500)
            case "silent":
                threading.Event().wait(1.5)  # time.sleep takes no time here
            case "garbage":
                self.wfile.write(b"\0\1\2 this is no HTTP\r\n\r\n")
                self.close_connection = True
            case _:
                self.send(404)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict]] = []

    def count(self, path):
        return 1 + sum(p == path for p, _ in self.asked)

    def handle_error(self, request, client_address):
        pass  # a client that hangs up early is part of the test

    def ranges(self):
        return [headers.get("Range") for _, headers in self.asked]


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def at(server):
    return lambda path: f"http://127.0.0.1:{server.server_port}/{path}"


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    """Waits take no time, and are remembered."""
    waits: list[float] = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    return waits


@pytest.fixture
def target(tmp_path):
    return tmp_path / "logs" / "w.pth"


def whole(target):
    """The file is there, right, and alone."""
    return target.read_bytes() == CONTENT and os.listdir(target.parent) == [target.name]


def refused(said, addresses, target, sha256=DIGEST):
    with pytest.raises(Unavailable, match=said) as error:
        download_file(addresses, target, sha256)
    assert not target.exists(), "what could not be checked is no file"
    assert list(error.value.reasons) == list(addresses) and "\n" not in str(error.value)
    return error.value.reasons


@pytest.mark.parametrize("sha256", [DIGEST, None], ids=["hash", "no hash"])
@pytest.mark.parametrize("path", ["good/w", "plain/w", "moved/w", "no-length/w", "announced/right"])
def test_a_file_is_fetched_whole(at, target, path, sha256):
    assert download_file([at(path)], target, sha256) == target
    assert whole(target)


@pytest.mark.parametrize("sha256", [DIGEST, None], ids=["hash", "no hash"])
def test_a_connection_that_breaks_off_is_resumed_where_it_broke(server, at, target, sha256):
    download_file([at("breaks/w")], target, sha256)
    assert whole(target) and server.ranges() == [None, "bytes=100000-", "bytes=200000-"]


def test_a_later_call_goes_on_from_what_an_earlier_one_left(server, at, target):
    refused("broke off after 1,000 of 300,000 bytes", [at("breaks-always/w")], target)
    assert target.with_name(".w.pth.part").stat().st_size == 1000
    download_file([at("good/w")], target, DIGEST)  # another address: the hash vouches for the whole
    assert whole(target) and server.ranges()[-1] == "bytes=1000-"


def test_without_a_hash_another_address_starts_anew(server, at, target):
    refused("broke off", [at("breaks-always/w")], target, sha256=None)
    download_file([at("good/w")], target)
    assert whole(target) and server.ranges()[-1] is None


@pytest.mark.parametrize("sha256", [DIGEST, None], ids=["hash", "no hash"])
def test_a_file_that_changes_meanwhile_is_not_mixed(at, target, sha256):
    download_file([at("changes/w")], target, sha256)
    assert whole(target)


@pytest.mark.parametrize("sha256", [DIGEST, None], ids=["hash", "no hash"])
def test_a_server_that_ignores_ranges_restarts_cleanly(server, at, target, sha256):
    download_file([at("no-ranges/w")], target, sha256)
    assert whole(target) and server.ranges() == [None, "bytes=120000-"]


def test_the_start_of_another_file_costs_one_more_request(server, at, target):
    target.parent.mkdir()
    target.with_name(".w.pth.part").write_bytes(b"x" * 5000)
    download_file([at("plain/w")], target, DIGEST)
    assert whole(target) and server.ranges() == ["bytes=5000-", None]


def test_a_part_longer_than_the_file_is_dropped(at, target):
    target.parent.mkdir()
    target.with_name(".w.pth.part").write_bytes(CONTENT + b"more")
    download_file([at("plain/w")], target, DIGEST)
    assert whole(target)


def test_a_length_that_is_a_lie(at, target):
    """Too long: the hash says that the file is whole. Too short: it says that it is not."""
    download_file([at("claims-more/w")], target, DIGEST)
    assert whole(target)
    target.unlink()
    refused("other bytes", [at("claims-less/w")], target)
    assert not os.listdir(target.parent) or os.listdir(target.parent) == [".w.pth.part.json"]
    refused("broke off after 300,000 of 305,000", [at("claims-more/w")], target, sha256=None)


@pytest.mark.parametrize("path, said", [
    ("other/w", r"sent other bytes \(SHA-256 [0-9a-f]{64}, expected"),
    ("nothing/w", "HTTP 404 Not Found"),
    ("loop/w", "HTTP 302 .*infinite loop"),
    ("chain/w", "HTTP 302 .*infinite loop"),
    ("to-file/w", "HTTP 302 .*not allowed"),
    ("to-ftp/w", "redirects from http to ftp"),
    ("wrong-range/w", "another range than asked for"),
    ("huge/w", "more than"),
    ("garbage/w", "broke off: BadStatusLine"),
    ("sick/w", "HTTP 500"),
    ("busy-for-long/w", "HTTP 429"),
    ("breaks-always/w", "broke off after 1,000 of 300,000 bytes"),
])  # fmt: skip
def test_what_is_no_answer_is_named_and_the_next_mirror_is_asked(server, at, target, path, said):
    refused(said, [at(path)], target)
    assert len(server.asked) <= 12, "bounded"
    download_file([at(path), at("good/w")], target, DIGEST)
    assert whole(target)


def test_an_announced_hash_is_checked_where_none_is_known(at, target):
    refused("sent other bytes", [at("announced/wrong")], target, sha256=None)


def test_a_server_that_asks_to_wait_is_left_alone_for_so_long(at, target, slept):
    download_file([at("busy/w")], target, DIGEST)
    assert whole(target) and slept == [7.0, 7.0]
    target.unlink()
    slept.clear()
    download_file([at("busy-until/w")], target, DIGEST)
    assert len(slept) == 1 and 15 <= slept[0] <= 20


def test_waits_are_bounded_and_grow(server, at, target, slept):
    refused("HTTP 429", [at("busy-for-long/w")], target)
    assert slept == [] and len(server.asked) == 1
    refused("HTTP 500", [at("sick/w")], target)
    assert slept == sorted(slept) and len(set(slept)) == len(slept) == download.TRIES - 1


def test_a_server_that_says_nothing_is_left(at, target, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setattr(download, "TRIES", 1)
    refused("timed out", [at("silent/w")], target)


def test_every_address_is_named_with_its_reason(at, target):
    with socket.socket() as free:  # a port where nobody listens
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/w"
    addresses = [at("nothing/w"), closed, "no address", at("other/w")]
    reasons = refused("w.pth cannot be fetched", addresses, target)
    for said, address in zip(("404", "refused", "no address", "other bytes"), addresses, strict=True):
        assert said in reasons[address]


def test_an_endless_answer_does_not_fill_the_disk(at, target, monkeypatch):
    monkeypatch.setattr(download, "LARGEST", 100_000)
    refused("more than 100,000 bytes", [at("no-length/w")], target)


def test_a_proxy_in_the_environment_is_used(server, at, target, monkeypatch):
    monkeypatch.setenv("http_proxy", at(""))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    refused("HTTP 404", ["http://weights.example/good"], target)
    assert server.asked[-1][0].startswith("http://weights.example")  # what a proxy is asked: the whole address


def test_offline_nobody_is_asked(server, at, target, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("HF_HUB_OFFLINE", [at("good/w")], target)
    assert server.asked == []


def test_a_folder_that_cannot_be_written_is_one_line(at, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write") as error:
        download_file([at("good/w")], tmp_path / "file" / "w.pth", DIGEST)
    assert not isinstance(error.value, Unavailable)


def test_a_full_disk_is_not_called_a_network_error(at, target, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_receive", full)
    with pytest.raises(InputError, match="cannot write.*No space left"):
        download_file([at("good/w")], target, DIGEST)


def test_two_processes_do_not_mix_what_they_fetch(server, at, target):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=download_file, args=([at("breaks/w")], target, DIGEST)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0] and whole(target)
    assert sum(headers.get("Range") is None for _, headers in server.asked) == 1, "the second took what the first got"


# --- Known weights ---------------------------------------------------------------------------------------------------


@pytest.fixture
def known(at, monkeypatch):
    """A published file on a hub that is the loopback server, with a mirror."""
    monkeypatch.setenv("HF_ENDPOINT", at("nothing"))
    monkeypatch.setattr(weights, "cached_by_hub", lambda repo, filename: None)
    return KnownWeights("net", "a/b", "w.pth", "logs/w.pth", (at("other/w"), at("good/w")), DIGEST)


def test_known_weights_come_from_the_first_mirror_that_has_them(server, known, tmp_path):
    assert fetch(known, tmp_path) == tmp_path / "logs" / "w.pth"
    assert whole(tmp_path / "logs" / "w.pth")
    assert [path for path, _ in server.asked] == ["/nothing/a/b/resolve/main/w.pth", "/other/w", "/good/w"]
    fetch(known, tmp_path)
    assert len(server.asked) == 3, "what is there is not fetched again"


def test_known_weights_that_cannot_be_had_are_named_with_every_reason(known, tmp_path):
    lost = replace(known, mirrors=known.mirrors[:1])
    with pytest.raises(MissingWeights) as error:
        fetch(lost, tmp_path)
    message = str(error.value)
    for said in ("logs/w.pth", DIGEST, f"{lost.addresses[0]} (HTTP 404", f"{lost.addresses[1]} (sent other bytes"):
        assert said in message
