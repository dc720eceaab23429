"""Exclusive creation of files and directories, for commands that convert checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from revnets.utils.atomic_files import make_folder
from revnets.utils.file_lock import FileLock, LockedError
from vision.errors import CheckpointError, why_not_written


@contextmanager
def new_file(path: Path, note: str = "") -> Iterator[None]:
    """Context in which only this process writes a new file or directory.

    Args:
        path: Of the file or directory.
        note: Added to the message if it cannot be written.

    Raises:
        CheckpointError: If the path exists, another process is writing it, or it cannot be written.
    """
    try:
        make_folder(path.parent)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if os.path.lexists(path):
                raise CheckpointError(path, "it already exists", "Give a new path", code="file-exists")
            yield
    except LockedError as error:
        problem = f"{error.owner or 'another process'} is writing it"
        raise CheckpointError(
            path, problem, "Wait until it is done, or give another path", code="output-in-use"
        ) from None
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        problem = f"it cannot be written ({why_not_written(error)}){note}"
        raise CheckpointError(path, problem, "Free some space, or give another path", code="unwritable-file") from error
