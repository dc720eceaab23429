"""Figures of `revnets analyze cka` and `revnets analyze layercam`: a place for every level of every column."""

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
"""Up to so many columns have their numbers written into the map."""


def cka_figure(found: Similarity) -> Figure:
    """Two heat maps (figure 9): the columns from left to right, the levels from bottom to top."""
    columns, levels = found.images.shape
    figure = Figure(figsize=(1.9 + 1.06 * min(columns, 16), 1.1 + 0.42 * levels), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    values = torch.stack([found.images, found.labels])
    top = max(0.1, float(np.ceil(10 * np.nanmax(values.numpy())) / 10)) if not values.isnan().all() else 1.0
    picture = None
    for axes, shown, name in zip(panels, values, ("(a) images", "(b) labels"), strict=True):
        picture = axes.imshow(shown.T.numpy(), cmap="viridis", vmin=0, vmax=top, origin="lower", aspect="auto")
        axes.set_title(name, fontsize=10, color=INK)
        axes.set_xlabel("column", color=INK)
        _whole_ticks(axes, columns, levels)
        if columns <= MOST_WRITTEN:
            for column, level in np.ndindex(columns, levels):
                _write(axes, column, level, float(shown[column, level]), top)
    panels[0].set_ylabel("level", color=INK)
    assert picture is not None  # there are two
    bar = figure.colorbar(picture, ax=panels, pad=0.015, aspect=14)
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
    """The image, and over it what each level of each column looks at (figure 8); levels from bottom to top.

    Args:
        pixels: the image (H, W, C) in [0, 1].
        maps: of each column and level (h, w); each is shown between its own least and greatest value.
        caption: stands below the image.
    """
    columns, levels = len(maps), max(len(column) for column in maps)
    figure = Figure(figsize=(2.0 + 0.8 * columns, 0.3 + 0.8 * levels), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)  # type: ignore[union-attr]
    sides = figure.add_gridspec(1, 2, width_ratios=(2.0, 0.8 * columns))
    left, right = figure.add_subfigure(sides[0]), figure.add_subfigure(sides[1])
    grey = (pixels.float().numpy() @ [0.299, 0.587, 0.114]) if pixels.shape[-1] == 3 else pixels[..., 0].numpy()
    whole = left.subplots()
    whole.imshow(pixels.numpy() if pixels.shape[-1] == 3 else grey, cmap="gray", vmin=0, vmax=1)
    whole.set_xlabel(caption, fontsize=9, color=INK, labelpad=6)
    _bare(whole)
    grid = right.subplots(levels, columns, squeeze=False)
    for row, column in np.ndindex(levels, columns):
        axes, level = cast(Axes, grid[row, column]), levels - 1 - row
        _bare(axes)
        if level < len(maps[column]):
            axes.imshow(_overlay(grey, maps[column][level]))
        if column == 0:
            axes.set_ylabel(f"level {level}", fontsize=8.5, color=INK)
        if row == levels - 1:
            axes.set_xlabel(f"column {column}" if columns <= 8 else str(column), fontsize=8.5, color=INK)
    return figure


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _overlay(grey: np.ndarray, heat: Tensor) -> np.ndarray:
    """A grey image (H, W) under a map (h, w) in colours; where the map is low the image shows."""
    low, high = heat.min(), heat.max()  # before it is enlarged, or a map of one value would show its rounding
    heat = (heat.float() - low) / (high - low) if high > low else torch.zeros_like(heat).float()
    heat = F.interpolate(heat[None, None], grey.shape, mode="bilinear", align_corners=False)[0, 0]
    share = heat.clamp(0, 1).numpy()[..., None]
    colours = colormaps["inferno"](share[..., 0])[..., :3]
    opacity = 0.25 + 0.7 * share
    return (1 - opacity) * grey[..., None] + opacity * colours
