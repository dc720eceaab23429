"""sacrebleu's tokenizers by language, and language codes of other standards."""

from __future__ import annotations

import re

from sacrebleu.metrics.bleu import BLEU

from revnets.config.errors import nearest

from ..data.errors import TranslationError
from ..data.languages import UNSEGMENTED, known_language

_CODES = """
    afr:af amh:am arb:ar ara:ar asm:as azj:az bel:be ben:bn bod:bo bos:bs bul:bg cat:ca ces:cs cmn:zh cym:cy dan:da
    deu:de dzo:dz ell:el eng:en epo:eo est:et eus:eu fas:fa fin:fi fra:fr gle:ga glg:gl guj:gu hau:ha heb:he hin:hi
    hrv:hr hun:hu hye:hy ibo:ig ind:id isl:is ita:it jav:jv jpn:ja kan:kn kat:ka kaz:kk khm:km kor:ko lao:lo lit:lt
    ltz:lb lvs:lv mal:ml mar:mr mkd:mk mlt:mt mya:my nld:nl nno:nn nob:nb npi:ne pan:pa pes:fa pol:pl por:pt ron:ro
    rus:ru sin:si slk:sk slv:sl som:so spa:es srp:sr swe:sv swh:sw tam:ta tel:te tgk:tg tgl:tl tha:th tur:tr ukr:uk
    urd:ur uzn:uz vie:vi xho:xh yor:yo zho:zh zsm:ms zul:zu
"""
THREE_LETTERS = {pair[:3]: pair[4:] for pair in _CODES.split()}
"""Two-letter codes by ISO 639-3 code, as in the codes of FLORES (deu_Latn)."""

TOKENIZERS = dict.fromkeys(UNSEGMENTED, "char") | {"zh": "zh", "yue": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
"""sacrebleu's tokenizers for languages that its default, 13a, does not support."""


def target_language(tag: str) -> str:
    """Return the code of a language without region and script: pt for pt_BR, zh for zh-Hans or zho_Hans.

    Raises:
        TranslationError: If the language is unknown.
    """
    base = re.split("[-_@]", tag)[0].lower()
    if base not in THREE_LETTERS and re.fullmatch("[a-z]{3}_[A-Z][a-z]{3}", tag):
        return base  # a language of FLORES without a two-letter code
    return known_language(THREE_LETTERS.get(base, base))


def default_tokenizer(language: str) -> str:
    """Return sacrebleu's tokenizer for a language; `char` for Japanese and Korean without their dictionaries."""
    name = TOKENIZERS.get(language, "13a")
    if not name.endswith("mecab"):
        return name
    try:
        BLEU(tokenize=name)
    except (RuntimeError, ImportError):
        return "char"
    return name


def fallback(language: str) -> str | None:
    """Return a warning if `default_tokenizer` falls back to `char` for a language, else None."""
    name = TOKENIZERS.get(language, "")
    if not name.endswith("mecab") or default_tokenizer(language) == name:
        return None
    return (
        f"sacreBLEU compares characters, because its tokenizer {name} is not installed. To compare words: pip install "
        f"'sacrebleu[{language}]'"
    )


def metric(tokenizer: str) -> BLEU:
    """Create BLEU with one of sacrebleu's tokenizers.

    Raises:
        TranslationError: If the tokenizer is unknown, or if its data is not installed and cannot be downloaded.
    """
    if tokenizer not in BLEU.TOKENIZERS:
        raise TranslationError(
            f"unknown tokenizer {tokenizer!r}. {nearest(tokenizer, BLEU.TOKENIZERS, 'sacrebleu has')}",
            code="unknown-choice",
        )
    try:
        return BLEU(tokenize=tokenizer, force=True)
    except (RuntimeError, ImportError, OSError, SystemExit) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise TranslationError(
            f"sacrebleu's tokenizer {tokenizer} cannot be used: {reason}", code="missing-dependency"
        ) from error
