"""The benchmark of fine-tuning: gradients of all methods, and no lower peak than that of `exact`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.examples.test_benchmarks import script
from tests.support.versions import TORCH

TINY = {
    "vit": {"depth": 3, "width": 64, "size": 48, "count": 5},
    "gpt2": {"depth": 3, "width": 64, "size": 13, "count": 3},
}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return script("finetuning")


def measured(benchmark: ModuleType, case: str, names: Sequence[str], **shape: int) -> Mapping[str, Any]:
    """Measure these methods on a small network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "WAYS", {name: benchmark.WAYS[name] for name in names})
        return benchmark.measure(benchmark.CASES[case]._replace(**TINY[case] | shape), 1, lambda: None)


SOME = (
    "store",
    "checkpoint each block",
    "checkpoint pairs of blocks",
    "checkpoint selectively",
    "int8",
    "save_on_cpu",
    "rewired, store",
    "exact",
    "exact, budget: checkpoint pairs of blocks",
)


@pytest.fixture(scope="module")
def results(benchmark: ModuleType) -> Mapping[str, Any]:
    """Results of some methods, with activations larger than the weights."""
    return measured(benchmark, "vit", SOME, depth=8, size=64, count=101)


def test_all_methods_except_int8_match_plain_autograd(results):
    assert {name for name, result in results.items() if result.error != 0} == {"int8"}
    assert results["int8"].error < 0.05


def test_exact_has_lowest_peak_on_device(results):
    peaks = {name: result.peak for name, result in results.items() if result.seconds and result.error == 0}
    assert min(peaks.values()) == results["exact"].peak


def test_budget_is_used_and_not_exceeded(results):
    planned = results["exact, budget: checkpoint pairs of blocks"]
    assert results["exact"].kept < planned.kept
    assert planned.peak <= results["checkpoint pairs of blocks"].peak


def test_int8_saves_less_than_half(results):
    assert results["int8"].kept < results["store"].kept / 2


def test_save_on_cpu_leaves_nothing_on_device(results):
    assert results["save_on_cpu"].kept < results["exact"].kept / 10
    assert not results["save_on_cpu"].seconds


@pytest.mark.skipif(
    TORCH < (2, 14), reason="older versions run the blocks without Dynamo while saved tensors are counted"
)
def test_compiled_blocks_save_less_with_smaller_budget(benchmark):
    names = ["store", "compile, budget 0.5", "compile, budget 0"]
    store, half, none = measured(benchmark, "vit", names).values()
    assert none.kept < half.kept < store.kept
    assert 0 <= none.error < 1e-5


def test_language_model_gradients_are_exact(benchmark):
    pytest.importorskip("transformers")
    results = measured(benchmark, "gpt2", ["store", "checkpoint pairs of blocks", "rewired, store", "exact"])
    assert [result.error for result in results.values()] == [0, 0, 0, 0]
    assert results["exact"].kept < results["rewired, store"].kept / 2


def test_reversible_network_has_different_gradients(benchmark):
    plain, rewired = (
        benchmark.Contender(benchmark.WAYS[name], benchmark.CASES["vit"]._replace(**TINY["vit"])).gradients()
        for name in ("store", "rewired, store")
    )
    assert plain.keys() == rewired.keys()
    assert not all(torch.equal(plain[key], rewired[key]) for key in plain)


def test_run_prints_all_methods_and_draws(benchmark, monkeypatch, tmp_path):
    names = ["store", "checkpoint each block", "save_on_cpu", "rewired, store", "exact"]
    monkeypatch.setattr(benchmark, "WAYS", {name: benchmark.WAYS[name] for name in names})
    monkeypatch.setitem(benchmark.CASES, "vit", benchmark.CASES["vit"]._replace(**TINY["vit"]))
    app = typer.Typer()
    app.command()(benchmark.main)
    options = ["--case", "vit", "--rounds", "2", "--batch", "2", "--png", str(tmp_path / "finetuning.png")]
    result = CliRunner().invoke(app, options, env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    for name in names:
        assert len(re.findall(rf"│ {name} +│", result.output)) == 1
    assert (tmp_path / "finetuning.png").stat().st_size > 10_000
