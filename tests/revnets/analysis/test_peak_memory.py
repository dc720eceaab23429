"""Every byte of the peak belongs to a part, and the parts agree with independent counts."""

from __future__ import annotations

import json
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revnets
from revnets.analysis.peak_memory import memory_parts
from revnets.analysis.peak_report import PARTS, MemoryParts, PeakMemory
from revnets.memory.tracker import MemoryTracker
from revnets.plotting.peak_parts import COLORS, peak_figure
from tests.revnets.plotting.test_figures import assert_apart
from tests.support.audit_networks import DIMS, Net, conv_columns

COLUMNS, BATCH, SIDE = 3, 3, 17
SHAPE = (BATCH, 3, SIDE, SIDE)
STATES = 4 * BATCH * SIDE * SIDE * sum(DIMS)
"""Bytes of the states of one column."""


class Wide(Net):
    """A network whose logits are the largest part of the peak."""

    def __init__(self) -> None:
        super().__init__(conv_columns(COLUMNS))
        self.head = nn.Linear(DIMS[-1], 100_003)


def measured_peak(net: nn.Module, mode: str) -> int:
    """Return the peak of a real step with weights, input and two optimizer tensors per weight."""
    revnets.find_columns(net).memory = mode
    x = torch.randn(SHAPE)
    with MemoryTracker() as tracker:
        tracker.register(net, x)
        F.cross_entropy(net(x), torch.zeros(BATCH, dtype=torch.long)).backward()
    return tracker.peak + 2 * weights(net)


def weights(net: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in net.parameters())


@pytest.fixture(scope="module")
def narrow() -> dict[str, PeakMemory]:
    return by_mode(memory_parts(Net(conv_columns(COLUMNS)), (torch.empty(SHAPE),)))


@pytest.fixture(scope="module")
def wide() -> dict[str, PeakMemory]:
    return by_mode(memory_parts(Wide(), (torch.empty(SHAPE),)))


def by_mode(result: MemoryParts) -> dict[str, PeakMemory]:
    return {mode.mode: mode for mode in result.modes}


@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_parts_add_up_to_the_peak_of_a_real_step(narrow, mode):
    assert narrow[mode].peak == measured_peak(Net(conv_columns(COLUMNS)), mode)


def test_lost_bits_are_estimated(narrow):
    assert narrow["exact"].peak == pytest.approx(measured_peak(Net(conv_columns(COLUMNS)), "exact"), rel=0.01)


def test_weights_optimizer_and_input_are_complete(narrow):
    net = Net(conv_columns(COLUMNS))
    for peak in narrow.values():
        assert peak.parts["weights"] == weights(net)
        assert peak.parts["optimizer"] == 2 * weights(net)
        assert peak.parts["input"] == 4 * BATCH * 3 * SIDE * SIDE


def test_only_one_cell_is_alive_during_replays(narrow):
    """The cell of the last level saves the most. Only `store` keeps what the other cells save."""
    peak = narrow["exact"]
    assert peak.is_backward
    assert peak.place.endswith("l2")
    assert max(peak.parts, key=peak.parts.__getitem__) == "running cell"
    assert "stored cells" not in peak.parts
    assert max(narrow["store"].parts, key=narrow["store"].parts.__getitem__) == "stored cells"


def test_states_and_lost_bits_are_separate_parts(wide):
    """At the logits, `recompute` holds the states of all columns, and the other modes only the last ones."""
    assert {peak.place for peak in wide.values()} == {"head and loss"}
    assert [peak.parts.get("window") for peak in wide.values()] == [None, STATES, STATES, STATES]
    kept = {mode: peak.parts.get("kept states", 0) for mode, peak in wide.items()}
    assert kept == {"store": 0, "recompute": (COLUMNS - 1) * STATES, "invert": 0, "exact": 0}
    assert 0.05 < wide["exact"].parts["lost bits"] / ((COLUMNS - 1) * STATES) < 0.08
    assert "lost bits" not in wide["invert"].parts


def test_largest_cell_is_reported_wherever_the_peak_is(narrow, wide):
    peak = wide["exact"]
    assert peak.largest_cell.endswith("l2")
    assert peak.largest_cell_bytes == narrow["exact"].largest_cell_bytes
    assert 0 <= peak.largest_cell_bytes - narrow["exact"].parts["running cell"] <= STATES  # plus a rebuilt state


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"weights": 5, "optimizer": 10, "head and loss": 13}, "54% of it is weights, gradients and optimizer state"),
        ({"weights": 5, "running cell": 7, "head and loss": 13}, "52% of it is for head, logits and loss"),
        ({"weights": 5, "running cell": 17, "lost bits": 13}, "49% of it is for cell c1.l0 alone"),
        ({"weights": 5, "window": 17, "lost bits": 13}, "49% of it is the window of 3 states"),
        ({"weights": 5, "window": 7, "lost bits": 13}, "52% of it is lost bits"),
    ],
)
def test_advice_names_the_largest_part_of_exact(parts, words):
    peaks = (
        PeakMemory("store", {"stored cells": 101}, "stem", True, "cell c0.l0", 1),
        PeakMemory("invert", {"input": 3}, "stem", True, "cell c0.l0", 1),
        PeakMemory("exact", parts, "cell c1.l0", True, "cell c0.l0", 1),
    )
    advice = MemoryParts("Net", SHAPE, "float32", "adamw", 3, peaks).advice
    assert advice.startswith(f"exact takes {sum(parts.values())} B, store 101 B; {words}")
    assert "\n" not in advice


def test_peak_without_logits_agrees_with_the_plan():
    columns, shape = conv_columns(2), (BATCH, SIDE, SIDE, DIMS[0])
    options = {"dtype": torch.bfloat16, "optimizer": "sgd", "modes": ("exact",)}
    (prediction,) = revnets.plan(columns, shape, **options).modes
    (peak,) = memory_parts(columns, (torch.empty(shape),), **options).modes
    assert peak.peak - peak.parts["input"] == prediction.peak


class Growing(Net):
    """Every call runs more operations than the previous one."""

    calls = count(1)

    def forward(self, image: Tensor) -> Tensor:
        for _ in range(next(self.calls)):
            image = image + 1
        return super().forward(image)


def test_changing_operations_are_an_error():
    with pytest.raises(RuntimeError, match="Growing"):
        memory_parts(Growing(conv_columns(2)), (torch.empty(SHAPE),), modes=("store",))


def test_the_model_is_left_as_it_was():
    net = Net(conv_columns(2))
    net.columns.memory, net.columns.stored = "recompute", 2
    found = dict(net.state_dict())
    memory_parts(net, (torch.empty(SHAPE),), modes=("exact",))
    assert set(net.columns.memory) == {"recompute"}
    assert len(net.columns.stored) == 2
    assert all(parameter.grad is None for parameter in net.parameters())
    torch.testing.assert_close(dict(net.state_dict()), found, rtol=0, atol=0)


def test_json_is_complete(wide):
    result = MemoryParts("Wide", SHAPE, "float32", "adamw", 3, tuple(wide.values()))
    numbers = json.loads(json.dumps(result.to_dict()))
    assert [mode["peak"] for mode in numbers["modes"]] == [sum(mode["parts"].values()) for mode in numbers["modes"]]
    assert numbers["advice"] == result.advice


def test_no_text_of_the_figure_overlaps_another(narrow):
    figure = peak_figure(MemoryParts("Net", SHAPE, "float32", "adamw", 3, tuple(narrow.values())))
    figure.draw_without_rendering()
    assert_apart(figure, figure)
    assert set(COLORS) == set(PARTS)
