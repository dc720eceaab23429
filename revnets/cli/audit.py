"""The command `audit`."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from revnets.analysis.audit import audit
from revnets.cli.common import example_shape, input_error, reversible_model, write_figure


def measure(
    source: str,
    overrides: Sequence[str],
    shape: tuple[int, ...] | None,
    batch: int,
    png: Path | None,
    json: bool,
    trust: bool = True,
) -> int:
    """Audit a freshly initialised net on random input; returns the exit code."""
    torch.manual_seed(0)
    net = reversible_model(source, overrides, trust)
    shape = shape or example_shape(net, source)
    console = Console(stderr=json)
    with console.status("measuring ...") as status:
        try:
            x = torch.randn(batch, *shape)
            result = audit(net, x, progress=lambda what: status.update(f"measuring {what} ..."))
        except (RuntimeError, ValueError) as error:
            raise input_error(source, shape, error) from error
    if json:
        print(json_format.dumps(result.to_dict(), indent=2))
    else:
        console.print(result.table())
    if png is not None:
        from revnets.plotting.audit import audit_figure

        write_figure(console, audit_figure(result), png)
    return 0 if result.ok else 1
