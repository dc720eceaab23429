"""Files that are not text are refused with one line, quickly and in bounded memory."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.errors import raises_error

pytest.importorskip("sacremoses")

from nlp.data.corpus import Corpus, TranslationError, lines_of
from nlp.data.text_files import EXPANSION, LONGEST, UNCHECKED

TEXT = "".join(f"sentence {number} of a text\n" for number in range(50))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.en", TEXT)


@pytest.mark.parametrize(
    ("name", "content", "code", "names"),
    [
        ("a.bz2", bz2.compress(TEXT.encode()), "wrong-format", ["bzip2", "bunzip2"]),
        ("a.xz", lzma.compress(TEXT.encode()), "wrong-format", ["xz", "unxz"]),
        ("a.zip", zipped, "wrong-format", ["zip", "unzip"]),
        ("a.en", gzip.compress(TEXT.encode()), "wrong-format", ["gzip", ".gz"]),
        ("a.en.gz", TEXT.encode(), "damaged-file", ["gzip"]),
        ("a.en.gz", b"", "empty-file", []),
        ("a.en", b"", "empty-file", []),
        ("a.en", TEXT.encode("utf-16"), "invalid-encoding", ["line 1", "UTF-16"]),
        ("a.en", TEXT.encode("utf-16-le"), "invalid-encoding", ["line 1", "UTF-16"]),
        ("a.en", TEXT.encode("utf-16-be"), "invalid-encoding", ["line 1", "UTF-16"]),
        ("a.en", TEXT.encode("utf-32"), "invalid-encoding", ["line 1", "UTF-32"]),
        ("a.en", bytes(5000), "wrong-format", ["binary"]),
        ("a.en", bytes(2 * LONGEST), "wrong-format", ["binary"]),
        ("a.en", random.Random(0).randbytes(5000), "invalid-encoding", ["line "]),
        ("a.en", TEXT.encode() + "für\n".encode("latin-1"), "invalid-encoding", ["line 51", "ISO-8859-1"]),
        ("a.en", TEXT.replace("\n", "\r").encode(), "wrong-format", ["carriage returns"]),
        ("a.en", TEXT.encode() + b"a" * (LONGEST + 1) + b"\n", "wrong-format", ["line 51", f"{LONGEST:,}"]),
        ("a.en", os.mkdir, "not-a-file", ["directory"]),
        ("a.en", os.mkfifo, "not-a-file", ["pipe"]),
        ("a.en", lambda path: path.symlink_to("/dev/zero"), "not-a-file", ["device"]),
        ("a.en", lambda path: path.symlink_to("gone"), "missing-file", []),
    ],
)
def test_files_that_are_not_text(tmp_path, name, content, code, names):
    path = tmp_path / name
    content(path) if callable(content) else path.write_bytes(content)
    (tmp_path / "a.de").write_text(TEXT)
    for paths in ((path, tmp_path / "a.de"), (tmp_path / "a.de", path)):
        with raises_error(TranslationError, code=code, names=[str(path), *names]):
            list(Corpus(paths).pairs())


def test_an_invalid_file_name():
    with raises_error(TranslationError, code="missing-file", names="a\\x00b"):
        list(lines_of(Path("a\0b")))
    with raises_error(TranslationError, code="missing-file", names="two lines"):
        list(lines_of(Path("two\nlines")))


def test_the_longest_line_is_read(tmp_path):
    path = tmp_path / "a.en"
    path.write_bytes(b"b" * (LONGEST - 1) + b"\nc")
    assert [len(line) for line in lines_of(path)] == [LONGEST - 1, 1]


BOMB = """
import resource, sys
from pathlib import Path
from nlp.data.corpus import TranslationError, lines_of

resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))
try:
    for _ in lines_of(Path(sys.argv[1])):
        pass
except TranslationError as error:
    print(error.code)
"""


@pytest.mark.parametrize(("block", "count"), [(bytes(1 << 20), 400), (b"a" * (1 << 20), 400), (b"\n" * (1 << 20), 20)])
def test_bombs_are_read_in_bounded_memory(tmp_path, block, count):
    """Files below a megabyte with a line of 400 MB, or 20 million empty lines, read by a process limited to 300 MB."""
    path = tmp_path / "a.en.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(count):
            file.write(block)
    assert count << 20 > UNCHECKED
    assert EXPANSION * path.stat().st_size < count << 20
    done = subprocess.run([sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, timeout=200)
    assert done.stdout == "wrong-format\n", done.stderr


def test_ordinary_text_is_decompressed_whole(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(500)]
    lines = [" ".join(rng.choices(words, k=400)) for _ in range(2 * UNCHECKED // 2000)]
    path = tmp_path / "a.en.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode(), 9))
    assert sum(map(len, lines)) > 1.5 * UNCHECKED
    assert list(lines_of(path)) == lines


@pytest.mark.parametrize(
    "text",
    [
        '<seg id="1"> one\n</seg>\n<seg id="2">two</seg>\n',
        "<SEG>one</SEG><seg>two\n",
        '<seg id="1">one <seg>two</seg>\n',
    ],
)
def test_segments_are_not_overlooked(tmp_path, text):
    path = tmp_path / "t.en.sgm"
    path.write_text(text)
    with raises_error(TranslationError, code="wrong-format", names=["line 1", "</seg>"]):
        list(lines_of(path))
    path.write_text("<seg>one</seg><SEG id=2 lang='x'> two </SEG>\n")
    assert list(lines_of(path)) == ["one", "two"]


@pytest.mark.parametrize(
    "header",
    [("source", "target"), ("Target", "Source"), ('"src"', '"tgt"'), ("en", "de"), ("German", "English"), ("DE", "en")],
)
def test_a_header_is_no_pair(tmp_path, header):
    path = tmp_path / "a.tsv"
    path.write_text("id\t" + "\t".join(header) + "\n1\tone\teins\n2\tit\tes\n")
    corpus = Corpus((path,), languages=("en", "de_AT"))
    assert corpus.header() == header
    assert list(corpus.pairs()) == [("one", "eins"), ("it", "es")]


@pytest.mark.parametrize("first", ["it\tes", "German\tDeutsch", "source\tQuelle", "text\ttext", "en\tfr"])
def test_a_first_pair_is_no_header(tmp_path, first):
    path = tmp_path / "a.tsv"
    path.write_text(f"{first}\none\teins\n")
    corpus = Corpus((path,), languages=("en", "de"))
    assert corpus.header() is None
    assert list(corpus.pairs()) == [tuple(first.split("\t")), ("one", "eins")]


def test_rows_with_another_number_of_fields(tmp_path):
    """With an extra tab or a missing field, the last two fields are not those of line 1."""
    path = tmp_path / "a.tsv"
    path.write_text("1\tone\teins\n2\ta\tb\tzwei\n")
    with raises_error(TranslationError, code="wrong-format", names=[f"{path}, line 2", "4 tab-separated", "--fields"]):
        list(Corpus((path,)).pairs())
    assert list(Corpus((path,), fields=(1, 2)).pairs()) == [("1", "one"), ("2", "a")]
