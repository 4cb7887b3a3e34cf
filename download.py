"""Fetch a file over HTTP: several addresses in turn, resumed where it broke off, checked before it is there.

Proxies come from the environment (``https_proxy``, ``no_proxy``), and so does ``HF_HUB_OFFLINE=1``: ask nobody.
"""

import email.utils
import fcntl
import hashlib
import http.client
import json
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from utils import InputError, unlinked, write_json

TIMEOUT = 30.0  # seconds without a byte
TRIES = 4  # requests to one address without progress
LONGEST_WAIT = 60.0  # seconds; a server that asks for more is left for the next one
LARGEST = 8 << 30  # bytes; an endless answer must not fill the disk
PROGRESS = 1 << 20  # bytes; a request that brought as many counts as no failure
CHUNK = 1 << 18


class Unavailable(InputError):
    """No address gave the file.

    Attributes:
        reasons: address -> why not, one line each.
    """

    def __init__(self, name: str, reasons: Mapping[str, str]) -> None:
        super().__init__(f"{name} cannot be fetched: " + "; ".join(f"{a}: {why}" for a, why in reasons.items()))
        self.reasons = dict(reasons)


class _Failed(Exception):
    """One request failed; ``wait`` is how long its server asked to be left alone, ``final`` that it need not be asked
    again."""

    def __init__(self, reason: str, final: bool = False, wait: float | None = None) -> None:
        super().__init__(reason)
        self.final, self.wait = final, wait


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects (ten at most), but none away from https, and keeps a hash announced on the way."""

    def __init__(self) -> None:
        self.announced: str | None = None

    def redirect_request(self, request, file, code, message, headers, new):
        # the Hugging Face hub names the SHA-256 of a large file in the answer that sends us to its storage
        if found := re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag", "")):
            self.announced = found[1]
        before, after = urlsplit(request.full_url).scheme, urlsplit(new).scheme
        if after not in ("http", "https") or (before, after) == ("https", "http"):
            raise _Failed(f"redirects from {before} to {after}", final=True)
        return super().redirect_request(request, file, code, message, headers, new)


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def offline() -> bool:
    """Whether the environment says to ask nobody, in huggingface_hub's own words."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def download_file(addresses: Sequence[str], target: str | Path, sha256: str | None = None) -> Path:
    """Fetch ``target`` from the first address that gives it.

    What arrives goes to ``.<name>.part`` beside the target and is renamed once it is whole and its hash is right; a
    later call goes on from there. Two processes that fetch into one folder take turns.

    Args:
        addresses: http or https, tried in turn; each several times where trying again may help.
        sha256: what the file must be. None: what the server announces, if anything.

    Returns:
        The target.

    Raises:
        Unavailable: no address gave the file, each with its reason.
        InputError: the folder cannot be written.
    """
    target = Path(target)
    if offline():
        raise Unavailable(target.name, dict.fromkeys(addresses, "not asked, as HF_HUB_OFFLINE is set"))
    reasons: dict[str, str] = {}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(target.parent):
            if target.is_file():  # another process fetched it meanwhile
                return target
            for address in addresses:
                try:
                    _fetch(address, target, sha256)
                    return target
                except _Failed as failure:
                    reasons[address] = str(failure)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error
    raise Unavailable(target.name, reasons)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; where the file system has none, go on without."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _fetch(address: str, target: Path, sha256: str | None) -> None:
    """Fetch ``target`` from one address, trying again while that may help."""
    part, notes = (target.with_name(f".{target.name}{suffix}") for suffix in (".part", ".part.json"))
    if sha256 is None and _noted(notes).get("address") != address:
        part.unlink(missing_ok=True)  # the start of what may be another file
    failures, farthest = 0, _size(part)
    while True:
        before = _size(part)
        try:
            announced = _request(address, part, notes, sha256 is not None)
        except _Failed as failure:
            if sha256 is not None and _size(part) and sha256_of(part) == sha256:
                break  # the server said that there is more; what is here is the file
            failures = 1 if _size(part) - farthest >= PROGRESS else failures + 1
            farthest = max(farthest, _size(part))
            pause = 2.0 ** (failures - 1) if failure.wait is None else failure.wait
            if failure.final or failures >= TRIES or pause > LONGEST_WAIT:
                raise
            time.sleep(pause)
            continue
        expected = sha256 if sha256 is not None else announced
        if expected is None or (found := sha256_of(part)) == expected:
            break
        part.unlink()
        if not before:  # these bytes are all this address's
            raise _Failed(f"sent other bytes (SHA-256 {found}, expected {expected})", final=True)
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    notes.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _noted(notes: Path) -> dict:
    """What is known of a partial file: its address and the server's validator."""
    try:
        noted = json.loads(notes.read_text(encoding="utf-8"))
        return noted if isinstance(noted, dict) else {}
    except (OSError, ValueError):
        return {}


def _request(address: str, part: Path, notes: Path, hash_known: bool) -> str | None:
    """One request, for all of a file or the rest of it, appended to ``part``; the hash that was announced, if any.

    Raises:
        _Failed: the answer is no file, or broke off.
    """
    have, noted = _size(part), _noted(notes)
    validator = noted.get("validator") if noted.get("address") == address else None
    headers = {"User-Agent": "spnn", "Accept-Encoding": "identity"}
    # without a hash to check the whole by, only the server can tell whether the rest still belongs to the start
    if have and (validator is not None or hash_known):
        headers["Range"] = f"bytes={have}-"
        if validator is not None:
            headers["If-Range"] = validator
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)  # proxies as the environment says
    try:
        answer = opener.open(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing lies beyond what is here: too much of it, or another file
            part.unlink(missing_ok=True)
            raise _Failed("has nothing beyond what was fetched before (416)") from None
        again = error.code in (408, 425, 429) or error.code >= 500
        reason = " ".join(str(error.reason).split())[:200]  # of a redirect loop, several lines
        raise _Failed(f"HTTP {error.code} {reason}", final=not again, wait=_retry_after(error.headers)) from None
    except urllib.error.URLError as error:
        final = isinstance(error.reason, (socket.gaierror, ConnectionRefusedError))
        raise _Failed(f"no connection: {error.reason}", final=final) from None
    except (http.client.HTTPException, OSError) as error:
        raise _Failed(f"broke off: {type(error).__name__} {error}".rstrip()) from None
    except ValueError as error:  # an address, or a redirect, that is none
        raise _Failed(f"no address: {error}", final=True) from None
    with answer:
        start = _start(answer, have)
        total = None if answer.length is None else start + answer.length
        if total is not None and total > LARGEST:
            raise _Failed(f"{total:,} bytes, more than {LARGEST:,}", final=True)
        etag = answer.headers.get("ETag", "")
        validator = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
        write_json(notes, {"address": address, "validator": validator})
        _receive(answer, part, start, total)
    return redirects.announced


def _start(answer: http.client.HTTPResponse, have: int) -> int:
    """The position in the file at which an answer starts."""
    if answer.status != 206:
        return 0  # the server knows no ranges, or has another file by now
    span = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    if span is None or int(span[1]) != have:
        raise _Failed("answered with another range than asked for", final=True)
    return have


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read(CHUNK)
    except (http.client.HTTPException, OSError) as error:  # told apart from an error of the disk
        raise _Failed(f"broke off: {type(error).__name__} {error}".rstrip()) from None


def _receive(answer: http.client.HTTPResponse, part: Path, start: int, total: int | None) -> None:
    with (
        open(part, "ab" if start else "wb", opener=unlinked) as file,
        tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem[1:], disable=None) as bar,
    ):
        at = start
        while chunk := _read(answer):
            at += len(chunk)
            if at > LARGEST:
                raise _Failed(f"sent more than {LARGEST:,} bytes", final=True)
            file.write(chunk)
            bar.update(len(chunk))
    if total is not None and at < total:
        raise _Failed(f"broke off after {at:,} of {total:,} bytes")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to be left alone: Retry-After, a number or a date."""
    said = headers.get("Retry-After", "").strip()
    if said.isdecimal():
        return float(said[:9])
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    return None
