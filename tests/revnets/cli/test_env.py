"""The command `env`: its sections, and what it prints if a part of the environment is broken."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import revnets
from revnets.cli import env, main


def printed(*options: str) -> str:
    result = CliRunner().invoke(main.app, ["env", *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def entry_points_of(*entries: EntryPoint) -> Any:
    return lambda group: [entry for entry in entries if entry.group == group]


@pytest.fixture
def no_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "entry_points", entry_points_of())


def test_json_contains_every_section() -> None:
    found = json.loads(printed("--json"))
    assert list(found) == ["system", "torch", "packages", "extras", "entry points", "variables"]
    assert found["system"]["revnets"].startswith(revnets.__version__)
    assert found["system"]["cpu"]["threads"] == torch.get_num_threads()
    assert found["torch"]["version"] == str(torch.__version__)
    assert "gloo" in found["torch"]["distributed backends"]
    assert found["packages"]["torch"]
    assert {"vision", "nlp", "hf"} <= set(found["extras"])
    assert {"train", "cka", "timm"} <= {entry["name"] for entry in found["entry points"]}
    assert found["variables"]["OMP_NUM_THREADS"] == "1"


@pytest.mark.usefixtures("no_entry_points")
def test_default_output_is_aligned_markdown_tables() -> None:
    tables = printed().strip().split("\n\n")
    assert len(tables) == 6
    for table in tables:
        lines = table.splitlines()
        assert len({len(line) for line in lines}) == 1
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
        assert set(lines[1]) == set("|- ")


def test_entry_points_that_fail_are_reported(monkeypatch: pytest.MonkeyPatch, own_modules: Path) -> None:
    (own_modules / "env_exits.py").write_text("print('noise')\nraise SystemExit(3)\n")
    (own_modules / "env_breaks.py").write_text("raise RuntimeError('first | line\\nsecond line')\n")
    monkeypatch.syspath_prepend(own_modules)
    entries = [
        EntryPoint("absent", "env_absent:run", "revnets.commands"),
        EntryPoint("breaks", "env_breaks:run", "revnets.commands"),
        EntryPoint("exits", "env_exits:run", "revnets.models"),
        EntryPoint("loads", "json:dumps", "revnets.models"),
    ]
    monkeypatch.setattr(env, "entry_points", entry_points_of(*entries))
    found = {entry["name"]: entry["error"] for entry in json.loads(printed("--json"))["entry points"]}
    assert found == {
        "absent": "error: ModuleNotFoundError: No module named 'env_absent'",
        "breaks": "error: RuntimeError: first | line",
        "exits": "error: SystemExit: 3",
        "loads": None,
    }
    assert "`error: RuntimeError: first \\| line`" in printed()


@pytest.mark.usefixtures("no_entry_points")
def test_probes_that_fail_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA driver is too old")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    monkeypatch.setattr(env, "distribution", fail)
    monkeypatch.setattr(env, "version", fail)
    error = "error: RuntimeError: CUDA driver is too old"
    found = json.loads(printed("--json"))
    assert found["torch"]["devices"] == found["extras"] == found["packages"]["timm"] == error
    assert found["system"]["revnets"] == error
    assert printed().count(f"`{error}`") == 3 + len(env.PACKAGES)


@pytest.mark.usefixtures("no_entry_points")
def test_gpus_are_listed_with_memory_and_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="GPU X", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert "| device 1             | name GPU X, memory 80.0 GiB, compute capability 9.0 |" in printed()
    assert json.loads(printed("--json"))["torch"]["devices"][0]["memory"] == 80 << 30


def test_an_extra_lists_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = {
        "revnets": [
            "torch>=2.7",
            "absent>=1; extra == 'a'",
            "old>=2; extra == 'a'",
            "revnets[a]; extra == 'b'",
            "tool[data]>=1; extra == 'c'",
            "other>=1; python_version < '3' and extra == 'c'",
            "torch>=2.7; extra == 'd'",
        ],
        "tool": ["arrow; extra == 'data'"],
    }
    versions = {"torch": "2.14.1", "old": "1.9", "tool": "1.0rc1", "revnets": "0.1"}
    metadata = SimpleNamespace(get_all=lambda name: ["a", "b", "c", "d"])

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(env, "distribution", lambda name: SimpleNamespace(metadata=metadata, requires=requires[name]))
    monkeypatch.setattr(env, "version", version)
    missing = ["absent>=1", "old>=2 (1.9 is installed)"]
    assert env.missing_by_extra() == {
        "a": missing,
        "b": missing,
        "c": ["arrow", "tool[data]>=1 (1.0rc1 is installed)"],
        "d": [],
    }


@pytest.mark.usefixtures("no_entry_points")
def test_secrets_and_the_home_directory_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("TORCH_HOME", "/home/someone/cache")
    monkeypatch.setenv("TORCH_HUB_TOKEN", "abc123")
    monkeypatch.setenv("NCCL_SERVER", "https://user:abc123@host")
    monkeypatch.setenv("HF_TOKEN", "abc123")
    text = printed("--json")
    assert "abc123" not in text
    assert "someone" not in text
    variables = json.loads(text)["variables"]
    assert variables["TORCH_HOME"] == "~/cache"
    assert variables["TORCH_HUB_TOKEN"] == variables["NCCL_SERVER"] == "(set)"
    assert "HF_TOKEN" not in variables


@pytest.mark.usefixtures("no_entry_points")
def test_imports_run_in_their_own_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator does not exist')\n")
    (tmp_path / "einops.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(env, "PACKAGES", {"timm": (), "einops": (), "typer": (), "no_such_package": ()})
    assert json.loads(printed("--json", "--imports"))["imports"] == {
        "timm": "RuntimeError: operator does not exist",
        "einops": "ended by signal 9",
        "typer": None,
    }
    assert "`RuntimeError: operator does not exist`" in printed("--imports")


def test_packages_are_not_imported_for_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "sacrebleu", "peft"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would raise
    monkeypatch.setattr(env, "entry_points", entry_points_of())
    assert not str(env.environment()["packages"]["timm"]).startswith("error")
