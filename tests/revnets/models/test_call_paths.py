"""How many files of this package take part in a call, so that its path stays short."""

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
    """Files of this repository of which a function is called, apart from the tests."""
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


def test_build_enters_few_files_besides_components() -> None:
    build()
    framework = {name for name in files_entered(build) if not name.startswith("revnets/nn/")}
    assert len(framework) <= 8, sorted(framework)
