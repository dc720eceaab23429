"""The command `revnets`. Other packages add commands with the entry-point group `revnets.commands`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from revnets.cli.options import InputShape, Overrides, Reversible, SpecArgument, Trust, picture_path, sample_shape
from revnets.cli.plugins import Commands

app = typer.Typer(
    name="revnets",
    cls=Commands,
    help="Inspect, measure and train reversible column networks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def show(
    spec: SpecArgument,
    overrides: Overrides = None,
    input_shape: InputShape = None,
    svg: Annotated[
        Path | None,
        typer.Option(
            help="Write a figure of columns, levels and connections to this file.",
            callback=picture_path,
            readable=False,
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write the figure as PNG.", callback=picture_path, readable=False)
    ] = None,
    trust: Trust = False,
) -> None:
    """Show the graph, parameters and multiply-accumulates of a model, as tables and as a figure.

    A YAML file can run code: it may name classes of other projects. This command rejects them without --trust.
    """
    from revnets.cli.show import describe

    describe(spec, overrides or [], sample_shape(input_shape), [path for path in (svg, png) if path], trust)


@app.command()
def audit(
    spec: SpecArgument,
    overrides: Overrides = None,
    input_shape: InputShape = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Batch size.", show_default="2, with --memory 32"),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Show the parts of the peak memory of a simulated training step.")
    ] = False,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="With --memory: optimizer whose state is counted (none, sgd, lion, adam, adamw).", show_default="adamw"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="With --memory: float32, or bfloat16 or float16 for autocast.", show_default="float32"),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write the figure to this file.", callback=picture_path, readable=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    reversible: Reversible = None,
    trust: Trust = True,
) -> None:
    """Measure whether a model is reversible, whether its gradients are right, and what it saves for backward.

    Exit code 1 if a gradient is wrong. Steps use random input and newly initialized weights. With --memory: show what
    the bytes at the peak belong to, in every memory mode.

    A YAML file can run code: the classes that it names are imported and run. Use --no-trust for untrusted files.
    """
    from revnets.cli.audit import explain_memory, measure
    from revnets.config.errors import option_error

    shape = sample_shape(input_shape)
    if memory:
        request = dtype or "float32", optimizer or "adamw"
        explain_memory(spec, overrides or [], shape, batch or 32, *request, png, json, trust, reversible)
        return
    for option, value in (("--optimizer", optimizer), ("--dtype", dtype)):
        if value is not None:
            raise option_error(option, "requires --memory", "Add --memory", code="conflicting-values")
    raise typer.Exit(measure(spec, overrides or [], shape, batch or 2, png, json, trust, reversible))


@app.command()
def plan(
    spec: SpecArgument,
    overrides: Overrides = None,
    input_shape: InputShape = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of one process.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 or float16 for autocast.")] = "float32",
    optimizer: Annotated[
        str | None, typer.Option(help="none, sgd, lion, adam or adamw.", show_default="from YAML, or adamw")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes that train together.", show_default="from YAML, or 1")
    ] = None,
    sharding: Annotated[
        str | None, typer.Option(help="ddp (replicas) or fsdp (shards).", show_default="from YAML, or ddp")
    ] = None,
    grad_accum: Annotated[
        int | None, typer.Option(min=1, help="Forward passes per update.", show_default="from YAML, or 1")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Choose the fastest policy within 24GiB, say, or within the peak of a memory mode."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Host memory that may be used in addition, e.g. 64GiB.")] = None,
    link: Annotated[
        str | None, typer.Option(help="Speed between device and host.", show_default="from YAML, or 25GB/s")
    ] = None,
    flops: Annotated[
        str | None,
        typer.Option(help="Speed of the device, e.g. 300TFLOP/s.", show_default="from YAML, or measured"),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write the figure to this file.", callback=picture_path, readable=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    reversible: Reversible = None,
    trust: Trust = True,
) -> None:
    """Predict the memory of a training step in every memory mode without running it.

    A YAML file can run code: the classes that it names are imported and run. Use --no-trust for untrusted files.
    """
    from revnets.cli.plan import forecast

    request = {"dtype": dtype, "optimizer": optimizer, "ranks": ranks, "sharding": sharding}
    request |= {"grad_accum": grad_accum, "budget": budget, "host": host, "link": link, "flops": flops}
    forecast(spec, overrides or [], sample_shape(input_shape), batch, request, png, json, trust, reversible)


@app.command()
def env(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of Markdown tables.")] = False,
    imports: Annotated[
        bool,
        typer.Option("--imports", help="Also import every package, each in its own process, and report failures."),
    ] = False,
) -> None:
    """Print versions, devices and extras as Markdown, for a bug report.

    Values of variables that could be secret are not printed, and the home directory is printed as ~.
    """
    from revnets.cli.env import print_environment

    print_environment(json, imports)


def _expanded(word: str) -> str:
    """Replace `~` by the home directory where no shell has done so: in `--option=~/x`, or in a call without a shell."""
    option, equals, value = word.partition("=")
    if word.startswith("-") and equals:
        return f"{option}={os.path.expanduser(value)}"
    return word if os.path.lexists(word) else os.path.expanduser(word)


def main() -> None:
    """Entry point. Prints every expected error as one line on stderr and exits with code 2, without a traceback."""
    try:
        app(args=[_expanded(word) for word in sys.argv[1:]])
    except Exception as error:
        from revnets.config.errors import SpecError
        from revnets.models.plan import PlanError  # imports the planner, which most commands do not need

        if isinstance(error, OSError) and error.filename and error.strerror:  # such as a file name that is too long
            error = SpecError(str(error.filename), "", error.strerror, "Check the path", "unreadable-file")
        if not isinstance(error, (SpecError, PlanError)):
            raise error
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print("error:", style="red", end=" ")
        console.print(str(error), markup=False)
        sys.exit(2)
