"""A trained model in Python: `vision.load_run("runs/mine")` returns it with its classes, transform and data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Subset

from revnets import NetSpec
from revnets.config.errors import ArgumentError, SpecError
from vision.checkpoints import reader
from vision.checkpoints.layout import TO_EVALUATE
from vision.config.data import images_in
from vision.config.run import TrainConfig, load_config, without_unused
from vision.data.class_subsets import class_difference
from vision.data.dataset import ImageData, load_data
from vision.data.decoding import Exif, converted
from vision.data.samplers import val_loader
from vision.errors import CheckpointError, run_error
from vision.tasks import builders
from vision.tasks.builders import create_model

WEIGHTS = ("auto", "raw", "ema")

TIMM_WEIGHTS = ("pretrained", "checkpoint_path")
"""Arguments of `timm.create_model` that make it load weights."""

FREE_ELEMENTS, FREE_BLOCKS = 2**24, 100
"""How much larger than its checkpoint a model may be. Smaller differences are found when weights are loaded."""

MAX_BATCH = 2**29
"""Most numbers in a batch of images that the configuration in a checkpoint may request: 2 GiB in float32."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint of `revnets train`, and the configuration that it is used with."""

    path: Path
    config: TrainConfig
    state: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes; None in checkpoints of the first versions."""
        names = self.state.get("classes")
        return tuple(names) if isinstance(names, (list, tuple)) else None

    @property
    def category_ids(self) -> tuple[int, ...] | None:
        """COCO category ids of a detector's classes; None for other models."""
        numbers = self.state.get("category_ids")
        if not isinstance(numbers, (list, tuple)) or len(numbers) != len(self.classes or ()):
            return None
        return tuple(numbers)

    @property
    def weight_sets(self) -> dict[str, tuple[Any, Any]]:
        """Available weights of the model and of its intermediate heads, by `raw` and `ema`."""
        keys = {"raw": ("model", "heads"), "ema": ("ema", "heads_ema")}
        return {
            name: (self.state[model], self.state[heads] or {})
            for name, (model, heads) in keys.items()
            if self.state[model] is not None
        }


@dataclass(frozen=True)
class LoadedRun:
    """A model in evaluation mode, with its configuration, classes and data.

    Attributes:
        name: Path of the checkpoint, or another source of the model.
        model: The network.
        config: Of the run.
        classes: Names in the order of the model's scores.
        device: Of the model.
        category_ids: COCO category ids of a detector's classes; None for other models.
    """

    name: str
    model: nn.Module
    config: TrainConfig
    classes: tuple[str, ...]
    device: torch.device
    category_ids: tuple[int, ...] | None = None

    @cached_property
    def data(self) -> ImageData:
        """Training and validation set of the run, opened on first use.

        Raises:
            revnets.SpecError: If the data is missing, or has other classes.
        """
        data = load_data(self.config.data, self.config.seed)
        if len(data.classes) != len(self.classes):
            problem = f"{len(data.classes)} classes, but the model is for {len(self.classes)}"
            raise run_error("data", problem, "Give the data of the run", code="class-mismatch")
        if difference := class_difference(self.classes, data.classes):
            raise run_error("data", difference, "Give the data of the run", code="class-mismatch")
        return data

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The transform of the validation set, from a PIL image to a tensor (C, H, W)."""
        if (images := images_in(self.config.data)) is not None:
            from vision.data.transforms import val_transform

            transform, decoding = val_transform(images), self.decoding
            return lambda picture: transform(converted(picture, *decoding))
        return self._small_image

    @property
    def decoding(self) -> tuple[str, Exif]:
        """The mode of the run's images, `RGB` or `L`, and whether their EXIF orientation is applied."""
        images = images_in(self.config.data)
        return ("L", "ignore") if images is None else ("RGB", images.exif)

    def _small_image(self, picture: Image.Image) -> Tensor:
        side = self.config.data.img_size
        pixels = converted(picture, *self.decoding).resize((side, side))
        image = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).view(1, side, side)
        return (image.float() / 255 - self.data.mean[0]) / self.data.std[0]

    def pixels(self, image: Tensor) -> Tensor:
        """Undo the normalization of an image (C, H, W): pixels (H, W, C) in [0, 1], on the CPU."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.data.mean, self.data.std))
        return (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)

    def val_batches(
        self, size: int, count: int | None = None, shuffled: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of the validation set, on the device. Unreadable images are skipped.

        Args:
            size: Images per batch.
            count: Number of batches; None for all.
            shuffled: Whether to draw images without replacement, by the seed of the run. Streams are never shuffled.
        """
        data, config = self.data, self.config.model_copy(update={"batch_size": size})
        if shuffled and not config.batch_is_stream:
            generator = torch.Generator().manual_seed(config.seed)
            order = torch.randperm(len(data.val), generator=generator)[: size * count if count else None]
            data = replace(data, val=Subset(data.val, order.tolist()))
        for images, labels in islice(val_loader(config, data), count):
            keep = labels >= 0
            yield images[keep].to(self.device), labels[keep].to(self.device)

    def val_image(self, index: int) -> tuple[Tensor, int]:
        """An image of the validation set, (1, C, H, W), and its class; -1 if it cannot be read.

        Raises:
            IndexError: If the index is out of range.
        """
        val = self.data.val
        if self.config.batch_is_stream:
            found = next(islice(val, index, None), None)
        else:
            found = val[index] if index < len(val) else None
        if found is None:
            raise IndexError(f"the validation set has no image {index}; its length is {len(val)}")
        return found[0][None].to(self.device), int(found[1])


def load_run(
    path: str | Path, weights: str = "auto", overrides: Sequence[str] = (), *, trust: bool = False
) -> LoadedRun:
    """Load the model of a checkpoint of `revnets train`, with its classes and its transform.

    The data of the run is only needed when `LoadedRun.data` is used.

    Args:
        path: A checkpoint, or the directory of a run: then its best checkpoint, or the last one.
        weights: `raw`, `ema` (averaged over training), or `auto` for the averaged weights if there are any.
        overrides: Of the run configuration, such as `data.root=/data/imagenet`, `device=cpu` or `memory=store`.
        trust: Whether the configuration in the checkpoint may name classes of other projects, such as a custom task or
            block, which are imported and executed.

    Raises:
        vision.errors.CheckpointError: If there is no such checkpoint, or it cannot be used.
        revnets.SpecError: If an override is wrong, or the configuration names code that is not trusted.
        ArgumentError: `weights` is none of the choices.
    """
    if weights not in WEIGHTS:
        problem = f"weights {weights!r}: choose among {', '.join(WEIGHTS)}"
        raise ArgumentError(problem, "weights", code="unknown-choice")
    checkpoint = load_checkpoint(path, overrides, trust=trust)
    sets, config = checkpoint.weight_sets, checkpoint.config
    name = ("ema" if "ema" in sets else "raw") if weights == "auto" else weights
    if name not in sets:
        raise CheckpointError(
            checkpoint.path,
            "it has no averaged weights",
            "Use those of the model: --weights raw",
            code="missing-weights",
        )
    data = None if checkpoint.classes else load_data(config.data, config.seed)
    classes = checkpoint.classes or (data.classes if data else ())
    model = builders.build_model(config, data or _without_images(config, classes))
    reader.load_weights(model, sets[name][0], checkpoint.path)
    device = builders.choose_device(config.device)
    return LoadedRun(str(checkpoint.path), model.to(device).eval(), config, classes, device, checkpoint.category_ids)


def fresh_run(config: TrainConfig, name: str) -> LoadedRun:
    """Create the model of a configuration with initial weights, drawn by the seed of the configuration.

    Raises:
        revnets.SpecError: If the data is missing, or the model cannot be built for it.
    """
    torch.manual_seed(config.seed)
    data, device = load_data(config.data, config.seed), builders.choose_device(config.device)
    model = builders.build_model(config, data)
    run = LoadedRun(name, model.to(device).eval(), config, data.classes, device)
    run.__dict__["data"] = data  # the cached property
    return run


def load_checkpoint(path: str | Path, overrides: Sequence[str] = (), *, trust: bool = False) -> Checkpoint:
    """Read a checkpoint of `revnets train`, and its configuration with overrides.

    Args:
        path: A checkpoint, or the directory of a run: then its best checkpoint, or the last if none is marked as best.
        overrides: Of the run configuration.
        trust: Whether the configuration may name classes of other projects.

    Raises:
        vision.errors.CheckpointError: If there is no such checkpoint, or the file only has weights.
        revnets.SpecError: If an override is wrong, or the configuration names code that is not trusted.
    """
    path = reader.in_run(Path(path))
    if path.suffix in (".safetensors", ".pth") and path.exists():
        hint = "Name a recipe for the model and its data, as in --config revcol_tiny_in1k"
        raise CheckpointError(path, "a file of weights has no configuration", hint, code="missing-config")
    state = reader.read(path, needed=TO_EVALUATE)
    config = without_unused(_without_weights(state["config"]))
    checkpoint = Checkpoint(path, _bounded(load_config(config, overrides, trust=trust, name=str(path)), path), state)
    _require_size(checkpoint)
    return checkpoint


def _bounded(config: TrainConfig, path: Path) -> TrainConfig:
    """Limit the workers in the configuration of a checkpoint to the processors of this machine.

    Raises:
        revnets.SpecError: If its batches of images are too large.
    """
    side = config.data.img_size
    image = (1 if images_in(config.data) is None else 3) * side**2
    if config.batch_size * image > MAX_BATCH:
        problem = f"a batch of {config.batch_size} images of {side} x {side} is too large"
        most = MAX_BATCH // image
        key, hint = ("batch_size", f"Give batch_size={most}") if most else ("data.img_size", "Give a smaller size")
        raise SpecError(str(path), key, problem, hint, code="out-of-range")
    return config.model_copy(update={"workers": min(config.workers, os.cpu_count() or 1)})


def _without_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint without arguments that load other weights."""
    model = config.get("model")
    if not isinstance(model, Mapping):
        return dict(config)
    return {**config, "model": {key: value for key, value in model.items() if key not in TIMM_WEIGHTS}}


def _require_size(checkpoint: Checkpoint) -> None:
    """Refuse a configuration whose model is much larger than the weights of the checkpoint, before it is allocated.

    Raises:
        vision.errors.CheckpointError: If the model is too large.
    """
    weights = checkpoint.state["model"]
    if not isinstance(weights, Mapping):
        return
    model = checkpoint.config.model
    if isinstance(model, NetSpec):
        blocks = model.columns * sum(level.depth for level in model.levels)
        if blocks > len(weights) + FREE_BLOCKS:  # every block has a tensor
            problem = f"its configuration describes a model with {blocks} blocks, but it has {len(weights)} tensors"
            raise CheckpointError(checkpoint.path, problem, "Use another checkpoint", code="weights-mismatch")
    held = sum(math.prod(tensor.shape) for tensor in weights.values())
    try:
        with torch.device("meta"):
            declared = sum(tensor.numel() for tensor in create_model(checkpoint.config).state_dict().values())
    except Exception:  # the error is reported when the model is built again, or it cannot be built on meta
        return
    if declared > 2 * held + FREE_ELEMENTS:
        problem = f"its configuration describes a model with {declared} parameters, but it has {held}"
        raise CheckpointError(checkpoint.path, problem, "Use another checkpoint", code="weights-mismatch")


def _without_images(config: TrainConfig, classes: tuple[str, ...]) -> ImageData:
    """The properties of the run's data that its model is built for."""
    channels = 1 if images_in(config.data) is None else 3
    side = config.data.img_size
    return ImageData(None, None, classes, (channels, side, side), (0.0,) * channels, (1.0,) * channels)
