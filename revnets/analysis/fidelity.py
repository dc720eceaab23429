"""Fidelity of a rewired network: compare its outputs with those of the original network on one batch."""

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
    """Agreement of the first output of both networks in evaluation mode.

    Attributes:
        cosine: Cosine similarity, mean over the samples.
        relative_error: Norm of the difference divided by the norm of the original output.
        same_largest: Fraction of positions with the same largest entry on the last axis, such as the same class.
    """

    cosine: float
    relative_error: float
    same_largest: float

    @property
    def sentence(self) -> str:
        """The three numbers in words."""
        return (
            f"compared with the original network: cosine {self.cosine:.4f}, relative error {self.relative_error:.2%}, "
            f"same largest output {self.same_largest:.1%}"
        )

    def to_dict(self) -> dict[str, float]:
        """Return the numbers by name, for JSON."""
        return asdict(self)


@torch.no_grad()
def fidelity(model: nn.Module, x: Any) -> Fidelity:
    """Compare the outputs of a rewired network with those of the original blocks.

    Both forward passes run in evaluation mode. Training flags are restored afterwards.

    Args:
        model: Network that `revnets.make_reversible` has rewired.
        x: Input of the network. A tuple contains positional arguments, a mapping keyword arguments.

    Returns:
        The agreement of both outputs.

    Raises:
        ArgumentError: If the model is not rewired or returns no floating point tensor with at least two axes.
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
        text = "the model returns no floating point tensor with at least two axes"
        raise ArgumentError(text, "model", code="invalid-value")
    return first
