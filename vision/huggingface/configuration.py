"""The configuration of a RevCol model in transformers: a name of the family, and what differs from it."""

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
"""Of an image or a level; a `config.json` that asks for more is refused before anything is allocated."""

MAX_LABELS = 2**20
"""Classes of a classifier."""


class RevColBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of `RevColBackbone` and `RevColForImageClassification`; `config.json` holds all of it.

    What is None is as in the model of that name.

    Attributes:
        name: of a model of the family, such as `revcol_tiny`.
        num_channels: of the images.
        columns: number of columns.
        dims: channels of each level.
        depths: blocks of each level.
        kernel_size: of the depthwise convolutions; 7 or 13 fit weights that were trained with 3 (appendix D.3.1).
        drop_path_rate: stochastic depth of the last block.
        init: first values of new weights, `paper` or `fast`.
        memory: what is kept for backward: a mode such as `exact`, one for each column, or `{"budget": "2GiB"}`.
        img_size: side of the images in pixels (RevCol-ViT).
        patch_size: of the stem.
        drop_rate: dropout before the classifier.
        head_init_scale: of the classifier's first weights (0.001 for fine-tuning, appendix D.2).
        stage_names: `stage1` for the finest level to `stage4` for the coarsest, as `out_features` names them.

    Raises:
        revnets.SpecError: a value cannot be used, or the parts of this model have no such option.
        ValueError: there is no model of this name, or a list has not one value for each level.
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
        )  # the next line makes a name for each
        super().__post_init__(**kwargs)
        levels = self.spec().levels
        self.hidden_sizes = [level.dim for level in levels]
        _require_bounded("dims", max(self.hidden_sizes), MAX_CHANNELS)
        _require_bounded("num_channels", self.num_channels, MAX_CHANNELS)
        self.stage_names = [f"stage{index + 1}" for index in range(len(levels))]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    def spec(self) -> NetSpec:
        """The network that this configuration describes."""
        if self.name not in variants():
            remedy = nearest(self.name, variants(), "The family has")
            raise ArgumentError(f"there is no model {self.name!r}. {remedy}", "name", code="unknown-model")
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
        raise ArgumentError(f"{key}: {size} is not in {least} ... {most}", key, code="out-of-range")


def configuration_of(model: RevCol, classes: Sequence[str] | None = None) -> RevColBackboneConfig:
    """The configuration of a model of timm.

    Args:
        classes: names of its classes, in order.

    Raises:
        ValueError: there are more or fewer names than classes, or no configuration describes the model: it lost
            levels, or its spec has been changed by hand.
    """
    spec, levels = model.spec, model.spec.levels
    if model.levels != len(levels):
        raise ArgumentError(f"the model has {model.levels} of its {len(levels)} levels", "model", code="no-spec")
    if classes is not None and len(classes) != model.num_classes:
        text = f"{len(classes)} names for {model.num_classes} classes"
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
        problem = "the model differs from its architecture in more than a configuration holds"
        raise ArgumentError(problem, "model", code="no-spec")
    return config


def _modes(memory: Any) -> Any:
    """The memory of a spec as `config.json` can hold it."""
    if isinstance(memory, BudgetSpec):
        return memory.model_dump(mode="json", exclude_unset=True)
    return [str(mode) for mode in memory] if isinstance(memory, tuple) else str(memory)
