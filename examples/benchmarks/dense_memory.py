"""Memory of a training step of detectors and segmenters, heads and loss included, by memory mode.

    .venv/bin/python examples/benchmarks/dense_memory.py                         # all five, on a small RevCol
    .venv/bin/python examples/benchmarks/dense_memory.py --measure               # and compared with a real step
    .venv/bin/python examples/benchmarks/dense_memory.py --backbone revcol_tiny --size 256 --markdown

`kept` is the memory alive between forward and backward. `peak` is the most memory alive at once, with gradients and
without weights and optimizer. Both are simulated, for the largest number of boxes that a detector allows. `--measure`
also runs a real step on the CPU in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import torch
import typer
from _cli import listed
from rich.console import Console
from rich.table import Table
from torch import nn

import revnets
from revnets.memory.tracker import peak_bytes
from vision.detection import DetectionStep, cascade_mask_rcnn, dino, htc
from vision.segmentation import mask2former, upernet
from vision.tasks.semantic_segmentation import SegmentationStep

MODELS = {
    "cascade": (cascade_mask_rcnn, {}),
    "htc": (htc, {"stuff_classes": 183}),
    "dino": (dino, {}),
    "upernet": (upernet, {}),
    "mask2former": (mask2former, {}),
}
SMALL = {
    "cascade": {"channels": 32, "width": 128, "mask_width": 32},
    "htc": {"channels": 32, "width": 128, "mask_width": 32},
    "dino": {"width": 64, "feedforward": 128, "encoder_layers": 2, "decoder_layers": 2},
    "upernet": {"channels": 64, "auxiliary_channels": 32},
    "mask2former": {"width": 64, "feedforward": 128, "encoder_layers": 2, "decoder_layers": 2, "points": 512},
}
"""Options for backbones other than those of the paper."""


class Row(NamedTuple):
    """Bytes of a step; `measured` is None without a real step."""

    model: str
    memory: str
    recomputes: bool
    kept: int
    peak: int
    measured: int | None

    def texts(self) -> list[str]:
        """Return the cells of the row, with sizes in MiB."""
        found = [
            self.model,
            self.memory,
            "yes" if self.recomputes else "no",
            _mebibytes(self.kept),
            _mebibytes(self.peak),
        ]
        if self.measured is None:
            return found
        return [*found, _mebibytes(self.measured), f"{self.peak / self.measured - 1:+.2%}"]


def step_of(name: str, backbone: str, memory: str, recomputes: bool, classes: int, objects: int) -> nn.Module:
    """Build the training step of a model as a function of images.

    Args:
        objects: Objects per image; for Mask2Former, classes per image.
    """
    build, options = MODELS[name]
    options = options | ({} if backbone.startswith("revcol_") else SMALL[name])
    create: Callable[..., Any] = build
    model = create(backbone, classes, memory=memory, checkpoint_heads=recomputes, **options).train()
    if name in ("upernet", "mask2former"):
        return SegmentationStep(model, objects)
    return DetectionStep(model, objects)


def rows(
    names: list[str], backbone: str, size: int, batch: int, classes: int, objects: int, measure: bool
) -> Iterator[Row]:
    """Yield the rows of the table."""
    shape = batch, 3, size, size
    for name in names:
        for memory in ("store", "exact"):
            for recomputes in (False, True):
                torch.manual_seed(0)
                with torch.device("cpu" if measure else "meta"):
                    step = step_of(name, backbone, memory, recomputes, classes, objects)
                found = revnets.plan(step, shape, modes=[memory], optimizer="none").modes[0]
                real = peak_bytes(step, torch.randn(shape)) if measure else None
                yield Row(name, memory, recomputes, found.kept, found.peak - found.parameters, real)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.4g}"


def main(
    models: Annotated[str, typer.Option(help="Any of cascade, htc, dino, upernet and mask2former.")] = ",".join(MODELS),
    backbone: Annotated[str, typer.Option(help="Model name in timm. Heads are small unless it is revcol_...")] = (
        "test_revcol"
    ),
    size: Annotated[int, typer.Option(help="Side of the images.", min=32)] = 128,
    batch: Annotated[int, typer.Option(help="Images per step.", min=2)] = 2,
    classes: Annotated[int, typer.Option(help="Classes of the data.", min=2)] = 80,
    objects: Annotated[int, typer.Option(help="Objects or classes per image.", min=1)] = 100,
    measure: Annotated[bool, typer.Option("--measure", help="Also measure a real step.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a table for the documentation.")] = False,
) -> None:
    """Print the memory of training steps of detectors and segmenters."""
    names = listed(models, "--models", {name: name for name in MODELS}, f"any of {', '.join(MODELS)}")
    columns = ["model", "memory", "checkpoint_heads", "kept, MiB", "peak, MiB"]
    columns += ["measured, MiB", "difference"] if measure else []
    found = rows(names, backbone, size, batch, classes, objects, measure)
    if markdown:
        print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        for row in found:
            print(f"| {' | '.join(row.texts())} |", flush=True)
        return
    title = f"{batch} images of {size} x {size}, {backbone}, float32"
    table = Table(*columns, title=title, title_justify="left")
    for row in found:
        table.add_row(*row.texts())
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
