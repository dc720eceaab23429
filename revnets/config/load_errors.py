"""Errors about files and overrides that cannot be read as a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from revnets.config.errors import ArgumentError, ConfigError, Keys, option_error, path, show, what

_REMEDY = "Write `key: value` lines (docs/reference/yaml.md)"
_REMEDIES = {
    "too-large": "Write less",
    "circular-reference": "Write it out",
    "not-a-file": "Give a YAML file",
}


def unreadable(file: Path, error: Exception) -> ConfigError:
    """The error for a file that is missing or is not usable YAML."""
    name = str(file)
    match error:
        case FileNotFoundError():
            return ConfigError(name, "", "there is no such file", _similar(file), "missing-file")
        case IsADirectoryError():
            return ConfigError(name, "", "this is a folder", "Give a YAML file inside of it", "not-a-file")
        case UnicodeDecodeError():
            text = f"not UTF-8 text (byte {error.start})"
            return ConfigError(name, "", text, "Save it as UTF-8 YAML", "invalid-encoding")
        case OSError():
            text = f"cannot be read ({error.strerror or error})"
            return ConfigError(name, "", text, "Check path and permissions", "unreadable-file")
        case ArgumentError():
            return ConfigError(name, error.key, str(error), _REMEDIES[error.code], error.code)
    if "\0" in name:
        text, remedy = "cannot be read (embedded null byte)", "Check path and permissions"
        return ConfigError(name, "", text, remedy, "unreadable-file")
    return ConfigError(name, "", *_syntax(error), "invalid-syntax")


def too_large(name: str, key: str, text: str) -> ConfigError:
    """The error for more than a configuration may hold."""
    return ConfigError(name, key, text, _REMEDIES["too-large"], "too-large")


def no_keys(name: str, data: Any) -> ConfigError:
    """The error for a file that holds nothing, or something else than a mapping."""
    if data is None:
        return ConfigError(name, "", "the file is empty", _REMEDY, "empty-file")
    return ConfigError(name, "", f"no keys with values: {what(data)}", _REMEDY, "wrong-format")


def unusable_text(name: str, keys: Keys, text: str) -> ConfigError:
    """The error for characters that neither paths nor files can hold."""
    problem = f"{show(text)} holds a null character or half of a surrogate pair"
    return ConfigError(name, path(keys), problem, "Remove it", "invalid-encoding")


def no_base(name: str, base: Any) -> ConfigError:
    return ConfigError(name, "base", what(base), "Give the path of one YAML file, relative to this one", "wrong-type")


def missing_base(name: str, file: Path) -> ConfigError:
    return ConfigError(name, "base", f"there is no file {file}", _similar(file), "missing-file")


def circular_base(name: str, files: Sequence[Path]) -> ConfigError:
    text = f"the files are based on each other ({' -> '.join(file.name for file in files)})"
    return ConfigError(name, "base", text, "Break the circle", "circular-reference")


def invalid_override(text: str) -> ConfigError:
    """The error for an override without `=` or keys, or with too many of them."""
    problem = "an override has the form key.path=value"
    return option_error(text, problem, "For example levels.2.depth=6", "invalid-override")


def invalid_value(text: str, key: str, error: Exception) -> ConfigError:
    """The error for a value of the command line that is no YAML."""
    if isinstance(error, ArgumentError) and error.code in _REMEDIES:
        return option_error(key, str(error), _REMEDIES[error.code], error.code)
    reason = f": {error}" if isinstance(error, ArgumentError) else ""
    return option_error(key, f"{show(text)} is not a YAML value{reason}", "Put it in quotes", "invalid-syntax")


def _similar(file: Path) -> str:
    try:
        names = [item.name for item in islice(file.parent.glob("*.y*ml"), 1000)]
    except (OSError, ValueError):
        names = []
    near = get_close_matches(file.name, names, n=1)
    return f"Did you mean {file.parent / near[0]}?" if near else "Check the path"


def _syntax(error: Exception) -> tuple[str, str]:
    """Problem and remedy of text that is no YAML."""
    parts = [str(part) for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    reason = " ".join(parts) or next(iter(str(error).splitlines()), type(error).__name__)
    if isinstance(error, RecursionError):
        reason = "brackets nested too deep"
    elif isinstance(error, (TypeError, LookupError, AttributeError)):
        reason = "a tag does not fit its value"
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"not valid YAML{where}: {reason}", "Correct that line" if mark else "Correct it"
