"""Images and labels, in an order and with augmentations that depend on (seed, epoch, index) alone.

A sample of the training set is asked for by its key (epoch, index), and draws its augmentation from a generator of
its own that is seeded with (seed, epoch, index). So neither the number of workers, nor the number of processes, nor
where a run was interrupted makes a difference to any image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from revnets.config import SpecError
from vision.config import DigitsConfig, TrainConfig
from vision.signals import leave_signals_to_parent


class Key(NamedTuple):
    """Which sample, and in which epoch: each has its own augmentation."""

    epoch: int
    index: int


class ImageSet(ABC, Dataset[tuple[Tensor, Tensor]]):
    """Images (C, H, W) with the numbers of their classes. A training set is asked by `Key`, others by number."""

    @abstractmethod
    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ImageData:
    """A training set, a validation set, and what both are made of."""

    train: ImageSet
    val: ImageSet
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # of an image: (channels, height, width)


def load_data(config: DigitsConfig, seed: int) -> ImageData:
    """The data that a configuration names.

    Args:
        seed: of the augmentations. The split into training and validation set is always the same.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16  # (1797, 1, 8, 8) in [0, 1]
    side = config.img_size
    images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits.target).long()
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    mean, std = images[train].mean().item(), images[train].std().item()
    return ImageData(
        train=Augmented(images[train], labels[train], RandomAffine(config, seed), mean, std),
        val=Plain((images[val] - mean) / std, labels[val]),
        classes=tuple(str(name) for name in digits.target_names),
        shape=(1, side, side),
    )


class RandomAffine:
    """A random rotation, change of size and shift of every image, drawn from (seed, epoch, index)."""

    def __init__(self, config: DigitsConfig, seed: int):
        self.limits = np.array([math.radians(config.rotate), config.scale, config.shift, config.shift])
        self.seed = seed

    def __call__(self, images: Tensor, keys: Sequence[Key]) -> Tensor:
        """Images (B, C, H, W) in, images of that shape out; what comes in from outside is black."""
        if not self.limits.any():
            return images
        draws = np.stack([np.random.default_rng((self.seed, *key)).uniform(-1, 1, 4) for key in keys]) * self.limits
        angle, growth, right, down = torch.from_numpy(draws).float().unbind(1)
        cos, sin = angle.cos() / (1 + growth), angle.sin() / (1 + growth)
        # affine_grid maps the result's coordinates, from -1 to 1 over the image, to the source's.
        matrix = torch.stack([cos, -sin, 2 * right, sin, cos, 2 * down], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


class Augmented(ImageSet):
    """Images in memory, augmented and normalised batch by batch."""

    def __init__(self, images: Tensor, labels: Tensor, augment: RandomAffine, mean: float, std: float):
        self.images, self.labels, self.augment = images, labels, augment
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, Tensor]]:
        index = [key.index for key in keys]
        images = (self.augment(self.images[index], keys) - self.mean) / self.std
        return list(zip(images, self.labels[index], strict=True))


class Plain(ImageSet):
    """Images in memory, ready to use."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class EpochBatches(Sampler[list[Key]]):
    """The batches of one epoch, in an order drawn from (seed, epoch), beginning wherever a run was interrupted.

    The samples that do not fill an update of all processes are left out; they differ from epoch to epoch.

    Args:
        length: samples in the set.
        batch_size: of one process and forward pass.
        accum: forward passes per update.
        seed: of the order.
        rank, world_size: this process takes every `world_size`-th batch.

    Raises:
        ValueError: the set has not enough samples for one update.
    """

    def __init__(self, length: int, batch_size: int, accum: int, seed: int, rank: int = 0, world_size: int = 1):
        self.length, self.batch_size, self.accum, self.seed = length, batch_size, accum, seed
        self.rank, self.world_size = rank, world_size
        self.updates = length // (batch_size * accum * world_size)
        if self.updates == 0:
            raise ValueError(f"{length} samples do not fill one update of {batch_size * accum * world_size}")
        self.epoch, self.start = 0, 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Let the next iteration be that of `epoch`, from its update `start` on."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return (self.updates - self.start) * self.accum

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length).tolist()
        epoch, size = self.epoch, self.batch_size
        for batch in range(self.start * self.accum, self.updates * self.accum):
            first = (batch * self.world_size + self.rank) * size
            yield [Key(epoch, index) for index in order[first : first + size]]


def train_loader(config: TrainConfig, data: ImageData) -> tuple[DataLoader, EpochBatches]:
    """The training set's loader, and the sampler that says which epoch it delivers next."""
    try:
        batches = EpochBatches(len(data.train), config.batch_size, config.grad_accum, config.seed)
    except ValueError as error:
        raise SpecError("training run", "batch_size", str(error), "Lower batch_size or grad_accum") from None
    return _loader(data.train, config, batch_sampler=batches), batches


def val_loader(config: TrainConfig, data: ImageData) -> DataLoader:
    """The validation set's loader: every image once, in order."""
    return _loader(data.val, config, batch_size=config.batch_size)


def _loader(dataset: ImageSet, config: TrainConfig, **options) -> DataLoader:
    # A loader draws a number for its workers at the start of every epoch; from the global generator that would make
    # the numbers that the model draws depend on how often a run was interrupted.
    generator = torch.Generator().manual_seed(config.seed)
    return DataLoader(
        dataset,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        generator=generator,
        worker_init_fn=leave_signals_to_parent,
        **options,
    )
