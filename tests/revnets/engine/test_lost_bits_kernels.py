"""Lost bits coded in Triton, on a GPU if available, otherwise in Triton's interpreter (`conftest.py`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")

from revnets.engine import lost_bits
from revnets.engine.coupling import add, subtract
from revnets.engine.lost_bits import coding, kernels
from revnets.engine.lost_bits.fields import Fields
from revnets.engine.lost_bits.kernels import BlockFields
from revnets.engine.lost_bits.tiers import Tiers
from tests.revnets.engine.test_lost_bits import Coupled, coupled, pairs_of_bits, same_bits
from tests.support.counters import Watch
from tests.support.gradients import assert_same, step
from tests.support.networks import stem_of, token_net

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(value: Tensor | float) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def decoded(pair: Coupled, lost: lost_bits.LostBits) -> Tensor:
    rebuilt = pair.rebuilt.clone()
    lost.decode(rebuilt, pair.state, pair.gamma)
    return rebuilt


@given(pairs_of_bits().filter(lambda pair: pair.past.dtype != torch.float64))
@settings(max_examples=8)
def test_arbitrary_states_are_restored_bit_for_bit(pair: Coupled) -> None:
    """A difference outside its field takes more than the state, so ordinary elements are added."""
    ones = torch.ones(2099, dtype=pair.past.dtype)
    vectors = [torch.cat((vector, ones)) for vector in pair[:3]]
    gamma = pair.gamma
    if isinstance(gamma, Tensor) and gamma.ndim:
        gamma = torch.cat((gamma, torch.full((2099,), 0.5)))
    elif not isinstance(gamma, Tensor) or not 0.01 < abs(float(gamma)) < 2:
        gamma = -0.5
    pair = Coupled(*map(on_device, (*vectors, gamma)))
    lost = BlockFields.encode(pair.past, pair.rebuilt.clone(), pair.state, pair.gamma)
    assert lost.compact()
    assert same_bits(decoded(pair, lost), pair.past)


@pytest.mark.parametrize("gamma", [1.0, -0.45, 0.05, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_is_close_to_the_cpu_coder(gamma: float, dtype: torch.dtype) -> None:
    pair = coupled(10_007, gamma, dtype)
    there = Coupled(*map(on_device, pair))
    lost = BlockFields.encode(there.past, there.rebuilt.clone(), there.state, there.gamma)
    assert lost.compact()
    assert lost.nbytes <= 1.03 * Fields.encode(*pair).nbytes + 0.07 * pair.past.numel()
    assert same_bits(decoded(there, lost), there.past)


@pytest.mark.parametrize("shape", [(7, 1, 1), (5, 7, 1, 1), (1, 3), (3, 1, 5, 3), ()])
def test_gamma_of_any_shape_and_memory_layout(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    gamma = torch.rand(shape, generator=generator)
    for order in (torch.contiguous_format, torch.channels_last):
        draw = [torch.randn(15, 7, 5, 3, generator=generator).contiguous(memory_format=order) for _ in range(2)]
        gain = gamma.repeat(15 // shape[0], 1, 1, 1) if len(shape) == 4 else gamma
        state = add(draw[0], draw[1], gain)
        pair = Coupled(*map(on_device, (draw[0], subtract(state, draw[1], gain), state, gain)))
        lost = BlockFields.encode(*pair)
        assert lost.compact()
        assert torch.equal(decoded(pair, lost), pair.past)


def test_state_smaller_than_its_lost_bits_is_kept() -> None:
    pair = coupled(10_007, 1e-6, torch.bfloat16)
    assert not BlockFields.encode(*map(on_device, pair)).compact()


class DeviceOperations(TorchDispatchMode):
    """Counts operators that run on the device, without views and allocations."""

    FREE = ("view", "slice", "as_strided", "detach", "alias", "select", "expand", "squeeze", "unsqueeze", "empty")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.overloadpacket.__name__.removeprefix("new_").startswith(self.FREE)
        return func(*args, **(kwargs or {}))


class CountedKernel:
    """Counts a kernel as one operation, regardless of the interpreter's operations."""

    def __init__(self, kernel: Any, operations: DeviceOperations):
        self.kernel, self.operations = kernel, operations

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args: object, **constants: object) -> None:
            self.operations.count += 1
            with _disable_current_modes():
                self.kernel[grid](*args, **constants)

        return launch


@pytest.mark.parametrize("gamma", [0.5, torch.full((2003,), 0.45)])
def test_kernels_need_a_third_of_the_device_operations_of_tiers(
    gamma: Tensor | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Coupled(*map(on_device, (*coupled(2003, 0.5)[:3], gamma)))
    counts = []
    for tiers in (True, False):
        with DeviceOperations() as operations, Watch() as watch, monkeypatch.context() as patch:
            for name in ("_encode", "_decode"):
                patch.setattr(kernels, name, CountedKernel(getattr(kernels, name), operations))
            past, rebuilt = pair[:2]
            lost = (
                Tiers.encode(past, rebuilt.clone()) if tiers else BlockFields.encode(past, rebuilt.clone(), *pair[2:])
            )
            assert watch.waits == []
            lost.compact()
            lost.decode(rebuilt, *pair[2:])
        assert torch.equal(rebuilt, past)
        pair = Coupled(past, *map(on_device, coupled(2003, 0.5)[1:3]), pair.gamma)
        counts.append(operations.count)
    assert counts[1] <= counts[0] / 3
    assert counts[1] <= 7


def test_working_kernels_are_used() -> None:
    assert coding.working_kernels(torch.device(DEVICE)) is BlockFields


def test_failing_kernels_are_disabled_with_one_warning() -> None:
    """As without a C compiler or on an unsupported GPU; here on a device without memory."""
    coding.working_kernels.cache_clear()
    with pytest.warns(UserWarning, match="without Triton on meta") as caught:
        found = [coding.working_kernels(torch.device("meta")) for _ in range(3)]
    assert found == [None] * 3
    assert len(caught) == 1


@pytest.mark.parametrize("gamma", [0.5, 1e-6])
def test_gradients_of_a_model(gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of the last column are replayed before their lost bits are compacted."""
    made = []

    class Noted(BlockFields):
        @classmethod
        def encode(cls, *args: Any) -> BlockFields:
            made.append(super().encode(*args))
            return made[-1]

    net = token_net(m=2, columns=3, gamma=gamma, blocks=("mlp",), seed=0)
    x = stem_of(net)
    plain = step(net, x, "store")
    monkeypatch.setattr(coding, "kernels_for", lambda past: Noted)
    monkeypatch.setattr(lost_bits, "encode", partial(lost_bits.encode, defer=True))
    assert_same(step(net, x, "exact"), plain)
    assert len(made) == 4
    assert not any(lost.is_pending for lost in made)
