"""A trained model that labels images: a run of `revnets train`, or a pretrained timm model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from revnets.config.errors import ConfigError, nearest, option_error
from vision.config.data import SourcesConfig, images_in
from vision.data.decoding import Exif
from vision.distributed.context import World
from vision.errors import CheckpointError, first_line
from vision.tasks.builders import choose_device
from vision.training.loaded_run import LoadedRun, load_run

ONLY_HEAD = "classes"
"""Name of the head of a model with one set of classes."""


@dataclass(frozen=True)
class Teacher:
    """A model in evaluation mode, and the transform of its inputs.

    Attributes:
        name: Of the run or the model.
        model: The network.
        heads: Number of classes by name, in the order of the model's scores.
        transform: From a PIL image to a tensor (C, H, W).
        exif: Whether the EXIF orientation is applied.
        device: Of the model.
        digest: sha256 of the weights.
        preparation: Settings of the transform, as plain data.
    """

    name: str
    model: nn.Module
    heads: dict[str, int]
    transform: Callable[[Image.Image], Tensor]
    exif: Exif
    device: torch.device
    digest: str
    preparation: dict[str, Any]

    @property
    def precision(self) -> str:
        """Precision of the forward pass."""
        return "bfloat16" if self.device.type == "cuda" else "float32"

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """The probabilities of every head, (B, classes), float32: the mean over images and mirrored images.

        Args:
            images: (B, C, H, W), on any device.

        Raises:
            revnets.SpecError: If the model does not return one score per class, or a score is not finite.
        """
        images = images.to(self.device, non_blocking=True)
        count = sum(self.heads.values())
        views = []
        for view in (images, images.flip(-1)):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                scores = self.model(view)
            if not isinstance(scores, Tensor) or scores.shape != (len(images), count):
                problem = f"it does not return scores of {count} classes"
                raise ConfigError(self.name, "", problem, "Give a classifier", code="class-mismatch")
            views.append([score.float().softmax(1) for score in scores.split(list(self.heads.values()), 1)])
        found = {name: (one + other) / 2 for name, one, other in zip(self.heads, *views, strict=True)}
        if not all(bool(values.isfinite().all()) for values in found.values()):
            raise ConfigError(self.name, "", "its scores are not finite", "Use another model", code="loss-not-finite")
        return found


def load_teacher(
    source: str, device: str = "auto", weights: str = "auto", trust: bool = False, world: World | None = None
) -> Teacher:
    """Load the model of a run, or a pretrained timm model.

    Args:
        source: A checkpoint of `revnets train`, the directory of a run, or a name such as `vit_huge_patch14_clip_224`.
        device: Of the model; `auto` for the GPU if there is one.
        weights: Of a checkpoint: `raw`, `ema`, or `auto` for the averaged weights if there are any.
        trust: Whether the configuration in a checkpoint may name classes of other projects.
        world: The processes, of which each uses its own GPU.

    Raises:
        vision.errors.CheckpointError: If the checkpoint cannot be used, or weights cannot be downloaded.
        revnets.SpecError: If there is no such model.
    """
    place = choose_device(device, world)
    if Path(source).exists():
        return _of_run(source, load_run(source, weights, [f"device={place}"], trust=trust))
    if not timm.is_model_pretrained(source):
        problem = f"{source!r} is neither a run nor a pretrained timm model"
        hint = nearest(source, timm.list_pretrained("revcol*"), "Give the directory of a run, or a model such as")
        raise option_error("TEACHER", problem, hint, code="missing-file")
    try:
        model: Any = timm.create_model(source, pretrained=True)
    except Exception as error:  # no network, or no space on the disk
        problem, hint = f"it cannot be downloaded ({first_line(error)})", "Check the network, or give a run"
        raise CheckpointError(source, problem, hint, code="download-failed") from None
    options = resolve_model_data_config(model)
    transform: Any = create_transform(**options, is_training=False)
    heads, preparation = {ONLY_HEAD: int(model.num_classes)}, {key: _plain(value) for key, value in options.items()}
    digest = weights_digest(model.state_dict())
    return Teacher(source, model.to(place).eval(), heads, transform, "ignore", place, digest, preparation)


def _of_run(source: str, run: LoadedRun) -> Teacher:
    images, data = images_in(run.config.data), run.config.data
    keys = SourcesConfig.PREPARED[:-1] if images is not None else ("name", "img_size")
    preparation = {key: _plain(getattr(data if images is None else images, key)) for key in keys}
    heads = run.config.heads or {ONLY_HEAD: len(run.classes)}
    digest = weights_digest(run.model.state_dict())
    return Teacher(source, run.model, dict(heads), run.transform, run.decoding[1], run.device, digest, preparation)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
