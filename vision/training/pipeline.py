"""Pipeline parallelism of a run, whose processes each have a range of the cells: updates, clipping, evaluation, state.

Every process builds the whole model and its optimizer, so that names and indices of parameters equal those of a single
process. Then the weights of other stages move to the meta device, where they need no memory. Micro-batches are the
`grad_accum` forward passes of an update. The weights are bit-identical to those that a single process trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
from timm.optim import get_optimizer_info
from timm.task import ClassificationTask, TrainingTask
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils._pytree import tree_map_only

from revnets import Net
from revnets.config.errors import ArgumentError
from vision.config.run import PipelineConfig, TrainConfig
from vision.distributed.context import PipelineWorld
from vision.errors import first_line, run_error
from vision.models.architecture import RevCol, to_nchw
from vision.tasks.builders import columns_of, has_budget, unwrapped

SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
NORM_CLIPPED = ("Lamb", "FusedLAMB")
"""Optimizer classes that clip by the norm of all gradients, of which a process only has a part."""

RANDOM = ("Kron",)
"""Optimizer classes that draw random numbers for each parameter, of which a process only has a part."""

Autocast = Callable[[], AbstractContextManager]


class TopLevelHead(nn.Module):
    """The classifier of a RevCol, called with the levels of its last column."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        return self.head(to_nchw(levels[-1]))


class Part(nn.Module):
    """This process's stage, in the precision of the run."""

    def __init__(self, stage: nn.Module, autocast: Autocast):
        super().__init__()
        self.stage, self.autocast = stage, autocast
        self.training = stage.training

    def forward(self, *inputs: Tensor, **context: Any) -> Any:
        with self.autocast():
            return self.stage(*inputs, **context)


class Relay(nn.Module):
    """A pipeline for evaluation. All processes call it with images, and the last one returns the scores.

    A training schedule has buffers for one batch size, but evaluation batches may have different sizes.
    """

    def __init__(self, part: Part, world: PipelineWorld, device: torch.device):
        super().__init__()
        self.part, self.world, self.device = part, world, device
        self.training = part.training

    def forward(self, x: Tensor) -> Tensor | None:
        output = self.part(*((x,) if self.world.is_main else self._received()))
        if self.world.is_last:
            return output
        dist.send_object_list([[(tensor.shape, tensor.dtype) for tensor in output]], dst=self.world.rank + 1)
        for tensor in output:
            dist.send(tensor, dst=self.world.rank + 1)
        return None

    def _received(self) -> list[Tensor]:
        source, found = self.world.rank - 1, [cast(Any, None)]
        dist.recv_object_list(found, src=source)
        tensors = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in found[0]]
        for tensor in tensors:
            dist.recv(tensor, src=source)
        return tensors


class Pipeline:
    """The stage of this process, for the model of a run and for its average.

    Args:
        config: Of the run.
        task: timm's task, with the whole model on the device.
        shape: Of an image (C, H, W).
        autocast: Context of a forward pass.
        world: The processes of the pipeline.
        device: Of this process.

    Raises:
        revnets.SpecError: If a pipeline of this many processes does not support the model or a setting of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: TrainingTask,
        shape: Sequence[int],
        autocast: Autocast,
        world: PipelineWorld,
        device: torch.device,
    ):
        self.config, self.world, self.device, self.autocast = config, world, device, autocast
        self.criterion = cast(ClassificationTask, task).criterion
        require_possible(config, world)
        model = unwrapped(task.get_trainable_module())
        self.part = self._part(model, shape)
        self.average: Part | None = None
        average = cast(ModelEmaV3 | None, task.get_trainable_module(ema=True))
        if average is not None:
            average.foreach = False  # foreach needs all tensors on one device
            self.average = self._part(average.module, shape)
        stage = PipelineStage(self.part, world.rank, world.size, device)
        kind = SCHEDULES[(config.pipeline or PipelineConfig()).schedule]
        self.schedule = kind(stage, config.grad_accum, loss_fn=self._loss, scale_grads=False)

    def _part(self, model: nn.Module, shape: Sequence[int]) -> Part:
        """The stage of this process. The other weights of the model move to the meta device."""
        columns = columns_of(model)
        if columns is None or not isinstance(model, (Net, RevCol)):
            problem = f"{type(model).__name__} has no reversible columns to divide into stages"
            raise run_error("parallel", problem, "Use ddp or fsdp", code="no-columns")
        if has_budget(self.config, model):
            problem = "the model has a memory budget, which a pipeline does not support"
            raise run_error("memory", problem, "Give memory: exact", code="conflicting-values")
        head = TopLevelHead(model.head) if isinstance(model, RevCol) else model.head
        x = torch.empty(1, *shape, device=self.device)
        balance = (self.config.pipeline or PipelineConfig()).balance
        try:
            stages = columns.split(self.world.size, stem=model.stem, head=head, balance=balance, x=x)
        except ArgumentError as error:
            remedy = "Start fewer processes" if error.key == "stages" else "Give memory: exact"
            key = "parallel" if error.key == "stages" else error.key
            raise run_error(key, first_line(error), remedy, code=error.code) from None
        stage = stages[self.world.rank]
        _drop_others(model, stage)
        return Part(stage, self.autocast)

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        with self.autocast():
            return self.criterion(output, target) / self.config.grad_accum

    @property
    def sees_batches(self) -> bool:
        """Whether this process needs the batches of an update."""
        return self.world.is_main or self.world.is_last

    def backward(self, batches: Sequence[tuple[Tensor, Tensor]], seeds: Sequence[int]) -> Tensor:
        """Compute the gradients of an update.

        Args:
            batches: The micro-batches, in the first and the last process.
            seeds: Of the random numbers of each micro-batch.

        Returns:
            The loss, which is 0 except in the last process.
        """
        losses: list[Tensor] = []
        inputs: list[Tensor] = []
        options: dict[str, Any] = {}
        if self.world.is_main:
            inputs, options = [torch.cat([images for images, _ in batches])], {"seed": torch.tensor(seeds)}
        if self.world.is_last:
            options = {"target": torch.cat([labels for _, labels in batches]), "losses": losses}
        self.schedule.step(*inputs, **options)
        total = torch.zeros((), device=self.device)
        for loss in losses:
            total += loss.detach()
        return total

    def relay(self, is_average: bool = False) -> Relay:
        """The model, or its average, for evaluation."""
        part = self.average if is_average else self.part
        assert part is not None
        return Relay(part, self.world, self.device)

    def clip(self, parameters: Iterable[nn.Parameter], value: float, mode: str) -> None:
        """Clip gradients like `timm.utils.clip_grad`, with the norm over the whole model."""
        given = [(number, item) for number, item in enumerate(parameters) if item.grad is not None]
        own = [item for _, item in given]
        if mode != "norm":
            dispatch_clip_grad(own, value, mode)
            return
        norms = {number: torch.linalg.vector_norm(cast(Tensor, item.grad)).cpu() for number, item in given}
        found = {number: norm for part in self.world.collect(norms) for number, norm in part.items()}
        total = torch.linalg.vector_norm(torch.stack([found[number] for number in sorted(found)]))
        nn.utils.clip_grads_with_norm_(own, value, total.to(self.device))

    def merged(self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Merge the states of all processes in the main process. The other processes keep their own."""
        own = own_state(state, optimizer)
        if not self.world.is_main:
            dist.send_object_list([own], dst=0)
            return dict(state)
        for rank in range(1, self.world.size):
            received: list[Any] = [None]
            dist.recv_object_list(received, src=rank)
            for key, part in received[0].items():
                own[key].update(part)
        result = dict(state)
        for key in ("model", "ema"):
            result[key] = None if state[key] is None else {name: own[key][name] for name in state[key]}
        result["optimizer"] = {**state["optimizer"], "state": dict(sorted(own["optimizer"].items()))}
        return result


def own_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The weights, averages and optimizer entries of this process, on the CPU, since devices differ by process."""
    parameters = [item for group in optimizer.param_groups for item in group["params"]]
    entries = state["optimizer"]["state"]
    own = {
        "model": {name: tensor for name, tensor in state["model"].items() if not tensor.is_meta},
        "ema": {name: tensor for name, tensor in (state["ema"] or {}).items() if not tensor.is_meta},
        "optimizer": {index: entry for index, entry in entries.items() if not parameters[index].is_meta},
    }
    return tree_map_only(Tensor, Tensor.cpu, own)


def require_possible(config: TrainConfig, world: PipelineWorld) -> None:
    """Refuse settings with which a pipeline would not make the updates of a single process.

    Raises:
        revnets.SpecError: If there are too few micro-batches, or the optimizer needs all parameters.
    """
    if config.grad_accum < world.size:
        problem = f"{config.grad_accum} micro-batches do not fill the {world.size} stages of a pipeline"
        raise run_error("grad_accum", problem, f"Give at least {world.size}, or start fewer processes", "out-of-range")
    name, options = config.optimizer.name, config.optimizer.options
    kind = get_optimizer_info(name.lower()).opt_class  # an optimizer of another package is the path of its class
    kind = kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
    if kind in NORM_CLIPPED and options.get("max_grad_norm", 1.0) is not None:
        problem = f"{name} clips by the norm of all gradients, but no stage has all gradients"
        hint = "Give optimizer.options: {max_grad_norm: null} and clip_grad, or another optimizer"
        raise run_error("optimizer.name", problem, hint, code="conflicting-values")
    if kind in RANDOM:
        problem = f"{name} draws random numbers for each parameter, but no stage has all parameters"
        raise run_error("optimizer.name", problem, "Choose another optimizer", code="conflicting-values")


def _drop_others(model: nn.Module, stage: nn.Module) -> None:
    """Move the weights of other stages to the meta device. Names, shapes and order do not change."""
    own = {id(module) for module in stage.modules()}
    for module in model.modules():
        if id(module) not in own:
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to("meta"), parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to("meta"))
