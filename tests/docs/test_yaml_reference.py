"""docs/reference/yaml.md lists all keys, components and options with their defaults, and its examples work."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic_core import PydanticUndefined

import revnets
from revnets.config import registry
from revnets.config.column_order import ConstantSpec
from revnets.config.memory_budget import BudgetSpec
from revnets.config.net_spec import GainSpec, LevelSpec, NetSpec
from revnets.config.registry import PROVIDED, names, options
from revnets.engine.graph import READS
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/reference/yaml.md").read_text()


def section(title: str) -> str:
    """Return the text under a heading, up to the next one."""
    return re.split(r"^#+ ", PAGE.split(f"# {title}\n")[1], flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Return the rows of a table, without the header."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in line.replace("\\|", "/").strip("|").split("|")] for line in lines]


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def plain(value: Any) -> Any:
    """Return a default as it is written in YAML."""
    if isinstance(value, GainSpec):
        return value.model_dump(exclude_defaults=True)
    if hasattr(value, "type"):
        return value.type
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("title", "model", "others"),
    [
        ("Keys of the network", NetSpec, {"base"}),
        ("Keys of a level", LevelSpec, set()),
        ("Gain", GainSpec, set()),
        ("Constant", ConstantSpec, set()),
        ("Budget", BudgetSpec, set()),
    ],
)
def test_all_keys_with_default(title: str, model: type, others: set[str]) -> None:
    table = {row[0]: row[2] for row in rows(section(title))}
    fields = {name: field for name, field in model.model_fields.items() if name != "options"}
    assert set(table) == set(fields) | others
    for name, field in fields.items():
        if field.default is PydanticUndefined:
            assert table[name] == "required"
        else:
            assert yaml.safe_load(table[name]) == plain(field.default)


@pytest.mark.parametrize(
    ("title", "kind"), [("Blocks", "block"), ("Fusions", "fusion"), ("Stems", "stem"), ("Heads", "head")]
)
def test_all_components_and_options_with_default(title: str, kind: str) -> None:
    packages = ("revnets.", "vision.")
    built_in = [name for name in names(kind) if registry.find_component(kind, name).__module__.startswith(packages)]
    table = {(row[0], row[1]): row[2] for row in rows(section(title))}
    expected = {
        (name, option): "required" if parameter.default is inspect.Parameter.empty else plain(parameter.default)
        for name in built_in
        for option, parameter in options(kind, name).items()
    }
    assert set(table) == set(expected) | {(name, "") for name in built_in}
    for place, default in expected.items():
        assert table[place] == "required" if default == "required" else float_or(table[place]) == default


def float_or(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return yaml.safe_load(text)


def test_reads_modes_and_arguments() -> None:
    assert [row[0] for row in rows(section("Connections"))] == [*READS, "1 to m - 1"]
    assert [row[0] for row in rows(section("Memory"))] == list(revnets.Memory)
    given = {row[0]: re.findall(r"\w+", row[1].split(" of ")[0]) for row in rows(section("Custom components"))}
    assert given == {kind: list(arguments) for kind, arguments in PROVIDED.items()}


@pytest.fixture
def page(own_modules: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a working directory with the modules of the page, its first file as net.yaml, and its base example."""
    for text in fenced("python"):
        if heading := re.match(r"# (\w+\.py)\n", text):
            (own_modules / heading[1]).write_text(text)
    (own_modules / "net.yaml").write_text(fenced("yaml")[0])
    (own_modules / "revcol_tiny.yaml").write_text(f"base: {ROOT}/examples/configs/revcol_tiny.yaml\n")
    monkeypatch.chdir(own_modules)
    return own_modules


def test_files_of_page_build(page: Path) -> None:
    texts = fenced("yaml")
    assert len(texts) >= 4
    for index, text in enumerate(texts):
        (page / f"{index}.yaml").write_text(text)
        with torch.device("meta"):
            revnets.build(f"{index}.yaml")


def test_python_of_page_runs(page: Path) -> None:
    first, *_ = fenced("python")
    scope: dict[str, Any] = {}
    exec(first, scope)
    assert (scope["net"].spec.columns, scope["net"].spec.levels[2].depth, scope["spec"].columns) == (8, 6, 4)


def test_custom_components_of_page_train(page: Path) -> None:
    (page / "own.yaml").write_text(next(text for text in fenced("yaml") if "my_parts" in text))
    net = revnets.build("own.yaml")
    words = torch.randint(100, (2, 7))
    grads = []
    for memory in ("exact", "store"):
        net.columns.memory = memory
        loss = torch.nn.functional.cross_entropy(net(words), words[:, 0])
        grads.append(torch.autograd.grad(loss, list(net.parameters())))
    assert all(torch.equal(exact, store) and exact.any() for exact, store in zip(*grads, strict=True))


def test_overrides_of_page_work(page: Path) -> None:
    line = next(line for line in section("Overrides").splitlines() if line.startswith("    "))
    for override in line.split():
        revnets.load_spec("net.yaml", [override])


@pytest.mark.parametrize("row", rows(section("Errors")), ids=lambda row: row[0])
def test_errors_of_page_are_raised(page: Path, row: list[str]) -> None:
    with pytest.raises(revnets.SpecError) as caught:
        revnets.build("net.yaml", [row[0]])
    assert str(caught.value) == row[1]
