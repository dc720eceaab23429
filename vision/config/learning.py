"""Schemas of the parts of a run: optimizer, schedule, weights, mixup, pipeline, supervision, models of libraries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from timm.optim import list_optimizers

from revnets.config.errors import ArgumentError, nearest, problem, what
from revnets.config.loader import Strict, UserPath

Weights = Annotated[
    float | tuple[float, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]

HeadName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$", max_length=64)]
Heads = Annotated[dict[HeadName, Annotated[int, Field(ge=2, le=10**6)]], Field(min_length=1, max_length=1000)]
"""Sets of classes of one model: number of classes by name."""

DECAY: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "constant": lambda x: 1.0,
}
"""Decay of the weight of reconstruction along the heads, from x = 0 at the first to 1 at the last."""

GROWTH: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "constant": lambda x: 1.0,
}
"""Growth of the weight of classification along the heads."""


class OptimizerConfig(Strict):
    """Arguments of `timm.optim.create_optimizer_v2`. 1-D parameters, which include all gains, have no weight decay."""

    name: str = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    lr_base_size: int | None = Field(default=None, ge=1)  # images per update that lr, warmup_lr and min_lr are for
    weight_decay: float = Field(default=0.05, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # for optimizers with momentum
    layer_decay: float | None = Field(default=None, gt=0, le=1)  # of the learning rate, by depth, for fine-tuning
    backbone_lr_scale: float = Field(default=1.0, gt=0, le=1)  # learning rate of a backbone relative to its heads
    options: dict[str, Any] = Field(default_factory=dict)  # other arguments of the optimizer, such as betas and eps

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = [str(item) for item in list_optimizers()]
        if name.lower() not in known:
            raise problem(f"timm has no optimizer {name!r}", nearest(name, known, "It has"), code="unknown-choice")
        return name

    def lr_factor(self, images: int) -> float:
        """Factor of the learning rates for this many images per update: the linear scaling rule."""
        return 1.0 if self.lr_base_size is None else images / self.lr_base_size


REPLACED_BY = {"warmup_updates": "warmup_epochs", "warmup_ratio": "warmup_lr"}
"""Keys of a schedule, and the key that each replaces where it is given."""

USED_BY = {"power": ("poly",), "milestones": ("step",), "decay_rate": ("step",), "min_lr": ("cosine", "poly")}
"""Keys of a schedule that only schedules of these names use."""

CLEARABLE = (*REPLACED_BY.values(), *USED_BY)
"""Keys of a schedule that may be null, which means the same as to omit them."""


def unused_keys(schedule: Mapping[str, Any]) -> set[str]:
    """Keys at their defaults, or absent, that a schedule does not use."""
    fields = ScheduleConfig.model_fields
    name = schedule.get("name", fields["name"].default)
    unused = {other for key, other in REPLACED_BY.items() if schedule.get(key) is not None}
    unused |= {key for key, names in USED_BY.items() if name not in names}
    return {key for key in unused if _plain(schedule.get(key, fields[key].default)) == _plain(fields[key].default)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class ScheduleConfig(Strict):
    """The learning rate of every update: a linear warm-up, then the schedule `name`."""

    name: Literal["cosine", "poly", "step", "constant"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_updates: int | None = Field(default=None, ge=0)  # replaces warmup_epochs
    warmup_lr: float = Field(default=1e-6, ge=0)  # rate at the start of the warm-up
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)  # warmup_lr / lr, replaces warmup_lr
    min_lr: float = Field(default=1e-6, ge=0)  # rate at the end of cosine and poly
    power: float = Field(default=1.0, gt=0)  # poly: min_lr + (lr - min_lr) * (1 - progress) ** power
    milestones: tuple[float, ...] = ()  # step: epochs (or updates, in a run with `updates`) after which lr falls
    decay_rate: float = Field(default=0.1, gt=0, le=1)  # step: factor of lr at each milestone

    @field_validator("milestones", mode="before")
    @classmethod
    def _sequence(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, other in REPLACED_BY.items():
            if other in self.model_fields_set and getattr(self, key) is not None:
                text = f"{getattr(self, key):g}, but {other}: {getattr(self, other):g} sets the same in another unit"
                raise problem(text, "Give one of the two, or set one to null", key, code="conflicting-values")
        for key in unused_keys({"name": self.name}):
            if key in self.model_fields_set:
                hint = f"Remove the key, set it to null, or set name: {' or '.join(USED_BY[key])}"
                raise problem(f"the schedule {self.name} does not use it", hint, key, code="conflicting-values")
        if self.name == "step":
            if not self.milestones:
                hint = "Give the epochs after which the rate falls, as in [27, 33]"
                raise problem("this key is missing", hint, "milestones", code="missing-key")
            if not all(low < high for low, high in pairwise((0.0, *self.milestones))):
                text = f"{list(self.milestones)} is not an increasing list of positive numbers"
                raise problem(text, "Give the milestones in order", "milestones", code="out-of-range")
        return self

    def require_below(self, lr: float) -> None:
        """Require that the rate falls from `lr` to `min_lr`, where the schedule uses `min_lr`.

        Raises:
            PydanticCustomError: `min_lr` is above `lr`.
        """
        if self.name in USED_BY["min_lr"] and self.min_lr > lr:
            text = f"{self.min_lr:g} is above optimizer.lr, which is {lr:g}"
            raise problem(text, f"Give at most {lr:g}", "schedule", "min_lr", code="conflicting-values")

    def require_length(self, epochs: int, updates: int | None) -> None:
        """Require that the warm-up and the milestones end before the run does.

        Args:
            epochs: Length of the run where `updates` is None.
            updates: Length of the run.

        Raises:
            PydanticCustomError: If the warm-up or a milestone is not within the run.
        """
        length, unit = (epochs, "epochs") if updates is None else (updates, "updates")
        key = f"warmup_{unit}"
        if (getattr(self, key) or 0) >= length:
            text = f"a warm-up of {getattr(self, key):g} {unit} is not shorter than the run of {length}"
            hint = f"Give less than {length}" + ", such as 0.5" * (unit == "epochs")
            raise problem(text, hint, "schedule", key, code="conflicting-values")
        if self.milestones and self.milestones[-1] >= length:
            text = f"the milestone {self.milestones[-1]:g} is not within the run of {length} {unit}"
            hint = f"Give milestones below {length}"
            raise problem(text, hint, "schedule", "milestones", code="conflicting-values")


class EmaConfig(Strict):
    """A moving average of the weights (`timm.utils.ModelEmaV3`), which is evaluated as well."""

    decay: float = Field(default=0.9999, gt=0, lt=1)
    warmup: bool = True  # start with a smaller decay


class PretrainedConfig(Strict):
    """Initial weights of a new run, for fine-tuning. A resumed run ignores them."""

    source: UserPath = Field(min_length=1, examples=["revcol_base_22k.pth"])  # a file, a run, or a timm model
    weights: Literal["raw", "ema"] = "raw"  # which weights of a checkpoint that has both
    head: Literal["auto", "new"] = "auto"  # auto: use the file's classifier if its classes are those of the data
    head_init_scale: float = Field(default=1e-3, ge=0)  # factor of the initial weights of a new classifier


class MixupConfig(Strict):
    """Arguments of `timm.data.Mixup`."""

    mixup_alpha: float = Field(default=0.0, ge=0)
    cutmix_alpha: float = Field(default=0.0, ge=0)
    prob: float = Field(default=1.0, gt=0, le=1)
    switch_prob: float = Field(default=0.5, ge=0, le=1)  # probability of cutmix where both are on
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


class PipelineConfig(Strict):
    """How a pipeline divides the columns among the processes, and the schedule of its stages."""

    schedule: Literal["1f1b", "gpipe"] = "1f1b"  # of torch.distributed.pipelining; gpipe holds all micro-batches
    balance: Literal["flops", "bytes", "cells"] = "flops"  # what is divided evenly among the stages


class Stop(NamedTuple):
    """A column whose output has losses."""

    column: int  # from 0
    alpha: float  # weight of reconstruction; 0: no decoder
    beta: float  # weight of classification; 0: no classifier


class SupervisionConfig(Strict):
    """Columns with intermediate heads, and the weights of their losses. The defaults are the paper's."""

    heads: int = Field(default=4, ge=1)  # columns with losses, including the last column
    alpha: Weights = 3.0  # of reconstruction: weight of the first head, or one weight per head
    beta: Weights = 0.7  # of classification: upper end before the last head, whose weight is 1; or one weight per head
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # how a single weight changes along the heads
    decoder: Literal["auto", "staged", "single"] = "auto"  # auto: staged for at most 1000 classes

    @model_validator(mode="after")
    def _usable(self) -> Self:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 0:
                raise problem(f"{value} includes a negative weight", "Give at least 0", name, code="out-of-range")
            if isinstance(value, tuple) and len(value) != self.heads:
                raise problem(
                    f"{len(value)} weights for {self.heads} heads",
                    "Give one number, or one per head",
                    name,
                    code="wrong-length",
                )
        if isinstance(self.beta, tuple) and self.beta[-1] == 0:
            raise problem(
                "the last weight is 0, so the model's classifier would not be trained",
                "Give a positive last weight",
                "beta",
                code="out-of-range",
            )
        return self

    def stops(self, columns: int) -> list[Stop]:
        """The heads of a model with this many columns, in order.

        They are evenly spaced, and the last one is at the last column. A model with fewer columns than heads has one
        head per column.

        Raises:
            ArgumentError: If there is a weight for each head, but the model has fewer columns.
        """
        heads = min(self.heads, columns)
        alphas, betas = self.alpha, self.beta
        if not isinstance(alphas, tuple):
            alphas = *(alphas * DECAY[self.schedule](head / (heads - 1)) for head in range(heads - 1)), 0.0
        if not isinstance(betas, tuple):
            betas = *(betas * GROWTH[self.schedule]((head + 1) / heads) for head in range(heads - 1)), 1.0
        if not len(alphas) == len(betas) == heads:
            raise ArgumentError(
                f"weights for {self.heads} heads, but the model has {columns} columns. Give one number",
                "heads",
                code="wrong-length",
            )
        ends = [(2 * columns * (head + 1) + heads) // (2 * heads) for head in range(heads)]
        return [Stop(end - 1, alpha, beta) for end, alpha, beta in zip(ends, alphas, betas, strict=True)]


class LibraryModel(BaseModel):
    """A model of another library. All keys except its name are arguments of the model."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TimmModel(LibraryModel):
    """A model of timm's registry, which includes the RevCol family."""

    timm: str

    @field_validator("timm")
    @classmethod
    def _known(cls, name: str) -> str:
        import timm

        if not timm.is_model(name):
            raise problem(
                f"timm has no model {name!r}", nearest(name, timm.list_models(), "It has"), code="unknown-model"
            )
        return name


class TransformersModel(LibraryModel):
    """A language model of transformers by its type, such as gpt2, with arguments of its configuration."""

    hf: str


LIBRARIES = {"timm": (TimmModel, "revcol_tiny"), "hf": (TransformersModel, "gpt2")}
"""Model classes by the key that holds the model's name, each with an example."""


def read_model(value: Any, info: ValidationInfo) -> Any:
    """Validate the key `model`: a path that `load_config` has read, a model of a library, or a specification."""
    if isinstance(value, str):
        return (info.context or {}).get("net", value)
    library = next((key for key in LIBRARIES if isinstance(value, dict) and key in value), None)
    if library is None:
        return value
    kind, example = LIBRARIES[library]
    if not isinstance(value[library], str):
        hint = f"Give the name of a model, such as {example}"
        raise problem(what(value[library]), hint, library, code="wrong-type")
    return kind(**value)
