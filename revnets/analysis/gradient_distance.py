"""How far apart two tensors are that should be one, and two sets of gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Distance(NamedTuple):
    """Of a tensor from its reference; norms are L2, taken in float64."""

    elements: int
    norm: float  # of the difference
    reference_norm: float
    largest: float  # absolute difference
    reference_largest: float
    equal: bool  # every bit

    @property
    def relative(self) -> float:
        return ratio(self.norm, self.reference_norm)


class GradientDistance(NamedTuple):
    """Of all gradients of a model from their references."""

    relative: float  # L2 of all differences over L2 of all references
    worst: str  # name of the parameter that is farthest off; empty if all are equal
    worst_relative: float
    equal: bool  # every bit of every gradient


def distance(tensor: Tensor, reference: Tensor) -> Distance:
    tensor, reference = _dense(tensor), _dense(reference)
    equal = same_bits(tensor, reference)
    wide = torch.promote_types(reference.dtype, torch.float32)
    difference = torch.zeros(1) if equal else tensor.to(wide) - reference.to(wide)
    return Distance(
        reference.numel(), norm(difference), norm(reference), _largest(difference), _largest(reference), equal
    )


def gradient_distance(
    gradients: Mapping[str, Tensor | None], references: Mapping[str, Tensor | None]
) -> GradientDistance:
    """Compare gradients by name; None stands for zeros.

    A parameter's own error is relative to the norm of its gradient, but at least to a thousandth of what is usual for
    its size: gradients that are zero but for rounding (of a bias before a norm) would be the worst ones every time.
    """
    distances = {}
    for name, reference in references.items():
        gradient = gradients[name]
        if gradient is None and reference is not None:
            gradient = torch.zeros_like(reference)
        if reference is None and gradient is not None:
            reference = torch.zeros_like(gradient)
        if gradient is not None and reference is not None:
            distances[name] = distance(gradient, reference)
    total = math.hypot(*(d.reference_norm for d in distances.values()))
    usual = total / math.sqrt(max(1, sum(d.elements for d in distances.values())))  # of one element
    errors = {
        name: ratio(d.norm, max(d.reference_norm, 1e-3 * usual * math.sqrt(d.elements)))
        for name, d in distances.items()
        if not d.equal
    }
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name], default="")
    return GradientDistance(
        ratio(math.hypot(*(d.norm for d in distances.values())), total),
        worst,
        errors.get(worst, 0.0),
        all(d.equal for d in distances.values()),
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Is every bit the same? 0.0 differs from -0.0, and a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.numel() == 0 or torch.equal(_bytes(a), _bytes(b))


def norm(tensor: Tensor) -> float:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def ratio(difference: float, size: float) -> float:
    """difference / size, where nothing over nothing is nothing."""
    if difference == 0:
        return 0.0
    return difference / size if size else math.inf


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
