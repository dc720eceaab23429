"""What an analysis looks at: a trained model or a fresh one, and images for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Subset

from revnets import ReversibleColumns, SpecError
from revnets.config.errors import nearest, option_error
from vision.checkpoints import manager
from vision.config.data import ImagesConfig
from vision.config.run import TrainConfig, load_config
from vision.data.dataset import ImageData
from vision.data.loading import load_data, val_loader
from vision.data.transforms import val_transform
from vision.errors import CheckpointError, first_line
from vision.paths import CONFIGS
from vision.training import builders


@dataclass(frozen=True, slots=True)
class Subject:
    """A model in evaluation mode, its columns, and the validation set of its run."""

    name: str
    model: nn.Module
    columns: ReversibleColumns
    data: ImageData
    config: TrainConfig
    device: torch.device

    def batches(self, size: int, count: int | None, shuffled: bool) -> Iterator[tuple[Tensor, Tensor]]:
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

    def divided(self, size: int, count: int) -> tuple[int, int | None]:
        """Size and number of the batches that there will be; None if a stream does not tell.

        Args:
            size, count: what is asked for; a count of 0 is the whole validation set.
        """
        there = None if self.config.batch_is_stream else len(self.data.val)
        if there is None:
            return size, count or None
        size = min(size, there)
        return size, min(count, -(-there // size)) if count else -(-there // size)

    def class_number(self, name: str) -> int:
        """The number of a class, from its name or from the number itself.

        Raises:
            revnets.SpecError: there is no such class.
        """
        classes = self.data.classes
        if name in classes:
            return classes.index(name)
        if name.isdecimal() and int(name) < len(classes):
            return int(name)
        raise option_error(
            "--class", f"there is no class {name!r}", nearest(name, classes, "There are"), code="unknown-choice"
        )

    def caption(self, scores: Tensor, shown: int, true: int | None) -> str:
        """What is predicted with scores (num_classes,), which class is `shown`, and which is right if that is known."""
        classes, shares = self.data.classes, scores.softmax(0)
        best = int(shares.argmax())
        lines = [f"predicted: {classes[best]}, {float(shares[best]):.0%}"]
        if shown != best:
            lines.insert(0, f"looked for: {classes[shown]}, {float(shares[shown]):.0%}")
        return "\n".join([*lines, *([f"true: {classes[true]}"] if true is not None else [])])

    def image(self, index: int) -> tuple[Tensor, int]:
        """Image number `index` of the validation set, (1, C, H, W), and its class.

        Raises:
            revnets.SpecError: there is none, or it cannot be read.
        """
        if self.config.batch_is_stream:
            found = next(islice(self.data.val, index, None), None)
        else:
            found = self.data.val[index] if index < len(self.data.val) else None
        if found is None:
            problem = f"the validation set has no image {index}; it has {len(self.data.val)}, from 0 on"
            raise option_error("--index", problem, "Give a lower number", code="out-of-range")
        image, label = found
        if int(label) < 0:
            raise option_error("--index", f"image {index} cannot be read", "Give another", code="unreadable-data")
        return image[None].to(self.device), int(label)

    def image_of(self, path: Path) -> Tensor:
        """A picture from any file, (1, C, H, W), as the validation set would have it.

        Raises:
            revnets.SpecError: it cannot be read.
        """
        try:
            picture = Image.open(path).convert("RGB" if self.data.shape[0] == 3 else "L")
        except (OSError, SyntaxError, ValueError) as error:
            problem = f"{path} cannot be read ({getattr(error, 'strerror', None) or first_line(error)})"
            raise option_error(
                "--image", problem, "Give a picture such as a .jpg or .png", code="unreadable-file"
            ) from None
        if isinstance(self.config.data, ImagesConfig):
            image = val_transform(self.config.data)(picture)
        else:
            side = self.config.data.img_size
            pixels = torch.frombuffer(bytearray(picture.resize((side, side)).tobytes()), dtype=torch.uint8)
            image = (pixels.view(1, side, side).float() / 255 - self.data.mean[0]) / self.data.std[0]
        return image[None].to(self.device)

    def pixels(self, image: Tensor) -> Tensor:
        """An image (C, H, W) before its normalisation, (H, W, C) in [0, 1], on the CPU."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.data.mean, self.data.std))
        return (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)


def load_subject(source: str, overrides: Sequence[str] = (), weights: str = "auto") -> Subject:
    """A model and its data.

    Args:
        source: a checkpoint of `revnets train`, or the folder of a run: then its best one, or the last. Or a model of
            timm's or a YAML of a run, with the weights of its initialisation (or with `model.pretrained=true`).
        overrides: of the run's configuration, such as `data.root=/data/imagenet` or `memory=store`.
        weights: of a checkpoint: `raw`, `ema` (averaged over training), or `auto` for those that count.

    Raises:
        vision.errors.CheckpointError: the checkpoint cannot be used.
        revnets.SpecError: there is no such thing, an override is wrong, or the model has no reversible columns.
    """
    path, state = Path(source), None
    if path.suffix.lower() not in (".yaml", ".yml") and path.exists():
        path = manager.in_run(path)
        state = manager.read(path)
        config = load_config(state["config"], overrides)
    elif timm.is_model(source):
        config = load_config({"model": {"timm": source}, "output": "."}, overrides)
    elif path.exists() or (CONFIGS / f"{source}.yaml").exists():
        config = load_config(source, overrides)
    else:
        known = [*timm.list_models("*revcol*"), *(file.stem for file in CONFIGS.glob("*.yaml"))]
        problem = "neither a checkpoint, the folder of a run, a model of timm's, nor a YAML of a run"
        raise SpecError(source, "", problem, nearest(source, known, "Models with columns are"), code="unknown-model")
    torch.manual_seed(config.seed)
    data, device = load_data(config.data, config.seed), builders.choose_device(config.device)
    model = builders.build_model(config, data)
    if state is not None:
        key = {"raw": "model", "ema": "ema", "auto": "ema" if state["ema"] is not None else "model"}[weights]
        if state[key] is None:
            raise CheckpointError(
                path, "it holds no averaged weights", "Take those of the model: --weights raw", code="missing-weights"
            )
        manager.load_weights(model, state[key], path)
    columns = builders.columns_of(model)
    if columns is None:
        raise SpecError(
            source,
            "",
            "this model has no reversible columns",
            "Give one that has, such as revcol_tiny",
            code="no-columns",
        )
    return Subject(source, model.to(device).eval(), columns, data, config, device)
