"""The command `revnets`. Other packages add commands through the entry-point group `revnets.commands`."""

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
    help="Reversible column nets: look at them, measure them, train them.",
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
        typer.Option(help="Draw columns, levels and wires into this file.", callback=picture_path, readable=False),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="The same as a PNG file.", callback=picture_path, readable=False)
    ] = None,
    trust: Trust = False,
) -> None:
    """Show a net: its graph, parameters and multiply-accumulates, as a table and as a picture.

    A YAML file is a program. This command refuses to run code of other projects that it names, unless --trust is given.
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
        typer.Option(min=1, help="Samples in the batch that is measured.", show_default="2, with --memory 32"),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Show what the peak of a step consists of, on simulated tensors.")
    ] = False,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="With --memory, whose state is counted: none, sgd, lion, adam or adamw.", show_default="adamw"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="With --memory: float32, or bfloat16 or float16 for autocast.", show_default="float32"),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Draw the figures into this file.", callback=picture_path, readable=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print numbers for machines instead of a table.")] = False,
    reversible: Reversible = None,
    trust: Trust = True,
) -> None:
    """Measure whether a net is reversible, whether its gradients are right, and what it keeps for backward.

    Exit code 1 if a gradient is wrong. Every step is taken on random input, with the weights of the initialization.
    With --memory: what the bytes at the peak belong to, in every memory mode.

    A YAML file is a program: the classes that it names are imported and run. Give --no-trust with files of others.
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
            raise option_error(option, "is for --memory alone", "Give --memory, too", code="conflicting-values")
    raise typer.Exit(measure(spec, overrides or [], shape, batch or 2, png, json, trust, reversible))


@app.command()
def plan(
    spec: SpecArgument,
    overrides: Overrides = None,
    input_shape: InputShape = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples a process sees in one step.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 or float16 for autocast.")] = "float32",
    optimizer: Annotated[
        str | None, typer.Option(help="none, sgd, lion, adam or adamw.", show_default="the YAML's, or adamw")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes that train together.", show_default="the YAML's, or 1")
    ] = None,
    sharding: Annotated[
        str | None, typer.Option(help="ddp (replicas) or fsdp (shards).", show_default="the YAML's, or ddp")
    ] = None,
    grad_accum: Annotated[
        int | None, typer.Option(min=1, help="Forward passes per update.", show_default="the YAML's, or 1")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Fastest way under it: 24GiB, or a mode (its peak).")] = None,
    host: Annotated[str | None, typer.Option(help="Host memory that may be used besides: 64GiB.")] = None,
    link: Annotated[
        str | None, typer.Option(help="Speed between device and host.", show_default="the YAML's, or 25GB/s")
    ] = None,
    flops: Annotated[
        str | None,
        typer.Option(help="Speed of the device: 300TFLOP/s.", show_default="the YAML's, or that of this machine"),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Draw the figure into this file.", callback=picture_path, readable=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print numbers for machines instead of a table.")] = False,
    reversible: Reversible = None,
    trust: Trust = True,
) -> None:
    """Predict the memory of a training step in every memory mode, without taking it.

    A YAML file is a program: the classes that it names are imported and run. Give --no-trust with files of others.
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
    """`~` as the home folder where no shell has replaced it: behind `--option=`, or in a call without a shell."""
    option, equals, value = word.partition("=")
    if word.startswith("-") and equals:
        return f"{option}={os.path.expanduser(value)}"
    return word if os.path.lexists(word) else os.path.expanduser(word)


def main() -> None:
    """Entry point: every expected mistake is one line on stderr and exit code 2, never a traceback."""
    try:
        app(args=[_expanded(word) for word in sys.argv[1:]])
    except Exception as error:
        from revnets.config.errors import SpecError
        from revnets.models.plan import PlanError  # with the planner, which most commands do without

        if isinstance(error, OSError) and error.filename and error.strerror:  # such as a name that is too long
            error = SpecError(str(error.filename), "", error.strerror, "Check the path", "unreadable-file")
        if not isinstance(error, (SpecError, PlanError)):
            raise error
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print("error:", style="red", end=" ")
        console.print(str(error), markup=False)
        sys.exit(2)
