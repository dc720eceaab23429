"""How close a rewired network is to the one that was trained: the outputs of both on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revnets.engine.errors import ArgumentError
from revnets.memory.tracker import tensors
from revnets.pretrained.rewiring import original_blocks


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Agreement of the first output of both networks, in evaluation."""

    cosine: float  # mean over the samples, 1 for equal directions
    relative_error: float  # norm of the difference against that of the original output
    same_largest: float  # share of positions whose largest entry of the last axis is the same, such as the class

    @property
    def sentence(self) -> str:
        """The three numbers in words."""
        return (
            f"against the original network: cosine {self.cosine:.4f}, relative error {self.relative_error:.2%}, "
            f"same largest output {self.same_largest:.1%}"
        )

    def to_dict(self) -> dict[str, float]:
        """The numbers by their names."""
        return asdict(self)


@torch.no_grad()
def fidelity(model: nn.Module, x: Any) -> Fidelity:
    """Compare the outputs of a rewired network with those of the original blocks.

    Training flags are left as they are; both forwards run in evaluation.

    Args:
        model: made reversible by `revnets.make_reversible`.
        x: its input; a tuple is passed on as positional, a mapping as keyword arguments.

    Raises:
        ArgumentError: the model is not rewired, or gives no tensor of floating point numbers.
    """
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        actual = _output(model, x)
        with original_blocks(model):
            expected = _output(model, x)
    finally:
        for module, flag in flags.items():
            module.training = flag
    rows, originals = actual.double().flatten(1), expected.double().flatten(1)
    return Fidelity(
        cosine=float(torch.cosine_similarity(rows, originals).mean()),
        relative_error=float(torch.linalg.norm(rows - originals) / torch.linalg.norm(originals)),
        same_largest=float((actual.argmax(-1) == expected.argmax(-1)).double().mean()),
    )


def _output(model: nn.Module, x: Any) -> Tensor:
    positional, keywords = ((), x) if isinstance(x, Mapping) else (x if isinstance(x, tuple) else (x,), {})
    output = model(*positional, **keywords)
    first = next((tensor for tensor in tensors(output) if tensor.is_floating_point() and tensor.ndim > 1), None)
    if first is None:
        raise ArgumentError("the model gives no tensor of floating point numbers", "model", code="invalid-value")
    return first
