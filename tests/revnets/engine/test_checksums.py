"""verify=True accepts correct replays, and names the cell of a wrong one, down to a single bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import revnets
from revnets import ReconstructionError, ReversibleSequence
from revnets.engine.replay.checksums import CAUSES, checksum
from revnets.memory.tracker import kept_bytes
from tests.support.counters import Watch
from tests.support.errors import raises_error
from tests.support.gradients import assert_same, loss_of, step
from tests.support.networks import BLOCKS, image_net, stem_of, token_net

TAPED = ("recompute", "invert", "exact")


# --------------------------------------------------------------------------------------- correct replays


@pytest.mark.parametrize("memory", TAPED)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::revnets.DriftWarning")
def test_correct_replays_pass_without_side_effects(memory, autocast):
    for net in (token_net(blocks=tuple(BLOCKS)), image_net()):
        x = stem_of(net)
        expected = step(net, x, memory, autocast=autocast)
        net.verify = True
        assert_same(step(net, x, memory, autocast=autocast), expected)


def test_mixed_modes_intermediate_outputs_and_a_second_backward():
    net = token_net(columns=6, blocks=("mlp", "dropout", "conv"))
    net.memory = ["exact", "recompute", "exact", "invert", "store", "exact"]
    net.verify = True
    (last, tapped), x = net(stem_of(net), taps=[1, 3]), stem_of(net)
    loss_of(last).backward(retain_graph=True)
    (loss_of(tapped) + loss_of(last)).backward(retain_graph=True)
    (gradient,) = torch.autograd.grad(loss_of(net(x)), x, create_graph=True)
    gradient.square().sum().backward()


def test_columns_inside_a_cell():
    inner = ReversibleSequence([nn.Linear(5, 5) for _ in range(5)], verify=True)

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[-1]

    ReversibleSequence([Cell() for _ in range(6)], verify=True)(torch.randn(3, 5))[-1].sum().backward()


def test_non_finite_states():
    net = ReversibleSequence([nn.Linear(5, 5) for _ in range(6)], verify=True)
    x = torch.randn(3, 5)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    net(x)[-1].sum().backward()


# --------------------------------------------------------------------------------------- wrong replays


class Hidden(nn.Linear):
    """Adds `size` to one element, only in its replay."""

    def __init__(self, size: float):
        super().__init__(5, 5)
        self.size, self.calls = size, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = super().forward(x)
        return y + self.size * (torch.arange(y.numel()).view_as(y) == 7) if self.calls % 2 == 0 else y + 0.0


def with_wrong_replay(at: int, memory: str, verify: bool = True, size: float = 1e-3) -> ReversibleSequence:
    cells = [nn.Linear(5, 5) for _ in range(12)]
    cells[at] = Hidden(size)
    return ReversibleSequence(cells, m=3, gain=0.5, memory=memory, verify=verify)


@pytest.mark.parametrize("at", [0, 1, 4, 8, 11])
@pytest.mark.parametrize("memory", ["recompute", "exact"])
def test_error_names_the_cell_with_a_wrong_replay(at, memory):
    net = with_wrong_replay(at, memory)
    cell = f"c{at // 3}.l{at % 3}"
    with raises_error(ReconstructionError, code="state-mismatch", cell=cell) as caught:
        loss_of(net(torch.randn(3, 5))).backward()
    text = str(caught.value)
    assert f"cell {cell} (Hidden), at column {at // 3}, level {at % 3}" in text
    assert CAUSES in text
    if memory == "exact" and at >= 3:
        assert f"the state of column {at // 3 - 1}, level {at % 3} " in text
    else:
        assert "the state of column" not in text


def test_difference_of_one_ulp_is_detected():
    with pytest.raises(ReconstructionError):
        loss_of(with_wrong_replay(4, "recompute", size=3e-7)(torch.randn(3, 5))).backward()


@pytest.mark.parametrize(("memory", "verify"), [("exact", False), ("invert", True), ("store", True)])
def test_store_and_verify_false_compare_nothing(memory, verify):
    loss_of(with_wrong_replay(4, memory, verify)(torch.randn(3, 5))).backward()


@pytest.mark.filterwarnings("ignore::revnets.DriftWarning")
def test_states_after_invert_are_not_compared():
    net = token_net(columns=6, gamma=0.2)
    net.memory = ["exact"] * 3 + ["invert"] * 3
    net.verify = True
    loss_of(net(stem_of(net))).backward()  # the states of the first columns have drifted, also those in exact


def test_verify_can_be_changed():
    net = with_wrong_replay(4, "exact", verify=False)
    net.verify = True
    with pytest.raises(ReconstructionError):
        loss_of(net(torch.randn(3, 5))).backward()


# --------------------------------------------------------------------------------------- checksums


@given(st.lists(st.tuples(st.integers(0, 34), st.sampled_from([-1, 1])), min_size=1, max_size=3), st.booleans())
def test_small_differences_do_not_cancel(steps, halve):
    bits = torch.arange(35, dtype=torch.int16 if halve else torch.int32) * 77
    other = bits.clone()
    for index, size in steps:
        other[index] += size
    dtype = torch.bfloat16 if halve else torch.float32
    one, two = (checksum(value.view(dtype).view(5, 7)) for value in (bits, other))
    assert torch.equal(one, two) == torch.equal(bits, other)


@given(st.permutations(range(12)))
def test_checksum_depends_on_the_order(order):
    state = torch.arange(12.0).view(3, 4)
    other = state.flatten()[list(order)].view(3, 4)
    assert torch.equal(checksum(state), checksum(other)) == torch.equal(state, other)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 0), (2, 3, 5)])
def test_checksum_of_any_shape_stays_on_the_device(shape):
    with Watch() as watch:
        found = checksum(torch.randn(shape))
    assert found.shape == (2,)
    assert watch.waits == []


def test_checksum_takes_sixteen_bytes():
    net = token_net()
    without = kept_bytes(net, stem_of(net))
    net.verify = True
    assert kept_bytes(net, stem_of(net)) - without == 16 * len(net.graph.nodes)


def test_verify_from_yaml_and_in_a_plan():
    data = {"columns": 3, "stem": {"type": "linear", "in_dim": 5}, "fusion": "linear", "verify": True}
    data["levels"] = [{"dim": 8, "depth": 1, "block": "mlp"}] * 2
    net = revnets.build(data)
    assert net.columns.verify
    assert not revnets.build(data, ["verify=false"]).columns.verify
    revnets.plan(net, (7, 5), modes=("exact",))
    assert revnets.audit(net, torch.randn(7, 5)).ok
