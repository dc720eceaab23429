"""Language pairs with regions and scripts, in the notations of other tools."""

from __future__ import annotations

import pytest

from tests.support.errors import raises_error

pytest.importorskip("sacremoses")

from nlp.data.corpus import TranslationError, known_language, languages
from nlp.data.recipe import read_recipe
from nlp.data.subwords.moses import detokenize, tokenize


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("en-pt_BR", ("en", "pt_BR")),
        ("en-pt_br", ("en", "pt_BR")),
        ("en-pt-BR", ("en", "pt_BR")),
        ("pt-BR-en", ("pt_BR", "en")),
        ("en-zh_CN", ("en", "zh_CN")),
        ("en-zh-cn", ("en", "zh_CN")),
        ("en_XX-de_DE", ("en_XX", "de_DE")),
        ("EN-DE", ("en", "de")),
        ("en - de\n", ("en", "de")),
        ("zh_CN-zh_TW", ("zh_CN", "zh_TW")),
        ("en-zh_hant_tw", ("en", "zh_Hant_TW")),
        ("en-es_419", ("en", "es_419")),
    ],
)
def test_unambiguous_pairs(text, pair):
    assert languages(text) == pair
    recipe, _ = read_recipe(["a.tsv"], {"languages": text})
    assert (recipe.languages, recipe.codes) == ("-".join(pair), pair)


@pytest.mark.parametrize(
    ("text", "code", "names"),
    [
        ("en-pt-br", "invalid-syntax", ["en-pt_BR", "en_PT-br"]),
        ("EN-en", "invalid-syntax", ["'EN-en'", "same"]),
        ("en_de", "invalid-syntax", ["'en_de'", "Write en-de"]),
        ("en:pt", "invalid-syntax", ["Write en-pt"]),
        ("en to de", "invalid-syntax", ["Write en-de"]),
        ("en", "invalid-syntax", ["'en'", "en-pt_BR"]),
        ("", "invalid-syntax", ["en-de"]),
        ("en-", "unknown-choice", ["''"]),
        ("eng-deu", "unknown-choice", ["'eng'", "two-letter"]),
        ("en-pt_", "unknown-choice", ["'pt_'", "pt"]),
        pytest.param("en-" * 1_000_000, "invalid-syntax", ["too long", "en-de"], id="megabytes"),
    ],
)
def test_other_pairs_are_refused_with_a_suggestion(text, code, names):
    with raises_error(TranslationError, code=code, names=names):
        languages(text)
    with raises_error(code=code, key="languages", source="command line", names=names):
        read_recipe(["a.tsv"], {"languages": text})


def test_tokenizer_rules_depend_on_the_language_only():
    line = ["L'acqua è fredda, no?"]
    tokens = tokenize(line, "it_CH")
    assert tokens == tokenize(line, "it") != tokenize(line, "de")
    assert detokenize(tokens, "it_CH") == detokenize(tokens, "it") != detokenize(tokens, "de")
    assert known_language("it-ch") == "it_CH"
