"""Commands of other packages: found by entry points, imported when they are called, with one-line errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

Errors = tuple[type[Exception], ...]


class Plugin(NamedTuple):
    """Description of a command whose module is not imported.

    Attributes:
        extra: Extra of this distribution that the command needs, or None.
        help: First paragraph of its help text.
    """

    extra: str | None
    help: str


PLUGINS = {
    "train": Plugin("vision", "Train a model, by default for image classification, or resume an interrupted run."),
    "eval": Plugin(
        "vision",
        "Evaluate the weights of a checkpoint, and their average if there is one, on the validation set of the run.",
    ),
    "predict": Plugin("vision", "Predict with a trained model on image files."),
    "reshard": Plugin("vision", "Convert a sharded checkpoint to one file, or one file to shards."),
    "convert": Plugin("vision", "Convert official RevCol checkpoints to our layout, and ours to the official one."),
    "label": Plugin("labels", "Label images with the predictions of a teacher: soft labels for training."),
    "duplicates": Plugin(
        "duplicates", "Find near-duplicates of the images of a validation set by their pseudo-labels."
    ),
    "analyze": Plugin(
        None, "Reproduce analyses of the paper. Each command draws a figure and writes its numbers as CSV."
    ),
    "cka": Plugin("vision", "Measure the similarity of every level of every column to images and labels (figure 9)."),
    "layercam": Plugin(
        "vision", "Show where every level of every column responds to a class: LayerCAM over an image (figure 8)."
    ),
    "user-dir": Plugin(
        "nlp", 'Print the directory for fairseq\'s option --user-dir: --user-dir "$(revnets user-dir)".'
    ),
    "prepare-mt": Plugin("nlp", "Prepare a fairseq data set from raw parallel text."),
    "average-checkpoints": Plugin("nlp", "Average the weights of several checkpoints of one run."),
    "train-lm": Plugin("nlp", "Train a language model, or resume an interrupted run."),
    "score-mt": Plugin("nlp", "Compute BLEU of a translation: tokenized, compound split, and sacreBLEU."),
}
"""The commands of vision/ and nlp/. Help pages use these descriptions, so they import neither package."""


class LazyCommand(TyperCommand):
    """Command of an entry point, which is imported when the command is called."""

    def __init__(self, entry: EntryPoint):
        package = entry.dist.name if entry.dist else entry.module
        self.entry = entry
        self.plugin = PLUGINS.get(entry.name) or Plugin(None, f"A command of the package {package}.")
        super().__init__(entry.name, callback=None, help=self.plugin.help)

    def load(self) -> Any:
        """Import the command.

        Raises:
            SystemExit: If its module cannot be imported. The message contains the package to install.
        """
        name, entry = self.entry.name, self.entry
        try:
            found = entry.load()
        except ImportError as error:
            package = entry.dist.name if entry.dist else entry.module
            missing = f"'revnets[{self.plugin.extra}]'" if self.plugin.extra else package
            text = f"revnets {name}: cannot import {entry.module} ({error}). Try: pip install {missing}"
            raise SystemExit(text) from error
        if isinstance(found, typer.Typer):
            command = typer.main.get_group(found)
        else:
            app = typer.Typer(add_completion=False)
            app.command(name)(found)
            command = typer.main.get_command(app)
        command.name = name
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Return the context of the imported command, which the group then uses instead of this one."""
        return self.load().make_context(*args, **kwargs)


class PluginGroup(TyperGroup):
    """A group of commands, followed by the commands of an entry-point group, which subclasses set."""

    entry_points: ClassVar[str]

    def __init__(self, **options: Any):
        super().__init__(**options)
        for entry in entry_points(group=self.entry_points):
            self.commands.setdefault(entry.name, LazyCommand(entry))


class Commands(PluginGroup):
    """The group of `revnets COMMAND`."""

    entry_points = "revnets.commands"


class Analyses(PluginGroup):
    """The group of `revnets analyze COMMAND`."""

    entry_points = "revnets.analyses"


@contextmanager
def one_line_errors(expected: Callable[[], Errors], extra: str | None = None) -> Iterator[None]:
    """Context manager that prints expected errors as one line and exits with code 1.

    `OSError` is always expected. `SpecError` and `PlanError` pass through, because the command `revnets` prints them.

    Args:
        expected: Returns the types of further expected errors. It is only called after an error, so that modules of
            these types are not imported before.
        extra: Extra of this distribution that contains modules that may be missing. If None, an import error is a bug
            and shows its traceback.

    Raises:
        typer.Exit: If an expected error occurs.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and extra is not None:
            text = f"{error.name} is not installed. Try: pip install 'revnets[{extra}]'"
        elif isinstance(error, OSError) and error.filename and error.strerror:
            text = f"{error.filename}: {error.strerror}. Check the path, its permissions and the free space"
        elif isinstance(error, (OSError, *expected())):
            text = str(error)
        else:
            raise
        typer.secho(f"error: {text}", fg="red", err=True)
        raise typer.Exit(1) from error
