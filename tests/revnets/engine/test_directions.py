"""Columns that run down: states and gradients against plain loops, outputs, and the learned constant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import revnets
from revnets.engine.columns import ReversibleColumns
from revnets.engine.errors import ArgumentError
from revnets.memory.tracker import kept_bytes
from tests.support.errors import raises_error
from tests.support.gradients import assert_like_autograd, assert_same, loss_of, plain, step
from tests.support.networks import BLOCKS, STEADY, stem_of, token_net

ORDERS = {
    "one down": ["up", "down"],
    "as many": ["up"] * 4 + ["down"] * 4,
    "deep": ["up"] * 7 + ["down"] * 9,
    "by turns": ["up", "down"] * 4,
    "back up": ["up", "up", "down", "down", "down", "up"],
}
DECODER: dict[str, Any] = {
    "columns": {"up": 2, "down": 3},
    "stem": {"type": "patchify", "patch": 2},
    "gain": {"init": 0.7},
    "constant": {"column": 2, "positions": [3, 4]},
    "levels": [{"dim": dim, "depth": 1, "block": "convnext", "layer_scale": 1.0} for dim in (3, 5, 7)],
}
SHAPE = (2, 3, 24, 32)


def net_of(order: str, m: int, **options: Any) -> ReversibleColumns:
    directions = ORDERS[order]
    return token_net(m, len(directions), directions=directions, scale=0.7, **options)


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_equal_ordinary_autograd(order: str, m: int) -> None:
    """Levels differ in width and length, so a state restored at another level would not match."""
    net = net_of(order, m, blocks=STEADY[:3])
    found = assert_like_autograd(net, stem_of(net))
    assert [output.shape[-1] for output in found.outputs] == [5 + 2 * level for level in range(m)]
    assert all(gradient is not None and gradient.any() for gradient in found.grads.values())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "bf16"])
def test_gradients_with_all_blocks_and_mixed_modes(autocast: torch.dtype | None) -> None:
    net = net_of("back up", 4, blocks=tuple(BLOCKS))
    x = stem_of(net)
    modes = ("exact", "store", "recompute", "exact", "exact", "recompute")
    assert_same(step(net, x, modes, autocast=autocast), step(net, x, "store", autocast=autocast))


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_gradients_under_a_budget(share: float) -> None:
    torch.manual_seed(0)
    net, x = revnets.build(DECODER), torch.randn(SHAPE)
    gradients = {}
    for name in ("store", "budget"):
        net.columns.memory, net.columns.stored = "store", 0
        if name == "budget":
            peaks = {mode.mode: mode.peak for mode in revnets.plan(net, SHAPE).modes}
            budget = int(share * peaks["store"] + (1 - share) * peaks["exact"] * 1.02)
            found = revnets.plan(net, SHAPE, budget=budget)
            found.apply(net)
            assert found.chosen is not None
            assert found.chosen.name not in ("exact", "store")
        gradients[name] = torch.autograd.grad(loss_of(net(x)), list(net.parameters()))
    assert all(map(torch.equal, gradients["store"], gradients["budget"]))


@pytest.mark.parametrize("mode", ["store", "recompute", "invert", "exact"])
def test_intermediate_outputs_are_top_levels(mode: str) -> None:
    net = net_of("back up", 3)
    x, taps = stem_of(net), (1, 2, 4, 5)
    net.memory = mode
    expected = plain(net)(x, taps=taps)
    levels, tapped = net(x, taps=taps)
    torch.testing.assert_close((levels, tapped), expected)
    assert {tap.shape[-1] for tap in tapped} == {9}
    found = torch.autograd.grad(loss_of([*levels, *tapped]), x)
    torch.testing.assert_close(
        found, torch.autograd.grad(loss_of([*expected[0], *expected[1]]), x), rtol=1e-3, atol=1e-4
    )


def test_cells_are_named_by_column_and_level() -> None:
    net = revnets.build(DECODER)
    for node, cell in zip(net.columns.graph.nodes, net.columns.flat(), strict=True):
        assert net.columns.cells[node.column][node.level] is cell
        assert cell.function.name == f"c{node.column}.l{node.level}"
    assert net.columns.cells[2][2].function.fusion.constant.shape == (3, 4, 7)


@pytest.mark.parametrize("length", [4, 6, 7, 8, 11])
def test_incomplete_last_column(length: int) -> None:
    """The latest state of each level is returned, those of the previous column first."""
    net = net_of("back up", 3).double()
    x = stem_of(net)
    states, nodes = plain(net).states(x), net.graph.nodes[:length]
    latest = {node.level: node for node in nodes}.values()
    expected = [states[node.index] for node in sorted(latest, key=lambda node: (node.column, node.level))]
    short = net.truncated(length)
    torch.testing.assert_close(net(x, stop=length), expected)
    assert_same(step(short, x, "exact"), step(short, x, "store"))
    with torch.no_grad():
        columns = short.inverse(short(x), x)[::-1]
    for node in nodes:
        of_column = sorted(other.level for other in nodes if other.column == node.column)
        rebuilt = columns[node.column][of_column.index(node.level)]
        torch.testing.assert_close(rebuilt, states[node.index], rtol=1e-8, atol=1e-8)


def test_error_names_the_level_of_a_wrong_replay() -> None:
    net = net_of("one down", 3)
    net.verify = True
    levels = net(stem_of(net))
    with torch.no_grad():
        for parameter in net.cells[1][1].function.parameters():
            parameter.data.mul_(1.5)
    with raises_error(revnets.ReconstructionError, code="state-mismatch", cell="c1.l1", names="column 1, level 1"):
        loss_of(levels).backward()


def test_additional_columns_keep_only_lost_bits() -> None:
    """The window is m states in either direction."""

    def kept(down: int, mode: str) -> int:
        net = token_net(3, 2 + down, directions=["up"] * 2 + ["down"] * down)
        net.memory = mode
        return kept_bytes(net, stem_of(net, batch=31, grad=False))

    state = 31 * (4 * 5 + 2 * 7 + 1 * 9) * 4
    growth = {mode: (kept(7, mode) - kept(2, mode)) / 5 / state for mode in ("store", "recompute", "invert", "exact")}
    assert growth["invert"] == 0
    assert 0 < growth["exact"] < 0.3
    assert growth["recompute"] == 1
    assert growth["store"] > 3


# ------------------------------------------------------------------------------------------------ the learned constant


def test_constant_is_added_at_the_start_of_the_column() -> None:
    torch.manual_seed(0)
    net, x = revnets.build(DECODER), torch.randn(SHAPE)
    cell = net.columns.cells[2][2]
    states: list[Tensor] = []
    cell.function.fusion.register_forward_hook(lambda module, reads, out: states.extend((module.fusion(*reads), out)))
    with torch.no_grad():
        net(x)
    before, after = states
    assert torch.equal(after, before + cell.function.fusion.constant)
    assert cell.function.fusion.constant.std() > 0.01
    loss_of(net(x)).backward()
    assert cell.function.fusion.constant.grad.any()


def test_constant_without_positions_is_one_vector() -> None:
    net = revnets.build({**DECODER, "constant": {"column": 4}})
    shapes = {name: parameter.shape for name, parameter in net.named_parameters() if name.endswith("constant")}
    assert shapes == {"columns.cells.4.2.function.fusion.constant": (7,)}
    assert [level.shape for level in net(torch.randn(1, 3, 20, 36))] == [(1, 10, 18, 3), (1, 5, 9, 5), (1, 3, 5, 7)]


@pytest.mark.parametrize("positions", [[4, 3], [12], [1, 4]])
def test_constant_with_other_positions_raises(positions: list[int]) -> None:
    net = revnets.build({**DECODER, "constant": {"column": 2, "positions": positions}})
    with raises_error(
        ArgumentError, code="shape-mismatch", key="constant.positions", names=[str(tuple(positions)), "(3, 4)"]
    ):
        net(torch.randn(SHAPE))


# ------------------------------------------------------------------------------------------------------ specifications


def test_counts_per_direction_equal_a_list_of_directions() -> None:
    spec = revnets.load_spec(DECODER)
    assert (spec.columns, spec.directions) == (5, ("up", "up", "down", "down", "down"))
    listed = {**DECODER, "columns": 5, "direction": ["up", "up", "down", "down", "down"]}
    assert revnets.load_spec(listed) == spec == revnets.load_spec(spec, ["verify=false"])
    assert revnets.load_spec(DECODER, ["columns.up=3", "columns.down=1"]).directions == ("up", "up", "up", "down")
    assert revnets.load_spec(DECODER, ["columns=3"]) == revnets.load_spec({**DECODER, "columns": {"up": 3}})


@pytest.mark.parametrize(
    ("overrides", "code", "key", "names"),
    [
        (["columns.up=0"], "out-of-range", "columns.up", "at least 1"),
        (["columns={down: 2}"], "out-of-range", "columns.up", "at least 1"),
        (["columns={}"], "out-of-range", "columns.up", "at least 1"),
        (["columns.down=-1"], "out-of-range", "columns.down", "-1"),
        (["columns.down=20000"], "out-of-range", "columns.down", "20000"),
        (["columns.down=two"], "wrong-type", "columns.down", "two"),
        (["columns.up=true"], "wrong-type", "columns.up", "true"),
        (["columns.dwon=2"], "unknown-key", "columns.dwon", "down"),
        (["direction=down"], "conflicting-values", "direction", "columns"),
        (["columns=3", "direction=down"], "conflicting-values", "direction", "first column"),
        (["columns=3", "direction=[down, up, up]"], "conflicting-values", "direction", "first column"),
        (["columns=3", "direction=[up, down]"], "wrong-length", "direction", ["2 directions", "3 columns"]),
        (["columns=3", "direction=dawn"], "unknown-choice", "direction", ["dawn", "down"]),
        (["columns=3", "direction=[up, up, 1]"], "wrong-type", "direction", "1"),
        (["constant.column=5"], "out-of-range", "constant.column", ["column 5", "0 to 4"]),
        (["constant.column=-1"], "out-of-range", "constant.column", "-1"),
        (["constant={positions: [3, 4]}"], "missing-key", "constant.column", "2"),
        (["constant=2"], "wrong-type", "constant", "{column: 2}"),
        (["constant.positions=[0, 4]"], "out-of-range", "constant.positions.0", "0"),
        (["constant.positions=[2, 2, 2, 2]"], "out-of-range", "constant.positions", "3 axes"),
        (["constant.positions=[10000, 10000]"], "out-of-range", "constant.positions", "1,000,000"),
        (["constant.position=[3, 4]"], "unknown-key", "constant.position", "positions"),
        (["levels.1.residual=1"], "shape-mismatch", "levels.1.residual", ["1 states back", "3 channels"]),
        (["reads=before"], "conflicting-values", "reads", "level 0"),
    ],
)
def test_invalid_directions_raise(overrides: list[str], code: str, key: str, names: str | list[str]) -> None:
    with raises_error(code=code, key=key, names=names):
        revnets.load_spec(copy.deepcopy(DECODER), overrides)


# ------------------------------------------------------------------------------------------------------------ analyses


def test_audit_by_column_and_level() -> None:
    torch.manual_seed(0)
    net = revnets.build(DECODER)
    found = revnets.audit(net, torch.randn(SHAPE), modes=("exact", "invert"))
    assert found.ok
    assert [column.column for column in found.columns] == [0, 1, 2, 3]
    assert {column.elements for column in found.columns} == {(2 * 12 * 16 * 3, 2 * 6 * 8 * 5, 2 * 3 * 4 * 7)}
    assert len(found.modes[0].column_bytes) == 5


def test_gains_by_column_and_level() -> None:
    from revnets.analysis.gains import gains_in, gains_of

    net = revnets.build(DECODER)
    found = gains_of(net)
    assert [(cell.column, cell.level) for cell in found[:6]] == [(1, 0), (1, 1), (1, 2), (2, 2), (2, 1), (2, 0)]
    of_file = gains_in(net.state_dict())
    assert {(c.column, c.level): len(c.gamma) for c in found} == {(c.column, c.level): len(c.gamma) for c in of_file}


def test_memory_scaling_keeps_the_columns_that_run_down(tmp_path) -> None:
    from revnets.analysis.memory_scaling import Step

    file = tmp_path / "net.yaml"
    file.write_text(
        "columns: {up: 2, down: 2}\nstem: {type: patchify}\nconstant: {column: 2}\nlevels:\n"
        "  - {dim: 3, depth: 0, block: convnext}\n  - {dim: 5, depth: 0, block: convnext}\n"
    )
    step = Step(str(file), (), (), (), (), 1, torch.float32)
    specs = {columns: step.model(columns, "meta").spec for columns in (1, 3, 6)}
    assert [specs[columns].directions.count("down") for columns in specs] == [0, 1, 3]
    assert [specs[columns].constant.column for columns in specs] == [0, 2, 3]
