"""Training and validation sets of a run with several heads, from one or several sources of images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from revnets.config.errors import ConfigError
from vision.config.data import ImagesConfig, SourcesConfig
from vision.data.dataset import ImageData, Unreadable
from vision.data.image_files import ImageFiles, NumberedFiles, listed
from vision.data.key_lists import read_keys
from vision.data.samplers import Key
from vision.data.streaming import Stream
from vision.data.timm_readers import Images, leave_out, load_images, provenance_of_exclusion, training_stream
from vision.data.transforms import train_transform
from vision.distributed.context import World
from vision.errors import run_error
from vision.pseudo_labels.label_files import read_labels
from vision.pseudo_labels.label_lookup import LabelLookup, sample_key
from vision.pseudo_labels.labeled_streams import ClassStreams, LabeledStream, MixedStreams
from vision.pseudo_labels.mixture import Mixture
from vision.pseudo_labels.sparse import SparseProbabilities
from vision.pseudo_labels.targets import HeadTargets, join_labels, listing_digest, require_heads_of


def load_sources(
    config: ImagesConfig | SourcesConfig,
    targets: HeadTargets,
    seed: int,
    unreadable: Unreadable,
    world: World,
    workers: int | None = None,
) -> ImageData:
    """The data of a run with several heads.

    A training sample is an image with the target of `targets`; a sample of the validation set has a class number for
    each head, -1 where it has none. Sources with a `head` have a validation set, others are for training alone.

    Args:
        workers: processes of each rank that load images; every one needs a shard of each stream. None if nothing is
            trained, so that heads without labels, streams of few shards and tiny weights do no harm.

    Raises:
        revnets.SpecError: data or labels are missing or do not fit the heads, or a source has no images to train on.
    """
    is_list = isinstance(config, SourcesConfig)
    sources, heads = config.sources if is_list else (config,), list(targets.heads)
    train: list[Any] = []
    val: list[tuple[int, Any]] = []
    names: dict[str, tuple[str, ...]] = {}
    remarks: list[str] = []
    provenance: dict[str, Any] = {}
    for number, source in enumerate(sources):
        place = f"data.{number}" if is_list else "data"
        if source.name not in ("folder", "tar") and not source.name.startswith("wds/"):
            problem = f"images of {source.name} have no keys, by which labels are found"
            raise run_error(f"{place}.name", problem, "Give folder, tar or wds", code="conflicting-values")
        data = None
        with _errors_at(place):
            if source.head is not None:
                data = load_images(_without_list(source), seed + number, unreadable, world)
                others = names.setdefault(source.head, data.classes)
                _require_classes(data.classes, others, source.head, targets.heads, place)
                remarks += data.remarks
                val.append((heads.index(source.head), data.val))
            join = _labeled_stream if source.is_stream else _training_set
            train.append(join(source, data, targets, seed + number, unreadable, place, remarks, provenance, world))
        if source.is_stream and workers is not None:
            _require_shards(train[-1], world.size, max(1, workers), place)
    if not val:
        remedy = "Give one source the head that its class folders belong to"
        raise run_error("data", "no source has images to validate on", remedy, code="empty-data")
    if workers is not None:
        _require_labels(heads, {*names, *(name for one in train for name in one.soft_heads)})
    first = sources[0]
    for head, count in targets.heads.items():
        names.setdefault(head, tuple(map(str, range(count))))
    weights = None if first.weight is None else [source.weight or 0.0 for source in sources]
    if first.is_stream:
        mixed: Any = MixedStreams(train, weights, seed)
        whole: Any = ClassStreams(val, len(heads))
    else:
        mixed = Mixture(train, weights)
        whole = ConcatDataset([HeadClasses(images, head, len(heads)) for head, images in val])
    for number, count in enumerate(mixed.counts):
        if count == 0 and workers is not None:
            problem = f"no image of this source is among the {len(mixed)} of an epoch"
            raise run_error(f"data.{number}.weight", problem, "Give a larger weight", code="out-of-range")
    classes = tuple(f"{head}/{name}" for head in heads for name in names[head])
    shape = (3, first.img_size, first.img_size)
    return ImageData(mixed, whole, classes, shape, first.mean, first.std, unreadable, tuple(remarks), provenance)


def _without_list(source: ImagesConfig) -> ImagesConfig:
    """A source all of whose images are read: those that are left out are known by their keys later."""
    return source.model_copy(update={"exclude": None})


def _training_set(
    source: ImagesConfig,
    data: ImageData | None,
    targets: HeadTargets,
    seed: int,
    unreadable: Unreadable,
    place: str,
    remarks: list[str],
    provenance: dict[str, Any],
    world: World,
) -> Dataset:
    """The images of files, joined with their labels."""
    if data is None:
        _require_root(source, place)
        reader = ImageFiles(str(source.root), place, source.name == "tar", source.input_key, has_classes=False)
        remarks += reader.remarks
    else:
        reader = data.train.reader
    keys = [reader.filename(index) for index in range(len(reader))]
    remarks += leave_out(reader, source)
    provenance |= provenance_of_exclusion(reader, place)
    kept, soft, rows = np.arange(len(reader)), None, np.full(len(reader), -1)
    if source.labels is not None:
        folder = read_labels(source.labels)
        provenance[f"{place}.labels"] = asdict(folder.provenance)
        shared = require_heads_of(folder, targets.heads, f"{place}.labels")
        if source.class_map is None and listing_digest(keys) != folder.provenance.data:
            problem = f"{folder.path} has labels of other images than those in {reader.root}"
            raise run_error(f"{place}.labels", problem, f"Label {reader.root}: revnets label", code="misaligned-data")
        keys = [reader.filename(index) for index in range(len(reader))]
        soft, rows = join_labels(folder, keys, shared, f"{place}.labels")
        if source.head is None:
            kept = np.flatnonzero(rows >= 0)
            if len(kept) < len(reader):
                remarks.append(f"left out, for the teacher could not read them: {len(reader) - len(kept)} images")
            if not len(kept):
                problem = f"the teacher could read no image of {reader.root}"
                raise run_error(f"{place}.labels", problem, "Leave out this source", code="empty-data")
    images = Images(NumberedFiles(reader, kept.tolist()), train_transform(source), unreadable, seed, source.exif)
    return HeadImages(images, targets, source.head, reader.targets, soft, rows)


def _labeled_stream(
    source: ImagesConfig,
    data: ImageData | None,
    targets: HeadTargets,
    seed: int,
    unreadable: Unreadable,
    place: str,
    remarks: list[str],
    provenance: dict[str, Any],
    world: World,
) -> LabeledStream:
    """The samples of shards, which find their labels as they come."""
    _require_root(source, place)
    stream = data.train if data is not None else training_stream(source, unreadable, world, seed)
    tars, lookup, excluded = _tars(stream), None, frozenset[str]()
    if source.labels is not None:
        folder = read_labels(source.labels)
        provenance[f"{place}.labels"] = asdict(folder.provenance)
        lookup = LabelLookup(folder, require_heads_of(folder, targets.heads, f"{place}.labels"))
        if missing := sorted(tars - lookup.archives):
            problem = f"{folder.path} has no labels of {listed(missing)}"
            raise run_error(f"{place}.labels", problem, "Label these tars: revnets label", code="misaligned-data")
        if others := sorted(lookup.archives - tars):
            remarks.append(f"{folder.path} has labels of tars that are not trained on: {listed(others)}")
    if source.exclude is not None:
        keys = read_keys(source.exclude)
        excluded = frozenset(sample_key(key) for key in keys if key.partition("/")[0] in tars)
        if keys and not excluded:
            problem = f"no key in {source.exclude} begins with the name of a tar of {source.root}, such as {min(tars)}/"
            raise run_error(f"{place}.exclude", problem, "Check the list", code="misaligned-data")
        if unknown := sorted(key for key in keys if key.partition("/")[0] not in tars):
            remarks.append(f"{source.exclude} has keys of tars that are not trained on: {listed(unknown)}")
    if excluded:
        provenance[f"{place}.exclude"] = listing_digest(excluded)
    return LabeledStream(stream, targets, source.head, lookup, excluded)


def _tars(stream: Stream) -> frozenset[str]:
    """Names of the shards of a stream, as keys have them."""
    return frozenset(map(os.path.basename, stream.reader.split_info.filenames))


class HeadImages(Dataset[tuple[Tensor, Tensor]]):
    """Images with targets of all heads; asked by `Key`.

    Args:
        images: gives an image and its number.
        targets: makes targets.
        head: whose classes `labels` are; None for images without classes.
        labels: class numbers, by the number of the image.
        soft: labels by head, whose rows are `rows[number]`.
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
        self.images, self.targets, self.head, self.labels, self.soft, self.rows = (
            images,
            targets,
            head,
            labels,
            soft,
            rows,
        )

    @property
    def soft_heads(self) -> tuple[str, ...]:
        """Heads with soft labels."""
        return tuple(self.soft or ())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        image, number = self.images[key]
        return image, self.targets.target(self.head, self.labels[number], self.soft, int(self.rows[number]))


class HeadClasses(Dataset[tuple[Tensor, Tensor]]):
    """A validation set of one head: class numbers (heads,), of which only one counts."""

    def __init__(self, images: Dataset, head: int, heads: int):
        self.images, self.head, self.heads = images, head, heads

    def __len__(self) -> int:
        return len(self.images)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.images[index]
        classes = torch.full((self.heads,), -1)
        classes[self.head] = label
        return image, classes


@contextmanager
def _errors_at(place: str) -> Iterator[None]:
    """Give errors of readers, which know a single source `data`, the key of one of several, such as `data.1`."""
    try:
        yield
    except ConfigError as error:
        inside = error.key == place or error.key.startswith(f"{place}.")
        if inside or error.key.partition(".")[0] != "data":
            raise
        key = place + error.key.removeprefix("data")
        raise ConfigError(error.source, key, error.message, error.hint, error.code) from None


def _require_shards(stream: Stream, processes: int, workers: int, place: str) -> None:
    shards = len(stream.reader.split_info.filenames)
    if shards < processes * workers:
        needed = processes * workers
        problem = f"{stream.reader.root} has {shards} of {needed} tars, one for each worker of each process"
        remedy = f"Divide the images among {needed} tars or more, or set workers to a smaller number"
        raise run_error(f"{place}.root", problem, remedy, code="too-few-samples")


def _require_labels(heads: Sequence[str], labeled: set[str]) -> None:
    for head in heads:
        if head not in labeled:
            remedy = "Remove it, or give it to a source with its classes"
            raise run_error(f"heads.{head}", "no source has labels of this head", remedy, code="class-mismatch")


def _require_root(source: ImagesConfig, place: str) -> None:
    if not Path(source.root or "").exists():
        problem = f"there is no folder {source.root}"
        raise run_error(f"{place}.root", problem, "Check the path", code="missing-file")


def _require_classes(
    classes: tuple[str, ...], others: tuple[str, ...], head: str, heads: Mapping[str, int], place: str
) -> None:
    if len(classes) != heads[head]:
        problem = f"the images have {len(classes)} classes, the head {head} has {heads[head]}"
        raise run_error(f"{place}.head", problem, f"Set heads.{head}={len(classes)}", code="class-mismatch")
    for number, (ours, theirs) in enumerate(zip(classes, others, strict=True)):
        if ours != theirs:
            problem = f"class {number} of {head} is {ours}, and {theirs} in another source"
            raise run_error(f"{place}.head", problem, "Give both a class_map", code="class-mismatch")
