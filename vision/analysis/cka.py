"""Similarity of the states of a network to its images and their labels: CKA (appendix E, figure 9).

Centered kernel alignment (Kornblith et al. 2019) compares two representations of the same n samples by their Gram
matrices K = X X^T and L = Y Y^T, independent of the number of features:

    CKA(K, L) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))

with the unbiased estimator of HSIC (Song et al. 2012), where the diagonals of K and L are set to 0:

    HSIC(K, L) = [tr(K L) + 1^T K 1 1^T L 1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1^T K L 1] / (n (n - 3))

Over several batches, each HSIC is the sum over the batches (Nguyen et al. 2021). The summands are unbiased, so apart
from noise the result does not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revnets import ReversibleColumns
from revnets.analysis import observed
from revnets.config.errors import option_error

LEAST = 4
"""Minimum number of samples of the unbiased estimator."""

CHUNK = 2**24
"""Number of elements that are converted to float64 at a time."""


class Similarity(NamedTuple):
    """CKA of every state with the images and with the labels; NaN where it is undefined.

    Attributes:
        images: (columns, levels), float64.
        labels: (columns, levels), float64.
        samples: Number of samples.
    """

    images: Tensor
    labels: Tensor
    samples: int

    def require_defined(self) -> None:
        """Require a defined result.

        Raises:
            revnets.SpecError: If there were too few images, or all of them have one class.
        """
        if self.samples < LEAST:
            problem = f"the batches contain {self.samples} readable images, but HSIC needs {LEAST}"
            raise option_error("--batch", problem, "Use more images", code="too-few-samples")
        if self.labels.isnan().all():
            problem = f"all {self.samples} images have the same class, so CKA with labels is undefined"
            raise option_error("--batch", problem, "Use more images, or --shuffle", code="too-few-samples")


@torch.no_grad()
def similarity(
    model: nn.Module,
    columns: ReversibleColumns,
    batches: Iterable[tuple[Tensor, Tensor]],
    tick: Callable[[], None] = lambda: None,
) -> Similarity:
    """Compute the CKA of the states of a model over all batches.

    Each state is reduced to its Gram matrix as soon as it is computed, so no states are stored beyond the window that
    the forward pass itself needs.

    Args:
        model: The model in evaluation mode.
        columns: The columns of the model.
        batches: Images (n, C, H, W) and class indices (n,), on the model's device. Batches with fewer than `LEAST`
            images are omitted.
        tick: Called after every batch.
    """
    total = len(columns.graph.nodes)
    of_states = torch.zeros(total, 3, dtype=torch.float64)  # HSIC with itself, with images, with labels
    of_targets = torch.zeros(2, dtype=torch.float64)
    samples = 0
    for images, labels in batches:
        if len(images) < LEAST:
            continue
        samples += len(images)
        targets = [
            gram(images),
            (labels[:, None] == labels).double(),
        ]  # the latter is the Gram matrix of one-hot labels
        of_targets += torch.stack([hsic(target, target) for target in targets]).cpu()

        def note(index: int, state: Tensor, targets: list[Tensor] = targets) -> None:
            kernel = gram(state)
            of_states[index] += torch.stack([hsic(kernel, other) for other in (kernel, *targets)]).cpu()

        with observed(columns, note):
            model(images)
        tick()
    found = of_states[:, 1:] / (of_states[:, :1] * of_targets).sqrt()
    found = found.where(found.isfinite(), torch.nan)
    grid = found.new_full((columns.graph.columns, columns.graph.m, 2), torch.nan)  # the last column may lack levels
    for node in columns.graph.nodes:
        grid[node.column, node.level] = found[node.index]
    return Similarity(grid[..., 0], grid[..., 1], samples)


def gram(x: Tensor) -> Tensor:
    """Compute K = X X^T in float64 from features (n, ...) of any dtype, without converting all of X at once."""
    x = x.flatten(1)
    kernel = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    for part in x.split(max(1, CHUNK // len(x)), dim=1):
        part = part.double()
        kernel.addmm_(part, part.T)
    return kernel


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741 (the letters of the equation)
    """Return the unbiased HSIC of two symmetric Gram matrices (n, n), n >= 4, ignoring their diagonals."""
    n = len(k)
    k, l = (kernel - kernel.diagonal().diag() for kernel in (k, l))  # noqa: E741
    rows_k, rows_l = k.sum(1), l.sum(1)
    sums = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2))
    return ((k * l).sum() + sums - 2 / (n - 2) * (rows_k @ rows_l)) / (n * (n - 3))


def cka(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Return the CKA of two Gram matrices of one batch."""
    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()


def similarity_rows(found: Similarity) -> list[dict[str, int | float]]:
    """Return a row for each level of each column."""
    return [
        {"column": column, "level": level, "images": float(images), "labels": float(labels)}
        for column, of_column in enumerate(zip(found.images, found.labels, strict=True))
        for level, (images, labels) in enumerate(zip(*of_column, strict=True))
    ]


def similarity_table(found: Similarity) -> list[dict[str, str]]:
    """Return a row for each column, formatted for a terminal table."""
    levels = range(found.images.shape[1])
    return [
        {"column": str(column)}
        | {f"images\n{level}": f"{images[level]:.2f}" for level in levels}
        | {f"labels\n{level}": f"{labels[level]:.2f}" for level in levels}
        for column, (images, labels) in enumerate(zip(found.images, found.labels, strict=True))
    ]
