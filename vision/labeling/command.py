"""The command `revnets label`: loading, progress bar and throughput."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from revnets.utils.atomic_files import make_folder
from vision.distributed.context import world_of
from vision.labeling.local_engine import LabelSettings, label_images, provenance_of
from vision.labeling.origin import write_origin
from vision.labeling.shards import list_shards
from vision.labeling.teacher import load_teacher
from vision.labeling.work_queue import WorkQueue

LARGE_DATA = 168_000_000
"""Number of images in the paper's large data set (appendix C.1)."""


def label_data(
    source: str,
    data: Path,
    folder: Path,
    settings: LabelSettings,
    engine: Literal["local", "ray"] = "local",
    workers: int = 0,
    device: str = "auto",
    weights: str = "auto",
    trust: bool = False,
    console: Console | None = None,
) -> int:
    """Write the label files that do not exist yet.

    Args:
        source: The teacher, as for `load_teacher`.
        data: As for `list_shards`.
        folder: Directory of the label files.
        settings: Of the predictions.
        engine: `local`, or `ray` for Ray Data.
        workers, device, weights, trust: as for `label_images` and `load_teacher`.
        console: For progress and results.

    Returns:
        Number of images that this process has labeled.

    Raises:
        revnets.SpecError: If teacher or data cannot be used, or the directory has labels that were made otherwise.
        vision.errors.CheckpointError: If the checkpoint of the teacher cannot be used.
        OSError: If a file cannot be written. Finished files remain.
    """
    world = world_of(os.environ)
    console = (console or Console()) if world.is_main else Console(quiet=True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    precision = None
    if engine == "ray":
        from vision.labeling.ray_engine import require_ray

        device, precision = (
            "cpu",
            "bfloat16" if require_ray() else "float32",
        )  # this process only needs the teacher's transform
    teacher = load_teacher(source, device, weights, trust, world)
    images = list_shards(data, settings.shard_size, settings.input_key)
    make_folder(folder)
    queue = WorkQueue(folder, images.shards, provenance_of(teacher, images, settings, precision))
    left, total = queue.images_waiting(), len(images.reader)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    heads = ", ".join(f"{name} ({count} classes)" for name, count in teacher.heads.items())
    say(f"{total} images in {len(images.shards)} shards, {total - left} of them labeled; heads: {heads}")
    for remark in images.reader.remarks:
        say(remark.replace("set data.input_key to", "add --input-key"))
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    started = finished = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=left, rate="")

        def advance(count: int) -> None:
            nonlocal finished
            finished = time.monotonic()
            rate = (bar.tasks[0].completed + count) / max(finished - started, 1e-9)
            bar.update(task, advance=count, rate=f"{rate:.1f} images/s")

        def remain(count: int) -> None:
            bar.update(task, total=bar.tasks[0].completed + count)

        if engine == "ray":
            from vision.labeling.ray_engine import label_with_ray

            load = partial(load_teacher, source, weights=weights, trust=trust)
            done = label_with_ray(load, teacher, images, queue, settings, advance, say)
        else:
            done = label_images(teacher, images, queue, settings, workers, world, advance, remain, say)
    write_origin(folder, source, data, settings.input_key)
    seconds = max(finished - started, 1e-9)  # without waiting for other processes at the end
    if done:
        say(f"labeled {done} images in {seconds:.1f} s: {throughput(done / seconds)}")
    say(f"wrote {folder}")
    return done


def throughput(rate: float) -> str:
    """Describe the throughput of a process, and the days that processes of this speed need for 168 million images."""
    days = LARGE_DATA / rate / 86400
    counts = ", ".join(f"{days / gpus:.3g} on {gpus}" for gpus in (1, 8, 64))
    return f"{rate:.1f} images/s; days for 168 million images by number of processes: {counts}"
