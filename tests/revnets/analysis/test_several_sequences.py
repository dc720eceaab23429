"""Audit, gains and commands for a model with several reversible sequences."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import revnets
from revnets.analysis.audit_report import Audit
from revnets.analysis.gains import gains_of
from revnets.analysis.memory_scaling import step_bytes
from revnets.cli import main
from revnets.memory.simulation import typical_gamma
from revnets.plotting.audit import audit_figure
from tests.support.audit_networks import by_mode, render
from tests.support.staged_networks import DEPTHS, RewiredNet, StagedBlocks, StagedNet, images, staged_net

EARLY, LATE = (-(-depth // 2) for depth in DEPTHS)  # columns; the later sequence comes first in the list
STATES = (3 * 5 * 29 * 23, 3 * 11 * 14 * 11)  # elements of one state of each sequence


@pytest.fixture(scope="module", params=[StagedNet, RewiredNet])
def result(request) -> Audit:
    return revnets.audit(staged_net(request.param), images())


def test_gradients_and_states_of_all_sequences_are_right(result):
    assert result.ok
    assert [mode.mode for mode in result.modes if mode.equal] == ["store", "recompute", "exact"]
    states = [column.elements for column in result.columns]
    assert [column.column for column in result.columns] == [0, 1, 3, 4, 5]  # without the last window of each sequence
    assert [len(levels) for levels in states] == [2, 1, 2, 2, 1]
    assert {levels[0] for levels in states[:2]} == {STATES[1]}
    assert {levels[0] for levels in states[2:]} == {STATES[0]}


def test_every_column_is_measured_in_the_order_of_the_forward(result):
    """The first column of a sequence adds the window. Each later cell replaces a state by another."""
    early, late = (4 * elements for elements in STATES)
    modes = by_mode(result)
    assert modes["invert"].column_bytes == (2 * early, 0, 0, 0, 2 * late, 0, 0)
    assert modes["recompute"].column_bytes == (2 * early, 2 * early, 2 * early, early, 2 * late, 2 * late, late)


def test_first_columns_do_not_count_in_bytes_per_column(result):
    early, late = (4 * elements for elements in STATES)
    recompute = by_mode(result)["recompute"]
    assert recompute.first_columns == (0, EARLY)
    assert recompute.bytes_per_column == (5 * early + 3 * late) / (EARLY + LATE - 2)
    assert by_mode(result)["invert"].bytes_per_column == 0


def test_tables_and_figures_show_all_columns(result):
    assert "bit for bit" in render(result)
    growth = audit_figure(result).axes[2]
    assert all(len(line.get_xdata()) == EARLY + LATE for line in growth.lines)


def test_sequences_outside_submodules_are_measured():
    net, rewired = (revnets.audit(staged_net(kind), images(), modes=["exact"]) for kind in (StagedNet, RewiredNet))
    assert net.columns == rewired.columns
    assert net.modes[0].column_bytes == rewired.modes[0].column_bytes
    assert net.modes[0].kept_bytes == rewired.modes[0].kept_bytes


def test_gains_are_numbered_across_sequences():
    found = gains_of(staged_net())
    assert [cell.column for cell in found] == [1, 1, 2, LATE + 1, LATE + 1, LATE + 2, LATE + 2, LATE + 3]


def rewired() -> StagedBlocks:
    torch.manual_seed(0)
    return revnets.make_reversible(StagedBlocks(), blend=0.3)


def test_rewired_network_is_audited_and_planned():
    net = rewired()
    group = revnets.find_columns(net)
    assert len(group) == 2
    found = revnets.audit(net, images(), modes=["exact"])
    assert found.ok
    assert {column.column for column in found.columns} == {0, 1, 2, 4, 5}
    modes = {row.mode: row for row in revnets.plan(net, images(), optimizer="none").modes}
    budget = (modes["store"].peak + modes["exact"].peak) // 2
    plan = revnets.plan(net, images(), optimizer="none", modes=(), budget=budget)
    plan.apply(net)
    assert all(columns.stored for columns in group)
    assert plan.chosen is not None
    assert step_bytes(net, images())[2] == pytest.approx(plan.chosen.peak, rel=0.003)


def test_gains_of_a_rewired_network_equal_its_blends():
    assert [cell.gamma.item() for cell in gains_of(rewired())] == pytest.approx([0.3] * (sum(DEPTHS) - 2))
    assert typical_gamma(rewired()) == 0.3


def test_commands_support_several_sequences(tmp_path):
    source, run = "tests.support.staged_networks:staged_net", CliRunner().invoke
    arguments = [source, "--input", "3,29,23", "--batch", "3"]
    planned = run(main.app, ["plan", *arguments, "--optimizer", "none", "--json"])
    assert planned.exit_code == 0, planned.output
    modes = {row["mode"]: row["peak"] for row in json.loads(planned.stdout)["modes"]}
    budget = str((modes["store"] + modes["exact"]) // 2)
    picture = tmp_path / "plan.png"
    planned = run(main.app, ["plan", *arguments, "--optimizer", "none", "--budget", budget, "--png", str(picture)])
    assert planned.exit_code == 0, planned.output
    assert "kept in part, peak" in " ".join(planned.output.split())
    assert picture.exists()
    audited = run(main.app, ["audit", *arguments, "--json"])
    assert audited.exit_code == 0, audited.output
    assert json.loads(audited.stdout)["ok"] is True
