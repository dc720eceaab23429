"""Labeling with Ray Data: tasks decode images on CPUs, actors label them on GPUs, and this process writes the files.

Ray runs embedded on one machine, or on the cluster of `RAY_ADDRESS`, whose machines must have data and teacher under
the same paths. Batches and files are those of the local engine. Shards are not claimed, so two commands that run at the
same time both label everything.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from revnets.config.errors import ConfigError, option_error
from vision.data.decoding import Exif, read_image
from vision.data.image_files import open_listed
from vision.data.listing import ImageFile
from vision.errors import EXPECTED, TrainingError, first_line
from vision.labeling.local_engine import LabelSettings, Predictions, joined_predictions, label_batch
from vision.labeling.shards import Shard, ShardedImages
from vision.labeling.teacher import Teacher
from vision.labeling.work_queue import WorkQueue
from vision.pseudo_labels.label_files import part_path, write_part

MAX_BLOCKS = 10_000
"""Most blocks of the list of batches. Each block is a decoding task."""

Batch = dict[str, Any]
"""Columns of Ray Data. Each has one item, a batch of images."""


def require_ray() -> bool:
    """Connect to Ray, or start it on this machine.

    Returns:
        Whether it has GPUs.

    Raises:
        revnets.SpecError: If ray is not installed.
    """
    try:
        import ray
    except ImportError:
        remedy = "pip install 'revnets[ray]'"
        raise option_error("--engine", "ray is not installed", remedy, code="missing-dependency") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        ray.init(
            address, include_dashboard=None if address else False, log_to_driver=False, logging_level=logging.ERROR
        )
    return ray.cluster_resources().get("GPU", 0) > 0


def label_with_ray(
    load: Callable[[str], Teacher],
    teacher: Teacher,
    images: ShardedImages,
    queue: WorkQueue,
    settings: LabelSettings,
    advance: Callable[[int], None],
    say: Callable[[str], None],
) -> int:
    """Label the shards that have no file.

    Args:
        load: Loads the teacher on a device.
        teacher: Provides the transform.
        images, queue, settings, advance, say: as for `label_images`.

    Returns:
        Number of labeled images.

    Raises:
        revnets.SpecError: If the teacher cannot be used.
        vision.errors.TrainingError: If an actor has failed.
        OSError: If a file cannot be written. Finished files remain.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    items = [item for shard in queue.waiting() for item in _batches(images, shard, settings.batch_size)]
    if not items:
        return 0
    decoding: Any = partial(decode, transform=teacher.transform, exif=teacher.exif)
    blocks = min(len(items), MAX_BLOCKS)
    decoded = ray.data.from_items(items, override_num_blocks=blocks).map_batches(decoding, batch_size=1)
    labeled = decoded.map_batches(
        Labeler,
        batch_size=1,
        fn_constructor_args=(partial(load, "cuda" if gpus else "cpu"), settings.min_probability),
        num_gpus=1 if gpus else 0,
        compute=ray.data.ActorPoolStrategy(size=gpus or 1),
    )
    waiting = {shard.number: shard for shard in queue.waiting()}
    found: defaultdict[int, dict[int, Predictions]] = defaultdict(dict)
    count = 0
    for row in _rows(labeled):
        shard, first = waiting[int(row["shard"])], int(row["first"])
        batches = found[shard.number]
        batches[first] = Predictions(*pickle.loads(row["predictions"]))
        size = len(batches[first].keys) + len(batches[first].unreadable)
        count += size
        advance(size)
        if len(batches) == -(-len(shard.images) // settings.batch_size):
            whole, path = (
                joined_predictions([batches[place] for place in sorted(batches)]),
                part_path(queue.folder, shard.number),
            )
            write_part(path, queue.provenance, shard.number, whole.keys, whole.heads, whole.unreadable)
            del found[shard.number]
            if whole.unreadable:
                say(f"{path.name}: no label for {len(whole.unreadable)} unreadable images")
    return count


def _batches(images: ShardedImages, shard: Shard, size: int) -> Iterator[Batch]:
    """The batches of a shard as items of Ray Data."""
    for first in range(0, len(shard.images), size):
        chosen = shard.images[first : first + size]
        files = [[images.key(image), *images.reader.files[image]] for image in chosen]
        yield {"shard": shard.number, "first": first, "root": images.reader.root, "files": json.dumps(files)}


def _rows(labeled: Any) -> Iterator[Batch]:
    """Yield the rows in order, and raise errors of actors as errors of this process."""
    from ray.exceptions import RayError

    try:
        yield from labeled.iter_rows()
    except RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (ConfigError, *EXPECTED)):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is not None:
            raise cause from None
        raise TrainingError(f"Ray: {first_line(error)}. Run the command again to resume it", "process-lost") from None


def decode(batch: Batch, transform: Callable[[Image.Image], torch.Tensor], exif: Exif) -> Batch:
    """Decode a batch of files to pixels. Unreadable images are black."""
    pixels, is_readable = [], []
    for _, *place in json.loads(str(batch["files"][0])):
        try:
            with open_listed(str(batch["root"][0]), ImageFile(*place)) as file:
                image = read_image(file, exif=exif)
        except Exception:  # decoders raise errors of any kind
            image = None
        is_readable.append(image is not None)
        pixels.append(transform(image or Image.new("RGB", (8, 8))))
    kept = {name: batch[name] for name in ("shard", "first", "files")}
    return {**kept, "pixels": torch.stack(pixels).numpy()[None], "readable": np.array([json.dumps(is_readable)])}


class Labeler:
    """A Ray actor that labels batches with a teacher."""

    def __init__(self, load: Callable[[], Teacher], minimum: float):
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        self.teacher, self.minimum = load(), minimum

    def __call__(self, batch: Batch) -> Batch:
        keys = [key for key, *_ in json.loads(str(batch["files"][0]))]
        pixels = torch.from_numpy(np.array(batch["pixels"][0]))
        found = label_batch(self.teacher, pixels, keys, json.loads(str(batch["readable"][0])), self.minimum)
        content = np.array([pickle.dumps(tuple(found))], dtype=object)
        return {"shard": batch["shard"], "first": batch["first"], "predictions": content}
