"""Pairs with similar labels, compared with distances of dense probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from vision.near_duplicates import candidates
from vision.near_duplicates.candidates import (
    CandidatePairs,
    label_distances,
    label_rows,
    nearest_pairs,
    similar_labels,
    stacked,
)
from vision.pseudo_labels.sparse import largest

HEADS = {"insects": 31, "eyes": 7}


def probabilities(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: (3 * torch.randn(rows, count, generator=generator)).softmax(1) for name, count in HEADS.items()}


def rows_of(dense, minimum):
    return label_rows({name: largest(values, minimum) for name, values in dense.items()}, HEADS)


def hellinger(one, other):
    """Distances of all pairs, (N, M), from probabilities of all classes."""
    affinity = sum(one[name].sqrt() @ other[name].sqrt().T for name in HEADS) / len(HEADS)
    return (1 - affinity).clamp(0, 1).sqrt()


@pytest.mark.parametrize("product", [10**6, 23])
def test_pairs_within_a_distance(monkeypatch, product):
    monkeypatch.setattr(candidates, "PRODUCT", product)
    monkeypatch.setattr(candidates, "COLUMNS", 5)
    one, other = probabilities(13, 0), probabilities(11, 1)
    blocks = list(similar_labels(rows_of(one, 0.0), rows_of(other, 0.0), 0.7))
    assert len(blocks) == (1 if product > 23 else 7)
    pairs = CandidatePairs(*(np.concatenate(values) for values in zip(*blocks, strict=True)))
    wanted = hellinger(one, other)
    assert 0 < len(pairs.rows) < wanted.numel()
    assert np.array_equal(np.stack(pairs[:2], 1), (wanted <= 0.7).nonzero().numpy())
    assert_close(torch.from_numpy(pairs.distances), wanted[wanted <= 0.7], atol=2e-3, rtol=0, check_dtype=False)


def truncated(dense, minimum):
    """Probabilities above the minimum, and the others in sum as one more class."""
    stored = {name: values.where(values > minimum, torch.zeros(())) for name, values in dense.items()}
    return {name: torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1) for name, kept in stored.items()}


def test_the_rest_counts_as_one_class():
    one, other = probabilities(13, 2), probabilities(11, 3)
    row, column = (index.ravel() for index in np.indices((13, 11)))
    found = label_distances(rows_of(one, 0.05), rows_of(other, 0.05), row, column).reshape(13, 11)
    wanted = hellinger(truncated(one, 0.05), truncated(other, 0.05))
    assert_close(torch.from_numpy(found), wanted, atol=2e-3, rtol=0, check_dtype=False)
    assert (wanted - hellinger(one, other)).abs().max() > 0.02


def test_an_image_has_distance_0_to_itself():
    rows = rows_of(probabilities(7, 4), 0.05)
    same = np.arange(7)
    assert_close(torch.from_numpy(label_distances(rows, rows, same, same)), torch.zeros(7), atol=0.03, rtol=0)


def test_rows_can_be_joined():
    dense = probabilities(7, 5)
    parts = [rows_of({name: values[part] for name, values in dense.items()}, 0.01) for part in (slice(3), slice(3, 7))]
    both, whole = stacked(parts), rows_of(dense, 0.01)
    assert (both.stored != whole.stored).nnz == 0
    assert np.array_equal(both.rest, whole.rest)


def test_the_nearest_pairs_of_each_row():
    pairs = CandidatePairs(np.array([0, 0, 0, 2, 2]), np.array([4, 5, 6, 4, 7]), np.array([0.3, 0.2, 0.1, 0.5, 0.4]))
    assert nearest_pairs(pairs, np.array([9, 7, 7, 3, 5]), 2).tolist() == [2, 1, 3, 4]
