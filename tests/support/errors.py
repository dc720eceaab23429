"""Assertions on errors: code, key and source, but not the wording.

The wording of many errors is in tests/golden/messages.txt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from revnets.config.errors import ConfigError


@contextmanager
def raises_error(expected: type[Exception] = ConfigError, **about: Any) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Like `pytest.raises`, and check the error with `assert_error`."""
    with pytest.raises(expected) as caught:
        yield caught
    assert_error(caught.value, expected, **about)


def assert_error(
    error: Any,
    expected: type[Exception] = ConfigError,
    *,
    code: str,
    key: str | None = None,
    source: object = None,
    cell: str | None = None,
    names: str | Sequence[str] = (),
) -> None:
    """Assert that an error has this type, a one-line message and these attributes.

    Args:
        code, key, source, cell: Attributes of the error. None is not compared.
        names: Texts that the message must contain, such as a file, a value or a suggestion.
    """
    assert isinstance(error, expected), repr(error)
    given = {"code": code, "key": key, "source": None if source is None else str(source), "cell": cell}
    wanted = {name: value for name, value in given.items() if value is not None}
    assert {name: getattr(error, name) for name in wanted} == wanted, str(error)
    assert "\n" not in str(error)
    for name in (names,) if isinstance(names, str) else names:
        assert name in str(error)
