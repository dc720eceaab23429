"""Resumable downloads with size and checksum, and safe extraction of archives."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import lzma
import os
import re
import socket
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pydantic import Field, field_validator, model_validator
from rich.markup import escape
from rich.progress import Progress, TaskID

from revnets.config.errors import problem
from revnets.config.loader import Strict
from revnets.utils.atomic_files import TEMPORARY, replacing_folder

from .errors import TranslationError
from .output_folder import sole_writer

BLOCK = 1 << 20
DIGITS = {"md5": 32, "sha1": 40, "sha256": 64}
SCHEMES = ("https", "http", "ftp", "file")
LARGEST = 1 << 38
"""Maximum bytes of a download without a `size`, and of an extracted archive."""

EXPANSION = 200
"""Maximum ratio of extracted to archived bytes, for archives that extract to more than a gigabyte."""

MEMBERS = 100_000
"""Maximum number of files in an archive."""

_NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""File names that Windows reserves."""

NETWORK = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
)
"""Errors that may be temporary."""


class Download(Strict):
    """An archive to download.

    Attributes:
        url: Address with scheme https, http, ftp or file.
        name: File name. By default the last part of the URL.
        checksum: Algorithm (md5, sha1, sha256) and hexadecimal digest, as in `md5:d41d8cd98f00b204e9800998ecf8427e`.
        size: Size in bytes, if known.
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
                raise problem(f"{text!r} is not a checksum", remedy, code="invalid-syntax")
        return text

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        remedy = f"Give a URL such as https://host/file.tgz ({', '.join(SCHEMES)})"
        if not url.isascii() or re.search(r"[\x00-\x20\x7f]", url):
            remedy = "Percent-encode spaces and non-ASCII characters, such as %20"
            raise problem(f"{url!r} is not a URL", remedy, code="invalid-syntax")
        try:
            parts = urlsplit(url)
            known = parts.scheme.lower() in SCHEMES and (bool(parts.hostname) or parts.scheme.lower() == "file")
            _ = parts.port  # access checks it
        except ValueError as error:
            raise problem(f"{url!r} is not a URL ({error})", remedy, code="invalid-syntax") from None
        if not known or not parts.path:
            raise problem(f"{url!r} is not the URL of a file", remedy, code="invalid-syntax")
        return url

    @model_validator(mode="after")
    def _is_file_name(self) -> Download:
        name, key = self.file, "name" if self.name else "url"
        remedy = "Set `name` to a file name without a directory"
        if not name:
            raise problem(f"{self.url!r} does not end with a file name", remedy, key, code="missing-key")
        wrong = _NOT_IN_NAMES.search(name) or _RESERVED.fullmatch(name) or len(os.fsencode(name)) > 200
        if wrong or name.startswith(".") or name.endswith((".", " ")) or name != name.strip():
            raise problem(f"{name!r} is not a valid file name", remedy, key, code="invalid-syntax")
        return self

    @property
    def file(self) -> str:
        """File name of the download."""
        return self.name or unquote(Path(urlsplit(self.url).path).name)


def fetch(item: Download, folder: Path, progress: Progress, attempts: int = 5, wait: float = 2.0) -> Path:
    """Return the path of a file, which is downloaded unless the directory already contains it.

    An interrupted download is resumed, in this call or in a later one.

    Args:
        item: File to download.
        folder: Directory of the download.
        progress: Receives a progress bar.
        attempts: Maximum number of attempts.
        wait: Seconds before the second attempt; every further pause is twice as long.

    Raises:
        TranslationError: If the download fails, if size or checksum differ, or if another process is downloading the
            same file.
    """
    path = folder / item.file
    task = progress.add_task(escape(item.file), total=item.size)
    if not path.exists():
        with sole_writer(path):
            _download(item, path, progress, task, attempts, wait)
    else:
        _check(item, path, progress, task)
    return path


def _download(item: Download, path: Path, progress: Progress, task: TaskID, attempts: int, wait: float) -> None:
    partial = path.with_name(f".{path.name}{TEMPORARY}")
    for attempt in range(attempts):
        try:
            _receive(item, partial, progress, task)
            break
        except TranslationError:
            raise
        except (*NETWORK, ValueError) as error:  # ValueError: a server sent an invalid address or length
            if attempt + 1 == attempts or _is_lasting(item, error):
                reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
                raise TranslationError(
                    f"{item.url}: {reason}. Run the command again to resume, or save the file as {path}",
                    code="download-failed",
                ) from error
            time.sleep(wait * 2**attempt)
    _check(item, partial, progress, task)
    os.replace(partial, path)


def _is_lasting(item: Download, error: Exception) -> bool:
    """Return True if another attempt would fail in the same way."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500
    reason = getattr(error, "reason", error)
    unknown_host = isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME
    return (
        unknown_host or item.url.lower().startswith("file:") or isinstance(error, (ValueError, http.client.InvalidURL))
    )


def _receive(item: Download, partial: Path, progress: Progress, task: TaskID) -> None:
    """Download the missing bytes and append them to the partial file."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(item.url, headers={"User-Agent": "revnets"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # the file is complete; the checksum detects other content
        raise
    with response:
        if "text/html" in response.headers.get("Content-Type", "") and not item.file.endswith((".html", ".htm")):
            raise TranslationError(
                f"{item.url}: the server sent a web page instead of {item.file}. Download the file in a browser and "
                f"save it as {partial.with_name(item.file)}",
                code="download-failed",
            )
        if have and response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # the server starts from the beginning
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else item.size
        progress.update(task, total=total, completed=have)
        with open(partial, "ab" if have else "wb") as file:
            try:
                while block := response.read(BLOCK):
                    if file.tell() + len(block) > (most := item.size or LARGEST):
                        raise _too_large(item, partial, most)
                    file.write(block)
                    progress.advance(task, len(block))
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                    raise
                raise OSError(error.errno, error.strerror, str(partial)) from error
            if total is not None and file.tell() < total:
                raise http.client.IncompleteRead(b"", total - file.tell())


def _too_large(item: Download, partial: Path, most: int) -> TranslationError:
    partial.unlink()
    fix = "the `size` in the recipe. Correct it" if item.size else "the limit for files without a `size`. Set it"
    return TranslationError(f"{item.url}: the server sends more than {most:,} bytes, {fix}", code="checksum-mismatch")


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
    if path.name != item.file:  # only a partial file: keep a file that the user saved
        path.unlink()
    raise TranslationError(
        f"{path.with_name(item.file)}: {wrong}, but the recipe expects {right}. Delete the file and run again",
        code="checksum-mismatch",
    )


_DAMAGE = (
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    OverflowError,
    KeyError,
)
"""Errors raised by reading a damaged archive."""


class _Member(tarfile.TarInfo):
    """An archive member with bounded headers.

    `tarfile` reads long names and other headers into memory without a limit on their declared size.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _HEADERS and member.size > BLOCK:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member


_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def extract_archive(archive: Path, folder: Path, progress: Progress) -> Path:
    """Extract a tar archive, compressed or not, to a directory that appears when it is complete.

    Args:
        archive: File to extract.
        folder: Parent of the new directory, which is named like the archive.
        progress: Receives a progress bar.

    Returns:
        The new directory.

    Raises:
        TranslationError: If the archive is damaged, expands beyond `EXPANSION`, `MEMBERS` or `LARGEST`, or would write
            outside of the directory.
    """
    target = folder / archive.name
    if not target.exists():
        size = archive.stat().st_size
        task = progress.add_task(f"extract {escape(archive.name)}", total=size)
        try:
            with (
                replacing_folder(target) as partial,
                open(archive, "rb") as file,
                tarfile.open(fileobj=file, tarinfo=_Member) as tar,
            ):
                total = 0
                for count, member in enumerate(tar, 1):
                    total += member.size
                    if count > MEMBERS or total > max(1 << 30, min(EXPANSION * size, LARGEST)):
                        raise tarfile.ReadError(f"more than {count - 1:,} files or {total:,} bytes in {size:,}")
                    tar.extract(member, partial, filter="data")
                    progress.update(task, completed=file.tell())
        except _DAMAGE as error:
            reason = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
            raise TranslationError(
                f"{archive}: cannot be extracted ({reason}). Delete the file and run again",
                code="damaged-file",
            ) from error
        progress.update(task, completed=archive.stat().st_size)
    return target
