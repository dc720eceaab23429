"""Where a class is seen, level by level and column by column: LayerCAM (Jiang et al. 2021; figure 8 of the paper).

With y the score of a class and A = x_t a state, k counting its channels,

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
    """Maps of the classes that were looked for."""

    scores: Tensor  # (B, num_classes)
    classes: Tensor  # (B,)
    maps: list[Tensor]  # of each state x_t: (B, H, W), not negative

    def grid(self, columns: ReversibleColumns) -> list[list[Tensor]]:
        """The maps (H, W) of the first image, by column of the model and by level, level 0 first."""
        graph = columns.graph
        return [[self.maps[t][0].cpu() for t in graph.states_of(column)] for column in range(graph.columns)]


def layercam(model: nn.Module, columns: ReversibleColumns, images: Tensor, classes: Tensor | None = None) -> LayerCam:
    """LayerCAM of every state, by one forward and one backward, in whatever memory mode the columns are.

    All states are held meanwhile, as their values meet their gradients. No gradient of a parameter is computed.

    Args:
        model: in evaluation mode; gives scores (B, num_classes).
        columns: of the model.
        images: (B, C, H, W).
        classes: whose scores are looked at, (B,); by default those predicted.

    Raises:
        revnets.SpecError: states are not images (B, H, W, C).
    """
    states: list[Tensor] = []
    with torch.enable_grad():
        with observed(columns, lambda _, state: states.append(state)):
            scores = model(images.detach().requires_grad_())  # or a model that is frozen would record nothing
        chosen = scores.detach().argmax(1) if classes is None else classes
        score = scores.gather(1, chosen[:, None]).sum()
    for shape in (tuple(state.shape) for state in states if state.ndim != 4):
        problem = f"it has states of shape {shape}, and maps need images (B, H, W, C)"
        raise SpecError(type(model).__name__, "", problem, "Give a net whose levels are images", code="shape-mismatch")
    gradients = torch.autograd.grad(score, states, allow_unused=True)
    maps = [
        torch.zeros_like(state[..., 0]) if gradient is None else (gradient.relu() * state.detach()).sum(-1).relu()
        for state, gradient in zip(states, gradients, strict=True)
    ]
    return LayerCam(scores.detach(), chosen, maps)


def map_rows(grid: Sequence[Sequence[Tensor]]) -> list[dict[str, int | float]]:
    """A row for each position (y, x) of each map."""
    return [
        {"column": column, "level": level, "y": y, "x": x, "value": value}
        for column, levels in enumerate(grid)
        for level, of_state in enumerate(levels)
        for y, line in enumerate(of_state.tolist())
        for x, value in enumerate(line)
    ]
