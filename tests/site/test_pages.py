"""The pages of the site: navigation, reference of the public names, and code blocks that run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import yaml

import revnets
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
API = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference" / "api").glob("*.md"))


def leaves(navigation: object) -> list[str]:
    """The pages of the navigation."""
    if isinstance(navigation, str):
        return [navigation]
    items = navigation if isinstance(navigation, list) else navigation.values()
    return [page for item in items for page in leaves(item)]


def test_navigation_lists_every_page_once():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    pages |= {f"notebooks/{path.stem}.md" for path in (DOCS / "notebooks").glob("*.ipynb")}
    listed = leaves(CONFIG["nav"])
    assert len(listed) == len(set(listed))
    roots = {"changelog", "code-of-conduct", "contributing", "security"}
    assert set(listed) == pages | {f"development/{name}.md" for name in roots}


@pytest.mark.parametrize("section", ["guides", "concepts", "results", "reference", "development"])
def test_section_index_links_to_every_page(section):
    index = (DOCS / section / "index.md").read_text(encoding="utf-8")
    pages = {path.relative_to(DOCS / section).as_posix() for path in (DOCS / section).rglob("*.md")} - {"index.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


def test_lists_and_tables_follow_a_blank_line():
    """Without one, the site shows them as running text."""
    fences = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)
    start = re.compile(r"^(?![ |*-]|\d+\.|#)\S.*\n(?=[-*|] |\d+\. )(.*)", flags=re.MULTILINE)
    pages = [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]
    found = {(page.name, line) for page in pages for line in start.findall(fences.sub("", page.read_text("utf-8")))}
    assert found == set()


@pytest.mark.parametrize(
    "package",
    [
        "revnets",
        "vision",
        "vision.tasks",
        "vision.supervision",
        "vision.huggingface",
        "vision.segmentation",
        "vision.detection",
    ],
)
def test_reference_has_every_public_name(package):
    source = (ROOT / Path(*package.split(".")) / "__init__.py").read_text(encoding="utf-8")
    (names,) = [
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    same_object = {"revnets.SpecError"}  # is ConfigError
    modules = {"vision.revcol"}
    missing = {f"{package}.{name}" for name in names} - set(re.findall(r"^::: ([\w.]+)$", API, flags=re.MULTILINE))
    assert missing - same_object - modules == set()


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_landing_page_runs():
    names: dict = {}
    (code,) = blocks("index.md", "python")
    exec(code, names)
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def test_first_network_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (text,) = blocks("getting-started/first-network.md", "yaml")
    Path("tiny.yaml").write_text(text)
    names: dict = {}
    for code in blocks("getting-started/first-network.md", "python"):
        exec(code, names)  # asserts that the gradients are equal
    assert isinstance(names["model"], revnets.Net)


def test_addresses_of_the_project_agree():
    import tomllib

    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert CONFIG["repo_url"] == urls["Repository"] == citation["repository-code"]
    assert CONFIG["site_url"] == urls["Documentation"] == citation["url"]


def test_citations_name_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == revnets.__version__
    assert f"version = {{{revnets.__version__}}}" in (ROOT / "README.md").read_text(encoding="utf-8")
