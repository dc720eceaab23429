"""Hook of mkdocs: list every command of `revnets` with its arguments and options on the page of the command line.

The texts come from the commands themselves, those of other packages included, so that the page shows what
`revnets COMMAND --help` prints.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

PAGE = "reference/command-line.md"
MARKER = "<!-- commands -->"


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Replace the marker of the page by the commands."""
    if page.file.src_uri != PAGE:
        return markdown
    if MARKER not in markdown:
        raise ValueError(f"{PAGE} has no line {MARKER}")
    return markdown.replace(MARKER, "\n".join(sections()))


def sections() -> Iterator[str]:
    """One section for each command, and one for each command of a group."""
    import typer

    from revnets.cli import main

    root = typer.main.get_command(main.app)
    with root.make_context("revnets", [], resilient_parsing=True) as context:
        for name, command, parent in commands(root, context, "revnets"):
            yield section(name, command, parent)


def commands(group: Any, context: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Every command of a group, depth first: its full name, the command and the context of its group."""
    for name in sorted(group.list_commands(context)):
        command = group.get_command(context, name)
        command = command.load() if hasattr(command, "load") else command  # a command of an entry point
        yield f"{prefix} {name}", command, context
        if hasattr(command, "list_commands"):
            with command.make_context(name, [], parent=context, resilient_parsing=True) as inner:
                yield from commands(command, inner, f"{prefix} {name}")


def section(name: str, command: Any, parent: Any) -> str:
    """The help of a command as Markdown."""
    last = name.rpartition(" ")[2]
    context = type(parent)(command, info_name=last, parent=parent)
    usage = " ".join(command.collect_usage_pieces(context))
    heading = "#" * len(name.split())  # a command of a group is below its group
    summary, _, details = paragraphs(command.help or "").partition("\n\n")
    lines = [f"{heading} {name}", "", summary, "", "```console", f"$ {name} {usage}", "```", "", details, ""]
    rows = [row(parameter, context) for parameter in command.get_params(context) if parameter.name != "help"]
    if rows:
        lines += ["| argument or option | meaning |", "| --- | --- |", *rows, ""]
    if hasattr(command, "list_commands"):
        inner = ", ".join(
            f"[`{each}`](#{name.replace(' ', '-')}-{each})" for each in sorted(command.list_commands(context))
        )
        lines += [f"Commands: {inner}.", ""]
    return "\n".join(lines)


def row(parameter: Any, context: Any) -> str:
    """One line of a table: the names of an argument or option, its help and its default."""
    names, meaning = parameter.get_help_record(context)
    return f"| <code>{cell(html.escape(names))}</code> | {cell(meaning)} |"


def cell(text: str) -> str:
    """Text for a cell of a table, on one line and without its separator."""
    return " ".join(text.split()).replace("|", "&#124;")


def paragraphs(text: str) -> str:
    """The help of a command as Markdown: paragraphs without line breaks, and examples of commands as code."""
    cleaned = text.replace("\b", "").split("\f")[0]  # control characters of click
    parts = [part.strip().splitlines() for part in re.split(r"\n\s*\n", cleaned) if part.strip()]
    return "\n\n".join(map(_paragraph, parts))


def _paragraph(lines: list[str]) -> str:
    stripped = [line.strip() for line in lines]
    if all(line.startswith(("revnets ", "torchrun ", "fairseq-")) for line in stripped):
        return "\n".join(["```console", *(f"$ {line}" for line in stripped), "```"])
    return " ".join(stripped)
