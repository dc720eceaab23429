"""Parser for the output of fairseq-generate and fairseq-interactive.

fairseq applies `--remove-bpe` to all lines, but the decoders of `--bpe` and `--tokenizer` only to S-, T- and D- lines.
The D- line of a hypothesis therefore always has the form of the reference; the H- line has it only without decoders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.corpus import TranslationError, lines_of
from ..data.subwords.byte_pairs import join
from ..data.subwords.moses import detokenize

_LINE = re.compile(r"([STHDP])-([0-9]{1,12})(?:\t(.*))?")
_MIXED = re.compile(r"[STHDP]-.*\r|.+[STHDP]-[0-9]+\t")
_START = re.compile(r".*fairseq_cli\.generate\b")
_END = re.compile(r"Generate \S+ with beam=|.*Translated [0-9,]+ sentences")

_BPE = re.compile(r"@@(?=\s|$)")
_GLUED = re.compile(r"[^\s@]@@[^\s@]")
_PIECE = "\N{LOWER ONE EIGHTH BLOCK}"  # represents a space in sentencepiece and in fairseq's characters
_OTHER = re.compile(r"(?:^|\s)##\w|(?:^|\s)\u0120\w.*\s\u0120\w")  # BERT's word pieces, GPT-2's bytes
_STOPS = ".,\u3001\uff0c\u3002\u060c\u0964"
_ATTACHED = re.compile(rf"[^\W\d_][{_STOPS}](?=\s|$)")
_APART = re.compile(rf"(?:^|\s)[{_STOPS}](?=\s|$)|&(?:apos|quot|amp|lt|gt|#\d+);|\s@-@\s")

LEFT_OUT = (
    "fairseq-generate omits the last sentences unless --required-batch-size-multiple 1 is set, and with "
    "--skip-invalid-size-inputs-valid-test those longer than --max-source-positions or --max-target-positions"
)
"""Reasons for missing translations (docs/guides/translation-data.md)."""

RARE = 0.05
"""Share of lines up to which a subword mark may be part of the text itself."""


@dataclass(frozen=True)
class Output:
    """Translations in the order of the data set, with subwords joined.

    Attributes:
        sources: Texts of the S- lines; empty without such lines.
        references: Texts of the T- lines, in the form of the hypotheses; empty without such lines, as from
            fairseq-interactive.
        hypotheses: Best hypothesis of each sentence; it may be empty.
        missing: Number of sentences without a translation, by the gaps in the numbering.
        tokenised: Whether the texts are tokens separated by spaces; otherwise they are detokenized.
        unfinished: Whether the last line of fairseq-generate is missing.
    """

    sources: list[str]
    references: list[str]
    hypotheses: list[str]
    missing: int = 0
    tokenised: bool = True
    unfinished: bool = False

    def detokenized(self, language: str) -> list[str]:
        """Return the detokenized hypotheses."""
        return detokenize(self.hypotheses, language) if self.tokenised else self.hypotheses


def read_output(path: Path) -> Output:
    """Read the S-, T-, H- and D- lines of fairseq-generate or fairseq-interactive; other lines are ignored.

    Of several hypotheses (`--nbest`), the one with the highest score is used.

    Args:
        path: File with the standard output of the command.

    Raises:
        TranslationError: If the file cannot be read, is truncated, contains the output of several commands, or has
            hypotheses and references in different forms.
    """
    lines = _Lines(path)
    texts = lines.best("D") if lines.found["D"].keys() == lines.found["H"].keys() else None
    raw = lines.best("H")
    hypotheses = raw if texts is None else texts
    references = lines.best("T")
    if texts is None and references:
        _check_same_form(path, references, raw)
    model = references or hypotheses
    if _share(model, _GLUED.search) > RARE:
        raise _form_error(path, "words joined by @@", "--remove-bpe subword_nmt")
    if _share(model, _OTHER.search) > RARE * 10:
        raise _form_error(path, "subwords of an unknown kind", "the --bpe of the data set")
    decoded = texts is not None and texts not in (raw, list(map(join, raw)))
    if decoded and (_is_pieces(model) or _share(model, _BPE.search) > RARE):
        raise _form_error(path, "subwords in detokenized text", "the matching --remove-bpe or --bpe")
    undo = _join_pieces if _is_pieces(model) else join
    references, hypotheses = [list(map(undo, side)) for side in (references, hypotheses)]
    votes = _tokenised_votes(references or hypotheses)
    return Output(
        list(map(undo, lines.best("S"))),
        references,
        hypotheses,
        missing=lines.order[-1] + 1 - len(lines.order),
        tokenised=votes > 0 or (votes == 0 and not decoded),
        unfinished=lines.unfinished,
    )


class _Lines:
    """Lines by kind and number of the sentence, checked for completeness.

    Attributes:
        found: Score and text of each sentence, by kind.
        order: Sorted numbers of the sentences.
        unfinished: See `Output`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, dict[int, tuple[float, str]]] = {kind: {} for kind in "STHDP"}
        started = ended = False
        previous: dict[str, int] = {}
        for count, line in enumerate(lines_of(path), 1):
            if match := _LINE.fullmatch(line):
                kind, number = match[1], int(match[2])
                if number in self.found[kind] and (kind in "ST" or previous[kind] != number):
                    raise TranslationError(
                        f"{path}, line {count}: {kind}-{number} is repeated. Give the output of one command",
                        code="wrong-format",
                    )
                previous[kind] = number
                self._add(kind, number, match[3] or "", count)
            if _MIXED.match(line):
                raise TranslationError(
                    f"{path}, line {count}: other output, such as a progress bar, is mixed with a translation. Write "
                    "only the standard output of one command to the file",
                    code="damaged-file",
                )
            started |= _START.match(line) is not None
            ended |= _END.match(line) is not None
        self.order = sorted(self.found["H"])
        self.unfinished = bool(self.found["P"] and self.found["T"]) and not ended
        self._check_complete(started, ended)

    def best(self, kind: str) -> list[str]:
        """Return the texts of a kind in the order of the data set; empty without such lines."""
        found = self.found[kind]
        return [found[number][1] for number in self.order] if found else []

    def _add(self, kind: str, number: int, rest: str, count: int) -> None:
        score = 0.0
        if kind in "HD":
            probability, _, rest = rest.partition("\t")
            try:
                score = float(probability)
            except ValueError:
                raise TranslationError(
                    f"{self.path}, line {count}: {kind}-{number} has no score. Give the unmodified output of "
                    "fairseq-generate",
                    code="wrong-format",
                ) from None
        known = self.found[kind].get(number)
        if known is None or score > known[0] or math.isnan(known[0]):
            self.found[kind][number] = score, rest

    def _check_complete(self, started: bool, ended: bool) -> None:
        hypotheses = self.found["H"].keys()
        if not hypotheses:
            raise TranslationError(
                f"{self.path}: no line starts with H-. Give the output of fairseq-generate without --quiet",
                code="wrong-format",
            )
        for kind in "ST" if ended else "STDP":
            if not (numbers := self.found[kind].keys()):
                continue
            if missing := hypotheses - numbers:
                raise self._cut_off(f"no {kind}-{min(missing)} for H-{min(missing)}")
            if missing := numbers - hypotheses:
                raise self._cut_off(f"no H-{min(missing)} for {kind}-{min(missing)}")
        if started and not ended:
            raise self._cut_off("the last line of fairseq-generate is missing")

    def _cut_off(self, what: str) -> TranslationError:
        return TranslationError(f"{self.path}: {what}. The file may be truncated", code="damaged-file")


def _form_error(path: Path, what: str, option: str) -> TranslationError:
    return TranslationError(f"{path}: {what} cannot be scored. Run fairseq-generate with {option}", code="wrong-format")


def _check_same_form(path: Path, references: Sequence[str], hypotheses: Sequence[str]) -> None:
    """Check that H- and T- lines have the same form, that is, that no decoder was applied to T- lines."""
    votes = _tokenised_votes(references), _tokenised_votes(hypotheses)
    if (
        _is_pieces(references) != _is_pieces(hypotheses)
        or (_share(hypotheses, _BPE.search) and not _share(references, _BPE.search))
        or votes[0] * votes[1] < 0
    ):
        raise TranslationError(
            f"{path}: T- and H- lines have different forms, and D- lines are missing. Keep the D- lines, or run "
            "fairseq-generate with --remove-bpe and without --bpe and --tokenizer",
            code="wrong-format",
        )


def _share(lines: Iterable[str], holds: Callable[[str], object]) -> float:
    """Compute the share of nonempty lines with a property, between 0 and 1."""
    filled = [line for line in lines if line]
    return sum(bool(holds(line)) for line in filled) / max(len(filled), 1)


def _is_pieces(lines: Iterable[str]) -> bool:
    return _share(lines, lambda line: _PIECE in line) > 0.5


def _join_pieces(line: str) -> str:
    """Join sentencepiece pieces to text."""
    return line.replace(" ", "").replace(_PIECE, " ").strip()


def _tokenised_votes(lines: Iterable[str]) -> int:
    """Return a positive number if punctuation is separated from words, a negative one if it is attached, else 0."""
    return sum(len(_APART.findall(line)) - len(_ATTACHED.findall(line)) for line in lines)
