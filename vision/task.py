"""Former path of `vision.supervision.task`."""

from vision.supervision.task import SupervisionTask as SupervisionTask
