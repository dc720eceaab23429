"""Run fairseq-preprocess in a fork; the fixture `made` in test_prepare.py runs it as users do."""

from __future__ import annotations

import pytest

from nlp.data import binarization
from tests.support import forked_programs


@pytest.fixture
def forked_preprocess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binarization.subprocess, "run", forked_programs.run)
