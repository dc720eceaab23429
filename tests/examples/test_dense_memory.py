"""The table of the memory of detectors and segmenters."""

import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from tests.examples.test_benchmarks import script


def invoke(*arguments):
    app = typer.Typer()
    app.command()(script("dense_memory").main)
    return CliRunner().invoke(app, arguments)


def test_recomputed_heads_and_exact_columns_take_less():
    found = {
        (row.memory, row.recomputes): row
        for row in script("dense_memory").rows(["upernet"], "test_revcol", 97, 2, 7, 7, measure=True)
    }
    assert all(row.peak == pytest.approx(row.measured, rel=0.03) for row in found.values())
    assert found["exact", True].kept < found["exact", False].kept < found["store", False].kept


def test_the_table_can_be_printed_as_markdown(monkeypatch):
    module = script("dense_memory")
    monkeypatch.setattr(module, "rows", lambda *args: [module.Row("dino", "exact", True, 2**21, 2**22, None)])
    result = invoke("--markdown", "--models", "dino")
    assert result.stdout.splitlines()[-1] == "| dino | exact | yes | 2 | 4 |"


def test_an_unknown_model_is_refused():
    result = invoke("--models", "dino,yolo")
    assert result.exit_code == 2
    assert "yolo" in result.output
