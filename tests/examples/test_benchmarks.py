"""Benchmarks compare the same function, its gradients and allocated bytes, and reject invalid options."""

from __future__ import annotations

import gc
import importlib
import re
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import typer
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from tests.support.paths import ROOT

FOLDER = ROOT / "examples" / "benchmarks"
BIT_FOR_BIT = ["torch checkpoint", "revnets store", "revnets recompute", "revnets exact", "revnets exact, planned"]
NEAR = ["memcnn", "revlib", "revlib graph", "revnets invert"]
SMALL = {"mlp": (3, 7, 16), "conv": (3, 5, 7, 16)}


def script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def libraries() -> ModuleType:
    return script("reversible_libraries")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the other libraries, which are older than this PyTorch
        yield


def contender(libraries: ModuleType, kind: str, name: str, shape: tuple[int, ...], depth: int = 6):
    """Return the contender of this name, and plain autograd on the same network and batch."""
    package = libraries.WAYS[name].package
    if package is not None:
        pytest.importorskip(package)
    reference, other = libraries.contenders(
        [libraries.REFERENCE, name], libraries.CASES[kind]._replace(shape=shape), depth
    )
    return other, reference


def test_all_methods_are_tested(libraries):
    assert {libraries.REFERENCE, *BIT_FOR_BIT, *NEAR} == set(libraries.WAYS)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("name", BIT_FOR_BIT + NEAR)
def test_methods_compute_same_function_and_gradients(libraries, kind, name):
    other, reference = contender(libraries, kind, name, SMALL[kind])
    torch.testing.assert_close(other.logits(), reference.logits(), rtol=1e-5, atol=1e-6)
    gradients, expected = other.gradients(), reference.gradients()
    assert all(gradient is not None and gradient.any() for gradient in expected.values())
    if name in BIT_FOR_BIT:
        torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
    else:
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", BIT_FOR_BIT + NEAR)
def test_bytes_equal_those_of_allocator(libraries, name):
    """memcnn frees its inputs without the dispatcher; the count must be right for every library."""
    other, _ = contender(libraries, "mlp", name, (16, 32, 64))
    other.gradients()  # creates what is allocated only once
    kept, peak = other.memory()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        other.loss().backward()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    assert highest == pytest.approx(peak, rel=0.05)
    assert 0 < kept < peak


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_exact_has_lowest_peak(libraries, kind):
    case = libraries.CASES[kind]
    shape = (case.shape[0], *(max(side // 4, 5) for side in case.shape[1:-1]), case.shape[-1] // 2)
    names, _ = libraries.installed()
    peaks = {one.name: one.memory()[1] for one in libraries.contenders(names, case._replace(shape=shape), 8)}
    exact = peaks.pop("revnets exact")
    del peaks["revnets invert"]  # the same engine without lost bits, with wrong gradients
    assert all(exact <= peak for peak in peaks.values()), (exact, peaks)


@pytest.mark.parametrize("kind", SMALL)
def test_run_prints_all_methods_and_draws(libraries, kind, monkeypatch, tmp_path):
    monkeypatch.setitem(libraries.CASES, kind, libraries.CASES[kind]._replace(shape=SMALL[kind]))
    app = typer.Typer()
    app.command()(libraries.main)
    options = ["--case", kind, "--blocks", "2,4", "--rounds", "1", "--png", str(tmp_path / "libraries.png")]
    result = CliRunner().invoke(app, options, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for name in libraries.installed()[0]:
        assert len(re.findall(rf"│ {name} +│", result.output)) == 2  # one row per depth
    assert (tmp_path / "libraries.png").stat().st_size > 10_000


def test_missing_packages_are_skipped(libraries, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    names, missing = libraries.installed()
    assert missing == ["memcnn", "revlib"]
    assert set(names) == {libraries.REFERENCE, *BIT_FOR_BIT, "revnets invert"}


def test_overview_prints_table_and_draws(tmp_path):
    app = typer.Typer()
    app.command()(script("overview").main)
    png = tmp_path / "overview.png"
    options = ["--columns", "2,3", "--size", "32", "--batch", "1", "--png", str(png)]
    result = CliRunner().invoke(app, options, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for name in ("store", "checkpoint", "exact"):
        assert len(re.findall(rf"│ {name} .*bit for bit", result.output)) == 2
    assert png.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reversible_libraries", ["--blocks", "8,7"], "'7': use even numbers"),
        ("reversible_libraries", ["--case", "attention"], "'attention': use mlp or conv"),
        ("reversible_libraries", ["--png", "libraries.jpg"], "libraries.jpg: use a file name that ends in .png"),
        ("training_step", ["--columns", "4,x"], "'x': use numbers from 1 to 1024"),
        ("training_step", ["--shape", "Z"], "'Z': use T or S or B"),
        ("training_step", ["--png", "step"], "step: use a file name that ends in .png"),
        ("finetuning", ["--case", "bert"], "'bert': use vit or gpt2"),
        ("overview", ["--columns", "0"], "'0': use numbers from 1 to 1024"),
        ("drift", ["--columns", "1"], "'1': use numbers from 2 to 1024"),
        ("drift", ["--png", "drift.jpg"], "drift.jpg: use a file name that ends in .png"),
    ],
)
def test_invalid_options_are_rejected(name, options, message):
    app = typer.Typer()
    app.command()(script(name).main)
    result = CliRunner().invoke(app, options, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output
