"""The benchmark of translation runs, and its memory matches the claims of the documentation."""

from __future__ import annotations

import importlib.util
import logging

import pytest

from tests.support.paths import ROOT

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")


@pytest.fixture
def benchmark():
    path = ROOT / "examples/benchmarks/translation.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_translation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    logging.disable(logging.NOTSET)


def test_translation_benchmark(benchmark, tmp_path, capsys, monkeypatch):
    speed, memory = benchmark.speed_table, benchmark.memory_table
    measured = []
    monkeypatch.setattr(benchmark, "speed_table", lambda rows, *rest: measured.append(rows) or speed(rows, *rest))
    monkeypatch.setattr(benchmark, "memory_table", lambda rows: measured.append(rows) or memory(rows))
    benchmark.main(scale=1, tokens=256, rounds=1, png=tmp_path / "nlp.png")
    printed = capsys.readouterr().out
    assert "in exact" in printed
    assert "RevCol, transformer's peak" in printed
    assert (tmp_path / "nlp.png").stat().st_size > 5000
    compared, kept = measured
    parameters = {name: row.parameters for name, row in compared.items()}
    assert parameters["RevCol, store"] == parameters["RevCol, exact"]
    assert 0.9 < parameters["RevCol, exact"] / parameters["transformer"] < 1.1
    few, many = kept[4], kept[8]
    grows = {name: many[name] - few[name] for name in few}
    assert 0 < grows["RevCol, exact"] <= 0.1 * grows["RevCol, store"]
    assert few["RevCol, exact"] < 0.1 * few["transformer"]


def test_scale_four_has_widths_of_paper(benchmark):
    from tests.support.fairseq import options

    text = [str(item) for item in benchmark.sizes(4)["revcol"]]
    given = dict(zip(text[::2], text[1::2], strict=True))
    paper = vars(options("revcol_transformer"))
    for option in ("embed-dim", "ffn-embed-dim", "attention-heads"):
        assert int(given[f"--encoder-{option}"]) == paper[f"encoder_{option.replace('-', '_')}"]
    assert int(given["--revcol-columns"]) == paper["revcol_columns"]
