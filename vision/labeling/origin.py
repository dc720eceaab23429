"""Where the teacher and the images of a set of labels were, for commands that need them again: `sources.json`.

The label files name both by hashes, so this file is a hint, and what it leads to is compared with the hashes.
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
    """Of a set of labels.

    Attributes:
        teacher: the path of a run, or the name of a model.
        data: the folder or the tar that was labeled.
        input_key: endings of the files that were read.
    """

    teacher: str
    data: str
    input_key: str | None


def write_origin(folder: Path, teacher: str, data: Path, input_key: str | None) -> None:
    """Write it into the folder of the labels, with paths that hold wherever a command is started.

    Raises:
        OSError: no space, no permission and the like; its `filename` is the path.
    """
    place = str(Path(teacher).resolve()) if Path(teacher).exists() else teacher
    with replacing(folder / NAME, "w") as file:
        json.dump(Origin(place, str(data.resolve()), input_key)._asdict(), file, indent=1)


def read_origin(folder: Path) -> Origin | None:
    """What `revnets label` has written, or None if it is not there, as in labels that were copied.

    Raises:
        revnets.SpecError: the file is something else.
    """
    path = folder / NAME
    try:
        content = json.loads(read_regular(path, MOST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        problem = f"it cannot be read ({getattr(error, 'strerror', None) or first_line(error)})"
        raise ConfigError(str(path), "", problem, "Remove it", code="damaged-file") from None
    given = content if isinstance(content, dict) else {}
    teacher, data, endings = (given.get(name) for name in Origin._fields)
    if not (isinstance(teacher, str) and isinstance(data, str) and isinstance(endings, str | None)):
        raise ConfigError(str(path), "", "it does not name a teacher and data", "Remove it", code="wrong-format")
    if "\0" in teacher + data:
        raise ConfigError(str(path), "", "it holds a path with a null byte", "Remove it", code="wrong-format")
    return Origin(teacher, data, endings)
