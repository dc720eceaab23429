"""BLEU of what fairseq wrote, in the ways in which papers report it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sacrebleu.dataset import DATASETS
from sacrebleu.utils import get_reference_files

from revnets.config.errors import nearest

from ..data.corpus import TranslationError, lines_of
from ..data.languages import UNSEGMENTED
from ..data.subwords.moses import detokenize
from .alignment import first_mismatch
from .generated_output import LEFT_OUT
from .generated_output import Output as Output
from .generated_output import read_output as read_output
from .tokenizers import default_tokenizer, metric, target_language


@dataclass(frozen=True)
class Score:
    """A kind of BLEU, its value in per cent, and what it is comparable with (sacrebleu's signature)."""

    kind: str
    value: float
    detail: str


def read_reference(path: Path) -> list[str]:
    """The sentences of a file.

    Raises:
        TranslationError: it is missing, empty or no UTF-8.
    """
    return list(lines_of(path))


def named_reference(name: str, language: str | None = None) -> list[str]:
    """The reference of a test set that sacrebleu knows, such as `wmt14/full:en-de`. It is downloaded once.

    Args:
        language: of the translation, which the reference must have.

    Raises:
        TranslationError: there is no such test set or pair of languages, it has another language, or it cannot be
            downloaded.
    """
    test_set, _, pair = name.partition(":")
    if test_set not in DATASETS:
        raise TranslationError(
            f"test set {test_set!r} is not known. {nearest(test_set, DATASETS, 'sacrebleu has')}", code="unknown-choice"
        )
    if pair not in DATASETS[test_set].langpairs:
        pairs = nearest(pair, DATASETS[test_set].langpairs, "It has")
        raise TranslationError(
            f"test set {test_set} has no languages {pair!r}. {pairs}; write {test_set}:en-de", code="unknown-choice"
        )
    if language is not None and (target := target_language(pair.partition("-")[2])) != target_language(language):
        raise TranslationError(
            f"test set {name} is in {target!r}, the translation in {language!r}. Give the pair of languages that ends "
            "with that of the translation",
            code="conflicting-values",
        )
    try:
        return list(lines_of(Path(get_reference_files(test_set, pair)[0])))
    except (OSError, SystemExit) as error:
        raise TranslationError(
            f"{name}: sacrebleu cannot download it ({error}). Give --reference instead", code="download-failed"
        ) from error


def compound_split(lines: Iterable[str]) -> list[str]:
    """Words apart at their hyphens, as Vaswani et al. (2017) score German: `a-b` becomes `a ##AT##-##AT## b`.

    As in the one line of Perl that everybody uses, the b of `a-b-c` belongs to the first hyphen only.
    """
    return [re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", line) for line in lines]


def scores(
    output: Output, language: str, reference: Sequence[str] | None = None, tokenizer: str | None = None
) -> list[Score]:
    """The kinds of BLEU that this output allows.

    sacreBLEU of detokenised text (Post, 2018) is always among them. Tokenised BLEU needs words that Moses' tokenizer
    has separated, in hypotheses and references; it is given with compounds split as well for German.

    Args:
        language: of the translation, such as de, pt_BR or zho_Hans.
        reference: sentences as people wrote them; without it, the detokenised tokens of the data set.
        tokenizer: of sacrebleu; by default that of the language.

    Raises:
        TranslationError: there is no reference, it is that of other sentences, or the tokenizer cannot be used.
    """
    code = target_language(language)
    references, hypotheses = output.references, output.hypotheses
    raw = detokenize(references, code) if output.tokenised else references
    if reference is None and not references:
        raise TranslationError(
            "the output has no T- lines, as that of fairseq-interactive. Give the translations to compare with "
            "(--reference)",
            code="missing-key",
        )
    if reference is not None:
        _check_reference(output, reference, raw)
        raw = reference
    kinds = [("sacreBLEU", metric(tokenizer or default_tokenizer(code)), output.detokenized(code), raw)]
    if references and output.tokenised and code not in UNSEGMENTED:
        words = metric("none")
        if code == "de":
            kinds.insert(0, ("compound split", words, compound_split(hypotheses), compound_split(references)))
        kinds.insert(0, ("tokenised", words, hypotheses, references))
    found = []
    for kind, bleu, ours, theirs in kinds:
        value = bleu.corpus_score(list(ours), [list(theirs)])
        found.append(Score(kind, value.score, f"{value.format(score_only=False)} {bleu.get_signature()}"))
    return found


def _check_reference(output: Output, reference: Sequence[str], expected: Sequence[str]) -> None:
    """The reference must have the sentences that were translated; `expected` are those of the T- lines, if any."""
    if len(reference) != len(output.hypotheses):
        why = f": {LEFT_OUT}" if output.references and len(reference) > len(output.hypotheses) else ""
        raise TranslationError(
            f"the reference has {len(reference)} lines, but there are {len(output.hypotheses)} translations. Give the "
            f"reference of the same data set, and translate all of it{why}",
            code="misaligned-data",
        )
    number = first_mismatch(expected, reference) if expected else None
    if number is not None:
        raise TranslationError(
            f"line {number + 1} of the reference is another sentence than the T- line of the output. Give the "
            "reference of the same data set, in the same order",
            code="misaligned-data",
        )
