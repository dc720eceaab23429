"""Class activation maps of every level and column: LayerCAM (Jiang et al. 2021; figure 8 of the paper).

With the score y of a class, a state A = x_t and its channels k,

    map = ReLU(sum_k ReLU(dy / dA_k) A_k)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revnets import ReversibleColumns, SpecError
from revnets.analysis import observed


class LayerCam(NamedTuple):
    """LayerCAM maps of one class per image.

    Attributes:
        scores: (B, num_classes).
        classes: (B,), the classes of the maps.
        maps: Non-negative maps (B, H, W) of each state x_t.
    """

    scores: Tensor
    classes: Tensor
    maps: list[Tensor]

    def grid(self, columns: ReversibleColumns) -> list[list[Tensor]]:
        """Return the maps (H, W) of the first image by column and level, level 0 first."""
        graph = columns.graph
        return [[self.maps[t][0].cpu() for t in graph.states_of(column)] for column in range(graph.columns)]


def layercam(model: nn.Module, columns: ReversibleColumns, images: Tensor, classes: Tensor | None = None) -> LayerCam:
    """Compute LayerCAM of every state with one forward and backward pass, in any memory mode.

    All states are stored, because their values are multiplied by their gradients. No parameter gradients are computed.

    Args:
        model: The model in evaluation mode, which returns scores (B, num_classes).
        columns: The columns of the model.
        images: (B, C, H, W).
        classes: (B,), classes of the maps; by default the predicted ones.

    Raises:
        revnets.SpecError: If states are not images (B, H, W, C).
    """
    states: list[Tensor] = []
    with torch.enable_grad():
        with observed(columns, lambda _, state: states.append(state)):
            scores = model(images.detach().requires_grad_())  # so that a frozen model records a graph
        chosen = scores.detach().argmax(1) if classes is None else classes
        score = scores.gather(1, chosen[:, None]).sum()
    for shape in (tuple(state.shape) for state in states if state.ndim != 4):
        problem = f"its states have the shape {shape}, but maps need images (B, H, W, C)"
        hint = "Use a network whose levels are images"
        raise SpecError(type(model).__name__, "", problem, hint, code="shape-mismatch")
    gradients = torch.autograd.grad(score, states, allow_unused=True)
    maps = [
        torch.zeros_like(state[..., 0]) if gradient is None else (gradient.relu() * state.detach()).sum(-1).relu()
        for state, gradient in zip(states, gradients, strict=True)
    ]
    return LayerCam(scores.detach(), chosen, maps)


def map_rows(grid: Sequence[Sequence[Tensor]]) -> list[dict[str, int | float]]:
    """Return a row for each position (y, x) of each map."""
    return [
        {"column": column, "level": level, "y": y, "x": x, "value": value}
        for column, levels in enumerate(grid)
        for level, of_state in enumerate(levels)
        for y, line in enumerate(of_state.tolist())
        for x, value in enumerate(line)
    ]
