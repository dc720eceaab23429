"""Assertions on what an error is about: its code, its key and its source, but not its wording.

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
    """Like `pytest.raises`, for an error about which `assert_error` holds."""
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
    """An error is of this type, has one line of text and these attributes.

    Args:
        code, key, source, cell: attributes of the error; `None` for one that is not compared.
        names: what the text must name in particular, such as a file, a value or a suggestion.
    """
    assert isinstance(error, expected), repr(error)
    given = {"code": code, "key": key, "source": None if source is None else str(source), "cell": cell}
    wanted = {name: value for name, value in given.items() if value is not None}
    assert {name: getattr(error, name) for name in wanted} == wanted, str(error)
    assert "\n" not in str(error)
    for name in (names,) if isinstance(names, str) else names:
        assert name in str(error)
