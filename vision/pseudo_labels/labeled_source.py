"""The training set of one source of images in a run with several heads: images joined with their labels by key."""

from __future__ import annotations

import os
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from revnets.utils.regular_files import open_regular
from vision.config.data import ImagesConfig
from vision.data.dataset import ImageData, Unreadable
from vision.data.image_files import ImageFiles, NumberedFiles, listed
from vision.data.key_lists import listing_digest, read_keys
from vision.data.samplers import Key
from vision.data.timm_readers import Images, leave_out, provenance_of_exclusion, training_stream
from vision.data.transforms import train_transform
from vision.distributed.context import World
from vision.errors import run_error
from vision.pseudo_labels.label_files import LabelFolder, read_labels
from vision.pseudo_labels.label_lookup import LabelLookup, sample_key
from vision.pseudo_labels.labeled_streams import LabeledStream
from vision.pseudo_labels.sparse import SparseProbabilities
from vision.pseudo_labels.targets import HeadTargets, join_labels, require_heads_of

MAX_LISTED_TARS = 16
"""Tars whose samples are compared with a list of keys before training. Listing a tar reads all of its headers."""


class HeadImages(Dataset[tuple[Tensor, Tensor]]):
    """Images with targets of all heads, indexed by `Key`.

    Args:
        images: Returns an image and its number.
        targets: Makes targets.
        head: Whose classes `labels` are; None for images without classes.
        labels: Class numbers, by the number of the image.
        soft: Labels by head, whose rows are `rows[number]`.
    """

    def __init__(
        self,
        images: Images,
        targets: HeadTargets,
        head: str | None,
        labels: Sequence[int],
        soft: Mapping[str, SparseProbabilities] | None,
        rows: np.ndarray,
    ):
        self.images, self.targets, self.head = images, targets, head
        self.labels, self.soft, self.rows = labels, soft, rows

    @property
    def soft_heads(self) -> tuple[str, ...]:
        """Heads with soft labels."""
        return tuple(self.soft or ())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        image, number = self.images[key]
        return image, self.targets.target(self.head, self.labels[number], self.soft, int(self.rows[number]))


@dataclass(frozen=True)
class LabeledSource:
    """One source of a run with heads. `images` or `stream` makes its training set.

    Attributes:
        config: Of the source.
        place: Key path of the source, such as `data.1`, for messages.
        targets: Makes the targets of all heads.
        seed: Of the augmentations.
        unreadable: What happens to images that cannot be read.
        world: The processes of the run.
        data: Images with classes, of a source with a `head`; otherwise None.
        remarks: Filled with warnings about the source.
        provenance: Filled with what identifies labels and excluded images.
    """

    config: ImagesConfig
    place: str
    targets: HeadTargets
    seed: int
    unreadable: Unreadable
    world: World
    data: ImageData | None = None
    remarks: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def images(self) -> HeadImages:
        """The images of files, joined with their labels.

        Raises:
            revnets.SpecError: If images, labels or the list of excluded keys are missing, or do not fit together.
        """
        source, reader = self.config, self._reader()
        keys = [reader.filename(index) for index in range(len(reader))]
        self.remarks.extend(leave_out(reader, source))
        self.provenance.update(provenance_of_exclusion(reader, self.place))
        kept, soft, rows = np.arange(len(reader)), None, np.full(len(reader), -1)
        if source.labels is not None:
            folder, shared = self._labels(source.labels)
            if source.class_map is None and listing_digest(keys) != folder.provenance.data:
                problem = f"{folder.path} has labels of other images than those in {reader.root}"
                hint = f"Label {reader.root}: revnets label"
                raise run_error(f"{self.place}.labels", problem, hint, code="misaligned-data")
            keys = [reader.filename(index) for index in range(len(reader))]
            soft, rows = join_labels(folder, keys, shared, f"{self.place}.labels")
            if source.head is None:
                kept = np.flatnonzero(rows >= 0)
                if len(kept) < len(reader):
                    self.remarks.append(f"omitted {len(reader) - len(kept)} images that the teacher could not read")
                if not len(kept):
                    problem = f"the teacher could read no image of {reader.root}"
                    raise run_error(f"{self.place}.labels", problem, "Remove this source", code="empty-data")
        files = NumberedFiles(reader, kept.tolist())
        images = Images(files, train_transform(source), self.unreadable, self.seed, source.exif)
        return HeadImages(images, self.targets, source.head, reader.targets, soft, rows)

    def stream(self) -> LabeledStream:
        """The samples of webdataset's shards. Each is joined with its labels when it is read.

        Raises:
            revnets.SpecError: If shards, labels or the list of excluded keys are missing, or do not fit together.
        """
        source, stream = self.config, self.data.train if self.data is not None else self._stream()
        tars = {os.path.basename(name): name for name in stream.reader.split_info.filenames}
        lookup, excluded = None, frozenset[str]()
        if source.labels is not None:
            folder, shared = self._labels(source.labels)
            lookup = LabelLookup(folder, shared)
            if missing := sorted(tars.keys() - lookup.archives):
                problem = f"{folder.path} has no labels of {listed(missing)}"
                raise run_error(
                    f"{self.place}.labels", problem, "Label these tars: revnets label", code="misaligned-data"
                )
            if others := sorted(lookup.archives - tars.keys()):
                self.remarks.append(f"{folder.path} has labels of tars outside the training set: {listed(others)}")
        if source.exclude is not None:
            excluded = self._excluded(source.exclude, tars)
        if excluded:
            self.provenance[f"{self.place}.exclude"] = listing_digest(excluded)
        return LabeledStream(stream, self.targets, source.head, lookup, excluded)

    def _reader(self) -> ImageFiles:
        if self.data is not None:
            return self.data.train.reader
        self._require_root()
        source = self.config
        reader = ImageFiles(str(source.root), self.place, source.name == "tar", source.input_key, has_classes=False)
        self.remarks.extend(reader.remarks)
        return reader

    def _stream(self) -> Any:
        self._require_root()
        return training_stream(self.config, self.unreadable, self.world, self.seed)

    def _require_root(self) -> None:
        if not Path(self.config.root or "").exists():
            problem = f"there is no directory {self.config.root}"
            raise run_error(f"{self.place}.root", problem, "Check the path", code="missing-file")

    def _labels(self, path: str) -> tuple[LabelFolder, list[str]]:
        """The label files of a directory, and the heads of the run that they are for."""
        folder = read_labels(path)
        self.provenance[f"{self.place}.labels"] = asdict(folder.provenance)
        return folder, require_heads_of(folder, self.targets.heads, f"{self.place}.labels")

    def _excluded(self, path: str, tars: Mapping[str, str]) -> frozenset[str]:
        """The samples that a list excludes from some tars, by `sample_key`."""
        keys, root = read_keys(path), self.config.root
        known = {key for key in keys if key.partition("/")[0] in tars}
        if keys and not known:
            problem = f"no key in {path} begins with the name of a tar of {root}, such as {min(tars)}/"
            raise run_error(f"{self.place}.exclude", problem, "Check the list", code="misaligned-data")
        if unknown := sorted(keys - known):
            self.remarks.append(f"{path} has keys of tars outside the training set: {listed(unknown)}")
        if self.world.is_main:
            named = sorted({key.partition("/")[0] for key in known})
            chosen = {name: Path(root or "") / tars[name] for name in named[:MAX_LISTED_TARS]}
            if unmatched := len(keys_without_sample(known, chosen)):
                checked = f" (of {len(chosen)} tars checked, out of {len(named)})" if len(named) > len(chosen) else ""
                self.remarks.append(f"{path}: {unmatched} keys match no sample of their tar{checked}")
        return frozenset(map(sample_key, known))


def keys_without_sample(keys: Iterable[str], tars: Mapping[str, Path]) -> set[str]:
    """Keys of images that match no member of their tar.

    Args:
        keys: Of images in tars. Those in other tars than `tars` are ignored.
        tars: Paths by name. One that cannot be read is ignored, because reading its samples reports the reason.
    """
    unmatched: set[str] = set()
    by_tar: dict[str, defaultdict[str, set[str]]] = {name: defaultdict(set) for name in tars}
    for key in keys:
        if (name := key.partition("/")[0]) in tars:
            by_tar[name][sample_key(key)].add(key)
    for name, path in tars.items():
        wanted = by_tar[name]
        try:
            with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                while wanted and (member := tar.next()) is not None:
                    wanted.pop(sample_key(f"{name}/{member.name}"), None)
                    vars(tar)["members"].clear()  # or every header stays in memory
        except (OSError, tarfile.TarError, ValueError, EOFError, OverflowError):
            continue
        unmatched.update(*wanted.values())
    return unmatched
