"""Errors of the package keep their attributes when they are sent to another process."""

from __future__ import annotations

import pickle

import pytest

from vision.errors import CheckpointError, DataError, TrainingError, run_error
from vision.weights.official_names import MismatchError


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("a.pt", "damaged", "Use another", code="damaged-file"),
        MismatchError("a.pt", "revcol_tiny", ["missing stem.0.weight"]),
        TrainingError("the loss is nan", code="loss-not-finite"),
        DataError("bee/3.jpg: cannot be read"),
        run_error("data.root", "there is no directory", "Check the path", code="missing-file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_pickled_errors_are_the_same(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    assert copy.code == error.code  # pyright: ignore[reportAttributeAccessIssue]


def test_an_error_of_a_run_names_its_key() -> None:
    error = run_error("data.root", "there is no directory", code="missing-file")
    assert (error.source, error.key, error.code) == ("training run", "data.root", "missing-file")


def test_a_checkpoint_error_has_the_attributes_of_a_configuration_error() -> None:
    error = CheckpointError("a.pt", "damaged", "Use another", code="damaged-file")
    assert (error.source, error.message, error.hint) == ("a.pt", "damaged", "Use another")
    assert (error.problem, error.remedy) == (error.message, error.hint)
