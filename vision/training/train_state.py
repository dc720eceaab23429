"""The state of a training run, its updates and its evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from vision.config.run import TrainConfig
from vision.data.samplers import seed_all, torch_seed
from vision.distributed.context import PipelineWorld, World
from vision.errors import CheckpointError
from vision.tasks import builders
from vision.tasks.base import Evaluator, Task
from vision.tasks.builders import create_task, unwrapped

if TYPE_CHECKING:
    from vision.training.pipeline import Pipeline


class TrainState:
    """Model, loss, optimizer, schedule, loss scaling and averaged weights of a run.

    Args:
        config: Of the run.
        data: Of the run, as loaded by its task.
        updates_per_epoch: For the schedule.
        world: The processes of the run.
        task: Of the run; made from the configuration if None.

    Attributes:
        training_task: timm's task, the model with its loss.
        note: Description of the memory plan; None without a budget.
        beginning: Description of the pretrained weights; None without any.
        samples: Number of samples that this process has trained on since it started.
        parts: Terms of the loss in the last forward pass of this process, which the task names `loss_...`.

    Raises:
        revnets.SpecError: If the configuration does not fit the data or the machine.
        CheckpointError: If pretrained weights do not exist, or are of another model.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Any,
        updates_per_epoch: int,
        world: World | None = None,
        task: Task | None = None,
    ):
        self.config, self.data, self.world = config, data, world or World()
        self.task = task or create_task(config)
        self.samples, self.parts = 0, dict[str, Tensor]()
        self.passes = config.grad_accum * self.world.replicas.size  # forward passes per update, of all processes
        images = config.batch_size * self.passes
        self.device = builders.choose_device(config.device, self.world)
        seed_all(config.seed)  # the same weights in every process
        model = self.task.build_model(data)
        self.beginning = self.task.begin(model, data, self.world) if config.pretrained else None
        self.training_task = builders.build_task(config, model, data, self.device, self.task)
        self.note = None
        if builders.has_budget(config, model) and not isinstance(self.world, PipelineWorld):
            from vision.training.memory_budget import plan_run_memory

            shape = self.task.input_shape(data)
            planned = self.task.planned(unwrapped(self.training_task.get_trainable_module()))
            self.note = plan_run_memory(config, planned, shape, self.world)
        self.autocast = builders.build_autocast(config.amp, self.device)
        self.pipeline: Pipeline | None = None
        if isinstance(self.world, PipelineWorld):
            from vision.training.pipeline import Pipeline  # imports torch.distributed.pipelining

            self.pipeline = Pipeline(config, self.training_task, data.shape, self.autocast, self.world, self.device)
        if config.compile is not None:
            builders.compile_cells(self.model, config.compile)
        if self.world.size > 1 and self.pipeline is None:
            from vision.distributed.parallel import distribute  # imports FSDP2

            distribute(self.training_task, config.parallel, self.world, self.device)
        self.optimizer = builders.build_optimizer(config, unwrapped(self.training_task.get_trainable_module()), images)
        self.schedule = builders.build_schedule(config, self.optimizer, updates_per_epoch, images)
        self.augment = self.task.augment(data)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "float16")

    @property
    def model(self) -> nn.Module:
        """The model without wrappers and intermediate heads."""
        return unwrapped(self.training_task.get_eval_model())

    @property
    def ema(self) -> nn.Module | None:
        """The model with averaged weights."""
        return unwrapped(self.training_task.get_eval_model(ema=True)) if self.training_task.has_ema() else None

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def update(self, batches: Iterator[Any], step: int) -> Tensor:
        """Make one step of the optimizer on the next `grad_accum` batches.

        All random numbers (mixup, dropout, drop path) are functions of the seed and of the number of the forward pass,
        counted over all processes. So no generator state is saved, and several processes train like a single process
        with gradient accumulation.

        Args:
            batches: Of the task.
            step: Number of updates including this one.

        Returns:
            The loss of this process, on its device.
        """
        config = self.config
        total = self._gradients(batches, step) if self.pipeline is None else self._stage_gradients(batches, step)
        if config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            clip = dispatch_clip_grad if self.pipeline is None else self.pipeline.clip
            clip(self.training_task.get_clip_parameters(), config.clip_grad, config.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step_update(step)
        self.training_task.update_ema(step)
        return total

    def _gradients(self, batches: Iterator[Any], step: int) -> Tensor:
        config, total = self.config, torch.zeros((), device=self.device)
        for number in range(config.grad_accum):
            batch = self._prepared(next(batches), step, number)
            is_last = number == config.grad_accum - 1
            with nullcontext() if is_last else self.training_task.no_sync():
                with self.autocast():
                    found = self.task.forward(self.training_task, batch)
                    loss = found["loss"] / config.grad_accum
                self.scaler.scale(loss).backward()
            total += loss.detach()
            self.parts = {name: part.detach() for name, part in found.items() if name.startswith("loss_")}
        return total

    def _stage_gradients(self, batches: Iterator[Any], step: int) -> Tensor:
        assert self.pipeline is not None
        numbers = range(self.config.grad_accum)
        seeds = [torch_seed(self.config.seed, self._pass(step, number)) for number in numbers]
        seen = numbers if self.pipeline.sees_batches else ()
        return self.pipeline.backward([self._prepared(next(batches), step, number) for number in seen], seeds)

    def _pass(self, step: int, number: int) -> int:
        """The number of a forward pass, counted over all processes."""
        replicas = self.world.replicas
        return (step - 1) * self.passes + number * replicas.size + replicas.rank

    def _prepared(self, batch: Any, step: int, number: int) -> Any:
        """Move a batch to the device, seed the random numbers of its forward pass, and augment it."""
        batch = self._moved(batch)
        seed_all(self.config.seed, self._pass(step, number))
        return batch if self.augment is None else self.augment(batch)

    def _moved(self, batch: Any) -> Any:
        self.samples += self.task.batch_size(batch)
        layout = torch.channels_last if self.config.channels_last else torch.preserve_format
        return self.task.to_device(batch, self.device, layout)

    def evaluate(self, batches: Iterable[Any], tick: Callable[[], None]) -> dict[str, Any]:
        """Metrics of the weights (`raw`), and of their average (`ema`) if there is one."""
        found = {}
        for name, is_average in (("raw", False), ("ema", True)):
            if self.training_task.has_ema() or not is_average:
                model = unwrapped(self.training_task.get_trainable_module(is_average))
                evaluator = self.task.evaluator(model, self.data, self.device)
                if self.pipeline is not None:
                    model = self.pipeline.relay(is_average)
                found[name] = evaluate(
                    self.task, model, batches, evaluator, self.device, self.autocast, tick, self.world
                )
                if self.world.size > 1 and self.pipeline is None:
                    from vision.distributed.parallel import release_gathered

                    release_gathered(model)
        return found

    def state(self) -> dict[str, Any]:
        """The state as plain data and tensors, which may be sharded. For a pipeline, the main process has all of it."""
        state = {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "heads": self.training_task.get_task_state(),
            "heads_ema": self.training_task.get_task_state(ema=True) if self.training_task.has_ema() else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return state if self.pipeline is None else self.pipeline.merged(state, self.optimizer)

    def load_state(self, state: dict[str, Any], path: Path) -> None:
        """Restore a state.

        Args:
            state: Of a checkpoint.
            path: Of the checkpoint, for messages.

        Raises:
            CheckpointError: If it is the state of another model.
        """
        from vision.checkpoints import reader  # new runs do not need it
        from vision.checkpoints.layout import require_optimizer

        reader.load_weights(self.model, state["model"], path)
        reader.load_heads(self.training_task.get_task_state(), state["heads"], path)
        if self.ema is not None:
            averaged = state["ema"] is not None
            reader.load_weights(self.ema, state["ema"] if averaged else state["model"], path)
            heads = state["heads_ema"] if averaged else state["heads"]
            reader.load_heads(self.training_task.get_task_state(ema=True), heads, path)
        require_optimizer(state["optimizer"], self.optimizer, path)
        self.optimizer.load_state_dict(self._optimizer_state(state["optimizer"]))
        if self.scaler.is_enabled() and state["scaler"]:
            if missing := self.scaler.state_dict().keys() - state["scaler"]:
                problem = f"it has no `scaler.{min(missing)}`"
                raise CheckpointError(path, problem, "Use another checkpoint", code="wrong-format")
            self.scaler.load_state_dict(state["scaler"])
        self.schedule.step_update(state["progress"]["step"])

    def _optimizer_state(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The saved state with tensors that are sharded like the parameters."""
        from vision.checkpoints.sharding import like, mapped

        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        of_each = {
            index: mapped(entry, lambda _, leaf, parameter=parameters[index]: like(parameter, leaf))
            for index, entry in saved["state"].items()
        }
        return {**saved, "state": of_each}


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    batches: Iterable[Any],
    evaluator: Evaluator,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    tick: Callable[[], None] = lambda: None,
    world: World | None = None,
) -> Any:
    """Evaluate a model on a validation set. The model is in evaluation mode during the call.

    Args:
        task: Whose `predict` computes the output of the model.
        model: To evaluate.
        batches: Of the validation set.
        evaluator: Accumulates the metrics.
        device: Of the model.
        autocast: Context of a forward pass.
        tick: Called after every batch. An error that it raises ends the evaluation.
        world: The processes, each of which has a part of the set. All return the metrics of the whole set.

    Returns:
        The metrics of the evaluator.
    """
    training = model.training
    model.eval()
    try:
        for batch in batches:
            batch = task.to_device(batch, device)
            with autocast():
                output = task.predict(model, batch)
            if output is not None:  # in a pipeline, only the last process has outputs
                evaluator.update(output, batch)
            tick()
    finally:
        model.train(training)
    return evaluator.compute(world or World())
