"""Memory plans: predictions agree with real steps, and budgets are respected."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import revnets
from revnets.cli import main
from revnets.cli.plan import plan_table
from revnets.config.memory_budget import parse_budget, parse_bytes
from revnets.memory.simulation import total, typical_gamma
from revnets.memory.tracker import MemoryTracker, OpCounter
from revnets.models.plan import PlanError, plan
from revnets.plotting.memory_plan import parts_of, plan_figure
from tests.support.errors import assert_error, raises_error
from tests.support.paths import ROOT
from tests.support.simulated_steps import simulated_once

EXAMPLES = ROOT / "examples/configs"
NARROW = ["levels.0.dim=16", "levels.1.dim=32", "levels.2.dim=64", "levels.3.dim=128"]  # activations outweigh weights
SHALLOW = [f"levels.{level}.depth=1" for level in range(4)]
SMALL = ["columns=2", *NARROW, *SHALLOW]
CASES = [  # net, overrides, input shape
    ("revcol_tiny.yaml", ["columns=2"], (3, 3, 64, 64)),
    ("revcol_tiny.yaml", ["columns=2", "gain.init=0.2", *SHALLOW], (2, 3, 96, 64)),
    ("revcol_small.yaml", ["columns=3", "taps=[1]", "drop_path=0.1", *SHALLOW], (2, 3, 64, 64)),
    (
        "huge_reads.yaml",
        ["columns=2", *SHALLOW, "levels.0.dim=24", "levels.1.dim=48", "levels.2.dim=96", "levels.3.dim=192"],
        (2, 3, 64, 64),
    ),
    ("mixed.yaml", ["columns=2", *SHALLOW], (2, 3, 64, 64)),
    ("vit.yaml", ["columns=2", *SHALLOW], None),
    ("revnet.yaml", ["columns=5"], (2, 3, 32, 32)),
    ("eq2.yaml", ["columns=2", *SHALLOW], None),
    ("vectors.yaml", ["columns=3"], None),
]


@pytest.fixture(scope="module", autouse=True)
def _simulated_once() -> Iterator[None]:
    with simulated_once():
        yield


def built(name: str, overrides: list[str], shape: tuple[int, ...] | None) -> tuple[revnets.Net, tuple[int, ...]]:
    torch.manual_seed(0)
    net = revnets.build(EXAMPLES / name, overrides)
    return net, shape or (2, *net.stem.example_shape)


def measured(net: revnets.Net, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Return saved and peak bytes of one real step, weights included."""
    x = torch.randn(shape)
    with MemoryTracker() as tracker:
        tracker.register(net)
        static = tracker.live
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = total(net(x))
        kept = tracker.live - static
        loss.backward()
    for parameter in net.parameters():
        parameter.grad = None
    return kept, tracker.peak


@pytest.mark.parametrize(("name", "overrides", "shape"), CASES)
def test_predicted_memory_is_what_a_step_takes(name, overrides, shape):
    net, shape = built(name, overrides, shape)
    for row in plan(net, shape, optimizer="none").modes:
        net.columns.memory = row.mode
        kept, peak = measured(net, shape)
        assert row.peak == pytest.approx(peak, rel=0.03)
        assert row.kept == pytest.approx(kept, rel=0.03)


def flops(net: revnets.Net, shape: tuple[int, ...]) -> int:
    with OpCounter() as counter:
        torch.autograd.grad(total(net(torch.randn(shape))), list(net.parameters()))
    return counter.flops


def test_prediction_with_autocast_and_stored_cells():
    net, shape = built("revcol_tiny.yaml", SMALL, (5, 3, 64, 64))
    net.columns.stored = 3
    _, peak = measured(net, shape, torch.bfloat16)
    least = plan(net, shape, dtype=torch.bfloat16, optimizer="none", modes=("exact",)).modes[0]
    chosen = plan(net, shape, dtype=torch.bfloat16, optimizer="none", modes=(), budget=int(1.015 * peak)).chosen
    assert least.peak < peak
    assert chosen is not None
    assert len(chosen.stored) >= 3
    assert chosen.peak == pytest.approx(peak, rel=0.03)


def test_planning_does_not_change_the_model():
    net, shape = built("vectors.yaml", ["columns=2"], None)
    net.columns.memory = ["invert"] + ["store"] * (net.columns.graph.columns - 1)
    before = net.columns.memory
    state = {name: value.clone() for name, value in net.state_dict().items()}
    plan(net, shape, budget="1GiB")
    assert net.columns.memory == before
    assert not net.columns.stored
    assert all(parameter.grad is None for parameter in net.parameters())
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)


def test_no_step_is_simulated_twice():
    net, shape = built("vectors.yaml", ["columns=2"], (601, 64))
    names: list[str] = []
    plan(net, shape, optimizer="none", modes=("store", "exact"), budget="exact", progress=names.append)
    assert len(names) > 3
    assert len(set(names)) == len(names)


def test_spec_is_planned_without_building_it():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = plan(EXAMPLES / "huge_reads.yaml", (1, 3, 64, 64), modes=("store",)).modes[0]
    assert row.parameters == 4 * 2_157_594_760  # 8.6 GB, which are never allocated
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: a gigabyte


def test_ten_budgets_are_respected_and_more_memory_means_less_compute():
    levels = "levels=[{dim: 16, depth: 1, block: mlp}, {dim: 24, depth: 1, block: mlp}]"
    net, shape = built("vectors.yaml", ["columns=3", levels], (601, 64))
    rows = {row.mode: row for row in plan(net, shape, optimizer="none").modes}
    least, most = int(1.01 * rows["exact"].peak) + 1, rows["store"].peak
    work, extra = [], []
    for step in range(10):
        budget = least + (most - least) * step // 9
        found = plan(net, shape, optimizer="none", modes=(), budget=budget)
        found.apply(net)
        _, peak = measured(net, shape)
        assert peak <= budget
        extra.append(found.chosen.extra)
        work.append(flops(net, shape))
    # A few simulations correct the search, which is not exact to the last cell.
    for costs in (extra, work):
        assert all(more <= 1.005 * less for less, more in pairwise(costs))
    assert work[-1] == rows["store"].flops
    assert len(set(work)) >= 6


@pytest.mark.parametrize("mode", ["exact", "recompute"])
def test_cells_are_stored_without_a_higher_peak(mode):
    """Backward allocates gradients step by step. Until then, stored cells can use their memory."""
    net, shape = built("revcol_tiny.yaml", SMALL, (1, 3, 32, 32))
    net.columns.memory = mode
    _, limit = measured(net, shape)
    chosen = plan(net, shape, optimizer="none", modes=(), budget=mode)
    chosen.apply(net)
    _, peak = measured(net, shape)
    assert peak <= 1.003 * limit  # the length of lost bits is an estimate, and a small part
    work = flops(net, shape)
    net.columns.stored = 1  # always true for the last cell
    assert work < flops(net, shape)


def test_remaining_memory_is_used_for_states():
    """With small activations and large weights, states do not raise the peak, and gradients have equal bits."""
    net, shape = built("revcol_tiny.yaml", ["columns=3", *NARROW, *SHALLOW], (3, 3, 64, 64))
    found = plan(net, shape, optimizer="none", modes=("exact",), budget="exact")
    assert found.chosen is not None
    assert found.chosen.kept_cells
    assert found.chosen.peak <= found.modes[0].peak
    found.apply(net)
    assert [str(mode) for mode in net.columns.memory] == found.chosen.memory(3)
    assert net.columns.kept == dict(found.chosen.kept_cells)
    x = torch.randn(shape)
    torch.manual_seed(0)  # of drop path
    planned = torch.autograd.grad(total(net(x)), list(net.parameters()))
    net.columns.memory, net.columns.stored = "store", 0
    torch.manual_seed(0)
    plain = torch.autograd.grad(total(net(x)), list(net.parameters()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(planned, plain, strict=True))


def test_a_choice_that_exceeds_the_budget_by_a_rounding_error_is_replaced():
    """The search rounds bytes to units. For these 51 cells, its first choices exceed the budget by a few units."""
    levels = [{"dim": dim, "depth": 1, "block": "convnext"} for dim in (8, 12, 20)]
    head = {"type": "classifier", "num_classes": 10}
    net = revnets.build({"columns": 17, "stem": {"type": "patchify"}, "levels": levels, "head": head})
    found = plan(net, (2, 3, 32, 32), optimizer="none", modes=("exact",), budget="exact").chosen
    assert found is not None
    assert found.peak <= plan(net, (2, 3, 32, 32), optimizer="none", modes=("exact",)).modes[0].peak
    assert found.kept_cells


def test_accumulated_gradients_count_during_the_whole_step():
    """They leave no memory for stored cells, and the budget is still respected."""
    net, shape = built("revcol_tiny.yaml", SMALL, (1, 3, 32, 32))
    once, several = (plan(net, shape, optimizer="none", modes=(), budget="exact", grad_accum=n) for n in (1, 2))
    assert once.chosen is not None
    assert several.chosen is not None
    assert len(several.chosen.stored) < len(once.chosen.stored)
    several.apply(net)
    x = torch.randn(shape)
    total(net(x)).backward()
    with MemoryTracker() as tracker:
        tracker.register(net)
        total(net(x)).backward()
    assert abs(several.chosen.peak / tracker.peak - 1) < 0.03
    with raises_error(PlanError, code="out-of-range", key="grad_accum", names="0"):
        plan(net, shape, grad_accum=0)


def test_ranks_and_optimizer():
    net, shape = built("vectors.yaml", ["columns=2"], None)
    weights = sum(parameter.nbytes for parameter in net.parameters())
    one = plan(net, shape, optimizer="adamw", modes=("exact",)).modes[0]
    bare = plan(net, shape, optimizer="none", modes=("exact",)).modes[0]
    ddp = plan(net, shape, optimizer="adamw", ranks=4, modes=("exact",)).modes[0]
    fsdp = plan(net, shape, optimizer="adamw", ranks=4, sharding="fsdp", modes=("exact",)).modes[0]
    assert one.peak - bare.peak == 2 * weights
    assert ddp.peak - one.peak == weights
    assert fsdp.optimizer == -(-2 * weights // 4)
    assert fsdp.peak < one.peak


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        ({"budget": "10KiB"}, "over-budget", ["10.0 KiB", "ranks"]),
        ({"budget": "lots"}, "invalid-value", ["'lots'", "24GiB"]),
        ({"optimizer": "adamm"}, "unknown-choice", ["'adamm'", "none, sgd"]),
        ({"sharding": "zero"}, "unknown-choice", ["'zero'", "ddp, fsdp"]),
        ({"ranks": 0}, "out-of-range", "0"),
    ],
)
def test_invalid_requests(arguments, code, names):
    with raises_error(PlanError, code=code, key=next(iter(arguments)), names=names):
        plan(EXAMPLES / "vectors.yaml", (2, 64), **arguments)


def test_rejected_input():
    with raises_error(PlanError, code="input-rejected", key="input_shape", names="(2, 17)"):
        plan(EXAMPLES / "vectors.yaml", (2, 17))
    with raises_error(PlanError, code="input-rejected", key="input_shape", names=["(2, 3, 64, 64)", "img_size 224"]):
        plan(EXAMPLES / "vit.yaml", (2, 3, 64, 64))


def test_error_distinguishes_large_batch_from_large_model():
    net, shape = built("revcol_tiny.yaml", SMALL, (8, 3, 96, 96))
    with raises_error(PlanError, code="over-budget", key="budget", names=["8 samples", "lower the batch"]):
        plan(net, shape, optimizer="none", budget=sum(p.nbytes for p in net.parameters()) * 2 + 2**20)


def test_apply_requires_a_budget():
    net, shape = built("vectors.yaml", ["columns=2"], None)
    with raises_error(PlanError, code="missing-budget", key="budget", names="budget="):
        plan(net, shape).apply(net)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), (7, 7), ("10B", 10), ("2KiB", 2048), ("2 kb", 2000), ("1.5GiB", 3 * 2**29), ("3tb", 3 * 10**12)],
)
def test_parse_bytes(text, count):
    assert parse_bytes(text) == count


def test_mode_as_budget_means_its_peak():
    assert parse_budget("exact") == "exact"
    assert parse_budget("2KiB") == 2048
    with raises_error(
        ValueError, code="invalid-value", key="budget", names=["'exactly'", "store, recompute, invert, exact"]
    ):
        parse_budget("exactly")


@pytest.mark.parametrize("text", ["", "-1GiB", "0", "1.2.3GB", "GiB", "1GX", "nan", "inf", "1e400"])
def test_invalid_amounts_of_memory(text):
    with raises_error(ValueError, code="invalid-value", key="budget", names=repr(text)):
        parse_bytes(text)


def test_typical_gamma():
    assert typical_gamma(nn.ModuleList([revnets.Gain(3, 0.2), revnets.Gain(3, -0.4), revnets.Gain(3, 0.9)])) == (
        pytest.approx(0.4)
    )
    with torch.device("meta"):
        assert typical_gamma(revnets.Gain(3, 0.3)) == 0.3
    assert typical_gamma(revnets.FixedGain(1.0)) == 1.0


def test_parts_add_up_and_figure_names_them():
    net, shape = built("vectors.yaml", ["columns=2"], None)
    found = plan(net, shape, budget="1GiB", ranks=2)
    for row in found.modes:
        assert sum(parts_of(row).values()) == row.peak
    figure = plan_figure(found)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"parameters", "optimizer", "communication", "budget"} <= set(labels)
    assert plan_table(found)


def test_command(tmp_path):
    run = CliRunner().invoke
    spec, picture = str(EXAMPLES / "vectors.yaml"), tmp_path / "plan.svg"
    done = run(main.app, ["plan", spec, "columns=3", "--batch", "5", "--json", "--png", str(picture)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["input_shape"][0] == 5
    assert [row["mode"] for row in found["modes"]] == ["store", "recompute", "invert", "exact"]
    assert picture.read_text().startswith("<?xml")
    assert run(main.app, ["plan", spec, "--png", "x.gif"]).exit_code == 2


@pytest.mark.parametrize("command", [["show", "--svg"], ["plan", "--png"], ["audit", "--png"]])
def test_unwritable_figure_is_a_one_line_error(command, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "p.svg")

    name, option = command
    file = tmp_path / "file"
    file.touch()
    spec = str(EXAMPLES / "vectors.yaml")
    for path, code, named in (
        (tmp_path / "d.svg", "not-a-file", "d.svg"),
        (file / "p.svg", "unwritable-file", str(file)),
    ):
        (tmp_path / "d.svg").mkdir(exist_ok=True)
        error = CliRunner().invoke(main.app, [name, spec, option, str(path)]).exception
        assert_error(error, code=code, source="command line", key=option, names=named)
    monkeypatch.setattr("revnets.plotting.style.save", full)
    error = CliRunner().invoke(main.app, [name, spec, "columns=2", option, str(tmp_path / "p.svg")]).exception
    assert_error(error, code="unwritable-file", source="p.svg", key="", names="No space left on device")


def test_command_uses_the_budget_in_yaml():
    def found(*words: str) -> dict[str, Any]:
        spec = str(EXAMPLES / "vectors.yaml")
        memory = "memory={budget: 1GiB, optimizer: sgd, ranks: 2, grad_accum: 3}"
        return json.loads(CliRunner().invoke(main.app, ["plan", spec, "columns=2", memory, "--json", *words]).stdout)

    own, other = found(), found("--optimizer", "adam", "--ranks", "5", "--sharding", "fsdp", "--budget", "2GiB")
    assert (own["ranks"], own["sharding"], own["budget"]) == (2, "ddp", 2**30)
    assert own["modes"][0]["optimizer"] == own["modes"][0]["gradients"]
    assert (other["ranks"], other["sharding"], other["budget"]) == (5, "fsdp", 2**31)
    assert other["modes"][0]["optimizer"] >= 2 * other["modes"][0]["gradients"] - 2
