"""Distance of a tensor from its reference, and of a set of gradients from another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Distance(NamedTuple):
    """Distance of a tensor from its reference. Norms are L2 norms, computed in float64.

    Attributes:
        elements: Number of elements.
        norm: Norm of the difference.
        reference_norm: Norm of the reference.
        largest: Largest absolute difference.
        reference_largest: Largest absolute element of the reference.
        equal: Whether all bits are equal.
    """

    elements: int
    norm: float
    reference_norm: float
    largest: float
    reference_largest: float
    equal: bool

    @property
    def relative(self) -> float:
        """Norm of the difference divided by the norm of the reference."""
        return ratio(self.norm, self.reference_norm)


class GradientDistance(NamedTuple):
    """Distance of all gradients of a model from their references.

    Attributes:
        relative: L2 norm of all differences divided by the L2 norm of all references.
        worst: Name of the parameter with the largest relative error, or empty if all are equal.
        worst_relative: Relative error of that parameter.
        equal: Whether all bits of all gradients are equal.
    """

    relative: float
    worst: str
    worst_relative: float
    equal: bool


def distance(tensor: Tensor, reference: Tensor) -> Distance:
    """Return the distance of a tensor from its reference of the same shape. Both may be sparse."""
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
    """Compare gradients by name. None means zeros.

    The error of one parameter is relative to the norm of its gradient, or to a thousandth of the average norm for its
    size if that is larger. Otherwise gradients that are zero except for rounding (of a bias before a norm) would always
    be the worst ones.

    Args:
        gradients: Gradients by parameter name.
        references: Reference gradients by parameter name.
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
    usual = total / math.sqrt(max(1, sum(d.elements for d in distances.values())))  # root mean square of an element
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
    """Return True if shapes, dtypes and all bits are equal. 0.0 differs from -0.0, and a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.numel() == 0 or torch.equal(_bytes(a), _bytes(b))


def norm(tensor: Tensor) -> float:
    """Return the L2 norm of a real or complex tensor, computed in float64."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def ratio(difference: float, size: float) -> float:
    """Return difference / size, with 0 / 0 = 0."""
    if difference == 0:
        return 0.0
    return difference / size if size else math.inf


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
