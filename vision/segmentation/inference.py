"""Inference on whole images with sliding windows, several scales and mirrored images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vision.data.decoding import fitted_size

Logits = Callable[[Tensor], Tensor]
"""A function from images (B, C, H, W) to scores (B, classes, H, W)."""


def sliding_window(logits: Logits, image: Tensor, window: int, stride: int) -> Tensor:
    """Return the scores of an image from sliding windows, averaged where windows overlap.

    The last window of each axis ends at the border. An image that is smaller than a window is one window.

    Args:
        logits: The model.
        image: (1, C, H, W).
        window: Side of a window in pixels.
        stride: Distance between windows in pixels (two thirds of the window in the release).

    Returns:
        (1, classes, H, W).
    """
    height, width = image.shape[-2:]
    total: Tensor | None = None
    count = image.new_zeros(1, 1, height, width)
    for top in _starts(height, window, stride):
        for left in _starts(width, window, stride):
            part = (..., slice(top, top + window), slice(left, left + window))
            scores = logits(image[part]).float()
            if total is None:
                total = scores.new_zeros(1, scores.shape[1], height, width)
            total[part] += scores
            count[part] += 1
    assert total is not None
    return total / count


def semantic_probabilities(
    logits: Logits,
    image: Tensor,
    *,
    short_side: int,
    long_side: int,
    window: int | None = None,
    stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Return the class probabilities of an image, averaged over scales and mirrored images.

    Args:
        logits: The model.
        image: (C, H, W), normalized, at its original size.
        short_side, long_side: the image is resized to the largest size within both (512 and 2048).
        window, stride: sliding windows as in `sliding_window`; None for the whole image at once.
        scales: Factors of both sides; 0.5, 0.75, ... 1.75 in the paper's multi-scale evaluation.
        flip: Also evaluate the mirrored image.

    Returns:
        (classes, H, W).
    """
    size = image.shape[-2:]
    total: Tensor | None = None
    for scale in scales:
        resized = F.interpolate(
            image[None],
            size=fitted_size(size, round(short_side * scale), round(long_side * scale)),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        for mirrored in (False, True)[: 1 + flip]:
            view = resized.flip(-1) if mirrored else resized
            scores = logits(view) if window is None else sliding_window(logits, view, window, stride or window)
            scores = scores.flip(-1) if mirrored else scores
            found = F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False).softmax(1)
            total = found if total is None else total + found
    assert total is not None
    return total[0] / (len(scales) * (1 + flip))


def _starts(length: int, window: int, stride: int) -> Iterator[int]:
    windows = max(length - window + stride - 1, 0) // stride + 1
    for index in range(windows):
        yield max(0, min(index * stride, length - window))


@torch.no_grad()
def predicted_classes(logits: Logits, image: Tensor, **options: int | float | bool | Sequence[float] | None) -> Tensor:
    """Return the class (H, W) of every pixel of an image (C, H, W); options as for `semantic_probabilities`."""
    return semantic_probabilities(logits, image, **options).argmax(0)  # pyright: ignore[reportArgumentType]
