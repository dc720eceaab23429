"""Errors that stop a run, one line each: bad data, bad checkpoints, a loss that is not finite."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from revnets.config.errors import ConfigError, printable
from revnets.config.errors import first_line as first_line


def run_error(key: str, message: str, hint: str = "", code: str = "invalid-value") -> ConfigError:
    """The error for a key of a training run that only fails when the run is set up, such as `data.root`."""
    return ConfigError("training run", key, printable(message), hint, code)


class TrainingError(RuntimeError):
    """A run that cannot go on; says where, what is safe, and what to try. `code` is the kind of error."""

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross process borders
        return TrainingError, (str(self), self.code)


class DataError(RuntimeError):
    """Data that cannot be read. A loader's worker hands it on with its traceback before the line that counts."""

    code = "unreadable-data"  # the only one: workers hand on nothing but the text

    def __init__(self, text: str):
        super().__init__(text.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used: names the file, what is wrong, and what to do.

    Attributes:
        path: the file; also `source`.
        message, hint: what is wrong and what to do; also `problem` and `remedy`.
        code: the kind of error, one of `revnets.config.error_codes.CODES`.
    """

    def __init__(self, path: Path | str, message: str, hint: str, code: str = "wrong-format"):
        self.path, self.message, self.hint, self.code = path, message, hint, code
        super().__init__(f"{path}: {message}. {hint}")

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross process borders
        return CheckpointError, (self.path, self.message, self.hint, self.code)

    @property
    def source(self) -> str:
        return str(self.path)

    @property
    def problem(self) -> str:
        return self.message

    @property
    def remedy(self) -> str:
        return self.hint


EXPECTED = (TrainingError, DataError, CheckpointError)
"""Errors that users can do something about."""


def comparable(name: str) -> str:
    """The name of a class as it is stored and compared: on one line, composed (NFC), as macOS may decompose it."""
    return printable(unicodedata.normalize("NFC", name))


def why_not_written(error: BaseException) -> str:
    """Why a file could not be written: torch's writer puts an error of its own in front of the system's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return first_line(error)
