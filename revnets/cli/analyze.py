"""The commands `revnets analyze ...`. Other packages add theirs through the entry-point group `revnets.analyses`."""

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
    help="Look into a net as the paper's figures do. Each command draws a picture and writes its numbers as CSV.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def memory(
    spec: SpecArgument = "revcol_tiny",
    overrides: Overrides = None,
    columns: Annotated[str, typer.Option(help="Numbers of columns.")] = "1,2,4,8,12,16,20",
    modes: Annotated[str, typer.Option(help="Memory modes.")] = "store,recompute,exact",
    input_shape: InputShape = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of the step that is predicted.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 or float16 for autocast.")] = "bfloat16",
    measure_columns: Annotated[str, typer.Option(help="Numbers of columns that are built and run.")] = "1,2,4,8",
    measure_input: Annotated[
        str | None, typer.Option(help="Shape of a sample there; 64 x 64 for larger images.", show_default=False)
    ] = None,
    measure_batch: Annotated[int, typer.Option(min=1, help="Samples of the step that is measured.")] = 32,
    png: Png = Path("memory.png"),
    csv: Csv = None,
    trust: Trust = False,
) -> None:
    """Memory against the number of columns, reversible and not (figure 4).

    The step of a GPU is predicted, as revnets plan does. A small one is taken
    on the CPU, counted byte by byte, and held against its own prediction.
    Weights, gradients and activations count; an optimizer does not.

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
        typer.Argument(help="A file of weights, the folder of a run, or whatever `show` takes.", show_default=False),
    ],
    overrides: Overrides = None,
    png: Png = Path("gains.png"),
    csv: Csv = None,
    trust: Trust = False,
) -> None:
    """The distribution of |gamma| in every column, and the bits that `exact` keeps because of it.

    Files are .safetensors, or of torch.save as the trainers of images and of
    fairseq write them, whatever the net. If they hold averaged weights, those
    are looked at.

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
            option, f"{text!r} is no list of positive whole numbers", "Give e.g. 1,2,4,8", code="wrong-type"
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
