"""Figures of `revnets analyze cka` and `revnets analyze layercam`, with a cell for every level of every column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from vision.analysis.cka import Similarity
from vision.training.figures import INK

MOST_WRITTEN = 20
"""Maximum number of columns for which values are written into the heat map."""


def cka_figure(found: Similarity) -> Figure:
    """Draw two heat maps (figure 9), with columns from left to right and levels from bottom to top."""
    columns, levels = found.images.shape
    figure = Figure(figsize=(1.9 + 1.06 * min(columns, 16), 1.1 + 0.42 * levels), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    values = torch.stack([found.images, found.labels])
    top = max(0.1, float(np.ceil(10 * np.nanmax(values.numpy())) / 10)) if not values.isnan().all() else 1.0
    mappable = None
    for axes, shown, name in zip(panels, values, ("(a) images", "(b) labels"), strict=True):
        mappable = axes.imshow(shown.T.numpy(), cmap="viridis", vmin=0, vmax=top, origin="lower", aspect="auto")
        axes.set_title(name, fontsize=10, color=INK)
        axes.set_xlabel("column", color=INK)
        _whole_ticks(axes, columns, levels)
        if columns <= MOST_WRITTEN:
            for column, level in np.ndindex(columns, levels):
                _write(axes, column, level, float(shown[column, level]), top)
    panels[0].set_ylabel("level", color=INK)
    assert mappable is not None  # there are two panels
    bar = figure.colorbar(mappable, ax=panels, pad=0.015, aspect=14)
    bar.set_label("CKA", color=INK)
    bar.outline.set_visible(False)  # type: ignore[operator]  # a method to matplotlib, an Artist to its stubs
    bar.ax.tick_params(labelsize=8.5, colors=INK)
    return figure


def _whole_ticks(axes: Axes, columns: int, levels: int) -> None:
    step = 1 + (columns - 1) // 20
    axes.set_xticks(range(0, columns, step))
    axes.set_yticks(range(levels))
    axes.tick_params(labelsize=9, colors=INK, length=0)
    axes.spines[:].set_visible(False)


def _write(axes: Axes, column: int, level: int, value: float, top: float) -> None:
    if not np.isnan(value):
        color = INK if value > 0.62 * top else "white"
        text = f"{value:.2f}".replace("0.", ".", 1)
        axes.text(column, level, text, ha="center", va="center", fontsize=8.5, color=color)


def layercam_figure(pixels: Tensor, maps: Sequence[Sequence[Tensor]], caption: str) -> Figure:
    """Draw an image and the map of each level of each column over it (figure 8), with levels from bottom to top.

    Args:
        pixels: The image (H, W, C) in [0, 1].
        maps: Map (h, w) of each column and level. Each one is scaled to its own range.
        caption: Text below the image.
    """
    columns, levels = len(maps), max(len(column) for column in maps)
    figure = Figure(figsize=(2.0 + 0.8 * columns, 0.3 + 0.8 * levels), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)  # type: ignore[union-attr]
    sides = figure.add_gridspec(1, 2, width_ratios=(2.0, 0.8 * columns))
    left, right = figure.add_subfigure(sides[0]), figure.add_subfigure(sides[1])
    gray = (pixels.float().numpy() @ [0.299, 0.587, 0.114]) if pixels.shape[-1] == 3 else pixels[..., 0].numpy()
    whole = left.subplots()
    whole.imshow(pixels.numpy() if pixels.shape[-1] == 3 else gray, cmap="gray", vmin=0, vmax=1)
    whole.set_xlabel(caption, fontsize=9, color=INK, labelpad=6)
    _bare(whole)
    grid = right.subplots(levels, columns, squeeze=False)
    for row, column in np.ndindex(levels, columns):
        axes, level = cast(Axes, grid[row, column]), levels - 1 - row
        _bare(axes)
        if level < len(maps[column]):
            axes.imshow(_overlay(gray, maps[column][level]))
        if column == 0:
            axes.set_ylabel(f"level {level}", fontsize=8.5, color=INK)
        if row == levels - 1:
            axes.set_xlabel(f"column {column}" if columns <= 8 else str(column), fontsize=8.5, color=INK)
    return figure


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _overlay(gray: np.ndarray, heat: Tensor) -> np.ndarray:
    """Blend a color map of `heat` (h, w) over a gray image (H, W). The image is visible where the map is low."""
    low, high = heat.min(), heat.max()  # before resizing, whose rounding would dominate a constant map
    heat = (heat.float() - low) / (high - low) if high > low else torch.zeros_like(heat).float()
    heat = F.interpolate(heat[None, None], gray.shape, mode="bilinear", align_corners=False)[0, 0]
    share = heat.clamp(0, 1).numpy()[..., None]
    colors = colormaps["inferno"](share[..., 0])[..., :3]
    opacity = 0.25 + 0.7 * share
    return (1 - opacity) * gray[..., None] + opacity * colors
