"""Training targets of several heads: classes of the data, soft labels of a teacher, or none.

The classes of all heads are concatenated, like the scores of the model. The target of a head is a distribution over its
classes, or zeros for an image without a label, for which the cross entropy of the head and its gradients are 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vision.data.key_lists import listing_digest as listing_digest
from vision.errors import run_error
from vision.pseudo_labels.label_files import LabelBatch, LabelFolder
from vision.pseudo_labels.sparse import SparseProbabilities, joined_rows


class HeadTargets:
    """Makes the targets of images.

    Args:
        heads: Number of classes of each head of the model, in order.
        smoothing: Label smoothing of classes. Soft labels are not changed.
    """

    def __init__(self, heads: Mapping[str, int], smoothing: float = 0.0):
        self.heads, self.smoothing = dict(heads), smoothing
        starts = np.cumsum([0, *heads.values()]).tolist()
        self.slices = {name: slice(*place) for name, place in zip(heads, pairwise(starts), strict=True)}
        self.width: int = starts[-1]

    def target(
        self, head: str | None, label: int, soft: Mapping[str, SparseProbabilities] | None = None, row: int = -1
    ) -> Tensor:
        """The target of an image, (classes of all heads,), float32.

        Args:
            head: Whose class `label` is; None if the image has no class.
            label: The class, which replaces the soft label of this head.
            soft: Soft labels by head.
            row: Of the image in `soft`; -1 for none.
        """
        target = torch.zeros(self.width)
        if row >= 0:
            for name, sparse in (soft or {}).items():
                target[self.slices[name]] = sparse.row(row, self.heads[name])
        if head is not None and label >= 0:
            share = target[self.slices[head]]
            share[:] = self.smoothing / len(share)
            share[label] += 1 - self.smoothing
        return target


def require_heads_of(folder: LabelFolder, heads: Mapping[str, int], key: str) -> list[str]:
    """The heads of a run that have labels in a directory.

    Args:
        folder: The labels.
        heads: Of the run.
        key: Of the configuration, for messages.

    Raises:
        revnets.SpecError: If no head has labels, or the labels of one have another number of classes.
    """
    shared = [name for name in heads if name in folder.heads]
    if not shared:
        problem = f"{folder.path} has labels of {', '.join(folder.heads)}, but the run has the heads {', '.join(heads)}"
        raise run_error(key, problem, "Give the heads the names of the teacher's heads", code="class-mismatch")
    for name in shared:
        if heads[name] != folder.heads[name]:
            problem = f"{folder.path} has {folder.heads[name]} classes of {name}, but the run has {heads[name]}"
            raise run_error(key, problem, f"Set heads.{name}={folder.heads[name]}", code="class-mismatch")
    return shared


def join_labels(
    folder: LabelFolder, keys: Sequence[str], shared: Sequence[str], key: str
) -> tuple[dict[str, SparseProbabilities], np.ndarray]:
    """Read the labels of some images.

    Args:
        folder: The labels.
        keys: Of the images.
        shared: Heads whose labels are returned.
        key: Of the configuration, for messages.

    Returns:
        Labels by head, and the row of each image in them; -1 for images that the teacher could not read.

    Raises:
        revnets.SpecError: If an image has no label.
    """
    batches: list[LabelBatch] = list(folder.batches(2**16))
    numbers = {name: row for row, name in enumerate(name for batch in batches for name in batch.keys)}
    rows = np.fromiter((numbers.get(name, -1) for name in keys), np.int64, len(keys))
    for index in np.flatnonzero(rows < 0).tolist():
        if keys[index] not in folder.unreadable:
            problem = f"{folder.path} has no label of {keys[index]}"
            raise run_error(key, problem, "Label this data set: revnets label", code="misaligned-data")
    return {name: joined_rows([batch.heads[name] for batch in batches]) for name in shared}, rows
