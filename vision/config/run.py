"""Schema of the YAML of a training run. Names are timm's where timm has one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from revnets.config import memory_modes
from revnets.config.errors import PartError, SpecError, nearest, problem, what
from revnets.config.imports import foreign_file, imported
from revnets.config.loader import Source, Strict, UserPath, read_layers
from revnets.config.memory_budget import BudgetSpec
from revnets.config.net_spec import Modes, NetSpec, dump, load_spec
from revnets.config.overrides import apply_overrides
from vision.config.data import DataConfig, DigitsConfig, ImagesConfig, SourcesConfig
from vision.config.heads import require_heads
from vision.config.learning import (
    CLEARABLE,
    EmaConfig,
    Heads,
    LibraryModel,
    MixupConfig,
    OptimizerConfig,
    PipelineConfig,
    PretrainedConfig,
    ScheduleConfig,
    SupervisionConfig,
    TimmModel,
    TransformersModel,
    read_model,
    unused_keys,
)
from vision.paths import FOLDERS

MAX_COUNT = 2**31 - 1
"""Bound of epochs, images and updates. Tensors and ranges can hold it."""


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare `off` as false


def _none_if_off(value: Any) -> Any:
    return None if value is False else value  # `off` and `no`, as for `amp`


def _path_or_none(value: Any) -> Any:
    return "none" if value is False else value


Off = BeforeValidator(_none_if_off)
"""Marks a key that is off by default and also accepts `off` and `no`."""


FSDP = "Set parallel: fsdp"

TASKS = {
    "classification": "vision.tasks.classification:Classification",
    "object_detection": "vision.tasks.object_detection:ObjectDetection",
    "semantic_segmentation": "vision.tasks.semantic_segmentation:SemanticSegmentation",
}
"""Import paths of the built-in tasks."""


def _task(value: Any, info: ValidationInfo) -> Any:
    name = value.get("type") if isinstance(value, dict) else value
    if not isinstance(name, str):
        remedy = f"Give {', '.join(TASKS)}, package.module:Class, or {{type: package.module:Class, option: value}}"
        raise problem(what(value), remedy)
    if name in TASKS:
        return value
    if ":" not in name:
        raise problem(f"unknown task {name!r}", nearest(name, list(TASKS), "Give package.module:Class, or one of"))
    context = info.context or {}
    try:
        imported("task", name, context.get("folders", ()), context.get("trust", True))
    except PartError as error:
        raise problem(error.problem, error.remedy, code=error.code) from None
    return value


class TrainConfig(Strict):
    """A training run. Only `model` and `output` are required."""

    model_config = ConfigDict(title="training run")

    # keys of a model, the path of its YAML, {timm: name, argument: value, ...}, or for text {hf: type, ...}
    model: Annotated[NetSpec | TimmModel | TransformersModel | str, BeforeValidator(read_model)] = Field(
        examples=["net.yaml"]
    )
    output: UserPath = Field(examples=["runs/mine"], min_length=1)  # directory of this run
    # a key of TASKS or package.module:Class, or {type: name, option: value, ...}
    task: Annotated[str | dict[str, Any], BeforeValidator(_task)] = "classification"
    data: DataConfig = DigitsConfig()
    heads: Annotated[Heads | None, Off] = None  # number of classes by name, of a model with several sets of classes
    pretrained: Annotated[PretrainedConfig | None, Off] = None  # initial weights of a new run
    memory: Modes | None = None  # memory mode of the columns, one per column, or {budget: 24GiB}
    epochs: int = Field(default=30, ge=1, le=MAX_COUNT)
    updates: Annotated[int | None, Off] = Field(default=None, ge=1, le=MAX_COUNT)  # length of the run, replaces epochs
    batch_size: int = Field(default=64, ge=1, le=MAX_COUNT)  # images per process and forward pass
    grad_accum: int = Field(default=1, ge=1, le=MAX_COUNT)  # forward passes per update
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_grad: Annotated[float | None, Off] = Field(default=None, gt=0)
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    amp: Annotated[Literal["off", "bfloat16", "float16"], BeforeValidator(_off)] = "off"
    channels_last: bool = False
    compile: Annotated[str | None, Off] = None  # backend of torch.compile for the cells, such as inductor
    parallel: Literal["ddp", "fsdp", "pipeline"] = "ddp"  # how several processes train one model
    pipeline: Annotated[PipelineConfig | None, Off] = None  # with parallel: pipeline; null for the defaults
    ema: Annotated[EmaConfig | None, Off] = None
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: Annotated[MixupConfig | None, Off] = None
    supervision: Annotated[SupervisionConfig | None, Off] = None  # losses at some columns of a RevCol
    resume: Annotated[UserPath, BeforeValidator(_path_or_none)] = (
        "auto"  # auto: resume the run in `output` if there is one; none; or a checkpoint
    )
    checkpoint: Literal["full", "sharded"] = "full"  # one file, or with fsdp one per process
    keep: int = Field(default=2, ge=1, le=MAX_COUNT)  # number of latest checkpoints to keep
    save_every: Annotated[int | None, Off] = Field(default=None, ge=1, le=MAX_COUNT)  # updates between checkpoints
    log_every: int = Field(default=10, ge=1, le=MAX_COUNT)  # updates between lines of the log
    workers: int = Field(default=0, ge=0, le=1024)  # processes per rank that load images; 0 loads in the main process
    device: str = "auto"  # auto: the GPU if there is one

    @field_validator("device")
    @classmethod
    def _is_device(cls, name: str) -> str:
        try:
            if name != "auto":
                torch.device(name)
        except (RuntimeError, ValueError, TypeError):
            raise problem(
                f"torch has no device {name!r}", "Give auto, cpu, cuda, cuda:1, ...", code="unknown-choice"
            ) from None
        return name

    @field_validator("compile")
    @classmethod
    def _is_backend(cls, name: str | None) -> str | None:
        if name is not None and name not in (known := torch.compiler.list_backends(exclude_tags=())):
            raise problem(
                f"torch.compile has no backend {name!r}", nearest(name, known, "It has"), code="unknown-choice"
            )
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.heads is not None or not isinstance(self.data, DigitsConfig):
            require_heads(self.data, self.heads)
        if self.updates is not None and "epochs" in self.model_fields_set:
            text = f"{self.epochs} epochs, but updates: {self.updates} sets the length of the run as well"
            raise problem(text, "Remove one of them, or set it to null", "epochs", code="conflicting-values")
        self.schedule.require_length(self.epochs, self.updates)
        self.schedule.require_below(self.optimizer.lr)
        if self.mixup and self.batch_size % 2:
            text = f"mixup pairs images, but {self.batch_size} is odd"
            raise problem(text, "Give an even number", "batch_size", code="conflicting-values")
        if isinstance(self.memory, (str, tuple)) and isinstance(self.model, NetSpec):
            try:
                memory_modes(self.memory, self.model.columns)
            except ValueError as error:
                raise problem(str(error), "See docs/reference/yaml.md", "memory", code="conflicting-values") from None
        if self.checkpoint == "sharded" and self.parallel != "fsdp":
            raise problem(
                "sharded checkpoints need fsdp",
                "Set parallel: fsdp, or checkpoint: full",
                "checkpoint",
                code="conflicting-values",
            )
        if self.parallel == "pipeline":
            self._require_pipeline()
        elif self.pipeline is not None:
            hint = "Set parallel: pipeline, or remove the key"
            raise problem("the run uses no pipeline", hint, "pipeline", code="conflicting-values")
        if self.clip_mode == "agc" and self.parallel == "fsdp":
            raise problem(
                "agc needs whole weights, but fsdp shards them",
                "Give norm or value",
                "clip_mode",
                code="conflicting-values",
            )
        if self.supervision is not None and not isinstance(self.model, TimmModel):
            hint = "Give a RevCol of timm, as in {timm: revcol_tiny}"
            raise problem(
                "only RevCol models of timm support heads at their columns",
                hint,
                "supervision",
                code="conflicting-values",
            )
        return self

    def _require_pipeline(self) -> None:
        """Refuse what a pipeline does not support."""
        conflicts = {
            "memory": (isinstance(self.memory, BudgetSpec), "a pipeline supports no memory budget", "Give exact"),
            "supervision": (self.supervision is not None, "a pipeline supports no supervision", "Remove the key"),
            "task": (self.task_and_options[0] != "classification", "a pipeline supports classification only", FSDP),
            "heads": (self.heads is not None, "a pipeline supports one set of classes only", FSDP),
            "amp": (self.amp == "float16", "each stage of a pipeline would scale its own loss", "Give bfloat16"),
            "data": (self.batch_is_stream, "each stage of a pipeline would read other images of a stream", FSDP),
        }
        for key, (is_given, text, hint) in conflicts.items():
            if is_given:
                raise problem(text, hint, key, code="conflicting-values")

    @field_serializer("model")
    def _plain_model(self, model: NetSpec | TimmModel | TransformersModel | str) -> Any:
        if isinstance(model, LibraryModel):
            return model.model_dump()
        return dump(model) if isinstance(model, NetSpec) else model

    @property
    def net(self) -> NetSpec:
        """The specification of the model, with the memory mode of the run.

        Raises:
            TypeError: If the model is of another library, or still a path.
        """
        if not isinstance(self.model, NetSpec):
            raise TypeError(f"model {self.model!r} is not a specification. Use load_config, which reads paths")
        return self.model if self.memory is None else self.model.model_copy(update={"memory": self.memory})

    @property
    def task_and_options(self) -> tuple[str, dict[str, Any]]:
        """The name or import path of the task, and its options."""
        if isinstance(self.task, str):
            return self.task, {}
        options = dict(self.task)
        return options.pop("type"), options

    @property
    def batch_is_stream(self) -> bool:
        """Whether the training set is read sequentially, so that its order depends on workers and processes."""
        return isinstance(self.data, (ImagesConfig, SourcesConfig)) and self.data.is_stream

    def total_updates(self, of_epoch: int) -> int:
        """Updates of the whole run.

        Args:
            of_epoch: Updates per epoch.
        """
        return self.epochs * of_epoch if self.updates is None else self.updates

    def plain(self) -> dict[str, Any]:
        """The run configuration as plain data that `load_config` accepts, for checkpoints and YAML.

        Keys that another key replaces are omitted, because `load_config` refuses both together.
        """
        return without_unused(self.model_dump(mode="json"))


def load_config(
    source: Source, overrides: Sequence[str] = (), *, trust: bool = True, name: str = "dict"
) -> TrainConfig:
    """Read and validate a run configuration.

    Args:
        source: Path of a YAML file, name of a recipe of this package, or a mapping of the same form. A path in `model`
            is relative to the file.
        overrides: `key.path=value` pairs, such as `epochs=5` or `model.columns=8`. A path in `model=` is relative to
            the working directory.
        trust: Whether the configuration may name classes of other projects, whose modules are imported and so
            executed. An untrusted mapping cannot name files either.
        name: Of a mapping, for error messages.

    Raises:
        revnets.SpecError: If a value is missing or wrong; names the file, the key, the value and a hint.
    """
    if isinstance(source, Mapping) and not trust:
        for key in ("base", "model"):
            if isinstance(source.get(key), str):
                raise foreign_file(name, key)
    if not isinstance(source, Mapping):
        source = _file_of(Path(os.path.expanduser(str(source))))
    inner = [text for text in overrides if text.strip().startswith("model.")]
    outer = [text for text in overrides if text not in inner]
    layers = read_layers(source, name)
    config = layers.copy()
    apply_overrides(config, outer)
    model = config.data.get("model")
    if not isinstance(model, str):
        apply_overrides(layers, overrides)
        _drop_nulls(layers.data)
        return layers.check(TrainConfig, trust=trust)
    _drop_nulls(config.data)
    given_here = any(text.strip().startswith("model=") for text in outer)
    folder = Path.cwd() if given_here or isinstance(source, Mapping) else source.parent
    words = [text.strip().removeprefix("model.") for text in inner]
    spec = load_spec(folder / os.path.expanduser(model), words, trust=trust)
    return config.check(TrainConfig, net=spec, trust=trust)


def without_unused(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without keys that are at their defaults and replaced by another key.

    Checkpoints of earlier versions contain all keys, and `load_config` treats a key that is present as set by the user.
    """
    config = dict(config)
    if config.get("updates") and config.get("epochs") == TrainConfig.model_fields["epochs"].default:
        del config["epochs"]
    if isinstance(config.get("schedule"), Mapping):
        unused = unused_keys(config["schedule"])
        config["schedule"] = {key: value for key, value in config["schedule"].items() if key not in unused}
    return config


def _drop_nulls(data: dict[str, Any]) -> None:
    """Remove, in place, keys that are null. An override or a file can thus reset a key of its base file."""
    schedule = data.get("schedule")
    for place, keys in ((data, ("epochs",)), (schedule, CLEARABLE)):
        for key in keys:
            if isinstance(place, dict) and key in place and place[key] is None:
                del place[key]


def _file_of(path: Path) -> Path:
    """The path itself, or the file of the recipe of that name.

    Raises:
        revnets.SpecError: If there is no such file or recipe.
    """
    recipes = {file.stem: file for folder in FOLDERS for file in folder.glob("*.yaml")}
    if path.suffix or path.parent != Path(".") or (os.path.exists(path) and not os.path.isdir(path)):
        return path
    if str(path) not in recipes:
        remedy = nearest(str(path), sorted(recipes), "Recipes are")
        raise SpecError(str(path), "", "there is no such file or recipe", remedy, code="missing-file")
    return recipes[str(path)]
