"""Lost bits: whatever was there comes back bit for bit, in little room, without waiting for a device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from revnets.engine import lost_bits
from revnets.engine.coupling import add, subtract
from tests.support.counters import Watch

INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(INTEGER[a.dtype]), b.view(INTEGER[b.dtype]))


def coupled(count: int, gamma: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A state and its reconstruction after x_t = F + gamma x_{t-m}."""
    generator = torch.Generator().manual_seed(count)
    past = torch.randn(count, generator=generator).to(dtype)
    update = torch.randn(count, generator=generator).to(dtype)
    gain = torch.tensor(gamma, dtype=dtype)
    return past, subtract(add(past, update, gain), update, gain)


@st.composite
def pairs_of_bits(draw) -> tuple[Tensor, Tensor]:
    """Two vectors of arbitrary bit patterns, from near neighbours to 2^30 apart, NaN and denormals among them."""
    dtype = draw(st.sampled_from(list(INTEGER)))
    width = 8 * torch.empty((), dtype=dtype).element_size()
    lowest, highest = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    special = [0, lowest, highest, lowest + 1, 1, -1, *(2**k for k in range(width - 1))]
    number = st.one_of(st.sampled_from(special), st.integers(lowest, highest))
    state = draw(st.lists(number, min_size=1, max_size=37))
    near = st.one_of(st.integers(-300, 300), st.sampled_from([7, 8, -7, -8, 127, 128, -128, -129, 32767, -32768]))
    other = [draw(st.one_of(number, near.map(lambda step, value=value: value + step))) for value in state]
    wrapped = [(value - lowest) % 2**width + lowest for value in other]
    integer = INTEGER[dtype]
    return torch.tensor(state, dtype=integer).view(dtype), torch.tensor(wrapped, dtype=integer).view(dtype)


@given(pairs_of_bits(), st.booleans())
def test_any_state_comes_back_bit_for_bit(pair: tuple[Tensor, Tensor], defer: bool) -> None:
    state, rebuilt = pair
    lost = lost_bits.encode(state, rebuilt.clone(), defer=defer)
    assert same_bits(lost_bits.decode(rebuilt.clone(), lost), state)


@pytest.mark.parametrize("gamma", [1.0, 0.5, -0.5, 0.05, 1e-3, float("inf"), float("nan")])
def test_what_arithmetic_makes_comes_back(gamma: float) -> None:
    state = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1.0, 3e38, float("inf"), -float("inf"), float("nan"), 2.0**-126])
    update = torch.tensor([1.0, -0.0, 1e-45, 3e38, -1.0, 3e38, 1.0, float("inf"), 0.0, 1e30])
    rebuilt = subtract(add(state, update, torch.tensor(gamma)), update, torch.tensor(gamma))
    lost = lost_bits.encode(state, rebuilt.clone())
    assert same_bits(lost_bits.decode(rebuilt, lost), state)


@pytest.mark.parametrize(("gamma", "limit"), [(1.0, 0.6), (0.5, 0.6), (-0.5, 0.6), (0.2, 0.75), (0.05, 1.15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_room_per_element(gamma: float, limit: float, dtype: torch.dtype) -> None:
    state, rebuilt = coupled(100_003, gamma, dtype)
    lost = lost_bits.encode(state, rebuilt)
    assert lost.nbytes <= limit * state.numel()


def test_tiers_hold_only_what_did_not_fit_the_tier_before() -> None:
    steps = torch.tensor([0, 7, -7, 8, -8, 127, -127, 128, -128, 32767, -32768, 2**30, -(2**31)], dtype=torch.int64)
    state = steps.to(torch.int32).view(torch.float32)
    lost = lost_bits.encode(state, torch.zeros(len(steps)))
    assert [tier.numel() for tier in lost.tiers] == [10, 6, 3]
    assert same_bits(lost_bits.decode(torch.zeros(len(steps)), lost), state)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_memory_in_any_order(order: tuple[int, ...]) -> None:
    def laid_out(flat: Tensor) -> Tensor:
        inverse = sorted(range(3), key=order.__getitem__)
        return flat.view([(7, 5, 3)[axis] for axis in order]).permute(inverse)

    state, rebuilt = (laid_out(flat) for flat in coupled(105, 0.2))
    assert state.shape == (7, 5, 3)
    assert not torch.equal(state, rebuilt)
    lost = lost_bits.encode(state, rebuilt.clone())
    back = lost_bits.decode(rebuilt.clone(), lost)
    assert back.stride() == state.stride()
    assert torch.equal(back, state)


def test_deferred_encoding_never_waits_and_equals_the_direct_one() -> None:
    state, rebuilt = coupled(10_007, 0.05)
    with Watch() as watch:
        late = lost_bits.encode(state, rebuilt.clone(), defer=True)
    assert watch.waits == []
    with Watch() as watch:
        direct = lost_bits.encode(state, rebuilt.clone(), defer=False)
    assert watch.waits, "the watch must see the operators that wait"
    assert late.nbytes > direct.nbytes
    late.compact()
    assert late.nbytes == direct.nbytes
    assert all(torch.equal(a, b) for a, b in zip(late.tiers, direct.tiers, strict=True))
    assert torch.equal(late.nibbles, direct.nibbles)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.2, 0.05])
def test_expected_shares_are_near_what_is_found(gamma: float) -> None:
    state, rebuilt = coupled(100_003, gamma)
    lost = lost_bits.encode(state, rebuilt)
    found = lost.nbytes / state.numel()
    shares = zip(lost_bits.expected_shares(gamma), (1, 2, 4), strict=True)
    expected = 0.5 + sum(share * width for share, width in shares)
    assert expected == pytest.approx(found, rel=0.15)


def test_fake_tensors_have_the_expected_size() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), lost_bits.assumed(0.5):
        state = torch.empty(1009)
        lost = lost_bits.encode(state, torch.empty(1009))
        assert lost_bits.decode(torch.empty(1009), lost).shape == (1009,)
    assert lost.nbytes == 505 + sum(
        int(share * 1009) * width for share, width in zip(lost_bits.expected_shares(0.5), (1, 2, 4), strict=True)
    )


def test_a_step_on_the_meta_device() -> None:
    import revnets

    with torch.device("meta"):
        net = revnets.ReversibleSequence([torch.nn.Linear(5, 5) for _ in range(6)])
        net(torch.empty(3, 5, requires_grad=True))[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
