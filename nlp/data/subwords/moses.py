"""Moses' tokenizer, detokenizer and punctuation normalizer (sacremoses)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import regex
from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

from ..languages import base_language

_CONTROL = regex.compile(r"\p{C}")


@lru_cache(maxsize=8)
def _moses(language: str) -> tuple[MosesPunctNormalizer, MosesTokenizer]:
    return MosesPunctNormalizer(language, perl_parity=True), MosesTokenizer(language)


def tokenize(lines: Sequence[str], language: str, normalize: bool = True, aggressive_dashes: bool = False) -> list[str]:
    """Tokenize sentences as Moses' tokenizer.perl does; &, |, <, >, quotes and brackets are escaped.

    Args:
        lines: Sentences.
        language: Code of the language; the rules do not depend on its region.
        normalize: Run Moses' normalize-punctuation first, and replace unprintable characters by spaces. Otherwise only
            the typographic apostrophe is replaced.
        aggressive_dashes: Split words at hyphens, marked `@-@`.

    Returns:
        One string per sentence, with tokens separated by single spaces.
    """
    normalizer, tokenizer = _moses(base_language(language))
    if normalize:
        lines = [_CONTROL.sub(" ", normalizer.normalize(line)) for line in lines]
    else:
        lines = [line.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'") for line in lines]
    return [str(tokenizer.tokenize(line, aggressive_dashes, return_str=True)) for line in lines]


def detokenize(lines: Iterable[str], language: str) -> list[str]:
    """Convert tokens separated by spaces back to plain sentences.

    Args:
        lines: Sentences as `tokenize` returns them.
        language: Code of the language.

    Returns:
        The detokenized sentences.
    """
    detokenizer = MosesDetokenizer(base_language(language))
    return [str(detokenizer.detokenize(line.split())) for line in lines]
