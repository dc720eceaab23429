"""`revnets show` with files for `--revcol-spec`, which describe columns without a stem."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")

from nlp.layers.transformer import TransformerBlock
from nlp.models.encoder_spec import read_spec
from revnets.cli.show import describe
from revnets.config.imports import PACKAGES, imported
from revnets.config.registry import IMPORTED
from tests.support.errors import raises_error
from tests.support.paths import ROOT

COLUMNS = """
columns: 3
levels:
  - {dim: 20, depth: 1, block: transformer, heads: 2, ffn_dim: 28}
  - {dim: 20, depth: 2, block: transformer, heads: 4, ffn_dim: 28}
"""
REST = ["stem={type: linear, in_dim: 20}", "fusion={type: linear, project: [above]}"]


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "columns.yaml"
    path.write_text(COLUMNS)
    return str(path)


def test_a_missing_stem_is_named_with_one_for_sequences(file):
    with raises_error(code="missing-key", key="stem", names=["{type: linear, in_dim: "]):
        describe(file, [], (11, 20), [])


def test_columns_are_shown_with_a_linear_stem(file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    describe(file, REST, (11, 20), [])
    printed = capsys.readouterr().out
    assert "3 columns of 2 levels" in printed
    assert "2 x transformer" in printed


def test_the_guide_has_this_stem_and_fusion():
    page = (ROOT / "docs/guides/translation-model.md").read_text(encoding="utf-8")
    assert '"stem={type: linear, in_dim: 768}" "fusion={type: linear, project: [above]}"' in page


def test_the_encoder_ignores_a_stem_in_the_file(tmp_path, file):
    whole = tmp_path / "whole.yaml"
    whole.write_text(COLUMNS + "stem: {type: linear, in_dim: 20}\n")
    specs = [json.loads(read_spec(path, {}, trust=False)) for path in (tmp_path / "columns.yaml", whole)]
    assert specs[0] == specs[1]


def test_the_block_is_imported_by_its_name():
    path = IMPORTED["block"]["transformer"]
    assert path.split(".")[0] in PACKAGES
    assert imported("block", path, trust=False) is TransformerBlock
