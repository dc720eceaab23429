"""The command for GPUs, run small on the CPU: what it measures is right, and what fails or comes too late is a row."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.examples.test_benchmarks import script


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return script("gpu")


def run(gpu: ModuleType, seconds: float = 1000):
    return gpu.Run(gpu.Device("cpu"), seconds, lambda text: None)


def invoke(gpu: ModuleType, *options: str):
    app = typer.Typer()
    app.command()(gpu.main)
    return CliRunner().invoke(app, options, env={"COLUMNS": "160"})


def test_the_official_scheme_takes_the_gradient_of_the_columns(gpu):
    """In float64, where its inverse is right to many digits."""
    official = script("official_columns")
    torch.manual_seed(0)
    net = script("training_step").columns_net("B", 3).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = []
    for columns in (net.columns, official.OfficialColumns(net.columns)):
        net.zero_grad()
        with net.columns.using(modes="store"):
            net.head(columns(net.stem(images))).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in net.named_parameters()})
    assert all(gradient is not None and gradient.any() for gradient in found[1].values())
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)


def test_what_does_not_fit_fails_or_is_late_becomes_a_row(gpu):
    measured = run(gpu)

    def work(error):
        def failing():
            raise error

        return failing

    errors = [torch.OutOfMemoryError("big"), ValueError("odd\nmore"), RuntimeError("No available kernel. Aborting")]
    for error in errors:
        measured.measure("steps", {"way": "any"}, work(error))
    measured.measure("steps", {"way": "last"}, lambda: {"peak": 3})
    measured.seconds = 0
    measured.measure("steps", {"way": "late"}, work(AssertionError("never called")))
    rows = measured.to_dict()["sections"]["steps"]
    assert [row["status"] for row in rows] == ["out of memory", "failed", "not here", "ok", "dropped"]
    assert rows[1]["error"] == "ValueError: odd"
    assert rows[3]["peak"] == 3
    assert measured.to_dict()["dropped"] == 1


def test_a_wrong_gradient_is_found(gpu, monkeypatch):
    checks = script("gpu_checks")
    outcome = checks.outcome

    def spoiled(check, device, mode, batch):
        found = outcome(check, device, mode, batch)
        if mode == "exact":
            next(gradient for gradient in found.gradients.values() if gradient is not None)[0] += 1e-3
        return found

    monkeypatch.setattr(checks, "outcome", spoiled)
    row = checks.found(checks.CHECKS["BatchNorm and dropout"], gpu.Device("cpu"), 2)
    assert not row["right"]
    assert [row["modes"][mode]["right"] for mode in ("recompute", "exact")] == [True, False]


def test_a_run_writes_numbers_and_a_picture(gpu, monkeypatch, tmp_path):
    pytest.importorskip("timm")
    checks, steps = script("gpu_checks"), script("gpu_steps")
    names = ("BatchNorm and dropout", "attention, math")
    ways = ("store", "official scheme", "selective")
    tiny = {
        "checks": lambda run: checks.run_checks(run, 2, names),
        "plan": lambda run: steps.run_plans(run, {"vit": steps.SMALL_MODELS["vit, rewired"]}, ("exact",)),
        "figure4": lambda run: steps.run_figure(run, (2,), 1, 32),
        "steps": lambda run: steps.run_steps(run, {"B": 2}, (1,), 32, 1, ways),
    }
    monkeypatch.setattr(gpu, "sections", lambda small: tiny)
    result = invoke(gpu, "--device", "cpu", "--out", str(tmp_path / "new"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "new" / "gpu.json").read_text())["sections"]
    assert list(found) == list(tiny)
    assert {row["status"] for rows in found.values() for row in rows} == {"ok"}
    assert all(row["modes"]["exact"]["equal"] for row in found["checks"])
    assert abs(found["plan"][0]["modes"]["exact"]["error"]) < 0.03
    assert [row["way"] for row in found["steps"]] == list(ways)
    assert (tmp_path / "new" / "gpu.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "abacus"], "'abacus': give cpu, cuda or cuda:1"),
        (["--device", "cpu", "--only", "checks,speed"], "'speed': use checks or plan or figure4 or steps"),
    ],
)
def test_bad_options_end_before_the_work(gpu, options, message):
    result = invoke(gpu, *options)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(gpu, tmp_path):
    result = invoke(gpu, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "finds no CUDA device" in result.output
