"""The benchmark of memory methods: gradients of each function, and predicted and measured peaks."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.examples.test_benchmarks import _quiet, script  # noqa: F401

TINY = {"depth": 4, "width": 64, "size": 32, "count": 3}


@pytest.fixture(scope="module")
def methods() -> ModuleType:
    return script("memory_methods")


def measured(methods: ModuleType, case: Any, ways: dict[str, Any], **shape: int) -> dict[str, Any]:
    return methods.finetuning.measure(case._replace(**TINY | shape), 1, lambda: None, ways)


@pytest.fixture(scope="module")
def columns(methods: ModuleType) -> dict[str, Any]:
    field = methods.fields()["columns"]
    names = ("store", "checkpoint each block", "checkpoint selectively", "exact")
    return measured(methods, field.case, {name: field.ways[name] for name in names}, depth=2, count=2)


def test_libraries_compute_gradients_of_their_function(methods):
    pytest.importorskip("timm")
    ways = {name: way for name, way in methods.LIBRARIES.items() if methods.installed(name)}
    vit = script("finetuning_ways").CASES["vit"]
    found = measured(methods, vit, ways)
    assert found["RevNet, exact"].error == 0
    assert all(result.error < 1e-4 for result in found.values())
    kept = {name: result.kept for name, result in found.items()}
    assert kept["RevNet, exact"] < kept["RevNet, store"] / 2


def test_libraries_compute_different_functions(methods):
    pytest.importorskip("timm")
    case = script("finetuning_ways").CASES["vit"]._replace(**TINY)
    losses = {}
    for name in filter(methods.installed, ("RevNet, store", "RevNet, exact", "RevNet, memcnn", "momentumnet, store")):
        losses[name] = methods.finetuning.Contender(methods.LIBRARIES[name], case).loss().detach()
    plain = methods.finetuning.Contender(methods.WAYS["store"], case).loss().detach()
    for name, loss in losses.items():
        assert not torch.equal(loss, plain)
        if name.startswith("RevNet"):
            torch.testing.assert_close(loss, losses["RevNet, store"])


def test_all_methods_compute_gradients_of_columns(columns):
    assert {name: result.error for name, result in columns.items()} == dict.fromkeys(columns, 0)


def test_selective_checkpoints_save_some_activations(columns):
    kept = {name: result.kept for name, result in columns.items()}
    assert kept["checkpoint each block"] < kept["checkpoint selectively"] < kept["store"]


def test_predicted_peaks_match_measured_ones(methods, columns):
    field = methods.fields()["columns"]
    found = methods.forecasts(field._replace(case=field.case._replace(**TINY | {"depth": 2, "count": 2})), columns)
    ours = [one for one in found if one.planner == "revnets.plan"]
    assert [one.way for one in ours] == ["store", "exact"]
    assert all(abs(one.error) < 0.01 for one in ours)


def test_run_prints_all_methods_and_draws(methods, monkeypatch, tmp_path):
    field = methods.fields()["columns"]
    ways = {name: field.ways[name] for name in ("store", "int8", "exact")}
    small = field._replace(ways=ways, case=field.case._replace(size=32))
    monkeypatch.setattr(methods, "fields", lambda: {"columns": small})
    app = typer.Typer()
    app.command()(methods.main)
    picture = tmp_path / "methods.png"
    options = [
        "--case",
        "columns",
        "--depth",
        "2",
        "--batch",
        "2",
        "--rounds",
        "1",
        "--markdown",
        "--png",
        str(picture),
    ]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    rows = [re.search(rf"^\| {name} \|.*\| (.+) \|$", result.output, re.MULTILINE).group(1) for name in ways]
    assert rows[0] == rows[2] == "bit for bit" != rows[1]
    assert "| RevCol-T | revnets.plan | exact |" in result.output
    assert picture.stat().st_size > 10_000
