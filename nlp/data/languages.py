"""Codes of languages: of two letters, with a script or a region behind an underscore where there is one.

Imports nothing that imports torch: processes that tokenize text do without it.
"""

from __future__ import annotations

import re

from .errors import TranslationError

# ISO 639-1, and the languages with a longer code that Moses' tokenizer has rules for.
_CODES = """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv
    ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne
    ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st
    su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu mni tdt yue
"""
LANGUAGES = frozenset(_CODES.split())
UNSEGMENTED = frozenset(["bo", "dz", "ja", "km", "lo", "my", "th", "yue", "zh"])
"""Languages that are written without spaces between words, which Moses' tokenizer does not segment."""

LONGEST = 100
"""Characters of a pair of languages. A longer text takes too long to be split in every way."""

_TAG = re.compile(r"([A-Za-z]{2,3})(?:[-_]([A-Za-z]{4}))?(?:[-_]([A-Za-z]{2}|[0-9]{3}))?")
_OTHER_SEPARATOR = re.compile(r"\s*(?:->|=>|[_:>/,→+|;.]|\bto\b|\s)\s*")
_FORM = "Give source and target with a hyphen between, such as en-de, and a region behind an underscore: en-pt_BR"


def languages(text: str) -> tuple[str, str]:
    """Read a pair of languages such as `en-de`, `en-pt_BR` or `en_XX-de_DE`; case is that of `canonical`.

    A region may follow a hyphen, too, where the pair can be read in one way only: `en-zh-CN`.

    Raises:
        TranslationError: not two different languages, or none that are known.
    """
    if len(text) > LONGEST:
        raise TranslationError(f"languages {text[:LONGEST]!r}...: too long. {_FORM}", code="invalid-syntax")
    parts = text.split("-")
    readings = []
    for cut in range(1, len(parts)):
        sides = "-".join(parts[:cut]).strip(), "-".join(parts[cut:]).strip()
        source, target = map(canonical, sides)
        if source and target and (len(parts) == 2 or text in (text.lower(), text.upper()) or all(map(_cased, sides))):
            readings.append((source, target))
    if len(readings) == 1 and readings[0][0] != readings[0][1]:
        return readings[0]
    if len(readings) > 1:
        ways = " or ".join("-".join(pair) for pair in readings)
        raise TranslationError(
            f"languages {text!r}: can be read as {ways}. Write one of these, with underscores", code="invalid-syntax"
        )
    if readings:
        raise TranslationError(
            f"languages {text!r}: source and target are the same. Give two, such as en-de", code="invalid-syntax"
        )
    if len(parts) == 2:
        for side in parts:
            known_language(side.strip())
    words = [canonical(word) for word in _OTHER_SEPARATOR.split(text.strip())]
    remedy = f"Write {words[0]}-{words[1]}" if len(words) == 2 and all(words) else _FORM
    raise TranslationError(f"languages {text!r} are no pair. {remedy}", code="invalid-syntax")


def known_language(code: str) -> str:
    """The code as `canonical` writes it.

    Raises:
        TranslationError: no language has it.
    """
    if found := canonical(code):
        return found
    from revnets.config.errors import nearest

    remedy = nearest(code, sorted(LANGUAGES), "Give a code of ISO 639-1, such as en or de; known are")
    if (match := _TAG.fullmatch(code)) and len(match[1]) == 3:
        remedy = "Give the code of two letters (ISO 639-1), such as en for eng, with a region as in pt_BR or zh_CN"
    raise TranslationError(f"language {code!r} is not known. {remedy}", code="unknown-choice")


def canonical(code: str) -> str | None:
    """A code with underscores and the case that ISO recommends, as in `zh_Hant_TW`; None if no language has it."""
    match = _TAG.fullmatch(code)
    if match is None or match[1].lower() not in LANGUAGES:
        return None
    return "_".join(filter(None, (match[1].lower(), (match[2] or "").title(), (match[3] or "").upper())))


def base_language(code: str) -> str:
    """The language without script and region: Moses has rules for languages alone."""
    return code.partition("_")[0]


def _cased(side: str) -> bool:
    """Whether the case distinguishes language and region, as in `pt-BR`."""
    language, *rest = re.split("[-_]", side)
    return language.islower() and not (rest and rest[-1].islower() and len(rest[-1]) == 2)
