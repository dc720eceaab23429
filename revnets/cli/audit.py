"""The command `audit`."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from revnets.analysis.audit import audit
from revnets.analysis.fidelity import fidelity
from revnets.cli.common import REWIRE, input_error, parse_dtype, reversible_model, sample_shape_of, write_figure
from revnets.config.errors import option_error
from revnets.config.memory_budget import OPTIMIZERS
from revnets.models.example_inputs import example_input


def measure(
    source: str,
    overrides: Sequence[str],
    shape: tuple[int, ...] | None,
    batch: int,
    png: Path | None,
    json: bool,
    trust: bool = True,
    blend: float | None = None,
) -> int:
    """Audit a model on random input and print the result.

    Args:
        source: Model, as in `load_model`.
        overrides: Overrides `key=value`.
        shape: Shape of one sample, or None for that of the model.
        batch: Batch size.
        png: File for the figure, or None.
        json: Whether to print JSON instead of tables.
        trust: Whether a YAML file may name classes of other projects.
        blend: Make a network of ordinary blocks reversible with this blend, and compare it with the original network.

    Returns:
        The exit code: 1 if a gradient is wrong.
    """
    torch.manual_seed(0)
    net = reversible_model(source, overrides, trust, blend, REWIRE if blend is None else "")
    shape = shape or sample_shape_of(net, source)
    console = Console(stderr=json)
    with console.status("measuring ...") as status:
        try:
            x = example_input(net, (batch, *shape))
            agreement = None if blend is None else fidelity(net, x)
            result = audit(net, x, progress=lambda what: status.update(f"measuring {what} ..."))
        except (RuntimeError, ValueError) as error:
            raise input_error(source, shape, error) from error
    if json:
        numbers = result.to_dict() | ({} if agreement is None else {"fidelity": agreement.to_dict()})
        print(json_format.dumps(numbers, indent=2))
    else:
        console.print(result.table())
        if agreement is not None:
            console.print(agreement.sentence)
    if png is not None:
        from revnets.plotting.audit import audit_figure

        write_figure(console, audit_figure(result), png)
    return 0 if result.ok else 1


def explain_memory(
    source: str,
    overrides: Sequence[str],
    shape: tuple[int, ...] | None,
    batch: int,
    dtype: str,
    optimizer: str,
    png: Path | None,
    json: bool,
    trust: bool = True,
    blend: float | None = None,
) -> None:
    """Print the parts of the peak memory of a training step, for a model on the meta device.

    Args:
        source: Model, as in `load_model`.
        overrides: Overrides `key=value`.
        shape: Shape of one sample, or None for that of the model.
        batch: Batch size.
        dtype: Name of the dtype.
        optimizer: Optimizer whose state is counted.
        png: File for the figure, or None.
        json: Whether to print JSON instead of a table.
        trust: Whether a YAML file may name classes of other projects.
        blend: Make a network of ordinary blocks reversible with this blend.
    """
    from revnets.analysis.peak_memory import memory_parts
    from revnets.plotting.peak_parts import peak_figure

    precision = parse_dtype(dtype)
    if optimizer not in OPTIMIZERS:
        problem = f"unknown optimizer (value {optimizer})"
        raise option_error("--optimizer", problem, f"Choose {', '.join(OPTIMIZERS)}", code="unknown-choice")
    with torch.device("meta"):
        net = reversible_model(source, overrides, trust, blend, REWIRE if blend is None else "")
    shape = shape or sample_shape_of(net, source)
    console = Console(stderr=json)
    with console.status("simulating ...") as status:
        try:
            result = memory_parts(
                net,
                (example_input(net, (batch, *shape), device="meta"),),
                dtype=precision,
                optimizer=optimizer,
                progress=lambda mode: status.update(f"simulating {mode} ..."),
            )
        except (RuntimeError, ValueError) as error:
            raise input_error(source, shape, error) from error
    if json:
        print(json_format.dumps(result.to_dict(), indent=2))
    else:
        console.print(result.table())
    if png is not None:
        write_figure(console, peak_figure(result), png)
