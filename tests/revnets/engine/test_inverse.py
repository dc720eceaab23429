"""Random graphs: the inverse rebuilds the states, and the tape rebuilds them bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from revnets.engine.columns import ReversibleColumns, ReversibleSequence
from revnets.engine.executor import run
from revnets.engine.graph import DIRECTIONS
from tests.support.gradients import assert_same, plain, rebuilt_states, step
from tests.support.networks import BLOCKS, STEADY, Mlp, stem_of, token_net

PRIMES = (2, 3, 5, 7, 11)


@st.composite
def token_nets(draw: st.DrawFn, gains: st.SearchStrategy[float], max_columns: int, blocks: tuple[str, ...], **options):
    """Draw token networks of any m, width, connections, gains, cells and directions."""
    m = draw(st.integers(2, 6))
    columns = draw(st.integers(1, max_columns))
    token = st.sampled_from(["below", "above", "stem", "top", "full", *range(1, m)])
    return token_net(
        m=m,
        columns=columns,
        blocks=draw(st.lists(st.sampled_from(blocks), min_size=1, max_size=4)),
        reads=draw(st.lists(st.lists(token, min_size=1, max_size=3), min_size=m, max_size=m)),
        gamma=draw(gains),
        dims=draw(st.lists(st.sampled_from(PRIMES), min_size=m, max_size=m)),
        halve=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        directions=["up", *draw(st.lists(st.sampled_from(DIRECTIONS), min_size=columns - 1, max_size=columns - 1))],
        **options,
    )


def in_order(net: ReversibleColumns, columns: list[list[Tensor]]) -> list[Tensor]:
    """Sort the states from `inverse` by the order of the cells."""
    return [columns[::-1][node.column][node.level] for node in net.graph.nodes]


def any_gain(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).flatmap(lambda value: st.sampled_from([value, -value]))


@given(token_nets(any_gain(0.5, 2.0), 6, STEADY, dtype=torch.float64, scale=0.5))
def test_inverse_reconstructs_the_states(net: ReversibleColumns):
    net.eval()
    x = stem_of(net, grad=False)
    with torch.no_grad():
        states = plain(net).states(x)
        columns = net.inverse(net(x), x)
    rebuilt = in_order(net, columns)
    assert sum(map(len, columns)) == len(rebuilt) == len(states)
    for state, other in zip(states, rebuilt, strict=True):
        assert (state - other).norm() <= 1e-9 * state.norm()


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7])
def test_inverse_of_an_incomplete_last_column(length):
    net = ReversibleSequence([Mlp(5) for _ in range(length)], m=3, gain=0.7).double().eval()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        levels = net(x)
        columns = net.inverse(levels, x)
    assert [len(column) for column in reversed(columns)] == [min(3, length - start) for start in range(0, length, 3)]
    rebuilt = [state for column in reversed(columns) for state in column]
    _, states = run(net.graph, net.flat(), x, net.memory, {}, range(length))
    torch.testing.assert_close(rebuilt, states, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@settings(max_examples=40)
@given(data=st.data())
def test_tape_rebuilds_states_bit_for_bit(dtype, autocast, data):
    net = data.draw(_any_net(dtype))
    for name, state, rebuilt in rebuilt_states(net, stem_of(net), autocast):
        assert torch.equal(rebuilt, state), name
        assert rebuilt.stride() == state.stride(), name


def _any_net(dtype: torch.dtype) -> st.SearchStrategy[ReversibleColumns]:
    return token_nets(any_gain(0.02, 2.0), 12, tuple(BLOCKS), dtype=dtype, scale=0.7)


@settings(max_examples=30)
@given(st.data(), st.sampled_from([None, torch.bfloat16]))
def test_gradients_of_random_graphs(data: st.DataObject, autocast: torch.dtype | None):
    net = data.draw(_any_net(torch.float32))
    memory = data.draw(st.lists(st.sampled_from(["store", "recompute", "exact"]), min_size=1, max_size=12))
    modes = [memory[column % len(memory)] for column in range(net.graph.columns)]
    x = stem_of(net)
    assert_same(step(net, x, modes, autocast=autocast), step(net, x, "store", autocast=autocast))


@given(token_nets(any_gain(0.5, 1.0), 6, STEADY, dtype=torch.float64, scale=0.5))
def test_forward_after_inverse_is_the_identity(net: ReversibleColumns):
    """This is true for arbitrary last states, because the map is one-to-one."""
    net.eval()
    x = stem_of(net, grad=False)
    assume(net.graph.columns > 1)
    with torch.no_grad():
        last = [torch.randn_like(level) for level in net(x)]
        states = in_order(net, net.inverse(last, x))
        for node, cell in zip(net.graph.nodes, net.flat(), strict=True):
            if node.residual is not None:
                reads = [x if read < 0 else states[read] for read in node.reads]
                again = cell.function(*reads) + cell.gain() * states[node.residual]
                torch.testing.assert_close(again, states[node.index], rtol=1e-9, atol=1e-9)
