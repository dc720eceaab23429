"""Rows of probabilities that store only the largest values (RevCol, appendix C.1), and their dense form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 0.01
"""Largest deviation of the sum of a row from 1. float16 has a relative error of 1/2048 per probability."""


@dataclass(frozen=True, slots=True)
class SparseProbabilities:
    """Sparse probabilities of N images. Row i has classes `classes[offsets[i] : offsets[i + 1]]`, most likely first.

    `scipy.sparse.csr_array((probabilities, classes, offsets))` is the same matrix.

    Attributes:
        offsets: (N + 1,), int64, starting at 0.
        classes: (entries,), int32.
        probabilities: (entries,), float16.
        rest: (N,), float16; the total probability of all other classes.
    """

    offsets: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    rest: np.ndarray

    def __len__(self) -> int:
        return len(self.rest)

    def row(self, number: int, count: int) -> Tensor:
        """A dense row of `count` classes, (count,), float32.

        The rest is distributed evenly over the classes that are not stored: the "marginal smoothing" of Shen and Xing
        ("A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022), which trained better there than
        dropping the rest or rescaling the stored probabilities.
        """
        begin, end = self.offsets[number : number + 2]
        others = count - int(end - begin)
        row = torch.full((count,), float(self.rest[number]) / others if others else 0.0)
        row[torch.from_numpy(self.classes[begin:end].astype(np.int64))] = torch.from_numpy(
            self.probabilities[begin:end].astype(np.float32)
        )
        return row

    def flaw(self, count: int, start: int = 0) -> str:
        """Describe the first error in these probabilities over `count` classes; empty if they are valid.

        Args:
            count: Number of classes.
            start: Number of the first row, for the text.
        """
        lengths, rows = np.diff(self.offsets), np.repeat(np.arange(len(self)), np.diff(self.offsets))
        values, rest = self.probabilities.astype(np.float32), self.rest.astype(np.float32)
        first = np.zeros(len(values), bool)
        first[self.offsets[:-1][lengths > 0]] = True
        rising = np.zeros(len(values), bool)
        rising[1:] = ~first[1:] & (values[1:] > values[:-1])
        order = np.lexsort((self.classes, rows))
        twice = np.zeros(len(values), bool)
        twice[1:] = (np.diff(rows[order]) == 0) & (np.diff(self.classes[order]) == 0)
        sums = rest + np.bincount(rows, values, len(self)) if len(self) else rest
        for is_wrong, of, text in (
            ((self.classes < 0) | (self.classes >= count), rows, f"a class that is not from 0 to {count - 1}"),
            (~((values > 0) & (values <= 1)), rows, "a probability that is not between 0 and 1"),
            (~((rest >= 0) & (rest <= 1)), np.arange(len(self)), "a rest that is not between 0 and 1"),
            (rising, rows, "probabilities that are not in decreasing order"),
            (twice, rows[order], "a class twice"),
            (~(np.abs(sums - 1) < TOLERANCE), np.arange(len(self)), "probabilities that do not add up to 1"),
        ):
            if is_wrong.any():
                return f"row {start + of[is_wrong.argmax()]} has {text}"
        return ""


def largest(probabilities: Tensor, minimum: float) -> SparseProbabilities:
    """The probabilities above a minimum. Equal probabilities are ordered by class.

    Args:
        probabilities: (N, classes), float32, whose rows sum to 1.
        minimum: At least 0.
    """
    values, classes = probabilities.sort(dim=1, descending=True, stable=True)
    stored = values.half()
    is_kept = (values > minimum) & (stored > 0)
    counts = is_kept.sum(1).cpu().numpy()
    rest = (1 - stored.float().where(is_kept, stored.new_zeros((), dtype=torch.float32)).sum(1)).clamp(0, 1)
    return SparseProbabilities(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        classes[is_kept].cpu().numpy().astype(np.int32),
        stored[is_kept].cpu().numpy(),
        rest.half().cpu().numpy(),
    )


def joined_rows(parts: Sequence[SparseProbabilities]) -> SparseProbabilities:
    """Concatenate the rows of all parts."""
    starts = np.cumsum([0, *(len(part.classes) for part in parts)])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    return SparseProbabilities(
        np.concatenate([np.zeros(1, np.int64), *offsets]),
        np.concatenate([np.zeros(0, np.int32), *(part.classes for part in parts)]),
        np.concatenate([np.zeros(0, np.float16), *(part.probabilities for part in parts)]),
        np.concatenate([np.zeros(0, np.float16), *(part.rest for part in parts)]),
    )


def chosen_rows(given: SparseProbabilities, keep: Sequence[int]) -> SparseProbabilities:
    """Select rows by number."""
    pieces = [slice(given.offsets[row], given.offsets[row + 1]) for row in keep]
    empty = slice(0, 0)
    return SparseProbabilities(
        np.cumsum([0, *(piece.stop - piece.start for piece in pieces)]).astype(np.int64),
        np.concatenate([given.classes[piece] for piece in (empty, *pieces)]),
        np.concatenate([given.probabilities[piece] for piece in (empty, *pieces)]),
        given.rest[list(keep)],
    )
