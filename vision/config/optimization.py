"""Optimizer, schedule, averaged and pretrained weights, mixup, as the YAML of a training run names them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from timm.optim import list_optimizers

from revnets.config.errors import nearest, problem
from revnets.config.loader import Strict, UserPath


class OptimizerConfig(Strict):
    """Arguments of `timm.optim.create_optimizer_v2`. 1-D parameters, and so all gains, get no weight decay."""

    name: str = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    lr_base_size: int | None = Field(default=None, ge=1)  # lr, warmup_lr and min_lr are for updates of so many images
    weight_decay: float = Field(default=0.05, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # for optimizers that have it
    layer_decay: float | None = Field(default=None, gt=0, le=1)  # of the learning rate, by depth, for fine-tuning
    options: dict[str, Any] = Field(default_factory=dict)  # whatever else this optimizer takes, such as betas and eps

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = [str(item) for item in list_optimizers()]
        if name.lower() not in known:
            raise problem(f"timm has no optimizer {name!r}", nearest(name, known, "It has"), code="unknown-choice")
        return name

    def lr_factor(self, images: int) -> float:
        """By what learning rates are multiplied for updates of so many images: the linear scaling rule."""
        return 1.0 if self.lr_base_size is None else images / self.lr_base_size


class ScheduleConfig(Strict):
    """The learning rate, set anew before every update: linear warm-up, then `name`."""

    name: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_lr: float = Field(default=1e-6, ge=0)  # where the warm-up begins
    min_lr: float = Field(default=1e-6, ge=0)  # where the cosine ends


class EmaConfig(Strict):
    """A moving average of the weights (`timm.utils.ModelEmaV3`), evaluated beside them."""

    decay: float = Field(default=0.9999, gt=0, lt=1)
    warmup: bool = True  # begin with a small decay


class PretrainedConfig(Strict):
    """Weights that a new run begins with, for fine-tuning; a run that is resumed has its own."""

    source: UserPath = Field(min_length=1, examples=["revcol_base_22k.pth"])  # a file, a run, or a name of timm's
    weights: Literal["raw", "ema"] = "raw"  # of a checkpoint that has both
    head: Literal["auto", "new"] = "auto"  # auto: the file's classifier, if it is for the classes of the data
    head_init_scale: float = Field(default=1e-3, ge=0)  # by which a new classifier's first weights are multiplied


class MixupConfig(Strict):
    """Arguments of `timm.data.Mixup`."""

    mixup_alpha: float = Field(default=0.0, ge=0)
    cutmix_alpha: float = Field(default=0.0, ge=0)
    prob: float = Field(default=1.0, gt=0, le=1)
    switch_prob: float = Field(default=0.5, ge=0, le=1)  # how often cutmix, where both are on
    mode: Literal["batch", "pair", "elem"] = "batch"

    @model_validator(mode="after")
    def _mixes(self) -> Self:
        if self.mixup_alpha == self.cutmix_alpha == 0:
            raise problem(
                "neither mixup nor cutmix is on",
                "Give mixup_alpha or cutmix_alpha, or write mixup: null",
                code="missing-key",
            )
        return self
