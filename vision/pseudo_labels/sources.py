"""Training and validation sets of a run with several heads, from one or several sources of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from revnets.config.errors import ConfigError
from vision.config.data import ImagesConfig, SourcesConfig
from vision.data.dataset import ImageData, Unreadable
from vision.data.streaming import Stream
from vision.data.timm_readers import load_images
from vision.distributed.context import World
from vision.errors import run_error
from vision.pseudo_labels.labeled_source import LabeledSource
from vision.pseudo_labels.labeled_streams import ClassStreams, MixedStreams
from vision.pseudo_labels.mixture import Mixture
from vision.pseudo_labels.targets import HeadTargets


def load_sources(
    config: ImagesConfig | SourcesConfig,
    targets: HeadTargets,
    seed: int,
    unreadable: Unreadable,
    world: World,
    workers: int | None = None,
) -> ImageData:
    """Open the data of a run with several heads.

    A training sample is an image with the target of `targets`. A validation sample has a class number for each head, -1
    where it has no class. Sources with a `head` have a validation set; others are for training only.

    Args:
        config: The key `data` of the run.
        targets: Makes the targets of all heads.
        seed: Of the augmentations.
        unreadable: Policy for images that cannot be read.
        world: The processes of the run.
        workers: Processes per rank that load images. Each needs a shard of each stream. None if nothing is trained;
            then heads without labels, streams of few shards and tiny weights are accepted.

    Raises:
        revnets.SpecError: If data or labels are missing or do not fit the heads, or a source has no images to train on.
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
        data = None
        with _errors_at(place):
            if source.head is not None:
                data = load_images(source.model_copy(update={"exclude": None}), seed + number, unreadable, world)
                others = names.setdefault(source.head, data.classes)
                _require_classes(data.classes, others, source.head, targets.heads, place)
                remarks += data.remarks
                val.append((heads.index(source.head), data.val))
            labeled = LabeledSource(source, place, targets, seed + number, unreadable, world, data)
            train.append(labeled.stream() if source.is_stream else labeled.images())
            remarks += labeled.remarks
            provenance |= labeled.provenance
        if source.is_stream and workers is not None:
            _require_shards(train[-1], world.size, max(1, workers), place)
    if not val:
        hint = "Give one source the head that its class directories belong to"
        raise run_error("data", "no source has a validation set", hint, code="empty-data")
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
            problem = f"an epoch of {len(mixed)} images has no image of this source"
            raise run_error(f"data.{number}.weight", problem, "Give a larger weight", code="out-of-range")
    classes = tuple(f"{head}/{name}" for head in heads for name in names[head])
    shape = (3, first.img_size, first.img_size)
    return ImageData(mixed, whole, classes, shape, first.mean, first.std, unreadable, tuple(remarks), provenance)


class HeadClasses(Dataset[tuple[Tensor, Tensor]]):
    """A validation set of one head, with class numbers (heads,) that are -1 for the other heads."""

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
    """Replace the key `data` in errors of readers by the key of one of several sources, such as `data.1`."""
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
        problem = f"{stream.reader.root} has {shards} tars, but each worker of each process needs one ({needed})"
        hint = f"Divide the images among at least {needed} tars, or reduce workers"
        raise run_error(f"{place}.root", problem, hint, code="too-few-samples")


def _require_labels(heads: Sequence[str], labeled: set[str]) -> None:
    for head in heads:
        if head not in labeled:
            hint = "Remove the head, or assign it to a source with its classes"
            raise run_error(f"heads.{head}", "no source has labels of this head", hint, code="class-mismatch")


def _require_classes(
    classes: tuple[str, ...], others: tuple[str, ...], head: str, heads: Mapping[str, int], place: str
) -> None:
    if len(classes) != heads[head]:
        problem = f"the images have {len(classes)} classes, but the head {head} has {heads[head]}"
        raise run_error(f"{place}.head", problem, f"Set heads.{head}={len(classes)}", code="class-mismatch")
    for number, (ours, theirs) in enumerate(zip(classes, others, strict=True)):
        if ours != theirs:
            problem = f"class {number} of {head} is {ours}, but {theirs} in another source"
            raise run_error(f"{place}.head", problem, "Give both a class_map", code="class-mismatch")
