"""Bounds the number of source files that one call runs through."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import revnets
from tests.support.paths import ROOT

CONFIG = ROOT / "vision" / "configs" / "models" / "revcol_tiny.yaml"


def files_entered(call: Callable[[], Any]) -> set[str]:
    """Return the source files of this repository whose functions are called, without tests."""
    entered = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    paths = [Path(name).relative_to(ROOT) for name in entered if name.startswith(f"{ROOT}/")]
    return {str(path) for path in paths if path.parts[0] in ("revnets", "vision", "nlp")}


def build() -> None:
    with torch.device("meta"):
        revnets.build(CONFIG)


def test_build_runs_through_few_files() -> None:
    build()
    framework = {name for name in files_entered(build) if not name.startswith("revnets/nn/")}
    assert len(framework) <= 8, sorted(framework)
