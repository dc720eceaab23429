"""Pairs of images with similar pseudo-labels, found in one pass over the labels by products of sparse matrices.

RevCol (appendix C.2) searches its 168 M images for those whose pseudo-labels are close to those of a test image. Labels
of thousands of classes are sparse, since few are stored: the cost of the product of a block of rows with all test
images is proportional to the classes that they share, so no index is needed.

The distance is the Hellinger distance, sqrt(1 - sum_c sqrt(p_c q_c)), from 0 for equal predictions to 1 for predictions
without a common class; the sums of several heads are averaged. The probability that is not stored counts as one more
class, and a class that is not stored has probability 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from vision.pseudo_labels.sparse import SparseProbabilities

PRODUCT = 2**22
"""Most pairs in a block of the product."""

COLUMNS = 2**16
"""Images of the other set in a block."""


class CandidatePairs(NamedTuple):
    """Pairs of images of two sets: their indices and distances, each (pairs,)."""

    rows: np.ndarray
    columns: np.ndarray
    distances: np.ndarray

    def chosen(self, keep: np.ndarray) -> CandidatePairs:
        """Select pairs by indices or a mask."""
        return CandidatePairs(self.rows[keep], self.columns[keep], self.distances[keep])


class LabelRows(NamedTuple):
    """Square roots of the probabilities of N images.

    Attributes:
        stored: (N, classes of all heads), a sparse array of scipy.
        rest: (N, heads), of the probability that is not stored.
    """

    stored: Any
    rest: np.ndarray


def label_rows(labels: Mapping[str, SparseProbabilities], heads: Mapping[str, int]) -> LabelRows:
    """Convert labels to rows whose products are sums of sqrt(p q), averaged over the heads.

    Args:
        labels: By the names of the heads.
        heads: Numbers of classes by the names of the heads.
    """
    from scipy.sparse import csr_array, hstack

    blocks, rests, scale = [], [], len(heads) ** -0.5
    for name, count in heads.items():
        given = labels[name]
        values = scale * np.sqrt(given.probabilities.astype(np.float32))
        blocks.append(csr_array((values, given.classes, given.offsets), shape=(len(given), count)))
        rests.append(scale * np.sqrt(given.rest.astype(np.float32)))
    return LabelRows(hstack(blocks, format="csr"), np.stack(rests, axis=1))


def stacked(rows: Iterable[LabelRows]) -> LabelRows:
    """Concatenate rows."""
    from scipy.sparse import vstack

    parts = list(rows)
    return LabelRows(
        vstack([part.stored for part in parts], format="csr"), np.concatenate([part.rest for part in parts])
    )


def similar_labels(rows: LabelRows, others: LabelRows, maximum: float) -> Iterator[CandidatePairs]:
    """Yield pairs of rows within a distance, grouped by row. The rows of a pair share at least one stored class.

    Args:
        rows: Labels of the first set.
        others: Labels of the second set.
        maximum: Largest distance, from 0 to 1.

    Yields:
        Pairs of some rows, at most `PRODUCT`, sorted by row and column.
    """
    step = max(1, PRODUCT // max(1, others.rest.shape[0]))
    for start in range(0, rows.rest.shape[0], step):
        block = LabelRows(rows.stored[start : start + step], rows.rest[start : start + step])
        found = [
            _pairs(
                block,
                LabelRows(others.stored[begin : begin + COLUMNS], others.rest[begin : begin + COLUMNS]),
                maximum,
                begin,
            )
            for begin in range(0, others.rest.shape[0], COLUMNS)
        ]
        pairs = CandidatePairs(*(np.concatenate(values) for values in zip(*found, strict=True)))
        pairs = pairs.chosen(np.lexsort((pairs.columns, pairs.rows)))
        yield CandidatePairs(pairs.rows + start, pairs.columns, pairs.distances)


def _pairs(rows: LabelRows, others: LabelRows, maximum: float, first: int) -> CandidatePairs:
    product = (rows.stored @ others.stored.T).tocoo()
    row, column = product.coords
    distances = _distances(product.data, rows.rest[row], others.rest[column])
    keep = distances <= maximum
    return CandidatePairs(row[keep].astype(np.int64), column[keep].astype(np.int64) + first, distances[keep])


def label_distances(rows: LabelRows, others: LabelRows, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The distances of pairs given by their indices, (pairs,)."""
    affinity = rows.stored[row].multiply(others.stored[column]).sum(1)
    return _distances(np.asarray(affinity), rows.rest[row], others.rest[column])


def _distances(affinity: np.ndarray, rest: np.ndarray, other_rest: np.ndarray) -> np.ndarray:
    affinity = affinity + np.einsum("ph,ph->p", rest, other_rest)
    return np.sqrt(np.clip(1 - affinity, 0, 1))  # a sum of rounded probabilities may exceed 1


def nearest_pairs(pairs: CandidatePairs, measure: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` pairs of each row with the smallest measure, sorted by row and measure."""
    order = np.lexsort((pairs.distances, measure, pairs.rows))
    rows = pairs.rows[order]
    is_first = np.ones(len(rows), bool)
    is_first[1:] = rows[1:] != rows[:-1]
    starts = np.flatnonzero(is_first)
    place = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
    return order[place < count]
