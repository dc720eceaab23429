"""Measure the drift of plain inversion: gradient error against ordinary autograd, by columns and gamma.

    .venv/bin/python examples/benchmarks/drift.py --png docs/assets/drift.png

RevCol-S-shaped columns at random initialization, batch 1, 64 x 64 images, one thread. `invert` rebuilds states only
with the inverse, as the paper describes; `exact` also restores the lost bits.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from _cli import counts, picture
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import revnets

COLUMNS = (4, 8, 16, 32)
GAINS = (1.0, 0.5, 0.2, 0.05)


def main(
    png: Annotated[Path | None, typer.Option(help="Write the figure to this file.", callback=picture)] = None,
    width: Annotated[int, typer.Option(help="Channels of level 0; 64 in the paper's RevCol-S.", min=1)] = 64,
    columns: Annotated[str, typer.Option(help="Comma-separated numbers of columns.")] = ",".join(map(str, COLUMNS)),
) -> None:
    """Measure the gradient error of `invert` and `exact`, in float32 and under bfloat16 autocast."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", revnets.DriftWarning)  # the benchmark measures this drift
    numbers = counts(columns, "--columns", 2)
    cases = [(gain, count, half) for half in (False, True) for gain in GAINS for count in numbers]
    errors = {case: gradient_errors(*case, width) for case in track(cases, description="measuring", transient=True)}
    console = Console()
    for half in (False, True):
        console.print(table(errors, numbers, half))
    if png is not None:
        draw(errors, numbers, png)
        console.print(f"wrote {png}", highlight=False, markup=False, soft_wrap=True)


def gradient_errors(gain: float, count: int, half: bool, width: int) -> tuple[float, float]:
    """Compute the relative L2 error of all parameter gradients in `invert` and in `exact`, against `store`."""
    torch.manual_seed(0)
    net = revnets.build(
        {
            "columns": count,
            "stem": {"type": "patchify"},
            "levels": [{"dim": width * 2**i, "depth": (2, 2, 4, 2)[i], "block": "convnext"} for i in range(4)],
            "gain": {"init": gain},
            "head": {"type": "classifier", "num_classes": 10},
        }
    )
    image, label = torch.randn(1, 3, 64, 64), torch.tensor([3])
    gradients = {mode: gradient(net, mode, image, label, half) for mode in ("store", "invert", "exact")}
    reference = gradients["store"]
    scale = float(reference.norm())
    return tuple(float((gradients[mode] - reference).norm()) / scale for mode in ("invert", "exact"))


def gradient(net: revnets.Net, mode: str, image: Tensor, label: Tensor, half: bool) -> Tensor:
    """Compute the gradient of all parameters as one float64 vector."""
    net.columns.memory = mode
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = torch.nn.functional.cross_entropy(net(image), label)
    parts = torch.autograd.grad(loss, list(net.parameters()))
    return torch.cat([part.double().flatten() for part in parts])


def predicted(gain: float, count: int, half: bool) -> float:
    return revnets.predict_drift(["invert"] * count, [gain**-2] * count, autocast=torch.bfloat16 if half else None)


def table(errors: dict[tuple[float, int, bool], tuple[float, float]], counts: list[int], half: bool) -> Table:
    rows = Table(title="bfloat16 autocast" if half else "float32", title_justify="left")
    rows.add_column("gamma", justify="right")
    for count in counts:
        rows.add_column(f"{count} columns\ninvert (predicted) / exact", justify="right")
    for gain in GAINS:
        cells = []
        for count in counts:
            invert, exact = errors[gain, count, half]
            color = "red" if not invert < 0.01 else "yellow" if invert > 1e-5 else "green"
            cells.append(f"[{color}]{invert:.1e}[/{color}] ({predicted(gain, count, half):.0e}) / {exact:.0e}")
        rows.add_row(f"{gain}", *cells)
    return rows


def draw(errors: dict[tuple[float, int, bool], tuple[float, float]], counts: list[int], path: Path) -> None:
    from matplotlib.figure import Figure

    from revnets.plotting.style import save

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, half in zip(axes, (False, True), strict=True):
        for gain, color, marker in zip(GAINS, ("#009e73", "#0072b2", "#e69f00", "#d55e00"), "osD^", strict=True):
            values = [min(errors[gain, count, half][0], 10.0) for count in counts]  # NaN and overflow are off the scale
            values = [10.0 if value != value else value for value in values]
            axis.plot(counts, values, marker=marker, color=color, label=f"gamma {gain}")
            axis.plot(counts, [predicted(gain, count, half) for count in counts], ":", color=color, linewidth=1)
        axis.axhline(0.01, color="#666666", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", yscale="log", xlabel="columns", title="bfloat16 autocast" if half else "float32")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gradient error of plain inversion")
    axes[0].set_title("float32 (dotted: predicted)")
    axes[0].text(counts[-1], 0.012, "1 %", color="#666666", fontsize=8, va="bottom", ha="right")
    axes[1].legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


if __name__ == "__main__":
    typer.run(main)
