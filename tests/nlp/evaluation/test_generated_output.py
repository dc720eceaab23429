"""All forms of fairseq's output: a perfect system scores 100 %, or the output is refused with one line."""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path

import pytest

from tests.support.errors import raises_error

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")

from nlp.data.corpus import TranslationError
from nlp.data.subwords.byte_pairs import learn, segment
from nlp.data.subwords.moses import detokenize, tokenize
from nlp.evaluation.bleu import read_output, scores
from tests.support.fairseq import USER_DIR, fairseq, train
from tests.support.paths import ROOT

CORPUS = ROOT / "examples/data/kjv-elberfelder-short.en-de.tsv.gz"
NONE: tuple[str, ...] = ()
ALL = {"tokenised", "compound split", "sacreBLEU"}


def verses(count: int = 40) -> tuple[list[str], list[str]]:
    """Plain English and German sentences."""
    with gzip.open(CORPUS, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t")[-2:] for line, _ in zip(file, range(count), strict=False)]
    return [row[0] for row in rows], [row[1] for row in rows]


def pieces(line: str) -> str:
    """Split a sentence like sentencepiece: a space belongs to the following piece."""
    words = (f"▁{word}" for word in line.split())
    return " ".join(part for word in words for part in (word[:4], word[4:]) if part)


class System:
    """A data set, a barely trained model, and the raw reference of the test set."""

    def __init__(self, folder: Path, source: list[str], target: list[str], reference: list[str]):
        self.folder, self.reference = folder, reference
        self.outputs: dict[tuple[object, ...], Path] = {}
        for split in ("train", "valid", "test"):
            for language, lines in (("en", source), ("de", target)):
                (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        texts = [part for split in ("train", "valid", "test") for part in (f"--{split}pref", folder / split)]
        self.data = folder / "data-bin"
        languages = ("--source-lang", "en", "--target-lang", "de")
        fairseq("preprocess", *languages, *texts, "--destdir", self.data, "--joined-dictionary")
        train(self.data, folder, "--max-update", 1, "--max-tokens", 4000)
        self.checkpoint = folder / "checkpoint_last.pt"

    def generate(self, *options: object) -> Path:
        """Run `fairseq-generate`, once per set of options, and return its output."""
        if options in self.outputs:
            return self.outputs[options]
        folder = self.folder / f"output{len(self.outputs)}"
        common = ("-s", "en", "-t", "de", "--user-dir", USER_DIR, "--path", self.checkpoint, "--cpu")
        all_sentences = ("--required-batch-size-multiple", 1, "--results-path", folder)
        fairseq("generate", self.data, *common, *all_sentences, *options)
        self.outputs[options] = folder / "generate-test.txt"
        return self.outputs[options]


@pytest.fixture(scope="module")
def moses(tmp_path_factory) -> System:
    """Moses' tokens in subwords of subword-nmt, as prepare-mt writes them."""
    folder = tmp_path_factory.mktemp("moses")
    source, target = verses()
    tokens = [tokenize(source, "en"), tokenize(target, "de")]
    learn([*tokens[0], *tokens[1]], 200, folder / "codes")
    return System(folder, *(segment(lines, folder / "codes") for lines in tokens), reference=target)


@pytest.fixture(scope="module")
def raw_pieces(tmp_path_factory) -> System:
    """Pieces of raw text, as users of sentencepiece make them."""
    source, target = verses()
    return System(
        tmp_path_factory.mktemp("pieces"), list(map(pieces, source)), list(map(pieces, target)), reference=target
    )


def percent(path: Path, reference: list[str] | None = None, language: str = "de") -> dict[str, float]:
    return {score.kind: score.value for score in scores(read_output(path), language, reference)}


def assert_perfect(found: dict[str, float], kinds: set[str], least: float = 99.9) -> None:
    assert found.keys() == kinds
    assert all(value >= least for value in found.values()), found


# ----------------------------------------------------------------------------------- outputs of fairseq-generate itself


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (("--remove-bpe",), ALL),
        (("--remove-bpe", "--sacrebleu"), ALL),
        (("--remove-bpe", "--scoring", "chrf"), ALL),
        (NONE, ALL),
        (("--bpe", "subword_nmt", "--bpe-codes", "{codes}"), ALL),
        (("--tokenizer", "moses", "--bpe", "subword_nmt", "--bpe-codes", "{codes}"), {"sacreBLEU"}),
        (("--tokenizer", "moses", "--remove-bpe"), {"sacreBLEU"}),
    ],
)
def test_a_perfect_system_of_tokens(moses, options, kinds):
    codes = moses.folder / "codes"
    path = moses.generate("--score-reference", *(option.format(codes=codes) for option in options))
    assert_perfect(percent(path), kinds)
    assert_perfect(percent(path, detokenize(tokenize(moses.reference, "de"), "de")), kinds)


@pytest.mark.parametrize("options", [NONE, ("--remove-bpe",), ("--remove-bpe", "sentencepiece")])
def test_a_perfect_system_of_pieces(raw_pieces, options):
    path = raw_pieces.generate("--score-reference", *options)
    assert_perfect(percent(path, raw_pieces.reference), {"sacreBLEU"})
    assert_perfect(percent(path), {"sacreBLEU"})


def test_pieces_that_fairseq_decodes(raw_pieces, tmp_path):
    """`--bpe sentencepiece` joins the pieces of S-, T- and D- lines, not those of H- lines."""
    lines = raw_pieces.generate("--score-reference").read_text(encoding="utf-8").splitlines()
    for index, line in enumerate(lines):
        head, _, text = line.rpartition("\t")
        if line[:2] in ("S-", "T-", "D-"):
            lines[index] = f"{head}\t{text.replace(' ', '').replace('▁', ' ').strip()}"
    path = tmp_path / "decoded"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert_perfect(percent(path, raw_pieces.reference), {"sacreBLEU"})
    path.write_text("\n".join(line for line in lines if line[:2] != "D-") + "\n", encoding="utf-8")
    with raises_error(TranslationError, code="wrong-format", names=[str(path), "D-"]):
        read_output(path)


@pytest.mark.parametrize("options", [("--remove-bpe", "sentencepiece"), ("--tokenizer", "moses")])
def test_sub_words_that_were_not_removed(moses, options):
    path = moses.generate("--score-reference", *options)
    with raises_error(TranslationError, code="wrong-format", names=[str(path), "--remove-bpe"]):
        read_output(path)


def test_tokens_and_text_are_not_compared(moses, tmp_path):
    """Without D- lines, T- and H- lines need the same form."""
    lines = moses.generate("--score-reference", "--remove-bpe", "--tokenizer", "moses").read_text().splitlines()
    path = tmp_path / "filtered"
    path.write_text("".join(f"{line}\n" for line in lines if line[:2] in ("T-", "H-")))
    with raises_error(TranslationError, code="wrong-format", names=[str(path), "D-"]):
        read_output(path)
    lines = moses.generate("--score-reference", "--remove-bpe").read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in lines if line[:2] in ("T-", "H-")))
    assert_perfect(percent(path), ALL)


def test_the_best_of_several_hypotheses_is_scored(moses, tmp_path):
    options = ("--beam", 3, "--nbest", 3, "--max-len-b", 5, "--print-alignment", "--prefix-size", 4, "--remove-bpe")
    path = moses.generate(*options)
    lines = path.read_text().splitlines()
    first = next(line.split("\t")[2] for line in lines if line.startswith("H-7\t"))
    assert read_output(path).hypotheses[7] == first
    other = tmp_path / "sorted"
    other.write_text("".join(f"{line}\n" for line in sorted(lines, reverse=True)))  # now the best is not first
    assert read_output(other).hypotheses == read_output(path).hypotheses


def test_sentences_that_are_too_long(moses):
    limit = ("--model-overrides", "{'max_source_positions': 40}", "--skip-invalid-size-inputs-valid-test")
    output = read_output(moses.generate("--score-reference", "--remove-bpe", *limit))
    assert 0 < len(output.hypotheses) < len(moses.reference)
    with raises_error(TranslationError, code="misaligned-data", names="--skip-invalid-size-inputs-valid-test"):
        scores(output, "de", moses.reference)


# -------------------------------------------------------------------------------------------------- constructed outputs


TEXTS = ["Der Mann ging nach Hause .", "Er sprach : &quot; Komm &quot; .", "Sie blieb , weil es regnete ."]


def lines_of_output(hypotheses: list[str], references: list[str] = TEXTS) -> list[str]:
    """Lines of fairseq-generate without decoders, sorted by length."""
    rows = list(enumerate(zip(references, hypotheses, strict=True)))
    random.Random(0).shuffle(rows)
    lines = []
    for number, (reference, text) in rows:
        scored = f"{number}\t-0.25\t{text}"
        lines += [f"S-{number}\tsource", f"T-{number}\t{reference}", f"H-{scored}", f"D-{scored}", f"P-{number}\t-0.2"]
    return [*lines, "Generate test with beam=4: BLEU4 = 1.00"]


@pytest.fixture
def write(tmp_path):
    def write(lines: list[str], end: str = "\n") -> Path:
        path = tmp_path / "test.out"
        path.write_bytes(end.join([*lines, ""]).encode())
        return path

    return write


def test_log_lines_and_line_ends_have_no_effect(write):
    lines = lines_of_output(TEXTS)
    logged = [
        "2026-01-01 10:00:00 | INFO | fairseq_cli.generate | {'bpe': None}",
        "\r 50%|███  | 1/2 [00:01<00:01]",
        "",
    ]
    mixed = [part for line in lines for part in (*logged, line)]
    assert read_output(write(mixed, "\r\n")) == read_output(write(lines))


@pytest.mark.parametrize("empty", ["H-1\t-0.25\t", "H-1\t-0.25"])
def test_an_empty_hypothesis_is_an_empty_translation(write, empty):
    lines = lines_of_output([TEXTS[0], "", TEXTS[2]])
    changed = [line.replace("H-1\t-0.25\t", empty).replace("D-1\t-0.25\t", empty.replace("H", "D")) for line in lines]
    path = write(changed)
    assert read_output(path).hypotheses == [TEXTS[0], "", TEXTS[2]]
    kept, whole = (sum(len(text.split()) for text in texts) for texts in ((TEXTS[0], TEXTS[2]), TEXTS))
    brevity = 2.718281828459045 ** (1 - whole / kept)
    assert percent(path)["tokenised"] == pytest.approx(100 * brevity)  # all n-grams match, some are missing


def test_translations_that_are_all_empty(write):
    assert set(percent(write(lines_of_output(["", "", ""]))).values()) == {0.0}


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (lambda lines: lines[:7], "damaged-file", "H-"),  # the file ends after a T- line
        (lambda lines: lines[:8], "damaged-file", "D-"),  # the file ends after an H- line
        (lambda lines: [line for line in lines if line[:3] != "H-1"], "damaged-file", "H-1"),
        (lambda lines: [line for line in lines if line[:3] != "T-1"], "damaged-file", "T-1"),
        (lambda lines: lines[:-1] + lines, "wrong-format", "is repeated"),
        (lambda lines: [f"12:{line}" for line in lines], "damaged-file", "line 1"),
        (lambda lines: ["\r 50%|█ " + lines[0], *lines[1:]], "damaged-file", "line 1"),
        (lambda lines: [line.replace("-0.25\t", "") for line in lines], "wrong-format", "no score"),
        (lambda lines: ["INFO:fairseq_cli.generate:{'bpe': None}", *lines[:-1]], "damaged-file", "last line"),
        (lambda lines: [line.replace(" ", " ##") for line in lines], "wrong-format", "--bpe"),
    ],
)
def test_incomplete_and_concatenated_output_is_refused(write, change, code, named):
    path = write(change(lines_of_output(TEXTS)))
    with raises_error(TranslationError, code=code, names=[str(path), named]):
        read_output(path)


def test_a_missing_last_line_is_noted(write):
    lines = lines_of_output(TEXTS)
    assert read_output(write(lines[:-1])).unfinished
    assert not read_output(write(lines)).unfinished


def test_output_of_interactive_needs_a_reference(write):
    lines = [line for line in lines_of_output(TEXTS) if line[:2] != "T-"][:-1]
    path = write(lines)
    text = ["Der Mann ging nach Hause.", 'Er sprach: "Komm".', "Sie blieb, weil es regnete."]
    assert_perfect(percent(path, text), {"sacreBLEU"})
    decoded = [re.sub(r"^(D-\d\t.*?\t).*", lambda match: match[1] + text[int(match[0][2])], line) for line in lines]
    assert_perfect(percent(write(decoded), text), {"sacreBLEU"})
    with raises_error(TranslationError, code="missing-key", names="--reference"):
        scores(read_output(path), "de")


# ------------------------------------------------------------------------------------------- references and languages


def test_the_reference_of_other_sentences_is_refused(moses):
    output = read_output(moses.generate("--score-reference", "--remove-bpe"))
    source, target = verses()
    half = len(target) // 2
    wrong = {
        "source": source,
        "other order": target[::-1],
        "off by one": [*target[1:], target[0]],
        "off by one in the second half": [*target[:half], *target[half + 1 :], target[half]],
    }
    for reference in wrong.values():
        with raises_error(TranslationError, code="misaligned-data", names="different sentence"):
            scores(output, "de", reference)
    other_words = [line.replace("und", "sowie").replace("der", "jener").upper() for line in target]
    assert scores(output, "de", other_words)[-1].value < 10  # another version of the same sentences is a reference


CHINESE = ["我 喜欢 苹果 。", "他 昨天 去 了 北京 。", "这 本 书 很 有趣 、 我 读 了 两 遍 。"]


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [
        ("zh", "zh"),
        ("zh_CN", "zh"),
        ("zho_Hans", "zh"),
        ("yue_Hant", "zh"),
        ("th", "char"),
        ("tha_Thai", "char"),
        ("pt_BR", "13a"),
        ("pt-br", "13a"),
        ("deu_Latn", "13a"),
        ("ace_Latn", "13a"),
    ],
)
def test_the_tokenizer_of_sacrebleu_is_that_of_the_language(write, language, tokenizer):
    found = {score.kind: score.detail for score in scores(read_output(write(lines_of_output(TEXTS))), language)}
    assert f"tok:{tokenizer}|" in found["sacreBLEU"]
    assert ("tokenised" in found) == (tokenizer == "13a")
    assert ("compound split" in found) == (language == "deu_Latn")


def test_a_perfect_system_in_chinese(write):
    reference = [text.replace(" ", "") for text in CHINESE]
    apart = [text.replace(" 。", "。") for text in CHINESE]
    for hypotheses in (CHINESE, reference, apart):
        output = read_output(write(lines_of_output(hypotheses, hypotheses)))
        assert {score.kind: round(score.value, 6) for score in scores(output, "zh", reference)} == {"sacreBLEU": 100}


@pytest.mark.parametrize("language", ["ja", "ja_JP", "jpn_Jpan", "ko", "kor_Hang"])
def test_languages_of_a_tokenizer_that_may_be_missing(write, language):
    from sacrebleu.metrics.bleu import BLEU

    name = "ko-mecab" if language.startswith("ko") else "ja-mecab"
    try:
        BLEU(tokenize=name)
    except RuntimeError:
        name = "char"
    found = scores(read_output(write(lines_of_output(TEXTS))), language)[-1]
    assert f"tok:{name}" in found.detail
    assert found.value == pytest.approx(100)


def test_a_tokenizer_can_be_chosen(write):
    output = read_output(write(lines_of_output(TEXTS)))
    assert "tok:intl|" in scores(output, "zh", tokenizer="intl")[-1].detail
    with raises_error(TranslationError, code="unknown-choice", names=["'intll'", "intl?"]):
        scores(output, "de", tokenizer="intll")
