"""Pickled errors keep code, key and cell."""

from __future__ import annotations

import pickle

import pytest

from revnets import PlanError, ReconstructionError, ReplayError
from revnets.engine.errors import ArgumentError
from revnets.engine.graph import ReadError


@pytest.mark.parametrize(
    "error",
    [
        ArgumentError("12 channels do not divide into 5 heads", "heads", code="not-divisible"),
        ReadError("no such read", "reads", code="unknown-choice"),
        PlanError("nothing fits", "budget", code="over-budget"),
        ReplayError("changed in place", code="changed-in-place", cell="c1.l0"),
        ReconstructionError("other bits", cell="c1.l0"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_pickled_errors_are_equal(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    assert vars(copy)["code"]
