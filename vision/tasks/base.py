"""The protocol between the trainer and a task, such as classification, regression or detection.

The trainer, checkpoints, log and progress line only use a `Task`. The task chooses data, model, loss and metrics, and
the metric that determines the best checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.utils.data import default_collate

from revnets.config.errors import nearest
from vision.config.run import TrainConfig
from vision.data.dataset import load_data
from vision.data.samplers import TrainBatches, val_loader
from vision.distributed.context import World
from vision.errors import run_error


class Metrics(Protocol):
    """Metrics of one set of weights that include more than numbers."""

    def scalars(self) -> dict[str, float]:
        """The numbers by name, which are logged."""
        ...


class Evaluator(Protocol):
    """Accumulates metrics over a validation set."""

    def update(self, output: Any, batch: Any) -> None:
        """Add a batch, on the device of the run, and the result of `Task.predict` for it."""
        ...

    def compute(self, world: World) -> Mapping[str, float] | Metrics:
        """The metrics of the whole set. All processes must call it, each after its part of the set."""
        ...


class Batches(Protocol):
    """The training batches of a process."""

    @property
    def updates(self) -> int:
        """Updates per epoch, the same number in every process."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield the `grad_accum` batches of each update of an epoch, from update `start` on.

        A run resumes bit for bit if they are a function of the seed, `epoch` and the update.
        """
        ...


class Curve(NamedTuple):
    """A metric in the figure of a run."""

    metric: str
    axis: str  # label of the axis
    mode: Literal["max", "min"]  # which value is marked as the best
    text: Callable[[float], str]  # formats the best value


class Task:
    """Base class of tasks. `task: package.module:Class` in the YAML of a run selects one.

    A subclass must implement `loss` and `evaluator`. A batch is the result of `collate`: tensors in tuples, lists and
    mappings with any nesting. The default of `predict` is for tuples and lists whose first item is the model's input.
    A subclass may have more arguments, which the YAML sets as `task: {type: package.module:Class, name: value}`.

    Args:
        config: Of the run.

    Attributes:
        monitor: Metric that determines the best checkpoint, of the averaged weights if there are any.
        mode: `max` if higher values of the metric are better, else `min`.
        label: Displayed name of the metric; that of `monitor` if empty.
        unit: Of the metric, such as %.
        digits: Decimals that are printed.
        samples: Name of the samples in the log (as in `images_per_second`), and in the progress bar.
        uses: Optional keys of the configuration (of `vision.tasks.builders.OPTIONAL`) that this task supports.
    """

    monitor: ClassVar[str] = "loss"
    mode: ClassVar[Literal["max", "min"]] = "min"
    label: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    digits: ClassVar[int] = 4
    samples: ClassVar[tuple[str, str]] = ("images", "img")
    uses: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: TrainConfig):
        self.config = config

    # ------------------------------------------------------------------------------------------------------- data

    def load_data(self, notes: Path | None = None, world: World | None = None) -> Any:
        """Open the data of the run, by default that of the key `data`.

        Args:
            notes: File for a list of samples that cannot be read.
            world: The processes of the run.

        Returns:
            An object with the attributes of `DataSplits`, which is passed to other methods as `data`.
        """
        return load_data(self.config.data, self.config.seed, notes, world)

    def collate(self, samples: list[Any]) -> Any:
        """Make a batch of samples. By default tensors are stacked. Called by the workers of a loader."""
        return default_collate(samples)

    def padding(self, sample: Any) -> Any:
        """Change a sample of the validation set into one that the evaluator ignores.

        Several processes need such samples, because their parts of the set must have the same size.
        """
        raise NotImplementedError

    def train_batches(self, data: Any, world: World) -> Batches:
        """The training batches; by default shuffled batches of `batch_size` samples."""
        return TrainBatches(self.config, data, world, self.collate)

    def val_batches(self, data: Any, world: World) -> Iterable[Any]:
        """The validation batches of this process, the same number in every process.

        Raises:
            revnets.SpecError: If there are several processes, and the task does not implement `padding`.
        """
        if world.size > 1 and type(self).padding is Task.padding:
            problem = f"{type(self).__name__} does not implement padding, which several processes need for validation"
            raise run_error("task", problem, "Implement it, or train with one process")
        return val_loader(self.config, data, world, self.collate, self.padding)

    def to_device(self, batch: Any, device: torch.device, layout: torch.memory_format = torch.preserve_format) -> Any:
        """Move all tensors of a batch to a device.

        Args:
            batch: Of the task.
            device: Of the run.
            layout: Of tensors (B, C, H, W), from the key `channels_last` of the run.
        """
        if isinstance(batch, Tensor):
            return batch.to(
                device, memory_format=layout if batch.ndim == 4 else torch.preserve_format, non_blocking=True
            )
        if isinstance(batch, Mapping):
            return {key: self.to_device(item, device, layout) for key, item in batch.items()}
        if isinstance(batch, (list, tuple)):
            items = [self.to_device(item, device, layout) for item in batch]
            return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
        return batch.to(device) if hasattr(batch, "to") else batch

    def batch_size(self, batch: Any) -> int:
        """Number of samples in a batch; by default the length of its first item, a tensor or a list of samples."""
        first = batch[0] if isinstance(batch, (list, tuple)) else batch
        while isinstance(first, Mapping):
            first = next(iter(first.values()))
        return len(first)

    def metadata(self, data: Any) -> dict[str, Any]:
        """Additional entries of a checkpoint, as plain data."""
        return {}

    # ------------------------------------------------------------------------------------------------------ model

    def build_model(self, data: Any) -> nn.Module:
        """Build the model in training mode; by default that of the key `model`.

        Raises:
            revnets.SpecError: If the model cannot be built, or does not fit the data.
        """
        from vision.tasks.builders import create_model  # which imports this module

        return create_model(self.config)

    def begin(self, model: nn.Module, data: Any, world: World) -> str:
        """Load the weights of the key `pretrained`, which `uses` must include, into a new model.

        Returns:
            A description of the weights.
        """
        raise NotImplementedError(f"{type(self).__name__} does not support pretrained weights")

    def input_shape(self, data: Any) -> tuple[int, ...] | None:
        """Shape of one input of the model, for the plan of a memory budget; None if shapes differ."""
        return getattr(data, "shape", None)

    def planned(self, model: nn.Module) -> nn.Module:
        """The module whose training step is simulated for a memory budget. Its input is a batch of `input_shape`."""
        return model

    def training_task(self, model: nn.Module, data: Any, device: torch.device) -> TrainingTask:
        """timm's task around the model, which contains all trained modules."""
        return LossTask(model, self.loss, device=device, verbose=False)

    # ------------------------------------------------------------------------------------------- loss and metrics

    def augment(self, data: Any) -> Callable[[Any], Any] | None:
        """A function that augments training batches on the device, such as mixup, or None.

        It draws from the generators that are seeded for the forward pass.
        """
        return None

    def loss(self, model: nn.Module, batch: Any) -> Tensor | Mapping[str, Tensor]:
        """The loss of a batch.

        Args:
            model: In training mode. It may be wrapped for several processes, so only call it.
            batch: Of the task, on the device.

        Returns:
            A scalar, or several by name. `loss` is minimized, or without it the sum of all. Scalars whose names begin
            with `loss_` are logged.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement loss")

    def forward(self, training_task: TrainingTask, batch: Any) -> Mapping[str, Tensor]:
        """Make a training forward pass. `loss` of the result is minimized."""
        return training_task(batch)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """The output of a model in evaluation mode, for the evaluator."""
        return model(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def evaluator(self, model: nn.Module, data: Any, device: torch.device) -> Evaluator:
        """A new evaluator of a model."""
        raise NotImplementedError(f"{type(self).__name__} does not implement evaluator")

    # ------------------------------------------------------------------------------------------------------ texts

    @classmethod
    def name(cls) -> str:
        """The displayed name of the monitored metric."""
        return cls.label or cls.monitor

    @classmethod
    def text(cls, value: float, digits: int | None = None) -> str:
        """Format a value of the monitored metric with its unit."""
        return f"{value:.{cls.digits if digits is None else digits}f}{cls.unit and f' {cls.unit}'}"

    @classmethod
    def curves(cls) -> list[Curve]:
        """The metrics that the figure of a run plots in addition to the loss."""
        unit = f", {cls.unit}" if cls.unit else ""
        return [Curve(cls.monitor, f"validation {cls.name()}{unit}", cls.mode, cls.text)]

    def summary(self, found: Mapping[str, Mapping[str, float]]) -> str:
        """Format the metrics of an epoch as one line.

        Args:
            found: Metrics of the weights (`raw`), and of their average (`ema`) if there is one.
        """
        last = list(found.values())[-1]
        loss = f"val loss {last['loss']:.4f}  " if "loss" in last and self.monitor != "loss" else ""
        values = "  ".join(f"{name} {self.text(metrics[self.monitor])}" for name, metrics in found.items())
        return f"{loss}{'val ' * (self.name() == 'loss')}{self.name()} {values}"

    def score(self, found: Mapping[str, Mapping[str, float]]) -> float:
        """The monitored metric, of the averaged weights if there are any.

        Raises:
            revnets.SpecError: If the evaluator does not return this metric.
        """
        last = list(found.values())[-1]
        if self.monitor not in last:
            problem = f"{type(self).__name__} monitors {self.monitor}, which its evaluator does not return"
            raise run_error("task", problem, nearest(self.monitor, list(last), "It returns"), code="unknown-choice")
        return last[self.monitor]

    def is_better(self, value: float, best: float) -> bool:
        """Whether a value of the monitored metric is better than another."""
        return value > best if self.mode == "max" else value < best


class LossTask(TrainingTask):
    """A timm task whose loss is a function of the model and a batch.

    Args:
        model: To train.
        loss: Called as `loss(model, batch)`, with a result as of `Task.loss`.
        device: Of the model.
        verbose: As in timm.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]],
        device: torch.device | None = None,
        verbose: bool = True,
    ):
        super().__init__(device=device, verbose=verbose)
        self.trainable_module, self.loss = model, loss

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> LossTask:
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def forward(self, batch: Any) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The losses of a batch, including `loss`."""
        found = self.loss(self.trainable_module, batch)
        if isinstance(found, Tensor):
            return {"loss": found}
        return dict(found) if "loss" in found else {**found, "loss": cast(Tensor, sum(found.values()))}


def scalars(metrics: Mapping[str, float] | Metrics) -> dict[str, float]:
    """The numbers in the metrics of an evaluator, by name."""
    return dict(metrics) if isinstance(metrics, Mapping) else metrics.scalars()
