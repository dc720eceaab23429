"""Host memory in a budget: what a plan offloads, what that costs, and whether a step matches the plan."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import revnets
from revnets.cli import main
from revnets.config.memory_budget import BudgetSpec, HostMemory, host_memory, parse_flops, parse_link
from revnets.memory import host_options
from revnets.memory.auto_budget import _compare, _poorest
from revnets.memory.host_options import HostOptions
from revnets.memory.planner import Prediction, plan_module
from revnets.memory.policy_search import ALL, LOST, STATE, Option, search
from revnets.memory.simulation import total
from revnets.memory.tracker import MemoryTracker
from revnets.models.plan import Plan, PlanError, plan
from tests.support.errors import assert_error, raises_error
from tests.support.paths import ROOT

NET = ROOT / "examples/configs/vectors.yaml"
SMALL = ["columns=4"]
SHAPE = (211, 64)
BUDGET = "3.9MB"


def net() -> revnets.Net:
    torch.manual_seed(0)
    return revnets.build(NET, SMALL)


@cache
def planned(**changes: Any) -> Plan:
    """Return a plan for a budget between the peaks of `exact` and `store`, on a device of 1 GFLOP/s."""
    request = {"budget": BUDGET, "host": "64GiB", "flops": 1e9, "optimizer": "none", "modes": ()}
    return plan(net(), SHAPE, **{**request, **changes})


def test_fast_link_saves_compute_and_slow_link_does_not():
    alone = planned(host=None, flops=None).chosen
    fast, slow = planned().chosen, planned(link="1kB/s").chosen
    assert (alone.host, alone.offloaded) == (0, ())
    assert fast.extra < alone.extra
    assert fast.host > 0
    assert len(fast.offloaded) > 0
    assert fast.peak <= 3.9e6
    assert slow.extra <= alone.extra
    assert slow.host < fast.host


def test_step_matches_plan_and_gradients_of_store():
    model, x = net(), torch.randn(SHAPE)
    model.columns.memory = "store"
    torch.manual_seed(1)
    expected = torch.autograd.grad(total(model(x)), list(model.parameters()))
    found = planned()
    found.apply(model)
    assert model.columns.offloaded == set(found.chosen.offloaded)
    with MemoryTracker() as tracker:
        tracker.register(model)
        torch.manual_seed(1)
        loss = total(model(x))
        loss.backward()
    assert tracker.peak == pytest.approx(found.chosen.peak, rel=0.03)
    assert tracker.host_peak == pytest.approx(found.chosen.host, rel=0.03)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), expected, strict=True))


def test_host_memory_is_bounded():
    whole = planned().chosen
    part = planned(host=whole.host // 3).chosen
    assert part.host <= whole.host // 3
    assert whole.extra <= part.extra


class WideHead(nn.Module):
    """Cells whose lost bits are far larger than their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = revnets.ReversibleSequence([nn.Linear(64, 64) for _ in range(8)], m=2, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.columns(x)[-1]


def test_lost_bits_of_some_cells_move_to_host_memory():
    model, x = WideHead(), torch.empty(4093, 64)

    def chosen(budget: int, bytes_on_host: int) -> Prediction | None:
        memory = HostMemory(bytes_on_host, flops=1e12)
        return plan_module(model, (x,), optimizer="none", modes=("exact",), budget=budget, host=memory).chosen

    exact = plan_module(model, (x,), optimizer="none", modes=("exact",)).modes[0].peak
    budget = exact - 40_000
    whole = chosen(budget, 10**9)
    part = chosen(budget, 270_000)
    assert whole is not None
    assert part is not None
    assert part.peak <= budget
    assert 0 < part.host <= 270_000
    with raises_error(PlanError, code="over-budget", key="budget"):
        chosen(budget, 1009)


def test_a_pending_budget_uses_host_memory():
    memory: dict[str, Any] = {
        "budget": BUDGET,
        "host": "64GiB",
        "link": "25GB/s",
        "flops": "1GFLOP/s",
        "optimizer": "none",
    }
    model = revnets.build({"base": str(NET), "memory": memory}, SMALL)
    total(model(torch.randn(SHAPE))).backward()
    assert model.memory_plan.chosen.host > 0
    assert model.columns.offloaded == set(model.memory_plan.chosen.offloaded) != set()


def test_device_speed_is_measured_if_not_given(monkeypatch):
    asked = []
    monkeypatch.setattr(host_options, "measured_flops", lambda *about: asked.append(about) or 1e9)
    assert planned(flops=None).chosen == planned().chosen
    assert asked == [(torch.device("cpu"), torch.float32)]


def test_measured_flops_are_plausible():
    assert host_options.measured_flops(torch.device("cpu"), torch.float32) > 1e6


def test_ranks_use_the_plan_of_the_rank_with_the_largest_peak():
    large = planned(modes=("store",))
    small = plan(net(), (11, 64), budget=BUDGET, host="64GiB", flops=1e9, optimizer="none", modes=("store",))
    hidden = replace(large, chosen=replace(large.chosen, extra=1.0))  # its copies overlap with compute
    assert small.chosen.offloaded == ()
    assert _poorest([small, hidden]) is hidden
    assert _poorest([hidden, small]) is hidden


def test_no_input_warning_after_offloaded_cells_change(recwarn):
    model = net()
    planned().apply(model)
    model.memory_plan = planned()
    x = torch.randn(2 * SHAPE[0], SHAPE[1])
    with pytest.warns(UserWarning, match="may exceed the budget"):
        _compare(model, (x,), {})
    model.columns.offloaded = ()
    recwarn.clear()
    _compare(model, (x,), {})
    assert not recwarn


# ------------------------------------------------------------------------------------------- search


def options(model: torch.nn.Module | None = None) -> HostOptions:
    """Options for a device with two units of compute in the time in which the link moves a byte."""
    return HostOptions(HostMemory(100, link=5, flops=10), model or torch.nn.Identity(), torch.float32)


CELLS = [[Option(11, 700, 1000, LOST), Option(47, 600, 1000, STATE), Option(97, 300, 1000, ALL)]] * 3


def test_copy_costs_the_time_that_does_not_overlap():
    hosted = options().extended(CELLS, [83, 83, 83], [166, 166, 166])[0][3:]
    assert [(option.kept, option.host) for option in hosted] == [(0, 11), (0, 47), (0, 97)]
    assert [option.waits for option in hosted] == [0, 94 - 83, 194 - 83 + 194 - 166]
    assert [option.work - option.waits for option in hosted] == [700, 600, 301]
    last = options().extended(CELLS, [83, 83, 83], [166, 166, 166])[-1]
    assert last[3].waits == 2 * 22  # nothing overlaps with it


def test_only_activations_are_offloaded():
    cells = [[Option(-83, 700, 1000, LOST), Option(-97, 600, 1000, STATE)]]
    hosted = options().extended(cells, [0], [0], gradients=[97])[0][2:]
    assert [(option.kept, option.host, option.room) for option in hosted] == [(-97, 14, 986)]  # gradients stay


def test_search_respects_host_memory():
    host, room = options(), 11 * 3
    cells = host.extended(CELLS, [997] * 3, [997] * 3)
    chosen = host.search(cells, room)
    assert chosen is not None
    alone = search(CELLS, room)
    assert alone is not None
    assert 0 < sum(option.host for option in chosen) <= 100
    assert sum(option.kept for option in chosen) <= room
    assert sum(option.work for option in chosen) < sum(option.work for option in alone)


# ------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(("given", "expected"), [("25GB/s", 25e9), ("2.5 GiB/s", 2.5 * 2**30), (19, 19)])
def test_parse_link(given, expected):
    assert parse_link(given) == expected


@pytest.mark.parametrize(("given", "expected"), [("300TFLOP/s", 3e14), ("1.5 GFLOP/s", 1.5e9), (7e12, 7e12), (3, 3)])
def test_parse_flops(given, expected):
    assert parse_flops(given) == expected


WRONG = [
    ({"host": "0"}, "host", "invalid-value"),
    ({"host": -3}, "host", "invalid-value"),
    ({"host": "exact"}, "host", "invalid-value"),
    ({"host": True}, "host", "wrong-type"),
    ({"host": "1GiB", "link": "fast"}, "link", "invalid-value"),
    ({"host": "1GiB", "link": "0GB/s"}, "link", "invalid-value"),
    ({"host": "1GiB", "link": "25GB"}, "link", "invalid-value"),
    ({"host": "1GiB", "link": "1e400GB/s"}, "link", "invalid-value"),
    ({"host": "1GiB", "flops": "300T"}, "flops", "invalid-value"),
    ({"host": "1GiB", "flops": 0}, "flops", "invalid-value"),
    ({"host": "1GiB", "flops": [1]}, "flops", "wrong-type"),
    ({"link": "24GB/s"}, "link", "conflicting-values"),
    ({"flops": "1TFLOP/s"}, "flops", "conflicting-values"),
]


@pytest.mark.parametrize(("given", "key", "code"), WRONG)
def test_invalid_values_in_a_spec(given, key, code):
    with raises_error(revnets.SpecError, code=code, key=f"memory.{key}"):
        revnets.load_spec({"base": str(NET), "memory": {"budget": "1GiB", **given}})


def test_host_memory_requires_budget():
    with raises_error(revnets.SpecError, code="missing-key", key="memory.budget"):
        revnets.load_spec({"base": str(NET), "memory": {"host": "1GiB"}})
    with raises_error(PlanError, code="missing-budget", key="host"):
        planned(budget=None)


WRONG_IN_A_CALL = [
    *(row for row in WRONG if row[2] == "invalid-value"),
    ({"host": "1GiB", "flops": [1]}, "flops", "wrong-type"),
    ({"host": 10**5000}, "host", "invalid-value"),
    ({"host": "1GiB", "link": 10**5000}, "link", "invalid-value"),
    ({"host": "1GiB", "flops": 10**5000}, "flops", "invalid-value"),
]


@pytest.mark.parametrize(("given", "key", "code"), WRONG_IN_A_CALL)
def test_invalid_values_in_a_call(given, key, code):
    with raises_error(PlanError, code=code, key=key):
        plan(net(), SHAPE, budget=BUDGET, **given)


def test_budget_without_host_memory():
    spec = BudgetSpec(budget="1GiB")
    assert host_memory(spec.host, spec.link, spec.flops) is None


def test_command_prints_device_and_host_memory():
    words = ["--input", "64", "--batch", "211", "--optimizer", "none", "--budget", BUDGET]
    host = ["--host", "1GiB", "--link", "25GB/s", "--flops", "1GFLOP/s"]
    result = CliRunner().invoke(main.app, ["plan", str(NET), *SMALL, *words, *host], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "host" in result.output
    assert "in host memory" in result.output
    result = CliRunner().invoke(main.app, ["plan", str(NET), *SMALL, *words[:-2], *host])
    assert_error(result.exception, PlanError, code="missing-budget", key="host")
