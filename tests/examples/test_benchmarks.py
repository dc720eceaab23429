"""The benchmark against peers compares what can be compared: one function, its gradients, and bytes as allocated."""

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
def peers() -> ModuleType:
    return script("reversible_libraries")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers, which are older than this PyTorch
        yield


def contender(peers: ModuleType, kind: str, name: str, shape: tuple[int, ...], depth: int = 6):
    """The one of this name, and plain autograd on the same net and batch."""
    package = peers.WAYS[name].package
    if package is not None:
        pytest.importorskip(package)
    reference, other = peers.contenders([peers.REFERENCE, name], peers.CASES[kind]._replace(shape=shape), depth)
    return other, reference


def test_every_way_is_looked_at(peers):
    assert {peers.REFERENCE, *BIT_FOR_BIT, *NEAR} == set(peers.WAYS)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("name", BIT_FOR_BIT + NEAR)
def test_all_compute_the_same_function_and_gradient(peers, kind, name):
    other, reference = contender(peers, kind, name, SMALL[kind])
    torch.testing.assert_close(other.logits(), reference.logits(), rtol=1e-5, atol=1e-6)
    gradients, expected = other.gradients(), reference.gradients()
    assert all(gradient is not None and gradient.any() for gradient in expected.values())
    if name in BIT_FOR_BIT:
        torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
    else:
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", BIT_FOR_BIT + NEAR)
def test_bytes_are_those_of_the_allocator(peers, name):
    """memcnn empties its inputs behind the dispatcher's back; whatever a peer does, it is to be counted right."""
    other, _ = contender(peers, "mlp", name, (16, 32, 64))
    other.gradients()  # whatever is made once
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
def test_the_lowest_peak_of_all_is_that_of_exact(peers, kind):
    case = peers.CASES[kind]
    shape = (case.shape[0], *(max(side // 4, 5) for side in case.shape[1:-1]), case.shape[-1] // 2)
    names, _ = peers.installed()
    peaks = {one.name: one.memory()[1] for one in peers.contenders(names, case._replace(shape=shape), 8)}
    exact = peaks.pop("revnets exact")
    del peaks["revnets invert"]  # the same engine without its lost bits, and without right gradients
    assert all(exact <= peak for peak in peaks.values()), (exact, peaks)


@pytest.mark.parametrize("kind", SMALL)
def test_a_run_prints_every_way_and_draws(peers, kind, monkeypatch, tmp_path):
    monkeypatch.setitem(peers.CASES, kind, peers.CASES[kind]._replace(shape=SMALL[kind]))
    app = typer.Typer()
    app.command()(peers.main)
    options = ["--case", kind, "--blocks", "2,4", "--rounds", "1", "--png", str(tmp_path / "peers.png")]
    result = CliRunner().invoke(app, options, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for name in peers.installed()[0]:
        assert len(re.findall(rf"│ {name} +│", result.output)) == 2  # a row in the table of each depth
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_who_is_missing_is_left_out(peers, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    names, missing = peers.installed()
    assert missing == ["memcnn", "revlib"]
    assert set(names) == {peers.REFERENCE, *BIT_FOR_BIT, "revnets invert"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reversible_libraries", ["--blocks", "8,7"], "'7': give even numbers"),
        ("reversible_libraries", ["--case", "attention"], "'attention': give mlp or conv"),
        ("reversible_libraries", ["--png", "peers.jpg"], "peers.jpg: give a file name that ends in .png"),
        ("training_step", ["--columns", "4,x"], "'x': give numbers from 1 to 1024"),
        ("training_step", ["--shape", "Z"], "'Z': give T or S or B"),
        ("training_step", ["--png", "step"], "step: give a file name that ends in .png"),
        ("finetuning", ["--case", "bert"], "'bert': give vit or gpt2"),
        ("drift", ["--columns", "1"], "'1': give numbers from 2 to 1024"),
        ("drift", ["--png", "drift.jpg"], "drift.jpg: give a file name that ends in .png"),
    ],
)
def test_bad_options_are_refused_before_the_work(name, options, message):
    app = typer.Typer()
    app.command()(script(name).main)
    result = CliRunner().invoke(app, options, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output
