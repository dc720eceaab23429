"""Steps of a long job, each a folder that appears when it is complete: what a killed run has done is not done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from revnets.utils.atomic_files import replacing_folder
from revnets.utils.regular_files import read_regular

from .errors import TranslationError

NOTE = "prepared.json"
"""In every folder: what it was made from and what was found on the way."""

Facts = dict[str, Any]

MAX_NOTE = 2**24
"""Bytes of a note; one with thousands of files has less."""


def read_note(folder: Path) -> Any:
    """What the note of a folder says.

    Raises:
        OSError: there is none, or it is no regular file or too large.
        ValueError, RecursionError: it is no JSON.
    """
    return json.loads(read_regular(folder / NOTE, MAX_NOTE).decode("utf-8"))


class Stages:
    """Runs steps whose result depends on `inputs` and on nothing else."""

    def __init__(self, inputs: Any):
        self.inputs = inputs
        self.key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def facts(self, folder: Path) -> Facts | None:
        """What was found when the folder was made from the same inputs; None if it was not."""
        try:
            note = read_note(folder)
            return note["facts"] if note["key"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def run(self, folder: Path, make: Callable[[Path], Facts]) -> Facts:
        """Have `make` fill the folder and say what it found, unless that was done before.

        Raises:
            TranslationError: it cannot be written, or something of this name is there that no step made.
        """
        facts = self.facts(folder)
        if facts is None:
            if folder.exists() and not (folder.is_dir() and ((folder / NOTE).exists() or not any(folder.iterdir()))):
                raise TranslationError(
                    f"{folder}: is not of prepare-mt, so it is not replaced. Move it, or give another --output",
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
                raise TranslationError(  # a write to an open file does not know its name, but the folder is known
                    f"{folder}: {error.strerror or error}. Check the free space, and run the command again to go on",
                    code="unwritable-file",
                ) from error
        return facts
