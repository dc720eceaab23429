"""Masks of objects: run lengths and polygons."""

import numpy as np
import pytest

pytest.importorskip("faster_coco_eval")

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from vision.detection.instance_masks import (
    MaskError,
    RunLengths,
    coco_segmentation,
    dense_mask,
    packed_mask,
    parse_segmentation,
)

MASKS = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=23), elements=st.integers(0, 1))
TRIANGLE = [3.3, 4.4, 30.2, 7.5, 20.1, 33.3]


@given(MASKS)
def test_compressed_run_lengths_round_trip(mask):
    found = parse_segmentation(packed_mask(mask), *mask.shape)
    assert (dense_mask(found, *mask.shape) == mask).all()


@given(MASKS)
def test_plain_and_packed_run_lengths_are_the_same(mask):
    packed = packed_mask(mask)
    counts = parse_segmentation(packed, *mask.shape).counts.tolist()
    plain = parse_segmentation({"size": list(mask.shape), "counts": counts}, *mask.shape)
    assert (dense_mask(plain, *mask.shape) == mask).all()
    text = coco_segmentation(plain, *mask.shape)["counts"]
    assert (text if isinstance(text, str) else text.decode()) == packed["counts"]


def test_polygons_are_drawn_as_pycocotools_draws_them():
    reference = pytest.importorskip("pycocotools.mask")
    outlines = [TRIANGLE, [31.0, 1.0, 36.5, 1.0, 36.5, 28.2, 31.0, 28.2]]
    expected = reference.decode(reference.merge(reference.frPyObjects(outlines, 37, 41)))
    assert (dense_mask(parse_segmentation(outlines, 37, 41), 37, 41) == expected).all()


def test_outlines_without_an_area_are_omitted():
    found = parse_segmentation([[1.0, 1.0, 5.0, 5.0], TRIANGLE, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]], 37, 41)
    assert [points.tolist() for points in found.outlines] == [TRIANGLE]


@pytest.mark.parametrize("value", [None, [], [[]], [[1.0, 2.0]]])
def test_an_object_may_have_no_mask(value):
    assert parse_segmentation(value, 37, 41) is None


@pytest.mark.parametrize(
    "value",
    [
        "text",
        [["a", "b", "c", "d", "e", "f"]],
        [[[1, 2], [3, 4], [5, 6]]],
        [[1, 2, 3, 4, 5, 10**400]],
        {"size": [5, 7], "counts": [35, 1]},
        {"size": [7, 5], "counts": [35]},
        {"size": [5, 7], "counts": [36, -1]},
        {"size": [5, 7], "counts": [True, 34]},
        {"size": [5, 7], "counts": [0] * 71},
        {"size": [5, 7], "counts": ""},
        {"size": [5, 7], "counts": "`"},
        {"size": [5, 7], "counts": "é"},
        {"size": [5, 7], "counts": "o" * 40 + "0"},
        {"size": [5, 7], "counts": None},
        {"size": [5, 7]},
        {},
    ],
)
def test_damaged_masks_are_refused(value):
    with pytest.raises(MaskError):
        parse_segmentation(value, 5, 7)


def test_outlines_that_are_slow_to_draw_are_refused():
    zigzag = [value for _ in range(1000) for value in (0.0, 0.0, 500.0, 500.0)]
    with pytest.raises(MaskError):
        parse_segmentation([zigzag], 500, 500)


@given(st.text(alphabet=[chr(code) for code in range(40, 127)], max_size=30))
def test_any_text_is_valid_run_lengths_or_refused(text):
    try:
        found = parse_segmentation({"size": [5, 7], "counts": text}, 5, 7)
    except MaskError:
        return
    assert isinstance(found, RunLengths)
    assert int(found.counts.sum()) == 35
