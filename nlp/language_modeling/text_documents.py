"""Documents of a training text: UTF-8 files or rows of a Hugging Face data set, and a held-out share."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from revnets import SpecError
from revnets.config.errors import first_line
from revnets.config.loader import Strict, UserPath
from revnets.utils.regular_files import require_regular

MAX_DOCUMENT = 2**36
"""Maximum bytes of a file, which is read into memory."""


class DatasetConfig(Strict):
    """Rows of a Hugging Face data set.

    Attributes:
        dataset: Directory written by `save_to_disk`, or a name on the Hub.
        split: Split of the data set. By default `train`, if there are splits.
        column: Column with the text.
    """

    dataset: UserPath = Field(examples=["roneneldan/TinyStories"], min_length=1)
    split: str | None = None
    column: str = "text"


Files = UserPath | tuple[UserPath, ...] | DatasetConfig
"""Files, directories of .txt files and patterns such as texts/*.txt; every file is a document."""


def documents(source: str | Sequence[str] | DatasetConfig, key: str) -> list[str]:
    """Read all documents, sorted by name.

    Args:
        source: Files, directories or patterns, or a data set.
        key: Key of the source in the configuration, for error messages.

    Raises:
        revnets.SpecError: If there are no documents, or if a file is empty, not UTF-8 or not a regular file.
    """
    if isinstance(source, DatasetConfig):
        return _rows(source, key)
    places = [source] if isinstance(source, str) else source
    return [_read(path, key) for place in places for path in _files(place, key)]


def held_out(texts: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Split documents at random, always in the same way, into training and held-out documents.

    Args:
        texts: Documents.
        share: Share of held-out documents, in (0, 1); at least one is held out.

    Returns:
        Training and held-out documents.

    Raises:
        revnets.SpecError: If there is only one document.
    """
    count = max(1, round(share * len(texts)))
    if count >= len(texts):
        problem = f"{len(texts)} documents cannot be split into training and validation"
        raise error("val", problem, "Give files for validation", "too-few-samples")
    order = np.random.default_rng(0).permutation(len(texts))
    chosen = set(order[:count].tolist())
    return (
        [text for index, text in enumerate(texts) if index not in chosen],
        [text for index, text in enumerate(texts) if index in chosen],
    )


def error(key: str, problem: str, remedy: str, code: str) -> SpecError:
    """Create the error for a key of the text in a run configuration."""
    return SpecError("training run", f"task.{key}", problem, remedy, code=code)


def _files(place: str, key: str) -> list[Path]:
    if os.path.isdir(place):
        found = sorted(path for path in Path(place).rglob("*.txt") if not path.is_dir())
    elif os.path.lexists(place):
        found = [Path(place)]
    else:
        found = sorted(map(Path, glob.glob(place, recursive=True)))
    if not found:
        problem = f"{place}: no such file, and no directory with text files"
        raise error(key, problem, "Give a file, a directory of .txt files, or a pattern", "missing-file")
    return found


def _read(path: Path, key: str) -> str:
    try:
        require_regular(path)
        if (size := path.stat().st_size) > MAX_DOCUMENT:
            raise error(key, f"{path}: {size:,} bytes", f"Use files of at most {MAX_DOCUMENT:,} bytes", "too-large")
        content = path.read_bytes()
    except OSError as problem:
        code = "missing-file" if isinstance(problem, FileNotFoundError) else "not-a-file"
        raise error(key, f"{path}: {problem.strerror}", "Give a text file", code) from None
    if not content.strip():
        raise error(key, f"{path}: the file is empty", "Remove it", "empty-file")
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        text = f"{path}: byte {problem.start} is not UTF-8"
        raise error(key, text, f"Convert it: iconv -f ISO-8859-1 -t UTF-8 {path.name}", "invalid-encoding") from None


def _rows(source: DatasetConfig, key: str) -> list[str]:
    try:
        import datasets
    except ImportError:
        problem = "datasets is not installed"
        raise error(key, problem, "pip install 'revnets[lm]'", "missing-dependency") from None
    try:
        saved = (Path(source.dataset) / name for name in ("state.json", "dataset_dict.json"))
        load: Any = datasets.load_from_disk if any(path.exists() for path in saved) else datasets.load_dataset
        found: Any = load(source.dataset)
    except Exception as problem:  # datasets raises many types
        raise error(key, f"{source.dataset}: {first_line(problem)}", "Check the name", "unreadable-data") from None
    if isinstance(found, dict):
        split = source.split or "train"
        if split not in found:
            raise error(f"{key}.split", f"no split {split!r}", f"It has {', '.join(found)}", "unknown-choice")
        found = found[split]
    if source.column not in found.column_names:
        remedy = f"It has {', '.join(found.column_names)}"
        raise error(f"{key}.column", f"no column {source.column!r}", remedy, "unknown-choice")
    texts = [text for text in found[source.column] if isinstance(text, str) and text.strip()]
    if not texts:
        raise error(key, f"{source.dataset}: no row has text", "Use another column or split", "empty-data")
    return texts
