"""Train the same models with all installed engines, and compare their weights and losses in one table.

    python examples/engines/compare.py [--steps 20] [--engines torch,fabric] [--workloads gpt2,columns]

In memory mode `exact`, each engine reaches the weights of `store`, bit for bit, and all have the same loss curve.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from workload import WORKLOADS

from revnets.utils.format import size

FOLDER = Path(__file__).resolve().parent


class Engine(NamedTuple):
    script: str
    package: str
    processes: int


ENGINES = {
    "torch": Engine("with_torch.py", "torch", 1),
    "accelerate": Engine("with_accelerate.py", "accelerate", 2),
    "fabric": Engine("with_fabric.py", "lightning_fabric", 2),
    "trainer": Engine("with_trainer.py", "transformers", 1),
    "pipeline": Engine("with_pipeline.py", "torch", 2),
}


def main(
    steps: Annotated[int, typer.Option(min=1, help="Number of updates.")] = 20,
    engines: Annotated[str, typer.Option(help="Comma-separated names.")] = ",".join(ENGINES),
    workloads: Annotated[str, typer.Option(help="Comma-separated names.")] = ",".join(WORKLOADS),
) -> None:
    """Train the same models with all installed engines."""
    chosen, models = _listed(engines, ENGINES, "--engines"), _listed(workloads, WORKLOADS, "--workloads")
    console = Console()
    console.width = max(console.width, WIDTH)
    missing = [name for name in chosen if find_spec(ENGINES[name].package) is None]
    if missing:
        console.print(f"not installed: {', '.join(missing)}")
    present = [name for name in chosen if name not in missing]
    results = [
        launched(name, models, steps) for name in track(present, "training ...", console=console, transient=True)
    ]
    assert_equal_curves(results)
    console.print(table(results))


def _listed(text: str, allowed: Mapping[str, Any], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in allowed:
            raise typer.BadParameter(f"{name!r}: give {', '.join(allowed)}", param_hint=option)
    return names


def launched(name: str, workloads: Sequence[str], steps: int) -> dict[str, Any]:
    """Run the script of an engine in the number of processes that it needs, and return its result.

    Raises:
        typer.Exit: If the script failed; its output is printed.
    """
    engine = ENGINES[name]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(engine.processes)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        options = ["--steps", str(steps), "--workloads", ",".join(workloads), "--output", str(output)]
        command = [sys.executable, *(torchrun if engine.processes > 1 else []), str(FOLDER / engine.script), *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            print(done.stdout, file=sys.stderr)
            raise typer.Exit(1)
        return json.loads(output.read_text(encoding="utf-8"))


def assert_equal_curves(results: Sequence[Mapping[str, Any]]) -> None:
    """Check that all engines have the losses of the first one, bit for bit.

    Raises:
        AssertionError: If a loss differs.
    """
    reference = {}
    for result in results:
        for name, found in result["workloads"].items():
            losses = torch.tensor(found["losses"])
            expected = reference.setdefault(name, losses)
            assert torch.equal(losses, expected), f"{result['engine']}, {name}: {losses} instead of {expected}"


WIDTH = 120
"""Width of the table in characters; a narrower terminal wraps its lines."""


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row for every model and engine."""
    found = Table(title="exact = store: equal final weights; losses equal those of the first engine; bit for bit")
    for heading in ("model", "engine", "version"):
        found.add_column(heading, no_wrap=True)
    for heading in ("processes", "updates", "loss", "exact = store", "saved by store", "by exact"):
        found.add_column(heading, justify="right", no_wrap=True)
    for name in WORKLOADS:
        for result in results:
            if name in result["workloads"]:
                row, engine = result["workloads"][name], result["engine"]
                kept = [size(row["kept"][memory]) for memory in ("store", "exact")]
                losses = row["losses"]
                figures = (str(ENGINES[engine].processes), str(len(losses)), f"{losses[-1]:.6f}")
                found.add_row(name, engine, result["version"], *figures, "yes", *kept)
    return found


if __name__ == "__main__":
    typer.run(main)
