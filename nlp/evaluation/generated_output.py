"""What fairseq-generate and fairseq-interactive write: which translation belongs to which sentence, and in which form.

fairseq applies `--remove-bpe` to all lines, but the decoders of `--bpe` and `--tokenizer` to S-, T- and D- lines only.
A hypothesis in the form of its reference is therefore on the D- line; the H- line has that form only without decoders.
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
_PIECE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space, in pieces of sentencepiece and in fairseq's characters
_OTHER = re.compile(r"(?:^|\s)##\w|(?:^|\s)\u0120\w.*\s\u0120\w")  # BERT's word pieces, GPT-2's bytes
_STOPS = ".,\u3001\uff0c\u3002\u060c\u0964"
_ATTACHED = re.compile(rf"[^\W\d_][{_STOPS}](?=\s|$)")
_APART = re.compile(rf"(?:^|\s)[{_STOPS}](?=\s|$)|&(?:apos|quot|amp|lt|gt|#\d+);|\s@-@\s")

LEFT_OUT = (
    "fairseq-generate leaves out the last sentences unless --required-batch-size-multiple 1 is given, and with "
    "--skip-invalid-size-inputs-valid-test those longer than --max-source-positions or --max-target-positions"
)
"""Why sentences may have no translation (docs/guides/translation-data.md)."""

RARE = 0.05
"""The share of lines up to which a mark of sub-words can be part of the text itself."""


@dataclass(frozen=True)
class Output:
    """Translations in the order of the data set, without sub-words.

    Attributes:
        sources: of the S- lines; empty if there are none.
        references: of the T- lines, in the form of the hypotheses; empty if there are none, as of fairseq-interactive.
        hypotheses: the best one of each sentence; an empty one is the empty text.
        missing: how many sentences were left out, by the numbers of the others.
        tokenised: words are between spaces, apart from punctuation; otherwise this is text as people write it.
        unfinished: the last line, which fairseq-generate writes at its end, is missing.
    """

    sources: list[str]
    references: list[str]
    hypotheses: list[str]
    missing: int = 0
    tokenised: bool = True
    unfinished: bool = False

    def detokenized(self, language: str) -> list[str]:
        """The translations as people write them."""
        return detokenize(self.hypotheses, language) if self.tokenised else self.hypotheses


def read_output(path: Path) -> Output:
    """Read the S-, T-, H- and D- lines of fairseq-generate or fairseq-interactive; other lines have no effect.

    Of several hypotheses (`--nbest`) the one with the highest score is taken.

    Raises:
        TranslationError: the file cannot be read, is not complete, holds the output of several commands, or has lines
            in a form that cannot be compared.
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
        raise _form_error(path, "words without spaces between them, but with @@ inside", "--remove-bpe subword_nmt")
    if _share(model, _OTHER.search) > RARE * 10:
        raise _form_error(path, "sub-words of a kind that is not known here", "the --bpe of the data set")
    decoded = texts is not None and texts not in (raw, list(map(join, raw)))
    if decoded and (_is_pieces(model) or _share(model, _BPE.search) > RARE):
        raise _form_error(path, "sub-words in detokenised text", "--remove-bpe of the right kind, or --bpe")
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
    """The lines of each kind by the number of their sentence, checked to be complete.

    Attributes:
        found: for each kind, the score and the text of each sentence.
        order: the numbers of the sentences, ascending.
        unfinished: as in `Output`.
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
                        f"{path}, line {count}: {kind}-{number} was there before. Give the output of one command",
                        code="wrong-format",
                    )
                previous[kind] = number
                self._add(kind, number, match[3] or "", count)
            if _MIXED.match(line):
                raise TranslationError(
                    f"{path}, line {count}: other output, such as a progress bar, is mixed with a translation. Write "
                    "the standard output of one command alone to a file",
                    code="damaged-file",
                )
            started |= _START.match(line) is not None
            ended |= _END.match(line) is not None
        self.order = sorted(self.found["H"])
        self.unfinished = bool(self.found["P"] and self.found["T"]) and not ended
        self._check_complete(started, ended)

    def best(self, kind: str) -> list[str]:
        """The texts of a kind in the order of the data set; none if there are no such lines."""
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
                    f"{self.path}, line {count}: {kind}-{number} has no score before its text. Give what "
                    "fairseq-generate wrote, as it is",
                    code="wrong-format",
                ) from None
        known = self.found[kind].get(number)
        if known is None or score > known[0] or math.isnan(known[0]):
            self.found[kind][number] = score, rest

    def _check_complete(self, started: bool, ended: bool) -> None:
        hypotheses = self.found["H"].keys()
        if not hypotheses:
            raise TranslationError(
                f"{self.path}: has no line that begins with H-. Give what fairseq-generate wrote, without --quiet",
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
        return TranslationError(f"{self.path}: {what}. Was the file cut off?", code="damaged-file")


def _form_error(path: Path, what: str, option: str) -> TranslationError:
    return TranslationError(
        f"{path}: has {what}, which cannot be scored. Run fairseq-generate with {option}", code="wrong-format"
    )


def _check_same_form(path: Path, references: Sequence[str], hypotheses: Sequence[str]) -> None:
    """H- lines can be compared with T- lines only if no decoder was applied to these."""
    votes = _tokenised_votes(references), _tokenised_votes(hypotheses)
    if (
        _is_pieces(references) != _is_pieces(hypotheses)
        or (_share(hypotheses, _BPE.search) and not _share(references, _BPE.search))
        or votes[0] * votes[1] < 0
    ):
        raise TranslationError(
            f"{path}: T- and H- lines have different forms, and there is no D- line for every H- line. Keep the D- "
            "lines, or run fairseq-generate with --remove-bpe and without --bpe and --tokenizer",
            code="wrong-format",
        )


def _share(lines: Iterable[str], holds: Callable[[str], object]) -> float:
    """How many of the lines that are not empty have a property, between 0 and 1."""
    filled = [line for line in lines if line]
    return sum(bool(holds(line)) for line in filled) / max(len(filled), 1)


def _is_pieces(lines: Iterable[str]) -> bool:
    return _share(lines, lambda line: _PIECE in line) > 0.5


def _join_pieces(line: str) -> str:
    """Text from the pieces of sentencepiece."""
    return line.replace(" ", "").replace(_PIECE, " ").strip()


def _tokenised_votes(lines: Iterable[str]) -> int:
    """Above 0 if punctuation is apart from words, below 0 if it is attached to them, 0 if there is none."""
    return sum(len(_APART.findall(line)) - len(_ATTACHED.findall(line)) for line in lines)
