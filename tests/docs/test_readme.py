"""The code, commands and links of the README work as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import revnets
from revnets.cli import main
from tests.support.paths import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)


def test_python_blocks_run():
    sequence, family, pretrained = blocks("python")
    assert all(len(text.strip().splitlines()) <= 8 for text in (sequence, family, pretrained))
    names: dict = {}
    exec(sequence, names)
    assert len(names["model"].flat()) == 48
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    with torch.device("meta"):
        exec(family, names)
        assert len(names["model"].columns.graph.nodes) == 4 * 4
        exec(pretrained, names)
    assert len(revnets.find_columns(names["model"]).flat()) == 12 + 1


def test_yaml_block_builds_a_network():
    (text,) = blocks("yaml")
    with torch.device("meta"):
        net = revnets.build(yaml.safe_load(text))
    assert net(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 10)


def test_commands_exist_and_files_exist():
    commands = re.findall(r"^    revnets ([\w-]+) (\S+)", TEXT, flags=re.MULTILINE)
    assert {command for command, _ in commands} == {"show", "audit", "plan", "train", "convert", "prepare-mt"}
    for command, file in commands:
        if "/" in file:
            assert (ROOT / file).exists(), file
        elif command == "train":
            assert (ROOT / "vision" / "configs" / f"{file}.yaml").exists(), file
        assert CliRunner().invoke(main.app, [command, "--help"]).exit_code == 0
    targets = re.findall(r"^    make (\w+)", TEXT, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(f"\n{target}: " in makefile for target in targets)


def test_links_resolve():
    links = []
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        found = re.findall(r"\]\((?!https?:)([^)]+)", page.read_text(encoding="utf-8"))
        links += [(page, *link.partition("#")[::2]) for link in found]
    assert len(links) > 10
    for page, path, heading in links:
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {path}"
        assert not heading or heading in anchors(target), f"{page.name}: {path}#{heading}"


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub generates them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_training_guide_names_every_key():
    from vision.config.run import TrainConfig

    page = (ROOT / "docs/guides/training.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", page))
    assert named >= set(TrainConfig.model_fields)
    for part in ("data", "optimizer", "schedule"):
        assert named >= set(type(TrainConfig.model_fields[part].default).model_fields)
    text, _ = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)  # the other one is in test_training_guide.py
    values = yaml.safe_load(text)
    assert TrainConfig.model_validate(values).optimizer.lr == 1e-3
