"""Resumable pipeline steps: each fills a directory that appears when it is complete, so a later run skips it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from revnets.utils.atomic_files import replacing_folder
from revnets.utils.regular_files import open_regular, read_regular

from .errors import TranslationError

NOTE = "prepared.json"
"""File in every directory that records its inputs and its facts."""

Facts = dict[str, Any]
"""Counts that a step reports, such as the number of pairs in a split."""

MAX_NOTE = 2**24
"""Maximum size of a note in bytes; one with thousands of files is smaller."""


def read_note(folder: Path) -> Any:
    """Read the note of a directory.

    Raises:
        OSError: If it is missing, not a regular file, or too large.
        ValueError, RecursionError: If it is not JSON.
    """
    return json.loads(read_regular(folder / NOTE, MAX_NOTE).decode("utf-8"))


def read_array(path: Path, kind: type) -> np.ndarray:
    """Read an array (N,) that an earlier step wrote.

    Args:
        path: File of NumPy's format.
        kind: Expected dtype.

    Raises:
        TranslationError: If the file is damaged, or has another shape or dtype.
    """
    array = None
    with suppress(OSError, EOFError, ValueError, MemoryError), open_regular(path) as file:
        array = np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != kind:
        raise TranslationError(f"{path}: damaged. Delete {path.parent} and run again", code="damaged-file")
    return array


class Stages:
    """Runs steps whose results depend only on `inputs`.

    Args:
        inputs: Data of JSON types. Steps are repeated if it changes.
    """

    def __init__(self, inputs: Any):
        self.inputs = inputs
        self.key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def facts(self, folder: Path) -> Facts | None:
        """Return the facts of a directory that was made from the same inputs, else None."""
        try:
            note = read_note(folder)
            facts = note["facts"] if note["key"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        is_valid = isinstance(facts, dict) and all(isinstance(value, int) for value in facts.values())
        return facts if is_valid else None

    def run(self, folder: Path, make: Callable[[Path], Facts]) -> Facts:
        """Run a step, unless its directory already exists and was made from the same inputs.

        Args:
            folder: Directory of the step.
            make: Fills the directory that it gets, and returns facts.

        Returns:
            The facts, from this call or an earlier one.

        Raises:
            TranslationError: If the directory cannot be written, or if it exists and no step wrote it.
        """
        facts = self.facts(folder)
        if facts is None:
            if folder.exists() and not (folder.is_dir() and ((folder / NOTE).exists() or not any(folder.iterdir()))):
                raise TranslationError(
                    f"{folder}: not written by prepare-mt, so not replaced. Move it, or choose another --output",
                    code="file-exists",
                )
            try:
                with replacing_folder(folder) as partial:
                    facts = make(partial)
                    note = {"key": self.key, "facts": facts, "inputs": self.inputs}
                    (partial / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                if error.filename not in (None, str(folder)):
                    raise
                raise TranslationError(  # an error of an open file has no file name
                    f"{folder}: {error.strerror or error}. Check the disk space, and run the command again to resume",
                    code="unwritable-file",
                ) from error
        return facts
