"""The exception for unusable text and translations."""

from __future__ import annotations


class TranslationError(ValueError):
    """Unusable data. The message is one line: the value or file, what is wrong, and how to fix it.

    Attributes:
        code: Kind of error, one of `revnets.config.error_codes.CODES`.
    """

    def __init__(self, message: str, code: str = "invalid-value"):
        super().__init__(" ".join(message.splitlines()))  # file names may contain line feeds
        self.code = code


DataError = TranslationError
"""Former name of `TranslationError`."""
