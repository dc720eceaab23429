"""When does `init: fast` learn faster than the initialization of the paper? Fashion-MNIST, equal budgets, paired seeds.

    apt-get install dataset-fashion-mnist         # Debian and Ubuntu; or any folder with the four idx files: --root
    python examples/experiments/initialization.py -o runs/initialization.jsonl      # 20 runs of a minute on one core
    python examples/experiments/initialization.py -o runs/initialization.jsonl --updates 2500 --columns 4,8,16
    python examples/experiments/initialization.py -o runs/initialization.jsonl --report

Every finished run is a line of the results file and is not trained again. A run that is stopped goes on with the same
command. Runs with equal seeds see the same images in the same order and start from the same weights, apart from gains
and layer scales. Accuracies are of all test images.
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
"""Images of an update, and updates between evaluations; an epoch has a sample for each."""

SHAPES = {
    4: ([16, 32, 64, 128], [1, 1, 1, 1]),
    8: ([12, 20, 48, 88], [1, 1, 1, 1]),
    16: ([6, 20, 28, 64], [1, 1, 1, 1]),
}
"""Channels and blocks of each level, by columns: parameters and multiply-accumulates of all are equal within 2 %."""

MAX_BYTES = 10_000_000
"""Bound of a results file, which has some hundred bytes a run."""


class Trial(Strict):
    """Settings of one run."""

    model: Literal["convnext", "revcol", "revcol_vit"]
    columns: int = Field(ge=1)
    init: Literal["paper", "fast"]
    updates: int = Field(ge=1)
    supervision: bool
    drop_path: float = Field(ge=0, lt=1)
    seed: int = Field(ge=0)

    @property
    def group(self) -> Trial:
        """Settings that it shares with the runs that it is compared with."""
        return self.model_copy(update={"init": "paper", "seed": 0})

    def __str__(self) -> str:
        words = [self.model, f"{self.columns} columns" if self.columns > 1 else "1 column"]
        words += ["supervised"] * self.supervision + [f"drop path {self.drop_path:g}"] * (self.drop_path > 0)
        return ", ".join(words)


class TrialResult(Strict):
    """A line of the results file."""

    trial: Trial
    parameters: int = Field(ge=1)
    accuracy: tuple[Annotated[float, Field(ge=0, le=100)], ...] = Field(min_length=1)  # in %, after each epoch


Results = Mapping[Trial, TrialResult]


def main(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Results, a JSON line for each finished run.")
    ] = OUTPUT,
    models: Annotated[str, typer.Option(help="Some of convnext, revcol and revcol_vit.")] = "convnext,revcol",
    columns: Annotated[str, typer.Option(help="Of revcol: some of 4, 8 and 16.")] = "4",
    updates: Annotated[int, typer.Option(min=1, help="Of 64 images: a multiple of 500, or fewer.")] = EPOCH,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting.")] = 5,
    supervision: Annotated[bool, typer.Option("--supervision", help="Losses at the columns, as in the paper.")] = False,
    drop_path: Annotated[float, typer.Option(min=0, max=0.99, help="Rate of the last block.")] = 0.0,
    root: Annotated[Path, typer.Option(help="Folder with the four idx files, gzipped or not.")] = ROOT,
    report: Annotated[bool, typer.Option("--report", help="Train nothing; show all results of the file.")] = False,
) -> None:
    """Train the same nets from the paper's initialization and from `init: fast`, and compare."""
    console = Console()
    if report:
        shown = read_results(output, console)
    else:
        shown = {}
        trials = list(planned(models, columns, updates, seeds, supervision, drop_path))
        require_files(root)
        for number, trial in enumerate(trials, 1):
            found = read_results(output, console).get(trial)  # another process may have added it
            if found is None:
                console.rule(f"run {number} of {len(trials)}: {trial}, {trial.init}, seed {trial.seed}")
                found = finished(trial, output, root, console)
            shown[trial] = found
    if not shown:
        raise TrainingError(f"{output} has no results. Leave --report out to train", code="missing-file")
    console.print(table(shown))
    save(figure(shown), picture := output.with_suffix(".png"))
    console.print(f"picture {picture}", highlight=False, markup=False, soft_wrap=True)


def planned(
    models: str, columns: str, updates: int, seeds: int, supervision: bool, drop_path: float
) -> Iterator[Trial]:
    """All runs, seed by seed, so that an early end leaves whole pairs. A ConvNeXt has no columns to supervise.

    Raises:
        TrainingError: there is no such model or number of columns, or the updates are no whole epochs.
    """
    names = chosen("--models", models, ["convnext", "revcol", "revcol_vit"])
    counts = [int(count) for count in chosen("--columns", columns, [str(count) for count in SHAPES])]
    if updates > EPOCH and updates % EPOCH:
        raise TrainingError(f"--updates {updates}: give a multiple of {EPOCH}, or fewer", code="not-divisible")
    of_model = {"convnext": [1], "revcol": counts, "revcol_vit": [4]}
    for seed, name in product(range(seeds), names):
        for count, init in product(of_model[name], INITIALIZATIONS):
            given = {"model": name, "columns": count, "init": init, "updates": updates, "seed": seed}
            yield Trial(**given, supervision=supervision and name != "convnext", drop_path=drop_path)


def chosen(option: str, text: str, known: Sequence[str]) -> list[str]:
    """The words of an option, `a,b`, without repetitions.

    Raises:
        TrainingError: one is not known, or there is none.
    """
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    if set(words) <= set(known):
        return words
    raise TrainingError(f"{option} {text!r}: give some of {', '.join(known)}", code="unknown-choice")


def configured(trial: Trial, folder: Path, root: Path) -> TrainConfig:
    """The run of `revnets train fashion` that a trial is. The first tenth of the updates is warm-up."""
    model = {"init": trial.init, "drop_path_rate": trial.drop_path}
    if trial.model == "revcol_vit":  # of images of 32 x 32
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
    words += ["supervision={}"] * trial.supervision
    return load_config(RECIPE, [*words, f"seed={trial.seed}", f"data.root={root.resolve()}", f"output={folder}"])


def finished(trial: Trial, output: Path, root: Path, console: Console) -> TrialResult:
    """Train to the end, from where an earlier call was stopped, and write a line of results.

    Raises:
        typer.Exit: SIGTERM or Ctrl-C stopped it; its state is saved.
        TrainingError: the data have fewer images than the updates need, or the loss is not finite.
    """
    words = (trial.model, trial.columns, trial.init, trial.updates, trial.supervision, trial.drop_path, trial.seed)
    folder = output.with_suffix(".runs") / "-".join(str(word).lower() for word in words)
    trainer = Trainer(configured(trial, folder, root), console)
    planned = trainer.batches.updates * trainer.config.epochs
    if planned != trial.updates:
        text = f"{root} has images for {planned} updates, not for {trial.updates}. Give a larger data set"
        raise TrainingError(text, code="wrong-length")
    outcome = trainer.fit()
    if outcome.signal is not None:
        console.print("Stopped; the same command goes on from here.")
        raise typer.Exit(128 + outcome.signal)
    accuracy = [line["raw_top1"] for line in read_log(folder / LOG) if line["kind"] == "eval"]
    parameters = size_of(trainer.config, trainer.data).parameters
    result = TrialResult(trial=trial, parameters=parameters, accuracy=tuple(accuracy))
    append(output, f"{result.model_dump_json()}\n".encode(), sync=True)
    shutil.rmtree(folder)
    return result


def read_results(path: Path, console: Console) -> dict[Trial, TrialResult]:
    """The results of a file by their trial; damaged lines are left out, and counted on the console.

    Raises:
        TrainingError: the file is too large for one of results.
        OSError: it cannot be read.
    """
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_BYTES:
        raise TrainingError(f"{path} has more than {MAX_BYTES:,} bytes. Give a file of results", code="too-large")
    results, damaged = {}, 0
    for line in path.read_bytes().splitlines():
        try:
            result = TrialResult.model_validate_json(line)
        except ValidationError:
            damaged += 1
        else:
            results[result.trial] = result
    if damaged:
        console.print(f"{path}: damaged lines left out: {damaged}", style="yellow", markup=False, soft_wrap=True)
    return results


class Paired(NamedTuple):
    """By how much runs are ahead of others with the same seeds, in points of accuracy."""

    differences: tuple[float, ...]

    @classmethod
    def of(cls, ones: Iterable[TrialResult], others: Iterable[TrialResult]) -> Paired:
        """Of each seed that both have, after the last epoch."""
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
    """A row for each setting and initialization, with differences over equal seeds."""
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
    shown.caption = "mean ± standard deviation over seeds; differences are of runs with equal seeds"
    return shown


def groups(results: Results) -> list[Trial]:
    """Settings without seed and initialization, in the order of the table."""
    found = {trial.group for trial in results}
    return sorted(
        found, key=lambda group: (group.updates, group.drop_path, group.supervision, group.model, group.columns)
    )


def of(results: Results, group: Trial, init: str) -> list[TrialResult]:
    """The runs of a setting, by seed."""
    found = [result for trial, result in results.items() if trial.group == group and trial.init == init]
    return sorted(found, key=lambda result: result.trial.seed)


def figure(results: Results) -> Figure:
    """What `fast` adds to each setting: every pair of seeds (dots), and their mean (line)."""
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
