"""Images with objects for detectors."""

from __future__ import annotations

import torch

STUFF = 7
SIZES = ((61, 93), (64, 71))
OBJECTS = (([[5, 7, 31, 41], [40, 10, 83, 57]], [1, 3]), ([[11, 3, 53, 47]], [2]))
CLASSES = 3


def objects(size, boxes, labels, generator):
    """Return a target whose masks are ellipses in its boxes."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    y, x = (torch.arange(side) + 0.5 for side in size)
    masks = []
    for left, top, right, bottom in boxes.tolist():
        vertical = ((y - (top + bottom) / 2) / ((bottom - top) / 2)).square()
        horizontal = ((x - (left + right) / 2) / ((right - left) / 2)).square()
        masks.append(vertical[:, None] + horizontal <= 1)
    return {
        "boxes": boxes,
        "labels": torch.tensor(labels, dtype=torch.long),
        "masks": torch.stack(masks).to(torch.uint8) if masks else torch.zeros(0, *size, dtype=torch.uint8),
        "semantic_map": torch.randint(0, STUFF, size, generator=generator),
    }


def detection_batch(content=OBJECTS):
    """Return two images (3, H, W) of different sizes, and their targets with three classes."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(3, *size, generator=generator) for size in SIZES]
    targets = [objects(size, *part, generator) for size, part in zip(SIZES, content, strict=True)]
    return images, targets


SMALL = {"channels": 16, "width": 32, "mask_width": 16}
