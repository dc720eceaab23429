"""The configuration of a RevCol model in transformers: the name of a model and the options that differ from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from revnets import NetSpec
from revnets.config.errors import ArgumentError, nearest
from revnets.config.memory_budget import BudgetSpec
from vision.revcol import load_variant, variants

if TYPE_CHECKING:
    from vision.models.architecture import RevCol

MAX_CHANNELS = 2**16
"""Maximum channels of an image or a level. A `config.json` with more is refused before memory is allocated."""

MAX_LABELS = 2**20
"""Maximum number of classes of a classifier."""


class RevColBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of `RevColBackbone` and `RevColForImageClassification`, which `config.json` stores completely.

    Options that are None are those of the named model.

    Attributes:
        name: Name of a RevCol model, such as `revcol_tiny`.
        num_channels: Channels of the images.
        columns: Number of columns.
        dims: Channels of each level.
        depths: Number of blocks of each level.
        kernel_size: Kernel size of the depthwise convolutions. Weights that were trained with 3 are padded to 7 or 13
            (appendix D.3.1).
        drop_path_rate: Stochastic depth rate of the last block.
        init: Initialization of new weights, `paper` or `fast`.
        memory: Memory mode such as `exact`, one for each column, or `{"budget": "2GiB"}`.
        img_size: Side of the images in pixels (RevCol-ViT).
        patch_size: Patch size of the stem.
        drop_rate: Dropout rate before the classifier.
        head_init_scale: Scale of the initial weights of the classifier (0.001 for fine-tuning, appendix D.2).
        stage_names: Names for `out_features`, from `stage1` for the finest level to `stage4` for the coarsest.

    Raises:
        revnets.SpecError: If a value is invalid, or the components of this model do not have the option.
        ValueError: If the model does not exist, or a list does not have one value for each level.
    """

    model_type = "revcol"

    name: str = "revcol_tiny"
    num_channels: int = 3
    columns: int | None = None
    dims: list[int] | None = None
    depths: list[int] | None = None
    kernel_size: int | None = None
    drop_path_rate: float | None = None
    init: str | None = None
    memory: Any = None
    img_size: int | None = None
    patch_size: int | None = None
    drop_rate: float = 0.0
    head_init_scale: float = 1.0

    def __post_init__(self, **kwargs: Any):
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        _require_bounded(
            "num_labels", kwargs.get("num_labels"), MAX_LABELS, least=0
        )  # the next line creates a name for each
        super().__post_init__(**kwargs)
        levels = self.spec().levels
        self.hidden_sizes = [level.dim for level in levels]
        _require_bounded("dims", max(self.hidden_sizes), MAX_CHANNELS)
        _require_bounded("num_channels", self.num_channels, MAX_CHANNELS)
        self.stage_names = [f"stage{index + 1}" for index in range(len(levels))]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    def spec(self) -> NetSpec:
        """Return the specification of the network that this configuration describes."""
        if self.name not in variants():
            hint = nearest(self.name, variants(), "Choose one of")
            raise ArgumentError(f"there is no model {self.name!r}. {hint}", "name", code="unknown-model")
        return load_variant(
            self.name,
            columns=self.columns,
            dims=self.dims,
            depths=self.depths,
            kernel_size=self.kernel_size,
            drop_path_rate=self.drop_path_rate,
            init=self.init,
            memory=self.memory,
            img_size=self.img_size,
            patch_size=self.patch_size,
        )


def _require_bounded(key: str, size: int | None, most: int, least: int = 1) -> None:
    if size is not None and not least <= size <= most:
        raise ArgumentError(f"{key} is {size}, but must be from {least} to {most}", key, code="out-of-range")


def configuration_of(model: RevCol, classes: Sequence[str] | None = None) -> RevColBackboneConfig:
    """Return the configuration of a RevCol of timm.

    Args:
        model: The model.
        classes: Names of its classes, in order.

    Raises:
        ValueError: If the number of names differs from that of the classes, or no configuration describes the model,
            because levels were removed or its spec was modified.
    """
    spec, levels = model.spec, model.spec.levels
    if model.levels != len(levels):
        problem = f"the model has only {model.levels} of its {len(levels)} levels"
        raise ArgumentError(problem, "model", code="no-spec")
    if classes is not None and len(classes) != model.num_classes:
        text = f"there are {len(classes)} names for {model.num_classes} classes"
        raise ArgumentError(text, "classes", code="wrong-length")
    labels: dict[str, Any] = {"num_labels": model.num_classes}
    if classes is not None:
        labels |= {
            "id2label": dict(enumerate(classes)),
            "label2id": {name: index for index, name in enumerate(classes)},
        }
    config = RevColBackboneConfig(
        name=model.pretrained_cfg["architecture"],
        num_channels=model.in_chans,
        columns=spec.columns,
        dims=[level.dim for level in levels],
        depths=[level.depth for level in levels],
        kernel_size=levels[0].options.get("kernel_size"),
        drop_path_rate=spec.drop_path or None,
        init=None if spec.init == "paper" else spec.init,
        memory=_modes(spec.memory),
        img_size=spec.stem.options.get("img_size"),
        patch_size=spec.stem.options.get("patch"),
        drop_rate=model.drop_rate,
        head_init_scale=model.head_init_scale,
        **labels,
    )
    if config.spec() != spec:
        problem = "the model differs from its architecture in options that a configuration cannot store"
        raise ArgumentError(problem, "model", code="no-spec")
    return config


def _modes(memory: Any) -> Any:
    """Return the memory modes or budget of a spec as plain data for `config.json`."""
    if isinstance(memory, BudgetSpec):
        return memory.model_dump(mode="json", exclude_unset=True)
    return [str(mode) for mode in memory] if isinstance(memory, tuple) else str(memory)
