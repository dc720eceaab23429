"""What a run learns: the protocol between the trainer and classification, regression, detection and the like.

The trainer, its checkpoints, its log and its progress line know a `Task` alone. The task chooses the data, the model,
the loss and the metrics, and which metric decides which checkpoint is the best.
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
    """Metrics of one set of weights that hold more than numbers."""

    def scalars(self) -> dict[str, float]:
        """The numbers, by name: what goes into the log."""
        ...


class Evaluator(Protocol):
    """Accumulates metrics over a validation set."""

    def update(self, output: Any, batch: Any) -> None:
        """Add a batch, on the device of the run, and what `Task.predict` gave for it."""
        ...

    def compute(self, world: World) -> Mapping[str, float] | Metrics:
        """The metrics of the whole set. All processes call it together, each after its own share of the set."""
        ...


class Batches(Protocol):
    """The training batches of a process."""

    @property
    def updates(self) -> int:
        """Updates of an epoch; the same number in every process."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The `grad_accum` batches of each update of an epoch, from update `start` on.

        A run that is resumed goes on bit for bit if they are a function of the seed, `epoch` and the update.
        """
        ...


class Curve(NamedTuple):
    """A metric in the figure of a run."""

    metric: str
    axis: str  # label of its axis
    mode: Literal["max", "min"]  # which value is marked as the best
    text: Callable[[float], str]  # of that value


class Task:
    """Base class of what a run can learn; `task: package.module:Class` in its YAML chooses one.

    Only `loss` and `evaluator` have to be written. A batch is whatever `collate` returns: tensors in tuples, lists and
    mappings, nested in any way. The default of `predict` is for tuples and lists whose first item the model takes.

    Args:
        config: of the run.

    A subclass may take further arguments, which the YAML gives as `task: {type: package.module:Class, name: value}`.

    Attributes:
        monitor: the metric that decides which checkpoint is the best, of the averaged weights where they are kept.
        mode: is a higher or a lower value of it better?
        label: the metric's name on the screen; that of `monitor` if empty.
        unit: of the metric, such as %.
        digits: decimals that are printed.
        samples: what a sample is called in the log (as in `images_per_second`), and on the progress bar.
        uses: keys of the configuration that mean nothing to other tasks: of `OPTIONAL`, those that this one reads.
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
        """The data of the run, by default what the key `data` names.

        Args:
            notes: file for a list of samples that cannot be read.
            world: the processes of the run.

        Returns:
            An object with the attributes of `DataSplits`, which every other method gets.
        """
        return load_data(self.config.data, self.config.seed, notes, world)

    def collate(self, samples: list[Any]) -> Any:
        """A batch of samples; by default tensors are stacked. Workers of a loader call it."""
        return default_collate(samples)

    def padding(self, sample: Any) -> Any:
        """A sample that the evaluator leaves out, made from one of the validation set.

        Several processes need such samples, since their shares of the set must be equally large.
        """
        raise NotImplementedError

    def train_batches(self, data: Any, world: World) -> Batches:
        """The training batches: by default shuffled, of `batch_size` samples, collated by `collate`."""
        return TrainBatches(self.config, data, world, self.collate)

    def val_batches(self, data: Any, world: World) -> Iterable[Any]:
        """The validation batches of this process; of as many batches in every process.

        Raises:
            revnets.SpecError: the set is shared by several processes, and the task has no `padding`.
        """
        if world.size > 1 and type(self).padding is Task.padding:
            problem = f"{type(self).__name__} has no padding, which several processes need for validation"
            raise run_error("task", problem, "Write the method, or train with one process")
        return val_loader(self.config, data, world, self.collate, self.padding)

    def to_device(self, batch: Any, device: torch.device, layout: torch.memory_format = torch.preserve_format) -> Any:
        """A batch with all of its tensors on a device.

        Args:
            layout: of tensors (B, C, H, W); `channels_last` if the run asks for it.
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
        """Samples of a batch: by default the length of its first item, a tensor or a list of samples."""
        first = batch[0] if isinstance(batch, (list, tuple)) else batch
        while isinstance(first, Mapping):
            first = next(iter(first.values()))
        return len(first)

    def metadata(self, data: Any) -> dict[str, Any]:
        """What else a checkpoint says about the run, as plain data."""
        return {}

    # ------------------------------------------------------------------------------------------------------ model

    def build_model(self, data: Any) -> nn.Module:
        """The model, in training mode; by default what the key `model` names.

        Raises:
            revnets.SpecError: it cannot be built, or does not fit the data.
        """
        from vision.tasks.builders import create_model  # which imports this module

        return create_model(self.config)

    def begin(self, model: nn.Module, data: Any, world: World) -> str:
        """Put the weights of the key `pretrained` into a new model; a sentence about what was done.

        It is called for a run that has the key, which `uses` must name.
        """
        raise NotImplementedError(f"{type(self).__name__} does not read pretrained weights")

    def input_shape(self, data: Any) -> tuple[int, ...] | None:
        """Shape of one sample of the model's input, for which a memory budget is planned; None if there is not one."""
        return getattr(data, "shape", None)

    def planned(self, model: nn.Module) -> nn.Module:
        """The module whose training step is simulated for a memory budget, called with a batch of `input_shape`."""
        return model

    def training_task(self, model: nn.Module, data: Any, device: torch.device) -> TrainingTask:
        """timm's task around the model, which holds what trains: it is averaged, divided and saved."""
        return LossTask(model, self.loss, device=device, verbose=False)

    # ------------------------------------------------------------------------------------------- loss and metrics

    def augment(self, data: Any) -> Callable[[Any], Any] | None:
        """What changes training batches on the device, such as mixup. Its random numbers are those of the pass."""
        return None

    def loss(self, model: nn.Module, batch: Any) -> Tensor | Mapping[str, Tensor]:
        """The loss of a batch.

        Args:
            model: in training mode; perhaps wrapped for several processes, so it is to be called and not looked into.

        Returns:
            A scalar, or several by name: `loss` among them is what is minimized, or without it their sum. Scalars whose
            names begin with `loss_` are logged.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def forward(self, training_task: TrainingTask, batch: Any) -> Mapping[str, Tensor]:
        """A training forward pass; `loss` of the result is what is minimized."""
        return training_task(batch)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """The output of a model in evaluation mode, for the evaluator."""
        return model(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def evaluator(self, model: nn.Module, data: Any, device: torch.device) -> Evaluator:
        """A new evaluator of a model."""
        raise NotImplementedError(f"{type(self).__name__} has no evaluator")

    # ------------------------------------------------------------------------------------------------------ texts

    @classmethod
    def name(cls) -> str:
        """The monitored metric's name on the screen."""
        return cls.label or cls.monitor

    @classmethod
    def text(cls, value: float, digits: int | None = None) -> str:
        """A value of the monitored metric with its unit."""
        return f"{value:.{cls.digits if digits is None else digits}f}{cls.unit and f' {cls.unit}'}"

    @classmethod
    def curves(cls) -> list[Curve]:
        """What the figure of a run plots beside the loss."""
        unit = f", {cls.unit}" if cls.unit else ""
        return [Curve(cls.monitor, f"validation {cls.name()}{unit}", cls.mode, cls.text)]

    def summary(self, found: Mapping[str, Mapping[str, float]]) -> str:
        """The metrics of an epoch on one line.

        Args:
            found: metrics of the weights (`raw`), and of their average (`ema`) if there is one.
        """
        last = list(found.values())[-1]
        loss = f"val loss {last['loss']:.4f}  " if "loss" in last and self.monitor != "loss" else ""
        values = "  ".join(f"{name} {self.text(metrics[self.monitor])}" for name, metrics in found.items())
        return f"{loss}{'val ' * (self.name() == 'loss')}{self.name()} {values}"

    def score(self, found: Mapping[str, Mapping[str, float]]) -> float:
        """The monitored metric of the weights that count: the averaged ones if there are any.

        Raises:
            revnets.SpecError: the evaluator does not give it.
        """
        last = list(found.values())[-1]
        if self.monitor not in last:
            problem = f"{type(self).__name__} monitors {self.monitor}, which its evaluator does not give"
            raise run_error("task", problem, nearest(self.monitor, list(last), "It gives"), code="unknown-choice")
        return last[self.monitor]

    def is_better(self, value: float, best: float) -> bool:
        """Is a value of the monitored metric better than another?"""
        return value > best if self.mode == "max" else value < best


class LossTask(TrainingTask):
    """A model whose loss is a function of it and of a batch, as a task of timm.

    Args:
        model: what is trained.
        loss: called as `loss(model, batch)`; the result is that of `Task.loss`.
        device: of the model.
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
        """The losses of a batch, `loss` among them."""
        found = self.loss(self.trainable_module, batch)
        if isinstance(found, Tensor):
            return {"loss": found}
        return dict(found) if "loss" in found else {**found, "loss": cast(Tensor, sum(found.values()))}


def scalars(metrics: Mapping[str, float] | Metrics) -> dict[str, float]:
    """What an evaluator has computed, as numbers by name."""
    return dict(metrics) if isinstance(metrics, Mapping) else metrics.scalars()
