"""Python programs as forks of a process that has already imported torch, timm and fairseq, so that they start quickly.

A program has its own arguments, directory, environment and streams, and can be killed. Unlike a program of a shell, it
starts with imported modules, and `PYTHON*` in its environment applies only to processes that it starts. Tests of
imports use `subprocess` itself, and so do tests of how `revnets`, fairseq and the examples are started.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import IO, Any, Self

from tests.support.multiprocess import processes
from tests.support.timeouts import HANG

_POPEN = subprocess.Popen


class Program:
    """The parts of `subprocess.Popen` that tests need.

    Args:
        words: `sys.executable` with a script, `-m` or `-c`, or an installed script.
        stdout, stderr: Open files. By default, `communicate` returns the output. `stderr` may be STDOUT.
        forks: Whether Python programs that this one starts are forks of it.
        context: Context that creates the process.
    """

    def __init__(
        self,
        words: Sequence[object],
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | int | None = None,
        forks: bool = False,
        context: BaseContext = processes,
        **_: Any,
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory()
        self._streams = [Path(self._temporary.name, name) for name in ("stdout", "stderr")]
        files = [str(getattr(given, "name", own)) for given, own in zip((stdout, stderr), self._streams, strict=True)]
        streams = (files[0], files[0] if stderr == subprocess.STDOUT else files[1])
        environment = dict(os.environ if env is None else env)
        given = ([str(word) for word in words], str(cwd or Path.cwd()), environment, streams, forks)
        self._process = context.Process(target=_become, args=given)  # type: ignore[attr-defined]
        self._process.start()
        self.args, self.pid = words, self._process.pid
        self.returncode: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = HANG) -> int:
        """Wait for the exit code.

        Raises:
            subprocess.TimeoutExpired: If the program does not end in time.
        """
        if self.returncode is None:
            self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or HANG)
        return self.returncode

    def communicate(self, _: None = None, timeout: float | None = HANG) -> tuple[str, str]:
        """Wait for the end; return the output."""
        self.wait(timeout)
        out, err = (path.read_text() if path.exists() else "" for path in self._streams)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(words: Sequence[object], **given: Any) -> subprocess.CompletedProcess[str]:
    """Replace `subprocess.run` for Python programs."""
    program = Program(words, **given)
    try:
        out, err = program.communicate()
    finally:
        program.kill()
    return subprocess.CompletedProcess(list(words), program.wait(), out, err)


def _popen(args: Any, *rest: Any, **given: Any) -> Any:
    """Replace `subprocess.Popen` in a program: Python programs are forks, other programs start as usual."""
    if isinstance(args, (list, tuple)) and args[0] == sys.executable:
        return Program(args, context=multiprocessing.get_context("fork"), **given)
    return _POPEN(args, *rest, **given)


def _become(words: list[str], folder: str, env: Mapping[str, str], streams: Iterable[str], forks: bool) -> None:
    """Run a program in this process."""
    os.chdir(folder)
    for number, path in enumerate(streams, start=1):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(env)
    logging.root.handlers.clear()  # importing fairseq creates one
    for name in [name for name in sys.modules if name.split(".")[0] == "nlp"]:
        del sys.modules[name]  # fairseq imports the models in --user-dir only if the package is new
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if forks:
        subprocess.Popen = _popen  # type: ignore[misc]
    if words[0] == sys.executable:
        words = words[1:]
    if words[0] == "-c":
        main = types.ModuleType("__main__")
        sys.modules["__main__"], sys.argv = main, [words[0], *words[2:]]
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    elif words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(words[0]))
        runpy.run_path(words[0], run_name="__main__")
