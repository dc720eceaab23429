"""The command `plan`."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from revnets.cli.common import REWIRE, parse_dtype, reversible_model, sample_shape_of, write_figure
from revnets.config.memory_budget import BudgetSpec
from revnets.memory.planner import Plan
from revnets.models.example_inputs import example_input
from revnets.utils.format import size


def forecast(
    source: str,
    overrides: Sequence[str],
    shape: tuple[int, ...] | None,
    batch: int,
    request: dict[str, Any],
    png: Path | None,
    json: bool,
    trust: bool = True,
    blend: float | None = None,
) -> None:
    """Plan the memory of a training step and print the plan, for a model on the meta device.

    Args:
        source: Model, as in `load_model`.
        overrides: Overrides `key=value`.
        shape: Shape of one sample, or None for that of the model.
        batch: Batch size of one process.
        request: Keyword arguments of `revnets.plan`. Values of None come from the budget in the YAML file, if any.
        png: File for the figure, or None.
        json: Whether to print JSON instead of a table.
        trust: Whether a YAML file may name classes of other projects.
        blend: Make a network of ordinary blocks reversible with this blend.
    """
    from revnets.models.plan import plan
    from revnets.plotting.memory_plan import plan_figure

    with torch.device("meta"):
        net = reversible_model(source, overrides, trust, blend, REWIRE if blend is None else "")
    shape = shape or sample_shape_of(net, source)
    console = Console(stderr=json)
    with console.status("simulating ...") as status:
        memory = getattr(getattr(net, "spec", None), "memory", None)
        own = memory.model_dump() if isinstance(memory, BudgetSpec) else {}
        given = {**request, "dtype": parse_dtype(request["dtype"])}
        request = {key: value for one in (own, given) for key, value in one.items() if value is not None}
        example = example_input(net, (batch, *shape), device="meta")
        result = plan(net, example, progress=lambda what: status.update(f"simulating {what} ..."), **request)
    if json:
        print(json_format.dumps(result.to_dict(), indent=2))
    else:
        console.print(plan_table(result))
    if png is not None:
        write_figure(console, plan_figure(result), png)


def plan_table(plan: Plan) -> Group:
    """Return a plan as a table and a sentence."""
    where = "one process" if plan.ranks == 1 else f"each of {plan.ranks} processes ({plan.sharding})"
    title = f"Memory of a training step, {where}, input {' x '.join(map(str, plan.input_shape))}, {plan.dtype}"
    table = Table(title=title, title_justify="left")
    names = ["memory", "weights", "gradients", "optimizer", "kept", "peak", *(["host"] if plan.host else []), "FLOPs"]
    for name in names:
        table.add_column(name, justify="left" if name == "memory" else "right")
    rows = [*plan.modes, plan.chosen] if plan.chosen and plan.chosen not in plan.modes else plan.modes
    for row in rows:
        fits = plan.budget is None or row.peak <= plan.budget
        table.add_row(
            row.name,
            *(size(count) for count in (row.parameters, row.gradients, row.optimizer, row.kept)),
            Text(size(row.peak), "" if plan.budget is None else "green" if fits else "red"),
            *([size(row.host) if row.host else "-"] if plan.host else []),
            f"{row.extra:.2f}x",
            style="bold" if row == plan.chosen else "",
        )
    return Group(table, *([Text(plan.sentence)] if plan.chosen else []))
