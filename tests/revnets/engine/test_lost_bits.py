"""Lost bits restore any state bit for bit, take little memory and do not wait for a device."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from revnets.engine import lost_bits
from revnets.engine.coupling import add, subtract
from revnets.engine.lost_bits.fields import Fields
from revnets.engine.lost_bits.tiers import Tiers
from tests.support.counters import Watch

INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(INTEGER[a.dtype]), b.view(INTEGER[b.dtype]))


class Coupled(NamedTuple):
    """x_{t-m}, its reconstruction, and the values that both encoder and decoder have."""

    past: Tensor
    rebuilt: Tensor
    state: Tensor
    gamma: Tensor | float


def coupled(count: int, gamma: float, dtype: torch.dtype = torch.float32) -> Coupled:
    """Create a state and its reconstruction after x_t = F + gamma x_{t-m}."""
    generator = torch.Generator().manual_seed(count)
    past = torch.randn(count, generator=generator).to(dtype)
    update = torch.randn(count, generator=generator).to(dtype)
    gain = torch.tensor(gamma, dtype=dtype)
    state = add(past, update, gain)
    return Coupled(past, subtract(state, update, gain), state, gain)


def encoded(pair: Coupled, defer: bool = False) -> lost_bits.LostBits:
    lost = lost_bits.encode(pair.past, pair.rebuilt.clone(), pair.state, pair.gamma, defer=defer)
    assert lost is not None
    return lost


def decoded(pair: Coupled, lost: lost_bits.LostBits) -> Tensor:
    rebuilt = pair.rebuilt.clone()
    lost.decode(rebuilt, pair.state, pair.gamma)
    return rebuilt


@st.composite
def pairs_of_bits(draw) -> Coupled:
    """Draw vectors of arbitrary bit patterns, from close neighbors to 2^30 apart, including NaN and denormals."""
    dtype = draw(st.sampled_from(list(INTEGER)))
    width = 8 * torch.empty((), dtype=dtype).element_size()
    lowest, highest = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    special = [0, lowest, highest, lowest + 1, 1, -1, *(2**k for k in range(width - 1))]
    number = st.one_of(st.sampled_from(special), st.integers(lowest, highest))
    past = draw(st.lists(number, min_size=1, max_size=37))
    near = st.one_of(st.integers(-300, 300), st.sampled_from([7, 8, -7, -8, 127, 128, -128, -129, 32767, -32768]))
    other = [draw(st.one_of(number, near.map(lambda step, value=value: value + step))) for value in past]
    wrapped = [(value - lowest) % 2**width + lowest for value in other]
    state = [draw(st.one_of(number, st.just(value))) for value in past]
    gamma = draw(st.sampled_from([1.0, -0.5, 0.3, 1e-3, 0.0, float("inf"), float("nan")]))
    numbers = [torch.tensor(values, dtype=INTEGER[dtype]).view(dtype) for values in (past, wrapped, state)]
    return Coupled(*numbers, draw(st.sampled_from([gamma, torch.tensor(gamma), torch.full((len(past),), gamma)])))


@given(pairs_of_bits())
def test_arbitrary_states_are_restored_bit_for_bit(pair: Coupled) -> None:
    for lost in (Fields.encode(*pair), Tiers.encode(pair.past, pair.rebuilt.clone())):
        assert same_bits(decoded(pair, lost), pair.past)


@pytest.mark.parametrize("gamma", [1.0, 0.5, -0.5, 0.05, 1e-3, float("inf"), float("nan")])
def test_states_of_the_coupling_are_restored(gamma: float) -> None:
    past = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1.0, 3e38, float("inf"), -float("inf"), float("nan"), 2.0**-126])
    update = torch.tensor([1.0, -0.0, 1e-45, 3e38, -1.0, 3e38, 1.0, float("inf"), 0.0, 1e30])
    gain = torch.tensor(gamma)
    state = add(past, update, gain)
    pair = Coupled(past, subtract(state, update, gain), state, gain)
    assert same_bits(decoded(pair, Fields.encode(*pair)), pair.past)


LIMITS = [(1.0, 0.22), (0.5, 0.30), (-0.5, 0.30), (0.3, 0.36), (0.2, 0.44), (0.05, 0.67), (0.01, 1.02)]


@pytest.mark.parametrize(("gamma", "limit"), LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bytes_per_element(gamma: float, limit: float, dtype: torch.dtype) -> None:
    pair = coupled(100_003, gamma, dtype)
    assert encoded(pair).nbytes <= limit * pair.past.numel()


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.45, 0.2, 0.05, 0.001])
def test_bytes_are_close_to_the_conditional_entropy(gamma: float) -> None:
    """Entropy of the differences, given the exponents of x_t and of the reconstruction."""
    pair = coupled(100_003, gamma)
    difference = lost_bits.bits_of(pair.past) - lost_bits.bits_of(pair.rebuilt)
    apart = torch.frexp(pair.state).exponent - torch.frexp(pair.rebuilt).exponent
    entropy = 0.0
    for window in apart.unique():
        counts = difference[apart == window].unique(return_counts=True)[1].double()
        entropy += float(-(counts * (counts / counts.sum()).log2()).sum()) / 8
    assert 0.9 * entropy <= encoded(pair).nbytes <= 1.3 * entropy


@pytest.mark.parametrize(("gamma", "dtype"), [(1e-6, torch.bfloat16), (1e-9, torch.float32), (0.0, torch.float32)])
def test_lost_bits_as_large_as_the_state_are_not_kept(gamma: float, dtype: torch.dtype) -> None:
    pair = coupled(1009, gamma, dtype)
    assert lost_bits.encode(*pair) is None


def test_tensor_with_gaps_has_no_lost_bits() -> None:
    pair = coupled(1010, 0.5)
    assert lost_bits.encode(*(vector[::2] for vector in pair[:3]), pair.gamma) is None


def test_difference_outside_its_field_is_stored_with_its_position() -> None:
    pair = coupled(70_001, 0.5)
    for place in (0, 65_535, 65_536, 70_000):  # in both blocks
        pair.past[place] *= 1.01
    lost = encoded(pair)
    assert isinstance(lost, Fields)
    assert {0, 65_535, 65_536, 70_000} <= set(lost.gaps.cumsum(0).tolist())
    assert len(lost.gaps) == len(lost.outside) < 9
    assert torch.equal(decoded(pair, lost), pair.past)


def test_channels_with_different_gamma() -> None:
    """Each element has the field width of its channel, in the order of memory."""
    generator = torch.Generator().manual_seed(0)
    past, update = (torch.randn(5, 7, 13, 11, generator=generator) for _ in range(2))
    gamma = torch.logspace(-3, 0, 7).view(7, 1, 1)
    for shape in (torch.contiguous_format, torch.channels_last):
        past, update = (tensor.contiguous(memory_format=shape) for tensor in (past, update))
        state = add(past, update, gamma)
        pair = Coupled(past, subtract(state, update, gamma), state, gamma)
        lost = encoded(pair)
        assert torch.equal(decoded(pair, lost), past)
        alone = [
            encoded(Coupled(*(tensor[:, c].contiguous() for tensor in pair[:3]), gamma[c])).nbytes for c in range(7)
        ]
        assert lost.nbytes <= sum(alone)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_any_memory_layout(order: tuple[int, ...]) -> None:
    def laid_out(flat: Tensor) -> Tensor:
        inverse = sorted(range(3), key=order.__getitem__)
        return flat.view([(7, 5, 3)[axis] for axis in order]).permute(inverse)

    pair = coupled(105, 0.2)
    pair = Coupled(*(laid_out(flat) for flat in pair[:3]), pair.gamma)
    assert pair.past.shape == (7, 5, 3)
    assert not torch.equal(pair.past, pair.rebuilt)
    back = decoded(pair, encoded(pair))
    assert back.stride() == pair.past.stride()
    assert torch.equal(back, pair.past)


def test_deferred_encoding_does_not_wait_and_is_compacted() -> None:
    pair = coupled(10_007, 0.05)
    with Watch() as watch:
        lost = encoded(pair, defer=True)
    assert watch.waits == []
    assert lost.is_pending
    assert not encoded(pair).is_pending
    longest = lost.nbytes
    assert lost.compact()
    assert lost.nbytes < 0.2 * longest
    assert torch.equal(decoded(pair, lost), pair.past)


def test_tiers_contain_only_overflows_of_the_previous_tier() -> None:
    steps = torch.tensor([0, 7, -7, 8, -8, 127, -127, 128, -128, 32767, -32768, 2**30, -(2**31)], dtype=torch.int64)
    state = steps.to(torch.int32).view(torch.float32)
    pair = Coupled(state, torch.zeros(len(steps)), state, 1.0)
    lost = encoded(pair, defer=True)
    assert isinstance(lost, Tiers)
    assert lost.compact()
    assert [tier.numel() for tier in lost.tiers] == [10, 6, 3]
    assert same_bits(decoded(pair, lost), state)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.45, 0.2, 0.05, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_expected_bytes_are_close_to_measured_bytes(gamma: float, dtype: torch.dtype) -> None:
    pair = coupled(100_003, gamma, dtype)
    found = encoded(pair).nbytes / pair.past.numel()
    expected = lost_bits.expected_bytes(gamma, dtype.itemsize)
    assert expected == pytest.approx(found, rel=0.1 if dtype == torch.float32 else 0.25)


def test_expected_bytes_are_at_most_the_state() -> None:
    assert lost_bits.expected_bytes(1e-5, 2) == 2
    assert lost_bits.expected_bytes(0.0, 4) == 4


def test_fake_tensors_have_the_expected_size() -> None:
    from torch._subclasses import FakeTensorMode

    for gamma, dtype in ((0.5, torch.float32), (1e-3, torch.bfloat16)):
        with FakeTensorMode(), lost_bits.assumed(gamma):
            state = torch.empty(1009, dtype=dtype)
            pair = Coupled(state, torch.empty_like(state), state, gamma)
            lost = encoded(pair)
            assert decoded(pair, lost).shape == (1009,)
        assert (
            lost.nbytes == int(lost_bits.expected_bytes(gamma, dtype.itemsize) * 1009) + 5
        )  # half a word and half a byte of padding
    with FakeTensorMode(), lost_bits.assumed(1e-7):
        state = torch.empty(1009)
        assert lost_bits.encode(state, state.clone(), state, 1e-7) is None


def test_step_on_the_meta_device() -> None:
    import revnets

    with torch.device("meta"):
        net = revnets.ReversibleSequence([torch.nn.Linear(5, 5) for _ in range(6)])
        net(torch.empty(3, 5, requires_grad=True))[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
