"""Train a RevCol-Transformer and a vanilla transformer of equal size on the Bible, from raw text to BLEU.

    python examples/experiments/translate.py                  # about 10 minutes on 2 idle CPU cores
    python examples/experiments/translate.py --updates 100    # a quick test, with useless translations

Prepares the bundled corpus (English-German, 11,721 verses), trains both models concurrently with fairseq, with one
thread each, translates the test set, and prints BLEU and some translations and draws both curves. The output is in
runs/translate, which every call replaces.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nlp.data.corpus import TranslationError, lines_of
from nlp.data.prepare import prepare
from nlp.data.recipe import read_recipe
from nlp.evaluation.bleu import Output, Score, read_output, scores
from nlp.evaluation.checkpoint_averaging import average, select_checkpoints
from revnets.plotting.style import save

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path(os.path.relpath(ROOT / "runs" / "translate"))
CORPUS = ROOT / "examples" / "data" / "kjv-elberfelder-short.en-de.tsv.gz"
DATA = {"languages": "en-de", "valid": 300, "test": 400, "merges": 2000, "clean": {"ratio": 2.0}}

SIZE = "--decoder-embed-dim 64 --decoder-ffn-embed-dim 128 --decoder-attention-heads 2 --decoder-layers 2"
MODELS = {
    # 4 columns of 2 levels with one block each, and 3 projections from one column to the next.
    "RevCol-Transformer": "--arch revcol_transformer_tiny",
    # The same number of layers; a wider FFN compensates for projections and gains.
    "vanilla transformer": f"--arch transformer {SIZE} --encoder-layers 8 --encoder-embed-dim 64 "
    "--encoder-ffn-embed-dim 141 --encoder-attention-heads 2",
}
COLORS = dict(zip(MODELS, ("#0072B2", "#D55E00"), strict=True))
INK, GRID = "#222222", "#e4e6ea"

TRAINING = """
    --share-all-embeddings --optimizer adam --adam-betas (0.9,0.98) --clip-norm 1.0
    --lr 0.003 --lr-scheduler inverse_sqrt --warmup-updates 300 --dropout 0.1 --max-tokens 2048
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1
    --eval-bleu --eval-bleu-args {"beam":1,"max_len_a":1.2,"max_len_b":10}
    --eval-bleu-detok moses --eval-bleu-remove-bpe
    --num-workers 0 --log-format json --log-interval 10 --no-epoch-checkpoints --validate-interval 1000000
"""
SEARCH = "--beam 4 --lenpen 0.6 --max-len-a 2 --max-len-b 10 --remove-bpe --max-tokens 2048 --num-workers 0 "
SEARCH += "--required-batch-size-multiple 1"  # keeps the last test sentences (docs/guides/translation-model.md)
AVERAGED = 3
"""Number of last checkpoints that are averaged."""


@dataclass
class Run:
    """A running fairseq command for one of the models, with its output in a file."""

    name: str
    text: Path
    process: subprocess.Popen[bytes]
    seconds: float | None = None  # CPU seconds, when it has finished

    def poll(self) -> bool:
        """Return True if the command has finished.

        Raises:
            TranslationError: If the command failed.
        """
        if self.seconds is None:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.seconds = usage.ru_utime + usage.ru_stime
                if self.process.returncode:
                    last = self.output().strip().splitlines()[-1:]
                    raise TranslationError(f"{self.name} failed: {''.join(last)}. The full output is in {self.text}")
        return self.seconds is not None

    def output(self) -> str:
        return self.text.read_text(encoding="utf-8", errors="replace")

    def curve(self, kind: str, key: str) -> tuple[list[int], list[float]]:
        """Return updates, and the values of `key` that fairseq logged as `train_inner` or `valid`."""
        lines = [json.loads(found[1]) for found in re.finditer(rf"\| {kind} \| (\{{.*\}})", self.output())]
        prefix = "valid_" if kind == "valid" else ""
        return [int(line[prefix + "num_updates"]) for line in lines], [float(line[prefix + key]) for line in lines]


def main(
    updates: Annotated[int, typer.Option(min=1, help="Updates of both models, with at most 2048 tokens each.")] = 2000,
    points: Annotated[int, typer.Option(min=1, help="Number of validations during training.")] = 10,
    output: Annotated[Path, typer.Option(help="Output directory, which is replaced.")] = OUTPUT,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and dropout.")] = 1,
    revcol: Annotated[
        str, typer.Option(help="Additional options for the RevCol-Transformer, e.g. '--revcol-gain 1'.")
    ] = "",
) -> None:
    """Train a RevCol-Transformer and a vanilla transformer of equal size on the Bible, and compare them.

    Takes about 10 minutes on 2 idle cores, in proportion to --updates.
    """
    console = Console()
    clear(output)
    recipe, base = read_recipe([str(CORPUS)], DATA)
    facts = prepare(recipe, output / "data", base, workers=2, console=console)
    console.print(f"{facts['train']:,} training pairs, {facts['test']} test pairs, {facts['types']:,} subwords")

    points = min(points, updates)
    every = str(updates // points)
    limits = ["--max-update", str(updates), "--validate-interval-updates", every, "--save-interval-updates", every]
    limits += ["--keep-interval-updates", str(min(points, AVERAGED)), "--seed", str(seed)]
    commands = {
        name: ["train", *given.split(), *TRAINING.split(), *limits, "--save-dir", str(folder(output, name))]
        + (revcol.split() if "revcol" in given else [])
        for name, given in MODELS.items()
    }
    trained = side_by_side(console, "train", commands, output, updates)
    for name in MODELS:
        average(
            select_checkpoints(folder(output, name), min(points, AVERAGED), updates=True),
            folder(output, name) / "average.pt",
        )
    commands = {
        name: ["generate", "--path", str(folder(output, name) / "average.pt"), *SEARCH.split()] for name in MODELS
    }
    translated = side_by_side(console, "translate", commands, output)
    found = {run.name: read_output(run.text) for run in translated}
    reference = list(lines_of(output / "data" / "test.raw.de"))
    bleu = {name: scores(translations, "de", reference) for name, translations in found.items()}

    console.print(summary(trained, bleu))
    console.print(examples(found, list(lines_of(output / "data" / "test.raw.en")), reference))
    picture = output / "translate.png"
    save(figure(trained, bleu), picture)
    lines = f"figure {picture}", f"text   {output}/*/translate.log"
    console.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)


def clear(output: Path) -> None:
    """Delete the output of an earlier call.

    Raises:
        TranslationError: If the directory was not made by this script, or contains other files.
    """
    if not output.exists():
        return
    own = {"data", "data.work", ".data.lock", "translate.png", *(folder(output, name).name for name in MODELS)}
    is_begun = any((output / name).exists() for name in ("data/prepared.json", "data.work"))
    if not is_begun or not {path.name for path in output.iterdir()} <= own:
        raise TranslationError(
            f"{output} exists and was not made by this script, or contains other files. Use another --output"
        )
    shutil.rmtree(output)


def folder(output: Path, name: str) -> Path:
    return output / name.split()[0].lower()


def side_by_side(
    console: Console, what: str, commands: dict[str, list[str]], output: Path, updates: int | None = None
) -> list[Run]:
    """Run a fairseq command for each model at the same time, with one thread each.

    If one fails, or on Ctrl-C, all are killed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    runs = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            for name, (command, *arguments) in commands.items():
                text = folder(output, name) / f"{what}.log"
                text.parent.mkdir(exist_ok=True)
                words = [sys.executable, "-m", f"fairseq_cli.{command}", str(output / "data"), *arguments]
                words += ["--user-dir", str(ROOT / "nlp"), "--cpu"]
                errors = text.with_suffix(".errors") if command == "generate" else text
                with open(text, "wb") as out, open(errors, "ab") as err:
                    process = subprocess.Popen(words, stdout=out, stderr=err, env=environment)
                runs.append(Run(name, text, process))
            tasks = [progress.add_task(f"{what} {run.name}", total=updates) for run in runs]
            while not all([run.poll() for run in runs]):
                time.sleep(0.5)
                for run, task in zip(runs, tasks, strict=True):
                    if updates:
                        progress.update(task, completed=max(run.curve("train_inner", "loss")[0], default=0))
            for task in tasks:
                progress.update(task, total=updates or 1, completed=updates or 1)
    finally:
        for run in runs:
            if run.seconds is None:
                run.process.kill()
                run.process.wait()
    return runs


def summary(trained: Sequence[Run], bleu: dict[str, list[Score]]) -> Table:
    """Return the results with one column per model."""
    table = Table(title="English to German, test set", title_justify="left")
    table.add_column("")
    for run in trained:
        table.add_column(run.name, justify="right")
    rows: dict[str, list[str]] = {
        "parameters": [re.search(r"num\. shared model params: ([\d,]+)", run.output())[1] for run in trained],  # type: ignore[index]
        "validation loss, last": [f"{run.curve('valid', 'nll_loss')[1][-1]:.2f}" for run in trained],
        "CPU seconds": [f"{run.seconds:.0f}" for run in trained],
    }
    for index, score in enumerate(next(iter(bleu.values()))):
        if score.kind != "compound split":
            rows[f"BLEU, {score.kind}"] = [f"[bold]{bleu[run.name][index].value:.2f}[/bold]" for run in trained]
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def examples(found: dict[str, Output], sources: Sequence[str], reference: Sequence[str], count: int = 4) -> Table:
    """Return translations of verses of medium length, evenly spread over the test set."""
    table = Table(show_header=False, title="Translations", title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    translated = {name: output.detokenized("de") for name, output in found.items()}
    middling = [number for number, line in enumerate(sources) if 7 <= len(line.split()) <= 12]
    for number in middling[:: max(len(middling) // count, 1)][:count]:
        table.add_row("English", Text(sources[number]))
        table.add_row("reference", Text(reference[number]))
        for name, lines in translated.items():
            table.add_row(name, Text(lines[number]))
        table.add_section()
    return table


def figure(trained: Sequence[Run], bleu: dict[str, list[Score]]) -> Figure:
    """Plot losses and BLEU against updates."""
    found = Figure(figsize=(11, 4), layout="constrained", facecolor="white")
    losses, quality = found.subplots(1, 2)
    draw(losses, "Loss (thin: training, with dropout)", "bits per subword")
    draw(quality, "sacreBLEU of greedy translations of the validation set", "%")
    for run in trained:
        color = COLORS[run.name]
        losses.plot(*run.curve("train_inner", "nll_loss"), color=color, lw=0.8, alpha=0.4)
        losses.plot(*run.curve("valid", "nll_loss"), "o-", color=color, lw=2, markersize=4, label=run.name)
        label = f"{run.name}: test {bleu[run.name][-1].value:.1f}"
        quality.plot(*run.curve("valid", "bleu"), "o-", color=color, lw=2, markersize=4, label=label)
    if losses.get_ylim()[0] < 8:  # the steep start would flatten the rest
        losses.set_ylim(top=min(losses.get_ylim()[1], 10))
    quality.set_ylim(bottom=0)
    for axes in (losses, quality):
        axes.legend(frameon=False, fontsize=9.5, labelcolor="linecolor")
    return found


def draw(axes: Axes, title: str, unit: str) -> None:
    """Style axes with a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel("updates", color=INK)
    axes.set_ylabel(unit, color=INK)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so child processes are killed
    try:
        app()
    except (TranslationError, OSError) as error:
        sys.exit(f"error: {error}")
