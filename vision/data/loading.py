"""From the key `data` of a run to a training and a validation set, and to the batches of an epoch.

A sample of the training set is asked for by its key (epoch, index), and draws its augmentation from generators that
are seeded with (seed, epoch, index). So neither the number of workers, nor the number of processes, nor where a run
was interrupted makes a difference to any image. (Streams have no index: see `vision.data.streaming`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from vision.config.data import DigitsConfig, IdxConfig, ImagesConfig
from vision.config.run import TrainConfig
from vision.data.dataset import DataSplits, ImageData, Unreadable
from vision.data.samplers import EpochBatches, Share, without_class
from vision.distributed.context import World, leave_signals_to_parent
from vision.errors import run_error

Collate = Callable[[list[Any]], Any]


def load_data(
    config: DigitsConfig | IdxConfig | ImagesConfig, seed: int, notes: Path | None = None, world: World | None = None
) -> ImageData:
    """The data that a configuration names.

    Args:
        seed: of the augmentations. The split into training and validation set is always the same.
        notes: file that lists images that could not be read.
        world: the processes that share a stream.

    Raises:
        revnets.SpecError: there are no such data.
    """
    if isinstance(config, DigitsConfig):
        from vision.data.in_memory import load_digits

        return load_digits(config, seed)
    if isinstance(config, IdxConfig):
        from vision.data.in_memory import load_idx

        return load_idx(config, seed)
    from vision.data.timm_readers import load_images  # every kind of data has requirements of its own

    return load_images(config, seed, Unreadable(notes, config.unreadable), world or World())


class TrainBatches:
    """The training batches of a process, epoch by epoch.

    Args:
        config: of the run.
        data: what it trains on.
        world: the processes of the run.
        collate: makes a batch of samples; torch's by default.

    Raises:
        revnets.SpecError: the set does not fill one update.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData | DataSplits,
        world: World | None = None,
        collate: Collate = default_collate,
    ):
        world = world or World()
        self.accum = config.grad_accum
        try:
            self.order = EpochBatches(
                len(data.train), config.batch_size, self.accum, config.seed, world.rank, world.size
            )
        except ValueError as error:
            raise run_error(
                "batch_size", str(error), "Lower batch_size or grad_accum", code="too-few-samples"
            ) from None
        self.stream: Any = data.train if config.batch_is_stream else None
        options: dict[str, Any] = {"batch_size": config.batch_size} if self.stream else {"batch_sampler": self.order}
        self.loader = _loader(data.train, config, collate, **options)

    @property
    def updates(self) -> int:
        """Updates of an epoch."""
        return self.order.updates

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches from update `start` of the epoch on: for `ImageData`, images (B, C, H, W) and class numbers (B,)."""
        if self.stream is None:
            self.order.begin(epoch, start)
            return iter(self.loader)
        self.stream.epoch = epoch
        return islice(self.loader, start * self.accum, self.updates * self.accum)


def val_loader(
    config: TrainConfig,
    data: ImageData | DataSplits,
    world: World | None = None,
    collate: Collate = default_collate,
    padding: Callable[[Any], Any] = without_class,
) -> DataLoader:
    """The validation set's loader: this process's share, padded to equal length with samples that do not count.

    Args:
        collate: makes a batch of samples; torch's by default.
        padding: makes a sample that does not count from one that does; by default an image of the class -1.
    """
    val = data.val if config.batch_is_stream else Share(data.val, world or World(), padding)
    return _loader(val, config, collate, batch_size=config.batch_size)


def _loader(dataset: Dataset, config: TrainConfig, collate: Collate, **options: Any) -> DataLoader:
    # A loader draws a number for its workers at the start of every epoch; from the global generator that would make
    # the numbers that the model draws depend on how often a run was interrupted.
    generator = torch.Generator().manual_seed(config.seed)
    return DataLoader(
        dataset,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available() and config.device != "cpu",
        generator=generator,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_parent,
        **options,
    )
