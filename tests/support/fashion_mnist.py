"""Synthetic images in idx format, and helpers to run the scripts on Fashion-MNIST."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.support.forked_programs import Program
from tests.support.paths import ROOT
from tests.support.timeouts import HANG
from tests.vision.data.test_idx import idx

QUICK = ("batch_size=32", "data.train_samples=320", "schedule.warmup_epochs=0.5")


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """Import a script of examples/ as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples/experiments")
    return importlib.import_module(name)


def make_files(root: Path) -> Path:
    """Write ten classes, each a different pattern with noise: easy, but not for an untrained network."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 2, (10, 7, 7), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    for name, count in (("train", 320), ("t10k", 100)):
        labels = torch.randperm(count, generator=generator) % 10
        noise = torch.randint(0, 80, (count, 28, 28), generator=generator)
        idx(root, f"{name}-images-idx3-ubyte", (170 * patterns[labels] + noise).byte(), zipped=name == "train")
        idx(root, f"{name}-labels-idx1-ubyte", labels.byte(), zipped=name == "t10k")
    return root


def command(name: str, *words: object) -> list[str]:
    return [sys.executable, str(ROOT / "examples/experiments" / f"{name}.py"), *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def started(name: str, *words: object, forks: bool = True) -> Program:
    """Start a script of examples/. With `forks`, the runs that it starts are forks, too."""
    return Program(command(name, *words), env=environment(), forks=forks)


def output_of(process: Program, code: int = 0) -> str:
    """Wait for an exit code; return the output, or the line of the error."""
    out, errors = process.communicate(timeout=HANG)
    assert process.returncode == code, errors
    return errors if code == 1 else out


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of a table by the first cell of each row."""
    cells = [[cell.strip() for cell in line.strip("│\n").split("│")] for line in text.splitlines() if "│" in line]
    return {name: rest for name, *rest in cells}
