"""The page of the command line lists every command and option, those of other packages included."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import entry_points

import pytest

from tests.support.paths import ROOT

pytest.importorskip("timm", reason="timm is not installed (extra vision)")


@pytest.fixture(scope="module")
def page() -> str:
    """What the hook of mkdocs puts in the place of the marker."""
    path = ROOT / "docs" / "hooks" / "command_reference.py"
    spec = importlib.util.spec_from_file_location("command_reference", path)
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    assert hook.MARKER in (ROOT / "docs" / hook.PAGE).read_text(encoding="utf-8")
    return "\n".join(hook.sections())


def test_every_command_has_a_section(page):
    sections = set(re.findall(r"^#+ revnets (.+)$", page, flags=re.MULTILINE))
    plugins = {entry.name for entry in entry_points(group="revnets.commands")}
    analyses = {f"analyze {entry.name}" for entry in entry_points(group="revnets.analyses")}
    assert {"show", "plan", "audit", "analyze memory", "analyze gains"} | plugins | analyses <= sections


def test_sections_have_usage_options_and_defaults(page):
    plan = page.split("## revnets plan\n")[1].split("\n## ")[0]
    assert "$ revnets plan [OPTIONS]" in plan
    assert "<code>--batch " in plan
    assert "[default: 32" in plan


def test_examples_are_code(page):
    assert "```console\n$ revnets analyze gains runs/fashion --png gains.png\n```" in page
