"""Objects of one image pasted into another (Ghiasi et al., "Simple Copy-Paste", CVPR 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from vision.detection.training_targets import Target


class CopyPaste:
    """Objects of each image, cut out along their masks and pasted into the image before it in the batch.

    An augmentation in the place of InstaBoost, which HTC++ has in Swin Transformer's recipe. Pasted objects keep their
    place. Objects that lose pixels get new masks and boxes, and those of which little is left are dropped.

    Args:
        probability: that an image gets objects.
        least_pixels: objects with fewer visible pixels are dropped.
    """

    def __init__(self, probability: float = 0.5, least_pixels: int = 16):
        self.probability, self.least_pixels = probability, least_pixels

    def __call__(
        self, images: Sequence[Tensor], targets: Sequence[Target], generator: torch.Generator | None = None
    ) -> tuple[list[Tensor], list[Target]]:
        """Images (C, H, W) and targets of a batch, and the same with pasted objects; what was given is not changed.

        Args:
            images: of any sizes; what reaches beyond the other image is cut off.
            targets: with `boxes`, `labels`, `masks` (N, H, W), and perhaps `semantic_map` (H, W).
            generator: of the random numbers.
        """
        pasted = []
        for index, (image, target) in enumerate(zip(images, targets, strict=True)):
            other = (index + 1) % len(images)
            chosen = torch.rand(len(targets[other]["labels"]), generator=generator) < 0.5
            if other == index or torch.rand((), generator=generator) >= self.probability:
                chosen[:] = False
            pasted.append(paste_objects(image, target, images[other], targets[other], chosen, self.least_pixels))
        return [image for image, _ in pasted], [target for _, target in pasted]


def paste_objects(
    image: Tensor, target: Target, source: Tensor, source_target: Target, chosen: Tensor, least_pixels: int = 16
) -> tuple[Tensor, Target]:
    """An image with the chosen objects of another one in front of its own.

    Args:
        image: (C, H, W).
        target: its objects.
        source: the other image (C, H', W').
        source_target: its objects.
        chosen: booleans, one for each of them.
        least_pixels: objects of which fewer pixels are visible are left out.
    """
    rows = chosen.nonzero().squeeze(1).to(source_target["labels"].device)
    if not len(rows):
        return image, target
    height, width = (min(image.shape[axis], source.shape[axis]) for axis in (1, 2))
    masks = target["masks"].new_zeros(len(rows), *image.shape[1:])
    masks[:, :height, :width] = source_target["masks"][rows, :height, :width]
    front = masks.amax(0).bool()
    image = image.clone()
    window = front[:height, :width]
    image[:, :height, :width] = torch.where(window, source[:, :height, :width], image[:, :height, :width])

    behind = target["masks"] * ~front
    masks = torch.cat([behind, masks])
    kept = masks.flatten(1).sum(1) >= least_pixels
    unchanged = torch.zeros_like(kept)
    unchanged[: len(behind)] = (behind == target["masks"]).flatten(1).all(1)
    kept |= unchanged
    boxes = torch.cat([target["boxes"], source_target["boxes"][rows]])
    redrawn = kept & ~unchanged
    boxes[redrawn] = pixel_boxes(masks[redrawn]).to(boxes.dtype)
    labels = torch.cat([target["labels"], source_target["labels"][rows]])
    result = {**target, "boxes": boxes[kept], "labels": labels[kept], "masks": masks[kept]}
    if "semantic_map" in target:
        classes = target["semantic_map"].clone()
        other = source_target.get("semantic_map")
        values = torch.full_like(classes, 255)
        if other is not None:
            values[:height, :width] = other[:height, :width]
        result["semantic_map"] = torch.where(front, values, classes)
    return image, result


def pixel_boxes(masks: Tensor) -> Tensor:
    """The boxes (N, 4) around the pixels of masks (N, H, W), each with at least one pixel."""
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1  # torchvision gives the last pixel
    return boxes
