"""What the YAML of a training run may say. Names are timm's wherever it has one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_serializer, field_validator, model_validator
from timm.optim import list_optimizers

from revnets.columns import memory_modes
from revnets.config import Source, Strict, load
from revnets.errors import nearest, problem
from revnets.spec import NetSpec, dump, load_spec

CONFIGS = Path(__file__).parent / "configs"
"""Recipes that come with the package: `revnets train digits` means `configs/digits.yaml`."""


class DigitsConfig(Strict):
    """scikit-learn's handwritten digits: 1797 real images of 8 x 8, enlarged to `img_size`."""

    name: Literal["digits"] = "digits"
    img_size: int = Field(default=16, ge=8, le=128)
    shift: float = Field(default=0.1, ge=0, lt=1)  # largest random shift, as a part of the side
    rotate: float = Field(default=10.0, ge=0, le=180)  # largest random angle, degrees
    scale: float = Field(default=0.1, ge=0, lt=1)  # largest random change of size, as a part of it


class OptimizerConfig(Strict):
    """Arguments of `timm.optim.create_optimizer_v2`. 1-D parameters, and so all gains, get no weight decay."""

    name: str = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # for optimizers that have it
    options: dict[str, Any] = Field(default_factory=dict)  # whatever else this optimizer takes, such as betas and eps

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = [str(item) for item in list_optimizers()]
        if name.lower() not in known:
            raise problem(f"timm has no optimizer {name!r}", nearest(name, known, "It has"))
        return name


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
            raise problem("neither mixup nor cutmix is on", "Give mixup_alpha or cutmix_alpha, or write mixup: null")
        return self


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare `off` as false


class TrainConfig(Strict):
    """A whole training run. Only `model` and `output` are required."""

    model_config = ConfigDict(title="training run")

    model: NetSpec | str = Field(examples=["net.yaml"])  # keys of a net, or the path of its YAML
    output: str = Field(examples=["runs/mine"], min_length=1)  # folder of this run
    data: DigitsConfig = DigitsConfig()
    memory: Annotated[str | tuple[str, ...] | None, BeforeValidator(_as_tuple)] = None
    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=64, ge=1)  # images of one forward pass of one process
    grad_accum: int = Field(default=1, ge=1)  # forward passes per update
    seed: int = Field(default=0, ge=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_grad: float | None = Field(default=None, gt=0)
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    amp: Annotated[Literal["off", "bfloat16", "float16"], BeforeValidator(_off)] = "off"
    ema: EmaConfig | None = None
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: MixupConfig | None = None
    resume: str = "auto"  # auto: go on with the run in `output` if there is one; none; or a checkpoint
    keep: int = Field(default=2, ge=1)  # how many of the last checkpoints stay
    save_every: int | None = Field(default=None, ge=1)  # updates between checkpoints, besides each end of an epoch
    log_every: int = Field(default=10, ge=1)  # updates between lines of the log
    workers: int = Field(default=0, ge=0)  # processes that load images; 0: none besides this one
    device: str = "auto"  # auto: the GPU if there is one

    @field_validator("device")
    @classmethod
    def _is_device(cls, name: str) -> str:
        try:
            if name != "auto":
                torch.device(name)
        except RuntimeError:
            raise problem(f"torch has no device {name!r}", "Give auto, cpu, cuda, cuda:1, ...") from None
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.schedule.warmup_epochs >= self.epochs:
            raise problem(
                f"a warm-up of {self.schedule.warmup_epochs:g} epochs leaves nothing of {self.epochs}",
                "Give fewer, a part of one such as 0.5 will do",
                "schedule",
                "warmup_epochs",
            )
        if self.mixup and self.batch_size % 2:
            raise problem(f"mixup pairs images, and {self.batch_size} is odd", "Give an even number", "batch_size")
        if self.memory is not None and isinstance(self.model, NetSpec):
            try:
                memory_modes(self.memory, self.model.columns)
            except ValueError as error:
                raise problem(str(error), "See docs/yaml.md", "memory") from None
        return self

    @field_serializer("model")
    def _plain_model(self, model: NetSpec | str) -> Any:
        return dump(model) if isinstance(model, NetSpec) else model

    @property
    def net(self) -> NetSpec:
        """The net that is trained, with the memory mode of the run."""
        if not isinstance(self.model, NetSpec):
            raise TypeError(f"model {self.model!r} is a path; read the configuration with load_config")
        return self.model if self.memory is None else self.model.model_copy(update={"memory": self.memory})

    def plain(self) -> dict[str, Any]:
        """The run as plain data that `load_config` accepts, for checkpoints and YAML."""
        return self.model_dump(mode="json")


class _ModelKey(BaseModel):
    """Only looks at what kind of `model` a file has."""

    model: Any = None


def load_config(source: Source, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read and check the configuration of a run.

    Args:
        source: path of a YAML file, name of a recipe of this package, or a mapping of the same form. Where `model` is
            a path, it is relative to the file.
        overrides: `key.path=value` pairs, such as `epochs=5` or `model.columns=8`. A path in `model=` is relative to
            the working directory, where it was typed.

    Raises:
        revnets.SpecError: names the file, the key, the value and the remedy.
    """
    if not isinstance(source, Mapping):
        recipe = CONFIGS / f"{source}.yaml"
        source = recipe if recipe.is_file() and not Path(source).exists() else Path(source)
    inner = [text for text in overrides if text.strip().startswith("model.")]
    outer = [text for text in overrides if text not in inner]
    model = load(_ModelKey, source, outer).model
    if not isinstance(model, str):
        return load(TrainConfig, source, overrides)
    given_here = any(text.strip().startswith("model=") for text in outer)
    folder = Path.cwd() if given_here or isinstance(source, Mapping) else source.parent
    spec = load_spec(folder / model, [text.strip().removeprefix("model.") for text in inner])
    return load(TrainConfig, source, [*outer, f"model={json.dumps(dump(spec))}"])  # JSON is YAML as well
