"""All engines reach the weights of `store` in `exact`, and have the same loss curve."""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
from typer.testing import CliRunner

from tests.support.paths import ROOT
from tests.support.two_processes import PROCESSES, in_two_processes

pytest.importorskip("sklearn")

FOLDER = ROOT / "examples" / "engines"
STEPS = 3


def script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)


def result(engine: str) -> dict[str, Any]:
    """Run the script of an engine in this process. It raises an error if the weights of two modes differ."""
    module, workload = script(f"with_{engine}"), script("workload")
    names = [name for name in module.WORKLOADS if name in workload.installed()]
    return workload.run(engine, "", module.train, names, STEPS)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    torch.set_num_threads(1)
    return result("torch")


def test_losses_fall(reference):
    for name, found in reference["workloads"].items():
        assert name == "gpt2-lora" or found["losses"][-1] < found["losses"][0]  # adapters start at 0


def test_exact_saves_less_than_a_tenth(reference):
    for found in reference["workloads"].values():
        assert 0 < found["kept"]["exact"] < found["kept"]["store"] / 10


def test_trainer_has_the_same_losses(reference):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    found = result("trainer")
    assert {"gpt2"} <= found["workloads"].keys() <= {"gpt2", "gpt2-lora"}
    script("compare").assert_equal_curves([reference, found])


def in_each_process(rank: int, engines: Sequence[str], folder: Path) -> None:
    """Set the environment variables of torchrun and run the scripts."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    found = [result(engine) for engine in engines]
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_have_losses_of_one(reference, tmp_path):
    packages = {"accelerate": "accelerate", "fabric": "lightning_fabric", "pipeline": "torch"}
    engines = [engine for engine, package in packages.items() if find_spec(package) is not None]
    in_two_processes(partial(in_each_process, engines=engines, folder=tmp_path), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [found["engine"] for found in results] == engines
    for found in results:
        expected = {"columns"} if found["engine"] == "pipeline" else reference["workloads"].keys()
        assert found["workloads"].keys() == expected
    script("compare").assert_equal_curves([reference, *results])


def test_one_differing_bit_in_weights_is_detected():
    module, workload = script("with_torch"), script("workload")

    def train(model: Any, samples: Any, memory: str) -> list[float]:
        losses = module.train(model, samples, memory)
        if memory == "exact":
            weight = next(model.parameters()).data.view(-1)
            weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
        return losses

    with pytest.raises(AssertionError, match="differs between exact and store"):
        workload.compared(train, "columns", 1)


def test_one_differing_bit_in_losses_is_detected(reference):
    other = copy.deepcopy(reference)
    losses = other["workloads"]["columns"]["losses"]
    losses[-1] = torch.nextafter(torch.tensor(losses[-1]), torch.tensor(9.0)).item()
    with pytest.raises(AssertionError, match="columns"):
        script("compare").assert_equal_curves([reference, other])


def test_compare_runs_script_and_prints_row():
    app = typer.Typer()
    app.command()(script("compare").main)
    options = ["--engines", "torch", "--workloads", "columns", "--steps", "1"]
    done = CliRunner().invoke(app, options, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    (row,) = [line for line in done.output.splitlines() if line.startswith("│ columns")]
    assert [cell.strip() for cell in row.split("│")][2:6] == ["torch", torch.__version__, "1", "1"]


@pytest.mark.parametrize("option", ["--engines", "--workloads"])
def test_unknown_names_are_rejected(option):
    app = typer.Typer()
    app.command()(script("compare").main)
    done = CliRunner().invoke(app, [option, "torch7"], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "'torch7'" in done.output
