"""Listing of the images in a directory, in a tar, or in a directory of tars, for `vision.data.image_files`.

timm's readers treat every file and directory as an image or a class. These functions skip files and directories that
programs leave behind, follow links without following cycles, and report what they do not read.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from revnets.utils.regular_files import open_regular
from vision.errors import first_line, run_error

NOT_DATA = frozenset(
    {"__macosx", "__pycache__", "@eadir", "@tmp", "@recycle", "@__thumb", "#recycle", "#snapshot"}
    | {"$recycle.bin", "recycler", "found.000", "system volume information", "lost+found"}
    | {"network trash folder", "temporary items", "thevolumesettingsfolder"}
)
"""Lower-case names of directories that systems and programs leave behind. Names with a leading dot are skipped too."""

PICTURES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm"}
    | {".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".tga"}
)
"""Suffixes of image files, only some of which are read."""

ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".zip", ".7z", ".rar")
"""Suffixes of archives that are not read. Each may contain a class, so they are refused."""

VISITS = 64
"""How many times links may lead to the same directory."""

LONGEST = 4096
"""Most characters of a name in a tar and of the target of a link."""


class ImageFile(NamedTuple):
    """The location of an image.

    Attributes:
        name: Path relative to the listed directory, or in the tar.
        folder: The class directory and its parents, as in `animals/ant`; for one of several tars, below the tar's name.
        archive: Path of the tar; empty for an image outside of a tar.
        start, size: range of bytes in the tar; a start of -1 if the tar does not contain them.
    """

    name: str
    folder: str
    archive: str = ""
    start: int = 0
    size: int = 0


@dataclass
class Listing:
    """The result of a listing.

    Attributes:
        endings: Suffixes of the files that are read.
        files: Images.
        folders: All directories, including empty ones, and broken links.
        unread: Images with other suffixes.
        tars: Whether the name of every directory begins with that of its tar.
    """

    endings: frozenset[str]
    files: list[ImageFile] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    tars: bool = False

    def add(self, file: ImageFile) -> None:
        """Add a file if it is an image."""
        ending = os.path.splitext(file.name)[1].lower()
        if ending in self.endings:
            self.files.append(file)
        elif ending in PICTURES:
            self.unread.append(posixpath.join(file.folder, posixpath.basename(file.name)))


def is_hidden(name: str) -> bool:
    """Whether a name is not part of the data, such as `.ipynb_checkpoints`, `._0.jpg` and `@eaDir`."""
    return name.startswith(".") or name.lower() in NOT_DATA


def list_folder(root: str, endings: frozenset[str]) -> Listing:
    """List the images below a directory, following links.

    Raises:
        revnets.SpecError: If links lead to one directory more than `VISITS` times.
        OSError: If a directory cannot be read.
    """
    found, visits = Listing(endings), Counter()
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while waiting:
        folder, above = waiting.pop()
        place = os.path.join(root, folder)
        status = os.stat(place)
        here = status.st_dev, status.st_ino
        if here in above:  # a link to one of its parents
            continue
        visits[here] += 1
        if visits[here] > VISITS:
            problem = f"links lead to {place} more than {VISITS} times"
            raise run_error("data.root", problem, "Remove links between directories", code="circular-reference")
        if folder:
            found.folders.append(folder)
        with os.scandir(place) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                name = posixpath.join(folder, entry.name)
                if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                    waiting.append((name, (*above, here)))
                elif os.path.splitext(name)[1].lower() in PICTURES | endings or not _leads_nowhere(entry):
                    found.add(ImageFile(name, folder))
                else:
                    found.folders.append(name)  # perhaps a class on a disk that is not mounted
    return found


def list_tars(root: str, endings: frozenset[str]) -> Listing:
    """List the images of a tar, or of all tars in a directory. Tars inside of a tar are read as directories.

    Raises:
        revnets.SpecError: If a tar is damaged, or other data is next to the tars.
        OSError: If a directory cannot be read.
    """
    found = Listing(endings, tars=os.path.isdir(root))
    if not found.tars:
        _list_archive(root, "", found)
        return found
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if is_hidden(entry.name):
            continue
        name, ending = os.path.splitext(entry.name)
        if ending.lower() == ".tar" and not entry.is_dir():
            found.folders.append(name)
            _list_archive(entry.path, name, found)
        elif _is_data(entry.name, endings) or (entry.is_dir() and _holds_data(entry.path, endings)):
            problem = f"{root} has {entry.name} next to tars"
            hint = "Move it elsewhere, or pack it into an uncompressed tar"
            raise run_error("data.root", problem, hint, code="class-mismatch")
    return found


def _list_archive(path: str, folder: str, found: Listing) -> None:
    try:
        with open_regular(path) as file:
            _list_members(file, path, folder, found)
    except (OSError, tarfile.TarError, ValueError, EOFError, RecursionError, OverflowError, MemoryError) as error:
        text = getattr(error, "strerror", None) or first_line(error)
        problem = f"{path} cannot be read ({text})"
        raise run_error("data.root", problem, "Download or create the tar again", code="damaged-file") from None


def _list_members(file: Any, path: str, folder: str, found: Listing, start: int = 0, is_inner: bool = False) -> None:
    """Add the images of a tar that begins at byte `start` of the file at `path`."""
    members: dict[str, tarfile.TarInfo] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if (length := max(len(member.name), len(member.linkname))) > LONGEST:
                raise ValueError(f"a name has {length} characters")
            parts = [part for part in posixpath.normpath(member.name).split("/") if part not in ("", ".", "..")]
            if parts and not any(map(is_hidden, parts)):
                members["/".join(parts)] = member  # the last one of a name counts, as for tar -x
        _require_end(file, tar.offset)
        for name, member in members.items():
            source, place = _source(name, members), posixpath.join(folder, name)
            if member.isdir() or (source is None and not _is_data(name, found.endings)):
                found.folders.append(place)
            elif source is not None and name.lower().endswith(".tar"):
                if is_inner:
                    raise ValueError(f"{member.name} is a tar nested in two tars")
                inner, begin = place[: -len(".tar")], start + source.offset_data
                found.folders.append(inner)
                _list_members(tar.extractfile(source), path, inner, found, begin, is_inner=True)
            elif name.lower().endswith(ARCHIVES):
                raise ValueError(f"{member.name} is an archive other than an uncompressed tar")
            elif source is None or source.issparse():
                found.add(ImageFile(member.name, posixpath.dirname(place), path, -1))
            else:
                begin = start + source.offset_data
                found.add(ImageFile(member.name, posixpath.dirname(place), path, begin, source.size))


def _source(name: str, members: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The regular file that a member is or links to; None for a directory, or if the tar does not contain it."""
    for _ in range(8):
        member = members.get(name)
        if member is None or not (member.issym() or member.islnk()):
            return member if member is not None and member.isreg() else None
        target = posixpath.join(posixpath.dirname(name), member.linkname) if member.issym() else member.linkname
        name = posixpath.normpath(target).lstrip("/")
    return None


def _require_end(file: IO[bytes], offset: int) -> None:
    """Require the block of zeros at the end of a tar; tarfile accepts any block that is not a header as the end."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        raise ValueError(f"it is damaged or truncated at byte {offset}")


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _is_data(name: str, endings: frozenset[str]) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURES | endings or name.lower().endswith((".tar", *ARCHIVES))


def _holds_data(path: str, endings: frozenset[str]) -> bool:
    """Whether a directory, or a directory in it, contains images or tars."""
    for entry in (entry for entry in os.scandir(path) if not is_hidden(entry.name)):
        if _is_data(entry.name, endings):
            return True
        if entry.is_dir(follow_symlinks=False) and any(_is_data(name, endings) for name in os.listdir(entry.path)):
            return True
    return False
