"""How sacrebleu splits the text of a language into words, and the codes by which a language is named."""

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
"""ISO 639-3, as in the codes of FLORES (deu_Latn), and the codes of two letters."""

TOKENIZERS = dict.fromkeys(UNSEGMENTED, "char") | {"zh": "zh", "yue": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
"""Tokenizers of sacrebleu for languages to which its usual one, 13a, does not apply."""


def target_language(tag: str) -> str:
    """The code of a language without region and script: pt for pt_BR, zh for zh-Hans or zho_Hans.

    Raises:
        TranslationError: no language has this code.
    """
    base = re.split("[-_@]", tag)[0].lower()
    if base not in THREE_LETTERS and re.fullmatch("[a-z]{3}_[A-Z][a-z]{3}", tag):
        return base  # a language of FLORES without a code of two letters
    return known_language(THREE_LETTERS.get(base, base))


def default_tokenizer(language: str) -> str:
    """That of sacrebleu for a language; `char` for Japanese and Korean if their dictionaries are not installed."""
    name = TOKENIZERS.get(language, "13a")
    if not name.endswith("mecab"):
        return name
    try:
        BLEU(tokenize=name)
    except (RuntimeError, ImportError):
        return "char"
    return name


def fallback(language: str) -> str | None:
    """Why `default_tokenizer` is not the one of the language, if so; one line."""
    name = TOKENIZERS.get(language, "")
    if not name.endswith("mecab") or default_tokenizer(language) == name:
        return None
    return (
        f"sacreBLEU counts characters, because its tokenizer {name} is not installed. For words: pip install "
        f"'sacrebleu[{language}]'"
    )


def metric(tokenizer: str) -> BLEU:
    """BLEU with one of sacrebleu's tokenizers.

    Raises:
        TranslationError: there is no such tokenizer, or what it needs is not installed or cannot be downloaded.
    """
    if tokenizer not in BLEU.TOKENIZERS:
        raise TranslationError(
            f"tokenizer {tokenizer!r} is not known. {nearest(tokenizer, BLEU.TOKENIZERS, 'sacrebleu has')}",
            code="unknown-choice",
        )
    try:
        return BLEU(tokenize=tokenizer, force=True)
    except (RuntimeError, ImportError, OSError, SystemExit) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise TranslationError(
            f"tokenizer {tokenizer} of sacrebleu cannot be used: {reason}", code="missing-dependency"
        ) from error
