"""Drawings of predictions: boxes and masks of objects, or a class for every pixel."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

FONT = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
SMALL = 600
"""Images whose shorter side has fewer pixels are enlarged before drawing, so that labels can be read."""

GOLDEN = (math.sqrt(5) - 1) / 2
INK, PAPER = (34, 34, 34), (255, 255, 255)


def class_colors(count: int) -> list[tuple[int, int, int]]:
    """Colors of classes, which differ clearly between consecutive classes."""
    colors = []
    for number in range(count):
        brightness = (1.0, 0.75)[number % 2]
        red, green, blue = colorsys.hsv_to_rgb(0.61 + number * GOLDEN, (0.85, 0.6)[number // 2 % 2], brightness)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


def draw_detections(
    picture: Image.Image, found: Mapping[str, Tensor], classes: Sequence[str], least: float
) -> Image.Image:
    """Draw the boxes, names and scores of objects, and their masks if there are any.

    Args:
        picture: The image.
        found: `boxes` (N, 4) in pixels, `labels` (N,) from 1, `scores` (N,), and optionally `masks` (N, H, W).
        classes: Names of the classes.
        least: Minimum score of drawn objects.
    """
    factor = enlargement(picture)
    canvas = TF.pil_to_tensor(enlarged(picture, factor))
    shown = (found["scores"] >= least).nonzero().flatten().cpu()
    shown = shown[found["scores"].cpu()[shown].argsort()]  # the most certain ones are drawn last
    if not len(shown):
        return TF.to_pil_image(canvas)
    labels, scores = found["labels"].cpu()[shown].tolist(), found["scores"].cpu()[shown].tolist()
    palette = class_colors(len(classes))
    colors = [palette[label - 1] for label in labels]
    if "masks" in found:
        for index, color in zip(shown.tolist(), colors, strict=True):
            mask = found["masks"][index].cpu()[None, None].float()
            mask = torch.nn.functional.interpolate(mask, canvas.shape[1:], mode="bilinear", align_corners=False)[0, 0]
            canvas = draw_segmentation_masks(canvas, mask > 0.5, alpha=0.45, colors=color)
    size = _font_size(canvas)
    texts = [f" {classes[label - 1]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    boxes = found["boxes"].cpu()[shown].double() * factor
    canvas = draw_bounding_boxes(
        canvas,
        _within(boxes, canvas.shape[2], canvas.shape[1]),
        labels=texts,
        colors=colors,
        width=max(2, size // 8),
        font=FONT,
        font_size=size,
        fill_labels=True,
    )
    return TF.to_pil_image(canvas)


def draw_classes(picture: Image.Image, numbers: Tensor, classes: Sequence[str]) -> Image.Image:
    """Draw the colors of the classes over an image, next to a legend of the classes that occur.

    Args:
        picture: The image, H x W.
        numbers: Class of every pixel, from 0, (H, W).
        classes: Names of the classes.
    """
    factor = enlargement(picture)
    canvas = TF.pil_to_tensor(enlarged(picture, factor))
    numbers = numbers.cpu()
    large = TF.resize(numbers[None], list(canvas.shape[1:]), interpolation=TF.InterpolationMode.NEAREST)[0]
    palette = class_colors(len(classes))
    counts = torch.bincount(numbers.flatten(), minlength=len(classes))
    present: list[int] = counts.argsort(descending=True)[: int((counts > 0).sum())].tolist()
    colors = torch.tensor(palette, dtype=torch.float32)[large].permute(2, 0, 1)
    mixed = TF.to_pil_image((0.5 * canvas.float() + 0.5 * colors).round().byte())
    rows = [(classes[number], palette[number], float(counts[number] / numbers.numel())) for number in present]
    return _with_legend(mixed, rows)


def _with_legend(picture: Image.Image, rows: Sequence[tuple[str, tuple[int, int, int], float]]) -> Image.Image:
    """An image next to names, colors and shares of as many classes as fit."""
    size = _font_size(TF.pil_to_tensor(picture))
    font, step = ImageFont.truetype(FONT, size), round(1.6 * size)
    room = max(1, (picture.height - size) // step)
    texts = [f"{name}  {100 * share:.1f} %" for name, _, share in rows[:room]]
    width = math.ceil(max(font.getlength(text) for text in texts)) + 3 * size
    page = Image.new("RGB", (picture.width + width, picture.height), PAPER)
    page.paste(picture, (0, 0))
    pen = ImageDraw.Draw(page)
    for row, (text, (_, color, _)) in enumerate(zip(texts, rows[:room], strict=True)):
        left, top = picture.width + size // 2, size // 2 + row * step
        pen.rectangle((left, top, left + size, top + size), fill=color)
        pen.text((left + 1.5 * size, top), text, fill=INK, font=font)
    return page


def enlargement(picture: Image.Image) -> int:
    """The integer factor by which a small image is enlarged."""
    return max(1, round(SMALL / min(picture.size))) if min(picture.size) * 8 > max(picture.size) else 1


def enlarged(picture: Image.Image, factor: int) -> Image.Image:
    """An image enlarged by a factor."""
    if factor == 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)


def _font_size(canvas: Tensor) -> int:
    return max(11, min(canvas.shape[1:]) // 38)


def _within(boxes: Tensor, width: int, height: int) -> Tensor:
    """Clip boxes to an image, with sides of at least one pixel, which torchvision requires."""
    left, top, right, bottom = boxes.unbind(1)
    left, top = left.clamp(0, width - 2), top.clamp(0, height - 2)
    right, bottom = right.clamp(max=width - 1), bottom.clamp(max=height - 1)
    return torch.stack([left, top, torch.maximum(right, left + 1), torch.maximum(bottom, top + 1)], 1)
