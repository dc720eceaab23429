"""The error of text and translations that cannot be used."""

from __future__ import annotations


class TranslationError(ValueError):
    """Data cannot be used. The message is one line: what was given, what is wrong with it and what to do.

    `code` is the kind of error, one of `revnets.config.error_codes.CODES`.
    """

    def __init__(self, message: str, code: str = "invalid-value"):
        super().__init__(" ".join(message.splitlines()))  # names of files may have line feeds
        self.code = code


DataError = TranslationError
"""The former name."""
