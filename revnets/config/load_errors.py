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
    "too-large": "Make the configuration smaller",
    "circular-reference": "Replace the alias with its content",
    "not-a-file": "Give a YAML file",
}


def unreadable(file: Path, error: Exception) -> ConfigError:
    """Return the error for a file that is missing or is not valid YAML."""
    name = str(file)
    match error:
        case FileNotFoundError():
            return ConfigError(name, "", "there is no such file", _similar(file), "missing-file")
        case IsADirectoryError():
            return ConfigError(name, "", "this is a directory", "Give a YAML file in it", "not-a-file")
        case UnicodeDecodeError():
            text = f"not UTF-8 text (byte {error.start})"
            return ConfigError(name, "", text, "Save the file as UTF-8", "invalid-encoding")
        case OSError():
            text = f"cannot be read ({error.strerror or error})"
            return ConfigError(name, "", text, "Check the path and its permissions", "unreadable-file")
        case ArgumentError():
            return ConfigError(name, error.key, str(error), _REMEDIES[error.code], error.code)
    if "\0" in name:
        text, remedy = "cannot be read (embedded null byte)", "Check the path and its permissions"
        return ConfigError(name, "", text, remedy, "unreadable-file")
    return ConfigError(name, "", *_syntax(error), "invalid-syntax")


def too_large(name: str, key: str, text: str) -> ConfigError:
    """Return the error for a configuration that is too large."""
    return ConfigError(name, key, text, _REMEDIES["too-large"], "too-large")


def no_keys(name: str, data: Any) -> ConfigError:
    """Return the error for a file that is empty or does not contain a mapping."""
    if data is None:
        return ConfigError(name, "", "the file is empty", _REMEDY, "empty-file")
    return ConfigError(name, "", f"a mapping of keys to values is needed: {what(data)}", _REMEDY, "wrong-format")


def unusable_text(name: str, keys: Keys, text: str) -> ConfigError:
    """Return the error for characters that neither paths nor files can contain."""
    problem = f"{show(text)} contains a null character or a lone surrogate"
    return ConfigError(name, path(keys), problem, "Remove it", "invalid-encoding")


def no_base(name: str, base: Any) -> ConfigError:
    return ConfigError(name, "base", what(base), "Give the path of one YAML file, relative to this one", "wrong-type")


def missing_base(name: str, file: Path) -> ConfigError:
    return ConfigError(name, "base", f"there is no file {file}", _similar(file), "missing-file")


def circular_base(name: str, files: Sequence[Path]) -> ConfigError:
    text = f"the base files refer to each other ({' -> '.join(file.name for file in files)})"
    return ConfigError(name, "base", text, "Remove one of the references", "circular-reference")


def invalid_override(text: str) -> ConfigError:
    """Return the error for an override without `=` or keys, or with too many keys."""
    problem = "an override must have the form key.path=value"
    return option_error(text, problem, "Example: levels.2.depth=6", "invalid-override")


def invalid_value(text: str, key: str, error: Exception) -> ConfigError:
    """Return the error for a value on the command line that is not valid YAML."""
    if isinstance(error, ArgumentError) and error.code in _REMEDIES:
        return option_error(key, str(error), _REMEDIES[error.code], error.code)
    reason = f": {error}" if isinstance(error, ArgumentError) else ""
    return option_error(key, f"{show(text)} is not valid YAML{reason}", "Put it in quotes", "invalid-syntax")


def _similar(file: Path) -> str:
    try:
        names = [item.name for item in islice(file.parent.glob("*.y*ml"), 1000)]
    except (OSError, ValueError):
        names = []
    near = get_close_matches(file.name, names, n=1)
    return f"Did you mean {file.parent / near[0]}?" if near else "Check the path"


def _syntax(error: Exception) -> tuple[str, str]:
    """Return problem and hint for text that is not valid YAML."""
    parts = [str(part) for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    reason = " ".join(parts) or next(iter(str(error).splitlines()), type(error).__name__)
    if isinstance(error, RecursionError):
        reason = "brackets are nested too deeply"
    elif isinstance(error, (TypeError, LookupError, AttributeError)):
        reason = "a tag does not fit its value"
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"not valid YAML{where}: {reason}", "Correct this line" if mark else "Correct the file"
