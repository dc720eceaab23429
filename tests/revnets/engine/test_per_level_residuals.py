"""Different residuals per level: RevNets with stages, networks without residuals, and invalid combinations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import revnets
from revnets.engine.errors import ArgumentError
from revnets.engine.graph import STEM, ReadError, wire
from revnets.memory.tracker import MemoryTracker
from revnets.nn.blocks import ConvNeXtBlock
from tests.support.errors import raises_error

STAGES = {  # two streams; the second stage has half the resolution and starts without residuals
    "columns": 1,
    "stem": {"type": "patchify", "patch": 2},
    "reads": [1],
    "residual": 2,
    "gain": {"init": 0.7, "learn": True},
    "levels": [
        *[{"dim": 5, "depth": 0, "block": "convnext", "stride": 1, "reads": ["stem"]}] * 2,
        *[{"dim": 5, "depth": 1, "block": "convnext", "shortcut": False, "stride": 1, "layer_scale": 1.0}] * 4,
        {"dim": 7, "depth": 0, "block": "convnext", "stride": 2, "reads": [2], "residual": 0},
        {"dim": 7, "depth": 0, "block": "convnext", "stride": 1, "reads": [2], "residual": 0},
        *[{"dim": 7, "depth": 1, "block": "convnext", "shortcut": False, "stride": 1, "layer_scale": 1.0}] * 3,
    ],
    "head": {"type": "classifier", "num_classes": 3},
}
BRANCHES = {
    "columns": 3,
    "stem": {"type": "patchify", "patch": 2},
    "fusion": {"type": "convnext", "stepwise": True},
    "reads": ["below", "before"],
    "residual": 0,
    "levels": [{"dim": dim, "depth": 1, "block": "convnext", "layer_scale": 1.0} for dim in (3, 5, 7)],
    "head": {"type": "classifier", "num_classes": 3},
}
NETS = {"stages": STAGES, "branches": BRANCHES}
MODES = ("store", "recompute", "invert", "exact")


def gradients(net: torch.nn.Module, x: Tensor, mode: str, passes: int = 1) -> list[Tensor]:
    net.columns.memory = mode
    loss = net(x).logsumexp(1).sum()
    for _ in range(passes):
        found = torch.autograd.grad(loss, list(net.parameters()), retain_graph=passes > 1)
    return list(found)


@pytest.mark.parametrize("name", NETS)
def test_gradients_equal_ordinary_autograd(name: str) -> None:
    torch.manual_seed(0)
    net, x = revnets.build(NETS[name]), torch.randn(2, 3, 26, 22)
    expected = gradients(net, x, "store")
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    for mode in ("recompute", "exact"):
        assert all(map(torch.equal, gradients(net, x, mode, passes=2), expected)), mode
    torch.testing.assert_close(gradients(net, x, "invert"), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_states_match_the_equation(name: str) -> None:
    """Compare with a loop of x_t = F_t(inputs) + gamma * residual that keeps all states."""
    torch.manual_seed(0)
    spec = revnets.load_spec(NETS[name])
    net, x = revnets.build(spec), torch.randn(2, 3, 24, 24)
    stem, states = net.stem(x), []
    for t, cell in enumerate(net.columns.flat()):
        level = t % len(spec.levels)
        if name == "branches":
            column = t - level
            reads = (
                [states[t - 1] if level else stem, *states[column - 3 : column]]
                if column
                else [states[t - 1] if level else stem]
            )
            state = cell.function(*reads)
        else:
            read = [stem, stem, *states[1:5], *states[4:6], *states[7:10]][t]
            state = cell.function(read)
            if t not in (0, 1, 6, 7):
                state = state + cell.gain() * states[t - 2]
        states.append(state)
    left = [4, 5, 9, 10] if name == "stages" else [6, 7, 8]
    for mode in MODES:
        net.columns.memory = mode
        torch.testing.assert_close(net.columns(stem), [states[t] for t in left])
    with torch.no_grad():
        torch.testing.assert_close(net.columns(stem), [states[t] for t in left])


def test_stage_is_rebuilt_from_its_last_two_states() -> None:
    torch.manual_seed(0)
    net = revnets.build(STAGES).double()
    stem = net.stem(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    with torch.no_grad():
        levels = net.columns(stem)
        (states,) = net.columns.inverse(levels, stem)
    assert len(states) == 11
    torch.testing.assert_close(states[0], stem)
    torch.testing.assert_close(states[1], stem)
    for t, state in zip((4, 5, 9, 10), levels, strict=True):
        assert torch.equal(states[t], state)


def test_inverse_without_residuals_raises() -> None:
    net = revnets.build(BRANCHES)
    stem = net.stem(torch.randn(1, 3, 16, 16))
    with raises_error(ArgumentError, code="no-columns", key="residuals"):
        net.columns.inverse(net.columns(stem), stem)
    assert not [name for name, _ in net.named_parameters() if "gain" in name]


def test_additional_blocks_keep_only_lost_bits() -> None:
    def kept(blocks: int, mode: str) -> int:
        data: dict[str, Any] = copy.deepcopy(STAGES)
        data["levels"][2:6] = data["levels"][2:3] * blocks
        torch.manual_seed(0)
        net = revnets.build(data)
        net.columns.memory = mode
        stem = net.stem(torch.randn(2, 3, 64, 64)).detach()
        with MemoryTracker() as tracker:
            tracker.register(net)
            before = tracker.live
            levels = net.columns(stem)
            found = tracker.live - before
        assert levels[-1].requires_grad  # keeps them alive until here
        return found

    state = 2 * 32 * 32 * 5 * 4
    slope = {mode: (kept(14, mode) - kept(4, mode)) / 10 / state for mode in MODES}
    assert slope["invert"] == 0
    assert 0 < slope["exact"] < 0.3
    assert slope["recompute"] == pytest.approx(1, abs=0.1)
    assert slope["store"] > 8


@pytest.mark.parametrize(("name", "rebuilt"), [("stages", 7), ("branches", 0)])
def test_audit(name: str, rebuilt: int) -> None:
    torch.manual_seed(0)
    found = revnets.audit(revnets.build(NETS[name]), torch.randn(2, 3, 8, 8), modes=("exact",))
    assert found.ok
    assert sum(len(column.elements) for column in found.columns) == rebuilt
    assert found.table() is not None


def test_plan() -> None:
    """Without residuals every mode but `store` keeps all states."""
    with torch.device("meta"):
        net = revnets.build({**BRANCHES, "columns": 2})
    kept = {mode.mode: mode.kept for mode in revnets.plan(net, (2, 3, 16, 16)).modes}
    assert kept["recompute"] == kept["invert"] == kept["exact"] < kept["store"]


def test_inputs_and_residuals() -> None:
    stages = revnets.load_spec(STAGES).graph()
    assert [node.residual for node in stages.nodes] == [None, None, 0, 1, 2, 3, None, None, 6, 7, 8]
    assert [node.reads for node in stages.nodes] == [
        *[(STEM,), (STEM,), (1,), (2,), (3,), (4,)],
        *[(4,), (5,), (7,), (8,), (9,)],
    ]
    assert stages.last == (4, 5, 9, 10)
    branches = revnets.load_spec(BRANCHES).graph()
    assert [node.reads for node in branches.nodes[:6]] == [
        (STEM,),
        (0,),
        (1,),
        (STEM, 0, 1, 2),
        (3, 0, 1, 2),
        (4, 0, 1, 2),
    ]
    assert (branches.window, branches.last) == (5, (6, 7, 8))


@pytest.mark.parametrize(
    ("reads", "residuals", "key", "names"),
    [
        (
            [["before"]] * 3,
            None,
            "reads",
            ["level 0 reads a state 3 back", "the residual of level 0"],
        ),
        ([[1], [1], [2]], [2, 2, 2], "reads", "level 2 reads a state 2 back"),
        ([[1], [1], [1]], [2, 3, 3], "residuals", ["level 1", "3 states back"]),
    ],
)
def test_invalid_inputs_and_residuals_raise(
    reads: list, residuals: list[int] | None, key: str, names: str | list[str]
) -> None:
    with raises_error(ReadError, code="conflicting-values", key=key, names=names):
        wire(9, 3, reads, residuals)


@pytest.mark.parametrize(
    ("data", "overrides", "code", "key", "names"),
    [
        (
            STAGES,
            ["levels.6.residual=null"],
            "shape-mismatch",
            "levels.6.residual",
            ["2 states", "5 channels at 1/1", "7 at 1/2"],
        ),
        (STAGES, ["residual=99"], "out-of-range", "residual", ["99", "11 levels"]),
        (STAGES, ["residual=-1"], "out-of-range", "residual", "-1"),
        (BRANCHES, ["residual=null"], "conflicting-values", "reads", ["level 0", "3 back"]),
        (BRANCHES, ["fusion.stepwise=2"], "wrong-type", "fusion.stepwise", "2"),
    ],
)
def test_errors_are_one_line(data: dict, overrides: list[str], code: str, key: str, names: str | list[str]) -> None:
    with raises_error(code=code, key=key, names=names):
        revnets.load_spec(data, overrides)


def test_stepwise_downsampling() -> None:
    spec = revnets.load_spec({**BRANCHES, "columns": 2})
    paths = revnets.build(spec).columns.cells[1][2].function.fusion.paths
    kernels = [
        [tuple(conv.weight.shape) for conv in path.modules() if isinstance(conv, torch.nn.Conv2d)] for path in paths
    ]
    assert kernels == [[(7, 5, 2, 2)], [(3, 3, 2, 2), (7, 3, 2, 2)], [(7, 5, 2, 2)], []]
    at_once = revnets.build(
        spec.model_copy(update={"fusion": revnets.load_spec({**BRANCHES, "fusion": "convnext"}).fusion})
    )
    assert at_once.columns.cells[1][2].function.fusion.paths[1].conv.weight.shape == (7, 3, 4, 4)


def test_block_without_shortcut_is_its_branch() -> None:
    torch.manual_seed(0)
    whole, branch = (ConvNeXtBlock(5, layer_scale=1.0, shortcut=shortcut) for shortcut in (True, False))
    branch.load_state_dict(whole.state_dict())
    x = torch.randn(2, 6, 7, 5)
    assert torch.equal(whole(x), x + branch(x))
    assert branch(x).abs().sum() > 0
