"""Hashes and aligned pixels of images and their edited copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.testing import assert_close

from tests.support.changed_pictures import CHANGES, picture

pytest.importorskip("imagehash")

from vision.near_duplicates.aligned_pixels import SIDE, aligned_correlation, thumbnails
from vision.near_duplicates.perceptual_hash import (
    BITS,
    COPIES,
    ORIGINALS,
    bits_apart,
    hashes_of_copy,
    hashes_of_original,
    trimmed,
)


def bits(copy: Image.Image, original: Image.Image) -> int:
    return int(bits_apart(hashes_of_copy(copy)[None], hashes_of_original(original)[None])[0])


def correlation(copy: Image.Image, original: Image.Image) -> float:
    return float(aligned_correlation(thumbnails(copy)[None], thumbnails(original)[None]))


@pytest.mark.parametrize("change", CHANGES)
def test_edited_copies_of_an_image_are_similar_to_it(change):
    original = picture(0)
    copy = CHANGES[change](original)
    assert bits(copy, original) <= 60
    assert correlation(copy, original) >= 0.95


def test_other_images_are_dissimilar():
    apart = [bits(picture(1), picture(seed)) for seed in range(2, 7)]
    assert min(apart) > 75
    assert max(correlation(picture(1), picture(seed)) for seed in range(2, 5)) < 0.8


def test_equal_and_mirrored_pictures_have_equal_hashes_and_correlate_fully():
    original = picture(7)
    assert bits(original, original) == bits(ImageOps.mirror(original), original) == 0
    assert_close(correlation(ImageOps.mirror(original), original), 1.0, atol=1e-5, rtol=0)


def test_bits_are_counted_between_the_nearest_versions():
    random = np.random.default_rng(0)
    copies, originals = (random.integers(0, 2**63, (3, count, 4)).astype(np.uint64) for count in (COPIES, ORIGINALS))
    unpacked = [np.unpackbits(values.view(np.uint8), axis=-1).astype(int) for values in (copies, originals)]
    apart = np.abs(unpacked[0][:, :, None] - unpacked[1][:, None]).sum(-1)  # (pairs, copies, originals)
    half = ORIGINALS // 2
    ends = apart[:, 1:, [0, half - 1, half, ORIGINALS - 1]].min((1, 2))
    assert np.array_equal(bits_apart(copies, originals), np.minimum(apart[:, 0].min(1), ends))
    assert 0 < apart.max() <= BITS


def test_a_border_is_trimmed_to_what_is_inside():
    inner = picture(8)
    framed = ImageOps.expand(inner, 5, 0)
    assert inner.width - 4 <= trimmed(framed).width <= inner.width
    flat = Image.new("L", (31, 29), 9)
    assert trimmed(flat) is flat


def test_pictures_of_one_color_and_of_one_pixel_are_compared_without_warnings():
    flat, dot = Image.new("L", (31, 29), 9), Image.new("RGB", (1, 1), "red")
    assert bits(flat, dot) <= BITS
    assert np.isfinite(correlation(flat, dot))


def test_pairs_are_compared_independently():
    views = torch.stack([thumbnails(picture(seed)) for seed in (9, 10, 11)])
    assert views.shape == (3, 2, SIDE, SIDE)
    others = views[[0, 2, 1]]
    together = aligned_correlation(views, others)
    alone = torch.cat([aligned_correlation(views[[row]], others[[row]]) for row in range(3)])
    assert_close(together, alone, atol=1e-4, rtol=0)
    assert len(aligned_correlation(views[:0], others[:0])) == 0
