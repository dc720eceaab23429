"""Language codes: two letters, optionally followed by a script or a region, as in `pt_BR`.

Worker processes import this module, so it imports nothing that imports torch.
"""

from __future__ import annotations

import re

from .errors import TranslationError

# ISO 639-1, and longer codes that Moses' tokenizer has rules for.
_CODES = """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv
    ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne
    ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st
    su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu mni tdt yue
"""
LANGUAGES = frozenset(_CODES.split())
UNSEGMENTED = frozenset(["bo", "dz", "ja", "km", "lo", "my", "th", "yue", "zh"])
"""Languages written without spaces between words; Moses' tokenizer does not segment them."""

LONGEST = 100
"""Maximum characters of a language pair, because every way to split it is tried."""

_TAG = re.compile(r"([A-Za-z]{2,3})(?:[-_]([A-Za-z]{4}))?(?:[-_]([A-Za-z]{2}|[0-9]{3}))?")
_OTHER_SEPARATOR = re.compile(r"\s*(?:->|=>|[_:>/,→+|;.]|\bto\b|\s)\s*")
_FORM = "Write source and target with a hyphen, such as en-de, and a region with an underscore, such as en-pt_BR"


def languages(text: str) -> tuple[str, str]:
    """Parse a language pair such as `en-de`, `en-pt_BR` or `en_XX-de_DE`.

    A region may also follow a hyphen, as in `en-zh-CN`, if only one reading of the pair is possible.

    Returns:
        The canonical codes of source and target.

    Raises:
        TranslationError: If the text is not a pair of two different known languages.
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
        raise TranslationError(f"languages {text!r}: ambiguous. Write {ways}, with underscores", code="invalid-syntax")
    if readings:
        raise TranslationError(
            f"languages {text!r}: source and target are the same. Give two languages, such as en-de",
            code="invalid-syntax",
        )
    if len(parts) == 2:
        for side in parts:
            known_language(side.strip())
    words = [canonical(word) for word in _OTHER_SEPARATOR.split(text.strip())]
    remedy = f"Write {words[0]}-{words[1]}" if len(words) == 2 and all(words) else _FORM
    raise TranslationError(f"languages {text!r}: not a language pair. {remedy}", code="invalid-syntax")


def known_language(code: str) -> str:
    """Return the canonical form of a language code.

    Raises:
        TranslationError: If the language is unknown.
    """
    if found := canonical(code):
        return found
    from revnets.config.errors import nearest

    remedy = nearest(code, sorted(LANGUAGES), "Use a code of ISO 639-1, such as en or de; known codes are")
    if (match := _TAG.fullmatch(code)) and len(match[1]) == 3:
        remedy = "Use the two-letter code (ISO 639-1), such as en for eng, with a region as in pt_BR or zh_CN"
    raise TranslationError(f"unknown language {code!r}. {remedy}", code="unknown-choice")


def canonical(code: str) -> str | None:
    """Return a code with underscores and the case that ISO recommends, as in `zh_Hant_TW`; None if it is unknown."""
    match = _TAG.fullmatch(code)
    if match is None or match[1].lower() not in LANGUAGES:
        return None
    return "_".join(filter(None, (match[1].lower(), (match[2] or "").title(), (match[3] or "").upper())))


def base_language(code: str) -> str:
    """Return the language without script and region; Moses has no rules for these."""
    return code.partition("_")[0]


def _cased(side: str) -> bool:
    """Return True if the case distinguishes language and region, as in `pt-BR`."""
    language, *rest = re.split("[-_]", side)
    return language.islower() and not (rest and rest[-1].islower() and len(rest[-1]) == 2)
