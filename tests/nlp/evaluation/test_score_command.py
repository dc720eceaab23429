"""Options, warnings and errors of `revnets score-mt`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")

from nlp import cli

app = typer.Typer()
app.command("score-mt")(cli.score_mt)

TEXT = ("Der Mann ging nach Hause .", "Sie blieb , weil es regnete .")


def call(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def output(tmp_path) -> Path:
    lines = [f"T-{number}\t{text}\nH-{number}\t-0.5\t{text}\n" for number, text in enumerate(TEXT)]
    path = tmp_path / "test.out"
    path.write_text("".join(lines))
    return path


def test_the_tokenizer_is_printed_in_the_signature(output):
    code, out, _ = call(output, "-l", "zh_CN")
    assert code == 0
    assert "tok:zh|" in out
    code, out, _ = call(output, "-l", "zh_CN", "--tokenize", "intl")
    assert code == 0
    assert "tok:intl|" in out


def test_brackets_in_the_name_of_the_output(output):
    path = output.with_name("[") / "x] [bold].out"
    path.parent.mkdir()
    output.rename(path)
    code, out, _ = call(path, "-l", "de")
    assert code == 0
    assert "[/x] [bold].out, 2 sentences" in "".join(out.split("\n"))


def test_a_missing_dictionary_is_a_warning(output, monkeypatch):
    monkeypatch.setattr("nlp.evaluation.tokenizers.default_tokenizer", lambda language: "char")
    code, out, err = call(output, "-l", "ja_JP", "--json")
    assert code == 0
    assert json.loads(out).keys() == {"sacreBLEU"}
    assert err.startswith("warning: sacreBLEU compares characters")
    assert "sacrebleu[ja]" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["-l", "de", "--tokenize", "13b"], ["'13b'"]),
        (["-l", "deutsch"], ["'deutsch'"]),
        (["-l", "de", "--reference", "{output}", "--test-set", "wmt14/full:en-de"], ["--reference", "--test-set"]),
        (["-l", "fr", "--test-set", "wmt14/full:en-de"], ["wmt14/full:en-de", "'fr'"]),
    ],
)
def test_errors_are_one_line(output, words, names):
    code, _, err = call(output, *(word.format(output=output) for word in words))
    assert code == 1
    assert err.startswith("error: ")
    assert all(name in err for name in names), err
    assert err.count("\n") == 1
