"""BLEU of fairseq's output in the variants that papers report."""

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
    """A BLEU score.

    Attributes:
        kind: Variant, such as sacreBLEU.
        value: BLEU in percent.
        detail: N-gram precisions, lengths and sacrebleu's signature.
    """

    kind: str
    value: float
    detail: str


def read_reference(path: Path) -> list[str]:
    """Read the sentences of a file.

    Raises:
        TranslationError: If the file is missing or not UTF-8.
    """
    return list(lines_of(path))


def named_reference(name: str, language: str | None = None) -> list[str]:
    """Read the reference of a sacrebleu test set, which is downloaded once.

    Args:
        name: Test set and language pair, such as `wmt14/full:en-de`.
        language: Language of the translation, to check against that of the reference.

    Raises:
        TranslationError: If the test set or the language pair is unknown, if the language differs, or if the download
            fails.
    """
    test_set, _, pair = name.partition(":")
    if test_set not in DATASETS:
        raise TranslationError(
            f"unknown test set {test_set!r}. {nearest(test_set, DATASETS, 'sacrebleu has')}", code="unknown-choice"
        )
    if pair not in DATASETS[test_set].langpairs:
        pairs = nearest(pair, DATASETS[test_set].langpairs, "It has")
        raise TranslationError(
            f"test set {test_set} has no language pair {pair!r}. {pairs}; write {test_set}:en-de", code="unknown-choice"
        )
    if language is not None and (target := target_language(pair.partition("-")[2])) != target_language(language):
        raise TranslationError(
            f"test set {name} is in {target!r}, but the translation is in {language!r}. Give a language pair that ends "
            "with the language of the translation",
            code="conflicting-values",
        )
    try:
        return list(lines_of(Path(get_reference_files(test_set, pair)[0])))
    except (OSError, SystemExit) as error:
        raise TranslationError(
            f"{name}: sacrebleu cannot download it ({error}). Give --reference instead", code="download-failed"
        ) from error


def compound_split(lines: Iterable[str]) -> list[str]:
    """Split words at hyphens as Vaswani et al. (2017) do for German: `a-b` becomes `a ##AT##-##AT## b`.

    As in the Perl script in common use, matches do not overlap: `a-b-c` is split at its first hyphen only.
    """
    return [re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", line) for line in lines]


def scores(
    output: Output, language: str, reference: Sequence[str] | None = None, tokenizer: str | None = None
) -> list[Score]:
    """Compute all variants of BLEU that an output supports.

    sacreBLEU of detokenized text (Post, 2018) is always computed. Tokenized BLEU needs hypotheses and references that
    consist of Moses' tokens; for German, it is also computed with compounds split.

    Args:
        output: Hypotheses and references.
        language: Language of the translation, such as de, pt_BR or zho_Hans.
        reference: Untokenized reference. By default the detokenized reference of the data set.
        tokenizer: Tokenizer of sacrebleu. By default that of the language.

    Returns:
        The scores; sacreBLEU is the last one.

    Raises:
        TranslationError: If there is no reference, if it has other sentences, or if the tokenizer cannot be used.
    """
    code = target_language(language)
    references, hypotheses = output.references, output.hypotheses
    raw = detokenize(references, code) if output.tokenised else references
    if reference is None and not references:
        raise TranslationError(
            "the output has no T- lines, like that of fairseq-interactive. Give a reference (--reference)",
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
    """Check that the reference has the translated sentences; `expected` are those of the T- lines, if any."""
    if len(reference) != len(output.hypotheses):
        why = f": {LEFT_OUT}" if output.references and len(reference) > len(output.hypotheses) else ""
        raise TranslationError(
            f"the reference has {len(reference)} lines, but there are {len(output.hypotheses)} translations. Use the "
            f"reference of the same data set, and translate all of it{why}",
            code="misaligned-data",
        )
    number = first_mismatch(expected, reference) if expected else None
    if number is not None:
        raise TranslationError(
            f"line {number + 1} of the reference is a different sentence than the T- line of the output. Use the "
            "reference of the same data set, in the same order",
            code="misaligned-data",
        )
