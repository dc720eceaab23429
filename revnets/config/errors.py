"""Errors of configurations: one line with the file, the key, the value and a hint how to fix it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import islice, takewhile
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from revnets.engine.errors import ArgumentError as ArgumentError

Keys = tuple[str | int, ...]


class ConfigError(ValueError):
    """Raised for an invalid value in a configuration or on the command line.

    The message is one line with the source, the key, the problem and a hint.

    Args:
        source: File of the value, or another origin such as "command line".
        key: Key path such as "levels.0.dim", or option such as "--png". Empty for the whole source.
        message: What is wrong.
        hint: How to fix it.
        code: Kind of error, one of `revnets.config.error_codes.CODES`.

    Attributes:
        source: File of the value, or another origin such as "command line".
        key: Key path such as "levels.0.dim", or option such as "--png". Empty for the whole source.
        message: What is wrong, on one line. Also available as `problem`.
        hint: How to fix it, on one line, or empty. Also available as `remedy`.
        code: Kind of error, one of `revnets.config.error_codes.CODES`. Stays the same when the message changes.
    """

    def __init__(self, source: str, key: str, message: str, hint: str = "", code: str = "invalid-value"):
        self.source, self.key, self.message, self.hint = source, _line(key), _line(message), _line(hint)
        self.code = code
        where = _shortened(str(source))
        where += f": {self.key}" if self.key else ""
        super().__init__(f"{where}: {self.message}{'.' if hint else ''} {self.hint}".rstrip())

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes send errors as pickles
        return ConfigError, (self.source, self.key, self.message, self.hint, self.code)

    @property
    def problem(self) -> str:
        """Alias of `message`."""
        return self.message

    @property
    def remedy(self) -> str:
        """Alias of `hint`."""
        return self.hint


SpecError = ConfigError
"""Alias of `ConfigError`, for errors in the specification of a network."""


def option_error(option: str, message: str, hint: str = "", code: str = "invalid-value") -> ConfigError:
    """Return the error for an option or argument of a command.

    Args:
        option: Name of the option, such as `--png`.
        message: What is wrong.
        hint: How to fix it.
        code: Kind of error, one of `revnets.config.error_codes.CODES`.
    """
    return ConfigError("command line", option, message, hint, code)


class PartError(ValueError):
    """Raised for the name of a component that cannot be used.

    Attributes:
        problem: What is wrong.
        remedy: How to fix it.
        code: Kind of error, one of `revnets.config.error_codes.CODES`.
    """

    def __init__(self, problem: str, remedy: str, code: str):
        super().__init__(f"{problem}. {remedy}")
        self.problem, self.remedy, self.code = problem, remedy, code


class Complaint(NamedTuple):
    """One invalid value, before its file is known."""

    keys: Keys
    problem: str
    remedy: str
    code: str = "invalid-value"


def problem(text: str, remedy: str, *keys: str | int, code: str = "invalid-value") -> PydanticCustomError:
    """Return the exception that a validator raises.

    Args:
        text: What is wrong.
        remedy: How to fix it.
        keys: Key path of the value, relative to the validated one.
        code: Kind of error, one of `revnets.config.error_codes.CODES`.
    """
    return PydanticCustomError("spec", "{problem}", {"problem": text, "remedy": remedy, "keys": keys, "code": code})


def explain(error: ValidationError, data: Any, model: type[BaseModel] | None = None) -> Complaint:
    """Return the most specific pydantic error about `data`, in words that need no knowledge of Python.

    Args:
        error: Exception of pydantic.
        data: Validated data, to separate its keys from the names of types in the locations of pydantic.
        model: Model with the known keys, and with examples for missing keys.
    """
    found = [(_keys_in(data, item["loc"], item["type"] == "missing"), item) for item in error.errors(include_url=False)]
    # A misspelled required key is reported twice, as unknown and as missing. The unknown key is what to fix.
    keys, first = next((pair for pair in found if pair[1]["type"] == "extra_forbidden"), found[0])
    inside = [pair for pair in found if pair[0][: len(keys)] == keys]
    keys, first = max(inside, key=lambda pair: len(pair[0]))  # the first of the deepest: the best branch of a union
    value, context = first["input"], first.get("ctx", {})
    match first["type"]:
        case "spec":
            return Complaint((*keys, *context["keys"]), context["problem"], context["remedy"], context["code"])
        case "extra_forbidden":
            known = _field(model, keys[:-1])[0]
            remedy = nearest(keys[-1], known, "Known keys are")
            return Complaint(keys, f"unknown key (value {show(value)})", remedy, code="unknown-key")
        case "missing" if isinstance(keys[-1], int):
            text = f"the list is too short ({keys[-1]} given)"
            return Complaint(keys[:-1], text, "Add a value", code="wrong-length")
        case "missing":
            examples = [f"`{keys[-1]}: {example}`" for example in _field(model, keys)[1] or ["..."]]
            remedy = f"Add it, as in {' or '.join(examples)}"
            return Complaint(keys, "this key is missing", remedy, code="missing-key")
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            word, bound = _BOUNDS[first["type"]]
            remedy = f"Give {bound} {next(iter(context.values()))}"
            return Complaint(keys, f"{show(value)} is too {word}", remedy, code="out-of-range")
        case "literal_error" | "enum":
            remedy = f"Choose {context['expected']}"
            return Complaint(keys, f"{show(value)} is not a valid choice", remedy, code="unknown-choice")
        case kind if kind in _WANTED:
            kinds = {item["type"] for place, item in inside if place == keys and item["type"] in _WANTED}
            wanted = list(dict.fromkeys(_WANTED[kind] for kind in _WANTED if kind in kinds))
            text, remedy, code = _wrong_type(value, wanted)
            examples = _field(model, keys)[1] if wanted == ["a mapping"] else []
            return Complaint(keys, text, f"{remedy}, as in `{keys[-1]}: {examples[0]}`" if examples else remedy, code)
    return Complaint(keys, f"{show(value)}: {first['msg'][0].lower()}{first['msg'][1:]}", "", code="invalid-value")


_BOUNDS = {
    "greater_than": ("small", "more than"),
    "greater_than_equal": ("small", "at least"),
    "less_than": ("large", "less than"),
    "less_than_equal": ("large", "at most"),
}
_WANTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "iterable_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "null",
}
"""Types of pydantic errors, and the value that is expected."""

EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
"""A number in scientific notation, which is text in YAML 1.1 unless it has a dot and a signed exponent."""

AMBIGUOUS = re.compile(
    r"[-+]?(0b_*[01][01_]*|0o_*[0-7][0-7_]*|0x_*[\da-fA-F][\da-fA-F_]*"
    r"|(0[\d_]*\d|\d[\d_]*(:\d[\d_]*)+|(?=.*_)\d[\d_]*)(\.[\d_]*)?)"
)
"""A number with leading zeros (octal in YAML 1.1), colons (base 60), underscores, or a prefix of another base."""


def _decimal(text: str) -> str:
    """Return an ambiguous number in the decimal form that its author most likely means."""
    digits = text.replace("_", "")
    sign, digits = (digits[0], digits[1:]) if digits[0] in "+-" else ("", digits)
    if ":" in digits:
        return "a single number"
    if digits[1:2] in ("b", "o", "x"):
        return f"{sign}{int(digits[:60], 0)}"
    digits = digits[:60].lstrip("0")
    return f"{sign}{digits}" if digits[:1].isdecimal() else f"{sign}0{digits}"


def _wrong_type(value: Any, wanted: list[str]) -> tuple[str, str, str]:
    """Return problem, hint and code for a value of the wrong type."""
    if isinstance(value, str) and {"a number", "a whole number"} & set(wanted):
        if EXPONENT.fullmatch(value):
            mantissa, exponent = re.split("[eE]", value)
            dot, sign = "" if "." in mantissa else ".0", "" if exponent[0] in "+-" else "+"
            whole = f"{float(value):.0f}" if abs(float(value)) < 1e18 else "a smaller number"
            better = f"{mantissa}{dot}e{sign}{exponent}" if "a number" in wanted else whole
            return f"YAML reads {value} as text, not as a number", f"Write {better}", "number-as-text"
        if AMBIGUOUS.fullmatch(value):
            text = f"{show(value)} is ambiguous in YAML 1.1, so it is text"
            return text, f"Write {_decimal(value)}", "number-as-text"
        if re.fullmatch(r"[-+]?\d+(\.\d+)?", value):
            return f"{show(value)} is text", f"Give {' or '.join(wanted)}, without quotes", "number-as-text"
    if wanted == ["text"] and isinstance(value, (bool, int, float)):
        return what(value), "Give text: put the value in quotes", "wrong-type"
    return what(value), f"Give {' or '.join(wanted)}", "wrong-type"


def nearest(word: Any, known: Iterable[str], otherwise: str) -> str:
    """Return a hint for an unknown name: the most similar known name, or `otherwise` followed by the first dozen."""
    known = list(islice(known, 10_000))
    near = get_close_matches(str(word)[:200], known, n=1)
    few = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"Did you mean {near[0]}?" if near else f"{otherwise} {few}"


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error without a period, or the name of its class."""
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def what(value: Any) -> str:
    """Return a value and its kind, such as `"a" is text`, for the beginning of an error message."""
    if value is None:
        return "no value is given (null)"
    names = {
        bool: "a yes/no value",
        int: "a whole number",
        float: "a decimal number",
        str: "text",
        list: "a list",
        tuple: "a list",
        dict: "a mapping",
    }
    return f"{show(value)} is {names.get(type(value), f'of type {type(value).__name__}')}"


def show(value: Any) -> str:
    """Return a value in YAML notation, shortened to 60 characters."""
    text = _line(json.dumps(_beginning(value, [60]), ensure_ascii=False, default=str))
    return text if len(text) <= 60 else text[:57] + "..."


def _beginning(value: Any, room: list[int]) -> Any:
    """Return the beginning of a value, as much as fits on a line. Lists that refer to each other can be huge.

    Args:
        room: How many more values may be shown. Each takes at least two characters.
    """
    room[0] -= 1
    if isinstance(value, str):
        return value[:200]
    if isinstance(value, int) and value.bit_length() > 256:
        return hex(value)[:60]  # Python refuses to convert very long integers to decimal text
    if isinstance(value, dict):
        items = takewhile(lambda _: room[0] > 0, value.items())
        return {
            key[:200] if isinstance(key, str) else type(key).__name__: _beginning(item, room) for key, item in items
        }
    if isinstance(value, (list, tuple)):
        return [_beginning(item, room) for item in takewhile(lambda _: room[0] > 0, value)]
    return f"a {type(value).__name__}" if isinstance(value, (set, frozenset)) else value


def path(keys: Sequence[str | int]) -> str:
    """Return keys as a key path, such as `levels.0.dim`."""
    return ".".join(str(key) for key in keys)


def _keys_in(data: Any, location: Sequence[str | int], is_missing: bool) -> Keys:
    """Return the part of a pydantic location that consists of keys of the data, without names of union branches.

    Args:
        is_missing: Whether the last item is a key that is missing in the data.
    """
    keys: list[str | int] = []
    for depth, key in enumerate(location):
        if isinstance(data, dict) and (key in data or (is_missing and depth == len(location) - 1)):
            data = data.get(key)
        elif isinstance(data, (list, tuple)) and isinstance(key, int):
            data = data[key] if key < len(data) else None
        else:
            continue
        keys.append(key)
    return tuple(keys)


def _field(model: type[BaseModel] | None, keys: Keys) -> tuple[list[str], list[Any]]:
    """Return the known keys at this place of the model, and its examples."""
    examples: list[Any] = []
    for key in keys:
        if model is not None and isinstance(key, str) and key in model.model_fields:
            field = model.model_fields[key]
            examples = field.examples or []
            model = next(iter(_models_in(field.annotation)), None)
    return ([] if model is None else list(model.model_fields)), examples


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]


def _line(text: str) -> str:
    """Return a text on one line without the final period, which the error message adds."""
    line = _shortened(text)
    return line if line.endswith("...") else line.removesuffix(".")


def _shortened(text: str, most: int = 2000) -> str:
    """Return a text on one line, cut after `most` characters with an ellipsis."""
    line = printable(" ".join(text[: 2 * most].split()))
    return line if len(line) <= most else line[:most] + "..."


def printable(text: str) -> str:
    """Return a text that every terminal and file accepts, with control characters and lone surrogates escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
