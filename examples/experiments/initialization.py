"""Compare `init: fast` with the paper's initialization on Fashion-MNIST, with equal budgets and paired seeds.

    apt-get install dataset-fashion-mnist         # Debian and Ubuntu; or any directory with the four idx files: --root
    python examples/experiments/initialization.py -o runs/initialization.jsonl      # 20 runs of one minute each
    python examples/experiments/initialization.py -o runs/initialization.jsonl --updates 2500 --columns 4,8,16
    python examples/experiments/initialization.py -o runs/initialization.jsonl --report

Each finished run is a line of the results file and is not repeated. Running the same command again resumes a stopped
run. Runs with the same seed see the same images in the same order and start from the same weights, except for gains and
layer scales. Accuracies are over all test images.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer
from matplotlib.figure import Figure
from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table
from seed_runner import PLAIN, RECIPE, REPO, ROOT, require_files, run_as_script, size_of, spread

from revnets.config.loader import Strict
from revnets.config.net_spec import INITIALIZATIONS
from revnets.plotting.style import save
from revnets.utils.atomic_files import append
from vision.config.run import TrainConfig, load_config
from vision.errors import TrainingError
from vision.training.figures import INK, style
from vision.training.run_log import LOG, read_log
from vision.training.trainer import Trainer

OUTPUT = Path(os.path.relpath(REPO / "runs" / "initialization.jsonl"))
BATCH, EPOCH = 64, 500
"""Images per update, and updates between evaluations, which make an epoch."""

LEARNING_RATE = 0.004
"""Of the recipe, at which RevCol-ViT does not learn."""

SHAPES = {
    4: ([16, 32, 64, 128], [1, 1, 1, 1]),
    8: ([12, 20, 48, 88], [1, 1, 1, 1]),
    16: ([6, 20, 28, 64], [1, 1, 1, 1]),
}
"""Channels and blocks per level, by number of columns; all are equal within 2 % in parameters and MACs."""

MAX_BYTES = 10_000_000
"""Maximum size of a results file, which has some hundred bytes per run."""


class Trial(Strict):
    """Settings of one run."""

    model: Literal["convnext", "revcol", "revcol_vit"]
    columns: int = Field(ge=1)
    init: Literal["paper", "fast"]
    updates: int = Field(ge=1)
    supervision: bool
    drop_path: float = Field(ge=0, lt=1)
    seed: int = Field(ge=0)
    learning_rate: float = Field(default=LEARNING_RATE, gt=0, le=1)

    @property
    def group(self) -> Trial:
        """Settings shared by the runs that are compared."""
        return self.model_copy(update={"init": "paper", "seed": 0})

    def __str__(self) -> str:
        words = [self.model, f"{self.columns} columns" if self.columns > 1 else "1 column"]
        words += ["supervised"] * self.supervision + [f"drop path {self.drop_path:g}"] * (self.drop_path > 0)
        words += [f"learning rate {self.learning_rate:g}"] * (self.learning_rate != LEARNING_RATE)
        return ", ".join(words)


class TrialResult(Strict):
    """A line of the results file."""

    trial: Trial
    parameters: int = Field(ge=1)
    accuracy: tuple[Annotated[float, Field(ge=0, le=100)], ...] = Field(min_length=1)  # in %, after each epoch


Results = Mapping[Trial, TrialResult]


def main(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Results file with a JSON line for each finished run.")
    ] = OUTPUT,
    models: Annotated[
        str, typer.Option(help="Comma-separated models, of convnext, revcol and revcol_vit.")
    ] = "convnext,revcol",
    columns: Annotated[str, typer.Option(help="Comma-separated numbers of columns for revcol, of 4, 8 and 16.")] = "4",
    updates: Annotated[int, typer.Option(min=1, help="Updates of 64 images: a multiple of 500, or fewer.")] = EPOCH,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting.")] = 5,
    supervision: Annotated[
        bool, typer.Option("--supervision", help="Train with intermediate supervision, as in the paper.")
    ] = False,
    drop_path: Annotated[float, typer.Option(min=0, max=0.99, help="Drop path rate of the last block.")] = 0.0,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate, above 0 and at most 1.")] = LEARNING_RATE,
    root: Annotated[Path, typer.Option(help="Directory with the four idx files, gzipped or not.")] = ROOT,
    report: Annotated[bool, typer.Option("--report", help="Show all results of the file without training.")] = False,
) -> None:
    """Train the same networks with the paper's initialization and with `init: fast`, and compare them."""
    console = Console()
    if report:
        shown = read_results(output, console)
    else:
        shown = {}
        trials = list(planned(models, columns, updates, seeds, supervision, drop_path, learning_rate))
        require_files(root)
        for number, trial in enumerate(trials, 1):
            found = read_results(output, console).get(trial)  # another process may have added it
            if found is None:
                console.rule(f"run {number} of {len(trials)}: {trial}, {trial.init}, seed {trial.seed}")
                found = finished(trial, output, root, console)
            shown[trial] = found
    if not shown:
        raise TrainingError(f"{output} has no results. Omit --report to train", code="missing-file")
    console.print(table(shown))
    save(figure(shown), picture := output.with_suffix(".png"))
    console.print(f"figure {picture}", highlight=False, markup=False, soft_wrap=True)


def planned(
    models: str,
    columns: str,
    updates: int,
    seeds: int,
    supervision: bool,
    drop_path: float,
    learning_rate: float = LEARNING_RATE,
) -> Iterator[Trial]:
    """Yield all runs, seed by seed, so that an early stop leaves complete pairs. A ConvNeXt is never supervised.

    Raises:
        TrainingError: If a model or number of columns is unknown, the updates are not whole epochs, or the learning
            rate is out of range.
    """
    if not 0 < learning_rate <= 1:
        raise TrainingError(f"--learning-rate {learning_rate}: use a number above 0, up to 1", code="out-of-range")
    names = chosen("--models", models, ["convnext", "revcol", "revcol_vit"])
    counts = [int(count) for count in chosen("--columns", columns, [str(count) for count in SHAPES])]
    if updates > EPOCH and updates % EPOCH:
        raise TrainingError(f"--updates {updates}: use a multiple of {EPOCH}, or fewer", code="not-divisible")
    of_model = {"convnext": [1], "revcol": counts, "revcol_vit": [4]}
    for seed, name in product(range(seeds), names):
        for count, init in product(of_model[name], INITIALIZATIONS):
            given = {"model": name, "columns": count, "init": init, "updates": updates, "seed": seed}
            given |= {"supervision": supervision and name != "convnext", "drop_path": drop_path}
            yield Trial(**given, learning_rate=learning_rate)


def chosen(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Split the value of an option, such as `a,b`, and remove repetitions.

    Raises:
        TrainingError: If a value is unknown, or there is none.
    """
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    if set(words) <= set(known):
        return words
    raise TrainingError(f"{option} {text!r}: choose from {', '.join(known)}", code="unknown-choice")


def configured(trial: Trial, folder: Path, root: Path) -> TrainConfig:
    """Return the run configuration of a trial. The first tenth of the updates is warm-up."""
    model = {"init": trial.init, "drop_path_rate": trial.drop_path}
    if trial.model == "revcol_vit":  # for images of 32 x 32
        model |= {
            "timm": "test_revcol_vit",
            "columns": trial.columns,
            "dims": [48] * 4,
            "img_size": 32,
            "patch_size": 8,
        }
    else:
        dims, depths = SHAPES[trial.columns] if trial.model == "revcol" else ([16, 32, 64, 128], [4, 5, 5, 5])
        model |= {"timm": "test_revcol", "columns": trial.columns, "dims": dims, "depths": depths}
    epochs, samples = max(1, trial.updates // EPOCH), min(trial.updates, EPOCH) * BATCH
    words = [f"model={model}", f"epochs={epochs}", f"data.train_samples={samples}", f"batch_size={BATCH}", *PLAIN]
    words += [f"schedule.warmup_epochs={epochs / 10:g}", "memory=store", "save_every=100", "keep=1", "log_every=25"]
    words += ["supervision={}"] * trial.supervision + [f"optimizer.lr={trial.learning_rate!r}"]
    return load_config(RECIPE, [*words, f"seed={trial.seed}", f"data.root={root.resolve()}", f"output={folder}"])


def finished(trial: Trial, output: Path, root: Path, console: Console) -> TrialResult:
    """Train to the end, resuming an earlier run, and write a line of results.

    Raises:
        typer.Exit: SIGTERM or Ctrl-C stopped the run; its state is saved.
        TrainingError: If the data has fewer images than the updates need, or the loss is not finite.
    """
    folder = output.with_suffix(".runs") / "-".join(str(value).lower() for _, value in trial)
    trainer = Trainer(configured(trial, folder, root), console)
    planned = trainer.batches.updates * trainer.config.epochs
    if planned != trial.updates:
        text = f"{root} has images for {planned} updates, not for {trial.updates}. Use a larger data set"
        raise TrainingError(text, code="wrong-length")
    outcome = trainer.fit()
    if outcome.signal is not None:
        console.print("Stopped. Run the same command again to resume.")
        raise typer.Exit(128 + outcome.signal)
    accuracy = [line["raw_top1"] for line in read_log(folder / LOG) if line["kind"] == "eval"]
    parameters = size_of(trainer.config, trainer.data).parameters
    result = TrialResult(trial=trial, parameters=parameters, accuracy=tuple(accuracy))
    append(output, f"{result.model_dump_json()}\n".encode(), sync=True)
    shutil.rmtree(folder)
    return result


def read_results(path: Path, console: Console) -> dict[Trial, TrialResult]:
    """Read the results of a file by trial. Damaged lines are skipped and counted on the console.

    Raises:
        TrainingError: If the file is too large for a results file.
        OSError: If the file cannot be read.
    """
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_BYTES:
        raise TrainingError(f"{path} has more than {MAX_BYTES:,} bytes. Use a results file", code="too-large")
    results, damaged = {}, 0
    for line in path.read_bytes().splitlines():
        try:
            result = TrialResult.model_validate_json(line)
        except ValidationError:
            damaged += 1
        else:
            results[result.trial] = result
    if damaged:
        console.print(f"{path}: skipped damaged lines: {damaged}", style="yellow", markup=False, soft_wrap=True)
    return results


class Paired(NamedTuple):
    """Differences in accuracy between runs with the same seeds, in points."""

    differences: tuple[float, ...]

    @classmethod
    def of(cls, ones: Iterable[TrialResult], others: Iterable[TrialResult]) -> Paired:
        """Compare the seeds that both have, after the last epoch."""
        last = {result.trial.seed: result.accuracy[-1] for result in others}
        ahead = {
            result.trial.seed: result.accuracy[-1] - last[result.trial.seed]
            for result in ones
            if result.trial.seed in last
        }
        return cls(tuple(ahead[seed] for seed in sorted(ahead)))

    def __str__(self) -> str:
        if not self.differences:
            return ""
        wins = sum(difference > 0 for difference in self.differences)
        return f"{spread(self.differences, 2)}, ahead in {wins} of {len(self.differences)}"


def table(results: Results) -> Table:
    """Return a row for each setting and initialization, with differences over the same seeds."""
    shown = Table(title="Fashion-MNIST, test accuracy in %", title_justify="left")
    for heading in ("model", "updates", "parameters", "init", "runs", "accuracy", "minus paper", "minus ConvNeXt"):
        shown.add_column(heading, justify="left" if heading in ("model", "init") else "right")
    for group in groups(results):
        convnext = group.model_copy(update={"model": "convnext", "columns": 1, "supervision": False})
        for init in INITIALIZATIONS:
            runs = of(results, group, init)
            if not runs:
                continue
            against = [Paired.of(runs, of(results, group, "paper")) if init != "paper" else ""]
            against += [Paired.of(runs, of(results, convnext, init)) if group != convnext else ""]
            accuracy = spread([run.accuracy[-1] for run in runs], 2)
            row = (group, f"{group.updates:,}", f"{runs[0].parameters:,}", init, len(runs), accuracy, *against)
            shown.add_row(*map(str, row))
    shown.caption = "mean ± standard deviation over seeds; differences are between runs with the same seeds"
    return shown


def groups(results: Results) -> list[Trial]:
    """Return the settings without seed and initialization, in the order of the table."""
    found = {trial.group for trial in results}
    return sorted(
        found,
        key=lambda group: (
            group.updates,
            group.drop_path,
            group.supervision,
            group.model,
            group.columns,
            group.learning_rate,
        ),
    )


def of(results: Results, group: Trial, init: str) -> list[TrialResult]:
    """Return the runs of a setting, by seed."""
    found = [result for trial, result in results.items() if trial.group == group and trial.init == init]
    return sorted(found, key=lambda result: result.trial.seed)


def figure(results: Results) -> Figure:
    """Plot the gain of `fast` for each setting: every pair of runs (dots) and the mean (line)."""
    shown = groups(results)
    drawn = Figure(figsize=(8, 1.3 + 0.36 * len(shown)), layout="constrained", facecolor="white")
    axes = drawn.subplots()
    style(axes, "test accuracy with fast minus that with paper, points", "")
    axes.axvline(0, color=INK, lw=0.8)
    for place, group in enumerate(shown):
        differences = Paired.of(of(results, group, "fast"), of(results, group, "paper")).differences
        axes.plot(differences, [place] * len(differences), "o", color="#0072B2", markersize=5, alpha=0.6)
        if differences:
            mean = statistics.mean(differences)
            axes.plot([mean, mean], [place - 0.3, place + 0.3], color="#0072B2", lw=2)
    axes.set_yticks(range(len(shown)), [f"{group}, {group.updates:,} updates" for group in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    return drawn


if __name__ == "__main__":
    run_as_script(main)
