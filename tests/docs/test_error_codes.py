"""The error codes in the packages, in the list of codes and in docs/reference/errors.md are the same."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import revnets
from revnets.config.error_codes import CODES
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/reference/errors.md").read_text()
FORM = re.compile(r"[a-z]+(-[a-z]+)+")
PACKAGES = ("revnets", "vision", "nlp")


def texts_in(node: ast.AST) -> Iterator[str]:
    """Return all string constants in an expression."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def codes_in(path: Path) -> set[str]:
    """Return the error codes of a module: keywords, defaults, attributes, and results of `_wrong_type`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "code":
            found |= set(texts_in(node.value))
        elif isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args]
            defaults = [None] * (len(arguments) - len(node.args.defaults)) + node.args.defaults
            pairs = [
                *zip(arguments, defaults, strict=True),
                *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
            ]
            found |= {text for item, value in pairs if item.arg == "code" and value for text in texts_in(value)}
            if node.name == "_wrong_type":
                returned = [item.value for item in ast.walk(node) if isinstance(item, ast.Return)]
                found |= {
                    text for value in returned if isinstance(value, ast.Tuple) for text in texts_in(value.elts[-1])
                }
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "code" for target in targets):
                found |= {text for text in texts_in(node.value) if FORM.fullmatch(text)}  # others are of languages
    return found


def test_codes_in_packages_and_list_are_equal() -> None:
    used = {code for name in PACKAGES for path in (ROOT / name).rglob("*.py") for code in codes_in(path)}
    assert used == set(CODES)


def test_codes_are_short_hyphenated_words() -> None:
    assert all(FORM.fullmatch(code) and len(code) <= 20 for code in CODES)


def test_page_lists_all_codes_with_meaning_and_fix() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (.+?) \| (.+?) \|$", PAGE, flags=re.MULTILINE)
    assert {code: meaning for code, meaning, _ in rows} == CODES
    assert len(rows) == len(CODES)


def test_example_of_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "net.yaml").write_text((ROOT / "examples/configs/vectors.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)[0]
    exec(code, {"revnets": revnets})
    assert capsys.readouterr().out.strip() == re.findall(r"# (unknown-key .*)", code)[0]
