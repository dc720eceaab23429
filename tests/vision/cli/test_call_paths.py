"""Number of project files that a command enters, as a measure of how hard it is to follow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.timeouts import HANG

ROOT = Path(__file__).parents[3]

PROFILED = """
import sys, threading
entered = set()
root = sys.argv.pop(1)

def note(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(root) and not code.co_name.startswith("<"):
        entered.add(code.co_filename.removeprefix(root))

threading.setprofile(note)
sys.setprofile(note)
from revnets.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
finally:
    sys.setprofile(None)
    print("entered", *sorted(entered))
"""


def entered(*words: str) -> list[str]:
    """Files whose functions or class bodies run when a command does, imports included."""
    given = [sys.executable, "-c", PROFILED, f"{ROOT}/", *words]
    done = subprocess.run(given, capture_output=True, text=True, timeout=HANG, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    ours = ("revnets/", "vision/", "nlp/")  # a virtual environment may be in the checkout
    return [file for file in done.stdout.splitlines()[-1].split()[1:] if file.startswith(ours)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    output = tmp_path_factory.mktemp("digits") / "run"
    return entered("train", "digits", "epochs=1", "model.columns=2", "device=cpu", f"output={output}")


def test_number_of_files_that_training_digits_enters(digits: list[str]) -> None:
    assert "vision/training/trainer.py" in digits
    assert "revnets/engine/tape.py" in digits
    assert len(digits) <= 50, digits


def test_training_digits_enters_no_code_for_pretrained_weights_analyses_and_budgets(digits: list[str]) -> None:
    folders = ("vision/weights/", "vision/analysis/", "revnets/analysis/", "revnets/memory/", "nlp/")
    assert not [file for file in digits if file.startswith(folders)]
