"""Training steps of recipes by name, for `revnets plan`: an entry point of the group `revnets.models`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from revnets import SpecError
from revnets.config.errors import nearest
from vision.config.data import CocoConfig, SmallImagesConfig
from vision.config.run import TrainConfig, load_config
from vision.paths import FOLDERS
from vision.tasks.builders import create_task


class RecipeStep(nn.Module):
    """The part of a training step that a plan simulates: the model of a task, or the model with its loss.

    Attributes:
        pretrained_cfg: Has the shape of one image, as in timm models.
    """

    def __init__(self, step: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        self.step, self.pretrained_cfg = step, {"input_size": shape}

    def forward(self, images: Tensor) -> Any:
        return self.step(images)


def names() -> list[str]:
    """The recipes of this package."""
    return sorted(file.stem for folder in FOLDERS for file in folder.glob("*.yaml"))


def create(name: str, **options: Any) -> RecipeStep:
    """Create the step of a recipe without reading data or weights.

    Args:
        name: Of the recipe.
        options: Replace keys of the recipe, such as `model={"kernel_size": 3}`.

    Raises:
        SpecError: If there is no such recipe, its model cannot be built, or its images have no common size.
    """
    file = next((file for folder in FOLDERS for file in folder.glob("*.yaml") if file.stem == name), None)
    if file is None:
        raise SpecError(name, "", "there is no such recipe", nearest(name, names(), "Try"), code="unknown-choice")
    config = load_config({"base": str(file), **options}, name=name)
    shape = _shape(config)
    if shape is None:
        raise SpecError(name, "data", "its samples have no common shape", "Plan its model", code="missing-shape")
    count = getattr(config.data, "num_classes", None) or _usual_classes(config)
    classes = tuple(map(str, range(sum(config.heads.values()) if config.heads else count)))
    task = create_task(config)
    model = task.build_model(SimpleNamespace(classes=classes, shape=shape))
    return RecipeStep(task.planned(model), shape)


def _shape(config: TrainConfig) -> tuple[int, ...] | None:
    side = getattr(config.data, "img_size", None)
    return None if side is None else (1 if _is_gray(config) else 3, side, side)


def _usual_classes(config: TrainConfig) -> int:
    """Return the usual number of classes of a data set, which is not read."""
    if isinstance(config.data, CocoConfig):
        return 80
    return 10 if _is_gray(config) else 1000


def _is_gray(config: TrainConfig) -> bool:
    return isinstance(config.data, SmallImagesConfig)
