"""The command `revnets label`. Slow imports are deferred until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from revnets.cli.options import Trust
from vision.cli.analyze import WeightsOption
from vision.cli.common import reported


def label(
    teacher: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, the directory of a run (its best one), or a pretrained timm model.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            help="A directory of images at any depth, a tar, or a directory of tars.",
            show_default=False,
            readable=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the label files.", show_default=False)],
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="local: this process; ray: Ray Data, on one machine or a cluster.")
    ] = "local",
    min_probability: Annotated[
        float, typer.Option(min=0, max=0.999, help="Store probabilities above it, and the sum of the others.")
    ] = 0.01,
    round: Annotated[
        int, typer.Option(min=1, help="Round of pseudo-labeling: 2 if the teacher is a student of round 1.")
    ] = 1,
    batch_size: Annotated[int, typer.Option(min=1, max=65536, help="Images per forward pass.")] = 64,
    shard_size: Annotated[int, typer.Option(min=1, help="Images per label file, for a directory.")] = 10_000,
    input_key: Annotated[
        str | None, typer.Option(help="Suffixes of the images to read, such as .png;.webp; by default PNG and JPEG.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Processes that decode images.")] = 0,
    weights: WeightsOption = "auto",
    device: Annotated[str, typer.Option(help="auto: the GPU if there is one.")] = "auto",
    trust: Trust = False,
) -> None:
    """Label images with the predictions of a teacher: soft labels for training.

    Writes one Parquet file per tar, or per 10,000 images of a directory.
    Running the same command again resumes it after an interruption. Any number
    of processes can label together, started at any time:
    torchrun --no-python --nproc-per-node 8 revnets label TEACHER DATA -o FOLDER

    revnets label runs/teacher /data/web -o labels
    revnets label runs/student /data/web -o labels-2 --round 2
    """
    with reported(extra="labels"):
        from vision.labeling.command import label_data
        from vision.labeling.local_engine import LabelSettings

        settings = LabelSettings(min_probability, batch_size, shard_size, input_key, round)
        label_data(teacher, data, output, settings, engine, workers, device, weights, trust)
