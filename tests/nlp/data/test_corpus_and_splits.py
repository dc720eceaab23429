"""Readers of parallel text, and the assignment of pairs to splits."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.errors import raises_error

pytest.importorskip("fairseq")

from nlp.data.corpus import LANGUAGES, Corpus, TranslationError, find_files, languages, lines_of
from nlp.data.recipe import RECIPES, Recipe, read_recipe
from nlp.data.splits import DROPPED, SPLITS, choose
from nlp.data.subwords.byte_pairs import MARK, join, learn, segment
from nlp.data.subwords.moses import detokenize, tokenize
from nlp.data.worker_pool import ordered


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def recipe(**given) -> Recipe:
    return Recipe(**{"languages": "en-de", "train": ("x",), "valid": 2, "test": 3, **given})


def test_two_files_and_a_table_give_the_same_pairs(tmp_path):
    pairs = [("one", "eins"), ("", "leer"), ("two\u2028lines", "zwei\x85Zeilen"), ("last", "letzte")]
    two = [
        write(tmp_path / "a.en.gz", "\n".join(left for left, _ in pairs)),
        write(tmp_path / "a.de", "\ufeff" + "".join(f"{right}\r\n" for _, right in pairs)),
    ]
    table = write(tmp_path / "a.tsv.gz", "".join(f"{i}\t{right}\t{left}\n" for i, (left, right) in enumerate(pairs)))
    assert list(Corpus(tuple(two)).pairs()) == pairs
    assert list(Corpus((table,), fields=(3, 2)).pairs()) == pairs
    assert list(Corpus((table,)).pairs()) == [pair[::-1] for pair in pairs]


def test_segments_of_a_test_set(tmp_path):
    text = '<refset>\n<doc id="a">\n<seg id="1"> It\u2019s &amp; so </seg>\n<hl>\n<seg id="2">b</seg>\n</hl></refset>\n'
    assert list(lines_of(write(tmp_path / "t.en.sgm", text))) == ["It\u2019s &amp; so", "b"]


GOOD = "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("files", "code", "names"),
    [
        ({"a.en": GOOD, "a.de": "eins\nzwei\n"}, "misaligned-data", ["a.de has 2 lines", "{}/a.en has 3"]),
        ({"a.en": "one\n", "a.de": GOOD * 9}, "misaligned-data", ["a.en has 1 line,", "{}/a.de has 27"]),
        ({"a.en": GOOD, "a.de": ""}, "empty-file", "{}/a.de: "),
        ({"a.en": "", "a.de": ""}, "empty-file", "{}/a.en and {}/a.de: "),
        (
            {"a.en": GOOD, "a.de": "eins\nz\xfcrnt\ndrei\n".encode("latin-1")},
            "invalid-encoding",
            ["{}/a.de, line 2: ", "UTF-8"],
        ),
        (
            {"a.en": GOOD, "a.de": "eins\nzwei\n".encode("utf-16")},
            "invalid-encoding",
            ["line 1: ", "iconv -f UTF-16 -t"],
        ),
        ({"a.en": GOOD, "b.de": None}, "missing-file", "{}/b.de: "),
        (
            {"a.tsv": "1\tone\teins\nzwei\n"},
            "wrong-format",
            ["{}/a.tsv, line 2: ", "1 tab-separated", "--fields"],
        ),
        ({"a.tsv": ""}, "empty-file", "{}/a.tsv: "),
        ({"a.en": GOOD, "b.de": "", "c.fr": ""}, "wrong-length", "{}/c.fr: "),
    ],
)
def test_invalid_text_is_a_one_line_error(tmp_path, files, code, names):
    paths = [tmp_path / name if text is None else write(tmp_path / name, text) for name, text in files.items()]
    given = [name.format(*[tmp_path] * 2) for name in ([names] if isinstance(names, str) else names)]
    with raises_error(TranslationError, code=code, names=given):
        list(Corpus(tuple(paths)).pairs())


def test_a_broken_gzip_is_a_one_line_error(tmp_path):
    whole = gzip.compress("".join(f"{i}\t{i * i}\n" for i in range(9999)).encode())
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with raises_error(TranslationError, code="damaged-file", names=f"{path}: ") as caught:
        list(Corpus((path,)).pairs())
    assert re.search(r"line \d+", str(caught.value))


@pytest.mark.parametrize(
    ("text", "code", "names"),
    [
        ("ende", "invalid-syntax", ["'ende'", "en-de"]),
        ("en-en", "invalid-syntax", ["'en-en'", "en-de"]),
        ("en-xx", "unknown-choice", "'xx'"),
        ("en-english", "unknown-choice", "'english'"),
    ],
)
def test_invalid_languages(text, code, names):
    with raises_error(TranslationError, code=code, names=names):
        languages(text)
    with raises_error(code=code, key="languages", source="command line", names=names):
        read_recipe(["a.tsv"], {"languages": text})


def test_languages_are_many():
    assert {"en", "de", "fr", "zh", "ro"} < LANGUAGES
    assert all(len(code) in (2, 3) and code.islower() for code in LANGUAGES)


def test_a_template_finds_files_in_several_directories(tmp_path):
    for name in ("x/t-src.en.sgm", "y/t-ref.de.sgm"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path / name, "")
    folders = (tmp_path / "x", tmp_path / "y")
    found = find_files("t-{role}.{lang}.sgm", folders, ("en", "de"))
    assert found == (tmp_path / "x/t-src.en.sgm", tmp_path / "y/t-ref.de.sgm")
    with raises_error(TranslationError, code="missing-file", names=["t-src.fr.sgm", *map(str, folders)]):
        find_files("t-{role}.{lang}.sgm", folders, ("fr", "de"))


def test_training_does_not_overlap_validation_and_test():
    """Training shares no source or target sentence with validation and test."""
    pairs = [(f"s{i % 41}", f"t{i % 53}") for i in range(400)] + [("", "empty"), ("  ", "blank")]
    chosen, facts = choose(pairs, recipe(deduplicate=True, valid=11, test=17))
    sides = {index: [set(), set(), []] for index in range(-1, 3)}
    for index, pair in zip(chosen.tolist(), pairs, strict=True):
        sides[index][0].add(pair[0])
        sides[index][1].add(pair[1])
        sides[index][2].append(pair)
    train, valid, test = (sides[index] for index in range(3))
    assert (len(valid[2]), len(test[2])) == (11, 17)
    assert len(set(train[2])) == len(train[2]) > 80
    for held in (valid, test):
        assert not train[0] & held[0]
        assert not train[1] & held[1]
    assert facts["empty"] == 2
    assert sum(facts[key] for key in ("empty", "repeated", "overlaps valid or test")) == (chosen == DROPPED).sum()

    again, _ = choose(pairs, recipe(deduplicate=True, valid=11, test=17))
    other, _ = choose(pairs, recipe(deduplicate=True, valid=11, test=17, seed=2))
    assert np.array_equal(chosen, again)
    assert not np.array_equal(chosen, other)


def test_every_nth_line_is_counted_as_awk_does():
    pairs = [("a", "b")] * 20 + [("", "")] + [("a", "b")] * 10
    chosen, _ = choose(pairs, recipe(valid={"every": 7}, test="given"))
    assert np.flatnonzero(chosen == SPLITS.index("valid")).tolist() == [6, 13, 27]  # 21 is empty
    assert chosen[20] == DROPPED


def test_too_few_pairs():
    with raises_error(TranslationError, code="too-few-samples", names=["valid.every 7", "5 pairs"]):
        choose([("a", "b")] * 5, recipe(valid={"every": 7}, test="given"))
    with raises_error(TranslationError, code="too-few-samples", names=["train", "6 pairs"]):
        choose([("a", "b"), ("a", "c"), ("a", "d"), ("a", "e"), ("a", "f"), ("a", "g")], recipe(deduplicate=True))
    with raises_error(
        TranslationError, code="too-few-samples", names=["2 pairs for valid", "3 pairs for test", "only 4"]
    ):
        choose([("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")], recipe())


def test_tokens_are_those_of_moses():
    lines = ["It's a well-known “fact” — said Mr. Fox & co. [1,234.50 €] isn\u2019t it?"]
    plain = tokenize(lines, "en", normalize=False)[0]
    assert plain == (
        "It &apos;s a well-known “ fact ” — said Mr. Fox & co . &#91; 1,234.50 € &#93; isn &apos;t it ?".replace(
            " & ", " &amp; "
        )
    )
    full = tokenize(lines, "en", normalize=True, aggressive_dashes=True)[0]
    assert full.startswith("It &apos;s a well @-@ known &quot; fact &quot; - said Mr. Fox")
    assert detokenize([full], "en") == ["It's a well-known \"fact\" - said Mr. Fox & co. [1,234.50 €] isn't it?"]
    assert tokenize(["a\x07b\u200bc"], "en") == ["a b c"]


def test_sub_words_join_to_the_same_words(tmp_path):
    lines = tokenize(["low lower lowest", "new newer newest wide", "wider widest &c"], "en") * 3
    codes = tmp_path / "codes"
    assert learn(lines, 9, codes) == 9
    pieces = segment([*lines, "unseen würds"], codes)
    assert [join(line) for line in pieces] == [*lines, "unseen würds"]
    assert any(MARK in line for line in pieces)
    learned = learn(lines, 999, codes)
    assert learned < 999  # no pair occurs twice anymore
    assert segment(lines, codes) == lines  # not with the codes of an earlier file
    words, subwords = " ".join(lines).split(), " ".join(pieces).split()
    assert len(subwords) > len(words)


def test_processes_keep_the_order():
    assert list(ordered(len, (["x"] * count for count in range(50)), workers=2)) == list(range(50))


def test_a_killed_process_is_reported():
    with raises_error(TranslationError, code="process-lost", names=["2 worker processes", "--workers"]):
        list(ordered(os._exit, [1] * 20, workers=2))


def test_built_in_recipes():
    german, base = read_recipe(["wmt16_en_de"], {})
    assert base == RECIPES
    assert (german.languages, german.merges, german.words, german.tokenize) == ("en-de", None, 32768, False)
    french, _ = read_recipe(["wmt14_en_fr"], {"merges": 100, "clean": {"max": 99, "min": None}})
    assert french.clean is not None
    assert (french.merges, french.clean.max, french.clean.min, french.clean.ratio) == (100, 99, 1, 1.5)
    assert {item.file for item in french.downloads} == {
        "training-parallel-europarl-v7.tgz",
        "training-parallel-commoncrawl.tgz",
        "training-parallel-un.tgz",
        "training-parallel-nc-v9.tgz",
        "training-giga-fren.tar",
        "test-full.tgz",
    }


@pytest.mark.parametrize(
    ("corpus", "options", "code", "key", "names"),
    [
        (["wmt16_en_dd"], {}, "missing-file", "", ["wmt16_en_dd", "Did you mean wmt16_en_de?"]),
        (["a.tsv"], {"languages": "en-de", "merges": 0}, "out-of-range", "merges", ["0 ", "1"]),
        (["a.tsv"], {"languages": "en-de", "valid": 0}, "out-of-range", "valid", ["0 ", "1"]),
        (
            ["a.tsv"],
            {"languages": "en-de", "clean": {"min": 9, "max": 3}},
            "conflicting-values",
            "clean.min",
            ["9", "3"],
        ),
        (["wmt14_en_fr"], {"clean": {"ratio": 0.5}}, "out-of-range", "clean.ratio", "0.5"),
    ],
)
def test_invalid_recipes_are_one_line_errors(corpus, options, code, key, names):
    with raises_error(code=code, key=key, source="command line" if key else corpus[0], names=names):
        read_recipe(corpus, options)


def test_a_text_needs_its_languages():
    with raises_error(TranslationError, code="missing-key", names=["a.tsv", "--languages"]):
        read_recipe(["a.tsv"], {})


def test_the_home_directory_in_paths_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "languages: en-de\ntrain: ['~/train.{lang}', ['~/a.en', b.de]]\nvalid: ~/dev.tsv\ntest: 3\n"
    (tmp_path / "mine.yaml").write_text(text)
    found, base = read_recipe(["~/mine.yaml"], {"clean": {"max": 7}, "fields": (2, 3)})
    assert base == tmp_path
    assert found.train == (f"{tmp_path}/train.{{lang}}", (tmp_path / "a.en", Path("b.de")))
    assert found.valid == f"{tmp_path}/dev.tsv"
    assert (found.clean.max, found.fields) == (7, (2, 3))


def test_names_of_texts_in_any_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["trän #1.en", "\U0001f600: x.de"]
    found, _ = read_recipe(names, {"languages": "en-de"})
    assert found.train == (tuple(tmp_path / name for name in names),)
