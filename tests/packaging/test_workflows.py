"""The workflows pin actions, have few permissions, and test the versions that pyproject.toml declares."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def workflow(name: str) -> dict[Any, Any]:
    return yaml.safe_load((GITHUB / "workflows" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_permissions_are_minimal(path):
    text = path.read_text(encoding="utf-8")
    actions = re.findall(r"uses: (\S+)", text)
    assert actions
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in actions)
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    jobs = yaml.safe_load(text)["jobs"]
    assert {name for name, job in jobs.items() if "permissions" in job} <= {"deploy"}
    assert all(job["timeout-minutes"] <= 180 for job in jobs.values())


def test_matrix_has_every_declared_python_and_the_lowest_torch():
    matrix = workflow("ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    declared = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert matrix["python"] == declared == workflow("ci.yml")["jobs"]["install"]["strategy"]["matrix"]["python"]
    (lowest,) = [line for line in PROJECT["dependencies"] if line.startswith("torch>=")]
    (entry,) = [entry for entry in matrix["include"] if entry.get("torch") == "lowest"]
    assert entry["torch_requirement"] == lowest.replace(">=", "==") + ".*"


def test_issue_forms_have_unique_fields_and_ask_for_the_environment():
    for path in (GITHUB / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        fields = [field["id"] for field in form["body"]]
        assert len(fields) == len(set(fields))
    assert "`revnets env`" in (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")


def test_linters_have_the_same_version_before_a_commit_and_in_development():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    revisions = {repository["repo"].split("/")[-1]: repository.get("rev") for repository in hooks["repos"]}
    (ruff,) = [line for line in PROJECT["optional-dependencies"]["dev"] if line.startswith("ruff==")]
    assert revisions["ruff-pre-commit"] == "v" + ruff.removeprefix("ruff==")
