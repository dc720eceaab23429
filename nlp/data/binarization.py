"""Binarization of subword text by fairseq-preprocess, and checks of its result."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from revnets.utils.regular_files import open_regular, read_regular, require_regular

from .corpus import Pair
from .errors import TranslationError
from .splits import SPLITS

LOG = "preprocess.log"
"""Log of fairseq-preprocess, in the directory of its other files."""

MAX_LOG = 2**24
"""Maximum size of a log in bytes; it has a few lines for each side of each split."""

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQ")  # magic, version, type of the tokens, number of sentences
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
    """Binarize the three splits.

    Args:
        units: Directory of the splits, named `train.en` and so on.
        folder: Absolute path of the output directory.
        codes: Languages of source and target.
        words: Maximum number of types in the dictionary; None for all.
        workers: Number of processes.
        log: File for the output of fairseq-preprocess.
        dictionary: Absolute path of a dictionary for both languages. By default, the types of the training text.

    Raises:
        TranslationError: If fairseq-preprocess fails.
        OSError: If the log cannot be written.
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
        # fairseq-preprocess splits paths at commas, so it runs in the directory and gets relative paths.
        done = subprocess.run(command, cwd=units, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise TranslationError(f"fairseq-preprocess failed: {''.join(last)}. See its output in {log}", "process-failed")


def check_sentences(folder: Path, codes: Pair, written: Mapping[str, int]) -> None:
    """Check that both sides of every split have the expected number of sentences.

    Args:
        folder: Directory that `run_preprocess` filled.
        codes: Languages of source and target.
        written: Expected number of sentences by split.

    Raises:
        TranslationError: If a number differs.
    """
    for name in SPLITS:
        for code in codes:
            found = count_sentences(folder / f"{name}.{'-'.join(codes)}.{code}.idx")
            if found != written[name]:
                raise TranslationError(
                    f"fairseq-preprocess read {found:,} sentences from {name}.{code}, which has {written[name]:,}, so "
                    "source and target are misaligned. Check the text for unusual line separators",
                    code="misaligned-data",
                )


def count_sentences(index: Path) -> int:
    """Read the number of sentences from the index of a binarized side (fairseq's `MMapIndexedDataset`).

    Raises:
        TranslationError: If the file is not an index.
        OSError: If it cannot be read.
    """
    with open_regular(index) as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise TranslationError(f"{index}: not an index of fairseq-preprocess. Run the command again", "damaged-file")
    return _HEADER.unpack(header)[-1]


def unknown_words(folder: Path) -> dict[str, dict[str, float]]:
    """Read the share of `<unk>` in percent, by split and language, from fairseq's log.

    Returns:
        An empty dict if the log is missing or too large.
    """
    try:
        text = read_regular(folder / LOG, MAX_LOG).decode(errors="replace")
    except OSError:
        return {}
    found: dict[str, dict[str, float]] = {}
    for match in _SUMMARY.finditer(text):
        found.setdefault(match[2], {})[match[1]] = float(match[3])
    return found


def rename_in_log(folder: Path, output: Path) -> None:
    """Replace the temporary name of a directory in fairseq's log by its final name."""
    log = folder / LOG
    if log.exists():
        text = log.read_text(encoding="utf-8", errors="replace")
        log.write_text(text.replace(str(folder), str(output)), encoding="utf-8")
