"""What the YAML of a training run may say. Names are timm's wherever it has one."""

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
from vision.config.data import DataConfig, DigitsConfig, ImagesConfig, SourcesConfig
from vision.config.heads import require_heads
from vision.config.learning import (
    CLEARABLE,
    EmaConfig,
    Heads,
    MixupConfig,
    OptimizerConfig,
    PipelineConfig,
    PretrainedConfig,
    ScheduleConfig,
    SupervisionConfig,
    unused_keys,
)
from vision.config.library_models import LibraryModel, TimmModel, TransformersModel, read_model
from vision.paths import FOLDERS

MAX_COUNT = 2**31 - 1
"""Bound of epochs, images and updates, which tensors and ranges can still hold."""


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare `off` as false


def _none_if_off(value: Any) -> Any:
    return None if value is False else value  # `off` and `no`, as for `amp`


def _path_or_none(value: Any) -> Any:
    return "none" if value is False else value


Off = BeforeValidator(_none_if_off)
"""For what is off if it is not given: it may also be switched off in words."""


TASKS = {
    "classification": "vision.tasks.classification:Classification",
    "object_detection": "vision.tasks.object_detection:ObjectDetection",
    "semantic_segmentation": "vision.tasks.semantic_segmentation:SemanticSegmentation",
}
"""Import paths of the tasks that have a name."""


def _task(value: Any, info: ValidationInfo) -> Any:
    name = value.get("type") if isinstance(value, dict) else value
    if not isinstance(name, str):
        remedy = f"Give {', '.join(TASKS)}, package.module:Class, or {{type: package.module:Class, option: value}}"
        raise problem(what(value), remedy)
    if name in TASKS:
        return value
    if ":" not in name:
        raise problem(
            f"there is no task {name!r}", nearest(name, list(TASKS), "Give package.module:Class, or choose among")
        )
    context = info.context or {}
    try:
        imported("task", name, context.get("folders", ()), context.get("trust", True))
    except PartError as error:
        raise problem(error.problem, error.remedy, code=error.code) from None
    return value


class TrainConfig(Strict):
    """A whole training run. Only `model` and `output` are required."""

    model_config = ConfigDict(title="training run")

    # keys of a net, the path of its YAML, or {timm: name, argument: value, ...}; for texts {hf: type, ...}
    model: Annotated[NetSpec | TimmModel | TransformersModel | str, BeforeValidator(read_model)] = Field(
        examples=["net.yaml"]
    )
    output: UserPath = Field(examples=["runs/mine"], min_length=1)  # folder of this run
    # what is learned: a name out of TASKS or package.module:Class, or {type: name, option: value, ...}
    task: Annotated[str | dict[str, Any], BeforeValidator(_task)] = "classification"
    data: DataConfig = DigitsConfig()
    heads: Annotated[Heads | None, Off] = None  # number of classes by the name of each of several sets of classes
    pretrained: Annotated[PretrainedConfig | None, Off] = None  # what a new run begins with instead of random weights
    memory: Modes | None = None  # memory mode of the columns, one per column, or {budget: 24GiB}
    epochs: int = Field(default=30, ge=1, le=MAX_COUNT)
    updates: Annotated[int | None, Off] = Field(default=None, ge=1, le=MAX_COUNT)  # length of the run instead of epochs
    batch_size: int = Field(default=64, ge=1, le=MAX_COUNT)  # images of one forward pass of one process
    grad_accum: int = Field(default=1, ge=1, le=MAX_COUNT)  # forward passes per update
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_grad: Annotated[float | None, Off] = Field(default=None, gt=0)
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    amp: Annotated[Literal["off", "bfloat16", "float16"], BeforeValidator(_off)] = "off"
    channels_last: bool = False
    compile: Annotated[str | None, Off] = None  # compile the cells with this backend of torch.compile, such as inductor
    parallel: Literal["ddp", "fsdp", "pipeline"] = "ddp"  # how several processes share the work
    pipeline: Annotated[PipelineConfig | None, Off] = None  # of parallel: pipeline; null for the defaults
    ema: Annotated[EmaConfig | None, Off] = None
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: Annotated[MixupConfig | None, Off] = None
    supervision: Annotated[SupervisionConfig | None, Off] = None  # losses at some columns of a RevCol
    resume: Annotated[UserPath, BeforeValidator(_path_or_none)] = (
        "auto"  # auto: go on with the run in `output` if there is one; none; or a checkpoint
    )
    checkpoint: Literal["full", "sharded"] = "full"  # one file, or with fsdp one for each process
    keep: int = Field(default=2, ge=1, le=MAX_COUNT)  # how many of the last checkpoints stay
    save_every: Annotated[int | None, Off] = Field(default=None, ge=1, le=MAX_COUNT)  # updates between checkpoints
    log_every: int = Field(default=10, ge=1, le=MAX_COUNT)  # updates between lines of the log
    workers: int = Field(default=0, ge=0, le=1024)  # processes of each rank that load images; 0: none
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
            text = f"mixup pairs images, and {self.batch_size} is odd"
            raise problem(text, "Give an even number", "batch_size", code="conflicting-values")
        if isinstance(self.memory, (str, tuple)) and isinstance(self.model, NetSpec):
            try:
                memory_modes(self.memory, self.model.columns)
            except ValueError as error:
                raise problem(str(error), "See docs/reference/yaml.md", "memory", code="conflicting-values") from None
        if self.checkpoint == "sharded" and self.parallel != "fsdp":
            raise problem(
                "only fsdp has shards",
                "Set parallel: fsdp, or checkpoint: full",
                "checkpoint",
                code="conflicting-values",
            )
        if self.parallel == "pipeline":
            self._require_pipeline()
        elif self.pipeline is not None:
            remedy = "Set parallel: pipeline, or remove the key"
            raise problem("no pipeline is in use", remedy, "pipeline", code="conflicting-values")
        if self.clip_mode == "agc" and self.parallel == "fsdp":
            raise problem(
                "agc needs whole weights, and fsdp divides them",
                "Give norm or value",
                "clip_mode",
                code="conflicting-values",
            )
        if self.supervision is not None and not isinstance(self.model, TimmModel):
            remedy = "Give one of the family, as in {timm: revcol_tiny}"
            raise problem(
                "only models of timm's registry have heads at their columns",
                remedy,
                "supervision",
                code="conflicting-values",
            )
        return self

    def _require_pipeline(self) -> None:
        """Refuse what a run whose processes have a part of the model each cannot do."""
        conflicts = {
            "memory": (isinstance(self.memory, BudgetSpec), "a budget is planned for a whole model", "Give exact"),
            "supervision": (self.supervision is not None, "its heads would be in several stages", "Remove it"),
            "task": (self.task_and_options[0] != "classification", "a pipeline trains classification", "Use fsdp"),
            "heads": (self.heads is not None, "a pipeline trains one set of classes", "Use fsdp"),
            "amp": (self.amp == "float16", "each stage of a pipeline would scale its own loss", "Give bfloat16"),
            "data": (self.batch_is_stream, "each stage of a pipeline would read other images of a stream", "Use fsdp"),
        }
        for key, (is_given, text, remedy) in conflicts.items():
            if is_given:
                raise problem(text, remedy, key, code="conflicting-values")

    @field_serializer("model")
    def _plain_model(self, model: NetSpec | TimmModel | TransformersModel | str) -> Any:
        if isinstance(model, LibraryModel):
            return model.model_dump()
        return dump(model) if isinstance(model, NetSpec) else model

    @property
    def net(self) -> NetSpec:
        """The net that is trained, with the memory mode of the run; not of a model of another library."""
        if not isinstance(self.model, NetSpec):
            raise TypeError(f"model {self.model!r} is no spec; paths are read by load_config")
        return self.model if self.memory is None else self.model.model_copy(update={"memory": self.memory})

    @property
    def task_and_options(self) -> tuple[str, dict[str, Any]]:
        """What is learned: the name or import path of the task, and its options."""
        if isinstance(self.task, str):
            return self.task, {}
        options = dict(self.task)
        return options.pop("type"), options

    @property
    def batch_is_stream(self) -> bool:
        """Is the training set read from front to back, so that its order depends on workers and processes?"""
        return isinstance(self.data, (ImagesConfig, SourcesConfig)) and self.data.is_stream

    def total_updates(self, of_epoch: int) -> int:
        """Updates of the whole run, whose epochs have `of_epoch` each."""
        return self.epochs * of_epoch if self.updates is None else self.updates

    def plain(self) -> dict[str, Any]:
        """The run as plain data that `load_config` accepts, for checkpoints and YAML.

        Keys that another key replaces are omitted, because `load_config` refuses both together.
        """
        return without_unused(self.model_dump(mode="json"))


def load_config(
    source: Source, overrides: Sequence[str] = (), *, trust: bool = True, name: str = "dict"
) -> TrainConfig:
    """Read and check the configuration of a run.

    Args:
        source: path of a YAML file, name of a recipe of this package, or a mapping of the same form. Where `model` is
            a path, it is relative to the file.
        overrides: `key.path=value` pairs, such as `epochs=5` or `model.columns=8`. A path in `model=` is relative to
            the working directory, where it was typed.
        trust: may it name classes of other projects? Their modules are imported, which runs them. A mapping that is not
            trusted names no files either.
        name: of a mapping, for error messages.

    Raises:
        revnets.SpecError: names the file, the key, the value and the remedy.
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
    config.apply(outer)
    model = config.data.get("model")
    if not isinstance(model, str):
        layers.apply(overrides)
        _drop_nulls(layers.data)
        return layers.check(TrainConfig, trust=trust)
    _drop_nulls(config.data)
    given_here = any(text.strip().startswith("model=") for text in outer)
    folder = Path.cwd() if given_here or isinstance(source, Mapping) else source.parent
    words = [text.strip().removeprefix("model.") for text in inner]
    spec = load_spec(folder / os.path.expanduser(model), words, trust=trust)
    return config.check(TrainConfig, net=spec, trust=trust)


def without_unused(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the keys at their defaults that another key replaces.

    Checkpoints of earlier versions have all keys, and a key that is present counts as set by the user.
    """
    config = dict(config)
    if config.get("updates") and config.get("epochs") == TrainConfig.model_fields["epochs"].default:
        del config["epochs"]
    if isinstance(config.get("schedule"), Mapping):
        unused = unused_keys(config["schedule"])
        config["schedule"] = {key: value for key, value in config["schedule"].items() if key not in unused}
    return config


def _drop_nulls(data: dict[str, Any]) -> None:
    """Remove keys that are null in place: an override or a file can so take back what a base file sets."""
    schedule = data.get("schedule")
    for place, keys in ((data, ("epochs",)), (schedule, CLEARABLE)):
        for key in keys:
            if isinstance(place, dict) and key in place and place[key] is None:
                del place[key]


def _file_of(path: Path) -> Path:
    """A file of the working directory, or the recipe of that name.

    Raises:
        revnets.SpecError: there is neither.
    """
    recipes = {file.stem: file for folder in FOLDERS for file in folder.glob("*.yaml")}
    if path.suffix or path.parent != Path(".") or (os.path.exists(path) and not os.path.isdir(path)):
        return path
    if str(path) not in recipes:
        remedy = nearest(str(path), sorted(recipes), "Recipes are")
        raise SpecError(str(path), "", "there is no such file or recipe", remedy, code="missing-file")
    return recipes[str(path)]
