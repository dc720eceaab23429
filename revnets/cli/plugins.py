"""Commands of other packages: found by entry points, loaded when they are called, with their errors on one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

Errors = tuple[type[Exception], ...]


class Plugin(NamedTuple):
    """What is known about a command before its module is imported."""

    extra: str | None  # of this distribution, without which the command cannot run; None: it needs none
    help: str  # first paragraph of the command's help


PLUGINS = {
    "train": Plugin("vision", "Train a model, by default for image classification, or go on with an interrupted run."),
    "eval": Plugin(
        "vision",
        "Evaluate a checkpoint on the validation set of its run: its weights, and their average if there is one.",
    ),
    "predict": Plugin("vision", "Show what a trained model finds in pictures."),
    "reshard": Plugin("vision", "Rewrite a checkpoint of `checkpoint: sharded` as one file, or one file as shards."),
    "convert": Plugin("vision", "Convert official RevCol checkpoints to ours, and ours to the official layout."),
    "label": Plugin("labels", "Write what a teacher predicts for the images of a folder: soft labels to train on."),
    "duplicates": Plugin(
        "duplicates", "Find images that are near-duplicates of those of a validation set, by their pseudo-labels."
    ),
    "analyze": Plugin(
        None, "Look into a net as the paper's figures do. Each command draws a picture and writes its numbers as CSV."
    ),
    "cka": Plugin("vision", "How similar every level of every column is to the images and to their labels (figure 9)."),
    "layercam": Plugin("vision", "Where every level of every column sees a class: LayerCAM over an image (figure 8)."),
    "user-dir": Plugin("nlp", 'Print the folder to give to fairseq: --user-dir "$(revnets user-dir)".'),
    "prepare-mt": Plugin("nlp", "Make a fairseq data set from raw parallel text."),
    "average-checkpoints": Plugin("nlp", "Average the weights of several checkpoints of one run into a new one."),
    "train-lm": Plugin("nlp", "Train a language model, or go on with an interrupted run."),
    "score-mt": Plugin("nlp", "BLEU of a translation: tokenised, with compounds split, and sacreBLEU."),
}
"""The commands of vision/ and nlp/. A help page lists them from here, so that it imports neither."""


class LazyCommand(TyperCommand):
    """Represents the command of an entry point in a group; the command is imported when it is called."""

    def __init__(self, entry: EntryPoint):
        package = entry.dist.name if entry.dist else entry.module
        self.entry = entry
        self.plugin = PLUGINS.get(entry.name) or Plugin(None, f"A command of the package {package}.")
        super().__init__(entry.name, callback=None, help=self.plugin.help)

    def load(self) -> Any:
        """The command itself.

        Raises:
            SystemExit: its module cannot be imported; says what to install.
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
        """The context of the command itself; from here on a group deals with that one."""
        return self.load().make_context(*args, **kwargs)


class PluginGroup(TyperGroup):
    """A group of commands with those of other packages behind its own; subclasses name the entry points."""

    entry_points: ClassVar[str]

    def __init__(self, **options: Any):
        super().__init__(**options)
        for entry in entry_points(group=self.entry_points):
            self.commands.setdefault(entry.name, LazyCommand(entry))


class Commands(PluginGroup):
    """`revnets COMMAND`."""

    entry_points = "revnets.commands"


class Analyses(PluginGroup):
    """`revnets analyze COMMAND`."""

    entry_points = "revnets.analyses"


@contextmanager
def one_line_errors(expected: Callable[[], Errors], extra: str | None = None) -> Iterator[None]:
    """End a command with exit code 1 and one line if its body raises what was expected, or an `OSError`.

    `SpecError` and `PlanError` pass: the command `revnets` itself tells them.

    Args:
        expected: gives the types of errors whose message is all that a user needs. It is called when something went
            wrong, so that their modules are not imported before.
        extra: of the distribution; a module that is not installed is said to come with it. Without it, what cannot be
            imported is a bug and shows its traceback.
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
