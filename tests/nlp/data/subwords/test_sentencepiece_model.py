# ruff: noqa: RUF001 - full-width punctuation is meant
"""Sentencepiece models of raw text, fairseq's dictionary, and data sets with pieces."""

from __future__ import annotations

import os
import random
import re
import sys
from pathlib import Path

import pytest

from tests.support.errors import raises_error

pytest.importorskip("fairseq")
pytest.importorskip("sentencepiece")

from fairseq.data import Dictionary
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig
from rich.progress import Progress

from nlp.data import prepare as module
from nlp.data.corpus import TranslationError
from nlp.data.prepare import prepare
from nlp.data.recipe import Recipe, read_recipe
from nlp.data.subwords.sentencepiece_model import DICTIONARY, MAX_VOCAB, MODEL, learn_pieces, split_pieces
from tests.support.parallel_texts import numbered_pairs, recipe_for, sub_words, write_pairs

CHINESE = [
    "起初，神創造天地。",
    "地是空虛混沌，淵面黑暗；神的靈運行在水面上。",
    "神說：「要有光！」就有了光。",
    "神看光是好的，就把光暗分開了。",
    "神稱光為「晝」，稱暗為「夜」。有晚上，有早晨，這是頭一日。",
]
JAPANESE = [
    "はじめに神は天と地とを創造された。",
    "地は形なく、むなしく、やみが淵のおもてにあり、神の霊が水のおもてをおおっていた。",
    "神は「光あれ」と言われた。すると光があった。",
    "神はその光を見て、良しとされた。神はその光とやみとを分けられた。",
    "神は光を昼と名づけ、やみを夜と名づけられた。夕となり、また朝となった。第一日である。",
]
MIXED = ["½ ﬁne… x² « élan » #1", "Ｆｕｌｌ ｗｉｄｔｈ", "נֶאֱמָן ‏(1)‏", "naïve café 🙂"]


def learned(folder: Path, lines: list[str], vocab: int | None = None, **given) -> Path:
    """Learn a model and return its path."""
    (folder / "model").mkdir(parents=True)
    (folder / "text").write_text("".join(f"{line}\n" for line in lines))
    options = {"model_type": "unigram", "character_coverage": 1.0, **given}
    learn_pieces(["../text"], folder / "model", vocab, **options)
    return folder / "model" / MODEL


def joined(line: str) -> str:
    return line.replace(" ", "").replace("\u2581", " ").strip()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return learned(tmp_path_factory.mktemp("pieces"), [*CHINESE, *JAPANESE, *MIXED])


def test_text_of_any_script_comes_back_as_it_was(model):
    """This includes full-width punctuation, which NFKC would change."""
    lines = [*CHINESE, *JAPANESE, *MIXED]
    assert list(map(joined, split_pieces(lines, model))) == lines


def test_pieces_are_those_of_fairseq_interactive(model):
    encoder = SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(model)))
    lines = [*CHINESE, *MIXED, "unseen Ж, and  two spaces "]
    found = split_pieces(lines, model)
    assert found == [encoder.encode(line) for line in lines]
    assert [encoder.decode(line) for line in found[:-1]] == lines[:-1]


def test_no_reader_splits_a_piece(model):
    """Every white space character of Python becomes a space, and control characters are dropped."""
    spaces = [char for char in map(chr, range(sys.maxunicode + 1)) if char.isspace()]
    found = split_pieces([f"光{char}神" for char in (*spaces, "\u2581", "\ufeff")], model)
    assert set(map(joined, found)) == {"光 神"}
    assert all(line.split() == line.split(" ") for line in found)
    assert set(map(joined, split_pieces([f"光{char}神" for char in "\x01\x7f\x9f"], model))) == {"光神"}


def test_symbols_of_fairseq_in_a_text_are_words(model):
    """`</s>` must not end a sentence; its characters are unknown to this model, so it is one piece."""
    assert split_pieces(["神</s>光 <s>"], model) == ["▁神 <unk> 光 ▁ <unk>"]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_the_same_text_gives_the_same_bytes_in_any_folder(tmp_path, model_type):
    lines = [f"{left}. {right}" for left, right in numbered_pairs(97)]
    paths = [learned(tmp_path / name, lines, 101, model_type=model_type) for name in ("a", "another/b")]
    for name in (MODEL, DICTIONARY):
        one, other = (path.with_name(name).read_bytes() for path in paths)
        assert one == other
    assert sorted(os.listdir(paths[0].parent)) == [DICTIONARY, MODEL]


def test_the_kinds_of_model_differ(tmp_path):
    lines = [left for left, _ in numbered_pairs(97)]
    one, other = (learned(tmp_path / kind, lines, 61, model_type=kind) for kind in ("unigram", "bpe"))
    assert split_pieces(lines, one) != split_pieces(lines, other)


def test_fairseq_reads_the_dictionary(tmp_path):
    """Every piece has its own index, and the number of symbols is a multiple of 8."""
    path = learned(tmp_path, [left for left, _ in numbered_pairs(97)], 61)
    dictionary = Dictionary.load(str(path.with_name(DICTIONARY)))
    made_up = [symbol for symbol in dictionary.symbols if symbol.startswith("madeupword")]
    assert len(dictionary) - dictionary.nspecial - len(made_up) == 61 - 3
    assert (len(dictionary) % 8, len(made_up) < 8) == (0, True)
    words = " ".join(split_pieces([left for left, _ in numbered_pairs(97)], path)).split()
    assert dictionary.unk() not in map(dictionary.index, words)


def test_rare_characters_are_unknown(tmp_path):
    lines = ["a b c d e f"] * 997 + ["a ж"]
    paths = [learned(tmp_path / str(share), lines, character_coverage=share) for share in (1.0, 0.99)]
    assert ["ж" in path.with_name(DICTIONARY).read_text() for path in paths] == [True, False]


def test_the_largest_vocabulary_is_named_and_works(tmp_path):
    lines = [left for left, _ in numbered_pairs(31)]
    with pytest.raises(TranslationError) as caught:
        learned(tmp_path / "a", lines, 7919)
    assert caught.value.code == "out-of-range"
    assert "--vocab 7919 is too large" in str(caught.value)
    largest = int(str(caught.value).split("Use --vocab ")[1].split()[0])
    path = learned(tmp_path / "b", lines, largest)
    assert path.stat().st_size > 0
    with raises_error(TranslationError, code="out-of-range", names=[f"--vocab {largest} or less"]):
        learned(tmp_path / "c", lines, largest + 1)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_the_smallest_vocabulary_is_named_and_works(tmp_path, model_type):
    """Sentencepiece itself reports it only for four pieces or more."""
    lines = [left for left, _ in numbered_pairs(31)]
    needed = set()
    for vocab in (1, 2, 3, 5):
        with raises_error(TranslationError, code="out-of-range", names=[f"--vocab {vocab} is too small"]) as caught:
            learned(tmp_path / str(vocab), lines, vocab, model_type=model_type)
        needed.add(int(str(caught.value).split("Use --vocab ")[1].split()[0]))
    (smallest,) = needed
    assert learned(tmp_path / "smallest", lines, smallest, model_type=model_type).stat().st_size > 0


@pytest.mark.parametrize(("model_type", "unit"), [("unigram", "candidates left"), ("bpe", "merges")])
def test_training_reports_its_progress(tmp_path, model_type, unit):
    reported = []
    learned(tmp_path, [left for left, _ in numbered_pairs(997)], 151, model_type=model_type, report=reported.append)
    assert reported
    assert all(re.fullmatch(rf"[\d,]+ {unit}", text) for text in reported)


def test_the_progress_bar_shows_the_state_of_training(tmp_path, monkeypatch):
    def learn(*arguments) -> int:
        arguments[-1]("8,800 candidates left")
        shown.extend(task.description for task in steps.progress.tasks)
        return 7

    shown: list[str] = []
    monkeypatch.setattr(module, "learn_pieces", learn)
    steps = module._Steps(own(), (tmp_path,), tmp_path, 1, Progress(disable=True))
    assert steps.learn(tmp_path) == {"pieces": 7}
    assert shown == ["learn subwords: 8,800 candidates left"]
    assert steps.progress.tasks[0].description == "learn subwords"


def test_without_a_number_small_texts_have_fewer_pieces(tmp_path):
    (tmp_path / "text").write_text("a b\nb c\n")
    (tmp_path / "model").mkdir()
    assert 3 < learn_pieces(["../text"], tmp_path / "model", None, "unigram", 1.0) < 11


@pytest.mark.parametrize(
    ("lines", "vocab", "code", "names"),
    [
        (CHINESE, 17, "out-of-range", ["--vocab 17 is too small", "--character-coverage"]),
        (["x" * 5003] * 3, 17, "empty-data", ["4,192 bytes"]),
        (["\u3000", "\x01"], 17, "empty-data", ["4,192 bytes"]),
        ([], 17, "empty-data", ["4,192 bytes"]),
    ],
    ids=["too small", "long", "blank", "empty"],
)
def test_text_without_learnable_pieces(tmp_path, lines, vocab, code, names):
    with raises_error(TranslationError, code=code, names=names) as caught:
        learned(tmp_path, lines, vocab)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 997, b"\n\x0e\n\x05<unk>\x15"], ids=["empty", "noise", "cut"])
def test_a_damaged_model_is_named(tmp_path, content):
    (tmp_path / MODEL).write_bytes(content)
    with raises_error(TranslationError, code="damaged-file", names=[str(tmp_path / MODEL)]):
        split_pieces(["a"], tmp_path / MODEL)


@pytest.mark.parametrize("side", [CHINESE, JAPANESE], ids=["zh", "ja"])
def test_languages_without_spaces(tmp_path, side):
    """Pieces of both sides join to the raw text, and pairs stay aligned."""
    rng = random.Random(3)
    pairs = [(f"Verse {number}.", f"{rng.choice(side)}{number}") for number in range(61)]
    recipe = recipe_for(write_pairs(tmp_path, pairs), subword="sentencepiece", clean=None)
    units, facts = sub_words(recipe, tmp_path / "work")
    found = [
        tuple(joined(line) for line in lines)
        for name in ("train", "valid", "test")
        for lines in zip(*((units / f"{name}.{code}").read_text().splitlines() for code in ("en", "de")), strict=True)
    ]
    assert sorted(found) == sorted(pairs)
    assert facts["pieces"] > 3
    assert [(units / f"raw.test.{code}").read_text().splitlines() for code in ("en", "de")] == [
        [pair[side] for pair in found[-7:]] for side in range(2)
    ]


def own(**given) -> Recipe:
    recipe, _ = read_recipe(["a.tsv"], {"languages": "en-zh", **given})
    return recipe


def test_a_corpus_without_a_recipe_gets_pieces_unless_options_are_of_the_other_kind():
    assert own().subword == "sentencepiece"
    assert [own(**{key: 7}).subword for key in ("merges", "words", "vocab")] == [
        *("subword-nmt", "subword-nmt", "sentencepiece")
    ]
    assert own(subword="subword-nmt").merges == 10000


def test_recipes_keep_the_tokens_of_moses():
    for name in ("wmt16_en_de", "wmt14_en_fr"):
        recipe, _ = read_recipe([name], {})
        assert recipe.subword == "subword-nmt"
        assert not recipe.has_pieces


@pytest.mark.parametrize(
    ("given", "code", "key"),
    [
        ({"subword": "sentencepiece", "merges": 7}, "conflicting-values", "merges"),
        ({"subword": "sentencepiece", "words": 7}, "conflicting-values", "words"),
        ({"subword": "sentencepiece", "tokenize": True}, "conflicting-values", "tokenize"),
        ({"subword": "subword-nmt", "model_type": "bpe"}, "conflicting-values", "model_type"),
        ({"subword": "subword-nmt", "character_coverage": 1.0}, "conflicting-values", "character_coverage"),
        ({"subword": "subword-nmt", "merges": 7, "vocab": 11}, "conflicting-values", "vocab"),
        ({"subword": "sentencepieces"}, "unknown-choice", "subword"),
        ({"model_type": "word"}, "unknown-choice", "model_type"),
        ({"character_coverage": 0.5}, "out-of-range", "character_coverage"),
        ({"vocab": 0}, "out-of-range", "vocab"),
        ({"vocab": MAX_VOCAB + 1}, "out-of-range", "vocab"),
        ({"vocab": 2**40}, "out-of-range", "vocab"),
        ({"vocab": 2**40, "subword": "subword-nmt"}, "out-of-range", "vocab"),
    ],
)
def test_conflicting_and_invalid_options(given, code, key):
    with raises_error(code=code, key=key, source="command line"):
        own(**given)


def test_an_earlier_recipe_describes_the_same_data_set():
    """Notes of earlier versions have no keys of sentencepiece, so the hash must not include their defaults."""
    keys = {"languages", "downloads", "train", "valid", "test", "fields", "tokenize", "normalize", "aggressive_dashes"}
    keys |= {"merges", "clean", "deduplicate", "words", "seed"}
    recorded = [module._inputs(recipe, Path())["recipe"].keys() for recipe in (own(merges=7), own(), own(vocab=11))]
    assert [found - keys for found in recorded] == [set(), {"subword"}, {"subword", "vocab"}]
    assert all(keys <= found for found in recorded)


@pytest.mark.parametrize("vocab", [97, 101])
def test_a_vocabulary_of_subword_nmt_counts_characters(tmp_path, vocab):
    recipe = Recipe(
        languages="en-de", train=(tuple(write_pairs(tmp_path, numbered_pairs(211))),), valid=5, test=7, vocab=vocab
    )
    units, facts = sub_words(recipe, tmp_path / "work")
    types = {word for code in ("en", "de") for word in (units / f"train.{code}").read_text().split()}
    assert facts["merges"] < vocab
    assert abs(len(types) - vocab) < vocab / 5


def test_a_vocabulary_of_subword_nmt_that_is_too_small(tmp_path):
    texts = write_pairs(tmp_path, numbered_pairs(31))
    recipe = Recipe(languages="en-de", train=(tuple(texts),), valid=5, test=7, vocab=2)
    with raises_error(TranslationError, code="out-of-range", names=["--vocab"]):
        sub_words(recipe, tmp_path / "work")


def test_a_model_is_learned_once(tmp_path, monkeypatch):
    """A second call resumes after the finished steps."""
    recipe = recipe_for(write_pairs(tmp_path, numbered_pairs(97)), subword="sentencepiece")
    first, facts = sub_words(recipe, tmp_path / "work")
    texts = {path.name: path.read_bytes() for path in first.iterdir()}
    monkeypatch.setattr(module, "learn_pieces", None)
    again, same = sub_words(recipe, tmp_path / "work")
    assert (same, {path.name: path.read_bytes() for path in again.iterdir()}) == (facts, texts)


def test_a_missing_package_is_reported_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: name != "sentencepiece" or None)
    with raises_error(TranslationError, code="missing-dependency", names=["sentencepiece", "pip install"]):
        prepare(own(), tmp_path / "bin", tmp_path)
    assert not (tmp_path / "bin").exists()
    assert not (tmp_path / "bin.work").exists()
