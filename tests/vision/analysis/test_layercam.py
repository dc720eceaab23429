"""LayerCAM: gradients with respect to states are those of ordinary autograd in every memory mode."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from revnets import Net, build
from revnets.analysis.reconstruction import observed
from tests.support.errors import raises_error
from tests.vision.analysis.test_cka import states_by_hand
from vision.analysis.layercam import layercam, map_rows


def small(memory: str | Sequence[str] = "store", **changes) -> Net:
    torch.manual_seed(1)
    spec = {
        "columns": 4,
        "stem": {"type": "patchify", "in_chans": 1, "patch": 2},
        "levels": [{"dim": dim, "depth": 1, "block": "convnext", "layer_scale": 0.5} for dim in (3, 5, 7)],
        "gain": {"init": 0.4},
        "head": {"type": "classifier", "num_classes": 11},
        "memory": memory,
    }
    return build({**spec, **changes}).eval()


def images(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("memory", ["exact", "recompute", ["exact", "store", "recompute", "exact"]])
def test_maps_and_gradients_are_those_of_store_bit_for_bit(memory: str | list[str]) -> None:
    gradients, maps = {}, {}
    for mode in ("store", memory):
        net, states = small(mode), []
        maps[str(mode)] = layercam(net, net.columns, images()).maps
        with observed(net.columns, lambda _, state, states=states: states.append(state)):
            score = net(images())[:, 3].sum()
        gradients[str(mode)] = torch.autograd.grad(score, states)
        assert all(parameter.grad is None for parameter in net.parameters())
    for found, wanted in ((gradients[str(memory)], gradients["store"]), (maps[str(memory)], maps["store"])):
        assert len(found) == len(wanted) == 12
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert sum(bool(of_state.any()) for of_state in maps["store"]) > 6


def test_maps_are_the_equation() -> None:
    """Compared with states computed without the engine, and with loops over channels."""
    net, x = small("exact").double(), images(dtype=torch.float64)
    states = states_by_hand(net, x)
    for state in states:
        state.retain_grad()
    scores = net.head(states[-3:])
    classes = torch.tensor([4, 9])
    (scores[0, 4] + scores[1, 9]).backward()
    found = layercam(net, net.columns, x, classes)
    torch.testing.assert_close(found.scores, scores.detach())
    for of_state, state in zip(found.maps, states, strict=True):
        wanted = torch.zeros(of_state.shape, dtype=torch.float64)
        for channel in range(state.shape[-1]):
            wanted += state.grad[..., channel].clamp(min=0) * state.detach()[..., channel]  # type: ignore[index]
        torch.testing.assert_close(of_state, wanted.clamp(min=0))


def test_the_gradient_of_a_state_matches_finite_differences() -> None:
    """Perturb a state of the middle column during the forward pass."""
    net, x, index, at, step = small().double(), images(1, torch.float64), 4, (0, 2, 1, 3), 1e-6
    states: list[Tensor] = []
    with observed(net.columns, lambda _, state: states.append(state)):
        score = net(x)[0, 5]
    (gradient,) = torch.autograd.grad(score, [states[index]])

    def nudged(size: float) -> Tensor:
        nudge = torch.zeros_like(states[index])
        nudge[at] = size
        handle = net.columns.flat()[index].register_forward_hook(lambda _module, _reads, state: state + nudge)
        with handle, torch.no_grad():
            return net(x)[0, 5]

    difference = float(nudged(step) - nudged(-step)) / (2 * step)
    assert abs(difference) > 1e-4
    assert float(gradient[at]) == pytest.approx(difference, rel=1e-6)


def test_images_do_not_mix_and_the_predicted_class_is_the_default() -> None:
    net, x = small("exact"), images(3)
    found = layercam(net, net.columns, x)
    assert torch.equal(found.classes, net(x).argmax(1))
    alone = layercam(net, net.columns, x[1:2], found.classes[1:2])
    for together, single in zip(found.maps, alone.maps, strict=True):
        torch.testing.assert_close(together[1:2], single)
    other = layercam(net, net.columns, x, (found.classes + 1) % 11)
    assert not torch.equal(other.maps[0], found.maps[0])


def test_a_frozen_net_and_one_without_gradients_around() -> None:
    net = small("exact")
    wanted = layercam(net, net.columns, images()).maps
    with torch.no_grad():
        found = layercam(net.requires_grad_(False), net.columns, images()).maps
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_grid_and_rows() -> None:
    net = small()
    found = layercam(net, net.columns, images())
    grid = found.grid(net.columns)
    assert [len(column) for column in grid] == [3] * 4
    assert torch.equal(grid[2][1], found.maps[7][0])
    lines = map_rows(grid)
    assert len(lines) == 4 * (8 * 8 + 4 * 4 + 2 * 2)
    assert lines[64 + 16 + 3] == {"column": 0, "level": 2, "y": 1, "x": 1, "value": float(grid[0][2][1, 1])}


def test_the_grid_of_columns_that_run_down_is_ordered_by_level() -> None:
    net = small(columns={"up": 1, "down": 2})
    grid = layercam(net, net.columns, images()).grid(net.columns)
    assert [[tuple(of_state.shape) for of_state in column] for column in grid] == [[(8, 8), (4, 4), (2, 2)]] * 3


def test_states_that_are_not_images_are_refused() -> None:
    levels = [{"dim": 4, "depth": 1, "block": "mlp"}] * 2
    net = build({"columns": 2, "stem": {"type": "linear", "in_dim": 4}, "levels": levels, "fusion": {"type": "linear"}})

    class Top(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net(x)[-1]

    with raises_error(code="shape-mismatch", source="Top", names="(2, 4)"):
        layercam(Top(), net.columns, torch.randn(2, 4))
