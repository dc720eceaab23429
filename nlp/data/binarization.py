"""fairseq-preprocess: text in sub-words to the files that fairseq reads, and whether they hold what was given."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from revnets.utils.regular_files import read_regular, require_regular

from .corpus import Pair
from .errors import TranslationError
from .splits import SPLITS

LOG = "preprocess.log"
"""The log of fairseq-preprocess, in the folder of its other files."""

MAX_LOG = 2**24
"""Bytes of a log that are read; it has some lines for each side of each split."""

_SUMMARY = re.compile(r"\[(\w+)\] .*?(\w+)\.\1: \d+ sents, \d+ tokens, ([\d.e+-]+)% replaced")


def run_preprocess(
    units: Path,
    folder: Path,
    codes: Pair,
    words: int | None,
    workers: int,
    log: Path,
    dictionary: Path | None = None,
) -> None:
    """Binarise the splits in the folder `units`.

    Args:
        folder: takes fairseq's files; an absolute path.
        words: largest number of types in the dictionary.
        log: takes what the program prints.
        dictionary: the types of both languages; an absolute path. By default those of the training text.

    Raises:
        TranslationError: it failed.
        OSError: the log cannot be written.
    """
    source, target = codes
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--joined-dictionary", "--destdir", str(folder)]
    command += ["--source-lang", source, "--target-lang", target, "--workers", str(workers)]
    command += [word for name in SPLITS for word in (f"--{name}pref", name)]
    if words is not None:
        command += ["--nwordssrc", str(words), "--nwordstgt", str(words)]
    if dictionary is not None:
        command += ["--srcdict", str(dictionary)]
    require_regular(log)
    with open(log, "w", encoding="utf-8") as file:
        # It takes a comma in a path for the end of the path, and so gets none.
        done = subprocess.run(command, cwd=units, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise TranslationError(
            f"fairseq-preprocess failed: {''.join(last)}. Its output is in {log}", code="process-failed"
        )


def check_sentences(folder: Path, codes: Pair, written: Mapping[str, int]) -> None:
    """Check that both sides of every split have as many sentences as were written.

    Raises:
        TranslationError: one has another number.
    """
    for name in SPLITS:
        for code in codes:
            found = count_sentences(folder / f"{name}.{'-'.join(codes)}.{code}.idx")
            if found != written[name]:
                raise TranslationError(
                    f"fairseq-preprocess made {found:,} sentences of the {written[name]:,} in {name}.{code}, so that "
                    "the sides do not belong together. Look for line separators in the text",
                    code="misaligned-data",
                )


def count_sentences(index: Path) -> int:
    """How many sentences a binarised side has, by the header of its index (fairseq's `MMapIndexedDataset`)."""
    with open(index, "rb") as file:
        magic, _version, _type, count = struct.unpack("<9sQBQ", file.read(26))
    assert magic == b"MMIDIDX\0\0", magic
    return count


def unknown_words(folder: Path) -> dict[str, dict[str, float]]:
    """The share of `<unk>` of every split and language, in per cent, by fairseq's log; empty where there is none."""
    try:
        text = read_regular(folder / LOG, MAX_LOG).decode(errors="replace")
    except OSError:
        return {}
    found: dict[str, dict[str, float]] = {}
    for match in _SUMMARY.finditer(text):
        found.setdefault(match[2], {})[match[1]] = float(match[3])
    return found


def rename_in_log(folder: Path, output: Path) -> None:
    """Let fairseq's log name the folder by the name that it is going to have."""
    log = folder / LOG
    if log.exists():
        text = log.read_text(encoding="utf-8", errors="replace")
        log.write_text(text.replace(str(folder), str(output)), encoding="utf-8")
