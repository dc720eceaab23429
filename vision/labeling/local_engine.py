"""Labeling in this process, alone or together with processes started by torchrun or by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Subset

from vision.data.dataset import Unreadable
from vision.data.image_files import NumberedFiles
from vision.data.timm_readers import Images
from vision.distributed.context import World, leave_signals_to_parent
from vision.labeling.shards import Shard, ShardedImages
from vision.labeling.teacher import Teacher
from vision.labeling.work_queue import WorkQueue
from vision.pseudo_labels.label_files import Provenance, part_path, write_part
from vision.pseudo_labels.sparse import SparseProbabilities, chosen_rows, joined_rows, largest


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """Settings of predictions.

    Attributes:
        min_probability: Probabilities above it are stored; the sum of the others is stored as the rest.
        batch_size: Images per forward pass. A batch has images of one shard.
        shard_size: Images per shard of a directory.
        input_key: Suffixes of the files that are read, as in `data.input_key` of a run.
        round: Round of pseudo-labeling.
    """

    min_probability: float = 0.01
    batch_size: int = 64
    shard_size: int = 10_000
    input_key: str | None = None
    round: int = 1


class Predictions(NamedTuple):
    """Predictions for the readable images of a shard or a batch, and the keys of the unreadable images."""

    keys: list[str]
    heads: dict[str, SparseProbabilities]
    unreadable: list[str]


def provenance_of(
    teacher: Teacher, images: ShardedImages, settings: LabelSettings, precision: str | None = None
) -> Provenance:
    """The provenance of the labels of these images.

    Args:
        teacher: Of the labels.
        images: That are labeled.
        settings: Of the predictions.
        precision: Of the forward pass; the teacher's if None.
    """
    plain = {
        "min_probability": settings.min_probability,
        "batch_size": settings.batch_size,
        "shard_size": settings.shard_size,
        "precision": precision or teacher.precision,
        "views": ["image", "mirrored"],
        "preparation": teacher.preparation,
    }
    return Provenance(teacher.digest, images.digest, plain, teacher.heads, len(images.shards), settings.round)


def label_images(
    teacher: Teacher,
    images: ShardedImages,
    queue: WorkQueue,
    settings: LabelSettings,
    workers: int = 0,
    world: World | None = None,
    advance: Callable[[int], None] = lambda _: None,
    remain: Callable[[int], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Label shards until all have a file.

    Args:
        teacher: That predicts the labels.
        images: To label.
        queue: Of the shards.
        settings: Of the predictions.
        workers: Processes that decode images.
        world: The processes that were started together.
        advance: Called with the number of images of each labeled batch.
        remain: Called before each shard with the number of images without a file; other processes label some.
        say: Called with messages about unreadable images and about waiting.

    Returns:
        Number of images that this process has labeled.

    Raises:
        OSError: If a file cannot be written. Finished files remain.
    """
    world, count = world or World(), 0
    pixels = decoded_images(teacher, images)
    for shard in queue.claims(world.rank, world.size, lambda owner: say(f"waiting for {owner}")):
        remain(queue.images_waiting())
        found = label_shard(teacher, images, pixels, shard, settings, workers, advance)
        path = part_path(queue.folder, shard.number)
        write_part(path, queue.provenance, shard.number, found.keys, found.heads, found.unreadable)
        count += len(shard.images)
        if found.unreadable:
            others = f" and {len(found.unreadable) - 1} more" if len(found.unreadable) > 1 else ""
            say(f"{path.name}: no label for unreadable images: {found.unreadable[0]}{others}")
    return count


def decoded_images(teacher: Teacher, images: ShardedImages) -> Images:
    """Inputs of a teacher by the number of an image, each with this number, or -1 if the image cannot be read."""
    files = NumberedFiles(images.reader, range(len(images.reader)))
    return Images(files, teacher.transform, Unreadable(), exif=teacher.exif)


def label_shard(
    teacher: Teacher,
    images: ShardedImages,
    pixels: Images,
    shard: Shard,
    settings: LabelSettings,
    workers: int,
    advance: Callable[[int], None],
) -> Predictions:
    """Predict the labels of a shard."""
    loader = DataLoader(
        Subset(pixels, shard.images),
        settings.batch_size,
        num_workers=min(workers, -(-len(shard.images) // settings.batch_size)),
        pin_memory=teacher.device.type == "cuda",
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),
    )
    batches = []
    for place, (batch, numbers) in enumerate(loader):
        first = place * settings.batch_size
        keys = [images.key(image) for image in shard.images[first : first + len(numbers)]]
        batches.append(label_batch(teacher, batch, keys, (numbers >= 0).tolist(), settings.min_probability))
        advance(len(numbers))
    return joined_predictions(batches)


def label_batch(
    teacher: Teacher, images: torch.Tensor, keys: list[str], is_readable: list[bool], minimum: float
) -> Predictions:
    """Predict the labels of a batch.

    Args:
        teacher: That predicts the labels.
        images: (B, C, H, W), with any pixels for unreadable images.
        keys: Of the images.
        is_readable: Whether each image could be read.
        minimum: Probabilities above it are stored.
    """
    kept = [row for row, is_there in enumerate(is_readable) if is_there]
    heads = {name: chosen_rows(largest(one, minimum), kept) for name, one in teacher.probabilities(images).items()}
    lost = [key for key, is_there in zip(keys, is_readable, strict=True) if not is_there]
    return Predictions([keys[row] for row in kept], heads, lost)


def joined_predictions(batches: list[Predictions]) -> Predictions:
    """Concatenate the predictions of consecutive batches."""
    heads = {name: joined_rows([batch.heads[name] for batch in batches]) for name in batches[0].heads}
    keys = [key for batch in batches for key in batch.keys]
    return Predictions(keys, heads, [key for batch in batches for key in batch.unreadable])
