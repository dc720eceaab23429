"""The commands `revnets analyze ...`. Other packages add commands with the entry-point group `revnets.analyses`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from revnets.cli.options import InputShape, Overrides, SpecArgument, Trust, sample_shape
from revnets.cli.output import Csv, Png, deliver, outputs, print_rows, progress
from revnets.cli.plugins import Analyses
from revnets.config.errors import nearest, option_error

app = typer.Typer(
    cls=Analyses,
    help="Reproduce analyses of the paper. Each command draws a figure and writes its numbers as CSV.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def memory(
    spec: SpecArgument = "revcol_tiny",
    overrides: Overrides = None,
    columns: Annotated[str, typer.Option(help="Numbers of columns to predict.")] = "1,2,4,8,12,16,20",
    modes: Annotated[str, typer.Option(help="Memory modes.")] = "store,recompute,exact",
    input_shape: InputShape = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of the predicted step.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 or float16 for autocast.")] = "bfloat16",
    measure_columns: Annotated[str, typer.Option(help="Numbers of columns to measure.")] = "1,2,4,8",
    measure_input: Annotated[
        str | None,
        typer.Option(
            help="Shape of one sample of the measured step. By default that of --input, at most 64 x 64 for images.",
            show_default=False,
        ),
    ] = None,
    measure_batch: Annotated[int, typer.Option(min=1, help="Batch size of the measured step.")] = 32,
    png: Png = Path("memory.png"),
    csv: Csv = None,
    trust: Trust = False,
) -> None:
    """Plot memory against the number of columns, with and without reversibility (figure 4).

    Predict a large training step, as revnets plan does. Measure a small step
    on the CPU byte by byte, and compare it with its prediction. Weights,
    gradients and activations count. Optimizer state does not.

    revnets analyze memory revcol_tiny --png memory.png
    """
    from rich.console import Console

    from revnets.analysis.memory_scaling import Step, measured, predicted, table
    from revnets.cli.common import parse_dtype, sample_shape_of
    from revnets.plotting.analysis import memory_figure

    png, csv = outputs(png, csv)
    shape, small = sample_shape(input_shape), sample_shape(measure_input)
    counts, kept_modes = _counts(columns, "--columns"), _modes(modes)
    large = Step(spec, tuple(overrides or ()), counts, kept_modes, (), batch, parse_dtype(dtype), trust)
    few = _counts(measure_columns, "--measure-columns")
    shape = shape or sample_shape_of(large.model(large.columns[0], "meta"), spec)
    if small is None:
        small = (shape[0], 64, 64) if len(shape) == 3 and min(shape[1:]) > 64 else shape
    large = replace(large, shape=shape)
    little = replace(large, shape=small, columns=few, batch=measure_batch)
    console, found = Console(), []
    with progress(console, len(large.modes) * (len(large.columns) + 2 * len(few))) as (tell, advance):
        for points in (predicted(large, tell), predicted(little, tell), measured(little, tell)):
            found.append([])
            for point in points:
                found[-1].append(point)
                advance()
    for points in (found[0], found[2]):
        print_rows(console, f"{points[0].kind}: {points[0].words}", table(points))
    lines = [asdict(point) for points in found for point in points]
    console.print(deliver(memory_figure(*found), png, lines, csv), soft_wrap=True, highlight=False, markup=False)


@app.command()
def gains(
    model: Annotated[
        str,
        typer.Argument(
            help="File of weights, directory of a run, or any model that `revnets show` supports.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    png: Png = Path("gains.png"),
    csv: Csv = None,
    trust: Trust = False,
) -> None:
    """Plot the distribution of |gamma| in every column, and the lost bits that mode `exact` saves.

    Files of weights are .safetensors, or checkpoints of revnets train or
    fairseq, of any model with gains. Averaged weights are preferred.

    revnets analyze gains runs/fashion --png gains.png
    """
    from rich.console import Console

    from revnets.analysis.gains import lost_bits, read_gains, rows, table
    from revnets.plotting.analysis import gains_figure

    png, csv = outputs(png, csv)
    console, cells = Console(), read_gains(model, overrides or [], trust)
    bits = []
    with progress(console, len(cells)) as (tell, advance):
        for cell in cells:
            tell(f"measuring lost bits, column {cell.column}")
            bits.append(lost_bits(cell.gamma))
            advance()
    print_rows(console, f"|gamma| and lost bits per element, {model}", table(cells, bits))
    written = deliver(gains_figure(cells, bits), png, rows(cells, bits), csv)
    console.print(written, soft_wrap=True, highlight=False, markup=False)


def _counts(text: str, option: str) -> tuple[int, ...]:
    try:
        counts = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        counts = ()
    if not counts or counts[0] < 1:
        raise option_error(
            option, f"{text!r} is not a list of positive whole numbers", "Give e.g. 1,2,4,8", code="wrong-type"
        )
    return counts


def _modes(text: str) -> tuple[str, ...]:
    from revnets.engine.memory_mode import Memory

    modes = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for mode in modes:
        if mode not in list(Memory):
            remedy = nearest(mode, Memory, "Choose among")
            raise option_error("--modes", f"memory mode {mode!r} is unknown", remedy, code="unknown-choice")
    return modes
