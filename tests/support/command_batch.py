"""Many commands in one process: `python -m tests.support.command_batch CASES RESULTS`.

A case is {folder, canary, argv}. A result is {exit, code, key, text, fired}, where `fired` is true if the canary, a
file that only foreign code creates, existed afterwards.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import typer

from tests.support import forked_programs
from tests.support.paths import ROOT


def run_batch(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run cases in one new process; return results by name."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.support.command_batch", folder / "cases.json", folder / "results.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    forked_programs.run(command, cwd=folder, env=environment).check_returncode()
    return json.loads((folder / "results.json").read_text())


def _call(argv: Sequence[str]) -> None:
    from vision import load_run

    if argv[0] == "load_run":
        load_run(argv[1])
        return
    _program()(list(argv), standalone_mode=False)


@cache
def _program() -> Any:
    """Return the program `revnets`. Building it takes longer than most commands."""
    from revnets.cli.main import app

    return typer.main.get_command(app)


def _result(argv: Sequence[str], canary: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"exit": 0, "code": None, "key": None, "text": ""}
    try:
        _call(argv)
    except BaseException as error:
        cause = error.__cause__ or error  # the cause of `typer.Exit`
        found["exit"] = getattr(error, "exit_code", 2 if hasattr(error, "code") else None)
        found |= {key: getattr(cause, key, None) for key in ("code", "key")} | {"text": str(cause)}
    fired = canary.exists()
    canary.unlink(missing_ok=True)
    for name, module in list(sys.modules.items()):  # the next case must import it again
        if (getattr(module, "__file__", None) or "").startswith(str(canary.parent)):
            del sys.modules[name]
    return {**found, "fired": fired}


def main() -> None:
    sys.path.remove(os.getcwd())  # a command does not import modules in its working directory
    cases, results = (Path(word) for word in sys.argv[1:])
    found = {}
    for name, case in json.loads(cases.read_text()).items():
        os.chdir(case["folder"])
        found[name] = _result(case["argv"], Path(case["canary"]))
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
