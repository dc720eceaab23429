"""Layout of the packages: directories, names, file sizes and former import paths."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

import revnets
from tests.support.list_slow_tests import read_list
from tests.support.paths import ROOT

PACKAGES = ("revnets", "vision", "nlp")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

SAME_MEANING = {
    "Attention": "self-attention; that of nlp has a padding mask and the initialization of fairseq",
    "CosineAttention": "the attention of Swin Transformer V2, for images and for padded sentences",
    "create": "builds the model of a name, in a package that `revnets.models` lists",
    "names": "the names in a registry or in a package of models",
    "read": "reads a file of the format of its module",
    "rows": "an analysis as rows of a CSV file",
    "table": "an analysis as a table of the terminal",
}
"""Public functions and classes that are defined more than once."""

SAME_TOPIC = {
    "analyze": "the analyses of a package on the command line",
    "audit": "the audit, its figure and its command",
    "blocks": "a former import path",
    "common": "helpers of the commands of a package",
    "configuration": "the configuration of a model for transformers, of images or of text",
    "errors": "the exceptions of a directory",
    "figures": "the figures of a directory",
    "graph": "the graph and its figure",
    "main": "the commands of a package",
    "memory_budget": "the key of a specification, and its use in training in vision and in nlp",
    "plan": "the memory plan of a model and its command",
    "task": "a former import path",
}
"""Names of modules in more than one folder."""


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ("revnets.blocks:DropPath", "revnets.nn.blocks:DropPath"),
        ("revnets.config:Strict", "revnets.config.loader:Strict"),
        ("revnets.config:SpecError", "revnets.config.errors:SpecError"),
        ("revnets.config:load", "revnets.config.loader:load"),
        ("revnets.models:load_model", "revnets.models.loading:load_model"),
        ("vision.vit:PatchEmbed", "vision.models.vit_blocks:PatchEmbed"),
        ("vision.vit:PostNormBlock", "vision.models.vit_blocks:PostNormBlock"),
        ("vision.task:SupervisionTask", "vision.supervision.task:SupervisionTask"),
        ("vision.supervision:SupervisionConfig", "vision.config.learning:SupervisionConfig"),
        ("vision.supervision:HeadsEvaluator", "vision.supervision.supervised:HeadsEvaluator"),
        ("nlp.data.corpus:DataError", "nlp.data.corpus:TranslationError"),
        ("nlp.model:RevColTransformerModel", "nlp.models.revcol_transformer:RevColTransformerModel"),
    ],
)
def test_former_paths_refer_to_the_same_objects(former, present):
    if former.startswith("vision"):
        pytest.importorskip("timm")
    if former.startswith("nlp.model"):
        pytest.importorskip("fairseq")
    old, new = (path.split(":") for path in (former, present))
    assert getattr(importlib.import_module(old[0]), old[1]) is getattr(importlib.import_module(new[0]), new[1])


@pytest.mark.parametrize("name", ["audit", "plan"])
def test_audit_and_plan_are_functions_of_the_package(name):
    assert inspect.isfunction(getattr(revnets, name))
    assert importlib.util.find_spec(f"revnets.{name}") is None  # importing a module of that name would replace it


def definitions() -> dict[str, list[Path]]:
    """Return public top-level functions and classes by name, without commands, whose functions have their names."""
    places = defaultdict(list)
    entry_points = [target for group in PROJECT["project"]["entry-points"].values() for target in group.values()]
    for file in FILES:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(file.read_bytes()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            is_command = "command(" in "".join(map(ast.unparse, node.decorator_list))
            if not is_command and f"{module}:{node.name}" not in entry_points and "cli" not in file.parts:
                places[node.name].append(file)
    return places


def test_names_have_one_meaning():
    repeated = {name for name, files in definitions().items() if len(files) > 1}
    assert repeated <= set(SAME_MEANING)


def test_module_names_have_one_topic():
    folders = defaultdict(set)
    for file in FILES:
        folders[file.stem].add(file.parent)
    repeated = {name for name, places in folders.items() if len(places) > 1}
    assert repeated - {"__init__"} <= set(SAME_TOPIC)


def test_directories_and_files_are_small():
    modules = defaultdict(list)
    for file in FILES:
        if file.name != "__init__.py":
            modules[file.parent].append(file.name)
    assert {folder: names for folder, names in modules.items() if len(names) > 14} == {}
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {file: count for file, count in lines.items() if count > 350} == {}


def test_packages_are_typed():
    assert [package for package in PACKAGES if not (ROOT / package / "py.typed").exists()] == []


def test_contracts_and_architecture_page_name_every_directory():
    page = (ROOT / "docs/development/architecture.md").read_text(encoding="utf-8")
    contracts = {item["id"]: item for item in PROJECT["tool"]["importlinter"]["contracts"]}
    for package in PACKAGES:
        contract = contracts[f"{package}-layers"]
        assert contract["exhaustive"]
        layers = re.findall(r"\w+", " ".join(contract["layers"]))
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert folders <= set(layers)
        assert {name for name in folders if f"`{package}/{name}`" not in page} == set()


def test_paths_in_the_documentation_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    pattern = re.compile(r"(?<![\w/.~-])(?:revnets|vision|nlp|tests|examples|docs)/[\w/.-]+\.(?:py|yaml|md|png)\b")
    made_by_the_reader = {"vision/configs/models/revcol_nano.yaml"}
    found = {(page.name, path) for page in pages for path in pattern.findall(page.read_text(encoding="utf-8"))}
    assert len(found) > 50
    missing = {(page, path) for page, path in found if path not in made_by_the_reader and not (ROOT / path).exists()}
    assert missing == set()


def test_listed_slow_tests_exist() -> None:
    names: dict[str, set[str]] = defaultdict(set)
    for test in read_list():
        file, name = test.split("::")
        names[file].add(name)
    for file, expected in names.items():
        tree = ast.parse((ROOT / file).read_bytes())
        assert expected <= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, file
