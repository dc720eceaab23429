"""Training tasks: the protocol `Task` and its implementations."""

from vision.tasks.base import Batches, Curve, Evaluator, LossTask, Metrics, Task, scalars
from vision.tasks.builders import create_task

__all__ = ["Batches", "Curve", "Evaluator", "LossTask", "Metrics", "Task", "create_task", "scalars"]
