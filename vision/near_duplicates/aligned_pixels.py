"""Correlation of the pixels of two images after alignment.

Labels, hashes and features of a teacher ignore differences, so they also match two gray pullovers. Pixels do not. The
second image is mirrored, scaled and shifted to maximize the correlation, by a search from coarse to fine. The result is
the smaller of two correlations: of the pixels, and of their fine detail.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vision.near_duplicates.perceptual_hash import small, trimmed

SIDE = 64
"""Side in pixels at which images are compared. The coarse search uses half of it."""

MARGIN = 3 / 32
"""Fraction of a side at each edge that is ignored, because the other image may lack its content."""

COARSE, FINE = (0.08, 0.06, 0.04, 0.02, 0.01), (0.01, 0.01, 0.005)
"""Steps of scale and shift, as fractions of a side."""

SMOOTH = 0.04
"""Steps of at least this size compare pixels only, because fine detail only correlates at the exact position."""

HOPELESS = (0.7, 0.75)
"""Correlations after the first round, and at half the pixels, below which the search stops."""

BLOCK = 256
"""Pairs that are compared at once."""

TRIED = ((0, 0), (1, 0), (1, 1))
"""Versions of both images that are compared: unchanged (0) or trimmed (1)."""


def thumbnails(picture: Image.Image) -> Tensor:
    """Gray pixels in [0, 1] of an image with and without its border, (2, SIDE, SIDE)."""
    gray = small(picture)
    versions = (version.resize((SIDE, SIDE), Image.Resampling.BILINEAR) for version in (gray, trimmed(gray)))
    return torch.from_numpy(np.stack([np.asarray(version) for version in versions])).float() / 255


@torch.inference_mode()
def aligned_correlation(copies: Tensor, originals: Tensor) -> Tensor:
    """The correlation of each pair of images at the best flip, scale and shift that are tried, from -1 to 1.

    Args:
        copies, originals: of `thumbnails`, (pairs, 2, SIDE, SIDE).

    Returns:
        (pairs,).
    """
    blocks = zip(copies.split(BLOCK), originals.split(BLOCK), strict=True)
    return torch.cat([torch.zeros(0), *(_correlation(*block) for block in blocks)])


def _correlation(copies: Tensor, originals: Tensor) -> Tensor:
    pairs = [(copies[:, [left]], originals[:, [right]]) for left, right in TRIED]
    search = None
    for fixed, moved in (*pairs, *((left, right.flip(-1)) for left, right in pairs)):
        tried = _Search(fixed, moved)
        tried.refine(COARSE[:1], 2)
        search = tried if search is None else search.better(tried)
    assert search is not None
    found = search.best
    for steps, pooled, least in ((COARSE[1:], 2, HOPELESS[0]), (FINE, 1, HOPELESS[1])):
        hopeful = found > least
        part = search.chosen(hopeful)
        part.refine(steps, pooled)
        search.take(hopeful, part)
        found = search.best
    return found


class _Search:
    """The best transform of the second image of each pair so far: (log of its scale, right, down), (pairs, 3)."""

    def __init__(self, fixed: Tensor, moved: Tensor):
        self.fixed, self.moved = fixed, moved
        self.best, self.place = torch.full((len(moved),), -1.0), torch.zeros(len(moved), 3)

    def refine(self, steps: tuple[float, ...], pooled: int) -> None:
        """Try the transforms that are one step away in each direction, for one step after the other.

        Args:
            steps: Of scale and shift.
            pooled: Factor by which images are downsampled.
        """
        if not len(self.best):
            return
        fixed, moved = (F.avg_pool2d(pictures, pooled) for pictures in (self.fixed, self.moved))
        aim = _normed(fixed)
        for step in steps:
            start = self.place
            self.best = torch.full_like(self.best, -1.0)  # correlations of other steps are not comparable
            for direction in itertools.product((-1, 0, 1), repeat=3):
                tried = start + step * torch.tensor(direction)
                both = (aim * _normed(_placed(moved, tried))).sum(-1)
                agreement = both[0] if step >= SMOOTH else both.amin(0)
                is_better = agreement > self.best
                self.best = torch.where(is_better, agreement, self.best)
                self.place = torch.where(is_better[:, None], tried, self.place)

    def better(self, other: _Search) -> _Search:
        """Select the better of two searches for each pair."""
        is_other = other.best > self.best
        result = _Search(*(torch.where(is_other[:, None, None, None], theirs, ours) for ours, theirs in (
            (self.fixed, other.fixed), (self.moved, other.moved))))  # fmt: skip
        result.best = torch.maximum(self.best, other.best)
        result.place = torch.where(is_other[:, None], other.place, self.place)
        return result

    def chosen(self, keep: Tensor) -> _Search:
        """The search for some pairs."""
        part = _Search(self.fixed[keep], self.moved[keep])
        part.best, part.place = self.best[keep], self.place[keep]
        return part

    def take(self, where: Tensor, part: _Search) -> None:
        """Replace the results of some pairs by those of another search."""
        self.best, self.place = self.best.clone(), self.place.clone()
        self.best[where], self.place[where] = part.best, part.place


def _placed(pictures: Tensor, place: Tensor) -> Tensor:
    matrix = torch.zeros(len(pictures), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = place[:, 0].exp()
    matrix[:, :, 2] = place[:, 1:]
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def _normed(pictures: Tensor) -> Tensor:
    """Pixels, and pixels minus their blurred surroundings, without margins, of mean 0, norm 1; (2, pairs, pixels)."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    scale = pictures.shape[-1] * 2 // SIDE  # the blur covers the same part of an image at both sizes
    blurred = pictures
    for _ in range(scale**2):
        blurred = F.conv2d(F.pad(blurred, (2, 2, 2, 2), mode="replicate"), (line[:, None] * line)[None, None])
    edge = round(MARGIN * pictures.shape[-1])
    inner = torch.stack([pictures, pictures - blurred])[..., edge:-edge, edge:-edge].flatten(2)
    inner = inner - inner.mean(-1, keepdim=True)
    return inner / inner.norm(dim=-1, keepdim=True).clamp_min(1e-6)
