"""Compare inference of RevCol models with other timm models of the same size.

    .venv/bin/python examples/benchmarks/inference.py                  # RevCol-T against ConvNeXt-T at 224, batch 1
    .venv/bin/python examples/benchmarks/inference.py --models swin_tiny_patch4_window7_224,revcol_tiny --batch 8
    .venv/bin/python examples/benchmarks/inference.py --device cuda --amp --batch 128

Prints parameters, multiply-accumulates, and time per image (medians of interleaved rounds): CPU time (user and system,
one thread) on a CPU, synchronized wall time on a GPU. Times are also relative to the first model.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Annotated

import timm
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vision  # noqa: F401 (registers RevCol with timm)
from revnets.config.errors import nearest


class Contender:
    """One model and the times of its passes."""

    def __init__(self, name: str, images: Tensor, amp: bool, compiled: bool):
        self.name, self.images, self.amp = name, images, amp
        model = timm.create_model(name).eval().to(images.device, memory_format=torch.channels_last)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.macs = macs(name, images.shape[-1])
        self.model = torch.compile(model) if compiled else model
        self.seconds: list[float] = []

    def run(self) -> None:
        with torch.inference_mode(), torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.amp):
            self.model(self.images)

    def timed(self) -> None:
        clock = time.process_time if self.images.device.type == "cpu" else _synchronized_clock
        start = clock()
        self.run()
        self.seconds.append((clock() - start) / len(self.images))


def _synchronized_clock() -> float:
    torch.accelerator.synchronize()
    return time.perf_counter()


def macs(name: str, size: int) -> int:
    """Count the multiply-accumulates of convolutions and matrix products for one image, on the meta device."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return counter.get_total_flops() // 2


def main(
    models: Annotated[str, typer.Option(help="Comma-separated timm names, e.g. convnext_tiny,revcol_tiny.")] = (
        "convnext_tiny,revcol_tiny"
    ),
    size: Annotated[int, typer.Option(help="Side of the images, in pixels.", min=1)] = 224,
    batch: Annotated[int, typer.Option(help="Images per pass.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Timed passes of each model.", min=1)] = 40,
    device: Annotated[str, typer.Option(help="Device: cpu, cuda, ...")] = "cpu",
    amp: Annotated[bool, typer.Option("--amp", help="Use bfloat16 autocast.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
) -> None:
    """Compare the inference speed of untrained models."""
    names = models.split(",")
    for name in names:
        if not timm.is_model(name):
            raise typer.BadParameter(f"timm has no model {name!r}. {nearest(name, timm.list_models(), 'Available')}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    contenders = [Contender(name, images, amp, compiled) for name in names]
    for contender in contenders:  # the first passes select kernels
        contender.run()
        contender.run()
    for _ in track(range(rounds), description="rounds", transient=True):
        for contender in contenders:
            contender.timed()
    console = Console()
    console.print(table(contenders, "CPU ms" if images.device.type == "cpu" else "ms"))
    where = f"1 thread of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}" if device == "cpu" else device
    console.print(f"{size} x {size}, batch {batch}, {rounds} rounds, torch {torch.__version__}, {where}")


def table(contenders: list[Contender], unit: str) -> Table:
    rows = Table()
    for name in ("model", "params M", "MACs G", f"{unit} per image", f"x {contenders[0].name}"):
        rows.add_column(name, justify="left" if name == "model" else "right")
    base = statistics.median(contenders[0].seconds)
    for contender in contenders:
        median = statistics.median(contender.seconds)
        sizes = f"{contender.parameters / 1e6:.2f}", f"{contender.macs / 1e9:.2f}"
        rows.add_row(contender.name, *sizes, f"{1e3 * median:.1f}", f"{median / base:.3f}")
    return rows


if __name__ == "__main__":
    typer.run(main)
