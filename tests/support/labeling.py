"""A small teacher with two heads, and labeling in processes that can be killed."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tests.support import image_folders
from tests.support.multiprocess import processes
from tests.support.timeouts import HANG
from vision.config.run import load_config
from vision.labeling.command import label_data
from vision.labeling.local_engine import LabelSettings
from vision.training.trainer import Trainer

HEADS = {"insects": 3, "eyes": 2}
SETTINGS = LabelSettings(batch_size=4, shard_size=5)

MODEL: dict[str, Any] = {
    "columns": 2,
    "stem": {"type": "patchify", "in_chans": 3, "patch": 4},
    "levels": [
        {"dim": 3, "depth": 1, "block": "convnext", "layer_scale": 0.1},
        {"dim": 5, "depth": 1, "block": "convnext", "layer_scale": 0.1},
    ],
    "head": {"type": "classifier", "num_classes": 5},
    "drop_path": 0.2,
}


def source(root: Path, **changes: Any) -> dict[str, Any]:
    """Return an entry of the list `data`."""
    return {"name": "folder", "root": str(root), "img_size": 16, **changes}


def run_of(output: Path, *sources: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the configuration of a run with both heads."""
    return {
        "model": MODEL,
        "output": str(output),
        "heads": HEADS,
        "data": list(sources),
        "epochs": 2,
        "batch_size": 6,
        "grad_accum": 2,
        "label_smoothing": 0.1,
        "ema": {"decay": 0.5},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "device": "cpu",
        "log_every": 3,
        **changes,
    }


def train(config: dict[str, Any]) -> tuple[Trainer, str]:
    """Train a run; return it and its output."""
    console = Console(file=io.StringIO(), width=200)
    trainer = Trainer(load_config(config), console)
    trainer.fit()
    return trainer, console.file.getvalue()  # type: ignore[attr-defined]


def two_sources(folder: Path) -> list[dict[str, Any]]:
    """Write images of three classes of insects and of two classes of eyes."""
    image_folders.folder(folder / "insects")
    image_folders.folder(folder / "eyes", train=5, val=2)
    for split in ("train", "val"):
        for path in (folder / "eyes" / split / "cat").iterdir():
            path.unlink()
        (folder / "eyes" / split / "cat").rmdir()
    return [source(folder / "insects", head="insects"), source(folder / "eyes", head="eyes")]


def label(teacher: Path, data: Path, folder: Path, settings: LabelSettings = SETTINGS, **options: Any) -> str:
    """Label in this process; return the output."""
    console = Console(file=io.StringIO(), width=200)
    label_data(str(teacher), data, folder, settings, device="cpu", console=console, **options)
    return console.file.getvalue()  # type: ignore[attr-defined]


def start(teacher: Path, data: Path, folder: Path, kill_at: int = 0, rank: int = 0, size: int = 1) -> Any:
    """Start a process that labels, and kill it before its `kill_at`-th file operation in the output directory."""
    child = processes.Process(target=_label, args=(teacher, data, folder, kill_at, rank, size))
    child.start()
    return child


def ended(child: Any) -> int:
    """Wait for a process; return its exit code."""
    child.join(HANG)
    if child.exitcode is None:
        child.kill()
        raise AssertionError("labeling hangs")
    return child.exitcode


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a directory, including hidden ones."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _label(teacher: Path, data: Path, folder: Path, kill_at: int, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29512"}
    if kill_at:
        calls = iter(range(1, 10_000))

        def hook(event: str, args: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            changes = writes or event in ("os.rename", "os.remove", "os.mkdir", "os.truncate")
            inside = (
                changes and isinstance(args[0], (str, bytes, Path)) and os.fsdecode(args[0]).startswith(str(folder))
            )
            if inside and next(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
    label(teacher, data, folder)
