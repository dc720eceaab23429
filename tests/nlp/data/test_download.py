"""Downloads from a local server that can disconnect, restart and send wrong headers."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import socket
import tarfile
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.progress import Progress

from tests.support.errors import raises_error

pytest.importorskip("sacremoses")

from nlp.data import download
from nlp.data.corpus import TranslationError
from nlp.data.download import Download, extract_archive, fetch
from nlp.data.recipe import Recipe
from revnets.config.loader import load
from revnets.utils.file_lock import FileLock

CONTENT = random.Random(0).randbytes(300_007)
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Server(ThreadingHTTPServer):
    """Serves CONTENT.

    Attributes:
        breaks: the lengths at which the next answers break off.
        ranges: whether it can start in the middle.
        moved_to: where it redirects to.
        has_length: whether it says how long an answer is.
        asked: the Range of every request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.breaks: list[int] = []
        self.ranges = True
        self.failures: list[int] = []
        self.asked: list[str | None] = []
        self.moved_to: str | None = None
        self.has_length = True

    def url(self, name: str = "file.bin") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Range"))
        if self.server.moved_to is not None:
            self.send_response(302)
            self.send_header("Location", self.server.moved_to)
            self.end_headers()
            return
        if self.server.failures:
            self.send_error(self.server.failures.pop(0))
            return
        start = int(self.headers["Range"][6:-1]) if self.headers["Range"] and self.server.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        if self.server.has_length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "text/html" if self.path.endswith("page.bin") else "application/octet-stream")
        self.end_headers()
        self.wfile.write(body[: self.server.breaks.pop(0)] if self.server.breaks else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(url: str, folder: Path, attempts: int = 5, **given) -> Path:
    return fetch(Download(url=url, **given), folder, Progress(disable=True), attempts, wait=0)


def test_a_download_is_resumed_until_it_is_complete(server, tmp_path):
    server.breaks = [100_003, 50_021]
    path = get(server.url(), tmp_path / "new", checksum=DIGEST, size=len(CONTENT))
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100003-", "bytes=150024-"]
    assert os.listdir(path.parent) == ["file.bin"]
    get(server.url(), tmp_path / "new", checksum=DIGEST)
    assert len(server.asked) == 3  # already downloaded


def test_a_later_call_resumes(server, tmp_path):
    server.breaks = [100_003]
    with raises_error(TranslationError, code="download-failed", names=[server.url(), str(tmp_path / "file.bin")]):
        get(server.url(), tmp_path, attempts=1)
    assert not (tmp_path / "file.bin").exists()
    assert get(server.url(), tmp_path, attempts=1).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100003-"]


def test_a_server_without_ranges_restarts(server, tmp_path):
    server.breaks, server.ranges = [100_003], False
    assert get(server.url(), tmp_path).read_bytes() == CONTENT


def test_a_download_killed_before_it_got_its_name(server, tmp_path):
    (tmp_path / ".file.bin.partial").write_bytes(CONTENT)
    assert get(server.url(), tmp_path, checksum=DIGEST).read_bytes() == CONTENT


def test_only_temporary_failures_are_retried(server, tmp_path):
    server.failures = [503, 500]
    assert get(server.url(), tmp_path).read_bytes() == CONTENT
    server.failures, server.asked = [404] * 9, []
    with raises_error(TranslationError, code="download-failed", names=["other.bin", "404"]):
        get(server.url("other.bin"), tmp_path)
    assert len(server.asked) == 1


def test_wrong_content_is_refused(server, tmp_path):
    wrong = "md5:" + "0" * 32
    with raises_error(TranslationError, code="checksum-mismatch", names=["file.bin", "md5:", wrong]):
        get(server.url(), tmp_path, checksum=wrong)
    assert os.listdir(tmp_path) == []
    with raises_error(TranslationError, code="checksum-mismatch", names=["300007 bytes", "300008 bytes"]):
        get(server.url(), tmp_path, size=len(CONTENT) + 1)
    (tmp_path / "file.bin").write_bytes(b"by hand")
    with raises_error(TranslationError, code="checksum-mismatch", names=["sha256:", DIGEST]):
        get(server.url(), tmp_path, checksum=DIGEST)
    assert (tmp_path / "file.bin").read_bytes() == b"by hand"


def test_a_web_page_is_no_archive(server, tmp_path):
    with raises_error(TranslationError, code="download-failed", names=["web page", str(tmp_path / "page.bin")]):
        get(server.url("page.bin"), tmp_path)
    assert os.listdir(tmp_path) == []


def test_no_server_and_no_file(tmp_path):
    with raises_error(
        TranslationError, code="download-failed", names=["localhost:1/x", "Connection refused", str(tmp_path)]
    ):
        get("http://localhost:1/x", tmp_path, attempts=2)
    with raises_error(TranslationError, code="download-failed", names=["file:///nowhere/x", "No such file"]):
        get("file:///nowhere/x", tmp_path)
    (tmp_path / "from").write_bytes(CONTENT)
    assert get((tmp_path / "from").as_uri(), tmp_path / "to").read_bytes() == CONTENT


@pytest.mark.parametrize("text", ["abc", "sha256:abc", "crc:00000000", "md5:" + "X" * 32])
def test_a_checksum_in_a_recipe_is_checked(text):
    with raises_error(
        code="invalid-syntax", key="checksum", names=[repr(text), "md5:<32 ", "sha1:<40 ", "sha256:<64 "]
    ):
        load(Download, {"url": "http://x/y", "checksum": text})


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "x",
            "x/y.tgz",
            "/abs/y.tgz",
            "//h/y.tgz",
            "http:",
            "http://",
            "http:///y.tgz",
            "http://[::1",
            "http://h:x/y",
        ),
        *("http://h:99999/y", "http://a b/y", "http://h/a b", "http://h/a\nb", "http://h/\u00e9"),
        *("gopher://h/y", "javascript:alert(1)", "data:text/plain,x", "HTTPX://h/y", "s3://bucket/y", "http://h"),
    ],
)
def test_an_address_in_a_recipe_is_checked(url):
    with raises_error(code="invalid-syntax", key="downloads.0.url", names=" URL"):
        load(Recipe, {**RECIPE, "downloads": [{"url": url, "name": "y"}]})


RECIPE = {"languages": "en-de", "train": ["x.{lang}"], "valid": 1, "test": 1}


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "/abs", "a/b", "a\\b", "..", ".", ".x", "a\nb", "CON", "nul.tgz", "com1", "LPT9.tar.gz"),
        *("C:x", "a*", "a?", "x.", "x ", " x", "x" * 300),
    ],
)
def test_a_name_in_a_recipe_is_checked(name):
    with raises_error(code="invalid-syntax", key="downloads.0.name"):
        load(Recipe, {**RECIPE, "downloads": [{"url": "http://h/y", "name": name}]})


def test_a_name_is_that_of_the_address():
    assert Download(url="http://h/a/b%20c.tgz?q=1#f").file == "b c.tgz"
    with raises_error(code="invalid-syntax", key="url", names="'../x'"):
        load(Download, {"url": "http://h/..%2Fx"})
    with raises_error(code="missing-key", key="url", names="name"):
        load(Download, {"url": "http://h/"})
    with raises_error(code="name-clash", key="downloads", names="A.tgz"):
        load(Recipe, {**RECIPE, "downloads": [{"url": "http://h/A.tgz"}, {"url": "http://g/a.tgz"}]})


@pytest.mark.parametrize("to", ["file:///etc/hostname", "http://[::1", "gopher://h/y", "http://h\u00e9/y"])
def test_a_redirection_to_another_scheme_is_refused(server, tmp_path, to):
    server.moved_to = to
    with raises_error(TranslationError, code="download-failed", names=[server.url(), str(tmp_path / "file.bin")]):
        get(server.url(), tmp_path)
    assert len(server.asked) == 1
    assert os.listdir(tmp_path) == []


def test_more_bytes_than_the_recipe_states_are_refused(server, tmp_path):
    server.has_length = False
    with raises_error(TranslationError, code="checksum-mismatch", names=[server.url(), "1,000 bytes"]):
        get(server.url(), tmp_path, size=1000)
    assert os.listdir(tmp_path) == []
    assert get(server.url(), tmp_path, size=len(CONTENT)).read_bytes() == CONTENT


def test_two_processes_do_not_write_one_download(server, tmp_path):
    with (
        FileLock(tmp_path / ".file.bin.lock"),
        raises_error(TranslationError, code="output-in-use", names=[str(tmp_path / "file.bin")]),
    ):
        get(server.url(), tmp_path)
    assert server.asked == []
    assert get(server.url(), tmp_path).read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["file.bin"]


def test_an_unknown_host_is_not_retried(tmp_path, monkeypatch):
    asked = []

    def unknown(*_args, **_options):
        asked.append(1)
        raise urllib.error.URLError(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", unknown)
    with raises_error(TranslationError, code="download-failed", names="Name or service not known"):
        get("http://nowhere.invalid/x", tmp_path)
    assert len(asked) == 1


def test_archives_that_expand_too_much(tmp_path, monkeypatch):
    """Too many bytes, too many files, and a header that is too large."""
    monkeypatch.setattr(download, "MEMBERS", 20)
    many = archive(tmp_path / "many.tgz", {f"x{number}": b"" for number in range(21)})
    large = tmp_path / "large.tgz"
    with gzip.open(large, "wb") as file:
        file.write(tar_header("x", 1 << 40, tarfile.REGTYPE) + bytes(5000))
    header = tmp_path / "header.tgz"
    with gzip.open(header, "wb") as file:
        file.write(tar_header("x", 3 << 30, tarfile.XHDTYPE) + bytes(5000))
    for path, names in ((many, "20 files"), (large, "1,099,511,627,776 bytes"), (header, "cannot be extracted")):
        with raises_error(TranslationError, code="damaged-file", names=[str(path), names]):
            extract_archive(path, tmp_path / "work", Progress(disable=True))
    assert os.listdir(tmp_path / "work") == []


def tar_header(name: str, size: int, kind: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def archive(path: Path, names: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, data in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", ["a.tgz", "a.tar"])
def test_archives_are_extracted_once_and_completely(tmp_path, name):
    path = archive(tmp_path / name, {"x/one": CONTENT, "two": b"2"})
    folder = extract_archive(path, tmp_path / "work", Progress(disable=True))
    assert (folder / "x" / "one").read_bytes() == CONTENT
    (folder / "two").write_text("kept")
    assert extract_archive(path, tmp_path / "work", Progress(disable=True)) == folder
    assert (folder / "two").read_text() == "kept"


def test_damaged_archives(tmp_path):
    whole = archive(tmp_path / "a.tgz", {"x": CONTENT}).read_bytes()
    for name, data in (("cut.tgz", whole[:-1000]), ("text.tgz", b"<html>"), ("empty.tgz", b"")):
        (tmp_path / name).write_bytes(data)
        with raises_error(TranslationError, code="damaged-file", names=str(tmp_path / name)):
            extract_archive(tmp_path / name, tmp_path / "work", Progress(disable=True))
    evil = archive(tmp_path / "evil.tgz", {"../../outside": b"!"})
    with raises_error(TranslationError, code="damaged-file", names=str(evil)):
        extract_archive(evil, tmp_path / "work", Progress(disable=True))
    assert not (tmp_path / "outside").exists()
    assert os.listdir(tmp_path / "work") == []


def test_null_characters_in_a_recipe_are_refused():
    for key, entry in (
        ("url", {"url": "http://h/\0", "name": "y"}),
        ("name", {"url": "http://h/y", "name": "a\0b"}),
    ):
        with raises_error(code="invalid-encoding", key=f"downloads.0.{key}"):
            load(Recipe, {**RECIPE, "downloads": [entry]})
