"""What the heads of a model learn from an image: classes of the data, soft labels of a teacher, or nothing.

The classes of all heads are side by side, as the scores of the model are. A target of a head is a distribution over
its classes, or zeros where an image has no label: then the cross entropy of that head is 0, and so are its gradients.
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
    """Targets of images.

    Args:
        heads: number of classes of each head of the model, in order.
        smoothing: of labels that are classes; soft ones are taken as they are.
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
            head: whose class `label` is; None if the image has no class. It counts more than a soft label.
            soft: labels by head.
            row: of the image in `soft`; -1 for none.
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
    """The heads of a run that labels are for.

    Raises:
        revnets.SpecError: there is none, or one has another number of classes.
    """
    shared = [name for name in heads if name in folder.heads]
    if not shared:
        problem = f"{folder.path} has labels of {', '.join(folder.heads)}, the run has the heads {', '.join(heads)}"
        raise run_error(key, problem, "Give heads the names that those of the teacher have", code="class-mismatch")
    for name in shared:
        if heads[name] != folder.heads[name]:
            problem = f"{folder.path} has {folder.heads[name]} classes of {name}, the run has {heads[name]}"
            raise run_error(key, problem, f"Set heads.{name}={folder.heads[name]}", code="class-mismatch")
    return shared


def join_labels(
    folder: LabelFolder, keys: Sequence[str], shared: Sequence[str], key: str
) -> tuple[dict[str, SparseProbabilities], np.ndarray]:
    """The labels of some images, and the row of each in them; -1 for those that the teacher could not read.

    Args:
        keys: of the images.
        shared: heads that are wanted.
        key: of the configuration, for messages.

    Raises:
        revnets.SpecError: an image has no label.
    """
    batches: list[LabelBatch] = list(folder.batches(2**16))
    numbers = {name: row for row, name in enumerate(name for batch in batches for name in batch.keys)}
    rows = np.fromiter((numbers.get(name, -1) for name in keys), np.int64, len(keys))
    for index in np.flatnonzero(rows < 0).tolist():
        if keys[index] not in folder.unreadable:
            problem = f"{folder.path} has no label of {keys[index]}"
            raise run_error(key, problem, "Label this data set: revnets label", code="misaligned-data")
    return {name: joined_rows([batch.heads[name] for batch in batches]) for name in shared}, rows
