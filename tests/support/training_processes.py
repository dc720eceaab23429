"""Runs in separate processes, alone or two together over gloo, which can be killed at chosen moments."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from revnets.utils import atomic_files
from tests.support.multiprocess import processes
from tests.support.timeouts import HANG
from vision.config.run import load_config
from vision.distributed.context import joined
from vision.errors import EXPECTED
from vision.training import train_state
from vision.training.trainer import Trainer

MOMENTS = {
    "before an update": (train_state.TrainState, "update", "before"),
    "before an evaluation": (train_state.TrainState, "evaluate", "before"),
    "while a checkpoint is written": (torch, "save", "halfway"),
    "before a file gets its name": (atomic_files.os, "replace", "before"),
    "after a file got its name": (atomic_files.os, "replace", "after"),
    "before the best gets its name": (atomic_files.os, "link", "before"),
    "images that are no numbers": (train_state.TrainState, "_moved", "poisoned"),
}


FILE_OPERATION = "before a file operation"
"""A file operation in the directory of the run: opening for writing, renaming, linking, creating or removing."""


def process(config: dict[str, Any], moment: str = "", count: int = 0, number: int = signal.SIGKILL) -> int:
    """Run one process; return its exit code. It gets a signal before the `count`-th occurrence of `moment`."""
    return together(config, moment, count, number, size=1)[0]


def together(
    config: dict[str, Any],
    moment: str = "",
    count: int = 0,
    number: int = signal.SIGKILL,
    size: int = 2,
    victim: int = 0,
    limit: int | None = None,
    patience: float = HANG,
) -> list[int]:
    """Run several processes; return their exit codes.

    Args:
        moment, count, number: Before the `count`-th occurrence of `moment`, `victim` gets this signal, or bad images.
        limit: Bytes that `victim` can write to a file.
        patience: Seconds that the others have to end after `victim`. Then they are killed, as by a launcher: a process
            that has not yet connected to the victim would wait for half an hour.
    """
    port = _free_port() if size > 1 else 0
    children = []
    for rank in range(size):
        what = (moment, count, number, limit) if rank == victim else ("", 0, 0, None)
        children.append(processes.Process(target=_run, args=(config, rank, size, port, *what)))
        children[-1].start()
    children[victim].join(HANG)
    for child in children:
        child.join(patience)
        if child.exitcode is None and patience < HANG:
            child.kill()
            child.join()
        if child.exitcode is None:
            for other in children:
                other.kill()
            raise AssertionError("the run hangs")
    return [child.exitcode for child in children]


def console_output(config: dict[str, Any]) -> str:
    """Return the output of a run, followed by its errors."""
    return Path(config["output"]).with_suffix(".txt").read_text()


def _run(
    config: dict[str, Any], rank: int, size: int, port: int, moment: str, count: int, number: int, limit: int | None
) -> None:
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    if moment == FILE_OPERATION:
        _arm_files(config["output"], count, number)
    elif moment:
        _arm(moment, count, number)
    if limit is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with open(Path(config["output"]).with_suffix(".txt" if rank == 0 else f".{rank}.txt"), "a") as file:
        try:
            with joined("cpu") as world:
                outcome = Trainer(load_config(config), Console(file=file, width=200), world).fit()
        except EXPECTED as error:
            file.write(f"error: {error}\n")
            file.flush()
            os._exit(3)  # the others may have ended
        except Exception:
            file.write(traceback.format_exc())
            file.flush()
            os._exit(4)
    raise SystemExit(0 if outcome.signal is None else 128 + outcome.signal)


def _arm(moment: str, count: int, number: int) -> None:
    owner, name, when = MOMENTS[moment]
    original, calls = getattr(owner, name), iter(range(1, 10_000))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) != count:
            return original(*args, **kwargs)
        if when == "poisoned":
            images, labels = original(*args, **kwargs)
            return torch.full_like(images, torch.nan), labels
        if when == "halfway":
            args[1].write(b"half of a checkpoint")
            args[1].flush()
        result = original(*args, **kwargs) if when == "after" else None
        os.kill(os.getpid(), number)
        return original(*args, **kwargs) if when == "before" else result

    setattr(owner, name, interrupted)


def _arm_files(folder: str, count: int, number: int) -> None:
    events = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
    calls = iter(range(1, 10_000))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in events):
            return
        inside = any(os.fsdecode(path).startswith(folder) for path in args[:2] if isinstance(path, (str, bytes, Path)))
        relative = event != "open" and not os.path.isabs(args[0])  # in a directory that is being removed
        if (inside or relative) and next(calls) == count:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
