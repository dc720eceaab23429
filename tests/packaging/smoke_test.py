"""Run every command of an installed `revnets` once: `python smoke_test.py`, outside of a checkout.

With `--without-extras`, only the commands of the library itself run, in an environment without timm and transformers.
The script uses only installed packages. Commands run in forks of one process, so that torch is imported once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path

import torch

import revnets
from revnets.cli import main

CHECKOUT = Path(__file__).resolve().parents[2]

NETWORK = """\
columns: 2
stem: {type: patchify, patch: 4}
levels:
  - {dim: 8, depth: 1, block: convnext}
  - {dim: 16, depth: 1, block: convnext}
head: {type: classifier, num_classes: 10}
"""


def commands(has_extras: bool) -> Iterator[list[str]]:
    """The arguments of each command line."""
    plugins = [entry.name for entry in entry_points(group="revnets.commands")]
    analyses = [entry.name for entry in entry_points(group="revnets.analyses")]
    own = [command.name or command.callback.__name__ for command in main.app.registered_commands if command.callback]
    yield ["--help"]
    for name in [*own, *(plugins if has_extras else [])]:
        yield [name, "--help"]
    for name in ("memory", "gains", *(analyses if has_extras else [])):
        yield ["analyze", name, "--help"]
    yield ["show", "network.yaml", "--png", "network.png"]
    yield ["plan", "network.yaml", "--input", "3,32,32", "--batch", "4", "--budget", "1GiB"]
    yield ["audit", "network.yaml", "--input", "3,32,32"]
    if has_extras:
        yield ["train", "digits", "epochs=1", "batch_size=718", "output=run"]  # two updates
        yield ["eval", "run"]


def run(arguments: list[str]) -> int:
    """The exit code of `revnets` with these arguments, in a fork."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        sys.argv = ["revnets", *arguments]
        code: object = 1
        try:
            main.main()
            code = 0
        except SystemExit as error:
            code = error.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else int(code is not None))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def smoke_test(has_extras: bool) -> list[str]:
    """Run all commands in the working directory, and return the command lines that fail."""
    torch.set_num_threads(1)
    executable = Path(sys.executable).with_name("revnets")
    subprocess.run([executable, "--help"], check=True, stdout=subprocess.DEVNULL)
    if has_extras:
        import timm  # noqa: F401  once, for all forks
    Path("network.yaml").write_text(NETWORK)
    failed = []
    for arguments in commands(has_extras):
        print("$ revnets", *arguments, flush=True)
        if run(arguments):
            failed.append(" ".join(arguments))
    return failed


if __name__ == "__main__":
    has_extras = "--without-extras" not in sys.argv
    assert has_extras == all(find_spec(name) is not None for name in ("timm", "transformers"))
    for name in ("revnets", "vision", "revnets_nlp"):
        spec = find_spec(name)
        assert spec is not None, f"{name} is not installed"
        assert spec.origin is not None
        assert not Path(spec.origin).is_relative_to(CHECKOUT), f"{name} is imported from the checkout"
    assert find_spec("nlp") is None, "the top-level name nlp is taken"
    assert revnets.__version__ == version("revnets")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        failures = smoke_test(has_extras)
    if failures:
        sys.exit("failed: " + "; ".join(failures))
