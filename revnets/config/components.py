"""A stem, fusion, head or block as a configuration names it: a name and options, checked against the signature."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BeforeValidator, ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError, ValidationInfo

from revnets.config.errors import explain, nearest, problem, show, what
from revnets.config.loader import Strict, validate
from revnets.config.registry import PROVIDED, PartError, names, options


class PartSpec(Strict):
    """A stem, fusion or head: its name and options. `linear` alone means `{type: linear}`."""

    type: str
    options: dict[str, Any] = Field(default_factory=dict)


def part(kind: str) -> BeforeValidator:
    """Validator that splits {type: name, option: value, ...} into name and checked options."""

    def split(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, PartSpec):
            return value
        if isinstance(value, str):
            name, checked = name_and_options(kind, {"type": value}, "type", ("type",), info, short=True)
        elif isinstance(value, dict):
            name, checked = name_and_options(kind, value, "type", ("type",), info)
        else:
            raise problem(
                what(value), f"Give a name, or {{type: name, ...}} with the options of the {kind}", code="wrong-type"
            )
        return {"type": name, "options": checked}

    return BeforeValidator(split)


def name_and_options(
    kind: str, given: dict[str, Any], key: str, reserved: Sequence[str], info: ValidationInfo, short: bool = False
) -> tuple[str, dict[str, Any]]:
    """The name that stands at `key`, and all that is not reserved as options, checked against the signature.

    Args:
        reserved: keys that are no options.
        info: of pydantic; its context may name `folders` of modules, as `revnets.config.loader` gives it.
        short: the name stands alone, so complaints about it belong to the place itself.
    """
    if key not in given:
        for other in get_close_matches(key, given, n=1):
            raise problem(
                f"unknown key (value {show(given[other])})", f"Did you mean {key}?", other, code="unknown-key"
            )
        raise problem("this key is missing", f"Add it, as in `{key}: {names(kind)[0]}`", key, code="missing-key")
    name = given[key]
    if not isinstance(name, str):
        raise problem(what(name), f"Give the name of a {kind}, or package.module:Class", key, code="wrong-type")
    try:
        allowed = options(kind, name, (info.context or {}).get("folders", ()))
    except PartError as error:
        raise problem(error.problem, error.remedy, *(() if short else (key,)), code=error.code) from None
    checked = {}
    for option, value in given.items():
        if option in reserved:
            continue
        if option in PROVIDED[kind]:
            raise problem(
                f'{kind} "{name}" is given {option} from the levels', "Remove the key", option, code="reserved-key"
            )
        if option in allowed:
            checked[option] = _typed(option, value, allowed[option])
        elif "**" in allowed:
            checked[option] = value
        else:
            known = [*reserved, *allowed]
            text = f'unknown key: {kind} "{name}" has no such option (value {show(value)})'
            raise problem(text, nearest(option, known, "Known keys are"), option, code="unknown-key")
    for option, parameter in allowed.items():
        if option != "**" and parameter.default is inspect.Parameter.empty and option not in checked:
            if option in reserved:
                text = f'the argument {option} of {kind} "{name}" has the name of a key'
                raise problem(text, "Rename the argument in its code", key, code="name-clash")
            raise problem(
                f'{kind} "{name}" needs this option', f"Add it, as in `{option}: ...`", option, code="missing-key"
            )
    return name, checked


def _typed(option: str, value: Any, parameter: inspect.Parameter) -> Any:
    """The value in the type that the part's signature asks for: a list becomes a tuple, but no text a number."""
    if parameter.annotation is inspect.Parameter.empty or isinstance(parameter.annotation, str):
        return value
    config = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    try:
        return validate(TypeAdapter(parameter.annotation, config=config), value)
    except ValidationError as error:
        complaint = explain(error, value)
    except (PydanticUserError, TypeError, NameError):  # a type that pydantic has no check for
        return value
    raise problem(complaint.problem, complaint.remedy, option, *complaint.keys, code=complaint.code)
