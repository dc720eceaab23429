"""Large files from the web: resumed where they broke off, checked, and never taken for whole when they are not."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import re
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pydantic import Field, field_validator
from rich.progress import Progress, TaskID

from revnets.config.errors import problem
from revnets.config.loader import Strict
from revnets.utils.atomic_files import TEMPORARY, replacing_folder

from .corpus import TranslationError

BLOCK = 1 << 20
DIGITS = {"md5": 32, "sha1": 40, "sha256": 64}


NETWORK = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
)
"""What may pass by itself."""


class Download(Strict):
    """An archive on the web.

    Attributes:
        name: of the file; the last part of the URL unless given.
        checksum: algorithm (md5, sha1, sha256) and hexadecimal digest, as in `md5:d41d8cd98f00b204e9800998ecf8427e`.
        size: bytes, if known.
    """

    url: str
    name: str = ""
    checksum: str | None = None
    size: int | None = Field(default=None, gt=0)

    @field_validator("checksum")
    @classmethod
    def _is_one(cls, text: str | None) -> str | None:
        if text is not None:
            algorithm, _, digest = text.partition(":")
            if len(digest) != DIGITS.get(algorithm) or not re.fullmatch("[0-9a-f]+", digest):
                remedy = "Give " + ", ".join(f"{name}:<{count} digits>" for name, count in DIGITS.items())
                raise problem(f"{text!r} is no checksum", remedy, code="invalid-syntax")
        return text

    @property
    def file(self) -> str:
        return self.name or unquote(Path(urlsplit(self.url).path).name)


def fetch(item: Download, folder: Path, progress: Progress, attempts: int = 5, wait: float = 2.0) -> Path:
    """The file, from the folder if it is there and right, else from the web.

    A download that broke off goes on where it stopped, in this call (with growing pauses of `wait` seconds) or in a
    later one.

    Raises:
        TranslationError: it cannot be had, or is not what the recipe names.
    """
    path = folder / item.file
    task = progress.add_task(item.file, total=item.size)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{item.file}{TEMPORARY}"
        for attempt in range(attempts):
            try:
                _receive(item, partial, progress, task)
                break
            except NETWORK as error:
                final = attempt + 1 == attempts or item.url.startswith("file:")
                if final or (isinstance(error, urllib.error.HTTPError) and error.code < 500):
                    reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
                    raise TranslationError(
                        f"{item.url}: {reason}. Run the command again to go on, or put the file at {path} by hand",
                        code="download-failed",
                    ) from error
                time.sleep(wait * 2**attempt)
        _check(item, partial, progress, task)
        os.replace(partial, path)
    else:
        _check(item, path, progress, task)
    return path


def _receive(item: Download, partial: Path, progress: Progress, task: TaskID) -> None:
    """Append what is missing to the partial file."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(item.url, headers={"User-Agent": "revnets"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is missing; if it is wrong nevertheless, the check will tell
        raise
    with response:
        if "text/html" in response.headers.get("Content-Type", "") and not item.file.endswith((".html", ".htm")):
            raise TranslationError(
                f"{item.url}: the server sends a web page instead of {item.file}. Open the address in a browser, and "
                f"put the file at {partial.with_name(item.file)}",
                code="download-failed",
            )
        if have and response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # the server starts from the beginning
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else item.size
        progress.update(task, total=total, completed=have)
        with open(partial, "ab" if have else "wb") as file:
            while block := response.read(BLOCK):
                file.write(block)
                progress.advance(task, len(block))
            file.flush()
            os.fsync(file.fileno())
            if total is not None and file.tell() < total:
                raise http.client.IncompleteRead(b"", total - file.tell())


def _check(item: Download, path: Path, progress: Progress, task: TaskID) -> None:
    size = path.stat().st_size
    progress.update(task, total=size, completed=size)
    found = None
    if item.checksum is not None:
        algorithm = item.checksum.partition(":")[0]
        with open(path, "rb") as file:
            found = f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
    if found == item.checksum and item.size in (None, size):
        return
    wrong, right = (found, item.checksum) if found != item.checksum else (f"{size} bytes", f"{item.size} bytes")
    if path.name != item.file:  # a partial file can only be made from the beginning; one put there by hand stays
        path.unlink()
    raise TranslationError(
        f"{path.with_name(item.file)}: has {wrong}, the recipe says {right}. Delete it and run again",
        code="checksum-mismatch",
    )


def extract_archive(archive: Path, folder: Path, progress: Progress) -> Path:
    """Unpack a tar archive, compressed or not, into a folder that appears when it is complete.

    Raises:
        TranslationError: the archive is damaged, or would write outside of the folder.
    """
    target = folder / archive.name
    if not target.exists():
        task = progress.add_task(f"unpack {archive.name}", total=archive.stat().st_size)
        try:
            with replacing_folder(target) as partial, open(archive, "rb") as file, tarfile.open(fileobj=file) as tar:
                for member in tar:
                    tar.extract(member, partial, filter="data")
                    progress.update(task, completed=file.tell())
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            reason = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
            raise TranslationError(
                f"{archive}: no archive that can be unpacked ({reason}). Delete it and run again",
                code="damaged-file",
            ) from error
        progress.update(task, completed=archive.stat().st_size)
    return target
