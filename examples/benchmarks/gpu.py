"""Everything that needs a GPU in one command: right gradients, predicted memory, memory by columns, step times.

    .venv/bin/python -m pip install -e '.[vision,hf]'
    .venv/bin/python examples/benchmarks/gpu.py --out out/gpu                 # at most 8 minutes; gpu.json, gpu.png
    .venv/bin/python examples/benchmarks/gpu.py --device cpu --out out/gpu    # small nets, to see it work

- `checks`: gradients of `recompute` and `exact` against `store`, bit for bit, with random numbers, autocast, another
  memory layout, BatchNorm, each backend of attention, compiled cells (`gpu_checks.py`).
- `plan`: peaks as `revnets.plan` predicts them, against `torch.cuda.max_memory_allocated`, for six models.
- `figure4`: memory by the number of columns, as in the figure 4 of the paper.
- `steps`: milliseconds and peak of a training step of columns shaped like RevCol-T, S and B, in each memory mode, in
  the scheme of the official code, and with checkpoints (`gpu_steps.py`).

What does not fit the device, fails, or comes after `--minutes` is a row that says so; nothing ends the run. The JSON is
written after every section. Exit code 1 if a check found a wrong gradient, or failed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _cli import listed
from gpu_checks import run_checks
from gpu_device import Device, Run
from gpu_figure import gpu_figure
from gpu_steps import MODELS, SIZES, SMALL_MODELS, run_figure, run_plans, run_steps
from rich.console import Console
from rich.table import Table

from revnets.plotting.style import save
from revnets.utils.atomic_files import replacing

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that matrix products repeat themselves


def sections(small: bool) -> dict[str, Callable[[Run], None]]:
    """What is measured, in the order of its worth."""
    if small:
        return {
            "checks": lambda run: run_checks(run, 2),
            "plan": lambda run: run_plans(run, SMALL_MODELS),
            "figure4": lambda run: run_figure(run, (2, 3), 2, 32),
            "steps": lambda run: run_steps(run, {"T": 2}, (2,), 32, 2),
        }
    return {
        "checks": lambda run: run_checks(run, 16),
        "plan": lambda run: run_plans(run, MODELS),
        "figure4": lambda run: run_figure(run, (4, 8, 12, 16), 64, 224),
        "steps": lambda run: run_steps(run, SIZES, (64, 128), 224, 6),
    }


def _device(name: str) -> Device:
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r}: give cpu, cuda or cuda:1", param_hint="--device")
    if kind == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "PyTorch finds no CUDA device here; --device cpu runs small nets", param_hint="--device"
        )
    if kind == "cuda" and (torch.device(name).index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"{name!r}: there are {torch.cuda.device_count()} devices", param_hint="--device")
    if kind == "cuda":
        torch.cuda.set_device(name if ":" in name else "cuda:0")
    return Device(name)


def main(
    out: Annotated[Path, typer.Option(help="Folder of gpu.json and gpu.png.")] = Path("out/gpu"),
    device: Annotated[str, typer.Option(help="cuda, cuda:1, or cpu.")] = "cuda",
    minutes: Annotated[float, typer.Option(help="What has not begun by then is left out.", min=0)] = 8,
    small: Annotated[bool | None, typer.Option(help="Small nets.", show_default="on the CPU")] = None,
    only: Annotated[str, typer.Option(help="Sections, separated by commas.")] = "checks,plan,figure4,steps",
) -> None:
    """Check and measure the engine on a device."""
    console = Console()
    target = _device(device)
    if small is None:
        small = not target.is_cuda
    known = sections(small)
    chosen = listed(only, "--only", {name: name for name in known}, " or ".join(known))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{out}: {error.strerror}", param_hint="--out") from None
    torch.set_num_threads(1)
    reserve = 45 if target.is_cuda else 0  # for what has begun by then, and the figure
    run = Run(target, 60 * minutes - reserve, lambda text: console.print(text, markup=False, highlight=False))
    for name in chosen:
        known[name](run)
        _write(run, out / "gpu.json")
    for name in chosen:
        console.print(table(name, run.rows.get(name, [])))
    found = run.to_dict()
    save(gpu_figure(found), out / "gpu.png")
    console.print(f"{target.words}, torch {torch.__version__}, {found['seconds']:.0f} s")
    if found["dropped"]:
        console.print(f"{found['dropped']} measurements were dropped: {minutes:g} minutes were over", style="yellow")
    console.print(f"wrote {out / 'gpu.json'} and {out / 'gpu.png'}", soft_wrap=True, highlight=False, markup=False)
    wrong = [row for row in run.rows.get("checks", []) if row["status"] == "failed" or row.get("right") is False]
    raise typer.Exit(1 if wrong else 0)


def _write(run: Run, path: Path) -> None:
    with replacing(path) as file:
        file.write(json.dumps(run.to_dict(), indent=1).encode())


def table(section: str, rows: list[dict[str, Any]]) -> Table:
    """The rows of a section, for people."""
    found = Table(title=section, title_justify="left")
    cells = [_cells(row) for row in rows]
    names = list(dict.fromkeys(name for row in cells for name in row))
    for name in names:
        found.add_column(name)
    for row in cells:
        found.add_row(*(row.get(name, "") for name in names))
    return found


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """One row as text; numbers by mode become a column for each mode."""
    found = {}
    for key, value in row.items():
        if key == "modes":
            for mode, numbers in value.items():
                found[mode] = _verdict(numbers) if "right" in numbers else f"{numbers['error']:+.1%}"
        elif key == "peak":
            found["peak GiB"] = f"{value / 2**30:.2f}"
        elif isinstance(value, float):
            found[key] = f"{value:.3g}"
        elif key != "range":
            found[key] = str(value)
    return found


def _verdict(numbers: dict[str, Any]) -> str:
    if numbers["equal"]:
        return "bit for bit"
    return f"{'WRONG ' if numbers['right'] is False else ''}{float(numbers['error']):.1e}"


if __name__ == "__main__":
    typer.run(main)
