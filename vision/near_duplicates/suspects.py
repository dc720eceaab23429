"""Suspected near-duplicates: candidates by labels or features, filtered by hashes, pixels and a teacher's features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from revnets.config.errors import option_error
from vision.near_duplicates.aligned_pixels import aligned_correlation, thumbnails
from vision.near_duplicates.candidates import (
    CandidatePairs,
    LabelRows,
    label_distances,
    label_rows,
    nearest_pairs,
    similar_labels,
    stacked,
)
from vision.near_duplicates.features import TeacherFeatures, similar_features
from vision.near_duplicates.perceptual_hash import (
    BITS,
    COPIES,
    ORIGINALS,
    WORDS,
    bits_apart,
    hashes_of_copy,
    hashes_of_original,
)
from vision.near_duplicates.pictures import Pictures
from vision.pseudo_labels.label_files import LabelFolder

MOST_AGAINST, MOST_SUSPECTS = 2**20, 10**6
"""Most images of the other set, whose labels and hashes are in memory, and most suspects in a report."""

ROWS, COMPARED, PICTURES = 4096, 2**14, 256
"""Labels read at once, pairs whose hashes are compared at once, and pairs whose images are in memory at once."""

NEIGHBORS = 8
"""Number of candidates by features for each image."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How similar the images of a pair must be by each measure.

    Attributes:
        distance: Largest distance of labels, from 0 to 1.
        bits: Most bits, of 256, in which perceptual hashes differ.
        correlation: Smallest correlation of aligned pixels.
        cosine: Smallest cosine of the teacher's features.
        nearest: Pairs per image that are compared further, those with the nearest hashes (or labels, without images).
    """

    distance: float = 0.5
    bits: int = 60
    correlation: float = 0.93
    cosine: float = 0.6
    nearest: int = 2


class Suspect(NamedTuple):
    """An image that may be a near-duplicate of another one. Measures that were not computed are None."""

    key: str
    against: str
    distance: float
    bits: int | None = None
    correlation: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class LabeledSet:
    """Labels, and their images if they are available."""

    labels: LabelFolder
    pictures: Pictures | None = None


def find_suspects(
    images: LabeledSet,
    against: LabeledSet,
    limits: Limits,
    features: TeacherFeatures | None = None,
    by: Literal["labels", "features"] = "labels",
    advance: Callable[[int], None] = lambda _: None,
) -> list[Suspect]:
    """Find images that are suspected near-duplicates of others, the most certain first.

    Memory is bounded by the labels and hashes of `against`, and by blocks of the other set. If both are the same set of
    labels, each pair of its images counts once.

    Args:
        images: The set that is searched.
        against: The set that it is compared with.
        limits: How similar the images of a pair must be.
        features: Of the teacher, which need images.
        by: Whether candidates are pairs with similar labels, or with similar features.
        advance: Called with the number of images of each finished block.

    Raises:
        revnets.SpecError: If the heads of both sets differ, labels are damaged, or there are too many images or
            suspects.
    """
    keys, rows = _rows_of(against.labels, images.labels.heads)
    opinions = None
    if images.pictures is not None and against.pictures is not None:
        opinions = _Opinions(images.pictures, against.pictures, keys, limits, features)
    space = None
    if by == "features":
        if features is None or images.pictures is None or against.pictures is None:
            problem = "features need images, and a teacher whose model has forward_head"
            remedy = "Give --teacher, --images and --against-images, or --by labels"
            raise option_error("--by", problem, remedy, code="missing-key")
        space = _FeatureSpace(features, images.pictures, against.pictures, keys, limits)
    is_same = images.labels.path.resolve() == against.labels.path.resolve()
    found: list[Suspect] = []
    done = 0
    for batch in images.labels.batches(ROWS):
        own = label_rows(batch.heads, images.labels.heads)
        if space is None:
            candidates = similar_labels(own, rows, limits.distance)
        else:
            candidates = space.candidates(batch.keys, own, rows)
        for pairs in candidates:
            if is_same:
                pairs = pairs.chosen(pairs.rows + done < pairs.columns)
            if opinions is not None:
                found.extend(opinions.on(batch.keys, pairs))
            else:
                kept = pairs.chosen(nearest_pairs(pairs, pairs.distances, limits.nearest))
                found.extend(
                    Suspect(batch.keys[row], keys[column], float(away)) for row, column, away in zip(*kept, strict=True)
                )
            if len(found) > MOST_SUSPECTS:
                problem, hint = f"more than {MOST_SUSPECTS} pairs are within this distance", "Give a smaller distance"
                raise option_error("--max-distance", problem, hint, code="too-large")
        done += len(batch.keys)
        advance(len(batch.keys))
    return sorted(
        found, key=lambda suspect: (-(suspect.correlation or 0), suspect.distance, suspect.key, suspect.against)
    )


def _rows_of(labels: LabelFolder, heads: dict[str, int]) -> tuple[list[str], LabelRows]:
    if labels.heads != heads:
        problem = f"{labels.path} has the heads {labels.heads}, but the labels have {heads}"
        raise option_error("--against", problem, "Label both with the same teacher", code="class-mismatch")
    if not 0 < labels.rows <= MOST_AGAINST:
        code, hint = (
            ("too-large", "Split the images") if labels.rows else ("empty-data", "Give images that can be read")
        )
        problem = f"{labels.path} has labels of {labels.rows} images, not from 1 to {MOST_AGAINST}"
        raise option_error("--against", problem, hint, code=code)
    keys: list[str] = []
    blocks = []
    for batch in labels.batches(ROWS):
        keys.extend(batch.keys)
        blocks.append(label_rows(batch.heads, heads))
    return keys, stacked(blocks)


class _FeatureSpace:
    """The features of all images of the other set.

    Args:
        keys: Of the images in the other set.
    """

    def __init__(
        self, features: TeacherFeatures, copies: Pictures, originals: Pictures, keys: list[str], limits: Limits
    ):
        self.features, self.copies, self.limits = features, copies, limits
        self.others = features.of_keys(originals, keys)

    def candidates(self, keys: list[str], own: LabelRows, others: LabelRows) -> Iterator[CandidatePairs]:
        """Yield pairs of images with similar features, with the distances of their labels."""
        for rows, columns, cosines in similar_features(
            self.features.of_keys(self.copies, keys), self.others, NEIGHBORS
        ):
            near = cosines >= self.limits.cosine
            rows, columns = rows[near], columns[near]
            order = np.lexsort((columns, rows))
            yield CandidatePairs(rows[order], columns[order], label_distances(own, others, rows[order], columns[order]))


class _Opinions:
    """Compares pairs by hashes, features and pixels. Hashes of the other set stay in memory.

    Args:
        keys: Of the images of the other set.
    """

    def __init__(
        self,
        copies: Pictures,
        originals: Pictures,
        keys: list[str],
        limits: Limits,
        features: TeacherFeatures | None,
    ):
        self.copies, self.originals, self.keys = copies, originals, keys
        self.limits, self.features = limits, features
        self.hashes = np.zeros((len(keys), ORIGINALS, WORDS), np.uint64)
        self.state = np.zeros(len(keys), np.int8)  # 0: not hashed yet, 1: hashed, -1: cannot be read

    def on(self, keys: list[str], pairs: CandidatePairs) -> Iterator[Suspect]:
        """Yield the pairs that are similar by every measure.

        Args:
            keys: Of the images, by the rows of the pairs.
            pairs: Candidates.
        """
        pairs, bits = self._near_by_hash(keys, pairs)
        order = nearest_pairs(pairs, bits, self.limits.nearest)
        pairs, bits = pairs.chosen(order), bits[order]
        correlations, cosines = self._compared(keys, pairs)
        for (row, column, away), apart, correlation, cosine in zip(
            zip(*pairs, strict=True), bits, correlations, cosines, strict=True
        ):
            if correlation >= self.limits.correlation and (self.features is None or cosine >= self.limits.cosine):
                yield Suspect(
                    keys[row],
                    self.keys[column],
                    float(away),
                    int(apart),
                    float(correlation),
                    None if self.features is None else float(cosine),
                )

    def _near_by_hash(self, keys: list[str], pairs: CandidatePairs) -> tuple[CandidatePairs, np.ndarray]:
        rows, places = np.unique(pairs.rows, return_inverse=True)
        own, state = np.zeros((len(rows), COPIES, WORDS), np.uint64), np.full(len(rows), -1)
        for place, row in enumerate(rows):
            if picture := self.copies.read(keys[row]):
                own[place], state[place] = hashes_of_copy(picture), 1
        for column in np.unique(pairs.columns[state[places] > 0]):
            if self.state[column] == 0:
                picture = self.originals.read(self.keys[column])
                self.state[column] = 1 if picture else -1
                if picture:
                    self.hashes[column] = hashes_of_original(picture)
        bits = np.full(len(pairs.rows), BITS + 1)
        readable = np.flatnonzero((state[places] > 0) & (self.state[pairs.columns] > 0))
        for start in range(0, len(readable), COMPARED):
            block = readable[start : start + COMPARED]
            bits[block] = bits_apart(own[places[block]], self.hashes[pairs.columns[block]])
        near = bits <= self.limits.bits
        return pairs.chosen(near), bits[near]

    def _compared(self, keys: list[str], pairs: CandidatePairs) -> tuple[np.ndarray, np.ndarray]:
        """Correlations and cosines of pairs, each (pairs,); NaN if an image cannot be read, or without features."""
        correlations, cosines = (np.full(len(pairs.rows), np.nan) for _ in range(2))
        for start in range(0, len(pairs.rows), PICTURES):
            block = range(start, min(start + PICTURES, len(pairs.rows)))
            both = [
                (place, self.copies.read(keys[pairs.rows[place]]), self.originals.read(self.keys[pairs.columns[place]]))
                for place in block
            ]
            there = [(place, copy, original) for place, copy, original in both if copy and original]
            if not there:
                continue
            places, copies, originals = (list(values) for values in zip(*there, strict=True))
            views = (torch.stack([thumbnails(picture) for picture in pictures]) for pictures in (copies, originals))
            correlations[places] = aligned_correlation(*views).numpy()
            if self.features is not None:
                alike = [
                    number for number, place in enumerate(places) if correlations[place] >= self.limits.correlation
                ]
                left, right = (
                    self.features([pictures[number] for number in alike]) for pictures in (copies, originals)
                )
                cosines[[places[number] for number in alike]] = (left * right).sum(1).numpy()
        return correlations, cosines
