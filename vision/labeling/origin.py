"""Paths of the teacher and the images of a set of labels, for commands that need them again: `sources.json`.

The paths are only a hint. Label files identify both by digests, which are compared with what is at these paths.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from revnets.config.errors import ConfigError
from revnets.utils.atomic_files import replacing
from revnets.utils.regular_files import read_regular
from vision.errors import first_line

NAME, MOST_BYTES = "sources.json", 2**16


class Origin(NamedTuple):
    """Where a set of labels came from.

    Attributes:
        teacher: Path of a run, or name of a model.
        data: The directory or the tar that was labeled.
        input_key: Suffixes of the files that were read.
    """

    teacher: str
    data: str
    input_key: str | None


def write_origin(folder: Path, teacher: str, data: Path, input_key: str | None) -> None:
    """Write the origin, with absolute paths, into the directory of the labels.

    Raises:
        OSError: If the file cannot be written, for lack of space or permission. Its `filename` is the path.
    """
    place = str(Path(teacher).resolve()) if Path(teacher).exists() else teacher
    with replacing(folder / NAME, "w") as file:
        json.dump(Origin(place, str(data.resolve()), input_key)._asdict(), file, indent=1)


def read_origin(folder: Path) -> Origin | None:
    """Read the origin that `revnets label` has written; None if there is no such file, as in copied labels.

    Raises:
        revnets.SpecError: If the file is damaged or has other content.
    """
    path = folder / NAME
    try:
        content = json.loads(read_regular(path, MOST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        problem = f"it cannot be read ({getattr(error, 'strerror', None) or first_line(error)})"
        raise ConfigError(str(path), "", problem, "Remove the file", code="damaged-file") from None
    given = content if isinstance(content, dict) else {}
    teacher, data, endings = (given.get(name) for name in Origin._fields)
    if not (isinstance(teacher, str) and isinstance(data, str) and isinstance(endings, str | None)):
        raise ConfigError(str(path), "", "it does not name a teacher and data", "Remove the file", code="wrong-format")
    if "\0" in teacher + data:
        raise ConfigError(str(path), "", "a path has a null byte", "Remove the file", code="wrong-format")
    return Origin(teacher, data, endings)
