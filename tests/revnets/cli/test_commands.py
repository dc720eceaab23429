"""The group of commands: its help page, its imports, and errors of commands that are not installed."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from importlib.metadata import EntryPoint, entry_points

import pytest
import typer
from typer.testing import CliRunner

from revnets.cli import main, plugins
from revnets.cli.output import tracked
from revnets.cli.plugins import PLUGINS, LazyCommand, PluginGroup
from tests.support.timeouts import HANG

COMMANDS = ["show", "audit", "plan", "env", *sorted(entry.name for entry in entry_points(group="revnets.commands"))]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=HANG)


def test_help_lists_every_command_with_its_first_line() -> None:
    result = CliRunner().invoke(main.app, ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    lines = [line.strip("│ ") for line in result.stdout.splitlines()]
    for name in COMMANDS:
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert name not in PLUGINS or PLUGINS[name].help in line


def test_help_imports_no_command() -> None:
    code = (
        "import sys\nfrom revnets.cli.main import app\ntry:\n    app(['--help'])\nexcept SystemExit as end:\n"
        "    assert end.code == 0\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}"
        " & {'timm', 'fairseq', 'matplotlib', 'vision', 'nlp', 'revnets_nlp', 'sklearn'}))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("group", ["revnets.commands", "revnets.analyses"])
def test_help_in_the_table_equals_that_of_the_command(group: str) -> None:
    for entry in entry_points(group=group):
        found = entry.load()
        text = found.info.help if isinstance(found, typer.Typer) else found.__doc__
        assert PLUGINS[entry.name].help == " ".join(text.split("\n\n")[0].split())


def test_call_loads_one_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = EntryPoint.load
    monkeypatch.setattr(EntryPoint, "load", lambda entry: loaded.append(entry.name) or load(entry))
    result = CliRunner().invoke(main.app, ["user-dir"])
    assert result.exit_code == 0
    assert loaded == ["user-dir"]


@pytest.mark.parametrize(("name", "hint"), [("train", "'revnets[vision]'"), ("score-mt", "'revnets[nlp]'")])
def test_command_whose_extra_is_missing(name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(module: str) -> None:
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    monkeypatch.setattr(importlib.metadata, "import_module", import_module)
    result = CliRunner().invoke(main.app, [name, "some", "--words"])
    assert result.exit_code == 1
    assert f"revnets {name}: cannot import" in result.output
    assert f"(No module named 'absent'). Try: pip install {hint}" in result.output
    assert PLUGINS[name].help in CliRunner().invoke(main.app, ["--help"], env={"COLUMNS": "200"}).stdout


def test_command_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is listed and called like other commands. Its error names the missing package."""

    class Others(PluginGroup):
        entry_points = "others"

    entries = [
        EntryPoint("shout", "textwrap:shorten", "others"),
        EntryPoint("whisper", "absent_package.cli:whisper", "others"),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == "others" else [])
    app = typer.Typer(cls=Others)
    app.callback()(lambda: None)
    listed = CliRunner().invoke(app, ["--help"]).stdout
    assert "A command of the package textwrap." in listed
    assert "A command of the package absent_package.cli." in listed
    assert isinstance(typer.main.get_group(app).commands["shout"], LazyCommand)
    failed = CliRunner().invoke(app, ["whisper"])
    assert failed.exit_code == 1
    assert "Try: pip install absent_package.cli" in failed.output


def test_mistyped_command_gets_a_suggestion() -> None:
    result = CliRunner().invoke(main.app, ["trian"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "Did you mean" in result.output
    assert "'train'" in result.output


def test_package_runs_as_a_module() -> None:
    done = python("-m", "revnets", "show", "no_such_net.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no_such_net.yaml: ")
    assert len(done.stderr.splitlines()) == 1


def test_progress_bar_ends_if_its_body_raises() -> None:
    with pytest.raises(ZeroDivisionError), tracked(iter(range(3)), "dividing") as bar:
        [1 / item for item in bar]
    assert [thread for thread in threading.enumerate() if "_TrackThread" in type(thread).__name__] == []
