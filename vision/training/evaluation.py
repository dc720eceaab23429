"""How good are the weights: the metrics of a task on the validation set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from vision.distributed.context import World
from vision.tasks.base import Evaluator, Task


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
    """Run the model over a validation set. It is in evaluation mode meanwhile and gets its own mode back.

    Args:
        task: gives the output of the model.
        evaluator: gets it, batch by batch.
        tick: called after every batch; whatever it raises ends the evaluation.
        world: every process has its share of the set, and all get the metrics of the whole.

    Returns:
        What the evaluator has computed.
    """
    training = model.training
    model.eval()
    try:
        for batch in batches:
            batch = task.to_device(batch, device)
            with autocast():
                output = task.predict(model, batch)
            evaluator.update(output, batch)
            tick()
    finally:
        model.train(training)
    return evaluator.compute(world or World())
