"""Sliding windows, scales and mirrored images."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from vision.segmentation.inference import fitted_size, semantic_probabilities, sliding_window


def pixelwise(images):
    return torch.stack([images.sum(1), images[:, 0] * 2, -images[:, 1]], 1)


@given(height=st.integers(5, 41), width=st.integers(5, 41), window=st.integers(3, 23), stride=st.integers(1, 23))
def test_windows_cover_every_pixel_once_on_average(height, width, window, stride):
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    stride = min(stride, window)
    torch.testing.assert_close(sliding_window(pixelwise, image, window, stride), pixelwise(image))


def test_windows_are_those_of_mmsegmentation():
    seen = []
    sliding_window(
        lambda part: seen.append(tuple(part.shape[-2:])) or pixelwise(part), torch.randn(1, 3, 11, 29), 13, 7
    )
    assert seen == [(11, 13)] * 4  # starts 0, 7, 14 and 16


def test_overlapping_scores_are_averaged():
    values = iter([1.0, 3.0])
    scores = sliding_window(lambda part: torch.full((1, 1, 2, 4), next(values)), torch.zeros(1, 3, 2, 6), 4, 2)
    assert scores[0, 0, 0].tolist() == [1, 1, 2, 2, 3, 3]


def test_probabilities_of_one_scale_are_a_softmax():
    image = torch.randn(3, 17, 19)
    found = semantic_probabilities(pixelwise, image, short_side=17, long_side=53)
    torch.testing.assert_close(found, pixelwise(image[None]).softmax(1)[0])


def test_mirroring_averages_both_views():
    def leftish(images):  # depends on the column, so that mirroring matters
        columns = torch.arange(images.shape[-1], dtype=torch.float32).expand(images.shape[0], 1, *images.shape[-2:])
        return torch.cat([columns, -columns], 1) / 10

    image = torch.randn(3, 13, 11)
    found = semantic_probabilities(leftish, image, short_side=11, long_side=13, flip=True)
    once = leftish(image[None]).softmax(1)
    torch.testing.assert_close(found, ((once + once.flip(-1)) / 2)[0])


def test_scales_are_averaged_at_the_size_of_the_image():
    image = torch.randn(3, 23, 31)
    found = semantic_probabilities(pixelwise, image, short_side=23, long_side=31, scales=(0.5, 1.0))
    small = F.interpolate(image[None], size=(12, 16), mode="bilinear", align_corners=False, antialias=True)
    half = F.interpolate(pixelwise(small), size=(23, 31), mode="bilinear", align_corners=False).softmax(1)
    torch.testing.assert_close(found, ((half + pixelwise(image[None]).softmax(1)) / 2)[0])


@given(height=st.integers(1, 4099), width=st.integers(1, 4099))
def test_fitted_sizes_exceed_neither_side(height, width):
    fitted = fitted_size((height, width), 512, 2048)
    assert max(fitted) <= 2048
    assert min(fitted) <= 512
    assert max(fitted) == 2048 or min(fitted) == 512
