"""What is said when something in a configuration is wrong: one line that names file, key, value and remedy."""

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
    """Something that the user gave cannot be used: names the file, the key path, the value and what to do.

    Attributes:
        source: the file, or where else the value was given, such as "command line".
        key: the key path in it, such as "levels.0.dim", or the option, such as "--png"; empty for the whole source.
        message: what is wrong, on one line; also `problem`.
        hint: what to do about it, on one line, or empty; also `remedy`.
        code: the kind of error, one of `revnets.config.error_codes.CODES`. Unlike the words, it does not change.
    """

    def __init__(self, source: str, key: str, message: str, hint: str = "", code: str = "invalid-value"):
        self.source, self.key, self.message, self.hint = source, _line(key), _line(message), _line(hint)
        self.code = code
        where = _shortened(str(source))
        where += f": {self.key}" if self.key else ""
        super().__init__(f"{where}: {self.message}{'.' if hint else ''} {self.hint}".rstrip())

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross process borders
        return ConfigError, (self.source, self.key, self.message, self.hint, self.code)

    @property
    def problem(self) -> str:
        return self.message

    @property
    def remedy(self) -> str:
        return self.hint


SpecError = ConfigError
"""The name under which errors in the specification of a net are known."""


def option_error(option: str, message: str, hint: str = "", code: str = "invalid-value") -> ConfigError:
    """The error for an option or argument of a command, such as `--png`."""
    return ConfigError("command line", option, message, hint, code)


class PartError(ValueError):
    """A name that refers to no component. `remedy` says what to do, `code` is the kind of error."""

    def __init__(self, problem: str, remedy: str, code: str):
        super().__init__(f"{problem}. {remedy}")
        self.problem, self.remedy, self.code = problem, remedy, code


class Complaint(NamedTuple):
    """One mistake, before it is known which file it stands in."""

    keys: Keys
    problem: str
    remedy: str
    code: str = "invalid-value"


def problem(text: str, remedy: str, *keys: str | int, code: str = "invalid-value") -> PydanticCustomError:
    """What a validator raises: a problem at `keys` below its own place, and what to do about it."""
    return PydanticCustomError("spec", "{problem}", {"problem": text, "remedy": remedy, "keys": keys, "code": code})


def explain(error: ValidationError, data: Any, model: type[BaseModel] | None = None) -> Complaint:
    """The most telling of pydantic's complaints about `data`, in words that need no knowledge of Python.

    Args:
        data: what was validated; tells keys of the data from names of types, which pydantic lists among them.
        model: gives the known keys and examples of missing ones.
    """
    found = [(_keys_in(data, item["loc"], item["type"] == "missing"), item) for item in error.errors(include_url=False)]
    # A misspelt key is also a missing one, and the misspelling is what to mend.
    keys, first = next((pair for pair in found if pair[1]["type"] == "extra_forbidden"), found[0])
    inside = [pair for pair in found if pair[0][: len(keys)] == keys]
    keys, first = max(inside, key=lambda pair: len(pair[0]))  # the first of the deepest: a union's best branch
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
            return Complaint(keys[:-1], text, "Give one value more", code="wrong-length")
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
            return Complaint(keys, f"{show(value)} is none of the choices", remedy, code="unknown-choice")
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
"""Pydantic's type errors, and what the user should have given."""

EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
"""A number in scientific notation that YAML 1.1 takes for text unless it has a dot and a signed exponent."""

AMBIGUOUS = re.compile(
    r"[-+]?(0b_*[01][01_]*|0o_*[0-7][0-7_]*|0x_*[\da-fA-F][\da-fA-F_]*"
    r"|(0[\d_]*\d|\d[\d_]*(:\d[\d_]*)+|(?=.*_)\d[\d_]*)(\.[\d_]*)?)"
)
"""A number with leading zeros (octal in YAML 1.1), colons (to the base of 60), underscores, or another base."""


def _decimal(text: str) -> str:
    """What a person means by a number that is ambiguous in YAML."""
    digits = text.replace("_", "")
    sign, digits = (digits[0], digits[1:]) if digits[0] in "+-" else ("", digits)
    if ":" in digits:
        return "it as one number"
    if digits[1:2] in ("b", "o", "x"):
        return f"{sign}{int(digits[:60], 0)}"
    digits = digits[:60].lstrip("0")
    return f"{sign}{digits}" if digits[:1].isdecimal() else f"{sign}0{digits}"


def _wrong_type(value: Any, wanted: list[str]) -> tuple[str, str, str]:
    """Problem, remedy and code."""
    if isinstance(value, str) and {"a number", "a whole number"} & set(wanted):
        if EXPONENT.fullmatch(value):
            mantissa, exponent = re.split("[eE]", value)
            dot, sign = "" if "." in mantissa else ".0", "" if exponent[0] in "+-" else "+"
            whole = f"{float(value):.0f}" if abs(float(value)) < 1e18 else "a smaller number"
            better = f"{mantissa}{dot}e{sign}{exponent}" if "a number" in wanted else whole
            return f"YAML reads {value} as text, not as a number", f"Write {better}", "number-as-text"
        if AMBIGUOUS.fullmatch(value):
            text = f"{show(value)} is text, for YAML 1.1 reads it in another way than people do"
            return text, f"Write {_decimal(value)}", "number-as-text"
        if re.fullmatch(r"[-+]?\d+(\.\d+)?", value):
            return f"{show(value)} is text", f"Give {' or '.join(wanted)}, without quotes", "number-as-text"
    if wanted == ["text"] and isinstance(value, (bool, int, float)):
        return what(value), "Give text: put it in quotes", "wrong-type"
    return what(value), f"Give {' or '.join(wanted)}", "wrong-type"


def nearest(word: Any, known: Iterable[str], otherwise: str) -> str:
    """A remedy for a name that is not known: the most similar one, or the first dozen after the words `otherwise`."""
    known = list(islice(known, 10_000))
    near = get_close_matches(str(word)[:200], known, n=1)
    few = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"Did you mean {near[0]}?" if near else f"{otherwise} {few}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message without a period, or the name of its class."""
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def what(value: Any) -> str:
    """The value and what it is, as the beginning of a complaint."""
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
    """The value in the notation of YAML, shortened to a part of a line."""
    text = _line(json.dumps(_beginning(value, [60]), ensure_ascii=False, default=str))
    return text if len(text) <= 60 else text[:57] + "..."


def _beginning(value: Any, room: list[int]) -> Any:
    """As much of a value as a line can show: lists may refer to each other, and so be large beyond all bounds.

    Args:
        room: how many values are left to show; each takes two characters or more.
    """
    room[0] -= 1
    if isinstance(value, str):
        return value[:200]
    if isinstance(value, int) and value.bit_length() > 256:
        return hex(value)[:60]  # longer ones have no decimal text in Python
    if isinstance(value, dict):
        items = takewhile(lambda _: room[0] > 0, value.items())
        return {
            key[:200] if isinstance(key, str) else type(key).__name__: _beginning(item, room) for key, item in items
        }
    if isinstance(value, (list, tuple)):
        return [_beginning(item, room) for item in takewhile(lambda _: room[0] > 0, value)]
    return f"a {type(value).__name__}" if isinstance(value, (set, frozenset)) else value


def path(keys: Sequence[str | int]) -> str:
    return ".".join(str(key) for key in keys)


def _keys_in(data: Any, location: Sequence[str | int], is_missing: bool) -> Keys:
    """The part of pydantic's location that leads through the data, without the names of a union's branches.

    Args:
        is_missing: is the last one the name of a key that the data lack?
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
    """The known keys at this place of the model, and the examples that belong to it."""
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
    """Any text on one line, without the full stop that a sentence of ours will add."""
    line = _shortened(text)
    return line if line.endswith("...") else line.removesuffix(".")


def _shortened(text: str, most: int = 2000) -> str:
    """A text on one line of at most this many characters, and an ellipsis."""
    line = printable(" ".join(text[: 2 * most].split()))
    return line if len(line) <= most else line[:most] + "..."


def printable(text: str) -> str:
    """A text on one line that every terminal and file accepts: control characters and lone surrogates are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
