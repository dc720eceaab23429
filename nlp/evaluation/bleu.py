"""BLEU of what fairseq-generate wrote, in the three ways in which papers report it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sacrebleu.dataset import DATASETS
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.utils import get_reference_files

from revnets.config.errors import nearest

from ..data.corpus import TranslationError, lines_of
from ..data.tokenization import detokenize, join

ALL = "For all sentences, run fairseq-generate with --required-batch-size-multiple 1"
"""What to do where some were left out (docs/guides/translation-model.md)."""

_LINE = re.compile(r"([STHD])-(\d+)\t(.*)")


@dataclass(frozen=True)
class Output:
    """What fairseq-generate wrote, in the order of the data set: words between spaces, without sub-words.

    Attributes:
        missing: how many sentences were left out, as the numbers of the others tell.
    """

    sources: list[str]
    references: list[str]
    hypotheses: list[str]
    missing: int = 0

    def detokenized(self, language: str) -> list[str]:
        """The translations as people write them."""
        return detokenize(self.hypotheses, language)


@dataclass(frozen=True)
class Score:
    """A kind of BLEU, its value in per cent, and what it is comparable with (sacrebleu's signature)."""

    kind: str
    value: float
    detail: str


def read_output(path: Path) -> Output:
    """Read the S-, T- and H- lines of fairseq-generate; whatever else stands between them is no matter.

    Of several hypotheses (--nbest) the first, which is the best, is taken.

    Raises:
        TranslationError: the file cannot be read, or has no such lines, or not all of them.
    """
    found: dict[str, dict[int, str]] = {kind: {} for kind in "STH"}
    for line in lines_of(path):
        if (match := _LINE.fullmatch(line)) and match[1] in found:
            words = match[3].split("\t")[-1]  # before it, H has its log-probability
            found[match[1]].setdefault(int(match[2]), join(words))
    hypotheses = found["H"]
    if not hypotheses:
        raise TranslationError(
            f"{path}: has no line that begins with H-. Give what fairseq-generate wrote, without --quiet",
            code="wrong-format",
        )
    for kind in "ST":
        if missing := hypotheses.keys() - found[kind].keys():
            raise TranslationError(
                f"{path}: no {kind}-{min(missing)} for H-{min(missing)}. Was the file cut off?", code="damaged-file"
            )
    order = sorted(hypotheses)
    lines = ([found[kind][number] for number in order] for kind in "STH")
    return Output(*lines, missing=order[-1] + 1 - len(order))


def read_reference(path: Path) -> list[str]:
    """The sentences of a file.

    Raises:
        TranslationError: it is missing, empty or no UTF-8.
    """
    return list(lines_of(path))


def named_reference(name: str) -> list[str]:
    """The reference of a test set that sacrebleu knows, such as `wmt14/full:en-de`. It is downloaded once.

    Raises:
        TranslationError: there is no such test set or pair of languages, or it cannot be downloaded.
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


def scores(output: Output, language: str, reference: Sequence[str] | None = None) -> list[Score]:
    """Tokenised BLEU, the same with compounds split, and sacreBLEU of detokenised text (Post, 2018).

    Args:
        language: of the translation, for detokenising.
        reference: sentences as people wrote them; without it, the detokenised tokens of the data set.

    Raises:
        TranslationError: the reference has another number of lines.
    """
    references, hypotheses = output.references, output.hypotheses
    if reference is not None and len(reference) != len(hypotheses):
        raise TranslationError(
            f"the reference has {len(reference)} lines, but there are {len(hypotheses)} translations. Give the "
            f"reference of the same data set. {ALL}",
            code="misaligned-data",
        )
    raw = detokenize(references, language) if reference is None else reference
    kinds = [
        ("tokenised", "none", hypotheses, references),
        ("compound split", "none", compound_split(hypotheses), compound_split(references)),
        ("sacreBLEU", "13a", output.detokenized(language), raw),
    ]
    found = []
    for kind, tokenizer, ours, theirs in kinds:
        metric = BLEU(tokenize=tokenizer, force=True)
        value = metric.corpus_score(list(ours), [list(theirs)])
        found.append(Score(kind, value.score, f"{value.format(score_only=False)} {metric.get_signature()}"))
    return found
