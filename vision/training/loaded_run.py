"""A trained model in Python: `vision.load_run("runs/mine")` gives it with what it needs to be used."""

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
"""Arguments of `timm.create_model` that make it look for weights."""

FREE_ELEMENTS, FREE_BLOCKS = 2**24, 100
"""How much larger than its checkpoint a model may be; smaller differences are found when the two are compared."""


MAX_BATCH = 2**29
"""Numbers in a batch of images that the configuration in a checkpoint may ask for: 2 GiB in float32."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint of `revnets train` as it was read, and the configuration that it is used with."""

    path: Path
    config: TrainConfig
    state: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes; checkpoints of the first versions have none."""
        names = self.state.get("classes")
        return tuple(names) if isinstance(names, (list, tuple)) else None

    @property
    def category_ids(self) -> tuple[int, ...] | None:
        """Numbers of the classes in files of COCO, of a detector with one for each."""
        numbers = self.state.get("category_ids")
        if not isinstance(numbers, (list, tuple)) or len(numbers) != len(self.classes or ()):
            return None
        return tuple(numbers)

    @property
    def weight_sets(self) -> dict[str, tuple[Any, Any]]:
        """Weights of the model and of heads at its columns, by `raw` and `ema`: those that there are."""
        keys = {"raw": ("model", "heads"), "ema": ("ema", "heads_ema")}
        return {
            name: (self.state[model], self.state[heads] or {})
            for name, (model, heads) in keys.items()
            if self.state[model] is not None
        }


@dataclass(frozen=True)
class LoadedRun:
    """A model in evaluation mode, and the images that it is made for.

    Attributes:
        name: the checkpoint, or what else the model is from.
        classes: names in the order of the model's scores.
        device: of the model.
        category_ids: numbers of the classes in files of COCO; None for models that are no detectors.
    """

    name: str
    model: nn.Module
    config: TrainConfig
    classes: tuple[str, ...]
    device: torch.device
    category_ids: tuple[int, ...] | None = None

    @cached_property
    def data(self) -> ImageData:
        """Training and validation set of the run, opened when they are first asked for.

        Raises:
            revnets.SpecError: they are not there, or have other classes.
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
        """From a picture (PIL) to an image (C, H, W) as the validation set has it; the model takes batches of these."""
        if (images := images_in(self.config.data)) is not None:
            from vision.data.transforms import val_transform

            transform, decoding = val_transform(images), self.decoding
            return lambda picture: transform(converted(picture, *decoding))
        return self._small_image

    @property
    def decoding(self) -> tuple[str, Exif]:
        """The mode of the images of the run, `RGB` or `L`, and whether their EXIF orientation is applied."""
        images = images_in(self.config.data)
        return ("L", "ignore") if images is None else ("RGB", images.exif)

    def _small_image(self, picture: Image.Image) -> Tensor:
        side = self.config.data.img_size
        pixels = converted(picture, *self.decoding).resize((side, side))
        image = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).view(1, side, side)
        return (image.float() / 255 - self.data.mean[0]) / self.data.std[0]

    def pixels(self, image: Tensor) -> Tensor:
        """An image (C, H, W) before its normalisation, (H, W, C) in [0, 1], on the CPU."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.data.mean, self.data.std))
        return (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)

    def val_batches(
        self, size: int, count: int | None = None, shuffled: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of the validation set, on the device; images that cannot be read are left out.

        Args:
            size: images in a batch.
            count: batches; None for all.
            shuffled: draw images without replacement, by the seed of the configuration. Streams are taken as they come.
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
        """Image number `index` of the validation set, (1, C, H, W), and its class; -1 if it cannot be read.

        Raises:
            IndexError: there is none.
        """
        val = self.data.val
        if self.config.batch_is_stream:
            found = next(islice(val, index, None), None)
        else:
            found = val[index] if index < len(val) else None
        if found is None:
            raise IndexError(f"the validation set has no image {index}; it has {len(val)}, from 0 on")
        return found[0][None].to(self.device), int(found[1])


def load_run(
    path: str | Path, weights: str = "auto", overrides: Sequence[str] = (), *, trust: bool = False
) -> LoadedRun:
    """The model of a checkpoint of `revnets train`, with its classes and its transform.

    Args:
        path: a checkpoint, or the folder of a run: then its best one, or the last.
        weights: `raw`, `ema` (averaged over training), or `auto` for the averaged ones if the run kept them.
        overrides: of the run's configuration, such as `data.root=/data/imagenet`, `device=cpu` or `memory=store`.
        trust: may the configuration in the checkpoint name classes of other projects, such as a task or a block of
            your own? They are imported and run.

    The data of the run need not be there, unless they are asked for.

    Raises:
        vision.errors.CheckpointError: there is no such checkpoint, or it cannot be used.
        revnets.SpecError: an override is wrong, or the configuration names code that is not trusted.
        ValueError: there are no weights of this kind.
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
            "it holds no averaged weights",
            "Take those of the model: --weights raw",
            code="missing-weights",
        )
    data = None if checkpoint.classes else load_data(config.data, config.seed)
    classes = checkpoint.classes or (data.classes if data else ())
    model = builders.build_model(config, data or _without_images(config, classes))
    reader.load_weights(model, sets[name][0], checkpoint.path)
    device = builders.choose_device(config.device)
    return LoadedRun(str(checkpoint.path), model.to(device).eval(), config, classes, device, checkpoint.category_ids)


def fresh_run(config: TrainConfig, name: str) -> LoadedRun:
    """The model of a configuration with the weights of its initialisation, drawn by the seed of the configuration.

    Raises:
        revnets.SpecError: the data are not there, or the model cannot be built for them.
    """
    torch.manual_seed(config.seed)
    data, device = load_data(config.data, config.seed), builders.choose_device(config.device)
    model = builders.build_model(config, data)
    run = LoadedRun(name, model.to(device).eval(), config, data.classes, device)
    run.__dict__["data"] = data  # opened already
    return run


def load_checkpoint(path: str | Path, overrides: Sequence[str] = (), *, trust: bool = False) -> Checkpoint:
    """A checkpoint of `revnets train`, and its configuration with overrides.

    Args:
        path: a checkpoint, or the folder of a run: then its best one, or the last if none is marked as it.
        trust: may the configuration name classes of other projects?

    Raises:
        vision.errors.CheckpointError: there is no such checkpoint, or it holds weights alone.
        revnets.SpecError: an override is wrong, or the configuration names code that is not trusted.
    """
    path = reader.in_run(Path(path))
    if path.suffix in (".safetensors", ".pth") and path.exists():
        remedy = "Name a recipe for the model and its data, as in --config revcol_tiny_in1k"
        raise CheckpointError(path, "weights alone do not say how they are evaluated", remedy, code="missing-config")
    state = reader.read(path, needed=TO_EVALUATE)
    config = without_unused(_without_weights(state["config"]))
    checkpoint = Checkpoint(path, _bounded(load_config(config, overrides, trust=trust, name=str(path)), path), state)
    _require_size(checkpoint)
    return checkpoint


def _bounded(config: TrainConfig, path: Path) -> TrainConfig:
    """The configuration of a checkpoint with no more workers than this machine has processors.

    Raises:
        revnets.SpecError: its batches of images are too large for an evaluation.
    """
    side = config.data.img_size
    image = (1 if images_in(config.data) is None else 3) * side**2
    if config.batch_size * image > MAX_BATCH:
        problem = f"{config.batch_size} images of {side} x {side} are more than a batch may have"
        most = MAX_BATCH // image
        key, remedy = ("batch_size", f"Give batch_size={most}") if most else ("data.img_size", "Give a smaller one")
        raise SpecError(str(path), key, problem, remedy, code="out-of-range")
    return config.model_copy(update={"workers": min(config.workers, os.cpu_count() or 1)})


def _without_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint, whose weights are all that its model needs: none are fetched or read."""
    model = config.get("model")
    if not isinstance(model, Mapping):
        return dict(config)
    return {**config, "model": {key: value for key, value in model.items() if key not in TIMM_WEIGHTS}}


def _require_size(checkpoint: Checkpoint) -> None:
    """Refuse a configuration whose model is much larger than the weights beside it, before memory is taken for it.

    Raises:
        vision.errors.CheckpointError: it is.
    """
    weights = checkpoint.state["model"]
    if not isinstance(weights, Mapping):
        return
    model = checkpoint.config.model
    if isinstance(model, NetSpec):
        blocks = model.columns * sum(level.depth for level in model.levels)
        if blocks > len(weights) + FREE_BLOCKS:  # every block has a tensor
            problem = f"its configuration is of a net with {blocks} blocks, but it holds {len(weights)} tensors"
            raise CheckpointError(checkpoint.path, problem, "Use another checkpoint", code="weights-mismatch")
    held = sum(math.prod(tensor.shape) for tensor in weights.values())
    try:
        with torch.device("meta"):
            declared = sum(tensor.numel() for tensor in create_model(checkpoint.config).state_dict().values())
    except Exception:  # it is built again, with an error for the user, or cannot be built without memory
        return
    if declared > 2 * held + FREE_ELEMENTS:
        problem = f"its configuration is of a model with {declared} numbers, but it holds {held}"
        raise CheckpointError(checkpoint.path, problem, "Use another checkpoint", code="weights-mismatch")


def _without_images(config: TrainConfig, classes: tuple[str, ...]) -> ImageData:
    """The data of a run as far as its model is built for them."""
    channels = 1 if images_in(config.data) is None else 3
    side = config.data.img_size
    return ImageData(None, None, classes, (channels, side, side), (0.0,) * channels, (1.0,) * channels)
